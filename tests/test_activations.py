"""Activations beyond ReLU, inside every kind of block and on every backend: against plain PyTorch by the rule of :mod:`fusedres.testing`,
at their kinks exactly, and recognised however a model spells them."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
import types
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from support import each_mode, ran, served
from torch import Tensor, nn

import fusedres
from fusedres import activations, functional
from fusedres.backends import select
from fusedres.blocks import parts_of
from fusedres.errors import BackendError, Unsupported
from fusedres.functional import Conv, Geometry, Norm, Pool, Unit
from fusedres.operands import Epilogue, LazyGrad, LazyMap
from fusedres.specs import instances
from fusedres.swap import FusedBlock
from fusedres.testing import assert_parity, compare

pytestmark = [
    pytest.mark.usefixtures("proven_once"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("uninitialised_memory_is_nan"),
]

MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu6": nn.ReLU6,
    "leaky_relu:0.1": lambda: nn.LeakyReLU(0.1, inplace=True),
    "leaky_relu:-0.5": lambda: nn.LeakyReLU(-0.5),
    "hardswish": nn.Hardswish,
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "mish": nn.Mish,
}
KINKS = {"relu6": (0.0, 6.0), "leaky_relu:0.1": (0.0,), "leaky_relu:-0.5": (0.0,), "hardswish": (-3.0, 3.0)}
SHAPE = (2, 5, 7, 6)


def slow(*values: object):
    return pytest.param(*values, marks=pytest.mark.slow)


each_act = pytest.mark.parametrize("act", MODULES)


def converted(module: nn.Module) -> list[str]:
    fusedres.convert(module)
    return [name for name, m in module.named_modules() if isinstance(m, FusedBlock)]


# ---- blocks ----------------------------------------------------------------------------------------------------------


class Basic(nn.Module):
    """Post-activation, with an identity or projected shortcut."""

    def __init__(self, act: nn.Module, inplanes: int = 5, planes: int = 5, kernel: int = 3, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, kernel, padding=kernel // 2, bias=False)
        self.bn1, self.bn2, self.act = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes), act
        self.downsample = nn.Identity()
        if inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(h)) + self.downsample(x))


class PreAct(nn.Module):
    """Pre-activation, with an identity shortcut or a projection of the activated input."""

    def __init__(self, act: nn.Module, inplanes: int = 5, planes: int = 5) -> None:
        super().__init__()
        self.bn1, self.bn2, self.act = nn.BatchNorm2d(inplanes), nn.BatchNorm2d(planes), act
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.downsample = nn.Conv2d(inplanes, planes, 1, bias=False) if inplanes != planes else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(h)
        return self.conv2(self.act(self.bn2(self.conv1(h)))) + shortcut


class DenseLayer(nn.Module):
    def __init__(self, act: nn.Module, inplanes: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.bn2, self.act = nn.BatchNorm2d(inplanes), nn.BatchNorm2d(4), act
        self.conv1 = nn.Conv2d(inplanes, 4, 1, bias=False)
        self.conv2 = nn.Conv2d(4, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))], 1)


def row(act: nn.Module, *behind: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(5, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), act, *behind)


BLOCKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "basic": Basic,
    "pre-activation": PreAct,
    "dense": lambda act: nn.Sequential(DenseLayer(act, 5, 3), DenseLayer(copy.deepcopy(act), 8, 2)),
    "row": row,
}
MORE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "basic-projection": lambda act: Basic(act, 5, 6),
    "pre-activation-projection": lambda act: PreAct(act, 5, 6),
    "stem": lambda act: row(act, nn.MaxPool2d(3, 2, 1)),
    "transition": lambda act: nn.Sequential(nn.BatchNorm2d(5), act, nn.Conv2d(5, 3, 1), nn.AvgPool2d(2)),
}


def build(block: str, act: str) -> nn.Module:
    return (BLOCKS | MORE)[block](MODULES[act]())


@each_mode
@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("block", BLOCKS)
@each_act
def test_a_block_equals_its_plain_modules(act, block, backend, training):
    served(backend, torch.float64)
    compare(functools.partial(build, block, act), SHAPE, torch.float64, backend, training, draws=1)


@each_mode
@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("block", MORE)
@pytest.mark.parametrize("act", ["silu", slow("relu6")])
def test_more_blocks_equal_their_plain_modules(act, block, backend, training):
    served(backend, torch.float64)
    compare(functools.partial(build, block, act), SHAPE, torch.float64, backend, training, draws=1)


@pytest.mark.parametrize("training", [True, slow(False)], ids=["training", "inference"])
@pytest.mark.parametrize("block", ["basic", *map(slow, ("pre-activation", "dense", "row"))])
@each_act
def test_a_block_is_as_exact_as_eager_in_float32(act, block, training):
    served("cpp", torch.float32)
    compare(functools.partial(build, block, act), SHAPE, torch.float32, "cpp", training)


@pytest.mark.slow
@pytest.mark.parametrize("block", MORE)
@pytest.mark.parametrize("act", ["silu", "leaky_relu:0.1"])
def test_more_blocks_are_as_exact_as_eager_in_float32(act, block):
    served("cpp", torch.float32)
    compare(functools.partial(build, block, act), SHAPE, torch.float32, "cpp")


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_trains_in_bfloat16(block):
    served("cpp", torch.bfloat16)
    compare(functools.partial(build, block, "silu"), SHAPE, torch.bfloat16, "cpp")


@pytest.mark.parametrize("act", ["silu", slow("hardswish")])
def test_winograd_tiles_and_several_vectors_of_channels(act):
    served("cpp", torch.float32)
    block = lambda: Basic(MODULES[act](), 48, 48)  # noqa: E731
    compare(block, (2, 48, 15, 13), torch.float32, "cpp", draws=2)


def test_recomputing_gives_the_same_step():
    served("cpp", torch.float64)
    block = lambda: Basic(nn.SiLU(), kernel=1)  # noqa: E731
    compare(block, SHAPE, torch.float64, "cpp", recompute=True, draws=1)


@pytest.mark.parametrize(
    ("act", "block"),
    [(act, block) if (act, block) == ("silu", "basic") else slow(act, block) for act in MODULES for block in BLOCKS],
)
def test_a_block_trains_on_triton(act, block):
    served("triton", torch.float32)
    compare(functools.partial(build, block, act), (1, 5, 5, 4), torch.float32, "triton", draws=1)


@pytest.mark.slow
@pytest.mark.parametrize("block", ["stem", "transition", "pre-activation-projection"])
def test_more_blocks_train_on_triton(block):
    served("triton", torch.float32)
    compare(functools.partial(build, block, "silu"), (1, 5, 6, 4), torch.float32, "triton", draws=1)


@pytest.mark.parametrize("act", ["silu", slow("gelu")])
def test_a_block_infers_on_triton(act):
    served("triton", torch.float32)
    compare(functools.partial(build, "basic", act), (1, 5, 5, 4), torch.float32, "triton", False, draws=1)


@pytest.mark.parametrize("block", ["basic", "pre-activation", "dense"])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "leaky_relu:0.1"])
def test_double_backward_on_eager(act, block):
    torch.manual_seed(0)
    model = build(block, act).double()
    x = torch.rand(SHAPE, dtype=torch.float64)

    def second(model: nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [leaf, *model.parameters()], allow_unused=True))

    wanted = second(copy.deepcopy(model))
    with fusedres.use_backend("eager"):
        found = second(fusedres.convert(model))
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


# ---- values ----------------------------------------------------------------------------------------------------------


def points(act: str, dtype: torch.dtype) -> Tensor:
    """A map whose values lie around the kinks of ``act``, exactly on them, and far out; with odd sizes."""
    exact = [kink + step for kink in KINKS.get(act, (0.0,)) for step in (-0.5, -0.125, 0.0, 0.125, 0.5)]
    values = [*exact, 0.0, -0.0, 20.0, -20.0, 95.0, -95.0, 1e4, -1e4, *torch.linspace(-9, 9, 2000).tolist()]
    values += [0.0] * (-len(values) % 35)
    x = torch.tensor(values, dtype=dtype).view(1, 5, 7, -1)
    return x.contiguous(memory_format=torch.channels_last)


def load(backend: str, dtype: torch.dtype):
    served(backend, dtype)
    return select.get(backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("eager", torch.float32), ("cpp", torch.float32), ("cpp", torch.float64), ("triton", torch.float32)],
    ids=["eager", "cpp-float32", "cpp-float64", "triton"],
)
@each_act
def test_every_primitive_is_torchs_function_at_its_kinks_and_far_out(act, backend, dtype):
    """Value and derivative, alone and in each place where a primitive applies them."""
    primitives, x = load(backend, dtype), points(act, dtype)
    c = x.shape[1]
    grad = torch.linspace(0.5, 1.5, x.numel(), dtype=dtype).view(x.shape).contiguous(memory_format=torch.channels_last)
    scale_shift = torch.stack([torch.ones(c), torch.zeros(c)]).to(dtype)
    plain = LazyMap(x, scale_shift)
    lazy, zero = plain._replace(act=act), LazyMap(torch.zeros_like(x))
    weight = torch.eye(c, dtype=dtype).view(c, c, 1, 1)
    geometry, window = Geometry((1, 1), (0, 0), (1, 1), 1), Pool("max", (1, 1), (1, 1), (0, 0))

    def torchs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = MODULES[act]()(leaf * 1)  # some are in place
        return y.detach(), torch.autograd.grad(y, leaf, grad.to(dtype))[0]

    values = {
        "no addition": primitives.add_act_forward(plain, None, act),
        "an addition": primitives.add_act_forward(plain, zero, act),
        "a prologue": primitives.conv_forward(lazy, weight, None, geometry),
        "an epilogue": primitives.conv_forward(LazyMap(x), weight, None, geometry, Epilogue(act=act)),
        "a pool": primitives.pool_forward(lazy, window)[0],
    }
    index = primitives.pool_forward(lazy, window)[1]
    coeff = torch.tensor([[1.0], [0.0], [0.0]], dtype=dtype).expand(3, c).contiguous()
    gradients = {
        "no addition": primitives.add_act_backward(grad, plain, None, act),
        "an addition": primitives.add_act_backward(grad, plain, zero, act),
        "a convolution": primitives.conv_backward(LazyGrad(grad), lazy, weight, geometry, need_dw=False)[0],
        "behind a convolution": primitives.dgrad_epilogue(grad.clone(), lazy),
        "a pool": primitives.pool_backward(grad, index, lazy, window, coeff=coeff),
    }
    (value, gradient), (true_value, true_gradient) = torchs(dtype), torchs(torch.float64)
    for where, found in values.items():
        assert_parity(found, value, true_value, where)
    for where, found in gradients.items():
        assert_parity(found, gradient, true_gradient, where)
    kinks = functools.reduce(torch.logical_or, [x == kink for kink in KINKS.get(act, ())], torch.zeros_like(x) > 0)
    assert kinks.any() == (act in KINKS)
    for where, found in gradients.items():
        assert torch.equal(found[kinks], gradient[kinks]), where


@pytest.mark.parametrize("capability", ["default", slow("avx2"), "avx512"])
def test_values_and_derivatives_are_exact_to_roundings_on_every_instruction_set(capability, tmp_path):
    """In float32, from -12 to 12: a few units in the last place of the argument for values, of 1 for derivatives."""
    served("cpp", torch.float32)
    from fusedres import _C

    if capability not in _C.cpu_capabilities():
        pytest.skip(f"this CPU has no {capability}")
    code = """if True:
        import sys, torch
        from fusedres.backends.cpp import BACKEND as cpp
        from fusedres.operands import LazyMap
        x = torch.linspace(-12, 12, 70007).view(1, 1, 1, -1).contiguous(memory_format=torch.channels_last)
        a, one = torch.tensor([[1.0], [0.0]]), torch.ones_like(x)
        z = LazyMap(x, a)
        found = {act: (cpp.add_act_forward(z, None, act), cpp.add_act_backward(one, z, None, act)) for act in sys.argv[2:]}
        torch.save((x, found), sys.argv[1])
    """
    out = tmp_path / "values.pt"
    environment = {**os.environ, "FUSEDRES_CPU_CAPABILITY": capability}
    done = forked.python(["-P", "-c", code, str(out), *MODULES], env=environment)
    assert done.returncode == 0, done.stderr
    x, found = torch.load(out)
    x, eps = x.double(), torch.finfo(torch.float32).eps
    for act, (y, dy) in found.items():
        wrong = (y.double() - activations.value(x, act)).abs() > 2 * eps * x.abs().clamp(min=1e-3)
        assert not wrong.any(), f"{act} at {x[wrong]}"
        wrong = (dy.double() - activations.gradient(torch.ones_like(x), x, act)).abs() > 4 * eps
        assert not wrong.any(), f"{act}' at {x[wrong]}"


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@each_act
def test_nan_passes(act, backend):
    primitives = load(backend, torch.float32)
    # whole vectors: behind the last of them torch gives hardswish another derivative at NaN
    x = torch.randn(1, 3, 8, 16).contiguous(memory_format=torch.channels_last)
    x[0, 1, 2, 3] = torch.nan
    z, one = LazyMap(x, torch.tensor([[1.0] * 3, [0.0] * 3])), torch.ones_like(x)
    y = primitives.add_act_forward(z, None, act)
    dz = primitives.add_act_backward(one, z, None, act)
    assert torch.equal(y.isnan(), x.isnan())
    wanted = activations.gradient(one, x, act)
    assert torch.equal(dz.isnan(), wanted.isnan())


# ---- recognition -----------------------------------------------------------------------------------------------------


class TwoConvs(nn.Module):
    """What is in a block whose activation is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(5, 5, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(5), nn.BatchNorm2d(5)


# as they stand in a forward
CALLS = {
    "relu6": "F.relu6({})",
    "relu6 in place": "F.relu6({}, True)",
    "hardtanh": "F.hardtanh({}, 0, 6)",
    "hardtanh_": "F.hardtanh_({}, min_val=0.0, max_val=6.0)",
    "leaky_relu": "F.leaky_relu({})",
    "leaky_relu with a slope": "F.leaky_relu({}, negative_slope=0.2, inplace=True)",
    "leaky_relu_": "F.leaky_relu_({}, 0.2)",
    "silu": "F.silu({})",
    "silu in place": "F.silu({}, inplace=True)",
    "hardswish": "F.hardswish({})",
    "gelu": "F.gelu({})",
    "mish": "F.mish({})",
    "gelu by tanh": "F.gelu({}, approximate='tanh')",
}


def block_of(folder: Path, *lines: str) -> Callable[[], nn.Module]:
    """A block whose forward consists of these lines, as a file holds it."""
    file = folder / "block.py"
    body = "".join(f"        {line}\n" for line in lines)
    file.write_text(f"import torch.nn.functional as F\n\n\nclass Block:\n    def forward(self, x):\n{body}")
    spec = importlib.util.spec_from_file_location("block", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return type("Block", (TwoConvs,), {"forward": module.Block.forward})


@pytest.mark.parametrize("name", CALLS)
def test_functions_are_recognised(name, tmp_path):
    first, second = CALLS[name].format("self.bn1(self.conv1(x))"), CALLS[name].format("self.bn2(self.conv2(h)) + x")
    compare(block_of(tmp_path, f"h = {first}", f"return {second}"), SHAPE, torch.float64, "eager", draws=1)


@pytest.mark.parametrize("name", ["relu6 in place", "hardtanh_", "leaky_relu_", "silu in place"])
def test_a_function_in_place_on_the_input_is_seen_by_what_reads_it_later(name, tmp_path):
    """The shortcut adds what the function has left, and so does the caller find it."""
    torch.manual_seed(0)
    plain = block_of(tmp_path, f"return self.bn1(self.conv1({CALLS[name].format('x')})) + x")()
    results = []
    for model in (plain, fusedres.convert(copy.deepcopy(plain))):
        x = 4 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        results.append((model(x), x))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "act", [nn.Softplus(), nn.Hardtanh(), nn.ELU(), nn.PReLU(), nn.Sigmoid()], ids=lambda a: type(a).__name__
)  # fmt: skip
def test_other_activations_leave_the_block_alone_and_report_says_so(act):
    block = fusedres.nn.BasicBlock(5, 5)
    block.relu = act
    x = torch.randn(SHAPE)
    torch.testing.assert_close(block(x), super(FusedBlock, block).forward(x))
    (described,) = fusedres.report(block)
    assert not described.fused and type(act).__name__ in described.detail
    assert converted(Basic(act)) == []


def test_a_grouped_convolution_is_fused_with_any_of_them():
    served("cpp", torch.float64)
    compare(lambda: Basic(nn.SiLU(), 6, 6, groups=2), (2, 6, 5, 7), torch.float64, "cpp", draws=1)


def test_a_depthwise_convolution_is_fused_with_any_of_them():
    served("cpp", torch.float64)
    compare(lambda: Basic(nn.Hardswish(), 8, 8, groups=8), (2, 8, 5, 7), torch.float64, "cpp", draws=1)


def test_an_activation_with_a_hook_is_not_fused_away():
    block, seen = fusedres.convert(Basic(nn.SiLU())), []
    block.act.register_forward_hook(lambda m, i, o: seen.append(o))
    with fusedres.use_backend("eager"):
        block(torch.randn(SHAPE))
    assert len(seen) == 2 and "hook" in ran(block)


def test_a_changed_slope_is_read_anew():
    block = fusedres.convert(Basic(nn.LeakyReLU(0.1)).double())
    x = torch.randn(SHAPE, dtype=torch.float64)
    with fusedres.use_backend("eager"):
        for slope in (0.1, 0.7):
            block.act.negative_slope = slope
            torch.testing.assert_close(block.eval()(x), fusedres.revert(copy.deepcopy(block))(x))


@pytest.mark.parametrize(
    "layer", [nn.SiLU, nn.Hardswish, functools.partial(nn.LeakyReLU, 0.2), nn.ReLU6, nn.GELU, nn.Identity]
)
def test_conv_bn_act_takes_any_of_them(layer):
    served("cpp", torch.float64)
    model = fusedres.nn.ConvBNAct(5, 7, activation_layer=layer).double().eval()
    x = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(model(x), nn.Sequential.forward(model, x))
    assert ran(model) == "cpp"


@each_act
def test_functional_blocks_take_a_name(act):
    double = torch.float64
    torch.manual_seed(0)
    weight = torch.randn(5, 5, 3, 3, dtype=double, requires_grad=True)
    conv = Conv(weight, None, Geometry((1, 1), (1, 1), (1, 1), 1))

    def norm(name: str) -> Norm:
        return Norm(None, None, torch.zeros(5, dtype=double), torch.ones(5, dtype=double), True, 0.1, 1e-5, name)

    x = torch.randn(SHAPE, dtype=double)
    y = functional.residual_block(x, (Unit(conv, norm(act)), Unit(conv, norm("none"))), act=act)
    module = MODULES[act]()
    h = module(F.batch_norm(F.conv2d(x, weight, padding=1), None, None, training=True))
    wanted = module(F.batch_norm(F.conv2d(h, weight, padding=1), None, None, training=True) + x)
    torch.testing.assert_close(y, wanted)
    grads = [torch.autograd.grad(result.square().sum(), weight)[0] for result in (y, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("act", ["swish", "leaky_relu", "leaky_relu:much", "silu:1", ""])
def test_an_unknown_name_is_an_error_before_any_statistic_moves(act):
    mean = torch.zeros(5)
    norm = Norm(None, None, mean, torch.ones(5), True, 0.1, 1e-5, act)
    conv = Conv(torch.randn(5, 5, 1, 1), None, Geometry((1, 1), (0, 0), (1, 1), 1))
    with pytest.raises(ValueError, match=f"unknown activation {act!r}.*'leaky_relu:SLOPE'"):
        functional.conv_bn_act(torch.randn(SHAPE), Unit(conv, norm))
    assert not mean.any()


# ---- models ----------------------------------------------------------------------------------------------------------


def fused_report(model: nn.Module, x: Tensor) -> None:
    model(x)
    report = fusedres.report(model)
    assert report and all(described.fused for described in report), str(report)


def acts_inside(model: nn.Module) -> set[str]:
    """The activations of the BatchNorms that run fused."""
    found: set[str] = set()
    for block in model.modules():
        with contextlib.suppress(Unsupported):
            for part in parts_of(block) if isinstance(block, FusedBlock) else ():
                found |= {norm.act for norm in instances(part.describe(None)[0], Norm)}
    return found


@each_mode
@pytest.mark.parametrize(
    "layer",
    ["silu", *map(slow, ("gelu", "hard_swish", "leaky_relu", "relu6", "gelu_tanh"))],
)
def test_timms_resnet18_with_another_activation_runs_fused(layer, training):
    timm = pytest.importorskip("timm")
    served("cpp", torch.float64)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", act_layer=layer, num_classes=3).double().train(training)
    x = torch.randn(2, 3, 40, 36, dtype=torch.float64)
    plain, fused = model(x), fusedres.convert(copy.deepcopy(model))
    assert_parity(fused(x), plain, plain)
    fused_report(fused, x)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", slow("mobilenet_v2"), slow("efficientnet_b0")])
def test_torchvisions_rows_run_fused_with_their_activation(name):
    models = pytest.importorskip("torchvision.models")
    served("cpp", torch.float32)
    model = getattr(models, name)(num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        plain, fused = model(x), fusedres.convert(copy.deepcopy(model))
        torch.testing.assert_close(fused(x), plain, rtol=1e-3, atol=1e-4)
    rows = fusedres.report(fused)
    assert all(described.fused for described in rows), str(rows)
    assert acts_inside(fused) >= {"relu6" if name == "mobilenet_v2" else "silu" if "efficient" in name else "hardswish"}


# ---- what happens without a row ---------------------------------------------------------------------------------------


def test_without_its_row_python_raises(monkeypatch):
    monkeypatch.delitem(activations._TABLE, "mish")
    activations.parse.cache_clear()
    try:
        for call in (activations.parse, lambda act: activations.value(torch.ones(1), act)):
            with pytest.raises(ValueError, match="unknown activation 'mish'"):
                call("mish")
    finally:
        activations.parse.cache_clear()


def test_without_its_row_the_extension_raises(monkeypatch):
    served("cpp", torch.float32)
    from fusedres.backends import cpp

    known = [name for name in cpp._C.activations() if name != "mish"]
    monkeypatch.setattr(cpp, "_C", types.SimpleNamespace(activations=lambda: known))
    cpp._code.cache_clear()
    x = torch.ones(1, 8, 2, 2).to(memory_format=torch.channels_last)
    try:
        with pytest.raises(BackendError, match="no activation 'mish'"):
            cpp.BACKEND.add_act_forward(LazyMap(x), None, "mish")
    finally:
        cpp._code.cache_clear()
