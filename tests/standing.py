"""Models that call as they stand what is not fused, between what is, and what may happen to that between two calls."""

from __future__ import annotations

from collections.abc import Callable

import general_blocks
import torch
import torch.nn.functional as F
from stretched import row
from support import Counts
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.shufflenetv2 import InvertedResidual as Shuffled
from torchvision.ops import SqueezeExcitation

SCALE = 2.0


class Gate(nn.Module):
    """Weighs the channels, by a parameter and constants of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.steps = nn.Conv2d(8, 8, 1), 2

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = x * torch.sigmoid(self.conv(x.mean((2, 3), keepdim=True))) / SCALE
        return x


class Weighed(nn.Module):
    """A residual block with ``inside`` between what is fused."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inside = inside
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Branches(nn.Module):
    """Paths side by side, one of them a pool (Szegedy et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (general_blocks.unit(8, 4, k) for k in (1, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([self.one(x), self.two(x), self.three(pooled)[:, ::2], F.avg_pool2d(x, 3, 1, 1)[:, :2]], 1)


class Sums(nn.Module):
    """Adds what no piece takes over."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = general_blocks.unit(8), general_blocks.unit(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(y + x.mean((2, 3), keepdim=True)) + torch.sigmoid(y)


class Layer(nn.Module):
    """A dense layer with an activation behind it, which keeps it out of the buffer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, F.gelu(self.conv2(F.relu(self.norm2(y))))], 1)


def squeeze() -> nn.Module:
    return SqueezeExcitation(8, 4, scale_activation=nn.Hardsigmoid)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "squeeze": lambda: row(Weighed(squeeze())),
    "gate": lambda: row(Weighed(Gate())),
    "shuffle": lambda: row(Shuffled(8, 16, 2), Shuffled(16, 16, 1)),
    "branches": lambda: row(Branches(), nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)),
    "sums": lambda: row(Sums()),
    "around": lambda: row(InvertedResidual(8, 12, 1, 2), nn.Hardswish(), nn.Dropout(0.5)),
    "pools": lambda: row(nn.AdaptiveAvgPool2d(4), nn.GroupNorm(2, 8), nn.Upsample(scale_factor=2), nn.MaxPool2d(2)),
    "norm": lambda: row(nn.BatchNorm2d(8), nn.GELU()),
    "layers in pieces": lambda: row(nn.Sequential(Layer(8), Layer(12)), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)),
}


def doubles(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
    return y * 2.0


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a weight in place": lambda m: m[5].inside.conv.bias.sub_(6.0),
    "another weight": lambda m: setattr(m[5].inside.conv, "bias", nn.Parameter(torch.full((8,), -3.0))),
    "a constant": lambda m: setattr(m[5].inside, "steps", 3),
    "a child": lambda m: setattr(m[5].inside, "conv", nn.Identity()),
    "its own forward": lambda m: setattr(m[5].inside, "forward", lambda x: x * 0.5),
    "a hook": lambda m: m[5].inside.register_forward_hook(doubles),
    "a hook inside": lambda m: m[5].inside.conv.register_forward_hook(lambda module, args, y: y - 4.0),
    "another module": lambda m: setattr(m[5], "inside", nn.Sigmoid()),
    "one that counts": lambda m: setattr(m[5], "inside", Counts()),
    "padding": lambda m: setattr(m[5].inside.conv, "padding", (1, 1)),
}
