"""What the report says of blocks that have run: routes, bytes, three dimensions, and its advice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from converted import (
    FUSED,
    SHAPE,
    Block,
    assert_same_step,
    draw,
    one_fused_backend,
    pair,
)
from torch import Tensor, nn
from torchvision.models import resnet

import fusedres
from fusedres.testing import assert_fused


@pytest.fixture(autouse=True)
def fused_backend() -> Iterator[None]:
    with one_fused_backend():
        yield


class Volume(nn.Module):
    """A DenseNet of three dimensions."""

    def __init__(self) -> None:
        super().__init__()

        def layer(channels: int) -> nn.Module:
            class Layer3d(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.norm, self.conv = nn.BatchNorm3d(channels), nn.Conv3d(channels, 4, 3, padding=1)

                def forward(self, x: Tensor) -> Tensor:
                    return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)

            return Layer3d()

        self.first = nn.Conv3d(1, 8, 3, padding=1)
        self.dense = nn.Sequential(layer(8), layer(12))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(self.first(x)).mean((2, 3, 4)))


def test_a_report_of_three_dimensions_behind_a_training_step():
    plain, model = pair(Volume)
    assert_same_step(model, plain, draw((2, 1, 6, 6, 6)))
    assert_fused(model, FUSED)
    (row,) = fusedres.report(model)
    assert row.fused and row.kept > 0 and row.eager_kept > row.kept


def test_a_report_tells_which_way_each_convolution_went():
    if FUSED != "cpp":
        pytest.skip("the plain primitives have no choice")
    model = fusedres.convert(resnet.BasicBlock(16, 16))
    model(torch.randn(2, 16, 8, 8))
    (row,) = fusedres.report(model)
    assert [name for name, _ in row.routes] == ["conv1", "conv2"]
    assert {route for _, route in row.routes} <= {"fused", "library"}


def test_a_report_advises_channels_last():
    model = fusedres.convert(nn.Sequential(Block(), nn.Dropout(0.1)))
    model(torch.randn(SHAPE))
    assert "channels_last" in str(fusedres.report(model))
    model.to(memory_format=torch.channels_last)(torch.randn(SHAPE).to(memory_format=torch.channels_last))
    assert "channels_last" not in str(fusedres.report(model))
