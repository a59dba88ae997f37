"""Fused blocks under torch.compile: every part is one operator of the graph, which computes what a call in eager computes, to the bit, and
whatever a block depends on is noticed after compilation. Whole networks: ``test_compiled_networks.py``; what stands around a compiled
model: ``test_compiled_around.py``."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from converted import Split
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fusedres
from fusedres.swap import state_of
from fusedres.testing import assert_fused, randomize

pytest.importorskip("torchvision")
from compiling import NEEDS_CPP, assert_close, assert_equal, block, compiled, maps, operators, projected, step, twins  # noqa: E402
from torchvision.models.resnet import BasicBlock  # noqa: E402

pytestmark = [NEEDS_CPP, pytest.mark.usefixtures("proven_once")]


class LeftSum(nn.Module):
    """A block whose sum lies in memory as its input does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.conv(x)))


def frozen_norms(m: nn.Module) -> None:
    for module in m.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def replace_child(m: nn.Module) -> None:
    torch.manual_seed(2)
    m[0].conv2 = nn.Conv2d(8, 8, 3, 2, padding=1, bias=True)


def squared(module: nn.Conv2d, x: Tensor) -> Tensor:
    return module._conv_forward(x, module.weight, module.bias).square()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a norm to eval": lambda m: m[0].bn2.eval(),
    "all to eval": lambda m: m.eval(),
    "momentum": lambda m: setattr(m[0].bn1, "momentum", 0.5),
    "no momentum": lambda m: setattr(m[0].bn1, "momentum", None),
    "eps": lambda m: setattr(m[0].bn3, "eps", 0.1),
    "a hook": lambda m: m[0].conv2.register_forward_hook(lambda module, args, y: y.square()),
    "a hook on a block": lambda m: m[0].register_forward_hook(lambda module, args, y: y.square()),
    "a child": replace_child,
    "an activation": lambda m: setattr(m[0], "relu", nn.SiLU()),
    "a frozen weight": lambda m: m[0].conv2.weight.requires_grad_(False),
    "frozen norms": frozen_norms,
    "weights in place": lambda m: m[0].conv2.weight.data.mul_(2),
    "no affine": lambda m: setattr(m[0].bn2, "weight", None),
    "dilation": lambda m: [setattr(m[0].conv2, name, (2, 2)) for name in ("dilation", "padding")],
    "padding": lambda m: setattr(m[0].conv2, "padding_mode", "circular"),
    "an own forward": lambda m: setattr(m[0].conv2, "forward", functools.partial(squared, m[0].conv2)),
    "an own _conv_forward": lambda m: setattr(
        m[0].conv2, "_conv_forward", lambda x, *own: F.conv2d(x, *own, 2, 1).square()
    ),
    "reverted": fusedres.revert,
}


#: behind which original modules run, whose sums have an order of their own
ORIGINALS = ("a hook", "padding", "an own forward", "an own _conv_forward", "reverted")
#: what a compiler notices where it guards the hooks that it has read
HOOKS = ("a hook", "a hook on a block")


def hooks_are_guarded() -> bool:
    """Whether this version of torch compiles anew where the number of hooks that a forward reads has changed."""
    child = nn.ReLU()
    program = torch.compile(lambda x: x + len(child._forward_hooks), backend="eager")
    before = program(torch.zeros(1))
    child.register_forward_hook(lambda *_: None)
    return not torch.equal(program(torch.zeros(1)), before)


#: each of which another change has with it: of all norms, of the same attribute, of the same call
SHARED = ("a norm to eval", "momentum", "an own forward")


@pytest.mark.parametrize("change", [pytest.param(c, marks=[pytest.mark.slow] * (c in SHARED)) for c in CHANGES])
def test_a_change_after_compilation_is_noticed(change):
    if change in HOOKS and not hooks_are_guarded():
        pytest.skip("this version of torch guards no hooks")
    model, twin = twins(lambda: nn.Sequential(projected()))
    x, is_exact = maps(), change not in ORIGINALS
    if not is_exact:
        model, twin, x = model.double(), twin.double(), x.double()
    program, _ = compiled(model, "eager")
    assert_equal(step(program, x, True), step(twin, x, True))
    unchanged = copy.deepcopy(twin)
    CHANGES[change](model), CHANGES[change](twin)
    for _ in range(2):
        found, expected, otherwise = (step(m, x, True) for m in (program, twin, unchanged))
        if is_exact:
            assert_equal(found, expected)
        else:
            assert_close(found, expected, 1e-10)
    same_names = found.keys() == otherwise.keys()
    assert not (same_names and all(torch.equal(otherwise[name], value) for name, value in found.items()))


class Activated(nn.Module):
    """A block that holds its activation, one BatchNorm twice, and what its owner counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.bn1 = self.bn2 = nn.BatchNorm2d(16)
        self.act = F.relu
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


OWN_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "its activation": lambda m: setattr(m, "act", F.silu),
    "one of two places": lambda m: setattr(m, "bn2", nn.BatchNorm2d(16, eps=0.1)),
    "a tied weight": lambda m: setattr(m.conv2, "weight", nn.Parameter(m.conv1.weight.detach() * 2)),
}


@pytest.mark.parametrize("change", OWN_CHANGES)
def test_a_change_of_what_a_block_holds_is_noticed(change):
    def build() -> nn.Module:
        block = Activated()
        block.conv2.weight = block.conv1.weight
        return nn.Sequential(block)

    model, twin = twins(build)
    program, counter = compiled(model, "eager")
    assert_equal(step(program, maps(), True), step(twin, maps(), True))
    assert operators(counter)
    OWN_CHANGES[change](model[0]), OWN_CHANGES[change](twin[0])
    assert_equal(step(program, maps(), True), step(twin, maps(), True))


def test_what_a_block_does_not_read_may_change():
    model, _ = twins(lambda: nn.Sequential(Activated()))
    program, counter = compiled(model, "eager")
    for model[0].calls in range(3):
        program(maps())
        model[0].conv1.in_channels += 1
        model[0].bn1.num_features += 1
    assert counter.frame_count == 1


def test_counters_and_hooks_of_the_backward_are_asked_for_in_training_alone():
    if not hooks_are_guarded():
        pytest.skip("this version of torch guards no hooks")
    model, twin = (m.double().eval() for m in twins(lambda: nn.Sequential(projected())))
    counter = CompileCounterWithBackend("eager")
    program, x = (
        torch.compile(model, backend=counter),
        maps().double(),
    )  # with breaks: Dynamo traces no hooks of a backward
    with torch.no_grad():
        expected = program(x)
        for m in (model, twin):
            m[0].bn1.num_batches_tracked = None
            m[0].conv2.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))
        assert torch.equal(program(x), expected) and counter.frame_count == 1
    unhooked = copy.deepcopy(twin)
    unhooked[0].conv2._backward_hooks.clear()
    found, right, wrong = (step(m, x, True) for m in (program, twin, unhooked))  # in eval mode, with gradients
    assert_close(found, right, 1e-10)
    assert any(not torch.allclose(found[name], value) for name, value in wrong.items())


def test_a_mode_that_comes_back_is_not_compiled_anew():
    model, twin = block()
    program, counter = compiled(model, "eager")
    for _ in range(3):
        for training in (True, False):
            model.train(training), twin.train(training)
            assert_equal(step(program, maps(), training), step(twin, maps(), training))
    assert counter.frame_count == 2


def test_the_choice_of_a_backend_is_noticed_without_compiling_anew():
    model, twin = block()
    program, counter = compiled(model)
    before = step(program, maps(), True)
    step(twin, maps(), True)
    with fusedres.use_backend("eager"):
        found, expected = step(program, maps(), True), step(twin, maps(), True)
        assert_fused(twin, "eager")
    assert_equal(found, expected)
    assert not torch.equal(before["output"], found["output"])
    assert counter.frame_count == 1


def cumulative(m: nn.Module) -> None:
    for module in m.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def untracked(m: nn.Module) -> None:
    m[0].bn1.track_running_stats, m[0].bn1.running_mean, m[0].bn1.running_var = False, None, None


SETUPS: dict[str, Callable[[nn.Module], object]] = {
    "as it is": lambda m: None,
    "cumulative averages": cumulative,
    "frozen norms": frozen_norms,
    "half frozen": lambda m: [p.requires_grad_(False) for p in m[0].parameters()],
    "untracked": untracked,
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
}


#: which a change after compilation makes as well, above
CHANGED = ("cumulative averages", "half frozen")


@pytest.mark.parametrize(
    ("setup", "recompute", "batches"),
    [
        *(
            pytest.param(
                setup, False, (3, 3), id=f"{setup}-kept", marks=[] if setup not in CHANGED else [pytest.mark.slow]
            )
            for setup in SETUPS
        ),
        pytest.param("as it is", True, (3, 3, 5), id="as it is-recomputed-another batch"),
        *(
            pytest.param(setup, recompute, (3, 3, 5), id=f"{setup}-{name}-another batch", marks=pytest.mark.slow)
            for setup in SETUPS
            for recompute, name in ((False, "kept"), (True, "recomputed"))
            if (setup, recompute) != ("as it is", True)
        ),
    ],
)
def test_training_equals_eager_to_the_bit(setup, recompute, batches):
    # what is said of the first block alone needs no second one
    alone = len(set(batches)) == 1 and setup != "as it is"
    model, twin = twins(lambda: nn.Sequential(projected())) if alone else block(recompute)
    SETUPS[setup](model), SETUPS[setup](twin)
    program, counter = compiled(model)
    for batch in batches:
        assert_equal(step(program, maps(batch), True), step(twin, maps(batch), True))
    assert operators(counter) == {"residual_forward": 1 if alone else 2}


@pytest.mark.parametrize(
    ("layout", "identity"),
    [
        pytest.param(
            layout,
            identity,
            id=f"{layout}-{'added' if identity else 'projected'}",
            marks=[pytest.mark.slow] if identity and layout in ("contiguous", "channels_last", "expanded") else [],
        )
        for layout in ("contiguous", "channels_last", "sliced", "expanded", "transposed")
        for identity in (False, True)
    ],
)
def test_maps_of_every_layout_are_taken_and_left_as_in_eager(layout, identity):
    model, twin = twins(lambda: nn.Sequential(LeftSum() if identity else projected()))
    x = maps()
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, :16]
    elif layout == "transposed":
        x = x.transpose(2, 3)
    elif layout == "expanded":
        x = x[:, :, :1, :1].expand(3, 16, 8, 8)
    program, counter = compiled(model)
    y, expected = program(x), twin(x)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    assert operators(counter) == {"residual_forward": 1}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_gradient_of_a_map_from_outside_lies_as_in_eager(layout):
    """Tracers take it that the derivatives of ReLU6, hardswish and others lie as the map does. They lie as the gradient: where that is
    another layout, a view of them, as an instance norm's, fails."""
    model, twin = twins(lambda: nn.Sequential(nn.InstanceNorm2d(16, affine=True), nn.ReLU6(), LeftSum()))
    x = maps().to(memory_format=layout)
    program, counter = compiled(model)
    assert_equal(step(program, x, True), step(twin, x, True))
    (found,), (expected,) = (torch.autograd.grad(m(x.requires_grad_()).sum(), x) for m in (program, twin))
    assert found.stride() == expected.stride()
    assert operators(counter) == {"residual_forward": 1}


def test_training_without_gradients_moves_statistics_alone():
    model, twin = block()
    program, counter = compiled(model)
    with torch.no_grad():
        assert torch.equal(program(maps()), twin(maps()))
    assert_equal(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert operators(counter) == {"residual_infer": 2}


@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "recorded"])
def test_a_batch_may_be_empty_where_nothing_is_normalised_by_it(recorded):
    model, twin = block()
    program, counter = compiled(model.eval())
    twin.eval()
    for batch in (3, 0):
        with torch.set_grad_enabled(recorded):
            y, expected = program(maps(batch)), twin(maps(batch))
        assert torch.equal(y, expected)
        assert sum(operators(counter).values()) == 2
    if recorded:
        y.sum().backward()
        assert all(not p.grad.any() for p in model.parameters())


def test_what_no_operator_takes_runs_its_original_modules():
    model, twin = block()
    program, counter = compiled(model.double().half())
    with torch.no_grad():
        y = program(maps().half())
        assert torch.equal(y, twin.half()(maps().half()))
    assert operators(counter) in ({}, {"residual_infer": 2})


def test_blocks_may_be_compiled_one_by_one():
    model, twin = block()
    model[0].compile(fullgraph=True, backend="aot_eager")
    assert_equal(step(model, maps(), True), step(twin, maps(), True))


BLOCKS = {
    "basic": lambda: fusedres.nn.BasicBlock(16, 16),
    "bottleneck": lambda: fusedres.nn.Bottleneck(16, 4),
    "pre-activation basic": lambda: fusedres.nn.PreActBasicBlock(16, 16),
    "pre-activation bottleneck": lambda: fusedres.nn.PreActBottleneck(16, 4),
    "plain": lambda: fusedres.nn.PlainBlock(16, 8),
    "highway": lambda: fusedres.nn.HighwayBlock(16),
    "dense": lambda: fusedres.nn.DenseBlock(2, 16, 4, 8, 0.0),
    "transition": lambda: fusedres.nn.Transition(16, 8),
    "row": lambda: fusedres.nn.ConvBNAct(16, 8),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_that_are_fused_from_the_start_run_compiled(name):
    torch.manual_seed(0)
    model = nn.Sequential(BLOCKS[name]())
    randomize(model)
    twin = copy.deepcopy(model)
    program, counter = compiled(model, "eager")
    assert_equal(step(program, maps(), True), step(twin, maps(), True))
    assert sum(operators(counter).values()) == 1


def by_hand(model: nn.Module) -> nn.Module:
    """A copy whose modules share all attributes with those of ``model``, its state included."""
    twin = type(model).__new__(type(model))
    twin.__dict__.update(model.__dict__)
    return twin


@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_hand])
@pytest.mark.parametrize("build", [lambda: fusedres.convert(BasicBlock(8, 8)), lambda: fusedres.nn.BasicBlock(8, 8)])
def test_a_copy_is_planned_by_its_own_modules(build, made):
    block = build().eval()
    randomize(block)
    twin = made(block)
    twin._modules = {**twin._modules, "bn2": nn.Identity()}  # what the block itself does not know of
    program, counter = compiled(twin)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        found, before = program(x), block(x)
        assert bool(operators(counter)) == (made is not by_hand), "a state of two modules plans for one of them"
        torch.testing.assert_close(found, twin(x))  # by hand, it is the original modules beside fused ones
        assert torch.equal(block(x), before) and (found - before).abs().max() > 0.01
    assert state_of(twin).is_of(twin) and state_of(block).is_of(block)


def test_a_part_without_any_tensor_compiles():
    """A sum that stands alone, behind what is no row."""
    torch.manual_seed(0)
    plain = Split()
    model, x = fusedres.convert(copy.deepcopy(plain)), torch.randn(2, 8, 6, 6)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), plain(x))
