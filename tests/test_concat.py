"""Concatenation whose producers write into their slices: equal to ``torch.cat`` in value and gradient, without it, in one buffer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from support import each_mode, served
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import functional
from fusedres.backends.layout import as_map, is_slice
from fusedres.nn import BasicBlock, Concat, ConvBNAct, DenseBlock, HighwayBlock, PlainBlock, PreActBasicBlock
from fusedres.testing import assert_fused, assert_parity, randomize
from fusedres.trial import memory

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("uninitialised_memory_is_nan"),
]


class Half(nn.Module):
    """The second half of the channels, of which it tells the shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, x.shape[1] // 2 :]

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], shape[1] - shape[1] // 2, *shape[2:])


class Silent(nn.Module):
    """A convolution of which nobody can tell the shape beforehand."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inplanes, planes, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).sigmoid()


def inception() -> Concat:
    return Concat(
        ConvBNAct(6, 5, 1),
        nn.Sequential(ConvBNAct(6, 3, 1), ConvBNAct(3, 4, 3)),
        nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvBNAct(6, 3, 1)),
        nn.AvgPool2d(3, 1, 1),
    )


def projected(inplanes: int, planes: int) -> BasicBlock:
    return BasicBlock(
        inplanes, planes, downsample=nn.Sequential(nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes))
    )


# the module, and the shapes of its inputs
CASES: dict[str, tuple[Callable[[], Concat], list[tuple[int, ...]]]] = {
    "inception": (inception, [(2, 6, 5, 7)]),
    "reduction": (lambda: Concat(ConvBNAct(6, 5, 3, 2), nn.MaxPool2d(3, 2, 1), PlainBlock(6, 4, 2)), [(2, 6, 7, 5)]),
    "decoder": (
        lambda: Concat(nn.Sequential(nn.Upsample(scale_factor=2), ConvBNAct(6, 4)), nn.Identity()),
        [(2, 6, 3, 4), (2, 5, 6, 8)],
    ),
    "transposed-decoder": (
        lambda: Concat(nn.ConvTranspose2d(6, 3, 2, 2), nn.Identity(), ConvBNAct(5, 2)), [(2, 6, 3, 4), (2, 5, 6, 8), (2, 5, 6, 8)],
    ),
    "vovnet": (
        lambda: Concat(nn.Identity(), ConvBNAct(6, 4), ConvBNAct(4, 4), ConvBNAct(4, 4), reads=[None, None, 1, 2]),
        [(2, 6, 5, 7)],
    ),
    "elan": (
        lambda: Concat(
            ConvBNAct(6, 4, 1), ConvBNAct(6, 4, 1), nn.Sequential(ConvBNAct(4, 4), ConvBNAct(4, 4)), ConvBNAct(4, 4),
            reads=[None, None, 1, 2],
        ),
        [(2, 6, 5, 7)],
    ),
    "c2f": (
        lambda: Concat(ConvBNAct(6, 8, 1), nn.Sequential(Half(), BasicBlock(4, 4)), BasicBlock(4, 4), reads=[None, 0, 1]),
        [(2, 6, 5, 7)],
    ),
    "every-block": (
        lambda: Concat(
            BasicBlock(6, 6), projected(6, 5), PreActBasicBlock(6, 6), HighwayBlock(6), PlainBlock(6, 3),
            DenseBlock(2, 6, 2, 3, 0.0),
        ),
        [(2, 6, 5, 7)],
    ),
    "one-untold": (
        lambda: Concat(ConvBNAct(6, 4), Silent(4, 3), ConvBNAct(3, 4), reads=[None, 0, 1]), [(2, 6, 5, 7)],
    ),
    "twice-read": (lambda: Concat(ConvBNAct(6, 4), ConvBNAct(4, 3), ConvBNAct(4, 2), reads=[None, 0, 0]), [(2, 6, 5, 7)]),
    "in-place-reader": (
        lambda: Concat(ConvBNAct(6, 4, activation_layer=None), nn.Sequential(nn.ReLU(inplace=True), ConvBNAct(4, 3)), reads=[None, 0]),
        [(2, 6, 5, 7)],
    ),
    "small": (lambda: Concat(ConvBNAct(3, 4, 1), ConvBNAct(4, 2, 1), reads=[None, 0]), [(2, 3, 3, 2)]),
    "one-branch": (lambda: Concat(ConvBNAct(6, 4)), [(2, 6, 5, 7)]),
}  # fmt: skip


def concatenated(model: Concat, inputs: list[Tensor]) -> Tensor:
    """The definition."""
    found: list[Tensor] = []
    for i, branch in enumerate(model):
        found.append(branch(inputs[i % len(inputs)] if model.reads[i] is None else found[model.reads[i]]))
    return torch.cat(found, 1)


def step(model: Concat, inputs: list[Tensor], forward: Callable[[Concat, list[Tensor]], Tensor]) -> dict[str, Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = forward(model, inputs)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    found = {"output": y.detach()} | {f"input {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return found | {f"buffer {n}": b for n, b in model.named_buffers()}


def compare(name: str, dtype: torch.dtype, backend: str, training: bool = True, draws: int = 5) -> None:
    """The joined ``backend`` run against eager modules and ``torch.cat``, by the rule."""
    build, shapes = CASES[name]
    results: dict[str, dict[str, list[Tensor]]] = {"ours": {}, "eager": {}, "truth": {}}
    for seed in range(draws):
        torch.manual_seed(seed)
        model = build().double()
        randomize(model)
        model = model.to(dtype).train(training)
        inputs = [torch.randn(shape).to(dtype) for shape in shapes]
        for which in results:
            twin, given = copy.deepcopy(model), inputs
            if which == "truth":
                twin, given = twin.double(), [x.double() for x in inputs]
            forward = (lambda m, x: m(*x)) if which == "ours" else concatenated
            with fusedres.use_backend(backend if which == "ours" else None), unfused(twin, which != "ours"):
                if training:
                    found = step(twin, given, forward)
                else:
                    with torch.no_grad():
                        found = {"output": forward(twin, given)}
            if which == "ours":
                assert_fused(twin, backend)
            for key, value in found.items():
                results[which].setdefault(key, []).append(value)
    for key, values in results["ours"].items():
        if values[0].is_floating_point():
            assert_parity(values, results["eager"][key], results["truth"][key], key)
        else:
            assert all(torch.equal(a, b) for a, b in zip(values, results["eager"][key], strict=True)), key


class unfused:
    """Blocks run their plain forwards inside: a hook on each BatchNorm sees to that."""

    def __init__(self, model: nn.Module, wanted: bool) -> None:
        self.norms = [m for m in model.modules() if wanted and isinstance(m, nn.BatchNorm2d)]

    def __enter__(self) -> None:
        self.handles = [m.register_forward_hook(lambda *_: None) for m in self.norms]

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()


@each_mode
@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("name", CASES)
def test_it_equals_concatenation(name, backend, training):
    served(backend, torch.float64)
    compare(name, torch.float64, backend, training, draws=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["inception", "vovnet"])
def test_it_equals_concatenation_in_other_dtypes(name, dtype):
    served("cpp", dtype)
    compare(name, dtype, "cpp", draws=5 if dtype == torch.float32 else 9)


@each_mode
def test_it_equals_concatenation_on_triton(training):
    served("triton", torch.float32)
    compare("small", torch.float32, "triton", training)


class Recorder(TorchDispatchMode):
    """The operators that move maps without computing anything."""

    MOVES = ("aten.cat.", "aten.copy_.", "aten.clone.", "aten._to_copy.", "aten.slice_backward.", "aten.new_zeros.")

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (
            str(func).startswith(self.MOVES)
            and isinstance(result, Tensor)
            and result.dim() == 4
            and min(result.shape[2:]) > 3
        ):
            self.moves.append(str(func))
        return result


@pytest.mark.parametrize(
    ("name", "copies"), [("inception", 1), ("vovnet", 1), ("elan", 0), ("decoder", 1), ("every-block", 1)]
)
def test_nothing_is_concatenated_and_only_foreign_outputs_are_copied(name, copies):
    """In a whole training step: of an average pool, an identity, a dense block."""
    served("cpp", torch.float32)
    build, shapes = CASES[name]
    model = build()
    # inputs that are no leaves: a leaf's gradient is a map of its own, for which autograd copies a slice
    inputs = [torch.randn(s).to(memory_format=torch.channels_last).requires_grad_() * 1 for s in shapes]
    grad = torch.randn_like(model(*inputs))
    with fusedres.use_backend("cpp"), Recorder() as recorder:
        model(*inputs).backward(grad)
    assert recorder.moves == ["aten.copy_.default"] * copies
    assert_fused(model, "cpp")


BATCH, SIDE = 2, 48
MAP = BATCH * SIDE * SIDE * 4


def peak(step: Callable[[], object]) -> float:
    """The peak of the second call, in maps of one channel."""
    step()
    return memory.peak_bytes(step, torch.device("cpu"), smallest=MAP) / MAP


def test_inference_allocates_the_buffer_and_nothing_else():
    served("cpp", torch.float32)
    model = Concat(ConvBNAct(8, 16, 1), ConvBNAct(8, 24, 1), ConvBNAct(16, 8, 1), reads=[None, None, 0]).eval()
    x = torch.randn(BATCH, 8, SIDE, SIDE).to(memory_format=torch.channels_last)
    with torch.no_grad(), fusedres.use_backend("cpp"):
        assert peak(lambda: model(x)) == 16 + 24 + 8


def test_a_training_step_holds_the_buffer_and_each_raw_map_once():
    served("cpp", torch.float32)
    model = Concat(ConvBNAct(8, 16, 1), ConvBNAct(8, 24, 1), ConvBNAct(16, 8, 1), reads=[None, None, 0])
    x = torch.randn(BATCH, 8, SIDE, SIDE).to(memory_format=torch.channels_last)

    def forward() -> Tensor:
        return model(x)

    with fusedres.use_backend("cpp"):
        assert peak(forward) == 2 * (16 + 24 + 8)


# ---- what a module goes through --------------------------------------------------------------------------------------


def test_other_modes():
    """No gradients, inference mode, no layout of its own, and no gradient of the input."""
    served("cpp", torch.float32)
    build, (shape,) = CASES["vovnet"]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    wanted = model(x).detach()
    assert wanted.is_contiguous(memory_format=torch.channels_last)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(x), wanted)
            torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), wanted)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(made(x).detach(), wanted)
    assert list(model.state_dict()) == list(nn.ModuleList(model).state_dict())
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_gives_what_concatenation_would():
    served("cpp", torch.bfloat16)
    model = Concat(ConvBNAct(6, 4), nn.Identity()).eval()
    x = torch.randn(2, 6, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = model(x), concatenated(model, [x])
        assert y.dtype == wanted.dtype == torch.float32
        torch.testing.assert_close(y, wanted)
        half = Concat(ConvBNAct(6, 4), ConvBNAct(6, 3)).eval()
        assert half(x).dtype == torch.bfloat16
        half(x).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in half.parameters())


def test_hooks_on_branches_fire_and_what_they_return_is_what_counts():
    served("cpp", torch.float32)
    model, x = inception().eval(), torch.randn(2, 6, 5, 7)
    seen = [
        model[1].register_forward_hook(lambda m, i, o: 2 * o),
        model[0].register_forward_hook(lambda m, i, o: o + 1),
    ]
    torch.testing.assert_close(model(x), concatenated(model, [x]))
    for handle in seen:
        handle.remove()
    torch.testing.assert_close(model(x), concatenated(model, [x]))


def test_a_changed_buffer_is_noticed_where_its_slices_were_kept():
    served("cpp", torch.float32)
    build, (shape,) = CASES["vovnet"]
    y = build()(torch.randn(shape))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.mul_(2).sum().backward()
    build, (shape,) = CASES["inception"]
    build()(torch.randn(shape)).mul_(2).sum().backward()  # nobody kept a slice


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_double_backward(backend):
    served(backend, torch.float64)
    build, (shape,) = CASES["vovnet"]
    torch.manual_seed(0)
    model = build().double()
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for forward in (lambda m, x: m(*x), concatenated):
        twin, leaf = copy.deepcopy(model), x.clone().requires_grad_()
        with fusedres.use_backend(backend):
            (first,) = torch.autograd.grad(forward(twin, [leaf]).square().sum(), leaf, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), [leaf, *twin.parameters()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_branches_are_converted_in_place():
    """Plain modules are copied in; converted, they write their slices themselves."""
    served("cpp", torch.float32)

    def row(inplanes: int, planes: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inplanes, planes, 3, 1, 1), nn.BatchNorm2d(planes), nn.ReLU())

    model, x = Concat(row(6, 4), row(6, 3)).eval(), torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last)
    counts = []
    wanted = model(x).detach()
    for _ in range(2):
        with Recorder() as recorder, torch.no_grad():
            torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
        counts.append(recorder.moves.count("aten.copy_.default"))
        fusedres.convert(model)
    assert counts == [2, 0]
    assert [row.kind for row in fusedres.report(model)] == ["sequential", "sequential"]


def test_compiled_it_is_a_concatenation():
    model, x = Concat(nn.Conv2d(6, 4, 1), nn.Identity()), torch.randn(2, 6, 5, 7)
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, concatenated(model, [x]))


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said():
    x = torch.randn(2, 6, 5, 7)
    with pytest.raises(ValueError, match=r"branch 1 gives \(2, 3, 3, 4\), branch 0 gives \(2, 4, 5, 7\)"):
        Concat(ConvBNAct(6, 4), ConvBNAct(6, 3, stride=2))(x)
    with pytest.raises(ValueError, match="one input, or one for each; found 3"):
        Concat(nn.Identity(), nn.Identity())(x, x, x)
    with pytest.raises(ValueError, match="at least one branch"):
        Concat()
    with pytest.raises(ValueError, match=r"reads\[1\] is 1"):
        Concat(nn.Identity(), nn.Identity(), reads=[None, 1])
    with pytest.raises(ValueError, match="reads has 1 entries"):
        Concat(nn.Identity(), nn.Identity(), reads=[None])

    class Wrong(Half):
        def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
            return shape

    with pytest.raises(ValueError, match=r"branch 0 gives \(2, 3, 5, 7\), where its out_shape said \(2, 6, 5, 7\)"):
        Concat(Wrong())(x)


def test_a_mismatch_is_found_before_a_running_statistic_moves():
    model = Concat(ConvBNAct(6, 4), ConvBNAct(6, 3, stride=2))
    before = copy.deepcopy(model.state_dict())
    with fusedres.use_backend("eager"), pytest.raises(ValueError, match="all sizes but their channels"):
        model(torch.randn(2, 6, 5, 7))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


# ---- the functional form, and slices ---------------------------------------------------------------------------------


def unit(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> functional.Unit:
    norm = functional.Norm(bn.weight, bn.bias, None, None, True, 0.0, bn.eps, "relu")
    return functional.Unit(
        functional.Conv(conv.weight, conv.bias, functional.Geometry(conv.stride, conv.padding, conv.dilation, 1)), norm
    )


def test_the_functional_form():
    torch.manual_seed(0)
    model = Concat(ConvBNAct(6, 4), nn.Identity(), ConvBNAct(4, 3, 1), reads=[None, None, 0]).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    branches = [(unit(model[0][0], model[0][1]),), (), (unit(model[2][0], model[2][1]),)]
    torch.testing.assert_close(functional.concat([x], branches, model.reads), concatenated(model, [x]))
    with pytest.raises(ValueError, match="found 2"):
        functional.concat([x, x], branches)
    with pytest.raises(ValueError, match="branch 1 gives"):
        functional.concat([x], [branches[0], (unit(nn.Conv2d(6, 2, 3).double(), nn.BatchNorm2d(2).double()),)])


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        (torch.empty(2, 8, 5, 7).to(memory_format=torch.channels_last)[:, 2:5], True),
        (torch.empty(2, 8, 5, 1).to(memory_format=torch.channels_last)[:, 2:5], True),
        (torch.empty(2, 8, 1, 1).to(memory_format=torch.channels_last)[:, 2:5], True),
        (torch.empty(2, 8, 3, 5, 7).to(memory_format=torch.channels_last_3d)[:, 2:5], True),
        (torch.empty(2, 8, 5, 7)[:, 2:5], False),
        (torch.empty(2, 8, 5, 7).to(memory_format=torch.channels_last)[:, 2:5, ::2], False),
        (torch.empty(2, 8, 5, 7).to(memory_format=torch.channels_last)[:, ::2], False),
        (torch.empty(1).expand(2, 8, 5, 7), False),
        (torch.empty(2, 3), False),
    ],
)
def test_slices_of_maps_are_told_and_not_copied(x, wanted):
    assert is_slice(x) is wanted
    assert (as_map(x) is x) is (wanted or x.dim() == 2)
