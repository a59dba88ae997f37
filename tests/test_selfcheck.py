"""Fused kernels beside the library at their first use: right ones run, wrong ones do not, and both are found out once per GPU model."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
pytest.importorskip("triton")

from interpreter import corrected  # noqa: E402
from triton.runtime.errors import PTXASError  # noqa: E402

from fusedres import first_use  # noqa: E402
from fusedres.__main__ import main  # noqa: E402
from fusedres.backends.triton import TritonBackend  # noqa: E402
from fusedres.kernels import conv_dgrad, conv_forward, conv_pointwise_backward, conv_wgrad, launch, tiles  # noqa: E402
from fusedres.kernels.launch import INTERPRETED  # noqa: E402
from fusedres.tuning import plans, selfcheck  # noqa: E402
from fusedres.tuning.convolutions import Draw  # noqa: E402
from fusedres.tuning.plans import Problem  # noqa: E402

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
KERNELS = {
    "forward": (conv_forward, "conv_forward"),
    "dgrad": (conv_dgrad, "conv_dgrad"),
    "wgrad": (conv_wgrad, "conv_wgrad"),
    "backward": (conv_pointwise_backward, "conv_pointwise_backward"),
}
FEATURES = {
    "forward": ("scale_shift", "relu", "stats"),
    "dgrad": ("coeff", "raw", "scale_shift", "relu", "scaled", "sums"),
    "wgrad": ("coeff", "raw", "scale_shift", "relu"),
    "backward": ("both", "coeff", "raw", "scale_shift", "relu", "scaled", "sums"),
}
each_op = pytest.mark.parametrize("op", KERNELS)


def problem(op: str, dtype: str = "float32", **changes) -> Problem:
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    values = {"x": (2, 8, 7, 6), "x_pitch": 8, "y_pitch": 16, "weight": (16, 8, 3, 3), "features": FEATURES[op]}
    if op == "backward":
        values["weight"], geometry["padding"] = (16, 8, 1, 1), (0, 0)
    return Problem(op, dtype, **(values | geometry | changes))


def config_of(of: Problem) -> tiles.ConvConfig:
    return tiles.conv_config(of.op, of.size, tiles.DEFAULT_ARCH)


@pytest.fixture
def backend(tmp_path, monkeypatch) -> Iterator[TritonBackend]:
    """One that compares kernels, and knows of none; of float32 the problems without TF32."""
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))
    plans.forget()
    monkeypatch.setattr(TritonBackend, "checks", lambda self, device: first_use.is_on())
    module = importlib.import_module(TritonBackend.__module__)
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module.estimate, "is_fused", lambda problem, arch: True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield TritonBackend()


PROBLEMS = {
    "3x3": {},
    "1x1": {"weight": (16, 8, 1, 1), "padding": (0, 0)},
    "strided": {"stride": (2, 2)},
    "dilated": {"dilation": (4, 4), "padding": (4, 4)},
    "groups": {"groups": 2, "weight": (16, 4, 3, 3)},
    "slices": {"x_pitch": 24, "y_pitch": 32},
}


@pytest.mark.parametrize(
    ("op", "name", "dtype"),
    [
        # dtypes take turns
        pytest.param(op, name, dtype, marks=[] if turn % 2 == i else [pytest.mark.slow])
        for op in KERNELS
        for turn, name in enumerate(PROBLEMS)
        for i, dtype in enumerate(("float32", "bfloat16"))
        if op != "backward" or name in ("1x1", "slices")
    ],
)
def test_right_kernels_pass(op, name, dtype):
    asked = problem(op, dtype, **PROBLEMS[name])
    with corrected() if INTERPRETED else torch.no_grad():
        assert selfcheck.passes(TritonBackend(), asked, config_of(asked), DEVICE)


#: what else a kernel may be asked for: everything of an epilogue, and a gradient that is added to what is there
OTHERS = {
    ("forward", "residual"): (
        "scale_shift",
        "relu",
        "bias",
        "out_scale_shift",
        "residual",
        "residual_scale_shift",
        "out_relu",
    ),
    ("forward", "plain"): ("bias", "out_relu"),
    ("dgrad", "accumulates"): ("coeff", "raw", "scale_shift", "relu", "accumulate", "scaled", "sums"),
    ("dgrad", "adds"): ("coeff", "raw", "scale_shift", "relu", "base", "sums"),
    ("dgrad", "plain"): (),
    ("wgrad", "plain"): (),
    ("backward", "accumulates"): ("both", "coeff", "raw", "scale_shift", "relu", "accumulate", "scaled", "sums"),
    ("backward", "plain"): ("both",),
}


@pytest.mark.parametrize(("op", "features"), [(op, f) for (op, _), f in OTHERS.items()], ids=map("-".join, OTHERS))
def test_right_kernels_pass_whatever_they_are_asked_for(op, features):
    asked = problem(op, features=features)
    assert selfcheck.passes(TritonBackend(), asked, config_of(asked), DEVICE)


def wrong_result(found):
    """A single channel is off; of two gradients that of the weight."""
    wrong = found[1] if isinstance(found, tuple) else found
    wrong[:, 3] *= 1.25
    return found


@each_op
def test_a_kernel_whose_result_is_wrong_does_not_pass(op, monkeypatch):
    module, name = KERNELS[op]
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: wrong_result(original(*args)))
    assert not selfcheck.passes(TritonBackend(), problem(op), config_of(problem(op)), DEVICE)


@pytest.mark.parametrize("op, place", [("forward", 4), ("dgrad", 4), ("backward", 3)])
def test_a_kernel_whose_sums_are_wrong_does_not_pass(op, place, monkeypatch):
    module, name = KERNELS[op]
    original = getattr(module, name)

    def wrong(*args):
        found = original(*args)
        reduced = args[place].stats if op == "forward" else args[place].sums
        reduced[1, 2] += reduced[1].abs().max()
        return found

    monkeypatch.setattr(module, name, wrong)
    assert not selfcheck.passes(TritonBackend(), problem(op), config_of(problem(op)), DEVICE)


def test_what_is_compared_is_the_same_kernel_on_few_pixels():
    asked = problem("forward", x=(256, 8, 56, 3), dilation=(8, 1))
    assert selfcheck.small(asked) == asked._replace(x=(2, 8, 17, 3))
    other = config_of(asked)
    assert selfcheck.key_of(asked, other) == selfcheck.key_of(asked._replace(x=(32, 8, 28, 3)), other)
    assert selfcheck.key_of(asked, other) != selfcheck.key_of(asked._replace(x_pitch=16), other)
    plain = selfcheck.key_of(asked, other)
    with launch.dependent_launches(True):
        assert selfcheck.key_of(asked, other) != plain


def call(backend: TritonBackend, op: str) -> tuple[torch.Tensor | None, ...]:
    asked = problem(op)
    draw = Draw(asked, DEVICE)
    if op == "forward":
        return (backend.conv_forward(*draw.forward()),)
    return backend.conv_backward(*gradients(draw, op))


def gradients(draw: Draw, op: str) -> tuple:
    """The arguments of the conv_backward that asks for ``op``."""
    grad, x, weight, geometry, target = draw.backward()
    return grad, x, weight, geometry, None if op == "wgrad" else target, op != "dgrad"


def routes(backend: TritonBackend, op: str) -> str:
    draw = Draw(problem(op), DEVICE)
    if op == "forward":
        return backend.routes("conv_forward", *draw.forward())[op]
    chosen = backend.backward_plans(*gradients(draw, op))
    return "fused" if op in chosen and chosen[op].fused else "library"


@each_op
def test_a_wrong_kernel_is_the_librarys_from_then_on(op, backend, monkeypatch):
    """It is said once, in this process and in each later one, which compares nothing again; random states are as before."""
    module, name = KERNELS[op]
    original, launched = getattr(module, name), []

    def wrong(*args):
        launched.append(args)
        return wrong_result(original(*args))

    monkeypatch.setattr(module, name, wrong)
    torch.manual_seed(1)
    call(by_library(), op)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match=f"fused {op} kernel .* computes something else than the library") as said:
        found = call(backend, op)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(said) == 1 and len(launched) == selfcheck.DRAWS and routes(backend, op) == "library"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(1)
        again = call(backend, op)
    for one, two in zip(found, again, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    with pytest.warns(RuntimeWarning, match="computes something else"):
        call(TritonBackend(), op)
    assert len(launched) == selfcheck.DRAWS


def test_doctor_says_what_was_found_out(backend, monkeypatch, capsys):
    module, name = KERNELS["forward"]
    original = getattr(module, name)
    call(backend, "wgrad")
    monkeypatch.setattr(module, name, lambda *args: wrong_result(original(*args)))
    with pytest.warns(RuntimeWarning):
        call(backend, "forward")

    def fails(*args):
        raise PTXASError("too many registers")

    monkeypatch.setattr(*KERNELS["dgrad"], fails)
    with pytest.warns(RuntimeWarning, match="cannot be built"):
        call(backend, "dgrad")
    assert main(["doctor"]) == 0
    *_, head, first, second = (line.strip() for line in capsys.readouterr().out.splitlines() if "triton: " in line)
    assert head == "triton: 3 kernels known here, 2 of them not used"
    assert first.startswith("triton: forward of input 2x8x7x6") and first.endswith(
        "computes something else than the library"
    )
    assert second.endswith("cannot be built: PTXASError: PTXAS error: too many registers")


def by_library() -> TritonBackend:
    other = TritonBackend()
    other._fallen = {problem(op): plans.LIBRARY for op in KERNELS}
    return other


@each_op
def test_a_right_kernel_is_compared_once_per_gpu_model(op, backend, monkeypatch):
    compared = []
    original = selfcheck.passes
    monkeypatch.setattr(selfcheck, "passes", lambda *args: (compared.append(args), original(*args))[1])
    for of in (backend, backend, TritonBackend()):
        call(of, op)
        assert routes(of, op) == "fused"
    assert len(compared) == 1
    monkeypatch.setattr(plans, "versions", lambda: {"torch": "another"})
    call(TritonBackend(), op)
    assert len(compared) == 2


def test_it_can_be_switched_off(backend, monkeypatch):
    monkeypatch.setenv("FUSEDRES_SELF_CHECK", "0")
    monkeypatch.setattr(selfcheck, "passes", lambda *args: pytest.fail("compared"))
    call(backend, "forward")


def test_a_cache_that_cannot_be_written_is_none(backend, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path / "file" / "below"))
    call(backend, "forward")
    assert routes(backend, "forward") == "fused"
