"""Whole networks from the blocks of ``fusedres.nn`` alone: a CIFAR ResNet with option A's shortcuts, its plain and highway counterparts,
and a dense network at any growth rate and compression, with and without bottlenecks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.backends import select
from fusedres.nn import BasicBlock, ConvBNAct, DenseBlock, HighwayBlock, PlainBlock, Transition
from fusedres.swap import original_class
from fusedres.testing import assert_fused, run_training


def option_a(inplanes: int, planes: int, stride: int) -> nn.Module | None:
    if stride == 1 and inplanes == planes:
        return None
    more = planes - inplanes
    return nn.Sequential(nn.AvgPool2d(1, stride), nn.ZeroPad3d((0, 0, 0, 0, more // 2, more - more // 2)))


class Head(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def cifar(kind: str) -> nn.Sequential:
    layers: list[nn.Module] = [ConvBNAct(3, 4)]
    planes = 4
    for i in range(3):
        out, stride = 4 * 2**i, 1 if i == 0 else 2
        if kind == "residual":
            layers.append(BasicBlock(planes, out, stride, option_a(planes, out, stride)))
        elif kind == "plain":
            layers.append(PlainBlock(planes, out, stride))
        else:
            layers += [ConvBNAct(planes, out, 3, stride), HighwayBlock(out)]
        planes = out
    return nn.Sequential(*layers, Head(planes))


def dense(growth: int, compression: float, bottleneck: int = 4, blocks: tuple[int, ...] = (2, 3)) -> nn.Sequential:
    channels = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for i, count in enumerate(blocks):
        layers.append(DenseBlock(count, channels, bottleneck, growth, 0.0))
        channels += count * growth
        if i + 1 < len(blocks):
            layers.append(Transition(channels, int(channels * compression)))
            channels = int(channels * compression)
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), Head(channels))


NETWORKS = {
    "resnet-option-a": lambda: cifar("residual"),
    "plain": lambda: cifar("plain"),
    "highway": lambda: cifar("highway"),
    "densenet-k3": lambda: dense(3, 0.5),
    "densenet-k5-uncompressed": lambda: dense(5, 1.0),
    "densenet-k4-narrow": lambda: dense(4, 0.3, bottleneck=1, blocks=(1, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_the_blocks_trains_as_its_plain_modules(name):
    if select.why_not("cpp", torch.device("cpu"), torch.float64) is not None:
        pytest.skip("cpp is not there")
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__class__ = original_class(module)
    x = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    with fusedres.use_backend("cpp"):
        found = run_training(model, x)
    assert_fused(model, "cpp")
    wanted: dict[str, Tensor] = run_training(twin, x)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], msg=lambda m, key=key: f"{key}: {m}")
