"""What a study is, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from matplotlib.figure import Figure
from torch import nn

from .. import training
from ..data import Images
from ..training import Epoch, Recipe

#: is told the name of every step as that begins
Advance = Callable[[str], None]
#: what a study has found, as JSON holds it
Result = dict[str, Any]


class Preset(Protocol):
    """A frozen dataclass of what a study's runs depend on."""

    __dataclass_fields__: Any


P = TypeVar("P", bound=Preset)
NAMES = ("toy", "quick", "full")


@dataclass(frozen=True)
class Study(Generic[P]):
    """One claim of a paper, run.

    ``presets`` has a ``toy`` (seconds, for tests), a ``quick`` (a minute or two on a laptop) and a ``full`` form; ``networks`` are all that
    it trains or measures, by name; ``steps`` says how often ``run`` will call its ``advance``. ``plot`` and ``sentences`` read the result
    alone, also where it comes from a file.
    """

    title: str
    paper: str
    presets: Mapping[str, P]
    networks: Callable[[P, Images], dict[str, Callable[[], nn.Module]]]
    steps: Callable[[P], int]
    run: Callable[[P, Images, Advance], Result]
    plot: Callable[[Result], Figure]
    sentences: Callable[[Result], tuple[str, str, str]]


def trained(
    build: Callable[[], nn.Module], images: Images, recipe: Recipe, seed: int, advance: Callable[[], None]
) -> tuple[nn.Module, list[Epoch]]:
    """A network of this ``seed`` when it has been trained, and its epochs. Raises RuntimeError where a block of it did not run fused."""
    torch.manual_seed(seed)
    model = build()
    epochs = []
    for epoch in training.train(model, images, recipe, torch.Generator().manual_seed(seed), fused=True):
        epochs.append(epoch)
        advance()
    return model, epochs


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
