"""A 1x1's forward by tensor descriptors: what it computes, by the contract's rule, which convolutions have it, and that nobody has it by
default.

Where there is no GPU it is interpreted: corrected, with programs in a shuffled order, and every access watched (conftest.py). On a GPU from
before Hopper there is nothing to test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from contract import SMALL, Config, Convolution, conforms, fresh, moments  # noqa: E402
from interpreter import corrected, watched  # noqa: E402
from support import Draw, dtype_name  # noqa: E402

from fusedres.backends.triton import BACKEND, use_plan  # noqa: E402
from fusedres.kernels import conv_pointwise_forward as kernel  # noqa: E402
from fusedres.kernels import tiles  # noqa: E402
from fusedres.kernels.launch import INTERPRETED, arch_of, record  # noqa: E402
from fusedres.kernels.tiles import Arch, ConvConfig, ConvSize  # noqa: E402
from fusedres.operands import Epilogue, LazyMap  # noqa: E402
from fusedres.specs import Geometry  # noqa: E402
from fusedres.testing import assert_parity  # noqa: E402
from fusedres.tuning import plans, selfcheck  # noqa: E402
from fusedres.tuning.plans import FUSED, Plan  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
HOPPER = Arch("sm_90", 227 * 1024, 32)
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("exact_and_unmeasured", "uninitialised_memory_is_nan"),
    pytest.mark.skipif(
        not INTERPRETED and not tiles.is_since_hopper(arch_of(torch.device("cuda"))),
        reason="this GPU has no descriptors",
    ),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POINT = Geometry((1, 1), (0, 0), (1, 1), 1)
PAD = (8, 16)  # of slices: a start and a pitch that 16 bytes divide


def conv(n: int, c: int, h: int, w: int, k: int) -> Convolution:
    return Convolution((n, c, h, w), k, (1, 1), POINT)


def by(block_m: int, block_n: int, block_k: int) -> Plan:
    return Plan(True, ConvConfig(block_m, block_n, block_k, 4, 2, descriptors=True))


# the shapes, the tile, and the programs at most
CASES = {
    "steps, a program for each tile": (conv(2, 72, 9, 9, 136), by(32, 32, 32), 1000),
    "steps, several tiles for each program": (conv(2, 72, 9, 9, 136), by(32, 32, 32), 7),
    "one step, several tiles for each program": (conv(2, 40, 7, 6, 72), by(16, 32, 64), 4),
    "one step, one program": (conv(1, 32, 5, 5, 32), by(16, 16, 32), 1),
    "nothing divides a tile": (conv(1, 24, 7, 5, 40), by(16, 16, 16), 5),
    "a pixel": (conv(1, 8, 1, 1, 16), by(16, 16, 16), 3),
    "maps of a pixel": (conv(3, 16, 1, 1, 8), by(16, 16, 16), 2),
    "a weight given channels_last": (conv(2, 24, 5, 5, 16)._replace(deep=True), by(16, 16, 16), 3),
}


def every(cases: dict[str, Any], turn: int = 0) -> pytest.MarkDecorator:
    """Every case in every dtype, one of which is quick where kernels are interpreted."""
    rows = [
        pytest.param(
            Config("triton", dtype, DEVICE), case, id=f"{dtype_name(dtype)}-{name}",
            marks=[pytest.mark.slow] if INTERPRETED and (i + turn) % len(DTYPES) != j else [],
        )
        for i, (name, case) in enumerate(cases.items())
        for j, dtype in enumerate(DTYPES)
    ]  # fmt: skip
    return pytest.mark.parametrize("config, case", rows)


def kernels_of(*given: Any) -> set[str]:
    """Which kernels such a conv_forward launches, but for merges."""
    with record() as launches:
        BACKEND.conv_forward(*given)
    return {one.kernel.__name__.removesuffix("_kernel") for one in launches} - {"merge"}


def forward(backend, draw, case, plan, programs, *, x=None, bias=False, **behind) -> dict[str, torch.Tensor]:
    """One conv_forward as results; on triton by descriptors, or it fails. ``behind``: ``into`` a slice, ``stats``, ``normalised``,
    ``residual`` (plain, normalised), ``act``."""
    outputs, residual = case.outputs, behind.get("residual")
    epilogue = Epilogue(
        draw.hole(*case.out) if behind.get("into") else None,
        draw.room(2, outputs) if behind.get("stats") else None,
        draw.scale_shift(outputs) if behind.get("normalised") else None,
        residual and draw.lazy(*case.out, normalised=residual == "normalised"),
        behind.get("act", "none"),
    )
    operand, weight = draw.lazy(*case.shape, **(x or {"normalised": False})), case.draw_weight(draw)
    given = operand, weight, draw.parameter(outputs) if bias else None, case.geometry, epilogue
    with use_plan(plan), kernel.in_few_programs(programs):
        if backend is BACKEND:
            assert kernels_of(*given) == {"conv_pointwise_forward"}
        y = backend.conv_forward(*given)
    assert y is epilogue.out or (epilogue.out is None and fresh(y) is y)
    return {"out": y, **({} if epilogue.stats is None else moments(epilogue.stats, y.numel()))}


# ---- what it computes ------------------------------------------------------------------------------------------------


@every(CASES)
def test_in_training(config, case):
    """A bias, statistics, into a slice."""
    conforms(
        config, lambda b, d: forward(b, d, *case, bias=True, stats=True, into=True), values=case[0].values, pad=PAD
    )


@every(CASES, turn=1)
def test_in_inference(config, case):
    """Everything in the epilogue: BatchNorm, a normalised residual, ReLU."""
    behind = {"normalised": True, "residual": "normalised", "act": "relu"}
    conforms(config, lambda b, d: forward(b, d, *case, **behind), values=case[0].values, pad=PAD)


EPILOGUES = {
    "bare": {},
    "into a slice": {"into": True},
    "statistics of a fresh map": {"stats": True},
    "normalised": {"normalised": True, "act": "silu", "into": True},
    "sum": {"residual": "plain"},
    "identity shortcut": {"normalised": True, "residual": "plain", "act": "relu"},
    "everything": {"bias": True, "normalised": True, "residual": "normalised", "act": "gelu", "into": True},
}


@every(EPILOGUES)
def test_epilogues(config, case):
    shape = conv(1, 24, 7, 5, 40)
    conforms(config, lambda b, d: forward(b, d, shape, by(16, 16, 16), 4, **case), values=shape.values, pad=PAD)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.skipif(not INTERPRETED, reason="the order of programs is the GPU's")
def test_no_bit_depends_on_the_order_or_the_number_of_programs(dtype):
    found, behind = [], {"stats": True, "into": True}
    for order, programs in (("forward", 1000), ("reverse", 5), ("shuffle", 1)):
        with corrected(order=order), watched() as watch:
            draw = Config("triton", dtype, DEVICE).draw(pad=PAD)
            found.append(forward(BACKEND, draw, conv(1, 24, 7, 5, 40), by(16, 16, 16), programs, **behind))
        assert watch.launches > 0
    assert all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())


def test_outputs_that_nothing_divides_into_an_aligned_slice():
    """The slice's neighbours stay what they were."""
    draw = Draw(torch.float32, pad=(0, 0), device=DEVICE)
    x, weight, buffer = draw.map(1, 16, 5, 3), draw.weight(19, 16, 1, 1), draw.filled(1, 32, 5, 3).fill_(torch.nan)
    given = LazyMap(x), weight, None, POINT, Epilogue(buffer[:, 8:27])
    with use_plan(by(16, 16, 16)), kernel.in_few_programs(2):
        assert kernels_of(*given) == {"conv_pointwise_forward"}
        y = BACKEND.conv_forward(*given)
    truth = torch.nn.functional.conv2d(x.double(), weight.double())
    assert_parity([y], [torch.nn.functional.conv2d(x, weight)], [truth], "out")
    assert buffer[:, :8].isnan().all() and buffer[:, 27:].isnan().all()


# ---- where it runs ---------------------------------------------------------------------------------------------------


def given(case: Convolution, dtype: torch.dtype = torch.float32, pad=PAD, x=None, **epilogue: Any) -> tuple:
    draw = Draw(dtype, pad=pad, device=DEVICE)
    operand = draw.lazy(*case.shape, **({"normalised": False} if x is None else x))
    return operand, case.draw_weight(draw), None, case.geometry, Epilogue(**epilogue)


SHAPE = conv(1, 16, 4, 3, 24)
OTHERS = {
    "a pending BatchNorm": lambda: given(SHAPE, x={}),
    "a pending activation": lambda: given(SHAPE, x={"normalised": False, "act": "relu"}),
    "a slice that begins between": lambda: given(SHAPE, pad=(2, 14)),
    "a pitch between": lambda: given(SHAPE, pad=(8, 2)),
    "channels that 16 bytes do not divide": lambda: given(conv(1, 6, 4, 3, 24), pad=(0, 2)),
    "outputs that 16 bytes do not divide": lambda: given(conv(1, 16, 4, 3, 21)),
    "a residual's pitch between": lambda: given(SHAPE, residual=LazyMap(Draw(torch.float32, pad=(0, 2)).map(*SHAPE.out).to(DEVICE))),
    "stride": lambda: given(conv(1, 8, 4, 4, 8)._replace(geometry=Geometry((2, 2), (0, 0), (1, 1), 1))),
    "padding": lambda: given(conv(1, 8, 4, 4, 8)._replace(geometry=Geometry((1, 1), (1, 1), (1, 1), 1))),
    "groups": lambda: given(conv(1, 16, 4, 4, 16)._replace(geometry=Geometry((1, 1), (0, 0), (1, 1), 2))),
    "several taps": lambda: given(SMALL["3x3"]),
    "an empty batch": lambda: given(conv(0, 16, 4, 3, 24)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_descriptors_cannot_say_runs_by_the_other_kernel(name):
    arguments = OTHERS[name]()
    with use_plan(by(16, 16, 16)):
        assert kernels_of(*arguments) == {"conv_forward"}
    with use_plan(by(16, 16, 16)):
        y = BACKEND.conv_forward(*arguments)
    with use_plan("library"):
        # that it is the same convolution: how right it is, the cases above say
        torch.testing.assert_close(y, BACKEND.conv_forward(*arguments), rtol=1e-4, atol=1e-4)


def test_gpus_before_hopper_have_none():
    x, weight = (torch.empty(*shape, dtype=torch.float16, device="meta") for shape in ((1, 16, 4, 3), (24, 16, 1, 1)))
    x = x.to(memory_format=torch.channels_last)
    for family, name in {
        "sm_80": "conv_forward", "sm_89": "conv_forward", "sm_90": "conv_pointwise_forward", "gfx942": "conv_forward",
        "sm_100": "conv_pointwise_forward", "sm_120": "conv_pointwise_forward",
    }.items():  # fmt: skip
        with record(arch=Arch(family, 64 * 1024, 32)) as launches, use_plan(by(16, 16, 16)):
            BACKEND.conv_forward(LazyMap(x), weight, None, POINT, Epilogue())
        assert [one.kernel.__name__ for one in launches] == [f"{name}_kernel"], family


def test_there_are_as_many_programs_as_multiprocessors_or_tiles():
    x = torch.empty(8, 16, 64, 64, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty(32, 16, 1, 1, dtype=torch.float16, device="meta")
    for block_m, programs in ((64, 264), (256, 128)):
        with record(arch=HOPPER) as launches, use_plan(by(block_m, 32, 16)):
            BACKEND.conv_forward(LazyMap(x), weight, None, POINT, Epilogue())
        assert launches[0].grid == (programs,)


def test_nobody_has_it_by_default():
    """Nothing of it has been timed."""
    arguments = given(SHAPE)
    for plan in ("fused", FUSED, "apart"):
        with use_plan(plan):
            assert kernels_of(*arguments) == {"conv_forward"}
    sizes = (ConvSize(rows, c, k, 1, 2) for rows in (100, 10**6) for c, k in ((64, 256), (1024, 256)))
    assert not any(tiles.forward_config(size, HOPPER).descriptors for size in sizes)


def test_a_measured_plan_has_it():
    """Kept on disk with the rest of the tile."""
    arguments, plan = given(SHAPE), by(16, 16, 16)
    [problem] = BACKEND.tuner.problems("conv_forward", *arguments)
    device = torch.device(DEVICE) if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
    plans.remember(device, {problem: plan})
    plans.forget()
    assert plans.table(device)[problem] == plan and "descriptors" in str(plan)
    assert kernels_of(*arguments) == {"conv_pointwise_forward"}


def test_tune_measures_it_from_hopper_on_where_descriptors_can_say_it():
    device = torch.device("meta")
    for arch, name, tf32, expected in (
        (HOPPER, None, True, True), (HOPPER, None, False, False), (Arch("sm_80", 163 * 1024, 32), None, True, False),
        (HOPPER, "a pending BatchNorm", True, False), (HOPPER, "a pending activation", True, False),
        (HOPPER, "a pitch between", True, False), (HOPPER, "stride", True, False),
    ):  # fmt: skip
        arguments = given(SHAPE) if name is None else OTHERS[name]()
        with record(arch=arch), torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            [problem] = BACKEND.tuner.problems("conv_forward", *arguments)
            first, *others = BACKEND.tuner.candidates(problem, device)
        assert first == FUSED and any(plan.config.descriptors for plan in others) == expected, name


@pytest.mark.parametrize("family", ["sm_90", "sm_100", "sm_120"])
def test_candidates_fit(family):
    """Into shared memory, with at least two steps on their way; whole inputs, where that is a tile, once."""
    arch = Arch(family, (99 if family == "sm_120" else 227) * 1024, 32)
    for channels, outputs, itemsize in ((64, 256, 2), (128, 512, 2), (1024, 256, 2), (96, 64, 4)):
        for features in ((), ("residual",), ("residual", "residual_scale_shift")):
            found = tiles.described_candidates(ConvSize(10**6, channels, outputs, 1, itemsize), features, arch)
            assert found and len(set(found)) == len(found)
            for one in found:
                step = (one.BLOCK_M + one.BLOCK_N) * one.BLOCK_K * itemsize
                out = one.BLOCK_M * one.BLOCK_N * itemsize
                assert one.descriptors and one.num_stages > 1 and max(one.BLOCK_M, one.BLOCK_N, one.BLOCK_K) <= 256
                assert one.num_stages * step + (2 if features else 1) * out <= arch.shared


@pytest.mark.skipif(not INTERPRETED, reason="the GPU's own first use is test_selfcheck.py's")
def test_the_first_use_compares_it_with_several_tiles_for_a_program(monkeypatch):
    [problem] = BACKEND.tuner.problems("conv_forward", *given(SHAPE, stats=torch.empty(2, 24)))
    launched, run = [], kernel.Prepared.__call__

    def noted(self, *tensors, **late):
        launched.append((self.kernel.__name__, self.grid))
        return run(self, *tensors, **late)

    monkeypatch.setattr(kernel.Prepared, "__call__", noted)
    assert selfcheck.passes(BACKEND, problem, by(16, 16, 16).config, torch.device("cpu"))
    assert ("conv_pointwise_forward_kernel", (1,)) in launched
    assert selfcheck.key_of(problem, by(16, 16, 16).config) != selfcheck.key_of(problem, ConvConfig(16, 16, 16, 4, 2))
