"""torchvision's ResNets in a few channels: what the tests say of a network holds in any width."""

from __future__ import annotations

import pytest
from torch import nn

resnet = pytest.importorskip("torchvision.models.resnet")


class ResNet(resnet.ResNet):
    """A ResNet whose stages have a quarter of the channels: 16, 32, 64 and 128."""

    def __init__(self, block: type[nn.Module], layers: list[int], num_classes: int = 5, **options: object) -> None:
        super().__init__(block, layers, num_classes, **options)
        self.fc = nn.Linear(128 * block.expansion, num_classes)

    def _make_layer(self, block: type[nn.Module], planes: int, *arguments: object, **options: object) -> nn.Sequential:
        return super()._make_layer(block, planes // 4, *arguments, **options)
