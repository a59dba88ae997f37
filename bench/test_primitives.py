"""The primitives of the cpp backend beside their definitions in plain PyTorch.

    pytest -p benchmark bench/test_primitives.py --benchmark-only

One shape for all, that of a bottleneck's or a dense layer's maps; ``FUSEDRES_BENCH_BATCH`` and ``FUSEDRES_BENCH_SIZE`` override its batch
and resolution.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedres.backends.contract import Backend
from fusedres.backends.cpp import BACKEND as CPP
from fusedres.backends.eager import BACKEND as EAGER
from fusedres.operands import Epilogue, GradTarget, LazyGrad, LazyMap
from fusedres.specs import Geometry, Pool

BATCH, SIZE = (int(os.environ.get(f"FUSEDRES_BENCH_{name}", default)) for name, default in (("BATCH", 4), ("SIZE", 28)))
WIDE, NARROW = 256, 64
Call = Callable[[Backend], object]


def new_map(channels: int, size: int = SIZE) -> Tensor:
    """A random map."""
    return torch.randn(BATCH, channels, size, size).to(memory_format=torch.channels_last)


def vectors(rows: int, channels: int) -> Tensor:
    """Random per-channel values."""
    return torch.rand(rows, channels) + 0.5


def convolution(inputs: int, outputs: int, kernel: int, groups: int = 1, size: int = SIZE) -> dict[str, Call]:
    """A convolution's forward in training and in inference, and its backward, all with everything pending; maps of ``size`` pixels."""
    geometry = Geometry((1, 1), (kernel // 2, kernel // 2), (1, 1), groups)
    x, y, weight = new_map(inputs, size), new_map(outputs, size), torch.randn(outputs, inputs // groups, kernel, kernel)
    weight = weight.to(memory_format=torch.channels_last)
    below, own, coeff = vectors(2, inputs), vectors(2, outputs), vectors(3, outputs)
    stats, sums = torch.empty_like(own), torch.empty_like(below)
    pending, grad = LazyMap(x, below, "relu", below), LazyGrad(y, y, coeff)
    training, target = Epilogue(stats=stats), GradTarget(sums=sums)
    inference = Epilogue(scale_shift=own, residual=LazyMap(y), act="relu")
    return {
        "forward": lambda b: b.conv_forward(pending, weight, None, geometry, training),
        "inference": lambda b: b.conv_forward(LazyMap(x), weight, None, geometry, inference),
        "backward": lambda b: b.conv_backward(grad, pending, weight, geometry, target),
    }


def passes() -> dict[str, Call]:
    """Everything else that reads or writes a map, by name."""
    raw, grad, residual = new_map(WIDE), new_map(WIDE), LazyMap(new_map(WIDE))
    own, coeff, sums = vectors(2, WIDE), vectors(3, WIDE), torch.empty(2, WIDE)
    x = LazyMap(raw, own, "none", own)
    activated, pending = x._replace(act="relu"), LazyGrad(grad, raw, coeff)
    image, mean = new_map(NARROW, 2 * SIZE), Pool("mean", (2, 2), (2, 2), (0, 0))
    narrow, window = vectors(2, NARROW), Pool("max", (3, 3), (2, 2), (1, 1))
    stem = LazyMap(image, narrow, "relu", narrow)
    pooled, index = EAGER.pool_forward(stem, window)
    behind = (pooled, index, stem, window)
    half, small_sums, small_coeff = new_map(WIDE, SIZE // 2), torch.empty(2, NARROW), vectors(3, NARROW)
    return {
        "statistics": lambda b: b.statistics(raw, sums),
        "addition": lambda b: b.add_act_forward(x, residual, "relu"),
        "addition backward": lambda b: b.add_act_backward(grad, x, residual, "relu", sums=sums),
        "gradient correction": lambda b: b.apply_grad_coeff(pending),
        "max pool forward": lambda b: b.pool_forward(stem, window),
        "max pool backward, sums": lambda b: b.pool_backward(*behind, sums=small_sums),
        "max pool backward, gradient": lambda b: b.pool_backward(*behind, coeff=small_coeff),
        "mean pool forward": lambda b: b.pool_forward(activated, mean),
        "mean pool backward, sums": lambda b: b.pool_backward(half, None, activated, mean, sums=sums),
    }


def cases() -> dict[str, Call]:
    """Every call by name; takes the backend."""
    torch.manual_seed(0)
    shapes = {
        f"conv 1x1 {WIDE}-{NARROW}": (WIDE, NARROW, 1),
        f"conv 1x1 {NARROW}-{WIDE}": (NARROW, WIDE, 1),
        f"conv 3x3 {NARROW}-{NARROW}": (NARROW, NARROW, 3),
        "conv 3x3 128-32": (128, 32, 3),
        # on both sides of what the cpp backend leaves to the library
        **{f"conv 1x1, groups of {n}": (WIDE, WIDE, 1, WIDE // n) for n in (2, 4, 16)},
        **{f"conv 3x3, groups of {n}": (WIDE, WIDE, 3, WIDE // n) for n in (4, 8, 16, 32)},
        **{f"conv 1x1, groups of 8, {size} px": (WIDE, WIDE, 1, WIDE // 8, size) for size in (8, 16, 64)},
        **{f"conv 3x3, groups of 4, {size} px": (WIDE, WIDE, 3, WIDE // 4, size) for size in (1, 4)},
        **{f"conv {k}x{k}, groups of 1": (WIDE, WIDE, k, WIDE) for k in (3, 5)},
        **{f"conv 3x3, groups of {n} to 8": (4 * n, 32, 3, 4) for n in (16, 24, 32)},
    }
    convolutions = {f"{name} {use}": c for name, shape in shapes.items() for use, c in convolution(*shape).items()}
    return convolutions | passes()


CASES = cases()


@pytest.mark.benchmark(max_time=0.2, min_rounds=5)
@pytest.mark.parametrize("backend", [EAGER, CPP], ids=["eager", "cpp"])
@pytest.mark.parametrize("case", CASES)
def test_primitive(benchmark, case, backend):
    """One call of a primitive."""
    benchmark.group = f"{case}: batch {BATCH}, {SIZE} px"
    reason = backend.supports(torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    CASES[case](backend)
    benchmark(CASES[case], backend)
