"""The schedules of ``triton`` on their way into a CUDA graph: after a first call the host reads no value and waits for nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from captured import HostRead, captured  # noqa: E402

import fusedres  # noqa: E402
from fusedres.kernels.launch import INTERPRETED  # noqa: E402
from fusedres.testing import assert_fused, randomize  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

HOST_READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "a branch": lambda x: 1 if x.sum() > 0 else 0,
    "float": lambda x: float(x.sum()),
    "int": lambda x: range(int(x.sum())),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "another device": lambda x: x.to("meta"),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("read", HOST_READS)
def test_a_read_on_the_host_is_seen(read):
    with captured(), pytest.raises(HostRead):
        HOST_READS[read](torch.ones(3))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: fusedres.nn.BasicBlock(8, 8),
    "bottleneck": lambda: fusedres.nn.Bottleneck(
        8, 4, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    ),
    "preactivation": lambda: fusedres.nn.PreActBasicBlock(8, 8),
    "highway": lambda: fusedres.nn.HighwayBlock(8),
    "stem": lambda: fusedres.convert(
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)), verify=False
    ),
    "dense": lambda: fusedres.nn.DenseBlock(2, 8, 2, 4, 0.0),
    "transition": lambda: fusedres.nn.Transition(8, 4),
}


@pytest.mark.parametrize(
    "recompute", [pytest.param(False, id="kept"), pytest.param(True, id="recomputed", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("basic", "preactivation"))) for n in BLOCKS]
)
def test_no_schedule_reads_a_value_on_the_host(name, recompute):
    torch.manual_seed(0)
    block = nn.Sequential(BLOCKS[name]())
    randomize(block)
    block = fusedres.convert(block, recompute=recompute, verify=False)
    x = torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    weights = [x, *block.parameters()]

    def step() -> None:
        y = block.train()(x)
        torch.autograd.grad(y, weights, torch.ones_like(y))
        with torch.no_grad():
            block.eval()(x)

    with fusedres.use_backend("triton"):
        step()
        with captured() as kernels:
            step()
    assert_fused(block, "triton")
    assert len(kernels) > 5
