"""What a user does to a model between two steps: the same to the plain and to the converted one.

Each change takes the model, a number that chooses among what it can be done to, and the Python module of the network; it does nothing where
there is nothing that it can be done to.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Change = Callable[[nn.Module, int, types.ModuleType], None]

BATCH_NORMS = (nn.BatchNorm2d,)


def _pick(found: Iterable[Any], where: int) -> Any:
    found = list(found)
    return found[where % len(found)] if found else None


def _module(model: nn.Module, where: int, *kinds: type[nn.Module]) -> Any:
    """One of the modules of these kinds."""
    return _pick((m for m in model.modules() if isinstance(m, kinds or nn.Module)), where)


def _parent(model: nn.Module, child: nn.Module) -> tuple[nn.Module, str]:
    return next((parent, name) for parent in model.modules() for name, m in parent._modules.items() if m is child)


def _doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2 if isinstance(output, torch.Tensor) else None


def _halved_in_place(module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, torch.Tensor):
        output.data.mul_(0.5)


def _shifted(module: nn.Module, args: Any) -> Any:
    return tuple(a + 0.5 if isinstance(a, torch.Tensor) else a for a in args)


def _backward(module: nn.Module, grads: Any, of_output: Any) -> Any:
    return tuple(None if g is None else g * 0.5 for g in grads)


def forward_hook(model: nn.Module, where: int, code: types.ModuleType) -> None:
    _module(model, where).register_forward_hook(_doubled)


def forward_hook_data(model: nn.Module, where: int, code: types.ModuleType) -> None:
    _module(model, where).register_forward_hook(_halved_in_place)


def forward_pre_hook(model: nn.Module, where: int, code: types.ModuleType) -> None:
    _module(model, where).register_forward_pre_hook(_shifted)


def backward_hook(model: nn.Module, where: int, code: types.ModuleType) -> None:
    _module(model, where).register_full_backward_hook(_backward)


def remove_hooks(model: nn.Module, where: int, code: types.ModuleType) -> None:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()


def parameter_hook(model: nn.Module, where: int, code: types.ModuleType) -> None:
    parameter = _pick(model.parameters(), where)
    if parameter is not None and parameter.requires_grad:
        parameter.register_hook(lambda grad: grad * 2)


def freeze(model: nn.Module, where: int, code: types.ModuleType) -> None:
    parameter = _pick(model.parameters(), where)
    if parameter is not None:
        parameter.requires_grad_(False)


def freeze_half(model: nn.Module, where: int, code: types.ModuleType) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_((i + where) % 2 == 0)


def unfreeze(model: nn.Module, where: int, code: types.ModuleType) -> None:
    model.requires_grad_(True)


def eval_one(model: nn.Module, where: int, code: types.ModuleType) -> None:
    _module(model, where).eval()


def train_one(model: nn.Module, where: int, code: types.ModuleType) -> None:
    _module(model, where).train()


def eval_norms(model: nn.Module, where: int, code: types.ModuleType) -> None:
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.eval()


def eval_norm(model: nn.Module, where: int, code: types.ModuleType) -> None:
    norm = _module(model, where, *BATCH_NORMS)
    if norm is not None:
        norm.eval()


def momentum(model: nn.Module, where: int, code: types.ModuleType) -> None:
    norm = _module(model, where, *BATCH_NORMS)
    if norm is not None:
        norm.momentum = (0.3, None, 0.0, 1.0)[where % 4]


def eps(model: nn.Module, where: int, code: types.ModuleType) -> None:
    norm = _module(model, where, *BATCH_NORMS)
    if norm is not None:
        norm.eps = 0.1


def track(model: nn.Module, where: int, code: types.ModuleType) -> None:
    norm = _module(model, where, *BATCH_NORMS)
    if norm is not None:
        norm.track_running_stats = not norm.track_running_stats and norm.running_mean is not None


def reset_statistics(model: nn.Module, where: int, code: types.ModuleType) -> None:
    norm = _module(model, where, *BATCH_NORMS)
    if norm is not None:
        norm.reset_running_stats()


def no_affine(model: nn.Module, where: int, code: types.ModuleType) -> None:
    norm = _module(model, where, *BATCH_NORMS)
    if norm is not None:
        norm.weight = None


def stride(model: nn.Module, where: int, code: types.ModuleType) -> None:
    conv = _module(model, where, nn.Conv2d)
    if conv is not None:
        conv.dilation, conv.padding = (2, 2), tuple(k - 1 for k in conv.kernel_size)


def no_bias(model: nn.Module, where: int, code: types.ModuleType) -> None:
    conv = _module(model, where, nn.Conv2d)
    if conv is not None:
        conv.bias = nn.Parameter(torch.full_like(conv.weight[:, 0, 0, 0], 0.25)) if conv.bias is None else None


def activation(model: nn.Module, where: int, code: types.ModuleType) -> None:
    found = _module(model, where, nn.ReLU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardswish)
    if found is not None and found is not model:
        parent, name = _parent(model, found)
        setattr(parent, name, (nn.Tanh(), nn.ReLU(), nn.SiLU(), nn.Identity())[where % 4])


def slope(model: nn.Module, where: int, code: types.ModuleType) -> None:
    found = _module(model, where, nn.LeakyReLU)
    if found is not None:
        found.negative_slope = 0.5


def inplace(model: nn.Module, where: int, code: types.ModuleType) -> None:
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.SiLU | nn.LeakyReLU | nn.Hardswish | nn.ReLU6):
            module.inplace = not module.inplace


def replace_conv(model: nn.Module, where: int, code: types.ModuleType) -> None:
    conv = _module(model, where, nn.Conv2d)
    if conv is not None:
        parent, name = _parent(model, conv)
        made = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            3,
            stride=conv.stride,
            padding=1,
            groups=conv.groups,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            for i, parameter in enumerate(made.parameters()):
                parameter.copy_(torch.linspace(-0.5, 0.5 + 0.1 * i, parameter.numel()).sin().reshape(parameter.shape))
        setattr(parent, name, made)


def remove_norm(model: nn.Module, where: int, code: types.ModuleType) -> None:
    norm = _module(model, where, *BATCH_NORMS)
    if norm is not None and norm is not model:
        parent, name = _parent(model, norm)
        setattr(parent, name, nn.Identity())


def no_child(model: nn.Module, where: int, code: types.ModuleType) -> None:
    sequential = _module(model, where, nn.Sequential)
    if sequential is not None and len(sequential) > 1:
        del sequential[len(sequential) - 1]


def insert(model: nn.Module, where: int, code: types.ModuleType) -> None:
    sequential = _module(model, where, nn.Sequential)
    if sequential is not None:
        sequential.append(nn.Tanh())


def patch_instance(model: nn.Module, where: int, code: types.ModuleType) -> None:
    module = _module(model, where)
    forward = module.forward
    module.forward = lambda *args, **kwargs: (
        forward(*args, **kwargs) if not args else forward(args[0] * 0.5, *args[1:], **kwargs)
    )


def patch_conv(model: nn.Module, where: int, code: types.ModuleType) -> None:
    conv = _module(model, where, nn.Conv2d)
    if conv is not None:
        original = conv._conv_forward
        conv._conv_forward = lambda x, weight, bias: original(x, weight * 0.5, bias)


def sgd(model: nn.Module, where: int, code: types.ModuleType) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad / (parameter.grad.norm() + 1), alpha=0.1)


def scale_data(model: nn.Module, where: int, code: types.ModuleType) -> None:
    parameter = _pick(model.parameters(), where)
    if parameter is not None:
        parameter.data = parameter.data * 1.5


def new_parameter(model: nn.Module, where: int, code: types.ModuleType) -> None:
    module = _module(model, where, nn.Conv2d, nn.BatchNorm2d)
    if module is not None and module.weight is not None:
        module.weight = nn.Parameter(module.weight.detach() * 0.5)


def share(model: nn.Module, where: int, code: types.ModuleType) -> None:
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for other in convs[1:]:
        if other.weight.shape == convs[0].weight.shape:
            other.weight = convs[0].weight


def channels_last(model: nn.Module, where: int, code: types.ModuleType) -> None:
    model.to(memory_format=torch.channels_last)


def global_scale(model: nn.Module, where: int, code: types.ModuleType) -> None:
    vars(code)["SCALE"] = 1.0 + where % 3


def class_attribute(model: nn.Module, where: int, code: types.ModuleType) -> None:
    for value in vars(code).values():
        if isinstance(value, type) and "weighting" in vars(value):
            value.weighting = 0.25 * (where % 4)  # type: ignore[attr-defined]


def attributes(model: nn.Module, where: int, code: types.ModuleType) -> None:
    """Change whatever plain attributes a forward may read."""
    for module in model.modules():
        own = module.__dict__
        if "factor" in own:
            module.factor = 1.5  # type: ignore[assignment]
        if "flag" in own:
            module.flag = not own["flag"]  # type: ignore[assignment]
        if "settings" in own:
            own["settings"]["factor"] = 1.5
        if "config" in own:
            own["config"].factor = 1.5
        if "factors" in own:
            own["factors"].append(0.25)
        if "call" in own:
            module.call = torch.tanh  # type: ignore[assignment]


def drop_rate(model: nn.Module, where: int, code: types.ModuleType) -> None:
    dropout = _module(model, where, nn.Dropout)
    if dropout is not None:
        dropout.p = 0.2 if where % 2 else 0.0


def zero_grad(model: nn.Module, where: int, code: types.ModuleType) -> None:
    model.zero_grad(set_to_none=bool(where % 2))


def patch_class(model: nn.Module, where: int, code: types.ModuleType) -> None:
    """Replace forward on one of the generated classes."""
    classes = [
        c
        for c in vars(code).values()
        if isinstance(c, type) and issubclass(c, nn.Module) and c.__module__ == code.__name__
    ]
    chosen = _pick(classes, where)
    if chosen is not None and not hasattr(chosen, "patched"):
        original = chosen.forward
        chosen.patched = True
        chosen.forward = lambda self, x: original(self, x * 0.5)


#: done once for both, since what they change belongs to neither
SHARED: dict[str, Change] = {
    "global_scale": global_scale,
    "class_attribute": class_attribute,
    "patch_class": patch_class,
}
CHANGES: dict[str, Change] = SHARED | {
    change.__name__: change
    for change in (
        forward_hook, forward_hook_data, forward_pre_hook, backward_hook, remove_hooks, parameter_hook, freeze, freeze_half, unfreeze,
        eval_one, train_one, eval_norms, eval_norm, momentum, eps, track, reset_statistics, no_affine, stride, no_bias, activation, slope,
        inplace, replace_conv, remove_norm, no_child, insert, patch_instance, patch_conv, sgd, scale_data, new_parameter, share,
        channels_last, attributes, drop_rate, zero_grad,
    )
}  # fmt: skip
