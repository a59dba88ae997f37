"""Schedules that the C++ extension plays from a tape: the same bits as the schedule itself, and what no tape may hold runs as before."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from support import each_mode, ran
from taped import assert_same, drawn, in_python, row, steps
from test_family import ALL
from torch import Tensor, nn

import fusedres
from fusedres.backends import tape
from fusedres.blocks import stretch

_C = pytest.importorskip("fusedres._C")
cpp = importlib.import_module("fusedres.backends.cpp")  # the package binds the name to its backend


class Tapes:
    """What became of schedules: the numbers of those that were recorded, refused and played."""

    def __init__(self) -> None:
        self.recorded = self.refused = self.played = 0


@pytest.fixture
def tapes(monkeypatch) -> Iterator[Tapes]:
    """Counts, while every test here starts to record at a schedule's first run."""
    count, record, play = Tapes(), tape.record, tape.Tape.play

    def counted(*args):
        results, made = record(*args)
        count.recorded += made is not None
        count.refused += made is None
        return results, made

    def played(self, *args):
        found = play(self, *args)
        count.played += found is not None
        return found

    monkeypatch.setattr(tape, "record", counted)
    monkeypatch.setattr(tape.Tape, "play", played)
    monkeypatch.setattr(tape, "RUNS_BEFORE_RECORDING", 0)
    monkeypatch.setattr(stretch, "RUNS_BEFORE", 100)  # block by block
    return count


def assert_same_bits(
    block: nn.Module, shape: tuple[int, ...], training: bool, dtype: torch.dtype = torch.float32
) -> None:
    maps = [torch.randn(shape).to(dtype).to(memory_format=torch.channels_last) for _ in range(3)]
    twin = copy.deepcopy(block)
    assert_same(steps(block, maps, training), in_python(cpp.CppBackend, lambda: steps(twin, maps, training)))


@each_mode
@pytest.mark.parametrize("name", ALL)
def test_a_tape_gives_the_bits_of_its_schedule(name, training, tapes):
    build, shape = ALL[name]
    assert_same_bits(drawn(build, training), shape, training)
    assert tapes.played >= tapes.recorded > 0 and tapes.refused == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["basic", "own-class-projection", "bottleneck-grouped", "row-mixed"])
def test_tapes_of_other_dtypes(name, dtype, tapes):
    build, shape = ALL[name]
    assert_same_bits(drawn(build, True, dtype), shape, True, dtype)
    assert tapes.played > 0


@pytest.mark.parametrize("name", ["basic", "bottleneck-projection", "row-mixed"])
def test_tapes_of_recomputing_blocks(name, tapes):
    build, shape = ALL[name]
    assert_same_bits(drawn(build, True, recompute=True), shape, True)
    assert tapes.played > 0


class Stem(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )  # fmt: skip


@each_mode
@pytest.mark.parametrize(
    "build, shape",
    [
        (Stem, (2, 3, 13, 11)),
        (lambda: row(groups=8), (2, 8, 5, 7)),
        (lambda: row(groups=2), (2, 8, 5, 7)),
        (lambda: row(groups=4), (2, 8, 1, 1)),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False)), (2, 4, 3, 3)),
    ],
    ids=["stem", "depthwise", "groups", "one-pixel", "not-affine"],
)
def test_tapes_of_rows(build, shape, training, tapes):
    assert_same_bits(drawn(build, training), shape, training)
    assert tapes.played > 0 and tapes.refused == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.contiguous(),
        lambda x: x.to(torch.float64),
        lambda x: x.to("cpu", torch.float32, memory_format=torch.channels_last),
        lambda x: x.transpose(1, 3).reshape(2, -1),
        lambda x: x.reshape(2, -1),
        lambda x: x.expand_as(torch.empty(2, 3, 4, 5)),
    ],
    ids=["channels-last", "contiguous", "dtype", "format", "reshaped-copy", "reshaped-view", "expanded"],
)
def test_what_may_be_a_view_or_a_copy_is_recorded_as_what_it_is(change, mode):
    """In inference mode a recorder sees operators whole that are one or the other."""

    def schedule() -> tuple[Tensor]:
        y = change(x)
        return (torch.empty_like(y).copy_(y),)

    with mode():
        x = torch.randn(2, 3, 4, 5)
        _, made = tape.record(schedule, (x,))
        x = torch.randn(2, 3, 4, 5)
        if made is not None:
            (y,) = made.play((x,))
            assert torch.equal(y, change(x))
    assert made is not None or change(x).untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


OF_TORCH: dict[str, Callable[[Tensor], Tensor | Sequence[Tensor]]] = {
    "one": torch.sigmoid,
    "several, one of them of whole numbers": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "parts": lambda x: torch.cat([part.flip(1) for part in x.chunk(2, 1)], 1),
    "parts of two sizes": lambda x: torch.cat([*x.split([1, 3], 1)][::-1], 1),
    "unbound": lambda x: torch.stack([*x.unbind(2)][::-1]),
    "a list": lambda x: torch.cat([x, x[:, :1], torch.sigmoid(x)], 1),
    "a dtype": lambda x: x.sum((0, 2), dtype=torch.float64),
    "a number": lambda x: x * 2.5 + 1 + x / 3,
    "a bool": lambda x: x.mean((2, 3), keepdim=True),
    "a text": lambda x: F.gelu(x, approximate="tanh"),
    "numbers": lambda x: F.interpolate(x, scale_factor=1.5),
    "a convolution": lambda x: F.conv2d(x, x[:1, :, :2, :2].contiguous(), stride=2),
    "a norm": lambda x: F.batch_norm(x, x[0, :, 0, 0], x[1, :, 0, 0].sigmoid(), eps=0.1),
    "a group norm": lambda x: F.group_norm(x, 2),
    "in place": lambda x: torch.sigmoid(x).relu_().mul_(x),
    "in place, of what it was given": lambda x: x.sigmoid_().clone(),
    "a broadcast sum": lambda x: x + x.mean(1, keepdim=True),
    "itself": lambda x: F.dropout(x, 0.5, training=False).flatten(0, 0) * 2.0,
    "shuffled": lambda x: F.channel_shuffle(x, 2),
}


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OF_TORCH)
def test_operators_of_torchs_are_played(name, mode, memory_format):
    def schedule(x: Tensor) -> list[Tensor]:
        y = OF_TORCH[name](x)
        return [y] if isinstance(y, Tensor) else [*y]

    def maps() -> tuple[Tensor, Tensor]:
        x = torch.randn(2, 4, 6, 4).to(memory_format=memory_format)
        return x, x.clone()

    with mode():
        x, _ = maps()
        _, made = tape.record(lambda: schedule(x), [x])
        assert made is not None
        for _ in range(2):
            x, twin = maps()
            assert_same(made.play([x]), schedule(twin))
            assert torch.equal(x, twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_numbers_beside_maps_of_other_dtypes(dtype):
    def schedule(x: Tensor) -> list[Tensor]:
        return [(x * 1.1 + 0.3) / 7]

    x = torch.randn(2, 3, 4, 5).to(dtype)
    made = tape.record(lambda: schedule(x), [x])[1]
    assert made is not None
    assert_same(made.play([x]), schedule(x))


NOT_THE_SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "random numbers": torch.bernoulli,
    "a dropout": lambda x: F.dropout(x, 0.5),
    "a shape of values": lambda x: x[x > 0.5],
    "statistics that move": lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True),
    "a number of any type": lambda x: x.clamp(0.2, 0.6),
    "another sum": lambda x: torch.add(x, x, alpha=2),
    "a map made of nothing": lambda x: x + torch.ones(3, 1, 1),
    "a sparse one": lambda x: x.to_sparse(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NOT_THE_SAME)
def test_what_no_tape_holds(name, mode):
    with mode():
        x = torch.rand(2, 3, 4, 5)
        assert tape.record(lambda: [NOT_THE_SAME[name](x)], [x])[1] is None


@torch.no_grad()
def test_what_an_operator_makes_lies_as_it_was_recorded():
    """A library may choose otherwise, and what comes behind counts on the strides."""
    x = torch.rand(2, 3)
    made = tape.record(lambda: [torch.sigmoid(x)], [x])[1]
    assert made is not None
    code = made.code.tolist()
    assert code[-6:-1] == [2, 3, 2, 3, 1]
    y = made._replace(code=torch.tensor([*code[:-3], 1, 2, code[-1]])).play([x])[0]
    assert torch.equal(y, torch.sigmoid(x)) and y.stride() == (1, 2)
    with pytest.raises(RuntimeError, match="another shape"):
        made._replace(code=torch.tensor([*code[:-6], 3, 2, *code[-4:]])).play([x])


def test_a_size_that_came_once_is_not_recorded(tapes, monkeypatch):
    monkeypatch.setattr(tape, "RUNS_BEFORE_RECORDING", 1)
    block = drawn(row, False)
    for size, (recorded, played) in zip((5, 6, 5, 6, 5), ((0, 0), (0, 0), (1, 0), (2, 0), (2, 1)), strict=True):
        with torch.no_grad():
            block(torch.randn(2, 8, size, size).to(memory_format=torch.channels_last))
        assert (tapes.recorded, tapes.played) == (recorded, played)


def test_sizes_that_change_all_the_time_do_not_pile_up(tapes, monkeypatch):
    monkeypatch.setattr(tape, "MOST_SCHEDULES", 4)
    block = drawn(row, False)
    with torch.no_grad():
        for size in (*range(1, 12), 11):
            block(torch.randn(1, 8, size, 2).to(memory_format=torch.channels_last))
    found = block._fusedres.kind.reading(block, block._fusedres)
    (part,) = block._fusedres.kind.parts(found)
    assert len(part.describe(None)[0].memo) <= 4 and tapes.played == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block[1].eval(),
        lambda block: setattr(block[1], "momentum", 0.5),
        lambda block: setattr(block[1], "eps", 0.1),
        lambda block: setattr(block[0], "weight", nn.Parameter(block[0].weight.detach() * 2)),
        lambda block: block[0].weight.data.mul_(2),
        lambda block: block[0].weight.requires_grad_(False),
        lambda block: setattr(block[0].weight, "data", block[0].weight.data.contiguous()),
        lambda block: block.double(),
    ],
    ids=["mode", "momentum", "eps", "other-weight", "weight-in-place", "frozen", "layout", "dtype"],
)
def test_what_changes_between_steps_is_noticed(change, tapes):
    block = drawn(row, True)
    maps = [torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last) for _ in range(3)]
    twin = copy.deepcopy(block)
    steps(block, maps, True), in_python(cpp.CppBackend, lambda: steps(twin, maps, True))
    assert tapes.played == 4  # twice forward and backward
    for of in (block, twin):
        change(of)
    maps = [x.to(block[0].weight.dtype) for x in maps]
    for a, b in zip(steps(block, maps, True), in_python(cpp.CppBackend, lambda: steps(twin, maps, True)), strict=True):
        assert torch.equal(a, b)


def test_a_tape_is_not_the_schedule_of_an_observed_backend(tapes):
    block = drawn(row, False)
    x = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last)
    with torch.no_grad():
        block(x), block(x)
        with fusedres.use_backend("eager"):
            block(x)
    assert tapes.played == 1 and ran(block) == "eager"


def test_a_schedule_that_reads_a_value_has_no_tape():
    x = torch.ones(3)
    results, made = tape.record(lambda: [torch.empty(int(x.sum().item()))], [x])
    assert made is None and results[0].shape == (3,)


def test_a_schedule_that_reads_what_it_was_not_given_has_no_tape():
    x, other = torch.ones(3), torch.ones(3)
    assert tape.record(lambda: [other.view(3, 1)], [x])[1] is None
    assert tape.record(lambda: [other], [x])[1] is None


def test_one_tensor_at_two_places_has_no_tape(tapes):
    x = torch.ones(3)
    assert tape.record(lambda: [x.view(3, 1)], [x, x])[1] is None
    block = drawn(ALL["row-mixed"][0], True)
    twin = copy.deepcopy(block)
    maps = [torch.randn(2, 5, 5, 7).to(memory_format=torch.channels_last) for _ in range(3)]

    def passes(block: nn.Module) -> list[Tensor]:
        found = []
        for own, x in zip((True, False, False), maps, strict=True):
            y = block(x.clone().requires_grad_())
            y.backward(y if own else torch.ones_like(y))  # what a dense block keeps is its output
            found += [p.grad.clone() for p in block.parameters()]
        return found

    for a, b in zip(passes(block), in_python(cpp.CppBackend, lambda: passes(twin)), strict=True):
        assert torch.equal(a, b)


def test_a_tape_may_return_what_it_was_given():
    x, y = torch.ones(3), torch.zeros(3)
    results, made = tape.record(lambda: [x, None, y.view(3, 1), x], [x, None, y])
    assert made is not None and results[0] is x
    a, b = torch.rand(3), torch.rand(3)
    first, nothing, view, again = made.play([a, None, b])
    assert first is a and again is a and nothing is None and view.data_ptr() == b.data_ptr() and view.shape == (3, 1)


def test_fills_and_sums_are_played():
    def schedule(x: Tensor) -> list[Tensor]:
        made = torch.empty(2, 3)
        made[0].fill_(2.0)
        made[1].zero_()
        made[1].add_(x)
        return [made, torch.empty_like(x)]

    x = torch.rand(3)
    results, made = tape.record(lambda: schedule(x), [x])
    other = torch.rand(3)
    found = made.play([other])
    assert torch.equal(found[0], torch.stack([torch.full((3,), 2.0), other])) and found[1].shape == (3,)
    assert torch.equal(results[0][1], x)


OTHERS = {
    "dtype": lambda x: x.half(),
    "shape": lambda x: x.reshape(3, 1, 2),
    "dimensions": lambda x: x.reshape(2, 3),
    "strides": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "an expanded one": lambda x: x[:, :, :1].expand(2, 1, 3),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_tape_is_not_played_with_tensors_of_other_measures(other):
    x = torch.rand(2, 1, 3)
    made = tape.record(lambda: [x[1].clone()], [x])[1]
    assert made is not None
    assert made.play([other(torch.rand(2, 1, 3))]) is None


def test_strides_of_one_value_say_nothing():
    x = torch.rand(2, 1, 3)
    made = tape.record(lambda: [x[1].clone()], [x])[1]
    again = torch.rand(2, 1, 3).as_strided((2, 1, 3), (3, 77, 1))
    assert made is not None
    assert torch.equal(made.play([again])[0], again[1])


#: one input, float32, of one dimension of one value
ONE = (1, 6, 1, 1, 1)


@pytest.mark.parametrize(
    "code, says",
    [
        ([], "ends in the middle"),
        ([0, -1, 0, 1, *ONE], "aligned to 0 bytes"),
        ([0, -1, 1, 1, *ONE[:4]], "ends in the middle"),
        ([0, -1, 1, 2, *ONE, 1], "in the middle of a list"),
        ([0, -1, 1, 0, 0], "got 1"),
        ([0, -1, 1, 0, *ONE], "got 1"),
        ([0, -1, 1, 1, *ONE, 1, 5], "no tensor has the number 5"),
        ([0, -1, 1, 2, *ONE, 1, 1], "has not made"),
        ([0, -1, 1, 1, *ONE, 0, 99], "is none"),
        ([0, -1, 1, 1, *ONE, 0, 8, 10**6], "no operator has the number"),
        ([0, -1, 1, 2, *ONE, 0, 3, 1, 0], "tensor 1 is not there"),
        ([0, -1, 1, 1, *ONE, 0, 3, 0, 4], "there is no number 4"),
        ([0, -1, 1, 1, *ONE, 0, 6, 1, 97, 0, 1, 40], "an argument of a recorded operator that is none"),
        ([0, -1, 1, 1, *ONE, 0, 6, 1, 97, 0, 1, 2, 7], "there is no number 7"),
        ([0, -1, 1, 2, *ONE, 0, 7, 0, 2, 9], "there is no number 9"),
        ([0, -1, 1, 1, *ONE, 0, 9, 1, 1, 1, 1, 32, 0, 0, 0], "has no driver"),
        ([0, -1, 1, 1, *ONE, 0, 9, 1, 1, 1, 1, 32, 0, 1, 0], "has no driver"),
    ],
)
def test_a_broken_tape_is_an_error(code, says):
    numbers = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=says):
        torch.ops.fusedres_cpp.play([torch.ones(1)], torch.tensor(code, dtype=torch.int64), numbers)


def test_every_operator_that_writes_into_its_arguments_is_on_tapes():
    names = {name for name in dir(torch.ops.fusedres_cpp) if not name.startswith("_")} - {"name", "play", "fresh"}
    assert set(_C.tape_operators()) >= {"conv_forward", "bn_coefficients", "add_act_forward"}
    assert names <= set(_C.tape_operators())


def test_memory_is_freed_where_the_schedule_frees_it():
    x = torch.randn(1, 64, 64, 64).to(memory_format=torch.channels_last)

    def schedule(x: Tensor) -> list[Tensor]:
        for _ in range(20):
            made = torch.empty_like(x, memory_format=torch.channels_last)
            torch.ops.fusedres_cpp.add_act_forward(x, None, None, None, 0, 0.0, made, None)
            x = made
        return [x]

    with torch.no_grad():
        made = tape.record(lambda: schedule(x), [x])[1]
    assert made is not None
    _, _, alignment, size, inputs, dtype, dims, *rest = made.code.tolist()
    assert (alignment, size, inputs, dtype, dims) == (1, 21, 1, 6, 4)
    form, (outputs, last), code = rest[:8], rest[8:10], rest[10:]
    assert [*zip(form[::2], form[1::2], strict=True)] == [*zip(x.shape, x.stride(), strict=True)]
    assert (outputs, last) == (1, 20)
    freed = []
    while code:  # a map is allocated, then written
        (fresh, _, _, dims), code = code[:4], code[4:]
        assert fresh == tape._EMPTY and dims == 4
        code = code[2 * dims + 1 :]
        assert code[0] == 0, "a fresh map was freed"
        call, code = code[1:11], code[11:]
        assert call[0] == tape._CALL
        freed += code[1 : 1 + code[0]]
        code = code[1 + code[0] :]
    assert freed == [*range(1, 20)]
