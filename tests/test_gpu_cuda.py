"""What only a GPU can show of the CUDA C++ kernels: that NVRTC's programs load and run, parity of blocks, CUDA graphs, other streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres.backends import select
from fusedres.backends.nvrtc import DTYPES
from fusedres.nn import BasicBlock, Bottleneck, DenseBlock, HighwayBlock, Transition
from fusedres.operands import LazyMap
from fusedres.testing import compare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BLOCKS = {
    "basic": (lambda: BasicBlock(64, 64), (4, 64, 15, 13)),
    "bottleneck": (lambda: Bottleneck(256, 64), (4, 256, 14, 14)),
    "dense": (lambda: DenseBlock(3, 32, 4, 32, 0.0), (4, 32, 14, 14)),
    "dense, unaligned": (lambda: DenseBlock(3, 24, 4, 13, 0.0), (2, 24, 7, 9)),
    "transition": (lambda: Transition(96, 48), (4, 96, 14, 14)),
    "highway": (lambda: HighwayBlock(32), (2, 32, 9, 9)),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_as_right_as_eager(kind, dtype, training):
    build, shape = BLOCKS[kind]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        compare(build, shape, dtype, "cuda", training, device="cuda")


def block() -> nn.Module:
    torch.manual_seed(0)
    made = Bottleneck(64, 16).to("cuda", torch.float16, memory_format=torch.channels_last).eval()
    return fusedres.convert(made, verify=False)


def image() -> Tensor:
    return torch.randn(2, 64, 9, 9, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)


def test_a_captured_step_gives_the_bits_of_a_launched_one():
    model, x = block(), image()
    with fusedres.use_backend("cuda"), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            wanted = model(x).clone()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        y.zero_()
        graph.replay()
    assert torch.equal(y, wanted)


def test_launches_go_to_the_current_stream():
    """What is enqueued before on that stream is done before."""
    backend, x = select.get("cuda"), image()
    busy = torch.randn(4096, 4096, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy
        x.fill_(3.0)
        y = backend.add_act_forward(LazyMap(x))
    stream.synchronize()
    assert torch.equal(y, torch.full_like(y, 3.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_another_gpu_than_the_current_one_is_computed_there():
    x = image().to("cuda:1").relu()
    y = select.get("cuda").add_act_forward(LazyMap(x), None, "relu")
    assert y.device == x.device and torch.equal(x, y) and torch.cuda.current_device() == 0
