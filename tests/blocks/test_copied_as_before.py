"""Copies and pickles of a converted module, and what may be done with its outputs: the right value is that of an unconverted copy."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from converted import (
    DTYPE,
    FUSED,
    KINDS,
    NETWORKS,
    Block,
    Copies,
    Layer,
    PreAct,
    Sum,
    assert_same_step,
    dense_block,
    draw,
    each_network,
    images,
    one_fused_backend,
    pair,
    small_densenet,
)
from torch import Tensor, nn
from torchvision.models import densenet

import fusedres
from fusedres.backends import select
from fusedres.backends.contract import Wrapped
from fusedres.blocks import kind_key
from fusedres.swap import FusedBlock, is_converted, original_class, state_of
from fusedres.testing import assert_fused

pytestmark = pytest.mark.usefixtures("proven_once")


@pytest.fixture(autouse=True)
def fused_backend() -> Iterator[None]:
    with one_fused_backend():
        yield


# ---- copies and pickles ----------------------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module) -> nn.Module:
    """Through ``torch.load(weights_only=True)`` with nothing allowed but the original classes and what torch's own modules need."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    allowed = {original_class(m) if is_converted(m) else type(m) for m in model.modules()}
    with torch.serialization.safe_globals([*allowed, set]):
        return torch.load(file, weights_only=True)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle-0": lambda m: pickle.loads(pickle.dumps(m, 0)),
    "weights-only": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("build", [*KINDS.values(), *NETWORKS.values()], ids=[*KINDS, *NETWORKS])
def test_a_copy_computes_the_same_and_remembers_nothing(build, how):
    plain, model = pair(build)
    fusedres.convert(model, recompute=True)
    x = draw() if len(list(model.modules())) < 30 else images()
    model(x)
    twin = COPIES[how](model)
    assert type(twin) is type(model) and kind_key(twin) == kind_key(model)
    for m in twin.modules():
        if isinstance(m, FusedBlock) and (how != "copy" or m is twin):
            state = state_of(m)
            assert state.reading is None and state.outcome is None and state.records == ()
    if how == "copy":
        plain = copy.copy(plain)
    else:
        plain(x)
    assert state_of(twin) is not state_of(model)
    assert state_of(twin).recompute
    if how != "copy":
        assert_same_step(twin, plain, x)
        assert_fused(twin, FUSED)
        assert {n for n, m in twin.named_modules() if is_converted(m)} == {
            n for n, m in model.named_modules() if is_converted(m)
        }


def test_weights_alone_are_loaded_where_the_original_class_is_not_allowed():
    file = io.BytesIO()
    torch.save(fusedres.convert(Block()), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Block"):
        torch.load(file, weights_only=True)


def test_replicas_of_data_parallel_read_themselves():
    _, model = pair(Block)
    model(draw())
    replica = model._replicate_for_data_parallel()
    assert state_of(replica) is not state_of(model) and state_of(replica).reading is None
    assert kind_key(replica) == "residual"


# ---- what is done with outputs ---------------------------------------------------------------------------------------


class Behind(nn.Module):
    """``block`` with something done to its output."""

    def __init__(self, block: nn.Module, change: Callable[[Tensor], Tensor], behind: nn.Module) -> None:
        super().__init__()
        self.block, self.behind = block, behind
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.change(self.block(x)))


def clamp_data(x: Tensor) -> Tensor:
    x.data.clamp_(-0.1, 0.1)
    return x


CHANGES = {"relu-in-place": lambda x: F.relu(x, inplace=True), "mul-in-place": lambda x: x.mul_(2), "data": clamp_data}
PRODUCERS = {
    "dense": (dense_block, lambda: densenet._Transition(16, 4)),
    "dense-row": (lambda: nn.Sequential(Layer(8), Layer(12)), lambda: densenet._Transition(16, 4)),
    "pre-activation": (PreAct, PreAct),
    "residual": (Sum, Block),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", PRODUCERS)
def test_an_output_may_be_changed_in_place(name, change):
    producer, consumer = PRODUCERS[name]
    plain, model = pair(lambda: Behind(producer(), CHANGES[change], consumer()))
    assert_same_step(model, plain, draw())
    assert_fused(model, FUSED)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", PRODUCERS)
def test_a_hook_may_change_an_output_in_place(name, change):
    producer, consumer = PRODUCERS[name]
    plain, model = pair(lambda: nn.Sequential(producer(), consumer()))

    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        CHANGES[change](output)

    for m in (plain, model):
        m[0].register_forward_hook(hook)
    assert_same_step(model, plain, draw())
    assert_fused(model, FUSED)


@pytest.mark.parametrize("name", ["pre-activation", "residual", "transition"])
def test_an_input_that_a_frozen_layer_has_read_may_be_overwritten_before_backward(name):
    """Eager keeps nothing of it."""
    build = {"pre-activation": PreAct, "residual": Block, "transition": lambda: densenet._Transition(8, 4)}[name]
    plain, model = pair(build)
    images, found = draw().to(memory_format=torch.channels_last), []
    for m in (plain, model):
        first = next(inner for inner in m.modules() if [*inner.parameters(recurse=False)])
        first.requires_grad_(False)
        x = images.clone()
        y = m(x)
        x.zero_()
        y.square().sum().backward()
        found.append([p.grad for p in m.parameters() if p.grad is not None])
    assert found[0] and all(torch.allclose(a, b) for a, b in zip(*found, strict=True))
    assert_fused(model, FUSED)


@pytest.mark.parametrize("place", ["features.denseblock1", "features.transition1", "features.norm5"])
def test_a_hook_inside_a_densenet_may_change_values_behind_autograd(place):
    plain, model = pair(small_densenet)

    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.data.clamp_(-0.2, 0.2)

    for m in (plain, model):
        m.get_submodule(place).register_forward_hook(hook)
    assert_same_step(model, plain, images())
    blocks = [m for m in model.features if isinstance(m, FusedBlock)]
    assert blocks and all(state_of(m).outcome.backend == FUSED for m in blocks)


def reduced_maps(model: nn.Module, x: Tensor) -> int:
    """How many maps a forward of ``model`` reduces in a pass of its own."""
    count = 0

    class Counting(Wrapped):
        def call(self, primitive: str, *args: object, **kwargs: object) -> object:
            nonlocal count
            count += primitive == "statistics"
            return super().call(primitive, *args, **kwargs)

    with select.observe(lambda backend: None if backend is None else Counting(backend)):
        model(x)
    return count


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@each_network
def test_fused_neighbours_hand_their_maps_over_without_a_copy(name, training):
    _, model = pair(NETWORKS[name])
    model.train(training).to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    with Copies() as copies, torch.set_grad_enabled(training):
        model(x)
    assert_fused(model, FUSED)
    assert copies.found == []


def test_statistics_are_handed_over_between_neighbours_and_nowhere_else():
    x = draw().to(memory_format=torch.channels_last)
    dense, transition = (fusedres.convert(m.to(DTYPE)) for m in (dense_block(), densenet._Transition(16, 4)))
    assert reduced_maps(fusedres.convert(nn.Sequential(dense, transition)), x) == 0
    assert reduced_maps(fusedres.convert(Behind(dense, lambda x: x, transition)), x) == 1
    blocks = [fusedres.convert(PreAct().to(DTYPE)) for _ in range(3)]
    assert reduced_maps(fusedres.convert(nn.Sequential(*blocks)), x) == 1  # the input of the first
