"""Every primitive of the triton backend against the eager definition in float64, in Triton's interpreter where there is
no GPU.

Maps are channel slices of wider buffers wherever a primitive may get one, outputs hold NaN before the call, and what
lies beside a slice must hold it afterwards.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
pytest.importorskip("triton")

from parity import assert_parity, error  # noqa: E402

from fusedres.backends import eager  # noqa: E402
from fusedres.backends import triton as fused  # noqa: E402
from fusedres.backends.eager import Geometry, Pool  # noqa: E402
from fusedres.kernels import helpers, join, pool, reduce  # noqa: E402
from fusedres.kernels.reduce import merge  # noqa: E402

DEVICE = "cpu" if helpers.INTERPRETED else "cuda"
if helpers.INTERPRETED:
    DTYPES = [torch.float32, torch.float16]  # the interpreter computes bfloat16 wrongly
else:
    DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")
# reductions over the rows of a map, by the names of their results below
REDUCED = ("mean", "M2", "sum dz", "sum dz xhat")
# masked lanes may compute inf - inf, which NumPy reports
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def exact_and_fused():
    """The fused kernels, against a reference without TF32: the rule compares IEEE float32."""
    torch.manual_seed(0)
    with fused.use_plan("fused"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# ---- inputs ----------------------------------------------------------------------------------------------------------


class Inputs:
    """Draws of random operands, the same numbers for every backend: ``dtype`` for two of them, float64 for the
    truth."""

    def __init__(self, dtype: torch.dtype, seed: int, double: bool) -> None:
        self.storage = torch.float64 if double else dtype
        self.accum = torch.float64 if double else torch.float32
        self._dtype, self._generator = dtype, torch.Generator().manual_seed(seed)
        self._written: list[tuple[torch.Tensor, int, int]] = []

    def _draw(self, shape, dtype, spread=1.0, mean=0.0):
        # rounded to the dtype first, so that float64 sees what the others see
        return (torch.randn(shape, generator=self._generator, dtype=torch.float64) * spread + mean).to(dtype)

    def map(self, n, c, h, w, *, mean=0.0):
        """A map, in the middle of a buffer whose other channels hold NaN."""
        buffer = torch.full((n, c + 8, h, w), NAN, dtype=self.storage, device=DEVICE)
        buffer = buffer.contiguous(memory_format=torch.channels_last)
        buffer[:, 3 : 3 + c] = self._draw((n, c, h, w), self._dtype, mean=mean).to(buffer)
        return buffer[:, 3 : 3 + c]

    def hole(self, n, c, h, w):
        """A slice that holds NaN, to be written into; :meth:`check` asserts that its neighbours still do."""
        buffer = torch.full((n, c + 5, h, w), NAN, dtype=self.storage, device=DEVICE)
        buffer = buffer.contiguous(memory_format=torch.channels_last)
        self._written.append((buffer, 2, 2 + c))
        return buffer[:, 2 : 2 + c]

    def filled(self, n, c, h, w):
        """A slice with values, to be accumulated into."""
        target = self.hole(n, c, h, w)
        target.copy_(self._draw((n, c, h, w), self._dtype).to(target))
        return target

    def weight(self, k, c, r, s):
        return self._draw((k, c, r, s), self._dtype, spread=(c * r * s) ** -0.5).to(DEVICE, self.storage)

    def parameter(self, c):
        return self._draw((c,), self._dtype).to(DEVICE, self.storage)

    def vectors(self, rows, c):
        """Per-channel values in accum precision, as a column slice of a wider tensor."""
        return self._draw((rows, c + 3), torch.float32).to(DEVICE, self.accum)[:, 1 : 1 + c]

    def saved(self, c):
        values = self.vectors(2, c)
        values[1].abs_().add_(0.5)
        return values

    def out_vectors(self, rows, c):
        return torch.full((rows, c + 3), NAN, dtype=self.accum, device=DEVICE)[:, 1 : 1 + c]

    def check(self) -> None:
        for buffer, start, stop in self._written:
            assert buffer[:, :start].isnan().all() and buffer[:, stop:].isnan().all(), "wrote beside its slice"


def compare(step, dtype: torch.dtype, repeat: bool = False) -> None:
    """Assert that ``step(backend, inputs) -> results`` on the triton backend is as right as on eager; on a GPU, or with
    ``repeat``, also that a second run gives the same bits."""

    def run(backend, double=False):
        inputs = Inputs(dtype, 0, double)
        results = step(backend, inputs)
        inputs.check()
        return {key: value for key, value in results.items() if value is not None}

    ours, theirs, truth = run(fused), run(eager), run(eager, double=True)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if not value.is_floating_point():
            assert torch.equal(value, theirs[key]), key
        elif helpers.INTERPRETED and key.endswith(REDUCED):
            # NumPy adds the rows of a tile one after the other, a GPU as a tree: some roundings more, in float32, than
            # the rule allows
            for mine, other in zip(error(value, truth[key]), error(theirs[key], truth[key]), strict=True):
                assert mine <= 2 * other + 2e-6, f"{key}: error {mine:.3g}, eager's own {other:.3g}"
        else:
            assert_parity(value, theirs[key], truth[key], key)
    if repeat or not helpers.INTERPRETED:
        for key, value in run(fused).items():
            assert torch.equal(value, ours[key]), f"{key}: two runs differ"


# ---- convolutions ----------------------------------------------------------------------------------------------------

# N, C, H, W, K, kernel, stride, padding, dilation, groups
CONVOLUTIONS = {
    "1x1": (2, 16, 5, 4, 32, 1, 1, 0, 1, 1),  # the plain product, aligned: no padding, no masked taps
    "1x1-odd": (2, 5, 7, 5, 35, 1, 1, 0, 1, 1),  # nothing divides a tile or 8
    "1x1-tiles": (2, 72, 9, 9, 136, 1, 1, 0, 1, 1),  # more than one tile in rows, K and the reduced dimension
    "1x1-stride2": (2, 6, 7, 6, 9, 1, 2, 0, 1, 1),  # a projection: three of four residues meet no tap
    "1x1-pad": (1, 5, 4, 5, 6, 1, 1, 1, 1, 1),  # the border is a product of zeros, after the affine
    "3x3": (2, 8, 6, 5, 8, 3, 1, 1, 1, 1),
    "3x3-odd": (1, 35, 5, 9, 19, 3, 1, 1, 1, 1),
    "3x3-valid": (2, 5, 6, 5, 7, 3, 1, 0, 1, 1),  # no padding, yet the input gradient reaches over the border
    "3x3-stride2": (2, 5, 8, 7, 6, 3, 2, 1, 1, 1),  # even and odd sizes: residues of different extent
    "3x3-stride3": (1, 5, 10, 8, 6, 3, 3, 0, 1, 1),  # the last column meets no window
    "3x3-dilated": (2, 5, 8, 9, 6, 3, 1, 2, 2, 1),
    "3x3-dilated-stride2": (1, 5, 9, 8, 6, 3, 2, 2, 2, 1),  # dilation and stride share a factor
    "3x3-dilated3-stride2": (1, 5, 9, 10, 6, 3, 2, 3, 3, 1),
    "mixed": (1, 5, 7, 9, 6, (3, 2), (2, 1), (0, 1), (1, 2), 1),  # the dimensions told apart
    "groups": (2, 9, 5, 4, 15, 3, 1, 1, 1, 3),
    "depthwise": (2, 3, 6, 5, 3, 3, 1, 1, 1, 3),
    "depthwise-multiplier": (1, 2, 6, 5, 4, 3, 2, 1, 1, 2),
    "stem": (1, 3, 9, 11, 16, 7, 2, 3, 1, 1),
    "pixel": (3, 5, 1, 1, 6, 1, 1, 0, 1, 1),  # maps of one pixel, whose strides say nothing
    "row": (2, 5, 1, 9, 6, 3, 1, 1, 1, 1),
}


def unpack(case):
    n, c, h, w, k, kernel, *parts, groups = CONVOLUTIONS[case]
    kernel, *parts = ((v, v) if isinstance(v, int) else v for v in (kernel, *parts))
    geometry = Geometry(*parts, groups)
    out = tuple(
        (size + 2 * geometry.padding[i] - geometry.dilation[i] * (kernel[i] - 1) - 1) // geometry.stride[i] + 1
        for i, size in enumerate((h, w))
    )
    return (n, c, h, w), (n, k, *out), (k, c // groups, *kernel), geometry


each_convolution = pytest.mark.parametrize("case", CONVOLUTIONS)


@each_dtype
@each_convolution
def test_conv_forward_training(case, dtype):
    """Pending affine and ReLU, bias, statistics, into a slice."""
    shape, out_shape, weight_shape, geometry = unpack(case)

    def step(backend, draw):
        x, affine = draw.map(*shape), draw.vectors(2, shape[1])
        weight, bias = draw.weight(*weight_shape), draw.parameter(out_shape[1])
        out, stats = draw.hole(*out_shape), draw.out_vectors(2, out_shape[1])
        y = backend.conv_forward(x, affine, "relu", weight, bias, geometry, out=out, stats=stats)
        assert y is out
        return {"out": y, "mean": stats[0], "M2": stats[1]}

    compare(step, dtype)


# affine, act, bias, out given, out_affine, residual, residual_affine, out_act
INFERENCE = {
    "bare": (False, "none", False, False, False, False, False, "none"),
    "relu-before": (False, "relu", False, False, False, False, False, "none"),
    "affine-before": (True, "none", True, False, False, False, False, "none"),
    "bn": (False, "none", False, True, True, False, False, "relu"),
    "join-identity": (True, "relu", False, False, True, True, False, "relu"),
    "join-projection": (False, "none", True, True, True, True, True, "relu"),
    "add": (True, "relu", False, False, False, True, False, "none"),
}


@each_dtype
@pytest.mark.parametrize("variant", INFERENCE)
def test_conv_forward_inference(variant, dtype):
    affine, act, bias, given, out_affine, residual, residual_affine, out_act = INFERENCE[variant]
    shape, out_shape, weight_shape, geometry = unpack("3x3-odd")

    def step(backend, draw):
        y = backend.conv_forward(
            draw.map(*shape), draw.vectors(2, shape[1]) if affine else None, act, draw.weight(*weight_shape),
            draw.parameter(out_shape[1]) if bias else None, geometry,
            out=draw.hole(*out_shape) if given else None,
            out_affine=draw.vectors(2, out_shape[1]) if out_affine else None,
            residual=draw.map(*out_shape) if residual else None,
            residual_affine=draw.vectors(2, out_shape[1]) if residual_affine else None,
            out_act=out_act,
        )  # fmt: skip
        assert given or y.is_contiguous(memory_format=torch.channels_last)
        return {"out": y}

    compare(step, dtype)


def conv_backward(
    backend, draw, case, *, pending="raw", affine=True, act="relu", target="fresh", scaled=False, sums=True,
    need=(True, True),
):  # fmt: skip
    shape, out_shape, weight_shape, geometry = unpack(case)
    grad, raw, coeff = draw.map(*out_shape), draw.map(*out_shape), draw.vectors(3, out_shape[1])
    x, vectors, saved = draw.map(*shape), draw.vectors(2, shape[1]), draw.saved(shape[1])
    given = {"fresh": None, "accumulate": draw.filled}.get(target, draw.hole)
    given = given and given(*shape)
    reduced = draw.out_vectors(2, shape[1]) if sums else None
    dx, dw = backend.conv_backward(
        grad, raw if pending == "raw" else None, None if pending == "none" else coeff, x, vectors if affine else None,
        saved if affine else None, act, draw.weight(*weight_shape), geometry, need_dx=need[0], need_dw=need[1],
        dx=given, base=draw.map(*shape) if target == "base" else None, accumulate=target == "accumulate", scaled=scaled,
        sums=reduced,
    )  # fmt: skip
    assert (dx is not None, dw is not None) == need
    if dx is not None and given is not None:
        assert dx is given
    found = {"dx": dx, "dw": dw}
    if sums:
        found |= {"sum dz": reduced[0], "sum dz xhat": reduced[1]}
    return found


@each_dtype
@each_convolution
def test_conv_backward(case, dtype):
    """Both operands pending, mask, sums, scaled accumulation into a slice."""
    compare(lambda b, d: conv_backward(b, d, case, target="accumulate", scaled=True), dtype)


BACKWARD = {
    "bare": {"pending": "none", "affine": False, "act": "none", "sums": False},
    "bare-base": {"pending": "none", "affine": False, "act": "none", "sums": False, "target": "base"},
    "bare-accumulate": {"pending": "none", "affine": False, "act": "none", "sums": False, "target": "accumulate"},
    "relu-without-affine": {"pending": "none", "affine": False, "sums": False},
    "eval": {"pending": "coeff"},  # a BatchNorm by running statistics: raw is None, only p (and r) count
    "no-act": {"act": "none"},
    "no-sums": {"sums": False},
    "slice": {"target": "slice"},
    "base-scaled": {"target": "base", "scaled": True},
    "scaled-only": {"act": "none", "sums": False, "scaled": True},
    "dx-only": {"need": (True, False)},
    "dw-only": {"need": (False, True), "sums": False},
}


@each_dtype
@pytest.mark.parametrize("variant", BACKWARD)
def test_conv_backward_variants(variant, dtype):
    compare(lambda b, d: conv_backward(b, d, "3x3-odd", **BACKWARD[variant]), dtype)


@each_dtype
def test_many_pixels_are_split(dtype):
    """Enough pixels for several tiles of statistics and several splits of the weight's gradient; two runs give the same
    bits."""
    shape, geometry = (2, 5, 18, 19), Geometry((1, 1), (0, 0), (1, 1), 1)

    def step(backend, draw):
        x, affine, weight = draw.map(*shape), draw.vectors(2, 5), draw.weight(6, 5, 1, 1)
        stats, sums = draw.out_vectors(2, 6), draw.out_vectors(2, 5)
        y = backend.conv_forward(x, affine, "relu", weight, None, geometry, stats=stats)
        dx, dw = backend.conv_backward(
            draw.map(2, 6, 18, 19), draw.map(2, 6, 18, 19), draw.vectors(3, 6), x, affine, draw.saved(5), "relu",
            weight, geometry, sums=sums,
        )  # fmt: skip
        return {"y": y, "mean": stats[0], "M2": stats[1], "dx": dx, "dw": dw, "sum dz": sums[0], "sum dz xhat": sums[1]}

    with helpers.record() as launches:
        step(fused, Inputs(dtype, 0, False))
    wgrad = next(launch for launch in launches if launch.kernel.__name__ == "conv_wgrad_kernel")
    assert wgrad.grid[1] > 1
    compare(step, dtype, repeat=True)


@pytest.mark.parametrize("plan", ["fused", "vendor"])
def test_plan(plan):
    """The plan decides which path runs, and both compute the same."""
    shape, out_shape, weight_shape, geometry = unpack("3x3-stride2")

    def step(backend, draw):
        stats = draw.out_vectors(2, out_shape[1])
        y = backend.conv_forward(
            draw.map(*shape), draw.vectors(2, shape[1]), "relu", draw.weight(*weight_shape), None, geometry, stats=stats
        )
        return {"y": y, "mean": stats[0], "M2": stats[1]}

    with fused.use_plan(plan):
        compare(step, torch.float32)
        compare(lambda b, d: conv_backward(b, d, "3x3-stride2", target="base", scaled=True), torch.float32)
        with helpers.record() as launches:
            step(fused, Inputs(torch.float32, 0, False))
    names = {launch.kernel.__name__ for launch in launches}
    assert ("conv_forward_kernel" in names) == (plan == "fused")
    with pytest.raises(ValueError, match="unknown plan"):
        fused.use_plan("both")


# ---- passes ----------------------------------------------------------------------------------------------------------

SHAPES = {
    "odd": (2, 5, 3, 7),
    "aligned": (2, 16, 4, 4),
    "wide": (1, 131, 3, 5),  # more channels than a block
    "long": (2, 35, 9, 13),  # several tiles of rows
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@each_dtype
@each_shape
def test_statistics(shape, dtype):
    def step(backend, draw):
        stats = draw.out_vectors(2, shape[1])
        backend.statistics(draw.map(*shape, mean=3.0), stats)
        return {"mean": stats[0], "M2": stats[1]}

    compare(step, dtype)


JOINS = {
    "copy": (False, False, False, "none"),
    "normalise": (True, False, False, "relu"),
    "identity": (True, True, False, "relu"),
    "projection": (True, True, True, "relu"),
    "add": (False, True, False, "none"),
}


@each_dtype
@each_shape
@pytest.mark.parametrize("variant", JOINS)
def test_join(variant, shape, dtype):
    """Forward into a slice with statistics, and backward with the sums of both BatchNorms."""
    has_affine, has_residual, has_residual_affine, act = JOINS[variant]
    channels = shape[1]

    def step(backend, draw):
        raw, affine = draw.map(*shape), draw.vectors(2, channels) if has_affine else None
        residual = draw.map(*shape) if has_residual else None
        residual_affine = draw.vectors(2, channels) if has_residual_affine else None
        stats, sums, residual_sums = (draw.out_vectors(2, channels) for _ in range(3))
        out = draw.hole(*shape)
        assert backend.join_forward(raw, affine, residual, residual_affine, act, out=out, stats=stats) is out
        grad = draw.map(*shape)
        dz = backend.join_backward(
            grad, raw, affine, draw.saved(channels), act, sums=sums, residual=residual, residual_affine=residual_affine,
            residual_saved=draw.saved(channels), residual_sums=residual_sums if has_residual_affine else None,
        )  # fmt: skip
        assert act != "none" or dz is grad
        found = {"out": out, "mean": stats[0], "M2": stats[1], "dz": dz, "sum dz": sums[0], "sum dz xhat": sums[1]}
        if has_residual_affine:
            found |= {"residual sum dz": residual_sums[0], "residual sum dz xhat": residual_sums[1]}
        return found

    compare(step, dtype)


@each_dtype
def test_join_backward_without_sums(dtype):
    def step(backend, draw):
        raw, grad = draw.map(2, 5, 3, 7), draw.map(2, 5, 3, 7)
        sums = draw.out_vectors(2, 5)
        dz = backend.join_backward(
            grad, raw, None, None, "relu", residual=draw.map(2, 5, 3, 7), residual_affine=draw.vectors(2, 5),
            residual_saved=draw.saved(5), residual_sums=sums,
        )  # fmt: skip
        return {"dz": dz, "residual sum dz": sums[0], "residual sum dz xhat": sums[1]}

    compare(step, dtype)


@each_dtype
@each_shape
@pytest.mark.parametrize("with_raw", [True, False], ids=["training", "eval"])
def test_grad_affine(with_raw, shape, dtype):
    def step(backend, draw):
        grad, raw, coeff = draw.map(*shape), draw.map(*shape) if with_raw else None, draw.vectors(3, shape[1])
        fresh = backend.grad_affine(grad, raw, coeff)
        out = draw.hole(*shape)
        out.copy_(grad)
        assert backend.grad_affine(out, raw, coeff, out=out) is out
        return {"fresh": fresh, "in place": out}

    compare(step, dtype)


@each_dtype
@each_shape
@pytest.mark.parametrize("target", ["fresh", "base", "accumulate"])
def test_dgrad_epilogue(target, shape, dtype):
    def step(backend, draw):
        da = draw.map(*shape).contiguous(memory_format=torch.channels_last)
        sums = draw.out_vectors(2, shape[1])
        dx = draw.hole(*shape) if target == "base" else draw.filled(*shape) if target == "accumulate" else None
        found = backend.dgrad_epilogue(
            da, draw.map(*shape), draw.vectors(2, shape[1]), draw.saved(shape[1]), "relu", dx=dx,
            base=draw.map(*shape) if target == "base" else None, accumulate=target == "accumulate",
            scaled=target != "fresh", sums=sums,
        )  # fmt: skip
        return {"dx": found, "sum dz": sums[0], "sum dz xhat": sums[1]}

    compare(step, dtype)


@each_dtype
def test_programs_walk_several_tiles(dtype, monkeypatch):
    """As on large maps: a program's chunk is several tiles, the last chunk and the last tile are short."""
    for module in (join, pool):
        monkeypatch.setattr(module, "pass_config", lambda *_: join.PassConfig(BLOCK_M=4, BLOCK_C=8, chunk=12))
    shape, window = (2, 11, 5, 7), Pool("max", (3, 3), (1, 1), (1, 1))

    def step(backend, draw):
        x, affine, saved = draw.map(*shape), draw.vectors(2, 11), draw.saved(11)
        stats, sums, pooled_stats, pooled_sums = (draw.out_vectors(2, 11) for _ in range(4))
        y = backend.join_forward(x, affine, None, None, "relu", stats=stats)
        dz = backend.join_backward(draw.map(*shape), x, affine, saved, "relu", sums=sums)
        pooled, index = backend.pool_forward(x, affine, "relu", window, stats=pooled_stats)
        backend.pool_backward(draw.map(*shape), index, x, affine, saved, "relu", window, sums=pooled_sums)
        found = {"y": y, "dz": dz, "pooled": pooled, "index": index}
        for i, name in enumerate(("mean", "M2")):
            found |= {name: stats[i], f"pooled {name}": pooled_stats[i]}
        for i, name in enumerate(("sum dz", "sum dz xhat")):
            found |= {name: sums[i], f"pooled {name}": pooled_sums[i]}
        return found

    compare(step, dtype)


# ---- pooling ---------------------------------------------------------------------------------------------------------

POOLS = {
    "max-stem": Pool("max", (3, 3), (2, 2), (1, 1)),
    "max-plain": Pool("max", (2, 2), (2, 2), (0, 0)),
    "max-sparse": Pool("max", (2, 2), (3, 3), (0, 0)),  # pixels that lie in no window
    "max-mixed": Pool("max", (3, 2), (1, 2), (1, 0)),
    "mean-2x2": Pool("mean", (2, 2), (2, 2), (0, 0)),  # a transition; an odd size drops its remainder
    "mean-global": Pool("mean", (5, 7), (5, 7), (0, 0)),  # the head
}


@each_dtype
@pytest.mark.parametrize("channels", [5, 16])
@pytest.mark.parametrize("case", POOLS)
def test_pool(case, channels, dtype):
    pool = POOLS[case]
    # ties are the rule after a ReLU: the first position must win, as in torch
    shape = (2, channels, 5, 7)

    def step(backend, draw):
        x, affine, saved = draw.map(*shape), draw.vectors(2, channels), draw.saved(channels)
        size = [(shape[2 + i] + 2 * pool.padding[i] - pool.kernel[i]) // pool.stride[i] + 1 for i in range(2)]
        out, stats = draw.hole(2, channels, *size), draw.out_vectors(2, channels)
        y, index = backend.pool_forward(x, affine, "relu", pool, out=out, stats=stats)
        assert y is out
        fresh, _ = backend.pool_forward(x, None, "none", pool)
        args = (draw.map(2, channels, *size), index, x, affine, saved, "relu", pool)
        sums = draw.out_vectors(2, channels)
        assert backend.pool_backward(*args, sums=sums) is None
        coeff = draw.vectors(3, channels)
        dx = backend.pool_backward(*args, coeff=coeff)
        given = draw.hole(*shape)
        assert backend.pool_backward(*args, coeff=coeff, dx=given) is given
        found = {"y": y, "fresh": fresh, "mean": stats[0], "M2": stats[1], "dx": dx, "dx in slice": given}
        if index is not None:
            assert index.is_contiguous(memory_format=torch.channels_last)
            found["index"] = index
        return found | {"sum dz": sums[0], "sum dz xhat": sums[1]}

    compare(step, dtype)


# ---- C-sized ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [5, 300])  # 300: more than one block
@pytest.mark.parametrize("parameters", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("momentum", [0.1, 1.0])
@pytest.mark.parametrize("count", [2, 77])
def test_bn_coefficients(count, momentum, parameters, channels):
    def step(backend, draw):
        stats = draw.vectors(2, channels)
        stats[1].abs_().mul_(count)
        weight, bias = (draw.parameter(channels) if parameters else None for _ in range(2))
        running = (draw.parameter(channels), draw.parameter(channels).abs()) if parameters else (None, None)
        affine, saved = backend.bn_coefficients(stats, count, weight, bias, *running, momentum, 1e-5)
        found = {"scale": affine[0], "shift": affine[1], "center": saved[0], "invstd": saved[1]}
        return found | ({"running_mean": running[0], "running_var": running[1]} if parameters else {})

    compare(step, torch.float32)


@each_dtype
@pytest.mark.parametrize("parameters", [True, False], ids=["affine", "plain"])
def test_bn_frozen(parameters, dtype):
    def step(backend, draw):
        weight, bias = (draw.parameter(35) if parameters else None for _ in range(2))
        mean, variance = draw.parameter(35), draw.parameter(35).abs()
        kept = mean.clone(), variance.clone()
        affine, saved = backend.bn_frozen(weight, bias, mean, variance, 1e-5, draw.accum)
        assert torch.equal(mean, kept[0]) and torch.equal(variance, kept[1])
        return {"scale": affine[0], "shift": affine[1], "center": saved[0], "invstd": saved[1]}

    compare(step, dtype)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("accumulate", [True, False], ids=["accumulate", "write"])
@pytest.mark.parametrize("parameters", [True, False], ids=["affine", "plain"])
def test_bn_backward(parameters, accumulate, training):
    def step(backend, draw):
        sums, saved = draw.vectors(2, 35), draw.saved(35)
        weight = draw.parameter(35) if parameters else None
        coeff = draw.vectors(3, 35) if accumulate else draw.out_vectors(3, 35)
        backend.bn_backward(sums, 77, weight, saved, training, coeff, accumulate)
        return {"p": coeff[0], "q": coeff[1], "r": coeff[2]}

    compare(step, torch.float32)


def test_merge_of_many_tiles():
    """More tiles than one program takes: two levels, for sums and for moments, the last tile short."""
    tiles, tile_rows, channels = reduce.ONE_LEVEL + 300, 3, 5
    rows = tiles * tile_rows - 1
    values = torch.randn(rows, channels, dtype=torch.float64)
    parts = [values[i * tile_rows : (i + 1) * tile_rows] for i in range(tiles)]
    means = torch.stack([p.mean(0) for p in parts])
    m2s = torch.stack([(p - p.mean(0)).square().sum(0) for p in parts])
    stats = torch.full((2, channels), NAN, device=DEVICE)
    merge(torch.stack([means, m2s]).float().to(DEVICE), stats, tile_rows, rows)
    torch.testing.assert_close(stats[0].cpu().double(), values.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(stats[1].cpu().double(), (values - values.mean(0)).square().sum(0), rtol=1e-5, atol=0)
    sums = torch.full((2, channels), NAN, device=DEVICE)
    merge(torch.stack([means, m2s]).float().to(DEVICE), sums)
    torch.testing.assert_close(sums[1].cpu().double(), m2s.sum(0), rtol=1e-5, atol=0)


@each_dtype
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("channels", [5, 35])  # 35: more than one block
def test_what_one_kernel_reads_is_merged_there(channels, levels, dtype, monkeypatch):
    """Statistics and sums that are left to the C-sized kernel after them are those of a merge of their own: the same
    arithmetic in the same order, so that only the compiler's contraction of products may differ."""
    monkeypatch.setattr(join, "pass_config", lambda *_: join.PassConfig(BLOCK_M=4, BLOCK_C=64, chunk=8))
    monkeypatch.setattr(reduce, "ONE_LEVEL", 1024 if levels == 1 else 3)
    shape, rows = (2, channels, 7, 5), 70

    def run(deferred: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
        draw = Inputs(dtype, 0, False)
        x, grad, weight, bias = draw.map(*shape), draw.map(*shape), draw.parameter(channels), draw.parameter(channels)
        running = draw.parameter(channels), draw.parameter(channels).abs()
        room = (lambda: fused.new_reduction(channels, x)) if deferred else (lambda: draw.out_vectors(2, channels))
        stats, sums, coeff = room(), room(), draw.out_vectors(3, channels)

        def step():
            fused.statistics(x, stats)
            affine, saved = fused.bn_coefficients(stats, rows, weight, bias, *running, 0.1, 1e-5)
            fused.join_backward(grad, x, affine, saved, "relu", sums=sums)
            fused.bn_backward(sums, rows, weight, saved, True, coeff)
            return affine, saved

        affine, saved = step()
        found = {"affine": affine, "saved": saved, "coeff": coeff, "mean": running[0], "variance": running[1]}
        for i in range(2):
            rounded = sums.as_gradient(i, dtype) if deferred else sums[i].to(dtype)
            assert rounded.dtype == dtype
            found |= {f"sum {i}": sums[i].clone(), f"gradient {i}": rounded.clone()}
        with helpers.record() as launches:
            step()
        return found, [launch.kernel.__name__ for launch in launches]

    (ours, launched), (plain, separate) = run(True), run(False)
    for key, value in ours.items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, plain[key], rtol=1e-6, atol=1e-6)
    assert launched.count("merge_kernel") == 2 * (levels - 1) and separate.count("merge_kernel") == 2 * levels


# ---- numerics --------------------------------------------------------------------------------------------------------


def test_large_mean_keeps_three_digits():
    """Mean 1e4, deviation 1: where E[x^2] - E[x]^2 would lose everything, invstd keeps 3 digits, out of a pass and of a
    convolution."""
    x = Inputs(torch.float32, 0, False).map(2, 5, 13, 17, mean=1e4)
    weight = torch.eye(5, device=DEVICE).view(5, 5, 1, 1)
    truth = x.double().var((0, 2, 3), correction=0).rsqrt()
    stats = torch.full((2, 5), NAN, device=DEVICE)
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1)
    for measure in (
        lambda: fused.statistics(x, stats),
        lambda: fused.conv_forward(x, None, "none", weight, None, geometry, stats=stats),
        lambda: fused.pool_forward(x, None, "none", Pool("max", (1, 1), (1, 1), (0, 0)), stats=stats),
    ):
        stats.fill_(NAN)
        measure()
        _, saved = fused.bn_coefficients(stats, 2 * 13 * 17, None, None, None, None, 0.1, 0.0)
        assert ((saved[1].double() - truth).abs() / truth).max() < 5e-4


@each_dtype
def test_nan_passes_relu(dtype):
    """NaN goes through ReLU as NaN and reaches exactly the results that depend on it; where z is NaN the gradient
    passes."""
    draw = Inputs(dtype, 0, False)
    x, affine = draw.map(1, 6, 4, 4).contiguous(memory_format=torch.channels_last), draw.vectors(2, 6)
    x[0, 2, 0, 0] = NAN
    y = fused.join_forward(x, affine, None, None, "relu")
    assert torch.equal(y.isnan(), x.isnan())
    grad = draw.map(1, 6, 4, 4)
    dz = fused.join_backward(grad, x, affine, None, "relu")
    assert dz[0, 2, 0, 0] == grad[0, 2, 0, 0] and not dz.isnan().any()
    pooled, index = fused.pool_forward(x, affine, "relu", Pool("max", (2, 2), (2, 2), (0, 0)))
    assert pooled.isnan().sum() == 1 and pooled[0, 2, 0, 0].isnan() and index[0, 2, 0, 0] == 0
    # two groups: the NaN stays in its own
    geometry = Geometry((1, 1), (1, 1), (1, 1), 2)
    weight = draw.weight(4, 3, 3, 3)
    out = fused.conv_forward(x, affine, "relu", weight, None, geometry)
    expected = eager.conv_forward(x, affine, "relu", weight, None, geometry)
    assert torch.equal(out.isnan(), expected.isnan()) and out[:, :2, :2, :2].isnan().all()
    dx, _ = fused.conv_backward(
        draw.map(1, 4, 4, 4), None, None, x, affine, None, "relu", weight, geometry, need_dw=False
    )
    assert not dx.isnan().any() and dx[0, 2, 0, 0] != 0


def test_what_is_no_map_is_refused():
    x = torch.zeros(2, 5, 4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="channels_last"):
        fused.statistics(x, torch.zeros(2, 5, device=DEVICE))
    with pytest.raises(ValueError, match="unknown activation"):
        fused.join_forward(x.contiguous(memory_format=torch.channels_last), None, None, None, "swish")


def test_supports():
    device = torch.device(DEVICE)
    assert fused.supports(device, torch.float32) is None and fused.supports(device, torch.float16) is None
    assert "float64" in fused.supports(device, torch.float64)
    assert (fused.supports(device, torch.bfloat16) is None) == (DEVICE == "cuda")
    assert "meta" in fused.supports(torch.device("meta"), torch.float32)
