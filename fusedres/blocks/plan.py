"""What a compiler is told of a fused module: its forward as steps of names and numbers, made by ordinary Python while a call is traced.

Kinds tell a :class:`Planner` their steps (``Kind.tell``). A part that runs fused becomes one operator of
:mod:`fusedres.autograd.operators`; everything else is a call as it stands. :mod:`.compiled` is what is traced then.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes

from ..autograd.encoding import decode, encode
from ..autograd.operators import FAMILIES
from ..backends import select
from ..errors import BackendError, Unsupported
from ..recognition import Form, FunctionStep, Getter, Op, Part, Piece, Setter, hooked, is_plain, method, methods_of
from ..specs import BlockSpec, Conv, instances
from ..swap import runs_fused, state_of
from .handover import Order

Path = tuple[str, ...]
#: what every module has, and what says nothing of what it computes
_OF_EVERY_MODULE = nn.Module().__dict__.keys() - {"training"}
#: what the forwards of torch's own modules do not read of their attributes: each thing that is watched is looked up at every call
_OF_NO_CONVOLUTION = {"training", "in_channels", "out_channels", "kernel_size", "transposed", "output_padding"}
_UNREAD: dict[type[nn.Module], set[str]] = {
    **dict.fromkeys((nn.Conv2d, nn.Conv3d), _OF_NO_CONVOLUTION),
    **dict.fromkeys((nn.BatchNorm2d, nn.BatchNorm3d), {"num_features", "affine"}),
    nn.ReLU: {"training"},
}
#: tensors that kernels can read, or what stands for one in a trace
ORDINARY = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
#: of the maps that stand in for those of a call
_SOME_SIZE, _STRIDES = 1024, range(1, 9)
#: orders of a part's input and of what its shortcut reads that are no other's, each beside channels_last
_OF_X, _OF_SOURCE = (3, 2, 1, 0), (2, 3, 1, 0)
_ORDERS: tuple[tuple[Order, Order], ...] = ((None, _OF_SOURCE), (_OF_X, None), (_OF_X, _OF_SOURCE))


class _Functions:
    """Functions by names, as attributes: a constant of a trace cannot be a function, what it finds here is guarded."""


FUNCTIONS = _Functions()


# ---- a plan ------------------------------------------------------------------------------------------------------------


class Fact(NamedTuple):
    """What a plan depends on of the module at ``path``: the names of its children (None where its forward asks for none), its plain
    attributes, those that are functions and the methods by which it computes, those that are groups of processes, by their names, and which
    of its parameters and buffers are missing; and that it has no hooks but those that are counted here: before and behind its forward, and
    where gradients are recorded before and behind its backward."""

    path: Path
    hooks: tuple[int, int]
    backward_hooks: tuple[int, int]
    children: tuple[str, ...] | None
    attributes: tuple[tuple[str, Any], ...]
    functions: tuple[str, ...]
    groups: tuple[tuple[str, str], ...]
    parameters: tuple[tuple[str, bool], ...]
    buffers: tuple[tuple[str, bool], ...]


class Where(NamedTuple):
    """Where a tensor is found: a parameter, or a buffer, of the module at ``path``."""

    path: Path
    name: str
    is_parameter: bool


class Fused(NamedTuple):
    """A part that runs as one operator of ``family``, and the slots that it reads (``source``: -1 for none) and writes.

    ``casts``: of the weights, those that autocast casts; ``casts_input``: whether it casts the input. ``infers``: whether it runs in its
    form for inference even where gradients are enabled. ``counters``: of the BatchNorms that use a batch, with how often. ``exchanges``:
    whether processes share its statistics: it runs fused then, wherever it is. ``lies``: how its output would lie in memory
    (:func:`_lies_as`) where what its shortcut reads would not be channels_last, where its input would not, and where both would not.
    ``instead``: its original steps, over slots of their own, of which the first two are its maps; without any that is the forward of the
    block. ``grad``: whether gradients are recorded, None as the forward is called.
    """

    at: int
    family: str
    text: str
    weights: tuple[Where, ...]
    casts: tuple[bool, ...]
    casts_input: bool
    statistics: tuple[Where, ...]
    moves: tuple[int, ...]
    infers: bool
    counters: tuple[tuple[Where, int], ...]
    keeps_output: bool
    measures: bool
    exchanges: bool
    lies: tuple[str, ...]
    x: int
    source: int
    result: int
    instead: tuple[Call, ...]
    grad: bool | None = None


class Call(NamedTuple):
    """A call that is traced as it stands, of the module at ``path`` where ``function`` is empty; ``args`` and ``kwargs`` as
    :meth:`Planner.written` gives them. Where ``keeps``, ``function`` is the name of what that module keeps: it is read, or set to the one
    argument that there is.

    ``direct``: of a fused module, to which its map is handed over. ``keeps_layout``, ``reads``, ``to_channels_last``: how its result lies
    in memory, as a general block's calls have it. ``measures``: it asks for a shape or a dtype alone. ``overwrites``: what it reads may
    be overwritten by it, or through its result. ``grad``: as of :class:`Fused`.
    """

    path: Path
    function: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    result: int
    direct: bool = False
    keeps_layout: bool = False
    measures: bool = False
    overwrites: bool = False
    to_channels_last: bool = False
    reads: tuple[int, ...] = ()
    keeps: bool = False
    grad: bool | None = None


class Plan(NamedTuple):
    """The ``steps`` of a forward, over ``size`` slots of which the first are its maps; ``output`` is the result's. Without steps the
    original forward runs."""

    facts: tuple[Fact, ...] = ()
    steps: tuple[Fused | Call, ...] = ()
    size: int = 1
    output: Any = ("slot", 0)
    recompute: bool = False


class Planner:
    """Makes the plan of a block that is called in ``form``. Kinds tell it their steps, in order; every method that adds one returns the
    slot of its result. ``casts``: whether autocast casts the input of a part where nothing else is said."""

    def __init__(self, block: nn.Module, recompute: bool, casts: bool, form: Form) -> None:
        self.block, self.recompute, self.casts, self.form = block, recompute, casts, form
        self.paths: dict[int, list[Path]] = {}
        self.tensors: dict[int, Where] = {}
        self.cumulative: dict[int, Tensor] = {}
        for name, module in block.named_modules(remove_duplicate=False):
            path = tuple(name.split(".")) if name else ()
            self.paths.setdefault(id(module), []).append(path)
            for found, is_parameter in ((module._parameters, True), (module._buffers, False)):
                for key, tensor in found.items():
                    if tensor is not None:
                        self.tensors.setdefault(id(tensor), Where(path, key, is_parameter))
            if isinstance(module, _BatchNorm) and module.momentum is None and module.running_mean is not None:
                counter = module.num_batches_tracked
                if counter is not None:
                    self.cumulative[id(module.running_mean)] = counter
        self.inside: list[nn.Module] = []
        self.names: set[str] = set()
        self.parts = 0
        self.steps: list[Fused | Call] = []
        self.size = form.count()

    def _slot(self) -> int:
        self.size += 1
        return self.size - 1

    def where(self, tensor: Tensor) -> Where:
        """The place of a tensor of the block; raises Unsupported where it has none."""
        if id(tensor) not in self.tensors:
            raise Unsupported("a weight that is none of its parameters and buffers")
        return self.tensors[id(tensor)]

    # ---- steps -------------------------------------------------------------------------------------------------------

    def fused(
        self,
        part: Part,
        x: int,
        source: int | None,
        behind: Callable[[BlockSpec, Order, Order], Order],
        instead: tuple[Call, ...] = (),
        casts: bool | None = None,
        grad: bool | None = None,
    ) -> int:
        """A part. ``instead``: what runs where it cannot run on its input; without it that is the block's forward. ``casts``: whether
        autocast casts its input, where that is not what the block does. ``grad``: as of :class:`Fused`. Raises Unsupported."""
        spec, counters = part.describe(None)
        if self.recompute:
            spec = spec.recomputing
        encoded = encode(spec, self.cumulative)
        if not (encoded.weights or encoded.statistics):
            return self._ordinary(instead, x, source, grad)
        of_convolutions = {id(t) for conv in instances(spec, Conv) for t in (conv.weight, conv.bias)}
        self.parts += 1
        step = Fused(
            self.parts - 1,
            FAMILIES[type(spec)],
            encoded.text,
            tuple(map(self.where, encoded.weights)),
            tuple(id(t) in of_convolutions for t in encoded.weights),
            self.casts if casts is None else casts,
            tuple(map(self.where, encoded.statistics)),
            encoded.moves,
            # asked here, outside of the trace: in one, torch.compile of torch 2.11 says it exported
            not encoded.moves and torch.compiler.is_exporting(),
            tuple((self.where(counter), times) for counter, times in counters.items()),
            spec.keeps_output,
            spec.measures,
            spec.exchanges,
            tuple(_lies_as(behind(spec, *orders)) for orders in _ORDERS),
            x,
            -1 if source is None else source,
            self._slot(),
            instead,
            grad,
        )
        self.steps.append(step)
        return step.result

    def _ordinary(self, calls: Sequence[Call], x: int, source: int | None, grad: bool | None) -> int:
        """A part without any tensor, by its original steps: ordinary code to a compiler. Raises Unsupported where there are none."""
        if not calls:
            raise Unsupported("a part without any tensor is ordinary code to a compiler")
        at = {0: x, 1: x if source is None else source}
        for call in calls:
            args, kwargs = _renumbered(call.args, at), tuple((name, _renumbered(v, at)) for name, v in call.kwargs)
            at[call.result] = self._slot()
            self.steps.append(call._replace(args=args, kwargs=kwargs, result=at[call.result], grad=grad))
        return at[calls[-1].result]

    def in_a_row(self, calls: Sequence[Callable[..., Any]], first: int = 0, result: int = 2) -> tuple[Call, ...]:
        """``calls`` one after the other, of slot ``first``, over slots from ``result``."""
        found: list[Call] = []
        for call in calls:
            found.append(self._call(call, (("slot", first),), (), result))
            first, result = result, result + 1
        return tuple(found)

    def original(self, piece: Piece, has_source: bool) -> tuple[Call, ...]:
        """The original steps of a piece, of slot 0, and of slot 1 where it ``has_source``."""
        x, found = 0, list[Call]()

        def row(ops: Sequence[Op], x: int) -> int:
            for op in ops:
                found.extend(self.in_a_row(op.run, x, 2 + len(found)))
                x = 1 + len(found) if op.run else x
            return x

        if piece.activated:
            x = row(piece.row[:1], x)
        y = row(piece.row[1:] if piece.activated else piece.row, x)
        if piece.shortcut is not None:
            beside = row(piece.shortcut, 1 if has_source else x)
            operands = (beside, y) if piece.shortcut_left else (y, beside)
            found.append(self._call(operator.add, tuple(("slot", slot) for slot in operands), (), 2 + len(found)))
            y = 1 + len(found)
        if piece.act is not None:
            row((piece.act,), y)
        return tuple(found)

    def call(self, call: Callable[..., Any], *args: Any, **layout: Any) -> int:
        """A call of a module of the block or of a function; ``args`` are written (:meth:`written`). ``layout``: of :class:`Call`."""
        kwargs = layout.pop("kwargs", ())
        step = self._call(call, args, kwargs, self._slot())._replace(**layout)
        self.steps.append(step)
        return step.result

    @staticmethod
    def is_direct(module: nn.Module) -> bool:
        """Whether calling ``module`` is calling its fused forward and nothing else; an exporter may stand around every module's call."""
        cls, own = type(module), module.__dict__
        return (
            runs_fused(cls)
            and cls.__call__ is nn.Module.__call__
            and "forward" not in own
            and own.get("_compiled_call_impl") is None
            and not hooked(module)
            and state_of(module) is not None
        )

    def child(self, module: nn.Module, x: int) -> int:
        """A module of the block, to which the map is handed over where that can be."""
        return self.call(module, ("slot", x), direct=self.is_direct(module), reads=(x,))

    def _path(self, module: nn.Module) -> Path:
        if id(module) not in self.paths:
            raise Unsupported(f"its {type(module).__name__} is not one of its modules")
        return self.paths[id(module)][0]

    def _call(self, call: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], result: int) -> Call:
        if isinstance(call, nn.Module):
            return Call(self._path(call), "", args, kwargs, result)
        if isinstance(call, Getter | Setter):
            return Call(self._path(call.module), call.name, args, kwargs, result, keeps=True)
        if isinstance(call, functools.partial):
            own = tuple((name, self.written(v)) for name, v in call.keywords.items())
            return self._call(call.func, (*map(self.written, call.args), *args), (*own, *kwargs), result)
        if isinstance(call, FunctionStep):
            own = list(map(self.written, call.args))
            named = {name: self.written(value) for name, value in call.kwargs}
            if isinstance(call.at, int):
                own[call.at] = args[0]
            else:
                named[call.at] = args[0]
            function = method(call.target) if isinstance(call.target, str) else call.target
            return self._call(function, tuple(own), tuple(named.items()), result)
        name = f"of_{id(call)}"
        setattr(FUNCTIONS, name, call)
        return Call((), name, args, kwargs, result)

    def written(self, value: Any) -> Any:
        """A value as constants of a trace are: ``(kind, ...)``. Raises Unsupported."""
        if isinstance(value, Tensor):
            return ("tensor", self.where(value))
        if type(value) in (tuple, list):
            return (type(value).__name__, tuple(map(self.written, value)))
        if isinstance(value, slice):
            return ("slice", tuple(map(self.written, (value.start, value.stop, value.step))))
        if is_plain(value):
            return ("constant", value)
        raise Unsupported(f"a {type(value).__name__} among the arguments of a call")

    def depends_on(self, modules: Sequence[nn.Module], names: Iterable[str] = ()) -> None:
        """Note that what is told depends on ``modules`` of the block; on the attributes of those that hold others by these ``names``."""
        self.inside += modules
        self.names.update(names)

    def plan(self, output: Any) -> Plan:
        """What has been told."""
        modules = dict.fromkeys(self.inside)
        # at every place where it stands: one of them may be given another module
        facts = tuple(_fact(path, m, self.names) for m in modules for path in self.paths.get(id(m), ()))
        return Plan(facts, tuple(self.steps), self.size, output, self.recompute)


def _renumbered(value: Any, at: dict[int, int]) -> Any:
    """``value``, as :meth:`Planner.written` writes it, with other numbers of slots."""
    if type(value) is not tuple:
        return value
    if len(value) == 2 and value[0] == "slot":
        return ("slot", at[value[1]])
    return tuple(_renumbered(item, at) for item in value)


def _lies_as(order: Order) -> str:
    """As ``"x"`` or ``"source"``, ``"contiguous"``, or ``"channels_last"``."""
    return {None: "channels_last", _OF_X: "x", _OF_SOURCE: "source"}.get(order, "contiguous")


def _is_constant(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_constant, value))
    return value is None or type(value) in (bool, int, str) or type(value) is float and value == value


def _fact(path: Path, module: nn.Module, names: set[str]) -> Fact:
    """What is watched of ``module``: all plain attributes of one that computes itself; of one that holds others, which may count its calls
    or whatever its owner likes, its mode and those of ``names``."""
    cls = type(module)
    counts = names | {"training"} if module._modules and not isinstance(module, _BatchNorm) else module.__dict__.keys()
    own = {name: value for name, value in module.__dict__.items() if name in counts - _UNREAD.get(cls, set())}
    if cls in _UNREAD and own.get("padding_mode") == "zeros":
        own.pop("_reversed_padding_repeated_twice", None)
    idle = {"num_batches_tracked"} if isinstance(module, _BatchNorm) and not module.training else set[str]()
    return Fact(
        path,
        (len(module._forward_hooks), len(module._forward_pre_hooks)),
        (len(module._backward_hooks), len(module._backward_pre_hooks)),
        None if cls in _UNREAD else tuple(module._modules),
        tuple((name, value) for name, value in own.items() if name not in _OF_EVERY_MODULE and _is_constant(value)),
        (
            *methods_of(module),
            *(name for name, value in own.items() if isinstance(value, FunctionType | BuiltinFunctionType)),
        ),
        tuple(
            (name, value.group_name)
            for name, value in own.items()
            if dist.is_available() and isinstance(value, dist.ProcessGroup)
        ),
        tuple((name, tensor is None) for name, tensor in module._parameters.items()),
        tuple((name, tensor is None) for name, tensor in module._buffers.items() if name not in idle),
    )


# ---- in a block ------------------------------------------------------------------------------------------------------


def module_at(block: nn.Module, path: Path) -> Any:
    for name in path:
        block = block._modules[name]  # type: ignore[assignment]
    return block


def tensor_at(block: nn.Module, where: Where) -> Any:
    module = module_at(block, where.path)
    return module._parameters[where.name] if where.is_parameter else module._buffers[where.name]


class Measures(NamedTuple):
    """What is known of a part's maps while a call is traced: the dtype that ``autocast`` computes in, and of its input the dtype, the
    device, how many dimensions and channels it has; ``beside``: the channels of what its shortcut reads, where that is another map."""

    autocast: torch.dtype | None
    dtype: torch.dtype
    device: torch.device
    dims: int
    channels: int
    beside: int | None


def part_takes(block: nn.Module, plan: Plan, at: int, measures: Measures) -> bool:
    """Whether part ``at`` of the ``plan`` of ``block`` can run on maps like these: by its check, on stand-ins."""
    autocast, dtype, device, dims, channels, beside = measures
    step = next(step for step in plan.steps if isinstance(step, Fused) and step.at == at)
    weights, statistics = ([tensor_at(block, where) for where in of] for of in (step.weights, step.statistics))
    if any(t.device != device for t in (*weights, *statistics)) or not all(
        type(t) in ORDINARY for t in (*weights, *statistics)
    ):
        return False
    if autocast is not None and dtype != autocast and not step.casts_input:
        return False
    dtype = dtype if autocast is None else autocast

    def stand_in(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty((), dtype=dtype, device="meta").expand(shape)

    with _disable_current_modes():
        size = (_SOME_SIZE,) * (dims - 2)
        dtypes = [
            dtype if casts and autocast is not None else w.dtype for w, casts in zip(weights, step.casts, strict=True)
        ]
        shown = [stand_in(tuple(w.shape), own) for w, own in zip(weights, dtypes, strict=True)]
        spec = decode(step.text, size, shown, [stand_in(tuple(t.shape), t.dtype) for t in statistics], True)
        x = stand_in((2, channels, *size), dtype)
        # how much larger a map beside it is depends on strides, which are not among what is known
        larger = [stand_in((2, beside, *(n * s for n in size)), dtype) for s in _STRIDES] if beside is not None else []
        if not any(_passes(spec, x, *maps) for maps in ([(source,) for source in larger] or [()])):
            return False
        try:
            return step.exchanges or select.resolve(device, dtype) is not None
        except BackendError:
            return True  # says so when it runs


def _passes(spec: BlockSpec, *maps: Tensor) -> bool:
    try:
        spec.check(*maps)
    except Unsupported:
        return False
    return True


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether a weight is a tensor that kernels can read, or what stands for one in a trace."""
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor) or isinstance(tensor, FunctionalTensor)
