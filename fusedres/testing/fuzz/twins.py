"""A model and its converted twin through the same steps, and everything in which they differ.

In float64 rounding is no excuse: results agree within ``TOLERANCE``. In other dtypes the rule of parity decides, over several draws where
one misses it (:mod:`.check`).
"""

from __future__ import annotations

import copy
import math
import random
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy
import torch
from torch import Tensor, nn

from .description import Case, Step

#: relative, in the 2-norm, of what is at least ``FLOOR`` of the largest of its kind
TOLERANCE = 1e-9
FLOOR = 1e-3
LAYOUTS = ("nchw", "channels_last", "nonleaf", "expanded", "channel_slice", "slice", "transposed", "offset")
#: what is counted of a module's hooks
HOOKS: tuple[str, ...] = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
_OF_COMPILERS = frozenset(
    ("_is_torch_compile", "_torchdynamo_wrapper_id", "_torchdynamo_orig_callable", "dynamo_ctx", "get_compiler_config")
)
#: attributes of torch.nn.Module itself, of compilers, and ours
_INTERNAL = frozenset(nn.Module().__dict__) | {"_fusedres", "_non_persistent_buffers_set"} | _OF_COMPILERS


class Difference(NamedTuple):
    """One thing in which the twins differ: ``what`` is its kind: output, gradient, buffer, attribute, generator, layout, input, raises,
    conversion or report; ``where`` its name; ``detail`` both values."""

    what: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.what} {self.where}: {self.detail}"


class Invalid(Exception):
    """The case is none: eager itself raises, or the network cannot be made."""


@dataclass
class Record:
    """What a step left."""

    outputs: list[Tensor] = field(default_factory=list)
    needs: list[bool] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    given: Tensor | None = None
    generators: tuple[Any, ...] = ()


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and numpy's generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def generators() -> tuple[Any, ...]:
    """The states of the generators, to be compared."""
    kind, keys, position, *_ = cast(tuple[Any, ...], numpy.random.get_state())
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), (kind, keys.tobytes(), position)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def state(model: nn.Module) -> dict[str, Any]:
    """Buffers and plain attributes of all modules, copied, and what hooks there are."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module.__dict__.items():
            if name not in _INTERNAL and not name.startswith("_fusedres"):
                found[f"{path}.{name}"] = _copied(value)
                found[f"{path}.{name} as a tensor"] = [(t.requires_grad, contiguity(t)) for t in tensors(value)]
        for name, buffer in module._buffers.items():
            found[f"{path}.{name}"] = None if buffer is None else buffer.detach().clone()
        found[f"{path}.training"] = module.training
        for hooks in HOOKS:
            found[f"{path}.{hooks}"] = len(getattr(module, hooks))
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return type(value)(map(_copied, value)) if type(value) in (tuple, list) else type(value).__name__
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, types.SimpleNamespace):
        return _copied(vars(value))
    return value if isinstance(value, int | float | str | bool | None) else type(value).__name__


def make_input(case: Case, number: int, dtype: torch.dtype, channels: int) -> tuple[Tensor, Tensor]:
    """``(leaf, x)``: the same numbers in every dtype; x is the leaf or a view of it."""
    generator = torch.Generator().manual_seed(case.seed + 1000 * number)
    n, c, h, w = case.batch, channels, case.size, case.size + 1
    shape = {
        "expanded": (n, c, 1, w),  # not images that are equal: a BatchNorm of them divides by nothing
        "channel_slice": (n, c + 2, h, w),
        "slice": (n, c, h + 2, w + 1),
        "transposed": (n, c, w, h),
    }.get(case.layout, (n, c, h, w))
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(
        torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    )
    leaf = values.to(dtype)
    if case.layout == "channels_last":
        leaf = leaf.to(memory_format=torch.channels_last)
    if case.layout == "offset":
        leaf = torch.cat([leaf.new_zeros(1), leaf.flatten()])[1:].view(shape)
    leaf.requires_grad_(case.needs_gradient)
    view: Callable[[Tensor], Tensor] = {
        "nonleaf": lambda t: t * 1.0,
        "expanded": lambda t: t.expand(n, c, h, w),
        "channel_slice": lambda t: t[:, 1:-1],
        "slice": lambda t: t[:, :, 1:-1, 1:],
        "transposed": lambda t: t.transpose(2, 3),
    }.get(case.layout, lambda t: t)
    return leaf, view(leaf)


def run_step(model: nn.Module, case: Case, step: Step, number: int, channels: int) -> Record:
    """One step; the model is in the mode that it is in."""
    seed_everything(case.seed + number)
    dtype = next((p.dtype for p in model.parameters()), torch.float64)
    leaf, x = make_input(case, number, dtype, channels)
    record = Record()
    with_gradient = step.kind in ("train", "penalty", "double")
    if not with_gradient:
        x = x.detach()
    with torch.inference_mode(step.kind == "inference"), torch.set_grad_enabled(with_gradient):
        record.outputs = list(tensors(model(x)))
        if step.kind == "double":
            record.outputs += tensors(model(make_input(case, number + 50, dtype, channels)[1]))
    record.given = x.detach().clone()
    outputs = [y for y in record.outputs if y.requires_grad]
    if with_gradient and outputs:
        generator = torch.Generator().manual_seed(case.seed)
        loss: Any = sum(
            (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)).sum() for y in outputs
        )
        if step.kind == "penalty" and leaf.requires_grad:
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True, allow_unused=True)
            loss = loss if grad is None else loss + (grad * grad).sum()
        assert isinstance(loss, Tensor)
        if loss.requires_grad:
            loss.backward()
    record.needs = [y.requires_grad for y in record.outputs]
    record.outputs = [y.detach() for y in record.outputs]
    record.gradients = {"input": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}}
    record.gradients = {name: None if g is None else g.detach().clone() for name, g in record.gradients.items()}
    record.state = state(model)
    record.generators = generators()
    return record


# ---- comparison ------------------------------------------------------------------------------------------------------


def contiguity(y: Tensor) -> tuple[bool, ...]:
    """How a map lies in memory, as far as code that reads it can tell."""
    if y.dim() != 4:
        return (y.is_contiguous(),)
    return y.is_contiguous(), y.is_contiguous(memory_format=torch.channels_last)


def distance(value: Tensor, expected: Tensor, scale: float) -> float:
    """The error relative to the larger of the norm of ``expected`` and ``scale``; infinite where other elements are finite."""
    value, expected = value.double(), expected.double()
    if not torch.equal(value.isfinite(), expected.isfinite()):
        return math.inf
    value, expected = (torch.nan_to_num(t, posinf=0, neginf=0) for t in (value, expected))
    return (value - expected).norm().item() / max(expected.norm().item(), scale, 1e-30)


def compare_tensors(
    what: str, where: str, value: Any, expected: Any, scale: float, tolerance: float
) -> Iterator[Difference]:
    """In what a tensor (or None) differs."""
    if value is None or expected is None:
        if value is not expected:
            yield Difference(what, where, f"{_short(value)}, eager has {_short(expected)}")
    elif value.dtype != expected.dtype or value.shape != expected.shape:
        yield Difference(what, where, f"{_short(value)}, eager has {_short(expected)}")
    elif not value.is_floating_point():
        if not torch.equal(value, expected):
            yield Difference(
                what, where, f"{value.flatten()[:3].tolist()}, eager has {expected.flatten()[:3].tolist()}"
            )
    else:
        error = distance(value, expected, scale)
        if not error <= tolerance:
            yield Difference(what, where, f"relative error {error:.1e}")


def _short(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]


def compare_values(where: str, value: Any, expected: Any, tolerance: float) -> Iterator[Difference]:
    """In what an attribute differs."""
    if isinstance(value, Tensor) and isinstance(expected, Tensor):
        yield from compare_tensors("attribute", where, value, expected, 1.0, tolerance)
    elif isinstance(value, list | tuple) and type(value) is type(expected):
        if len(value) != len(expected):
            yield Difference("attribute", where, f"{len(value)} items, eager has {len(expected)}")
        for i, pair in enumerate(zip(value, expected, strict=False)):
            yield from compare_values(f"{where}[{i}]", *pair, tolerance)
    elif isinstance(value, dict) and isinstance(expected, dict):
        if value.keys() != expected.keys():
            yield Difference("attribute", where, f"items {[*value]}, eager has {[*expected]}")
        for key in value.keys() & expected.keys():
            yield from compare_values(f"{where}[{key!r}]", value[key], expected[key], tolerance)
    elif isinstance(value, float) and isinstance(expected, float):
        if not abs(value - expected) <= tolerance * max(1.0, abs(expected)) and value is not expected:
            yield Difference("attribute", where, f"{value}, eager has {expected}")
    elif type(value) is not type(expected) or not isinstance(value, Tensor) and value != expected:
        yield Difference("attribute", where, f"{_short(value)}, eager has {_short(expected)}")


def compare_states(ours: Mapping[str, Any], eager: Mapping[str, Any], tolerance: float) -> Iterator[Difference]:
    """In what buffers and attributes differ."""
    for name in [*eager, *(n for n in ours if n not in eager)]:
        if name not in ours or name not in eager:
            yield Difference(
                "attribute", name, "is there only in " + ("eager" if name in eager else "the converted model")
            )
        elif isinstance(eager[name], Tensor) and isinstance(ours[name], Tensor):
            yield from compare_tensors("buffer", name, ours[name], eager[name], 1.0, tolerance)
        else:
            yield from compare_values(name, ours[name], eager[name], tolerance)


def compare_forms(ours: Record, eager: Record) -> Iterator[Difference]:
    """In what everything but the numbers differs."""
    if len(ours.outputs) != len(eager.outputs):
        yield Difference("output", "number", f"{len(ours.outputs)}, eager has {len(eager.outputs)}")
        return
    for i, (y, expected) in enumerate(zip(ours.outputs, eager.outputs, strict=True)):
        if y.shape == expected.shape and contiguity(y) != contiguity(expected):
            yield Difference("layout", f"output {i}", f"strides {y.stride()}, eager has {expected.stride()}")
    if ours.needs != eager.needs:
        yield Difference("output", "requires_grad", f"{ours.needs}, eager has {eager.needs}")
    for name, pair in {"torch": 0, "random": 1, "numpy": 2}.items():
        if ours.generators[pair] != eager.generators[pair]:
            yield Difference("generator", name, "its state after the step")


def compare(ours: Record, eager: Record, tolerance: float = TOLERANCE) -> list[Difference]:
    """In what two steps differ, the numbers by ``tolerance``."""
    found = list(compare_forms(ours, eager))
    for i, pair in enumerate(zip(ours.outputs, eager.outputs, strict=False)):
        found += compare_tensors("output", str(i), *pair, 1e-6, tolerance)
    found += compare_tensors("input", "after the call", ours.given, eager.given, 1.0, tolerance)
    norms = [g.norm().item() for g in eager.gradients.values() if g is not None]
    scale = FLOOR * max((n for n in norms if math.isfinite(n)), default=1.0) + 1e-6
    for name, expected in eager.gradients.items():
        found += compare_tensors("gradient", name, ours.gradients.get(name), expected, scale, tolerance)
    found += compare_states(ours.state, eager.state, tolerance)
    return found


def copied(model: nn.Module) -> nn.Module:
    """A copy with gradients, as a user would make it."""
    return copy.deepcopy(model)
