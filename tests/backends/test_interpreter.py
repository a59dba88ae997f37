"""The corrections of Triton's interpreter (:mod:`interpreter`), and what they let it prove: bfloat16, and that nothing depends on the order
of programs or on what fresh memory holds."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from contract import Config, conforms, moments, sums_of  # noqa: E402
from interpreter import corrected, rounded, watched, widened  # noqa: E402
from support import Draw, dtype_name  # noqa: E402

from fusedres.backends.triton import BACKEND, use_plan  # noqa: E402
from fusedres.kernels.launch import INTERPRETED  # noqa: E402
from fusedres.operands import Epilogue, GradTarget  # noqa: E402
from fusedres.specs import Geometry, Norm, Pool  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here"),
    # masked lanes may compute inf - inf, which NumPy reports
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


def config(dtype: torch.dtype) -> Config:
    return Config("triton", dtype, "cpu")


# ---- the faults ------------------------------------------------------------------------------------------------------


@triton.jit
def product_kernel(a, b, out, N: tl.constexpr):
    """out = a @ b, all N x N."""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    found = tl.dot(tl.load(a + i * N + j), tl.load(b + i * N + j), input_precision="ieee")
    tl.store(out + i * N + j, found)


@triton.jit
def conversion_kernel(x, out, N: tl.constexpr):
    """out = x, in the dtype of out."""
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def sum_kernel(x, out, N: tl.constexpr):
    """out = x + x, without a conversion."""
    i = tl.arange(0, N)
    values = tl.load(x + i)
    tl.store(out + i, values + values)


def draws(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def product_is_right() -> bool:
    a, b, out = draws(16, 16), draws(16, 16), torch.empty(16, 16)
    product_kernel[(1,)](a, b, out, 16)
    return torch.allclose(out, a.float() @ b.float(), rtol=1e-4, atol=1e-4)


def conversion_is_right() -> bool:
    x = draws(256, dtype=torch.float32)
    out = torch.empty_like(x, dtype=torch.bfloat16)
    conversion_kernel[(1,)](x, out, 256)
    return torch.equal(out, x.to(torch.bfloat16))


@pytest.mark.parametrize("is_right", [product_is_right, conversion_is_right], ids=["tl.dot", "conversion"])
def test_each_correction_is_needed_and_corrects(is_right):
    """Where the first assertion fails, Triton has mended it: this correction can go."""
    assert not is_right(), f"Triton {triton.__version__} computes this rightly: remove its correction"
    with corrected():
        assert is_right()
    assert not is_right(), "the correction outlives its with"


def test_arithmetic_on_bfloat16_is_refused():
    x = draws(16)
    with corrected(), pytest.raises(Exception, match="arithmetic on bfloat16"):
        sum_kernel[(1,)](x, torch.empty_like(x), 16)


def test_rounding_is_torchs():
    """To nearest, ties to even, into infinity, and of NaN."""
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8]
    values = torch.cat([torch.tensor(special), draws(10_000, dtype=torch.float32)])
    found = torch.from_numpy(widened(rounded(values.numpy())))
    torch.testing.assert_close(found, values.to(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)


# ---- the watch -------------------------------------------------------------------------------------------------------


@triton.jit
def shift_kernel(x, out, N, BY: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = x[i + BY], a block per program."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i + BY, mask=i < N, other=0.0), mask=i < N)


@triton.jit
def overlap_kernel(x, out, BLOCK: tl.constexpr):
    """Every program writes the first block of out."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def twice_kernel(x, out, BLOCK: tl.constexpr):
    """Two lanes write each element of out."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, tl.load(x + i))


def cases() -> dict[str, tuple]:
    """What is wrong, the launch that does it, and what is said of it."""
    x, out, buffer = draws(16), draws(16), draws(32)
    first = buffer[:16]
    return {
        "reads behind": (lambda: shift_kernel[(2,)](x, out, 16, 4, 8), "reads 4 elements in nobody's memory"),
        "reads beside a slice": (lambda: shift_kernel[(2,)](first, out, 16, 4, 8), "reads 4 elements beside a tensor"),
        "writes beside a slice": (lambda: shift_kernel[(2,)](x, first[:12], 16, 0, 8), "writes 4 elements beside"),
        "two programs write": (lambda: overlap_kernel[(2,)](x, out, 8), "two programs of overlap_kernel write"),
        "one store writes twice": (lambda: twice_kernel[(1,)](x, out, 16), "writes an element twice"),
        "reads what another writes": (lambda: shift_kernel[(2,)](buffer, first, 16, 4, 8), "reads what another one"),
    }  # fmt: skip


@pytest.mark.parametrize("case", cases())
def test_the_watch_sees(case):
    launch, said = cases()[case]
    with corrected(), watched(), pytest.raises(Exception, match=said):
        launch()


def test_the_watch_allows_a_program_its_own_elements():
    """In place, and next to a slice that another one owns."""
    buffer = draws(32)
    with corrected(), watched() as watch:
        shift_kernel[(2,)](buffer[:16], buffer[:16], 16, 0, 8)
        shift_kernel[(2,)](buffer[:16], buffer[16:], 16, 0, 8)
    assert watch.launches == 2


# ---- what they prove -------------------------------------------------------------------------------------------------

CHAIN = ((2, 8, 9, 7), (2, 16, 5, 4), (16, 8, 3, 3), Geometry((2, 2), (1, 1), (1, 1), 1))


def step(backend, draw: Draw) -> dict[str, torch.Tensor]:
    """Every primitive that reads or writes maps, once."""
    shape, out_shape, weight_shape, geometry = CHAIN
    (channels, outputs), window = (shape[1], out_shape[1]), Pool("max", (3, 3), (2, 2), (1, 1))
    x, weight, stats = draw.lazy(*shape, act="relu"), draw.weight(*weight_shape), draw.room(2, outputs)
    y = backend.conv_forward(x, weight, draw.parameter(outputs), geometry, Epilogue(draw.hole(*out_shape), stats))
    target = GradTarget(draw.filled(*shape), None, True, True, draw.room(2, channels))
    grad = draw.gradient(*out_shape)
    dx, dw = backend.conv_backward(grad, x, weight, geometry, target)
    plain, residual, sums = x._replace(act="none"), draw.lazy(*shape), draw.room(2, channels)
    added_stats, residual_sums = draw.room(2, channels), draw.room(2, channels)
    added = backend.add_act_forward(plain, residual, "relu", stats=added_stats)
    dz = backend.add_act_backward(draw.map(*shape), plain, residual, "relu", sums=sums, residual_sums=residual_sums)
    pooled, index = backend.pool_forward(x, window)
    pool_grad, pool_sums = draw.map(*pooled.shape), draw.room(2, channels)
    backend.pool_backward(pool_grad, index, x, window, sums=pool_sums)
    pool_dx = backend.pool_backward(pool_grad, index, x, window, coeff=draw.vectors(3, channels))
    return {
        "y": y, "dx": dx, "dw": dw, "added": added, "dz": dz, "pooled": pooled, "index": index, "pool dx": pool_dx,
        "final": backend.apply_grad_coeff(grad), **moments(stats, y.numel()), **sums_of(target.sums),
        **moments(added_stats, added.numel(), "added "), **sums_of(sums, "added "),
        **sums_of(residual_sums, "residual "),
        **sums_of(pool_sums, "pool "),
    }  # fmt: skip


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("plan", ["fused", "library"])
def test_every_primitive_in_bfloat16(plan):
    with use_plan(plan), corrected():
        conforms(config(torch.bfloat16), step)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=dtype_name)
def test_no_result_depends_on_the_order_of_programs(dtype):
    """The same bits with the last program first, and in a shuffled order."""
    found = []
    with use_plan("fused"):
        for order in ("forward", "reverse", "shuffle"):
            with corrected(order=order), watched() as watch:
                found.append(step(BACKEND, config(dtype).draw()))
            assert watch.launches > 12
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_the_running_statistics_in_bfloat16():
    """As torch rounds them, and read by the kernel that normalises."""
    norm = Norm(draws(5), draws(5), draws(5), draws(5).abs(), True, 0.1, 1e-5, "relu")
    kept = norm.running_mean.clone()
    stats = torch.tensor([[1.0] * 5, [20.0] * 5])
    with corrected():
        BACKEND.bn_coefficients(norm, stats, 20)
    torch.testing.assert_close(norm.running_mean, kept.lerp(torch.ones_like(kept), 0.1), rtol=2**-8, atol=0)
    with corrected():
        scale_shift, mean_invstd = BACKEND.bn_frozen(norm, torch.float32)
    torch.testing.assert_close(mean_invstd[0], norm.running_mean.float(), rtol=0, atol=0)
    assert scale_shift.isfinite().all()
