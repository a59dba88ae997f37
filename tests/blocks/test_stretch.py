"""Blocks that are one schedule in inference: the bits of the blocks one by one, as long as nothing has changed, and what is reported."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from converted import small_resnet
from stretched import CHANGES, MODELS, WARM, added_by, blocks, images, model_of, one_by_one, row
from support import Counts
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import fusedres
from fusedres.backends import select, tape
from fusedres.blocks import stretch
from fusedres.swap import state_of
from fusedres.trial import memory

pytest.importorskip("fusedres._C")


@pytest.fixture(autouse=True)
def compiled_backend() -> Iterator[None]:
    with fusedres.use_backend("cpp"), torch.no_grad():
        yield


def warm(model: nn.Module, x: Tensor) -> None:
    for _ in range(WARM):
        model(x)


#: schedules that a call plays: in front of a forward's own code and behind it there is one each
PLAYED = {"forward": 2}


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("name", MODELS)
def test_a_stretch_gives_the_bits_of_its_blocks_in_their_memory_format(name, memory_format, plays):
    model = model_of(MODELS[name])
    twin = one_by_one(model)
    for _ in range(WARM + 2):
        x = images().to(memory_format=memory_format)
        y, expected = model(x), twin(x)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
    assert added_by(lambda: model(x), plays) == PLAYED.get(name, 1)
    assert added_by(lambda: twin(x), plays) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_stretch_of_other_dtypes(dtype, plays):
    model = model_of(row, dtype)
    twin = one_by_one(model)
    for _ in range(WARM):
        x = images().to(dtype)
        assert torch.equal(model(x), twin(x))
    assert added_by(lambda: model(x), plays) == 1
    x = images().to(dtype)
    assert torch.equal(model(x), twin(x))


def test_the_report_says_of_a_stretch_what_it_says_of_its_blocks():
    model = model_of(small_resnet)
    twin, x = one_by_one(model), images()
    warm(model, x)
    model(x[:1])  # whose records are others
    model(x), twin(x)
    ours, theirs = ((state_of(m) for m in net.modules()) for net in (model, twin))
    for mine, its in zip(ours, theirs, strict=True):
        if mine is None or its is None:
            assert mine is its
            continue
        assert mine.outcome == its.outcome and len(mine.records) == len(its.records)
        for a, b in zip(mine.records, its.records, strict=True):
            assert a is not None and b is not None and a._replace(identities=()) == b._replace(identities=())
    assert str(fusedres.report(model)) == str(fusedres.report(twin))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change, plays):
    model = model_of(small_resnet)
    x = images()
    warm(model, x)
    before = model(x)
    plain = fusedres.revert(copy.deepcopy(model))
    torch.manual_seed(1)
    change(model)
    torch.manual_seed(1)
    if change is not CHANGES["reverted"]:
        change(plain)
        # far above the roundings that the assertion below allows
        assert not torch.allclose(before, copy.deepcopy(plain)(x), rtol=1e-3, atol=1e-3), (
            "a change that changes nothing"
        )
    for _ in range(WARM + 1):
        # eager's convolutions add up in another order; what a missed change makes is ten times as large, as was just asserted
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_weight_of_another_dtype_raises_as_without(plays):
    model = model_of(small_resnet)
    x = images()
    warm(model, x)
    weight = model.layer1[0].conv1.weight
    weight.data = weight.double()
    with pytest.raises(RuntimeError):
        model(x)


def test_a_call_of_a_class_that_was_replaced_is_called(plays, monkeypatch):
    model, seen = model_of(small_resnet), []
    x = images()
    warm(model, x)
    cls, call = type(model.layer1[0]), nn.Module.__call__
    monkeypatch.setattr(cls, "__call__", lambda self, *args: (seen.append(self), call(self, *args))[1], raising=False)
    y = model(x)
    assert seen and torch.equal(y, one_by_one(model)(x))


def test_a_global_hook_sees_every_module():
    model, seen = model_of(small_resnet), []
    x = images()
    warm(model, x)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(None)):
        model(x)
    assert len(seen) > 10


def test_autocast_and_observers_see_blocks_one_by_one(plays):
    model = model_of(small_resnet)
    twin, x = one_by_one(model), images()
    warm(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), twin(x))
    parts: list[object] = []

    def wrap(backend):
        parts.append(backend)
        return backend

    with select.observe(wrap):
        model(x)
    assert len(parts) > 3
    assert added_by(lambda: model(x), plays) == 1


def test_another_backend_runs_the_blocks_itself(plays):
    model = model_of(small_resnet)
    x = images()
    warm(model, x)
    with fusedres.use_backend("eager"):
        assert added_by(lambda: model(x), plays) == 0
        assert state_of(model).outcome.backend == "eager"
    model(x)
    assert state_of(model).outcome.backend == "cpp"


def test_inference_mode_gives_inference_tensors(plays):
    model = model_of(small_resnet)
    twin, x = one_by_one(model), images()
    with torch.inference_mode():
        warm(model, x)
        assert added_by(lambda: model(x), plays) == 1 and model(x).is_inference()
        for _ in range(2):
            x = images()
            assert torch.equal(model(x), twin(x))
    assert added_by(lambda: model(x), plays) == 1 and not model(x).is_inference()


def test_what_is_in_the_way_ends_a_stretch_and_rows_behind_it_have_their_own(plays):
    model = model_of(lambda: row(Counts(), *blocks(), nn.Sequential(*blocks())))
    twin, x = one_by_one(model), images()
    for _ in range(WARM + 1):
        assert torch.equal(model(x), twin(x))
    assert model[5].calls == twin[5].calls == WARM + 1
    # up to what counts, two blocks alone, the row inside
    assert added_by(lambda: model(x), plays) == 1 + 2 + 1


def test_alone_a_block_has_no_stretch(plays):
    model = model_of(lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)))
    x = images()
    warm(model, x)
    state = state_of(model)
    assert state.stretches[0]._known is None and state.stretches[0]._failures == 1
    assert added_by(lambda: model(x), plays) == 1  # as a block


def test_where_nothing_is_recorded_it_is_given_up(plays):
    model, x = model_of(row), images()
    with fusedres.use_backend("eager"):
        for _ in range(stretch.RUNS_BEFORE + stretch.RUNS_IN_VAIN + 1):
            model(x)
    state = state_of(model)
    assert state.stretches[0]._known is None and state.stretches[0]._failures == 1


def test_sizes_that_change_all_the_time_are_given_up_and_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(tape, "MOST_SCHEDULES", 4)
    model = model_of(row)
    for size in range(8, 40):
        model(images(1, 3, size, 8))
        known = state_of(model).stretches[0]._known
        assert known is None or len(known.left) <= 5
    assert state_of(model).stretches[0]._failures > 0


def test_what_changes_at_every_call_is_looked_at_more_and_more_rarely(monkeypatch):
    monkeypatch.setattr(stretch, "RUNS_AFTER_FAILURE", 2)
    looked, look_at = [], stretch._look_at
    monkeypatch.setattr(stretch, "_look_at", lambda *args: (looked.append(None), look_at(*args))[1])
    model = model_of(row)
    for i in range(60):
        model[3].bn1.calls = i
        model(images(1, 3, 8, 8))
    assert 2 <= len(looked) <= 5


def test_copies_and_pickles_have_none(tmp_path):
    model = model_of(small_resnet)
    x = images()
    warm(model, x)
    twin = copy.deepcopy(model)
    assert state_of(model).stretches is not None and state_of(twin).stretches is None
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), model(x))


def test_threads_share_a_stretch():
    model = model_of(small_resnet)
    maps = [images(1, 3, size, 24) for size in (24, 32, 24, 40)]
    twin = one_by_one(model)
    expected = [twin(x) for x in maps]
    wrong: list[int] = []

    def serve(at: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(maps[at]), expected[at]):
                    wrong.append(at)

    threads = [threading.Thread(target=serve, args=(at,)) for at in range(len(maps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert state_of(model).stretches[0]._known is not None


def test_a_stretch_holds_no_more_than_its_blocks_one_by_one():
    model = model_of(lambda: nn.Sequential(*[BasicBlock(16, 16) for _ in range(8)]))
    x = images(1, 16, 64, 64).to(memory_format=torch.channels_last)

    def peak(net: nn.Module) -> int:
        warm(net, x)
        return memory.peak_bytes(lambda: net(x), x.device)

    assert peak(model) <= peak(one_by_one(model))
