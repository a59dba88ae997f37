"""The C++ passes against their definitions in plain PyTorch (the eager backend), evaluated in float64 on upcast inputs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from parity import assert_parity
from torch import Tensor

from fusedres.activations import parse
from fusedres.backends import cpp, eager
from fusedres.backends.eager import Pool, accum_dtype

pytestmark = pytest.mark.skipif(cpp._C is None, reason="the C++ extension is not built")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}

# (shape, channels of the buffer of which every map is a slice, or None)
SHAPES = {
    "channels of a register": ((2, 32, 7, 5), None),
    "channels not of a register": ((2, 67, 6, 5), None),
    "three channels: rows folded": ((3, 3, 9, 7), None),
    "five channels: rows folded, a rest": ((1, 5, 7, 7), None),
    "one channel": ((2, 1, 5, 5), None),
    "odd and too wide to fold": ((1, 513, 3, 3), None),
    "more channels than a chunk": ((2, 1040, 3, 3), None),
    "one row": ((1, 48, 1, 1), None),
    "one pixel an image": ((5, 24, 1, 1), None),
    "many tiles": ((2, 20, 30, 31), None),
    "several tiles of wide rows": ((1, 144, 13, 11), None),
    "slices": ((2, 32, 5, 6), 96),
    "narrow slices: no folding": ((2, 5, 6, 4), 11),
    "one channel of many": ((2, 1, 4, 5), 7),
}
# float32 and bfloat16 see every shape, the other two the shapes that take another path through the kernels
FEW = ("channels not of a register", "five channels: rows folded, a rest", "slices", "several tiles of wide rows")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param((*shape, dtype), id=f"{name}, {NAMES[dtype]}")
        for name, shape in SHAPES.items()
        for dtype in DTYPES
        if dtype in (torch.float32, torch.bfloat16) or name in FEW
    ],
)


class Slice:
    """A map that is a slice of a wider buffer full of NaN (``width`` channels), or a map of its own."""

    def __init__(self, shape: tuple[int, ...], width: int | None, dtype: torch.dtype) -> None:
        n, c, h, w = shape
        self.at = 0 if width is None else (width - c) // 2
        self.buffer = torch.full((n, width or c, h, w), torch.nan, dtype=dtype).to(memory_format=torch.channels_last)
        self.map = self.buffer[:, self.at : self.at + c]

    def neighbours_untouched(self) -> bool:
        c = self.map.shape[1]
        return all(part.isnan().all() for part in (self.buffer[:, : self.at], self.buffer[:, self.at + c :]))


class Draw:
    """Random maps and per-channel tensors of one test: the same numbers in ``dtype`` and, upcast, in float64."""

    def __init__(self, shape: tuple[int, ...], width: int | None, dtype: torch.dtype, seed: int = 0) -> None:
        self.shape, self.width, self.dtype = shape, width, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.accum = accum_dtype(dtype)

    def map(self, shape: tuple[int, ...] | None = None) -> Tensor:
        made = Slice(shape or self.shape, self.width, self.dtype).map
        return made.copy_(torch.randn(made.shape, generator=self.generator, dtype=torch.float64))

    def out(self, shape: tuple[int, ...] | None = None) -> Slice:
        return Slice(shape or self.shape, self.width, self.dtype)

    def vectors(self, rows: int) -> Tensor:
        """A per-channel tensor, column slice of a wider one, away from zero."""
        c = self.shape[1]
        values = torch.rand(rows, c + 5, generator=self.generator, dtype=torch.float64) + 0.5
        return values.to(self.accum)[:, 3 : 3 + c]

    def poisoned(self, rows: int) -> Tensor:
        return torch.full((rows, self.shape[1] + 2), torch.nan, dtype=self.accum)[:, 1:-1]


def up(value):
    """``value`` with every floating tensor in float64."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, tuple) and not isinstance(value, Pool):
        return tuple(up(v) for v in value)
    return value


def check(
    call: Callable, case: tuple, inputs: Callable[[Draw], tuple], outputs: Callable[[Draw], dict], what: str = ""
) -> None:
    """Run ``call(backend, *inputs, **outputs)``, which may return maps too, on both backends and on eager in float64.

    ``case`` is (shape, width, dtype). Few values are drawn several times: over them, eager is right by luck too often.
    """
    results: dict[str, dict[str, list[Tensor]]] = {"ours": {}, "eager": {}, "truth": {}}
    for seed in range(3 if math.prod(case[0]) > 2000 else 5):
        for name, backend in (("ours", cpp), ("eager", eager), ("truth", eager)):
            convert = up if name == "truth" else lambda v: v
            d = Draw(*case, seed)
            made = {k: convert(v) for k, v in outputs(d).items()}
            returned = call(backend, *(convert(v) for v in inputs(d)), **made)
            for i, r in enumerate(returned if isinstance(returned, tuple) else (returned,)):
                if r is not None:
                    made[f"result {i}"] = r
            for key, value in made.items():
                results[name].setdefault(key, []).append(value)
    for key, values in results["ours"].items():
        if values[0].is_floating_point():
            assert_parity(values, results["eager"][key], results["truth"][key], f"{what} {key}")
        else:
            assert all(torch.equal(a, b) for a, b in zip(values, results["eager"][key], strict=True)), f"{what} {key}"


@cases
def test_statistics(case):
    check(lambda b, x, stats: b.statistics(x, stats), case, lambda d: (d.map(),), lambda d: {"stats": d.poisoned(2)})


@cases
@pytest.mark.parametrize("residual", ["none", "plain", "affine"])
@pytest.mark.parametrize("affine", [False, True], ids=["raw", "affine"])
def test_join_forward(case, affine, residual):
    def inputs(d):
        other = None if residual == "none" else d.map()
        return d.map(), d.vectors(2) if affine else None, other, d.vectors(2) if residual == "affine" else None

    for act in ("none", "relu"):
        check(
            lambda b, *v, act=act, **k: b.join_forward(*v, act, **k),
            case,
            inputs,
            lambda d: {"stats": d.poisoned(2)},
            act,
        )
        d = Draw(*case)
        given, out = inputs(d), d.out()
        assert cpp.join_forward(*given, act, out=out.map) is out.map
        assert torch.equal(out.map, cpp.join_forward(*given, act))
        assert out.neighbours_untouched()


@cases
@pytest.mark.parametrize(
    ("act", "residual", "sums"),
    [
        ("relu", "none", 0),
        ("relu", "none", 1),
        ("relu", "plain", 0),
        ("relu", "plain", 1),  # an identity shortcut
        ("relu", "plain", 2),
        ("relu", "affine", 0),
        ("relu", "affine", 1),
        ("relu", "affine", 2),  # a projection
        ("none", "none", 1),
        ("none", "plain", 2),
    ],
)
def test_join_backward(case, act, residual, sums):
    def inputs(d):
        other = None if residual == "none" else d.map()
        return (
            d.map(),
            d.map(),
            d.vectors(2),
            d.vectors(2),
            other,
            d.vectors(2) if residual == "affine" else None,
            d.vectors(2),
        )

    def call(b, *v, **k):
        return b.join_backward(*v[:4], act, residual=v[4], residual_affine=v[5], residual_saved=v[6], **k)

    check(call, case, inputs, lambda d: {k: d.poisoned(2) for k in ("sums", "residual_sums")[:sums]})


def test_without_an_activation_the_join_returns_its_gradient():
    d = Draw((2, 8, 3, 3), None, torch.float32)
    grad = d.map()
    assert cpp.join_backward(grad, d.map(), None, None, "none") is grad


@dtypes
def test_join_backward_with_only_the_residual_sums(dtype):
    check(
        lambda b, grad, raw, other, saved, **k: b.join_backward(
            grad, raw, None, None, "relu", residual=other, residual_saved=saved, **k
        ),
        ((2, 20, 5, 5), None, dtype),
        lambda d: (d.map(), d.map(), d.map(), d.vectors(2)),
        lambda d: {"residual_sums": d.poisoned(2)},
    )


@cases
@pytest.mark.parametrize("with_raw", [False, True], ids=["without raw", "with raw"])
def test_grad_affine(case, with_raw):
    check(
        lambda b, *v: b.grad_affine(*v),
        case,
        lambda d: (d.map(), d.map() if with_raw else None, d.vectors(3)),
        lambda d: {},
    )
    d = Draw(*case)
    inputs = d.map(), d.map() if with_raw else None, d.vectors(3)
    out, expected = d.out(), cpp.grad_affine(*inputs)
    assert torch.equal(cpp.grad_affine(*inputs, out=out.map), expected)
    assert out.neighbours_untouched()
    assert torch.equal(cpp.grad_affine(*inputs, out=inputs[0]), expected), "in place"


@cases
@pytest.mark.parametrize(
    ("target", "act", "affine", "scaled", "reduce"),
    [
        ("fresh", "relu", True, False, True),  # a chain
        ("accumulate", "relu", True, True, True),  # a dense layer
        ("base", "relu", True, True, True),
        ("out", "relu", True, True, True),
        ("fresh", "none", True, True, True),
        ("accumulate", "none", True, True, True),
        ("fresh", "relu", False, False, False),  # the map is not normalised
        ("accumulate", "relu", False, False, False),
        ("out", "none", False, False, False),  # only the target
        ("base", "none", False, False, False),  # an identity shortcut
    ],
)
def test_dgrad_epilogue(case, target, act, affine, scaled, reduce):
    shape, width, dtype = case

    def call(b, da, x, before, vectors, saved, **k):
        dx = Slice(shape, width, x.dtype)
        if target == "accumulate":
            dx.map.copy_(before)
        options = {"out": {"dx": dx.map}, "accumulate": {"dx": dx.map, "accumulate": True}, "base": {"base": before}}
        result = b.dgrad_epilogue(da, x, vectors, saved, act, scaled=scaled, **options.get(target, {}), **k)
        assert dx.neighbours_untouched()
        return result

    check(
        call,
        case,
        lambda d: (d.map(), d.map(), d.map(), d.vectors(2) if affine else None, d.vectors(2)),
        lambda d: {"sums": d.poisoned(2)} if reduce else {},
    )


POOLS = {
    "stem": Pool("max", (3, 3), (2, 2), (1, 1)),
    "overlapping on every side": Pool("max", (3, 2), (1, 1), (1, 1)),
    "windows apart": Pool("max", (2, 2), (3, 3), (0, 0)),
    "uneven window": Pool("max", (3, 1), (2, 1), (1, 0)),
    "transition": Pool("mean", (2, 2), (2, 2), (0, 0)),
    "mean with a remainder": Pool("mean", (3, 2), (3, 2), (0, 0)),
    "mean of more than eight": Pool("mean", (4, 5), (4, 5), (0, 0)),
    "single pixel": Pool("mean", (1, 1), (1, 1), (0, 0)),
}
pools = pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
POOL_SHAPES = {
    "channels of a register": ((2, 32, 8, 10), None),
    "odd": ((2, 19, 7, 9), None),
    "three channels": ((2, 3, 9, 11), None),
    "more channels than a chunk": ((1, 530, 5, 5), None),
    "many tiles": ((2, 4, 17, 19), None),
    "slices": ((2, 8, 7, 8), 24),
}
pool_cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param((*shape, dtype), id=f"{name}, {NAMES[dtype]}")
        for name, shape in POOL_SHAPES.items()
        for dtype in DTYPES
        if dtype in (torch.float32, torch.bfloat16) or name in ("odd", "slices")
    ],
)


@pool_cases
@pools
def test_pool_forward(case, pool):
    for pending, act in ((True, "relu"), (False, "none")):
        check(
            lambda b, x, v, act=act, **k: b.pool_forward(x, v, act, pool, **k),
            case,
            lambda d, pending=pending: (d.map(), d.vectors(2) if pending else None),
            lambda d: {"stats": d.poisoned(2)},
            act,
        )
    d = Draw(*case)
    x, affine = d.map(), d.vectors(2)
    y, index = cpp.pool_forward(x, affine, "relu", pool)
    out = d.out(tuple(y.shape))
    assert torch.equal(cpp.pool_forward(x, affine, "relu", pool, out=out.map)[0], y)
    assert out.neighbours_untouched()
    assert index is None or index.is_contiguous(memory_format=torch.channels_last)


@pool_cases
@pools
def test_pool_backward(case, pool):
    shape, width, dtype = case

    def inputs(d):
        x, affine = d.map(), d.vectors(2)
        y, index = eager.pool_forward(x.double(), affine.double(), "relu", pool)
        return d.map(tuple(y.shape)), index, x, affine, d.vectors(2), d.vectors(3)

    def call(b, grad, index, x, affine, saved, coeff, **k):
        assert b.pool_backward(grad, index, x, affine, saved, "relu", pool, **k) is None
        out = Slice(shape, width, x.dtype)
        assert b.pool_backward(grad, index, x, affine, saved, "relu", pool, coeff=coeff, dx=out.map) is out.map
        assert out.neighbours_untouched()
        return out.map, b.pool_backward(grad, index, x, None, None, "none", pool, coeff=coeff)

    check(call, case, inputs, lambda d: {"sums": d.poisoned(2)})


@dtypes
def test_both_calls_of_the_pool_backward_in_one(dtype):
    d, pool = Draw((2, 16, 6, 6), None, dtype), POOLS["stem"]
    x, affine, saved, coeff = d.map(), d.vectors(2), d.vectors(2), d.vectors(3)
    y, index = cpp.pool_forward(x, affine, "relu", pool)
    sums, both = d.poisoned(2), d.poisoned(2)
    args = (torch.ones_like(y), index, x, affine, saved, "relu", pool)
    cpp.pool_backward(*args, sums=sums)
    assert torch.equal(cpp.pool_backward(*args, sums=both, coeff=coeff), cpp.pool_backward(*args, coeff=coeff))
    assert torch.equal(sums, both)


@dtypes
def test_max_pool_of_nan_and_infinity(dtype):
    x = Draw((2, 18, 7, 7), None, dtype).map()
    x[0, :, 2, 3], x[1, 1] = torch.nan, -torch.inf
    x[0, 5, 4, 4] = torch.nan  # two NaN in one window
    pool = POOLS["stem"]
    ours, theirs = cpp.pool_forward(x, None, "none", pool), eager.pool_forward(x, None, "none", pool)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours[1], theirs[1])


@dtypes
def test_nan_passes_through_relu_and_its_mask(dtype):
    d = Draw((1, 18, 3, 3), None, dtype)
    x, grad = d.map(), d.map()
    x[0, 2, 1, 1], x[0, 17, 2, 2], x[0, 3, 0, 0], x[0, 4, 0, 0] = torch.nan, torch.nan, torch.inf, -torch.inf
    for call in (
        lambda b: b.join_forward(x, None, None, None, "relu"),
        lambda b: b.join_forward(x, None, x, None, "none"),
        lambda b: b.join_backward(grad, x, None, None, "relu"),
        lambda b: b.join_backward(grad, grad, None, None, "relu", residual=x),
        lambda b: b.dgrad_epilogue(grad.clone(), x, None, None, "relu"),
    ):
        torch.testing.assert_close(call(cpp), call(eager), rtol=0, atol=0, equal_nan=True)


@dtypes
def test_a_nan_in_one_channel_stays_there(dtype):
    d = Draw((2, 9, 8, 8), None, dtype)
    x = d.map()
    x[0, 4, 3, 3] = torch.nan
    stats = d.poisoned(2)
    cpp.statistics(x, stats)
    assert stats.isnan().any(0).tolist() == [c == 4 for c in range(9)]


@pytest.mark.parametrize("channels", [3, 16, 67])
@pytest.mark.parametrize("mean", [1e4, -3e5])
def test_statistics_of_a_large_mean(channels, mean):
    x = (torch.randn(4, channels, 64, 64) + mean).to(memory_format=torch.channels_last)
    stats = torch.empty(2, channels)
    cpp.statistics(x, stats)
    invstd = torch.rsqrt(stats[1].double() / (x.numel() // channels))
    expected = 1 / x.double().std((0, 2, 3), correction=0)
    torch.testing.assert_close(invstd, expected, rtol=1e-4, atol=0)  # three digits and one more
    torch.testing.assert_close(stats[0].double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)


def test_statistics_where_the_mean_drifts():
    # every block has another mean: what is merged outweighs what is inside
    x = torch.randn(1, 16, 200, 40) + torch.linspace(-1e3, 1e3, 200).view(1, 1, -1, 1)
    x = x.to(memory_format=torch.channels_last)
    stats, theirs, truth = torch.empty(2, 16), torch.empty(2, 16), torch.empty(2, 16, dtype=torch.float64)
    cpp.statistics(x, stats), eager.statistics(x, theirs), eager.statistics(x.double(), truth)
    assert_parity(stats[1], theirs[1], truth[1], "M2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_half_precision_value_survives_a_copy(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.view(1, 16, 64, 64).contiguous(memory_format=torch.channels_last)
    y = cpp.join_forward(x, None, None, None, "none")
    nan = x.isnan()
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(y.view(torch.int16)[~nan], x.view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_rounding_to_half_precision_is_to_nearest_even(dtype):
    # sums of neighbours reach every kind of tie, subnormals and overflow included
    bits = torch.arange(0, 2**15, 1, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = bits[bits.isfinite()][: 2**15 // 64 * 62]
    x = bits[: bits.numel() // 64 * 64].view(1, 64, -1, 1).contiguous(memory_format=torch.channels_last)
    scale = torch.full((2, 64), 1.0)
    for factor in (0.5, 0.75, 1.0009765625, 1.5, 3.0):
        scale[0], scale[1] = factor, 0.0
        y = cpp.join_forward(x, scale, None, None, "none")
        assert torch.equal(y, (x.float() * factor).to(dtype)), factor


@pytest.mark.parametrize("shape", [(8, 64, 20, 20), (3, 5, 31, 33), (8, 2048, 5, 5)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape):
    def run() -> list[Tensor]:
        d = Draw(shape, None, torch.float32)
        x, grad, affine, saved, coeff = d.map(), d.map(), d.vectors(2), d.vectors(2), d.vectors(3)
        stats, sums, more, pooled, again = (d.poisoned(2) for _ in range(5))
        y = cpp.join_forward(x, affine, grad, None, "relu", stats=stats)
        dz = cpp.join_backward(
            grad, x, affine, saved, "relu", sums=sums, residual=y, residual_saved=saved, residual_sums=more
        )
        z, index = cpp.pool_forward(x, affine, "relu", POOLS["stem"], stats=pooled)
        cpp.pool_backward(z, index, x, affine, saved, "relu", POOLS["stem"], sums=again)
        dx = cpp.pool_backward(z, index, x, affine, saved, "relu", POOLS["stem"], coeff=coeff)
        return [stats, sums, more, pooled, again, y, dz, z, dx]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = run()
        torch.set_num_threads(3)
        several = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(single, several, strict=True))


@pytest.mark.parametrize("parameter", [None, torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("accum", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_bn_coefficients(accum, parameter):
    d = Draw((2, 37, 3, 3), None, accum)
    weight, bias, mean, var = (
        (None,) * 4 if parameter is None else (d.vectors(1)[0].to(parameter).contiguous() for _ in range(4))
    )
    found = []
    for b, dtype in ((cpp, None), (eager, None), (eager, torch.float64)):
        args = [v if v is None else (v.clone() if dtype is None else v.to(dtype)) for v in (weight, bias, mean, var)]
        stats = Draw((2, 37, 3, 3), None, accum).vectors(2)
        affine, saved = b.bn_coefficients(stats if dtype is None else stats.to(dtype), 18, *args, 0.1, 1e-5)
        found.append([affine, saved] if parameter is None else [affine, saved, *args[2:]])
    for ours, theirs, truth in zip(*found, strict=True):
        assert_parity(ours, theirs, truth)


def test_bn_coefficients_of_one_row_and_the_version_of_running_statistics():
    stats = torch.zeros(2, 4)
    mean, var = torch.zeros(4), torch.ones(4)
    versions = mean._version, var._version
    affine, saved = cpp.bn_coefficients(stats, 1, None, None, mean, var, 0.5, 0.25)
    assert torch.equal(saved[1], torch.full((4,), 2.0)) and torch.equal(var, torch.full((4,), 0.5))
    assert (mean._version, var._version) == (versions[0] + 1, versions[1] + 1)


@pytest.mark.parametrize("parameter", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_bn_frozen(dtype, parameter):
    d = Draw((2, 21, 3, 3), None, dtype)
    weight, bias = (None, None) if parameter is None else (d.vectors(1)[0].to(parameter) for _ in range(2))
    mean, var = (d.vectors(1)[0].to(parameter or dtype) for _ in range(2))
    ours, theirs = (b.bn_frozen(weight, bias, mean, var, 1e-3, dtype) for b in (cpp, eager))
    truth = eager.bn_frozen(*(up(v) for v in (weight, bias, mean, var)), 1e-3, torch.float64)
    for o, e, t in zip(ours, theirs, truth, strict=True):
        assert_parity(o, e, t)


@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
@pytest.mark.parametrize("training", [False, True], ids=["frozen", "training"])
@pytest.mark.parametrize("weighted", [False, True], ids=["no weight", "weight"])
def test_bn_backward(training, accumulate, weighted):
    def call(b, sums, weight, saved, before, coeff):
        if accumulate:
            coeff.copy_(before)
        b.bn_backward(sums, 18, weight, saved, training, coeff, accumulate)

    check(
        call,
        ((2, 21, 3, 3), None, torch.float32),
        lambda d: (d.vectors(2), d.vectors(1)[0] if weighted else None, d.vectors(2), d.vectors(3)),
        lambda d: {"coeff": d.poisoned(3)},
    )


def test_wrong_arguments_say_what_is_wrong():
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    stats = torch.empty(2, 8)
    for call, message in (
        (lambda: cpp.statistics(x.contiguous(), stats), "channels_last"),
        (lambda: cpp.statistics(x, torch.empty(2, 7)), r"stats must be \[2, 8\]"),
        (lambda: cpp.statistics(x, stats.double()), "stats must be float32"),
        (lambda: cpp.join_forward(x, None, x[:, :4], None, "none"), "residual must have the shape"),
        (lambda: cpp.join_forward(x, None, x.double(), None, "none"), "residual must have the dtype"),
        (lambda: cpp.dgrad_epilogue(x, x, None, None, "none", scaled=True), "no affine"),
        (lambda: cpp.join_backward(x, x, None, None, "none", sums=stats), "without the saved"),
        (lambda: cpp.pool_forward(x, None, "none", Pool("max", (3, 3), (1, 1), (2, 2))), "half of the window"),
        (lambda: cpp.pool_forward(x, None, "none", Pool("mean", (3, 3), (1, 1), (0, 0))), "side by side"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_an_empty_batch():
    x = torch.empty(0, 8, 4, 4).to(memory_format=torch.channels_last)
    sums = torch.full((2, 8), torch.nan)
    assert cpp.join_forward(x, None, x, None, "relu").shape == x.shape
    cpp.dgrad_epilogue(x, x, None, torch.ones(2, 8), "relu", sums=sums)
    assert torch.equal(sums, torch.zeros(2, 8))


def test_operators_follow_their_schemas():
    d = Draw((2, 8, 5, 5), 24, torch.float32)
    check_op = torch.library.opcheck
    tests = ("test_schema", "test_faketensor")
    check_op(torch.ops.fusedres_cpp.statistics.default, (d.map(), d.poisoned(2)), test_utils=tests)
    check_op(
        torch.ops.fusedres_cpp.join_forward.default,
        (d.map(), d.vectors(2), d.map(), None, *parse("silu").code, d.map(), d.vectors(2)),
        test_utils=tests,
    )
    check_op(
        torch.ops.fusedres_cpp.dgrad_epilogue.default,
        (d.map(), d.map(), d.vectors(2), d.vectors(2), 1, 0.0, d.map(), d.map(), False, True, d.vectors(2)),
        test_utils=tests,
    )


def test_what_the_backend_serves():
    assert cpp.supports(torch.device("cpu"), torch.bfloat16) is None
    assert "not on cuda" in cpp.supports(torch.device("cuda"), torch.float32)
    assert "not torch.int32" in cpp.supports(torch.device("cpu"), torch.int32)


def test_the_capability_is_chosen_by_the_environment():
    def ask(value: str) -> subprocess.CompletedProcess:
        code = "from fusedres.backends import cpp; print(cpp.cpu_capability())"
        env = os.environ | {"FUSEDRES_CPU_CAPABILITY": value}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    for name in cpp._C.cpu_capabilities():
        assert ask(name).stdout.strip() == name
    wrong = ask("sse9")
    assert wrong.returncode != 0 and "expected default, avx2, avx512 or avx512_bf16" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "avx2", "avx512", "avx512_bf16"])
def test_every_pass_on_every_capability(name):
    """This file again, in a process that uses another instruction set."""
    if name not in cpp._C.cpu_capabilities():
        pytest.skip(f"this CPU has no {name}")
    if name == cpp.cpu_capability():
        pytest.skip("what this process runs on")
    env = os.environ | {"FUSEDRES_CPU_CAPABILITY": name}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
