"""How right a whole network is: its error against eager in float64, compared with eager's own error in the network's dtype.

The rule is that of every test (:mod:`fusedres.testing.parity`): at most twice eager's own error. What stands in its way in a deep network
is ReLU: an activation within rounding of zero may pass in one run and not in the other, which moves the gradients of everything before it
by far more than rounding does. Whether a run is struck, and in which tensors, is chance, in eager as in a contender. So eager is run
several times on images that differ by less than their own rounding, its error is that of its worst run, and the rule is applied

1. to all tensors of a group (the output, the gradients, the running statistics) concatenated;
2. to the typical tensor, the median over the group's tensors;
3. to every tensor, with eager's worst tensor as the measure: no tensor may be struck harder than twice what eager shows.

The contender's errors are medians over a few draws (batches); all are relative, in the 2-norm.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..accuracy import allowance, error, holds

#: how often eager runs on every draw
EAGER_RUNS = 4
Tensors = dict[str, Tensor]
Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Group:
    """The comparison of a group of tensors: together, the typical and the worst one; ``error`` is the contender's."""

    name: str
    tensors: int
    error: float
    eager_error: float
    typical_error: float
    eager_typical_error: float
    worst_tensor: str
    worst_error: float
    eager_worst_error: float
    allowance: float

    @property
    def passed(self) -> bool:
        """Whether the rule holds in all three forms."""
        pairs = (
            (self.error, self.eager_error),
            (self.typical_error, self.eager_typical_error),
            (self.worst_error, self.eager_worst_error),
        )
        return all(holds(mine, eager, self.allowance) for mine, eager in pairs)

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.tensors}): error {self.error:.2e}, eager's own {self.eager_error:.2e}; "
            f"worst {self.worst_tensor} {self.worst_error:.2e}, eager's {self.eager_worst_error:.2e}"
        )


@dataclass(frozen=True)
class Errors:
    """The errors of one run in a group: of everything together and of every tensor."""

    together: float
    each: dict[str, float]

    @staticmethod
    def of(values: Tensors, truth: Tensors) -> Errors:
        """Those of ``values``."""
        found, wanted = (torch.cat([side[key].double().flatten() for key in truth]) for side in (values, truth))
        together = error(found, wanted)
        return Errors(together[0], {key: error(values[key], truth[key])[0] for key in truth})

    @property
    def typical(self) -> float:
        """The median over the tensors."""
        return statistics.median(self.each.values())

    @property
    def worst(self) -> float:
        """The largest of a tensor."""
        return max(self.each.values())


def judge(name: str, ours: Sequence[Errors], eager: Sequence[Errors], dtype: torch.dtype) -> Group:
    """Apply the rule to a contender's runs, one per draw, and all of eager's."""
    each = {key: statistics.median(run.each[key] for run in ours) for key in ours[0].each}
    worst, worst_error = max(each.items(), key=lambda item: item[1])
    return Group(
        name=name,
        tensors=len(each),
        error=statistics.median(run.together for run in ours),
        eager_error=max(run.together for run in eager),
        typical_error=statistics.median(run.typical for run in ours),
        eager_typical_error=max(run.typical for run in eager),
        worst_tensor=worst,
        worst_error=worst_error,
        eager_worst_error=max(run.worst for run in eager),
        allowance=allowance(dtype),
    )


def _step(model: nn.Module, x: Tensor, labels: Tensor | None, autocast: Autocast = nullcontext) -> dict[str, Tensors]:
    """What a step computes, by group: a training step where there are labels, else the output alone."""
    with torch.set_grad_enabled(labels is not None), autocast():
        output = model(x)
        loss = None if labels is None else F.cross_entropy(output, labels)
    found = {"output": {"output": output.detach()}}
    if loss is not None:
        loss.backward()
        # a gradient that is missing counts as zero, so that it fails by its name
        found["gradients"] = {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
        }
        found["running statistics"] = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    return found


def measure(
    base: nn.Module,
    convert: Callable[[nn.Module], nn.Module],
    draws: Sequence[tuple[Tensor, Tensor | None]],
    autocast: Autocast = nullcontext,
    dtype: torch.dtype | None = None,
) -> list[Group]:
    """Compare ``convert`` of a copy of ``base``, a classifier, with ``base`` itself, over draws of (images, labels or None): a training
    step under cross entropy where there are labels, else an inference.

    ``base`` keeps its state. The truth is ``base`` in float64 on the same numbers. ``dtype`` is that of the rounding, where autocast makes
    it another than the images'.
    """
    dtype = dtype or draws[0][0].dtype
    half_rounding = torch.finfo(dtype).eps / 2
    ours: dict[str, list[Errors]] = {}
    eager: dict[str, list[Errors]] = {}
    for x, labels in draws:
        truth = _step(copy.deepcopy(base).double(), x.double(), labels)
        generator = torch.Generator(x.device).manual_seed(0)
        for run in range(EAGER_RUNS):
            noise = torch.empty_like(x, dtype=torch.float64).uniform_(-1, 1, generator=generator) * half_rounding
            images = x if run == 0 else (x * (1 + noise)).to(x.dtype)
            for name, found in _step(copy.deepcopy(base), images, labels, autocast).items():
                eager.setdefault(name, []).append(Errors.of(found, truth[name]))
        for name, found in _step(convert(copy.deepcopy(base)), x, labels, autocast).items():
            ours.setdefault(name, []).append(Errors.of(found, truth[name]))
    return [judge(name, ours[name], eager[name], dtype) for name in ours]
