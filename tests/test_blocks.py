"""Every kind of block, on every backend, dtype and mode, against plain PyTorch by the rule of :mod:`fusedres.testing`.

Sizes and channels are odd wherever the block allows it. Uninitialised memory is NaN throughout, so that reading it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support import served
from torch import Tensor, nn

import fusedres
from fusedres.testing import compare

pytest.importorskip("torchvision")
from torchvision.models import DenseNet  # noqa: E402
from torchvision.models.densenet import _DenseBlock, _Transition  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402

# masked lanes of Triton's interpreter may compute inf - inf, which NumPy reports
pytestmark = [
    pytest.mark.usefixtures("proven_once"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("uninitialised_memory_is_nan"),
]


# ---- blocks ----------------------------------------------------------------------------------------------------------


def projection(
    inplanes: int, planes: int, stride: int = 1, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), norm(planes))


def basic(inplanes: int, planes: int, stride: int = 1, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    shortcut = None if stride == 1 and inplanes == planes else projection(inplanes, planes, stride, norm)
    return BasicBlock(inplanes, planes, stride, shortcut, norm_layer=norm)


def bottleneck(inplanes: int, planes: int, stride: int = 1, norm=nn.BatchNorm2d, **arguments: int) -> nn.Module:
    shortcut = None if stride == 1 and inplanes == 4 * planes else projection(inplanes, 4 * planes, stride, norm)
    return Bottleneck(inplanes, planes, stride, shortcut, norm_layer=norm, **arguments)


def dense(layers: int, channels: int, growth: int) -> nn.Module:
    return _DenseBlock(layers, channels, bn_size=2, growth_rate=growth, drop_rate=0.0)


def conv(channels: int, outputs: int, kernel: int, *, act: bool = True, norm=nn.BatchNorm2d, **arguments) -> nn.Module:
    row = [nn.Conv2d(channels, outputs, kernel, **arguments), norm(outputs)]
    return nn.Sequential(*row, *([nn.ReLU(inplace=True)] if act else []))


def stem() -> nn.Module:
    convolution = nn.Conv2d(3, 9, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(9), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))


def dense_then_transition() -> nn.Module:
    """A transition that takes the statistics which the dense block in front of it has reduced."""
    return nn.Sequential(dense(2, 7, 5), _Transition(17, 6))


def densenet() -> nn.Module:
    """A whole DenseNet, for its head."""
    return DenseNet(growth_rate=5, block_config=(1, 1), num_init_features=6, bn_size=2, num_classes=3)


class Around(nn.Module):
    """``block`` with a forward around it that is not fused."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block


class OfStridedView(Around):
    """Hands the block a view with gaps between pixels and rows."""

    def forward(self, x: Tensor) -> Tensor:
        view = x[:, :, ::2, 1:]
        assert not view.is_contiguous() and not view.is_contiguous(memory_format=torch.channels_last)
        return self.block(view)


class OfChannelSlice(Around):
    """Hands the block some of the channels of a channels_last map, as a dense block would."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.contiguous(memory_format=torch.channels_last)[:, 2:])


class OfChannelsLast(Around):
    """Hands the block its native memory format; the other cases are NCHW."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.contiguous(memory_format=torch.channels_last))


class OfConstant(Around):
    """Asks for no gradient of the block's input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.detach()) + 0 * x.sum()


class TwiceUsed(Around):
    """Uses the block's input and output elsewhere too, so that neither gradient is the block's alone."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return (y * y).sum((1, 2, 3)) + x.sum((1, 2, 3))


class WithFrozenNorms(Around):
    """Keeps some BatchNorms in eval mode, as fine-tuning does; ``which`` of them, in the order of ``modules()``."""

    def __init__(self, block: nn.Module, which: slice = slice(None)) -> None:
        super().__init__(block)
        self.which = which

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for norm in [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)][self.which]:
            norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def frozen(block: nn.Module, *names: str) -> nn.Module:
    """``block`` without gradients for the parameters whose name contains one of ``names``."""
    chosen = [p for n, p in block.named_parameters() if any(name in n for name in names)]
    assert chosen
    for parameter in chosen:
        parameter.requires_grad_(False)
    return block


no_affine = partial(nn.BatchNorm2d, affine=False)
cumulative = partial(nn.BatchNorm2d, momentum=None)
untracked = partial(nn.BatchNorm2d, track_running_stats=False)
other_numbers = partial(nn.BatchNorm2d, eps=0.1, momentum=0.7)

# a block and the shape of its input; the sizes are the smallest that have borders, an interior and a remainder
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "basic": (lambda: basic(9, 9), (2, 9, 5, 7)),
    "basic-projection": (lambda: basic(6, 9), (2, 6, 5, 5)),
    "basic-strided": (lambda: basic(7, 10, 2), (2, 7, 7, 5)),
    "bottleneck": (lambda: bottleneck(12, 3), (2, 12, 5, 7)),
    "bottleneck-projection": (lambda: bottleneck(9, 3), (2, 9, 5, 5)),
    "bottleneck-strided": (lambda: bottleneck(7, 3, 2), (2, 7, 7, 5)),
    "bottleneck-grouped": (lambda: bottleneck(16, 4, groups=3, base_width=16), (2, 16, 5, 7)),
    "bottleneck-grouped-strided": (lambda: bottleneck(10, 4, 2, groups=2, base_width=32), (2, 10, 7, 5)),
    "bottleneck-dilated": (lambda: bottleneck(12, 3, dilation=2), (2, 12, 7, 5)),
    "dense-3-layers-growth-5": (lambda: dense(3, 7, 5), (2, 7, 5, 5)),
    "dense-4-layers-growth-12": (lambda: dense(4, 8, 12), (2, 8, 3, 5)),
    "dense-1-layer": (lambda: dense(1, 5, 3), (2, 5, 5, 3)),
    "transition": (lambda: _Transition(10, 5), (2, 10, 6, 8)),
    "transition-odd": (lambda: _Transition(11, 5), (2, 11, 7, 5)),
    "dense-then-transition": (dense_then_transition, (2, 7, 5, 6)),
    "densenet": (densenet, (2, 3, 17, 21)),
    "stem": (stem, (2, 3, 13, 11)),
    "conv1x1": (lambda: conv(9, 5, 1, bias=False), (2, 9, 5, 7)),
    "conv3x3": (lambda: conv(5, 9, 3, padding=1, bias=False), (2, 5, 5, 7)),
    "conv3x3-no-padding": (lambda: conv(5, 9, 3, bias=False), (2, 5, 5, 7)),
    "conv-depthwise": (lambda: conv(9, 9, 3, padding=1, groups=9, bias=False), (2, 9, 5, 7)),
    "conv-dilated": (lambda: conv(5, 7, 3, padding=2, dilation=2, bias=False), (2, 5, 7, 6)),
    "conv-bias": (lambda: WithFrozenNorms(conv(5, 9, 3, padding=1)), (2, 5, 5, 7)),
    "conv-no-act": (lambda: conv(5, 9, 3, padding=1, bias=False, act=False), (2, 5, 5, 7)),
    "conv-uneven": (
        lambda: conv(5, 7, (3, 1), stride=(1, 2), padding=(1, 0), bias=False),
        (2, 5, 5, 7),
    ),
    "conv-same": (lambda: conv(5, 7, 3, padding="same", dilation=2, bias=False), (2, 5, 7, 5)),
}

# what may vary about every kind, shown on a few of them
VARIANTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "no-affine-basic": (lambda: basic(6, 9, 2, no_affine), (2, 6, 7, 5)),
    "no-affine-bottleneck": (lambda: bottleneck(12, 3, norm=no_affine), (2, 12, 5, 5)),
    "cumulative-average": (lambda: basic(6, 9, 2, cumulative), (2, 6, 7, 5)),
    "untracked-basic": (lambda: basic(6, 9, 2, untracked), (2, 6, 7, 5)),
    "untracked-conv": (lambda: conv(5, 9, 3, bias=False, norm=untracked), (2, 5, 5, 7)),
    "eps-and-momentum": (lambda: bottleneck(9, 3, 1, other_numbers), (2, 9, 5, 5)),
    "frozen-norms-basic": (lambda: WithFrozenNorms(basic(6, 9, 2)), (2, 6, 7, 5)),
    "frozen-norms-bottleneck": (lambda: WithFrozenNorms(bottleneck(12, 3)), (2, 12, 5, 5)),
    "frozen-norms-dense": (lambda: WithFrozenNorms(dense(3, 7, 5)), (2, 7, 5, 5)),
    "frozen-norms-transition": (lambda: WithFrozenNorms(_Transition(11, 5)), (2, 11, 7, 5)),
    "frozen-norms-stem": (lambda: WithFrozenNorms(stem()), (2, 3, 13, 11)),
    "some-frozen-norms-bottleneck": (lambda: WithFrozenNorms(bottleneck(9, 3, 2), slice(0, None, 2)), (2, 9, 7, 5)),
    "other-frozen-norms-bottleneck": (lambda: WithFrozenNorms(bottleneck(9, 3, 2), slice(1, None, 2)), (2, 9, 7, 5)),
    "some-frozen-norms-dense": (lambda: WithFrozenNorms(dense(3, 7, 5), slice(0, None, 2)), (2, 7, 5, 5)),
    "other-frozen-norms-dense": (lambda: WithFrozenNorms(dense(3, 7, 5), slice(1, None, 2)), (2, 7, 5, 5)),
    "first-layer-frozen-dense": (lambda: WithFrozenNorms(dense(3, 7, 5), slice(2)), (2, 7, 5, 5)),
    "last-layer-frozen-dense": (lambda: WithFrozenNorms(dense(3, 7, 5), slice(4, 6)), (2, 7, 5, 5)),
    "some-frozen-norms-then-transition": (lambda: WithFrozenNorms(dense_then_transition(), slice(4)), (2, 7, 5, 6)),
    "no-gradient-of-weights": (lambda: frozen(bottleneck(9, 3, 2), "conv", "downsample.0"), (2, 9, 7, 5)),
    "no-gradient-of-norms": (lambda: frozen(bottleneck(9, 3, 2), "bn", "downsample.1"), (2, 9, 7, 5)),
    "no-gradient-of-conv1": (lambda: frozen(basic(9, 9), "conv1"), (2, 9, 5, 5)),
    "no-gradient-of-gamma": (lambda: frozen(basic(9, 9), "bn1.weight", "bn2.weight"), (2, 9, 5, 5)),
    "no-gradient-of-shortcut": (lambda: frozen(bottleneck(9, 3, 2), "downsample"), (2, 9, 7, 5)),
    "no-gradient-of-layer-1": (lambda: frozen(dense(3, 7, 5), "denselayer1"), (2, 7, 5, 5)),
    "no-gradient-of-layer-3": (lambda: frozen(dense(3, 7, 5), "denselayer3"), (2, 7, 5, 5)),
    "no-gradient-of-dense-weights": (lambda: frozen(dense(3, 7, 5), "conv"), (2, 7, 5, 5)),
    "no-gradient-of-transition-weight": (lambda: frozen(_Transition(11, 5), "conv"), (2, 11, 7, 5)),
    "no-gradient-of-transition-norm": (lambda: frozen(_Transition(11, 5), "norm"), (2, 11, 7, 5)),
    "constant-input-basic": (lambda: OfConstant(basic(9, 9)), (2, 9, 5, 5)),
    "constant-input-bottleneck": (lambda: OfConstant(bottleneck(9, 3, 2)), (2, 9, 7, 5)),
    "constant-input-dense": (lambda: OfConstant(dense(3, 7, 5)), (2, 7, 5, 5)),
    "constant-input-transition": (lambda: OfConstant(_Transition(11, 5)), (2, 11, 7, 5)),
    "constant-input-stem": (lambda: OfConstant(stem()), (2, 3, 13, 11)),
    "last-conv-alone": (
        lambda: OfConstant(frozen(basic(9, 9), "conv1", "bn1")),
        (2, 9, 5, 5),
    ),
    "strided-view-basic": (lambda: OfStridedView(basic(9, 9)), (2, 9, 9, 6)),
    "strided-view-dense": (lambda: OfStridedView(dense(2, 7, 5)), (2, 7, 9, 6)),
    "strided-view-transition": (lambda: OfStridedView(_Transition(11, 5)), (2, 11, 11, 8)),
    "strided-view-stem": (lambda: OfStridedView(stem()), (2, 3, 23, 12)),
    "channel-slice-bottleneck": (lambda: OfChannelSlice(bottleneck(12, 3)), (2, 14, 5, 5)),
    "channel-slice-transition": (lambda: OfChannelSlice(_Transition(11, 5)), (2, 13, 7, 5)),
    "channels-last-bottleneck": (lambda: OfChannelsLast(bottleneck(9, 3, 2)), (2, 9, 7, 5)),
    "channels-last-dense": (lambda: OfChannelsLast(dense(3, 7, 5)), (2, 7, 5, 5)),
    "twice-used-basic": (lambda: TwiceUsed(basic(9, 9)), (2, 9, 5, 5)),
    "twice-used-dense": (lambda: TwiceUsed(dense(3, 7, 5)), (2, 7, 5, 5)),
    "one-image": (lambda: bottleneck(9, 3, 2), (1, 9, 7, 5)),
    "one-pixel": (lambda: basic(9, 9), (3, 9, 1, 1)),
    "one-pixel-dense": (lambda: dense(2, 7, 5), (5, 7, 1, 1)),
    "one-channel": (lambda: basic(1, 1), (2, 1, 5, 5)),
    "wide-row": (lambda: basic(5, 5), (1, 5, 1, 19)),
}  # fmt: skip

RECOMPUTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    name: (KINDS | VARIANTS)[name]
    for name in (
        "basic-strided", "bottleneck", "bottleneck-strided", "bottleneck-grouped", "dense-3-layers-growth-5", "conv1x1", "densenet",
        "cumulative-average", "some-frozen-norms-bottleneck", "some-frozen-norms-dense", "no-gradient-of-weights",
        "no-gradient-of-conv1", "no-gradient-of-layer-1", "constant-input-bottleneck",
    )
}  # fmt: skip

# every backend in the dtypes that it is tested in, and in both modes; those of one list take turns, case by case: the others are slow
BOTH_MODES = [
    [("eager", torch.float64, True), ("cpp", torch.float64, True)],
    [("cpp", torch.float64, False), ("eager", torch.float64, False)],
    [("cpp", torch.float32, True)],
    [("cpp", torch.float32, False)],
    [
        ("eager", torch.float32, True),
        ("eager", torch.bfloat16, False),
        ("eager", torch.float32, False),
        ("eager", torch.bfloat16, True),
    ],
    # kernels of 16 bits differ in how they load and store alone
    [
        ("cpp", torch.bfloat16, True),
        ("cpp", torch.float16, False),
        ("cpp", torch.bfloat16, False),
        ("cpp", torch.float16, True),
    ],
]
TRAINING = [
    [("eager", torch.float64), ("cpp", torch.float64)],
    [("cpp", torch.float32), ("cpp", torch.bfloat16)],
]
# the interpreter takes seconds where a GPU takes microseconds
INTERPRETED = {
    name: (KINDS | VARIANTS)[name]
    for name in (
        "basic", "basic-strided", "bottleneck-strided", "bottleneck", "bottleneck-dilated", "dense-1-layer",
        "dense-then-transition", "transition-odd", "conv1x1", "conv3x3", "conv-uneven", "conv-bias", "no-affine-basic",
        "some-frozen-norms-bottleneck", "no-gradient-of-norms", "constant-input-basic",
    )
} | {
    "bottleneck-grouped": (lambda: bottleneck(8, 2, groups=2, base_width=64), (2, 8, 3, 5)),
    "stem": (stem, (1, 3, 9, 7)),
}  # fmt: skip


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else None


def each(cases: dict, configurations: list[list[tuple]], slow: tuple[str, ...] = ()) -> Callable:
    """Parametrise a test with ``build, shape, backend, dtype`` and, where the configurations have it, ``training``."""
    rows = []
    for turn, (name, case) in enumerate(cases.items()):
        for group in configurations:
            for i, (backend, dtype, *training) in enumerate(group):
                words = [name, backend, name_of(dtype), *("training" if mode else "inference" for mode in training)]
                marks = [] if i == turn % len(group) and name not in slow else [pytest.mark.slow]
                rows.append(pytest.param(*case, backend, dtype, *training, id="-".join(words), marks=marks))
    names = ("build", "shape", "backend", "dtype", "training")
    return pytest.mark.parametrize(names[: len(rows[0].values)], rows)


# ---- tests -----------------------------------------------------------------------------------------------------------


@each(KINDS, BOTH_MODES)
def test_a_block_equals_its_plain_modules(build, shape, backend, dtype, training):
    served(backend, dtype)
    compare(build, shape, dtype, backend, training)


# slow are those that train as others do but for a stride, a size or a flag that no kernel sees
@each(
    INTERPRETED,
    [[("triton", torch.float32), ("triton", torch.float16)]],
    ("basic", "bottleneck", "bottleneck-dilated", "conv3x3", "no-gradient-of-norms", "constant-input-basic"),
)
def test_a_block_trains_as_its_plain_modules_on_triton(build, shape, backend, dtype):
    served(backend, dtype)
    compare(build, shape, dtype, backend, draws=1)


@pytest.mark.parametrize("name", INTERPRETED)
def test_a_block_infers_as_its_plain_modules_on_triton(name):
    served("triton", torch.float32)
    compare(*INTERPRETED[name], torch.float32, "triton", training=False, draws=1)


@each(VARIANTS, TRAINING)
def test_a_variant_trains_as_its_plain_modules(build, shape, backend, dtype):
    served(backend, dtype)
    compare(build, shape, dtype, backend)


@each(RECOMPUTED, TRAINING)
def test_recomputing_gives_the_same_step(build, shape, backend, dtype):
    served(backend, dtype)
    compare(build, shape, dtype, backend, recompute=True)


@pytest.mark.parametrize("backend", ["eager", "cpp", "triton"])
def test_a_bias_that_the_batch_norm_removes_gets_no_gradient(backend):
    """In training its gradient is zero up to rounding, of which the rule of parity makes nothing."""
    served(backend, torch.float32)
    torch.manual_seed(0)
    block = fusedres.convert(conv(5, 9, 3, padding=1))
    with fusedres.use_backend(backend):
        y = block(torch.randn(2, 5, 5, 7))
    y.backward(torch.randn(y.shape))
    assert block[0].bias.grad.abs().max() < 1e-4 * block[1].bias.grad.abs().max()
