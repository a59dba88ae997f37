"""Every registered backend by the contract, as :mod:`test_contract` does: BatchNorm's numbers, and what happens at the edges, with large
means, NaN and infinity, empty batches, wrong words, and other instruction sets.

    pytest tests/backends/test_contract*.py --backend NAME          one backend alone, for instance a new one
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contract import SMALL, Table, conforms, each, exact_and_fused, is_corrected, moments, parametrize
from support import Draw
from torch import Tensor

from fusedres.backends import cpp, select
from fusedres.backends.contract import Backend
from fusedres.operands import Epilogue, GradTarget, LazyGrad, LazyMap
from fusedres.specs import Geometry, Norm, Pool

# masked lanes of interpreted kernels may compute inf - inf, which NumPy reports
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
pytest_generate_tests = parametrize
#: where roundings in between leave something to compare with torch's own
WIDE = (torch.float32, torch.float64)
POINT = Geometry((1, 1), (0, 0), (1, 1), 1)
HALVES = Pool("max", (2, 2), (2, 2), (0, 0))


@pytest.fixture(autouse=True)
def as_promised() -> Iterator[None]:
    with exact_and_fused():
        yield


def cases(**named: object) -> Table:
    """Cases that every backend sees in every dtype."""
    return Table(named, tuple(named), tuple(named))


def norm_of(
    draw: Draw, channels: int, parameters: str = "own", training: bool = True, momentum: float = 0.1, eps: float = 1e-5
) -> Norm:
    """``parameters``: "none", "own" (of the maps' dtype), or the name of another dtype. Its tensors may be written."""
    if parameters == "none":
        return Norm(None, None, None, None, training, momentum, eps, "none")
    dtype = None if parameters == "own" else getattr(torch, parameters)
    weight, bias, mean = (draw.parameter(channels, dtype) for _ in range(3))
    variance = draw.parameter(channels, dtype, positive=True)
    return Norm(weight, bias, mean, variance, training, momentum, eps, "none")


def rows(scale_shift: Tensor, mean_invstd: Tensor) -> dict[str, Tensor]:
    """Coefficients as results."""
    names = ("scale", "shift", "center", "invstd")
    return dict(zip(names, (*scale_shift, *mean_invstd), strict=True))


# ---- C numbers -------------------------------------------------------------------------------------------------------

PARAMETERS = ("none", "own", "float32", "bfloat16", "float64")
COEFFICIENTS = {
    f"{channels} channels, {parameters}, momentum {momentum}, {count} rows": (channels, parameters, momentum, count)
    for channels, parameters, momentum, count in (
        *((37, parameters, 0.1, 18) for parameters in PARAMETERS),
        (5, "own", 1.0, 2),
        (300, "own", 0.1, 77),  # more than a block
        (300, "none", 0.1, 77),
        (4, "own", 0.5, 1),  # the unbiased variance of one row is taken as its biased one
    )
}
_FEW = tuple(name for name in COEFFICIENTS if "bfloat16" not in name and "float64" not in name)


@each(Table(COEFFICIENTS, tuple(COEFFICIENTS), _FEW))
def test_bn_coefficients(config, case):
    channels, parameters, momentum, count = case

    def step(backend, draw):
        norm, stats = norm_of(draw, channels, parameters, momentum=momentum), draw.moments(channels, count)
        running = [t for t in (norm.running_mean, norm.running_var) if t is not None]
        versions = [t._version for t in running]
        found = backend.bn_coefficients(norm, stats, count)
        # as torch's own: another BatchNorm call may have saved them for its backward
        assert [t._version for t in running] == versions
        return rows(*found) | dict(zip(("running_mean", "running_var"), running, strict=False))

    conforms(config, step, values=channels)


@each(cases(**{parameters: parameters for parameters in ("own", "float32", "float16")}))
def test_bn_frozen(config, case):
    def step(backend, draw):
        norm = norm_of(draw, 35, case, training=False, eps=1e-3)
        kept = norm.running_mean.clone(), norm.running_var.clone()
        plain = Norm(None, None, norm.running_mean, norm.running_var, False, 0.0, 1e-3, "none")
        found = rows(*backend.bn_frozen(norm, draw.accum))
        bare = rows(*backend.bn_frozen(plain, draw.accum))
        assert torch.equal(norm.running_mean, kept[0]) and torch.equal(norm.running_var, kept[1])
        return found | {f"bare {name}": value for name, value in bare.items()}

    conforms(config, step, values=35)


@each(
    cases(
        **{
            f"{conv}, {parameters}": (conv, parameters)
            for conv in ("3x3 odd", "groups")
            for parameters in ("own", "float16")
        }
    )
)
def test_conv_norm_forward(config, case):
    """In one step what convolution and frozen BatchNorm are in two, whoever's the convolution is."""
    conv, parameters = SMALL[case[0]], case[1]

    def step(backend, draw):
        norm = norm_of(draw, conv.outputs, parameters, training=False, eps=1e-3)
        x, weight, bias = draw.lazy(*conv.shape, act="relu"), conv.draw_weight(draw), draw.parameter(conv.outputs)
        out, residual = draw.hole(*conv.out), draw.lazy(*conv.out, act="none")
        y = backend.conv_norm_forward(x, weight, bias, conv.geometry, norm, out=out, residual=residual, act="silu")
        assert y is out
        bare = backend.conv_norm_forward(x, weight, None, conv.geometry, norm)
        return {"out": out, "bare": bare}

    conforms(config, step, values=conv.values)


@each(
    cases(
        **{
            f"{'training' if training else 'frozen'}, {how}, {parameters}": (training, how == "accumulated", parameters)
            for training in (True, False)
            for how in ("written", "accumulated")
            for parameters in ("own", "none")
        }
    )
)
def test_bn_backward(config, case):
    training, accumulate, parameters = case

    def step(backend, draw):
        norm, sums, mean_invstd = norm_of(draw, 35, parameters, training), draw.vectors(2, 35), draw.mean_invstd(35)
        coeff = draw.kept(3, 35) if accumulate else draw.room(3, 35)
        before = coeff[0].clone()
        assert backend.bn_backward(norm, sums, 77, mean_invstd, coeff, accumulate) is None
        assert not accumulate or torch.equal(coeff[0], before)
        return dict(zip("pqr", coeff, strict=True))

    conforms(config, step, values=35)


@each(dtypes=WIDE)
def test_the_primitives_together_are_torchs_batch_norm(config):
    """Statistics, normalisation, sums and correction, with a ReLU behind: the output, every gradient and the running statistics are those
    of ``F.batch_norm`` under autograd."""
    shape, eps = (3, 6, 7, 5), 1e-5
    draw, backend = config.draw(), config.backend
    x, grad, norm = draw.map(*shape, mean=2.0), draw.map(*shape), norm_of(draw, 6, eps=eps)
    leaves = [t.double().requires_grad_() for t in (x, norm.weight, norm.bias)]
    running = [norm.running_mean.double(), norm.running_var.double()]
    wanted = F.relu(F.batch_norm(leaves[0], *running, *leaves[1:], True, norm.momentum, eps))
    wanted_grads = torch.autograd.grad(wanted, leaves, grad.double())

    stats, sums = (backend.new_reduction(6, x) for _ in range(2))
    backend.statistics(x, stats)
    scale_shift, mean_invstd = backend.bn_coefficients(norm, stats, 105)
    pending = LazyMap(x, scale_shift, "none", mean_invstd)
    y = backend.add_act_forward(pending, None, "relu")
    dz = backend.add_act_backward(grad, pending, None, "relu", sums=sums)
    coeff = draw.room(3, 6)
    backend.bn_backward(norm, sums, 105, mean_invstd, coeff)
    dx = backend.apply_grad_coeff(LazyGrad(dz, x, coeff))
    close = {"rtol": 1e-9, "atol": 1e-11} if config.dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    of_parameters = [backend.parameter_grad(sums, row, config.dtype) for row in (1, 0)]
    for ours, theirs in zip((y, dx, *of_parameters), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **close)
    torch.testing.assert_close(norm.running_mean.double(), running[0], **close)
    torch.testing.assert_close(norm.running_var.double(), running[1], **close)


# ---- large means -----------------------------------------------------------------------------------------------------


@each(Table({str(c): c for c in (3, 5, 16, 67)}, ("3",), ("5",)), dtypes=WIDE)
def test_a_large_mean_keeps_three_digits_of_the_deviation(config, case):
    """Where E[x^2] - E[x]^2 would lose everything, out of each place where statistics are reduced."""
    c, size = case, (13, 17) if config.interpreted else (40, 41)
    draw, backend = config.draw(), config.backend
    weight = torch.eye(c, dtype=draw.dtype, device=draw.device).view(c, c, 1, 1)

    def deviation_is_kept(mean: float, rtol: float, measure: Callable[[Tensor, Tensor], object]) -> None:
        x, stats = draw.map(2, c, *size, mean=mean), draw.room(2, c)
        measure(x, stats)
        norm = Norm(None, None, None, None, True, 0.1, 0.0, "none")
        _, mean_invstd = backend.bn_coefficients(norm, stats, 2 * size[0] * size[1])
        deviation, center = torch.std_mean(x.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean_invstd[1].double(), 1 / deviation, rtol=rtol, atol=0)
        torch.testing.assert_close(mean_invstd[0].double(), center, rtol=1e-6, atol=0)

    for measure in (
        lambda x, stats: backend.statistics(x, stats),
        lambda x, stats: backend.conv_forward(LazyMap(x), weight, None, POINT, Epilogue(stats=stats)),
        lambda x, stats: backend.pool_forward(LazyMap(x), Pool("max", (1, 1), (1, 1), (0, 0)), stats=stats),
        lambda x, stats: backend.add_act_forward(LazyMap(x), stats=stats),
    ):
        deviation_is_kept(1e4, 5e-4, measure)
    if not config.interpreted:
        for mean in (1e4, -3e5):
            deviation_is_kept(mean, 1e-4, lambda x, stats: backend.statistics(x, stats))


# ---- channels of mostly one value ------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[Backend, Tensor, Tensor, Tensor], object]] = {
    "statistics": lambda backend, x, eye, stats: backend.statistics(x, stats),
    "convolution": lambda backend, x, eye, stats: backend.conv_forward(
        LazyMap(x), eye, None, POINT, Epilogue(stats=stats)
    ),
    "pool": lambda backend, x, eye, stats: backend.pool_forward(
        LazyMap(x), Pool("max", (1, 1), (1, 1), (0, 0)), stats=stats
    ),
    "sum": lambda backend, x, eye, stats: backend.add_act_forward(LazyMap(x), stats=stats),
}


@each(Table(MEASURES, tuple(MEASURES), ()))
def test_a_channel_of_mostly_one_value_is_measured_as_closely(config, case):
    """As behind a ReLU: most squared deviations are equal, and adding one after the other rounds in one direction again and again, as NumPy
    does for Triton's interpreter."""

    def step(backend, draw):
        x, stats = draw.filled(1, 512, 20, 8), draw.room(2, 512)
        x[:, :, 1:] = x[:, :, 1:2, :1]
        case(backend, x, torch.eye(512, dtype=draw.storage, device=draw.device)[..., None, None], stats)
        return moments(stats, x.numel())

    conforms(config, step)


# ---- NaN and infinity ------------------------------------------------------------------------------------------------


def same(ours: Tensor, eager: Tensor) -> None:
    """The same numbers, NaN where eager has it."""
    torch.testing.assert_close(ours, eager, rtol=0, atol=0, equal_nan=True)


@each()
def test_nan_and_infinity_pass_relu_and_where_it_is_nan_the_gradient_does(config):
    draw, backend, eager = config.draw(), config.backend, select.get("eager")
    x, grad = draw.filled(1, 18, 3, 3), draw.map(1, 18, 3, 3)
    x[0, 2, 1, 1], x[0, 17, 2, 2], x[0, 3, 0, 0], x[0, 4, 0, 0] = torch.nan, torch.nan, torch.inf, -torch.inf
    lazy, plain = LazyMap(x), LazyMap(grad)
    for call in (
        lambda b: b.add_act_forward(lazy, None, "relu"),
        lambda b: b.add_act_forward(lazy, lazy),
        lambda b: b.materialize(lazy._replace(act="relu")),
        lambda b: b.add_act_backward(grad, lazy, None, "relu"),
        lambda b: b.add_act_backward(grad, plain, lazy, "relu"),
        lambda b: b.dgrad_epilogue(grad.contiguous(memory_format=torch.channels_last), lazy._replace(act="relu")),
    ):
        same(call(backend), call(eager))
    y = backend.add_act_forward(lazy, None, "relu")
    dz = backend.add_act_backward(grad, lazy, None, "relu")
    assert torch.equal(y.isnan(), x.isnan())
    assert dz[0, 2, 1, 1] == grad[0, 2, 1, 1] and dz[0, 17, 2, 2] == grad[0, 17, 2, 2] and not dz.isnan().any()


@each()
def test_max_pool_of_nan_and_infinity(config):
    """NaN wins, the first of several; -inf is larger than what lies outside."""
    x = config.draw().filled(2, 18, 7, 7)
    x[0, :, 2, 3], x[1, 1] = torch.nan, -torch.inf
    x[0, 5, 4, 4] = torch.nan  # two NaN in one window
    pool = Pool("max", (3, 3), (2, 2), (1, 1))
    ours, theirs = (b.pool_forward(LazyMap(x), pool) for b in (config.backend, select.get("eager")))
    same(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@each()
def test_nan_reaches_what_depends_on_it_and_nothing_else(config):
    draw, backend, eager = config.draw(), config.backend, select.get("eager")
    x = draw.filled(2, 6, 4, 4)
    x[0, 2, 0, 0] = torch.nan
    stats = draw.room(2, 6)
    backend.statistics(x, stats)
    assert stats.isnan().any(0).tolist() == [c == 2 for c in range(6)]
    lazy = LazyMap(x, draw.scale_shift(6), "relu")
    pooled, index = backend.pool_forward(lazy, HALVES)
    assert pooled.isnan().sum() == 1 and pooled[0, 2, 0, 0].isnan() and index[0, 2, 0, 0] == 0
    # two groups: the NaN stays in its own
    geometry, weight = Geometry((1, 1), (1, 1), (1, 1), 2), draw.weight(4, 3, 3, 3)
    out, expected = (b.conv_forward(lazy, weight, None, geometry) for b in (backend, eager))
    assert torch.equal(out.isnan(), expected.isnan()) and out[0, :2, :2, :2].isnan().all()
    grad = LazyGrad(draw.map(2, 4, 4, 4))
    dx, _ = backend.conv_backward(grad, lazy, weight, geometry, need_dw=False)
    assert not dx.isnan().any() and dx[0, 2, 0, 0] != 0


@each()
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_an_addition_may_overwrite_its_first_operand(config, act):
    draw, backend = config.draw(), config.backend
    x, residual = draw.lazy(2, 18, 5, 7).before_act, draw.lazy(2, 18, 5, 7).before_act
    expected = backend.add_act_forward(x, residual, act)
    y = backend.add_act_forward(x, residual, act, out=x.raw)
    assert y is x.raw
    same(y, expected)


@each()
def test_gates_at_their_limits(config):
    """A gate that is wide open or shut passes one side exactly, infinities are limits, and NaN stays NaN."""
    values = [float("inf"), 200.0, -200.0, float("-inf"), float("nan"), 0.0, 90.0, -90.0]
    options = {"dtype": config.dtype, "device": config.device}
    gate = torch.tensor(values, **options).view(1, 8, 1, 1)
    x, carry = torch.full((1, 8, 1, 1), 3.0, **options), torch.full((1, 8, 1, 1), 5.0, **options)
    y = config.backend.highway_forward(LazyMap(x), LazyMap(gate), carry)
    torch.testing.assert_close(y, torch.lerp(carry, x, gate.sigmoid()), equal_nan=True)
    assert y.flatten()[:4].tolist() == [3.0, 3.0, 5.0, 5.0] and y.flatten()[4].isnan()


# ---- nothing, and wrong words ----------------------------------------------------------------------------------------


@each()
def test_an_empty_batch(config):
    """Maps without rows give maps without rows, and sums of nothing."""
    draw, backend = config.draw(pad=(0, 0)), config.backend
    x, grad = draw.lazy(0, 8, 4, 4), draw.map(0, 8, 4, 4)
    sums = draw.room(2, 8)
    assert backend.add_act_forward(x, x, "relu").shape == (0, 8, 4, 4)
    backend.add_act_backward(grad, x, None, "relu", sums=sums)
    assert torch.equal(sums, torch.zeros_like(sums))
    more = draw.room(2, 8)
    backend.dgrad_epilogue(draw.filled(0, 8, 4, 4), x._replace(act="relu"), GradTarget(sums=more))
    assert torch.equal(more, torch.zeros_like(more))


@each(eager=True)
def test_an_unknown_activation_raises_wherever_one_is_named(config):
    draw, backend = config.draw(), config.backend
    x, weight, grad = draw.lazy(1, 4, 4, 4), draw.weight(4, 4, 1, 1), draw.map(1, 4, 4, 4)
    swish, coeff = x._replace(act="swish"), draw.vectors(3, 4)
    for call in (
        lambda: backend.conv_forward(swish, weight, None, POINT),
        lambda: backend.conv_forward(x, weight, None, POINT, Epilogue(act="swish")),
        lambda: backend.conv_backward(LazyGrad(grad), swish, weight, POINT),
        lambda: backend.dgrad_epilogue(draw.filled(1, 4, 4, 4), swish),
        lambda: backend.add_act_forward(x, None, "swish"),
        lambda: backend.add_act_backward(grad, x, None, "swish"),
        lambda: backend.materialize(swish),
        lambda: backend.pool_forward(swish, HALVES),
        lambda: backend.pool_backward(draw.map(1, 4, 2, 2), index_of(draw), swish, HALVES, coeff=coeff),
        lambda: backend.highway_forward(swish, x, grad),
        lambda: backend.highway_backward(grad, swish, x, grad),
    ):
        with pytest.raises(ValueError, match="swish"):
            call()


def index_of(draw: Draw) -> Tensor:
    """The index of a max pool whose maxima all lie in the first place."""
    index = torch.zeros(1, 4, 2, 2, dtype=torch.uint8, device=draw.device)
    return index.contiguous(memory_format=torch.channels_last)


@each(eager=True)
def test_an_unknown_pool_raises(config):
    draw, backend, pool = config.draw(), config.backend, Pool("median", (2, 2), (2, 2), (0, 0))
    with pytest.raises(ValueError, match="median"):
        backend.pool_forward(draw.lazy(1, 4, 4, 4), pool)
    with pytest.raises(ValueError, match="median"):
        backend.pool_backward(draw.map(1, 4, 2, 2), index_of(draw), draw.lazy(1, 4, 4, 4), pool, sums=draw.room(2, 4))


@each(eager=True)
def test_sums_without_the_means_that_they_need_raise(config):
    draw, backend = config.draw(), config.backend
    x, grad, sums = LazyMap(draw.map(1, 4, 4, 4)), draw.map(1, 4, 4, 4), draw.room(2, 4)
    for call in (
        lambda: backend.add_act_backward(grad, x, None, "relu", sums=sums),
        lambda: backend.dgrad_epilogue(draw.filled(1, 4, 4, 4), x, GradTarget(sums=sums)),
        lambda: backend.dgrad_epilogue(draw.filled(1, 4, 4, 4), x, GradTarget(scaled=True)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call()


@each(eager=True)
def test_what_is_served_is_said_in_words(config):
    """In this dtype it is; elsewhere a sentence says why not."""
    device = torch.device(config.device)
    assert config.backend.name == config.name
    assert (config.backend.supports(device, config.dtype) is None) != is_corrected(config.name, config.dtype)
    assert "int32" in config.backend.supports(device, torch.int32)
    assert "meta" in config.backend.supports(torch.device("meta"), config.dtype)


# ---- instruction sets ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16"])
def test_the_extension_keeps_the_contract_on_every_instruction_set(capability, request):
    """These files again, in a process that uses another one."""
    if "cpp" not in (request.config.getoption("--backend") or ["cpp"]):
        pytest.skip("another backend was asked for")
    if cpp.cpu_capability() is None or capability not in cpp._C.cpu_capabilities():
        pytest.skip(f"the extension has no {capability} here")
    if capability == cpp.cpu_capability():
        pytest.skip("what this process runs on")
    files = sorted(map(str, Path(__file__).parent.glob("test_contract*.py")))
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", "-m", "not slow"]
    run = subprocess.run(
        [*command, "--backend", "cpp", *files],
        env=os.environ | {"FUSEDRES_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert run.returncode == 0, run.stdout[-4000:]
