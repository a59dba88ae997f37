"""What is triton's own: tiles, splits into levels, merges, plans, launches, offsets of 64 bits, and kernels that cannot be built.

That every primitive computes what it should is in test_contract.py.
"""

from __future__ import annotations

import subprocess
import threading
import warnings

import pytest
import torch

pytest.importorskip("triton")

from contract import DEFINITION, Config, Step, conforms, moments, sums_of  # noqa: E402
from support import Draw  # noqa: E402
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

from fusedres.activations import Activation, parse  # noqa: E402
from fusedres.backends import eager  # noqa: E402
from fusedres.backends import triton as module  # noqa: E402
from fusedres.backends.triton import BACKEND, use_plan  # noqa: E402
from fusedres.kernels import conv_dgrad, conv_forward, conv_wgrad, elementwise, passes, reduce, tiles  # noqa: E402
from fusedres.kernels.launch import INTERPRETED, record, target_device  # noqa: E402
from fusedres.kernels.tiles import Arch, ConvConfig, PassConfig  # noqa: E402
from fusedres.operands import Epilogue, GradTarget, LazyGrad, LazyMap  # noqa: E402
from fusedres.specs import Geometry, Norm, Pool  # noqa: E402
from fusedres.testing import assert_parity  # noqa: E402
from fusedres.tuning.plans import Plan  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# masked lanes may compute inf - inf, which NumPy reports
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("exact_and_unmeasured"),
]
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)


def quick_in(quick: torch.dtype) -> pytest.MarkDecorator:
    """Each dtype, of which only one is quick: for many programs in the interpreter."""
    return pytest.mark.parametrize(
        "dtype",
        [
            pytest.param(
                dtype, id=str(dtype).removeprefix("torch."), marks=[] if dtype == quick else [pytest.mark.slow]
            )
            for dtype in (torch.float32, torch.float16)
        ],
    )


POINT, THREE = Geometry((1, 1), (0, 0), (1, 1), 1), Geometry((1, 1), (1, 1), (1, 1), 1)
TILE = ConvConfig(32, 16, 16, 2, 2)


def config(dtype: torch.dtype = torch.float32) -> Config:
    return Config("triton", dtype, DEVICE)


def conforms_in_the_median(config: Config, step: Step, draws: int = 5) -> None:
    """:func:`contract.conforms`, which interprets one draw, over several: a sum whose terms nearly cancel is right by luck in some."""
    found = [
        [step(backend, config.draw(seed, truth=truth)) for seed in range(draws)]
        for backend, truth in ((BACKEND, False), (eager.BACKEND, False), (DEFINITION, True))
    ]
    for key in found[0][0]:
        assert_parity(*([results[key] for results in side] for side in found), key)


def launched(call) -> list[str]:
    """The names of the kernels that ``call`` launches."""
    with record() as launches:
        call()
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]


def convolution(stats: bool = False, residual: bool = False, kernel: int = 3) -> tuple:
    """The arguments of a small ``conv_forward``."""
    draw = Draw(torch.float32, device=DEVICE)
    added = draw.lazy(2, 8, 6, 6) if residual else None
    epilogue = Epilogue(stats=draw.room(2, 8) if stats else None, residual=added)
    weight, geometry = draw.weight(8, 8, kernel, kernel), THREE if kernel == 3 else POINT
    return draw.lazy(2, 8, 6, 6, act="relu"), weight, None, geometry, epilogue


def backward_of(arguments: tuple) -> tuple:
    """The arguments of the ``conv_backward`` of such a convolution."""
    x, weight, _, geometry, _ = arguments
    return Draw(torch.float32, 1, device=DEVICE).gradient(2, 8, 6, 6), x, weight, geometry


# ---- tiles -----------------------------------------------------------------------------------------------------------

H100 = Arch("sm_90", 227 * 1024, 32)


@pytest.mark.parametrize("op", ["forward", "dgrad"])
def test_a_tile_that_is_not_allowed_is_refused(op):
    """Of a plan for a 3x3: eight warps."""
    arguments = convolution()
    with use_plan(Plan(True, ConvConfig(128, 64, 64, 8, 3))), pytest.raises(ValueError, match="4 warps at most"):
        BACKEND.conv_forward(*arguments) if op == "forward" else BACKEND.conv_backward(*backward_of(arguments))


def test_a_row_for_a_gpu_is_what_its_launches_use(monkeypatch):
    row = tiles.Row("forward", "many", "sm_90", 64, 32, 32, 32, eight_from=2**30, max_warps=2)
    monkeypatch.setattr(tiles, "ROWS", (row, *tiles.ROWS))
    for arch, warps in ((H100, 2), (tiles.DEFAULT_ARCH, 4)):
        with record(arch=arch) as launches, use_plan("fused"):
            BACKEND.conv_forward(*convolution())
        assert launches[0].arguments["num_warps"] == warps


# ---- splits and merges -----------------------------------------------------------------------------------------------


@quick_in(torch.float32)
@pytest.mark.parametrize("plan", ["fused", "apart"])
def test_many_pixels_are_split(plan, dtype):
    """Enough pixels for several tiles of statistics and several splits of the weight's gradient."""
    shape = (2, 5, 18, 19)

    def step(backend, draw):
        x, weight, stats, sums = (
            draw.lazy(*shape, act="relu"),
            draw.weight(6, 5, 1, 1),
            draw.room(2, 6),
            draw.room(2, 5),
        )
        y = backend.conv_forward(x, weight, None, POINT, Epilogue(stats=stats))
        dx, dw = backend.conv_backward(draw.gradient(2, 6, 18, 19), x, weight, POINT, GradTarget(sums=sums))
        return {"y": y, "dx": dx, "dw": dw, **moments(stats, y.numel()), **sums_of(sums)}

    with use_plan(plan):
        with record() as launches:
            step(BACKEND, config(dtype).draw())
        name = "conv_wgrad_kernel" if plan == "apart" else "conv_pointwise_backward_kernel"
        wgrad = next(launch for launch in launches if launch.kernel.__name__ == name)
        assert wgrad.grid[1] > 1
        conforms_in_the_median(config(dtype), step)


@pytest.mark.parametrize("size", [(8, 16), (9, 11)], ids=["all of a tile", "a part of it"])
def test_a_convolution_measures_a_mean_far_above_the_deviation(size):
    """In one tile, by its first estimate and what that left: a mean of 10,000 deviations to half a step of a float, and M2 also where
    rounding in the first estimate would be as large as the deviation."""
    weight = torch.eye(16, device=DEVICE)[..., None, None]
    for seed, spread in ((0, 1.0), (1, 1.0), (2, 2e-3)):
        draw = Draw(torch.float32, seed, device=DEVICE)
        x, stats = draw.map(1, 16, *size, mean=1e4, spread=spread), draw.room(2, 16)
        with use_plan("fused"):
            y = BACKEND.conv_forward(LazyMap(x), weight, None, POINT, Epilogue(stats=stats)).double()
        draw.check()
        mean = y.mean((0, 2, 3))
        # from 8192 to 16384 a float has 23 binary digits behind the first, ten of them behind the point
        torch.testing.assert_close(stats[0].double(), mean, rtol=0, atol=0.501 * 2.0**-10)
        m2 = (y - mean[:, None, None]).square().sum((0, 2, 3))
        # at most a rounding to 24 binary digits for each value that is added
        torch.testing.assert_close(stats[1].double(), m2, rtol=x[0, 0].numel() * 2.0**-24, atol=0)


@quick_in(torch.float16)
def test_programs_walk_several_tiles(dtype, monkeypatch):
    """As on large maps: a program's chunk is several tiles, the last chunk and the last tile are short."""
    monkeypatch.setattr(passes, "pass_config", lambda *_: PassConfig(BLOCK_M=4, BLOCK_C=8, chunk=12))
    shape, window = (1, 11, 5, 7), Pool("max", (3, 3), (1, 1), (1, 1))

    def step(backend, draw):
        x, grad = draw.lazy(*shape, act="relu"), draw.map(*shape)
        stats, sums, pooled_stats, pooled_sums = (draw.room(2, 11) for _ in range(4))
        y = backend.materialize(x, stats=stats)
        dz = backend.add_act_backward(grad, x._replace(act="none"), None, "relu", sums=sums)
        pooled, index = backend.pool_forward(x, window, stats=pooled_stats)
        backend.pool_backward(grad, index, x, window, sums=pooled_sums)
        return {
            "y": y, "dz": dz, "pooled": pooled, "index": index, **moments(stats, y.numel()),
            **moments(pooled_stats, pooled.numel(), "pooled "), **sums_of(sums), **sums_of(pooled_sums, "pooled "),
        }  # fmt: skip

    conforms(config(dtype), step)


def test_merge_of_many_tiles():
    """More tiles than one program takes: two levels, for sums and for moments, the last tile short."""
    count, tile_rows, channels = reduce.ONE_LEVEL + 300, 3, 5
    rows = count * tile_rows - 1
    values = torch.randn(rows, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [values[i * tile_rows : (i + 1) * tile_rows] for i in range(count)]
    means = torch.stack([p.mean(0) for p in parts])
    m2s = torch.stack([(p - p.mean(0)).square().sum(0) for p in parts])
    stats = torch.full((2, channels), torch.nan, device=DEVICE)
    reduce.merge(torch.stack([means, m2s]).float().to(DEVICE), stats, tile_rows, rows)
    torch.testing.assert_close(stats[0].cpu().double(), values.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(stats[1].cpu().double(), (values - values.mean(0)).square().sum(0), rtol=1e-5, atol=0)
    sums = torch.full((2, channels), torch.nan, device=DEVICE)
    reduce.merge(torch.stack([means, m2s]).float().to(DEVICE), sums)
    torch.testing.assert_close(sums[1].cpu().double(), m2s.sum(0), rtol=1e-5, atol=0)


def test_statistics_of_equal_rows_have_no_negative_spread():
    """A channel of one value: by the difference of two roundings M2 would be below zero, and NaN where eps is none."""
    values = torch.linspace(0.1, 7.7, 64).view(1, 64, 1, 1).expand(3, 64, 5, 7)
    stats = torch.full((2, 64), torch.nan, device=DEVICE)
    BACKEND.statistics(values.contiguous(memory_format=torch.channels_last).to(DEVICE), stats)
    assert (stats[1] >= 0).all() and (stats[1] < 1e-9).all()
    nan = torch.full((1, 8, 2, 2), torch.nan, device=DEVICE).to(memory_format=torch.channels_last)
    BACKEND.statistics(nan, stats[:, :8])
    assert stats[:, :8].isnan().all()


@each_dtype
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("channels", [5, 35])  # 35: more than one block
def test_what_one_kernel_reads_is_merged_there(channels, levels, dtype, monkeypatch):
    """Statistics and sums that are left to the C-sized kernel after them are those of a merge of their own: the same arithmetic in the
    same order, so that only the compiler's contraction of products may differ."""
    monkeypatch.setattr(passes, "pass_config", lambda *_: PassConfig(BLOCK_M=4, BLOCK_C=64, chunk=8))
    monkeypatch.setattr(reduce, "ONE_LEVEL", 1024 if levels == 1 else 3)
    shape, rows = (2, channels, 7, 5), 70

    def run(deferred: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
        draw = config(dtype).draw()
        x, grad = draw.map(*shape), draw.map(*shape)
        parameters = [draw.parameter(channels) for _ in range(3)]
        norm = Norm(*parameters, draw.parameter(channels, positive=True), True, 0.1, 1e-5, "relu")
        stats, sums = (BACKEND.new_reduction(channels, x) if deferred else draw.room(2, channels) for _ in range(2))
        coeff = draw.room(3, channels)

        def step():
            BACKEND.statistics(x, stats)
            scale_shift, mean_invstd = BACKEND.bn_coefficients(norm, stats, rows)
            BACKEND.add_act_backward(grad, LazyMap(x, scale_shift, "none", mean_invstd), None, "relu", sums=sums)
            BACKEND.bn_backward(norm, sums, rows, mean_invstd, coeff)
            return scale_shift, mean_invstd

        found = dict(zip(("scale_shift", "mean_invstd"), step(), strict=True))
        found |= {"coeff": coeff, "running mean": norm.running_mean, "running variance": norm.running_var}
        found |= {f"sum {i}": sums[i] for i in range(2)}
        if deferred:
            rounded = [sums.as_gradient(i, dtype) for i in range(2)]
            assert all(r.dtype == dtype and torch.equal(r, sums[i].to(dtype)) for i, r in enumerate(rounded))
        return {name: value.clone() for name, value in found.items()}, launched(step)

    (ours, ours_launched), (plain, plain_launched) = run(True), run(False)
    for name, value in ours.items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-6)
    assert ours_launched.count("merge") == 2 * (levels - 1) and plain_launched.count("merge") == 2 * levels


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["fused", "library"])
def test_a_plan_decides_which_way_runs(plan):
    """And both compute the same."""
    case = (2, 5, 8, 7), Geometry((2, 2), (1, 1), (1, 1), 1)

    def step(backend, draw):
        x, weight, stats = draw.lazy(*case[0], act="relu"), draw.weight(6, 5, 3, 3), draw.room(2, 6)
        y = backend.conv_forward(x, weight, None, case[1], Epilogue(stats=stats))
        target = GradTarget(draw.hole(*case[0]), draw.map(*case[0]), scaled=True, sums=draw.room(2, 5))
        dx, dw = backend.conv_backward(draw.gradient(*y.shape), x, weight, case[1], target)
        return {"y": y, "dx": dx, "dw": dw, **moments(stats, y.numel()), **sums_of(target.sums)}

    with use_plan(plan):
        conforms(config(), step)
        kernels = launched(lambda: step(BACKEND, config().draw()))
        arguments = convolution()
        assert BACKEND.routes("conv_forward", *arguments) == {"forward": plan}
        assert BACKEND.routes("conv_backward", *backward_of(arguments)) == {"dgrad": plan, "wgrad": plan}
    convolutions = {"conv_forward", "conv_dgrad", "conv_wgrad"}
    assert convolutions & set(kernels) == (convolutions if plan == "fused" else set())


def test_plans_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="unknown plan 'both'"):
        use_plan("both")
    with pytest.raises(ValueError, match="by the library has no tile"):
        Plan(False, TILE)


def test_statistics_of_a_sum_run_by_the_library():
    """The kernel reduces those of the convolution; a tile for it is refused, since it would change nothing."""
    arguments = convolution(stats=True, residual=True)
    with use_plan("fused"):
        assert BACKEND.routes("conv_forward", *arguments) == {"forward": "library"}
        assert "conv_forward" not in launched(lambda: BACKEND.conv_forward(*arguments))
    with use_plan(Plan(True, TILE)), pytest.raises(ValueError, match="runs by the library"):
        BACKEND.conv_forward(*arguments)
    assert BACKEND.tuner.problems("conv_forward", *arguments) == []


@pytest.mark.parametrize(
    "family, fused",
    [
        ("sm_80", "forward dgrad wgrad"),
        ("sm_90", "forward dgrad wgrad"),
        ("sm_100", "forward dgrad wgrad"),
        ("gfx1100", "forward"),
    ],
)
def test_what_is_not_measured_is_estimated_for_the_gpu(family, fused, monkeypatch):
    """By :mod:`fusedres.tuning.estimate`: of the calls that a bottleneck's first stage makes, whose gradients may be one kernel's; a 3x3
    is the library's."""
    monkeypatch.setattr(module, "INTERPRETED", False)

    def estimated(kernel: int = 1, geometry: Geometry = POINT) -> str:
        def of(channels: int) -> torch.Tensor:
            x = torch.empty(256, channels, 56, 56, dtype=torch.bfloat16, device="meta")
            return x.to(memory_format=torch.channels_last)

        x = LazyMap(of(64), torch.empty(2, 64), "relu", torch.empty(2, 64))
        weight, grad = (
            torch.empty(256, 64, kernel, kernel, dtype=torch.bfloat16),
            LazyGrad(of(256), of(256), torch.empty(3, 256)),
        )
        with record(arch=Arch(family, 227 * 1024, 32)):
            routes = BACKEND.routes("conv_forward", x, weight, None, geometry, Epilogue(stats=torch.empty(2, 256)))
            routes |= BACKEND.routes("conv_backward", grad, x, weight, geometry, GradTarget(sums=torch.empty(2, 64)))
        return " ".join(op for op, route in routes.items() if route == "fused")

    assert estimated() == fused
    assert estimated(3, THREE) == ""


# ---- float32 products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("allowed", [True, False])
def test_float32_is_multiplied_as_torch_is_allowed_to(allowed, dtype):
    """In TF32 where torch's own convolutions may use it, at every call anew; what was measured so says nothing of IEEE."""
    draw = Draw(dtype, device=DEVICE)
    x, weight = draw.lazy(2, 8, 6, 6, act="relu"), draw.weight(8, 8, 3, 3)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed), use_plan("fused"), record() as launches:
        BACKEND.conv_forward(x, weight, None, THREE)
        BACKEND.conv_backward(draw.gradient(2, 8, 6, 6), x, weight, THREE)
        (problem,) = BACKEND.tuner.problems("conv_forward", x, weight, None, THREE)
    reduced = allowed and dtype == torch.float32
    convolutions = [one.arguments for one in launches if one.kernel.__name__.startswith("conv_")]
    assert [a["PRECISION"] for a in convolutions] == ["tf32" if reduced else "ieee"] * 3
    assert ("tf32" in problem.features) == reduced


# ---- launches --------------------------------------------------------------------------------------------------------


def test_recording_takes_nothing_of_another_thread():
    arguments, found = convolution(), {}

    def beside():
        with use_plan("fused"):
            found["y"] = BACKEND.conv_forward(*arguments)

    thread = threading.Thread(target=beside)
    with record() as launches:
        thread.start()
        thread.join()
    assert launches == [] and found["y"].isfinite().all()


def test_recordings_nest():
    meta, outer, inner = torch.device("meta"), torch.device("cuda", 3), torch.device("cuda", 5)
    assert target_device(meta) == meta
    with record(outer, H100) as first:
        with record(inner, H100) as second:
            assert target_device(meta) == inner and target_device(torch.device("cpu")) == torch.device("cpu")
            BACKEND.statistics(
                torch.empty(1, 8, 2, 2, device="meta").to(memory_format=torch.channels_last),
                torch.empty(2, 8, device="meta"),
            )
        assert target_device(meta) == outer
    assert first == [] and len(second) == 2


def test_operands_with_activations_cannot_be_added():
    """What is between a BatchNorm and an addition has no place in the pass: it must not be dropped."""
    draw = Draw(torch.float32, device=DEVICE)
    x, plain = draw.lazy(1, 5, 2, 2, act="relu"), draw.lazy(1, 5, 2, 2)
    for operands in ((x, plain), (plain, x)):
        with pytest.raises(ValueError, match="activation of its own"):
            BACKEND.add_act_forward(*operands)
        with pytest.raises(ValueError, match="activation of its own"):
            BACKEND.add_act_backward(plain.raw, *operands, "relu")


def test_what_is_no_map_is_refused():
    x = torch.zeros(2, 5, 4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="channels_last"):
        BACKEND.statistics(x, torch.zeros(2, 5, device=DEVICE))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own test of this, in test_gpu.py")
@pytest.mark.parametrize("kernel, plan", [(1, "fused"), (1, "apart"), (3, "fused")])
def test_offsets_beyond_two_to_the_31(kernel, plan, monkeypatch):
    """Maps whose pixels are 2^22 values apart: untouched pages cost nothing."""
    from triton.runtime import interpreter

    # by which interpreted kernels copy whole storages onto themselves
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    (n, c, h, w), pitch = (2, 8, 15, 18), 1 << 22
    generator = torch.Generator().manual_seed(0)

    def wide() -> torch.Tensor:
        buffer = torch.empty(n * h * w * pitch, dtype=torch.float16)
        values = buffer.as_strided((n, c, h, w), (h * w * pitch, 1, w * pitch, pitch), 5)
        return values.copy_(torch.randn(n, c, h, w, generator=generator))

    def compact(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    assert n * h * w * pitch > 2**31
    draw, geometry = Draw(torch.float16), POINT if kernel == 1 else THREE
    x, grad, raw, out = wide(), wide(), wide(), wide()
    weight, coeff = draw.weight(c, c, kernel, kernel), draw.vectors(3, c)
    lazy = LazyMap(x, draw.scale_shift(c), "relu", draw.mean_invstd(c))
    small, small_grad = lazy._replace(raw=compact(x)), LazyGrad(compact(grad), compact(raw), coeff)
    stats, sums, expected_stats, expected_sums = (torch.empty(2, c) for _ in range(4))
    with use_plan(plan):
        BACKEND.conv_forward(lazy, weight, None, geometry, Epilogue(out, stats))
        dx, dw = BACKEND.conv_backward(
            LazyGrad(grad, raw, coeff), lazy, weight, geometry, GradTarget(wide(), sums=sums)
        )
    expected = eager.BACKEND.conv_forward(small, weight, None, geometry, Epilogue(stats=expected_stats))
    expected_dx, expected_dw = eager.BACKEND.conv_backward(
        small_grad, small, weight, geometry, GradTarget(sums=expected_sums)
    )
    pairs = ((out, expected), (dx, expected_dx), (dw, expected_dw), (stats, expected_stats), (sums, expected_sums))
    for ours, theirs in pairs:
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=4e-3 * scale)
    added = BACKEND.add_act_forward(lazy._replace(act="none"), LazyMap(raw), "relu", out=out)
    expected = eager.BACKEND.add_act_forward(small._replace(act="none"), LazyMap(compact(raw)), "relu")
    torch.testing.assert_close(added, expected)


# ---- what cannot be built --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("direction", ["value", "derivative"])
def test_an_activation_without_device_code_does_not_compile(direction, act):
    """Also interpreted; one that is known does."""
    unknown = Activation("swish", 0.0)
    x = LazyMap(Draw(torch.float32, device=DEVICE).map(1, 5, 2, 2))

    def run(activation: Activation) -> torch.Tensor:
        if direction == "value":
            return elementwise.add_act_forward(x, None, activation)
        return elementwise.add_act_backward(x.raw, x, None, activation)

    with pytest.raises(Exception, match=f"no {direction} for this kind"):
        run(unknown)
    assert run(parse(act)).isfinite().all()


def test_an_unknown_name_of_an_activation_is_refused():
    x = LazyMap(Draw(torch.float32, device=DEVICE).map(1, 5, 2, 2))
    with pytest.raises(ValueError, match="unknown activation"):
        BACKEND.add_act_forward(x, None, "swish")


FAILING = {
    "forward": (conv_forward, "conv_forward"),
    "dgrad": (conv_dgrad, "conv_dgrad"),
    "wgrad": (conv_wgrad, "conv_wgrad"),
}


@pytest.mark.parametrize("op", FAILING)
@pytest.mark.parametrize("error", [OutOfResources, PTXASError])
def test_a_kernel_that_cannot_be_built_is_the_librarys_from_then_on(op, error, monkeypatch):
    """It is tried once, where it does not fit also in smaller tiles, and said once, for this convolution alone; the result is right."""
    arguments, other = convolution(), convolution(kernel=1)
    tried = []

    def fails(*args):
        tried.append(args[-1])
        raise OutOfResources(99_999, 40_000, "shared memory") if error is OutOfResources else PTXASError("99999")

    monkeypatch.setattr(*FAILING[op], fails)

    def call(arguments):
        if op == "forward":
            return (BACKEND.conv_forward(*arguments),)
        return BACKEND.conv_backward(*backward_of(arguments))

    with use_plan("library"):
        expected = call(arguments)
    with pytest.warns(RuntimeWarning, match=f"fused {op} kernel .* cannot be built .*99999") as warned:
        first = call(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = call(arguments)
    assert len(warned) == 1 and tried[0] is None
    assert len(tried) == len(set(tried)) and (len(tried) > 1) == (error is OutOfResources)
    for found in (first, second):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    name = "conv_forward" if op == "forward" else "conv_backward"
    routes = BACKEND.routes(name, *(arguments if op == "forward" else backward_of(arguments)))
    assert routes[op] == "library" and all(route == "fused" for key, route in routes.items() if key != op)
    assert BACKEND.routes(name, *(other if op == "forward" else backward_of(other)))[op] == "fused"
    # what was asked for by name is not replaced in silence
    with use_plan("fused"), pytest.raises(error):
        call(arguments)


@pytest.mark.parametrize("op", FAILING)
def test_what_does_not_fit_runs_in_the_nearest_tile_that_does(op, monkeypatch):
    """In fewer stages or half the columns; from then on at once, and right."""
    arguments, (where, name) = convolution(), FAILING[op]
    original, tried = getattr(where, name), []
    default = tiles.conv_config(op, tiles.ConvSize(72, 8, 8, 9, 4), tiles.DEFAULT_ARCH)
    fits = tiles.smaller(default)[-1]

    def limited(*args):
        tried.append(args[-1])
        if args[-1] != fits:
            raise OutOfResources(99_999, 40_000, "shared memory")
        return original(*args)

    def call():
        if op == "forward":
            return (BACKEND.conv_forward(*arguments),)
        return BACKEND.conv_backward(*backward_of(arguments))

    with use_plan("library"):
        expected = call()
    monkeypatch.setattr(where, name, limited)
    with pytest.warns(RuntimeWarning, match=f"fused {op} kernel .* runs in a tile of {fits} from now on"):
        call()
    assert tried == [None, *tiles.smaller(default)]
    tried.clear()
    for ours, theirs in zip(call(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert tried == [fits]


@pytest.fixture
def empty_triton_cache(tmp_path, monkeypatch):
    """Nothing built or found before, here or on disk."""
    from triton.runtime import build

    # what Triton remembers of the compiler, from 3.7 on
    caches = [module.build_fault, *(f for name, f in vars(build).items() if name == "_find_compiler")]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_machine_with_a_compiler_can_build(empty_triton_cache):
    assert module.build_fault() is None


@pytest.mark.parametrize("lacking", ["compiler", "headers"])
def test_a_machine_that_cannot_build_says_so_before_the_first_call(lacking, empty_triton_cache, monkeypatch):
    if lacking == "compiler":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "")
    else:
        # a compiler that does not find what it includes
        monkeypatch.setenv("CC", "false")
        monkeypatch.setattr(subprocess, "check_call", _fails)
    reason = module.build_fault()
    assert reason is not None and "C compiler and Python's headers" in reason
    assert module.build_fault() is reason, "it is tried once"
    # what a GPU would be told
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert BACKEND.supports(torch.device("cuda", 0), torch.float16) == reason


def _fails(command, **options):
    raise subprocess.CalledProcessError(1, command)


def test_supports():
    device = torch.device(DEVICE)
    assert BACKEND.supports(device, torch.float32) is None and BACKEND.supports(device, torch.float16) is None
    assert "float64" in BACKEND.supports(device, torch.float64)
    assert "meta" in BACKEND.supports(torch.device("meta"), torch.float32)
