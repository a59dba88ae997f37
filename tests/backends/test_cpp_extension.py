"""What the C++ extension promises beyond the contract, as a library of kernels: the same bits on any number of threads, every value of 16
bits, weights in any layout, the convolutions that it takes itself, and arguments that do not fit said in words."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import forked
import pytest
import torch
from contract import CONVOLUTIONS, LARGER, Config, Convolution, configs
from support import Draw, dtype_name
from torch import Tensor

from fusedres.backends import cpp, eager
from fusedres.operands import FRESH, Epilogue, GradTarget, LazyMap
from fusedres.specs import Geometry, Pool
from fusedres.testing import assert_parity

pytestmark = pytest.mark.skipif(cpp.cpu_capability() is None, reason="the C++ extension is not built")

BACKEND = cpp.BACKEND
STEM = Pool("max", (3, 3), (2, 2), (1, 1))
OWN = {"pad": (0, 0)}
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
needs_bfloat16 = pytest.mark.skipif(
    cpp.cpu_capability() != "avx512_bf16",
    reason="this process multiplies no bfloat16 itself (CPU capability avx512_bf16)",
)


# ---- threads ---------------------------------------------------------------------------------------------------------


def with_threads(run: Callable[[], list[Tensor]]) -> None:
    """Assert that ``run`` gives the same bits on one thread and on three."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = run()
        torch.set_num_threads(3)
        several = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(single, several, strict=True))


@pytest.mark.parametrize("shape", [(8, 64, 20, 20), (3, 5, 31, 33), (8, 2048, 5, 5)], ids=str)
def test_the_number_of_threads_changes_no_bit_of_a_pass(shape):
    def run() -> list[Tensor]:
        draw = Draw(torch.float32, **OWN)
        x, grad, coeff = draw.lazy(*shape, act="relu"), draw.map(*shape), draw.vectors(3, shape[1])
        plain = x._replace(act="none")
        stats, sums, more, pooled, again = (draw.room(2, shape[1]) for _ in range(5))
        y = BACKEND.add_act_forward(plain, LazyMap(grad), "relu", stats=stats)
        residual = LazyMap(y, mean_invstd=x.mean_invstd)
        dz = BACKEND.add_act_backward(grad, plain, residual, "relu", sums=sums, residual_sums=more)
        z, index = BACKEND.pool_forward(x, STEM, stats=pooled)
        BACKEND.pool_backward(z, index, x, STEM, sums=again)
        dx = BACKEND.pool_backward(z, index, x, STEM, coeff=coeff)
        return [stats, sums, more, pooled, again, y, dz, z, dx]

    with_threads(run)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(
    "name",
    [
        "1x1 of many channels",
        "even sizes",
        "odd sizes, tiles across images",
        "channels beyond one chunk",
        "few pixels, 3x3",
        "groups of 4 abreast, of many pixels",
        "few pixels, many groups",
    ],
)
def test_the_number_of_threads_changes_no_bit_of_a_convolution(name, dtype):
    case = LARGER[name]

    def run() -> list[Tensor]:
        draw = Draw(dtype)
        x, grad, weight = draw.lazy(*case.shape, act="relu"), draw.gradient(*case.out), case.draw_weight(draw)
        stats, sums = draw.room(2, case.outputs), draw.room(2, case.shape[1])
        y = BACKEND.conv_forward(x, weight, None, case.geometry, Epilogue(stats=stats))
        return [y, stats, sums, *BACKEND.conv_backward(grad, x, weight, case.geometry, GradTarget(sums=sums))]

    with_threads(run)


# ---- convolutions ----------------------------------------------------------------------------------------------------


def routes(case: Convolution, dtype: torch.dtype) -> set[str]:
    draw = Draw(dtype, device="meta")
    x, weight = draw.lazy(*case.shape), case.draw_weight(draw)
    forward = BACKEND.routes("conv_forward", x, weight, None, case.geometry)
    backward = BACKEND.routes("conv_backward", draw.gradient(*case.out), x, weight, case.geometry, FRESH)
    return {*forward.values(), *backward.values()}


#: groups that fill no vector, alone or abreast
NARROW = ("groups", "depthwise multiplier")
#: and those on which the library's products of pairs are faster than products of numbers
PAIRED = (
    "groups of a register",
    "groups that narrow, strided",
    "groups of 8 abreast, strided",
    "13 groups of 8 abreast",
    "groups of 16 abreast, 5x5",
)


@pytest.mark.parametrize("name", CONVOLUTIONS.cases)
def test_float32_convolutions_but_for_narrow_groups_are_its_own(name):
    case = CONVOLUTIONS.cases[name]
    assert routes(case, torch.float32) == {"library" if name in NARROW else "fused"}
    assert routes(case, torch.float64) == routes(case, torch.float16) == {"library"}


@needs_bfloat16
@pytest.mark.parametrize("name", CONVOLUTIONS.cases)
def test_bfloat16_convolutions_of_even_channels_are_its_own(name):
    """It is multiplied in pairs of channels."""
    case, groups = CONVOLUTIONS.cases[name], CONVOLUTIONS.cases[name].geometry.groups
    even = case.shape[1] // groups % 2 == case.outputs // groups % 2 == 0
    own = even and name not in NARROW + PAIRED or name.startswith("depthwise") and name not in NARROW
    assert routes(case, torch.bfloat16) == {"fused" if own else "library"}


@pytest.mark.parametrize(
    ("read", "written", "groups", "taps", "size", "own"),
    [
        (4, 2, 4, 1, 8, True),
        (2, 8, 4, 1, 8, False),
        (16, 16, 4, 9, 8, True),
        (32, 8, 4, 9, 8, True),
        (8, 8, 4, 9, 8, True),
        (8, 8, 3, 9, 8, True),
        (4, 4, 32, 9, 40, True),
        (4, 8, 32, 9, 40, cpp._lanes() == 4),
        (2, 2, 32, 9, 40, True),
        (1, 1, 4, 9, 8, True),
        (1, 1, 64, 9, 40, True),
    ],
)
def test_groups_are_its_own_where_they_fill_or_share_vectors_or_would_be_copied_out(
    read, written, groups, taps, size, own
):
    kernel = 1 if taps == 1 else 3
    weight = torch.Size((groups * written, read, kernel, kernel))
    geometry = Geometry((1, 1), (kernel // 2, kernel // 2), (1, 1), groups)
    found = cpp._own_conv(torch.Size((1, groups * read, size, size)), weight, torch.float32, geometry)
    assert (found is not None) == own


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "own"),
    [
        ((3, 7), (2, 2), (1, 1), True),
        ((16, 3), (1, 1), (1, 1), True),
        ((3, 8), (1, 1), (1, 1), False),
        ((3, 3), (3, 3), (1, 1), False),
        ((3, 3), (1, 1), (2, 1), True),
        ((3, 3), (1, 1), (1, 2), False),
    ],
)
def test_depthwise_convolutions_are_its_own_but_for_wide_rows_and_far_taps(kernel, stride, dilation, own):
    case = Convolution((2, 32, 40, 24), 32, kernel, Geometry(stride, (2, 2), dilation, 32))
    assert routes(case, torch.float32) == {"fused" if own else "library"}


def test_a_weight_of_another_number_of_groups_is_refused_by_the_operator():
    draw = Draw(torch.float32)
    x, weight, out = draw.map(2, 8, 4, 4), draw.weight(8, 4, 1, 1), draw.hole(2, 8, 4, 4)
    with pytest.raises(RuntimeError, match="do not belong to one convolution"):
        torch.ops.fusedres_cpp.conv_forward(
            x, None, 0, 0.0, weight, None, [1, 1, 0, 0, 1, 1], out, None, None, None, None, 0, 0.0
        )


@needs_bfloat16
def test_odd_channels_in_bfloat16_are_refused_by_the_operator():
    draw = Draw(torch.bfloat16)
    x, weight, out = draw.map(2, 13, 4, 4), draw.weight(5, 13, 1, 1), draw.hole(2, 5, 4, 4)
    with pytest.raises(RuntimeError, match=r"even numbers of channels, found 13 and 5"):
        torch.ops.fusedres_cpp.conv_forward(
            x, None, 0, 0.0, weight, None, [1, 1, 0, 0, 1, 1], out, None, None, None, None, 0, 0.0
        )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["3x3 strided", "growth rate"], ids=["direct", "winograd"])
def test_a_weight_may_have_any_layout_and_its_gradient_has_it_too(name, layout):
    case = LARGER[name]

    def run(layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
        draw = Draw(torch.float32)
        x, grad = draw.lazy(*case.shape, act="relu"), draw.gradient(*case.out)
        weight = draw.weight(*case.weight).contiguous(memory_format=layout)
        _, dw = BACKEND.conv_backward(grad, x, weight, case.geometry)
        return weight, BACKEND.conv_forward(x, weight, None, case.geometry), dw

    weight, y, dw = run(layout)
    _, wanted, _ = run(torch.preserve_format)
    assert torch.equal(y, wanted) and dw.stride() == weight.stride()


# ---- passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", configs(["cpp"]), ids=str)
def test_both_calls_of_the_pool_backward_may_be_one(config: Config):
    draw = config.draw(**OWN)
    x, grad, coeff = draw.lazy(2, 16, 6, 6, act="relu"), draw.map(2, 16, 3, 3), draw.vectors(3, 16)
    _, index = BACKEND.pool_forward(x, STEM)
    sums, both = draw.room(2, 16), draw.room(2, 16)
    BACKEND.pool_backward(grad, index, x, STEM, sums=sums)
    dx = BACKEND.pool_backward(grad, index, x, STEM, sums=both, coeff=coeff)
    assert torch.equal(dx, BACKEND.pool_backward(grad, index, x, STEM, coeff=coeff)) and torch.equal(sums, both)


def test_statistics_where_the_mean_drifts():
    """Every block has another mean: what is merged outweighs what is inside."""
    x = torch.randn(1, 16, 200, 40) + torch.linspace(-1e3, 1e3, 200).view(1, 1, -1, 1)
    x = x.to(memory_format=torch.channels_last)
    stats, theirs, truth = torch.empty(2, 16), torch.empty(2, 16), torch.empty(2, 16, dtype=torch.float64)
    BACKEND.statistics(x, stats)
    eager.BACKEND.statistics(x, theirs)
    eager.BACKEND.statistics(x.double(), truth)
    assert_parity(stats[1], theirs[1], truth[1], "M2")


@halves
def test_every_half_precision_value_survives_a_copy(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.view(1, 16, 64, 64).contiguous(memory_format=torch.channels_last)
    y, nan = BACKEND.materialize(LazyMap(x)), x.isnan()
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(y.view(torch.int16)[~nan], x.view(torch.int16)[~nan])


@halves
def test_rounding_to_half_precision_is_to_nearest_even(dtype):
    # sums of neighbours reach every kind of tie, subnormals and overflow included
    bits = torch.arange(0, 2**15, 1, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = bits[bits.isfinite()][: 2**15 // 64 * 62]
    x = bits[: bits.numel() // 64 * 64].view(1, 64, -1, 1).contiguous(memory_format=torch.channels_last)
    for factor in (0.5, 0.75, 1.0009765625, 1.5, 3.0):
        scale_shift = torch.stack([torch.full((64,), factor), torch.zeros(64)])
        y = BACKEND.add_act_forward(LazyMap(x, scale_shift))
        assert torch.equal(y, (x.float() * factor).to(dtype)), factor


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_wrong_arguments_say_what_is_wrong():
    x, stats = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last), torch.empty(2, 8)
    lazy = LazyMap(x)
    for call, message in (
        (lambda: BACKEND.statistics(x.contiguous(), stats), "channels_last"),
        (lambda: BACKEND.statistics(x, torch.empty(2, 7)), r"stats must be \[2, 8\]"),
        (lambda: BACKEND.statistics(x, stats.double()), "stats must be float32"),
        (lambda: BACKEND.add_act_forward(lazy, LazyMap(x[:, :4])), "residual must have the shape"),
        (lambda: BACKEND.add_act_forward(lazy, LazyMap(x.double())), "residual must have the dtype"),
        (lambda: BACKEND.dgrad_epilogue(x, lazy, GradTarget(scaled=True)), "scale of scale_shift"),
        (lambda: BACKEND.add_act_backward(x, lazy, sums=stats), "without mean_invstd"),
        (lambda: BACKEND.pool_forward(lazy, Pool("max", (3, 3), (1, 1), (2, 2))), "half of the window"),
        (lambda: BACKEND.pool_forward(lazy, Pool("mean", (3, 3), (1, 1), (0, 0))), "side by side"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_a_device_and_a_dtype_that_it_does_not_serve_are_named():
    assert "not on cuda" in BACKEND.supports(torch.device("cuda"), torch.float32)
    assert "not torch.int32" in BACKEND.supports(torch.device("cpu"), torch.int32)


def test_operators_follow_their_schemas():
    draw, ops = Draw(torch.float32), torch.ops.fusedres_cpp
    silu = cpp._code("silu")
    for operator, args in (
        (ops.statistics, (draw.map(2, 8, 5, 5), draw.room(2, 8))),
        (
            ops.add_act_forward,
            (*_map(draw), draw.map(2, 8, 5, 5), None, *silu, draw.filled(2, 8, 5, 5), draw.room(2, 8)),
        ),
        (
            ops.dgrad_epilogue,
            (draw.filled(2, 8, 5, 5), *_map(draw), draw.mean_invstd(8), 1, 0.0, draw.filled(2, 8, 5, 5))
            + (draw.map(2, 8, 5, 5), False, True, draw.room(2, 8)),
        ),
    ):
        torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))


def _map(draw: Draw) -> tuple[Tensor, Tensor]:
    return draw.map(2, 8, 5, 5), draw.scale_shift(8)


def test_the_capability_is_chosen_by_the_environment():
    # a process of its own for each, which has torch but not yet the extension
    code = """
        import os, sys
        import torch
        for name in sys.argv[1:]:
            if os.fork() == 0:
                os.environ["FUSEDRES_CPU_CAPABILITY"] = name
                from fusedres.backends import cpp
                print(cpp.cpu_capability(), flush=True)
                os._exit(0)
            status = os.wait()[1]
        sys.exit(status != 0)
        """
    names = [*cpp._C.cpu_capabilities(), "sse9"]
    done = forked.python(["-c", textwrap.dedent(code), *names])
    assert done.stdout.split() == names[:-1]
    assert done.returncode == 1 and "expected default, avx2, avx512 or avx512_bf16" in done.stderr
