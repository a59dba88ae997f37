"""Proofs that a fused block computes what its modules do.

At conversion every structure is proven once: a copy of the narrowest block that has it, with random values in float64, runs small maps
through its fused form, on plain primitives, and through its modules, in training and in evaluation. :func:`verify` compares a converted
model with its original on the user's own input.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .accuracy import allowance, error, holds
from .backends.select import use_backend
from .blocks import is_converted, release
from .recognition import ONE_MAP, Form, arguments, follows, global_hooks, is_plain
from .swap import KEY, original_class

#: spatial sizes of the maps of a proof, the first that the modules take
_SIZES = (5, 8, 16)
#: the largest relative difference in float64: some ten thousand times what rounding makes of such small maps
_TOLERANCE = 1e-8

#: below this part of the largest gradient one counts as that large: where it vanishes (a bias in front of a BatchNorm) it is all rounding,
#: of terms that are as large as others and cancel; likewise of outputs, buffers and attributes (the mean of what was normalised)
_FLOOR = 1e-4

#: what every module holds
_OF_EVERY_MODULE = frozenset({*nn.Module().__dict__, KEY})

#: gradients, outputs, buffers and attributes by name
Results = dict[str, Tensor]


# ---- which structures are the same --------------------------------------------------------------------------------------


def _signature(module: nn.Module, widths: set[int]) -> tuple[Any, ...]:
    """What of one module shapes the structure of a block; how wide it is does not."""
    cls = original_class(module)
    if isinstance(module, _ConvNd):
        grouped = 0 if module.groups == 1 else 1 if module.groups == module.in_channels else 2
        square = module.in_channels == module.out_channels
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
        return cls, *geometry, grouped, square, module.bias is None
    if isinstance(module, _NormBase):
        return cls, module.eps, module.momentum, module.affine, module.track_running_stats
    held = {name: value for name, value in module.__dict__.items() if name not in ("training", KEY) and is_plain(value)}
    # by what they print, since slices, alone or in tuples, are no keys on every Python
    return cls, *(
        (name, "a width" if type(value) is int and value in widths else repr(value))
        for name, value in sorted(held.items())
    )


#: what may be a number of channels, and not a stride or a number of groups
_LEAST_WIDTH = 8


def structure_of(*modules: nn.Module) -> tuple[Any, ...]:
    """What rows of modules share that compute the same but for their widths and values."""
    found: list[tuple[Any, ...]] = []
    for module in modules:
        inside = list(module.named_modules(remove_duplicate=False))
        convolutions = [m for _, m in inside if isinstance(m, _ConvNd)]
        widths = {width for m in convolutions for width in (m.in_channels, m.out_channels) if width >= _LEAST_WIDTH}
        found += ((path, *_signature(m, widths)) for path, m in inside)
    return tuple(found)


# ---- a block beside its modules -----------------------------------------------------------------------------------------


def _twin(block: nn.Module) -> nn.Module | None:
    """A copy of ``block`` that nobody knows: original classes, no hooks, random values in float64; None where there is none."""
    try:
        twin = copied(block, _without_graphs(block))
        for module in twin.modules():
            release(module)
            for name, held in module.__dict__.items():
                if name.endswith("_hooks") and isinstance(held, dict):
                    held.clear()
        twin = twin.to_empty(device="cpu") if any(t.is_meta for t in _tensors(twin)) else twin.to("cpu")
        twin = twin.to(torch.float64)
        numbers = _Numbers()
        with torch.no_grad():
            for module in twin.modules():
                _draw(module, numbers)
    except Exception:  # a module may hold anything
        return None
    return twin


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy. A module has a dozen empty dictionaries for hooks, which would take longer than all else."""
    empty = (held for m in module.modules() for held in m.__dict__.values() if type(held) is OrderedDict and not held)
    return copy.deepcopy(module, {id(held): OrderedDict() for held in empty} | (memo or {}))


def _without_graphs(block: nn.Module) -> dict[int, Any]:
    """By their ids, what stands in a copy of ``block`` for tensors that a call has left in it, which no copy can be made of."""
    found: dict[int, Any] = {}
    for module in block.modules():
        left = (*module.__dict__.items(), *module._buffers.items())
        for _, tensor in named_tensors({name: value for name, value in left if name not in _OF_EVERY_MODULE}, ""):
            if not tensor.is_leaf:
                found[id(tensor)] = tensor.detach().clone().requires_grad_()
    return found


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class _Numbers:
    """Normally distributed numbers, without end, which cost no more than to be copied: a prime number of them, over and over, so that
    hardly two rows of a weight, or two weights, are the same."""

    def __init__(self) -> None:
        self._drawn = torch.randn(8191, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self._at = 0

    def take(self, count: int) -> Tensor:
        """The next ``count`` of them."""
        begin, size = self._at, len(self._drawn)
        self._at = (begin + count) % size
        return self._drawn.repeat(-(-(begin + count) // size))[begin : begin + count]


def _draw(module: nn.Module, numbers: _Numbers) -> None:
    """Values of ``module`` itself in which no term vanishes."""
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        tensor.copy_(numbers.take(tensor.numel()).view(tensor.shape))
        if tensor.dim() > 1:
            tensor.mul_(1 / math.sqrt(max(1, tensor[0].numel())))
        elif name in ("weight", "running_var"):
            tensor.abs_().mul_(0.3).add_(0.5)
        else:
            tensor.mul_(0.3)


def _step(model: nn.Module, form: Form, maps: list[Tensor]) -> Results:
    """The outputs, every gradient, every buffer and what modules keep beside them, of one call in that form."""
    # all is on CPU: torch.manual_seed would note the stack for devices that are not there
    torch.default_generator.manual_seed(0)
    maps = [x.clone().requires_grad_() for x in maps]
    args, kwargs = arguments(form, iter(maps))
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(form.grad):
        outputs = dict(named_tensors(model(*args, **kwargs), "the output"))
    found: Results = outputs | _kept(model)
    found |= {f"whether {name} requires a gradient": torch.tensor(t.requires_grad) for name, t in found.items()}
    generator = torch.Generator().manual_seed(1)
    ys = {y: torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs.values() if y.requires_grad}
    if ys:
        torch.autograd.backward([*ys], [*ys.values()])
    for i, x in enumerate(maps):
        number = f" {i}" if i else ""
        found[f"the gradient of the input{number}"] = torch.zeros_like(x) if x.grad is None else x.grad
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            given = parameter.grad
            found[f"the gradient of {name}"] = torch.zeros_like(parameter) if given is None else given
            found[f"whether there is a gradient of {name}"] = torch.tensor(given is not None)
    found |= {f"the buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return {name: value.detach() for name, value in found.items()}


def _kept(model: nn.Module) -> Results:
    """The tensors and numbers that the modules of ``model`` keep as attributes, by name."""
    found: Results = {}
    for path, module in model.named_modules():
        held = {name: value for name, value in module.__dict__.items() if name not in _OF_EVERY_MODULE}
        for name, value in held.items():
            what = f"the attribute {path}.{name}" if path else f"the attribute {name}"
            found |= named_tensors(_as_tensors(value), what)
    return found


def _as_tensors(value: Any) -> Any:
    """``value`` with tensors in the places of numbers."""
    if isinstance(value, dict):
        return {key: _as_tensors(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_as_tensors(item) for item in value]
    return torch.tensor(value) if isinstance(value, bool | int | float) else value


def _worst(found: Results, wanted: Results) -> str | None:
    """What differs most, None where nothing does."""
    gradients, others = [], []
    for name, t in wanted.items():
        norm = t.double().norm().item() if t.dim() else abs(float(t))
        (gradients if name.startswith("the gradient") else others).append(norm)
    scales = max(gradients, default=0.0), max(others, default=0.0)
    worst, what = _TOLERANCE, None
    for name, truth in wanted.items():
        if name not in found or found[name].shape != truth.shape or found[name].dtype != truth.dtype:
            return f"{name} has another shape"
        if torch.equal(found[name], truth):
            continue
        least = _FLOOR * scales[not name.startswith("the gradient")]
        difference = error(found[name], truth, least)[0]
        if not difference <= worst:
            worst, what = difference, f"{name} differs by {difference:.1e}"
    return what


def _inputs(block: nn.Module, count: int) -> Iterator[list[Tensor]]:
    """As many maps as that, which may fit: each as wide as what a module reads, all of them together, or half of each."""
    channels: dict[tuple[int, int], None] = {}
    for module in block.modules():
        if isinstance(module, _ConvNd):
            channels[module.in_channels, module.weight.dim() - 2] = None
        elif isinstance(module, _NormBase):
            channels[module.num_features, 3 if isinstance(module, nn.BatchNorm3d) else 2] = None
    generator = torch.Generator().manual_seed(2)
    for width, dims in [*channels][:4]:
        for size in _SIZES:
            for each in dict.fromkeys((width, width // count, 2 * width)):
                shape = (2, each, *(size + 2 * (i == dims - 1) * (size % 2) for i in range(dims)))
                yield [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A context of a proof's own: plain primitives, gradients, no autocast, and random numbers that are put back."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(use_backend("eager"))
        yield


class Claim(NamedTuple):
    """That ``fuse`` makes of a copy of ``block`` what computes the same. ``owner``: the module that is left alone where it does not;
    ``structure``: what blocks share of which one proof is enough, hashable; ``form``: how the block is called; ``asks``: whether it does
    something else without gradients; ``followed``: the paths of the modules inside whose forwards have been followed."""

    owner: nn.Module
    block: nn.Module
    structure: tuple[Any, ...]
    fuse: Callable[[nn.Module], None]
    form: Form = ONE_MAP
    followed: frozenset[str] = frozenset()
    asks: bool = False


def disprove(claim: Claim) -> str | None:
    """How what is claimed is wrong; None where it is not, and where no proof is possible (a module inside does what cannot be followed, and
    may not run before its time)."""
    block, form = claim.block, claim.form
    others = [module for path, module in block.named_modules() if path not in claim.followed]
    if global_hooks() or not all(map(follows, others)):
        return None
    forms = (form, form.other) if claim.asks else (form,)
    steps = [(training, of) for of in forms for training in (True, False)]
    with _undisturbed():
        twin = _twin(block)
        if twin is None:
            return None
        for maps in _inputs(twin, form.count()):
            plain = copied(twin)
            try:
                wanted = [_step(plain.train(training), of, maps) for training, of in steps]
            except Exception:  # no map that fits
                continue
            claim.fuse(twin)
            try:
                found = [_step(twin.train(training), of, maps) for training, of in steps]
            except Exception as reason:
                return f"fused, it raises {type(reason).__name__}: {reason}"
            for (training, of), ours, theirs in zip(steps, found, wanted, strict=True):
                what = _worst(ours, theirs)
                if what is not None:
                    mode = "training" if training else "evaluation"
                    return f"fused, {what} in {mode}{'' if of.grad else ' without gradients'}"
            return None
    return None


#: what was found to differ, and how
_disproved: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def disproved(block: nn.Module) -> str | None:
    """How the fused form of ``block`` was found to differ, None where it was not."""
    return _disproved.get(block)


def prove(claims: Iterable[Claim]) -> list[nn.Module]:
    """The owners of those claims that do not hold; :func:`disproved` says why. One proof for each structure, on the narrowest block that
    has it."""
    groups: dict[tuple[Any, ...], list[Claim]] = {}
    for claim in claims:
        groups.setdefault(claim.structure, []).append(claim)
    found: list[nn.Module] = []
    for members in groups.values():
        narrowest = min(members, key=lambda claim: sum(p.numel() for p in claim.block.parameters()))
        reason = disprove(narrowest)
        if reason is not None:
            _disproved.update((claim.owner, reason) for claim in members)
            found += [claim.owner for claim in members]
    return found


# ---- a model on the user's input ----------------------------------------------------------------------------------------

#: how often eager runs, on inputs that differ by less than their own rounding: an activation within rounding of zero may pass in one run
#: and not in the other, and which run is struck by that is chance
_EAGER_RUNS = 4
#: how often both run before a result is called wrong: chance strikes some runs of the converted model, a fault strikes most of them
_DECIDING_RUNS = 9
#: below this part of the largest result of its kind, one in float64 is all rounding, of terms that cancel (the gradient of a bias in front
#: of a BatchNorm): its errors are measured by the largest, since against itself eager's would excuse whatever errors the others have
_VANISHES = 1e-10


class Difference(NamedTuple):
    """One result of a model: its relative error against float64 (in the 2-norm; the median where there were several runs), the largest of
    eager's own among the results of its kind, and whether the first is at most twice the second."""

    name: str
    error: float
    eager: float
    holds: bool


class Verification(list[Difference]):
    """What :func:`verify` has found, result by result; ``holds`` where it is right for every one."""

    @property
    def holds(self) -> bool:
        """Whether every error is at most twice eager's."""
        return all(difference.holds for difference in self)

    def __str__(self) -> str:
        wrong = [difference for difference in self if not difference.holds]
        if not wrong:
            return f"all {len(self)} results are as right as eager's"
        lines = (f"{d.name}: error {d.error:.2g}, eager's own {d.eager:.2g}" for d in wrong)
        return "\n".join([f"{len(wrong)} of {len(self)} results are not as right as eager's", *lines])


def named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in ``value``, by name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from named_tensors(item, f"{name}[{i}]")


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with its floating-point tensors changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return type(value)(_mapped(item, change) for item in value) if type(value) in (tuple, list) else value


def _run(model: nn.Module, example: tuple[Any, ...], seed: int) -> dict[str, Results]:
    """Outputs, gradients and buffers of one call, with random numbers from ``seed``."""
    torch.manual_seed(seed)
    example = _mapped(example, lambda t: t.detach().clone().requires_grad_())
    outputs = dict(named_tensors(model(*example), "output"))
    generator = torch.Generator().manual_seed(seed)
    gradients = {
        y: torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        for y in outputs.values()
        if y.requires_grad
    }
    if gradients:
        torch.autograd.backward([*gradients], [*gradients.values()])
    leaves = [*named_tensors(example, "input"), *model.named_parameters()]
    found = {
        "outputs": outputs,
        "gradients": {f"gradient of {name}": t.grad for name, t in leaves if t.grad is not None},
        "buffers": {f"buffer {name}": b for name, b in model.named_buffers()},
    }
    return {kind: {name: t.detach().clone() for name, t in of_kind.items()} for kind, of_kind in found.items()}


def _nudged(example: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """``example``, changed by less than its rounding."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(t: Tensor) -> Tensor:
        by = 0.5 * torch.finfo(t.dtype).eps * (2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1)
        return (t.double() * (1 + by.to(t.device))).to(t.dtype)

    return _mapped(example, nudge)


def _differences(found: list[Results], eager: list[Results], truth: Results) -> Iterator[Difference]:
    """Result by result of one kind, whose worst tensor in eager is the measure: which is struck by chance is another in every run."""
    norms = {name: t.double().norm().item() for name, t in truth.items() if t.is_floating_point()}
    largest = max(norms.values(), default=0.0)

    def off(value: Tensor, name: str) -> float:
        return error(value, truth[name], largest if norms.get(name, math.inf) <= _VANISHES * largest else 0.0)[0]

    worst = max((off(run[name], name) for run in eager for name in truth), default=0.0)
    for name, value in eager[0].items():
        mine = [run.get(name) for run in found]
        errors = [
            math.inf if m is None or m.shape != value.shape or m.dtype != value.dtype else off(m, name) for m in mine
        ]
        allowed = allowance(value.dtype) if value.is_floating_point() else 0.0
        ours = statistics.median(errors)
        yield Difference(name, ours, worst, holds(ours, worst, allowed))


def verify(model: nn.Module, *example: Any, seed: int = 0) -> Verification:
    """Compare ``model``, converted, with its original on ``example``: outputs, gradients of parameters and inputs, buffers, in the model's
    mode and dtype and on the backend that serves it, all by copies of it. ``seed``: of the random numbers that it draws, and of the
    outputs' gradients.

    A result is right where its error against float64 is at most twice eager's own. Where one is not, more calls decide, on inputs that
    differ by less than their rounding: the sign of an activation within rounding of zero is chance, and what it moves is no fault. Raises
    TypeError if ``model`` is no ``nn.Module``, and whatever the model raises."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify expects a torch.nn.Module, found {type(model).__name__}")
    original = copy.deepcopy(model, _without_graphs(model))
    for module in original.modules():
        if is_converted(module):
            release(module)
    inputs = [example, *(_nudged(example, seed + i) for i in range(1, _DECIDING_RUNS))]

    def calls(of: nn.Module, on: Iterable[tuple[Any, ...]]) -> list[dict[str, Results]]:
        return [_run(copy.deepcopy(of, _without_graphs(of)), given, seed) for given in on]

    def verification() -> Verification:
        return Verification(
            difference
            for kind in truth
            for difference in _differences([run[kind] for run in found], [run[kind] for run in eager], truth[kind])
        )

    with torch.random.fork_rng():
        found, eager = calls(model, inputs[:1]), calls(original, inputs[:_EAGER_RUNS])
        truth = _run(copy.deepcopy(original).double(), _mapped(example, Tensor.double), seed)
        result = verification()
        if not result.holds:
            found += calls(model, inputs[1:])
            eager += calls(original, inputs[_EAGER_RUNS:])
            result = verification()
    return result
