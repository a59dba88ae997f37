"""Small blocks of every shape that is no row, nor two that meet in a sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 8


def unit(c: int, out: int | None = None, k: int = 3, stride: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution, BatchNorm and, with ``act``, a ReLU in place."""
    rest = [nn.ReLU(inplace=True)] if act else []
    return nn.Sequential(nn.Conv2d(c, out or c, k, stride, k // 2, bias=False), nn.BatchNorm2d(out or c), *rest)


class Res2Net(nn.Module):
    """Splits that each read the one before (Gao et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.conv3, self.bn3 = nn.Conv2d(12, C, 1, bias=False), nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        splits = torch.split(self.relu(self.bn1(self.conv1(x))), 4, 1)
        found = []
        y = splits[0]
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            y = splits[i] if i == 0 else y + splits[i]
            y = self.relu(bn(conv(y)))
            found.append(y)
        y = torch.cat([*found, splits[-1]], 1)
        y = self.bn3(self.conv3(y))
        y += x
        return self.relu(y)


class Append(nn.Sequential):
    """A row that appends what each of its modules gives to a list."""

    def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:
        for module in self:
            x = module(x)
            found.append(x)
        return torch.cat(found, dim=1)


class OneShot(nn.Module):
    """One-shot aggregation (Lee et al. 2019), with an attention and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.last = Append(*(unit(C) for _ in range(3))), unit(4 * C, C, 1)
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.middle(x, [x]))
        return x + y * self.attention(y)


class NormActConv(nn.Module):
    """BatchNorm, ReLU and a convolution."""

    def __init__(self, c: int, out: int, k: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(c), nn.Conv2d(c, out, k, padding=k // 2, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x), inplace=True))


class DualPath(nn.Module):
    """A residual and a dense path in one map (Chen et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = NormActConv(C, C + 4)
        self.a, self.b, self.c = NormActConv(C, 6), NormActConv(6, 6, 3, 2), NormActConv(6, C + 2)

    def forward(self, x: Tensor) -> Tensor:
        s = self.project(x)
        y = self.c(self.b(self.a(x)))
        return torch.cat([s[:, :C] + y[:, :C], s[:, C:], y[:, C:]], dim=1)


class Root(nn.Module):
    """A node that aggregates a list of maps (Yu et al. 2018)."""

    def __init__(self, shortcut: bool = True) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.shortcut = (
            nn.Conv2d(2 * C, C, 1), nn.BatchNorm2d(C), nn.ReLU(inplace=True), shortcut
        )  # fmt: skip

    def forward(self, children: list[Tensor]) -> Tensor:
        x = self.bn(self.conv(torch.cat(children, 1)))
        if self.shortcut:
            x += children[0]
        return self.relu(x)


class Optional(nn.Module):
    """A residual block that may be given its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: list[Tensor] | None = None) -> Tensor:
        if shortcut is None:
            shortcut = x
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += shortcut
        return self.relu(y)


class Tree(nn.Module):
    """What such blocks stand in; no block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.left, self.right, self.root = unit(C, act=False), Optional(), Optional(), Root()

    def forward(self, x: Tensor) -> Tensor:
        a = self.left(x, self.project(x))
        return self.root([self.right(a), a])


class Select(nn.Module):
    """Lists of maps in and out (Mehta et al. 2019)."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.conv1, self.conv2, self.conv3 = unit(C), unit(C, k=1), unit(C, 4)
        self.conv4 = unit(C + 4 + (0 if first else C), C, 1)

    def forward(self, x: Tensor | list[Tensor]) -> list[Tensor]:
        if not isinstance(x, list):
            x = [x]
        assert len(x) in [1, 2]
        a = self.conv1(x[0])
        b = self.conv3(self.conv2(a))
        if self.first:
            y = self.conv4(torch.cat([a, b], 1))
            return [y, y]
        return [self.conv4(torch.cat([a, b, x[1]], 1)), x[1]]


class Selects(nn.Module):
    """Two of them, and the sum of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Select(True), Select(False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.second(self.first(x))
        return a + b


class CrossStage(nn.Module):
    """Half of the channels go around (Wang et al. 2019), and every map joins (ELAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.a, self.b, self.leave = unit(C, k=1), unit(4), unit(4), unit(16, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [*self._halves(self.enter(x))]
        found.append(self.a(found[-1]))
        found.append(self.b(found[-1]))
        return self.leave(torch.cat(found, 1))

    @staticmethod
    def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        return a, b


class ThreeBranches(nn.Module):
    """RepVGG's sum (Ding et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.identity, self.one, self.three = nn.BatchNorm2d(C), unit(C, k=1, act=False), unit(C, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x) + self.three(x)
        y += self.identity(x)
        return F.relu(y)


class Shuffle(nn.Module):
    """ShuffleNetV2's unit (Ma et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *unit(4, k=1), nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), *unit(4, k=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        y = torch.cat((a, self.branch(b)), dim=1)
        n, c, h, w = y.size()
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous()
        return y.view(n, c, h, w)


class SeveralSkips(nn.Module):
    """A sum of three maps, one of them from further back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = unit(C), unit(C, act=False), unit(C, act=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = F.relu(self.b(a) + a)
        return F.relu(self.c(b) + a + x)


class ReadTwice(nn.Module):
    """What is in the middle of a row is read beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = unit(C, act=False), unit(C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.b(F.relu(y)), y.mean((2, 3))


class OverwritesShared(nn.Module):
    """A map is overwritten after others have read it; no row reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = unit(C, act=False), unit(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        before = y.exp()
        half = y[:, :4]
        half.mul_(2)
        y.relu_()
        return self.b(torch.cat((before, y), 1))


class OverwritesRead(nn.Module):
    """A map is overwritten that a row has read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = unit(C, act=False), unit(C, act=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.a(x) + self.b(x)
        x.mul_(2)
        return torch.cat((x, y), 1)


class Draws(nn.Module):
    """Random numbers are drawn between and beside what is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = unit(C), unit(C), nn.Dropout2d(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.a(x), 0.2, self.training)
        return torch.cat((self.drop(self.b(y)), y), 1)


#: every shape that is fused, and how many pieces it has
SHAPES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "res2net": (Res2Net, 4),
    "one-shot": (OneShot, 4),
    "dual path": (DualPath, 2),
    "cross stage": (CrossStage, 4),
    "three branches": (ThreeBranches, 2),
    "shuffle": (Shuffle, 1),
    "several skips": (SeveralSkips, 4),
    "read twice": (ReadTwice, 2),
    "overwrites shared": (OverwritesShared, 2),
    "draws": (Draws, 2),
}
