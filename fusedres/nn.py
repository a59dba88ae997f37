"""Drop-in modules: torchvision's constructor arguments, parameter names and semantics, fused.

``torchvision.models.ResNet(fusedres.nn.Bottleneck, [3, 4, 6, 3])`` is a fused ResNet-50. Where a block cannot be fused its plain forward
below runs, and ``fusedres.report`` says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import concat
from .blocks import BlockState, kind_of
from .swap import FusedBlock

__all__ = [
    "BasicBlock", "Bottleneck", "Concat", "ConvBNAct", "DenseBlock", "DenseLayer", "HighwayBlock", "PlainBlock",
    "PreActBasicBlock", "PreActBottleneck", "Transition",
]  # fmt: skip


def _state(kind: str) -> Callable[[], BlockState]:
    """How the state of a module of this file is made."""
    return functools.partial(BlockState, kind_of(kind))


class _PlainBasic(nn.Module):
    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock only supports groups=1 and base_width=64, found {groups} and {base_width}")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class _PlainBottleneck(nn.Module):
    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        out = planes * 4
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = norm_layer(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(h)))))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(FusedBlock, _PlainBasic, state=_state("basic")):
    """ResNet's basic block (He et al. 2015): two 3x3 convolutions and a shortcut; arguments as torchvision's ``BasicBlock``.

    Maps N x ``inplanes`` x H x W to N x ``planes`` x H' x W'. ``downsample`` (convolution and BatchNorm) projects the shortcut; option A,
    without parameters, is ``nn.Sequential(nn.AvgPool2d(1, stride), nn.ZeroPad3d((0, 0, 0, 0, front, back)))`` with ``front + back`` new
    channels.
    """

    expansion = 1


class Bottleneck(FusedBlock, _PlainBottleneck, state=_state("bottleneck")):
    """ResNet's bottleneck, stride on the 3x3: 1x1, 3x3 (``groups``, ``dilation``), 1x1; arguments as torchvision's ``Bottleneck``.

    Maps N x ``inplanes`` x H x W to N x ``4 * planes`` x H' x W'. ``downsample`` (convolution and BatchNorm) projects the shortcut.
    """

    expansion = 4


class _PlainPreActBasic(nn.Module):
    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = norm_layer(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(h)
        return self.conv2(self.relu(self.bn2(self.conv1(h)))) + shortcut


class _PlainPreActBottleneck(nn.Module):
    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.bn1 = norm_layer(inplanes)
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn2 = norm_layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn3 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, planes * 4, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(h)
        h = self.conv2(self.relu(self.bn2(self.conv1(h))))
        return self.conv3(self.relu(self.bn3(h))) + shortcut


class PreActBasicBlock(FusedBlock, _PlainPreActBasic, state=_state("preact_basic")):
    """The pre-activation basic block (He et al. 2016): BatchNorm and ReLU before each 3x3 convolution, nothing on the identity path.

    Maps N x ``inplanes`` x H x W to N x ``planes`` x H' x W'. ``downsample`` (a convolution) projects the activated input.
    """

    expansion = 1


class PreActBottleneck(FusedBlock, _PlainPreActBottleneck, state=_state("preact_bottleneck")):
    """The pre-activation bottleneck: 1x1, 3x3 (``stride``, ``groups``, ``dilation``), 1x1, each behind BatchNorm and ReLU.

    Maps N x ``inplanes`` x H x W to N x ``4 * planes`` x H' x W'. ``downsample`` (a convolution) projects the activated input.
    """

    expansion = 4


class _PlainPlain(nn.Module):
    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if base_width != 64:
            raise ValueError(f"PlainBlock only supports base_width=64, found {base_width}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, groups, bias=False)
        self.bn2 = norm_layer(planes)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(h)))


class PlainBlock(FusedBlock, _PlainPlain, state=_state("plain")):
    """The basic block without its shortcut, what residual learning is compared with (He et al. 2015, figure 3, middle).

    Maps N x ``inplanes`` x H x W to N x ``planes`` x H' x W'; arguments as torchvision's ``BasicBlock``, so that
    ``torchvision.models.ResNet(fusedres.nn.PlainBlock, [2, 2, 2, 2])`` is the plain network of 18 layers. ``downsample``, which such a
    network passes, is no part of a plain block and is dropped.
    """

    expansion = 1


class _PlainHighway(nn.Module):
    def __init__(
        self,
        planes: int,
        kernel_size: int = 3,
        groups: int = 1,
        dilation: int = 1,
        gate_bias: float = -2.0,
        gate_norm: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(
                f"HighwayBlock wants an odd kernel_size, which keeps the size of a map, found {kernel_size}"
            )
        norm_layer = norm_layer or nn.BatchNorm2d
        padding = (kernel_size - 1) // 2 * dilation

        def conv(bias: bool) -> nn.Conv2d:
            return nn.Conv2d(planes, planes, kernel_size, 1, padding, dilation, groups, bias=bias)

        self.conv1 = conv(False)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.gate = conv(not gate_norm)
        self.gate_bn = norm_layer(planes) if gate_norm else None
        self.sigmoid = nn.Sigmoid()
        last: Any = self.gate_bn if gate_norm else self.gate
        nn.init.constant_(last.bias, gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        t = self.gate(x)
        t = self.sigmoid(t if self.gate_bn is None else self.gate_bn(t))
        return t * h + (1 - t) * x


class HighwayBlock(FusedBlock, _PlainHighway, state=_state("highway")):
    """A highway block (Srivastava et al. 2015), convolutional and with BatchNorm: ``t * h + (1 - t) * x`` with the candidate
    ``h = relu(bn1(conv1(x)))`` and the transform gate ``t = sigmoid(gate(x))``, or ``sigmoid(gate_bn(gate(x)))`` with ``gate_norm``.

    Maps N x ``planes`` x H x W to the same. The gate's bias (``gate_bn``'s with ``gate_norm``) begins at ``gate_bias``: negative, so that
    a fresh block mostly carries. Candidate, gate and carry meet in one pass over four maps; its backward is one over seven.
    """


class DenseLayer(nn.Module):
    """A DenseNet layer with bottleneck, a part of :class:`DenseBlock`; arguments as torchvision's ``_DenseLayer``.

    Takes a map or a list of maps to read side by side, returns the ``growth_rate`` new channels.
    """

    def __init__(
        self, num_input_features: int, growth_rate: int, bn_size: int, drop_rate: float, memory_efficient: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, bn_size * growth_rate, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        seen = input if isinstance(input, Tensor) else torch.cat(input, 1)
        mid = self.conv1(self.relu1(self.norm1(seen)))
        new = self.conv2(self.relu2(self.norm2(mid)))
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new


class _PlainDense(nn.ModuleDict):
    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            channels = num_input_features + i * growth_rate
            self[f"denselayer{i + 1}"] = DenseLayer(channels, growth_rate, bn_size, drop_rate, memory_efficient)

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseBlock(FusedBlock, _PlainDense, state=_state("dense")):
    """``num_layers`` dense layers in one preallocated buffer; arguments as torchvision's ``_DenseBlock``.

    Maps N x ``num_input_features`` x H x W to N x ``num_input_features + num_layers * growth_rate`` x H x W.
    """


class _PlainTransition(nn.Sequential):
    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)


class Transition(FusedBlock, _PlainTransition, state=_state("transition")):
    """DenseNet's transition: norm, relu, 1x1 convolution, 2x2 mean, the mean taken first; arguments as torchvision's ``_Transition``."""


class ConvBNAct(FusedBlock, nn.Sequential, state=_state("sequential")):
    """Convolution, BatchNorm and activation (ReLU, or any of :mod:`fusedres.activations`); arguments and keys as torchvision's
    ``Conv2dNormActivation`` (``padding=None``: half the dilated kernel, ``bias=None``: no bias)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        dilation: int = 1,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        bias: bool | None = None,
    ) -> None:
        if padding is None:
            padding = (kernel_size - 1) // 2 * dilation
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=bool(bias))
        layers: list[nn.Module] = [conv, nn.BatchNorm2d(out_channels)]
        if activation_layer is not None:
            layers.append(activation_layer())
        super().__init__(*layers)


class Concat(nn.ModuleList):
    """The outputs of ``branches`` side by side, in one channels_last buffer into which they write: no ``torch.cat``, forward or backward.

    ``forward(x)`` hands x to every branch (Inception), ``forward(x_0, ..., x_n)`` every branch its own input (a decoder's
    ``Concat(up, nn.Identity())(x, skip)``). A branch may read another's output instead, in its slice: ``reads[i]`` is the number of that
    branch, which stands before branch i, or None for the input. VoVNet's aggregation reads ``[None, None, 1, 2]`` behind an
    ``nn.Identity()``; ELAN's too, behind a convolution.

    A branch whose last module is a fused block that ends in a convolution, a residual or a highway join, or a max pool writes its slice
    in that block's last pass; any other output is copied in, once. For that the shapes of all outputs are told before anything runs; a
    branch with a module of your own among what is to run fused tells it by a method ``out_shape(shape)``, else it runs before the others
    and is copied. Backward hands every branch its slice of the gradient as it lies. Raises ValueError where sizes other than channels
    disagree, or inputs and branches do.
    """

    def __init__(self, *branches: nn.Module, reads: Sequence[int | None] | None = None) -> None:
        super().__init__(branches)
        if not branches:
            raise ValueError("Concat wants at least one branch")
        self.reads = (None,) * len(branches) if reads is None else tuple(reads)
        if len(self.reads) != len(branches):
            raise ValueError(f"Concat of {len(branches)} branches: reads has {len(self.reads)} entries")
        for i, read in enumerate(self.reads):
            if read is not None and not 0 <= read < i:
                raise ValueError(f"Concat: reads[{i}] is {read}; a branch reads the input (None) or a branch before it")

    def forward(self, *inputs: Tensor) -> Tensor:
        if len(inputs) not in (1, len(self)):
            raise ValueError(f"Concat of {len(self)} branches takes one input, or one for each; found {len(inputs)}")
        if concat.is_traced(inputs):
            return concat.plain(inputs, list(self), self.reads)
        return concat.run(
            inputs, [concat.branch_of(branch, i in self.reads) for i, branch in enumerate(self)], self.reads
        )

    def extra_repr(self) -> str:
        return "" if all(read is None for read in self.reads) else f"reads={list(self.reads)}"
