"""A block of any shape computes what it did: outputs, gradients and buffers, in every mode, layout and form of its call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from general_blocks import SHAPES, C, Draws, DualPath, OneShot, Optional, Res2Net, Root, Select, Selects, Shuffle, Tree
from torch import Tensor, nn

import fusedres
from fusedres.blocks.general import MOST_FORMS
from fusedres.report import why_not_fused
from fusedres.swap import FusedBlock, state_of
from fusedres.testing import assert_fused, compare, randomize

pytestmark = pytest.mark.usefixtures("proven_once")


@pytest.fixture(autouse=True)
def plain_primitives() -> Iterator[None]:
    torch.manual_seed(0)
    with fusedres.use_backend("eager"):
        yield


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for item in value for t in flat(item)]


def step(model: nn.Module, given: Callable[[], tuple[tuple[Any, ...], list[Tensor]]]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one call with the arguments that ``given`` makes, from the same random numbers."""
    args, leaves = given()
    model.zero_grad()
    torch.manual_seed(3)
    ys = flat(model(*args))
    torch.autograd.backward(ys, [torch.randn(y.shape, dtype=y.dtype) for y in ys])
    found = {f"output {i}": y for i, y in enumerate(ys)} | {f"input {i}": x.grad for i, x in enumerate(leaves)}
    found |= {name: p.grad for name, p in model.named_parameters()} | {
        f"buffer {n}": b for n, b in model.named_buffers()
    }
    return {name: value.detach().clone() for name, value in found.items() if value is not None}


def maps(count: int, pack: Callable[..., tuple[Any, ...]], layout: torch.memory_format) -> Callable[[], Any]:
    """Makes the arguments of a call: ``count`` maps, as ``pack`` arranges them."""

    def make() -> tuple[tuple[Any, ...], list[Tensor]]:
        draw = torch.Generator().manual_seed(1)
        leaves = [torch.randn(3, C, 6, 5, generator=draw, dtype=torch.float64) for _ in range(count)]
        leaves = [x.contiguous(memory_format=layout).requires_grad_() for x in leaves]
        return pack(*leaves), leaves

    return make


def assert_equal(model: nn.Module, twin: nn.Module, given: Callable[[], Any], fused: bool = True) -> None:
    """Two steps in training, then one in evaluation, then one without gradients."""
    for training in (True, True, False):
        model.train(training), twin.train(training)
        wanted, found = step(model, given), step(twin, given)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        if fused:
            assert_fused(twin, "eager")
    with torch.no_grad():
        torch.manual_seed(4)
        wanted = flat(model(*given()[0]))
        torch.manual_seed(4)
        for a, b in zip(flat(twin(*given()[0])), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
            assert a.stride() == b.stride()


def pair(
    build: Callable[[], nn.Module], layout: torch.memory_format = torch.contiguous_format
) -> tuple[nn.Module, nn.Module]:
    """A block, and its converted copy."""
    model = build().double().to(memory_format=layout)
    randomize(model)
    return model, fusedres.convert(copy.deepcopy(model))


LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)


@LAYOUTS
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_equals_eager(name: str, layout: torch.memory_format) -> None:
    model, twin = pair(SHAPES[name][0], layout)
    assert_equal(model, twin, maps(1, lambda x: (x,), layout))


@LAYOUTS
@pytest.mark.parametrize(
    ("build", "count", "pack"),
    [
        (Root, 2, lambda a, b: ([a, b],)),
        (lambda: Root(False), 2, lambda a, b: ((a, b),)),
        (Optional, 1, lambda x: (x,)),
        (Optional, 2, lambda x, s: (x, s)),
        (Optional, 3, lambda x, s, c: (x, s, [c, x])),
        (lambda: Select(True), 1, lambda x: (x,)),
        (lambda: Select(False), 2, lambda x, y: ([x, y],)),
        (Selects, 1, lambda x: (x,)),
        (Tree, 1, lambda x: (x,)),
    ],
    ids=["list", "tuple", "default", "two maps", "maps and a list", "map to list", "list to list", "lists", "tree"],
)  # fmt: skip
def test_every_form_of_a_call_equals_eager(
    build: Callable[[], nn.Module], count: int, pack: Any, layout: torch.memory_format
) -> None:
    model, twin = pair(build, layout)
    assert_equal(model, twin, maps(count, pack, layout))


@pytest.mark.parametrize("backend", ["cpp", "eager"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [Res2Net, OneShot, Shuffle])
def test_parity_in_float32(build: Callable[[], nn.Module], training: bool, backend: str) -> None:
    with fusedres.use_backend(None):
        compare(build, (2, C, 9, 7), torch.float32, backend, training)


def test_a_call_in_many_forms_is_followed_in_so_many() -> None:
    model, twin = pair(lambda: Root(False))
    for block in (model, twin):
        block.conv = nn.Conv2d(C, C, 1).double()
    block = model.eval(), twin.eval()
    x = torch.randn(2, C, 4, 4, dtype=torch.float64)
    model.load_state_dict(twin.state_dict())
    for i in range(MOST_FORMS + 3):
        given = [*[x[:, : C // 2]] * 2] if i % 2 else [x]
        given = tuple(given) if i // 2 % 2 else given
        torch.testing.assert_close(twin(given), model(given))
    assert str(state_of(twin).outcome) == "eager" and block


def test_maps_are_the_very_ones_that_eager_returns() -> None:
    _, twin = pair(lambda: Select(True))
    a, b = twin(torch.randn(2, C, 4, 4, dtype=torch.float64))
    assert a is b
    _, twin = pair(lambda: Select(False))
    x, y = torch.randn(2, 2, C, 4, 4, dtype=torch.float64)
    assert twin([x, y])[1] is y


def test_hooks_fire_on_what_runs_as_it_is_and_on_what_would_be_fused() -> None:
    model, twin = pair(OneShot)
    seen: list[list[str]] = [[], []]
    for names, block in zip(seen, (model, twin), strict=True):
        for name in ("attention", "middle.1.1"):
            block.get_submodule(name).register_forward_hook(lambda *_, n=name, to=names: to.append(n))
    assert_equal(model, twin, maps(1, lambda x: (x,), torch.contiguous_format), fused=False)
    assert seen[0] == seen[1] and len(seen[0]) >= 8
    assert "hook" in str(state_of(twin).outcome)


def test_a_hook_on_what_is_gone_through_runs_the_original() -> None:
    _, twin = pair(OneShot)
    seen: list[int] = []
    handle = twin.middle.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, C, 4, 4, dtype=torch.float64)
    twin(x)
    assert seen == [1] and "a hook is registered" in str(state_of(twin).outcome)
    handle.remove()
    twin(x)
    assert state_of(twin).outcome.fused


def test_what_was_read_and_changes_is_noticed() -> None:
    model, twin = pair(lambda: Root(True))
    given = maps(2, lambda a, b: ([a, b],), torch.contiguous_format)
    assert_equal(model, twin, given)
    model.shortcut = twin.shortcut = False
    assert_equal(model, twin, given, fused=False)
    assert "shortcut has changed" in str(state_of(twin).outcome)
    fusedres.convert(twin)
    assert_equal(model, twin, given)


def test_a_changed_module_is_read_at_the_next_call() -> None:
    model, twin = pair(Res2Net)
    given = maps(1, lambda x: (x,), torch.contiguous_format)
    assert_equal(model, twin, given)
    for block in (model, twin):
        torch.manual_seed(9)
        block.convs[0] = nn.Conv2d(4, 4, 1).double()
        block.bn1.momentum = None
    assert_equal(model, twin, given)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_fused(again: Callable[[nn.Module], nn.Module]) -> None:
    model, twin = pair(Res2Net)
    assert_equal(model, again(twin), maps(1, lambda x: (x,), torch.contiguous_format))


def test_other_arguments_run_the_original() -> None:
    class Scaled(Optional):
        def forward(self, x: Tensor, by: Any = None) -> Any:
            y = super().forward(x)
            return torch.cat((y, x), 1) if by is None else {"y": y}

    _, twin = pair(Scaled)
    x = torch.randn(2, C, 4, 4, dtype=torch.float64)
    assert isinstance(twin(x), Tensor) and state_of(twin).outcome.fused
    assert isinstance(twin(x, 2), dict) and not state_of(twin).outcome.fused
    assert isinstance(twin(x, {}), dict) and "is given a dict" in str(state_of(twin).outcome)
    assert isinstance(twin(x), Tensor) and state_of(twin).outcome.fused


def test_random_numbers_are_drawn_in_their_order() -> None:
    model, twin = pair(Draws, torch.channels_last)
    given = maps(1, lambda x: (x,), torch.channels_last)
    for _ in range(3):
        assert_equal(model, twin, given)
        state = torch.get_rng_state()
        assert_equal(model, twin, given)
        assert torch.equal(state, torch.get_rng_state())


def test_outputs_may_be_overwritten() -> None:
    model, twin = pair(DualPath)
    found = []
    for block in (model, twin):
        x = torch.linspace(-1, 1, 2 * C * 9, dtype=torch.float64).view(2, C, 3, 3).requires_grad_()
        y = block(x)
        y.mul_(3)
        y.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])


def test_double_backward_equals_eager() -> None:
    found = []
    model, twin = pair(Res2Net)
    for block in (model, twin):
        x = torch.linspace(-1, 1, 2 * C * 9, dtype=torch.float64).view(2, C, 3, 3).requires_grad_()
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([x.grad, *(p.grad for p in block.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_inference_keeps_no_more_maps_than_eager() -> None:
    _, twin = pair(OneShot)
    twin.eval()
    alive: list[int] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            y = func(*args, **(kwargs or {}))
            alive.append(func is torch.ops.aten.cat.default)
            return y

    with torch.no_grad(), Count():
        twin(torch.randn(2, C, 4, 4, dtype=torch.float64))
    assert sum(alive) == 1  # one concatenation, as in eager
    assert state_of(twin).outcome.fused


# ---- timm ----------------------------------------------------------------------------------------------------------------


FAMILIES = pytest.mark.parametrize(
    ("name", "block"),
    [
        ("res2net50_14w_8s", "Bottle2neck"),
        ("dla34", "DlaBasic"),
        ("dla60x_c", "DlaRoot"),
        ("dpn48b", "DualPathBlock"),
        ("selecsls42", "SelecSlsBlock"),
        ("vovnet39a", "OsaBlock"),
        ("ese_vovnet19b_dw", "OsaBlock"),
        ("repvgg_a0", "RepVggBlock"),
    ],
)


@FAMILIES
def test_every_block_of_a_family_of_timm_is_fused(name: str, block: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    fusedres.convert(model, verify=False)
    blocks = [m for m in model.modules() if type(m).__name__ == block]
    assert blocks and all(isinstance(m, FusedBlock) and why_not_fused(m) is None for m in blocks)


@pytest.mark.slow
@FAMILIES
def test_a_family_of_timm_equals_eager(name: str, block: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3).double()
    randomize(model)
    twin = fusedres.convert(copy.deepcopy(model))
    draw = torch.Generator()
    for training in (True, False):
        model.train(training), twin.train(training)
        found = []
        for net in (model, twin):
            net.zero_grad()
            x = torch.randn(2, 3, 64, 64, generator=draw.manual_seed(2), dtype=torch.float64).requires_grad_()
            y = net(x)
            y.square().sum().backward()
            found.append([y, x.grad, *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-9 * float(b.double().abs().max() + 1))
    assert any(type(m).__name__ == block and state_of(m) is not None for m in twin.modules())
    assert_fused(twin, "eager")
