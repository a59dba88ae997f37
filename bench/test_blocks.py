"""Single blocks in training and inference, eager beside fused.

    pytest -p benchmark bench/test_blocks.py --benchmark-only

Small enough to run in seconds; the shapes are those of an early stage, at a batch and a resolution that ``FUSEDRES_BENCH_BATCH`` and
``FUSEDRES_BENCH_SIZE`` override. Contenders run one after another here: on a machine that does other work too,
compare minima, or use bench.models, which lets them take turns.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.resnet import BasicBlock, Bottleneck

import fusedres

BATCH, SIZE = (int(os.environ.get(f"FUSEDRES_BENCH_{name}", default)) for name, default in (("BATCH", 4), ("SIZE", 28)))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stem() -> nn.Module:
    """The stem of a ResNet."""
    resnet = torchvision.models.resnet18()
    return nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)


def projected() -> nn.Module:
    """A bottleneck at the start of a stage: its shortcut is a strided convolution."""
    return Bottleneck(256, 128, 2, nn.Sequential(nn.Conv2d(256, 512, 1, 2, bias=False), nn.BatchNorm2d(512)))


# what builds a block, its input channels, and its input's size in units of SIZE
BLOCKS = {
    "basic": (lambda: BasicBlock(64, 64), 64, 1),
    "bottleneck": (lambda: Bottleneck(256, 64), 256, 1),
    "bottleneck with projection": (projected, 256, 1),
    "stem": (stem, 3, 4),
    "dense block of 6 layers": (lambda: _DenseBlock(6, 64, 4, 32, 0.0), 64, 1),
    "transition": (lambda: _Transition(256, 128), 256, 1),
}
CONTENDERS = {
    "eager": lambda model: model,
    "fused": fusedres.convert,
    "fused-recompute": lambda model: fusedres.convert(model, recompute=True),
}


@pytest.mark.benchmark(max_time=0.4, min_rounds=5)
@pytest.mark.parametrize(
    "block, mode, contender",
    [
        (block, mode, contender)
        for block in BLOCKS
        for mode in ("train", "infer")
        for contender in CONTENDERS
        if (mode, contender) != ("infer", "fused-recompute")
    ],
)
def test_block(benchmark, block, mode, contender):
    """A forward, and in training a backward to the input and all parameters."""
    benchmark.group = f"{block}, {mode}: batch {BATCH}, {SIZE} px, {DEVICE.type}"
    build, channels, scale = BLOCKS[block]
    torch.manual_seed(0)
    base = nn.Sequential(build()).to(DEVICE, memory_format=torch.channels_last)
    model = CONTENDERS[contender](copy.deepcopy(base)).train(mode == "train")
    x = torch.randn(BATCH, channels, SIZE * scale, SIZE * scale, device=DEVICE)
    x = x.to(memory_format=torch.channels_last).requires_grad_(mode == "train" and block != "stem")
    wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
    with torch.set_grad_enabled(mode == "train"):
        grad = torch.randn_like(model(x))

    def step() -> None:
        if mode == "train":
            torch.autograd.grad(model(x), wanted, grad)
        else:
            with torch.no_grad():
                model(x)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    step()
    plain = [row.detail for row in fusedres.report(model) if not row.fused]
    if contender != "eager" and plain:
        pytest.skip(plain[0])
    benchmark(step)
