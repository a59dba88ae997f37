"""Plain and highway blocks, what residual learning is compared with: as modules, in functional form, and the highway's one pass on every
backend. Against plain PyTorch by the rule of :mod:`fusedres.testing`, with NaN in uninitialised memory."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import each_mode, served
from torch import Tensor, nn

import fusedres
from fusedres import functional
from fusedres.backends import select
from fusedres.backends.contract import Wrapped
from fusedres.nn import HighwayBlock, PlainBlock, _PlainHighway, _PlainPlain
from fusedres.operands import LazyMap
from fusedres.testing import assert_fused, compare

pytestmark = [
    pytest.mark.usefixtures("proven_once"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("uninitialised_memory_is_nan"),
]


def fused(model: nn.Module) -> nn.Module:
    """The modules of ``fusedres.nn`` in the place of their plain forwards."""
    for module in model.modules():
        module.__class__ = {_PlainHighway: HighwayBlock, _PlainPlain: PlainBlock}.get(type(module), type(module))
    return model


def recomputing(model: nn.Module) -> nn.Module:
    return fusedres.convert(fused(model), recompute=True)


def frozen(block: nn.Module, *names: str) -> nn.Module:
    """``block`` without gradients of parameters whose name begins so."""
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(names))
    return block


CASES = {
    "highway": lambda: _PlainHighway(7),
    "highway-gate-norm": lambda: _PlainHighway(7, gate_norm=True),
    "highway-1x1": lambda: _PlainHighway(7, 1, gate_norm=True),
    "highway-dilated": lambda: _PlainHighway(7, dilation=2),
    "highways": lambda: nn.Sequential(_PlainHighway(7, gate_bias=-1.0), _PlainHighway(7, 1), _PlainHighway(7, gate_norm=True)),
    "highway-without-gate-gradients": lambda: frozen(_PlainHighway(7, gate_norm=True), "gate"),
    "highway-without-candidate-gradients": lambda: frozen(_PlainHighway(7), "conv1", "bn1"),
    "plain": lambda: _PlainPlain(7, 9),
    "plain-strided": lambda: _PlainPlain(7, 5, 2),
    "plains": lambda: nn.Sequential(_PlainPlain(7, 9, 2), _PlainPlain(9, 9)),
}  # fmt: skip
SHAPE = (2, 7, 6, 5)


@each_mode
@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("name", CASES)
def test_the_modules_equal_their_plain_forward(name, backend, training):
    served(backend, torch.float64)
    compare(CASES[name], SHAPE, torch.float64, backend, training, draws=1, fuse=fused)


@each_mode
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("name", ["highway", "highway-gate-norm", "plain"])
def test_other_dtypes(name, dtype, training):
    served("cpp", dtype)
    compare(CASES[name], SHAPE, dtype, "cpp", training, fuse=fused)


@each_mode
@pytest.mark.parametrize("name", ["highway", "highway-gate-norm", "plain-strided"])
def test_the_modules_on_triton(name, training):
    served("triton", torch.float32)
    compare(CASES[name], (1, 7, 4, 3), torch.float32, "triton", training, draws=1, fuse=fused)


@pytest.mark.parametrize("name", ["highway-1x1", "highways"])
def test_recomputing_gives_the_same_step(name):
    served("cpp", torch.float64)
    compare(CASES[name], SHAPE, torch.float64, "cpp", draws=1, fuse=recomputing)


# ---- the pass, whose parity tests/backends/test_contract.py shows --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_gates_at_their_limits(dtype):
    """A gate that is wide open or shut passes one side exactly, infinities are limits, and NaN stays NaN."""
    served("cpp", dtype)
    gate = torch.tensor([float("inf"), 200.0, -200.0, float("-inf"), float("nan"), 0.0, 90.0, -90.0], dtype=dtype)
    shape = (1, 8, 1, 1)
    raw, carry = torch.full(shape, 3.0, dtype=dtype), torch.full(shape, 5.0, dtype=dtype)
    y = select.load("cpp").highway_forward(LazyMap(raw), LazyMap(gate.view(shape)), carry).flatten()
    torch.testing.assert_close(y, torch.lerp(carry, raw, gate.view(shape).sigmoid()).flatten(), equal_nan=True)
    assert y[:4].tolist() == [3.0, 3.0, 5.0, 5.0] and y[4].isnan()


def test_the_join_is_one_pass_each_way():
    """Beside convolutions and steps of C numbers, a highway is one pass forward and one backward."""
    calls: list[str] = []

    class Counting(Wrapped):
        def call(self, primitive: str, *args: object, **kwargs: object) -> object:
            if not primitive.startswith(("conv_", "bn_")):
                calls.append(primitive)
            return super().call(primitive, *args, **kwargs)

    block = HighwayBlock(5, gate_norm=True)
    with fusedres.use_backend("eager"), select.observe(Counting):
        block(torch.randn(2, 5, 4, 4, requires_grad=True)).sum().backward()
    assert calls == ["highway_forward", "highway_backward"]


def test_a_highway_keeps_its_input_and_two_raw_maps():
    """Neither its output, nor its gate, nor its candidate is kept for backward."""
    served("cpp", torch.float32)
    block, x = HighwayBlock(6, gate_norm=True), torch.randn(3, 6, 8, 8).to(memory_format=torch.channels_last)
    kept: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        if t.dim() == 4 and t.shape[0] == 3:
            kept.add(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), fusedres.use_backend("cpp"):
        y = block(x)
    assert len(kept) == 3 and x.data_ptr() in kept and y.data_ptr() not in kept


# ---- the modules as modules ------------------------------------------------------------------------------------------


def test_a_fresh_highway_mostly_carries():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    for gate_norm in (False, True):
        shut = HighwayBlock(8, gate_bias=-30.0, gate_norm=gate_norm)
        torch.testing.assert_close(shut(x), x)
        assert (HighwayBlock(8, gate_norm=gate_norm).eval()(x) - x).norm() < (
            HighwayBlock(8, gate_bias=3.0).eval()(x) - x
        ).norm()


def test_a_plain_network_of_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    served("cpp", torch.float32)
    model = torchvision.models.ResNet(PlainBlock, [1, 1, 1, 1], num_classes=3)
    assert not any("downsample" in name for name, _ in model.named_modules())
    fusedres.convert(model)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert_fused(model, "cpp")
    assert [row.kind for row in fusedres.report(model)].count("plain block") == 4


@pytest.mark.parametrize(
    "build", [lambda: HighwayBlock(5, gate_norm=True), lambda: PlainBlock(5, 5)], ids=["highway", "plain"]
)
def test_hooks_autocast_copies_and_double_backward(build):
    served("cpp", torch.float32)
    torch.manual_seed(0)
    block = build().eval()
    twin = copy.deepcopy(block)
    twin.__class__ = {HighwayBlock: _PlainHighway, PlainBlock: _PlainPlain}[type(block)]
    x = torch.randn(2, 5, 4, 4)
    wanted = twin(x)
    for made in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(made(x), wanted)
        assert made._fusedres.outcome.backend == "cpp"
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x.bfloat16())
    assert y.dtype == torch.bfloat16 and block._fusedres.outcome.backend == "cpp"
    torch.testing.assert_close(y.float(), wanted, rtol=0.1, atol=0.1)
    seen = []
    handle = block.conv1.register_forward_hook(lambda m, i, o: seen.append(o))
    torch.testing.assert_close(block(x), wanted)
    assert len(seen) == 1 and "hook" in block._fusedres.outcome.reason
    handle.remove()

    def second(model: nn.Module) -> list[Tensor]:
        leaf = x.double().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [leaf, *model.parameters()]))

    for backend in ("eager", "cpp"):
        with fusedres.use_backend(backend):
            pairs = zip(second(block.double().train()), second(twin.double().train()), strict=True)
        assert block._fusedres.outcome.backend == backend
        for a, b in pairs:
            torch.testing.assert_close(a, b)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="odd kernel_size"):
        HighwayBlock(4, 2)
    with pytest.raises(ValueError, match="base_width=64"):
        PlainBlock(4, 4, base_width=32)


# ---- the functional forms --------------------------------------------------------------------------------------------


def unit(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, act: str) -> functional.Unit:
    norm = None if bn is None else functional.Norm(bn.weight, bn.bias, None, None, True, 0.0, bn.eps, act)
    geometry = functional.Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)
    return functional.Unit(functional.Conv(conv.weight, conv.bias, geometry), norm)


def test_the_functional_forms():
    torch.manual_seed(0)
    highway, plain = _PlainHighway(5).double(), _PlainPlain(5, 6, 2).double()
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    candidate, gate = unit(highway.conv1, highway.bn1, "relu"), unit(highway.gate, None, "none")
    torch.testing.assert_close(functional.highway_block(x, (candidate,), gate), highway(x))
    units = unit(plain.conv1, plain.bn1, "relu"), unit(plain.conv2, plain.bn2, "relu")
    torch.testing.assert_close(functional.plain_block(x, units), plain(x))
    # a candidate of two convolutions, without BatchNorm behind the last
    wanted = F.conv2d(F.relu(highway.bn1(highway.conv1(x))), highway.gate.weight, padding=1)
    t = highway.gate(x).sigmoid()
    second = functional.Unit(functional.Conv(highway.gate.weight, None, candidate.conv.geometry), None)
    torch.testing.assert_close(functional.highway_block(x, (candidate, second), gate), t * wanted + (1 - t) * x)


def test_highways_that_do_not_fit_say_why():
    x = torch.randn(2, 5, 6, 4)
    highway, plain = _PlainHighway(5), _PlainPlain(5, 5, 2)
    candidate, gate = unit(highway.conv1, highway.bn1, "relu"), unit(highway.gate, None, "none")
    strided = unit(plain.conv1, plain.bn1, "relu")
    with pytest.raises(ValueError, match="its gate gives"):
        functional.highway_block(x, (strided,), gate)
    with pytest.raises(ValueError, match="carries"):
        functional.highway_block(x, (strided,), unit(plain.conv1, None, "none"))
    with pytest.raises(ValueError, match="in front of its sigmoid"):
        functional.highway_block(x, (candidate,), candidate)
