"""A converted module behaves as the module it was: how it is called, sliced, copied, scripted and registered, what may be done with its
outputs, and in which memory format they are. The right value is that of an unconverted copy, in eager."""

from __future__ import annotations

import abc
import copy
import inspect
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres.backends import select
from fusedres.backends.contract import Wrapped
from fusedres.blocks import kind_key
from fusedres.blocks.handover import suggests_channels_last
from fusedres.swap import FusedBlock, is_converted, original_class, state_of
from fusedres.testing import assert_fused, assert_parity, randomize, run_training

torchvision = pytest.importorskip("torchvision")
from torchvision.models import DenseNet, densenet, resnet  # noqa: E402

FUSED = "eager" if fusedres.backends()["cpp"] != "available" else "cpp"
DTYPE = torch.float64


@pytest.fixture(autouse=True)
def one_fused_backend():
    """The compiled backend, or eager's primitives where there is no extension: never the original modules."""
    torch.manual_seed(0)
    with fusedres.use_backend(None if FUSED == "cpp" else FUSED):
        yield


class Block(nn.Module):
    """A basic block whose input is not called x."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, inputs: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(self.bn2(self.conv2(h)) + inputs)


class Sum(Block):
    """The same without an activation behind the addition, whose output eager would keep."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(inputs))))) + inputs


class PreAct(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x)))))) + x


class Flipped(Block):
    """A block whose shortcut is the first operand of its sum."""

    def forward(self, inputs: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(inputs + self.bn2(self.conv2(h)))


class Split(Block):
    """A block in several parts, whose last is the sum alone."""

    def forward(self, inputs: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(F.avg_pool2d(self.bn2(self.conv2(h)), 3, 1, 1) + inputs)


class RowWithSum(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


class Layer(nn.Module):
    """A dense layer that puts its channels behind its input's."""

    def __init__(self, channels: int, growth: int = 4) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


def conv_row() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def dense_block() -> nn.Module:
    return densenet._DenseBlock(2, 8, 2, 4, 0.0)


def small_densenet() -> DenseNet:
    return DenseNet(8, (2, 2), 12, bn_size=2, num_classes=5)


def small_resnet() -> resnet.ResNet:
    return resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=5)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "residual": Block,
    "flipped": Flipped,
    "split": Split,
    "projection": lambda: resnet.BasicBlock(
        8, 12, 2, nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    ),
    "pre-activation": PreAct,
    "row": conv_row,
    "dense": dense_block,
    "dense-row": lambda: nn.Sequential(Layer(8), Layer(12)),
    "transition": lambda: densenet._Transition(8, 4),
    "own": lambda: fusedres.nn.BasicBlock(8, 8),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
SHAPE = (3, 8, 6, 6)
NETWORKS = {"resnet": small_resnet, "densenet": small_densenet}
each_network = pytest.mark.parametrize("name", NETWORKS)


def pair(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A plain module in float64 and its converted twin. What is fused from the start is compared with its plain class."""
    plain = build().to(DTYPE)
    randomize(plain)
    model = fusedres.convert(copy.deepcopy(plain))
    for m in plain.modules():
        m.__dict__.pop("_fusedres", None)
        m.__class__ = original_class(m)
    return plain, model


def draw(shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)


def images(*shape: int) -> Tensor:
    return draw(shape or (2, 3, 48, 48))


def assert_same_step(
    model: nn.Module, plain: nn.Module, x: Tensor, forward: Callable[[nn.Module, Tensor], Tensor] | None = None
) -> None:
    """Assert that a training step of both gives the same output, gradients and buffers."""
    call = forward or (lambda m, x: m(x))

    class Called(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return call(self.inner, x)

    ours, theirs = (run_training(Called(m), x) for m in (model, plain))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.is_floating_point():
            assert_parity(value, theirs[name], theirs[name], name)
        else:
            assert torch.equal(value, theirs[name]), name


def assert_nothing_fused(model: nn.Module) -> None:
    assert not any(isinstance(m, FusedBlock) and state_of(m) is not None for m in model.modules())


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


class Copies(TorchDispatchMode):
    """The operators that copy whole maps."""

    NAMES = ("aten.clone.", "aten.copy_.", "aten._to_copy.", "aten.cat.")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (
            str(func).startswith(self.NAMES)
            and isinstance(result, Tensor)
            and result.dim() == 4
            and min(result.shape[2:]) > 1
        ):
            self.found.append(str(func))
        return result


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


# ---- memory format ---------------------------------------------------------------------------------------------------

FORMATS = {
    "nchw": (torch.contiguous_format, torch.contiguous_format),
    "channels-last": (torch.channels_last, torch.channels_last),
    "channels-last-input": (torch.channels_last, torch.contiguous_format),
    "channels-last-weights": (torch.contiguous_format, torch.channels_last),
}


def steps_in(x_format: torch.memory_format, m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of an input that is no leaf, as they are."""
    leaf = x.clone().contiguous(memory_format=x_format).requires_grad_()
    inner = leaf * 1
    y = m(inner)
    (grad,) = torch.autograd.grad(y, inner, torch.ones_like(y))
    return y, grad


@pytest.mark.parametrize("formats", FORMATS)
@each_kind
def test_outputs_and_gradients_are_in_the_memory_format_of_the_original(kind, formats):
    x_format, weight_format = FORMATS[formats]
    plain, model = (m.to(memory_format=weight_format) for m in pair(KINDS[kind]))
    ours, theirs = (steps_in(x_format, m, draw()) for m in (model, plain))
    assert_fused(model, FUSED)
    assert ours[0].stride() == theirs[0].stride()
    if formats in ("nchw", "channels-last"):
        assert ours[1].stride() == theirs[1].stride()
    with torch.no_grad():
        x = draw().contiguous(memory_format=x_format)
        assert model.eval()(x).stride() == plain.eval()(x).stride()


class Mixed(nn.Module):
    """A block of two paths, on one of which a norm stands whose output is in a memory format of its own: an InstanceNorm's is never
    channels_last. ``join`` adds them."""

    def __init__(self, norm: nn.Module, join: Callable[[Tensor, Tensor], Tensor], behind: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm
        self.behind = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)) if behind else None
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.join = join

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.norm(self.conv1(x))
        if self.behind is not None:
            y = self.behind(y)
        return self.join(y, self.bn2(self.conv2(x))) * scale


def norm_first(y: Tensor, shortcut: Tensor) -> Tensor:
    return y + shortcut


def norm_last(y: Tensor, shortcut: Tensor) -> Tensor:
    return shortcut + y


class Twice(nn.Module):
    """A block that adds its input twice, to what a convolution has made and to the sum; ``last`` stands behind, a convolution alone."""

    def __init__(self, flipped: bool, last: bool) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2, self.flipped = nn.BatchNorm2d(8), flipped
        self.last = nn.Conv2d(8, 8, 3, padding=1) if last else None

    def forward(self, x: Tensor) -> Tensor:
        s = torch.relu(self.bn1(x))
        y = self.bn2(self.conv1(s))
        y = s + y if self.flipped else y + s
        y = s + y if self.flipped else y + s
        return y if self.last is None else self.last(y)


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("last", [False, True], ids=["sum", "convolution"])
@pytest.mark.parametrize("flipped", [False, True], ids=["input-last", "input-first"])
def test_what_runs_between_pieces_is_in_the_memory_format_of_the_original(flipped, last, formats):
    x_format, weight_format = FORMATS[formats]
    plain, model = (m.to(memory_format=weight_format) for m in pair(lambda: Twice(flipped, last)))
    x = draw().contiguous(memory_format=x_format)
    ours, theirs = model(x), plain(x)
    assert kind_key(model) == "general"
    assert_fused(model, FUSED)
    assert ours.stride() == theirs.stride()
    assert_parity(ours, theirs, theirs)


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("behind", [False, True], ids=["alone", "convolution-behind"])
@pytest.mark.parametrize("join", [norm_first, norm_last])
@pytest.mark.parametrize("norm", [lambda: nn.InstanceNorm2d(8), lambda: nn.GroupNorm(2, 8)], ids=["instance", "group"])
def test_a_sum_has_the_memory_format_of_its_first_operand(norm, join, behind, formats):
    x_format, weight_format = FORMATS[formats]
    plain, model = (m.to(memory_format=weight_format) for m in pair(lambda: Mixed(norm(), join, behind)))
    x = draw().contiguous(memory_format=x_format)
    ours, theirs = model(x), plain(x)
    assert kind_key(model) == "general"
    assert_fused(model, FUSED)
    assert ours.stride() == theirs.stride()
    assert_parity(ours, theirs, theirs)
    with torch.no_grad():
        assert model.eval()(x).stride() == plain.eval()(x).stride()


@pytest.mark.parametrize("join", [norm_first, norm_last])
def test_a_sum_that_runs_unfused_has_the_memory_format_of_its_first_operand(join):
    plain, model = pair(lambda: Mixed(nn.InstanceNorm2d(8), join))
    x = draw().contiguous(memory_format=torch.channels_last)
    with torch.autocast(
        "cpu", torch.bfloat16
    ):  # which leaves float64 alone, and no piece of a general block is known to take
        assert model(x).stride() == plain(x).stride()
    assert not state_of(model).outcome.fused


class Dropping(Layer):
    """A dense layer with a dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.dropout(self.conv(torch.relu(self.norm(x))), 0.5, self.training)], 1)


@pytest.mark.parametrize("formats", FORMATS)
def test_a_dropout_inside_a_dense_layer_draws_the_same_mask(formats):
    x_format, weight_format = FORMATS[formats]
    plain, model = (m.to(memory_format=weight_format) for m in pair(lambda: nn.Sequential(Dropping(8), Dropping(12))))
    found, x = [], draw().contiguous(memory_format=x_format)
    for m in (model, plain):
        torch.manual_seed(3)
        found.append(m(x))
    assert_fused(model, FUSED)
    assert_parity(*found, found[1])
    assert torch.equal(found[0] == 0, found[1] == 0) and found[0].stride() == found[1].stride()


@pytest.mark.parametrize("kind", ["residual", "row", "dense"])
def test_a_dropout_behind_a_block_draws_the_same_mask(kind):
    plain, model = pair(lambda: nn.Sequential(KINDS[kind](), nn.Dropout(0.5)))
    x = draw()
    found = []
    for m in (model, plain):
        torch.manual_seed(3)
        found.append(m(x))
    assert_parity(*found, found[1])
    assert torch.equal(found[0] == 0, found[1] == 0)
    assert_fused(model, FUSED)


class Policy(nn.Module):
    """A small net that plays games, in NCHW: a convolution, residual blocks, and heads that flatten by ``view``."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.size = size
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.policy = nn.Sequential(nn.Conv2d(8, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU())
        self.value_conv, self.value_bn = nn.Conv2d(8, 1, 1, bias=False), nn.BatchNorm2d(1)
        self.moves, self.value = nn.Linear(2 * size * size, size * size), nn.Linear(size * size, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        moves = self.moves(self.policy(x).view(-1, 2 * self.size * self.size))
        value = self.value(torch.relu(self.value_bn(self.value_conv(x))).view(x.size(0), -1))
        return torch.cat([moves, torch.tanh(value)], 1)


def test_a_net_that_flattens_its_maps_by_view_computes_the_same():
    plain, model = pair(Policy)
    assert_same_step(model, plain, draw((4, 3, 6, 6)))
    assert sum(isinstance(m, FusedBlock) for m in model.modules()) >= 4
    assert_fused(model, FUSED)


def test_gradients_that_leave_a_block_may_be_viewed():
    plain, model = pair(lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), Block()))
    for m in (plain, model):
        y = m[0](draw((2, 3, 6, 6)))
        seen = []
        y.register_hook(lambda grad, seen=seen: seen.append(grad.view(-1)))
        m[1](y).sum().backward()
        assert len(seen) == 1
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert p.grad.stride() == q.grad.stride()
    assert_fused(model[1], FUSED)


def test_maps_are_converted_where_a_region_begins_and_ends_and_not_between():
    _, model = pair(lambda: nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())))
    with Copies() as copies, torch.no_grad():
        y = model(draw())
    assert_fused(model, FUSED)
    assert y.is_contiguous() and len(copies.found) == 2


@pytest.mark.parametrize(
    "shape",
    [(2, 8, 5, 6), (2, 1, 5, 6), (2, 8, 1, 1), (1, 8, 5, 6), (2, 8, 1, 6), (1, 1, 1, 1), (8, 4, 3, 3), (8, 1, 3, 3)],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
def test_a_map_suggests_the_format_that_torch_takes_it_for(shape, memory_format):
    x = torch.randn(shape).to(memory_format=memory_format)
    y = F.batch_norm(x, None, None, training=True) if x.numel() > shape[1] else x
    x_is = suggests_channels_last(x)
    assert x_is is (torch._prims_common.suggest_memory_format(x) is torch.channels_last)
    assert x_is is suggests_channels_last(y) or min(shape) == 1


# ---- the report ------------------------------------------------------------------------------------------------------


class Volume(nn.Module):
    """A DenseNet of three dimensions."""

    def __init__(self) -> None:
        super().__init__()

        def layer(channels: int) -> nn.Module:
            class Layer3d(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.norm, self.conv = nn.BatchNorm3d(channels), nn.Conv3d(channels, 4, 3, padding=1)

                def forward(self, x: Tensor) -> Tensor:
                    return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)

            return Layer3d()

        self.first = nn.Conv3d(1, 8, 3, padding=1)
        self.dense = nn.Sequential(layer(8), layer(12))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(self.first(x)).mean((2, 3, 4)))


def test_a_report_of_three_dimensions_behind_a_training_step():
    plain, model = pair(Volume)
    assert_same_step(model, plain, draw((2, 1, 6, 6, 6)))
    assert_fused(model, FUSED)
    (row,) = fusedres.report(model)
    assert row.fused and row.kept > 0 and row.eager_kept > row.kept


def test_a_report_tells_which_way_each_convolution_went():
    if FUSED != "cpp":
        pytest.skip("the plain primitives have no choice")
    model = fusedres.convert(resnet.BasicBlock(16, 16))
    model(torch.randn(2, 16, 8, 8))
    (row,) = fusedres.report(model)
    assert [name for name, _ in row.routes] == ["conv1", "conv2"]
    assert {route for _, route in row.routes} <= {"fused", "library"}


def test_a_report_advises_channels_last():
    model = fusedres.convert(nn.Sequential(Block(), nn.Dropout(0.1)))
    model(torch.randn(SHAPE))
    assert "channels_last" in str(fusedres.report(model))
    model.to(memory_format=torch.channels_last)(torch.randn(SHAPE).to(memory_format=torch.channels_last))
    assert "channels_last" not in str(fusedres.report(model))
