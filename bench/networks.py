"""Small networks of kinds that torchvision has none of, for :mod:`bench.sweep`: where a fused block is small, or its convolutions are
grouped, so that it gains least. Each as its paper draws it, with a classifier behind a mean over the map, random weights; the last two
are timm's.

``condensenet``   Huang et al. 2017, CondenseNet, arXiv 1711.09224: dense layers whose 1x1 and 3x3 are grouped, as after condensing
``msdnet``        Huang et al. 2017, MSDNet, arXiv 1703.09844: dense layers over several scales, each concatenating what it reads
``fc_densenet``   Jegou et al. 2016, The One Hundred Layers Tiramisu, arXiv 1611.09326: dense layers of one 3x3, down and up again
``dpn68``         Chen et al. 2017, Dual Path Networks, arXiv 1707.01629: a sum and a concatenation around narrow groups
``ese_vovnet19b_dw``  Lee and Park 2019, CenterMask, arXiv 1911.06667: one concatenation behind rows of depthwise convolutions
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES = 1000


class Classifier(nn.Sequential):
    """``features``, a mean over the map, and a linear layer."""

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def _row(before: int, behind: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(before, behind, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(behind), nn.ReLU(inplace=True)]


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a convolution, twice with a bottleneck of ``bottleneck`` times ``growth``, beside what it reads."""

    def __init__(self, channels: int, growth: int, bottleneck: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.bottleneck = bool(bottleneck)
        if self.bottleneck:
            self.norm1 = nn.BatchNorm2d(channels)
            self.conv1 = nn.Conv2d(channels, bottleneck * growth, 1, groups=groups, bias=False)
            channels = bottleneck * growth
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, growth, 3, padding=1, groups=groups, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """What was read, and what the layer adds."""
        y = x
        if self.bottleneck:
            y = self.conv1(self.relu(self.norm1(y)))
        return torch.cat([x, self.conv2(self.relu(self.norm2(y)))], 1)


def condensenet() -> nn.Module:
    """Three stages of eight layers, growth 8, 16 and 32, four groups."""
    channels, count = 16, 8
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1, bias=False)]
    for stage, growth in enumerate((8, 16, 32)):
        if stage:
            layers.append(nn.AvgPool2d(2))
        stacked = (DenseLayer(channels + i * growth, growth, bottleneck=4, groups=4) for i in range(count))
        layers.append(nn.Sequential(*stacked))
        channels += count * growth
    return Classifier(nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)), channels)


class MultiScaleLayer(nn.Module):
    """At every scale a bottleneck and a 3x3 of the scale's map and, but for the finest, a strided 3x3 of the next finer one, beside what
    the scale holds already."""

    def __init__(self, channels: list[int], growth: list[int]) -> None:
        super().__init__()
        self.same = nn.ModuleList(
            nn.Sequential(*_row(c, 4 * g, 1), *_row(4 * g, g if not i else g // 2, 3))
            for i, (c, g) in enumerate(zip(channels, growth, strict=True))
        )
        self.finer = nn.ModuleList(
            nn.Sequential(*_row(c, 4 * g, 1), *_row(4 * g, g - g // 2, 3, stride=2))
            for c, g in zip(channels[:-1], growth[1:], strict=True)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The maps of all scales, the finest first."""
        found = [torch.cat([maps[0], self.same[0](maps[0])], 1)]
        for i, finer in enumerate(self.finer):
            found.append(torch.cat([maps[i + 1], finer(maps[i]), self.same[i + 1](maps[i + 1])], 1))
        return found


class MultiScale(nn.Module):
    """Three scales, six layers; the coarsest scale's map."""

    def __init__(self) -> None:
        super().__init__()
        channels, growth = [16, 32, 64], [8, 16, 32]
        sizes = [3, *channels]
        self.first = nn.ModuleList(
            nn.Sequential(*_row(sizes[i], channels[i], 3, 1 if i == 0 else 2)) for i in range(len(channels))
        )
        self.layers = nn.ModuleList()
        for _ in range(6):
            self.layers.append(MultiScaleLayer(channels, growth))
            channels = [c + g for c, g in zip(channels, growth, strict=True)]
        self.channels = channels[-1]

    def forward(self, x: Tensor) -> Tensor:
        """The coarsest map."""
        maps = []
        for first in self.first:
            x = first(x)
            maps.append(x)
        for layer in self.layers:
            maps = layer(maps)
        return maps[-1]


def msdnet() -> nn.Module:
    """Three scales, six layers, classified from the coarsest."""
    features = MultiScale()
    return Classifier(features, features.channels)


class _Tiramisu(nn.Module):
    """Down through dense blocks and pools, up through transposed convolutions, with what was left at each size beside it."""

    def __init__(self, growth: int = 12, layers: int = 4, depth: int = 3) -> None:
        super().__init__()
        channels, kept = 48, []
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.down, self.pools, self.up, self.wider = (nn.ModuleList() for _ in range(4))
        for _ in range(depth):
            self.down.append(self._block(channels, growth, layers))
            channels += growth * layers
            kept.append(channels)
            norm = nn.BatchNorm2d(channels)
            self.pools.append(
                nn.Sequential(norm, nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1), nn.MaxPool2d(2))
            )
        self.bottom = self._block(channels, growth, layers)
        channels += growth * layers
        for beside in reversed(kept):
            added = growth * layers
            self.wider.append(nn.ConvTranspose2d(channels, added, 2, 2))
            self.up.append(self._block(added + beside, growth, layers))
            channels = added + beside + growth * layers
        self.channels = channels

    @staticmethod
    def _block(channels: int, growth: int, layers: int) -> nn.Sequential:
        return nn.Sequential(*(DenseLayer(channels + i * growth, growth) for i in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        """A map of the input's size."""
        x, kept = self.first(x), []
        for block, pool in zip(self.down, self.pools, strict=True):
            x = block(x)
            kept.append(x)
            x = pool(x)
        x = self.bottom(x)
        for wider, block in zip(self.wider, self.up, strict=True):
            x = block(torch.cat([wider(x), kept.pop()], 1))
        return x


def fc_densenet() -> nn.Module:
    """Three sizes down and up, blocks of four layers, growth 12."""
    features = _Tiramisu()
    return Classifier(features, features.channels)


def of_timm(name: str) -> nn.Module:
    """The model of timm with that name."""
    import timm

    return timm.create_model(name, pretrained=False)


DRAWN: dict[str, Callable[[], nn.Module]] = {
    "condensenet": condensenet,
    "msdnet": msdnet,
    "fc_densenet": fc_densenet,
}
OF_TIMM = ("dpn68", "ese_vovnet19b_dw")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **DRAWN,
    **{name: functools.partial(of_timm, name) for name in OF_TIMM},
}
