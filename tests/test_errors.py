"""What goes wrong is an error of the right type that says what was found, and leaves no trace in the statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusedres
import fusedres.functional as F
from fusedres.backends import select
from fusedres.functional import Conv, Geometry, Layer, Norm, Pool, Unit

resnet = pytest.importorskip("torchvision.models.resnet")
densenet = pytest.importorskip("torchvision.models.densenet")

CHANNELS = 6
BLOCKS = {
    "basic": lambda: resnet.BasicBlock(CHANNELS, CHANNELS),
    "bottleneck": lambda: resnet.Bottleneck(CHANNELS, 3, 2, nn.Sequential(nn.Conv2d(CHANNELS, 12, 1, 2), nn.BatchNorm2d(12))),
    "dense": lambda: densenet._DenseBlock(2, CHANNELS, bn_size=2, growth_rate=5, drop_rate=0.0),
    "transition": lambda: densenet._Transition(CHANNELS, 3),
    "conv": lambda: nn.Sequential(nn.Conv2d(CHANNELS, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()),
}  # fmt: skip
each_block = pytest.mark.parametrize("name", BLOCKS)
SERVED = fusedres.backends()["cpp"] == "available"
CHOSEN = select.load("cpp") if SERVED else None


def converted(name: str) -> nn.Module:
    return fusedres.convert(BLOCKS[name]())


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def fails(module: nn.Module, x: torch.Tensor, kind: type[Exception], words: str) -> str:
    """Assert that ``module(x)`` raises ``kind`` with ``words`` and changes no buffer; returns the message."""
    before = buffers(module)
    with pytest.raises(kind, match=words) as raised:
        module(x)
    for name, value in buffers(module).items():
        assert torch.equal(value, before[name]), f"{name} has changed"
    return str(raised.value)


def fails_as_plain(name: str, x: torch.Tensor, place: str = "cpu") -> None:
    """Assert that the converted block raises what the plain one raises and changes no running statistic.

    Where a block begins with a BatchNorm, torch counts the batch before it looks at its input: then the plain block's count is right.
    """
    plain = BLOCKS[name]().to(place)
    model = fusedres.convert(copy.deepcopy(plain))
    before = buffers(model)
    with pytest.raises((RuntimeError, ValueError, IndexError)) as theirs:
        plain(x)
    with pytest.raises(theirs.type) as ours:
        model(x)
    assert str(ours.value) == str(theirs.value)
    if place == "meta":
        return
    for key, value in buffers(model).items():
        expected = plain.get_buffer(key) if "num_batches_tracked" in key else before[key]
        assert torch.equal(value, expected), f"{key} has changed"


# ---- inputs ----------------------------------------------------------------------------------------------------------


@each_block
def test_an_integer_input_is_torchs_error(name):
    fails_as_plain(name, torch.ones(2, CHANNELS, 6, 6, dtype=torch.int64))


# the BatchNorm at the head of a pre-activation block takes other dtypes, and torch updates its statistics before the convolution fails
@pytest.mark.parametrize("name", ["basic", "bottleneck", "conv"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)
def test_an_input_of_another_dtype_is_torchs_error(name, dtype):
    fails_as_plain(name, torch.ones(2, CHANNELS, 6, 6, dtype=dtype))


@each_block
@pytest.mark.parametrize("channels", [CHANNELS - 1, CHANNELS + 1, 2 * CHANNELS])
def test_a_channel_mismatch_is_torchs_error(name, channels):
    fails_as_plain(name, torch.randn(2, channels, 6, 6))


@each_block
@pytest.mark.parametrize("shape", [(CHANNELS,), (2, CHANNELS), (2, CHANNELS, 6, 6, 6)], ids=["1-d", "2-d", "5-d"])
def test_an_input_that_is_no_map_is_torchs_error(name, shape):
    fails_as_plain(name, torch.randn(shape))


@each_block
@pytest.mark.parametrize(
    ("input_on", "module_on"), [("meta", "cpu"), ("cpu", "meta")], ids=["meta-input", "meta-module"]
)
def test_a_mix_of_devices_is_torchs_error(name, input_on, module_on):
    fails_as_plain(name, torch.randn(2, CHANNELS, 6, 6, device=input_on), module_on)


@pytest.mark.skipif(not SERVED, reason="needs the C++ extension")
@each_block
def test_one_value_per_channel_in_training_is_an_error(name):
    module = converted(name)
    x = torch.randn(1, CHANNELS, 1, 1)
    fails(module, x, ValueError, "more than 1 value per channel when training")
    if name == "transition":
        return  # its window does not fit one pixel
    with torch.no_grad():
        assert module.eval()(x).isfinite().all()


@pytest.mark.skipif(not SERVED, reason="needs the C++ extension")
def test_one_value_per_channel_behind_the_stride_leaves_the_norms_in_front_untouched():
    module = converted("bottleneck")
    fails(module, torch.randn(1, CHANNELS, 2, 2), ValueError, "more than 1 value per channel when training")


@each_block
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_an_empty_batch_does_what_the_plain_modules_do(name, training):
    plain = BLOCKS[name]().train(training)
    model = fusedres.convert(copy.deepcopy(plain))
    outcomes = []
    for module in (plain, model):
        x = torch.randn(0, CHANNELS, 6, 6, requires_grad=True)
        try:
            y = module(x)
            y.sum().backward()
            outcomes.append((y.shape, x.grad.shape))
        except (RuntimeError, ValueError) as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]
    for (key, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), key


# ---- backends --------------------------------------------------------------------------------------------------------


def test_an_unknown_backend_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match="unknown backend 'vulkan'.*triton, cuda, cpp, eager.*'auto' or None"):
        fusedres.use_backend("vulkan")
    assert select.resolve(torch.device("cpu"), torch.float32) is CHOSEN  # the choice is as it was


@each_block
def test_a_backend_that_cannot_serve_says_why(name):
    module = converted(name).double()
    with fusedres.use_backend("triton"):
        message = fails(
            module, torch.randn(2, CHANNELS, 6, 6).double(), fusedres.BackendError, "'triton' was asked for"
        )
    assert "float64" in message and 'use_backend("auto")' in message


def test_the_choice_of_a_backend_ends_with_its_with():
    device, dtype = torch.device("cpu"), torch.float32
    with pytest.raises(ZeroDivisionError), fusedres.use_backend("eager"):
        with fusedres.use_backend("auto"):
            assert select.resolve(device, dtype) is CHOSEN
        assert select.resolve(device, dtype).name == "eager"
        raise ZeroDivisionError
    assert select.resolve(device, dtype) is CHOSEN


# ---- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [None, [nn.ReLU()], torch.zeros(2), nn.ReLU], ids=["None", "list", "tensor", "class"])
@pytest.mark.parametrize("function", [fusedres.convert, fusedres.revert, fusedres.report], ids=lambda f: f.__name__)
def test_what_is_no_module_is_a_type_error(function, thing):
    with pytest.raises(TypeError, match=f"{function.__name__} expects a torch.nn.Module, found {type(thing).__name__}"):
        function(thing)


@pytest.mark.parametrize("function", [fusedres.convert, fusedres.revert], ids=lambda f: f.__name__)
def test_a_module_without_blocks_is_left_as_it_is(function):
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert function(module) is module and type(module) is nn.Sequential
    assert str(fusedres.report(module)) == "fusedres: no residual or dense block found"


# ---- functions -------------------------------------------------------------------------------------------------------


def geometry(**changes) -> Geometry:
    return Geometry(**({"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1} | changes))


def norm(channels: int, **changes) -> Norm:
    values = {
        "weight": torch.ones(channels), "bias": torch.zeros(channels), "running_mean": torch.zeros(channels),
        "running_var": torch.ones(channels), "training": True, "momentum": 0.1, "eps": 1e-5, "act": "relu",
    }  # fmt: skip
    return Norm(**(values | changes))


def unit(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    *,
    channels: int | None = None,
    dtype=torch.float32,
    act="relu",
    **changes,
) -> Unit:
    weight = torch.randn(outputs, inputs, kernel, kernel, dtype=dtype)
    shape = geometry(padding=(kernel // 2, kernel // 2), **changes)
    return Unit(Conv(weight, None, shape), norm(channels or outputs, act=act))


def pointwise(inputs: int, outputs: int) -> Conv:
    return Conv(torch.randn(outputs, inputs, 1, 1), None, geometry(padding=(0, 0)))


X = torch.randn(2, 6, 5, 7)
MEAN, MAX = Pool("mean", (2, 2), (2, 2), (0, 0)), Pool("max", (9, 9), (1, 1), (0, 0))
MISUSES = {
    "three-dimensional": (lambda u: F.conv_bn_act(X[0], u), unit(6, 5), "shape"),
    "empty": (lambda u: F.conv_bn_act(X[:0], u), unit(6, 5), "non-empty"),
    "channels": (lambda u: F.conv_bn_act(X, u), unit(4, 5), "expects 4 channels and finds 6"),
    "channels-of-a-norm": (lambda u: F.conv_bn_act(X, u), unit(6, 5, channels=3), "BatchNorm of 3 channels .* meets 5"),
    "dtype": (lambda u: F.conv_bn_act(X, u), unit(6, 5, dtype=torch.float64), "float32, its weights torch.float64"),
    "kernel": (lambda u: F.conv_bn_act(X, u), unit(6, 5, 9, dilation=(9, 9)), "kernel larger than its padded input"),
    "pool": (lambda u: F.conv_bn_act(X, u, MAX), unit(6, 5), "pooling window larger"),
    "identity": (lambda u: F.residual_block(X, (u,)), unit(6, 5, act="none"), "its shortcut gives .*6.* main path .*5"),
    "activation": (lambda u: F.residual_block(X, (u,)), unit(6, 6), "an activation in front of the addition"),
    "second-unit": (lambda u: F.residual_block(X, (unit(6, 6), u)), unit(5, 6), "expects 5 channels and finds 6"),
    "projection": (
        lambda u: F.residual_block(X, (unit(6, 5, act="none"),), u), unit(6, 4, 1, act="none"),
        "its shortcut gives .*4.* main path",
    ),
    "projection-stride": (
        lambda u: F.residual_block(X, (unit(6, 5, act="none"),), u), unit(6, 5, 1, stride=(2, 2), act="none"),
        "its shortcut gives",
    ),
    "dense-channels": (
        lambda u: F.dense_block(X, (Layer(norm(6), pointwise(6, 4), norm(4), u.conv),)), unit(3, 5), "expects 3 channels",
    ),
    "dense-norm": (
        lambda u: F.dense_block(X, (Layer(norm(7), pointwise(6, 4), u.norm, u.conv),)), unit(4, 5), "BatchNorm of 7",
    ),
    "dense-size": (
        lambda u: F.dense_block(X, (Layer(norm(6), pointwise(6, 4), norm(4), u.conv),)),
        unit(4, 5, stride=(2, 2)), "spatial size",
    ),
    "transition-norm": (lambda u: F.transition(X, u.norm, MEAN), unit(6, 5), "BatchNorm of 5 channels"),
    "transition-conv": (lambda u: F.transition(X, norm(6), MEAN, u.conv), unit(5, 3, 1), "expects 5 channels"),
    "transition-pool": (
        lambda u: F.transition(X, u.norm, MEAN._replace(kernel=(9, 9), stride=(9, 9))), unit(1, 6), "window larger",
    ),
    "one-value": (lambda u: F.conv_bn_act(X[:1, :, :1, :1], u), unit(6, 5), "more than 1 value per channel"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_functions_check_before_they_compute(name):
    call, unit_, words = MISUSES[name]
    with pytest.raises(ValueError, match=words):
        call(unit_)
    assert unit_.norm.running_mean.eq(0).all() and unit_.norm.running_var.eq(1).all()


def test_functions_refuse_devices_that_hold_no_values():
    with pytest.raises(ValueError, match="cpu.*meta|meta.*cpu"):
        F.conv_bn_act(X.to("meta"), unit(6, 5))
