"""Schedules, recorded once and run again without Python between their operators and launches.

A schedule (:meth:`~.contract.Backend.run_schedule`) goes the same way for all maps of the same shapes: the same operators on the same
numbers, with other tensors. :func:`record` runs it and writes that down; :meth:`Tape.play` is one operator, ``fusedres_cpp::play``, that
goes the same way in C++. A tape holds operators of ``fusedres_cpp``, launches of compiled kernels, fresh tensors, views, fills and sums in
place and copies, and the operators of torch's that compute tensors of tensors and of constants that C++ can be told; a schedule that does
anything else (a collective, a random number, a number of Python's that may be of any type) has none.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

try:
    from fusedres._C import tape_operators
except ImportError:
    _NUMBERS: dict[str, int] = {}
else:
    _NUMBERS = {name: number for number, name in enumerate(tape_operators())}
    _play = torch.ops.fusedres_cpp.play.default

# as csrc/tape.cpp has them
_EMPTY, _EMPTY_LIKE, _VIEW, _FILL, _COPY, _ADD, _TORCH, _SUM, _CALL, _LAUNCH = range(10)
_Argument = enum.IntEnum(
    "_Argument", "NONE TENSOR SCALAR INTEGER NUMBER FLAG TEXT DTYPE INTEGERS NUMBERS FLAGS TENSORS MAYBE", start=0
)
#: as torch numbers them
_DEVICES = {"cpu": 0, "cuda": 1}
_DTYPES = {torch.uint8: 0, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
_FRESH = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
#: what inference mode does not take apart before a dispatch mode sees it
_VIEWS_OR_COPIES = (
    torch.ops.aten.contiguous.default,
    *(getattr(torch.ops.aten.to, o) for o in torch.ops.aten.to.overloads()),
)
_FILLS = ("fill_", "zero_")
#: of operators whose results are not the same every time, or whose shapes follow from values
_NOT_THE_SAME = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
#: parameters of operators that, where they are true, draw or move statistics, which a schema does not say
_TRAINS = ("training", "train")

#: how often a schedule runs for maps of the same shapes before it is recorded: sizes that come once are not worth it
RUNS_BEFORE_RECORDING = 1
#: schedules that are remembered in one place; where more come, sizes change all the time
MOST_SCHEDULES = 64
#: what divides the address of every tensor that a tape with launches is played with: kernels are specialised for it
ALIGNMENT = 16

Tensors = Sequence[Tensor | None]

#: of a thread: whether it records
_recording = threading.local()


class Launch(Protocol):
    """What a driver is asked for: a ``function`` by its handle, over a ``grid``, in blocks of so many ``threads`` with ``shared`` bytes.
    ``parameters``: of each, the operand and the bytes behind its address, or -1 and the bits of a number. ``owner`` keeps the function
    loaded. ``dependent``: it may be scheduled before the kernel in front of it has ended."""

    @property
    def owner(self) -> object: ...
    @property
    def function(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def threads(self) -> int: ...
    @property
    def shared(self) -> int: ...
    @property
    def parameters(self) -> Sequence[tuple[int, int]]: ...
    @property
    def dependent(self) -> bool: ...


#: told of every launch with its operands; of None where nobody can say what a driver is asked for
OnLaunch = Callable[[Launch | None, Tensors], None]


class Launcher(NamedTuple):
    """What plays launches: ``observed`` is a ``with`` in which it tells of them, ``function`` the address of the driver's function of the
    type of CUDA's ``cuLaunchKernel``, and ``dependent`` of that of ``cuLaunchKernelEx``, where launches may be dependent."""

    observed: Callable[[OnLaunch], contextlib.AbstractContextManager[None]]
    function: int
    dependent: int = 0


class Tape(NamedTuple):
    """How a schedule went. ``inputs`` picks what it reads of all that it is given; ``returned`` says which of the tensors that come back is
    at each place of the results, None for none. ``held`` is there as long as the tape."""

    inputs: Callable[[Tensors], tuple[Tensor, ...]]
    code: Tensor
    numbers: Tensor
    returned: tuple[int | None, ...]
    held: tuple[object, ...] = ()

    def play(
        self, given: Tensors, stream: int = 0, launcher: int = 0, dependent: int = 0
    ) -> list[Tensor | None] | None:
        """The results for other tensors ``given``; launches go to that ``stream`` of the device, by the driver's functions at the addresses
        ``launcher`` and ``dependent``. None, with nothing done, where one that it reads is elsewhere, aligned otherwise, or of another
        dtype, shape or strides."""
        found = _play(self.inputs(given), self.code, self.numbers, stream, launcher, dependent)
        return [None if at is None else found[at] for at in self.returned] if found else None


def record(
    schedule: Callable[[], Tensors], given: Tensors, launcher: Launcher | None = None
) -> tuple[Tensors, Tape | None]:
    """``(the results of the schedule, how it went)``, None where that is more than a tape holds. ``given``: all tensors that it reads."""
    recorder = _Recorder(given)
    with contextlib.nullcontext() if launcher is None else launcher.observed(recorder.launched), recorder:
        _recording.now = True
        try:
            results = schedule()
        finally:
            _recording.now = False
    return results, recorder.tape(given, results)


def run(
    memo: dict[Any, Any],
    key: Hashable,
    given: Tensors,
    schedule: Callable[[], Tensors],
    launcher: Launcher | None = None,
    stream: int = 0,
) -> Tensors:
    """The results of the ``schedule``: from the tape that ``memo`` has for ``key``, or as it runs, recorded once it comes again."""
    if getattr(_recording, "now", False):  # a schedule that others are part of
        return schedule()
    known = memo.get(key, 0)
    if isinstance(known, Tape):
        driver = () if launcher is None else (stream, launcher.function, launcher.dependent)
        found = known.play(given, *driver)
        return schedule() if found is None else found
    if known is None:
        return schedule()
    if len(memo) >= MOST_SCHEDULES:
        memo.clear()
    if known < RUNS_BEFORE_RECORDING:
        memo[key] = known + 1
        return schedule()
    results, memo[key] = record(schedule, given, launcher)
    return results


def can_play() -> bool:
    """Whether the extension is there."""
    return bool(_NUMBERS)


def measures(t: Tensor | None) -> Hashable:
    """What a schedule depends on of a map."""
    return None if t is None else (t.shape, t.stride(), t.dtype)


class _Refused(Exception):
    """The schedule does what no tape holds."""


class _Slot(int):
    """The number of a tensor, among other numbers."""


class _Recorder(TorchDispatchMode):
    """Writes down every operator that runs."""

    def __init__(self, given: Tensors) -> None:
        super().__init__()
        #: by the identity of a tensor, as long as it lives: held here it would not be freed where the schedule frees it
        self._slots: dict[int, tuple[TensorWeakRef, _Slot]] = {}
        self._size = 0
        self._steps: list[list[int]] = []
        self._numbers: list[float] = []
        self._owners: dict[int, object] = {}
        self._fits = True
        for t in given:
            if t is not None:
                self._new(t)
        self._given = self._size
        self._device = next(t.device for t in given if t is not None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if self._fits:
            try:
                if not self._is_same(func, args, y):
                    self._steps += self._written(func, args, kwargs or {}, y)
            except _Refused:
                self._fits = False
        return y

    def launched(self, launch: Launch | None, operands: Tensors) -> None:
        """Write down a launch."""
        try:
            if launch is None:
                raise _Refused
            slots = [None if t is None else self._slot(t) for t in operands]
            step = [_LAUNCH, launch.function, *launch.grid, launch.threads, launch.shared, int(launch.dependent)]
            step.append(len(launch.parameters))
            for operand, rest in launch.parameters:
                slot = None if operand < 0 else slots[operand]
                step += (-1 if slot is None else slot, rest)
            self._steps.append(step)
            self._owners[launch.function] = launch.owner
        except _Refused:
            self._fits = False

    # ---- from an operator to a step ----------------------------------------------------------------------------------

    def _is_same(self, func: Any, args: tuple[Any, ...], y: Any) -> bool:
        """Whether it only gives a tensor that was made here another object, as Python's ``torch.empty`` does while a mode looks on."""
        if func is not torch.ops.aten.detach.default:
            return False
        of = self._slot(args[0])
        if of < self._given:
            return False
        self._slots[id(y)] = TensorWeakRef(y), of
        return True

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> list[list[int]]:
        if isinstance(y, Tensor) and y.device.type == "meta":
            return []  # somebody asks for strides: nothing that a step could read
        if args and y is args[0] and not func._schema.is_mutable:
            return []  # as it was, which inference mode leaves to operators that may copy, or draw
        if isinstance(y, list | tuple) and all(_share_memory(args[0], part) for part in y):
            return [self._view(args[0], part) for part in y]
        copies = func in _COPIES or func in _VIEWS_OR_COPIES and not _share_memory(args[0], y)
        if copies and isinstance(y, Tensor):
            of = self._slot(args[0])
            return [self._empty(y), [_COPY, self._slot(y), of]]
        return [self._step(func, args, kwargs, y)]

    def _view(self, of: Tensor, y: Tensor) -> list[int]:
        slot, offset = self._slot(of), int(y.storage_offset() - of.storage_offset())
        return [_VIEW, self._new(y), slot, *_strided(y), offset]

    def _step(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> list[int]:
        schema = func._schema
        library, name = schema.name.split("::")
        if library == "fusedres_cpp" and name == "fresh":
            return self._empty(y)
        if library == "fusedres_cpp" and name in _NUMBERS and not kwargs:
            return [_CALL, _NUMBERS[name], *self._arguments(schema.arguments, args)]
        if library != "aten" or not _NOT_THE_SAME.isdisjoint(func.tags):
            raise _Refused
        if not args:
            raise _Refused
        if not isinstance(y, Tensor):
            return self._called(schema, args, kwargs, y)
        if name == "copy_" and len(args) == 2 and not kwargs:
            return [_COPY, self._slot(y), self._slot(args[1])]
        if name == "add_" and not kwargs and _can_be_added(*args):
            return [_ADD, self._slot(y), self._slot(args[1])]
        of_two = self._device.type == "cpu" and len(args) == 2 and not kwargs
        if name == "add" and of_two and _is_floating(args[0]):
            return [_SUM, self._slot(args[0]), *self._argument("Tensor", args[1]), *self._made(y)]
        if name in _FRESH:
            return self._fresh(name, args, kwargs, y)
        if name in _FILLS:
            value = args[1] if len(args) == 2 else 0.0
            if not isinstance(value, float | int):
                raise _Refused
            return [_FILL, self._slot(y), self._number(value)]
        alias = schema.returns[0].alias_info
        if _share_memory(args[0], y) and not (alias is not None and alias.is_write):
            return self._view(args[0], y)
        return self._called(schema, args, kwargs, y)

    def _called(self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> list[int]:
        """An operator of torch's that computes tensors, or overwrites its first argument."""
        first, *rest = schema.arguments
        overwrites = first.alias_info is not None and first.alias_info.is_write
        if any(p.alias_info is not None for p in rest) or overwrites != (y is args[0]):
            raise _Refused
        step = [_TORCH, *_text(schema.name), *_text(schema.overload_name), len(schema.arguments)]
        for i, parameter in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(parameter.name, parameter.default_value)
            if value is True and parameter.name in _TRAINS:
                raise _Refused
            kind = str(parameter.type)
            if kind == "Tensor" and isinstance(value, float | int) and not _is_floating(args[0]):
                raise _Refused  # beside whole numbers a whole number stays one
            step += self._argument(kind, value)
        results = y if isinstance(y, tuple) else (y,)
        step.append(len(results))
        for made in results:
            step += [-1] if made is None or overwrites else self._made(made)
        return step

    def _made(self, made: Any) -> list[int]:
        """A tensor that an operator of torch's has made."""
        if (
            not isinstance(made, Tensor)
            or made.layout is not torch.strided
            or made.device != self._device
            or self._known(made) is not None
        ):
            raise _Refused
        return [self._new(made), *_strided(made)]

    def _argument(self, kind: str, value: Any) -> list[int]:
        """An argument of an operator of torch's, of a parameter of that ``kind``."""
        maybe = _Argument.MAYBE if kind.startswith("Optional[") else 0
        kind = kind.removeprefix("Optional[").removesuffix("]" if maybe else "")
        if value is None:
            if maybe:
                return [_Argument.NONE]
            raise _Refused
        if kind == "Tensor" and isinstance(value, Tensor):
            return [_Argument.TENSOR + maybe, self._slot(value)]
        if kind == "Tensor" and type(value) in (int, float) and not maybe:
            return [_Argument.SCALAR, self._number(value)]
        if kind == "List[Tensor]":
            return [_Argument.TENSORS + maybe, len(value), *map(self._slot, value)]
        if kind == "bool":
            return [_Argument.FLAG + maybe, int(value)]
        if kind == "float":
            return [_Argument.NUMBER + maybe, self._number(value)]
        if kind == "str" and not maybe:
            return [_Argument.TEXT, *_text(value)]
        if kind == "int" and type(value) is int:
            return [_Argument.INTEGER + maybe, value]
        if kind == "int" and value in _DTYPES:  # what schemas call them
            return [_Argument.DTYPE + maybe, _DTYPES[value]]
        if kind == "List[int]":
            return [_Argument.INTEGERS + maybe, len(value), *value]
        if kind == "List[float]":
            return [_Argument.NUMBERS + maybe, len(value), *map(self._number, value)]
        if kind == "List[bool]" and not maybe:
            return [_Argument.FLAGS, len(value), *map(int, value)]
        raise _Refused

    def _fresh(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> list[int]:
        if kwargs.get("pin_memory"):
            raise _Refused
        if name == "empty_like" and kwargs.get("memory_format") in (None, torch.preserve_format):
            self._check(y)
            return [_EMPTY_LIKE, self._new(y), self._slot(args[0])]
        return self._empty(y)

    def _empty(self, y: Tensor) -> list[int]:
        self._check(y)
        return [_EMPTY, self._new(y), _DTYPES[y.dtype], *_strided(y)]

    def _check(self, made: Tensor) -> None:
        if made.device != self._device or made.dtype not in _DTYPES:
            raise _Refused

    def _arguments(self, parameters: Sequence[Any], args: tuple[Any, ...]) -> Iterator[int]:
        for parameter, value in zip(parameters, args, strict=True):
            kind = str(parameter.type)
            if isinstance(value, Tensor):
                yield self._slot(value)
            elif value is None:
                yield -1
            elif kind == "List[int]":
                yield from (len(value), *value)
            else:
                yield self._number(value) if kind == "float" else int(value)

    def _known(self, t: Tensor) -> _Slot | None:
        ref, slot = self._slots.get(id(t), (None, None))
        return slot if ref is not None and ref() is t else None

    def _slot(self, t: Tensor) -> _Slot:
        found = self._known(t)
        if found is None:
            raise _Refused  # from outside: the next call may have another
        return found

    def _new(self, t: Tensor) -> _Slot:
        found = self._known(t)
        if found is None:
            found = _Slot(self._size)
            self._slots[id(t)] = TensorWeakRef(t), found
            self._size += 1
        return found

    def _number(self, value: float) -> int:
        self._numbers.append(float(value))
        return len(self._numbers) - 1

    # ---- the whole ---------------------------------------------------------------------------------------------------

    def tape(self, given: Tensors, results: Tensors) -> Tape | None:
        """All of it, None where no tape holds it."""
        returned = [None if t is None else self._known(t) for t in results]
        if self._given < sum(t is not None for t in given):
            return None  # one tensor at two places, where the next call may have two
        if not self._fits or [t is None for t in results] != [at is None for at in returned]:
            return None
        outputs = [*dict.fromkeys(at for at in returned if at is not None)]
        alignment = ALIGNMENT if self._owners else 1
        there = {i: t for i, t in enumerate(given) if t is not None}
        if not outputs or any(t.data_ptr() % alignment or t.dtype not in _DTYPES for t in there.values()):
            return None
        last = {at: i for i, step in enumerate(self._steps) for at in step if isinstance(at, _Slot)}
        # what is read of what was given comes first, then what is made
        read = [at for at in range(self._given) if at in last or at in outputs]
        order: dict[int, int] = {at: i for i, at in enumerate([*read, *range(self._given, self._size)])}
        where = -1 if self._device.index is None else self._device.index
        places: dict[int, int] = {self._slot(t): i for i, t in there.items()}
        chosen = [places[at] for at in read]
        code = [_DEVICES[self._device.type], where, alignment, len(order), len(chosen)]
        for i in chosen:
            code += _form(there[i])
        code += (len(outputs), *(order[at] for at in outputs))
        for i, step in enumerate(self._steps):
            code += [order[n] if isinstance(n, _Slot) else n for n in step]
            freed = [order[at] for at, end in last.items() if end == i and at >= self._given and at not in outputs]
            code += (len(freed), *freed)
        return Tape(
            operator.itemgetter(*chosen) if len(chosen) > 1 else _single(*chosen),
            torch.tensor(code, dtype=torch.int64, device="cpu"),
            torch.tensor(self._numbers, dtype=torch.float64, device="cpu"),
            tuple(None if at is None else outputs.index(at) for at in returned),
            tuple(self._owners.values()),
        )


def _share_memory(a: Any, b: Any) -> bool:
    """Whether they are tensors of one storage: an operator that may give a view may give a copy."""
    both = all(isinstance(t, Tensor) and t.layout is torch.strided for t in (a, b))
    return both and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _text(text: str) -> list[int]:
    return [len(text), *text.encode("ascii")]


def _can_be_added(to: Tensor, other: Any) -> bool:
    """Whether they are numbers per channel."""
    return (
        isinstance(other, Tensor)
        and to.device.type == "cpu"
        and to.dtype == other.dtype
        and to.dtype in (torch.float32, torch.float64)
        and to.shape == other.shape
        and to.is_contiguous()
        and other.is_contiguous()
    )


def _form(t: Tensor) -> list[int]:
    """What an input has to be."""
    return [_DTYPES[t.dtype], t.dim(), *itertools.chain.from_iterable(zip(t.shape, t.stride(), strict=True))]


def _strided(t: Tensor) -> list[int]:
    return [t.dim(), *t.shape, t.dim(), *t.stride()]


def _single(*chosen: int) -> Callable[[Tensors], Any]:
    """As ``operator.itemgetter``, of one place or none, in a tuple."""
    return lambda given: tuple(given[at] for at in chosen)
