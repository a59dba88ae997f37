"""Models with blocks in a row, their twins that run them one by one, and what may happen to them between two calls."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from converted import small_densenet, small_resnet
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fusedres
from fusedres.backends import tape
from fusedres.blocks import stretch
from fusedres.swap import state_of
from fusedres.testing import randomize

#: runs of one kind of map until all of them are from the recording
WARM = stretch.RUNS_BEFORE + tape.RUNS_BEFORE_RECORDING + 1
#: where gradients are recorded, until all of them are rows
WARM_ROWS = stretch.RUNS_BEFORE + 1


def blocks() -> list[nn.Module]:
    return [BasicBlock(8, 8), BasicBlock(8, 8)]


def row(*behind: nn.Module) -> nn.Sequential:
    """A stem and blocks, and behind them what is not fused, as the features of a DenseNet have a BatchNorm there."""
    stem = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *blocks(), *behind)


class InAForward(nn.Module):
    """Rows that a forward calls one after the other, with code of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), BasicBlock(8, 8))
        self.second = nn.Sequential(Bottleneck(8, 2), Bottleneck(8, 2), BasicBlock(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x.roll(1, 0)).mean((2, 3))


class Gathers(nn.Module):
    """A block that is followed call by call, in pieces that all run fused."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.one(x)).relu()
        y = self.norm2(self.two(x)).relu()
        return (self.norm3(self.three(y)) + x + y).relu()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet": small_resnet,
    "densenet": small_densenet,
    "features": lambda: small_densenet().features,
    "row": row,
    "tail": lambda: row(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "forward": InAForward,
    "general": lambda: row(Gathers(), Gathers()),
}
SHAPE = (2, 3, 32, 40)


def images(*shape: int) -> Tensor:
    return torch.randn(shape or SHAPE)


def model_of(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    randomize(model)
    return fusedres.convert(model, verify=False)


def one_by_one(model: nn.Module) -> nn.Module:
    """A copy that never has a stretch."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        state = state_of(module)
        if state is not None:
            state.stretches = stretch.Stretch(), stretch.Stretch()
            for waits in state.stretches:
                waits._wait = 1 << 30
    return twin


def added_by(run: Callable[[], object], count: list[int]) -> int:
    """What ``run`` adds to a count."""
    before = count[0]
    run()
    return count[0] - before


def training(build: Callable[[], nn.Module] = small_resnet, dtype: torch.dtype = torch.float32) -> nn.Module:
    return model_of(build, dtype).train()


def step(model: nn.Module, x: Tensor) -> Tensor:
    """The output, with gradients left where they belong."""
    for p in model.parameters():
        p.grad = None
    y = model(x)
    y.square().sum().backward()
    return y.detach()


def warm(model: nn.Module, x: Tensor) -> None:
    for _ in range(WARM_ROWS):
        step(model, x)


def assert_same_step(model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """A step of both leaves the same bits everywhere."""
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = step(model, ours), step(twin, theirs)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    assert (ours.grad is None) == (theirs.grad is None)
    assert ours.grad is None or torch.equal(ours.grad, theirs.grad) and ours.grad.stride() == theirs.grad.stride()
    assert_same_state(model, twin)


def assert_same_state(model: nn.Module, twin: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name


def _own_forward(model: nn.Module) -> None:
    model.layer2[0].forward = lambda x: x.new_ones(x.shape[0], 32, x.shape[2] // 2, x.shape[3] // 2)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a weight in place": lambda m: m.layer1[0].conv1.weight.mul_(1.5),
    "a weight's data": lambda m: setattr(m.layer1[0].conv1.weight, "data", torch.randn_like(m.layer1[0].conv1.weight)),
    "another weight": lambda m: setattr(
        m.layer1[0].conv1, "weight", nn.Parameter(torch.randn_like(m.layer1[0].conv1.weight))
    ),
    "running statistics": lambda m: m.layer2[0].bn1.running_mean.add_(1.0),
    "eps": lambda m: setattr(m.layer1[0].bn1, "eps", 0.5),
    "a child": lambda m: setattr(m.layer1[0], "relu", nn.Sigmoid()),
    "another block": lambda m: setattr(m.layer2, "1", nn.Identity()),
    "a block's mode": lambda m: m.layer1[0].train(),
    "a batchnorm's mode": lambda m: m.layer2[0].bn2.train(),
    "its own forward": _own_forward,
    "a hook": lambda m: m.layer2[0].register_forward_hook(lambda module, args, y: y + 1.0),
    "a hook inside": lambda m: m.layer2[0].bn1.register_forward_hook(lambda module, args, y: y + 1.0),
    "the stem": lambda m: setattr(m.bn1, "eps", 0.5),
    "reverted": lambda m: fusedres.revert(m),
    "a state dict": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}),
}
