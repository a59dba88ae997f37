"""The networks of the studies, of the blocks of :mod:`fusedres.nn`: a stem, three stages of blocks, a classifier.

A residual network of depth 6 n + 2 has n blocks of two 3x3 convolutions in each stage, as He et al. 2015 draw it for CIFAR-10; stages
double the width and halve the map. The other kinds have as many layers in as many stages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fusedres
from fusedres.nn import (
    BasicBlock,
    Bottleneck,
    ConvBNAct,
    DenseBlock,
    HighwayBlock,
    PlainBlock,
    PreActBasicBlock,
    Transition,
)

from ..data import CLASSES

STAGES = 3


@dataclass(frozen=True)
class Part:
    """A block of a network. ``shortcut``: what is left of it where its convolutions are taken out, None where nothing is. ``layers``: its
    layers, where it is more than one residual function: those of a dense block. ``same``: its input and its output have one size."""

    block: nn.Module
    shortcut: nn.Module | None = None
    layers: tuple[nn.Module, ...] = ()
    same: bool = False


#: channels before, width, stride -> the block
Builder = Callable[[int, int, int], Part]


class Network(nn.Sequential):
    """``stem``, ``blocks`` and ``head``; ``shortcuts``, ``layers`` and ``same`` are those of every :class:`Part`."""

    def __init__(self, stem: nn.Module, parts: Sequence[Part], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*(part.block for part in parts))
        self.head = head
        # not registered: a shortcut's parameters are its block's
        self.shortcuts = tuple(part.shortcut for part in parts)
        self.layers = tuple(part.layers for part in parts)
        self.same = tuple(part.same for part in parts)

    def units(self) -> list[nn.Module]:
        """Blocks and, in place of a dense block, its layers, from the first to the last."""
        return [unit for block, layers in zip(self.blocks, self.layers, strict=True) for unit in layers or (block,)]

    def states(self, x: Tensor) -> list[Tensor]:
        """The maps in front of every block and behind the last."""
        found = [self.stem(x)]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found


def option_a(before: int, width: int, stride: int) -> nn.Module | None:
    """He et al.'s shortcut without parameters: every other pixel, and channels of zeros; None where it is the identity."""
    if (before, stride) == (width, 1):
        return None
    front = (width - before) // 2
    return nn.Sequential(nn.AvgPool2d(1, stride), nn.ZeroPad3d((0, 0, 0, 0, front, width - before - front)))


def projection(before: int, width: int, stride: int) -> nn.Sequential:
    """A 1x1 convolution and BatchNorm."""
    return nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))


def plain(before: int, width: int, stride: int) -> Part:
    """Two convolutions and no shortcut. Where sizes agree, the next block can read what this one would."""
    same = (before, stride) == (width, 1)
    return Part(PlainBlock(before, width, stride), nn.Identity() if same else None, same=same)


def residual(before: int, width: int, stride: int) -> Part:
    """The basic block, option A."""
    shortcut = option_a(before, width, stride)
    return Part(BasicBlock(before, width, stride, shortcut), shortcut or nn.Identity(), same=shortcut is None)


def bottleneck(before: int, width: int, stride: int) -> Part:
    """The bottleneck, four times as wide outside as inside; projections where the size changes."""
    same = (before, stride) == (4 * width, 1)
    shortcut = None if same else projection(before, 4 * width, stride)
    return Part(Bottleneck(before, width, stride, shortcut), shortcut or nn.Identity(), same=same)


def preact(before: int, width: int, stride: int) -> Part:
    """The pre-activation block: a sum with nothing behind it. Where the size changes, option A of the activated input."""
    shortcut = option_a(before, width, stride)
    block = PreActBasicBlock(before, width, stride, shortcut)
    skip = nn.Identity() if shortcut is None else nn.Sequential(block.bn1, block.relu, shortcut)
    return Part(block, skip, same=shortcut is None)


def highway(before: int, width: int, stride: int) -> Part:
    """A highway block; where the size changes, a convolution."""
    same = (before, stride) == (width, 1)
    return Part(HighwayBlock(width) if same else ConvBNAct(before, width, 3, stride), same=same)


def finished(network: nn.Module) -> nn.Module:
    """With He et al.'s random weights, in channels_last, and converted: what is no block of the package's own runs fused as well."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return fusedres.convert(network.to(memory_format=torch.channels_last))


def _head(channels: int, activated: bool) -> nn.Sequential:
    before = [] if activated else [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def of_blocks(build: Builder, depths: Sequence[int], width: int, channels: int, activated: bool = True) -> Network:
    """A stage of ``depths[i]`` blocks each, the first ``width`` wide, for images of so many ``channels``. What comes out of a block is
    ``activated`` or, in a pre-activation network, is not."""
    stem = ConvBNAct(channels, width, 3) if activated else nn.Conv2d(channels, width, 3, padding=1, bias=False)
    parts, before = [], width
    for stage, count in enumerate(depths):
        for i in range(count):
            part = build(before, width * 2**stage, 2 if stage and not i else 1)
            parts.append(part)
            before = getattr(part.block, "expansion", 1) * width * 2**stage
    return finished(Network(stem, parts, _head(before, activated)))


def of_dense(layers: int, growth: int, channels: int, blocks: int = STAGES, bn_size: int = 4) -> Network:
    """DenseNet-BC: ``blocks`` dense blocks of so many ``layers`` with bottlenecks, halved in between."""
    width = 2 * growth
    parts = []
    stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    for i in range(blocks):
        block = DenseBlock(layers, width, bn_size, growth, 0.0)
        parts.append(Part(block, layers=tuple(block.values())))
        width += layers * growth
        if i < blocks - 1:
            parts.append(Part(Transition(width, width // 2)))
            width //= 2
    return finished(Network(stem, parts, _head(width, activated=False)))


def per_stage(depth: int) -> int:
    """Blocks of a stage in a network of depth 6 n + 2. Raises ValueError for another depth."""
    count, rest = divmod(depth - 2, 2 * STAGES)
    if rest or count < 1:
        raise ValueError(f"a network of these blocks has 6 n + 2 layers: 8, 14, 20, ..., not {depth}")
    return count


def _of_pairs(build: Builder, depth: int, width: int, channels: int, activated: bool = True) -> Network:
    return of_blocks(build, (per_stage(depth),) * STAGES, width, channels, activated)


def _highway(depth: int, width: int, channels: int) -> Network:
    return of_blocks(highway, (2 * per_stage(depth),) * STAGES, width, channels)


def _dense(depth: int, width: int, channels: int) -> Network:
    # a layer is two convolutions, as a block is; the mean width of a dense block of 2 n layers is then of the order of the others'
    return of_dense(per_stage(depth), max(2, width // 2), channels)


#: kind -> depth, width, channels of the images -> network
KINDS: dict[str, Callable[[int, int, int], Network]] = {
    "plain": functools.partial(_of_pairs, plain),
    "highway": _highway,
    "residual": functools.partial(_of_pairs, residual),
    "pre-activation": functools.partial(_of_pairs, preact, activated=False),
    "dense": _dense,
}
