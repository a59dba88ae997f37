"""What tests of tapes share: blocks, everything that their steps make, and the same without tapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.backends.contract import Backend
from fusedres.testing import randomize


def in_python(backend: type[Backend], run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What ``run`` gives where no schedule of the ``backend`` has a tape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "run_schedule", Backend.run_schedule)
        return run()


def steps(block: nn.Module, maps: list[Tensor], training: bool) -> list[Tensor]:
    """Everything that so many steps make: outputs, gradients, running statistics."""
    found = []
    for x in maps:
        x = x.clone().requires_grad_(training)
        with torch.set_grad_enabled(training):
            y = block(x)
        found.append(y.detach())
        if training:
            block.zero_grad()
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
            found += [x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]
            found += [b.clone() for b in block.buffers()]
    return found


def drawn(build: Callable[[], nn.Module], training: bool, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    block = build().to(dtype).train(training)
    randomize(block)
    return fusedres.convert(block, verify=False, **options)


def row(groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def assert_same(ours: list[Tensor], plain: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
        assert torch.equal(a, b) and a.stride() == b.stride(), f"result {i} is not that of the schedule in Python"
