"""Inference without Python: a model as a package of AOTInductor, and the library with the operators that such a package calls."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from .autograd.operators import inlined
from .backends import select
from .errors import BackendError

_BACKEND = "cpp"


def library_path() -> Path:
    """The shared library that registers the operators ``torch.ops.fusedres_cpp`` when it is loaded: what a program without Python opens
    (``dlopen``), or is linked with, before it loads a package of :func:`export_cpp`. It needs libtorch alone. Raises BackendError where the
    C++ extension was not built."""
    _refuse(torch.device("cpu"))
    from . import _C

    return Path(_C.__file__)


def _refuse(device: torch.device) -> None:
    """Raise BackendError where the extension is not there, or does not serve ``device``."""
    reason = select.why_not(_BACKEND, device, torch.float32)
    if reason is not None:
        raise BackendError(f"what runs without Python is the C++ extension, but {reason}")


def _check(model: nn.Module, args: tuple[Any, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"export_cpp expects a torch.nn.Module, found {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"export_cpp exports inference, but {name or 'the model'} is in training: call model.eval() before"
            )
    tensors = (t for t in (*model.parameters(), *model.buffers(), *tree_leaves(args)) if isinstance(t, Tensor))
    for device in dict.fromkeys((torch.device("cpu"), *(t.device for t in tensors))):
        _refuse(device)


def _with_batch(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` with a batch that an exporter can take for one of any size: a size of 1 it would take for a constant."""
    sizes = {t.shape[0] if t.dim() else None for t in tree_leaves(args) if isinstance(t, Tensor)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            "the first size of every tensor of the example has to be its batch, the same one, or dynamic_batch=False; "
            f"found {', '.join(sorted(map(str, sizes))) or 'no tensor'}"
        )
    return tree_map_only(Tensor, lambda t: torch.cat([t, t]), args) if sizes == {1} else args


def program_of_primitives(
    model: nn.Module, example: Tensor | tuple[Any, ...], *, dynamic_batch: bool = True
) -> ExportedProgram:
    """What :func:`export_cpp` compiles: ``model`` as a program whose fused parts are operators of ``torch.ops.fusedres_cpp``, and all else
    ATen's. Takes and raises what that does."""
    args = example if isinstance(example, tuple) else (example,)
    _check(model, args)
    shapes: Any = None
    if dynamic_batch:
        args = _with_batch(args)
        batch = Dim("batch")
        shapes = tree_map_only(Tensor, lambda _: {0: batch}, args)
    with torch.no_grad(), inlined(select.get(_BACKEND)):
        return torch.export.export(model, args, dynamic_shapes=shapes, strict=False)


def export_cpp(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
) -> Path:
    """Compile the inference of ``model`` into the package ``path`` (``.pt2``), for programs without Python, and return its path.

    ``model``: a converted one on CPU, in evaluation; what of it is not fused is compiled as it is. A program in C++ opens
    :func:`library_path` and loads the package by ``torch::inductor::AOTIModelPackageLoader``; one in Python imports fusedres and calls
    ``torch._inductor.aoti_load_package``. The package holds the weights. It is for the version of torch and the kind of CPU that made it.

    ``example``: the argument of a call, or a tuple of several. What the package is given later has to have the dtypes, the sizes and the
    memory format of these, which it does not check. ``dynamic_batch``: the first size of every tensor is a batch of any size from 1 on;
    without, the example's.

    Raises TypeError where ``model`` is no ``nn.Module``; ValueError where something of it is in training, where the example's tensors share
    no batch, and for another suffix; FileNotFoundError where there is no such folder; BackendError without the C++ extension, and for
    tensors that are not on CPU; and what torch.export raises for a model that it cannot trace.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"a package's name ends in .pt2, found {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    program = program_of_primitives(model, example, dynamic_batch=dynamic_batch)
    with torch.no_grad():
        return Path(torch._inductor.aoti_compile_and_package(program, package_path=str(path)))
