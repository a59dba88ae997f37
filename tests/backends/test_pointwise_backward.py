"""Both gradients of a 1x1 convolution by one kernel: what it computes, by the contract's rule, where it runs, and what runs instead.

Where there is no GPU it is interpreted: corrected, with programs in a shuffled order, and every access watched (conftest.py).
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from contract import SMALL, Config, Convolution, conforms, fresh, sums_of  # noqa: E402
from interpreter import corrected, watched  # noqa: E402
from support import Draw, dtype_name  # noqa: E402
from torch import nn  # noqa: E402
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

from fusedres import activations  # noqa: E402
from fusedres.backends import triton as module  # noqa: E402
from fusedres.backends.triton import BACKEND, use_plan  # noqa: E402
from fusedres.kernels import conv_pointwise_backward as kernel  # noqa: E402
from fusedres.kernels import launch, tiles  # noqa: E402
from fusedres.kernels.launch import INTERPRETED, record  # noqa: E402
from fusedres.kernels.tiles import Arch, ConvConfig  # noqa: E402
from fusedres.operands import GradTarget, LazyGrad  # noqa: E402
from fusedres.specs import Geometry  # noqa: E402
from fusedres.testing import compare  # noqa: E402
from fusedres.tuning import plans  # noqa: E402
from fusedres.tuning.plans import FUSED, LIBRARY, Plan  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# masked lanes may compute inf - inf, which NumPy reports
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("exact_and_unmeasured", "uninitialised_memory_is_nan"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POINT = Geometry((1, 1), (0, 0), (1, 1), 1)


def conv(n: int, c: int, h: int, w: int, k: int) -> Convolution:
    return Convolution((n, c, h, w), k, (1, 1), POINT)


CASES = {
    "aligned": SMALL["1x1"],
    "odd": SMALL["1x1 odd"],
    "several tiles of columns": SMALL["1x1 tiles"],
    "maps of a pixel": SMALL["pixel"],
    "one row": conv(1, 8, 1, 1, 16),
    "outputs of no power of two": conv(1, 17, 5, 7, 96),
    "several splits": conv(1, 9, 27, 23, 20),
    "all outputs that a program holds": conv(1, 40, 5, 9, tiles.MOST_OUTPUTS),
    "all outputs of float32": conv(1, 70, 5, 9, tiles.MOST_EXACT_OUTPUTS),
    "a weight given channels_last": conv(2, 24, 5, 5, 12)._replace(deep=True),
}


def most_outputs(dtype: torch.dtype) -> int:
    """For which there is one kernel."""
    return tiles.MOST_EXACT_OUTPUTS if dtype == torch.float32 else tiles.MOST_OUTPUTS


def every(cases: dict[str, Any]) -> pytest.MarkDecorator:
    """Every case in every dtype, one of which is quick where kernels are interpreted."""
    rows = [
        pytest.param(
            Config("triton", dtype, DEVICE), case, id=f"{dtype_name(dtype)}-{name}",
            marks=[pytest.mark.slow] if INTERPRETED and i % len(DTYPES) != j else [],
        )
        for i, (name, case) in enumerate(cases.items())
        for j, dtype in enumerate(DTYPES)
        if not isinstance(case, Convolution) or case.outputs <= most_outputs(dtype)
    ]  # fmt: skip
    return pytest.mark.parametrize("config, case", rows)


def backward(backend, draw, case, *, pending="raw", x=None, into="fresh", scaled=False, sums=True):
    """One conv_backward as results; on triton by one kernel, or it fails. ``into``: a fresh map, a slice, a slice that is accumulated to, a
    slice behind a base, or behind the gradient itself."""
    grad, operand = draw.gradient(*case.out, pending=pending), draw.lazy(*case.shape, **(x or {"act": "relu"}))
    dx = {"fresh": None, "accumulate": draw.filled}.get(into, draw.hole)
    dx = dx and dx(*case.shape)
    base = draw.map(*case.shape) if into == "base" else grad.grad if into == "the gradient" else None
    room = draw.room(2, case.shape[1]) if sums else None
    target, weight = GradTarget(dx, base, into == "accumulate", scaled, room), case.draw_weight(draw)
    given = (grad, operand, weight, case.geometry, target)
    if backend is BACKEND:
        assert kernels_of(*given) == {"conv_pointwise_backward"}
    found, dw = backend.conv_backward(*given)
    assert found is dx or (dx is None and fresh(found) is found)
    assert (dw.shape, dw.dtype) == (weight.shape, weight.dtype)
    return {"dx": found, "dw": dw, **sums_of(room)}


def kernels_of(*given) -> set[str]:
    """Which kernels such a call launches, but for merges."""
    with record() as launches:
        BACKEND.conv_backward(*given)
    return {one.kernel.__name__.removesuffix("_kernel") for one in launches} - {"merge"}


# ---- what it computes ------------------------------------------------------------------------------------------------


@every(CASES)
def test_a_chain(config, case):
    """Both operands pending, sums, into a slice."""
    with use_plan("fused"):
        conforms(config, lambda b, d: backward(b, d, case, into="slice"), values=case.values)


@every(CASES)
def test_a_dense_layer(config, case):
    """Both operands pending, sums, scaled and accumulated into a slice."""
    with use_plan("fused"):
        conforms(config, lambda b, d: backward(b, d, case, into="accumulate", scaled=True), values=case.values)


PLAIN_X = {"normalised": False}
TARGETS = {
    "bare": {"pending": "none", "x": PLAIN_X, "sums": False},
    "bare, base": {"pending": "none", "x": PLAIN_X, "sums": False, "into": "base"},
    "bare, accumulated": {"pending": "none", "x": PLAIN_X, "sums": False, "into": "accumulate"},
    "relu of a plain map": {"pending": "none", "x": {"normalised": False, "act": "relu"}, "sums": False},
    "frozen": {"pending": "coeff"},
    "no activation": {"x": {"act": "none"}},
    "no sums": {"sums": False},
    "base, scaled": {"into": "base", "scaled": True},
    "scaled alone": {"x": {"act": "none"}, "sums": False, "scaled": True},
    "sums of a plain map": {"x": PLAIN_X},
    "accumulated without raw": {"pending": "coeff", "into": "accumulate", "scaled": True, "sums": False},
    "the gradient above is the base": {"pending": "none", "into": "the gradient"},
    "the pending gradient is the base": {"into": "the gradient", "scaled": True},
    **{kind: {"x": {"act": kind}} for kind in activations.KINDS if kind not in ("none", "relu", "leaky_relu")},
    "leaky_relu": {"x": {"act": activations.leaky(0.1)}},
}


@every(TARGETS)
def test_what_is_added_scaled_and_reduced(config, case):
    shape = conv(2, 21, 7, 6, 21)
    with use_plan("fused"):
        conforms(config, lambda b, d: backward(b, d, shape, **case), values=shape.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.skipif(not INTERPRETED, reason="the order of programs is the GPU's")
def test_no_bit_depends_on_the_order_of_programs(dtype):
    """Of several tiles of columns and several splits."""
    case, found = conv(1, 70, 23, 25, 6), []
    with use_plan("fused"):
        for order in ("forward", "reverse", "shuffle"):
            with corrected(order=order), watched() as watch:
                found.append(backward(BACKEND, Config("triton", dtype, DEVICE).draw(), case, into="accumulate"))
            assert watch.launches > 1
    assert all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())


def test_an_empty_batch_has_a_gradient_of_zeros():
    draw = Draw(torch.float32, pad=(0, 0), device=DEVICE)
    sums, grad = draw.room(2, 8), LazyGrad(draw.map(0, 16, 4, 4))
    given = (grad, draw.lazy(0, 8, 4, 4, act="relu"), draw.weight(16, 8, 1, 1), POINT, GradTarget(sums=sums))
    with use_plan("fused"):
        assert kernels_of(*given) == {"conv_pointwise_backward"}
        dx, dw = BACKEND.conv_backward(*given)
    assert dx.shape == (0, 8, 4, 4) and dw.shape == (16, 8, 1, 1)
    assert not dw.any() and not sums.any()


torchvision = pytest.importorskip("torchvision")
resnet, densenet = torchvision.models.resnet, torchvision.models.densenet
BLOCKS = {
    "bottleneck": (lambda: resnet.Bottleneck(16, 4), (2, 16, 5, 6)),
    "projection": (
        lambda: resnet.Bottleneck(8, 4, downsample=nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))),
        (2, 8, 5, 6),
    ),
    "dense block": (lambda: densenet._DenseBlock(2, 8, 2, 4, 0.0), (2, 8, 5, 6)),
    "pre-activation": (lambda: PreActivation(16), (2, 16, 5, 6)),
}


class PreActivation(nn.Module):
    """BatchNorm and ReLU in front of two 1x1 convolutions, and an identity shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(channels, 4, 1, bias=False), nn.Conv2d(4, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


@pytest.mark.skipif(not INTERPRETED, reason="every access is watched")
# a projection's block has everything of the bottleneck
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "bottleneck" else []) for name in BLOCKS]
)
def test_no_block_writes_a_gradient_where_another_program_reads(name):
    """Of what autograd passes as gradients, bases and places: whatever they share is no other program's. And the block is right."""
    build, shape = BLOCKS[name]
    launched = set()
    original = launch.Prepared.__call__

    def noted(self, *tensors, **late):
        launched.add(self.kernel.__name__)
        return original(self, *tensors, **late)

    with pytest.MonkeyPatch.context() as patch, use_plan("fused"), corrected(order="shuffle"), watched() as watch:
        patch.setattr(launch.Prepared, "__call__", noted)
        compare(build, shape, torch.float32, "triton")
    assert "conv_pointwise_backward_kernel" in launched and watch.launches > 8


# ---- where it runs ---------------------------------------------------------------------------------------------------


def given(case: Convolution = CASES["aligned"], dtype: torch.dtype = torch.float32, **target: Any) -> tuple:
    """The arguments of a conv_backward."""
    draw = Draw(dtype, device=DEVICE)
    return (
        draw.gradient(*case.out), draw.lazy(*case.shape, act="relu"), case.draw_weight(draw), case.geometry, GradTarget(**target),
    )  # fmt: skip


APART = {"conv_dgrad", "conv_wgrad"}
OTHER_FORMS = {
    "strided": SMALL["1x1 stride 2"],
    "padded": SMALL["1x1 padded"],
    "3x3": SMALL["3x3"],
    "more outputs than a program holds": conv(1, 8, 2, 2, tiles.MOST_OUTPUTS + 1),
    "groups": Convolution((1, 8, 3, 3), 8, (1, 1), Geometry((1, 1), (0, 0), (1, 1), 2)),
    "depthwise": Convolution((1, 8, 3, 3), 8, (1, 1), Geometry((1, 1), (0, 0), (1, 1), 8)),
}


@pytest.mark.parametrize("case", OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_what_has_another_form_has_two_kernels(case):
    with use_plan("fused"):
        assert kernels_of(*given(case)) == APART


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_float32_without_tf32_has_two_kernels_from_fewer_outputs_on(dtype):
    case = conv(1, 8, 2, 2, tiles.MOST_EXACT_OUTPUTS + 1)
    for allowed in (True, False):
        with use_plan("fused"), torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            two = dtype == torch.float32 and not allowed
            assert kernels_of(*given(case, dtype)) == (APART if two else {"conv_pointwise_backward"})


def test_one_gradient_alone_has_its_own_kernel():
    grad, x, weight, geometry, target = given()
    with use_plan("fused"):
        assert kernels_of(grad, x, weight, geometry, target, False) == {"conv_dgrad"}
        assert kernels_of(grad, x, weight, geometry, None, True) == {"conv_wgrad"}


def test_a_gpu_with_too_few_registers_has_two_kernels():
    with record(arch=Arch("gfx1100", 64 * 1024, 32)) as launches, use_plan("fused"):
        BACKEND.conv_backward(*given())
    assert {one.kernel.__name__ for one in launches} >= {"conv_dgrad_kernel", "conv_wgrad_kernel"}


TILE = ConvConfig(16, 16, 32, 4, 2)


def test_plans_decide():
    """A word, a tile, which is of two kernels, or what was measured for this problem."""
    arguments = given()
    for plan, expected in (
        ("fused", {"conv_pointwise_backward"}),
        ("apart", APART),
        (Plan(True, TILE), APART),
        (FUSED, None),
    ):
        with use_plan(plan):
            assert kernels_of(*arguments) == (expected or {"conv_pointwise_backward"})
            assert BACKEND.routes("conv_backward", *arguments) == {"dgrad": "fused", "wgrad": "fused"}
    device = torch.device(DEVICE) if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
    problem = BACKEND.tuner.problems("conv_backward", *arguments)[-1]
    assert problem.op == "backward"
    plans.remember(device, {problem: Plan(True, TILE)})
    with record() as launches:
        BACKEND.conv_backward(*arguments)
    found = launches[0].arguments
    assert [found[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")] == [16, 16, 32, 4, 2]
    plans.remember(device, {problem: LIBRARY})
    assert "conv_pointwise_backward" not in kernels_of(*arguments)


def test_a_tile_that_does_not_hold_all_outputs_is_refused():
    grad, x, weight, _, target = given()
    with pytest.raises(ValueError, match="holds all 32 outputs"):
        kernel.conv_pointwise_backward(grad, module._parsed(x), weight, target, ConvConfig(16, 16, 16, 4, 2))


@pytest.mark.parametrize("error", [OutOfResources, PTXASError])
def test_where_it_cannot_be_built_each_gradient_has_its_kernel(error, monkeypatch):
    """Said once; what is accumulated to is as it was."""
    held, tried = Draw(torch.float32, 1, device=DEVICE).filled(*CASES["aligned"].shape), []

    def fails(*args):
        tried.append(args[-1])
        raise OutOfResources(99_999, 40_000, "shared memory") if error is OutOfResources else PTXASError("99999")

    def call() -> tuple:
        return BACKEND.conv_backward(*given(dx=held.clone(), accumulate=True))

    with use_plan("library"):
        expected = call()
    monkeypatch.setattr(kernel, "conv_pointwise_backward", fails)
    with pytest.warns(
        RuntimeWarning, match="fused backward kernel .* cannot be built here, which runs gradient by"
    ) as said:
        found = call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = call()
        assert kernels_of(*given(dx=held, accumulate=True)) == APART
    assert len(said) == 1 and tried[0] is None and (len(tried) > 1) == (error is OutOfResources)
    for results in (found, again):
        for ours, theirs in zip(results, expected, strict=True):
            # that it is the same gradient; how right it is, the contract's cases say
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with use_plan("fused"), pytest.raises(error):
        call()


def test_what_does_not_fit_runs_in_the_nearest_tile_that_does(monkeypatch):
    original, size = kernel.conv_pointwise_backward, tiles.ConvSize(40, 16, 32, 1, 4, True)
    default = tiles.conv_config("backward", size, tiles.DEFAULT_ARCH)
    fits = tiles.smaller(default)[0]

    def limited(*args):
        if args[-1] != fits:
            raise OutOfResources(99_999, 40_000, "shared memory")
        return original(*args)

    monkeypatch.setattr(kernel, "conv_pointwise_backward", limited)
    with pytest.warns(RuntimeWarning, match=f"fused backward kernel .* runs in a tile of {fits} from now on"):
        BACKEND.conv_backward(*given())
    assert kernels_of(*given()) == {"conv_pointwise_backward"}
