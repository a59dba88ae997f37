"""What only a GPU can show: parity of every kind of block on the real kernels, CUDA graphs, tensors beyond 2^31
elements."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton")
torchvision = pytest.importorskip("torchvision")

import fusedres  # noqa: E402
from fusedres.backends import tape  # noqa: E402
from fusedres.backends.triton import BACKEND, use_plan  # noqa: E402
from fusedres.kernels import (  # noqa: E402
    batchnorm,
    conv_dgrad,
    conv_forward,
    conv_pointwise_backward,
    conv_wgrad,
    elementwise,
    launch,
    pool,
    reduce,
)
from fusedres.kernels.launch import INTERPRETED  # noqa: E402
from fusedres.operands import Epilogue, GradTarget, LazyGrad, LazyMap  # noqa: E402
from fusedres.specs import Geometry  # noqa: E402
from fusedres.testing import compare, run_training  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 is set"),
]
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d).removeprefix("torch.")
)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _sequential(**options) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(32, 64, 3, bias=False, **options), nn.BatchNorm2d(64), nn.ReLU())


def _small(model: nn.Module) -> nn.Module:
    """A whole network as its body alone: a classifier's rounding is not ours to judge."""
    for name in ("fc", "classifier"):
        if hasattr(model, name):
            setattr(model, name, nn.Identity())
    return model


resnet, densenet = torchvision.models.resnet, torchvision.models.densenet

# kind: module, input; sizes around the tiles, odd where a block allows it
BLOCKS = {
    "basic block": (lambda: resnet.BasicBlock(64, 64), (4, 64, 15, 13)),
    "basic block, projection": (lambda: resnet.BasicBlock(32, 64, 2, _projection(32, 64, 2)), (4, 32, 15, 13)),
    "bottleneck": (lambda: resnet.Bottleneck(256, 64), (4, 256, 14, 14)),
    "bottleneck, projection": (lambda: resnet.Bottleneck(64, 32, 2, _projection(64, 128, 2)), (4, 64, 14, 14)),
    "resnet stem": (lambda: _small(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])), (2, 3, 64, 64)),
    "dense block": (lambda: densenet._DenseBlock(3, 32, 4, 32, 0.0), (4, 32, 14, 14)),
    "dense block, unaligned": (lambda: densenet._DenseBlock(3, 24, 4, 12, 0.0), (2, 24, 7, 9)),
    "transition": (lambda: densenet._Transition(96, 48), (4, 96, 14, 14)),
    "densenet head": (lambda: _small(densenet.DenseNet(16, (2, 2), 32, num_classes=2)), (2, 3, 64, 64)),
    "sequential": (lambda: _sequential(padding=1), (4, 32, 14, 14)),
    "sequential, strided and dilated": (lambda: _sequential(stride=2, padding=2, dilation=2), (4, 32, 15, 14)),
    "sequential, groups": (lambda: _sequential(padding=1, groups=4), (4, 32, 14, 14)),
}


@each_dtype
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("plan", ["fused", "apart", "auto"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_parity(kind, plan, training, dtype):
    """Every kind of block, with every convolution fused, both gradients of a 1x1 by one kernel or by two, and with the default plans."""
    if plan == "apart" and not (training and kind.startswith(("bottleneck", "dense block", "densenet"))):
        pytest.skip("has no 1x1 whose gradients one kernel makes")
    build, shape = BLOCKS[kind]
    # eager's own float32 without TF32: the rule compares IEEE float32
    with use_plan(plan), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        compare(build, shape, dtype, "triton", training, device="cuda")


@pytest.mark.parametrize("kind", ["bottleneck", "bottleneck, projection", "dense block"])
def test_parity_in_tf32(kind):
    """Where torch's convolutions may reduce float32 operands, ours do, and are as near as they are."""
    build, shape = BLOCKS[kind]
    with use_plan("fused"), torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        compare(build, shape, torch.float32, "triton", device="cuda")


@pytest.mark.parametrize("kind", ["bottleneck, projection", "dense block", "transition"])
def test_recompute(kind):
    build, shape = BLOCKS[kind]
    compare(build, shape, torch.bfloat16, "triton", recompute=True, device="cuda")


def network() -> nn.Module:
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)
    return model.to("cuda", torch.bfloat16, memory_format=torch.channels_last)


def images(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 64, 64, generator=generator).to("cuda", torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("plan", ["fused", "auto"])
def test_two_runs_give_the_same_bits(plan):
    # what a plan leaves to the library is as deterministic as the library is told to be
    with use_plan(plan), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        first, second = (run_training(fusedres.convert(network()).train(), images(0)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def trained(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a training step from ``state`` leaves, in memory of its own."""
    model.load_state_dict(state)
    model.zero_grad()
    return {name: value.clone() for name, value in run_training(model, images(0)).items()}


@pytest.mark.parametrize("plan", ["fused", "auto"])
def test_dependent_launches_change_no_bit(plan):
    """By Triton's launcher and from tapes: what waits too late reads what is not written yet."""
    model = fusedres.convert(network()).train()
    state, found = copy.deepcopy(model.state_dict()), []
    with use_plan(plan), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for on in (False, *[True] * 8):
            with launch.dependent_launches(on):
                if on and not launch.arch_of(torch.device("cuda")).dependent:
                    pytest.skip("this GPU has no dependent launches")
                found.append(trained(model, state))
    assert all(torch.equal(found[0][name], other[name]) for other in found for name in found[0])


def test_launches_from_python_and_from_tapes_give_the_bits_of_public_ones(monkeypatch):
    """Of a step whose kernels Triton has compiled before, also on maps in a buffer of another address."""
    model = fusedres.convert(network()).train()
    state, played, play = copy.deepcopy(model.state_dict()), [0], tape.Tape.play

    def counted(*args):
        results = play(*args)
        played[-1] += results is not None
        return results

    monkeypatch.setattr(tape.Tape, "play", counted)
    found = []
    with use_plan("fused"):
        for direct in (True, True, True, True, False):
            monkeypatch.setattr(launch, "direct", direct)
            found.append(trained(model, state))
            played.append(0)
    assert all(torch.equal(found[-1][name], other[name]) for other in found for name in found[0])
    if tape.can_play():
        assert played[0] == played[-2] == 0 < played[3], "nothing was played from a tape"


@pytest.mark.parametrize("plan", ["fused", "auto"])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_cuda_graph(mode, plan):
    """A converted model waits for the GPU nowhere, and a replay computes what a call computes."""
    model = fusedres.convert(network()).train(mode == "train")
    reference = copy.deepcopy(model)
    x = images(0)

    def step(of: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
        with torch.set_grad_enabled(mode == "train"):
            y = of(batch)
        if mode == "infer":
            return [y]
        return [y, *torch.autograd.grad(y.float().square().mean(), list(of.parameters()))]

    with use_plan(plan), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        # compile, and choose the library's algorithms, outside the capture; running statistics are put back
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(copy.deepcopy(model), x)
            step(copy.deepcopy(model), x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(model, x)
        for seed in (1, 2):
            x.copy_(images(seed))
            graph.replay()
            expected = step(reference, images(seed))
            for ours, theirs in zip(captured, expected, strict=True):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_graphed(mode):
    """A model by CUDA graphs makes what the model does: outputs, gradients, running statistics."""
    model = fusedres.convert(network()).train(mode == "train")
    reference = copy.deepcopy(model)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True), torch.set_grad_enabled(mode == "train"):
        forward = fusedres.graphed(model, images(0))
        for seed in (1, 2):
            ours, theirs = forward(images(seed)), reference(images(seed))
            torch.testing.assert_close(ours, theirs)
            if mode == "train":
                ours.float().square().mean().backward(), theirs.float().square().mean().backward()
                for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                    torch.testing.assert_close(p.grad, q.grad)
        for p, q in zip(model.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(p, q)


def test_precompile():
    """What is compiled in parallel beforehand is what the step launches: nothing is left for its first call."""
    model, x = fusedres.convert(network()).train(), images(0)
    with use_plan("fused"):
        assert fusedres.precompile(model, x.detach().requires_grad_()) > 0
        before = _compiled()
        run_training(model, x)
    assert before and _compiled() == before


def _compiled() -> int:
    """How many variants of all kernels this process holds."""
    convolutions = (conv_dgrad, conv_forward, conv_pointwise_backward, conv_wgrad)
    modules = (batchnorm, *convolutions, elementwise, pool, reduce)
    kernels = [v for module in modules for v in vars(module).values() if isinstance(v, triton.JITFunction)]
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


HUGE = 2**31


@pytest.mark.parametrize("what", ["addition", "convolution 1x1", "convolution 1x1 apart", "convolution 3x3"])
def test_more_than_two_to_the_31_elements(what):
    """The last images of a map whose offsets need 64 bits are those of the same images alone."""
    channels, size = 256, 64
    n = HUGE // (channels * size * size) + 8
    need = 5 * n * channels * size * size * 2
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB of free memory")
    raw = torch.empty(n, channels, size, size, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    raw.normal_()
    assert raw.numel() > HUGE
    scale_shift, mean_invstd, coeff = (torch.rand(rows, channels, device="cuda") for rows in (2, 2, 3))
    sums, stats = torch.empty(2, channels, device="cuda"), torch.empty(2, channels, device="cuda")
    x, few = (LazyMap(maps, scale_shift, "none", mean_invstd) for maps in (raw, raw[-8:]))
    if what == "addition":
        y = BACKEND.add_act_forward(x, LazyMap(raw), "relu", stats=stats)
        assert torch.equal(y[-8:], BACKEND.add_act_forward(few, LazyMap(raw[-8:]), "relu"))
        dz = BACKEND.add_act_backward(y, x, None, "relu", sums=sums)
        assert torch.equal(dz[-8:], BACKEND.add_act_backward(y[-8:], few, None, "relu"))
        # the mean of all the images: of as many independent values, nearly that of a few
        torch.testing.assert_close(stats[0], y[-8:].float().mean((0, 2, 3)), rtol=0.1, atol=0.1)
        return
    kernel = 3 if "3x3" in what else 1
    geometry = Geometry((1, 1), (kernel // 2,) * 2, (1, 1), 1)
    weight = torch.randn(channels, channels, kernel, kernel, dtype=torch.bfloat16, device="cuda") / 16
    x, few = x._replace(act="relu"), few._replace(act="relu")
    with use_plan("apart" if "apart" in what else "fused"):
        y = BACKEND.conv_forward(x, weight, None, geometry, Epilogue(stats=stats))
        torch.testing.assert_close(y[-8:], BACKEND.conv_forward(few, weight, None, geometry))
        dx, dw = BACKEND.conv_backward(LazyGrad(y, y, coeff), x, weight, geometry, GradTarget(sums=sums))
        last = LazyGrad(y[-8:], y[-8:], coeff)
        small, _ = BACKEND.conv_backward(last, few, weight, geometry, GradTarget(sums=sums.clone()))
    torch.testing.assert_close(dx[-8:], small)
    assert dw.isfinite().all()
