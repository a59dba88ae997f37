"""What blocks call as it stands, beside what is fused, is part of the one schedule that they are in inference, where it does nothing but
compute: the bits of the blocks one by one, any change noticed, and anything else runs at every call as it did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import general_blocks
import pytest
import torch
import torch.nn.functional as F
from standing import CHANGES, MODELS, Branches, Gate, Shuffled, Sums, Weighed, doubles, squeeze
from stretched import WARM, added_by, images, model_of, one_by_one, row
from support import Counts
from torch import Tensor, nn

import fusedres
from fusedres.blocks import stretch
from fusedres.errors import Unsupported
from fusedres.recognition import computing
from fusedres.swap import state_of

pytestmark = pytest.mark.usefixtures("compiled_backend")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("name", MODELS)
def test_it_gives_the_bits_of_the_blocks_one_by_one(name, memory_format, mode: AbstractContextManager, plays):
    model = model_of(MODELS[name])
    twin = one_by_one(model)
    with mode():
        for _ in range(WARM + 2):
            x = images().to(memory_format=memory_format)
            y, expected = model(x), twin(x)
            assert torch.equal(y, expected) and y.stride() == expected.stride()
        assert added_by(lambda: model(x), plays) == 1 and added_by(lambda: twin(x), plays) > 1


@pytest.mark.parametrize("name", ["squeeze", "sums"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_in_other_dtypes(name, dtype, plays):
    model = model_of(MODELS[name], dtype)
    twin = one_by_one(model)
    with torch.no_grad():
        for _ in range(WARM + 1):
            x = images().to(dtype)
            assert torch.equal(model(x), twin(x))
        assert added_by(lambda: model(x), plays) == 1


@pytest.mark.parametrize("build", [Branches, Sums, lambda: Shuffled(8, 8, 1)], ids=["branches", "sums", "shuffle"])
def test_a_general_block_alone_is_one_schedule(build, plays):
    model = model_of(build)
    twin = one_by_one(model)
    with torch.no_grad():
        for _ in range(WARM + 1):
            x = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last)
            y, expected = model(x), twin(x)
            assert torch.equal(y, expected) and y.stride() == expected.stride()
        assert added_by(lambda: model(x), plays) == 1


# ---- what may happen between two calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_change_is_noticed(change, plays, monkeypatch):
    monkeypatch.setattr(stretch, "RUNS_AFTER_FAILURE", 1)  # what has changed is looked at, and recorded, too
    model = model_of(MODELS["gate"])
    x = images()
    for _ in range(WARM + 1):
        before = model(x)
    assert added_by(lambda: model(x), plays) == 1
    plain = fusedres.revert(copy.deepcopy(model))
    if change is CHANGES["padding"]:
        with pytest.raises(RuntimeError, match="size"):
            change(plain)
            plain(x)
        change(model)
        with pytest.raises(RuntimeError, match="size"):
            model(x)
        return
    change(plain)
    change(model)
    # far above the roundings that the assertion below allows
    assert not torch.allclose(before, plain(x), rtol=1e-3, atol=1e-3), "a change that changes nothing"
    for _ in range(3 * WARM):
        # eager's convolutions add up in another order; what a missed change makes is ten times as large, as was just asserted
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    if change is CHANGES["one that counts"]:
        assert model[5].inside.calls == 3 * WARM


REPLACED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a forward of the class": lambda patch: patch.setattr(Gate, "forward", lambda self, x: x * 0.5),
    "a call of the class": lambda patch: patch.setattr(Gate, "__call__", lambda self, x: x * 0.5, raising=False),
    "a constant of the file": lambda patch: patch.setitem(Gate.forward.__globals__, "SCALE", -9.0),
    "a function that it calls": lambda patch: patch.setattr(torch, "sigmoid", torch.tanh),
    "a function behind torch's module": lambda patch: patch.setattr(F, "hardsigmoid", lambda x, inplace: x),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
@torch.no_grad()
def test_code_that_is_replaced_is_called(replace, plays, monkeypatch):
    monkeypatch.setattr(stretch, "RUNS_AFTER_FAILURE", 1)
    name = "squeeze" if replace is REPLACED["a function behind torch's module"] else "gate"
    model = model_of(MODELS[name])
    plain, x = fusedres.revert(copy.deepcopy(model)), images()
    for _ in range(WARM + 1):
        before = model(x)
    assert added_by(lambda: model(x), plays) == 1
    replace(monkeypatch)
    # far above the roundings that the assertion below allows
    assert not torch.allclose(before, plain(x), rtol=1e-3, atol=1e-3), "a change that changes nothing"
    for _ in range(3 * WARM):
        # eager's convolutions add up in another order; what a missed change makes is ten times as large, as was just asserted
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


# ---- what does more --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_counts_its_calls_runs_at_every_call():
    model = model_of(lambda: row(Weighed(Counts())))
    for _ in range(2 * WARM):
        model(images())
    assert model[5].inside.calls == 2 * WARM


@torch.no_grad()
def test_random_numbers_are_drawn_at_every_call(plays):
    model = model_of(lambda: row(Weighed(nn.Dropout(0.5))))
    model[5].inside.train()
    x = images()
    found = [model(x) for _ in range(4 * WARM)]
    assert not any(torch.equal(a, b) for a, b in zip(found, found[1:], strict=False))
    assert added_by(lambda: model(x), plays) > 1, "the fused parts are schedules still"


@torch.no_grad()
def test_a_norm_that_uses_its_batch_moves_its_statistics_at_every_call():
    model = model_of(lambda: row(Weighed(nn.Sequential(nn.BatchNorm2d(8), nn.Sigmoid()))))
    model[5].inside.train()
    plain, x = fusedres.revert(copy.deepcopy(model)), images()
    for _ in range(3 * WARM):
        # eager's convolutions add up in another order
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    ours, theirs = model[5].inside[0], plain[5].inside[0]
    assert ours.num_batches_tracked == theirs.num_batches_tracked
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


class Clamped(nn.Module):
    """Computes by an operator that no schedule holds: it takes numbers of any type."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0.0, 1.0)


@torch.no_grad()
def test_where_that_cannot_be_recorded_what_is_fused_in_front_of_it_is_one_schedule(plays):
    model = model_of(lambda: row(Clamped(), *general_blocks.unit(8)))
    twin, x = one_by_one(model), images()
    for _ in range(3 * WARM):
        assert torch.equal(model(x), twin(x))
    assert added_by(lambda: model(x), plays) == 2 < added_by(lambda: twin(x), plays)
    assert state_of(model).stretches[0]._failures == 0


class Halves(nn.Module):
    """Returns a part of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = general_blocks.unit(8), general_blocks.unit(8)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :4] if self.two(self.one(x)).dim() == 4 else x


@torch.no_grad()
def test_a_view_of_the_input_stays_one():
    model = model_of(Halves)
    x = torch.randn(2, 8, 5, 7)
    for _ in range(2 * WARM):
        y = model(x)
        assert y._base is x and y.data_ptr() == x.data_ptr()


def _with(module: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(module)
    return module


@pytest.mark.parametrize(
    "build, reason",
    [
        (Counts, "more than compute"),
        (lambda: nn.BatchNorm2d(8), "BatchNorm"),
        (lambda: nn.Bilinear(2, 2, 2), "Bilinear"),
        (lambda: nn.Sequential(nn.ReLU(), Counts()), "more than compute"),
        (lambda: _with(Gate(), lambda m: m.register_forward_hook(doubles)), "hook"),
        (lambda: _with(Gate(), lambda m: m.conv.register_forward_pre_hook(lambda module, args: None)), "hook"),
        (lambda: _with(Gate(), lambda m: setattr(m, "forward", lambda x: x)), "overridden"),
    ],
    ids=["counts", "norm", "unknown", "inside", "hooked", "hooked inside", "its own forward"],
)
def test_what_is_not_known_to_compute_alone_says_why(build, reason):
    with pytest.raises(Unsupported, match=reason):
        computing(build().train())


def test_what_is_known_to_compute_alone():
    assert computing(nn.Linear(2, 2)) == ()
    assert computing(nn.BatchNorm2d(8).eval()) == ()
    assert len(computing(squeeze())) == 1
    assert len(computing(nn.Sequential(nn.ReLU(), Gate()).eval())) == 2
