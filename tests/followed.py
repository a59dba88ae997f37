"""A block to be overridden, and how it is compared with its converted twin: in float64, in every mode and over several steps."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres.swap import FusedBlock

C = 6
SHAPE = (3, C, 5, 7)


def draw(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, all gradients and all buffers of one call, drawn from the same random numbers."""
    torch.manual_seed(3)
    random.seed(3)
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.randn(y.shape, dtype=y.dtype))
    found = {"output": y, "input": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach().clone() for k, v in found.items()} | {n: b.clone() for n, b in model.named_buffers()}


def assert_equal(model: nn.Module, twin: nn.Module) -> None:
    """Two steps in training, then one in evaluation."""
    for training in (True, True, False):
        model.train(training), twin.train(training)
        x = draw()
        wanted, found = step(model, x), step(twin, x)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def converted(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, FusedBlock)]


def twins(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = build().double()
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.normal_(norm.weight, 1, 0.3), nn.init.normal_(norm.bias, 0, 0.3)
    return model, fusedres.convert(copy.deepcopy(model))


class Block(nn.Module):
    """A basic block, to be overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(C, C, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.register_buffer("average", torch.zeros(C))
        self.calls, self.kept, self.table = 0, [], {"scale": 1.0}
        self.config = SimpleNamespace(residual=True)

    def body(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


class OfAClass(Block):
    scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) * self.scale + x)
