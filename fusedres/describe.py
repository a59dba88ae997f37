"""From modules to what the schedules take: reads convolutions, BatchNorms and blocks, and says why where one cannot be fused."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .backends.eager import Geometry, Pool
from .schedules.chain import Chain
from .schedules.common import Conv, Norm, Unit
from .schedules.dense import Layer
from .schedules.norm_pool import NormPool

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unsupported(Exception):
    """A block that runs its original modules; the message says why, for ``report``."""


def hooked(module: nn.Module) -> bool:
    """Whether a hook waits on ``module`` that running it fused would not fire."""
    return any(getattr(module, name) for name in _HOOKS)


def plain(module: nn.Module, *types: type[nn.Module]) -> None:
    """Check that ``module`` is exactly one of ``types`` (a subclass may compute something else) and that no hook waits inside."""
    if type(module) not in types:
        raise Unsupported(f"found {type(module).__name__} where {' or '.join(t.__name__ for t in types)} is expected")
    if hooked(module):
        raise Unsupported(f"a hook is registered on its {type(module).__name__}")
    if "forward" in module.__dict__:
        raise Unsupported(f"the forward of its {type(module).__name__} is overridden")


def global_hooks() -> bool:
    """Whether a hook on every module of the process is registered, which inner modules must fire."""
    return any(getattr(torch_module, f"_global{name}", None) for name in _HOOKS)


def conv(module: nn.Module, dtype: torch.dtype | None) -> Conv:
    """A ``nn.Conv2d``; ``dtype`` casts its weights, as autocast does."""
    plain(module, nn.Conv2d)
    if module.padding_mode != "zeros":
        raise Unsupported(f"padding_mode {module.padding_mode!r}")
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(r % 2 for r in reach):
            raise Unsupported("padding 'same' that is wider on one side")
        padding = tuple(r // 2 for r in reach)
    weight, bias = module.weight, module.bias
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return Conv(weight, bias, Geometry(module.stride, padding, module.dilation, module.groups))


def norm(module: nn.Module, act: str) -> Norm:
    """A ``nn.BatchNorm2d`` and what its next step does, without doing it: see :func:`count_batches`."""
    plain(module, nn.BatchNorm2d)
    training = module.training or (module.running_mean is None and module.running_var is None)
    tracking = training and module.training and module.track_running_stats and module.running_mean is not None
    momentum = module.momentum
    if tracking and momentum is None:
        momentum = 1.0 / (float(module.num_batches_tracked) + 1.0)  # torch reads the counter on the host, too
    running = (module.running_mean, module.running_var) if tracking or not training else (None, None)
    return Norm(module.weight, module.bias, *running, training, momentum or 0.0, module.eps, act)


def count_batches(*modules: nn.Module) -> None:
    """Advance ``num_batches_tracked`` of the BatchNorms that are about to use a batch."""
    for module in modules:
        if module.training and module.track_running_stats and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)


def activation(module: nn.Module | None) -> str:
    """The name of an activation module."""
    if module is None:
        return "none"
    plain(module, nn.ReLU, nn.Identity)
    return "relu" if type(module) is nn.ReLU else "none"


def _pair(value) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def pool(module: nn.Module) -> Pool:
    """A ``nn.MaxPool2d`` or ``nn.AvgPool2d``."""
    plain(module, nn.MaxPool2d, nn.AvgPool2d)
    kernel = _pair(module.kernel_size)
    stride = _pair(module.stride)
    padding = _pair(module.padding)
    if module.ceil_mode:
        raise Unsupported("pooling with ceil_mode")
    if type(module) is nn.AvgPool2d:
        if stride != kernel or padding != (0, 0) or module.divisor_override is not None:
            raise Unsupported("a mean pool with overlapping, padded or re-weighted windows")
        return Pool("mean", kernel, stride, padding)
    if _pair(module.dilation) != (1, 1) or module.return_indices:
        raise Unsupported("a max pool with dilation or return_indices")
    if kernel[0] * kernel[1] > 255:
        raise Unsupported("a max pool whose window has more than 255 positions")
    return Pool("max", kernel, stride, padding)


def shortcut(module: nn.Module | None, dtype: torch.dtype | None) -> tuple[Unit | None, list[nn.Module]]:
    """``(projection, its BatchNorms)``; None for an identity."""
    if module is None or type(module) is nn.Identity or (type(module) is nn.Sequential and len(module) == 0):
        if module is not None:
            plain(module, nn.Identity, nn.Sequential)
        return None, []
    plain(module, nn.Sequential)
    children = list(module)
    if len(children) != 2:
        raise Unsupported(f"a shortcut of {len(children)} modules, not a convolution and a BatchNorm")
    return Unit(conv(children[0], dtype), norm(children[1], "none")), [children[1]]


def residual(block: nn.Module, pairs: list[tuple[nn.Module, nn.Module]], dtype) -> tuple[Chain, list[nn.Module]]:
    """A post-activation residual block with one ``relu`` for all its activations and ``downsample`` as its shortcut."""
    act = activation(block.relu)
    projection, norms = shortcut(block.downsample, dtype)
    acts = [act] * (len(pairs) - 1) + ["none"]
    units = tuple(Unit(conv(c, dtype), norm(n, a)) for (c, n), a in zip(pairs, acts, strict=True))
    return Chain(units, projection is None, projection, act), [n for _, n in pairs] + norms


def stem(children: list[nn.Module | None], dtype) -> tuple[Chain, list[nn.Module]]:
    """Convolution, BatchNorm, activation or None, max pool or None."""
    convolution, batch_norm, act, pooling = children
    unit = Unit(conv(convolution, dtype), norm(batch_norm, activation(act)))
    window = None if pooling is None else pool(pooling)
    return Chain((unit,), pool=window), [batch_norm]


def dense_layer(layer: nn.Module, dtype) -> tuple[Layer, list[nn.Module]]:
    """A DenseNet layer with bottleneck."""
    if layer.training and layer.drop_rate > 0:
        raise Unsupported(f"dropout inside its layers (drop_rate {layer.drop_rate})")
    norm1 = norm(layer.norm1, activation(layer.relu1))
    norm2 = norm(layer.norm2, activation(layer.relu2))
    return Layer(norm1, conv(layer.conv1, dtype), norm2, conv(layer.conv2, dtype)), [layer.norm1, layer.norm2]


def transition(block: nn.Module, dtype) -> tuple[NormPool, list[nn.Module]]:
    """A DenseNet transition: norm, relu, conv (1x1), pool (mean)."""
    convolution, window = conv(block.conv, dtype), pool(block.pool)
    g = convolution.geometry
    pointwise = convolution.weight.shape[2:] == (1, 1) and g.stride == (1, 1) and g.padding == (0, 0)
    if not pointwise or window.kind != "mean":
        raise Unsupported("a transition that is not a 1x1 convolution and a mean pool")
    return NormPool(norm(block.norm, activation(block.relu)), window, convolution), [block.norm]


def check_map(x: Tensor, dtype: torch.dtype) -> None:
    """Check that ``x`` is an ordinary, non-empty N x C x H x W tensor of ``dtype``."""
    if type(x) not in (Tensor, nn.Parameter):
        raise Unsupported(f"its input is a {type(x).__name__}")
    if x.dim() != 4 or x.numel() == 0:
        raise Unsupported(f"its input has shape {tuple(x.shape)}, not a non-empty N x C x H x W")
    if x.dtype != dtype:
        raise Unsupported(f"its input is {x.dtype}, its weights {dtype}")


def check_conv(c: Conv, shape: tuple[int, ...], like: Tensor) -> tuple[int, ...]:
    """Check ``c`` against its input; returns the shape of its output. Whatever is wrong, the original modules raise it."""
    if c.weight.device != like.device or c.weight.dtype != like.dtype:
        raise Unsupported(f"its input is {like.dtype} on {like.device}, a weight {c.weight.dtype} on {c.weight.device}")
    if shape[1] != c.weight.shape[1] * c.geometry.groups:
        raise Unsupported(
            f"a convolution expects {c.weight.shape[1] * c.geometry.groups} channels and finds {shape[1]}"
        )
    out = c.out_shape(shape)
    if min(out[2:]) < 1:
        raise Unsupported("a kernel larger than its padded input")
    return out


def check_norm(n: Norm, shape: tuple[int, ...], like: Tensor) -> None:
    """Check ``n`` against its input. One value per channel in training is an error here, before any statistic is updated."""
    for tensor in (n.weight, n.bias, n.running_mean, n.running_var):
        if tensor is None:
            continue
        if tensor.numel() != shape[1] or tensor.device != like.device:
            raise Unsupported(
                f"a BatchNorm of {tensor.numel()} channels on {tensor.device} meets {shape[1]} on {like.device}"
            )
        if tensor.dtype not in (like.dtype, torch.float32):
            raise Unsupported(f"a BatchNorm in {tensor.dtype} meets {like.dtype}")
    if n.training and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")
