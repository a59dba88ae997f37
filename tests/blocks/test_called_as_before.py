"""A converted module is called, sliced, wrapped, registered and given other parameters as the module it was: the right value is that of an
unconverted copy, in eager."""

from __future__ import annotations

import abc
import copy
import inspect
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from converted import (
    DTYPE,
    FUSED,
    KINDS,
    NETWORKS,
    Block,
    Layer,
    RowWithSum,
    assert_nothing_fused,
    assert_same_step,
    conv_row,
    draw,
    each_kind,
    each_network,
    images,
    one_fused_backend,
    pair,
    small_densenet,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import densenet

import fusedres
from fusedres.blocks import kind_key
from fusedres.swap import FusedBlock, is_converted, state_of
from fusedres.testing import assert_fused, assert_parity

pytestmark = pytest.mark.usefixtures("proven_once")


@pytest.fixture(autouse=True)
def fused_backend() -> Iterator[None]:
    with one_fused_backend():
        yield


# ---- calls -----------------------------------------------------------------------------------------------------------

KEYWORDS = {
    "residual": "inputs",
    "pre-activation": "x",
    "row": "input",
    "dense": "init_features",
    "transition": "input",
}


@pytest.mark.parametrize("kind", KEYWORDS)
def test_a_call_by_keyword_is_fused(kind):
    plain, model = pair(KINDS[kind])
    assert_same_step(model, plain, draw(), lambda m, x: m(**{KEYWORDS[kind]: x}))
    assert_fused(model, FUSED)


@each_kind
@pytest.mark.parametrize("arguments", [{}, {"nonsense": 1}], ids=["none", "unknown"])
def test_a_wrong_call_raises_what_the_original_raises(kind, arguments):
    for module in pair(KINDS[kind]):
        with pytest.raises(TypeError, match="forward"):
            module(**arguments)
    with pytest.raises(TypeError):
        pair(KINDS[kind])[1](draw(), draw())


class Crowded(nn.Module):
    """A block whose children have the names of everything that a converted module might be asked for."""

    NAMES = (
        "kind",
        "label",
        "parts",
        "reading",
        "steps",
        "stem",
        "layers",
        "plan",
        "inside",
        "outcome",
        "records",
        "structure",
    )

    def __init__(self) -> None:
        super().__init__()
        for i, name in enumerate(self.NAMES):
            self.add_module(name, nn.Conv2d(4, 4, 1, bias=False) if i % 2 == 0 else nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.label(self.kind(x)))
        h = torch.relu(self.reading(self.parts(h)))
        h = torch.relu(self.stem(self.steps(h)))
        h = torch.relu(self.plan(self.layers(h)))
        h = torch.relu(self.outcome(self.inside(h)))
        return x + self.structure(self.records(h))


def test_no_name_of_a_child_is_hidden():
    plain, model = pair(Crowded)
    assert all(getattr(model, name) is model._modules[name] for name in Crowded.NAMES)
    assert_same_step(model, plain, draw((3, 4, 5, 5)))
    assert_fused(model, FUSED)
    public = {name for name in vars(FusedBlock) if not name.startswith("_")}
    assert public == set()


@each_kind
def test_the_forward_has_the_signature_of_the_original(kind):
    plain, model = pair(KINDS[kind])
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    graph, wanted = (torch.fx.symbolic_trace(m).graph for m in (model, plain))
    assert [n.target for n in graph.find_nodes(op="placeholder")] == [
        n.target for n in wanted.find_nodes(op="placeholder")
    ]


def test_the_signature_is_that_of_the_present_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Block):
        pass

    def patched(self: Block, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x))) * scale

    with monkeypatch.context() as patch:
        patch.setattr(Own, "forward", patched)
        first = fusedres.convert(Own())
        assert inspect.signature(first.forward) == inspect.signature(Own().forward)
        assert "scale" in inspect.signature(first.forward).parameters
    second = fusedres.convert(Own())
    assert type(second) is type(first)
    assert inspect.signature(second.forward) == inspect.signature(Own().forward)
    assert second.forward.__name__ == "forward"


# ---- slices and new instances ----------------------------------------------------------------------------------------

ROWS = {
    "row-with-sum": lambda: RowWithSum(*conv_row(), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
    "row": lambda: nn.Sequential(*conv_row(), *conv_row()),
    "dense-row": lambda: nn.Sequential(Layer(8), Layer(12), Layer(16)),
    "transition": lambda: nn.Sequential(*densenet._Transition(8, 4)),
    "blocks": lambda: nn.Sequential(Block(), Block(), Block()),
}


@pytest.mark.parametrize("cut", [slice(0, 2), slice(0, 3), slice(0, 1)], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_a_slice_computes_as_a_slice_of_the_original(name, cut):
    plain, model = pair(ROWS[name])
    x = draw()
    plain(x), model(x)
    assert_fused(model, FUSED)
    part = model[cut]
    assert state_of(part) is None
    assert repr(part).splitlines()[0] == repr(plain[cut]).splitlines()[0]
    assert_same_step(part, plain[cut], draw())
    assert_same_step(fusedres.convert(part), plain[cut], draw())
    assert_same_step(model, plain, draw())


def test_a_class_whose_source_cannot_be_read_is_left_alone():
    names = {"nn": nn, "torch": torch, "Block": Block}
    body = "def forward(self, x):\n  return x + self.bn1(self.conv1(x))"
    exec(body, names)
    plain, model = pair(lambda: type("Unread", (Block,), {"forward": names["forward"]})())
    assert_same_step(model, plain, draw())
    assert kind_key(model) is None
    assert "cannot be read" in str(fusedres.report(model))


def test_a_new_instance_of_the_class_of_a_block_is_an_original():
    plain, model = pair(Block)
    made = type(model)(8).to(DTYPE)
    made.load_state_dict(plain.state_dict())
    assert_same_step(made, plain, draw())
    assert_nothing_fused(made)
    again = fusedres.convert(pickle.loads(pickle.dumps(made)))
    again(draw())
    assert_fused(again, FUSED)


@each_kind
def test_a_forward_that_somebody_kept_is_the_original_after_a_revert(kind):
    plain, model = pair(KINDS[kind])
    kept = model.forward
    model.forward = lambda *args, **kwargs: kept(*args, **kwargs) * 2
    plain_forward = plain.forward
    plain.forward = lambda *args, **kwargs: plain_forward(*args, **kwargs) * 2
    assert_same_step(model, plain, draw())
    fusedres.revert(model)
    assert not is_converted(model)
    assert_same_step(model, plain, draw())


def test_features_wrapped_in_another_module_compute_the_same():
    plain, model = pair(small_densenet)
    for m in (plain, model):
        m.features = nn.DataParallel(m.features)
    assert_same_step(model, plain, images())
    assert state_of(model.features.module).outcome.backend == FUSED
    assert not state_of(model).outcome.fused


# ---- compilers and registries ----------------------------------------------------------------------------------------


@each_network
def test_scripting_gives_the_same_program_and_leaves_the_model_fused(name):
    plain, model = (m.eval() for m in pair(NETWORKS[name]))
    x = images()
    fused = {path for path, m in model.named_modules() if isinstance(m, FusedBlock)}
    wanted = plain(x)
    try:
        torch.jit.script(plain)
    except Exception as reason:  # an original that cannot be scripted either
        pytest.skip(f"the original cannot be scripted: {type(reason).__name__}")
    assert_parity(torch.jit.script(model)(x), wanted, wanted)
    assert_parity(model(x), wanted, wanted)
    assert {path for path, m in model.named_modules() if isinstance(m, FusedBlock)} == fused
    assert_fused(model, FUSED)


def test_scripting_a_part_of_a_plain_module_leaves_it_fused():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.block(x)

    plain, model = (m.eval() for m in pair(Around))
    block, x = model.block, draw()
    wanted = plain(x)
    assert_parity(torch.jit.script(model)(x), wanted, wanted)
    twin = copy.deepcopy(model)
    for m in (model, twin):
        assert_parity(m(x), wanted, wanted)
        assert_fused(m, FUSED)
    assert model.block is block
    torch.jit.script(model)
    assert str(fusedres.report(model)).endswith("1 of 1 blocks fused")
    torch.jit.script(model)
    fusedres.revert(model)
    assert type(model.block) is Block and "_fusedres" not in model.block.__dict__


class Registering(nn.Module):
    """Registers its subclasses, which are called by their names."""

    known: dict[str, type] = {}

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        if cls.__name__ in Registering.known:
            raise KeyError(f"{cls.__name__} is registered already")
        Registering.known[cls.__name__] = cls


class RegisteringMeta(type):
    known: dict[str, type] = {}

    def __new__(cls, name, bases, names):
        if name in RegisteringMeta.known:
            raise KeyError(f"{name} is registered already")
        made = super().__new__(cls, name, bases, names)
        RegisteringMeta.known[name] = made
        return made


class Registered(Block, Registering):
    pass


class MetaRegistered(Block, metaclass=RegisteringMeta):
    pass


class Abstract(Block, abc.ABC):
    pass


@pytest.mark.parametrize("cls", [Registered, MetaRegistered, Abstract])
def test_classes_that_register_their_subclasses_do_not_see_ours(cls):
    before = dict(Registering.known), dict(RegisteringMeta.known)
    plain, model = pair(cls)
    assert_same_step(model, plain, draw())
    assert_fused(model, FUSED)
    assert (Registering.known, RegisteringMeta.known) == before
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__
    assert not isinstance(plain, type(model)) and isinstance(model, type(model))


# ---- other parameters ------------------------------------------------------------------------------------------------


class OfComputedParameters(nn.Module):
    """``inner``, checkpointed, by parameters that are computed at every call: a checkpoint computes again in backward, where the
    parameters are the module's own once more, and these are what eager's backward reads."""

    def __init__(self, inner: nn.Module, checkpointed: bool) -> None:
        super().__init__()
        self.inner, self.checkpointed = inner, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)

        holder = Holder(self.inner, run)
        parameters = {f"inner.{name}": 0.75 * p for name, p in self.inner.named_parameters()}
        return torch.func.functional_call(holder, parameters, (x,))


class Holder(nn.Module):
    def __init__(self, inner: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.run = inner, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@each_kind
def test_a_functional_call_uses_the_parameters_that_eager_uses(kind, checkpointed):
    plain, model = (OfComputedParameters(m, checkpointed) for m in pair(KINDS[kind]))
    assert_same_step(model, plain, draw())
    assert_fused(model, FUSED)
