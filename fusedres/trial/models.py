"""From what a user types to a model."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

#: how a model is named on the command line
FORMS = "torchvision:NAME, timm:NAME, package.module:NAME or path/to/file.py:NAME"


class TrialError(Exception):
    """What is wrong with the question, in one sentence."""


def load_model(name: str, weights: str | None = None) -> nn.Module:
    """The model that ``name`` names (:data:`FORMS`; NAME in a module or file is an ``nn.Module``, or what gives one without arguments).

    ``weights``: a file with a state_dict; for torchvision also a name of its weights (``DEFAULT``), for timm ``pretrained``. Raises
    TrialError where there is no such model, or it cannot be made.
    """
    where, _, what = name.rpartition(":")
    if not where or not what:
        raise TrialError(f"the model {name!r} is not understood: expected {FORMS}")
    from_file = weights is not None and Path(weights).is_file()
    named = None if from_file else weights
    if where == "torchvision":
        model = _made(name, lambda: _library("torchvision.models", "torchvision").get_model(what, weights=named))
    elif where == "timm":
        if named not in (None, "pretrained"):
            raise TrialError(f"weights of a model of timm are a file or 'pretrained', found {named!r}")
        model = _made(name, lambda: _library("timm", "timm").create_model(what, pretrained=named is not None))
    elif named is not None:
        raise TrialError(f"there is no file {named!r} with weights")
    else:
        found = _found(where, what)
        model = found if isinstance(found, nn.Module) else _made(name, found)
    if not isinstance(model, nn.Module):
        raise TrialError(f"{name} gives a {type(model).__name__}, not a torch.nn.Module")
    if from_file and weights is not None:
        _made(f"weights {weights}", lambda: model.load_state_dict(torch.load(weights, weights_only=True)))
    return model


def input_channels_and_size(model: nn.Module) -> tuple[int, tuple[int, ...]]:
    """``(channels, spatial size)`` of the images that a model says it is made for, as timm's do; 3 and 224 x 224 for others."""
    config = getattr(model, "default_cfg", None)
    shape = config.get("input_size", (3, 224, 224)) if isinstance(config, dict) else (3, 224, 224)
    return shape[0], tuple(shape[1:])


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrialError(f"{package} cannot be imported ({error}): type pip install {package}") from None


def _found(where: str, what: str) -> Any:
    """The object ``what`` of a module or of a file."""
    path = Path(where)
    module = _of_file(path) if path.suffix == ".py" else _of_package(where)
    try:
        found = getattr(module, what)
    except AttributeError:
        raise TrialError(f"{where} has no {what!r}") from None
    if not callable(found):
        raise TrialError(f"{where}:{what} is a {type(found).__name__}, neither a model nor a function that gives one")
    return found


def _of_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise TrialError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where its classes say that they come from
    _made(f"the file {path}", lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    return module


def _of_package(name: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder that the user stands in, as with python -c
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrialError(f"the module {name} cannot be imported: {error}") from None


def _made(what: str, make: Callable[[], Any]) -> Any:
    """``make()``; whatever somebody else's code raises is a TrialError that says so."""
    try:
        return make()
    except TrialError:
        raise
    except Exception as error:
        raise TrialError(f"{what} fails: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")
