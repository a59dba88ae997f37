"""Drop-in modules: torchvision's constructor arguments, parameter names and semantics, fused.

``torchvision.models.ResNet(fusedres.nn.Bottleneck, [3, 4, 6, 3])`` is a fused ResNet-50. Where a block cannot be fused its plain forward
below runs, and ``fusedres.report`` says why.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import (
    FusedBasic,
    FusedBottleneck,
    FusedDenseBlock,
    FusedPreActBasic,
    FusedPreActBottleneck,
    FusedSequential,
    FusedTransition,
)

__all__ = [
    "BasicBlock", "Bottleneck", "ConvBNAct", "DenseBlock", "DenseLayer", "PreActBasicBlock", "PreActBottleneck",
    "Transition",
]  # fmt: skip


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


class BasicBlock(FusedBasic, _PlainBasic):
    """ResNet's basic block (He et al. 2015): two 3x3 convolutions and a shortcut; arguments as torchvision's ``BasicBlock``.

    Maps N x ``inplanes`` x H x W to N x ``planes`` x H' x W'. ``downsample`` (convolution and BatchNorm) projects the shortcut.
    """

    expansion = 1


class Bottleneck(FusedBottleneck, _PlainBottleneck):
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


class PreActBasicBlock(FusedPreActBasic, _PlainPreActBasic):
    """The pre-activation basic block (He et al. 2016): BatchNorm and ReLU before each 3x3 convolution, nothing on the identity path.

    Maps N x ``inplanes`` x H x W to N x ``planes`` x H' x W'. ``downsample`` (a convolution) projects the activated input.
    """

    expansion = 1


class PreActBottleneck(FusedPreActBottleneck, _PlainPreActBottleneck):
    """The pre-activation bottleneck: 1x1, 3x3 (``stride``, ``groups``, ``dilation``), 1x1, each behind BatchNorm and ReLU.

    Maps N x ``inplanes`` x H x W to N x ``4 * planes`` x H' x W'. ``downsample`` (a convolution) projects the activated input.
    """

    expansion = 4


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


class DenseBlock(FusedDenseBlock, _PlainDense):
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


class Transition(FusedTransition, _PlainTransition):
    """DenseNet's transition: norm, relu, 1x1 convolution, 2x2 mean, the mean taken first; arguments as torchvision's ``_Transition``."""


class ConvBNAct(FusedSequential, nn.Sequential):
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
