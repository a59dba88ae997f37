"""``fusedres.functional`` and ``fusedres.nn`` against plain torch, and the latter's arguments and keys against torchvision's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import each_mode, ran
from torch import Tensor, nn

import fusedres
from fusedres import functional
from fusedres.backends import select
from fusedres.functional import (
    Conv,
    Geometry,
    Layer,
    Norm,
    Pool,
    Unit,
    conv_bn_act,
    dense_block,
    residual_block,
)
from fusedres.testing import assert_parity, randomize, run_training

torchvision = pytest.importorskip("torchvision")
from torchvision.models import densenet, resnet  # noqa: E402
from torchvision.ops.misc import Conv2dNormActivation  # noqa: E402

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


each_backend = pytest.mark.parametrize("backend", ["eager", "cpp"])


def use(backend: str) -> fusedres.use_backend:
    """``backend``, or a skip where this installation has none."""
    reason = fusedres.backends()[backend]
    if reason != "available":
        pytest.skip(f"{backend}: {reason}")
    return fusedres.use_backend(backend)


# ---- functions -------------------------------------------------------------------------------------------------------


class Tensors:
    """Fresh float64 operands, all of which ask for gradients; ``norms`` collects what training updates."""

    def __init__(self, training: bool) -> None:
        self.training = training
        self.leaves: list[Tensor] = []
        self.norms: list[Norm] = []

    def leaf(self, value: Tensor) -> Tensor:
        self.leaves.append(value.to(DOUBLE).requires_grad_())
        return self.leaves[-1]

    def conv(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, bias: bool = False) -> Conv:
        weight = self.leaf(torch.randn(outputs, inputs, kernel, kernel))
        pad = kernel // 2
        geometry = Geometry((stride, stride), (pad, pad), (1, 1), 1)
        return Conv(weight, self.leaf(torch.randn(outputs)) if bias else None, geometry)

    def norm(self, channels: int, act: str = "relu") -> Norm:
        weight, bias = self.leaf(torch.rand(channels) + 0.5), self.leaf(torch.randn(channels))
        mean, var = torch.randn(channels, dtype=DOUBLE), torch.rand(channels, dtype=DOUBLE) + 0.5
        self.norms.append(Norm(weight, bias, mean, var, self.training, 0.3, 1e-3, act))
        return self.norms[-1]

    def unit(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, act: str = "relu") -> Unit:
        return Unit(self.conv(inputs, outputs, kernel, stride), self.norm(outputs, act))


def plain_conv(x: Tensor, conv: Conv) -> Tensor:
    g = conv.geometry
    return F.conv2d(x, conv.weight, conv.bias, g.stride, g.padding, g.dilation, g.groups)


def plain_norm(x: Tensor, norm: Norm) -> Tensor:
    y = F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
    )
    return y.relu() if norm.act == "relu" else y


def plain_unit(x: Tensor, unit: Unit) -> Tensor:
    return plain_norm(plain_conv(x, unit.conv), unit.norm)


def basic(t: Tensors) -> tuple[Callable, Callable]:
    units = (t.unit(7, 9, 3), t.unit(9, 7, 3, act="none"))
    return lambda x: residual_block(x, units), lambda x: (plain_unit(plain_unit(x, units[0]), units[1]) + x).relu()


def without_act(t: Tensors) -> tuple[Callable, Callable]:
    units = (t.unit(7, 7, 3, act="none"),)
    return lambda x: residual_block(x, units, act="none"), lambda x: plain_unit(x, units[0]) + x


def projected(t: Tensors) -> tuple[Callable, Callable]:
    units = (t.unit(7, 5), t.unit(5, 5, 3, 2), t.unit(5, 12, act="none"))
    shortcut = t.unit(7, 12, 1, 2, act="none")

    def plain(x: Tensor) -> Tensor:
        h = x
        for unit in units:
            h = plain_unit(h, unit)
        return (h + plain_unit(x, shortcut)).relu()

    return lambda x: residual_block(x, units, shortcut), plain


def convolution(t: Tensors) -> tuple[Callable, Callable]:
    unit = t.unit(7, 9, 3, 2)
    return lambda x: conv_bn_act(x, unit), lambda x: plain_unit(x, unit)


def stem(t: Tensors) -> tuple[Callable, Callable]:
    unit, pool = t.unit(7, 9, 3), Pool("max", (3, 3), (2, 2), (1, 1))
    return lambda x: conv_bn_act(x, unit, pool), lambda x: F.max_pool2d(plain_unit(x, unit), 3, 2, 1)


def dense(t: Tensors) -> tuple[Callable, Callable]:
    layers = [Layer(t.norm(7 + 5 * i), t.conv(7 + 5 * i, 6), t.norm(6), t.conv(6, 5, 3, bias=True)) for i in range(3)]

    def plain(x: Tensor) -> Tensor:
        for layer in layers:
            mid = plain_conv(plain_norm(x, layer.norm1), layer.conv1)
            x = torch.cat([x, plain_conv(plain_norm(mid, layer.norm2), layer.conv2)], 1)
        return x

    return lambda x: dense_block(x, tuple(layers)), plain


def transition(t: Tensors) -> tuple[Callable, Callable]:
    norm, conv, pool = t.norm(7), t.conv(7, 4, bias=True), Pool("mean", (2, 2), (2, 2), (0, 0))
    return lambda x: functional.transition(x, norm, pool, conv), lambda x: F.avg_pool2d(
        plain_conv(plain_norm(x, norm), conv), 2
    )


def head(t: Tensors) -> tuple[Callable, Callable]:
    norm, pool = t.norm(7), Pool("mean", (6, 5), (6, 5), (0, 0))
    return lambda x: functional.transition(x, norm, pool), lambda x: plain_norm(x, norm).mean((2, 3), keepdim=True)


FUNCTIONS = {
    "residual_block": basic, "residual_block-without-act": without_act, "residual_block-projection": projected,
    "conv_bn_act": convolution, "conv_bn_act-pool": stem, "dense_block": dense, "transition": transition,
    "transition-without-conv": head,
}  # fmt: skip


@each_backend
@each_mode
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_equals_plain_torch(name, training, backend):
    results = []
    for which in (0, 1):
        torch.manual_seed(0)
        tensors = Tensors(training)
        call = FUNCTIONS[name](tensors)[which]
        x = tensors.leaf(torch.randn(2, 7, 6, 5))
        with use(backend):
            y = call(x)
            # in the blocks' own memory format, in which they could take it for theirs to write into
            grad = torch.randn(y.shape, dtype=DOUBLE).to(memory_format=torch.channels_last)
            before = grad.clone()
            y.backward(grad)
        assert torch.equal(grad, before), "the output's gradient belongs to the caller"
        running = [v for n in tensors.norms for v in (n.running_mean, n.running_var)]
        results.append([y.detach(), *(leaf.grad for leaf in tensors.leaves), *running])
    ours, theirs = results
    assert len(ours) > 3
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert_parity(mine, other, other, f"{name}: result {i}")


@each_backend
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_without_gradients_gives_the_same(name, backend):
    tensors = Tensors(training=False)
    fused, plain = FUNCTIONS[name](tensors)
    x = torch.randn(2, 7, 6, 5, dtype=DOUBLE)
    with torch.no_grad(), use(backend):
        ours = fused(x)
    assert not ours.requires_grad
    theirs = plain(x).detach()
    assert_parity(ours, theirs, theirs)


def test_a_function_runs_eagerly_where_no_backend_serves(monkeypatch):
    monkeypatch.setattr(select, "_choose", lambda device, dtype: None)
    fused, plain = projected(Tensors(training=True))
    x = torch.randn(2, 7, 6, 5, dtype=DOUBLE)
    torch.testing.assert_close(fused(x), plain(x))


# ---- modules ---------------------------------------------------------------------------------------------------------


def shortcut(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


# ours, torchvision's, arguments, keyword arguments, the shape of an input
MODULES: dict[str, tuple[type, type, Callable[[], tuple], dict, tuple[int, ...]]] = {
    "BasicBlock": (fusedres.nn.BasicBlock, resnet.BasicBlock, lambda: (7, 7), {}, (2, 7, 5, 6)),
    "BasicBlock-strided": (
        fusedres.nn.BasicBlock, resnet.BasicBlock, lambda: (7, 9, 2, shortcut(7, 9, 2)), {}, (2, 7, 7, 6),
    ),
    "BasicBlock-norm_layer": (
        fusedres.nn.BasicBlock, resnet.BasicBlock, lambda: (7, 7),
        {"norm_layer": lambda c: nn.BatchNorm2d(c, eps=0.1, affine=False)}, (2, 7, 5, 6),
    ),
    "Bottleneck": (fusedres.nn.Bottleneck, resnet.Bottleneck, lambda: (12, 3), {}, (2, 12, 5, 6)),
    "Bottleneck-strided": (
        fusedres.nn.Bottleneck, resnet.Bottleneck, lambda: (7, 3, 2, shortcut(7, 12, 2)), {}, (2, 7, 7, 6),
    ),
    "Bottleneck-grouped": (
        fusedres.nn.Bottleneck, resnet.Bottleneck, lambda: (16, 4), {"groups": 3, "base_width": 32}, (2, 16, 5, 6),
    ),
    "Bottleneck-dilated": (
        fusedres.nn.Bottleneck, resnet.Bottleneck, lambda: (12, 3), {"dilation": 2}, (2, 12, 7, 6),
    ),
    "DenseBlock": (fusedres.nn.DenseBlock, densenet._DenseBlock, lambda: (3, 7, 2, 5, 0.0), {}, (2, 7, 5, 6)),
    "DenseBlock-memory_efficient": (
        fusedres.nn.DenseBlock, densenet._DenseBlock, lambda: (2, 7, 2, 5, 0.0), {"memory_efficient": True}, (2, 7, 5, 6),
    ),
    "DenseLayer": (fusedres.nn.DenseLayer, densenet._DenseLayer, lambda: (7, 5, 2, 0.0), {}, (2, 7, 5, 6)),
    "Transition": (fusedres.nn.Transition, densenet._Transition, lambda: (11, 5), {}, (2, 11, 7, 6)),
    "ConvBNAct": (fusedres.nn.ConvBNAct, Conv2dNormActivation, lambda: (7, 9), {}, (2, 7, 5, 6)),
    "ConvBNAct-strided": (
        fusedres.nn.ConvBNAct, Conv2dNormActivation, lambda: (7, 9, 5, 2), {"dilation": 2}, (2, 7, 9, 11),
    ),
    "ConvBNAct-depthwise": (fusedres.nn.ConvBNAct, Conv2dNormActivation, lambda: (7, 7), {"groups": 7}, (2, 7, 5, 6)),
    "ConvBNAct-linear": (
        fusedres.nn.ConvBNAct, Conv2dNormActivation, lambda: (7, 9, 1), {"activation_layer": None}, (2, 7, 5, 6),
    ),
}  # fmt: skip
each_module = pytest.mark.parametrize("name", MODULES)


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """Our module and torchvision's, in float64, with the same bits."""
    ours, theirs, arguments, keywords, _ = MODULES[name]
    # torchvision's checkpoint updates the running statistics twice a step, ours once as it does without
    plain = theirs(*arguments(), **{k: v for k, v in keywords.items() if k != "memory_efficient"})
    randomize(plain)
    fused = ours(*arguments(), **keywords)
    fused.load_state_dict(plain.state_dict())
    return fused.double(), plain.double()


@each_module
def test_a_module_has_the_keys_and_shapes_of_torchvisions(name):
    fused, plain = both(name)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    assert {k: v.shape for k, v in fused.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


@each_module
def test_a_module_takes_the_arguments_of_torchvisions(name):
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in MODULES[name][:2])
    # what a fused conv-BN-act has no use for: it is always a BatchNorm, and nothing is computed in place
    expected = [n for n in theirs if "ConvBNAct" not in name or n not in ("norm_layer", "inplace")]
    assert sorted(ours) == sorted(expected)
    assert name.startswith("ConvBNAct") or list(ours) == expected
    for argument in expected:
        assert ours[argument].default == theirs[argument].default, argument


@each_backend
@each_mode
@each_module
def test_a_module_equals_torchvisions(name, training, backend):
    fused, plain = both(name)
    fused.train(training), plain.train(training)
    x = torch.randn(MODULES[name][-1], dtype=DOUBLE)
    with use(backend):
        ours = run_training(fused, x)
    theirs = run_training(plain, x)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if value.is_floating_point():
            assert_parity(value, theirs[key], theirs[key], key)
        else:
            assert torch.equal(value, theirs[key]), key
    # a layer by itself is plain: the block that holds it fuses it
    assert name == "DenseLayer" or ran(fused) == backend


@each_mode
@each_module
def test_the_plain_forward_of_a_module_equals_torchvisions(name, training):
    """What runs where a block cannot be fused: here because of a hook."""
    fused, plain = both(name)
    fused.train(training), plain.train(training)
    for child in list(fused.modules())[1:]:
        child.register_forward_hook(lambda module, inputs, output: None)
    x = torch.randn(MODULES[name][-1], dtype=DOUBLE)
    ours, theirs = run_training(fused, x), run_training(plain, x)
    for key, value in ours.items():
        if value.is_floating_point():
            assert_parity(value, theirs[key], theirs[key], key)
    assert name == "DenseLayer" or "hook" in ran(fused)


@pytest.mark.parametrize(
    ("block", "arguments", "error"),
    [
        ("BasicBlock", {"groups": 2}, ValueError),
        ("BasicBlock", {"base_width": 32}, ValueError),
        ("BasicBlock", {"dilation": 2}, NotImplementedError),
    ],
    ids=["groups", "base_width", "dilation"],
)
def test_a_module_refuses_what_torchvisions_refuses(block, arguments, error):
    for namespace in (resnet, fusedres.nn):
        with pytest.raises(error):
            getattr(namespace, block)(8, 8, **arguments)


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_torchvisions_resnet_is_built_from_our_blocks(block):
    ours = resnet.ResNet(getattr(fusedres.nn, block), [1, 1, 1, 1], num_classes=3).double().eval()
    theirs = resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=3).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 33, 35, dtype=DOUBLE)
    with torch.no_grad(), use("cpp"):
        assert_parity(ours(x), theirs(x), theirs(x))
    report = fusedres.report(ours)
    blocks = [r for r in report if r.kind in ("basic block", "bottleneck")]
    assert len(blocks) == 4 and all(r.fused and r.detail == "cpp" for r in blocks)
    # built so, not converted: there is nothing to revert to
    fusedres.revert(ours)
    assert isinstance(ours.layer1[0], getattr(fusedres.nn, block))


def test_modules_copy_and_save_as_modules_do():
    block = fusedres.nn.DenseBlock(2, 7, 2, 5, 0.0)
    twin = copy.deepcopy(block)
    assert type(twin) is fusedres.nn.DenseBlock
    x = torch.randn(2, 7, 4, 4)
    assert torch.equal(block.eval()(x), twin.eval()(x))
