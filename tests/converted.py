"""Blocks, rows and networks of many kinds, each plain and converted, for tests that a converted module behaves as the module it was. The
right value is that of an unconverted copy, in eager."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from narrow import ResNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres.swap import FusedBlock, original_class, state_of
from fusedres.testing import assert_parity, randomize, run_training

torchvision = pytest.importorskip("torchvision")
from torchvision.models import DenseNet, densenet, resnet  # noqa: E402

FUSED = "eager" if fusedres.backends()["cpp"] != "available" else "cpp"
DTYPE = torch.float64


@contextlib.contextmanager
def one_fused_backend() -> Iterator[None]:
    """The compiled backend, or eager's primitives where there is no extension: never the original modules."""
    torch.manual_seed(0)
    with fusedres.use_backend(None if FUSED == "cpp" else FUSED):
        yield


class Block(nn.Module):
    """A basic block whose input is not called x."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, inputs: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(self.bn2(self.conv2(h)) + inputs)


class Sum(Block):
    """The same without an activation behind the addition, whose output eager would keep."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(inputs))))) + inputs


class PreAct(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x)))))) + x


class Flipped(Block):
    """A block whose shortcut is the first operand of its sum."""

    def forward(self, inputs: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(inputs + self.bn2(self.conv2(h)))


class Split(Block):
    """A block in several parts, whose last is the sum alone."""

    def forward(self, inputs: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(F.avg_pool2d(self.bn2(self.conv2(h)), 3, 1, 1) + inputs)


class RowWithSum(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


class Layer(nn.Module):
    """A dense layer that puts its channels behind its input's."""

    def __init__(self, channels: int, growth: int = 4) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


def conv_row() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def dense_block() -> nn.Module:
    return densenet._DenseBlock(2, 8, 2, 4, 0.0)


def small_densenet() -> DenseNet:
    return DenseNet(8, (2, 2), 12, bn_size=2, num_classes=5)


def small_resnet() -> ResNet:
    return ResNet(resnet.BasicBlock, [1, 2, 1, 1])


KINDS: dict[str, Callable[[], nn.Module]] = {
    "residual": Block,
    "flipped": Flipped,
    "split": Split,
    "projection": lambda: resnet.BasicBlock(
        8, 12, 2, nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    ),
    "pre-activation": PreAct,
    "row": conv_row,
    "dense": dense_block,
    "dense-row": lambda: nn.Sequential(Layer(8), Layer(12)),
    "transition": lambda: densenet._Transition(8, 4),
    "own": lambda: fusedres.nn.BasicBlock(8, 8),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
SHAPE = (3, 8, 6, 6)
NETWORKS = {"resnet": small_resnet, "densenet": small_densenet}
each_network = pytest.mark.parametrize("name", NETWORKS)


def pair(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A plain module in float64 and its converted twin. What is fused from the start is compared with its plain class."""
    plain = build().to(DTYPE)
    randomize(plain)
    model = fusedres.convert(copy.deepcopy(plain))
    for m in plain.modules():
        m.__dict__.pop("_fusedres", None)
        m.__class__ = original_class(m)
    return plain, model


def draw(shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)


def images(*shape: int) -> Tensor:
    return draw(shape or (2, 3, 48, 48))


def assert_same_step(
    model: nn.Module, plain: nn.Module, x: Tensor, forward: Callable[[nn.Module, Tensor], Tensor] | None = None
) -> None:
    """Assert that a training step of both gives the same output, gradients and buffers."""
    call = forward or (lambda m, x: m(x))

    class Called(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return call(self.inner, x)

    ours, theirs = (run_training(Called(m), x) for m in (model, plain))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.is_floating_point():
            assert_parity(value, theirs[name], theirs[name], name)
        else:
            assert torch.equal(value, theirs[name]), name


def assert_nothing_fused(model: nn.Module) -> None:
    assert not any(isinstance(m, FusedBlock) and state_of(m) is not None for m in model.modules())


class Copies(TorchDispatchMode):
    """The operators that copy whole maps."""

    NAMES = ("aten.clone.", "aten.copy_.", "aten._to_copy.", "aten.cat.")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (
            str(func).startswith(self.NAMES)
            and isinstance(result, Tensor)
            and result.dim() == 4
            and min(result.shape[2:]) > 1
        ):
            self.found.append(str(func))
        return result
