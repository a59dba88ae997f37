"""Frozen BatchNorms of one schedule in one launch on ``triton``: the bits of each alone, and who runs them so.

Where there is no GPU kernels are interpreted, and every access is watched (conftest.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from interpreter import corrected, watched  # noqa: E402
from torchvision.models.densenet import _DenseBlock  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1  # noqa: E402

import fusedres  # noqa: E402
from fusedres.backends import select  # noqa: E402
from fusedres.backends.contract import Wrapped  # noqa: E402
from fusedres.backends.triton import BACKEND, use_plan  # noqa: E402
from fusedres.kernels import batchnorm  # noqa: E402
from fusedres.kernels.launch import INTERPRETED, record  # noqa: E402
from fusedres.specs import Norm  # noqa: E402
from fusedres.testing import randomize  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("exact_and_unmeasured", "uninitialised_memory_is_nan"),
]
CHANNELS = (5, 300, 64, 7, 1, 256, 257, 33, 12, 8)


def norms(dtype: torch.dtype, count: int) -> list[Norm]:
    """BatchNorms with both parameters, one of them or none, of odd widths; of two dtypes where ``dtype`` has 16 bits."""
    found = []
    for i, channels in enumerate(CHANNELS[:count]):
        own = dtype if i % 4 else torch.float32
        weight, bias, mean = (torch.randn(channels, device=DEVICE).to(own) for _ in range(3))
        var = torch.rand(channels, device=DEVICE).add_(0.1).to(own)
        found.append(
            Norm(
                weight if i % 3 != 1 else None,
                bias if i % 3 != 2 else None,
                mean,
                var,
                False,
                0.1,
                10.0 ** -(i + 1),
                "relu",
            )
        )
    return found


def launched(run: Callable[[], object]) -> Counter[str]:
    with record() as launches:
        run()
    return Counter(one.kernel.__name__.removesuffix("_kernel") for one in launches)


@pytest.mark.parametrize("count", [2, 8, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_together_they_have_the_bits_of_each_alone(dtype, count):
    drawn = norms(dtype, count)
    with corrected(order="shuffle"), watched():
        together = batchnorm.bn_frozen_together(drawn)
    with corrected():
        alone = [BACKEND.bn_frozen(norm, torch.float32) for norm in drawn]
    for found, expected in zip(together, alone, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs) and ours.isfinite().all()
            assert ours.data_ptr() % 16 == 0
    assert launched(lambda: batchnorm.bn_frozen_together(drawn)) == {"frozen": -(-count // batchnorm.TOGETHER)}


def test_one_without_running_statistics_is_refused():
    first, second = norms(torch.float32, 2)
    with pytest.raises(ValueError, match="without running statistics"):
        batchnorm.bn_frozen_together([first, replace(second, running_mean=None)])


def projected() -> nn.Module:
    return Bottleneck(16, 4, downsample=nn.Sequential(conv1x1(16, 16), nn.BatchNorm2d(16)))


#: a block, the channels that it reads, and its BatchNorms
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "basic": (lambda: BasicBlock(8, 8), 8, 2),
    "projected": (projected, 16, 4),
    "pre-activation": (lambda: fusedres.nn.PreActBottleneck(16, 4), 16, 3),
    "dense": (lambda: _DenseBlock(5, 8, 2, 4, 0.0), 8, 10),
}


def block_of(name: str) -> tuple[nn.Module, Tensor, int]:
    torch.manual_seed(0)
    build, channels, count = BLOCKS[name]
    model = build()
    randomize(model)
    x = torch.randn(1, channels, 5, 5).to(DEVICE, memory_format=torch.channels_last)
    return fusedres.convert(model, verify=False).to(DEVICE).eval(), x, count


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_computes_them_in_front_of_its_convolutions_and_gives_the_same_bits(name):
    model, x, count = block_of(name)
    with fusedres.use_backend("triton"), use_plan("fused"):
        with torch.no_grad():
            found = launched(lambda: model(x))
            assert found["frozen"] == -(-count // batchnorm.TOGETHER) and found["coefficients"] == 0
            y = model(x)
            with select.observe(lambda backend: None if backend is None else Wrapped(backend)):
                assert launched(lambda: model(x))["coefficients"] == count
                assert torch.equal(model(x), y)
        # a fine-tuned block, whose BatchNorms stay frozen, records a schedule of its own
        assert launched(lambda: model(x))["frozen"] > 0
        slopes = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
        with select.observe(lambda backend: None if backend is None else Wrapped(backend)):
            expected = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    assert all(map(torch.equal, slopes, expected))


def test_where_one_of_them_uses_its_batch_each_is_computed_in_its_turn():
    model, x, count = block_of("projected")
    model.bn2.train()
    with fusedres.use_backend("triton"), use_plan("fused"), torch.no_grad():
        found = launched(lambda: model(x))
    assert found["frozen"] == 0 and found["coefficients"] == count
