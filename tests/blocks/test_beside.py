"""A block that does more than compute runs fused in pieces, and what it does beside happens in its place, as in eager."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from beside import (
    BESIDE,
    AppendsMaps,
    AsksForGradients,
    AsksInside,
    Counts,
    CountsOnATensor,
    Decorated,
    InOrder,
    KeepsInADict,
    ReadsADict,
    ReadsTheLastCall,
    ReplacesABuffer,
    StoresAMap,
    StoresItsOutput,
    StoresWhatIsOverwritten,
    UpdatesABuffer,
    UpdatesABufferOutside,
    WithoutGradient,
    WithoutGradientInside,
    assert_same,
    kept,
)
from followed import Block, C, assert_equal, draw, step, twins
from torch import Tensor, nn

import fusedres
from fusedres.blocks import kind_key
from fusedres.recognition.actions import Setter
from fusedres.swap import FusedBlock, state_of
from fusedres.testing import assert_fused, compare, first_difference


@pytest.fixture(autouse=True)
def plain_primitives() -> Iterator[None]:
    torch.manual_seed(0)
    with fusedres.use_backend("eager"):
        yield


each_kind = pytest.mark.parametrize("kind", BESIDE, ids=lambda kind: kind.__name__)
each_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


def outcome(model: nn.Module) -> str:
    state = state_of(model)
    assert state is not None
    return str(state.outcome)


# ---- values, gradients, and what is kept ---------------------------------------------------------------------------------


@each_layout
@each_kind
def test_everything_is_as_in_eager_and_fused(kind: type[Block], layout: torch.memory_format) -> None:
    model, twin = twins(kind)
    assert kind_key(twin) == "general"
    for training, grad in ((True, True), (True, True), (False, True), (False, False), (True, False)):
        model.train(training), twin.train(training)
        found = []
        for block in (model, twin):
            x = draw().contiguous(memory_format=layout).requires_grad_()
            block.zero_grad()
            with torch.set_grad_enabled(grad):
                y = block(x)
            if y.requires_grad:
                y.square().sum().backward()
            gradients = {name: p.grad for name, p in block.named_parameters()}
            buffers = {name: b.clone() for name, b in block.named_buffers()}
            found.append({"output": y, "input": x.grad, **gradients, **buffers, **kept(block)})
        assert found[0].keys() == found[1].keys()
        for name, value in found[0].items():
            assert_same(found[1][name], value, name)
        assert_fused(twin, "eager")


@pytest.mark.parametrize("backend", ["cpp", "eager"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [StoresAMap, UpdatesABuffer, WithoutGradientInside], ids=lambda kind: kind.__name__)
def test_parity_in_float32(kind: type[Block], training: bool, backend: str) -> None:
    with fusedres.use_backend(None):
        compare(kind, (2, C, 9, 7), torch.float32, backend, training)


def test_what_is_stored_is_the_very_tensor_that_eager_stores() -> None:
    _, twin = twins(StoresItsOutput)
    x = draw()
    y = twin(x)
    assert twin.features is y and twin.given is x and outcome(twin) == "eager"


@each_layout
def test_what_is_stored_is_nobody_elses(layout: torch.memory_format) -> None:
    _, twin = twins(StoresAMap)
    y = twin(draw().contiguous(memory_format=layout).requires_grad_())
    before, gradient = twin.features.detach().clone(), torch.ones_like(y)
    stored = twin.features
    y.backward(gradient)
    twin(2 * draw())
    assert torch.equal(stored, before) and twin.features is not stored


def test_what_is_stored_may_be_overwritten_as_in_eager() -> None:
    for kind in (StoresAMap, StoresItsOutput):
        model, twin = twins(kind)
        found = []
        for block in (model, twin):
            y = block(draw())
            block.features.data.mul_(3)
            found.append((y.detach().clone(), block.features.detach().clone()))
        assert_same(found[1], found[0], kind.__name__)


def test_what_is_stored_sees_what_overwrites_it_later() -> None:
    model, twin = twins(StoresWhatIsOverwritten)
    assert_equal(model, twin)
    assert bool((twin.features >= 0).all()) and torch.equal(twin.seen, twin.features)
    assert bool((twin.sum >= 0).all()) and outcome(twin) == "eager"


def test_what_is_stored_gives_gradients() -> None:
    model, twin = twins(StoresAMap)
    for block in (model, twin):
        block(draw())
        block.features.square().sum().backward()
    assert_same(twin.conv1.weight.grad, model.conv1.weight.grad, "gradient")
    assert twin.conv1.weight.grad.abs().sum() > 0 and outcome(twin) == "eager"


def test_effects_happen_in_their_order() -> None:
    model, twin = twins(InOrder)
    for block in (model, twin):
        for _ in range(3):
            block(draw())
    assert_same(twin.kept, model.kept, "kept")
    assert len(twin.kept) == 6 and not torch.equal(twin.kept[0], twin.kept[1]) and outcome(twin) == "eager"


def test_a_list_that_the_user_replaces_is_the_one_that_grows() -> None:
    _, twin = twins(AppendsMaps)
    twin(draw())
    first, twin.kept = twin.kept, []
    twin(draw())
    assert len(first) == len(twin.kept) == 3 and outcome(twin) == "eager"


def test_a_dict_is_read_at_every_call() -> None:
    model, twin = twins(ReadsADict)
    for scale in (1.0, 3.0):
        model.table["scale"] = twin.table["scale"] = scale
        assert_equal(model, twin)
        assert outcome(twin) == "eager"


def test_a_key_that_is_missing_raises_as_in_eager() -> None:
    _, twin = twins(ReadsADict)
    twin.table.clear()
    with pytest.raises(KeyError, match="scale"):
        twin(draw())


def test_numbers_that_the_user_sets_count_from_there() -> None:
    _, twin = twins(Counts)
    twin(draw())
    twin.calls = 10
    twin(draw())
    assert twin.calls == 11 and outcome(twin) == "eager"


def test_what_becomes_something_else_is_left_to_the_forward() -> None:
    model, twin = twins(ReadsTheLastCall)
    for block in (model, twin):
        block.last = 0.5
    assert_equal(model, twin)
    for block in (model, twin):
        block.last = 0.5
    assert_same(twin(draw()), model(draw()), "output")
    assert "its last is a float, and was a Tensor" in outcome(twin)
    assert_same(twin(draw()), model(draw()), "output")
    assert outcome(twin) == "eager"


# ---- gradients recorded or not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WithoutGradient, Decorated], ids=lambda kind: kind.__name__)
def test_nothing_is_recorded_where_gradients_are_off(kind: type[Block]) -> None:
    _, twin = twins(kind)
    twin(draw().requires_grad_()).sum().backward()
    assert twin.conv1.weight.grad is None and twin.bn1.weight.grad is None
    assert twin.conv2.weight.grad is not None and outcome(twin) == "eager"
    recorded = [record.recorded for record in state_of(twin).records if record is not None]
    assert recorded[0] is False and all(recorded[1:])


def test_a_copy_made_without_gradients_cuts_none_off() -> None:
    model, twin = twins(WithoutGradientInside)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = [step(block, draw().contiguous(memory_format=layout)) for block in (model, twin)]
        assert_same(found[1], found[0], "step")
        assert twin.features.requires_grad and not twin.inside.requires_grad


def test_gradients_recorded_inside_go_on_outside_of_a_row() -> None:
    class Thawed(Block):
        @torch.enable_grad()
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.body(x) + x)

    model, twin = twins(lambda: nn.Sequential(Thawed()))
    with torch.no_grad():
        found = [block(draw()) for block in (model, twin)]
    assert_same(found[1], found[0], "output")
    assert found[1].requires_grad and outcome(twin[0]) == "eager"


def test_each_answer_has_a_flow_of_its_own_where_it_is_asked_for() -> None:
    for kind, asks in ((AsksForGradients, True), (AsksInside, False), (StoresAMap, False)):
        _, twin = twins(kind)
        state = state_of(twin)
        twin(draw())
        with torch.no_grad():
            twin(draw())
        assert len(state.flows[True]) == 1 + asks and outcome(twin) == "eager"


def test_inference_mode_runs_the_forward_where_gradients_are_switched() -> None:
    model, twin = twins(Decorated)
    with torch.inference_mode():
        assert_same(twin(draw()), model(draw()), "output")
    assert "inference mode" in outcome(twin)


# ---- as any other block ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Counts, StoresAMap, CountsOnATensor, UpdatesABuffer], ids=lambda kind: kind.__name__)
def test_a_block_is_not_read_anew_for_what_it_sets_itself(kind: type[Block]) -> None:
    _, twin = twins(kind)
    twin(draw())
    reading = state_of(twin).reading
    for _ in range(3):
        twin(draw())
    assert reading is not None and state_of(twin).reading is reading


def test_a_buffer_that_is_replaced_by_the_user_is_the_one_that_counts() -> None:
    model, twin = twins(ReplacesABuffer)
    assert_equal(model, twin)
    for block in (model, twin):
        block.average = torch.ones(C, dtype=torch.float64)
    assert_equal(model, twin)
    assert outcome(twin) == "eager"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [Counts, UpdatesABuffer, AsksForGradients, Decorated], ids=lambda kind: kind.__name__)
def test_copies_change_their_own(kind: type[Block], again: Callable[[nn.Module], nn.Module]) -> None:
    model, twin = twins(kind)
    assert_equal(model, twin)
    copied = again(twin)
    assert isinstance(copied, FusedBlock)
    before = {name: b.clone() for name, b in twin.named_buffers()}, twin.calls
    assert_equal(model, copied)
    assert outcome(copied) == "eager"
    assert_same(({name: b.clone() for name, b in twin.named_buffers()}, twin.calls), before, "the first one")


def test_a_replica_keeps_what_it_sets() -> None:
    _, twin = twins(StoresAMap)
    replica = twin._replicate_for_data_parallel()
    replica._modules = twin._modules
    replica._parameters, replica._buffers = twin._parameters, twin._buffers
    replica(draw())
    assert "features" in replica.__dict__ and "features" not in twin.__dict__ and outcome(replica) == "eager"


def test_reverting_gives_the_forward_back() -> None:
    model, twin = twins(UpdatesABuffer)
    twin(draw()), model(draw())
    assert type(fusedres.revert(twin)) is UpdatesABuffer
    assert_equal(model, twin)


def test_hooks_fire_and_see_what_has_happened_before_them() -> None:
    seen: list[list[int]] = [[], []]
    model, twin = twins(Counts)
    for counted, block in zip(seen, (model, twin), strict=True):
        block.register_forward_hook(lambda block, *_, to=counted: to.append(block.calls))
        block.conv2.register_forward_hook(lambda *_, block=block, to=counted: to.append(block.calls))
    assert_equal(model, twin)
    assert seen[0] == seen[1] and len(seen[0]) == 6


@pytest.mark.parametrize("kind", [StoresAMap, Counts, UpdatesABuffer, Decorated, AsksForGradients])
def test_under_a_compiler_it_is_as_in_eager(kind: type[Block]) -> None:
    model, twin = twins(kind)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="eager")
    for training, grad in ((True, True), (False, True), (False, False)):
        model.train(training), twin.train(training)
        with torch.set_grad_enabled(grad):
            assert_same(compiled(draw()).detach(), model(draw()).detach(), "output")
    assert twin.calls == model.calls and kept(model).keys() <= kept(twin).keys()
    for (name, found), wanted in zip(twin.named_buffers(), model.buffers(), strict=True):
        assert_same(found, wanted, name)


def test_what_is_asked_of_a_model_is_answered() -> None:
    _, twin = twins(KeepsInADict)
    x = draw()
    assert fusedres.verify(twin, x).holds
    assert first_difference(twin, x) is None
    twin(x)
    assert fusedres.verify(twin, x).holds
    text = str(fusedres.report(twin))
    assert "general block" in text and "unfused: setitem, sum" in text and "1 of 1 blocks fused" in text


def test_the_proof_sees_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setter, "__call__", lambda self, value: setattr(self.module, self.name, 2 * value))
    for kind, what in ((StoresAMap, "the attribute features differs"), (ReplacesABuffer, "the buffer average differs")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            block = fusedres.convert(kind())
        assert type(block) is kind and what in str(caught[0].message)


def test_the_proof_sees_both_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedres.recognition import flow

    taken = flow.follow
    monkeypatch.setattr(flow, "follow", lambda block, form, *rest: taken(block, form._replace(grad=True), *rest))
    with pytest.warns(RuntimeWarning, match="without gradients"):
        assert type(fusedres.convert(AsksForGradients())) is AsksForGradients


def test_a_block_that_a_call_has_left_maps_in_is_proven_and_converted() -> None:
    block = StoresAMap()
    block(draw(torch.float32))
    fusedres.convert(block)
    assert kind_key(block) == "general" and block.features.grad_fn is not None


def test_converting_again_after_calls_changes_nothing_of_what_is_kept() -> None:
    _, twin = twins(StoresAMap)
    twin(draw())
    stored = twin.features
    fusedres.convert(twin)
    assert twin.features is stored and kind_key(twin) == "general"


# ---- memory that is somebody else's ------------------------------------------------------------------------------------------


def test_a_kept_tensor_that_is_given_as_the_input_is_overwritten_as_in_eager() -> None:
    class Overwrites(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("memory", draw())

        def forward(self, x: Tensor) -> Tensor:
            out = F.relu(self.bn1(self.conv1(x)))
            self.memory.mul_(0.5)
            return self.bn2(self.conv2(out)) + x

    model, twin = twins(Overwrites)
    for given in (lambda block: block.memory, lambda block: block.memory.view(-1).view(block.memory.shape)):
        with torch.no_grad():
            assert_same(twin(given(twin)), model(given(model)), "output")
        assert "overwrites memory, which it is given" in outcome(twin)
    with torch.no_grad():
        assert_same(twin(draw()), model(draw()), "output")
    assert outcome(twin) == "eager"


class ReadsRunningMean(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        self.mean = self.bn1.running_mean.clone()
        return F.relu(self.bn2(self.conv2(F.relu(out))) + x)


class GivesRunningMean(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        shifted = x + torch.sub(x, self.bn1.running_mean[:, None, None])
        return F.relu(self.bn2(self.conv2(F.relu(out))) + shifted)


class ClipsAWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        with torch.no_grad():
            self.conv1.weight.clamp_(-0.1, 0.1)
        return F.relu(self.bn2(self.conv2(F.relu(out))) + x)


@pytest.mark.parametrize("kind", [ReadsRunningMean, GivesRunningMean, ClipsAWeight], ids=lambda kind: kind.__name__)
def test_what_pieces_move_or_read_is_not_touched_beside_them(kind: type[Block]) -> None:
    model, twin = twins(kind)
    assert kind_key(twin) is None
    with torch.no_grad():
        for _ in range(2):
            assert_same(twin(draw()), model(draw()), "output")


def test_a_buffer_that_no_piece_has_may_be_overwritten_between_them() -> None:
    model, twin = twins(UpdatesABufferOutside)
    assert_equal(model, twin)
    assert_same(twin.average, torch.full((C,), 3.0, dtype=torch.float64), "average")
    assert outcome(twin) == "eager"
