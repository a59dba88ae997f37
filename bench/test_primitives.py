"""The primitives of the cpp backend beside their definitions in plain PyTorch.

    pytest bench/test_primitives.py --benchmark-only

One shape for all, that of a bottleneck's or a dense layer's maps; ``FUSEDRES_BENCH_BATCH`` and ``FUSEDRES_BENCH_SIZE`` override its batch
and resolution.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedres.backends import cpp, eager
from fusedres.backends.eager import Geometry, Pool

BATCH, SIZE = (int(os.environ.get(f"FUSEDRES_BENCH_{name}", default)) for name, default in (("BATCH", 4), ("SIZE", 28)))
WIDE, NARROW = 256, 64
POINT, WINDOW = Geometry((1, 1), (0, 0), (1, 1), 1), Geometry((1, 1), (1, 1), (1, 1), 1)


def new_map(channels: int, size: int = SIZE) -> Tensor:
    """A random map."""
    return torch.randn(BATCH, channels, size, size).to(memory_format=torch.channels_last)


def vectors(rows: int, channels: int) -> Tensor:
    """Random per-channel values."""
    return torch.rand(rows, channels) + 0.5


def convolution(inputs: int, outputs: int, kernel: int) -> dict[str, Callable]:
    """A convolution's forward in training and in inference, and its backward, all with everything pending."""
    geometry = POINT if kernel == 1 else WINDOW
    x, y, weight = new_map(inputs), new_map(outputs), torch.randn(outputs, inputs, kernel, kernel)
    weight = weight.to(memory_format=torch.channels_last)
    below, own, coeff = vectors(2, inputs), vectors(2, outputs), vectors(3, outputs)
    stats, sums = torch.empty_like(own), torch.empty_like(below)
    return {
        "forward": lambda b: b.conv_forward(x, below, "relu", weight, None, geometry, stats=stats),
        "inference": lambda b: b.conv_forward(
            x, None, "none", weight, None, geometry, out_affine=own, residual=y, out_act="relu"
        ),
        "backward": lambda b: b.conv_backward(y, y, coeff, x, below, below, "relu", weight, geometry, sums=sums),
    }


def passes() -> dict[str, Callable]:
    """Everything else that reads or writes a map, by name."""
    x, grad, residual = new_map(WIDE), new_map(WIDE), new_map(WIDE)
    affine, coeff, sums = vectors(2, WIDE), vectors(3, WIDE), torch.empty(2, WIDE)
    image, mean = new_map(NARROW, 2 * SIZE), Pool("mean", (2, 2), (2, 2), (0, 0))
    own, window = vectors(2, NARROW), Pool("max", (3, 3), (2, 2), (1, 1))
    pooled, index = eager.pool_forward(image, own, "relu", window)
    stem = (pooled, index, image, own, own, "relu", window)
    half, small_sums, small_coeff = new_map(WIDE, SIZE // 2), torch.empty(2, NARROW), vectors(3, NARROW)
    return {
        "statistics": lambda b: b.statistics(x, sums),
        "join forward": lambda b: b.join_forward(x, affine, residual, None, "relu"),
        "join backward": lambda b: b.join_backward(grad, x, affine, affine, "relu", sums=sums, residual=residual),
        "gradient correction": lambda b: b.grad_affine(grad, x, coeff),
        "max pool forward": lambda b: b.pool_forward(image, own, "relu", window),
        "max pool backward, sums": lambda b: b.pool_backward(*stem, sums=small_sums),
        "max pool backward, gradient": lambda b: b.pool_backward(*stem, coeff=small_coeff),
        "mean pool forward": lambda b: b.pool_forward(x, affine, "relu", mean),
        "mean pool backward, sums": lambda b: b.pool_backward(half, None, x, affine, affine, "relu", mean, sums=sums),
    }


def cases() -> dict[str, Callable]:
    """Every call by name; takes the backend."""
    torch.manual_seed(0)
    shapes = {
        f"conv 1x1 {WIDE}-{NARROW}": (WIDE, NARROW, 1),
        f"conv 1x1 {NARROW}-{WIDE}": (NARROW, WIDE, 1),
        f"conv 3x3 {NARROW}-{NARROW}": (NARROW, NARROW, 3),
        "conv 3x3 128-32": (128, 32, 3),
    }
    convolutions = {f"{name} {use}": c for name, shape in shapes.items() for use, c in convolution(*shape).items()}
    return convolutions | passes()


CASES = cases()


@pytest.mark.benchmark(max_time=0.2, min_rounds=5)
@pytest.mark.parametrize("backend", [eager, cpp], ids=["eager", "cpp"])
@pytest.mark.parametrize("case", CASES)
def test_primitive(benchmark, case, backend):
    """One call of a primitive."""
    benchmark.group = f"{case}: batch {BATCH}, {SIZE} px"
    reason = backend.supports(torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    CASES[case](backend)
    benchmark(CASES[case], backend)
