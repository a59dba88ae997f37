"""One step of a model: what ``tune`` records and ``precompile`` follows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .plans import Plan, Problem


class Tuner(Protocol):
    """What a backend with a choice of plans has as its ``tuner``."""

    def problems(self, primitive: str, *args: Any, **kwargs: Any) -> list[Problem]:
        """The convolutions of a call for which there is a choice."""
        ...

    def candidates(self, problem: Problem, device: torch.device) -> list[Plan]:
        """The fused plans that are worth a measurement, the default one first."""
        ...

    def call(self, problem: Problem, needed: Collection[str], plan: Plan, device: torch.device) -> Any:
        """A function that solves the problem by the plan; of two gradients those that are needed."""
        ...

    def recording(self, device: torch.device) -> AbstractContextManager[list[Any]]:
        """A context in which meta tensors stand for tensors on ``device`` and launches are listed instead of run."""
        ...

    def compile(self, launches: Iterable[Any], device: torch.device) -> int:
        """Compile each distinct launch for ``device`` in parallel; returns how many there are."""
        ...


def run_step(model: nn.Module, example: tuple[object, ...], keywords: Mapping[str, object]) -> None:
    """A call, of a model in training mode also backward."""
    with torch.set_grad_enabled(model.training):
        result = model(*example, **keywords)
        if model.training:
            outputs = [t for t in tensors_of(result) if t.requires_grad]
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def tensors_of(value: object) -> list[Tensor]:
    """The tensors in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [t for v in values for t in tensors_of(v)]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put gradients, buffers and the random number generators back afterwards."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
