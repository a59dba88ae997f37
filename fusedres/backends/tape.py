"""Schedules of the C++ backend, recorded once and run again without Python between their operators.

A schedule (:meth:`~.contract.Backend.run_schedule`) goes the same way for all maps of the same shapes: the same operators on the same
numbers, with other tensors. :func:`record` runs it and writes that down; :meth:`Tape.play` is one operator, ``fusedres_cpp::play``, that
goes the same way in C++. A tape holds operators of ``fusedres_cpp``, convolutions of the library, fresh tensors, views, fills and sums in
place and copies; a schedule that does anything else (a collective, a pool of the library) has none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

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
_EMPTY, _EMPTY_LIKE, _VIEW, _FILL, _COPY, _ADD, _CONVOLUTION, _CONVOLUTION_BACKWARD, _CALL = range(9)
#: as torch numbers them
_DTYPES = {torch.uint8: 0, torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
_FRESH = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
_FILLS = ("fill_", "zero_")

Tensors = Sequence[Tensor | None]


class Tape(NamedTuple):
    """How a schedule went. ``inputs`` picks what it reads of all that it is given; ``returned`` says which of the tensors that come back is
    at each place of the results, None for none."""

    inputs: Callable[[Tensors], tuple[Tensor, ...]]
    code: Tensor
    numbers: Tensor
    returned: tuple[int | None, ...]

    def play(self, given: Tensors) -> list[Tensor | None]:
        """The results for other tensors ``given``, of the same shapes."""
        found = _play(self.inputs(given), self.code, self.numbers)
        return [None if at is None else found[at] for at in self.returned]


def record(schedule: Callable[[], Tensors], given: Tensors) -> tuple[Tensors, Tape | None]:
    """``(the results of the schedule, how it went)``, None where that is more than a tape holds. ``given``: all tensors that it reads."""
    recorder = _Recorder(given)
    with recorder:
        results = schedule()
    return results, recorder.tape(given, results)


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
        self._fits = True
        for t in given:
            if t is not None:
                self._new(t)
        self._given = self._size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if self._fits:
            try:
                if not self._is_same(func, args, y):
                    self._steps.append(self._step(func, args, kwargs or {}, y))
            except _Refused:
                self._fits = False
        return y

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

    def _step(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> list[int]:
        schema = func._schema
        library, name = schema.name.split("::")
        if library == "fusedres_cpp" and name in _NUMBERS and not kwargs:
            return [_CALL, _NUMBERS[name], *self._arguments(schema.arguments, args)]
        if library == "aten" and name == "convolution_backward":
            return self._library_backward(args, y)
        if library != "aten" or not isinstance(y, Tensor):
            raise _Refused
        if name == "convolution":
            x, weight, bias, *geometry = args
            # before it gets its number: one that is not a map already would be copied
            inputs = [self._slot(x), self._slot(weight), -1 if bias is None else self._slot(bias)]
            return [_CONVOLUTION, self._library_map(y), *inputs, *_geometry(*geometry)]
        if name == "copy_" and len(args) == 2 and not kwargs:
            return [_COPY, self._slot(y), self._slot(args[1])]
        if name == "add_" and not kwargs and _can_be_added(*args):
            return [_ADD, self._slot(y), self._slot(args[1])]
        if name in _FRESH:
            return self._fresh(name, args, kwargs, y)
        if name in _FILLS:
            value = args[1] if len(args) == 2 else 0.0
            if not isinstance(value, float | int):
                raise _Refused
            return [_FILL, self._slot(y), self._number(value)]
        alias = schema.returns[0].alias_info
        if alias is None or alias.is_write:
            raise _Refused
        of, offset = self._slot(args[0]), y.storage_offset() - args[0].storage_offset()
        return [_VIEW, self._new(y), of, *_strided(y), offset]

    def _fresh(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> list[int]:
        if y.device.type != "cpu" or y.dtype not in _DTYPES or kwargs.get("pin_memory"):
            raise _Refused
        if name == "empty_like" and kwargs.get("memory_format") in (None, torch.preserve_format):
            return [_EMPTY_LIKE, self._new(y), self._slot(args[0])]
        return [_EMPTY, self._new(y), _DTYPES[y.dtype], *_strided(y)]

    def _library_map(self, y: Tensor) -> _Slot:
        if not y.is_contiguous(memory_format=torch.channels_last):
            raise _Refused  # copied then, and not where the library chooses otherwise
        return self._new(y)

    def _library_backward(self, args: tuple[Any, ...], y: tuple[Tensor | None, ...]) -> list[int]:
        grad, x, weight, bias_sizes, *geometry, (needs_input, needs_weight, needs_bias) = args
        if needs_bias or bias_sizes is not None:
            raise _Refused
        inputs = [self._slot(grad), self._slot(x), self._slot(weight)]
        dx = self._library_map(y[0]) if needs_input and y[0] is not None else -1
        dweight = self._new(y[1]) if needs_weight and y[1] is not None else -1
        return [_CONVOLUTION_BACKWARD, dx, dweight, *inputs, *_geometry(*geometry)]

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
        last = {at: i for i, step in enumerate(self._steps) for at in step if isinstance(at, _Slot)}
        # what is read of what was given comes first, then what is made
        read = [at for at in range(self._given) if at in last or at in outputs]
        order: dict[int, int] = {at: i for i, at in enumerate([*read, *range(self._given, self._size)])}
        code = [len(order), len(outputs), *(order[at] for at in outputs)]
        for i, step in enumerate(self._steps):
            code += [order[n] if isinstance(n, _Slot) else n for n in step]
            freed = [order[at] for at, end in last.items() if end == i and at >= self._given and at not in outputs]
            code += (len(freed), *freed)
        places: dict[int, int] = {self._slot(t): i for i, t in enumerate(given) if t is not None}
        chosen = [places[at] for at in read]
        return Tape(
            operator.itemgetter(*chosen) if len(chosen) > 1 else _single(*chosen),
            torch.tensor(code, dtype=torch.int64, device="cpu"),
            torch.tensor(self._numbers, dtype=torch.float64, device="cpu"),
            tuple(None if at is None else outputs.index(at) for at in returned),
        )


def _can_be_added(to: Tensor, other: Any) -> bool:
    """Whether they are numbers per channel."""
    return (
        isinstance(other, Tensor)
        and to.dtype == other.dtype
        and to.dtype in (torch.float32, torch.float64)
        and to.shape == other.shape
        and to.is_contiguous()
        and other.is_contiguous()
    )


def _geometry(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> list[int]:
    if transposed or any(output_padding):
        raise _Refused
    return [len(stride), *stride, len(padding), *padding, len(dilation), *dilation, groups]


def _strided(t: Tensor) -> list[int]:
    return [t.dim(), *t.shape, t.dim(), *t.stride()]


def _single(*chosen: int) -> Callable[[Tensors], Any]:
    """As ``operator.itemgetter``, of one place or none, in a tuple."""
    return lambda given: tuple(given[at] for at in chosen)
