"""From modules to what the schedules take: reads convolutions, BatchNorms and blocks, and says why where one cannot be fused."""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import activations
from .backends.eager import Geometry, Pool
from .memory import Part, Unsupported, instances
from .schedules.chain import Chain, Shortcut, Subsample
from .schedules.common import Conv, Norm, Unit
from .schedules.dense import Layer
from .schedules.norm_pool import NormPool
from .structure import CONVOLUTIONS, Call, Plan, Step, class_of, norm_types, original_forward

_GLOBAL_HOOKS = tuple(f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre"))


class Hooked(Unsupported):
    """It does so because of a hook, which may be removed at any time."""


def unhooked(module: nn.Module) -> None:
    """Check that no hook waits on ``module``."""
    if hooked(module):
        raise Hooked(f"a hook is registered on its {type(module).__name__}")


def hooked(module: nn.Module) -> bool:
    """Whether a hook waits on ``module`` that running it fused would not fire."""
    own = module.__dict__  # asked of every module at every call: past nn.Module's __getattr__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def plain(module: nn.Module, *types: type[nn.Module]) -> None:
    """Check that ``module`` is exactly one of ``types`` (a subclass may compute something else) and that no hook waits inside."""
    if class_of(module) not in types:
        raise Unsupported(f"found {type(module).__name__} where {' or '.join(t.__name__ for t in types)} is expected")
    unhooked(module)
    if "forward" in module.__dict__:
        raise Unsupported(f"the forward of its {type(module).__name__} is overridden")


def child_of(module: nn.Module, path: str) -> nn.Module | None:
    """What stands at ``path`` inside ``module``."""
    try:
        for name in path.split(".") if path else ():
            module = module._modules[name]
    except (KeyError, AttributeError):
        raise Unsupported(f"it has no {path} any more; fusedres.convert reads it anew") from None
    return module


def global_hooks() -> bool:
    """Whether a hook on every module of the process is registered, which inner modules must fire."""
    return any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS)


def conv(module: nn.Module, dtype: torch.dtype | None, *types: type[nn.Module]) -> Conv:
    """A ``nn.Conv2d`` (or another of ``types``); ``dtype`` casts its weights, as autocast does."""
    plain(module, *(types or (nn.Conv2d,)))
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
    """A BatchNorm and what its next step does, without doing it."""
    inside = norm_act(module)
    if inside is None:
        plain(module, *norm_types())
    else:
        plain(module, type(module))
        if not at_rest(inside[0]) or hooked(inside[0]):
            raise Unsupported(f"{type(inside[0]).__name__} inside a BatchNorm")
        own = activation(inside[1])
        act = act if own == "none" else own
    return _norm(module, act)


def _norm(module: nn.Module, act: str) -> Norm:
    weight, bias = module.weight, module.bias
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):  # torchvision's frozen one: buffers in every mode
        return Norm(weight, bias, module.running_mean, module.running_var, False, 0.0, module.eps, act, promotes=True)
    training = module.training or (module.running_mean is None and module.running_var is None)
    tracking = training and module.training and module.track_running_stats and module.running_mean is not None
    momentum = module.momentum
    if tracking and momentum is None:
        momentum = 1.0 / (float(module.num_batches_tracked) + 1.0)  # torch reads the counter on the host, too
    running = (module.running_mean, module.running_var) if tracking or not training else (None, None)
    group = _group(module) if isinstance(module, nn.SyncBatchNorm) else None
    return Norm(weight, bias, *running, training, momentum or 0.0, module.eps, act, group)


def _group(module: nn.SyncBatchNorm) -> dist.ProcessGroup | None:
    """The processes with which a SyncBatchNorm shares its statistics, None where it has its own batch alone."""
    if not (module.training and dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def lone_norm(module: nn.Module, dtype: torch.dtype | None) -> tuple[Chain, list[nn.Module]]:
    """``(a chain of nothing but this BatchNorm, itself)``; hooks on it are not in the way, being its caller's to fire."""
    return Chain((), _norm(module, "none")), [module]


def activation(module: nn.Module | None) -> str:
    """The name of an activation module, in :mod:`fusedres.activations`."""
    if module is None:
        return "none"
    act = "none" if type(module) is nn.Identity else activations.of_module(module)
    if act is None:
        raise _not_fused(module)
    plain(module, type(module))
    return act


def _not_fused(module: nn.Module) -> Unsupported:
    return Unsupported(f"found {type(module).__name__}, which is not among the activations that are fused")


def _pair(value) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def pool(module: nn.Module) -> Pool:
    """A ``nn.MaxPool2d`` or ``nn.AvgPool2d``."""
    plain(module, nn.MaxPool2d, nn.AvgPool2d)
    kernel = _pair(module.kernel_size)
    stride = _pair(module.stride)
    padding = _pair(module.padding)
    if type(module) is nn.AvgPool2d:
        if stride != kernel or padding != (0, 0) or module.divisor_override is not None:
            raise Unsupported("a mean pool with overlapping, padded or re-weighted windows")
        return Pool("mean", kernel, stride, padding, module.ceil_mode)
    if module.ceil_mode:
        raise Unsupported("pooling with ceil_mode")
    if _pair(module.dilation) != (1, 1) or module.return_indices:
        raise Unsupported("a max pool with dilation or return_indices")
    if kernel[0] * kernel[1] > 255:
        raise Unsupported("a max pool whose window has more than 255 positions")
    return Pool("max", kernel, stride, padding)


#: what changes no shape, and what stands among the activations and does
_ELEMENTWISE = (nn.Identity, nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
_RESHAPING = (nn.GLU, nn.MultiheadAttention)


def shape_behind(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of ``module``'s output for an input of ``shape``, None where it cannot be told without running it. A module that knows
    has a method ``out_shape(shape)``."""
    told = getattr(module, "out_shape", None)
    if callable(told):
        return told(shape)
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for child in module:
            shape = None if shape is None else shape_behind(child, shape)
        return shape
    try:
        if type(module) is nn.Conv2d:
            return conv(module, None).out_shape(shape)
        if type(module) in (nn.MaxPool2d, nn.AvgPool2d):
            return pool(module).out_shape(shape)
    except Unsupported:
        return None
    if isinstance(module, nn.Upsample):
        return _upsampled(module, shape)
    activation = type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, _RESHAPING)
    return shape if activation or isinstance(module, _ELEMENTWISE) else None


def _upsampled(module: nn.Upsample, shape: tuple[int, ...]) -> tuple[int, ...]:
    spatial = shape[2:]
    given = module.scale_factor if module.size is None else module.size
    values = given if isinstance(given, tuple) else (given,) * len(spatial)
    if module.size is None:
        values = tuple(math.floor(size * scale) for size, scale in zip(spatial, values, strict=True))
    return (*shape[:2], *values)


def norm_act(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """``(dropout, activation)`` of timm's BatchNorms with both inside, None where ``module`` is another."""
    library = sys.modules.get("timm.layers.norm_act")
    known = (getattr(library, name, None) for name in ("BatchNormAct2d", "SyncBatchNormAct"))
    return (module.drop, module.act) if type(module) in [k for k in known if k is not None] else None


def at_rest(module: nn.Module) -> bool:
    """Whether a dropout, or stochastic depth, does nothing in its present mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return not module.training or module.p == 0
    if type(module).__name__ in ("DropPath", "DropBlock2d", "StochasticDepth"):
        rate = getattr(module, "drop_prob", getattr(module, "p", None))
        return not module.training or rate == 0
    return type(module) is nn.Identity


class Token(NamedTuple):
    """One step of a block as the schedules see it. ``kind``: conv, norm, act, pool, subsample or other. ``run``: the originals, in a row;
    ``module``: what is described when the schedule runs; ``value``: an activation's name (of a norm: that of the one behind it; None: not
    one that is fused), a pool, a subsampling."""

    kind: str
    run: tuple[Callable[[Tensor], Tensor], ...]
    module: nn.Module | None = None
    value: object = None


#: activations, known or not: where a BatchNorm stands in front of one that no schedule computes, the block is left alone
_ACTIVATIONS = tuple(
    getattr(nn, name)
    for name in (
        "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU ReLU6 SELU Sigmoid SiLU "
        "Softplus Softshrink Softsign Tanh Tanhshrink Threshold"
    ).split()
)


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def _foreign_activation(module: nn.Module) -> bool:
    # timm's own activations hold nothing and stand in modules of that name
    return isinstance(module, _ACTIVATIONS) or ".activations" in type(module).__module__


def _tokens_of(module: nn.Module) -> Iterator[Token]:
    inside = norm_act(module)
    if isinstance(module, nn.Sequential) and original_forward(module) is nn.Sequential.forward:
        unhooked(module)
        for child in module:
            yield from _tokens_of(child)
    elif isinstance(module, CONVOLUTIONS):
        yield Token("conv", (module,), module)
    elif inside is not None:
        drop, act = inside
        known = "none" if type(act) is nn.Identity else activations.of_module(act)
        if known is None and _foreign_activation(act):
            raise _not_fused(act)
        if at_rest(drop) and known is not None:
            yield Token("norm", (module,), module, known)
        else:
            yield Token("other", (module,), module)
    elif isinstance(module, norm_types()):
        yield Token("norm", (module,), module, "none")
    elif type(module) is nn.AvgPool2d and not hooked(module):
        yield _average(module)
    elif type(module) in (nn.ZeroPad3d, nn.ConstantPad3d) and _pads_channels(module) and not hooked(module):
        yield Token("subsample", (module,), module, Subsample((1, 1), *module.padding[4:]))
    elif at_rest(module) and not hooked(module):
        return
    elif _foreign_activation(module) or activations.of_module(module) is not None:
        yield Token("act", (module,), module, activations.of_module(module))
    elif isinstance(module, _NORMS):
        raise Unsupported(f"found {type(module).__name__} where BatchNorm2d is expected")
    else:
        yield Token("other", (module,), module)


def _average(module: nn.AvgPool2d) -> Token:
    kernel, stride = _pair(module.kernel_size), _pair(module.stride)
    if kernel == (1, 1) and _pair(module.padding) == (0, 0) and module.divisor_override is None:
        return Token("subsample", (module,), module, Subsample(stride, 0, 0))
    try:
        return Token("pool", (module,), module, pool(module))
    except Unsupported:
        return Token("other", (module,), module)


def _pads_channels(module: nn.ConstantPad3d) -> bool:
    """Whether ``module`` puts channels of zeros around a map: its third dimension from the end is that of the channels."""
    return module.value == 0 and not any(module.padding[:4]) and min(module.padding) >= 0


def _strides(step: Call) -> tuple[int, int] | None:
    """The strides of ``x[:, :, ::s, ::t]``."""
    if (
        step.target is not operator.getitem
        or step.at != 0
        or not isinstance(step.args[1], tuple)
        or len(step.args[1]) != 4
    ):
        return None
    every, steps = slice(None), []
    for i, s in enumerate(step.args[1]):
        if not isinstance(s, slice) or s.start is not None or s.stop is not None or (i < 2 and s != every):
            return None
        steps.append(s.step or 1)
    return (steps[2], steps[3]) if min(steps) > 0 else None


def _zero_channels(step: Call) -> tuple[int, int] | None:
    """The channels before and behind of ``F.pad(x, (0, 0, 0, 0, front, back))``."""
    if step.target is not F.pad:
        return None
    names = ("input", "pad", "mode", "value")
    found = {**dict(zip(names, step.args, strict=False)), **dict(step.kwargs)}
    pad = tuple(found.get("pad") or ())
    plain = found.get("mode", "constant") == "constant" and not found.get("value")
    if not plain or len(pad) not in (6, 8) or any(pad[:4]) or any(pad[6:]) or min(pad) < 0:
        return None
    return pad[4], pad[5]


def _call_token(step: Call) -> Token | None:
    act = activations.of_call(step.target, step.args, dict(step.kwargs))
    if act is not None:
        return Token("act", (step,), None, act)
    strides, zeros = _strides(step), _zero_channels(step)
    if strides is not None or zeros is not None:
        return Token("subsample", (step,), None, Subsample(strides or (1, 1), *(zeros or (0, 0))))
    if step.target in (F.dropout, F.dropout2d):
        names = ("input", "p", "training")
        found = {"p": 0.5, "training": True, **dict(zip(names, step.args, strict=False)), **dict(step.kwargs)}
        if not found["training"] or found["p"] == 0:
            return None
    return Token("other", (step,))


#: what most steps are, exactly: told by one look-up
_COMMON = {
    **dict.fromkeys(CONVOLUTIONS, ("conv", None)),
    **dict.fromkeys((nn.BatchNorm2d, nn.BatchNorm3d), ("norm", "none")),
    nn.ReLU: ("act", "relu"),
}


def tokens(block: nn.Module, steps: tuple[Step, ...]) -> list[Token]:
    """What ``steps`` of ``block`` are: an activation belongs to the BatchNorm before it, a zero padding to the subsampling before it, and
    what does nothing is left out."""
    found: list[Token] = []
    for step in steps:
        if isinstance(step, Call):
            token = _call_token(step)
            new = [] if token is None else [token]
        else:
            module = child_of(block, step)
            common = _COMMON.get(type(module))
            if common is not None:
                new = [Token(common[0], (module,), module, common[1])]
            else:
                new = [] if module is None else _tokens_of(module)
        for token in new:
            last = found[-1] if found else None
            if token.kind == "act" and last is not None and last.kind == "norm" and last.value == "none":
                found[-1] = last._replace(run=last.run + token.run, value=_act(token))
            elif (
                token.kind == "subsample"
                and last is not None
                and last.kind == "subsample"
                and token.value.stride == (1, 1)
            ):
                value = Subsample(
                    last.value.stride, token.value.front + last.value.front, token.value.back + last.value.back
                )
                found[-1] = Token("subsample", last.run + token.run, None, value)
            else:
                found.append(token)
    return found


def _check_gain(convolutions: Iterable[nn.Conv2d], acts: Iterable[str]) -> None:
    """Check that a schedule can be faster than the modules: beyond ReLU not around a depthwise convolution, which the vendor's library
    runs between passes over maps that are its whole cost. Measured on CPU, MobileNets and EfficientNets: 0.7 to 0.95 of eager's speed."""
    if not set(acts) <= {"none", "relu"} and any(1 < c.groups == c.in_channels for c in convolutions):
        raise Unsupported(
            "a depthwise convolution with an activation beyond ReLU, which gains nothing from being fused"
        )


def _act(token: Token) -> str:
    """The activation of a token that a schedule takes over."""
    return token.value if token.module is None else activation(token.module)


@dataclass(frozen=True)
class Piece:
    """A stretch of a block: a chain of the schedule, or what runs as it is. ``original`` computes the same by the modules, from the map and
    from what the shortcut reads."""

    original: Callable[..., Tensor]
    first: Token | None = None
    units: tuple[tuple[Token, Token | None], ...] = ()
    shortcut: tuple[Token, ...] | None = None
    activated: bool = False
    act: str = "none"

    @property
    def is_chain(self) -> bool:
        return self.first is not None or any(norm is not None for _, norm in self.units) or self.shortcut is not None

    @functools.cached_property
    def part(self) -> Part:
        """The chain, to be run as one schedule."""
        return Part(functools.partial(chain, self))


@dataclass(frozen=True)
class Layout:
    """A block in pieces: ``head``, then ``aside`` for what the shortcut reads and ``body`` from the same map, whose last piece joins
    them, then ``tail``."""

    head: tuple[Piece, ...]
    aside: tuple[Piece, ...]
    body: tuple[Piece, ...]
    tail: tuple[Piece, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (*self.head, *self.aside, *self.body, *self.tail)


def in_a_row(x: Tensor, *steps: Callable[[Tensor], Tensor]) -> Tensor:
    """``steps`` one after the other."""
    for step in steps:
        x = step(x)
    return x


def _runs(*found: Token) -> tuple[Callable, ...]:
    return tuple(run for token in found for run in token.run)


def _row(found: list[Token]) -> list[Piece]:
    """The fewest pieces for a row of tokens."""
    pieces: list[Piece] = []
    i = 0
    while i < len(found):
        start, first, units = i, None, []
        if found[i].kind == "norm":
            first = found[i]
            i += 1
        while i < len(found) and found[i].kind == "conv":
            behind = found[i + 1] if i + 1 < len(found) and found[i + 1].kind == "norm" else None
            units.append((found[i], behind))
            i += 1 if behind is None else 2
            if behind is None:
                break
        i = max(i, start + 1)
        runs = _runs(*found[start:i])
        pieces.append(Piece(lambda x, runs=runs: in_a_row(x, *runs), first, tuple(units)))
    return pieces


def _split_shortcut(found: list[Token]) -> tuple[list[Token], tuple[Token, ...]]:
    """A shortcut's tokens in two: what has to run before, and what the schedule takes over (pool, subsampling, convolution, norm)."""
    k = len(found)
    if k > 1 and found[k - 1].kind == "norm" and found[k - 1].value == "none" and found[k - 2].kind == "conv":
        k -= 2
    elif k and found[k - 1].kind == "conv":
        k -= 1
    for kind in ("subsample", "pool"):
        if k and found[k - 1].kind == kind:
            k -= 1
    return found[:k], tuple(found[k:])


def module_parts(block: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """The modules of ``block`` that the schedules stand for."""
    for stamp in plan.stamps[1:]:
        yield block.get_submodule(stamp.path)
    for step in (*plan.main, *(plan.shortcut or ()), *plan.behind):
        if isinstance(step, str):
            module = block.get_submodule(step)
            if isinstance(module, (nn.Conv2d, *norm_types())):
                yield from module.modules()


def check_stamps(block: nn.Module, plan: Plan, training: bool | None = None) -> None:
    """Check that ``block`` is still what its plan was read from, and that no hook waits on a module that the plan goes through."""
    for stamp in plan.stamps:
        module = child_of(block, stamp.path)
        if training is None and not stamp.fits(module, block.training):
            raise Unsupported("it has changed since it was converted; fusedres.convert reads it anew")
        if stamp.path:
            unhooked(module)


def layout(block: nn.Module, plan: Plan, training: bool | None = None) -> Layout:
    """``block`` in the fewest pieces; raises Unsupported where none of them would be fused. ``training``: as if in that mode, by structure
    alone."""
    check_stamps(block, plan, training)
    main = tokens(block, plan.main[plan.shared :])
    before = tokens(block, plan.main[: plan.shared])
    if any(isinstance(token.module, nn.Conv3d | nn.BatchNorm3d) for token in (*before, *main)):
        raise Unsupported("three dimensions, which only dense blocks run fused in")
    if plan.shortcut is None:
        laid = Layout((), (), tuple(_row(tokens(block, plan.main))), ())
    else:
        laid = _residual_layout(before, main, tokens(block, plan.shortcut), tokens(block, plan.behind))
    if not any(norm is not None for piece in laid.pieces for _, norm in piece.units) and not any(
        piece.first is not None and piece.units for piece in laid.pieces
    ):
        raise Unsupported("no convolution with a BatchNorm before or behind it")
    chains = [piece for piece in laid.pieces if piece.is_chain]
    norms = [norm for piece in chains for norm in (piece.first, *(n for _, n in piece.units)) if norm is not None]
    convolutions = (c.module for piece in chains for c, _ in piece.units)
    _check_gain(convolutions, (*(norm.value for norm in norms), *(piece.act for piece in chains)))
    return laid


def _residual_layout(before: list[Token], main: list[Token], other: list[Token], behind: list[Token]) -> Layout:
    early, taken = _split_shortcut(other)
    act, tail = "none", behind
    if behind and behind[0].kind == "act":
        act, tail = _act(behind[0]), behind[1:]
    if _projects_activated(before, main, early, taken) and not tail:
        (piece,) = _row(before + main)
        return Layout((), (), (replace(piece, shortcut=taken, activated=True, act=act),), ())
    body = _row(main)
    last = body.pop() if body and body[-1].is_chain else Piece(in_a_row)
    runs, ends = _runs(*taken), _runs(*behind[:1]) if act != "none" else ()

    def original(x: Tensor, source: Tensor | None = None) -> Tensor:
        return in_a_row(last.original(x) + in_a_row(x if source is None else source, *runs), *ends)

    body.append(replace(last, original=original, shortcut=taken, act=act))
    return Layout(tuple(_row(before)), tuple(_row(early)), tuple(body), tuple(_row(tail)))


def _projects_activated(before: list[Token], main: list[Token], early: list[Token], taken: tuple[Token, ...]) -> bool:
    """Whether one schedule can both activate the input and project it: where nothing else stands on either path."""
    kinds = {token.kind for token in taken}
    norm_first = len(before) == 1 and before[0].kind == "norm"
    return norm_first and not early and "conv" in kinds and "subsample" not in kinds and len(_row(before + main)) == 1


def chain(piece: Piece, dtype: torch.dtype | None) -> tuple[Chain, list[nn.Module]]:
    """``(the chain of a piece, its BatchNorms)``; ``dtype`` casts convolution weights, as autocast does."""
    norms: list[nn.Module] = []

    def normal(token: Token | None) -> Norm | None:
        if token is None:
            return None
        norms.append(token.module)
        return norm(token.module, token.value)

    first = normal(piece.first)
    units = tuple(Unit(conv(c.module, dtype), normal(n)) for c, n in piece.units)
    shortcut = None
    if piece.shortcut is not None:
        found = {token.kind: token for token in piece.shortcut}
        values = {kind: found[kind].value if kind in found else None for kind in ("pool", "subsample")}
        unit = Unit(conv(found["conv"].module, dtype), normal(found.get("norm"))) if "conv" in found else None
        for token in piece.shortcut:
            if token.module is not None:
                unhooked(token.module)
        shortcut = Shortcut(values["pool"], values["subsample"], unit, piece.activated)
    return Chain(units, first, shortcut, piece.act), norms


def stem(children: list[nn.Module | None], dtype) -> tuple[Chain, list[nn.Module]]:
    """Convolution, BatchNorm, activation or None, max pool or None."""
    convolution, batch_norm, act, pooling = children
    unit = Unit(conv(convolution, dtype), norm(batch_norm, activation(act)))
    _check_gain([convolution], [unit.norm.act])
    no_pool = pooling is None or type(pooling) is nn.Identity and not hooked(pooling)
    window = None if no_pool else pool(pooling)
    return Chain((unit,), pool=window), [batch_norm]


def highway(block: nn.Module, dtype: torch.dtype | None) -> tuple[Chain, list[nn.Module]]:
    """``(the chain of a highway block, its BatchNorms)``, by the names of its children."""
    plain(block.sigmoid, nn.Sigmoid)
    norms = [module for module in (block.bn1, block.gate_bn) if module is not None]
    gate = Unit(conv(block.gate, dtype), None if block.gate_bn is None else norm(block.gate_bn, "none"))
    act = activation(block.relu)
    if act not in ("none", "relu"):
        raise Unsupported(
            f"a highway's candidate is fused with ReLU or nothing behind it, found {type(block.relu).__name__}"
        )
    candidate = Unit(conv(block.conv1, dtype), norm(block.bn1, act))
    return Chain((candidate,), shortcut=Shortcut(unit=gate, gated=True)), norms


#: the forwards of dense layers whose children have the names below
_DENSE_LAYERS = (
    ("torchvision.models.densenet", "_DenseLayer"),
    ("timm.models.densenet", "DenseLayer"),
    ("fusedres.nn", "DenseLayer"),
)
_DENSE_NAMES = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")


def dense_layer(layer: nn.Module, plan: Plan | None = None) -> list[Token]:
    """What a dense layer does to what it reads: by its plan, or by the names of its children."""
    unhooked(layer)
    if plan is not None:
        check_stamps(layer, plan)
        return tokens(layer, plan.main)
    known = (getattr(sys.modules.get(module), name, None) for module, name in _DENSE_LAYERS)
    if "forward" in layer.__dict__ or type(layer).forward not in [k.forward for k in known if k is not None]:
        raise Unsupported(f"a {type(layer).__name__} among its layers")
    found = tokens(layer, tuple(name for name in _DENSE_NAMES if name in layer._modules))
    if layer.training and layer.drop_rate > 0:
        found.append(Token("other", (functools.partial(F.dropout, p=layer.drop_rate, training=True),)))
    return found


def in_buffer(found: list[Token]) -> bool:
    """Whether a dense layer can write straight into the buffer: norm-act-conv, with or without norm-act-conv behind it."""
    return [token.kind for token in found] in (["norm", "conv"], ["norm", "conv", "norm", "conv"])


def layers(found: list[list[Token]], dtype) -> tuple[tuple[Layer, ...], list[nn.Module]]:
    """``(the layers of the schedule, their BatchNorms)`` of what :func:`in_buffer` says yes to."""
    described = tuple(
        Layer(*(norm(t.module, t.value) if t.kind == "norm" else conv(t.module, dtype, *CONVOLUTIONS) for t in of_layer))
        for of_layer in found
    )  # fmt: skip
    return described, [token.module for of_layer in found for token in of_layer if token.kind == "norm"]


def row(found: list[Token]) -> list[Piece]:
    """The fewest pieces for a row of tokens; raises Unsupported where none of them would be fused."""
    pieces = _row(found)
    if not any(piece.first is not None and piece.units for piece in pieces):
        raise Unsupported("no convolution behind a BatchNorm")
    return pieces


def is_transition(found: list[Token]) -> bool:
    """Whether a row is a DenseNet's transition: norm, act, conv (1x1), pool (mean)."""
    return [token.kind for token in found] == ["norm", "conv", "pool"] and found[1].module.kernel_size == (1, 1)


def transition(found: list[Token], dtype) -> tuple[NormPool, list[nn.Module]]:
    """``(the transition of the schedule, its BatchNorm)``."""
    if not is_transition(found):
        raise Unsupported("a transition that is not a BatchNorm, a 1x1 convolution and a mean pool")
    convolution, window = conv(found[1].module, dtype), found[2].value
    plain(found[2].module, nn.AvgPool2d)
    if convolution.geometry.stride != (1, 1) or convolution.geometry.padding != (0, 0) or window.ceil:
        raise Unsupported("a transition that is not a 1x1 convolution and a mean pool")
    return NormPool(norm(found[0].module, found[0].value), window, convolution), [found[0].module]


def exchanges(description: object) -> bool:
    """Whether running ``description`` exchanges anything with other processes."""
    return any(norm.group is not None for norm in instances(description, Norm))


def check_map(x: Tensor, dtype: torch.dtype, description: object, dims: int = 4) -> None:
    """Check that ``x`` is an ordinary N x C x H x W tensor of ``dtype``, or one of ``dims`` dimensions, and not empty unless other
    processes wait for ``description``."""
    if type(x) not in (Tensor, nn.Parameter):
        raise Unsupported(f"its input is a {type(x).__name__}")
    if x.dim() != dims or x.numel() == 0 and (min(x.shape[1:]) == 0 or not exchanges(description)):
        expected = "N x C x H x W" if dims == 4 else "N x C x D x H x W"
        raise Unsupported(f"its input has shape {tuple(x.shape)}, not a non-empty {expected}")
    if x.dtype != dtype:
        raise Unsupported(f"its input is {x.dtype}, its weights {dtype}")


def _check_ordinary(*tensors: Tensor | None) -> None:
    """Check that kernels can read weights: a subclass (a DTensor between two uses, a quantised weight) holds its values elsewhere."""
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (Tensor, nn.Parameter):
            raise Unsupported(f"a weight is a {type(tensor).__name__}")


def check_conv(c: Conv, shape: tuple[int, ...], like: Tensor) -> tuple[int, ...]:
    """Check ``c`` against its input; returns the shape of its output. Whatever is wrong, the original modules raise it."""
    _check_ordinary(c.weight, c.bias)
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
    """Check ``n`` against its input. One value per channel in training, or an activation that is unknown, is an error here, before any
    statistic is updated."""
    activations.parse(n.act)
    _check_ordinary(n.weight, n.bias, n.running_mean, n.running_var)
    for tensor in (n.weight, n.bias, n.running_mean, n.running_var):
        if tensor is None:
            continue
        if tensor.numel() != shape[1] or tensor.device != like.device:
            raise Unsupported(
                f"a BatchNorm of {tensor.numel()} channels on {tensor.device} meets {shape[1]} on {like.device}"
            )
        if tensor.dtype != like.dtype and (n.promotes or tensor.dtype != torch.float32):
            raise Unsupported(f"a BatchNorm in {tensor.dtype} meets {like.dtype}")
    if n.training and n.group is None and shape[0] * math.prod(shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")
