"""How ``tests/backends/test_contract*.py`` hold a backend to :mod:`fusedres.backends.contract`: which cases it sees, what it must equal.

A case sees every registered backend that serves the dtype, by its own word. Four are special: ``eager``, which is the measure for the
others and is held to :class:`definition.Definition` in float64 itself; ``cpp``, whose every dtype has kernels of its own, but not for every
case; ``cuda_host``, the kernels of ``cuda`` compiled for the host (:mod:`host_kernels`), likewise; and ``triton`` where there is no GPU,
whose interpreter is slow enough for few cases.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from definition import Definition
from support import Draw, dtype_name
from torch import Tensor

from fusedres.backends import select
from fusedres.backends.contract import Backend
from fusedres.specs import Geometry, Pool
from fusedres.testing import assert_parity, error

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: in which dtypes a backend sees every case, where it has kernels that share their paths with another's
THOROUGH = {"cpp": (torch.float32, torch.bfloat16), "cuda_host": (torch.bfloat16,)}
INTERPRETED = not torch.cuda.is_available()
#: what NumPy, by which Triton's interpreter computes, adds to a reduction's error: it sums the rows of a tile one after the other, where a
#: GPU does so as a tree
INTERPRETED_REDUCTION = 2e-6
REDUCED = ("moments", "M2", "sums")
DEFINITION = Definition()


class Config(NamedTuple):
    """A backend in one dtype, on the device that it serves here."""

    name: str
    dtype: torch.dtype
    device: str

    @property
    def backend(self) -> Backend:
        """The backend itself."""
        return select.get(self.name)

    @property
    def interpreted(self) -> bool:
        """Whether every instruction is interpreted."""
        return self.name == "triton" and INTERPRETED

    def draw(self, seed: int = 0, **options: Any) -> Draw:
        """Operands for it."""
        return Draw(self.dtype, seed, device=self.device, **options)

    def __str__(self) -> str:
        return f"{self.name}-{dtype_name(self.dtype)}"


def is_corrected(name: str, dtype: torch.dtype) -> bool:
    """Whether a backend computes in ``dtype`` here under test, though it would not for a user: triton in bfloat16, interpreted
    (:mod:`interpreter`, which tests/backends/conftest.py puts around every test of a ``config``)."""
    return name == "triton" and INTERPRETED and dtype == torch.bfloat16 and find_spec("triton") is not None


def configs(only: Iterable[str] | None = None, *, eager: bool = False) -> list[Config]:
    """Every backend in every dtype that it serves here; of ``eager`` float64 alone unless asked for all of it."""
    return [
        Config(name, dtype, device)
        for name in (select.names() if only is None else only)
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
        for dtype in DTYPES
        if select.why_not(name, torch.device(device), dtype) is None or is_corrected(name, dtype)
        if name != "eager" or (device == "cpu" and (eager or dtype == torch.float64))
    ]


@dataclass(frozen=True)
class Table:
    """Cases by name. ``few``: what a dtype sees that shares its kernels' paths with another. ``interpreted``: what an interpreter sees.
    ``quick``: what is not slow, where that is not all of them; an interpreter takes turns instead."""

    cases: Mapping[str, Any]
    few: tuple[str, ...]
    interpreted: tuple[str, ...]
    quick: frozenset[str] | None = None

    def of(self, config: Config) -> tuple[str, ...]:
        """The names of the cases for a backend in a dtype."""
        if config.interpreted:
            return self.interpreted
        return tuple(self.cases) if config.dtype in THOROUGH.get(config.name, DTYPES) else self.few

    def interpreting(self, *names: str) -> Table:
        """The same where an interpreter sees only these."""
        return replace(self, interpreted=names)

    def turn(self, mine: int, of: int = 2) -> Table:
        """The same for one of so many tests that take turns: quick are the few, and its part of the other cases."""
        names = [name for name in self.cases if name not in self.few]
        return replace(self, quick=frozenset((*self.few, *names[mine::of])))

    def crossed(self, others: Mapping[str, Any], interpreted: Iterable[str]) -> Table:
        """Every case with every one of ``others``, as pairs; an interpreter sees of these only ``interpreted``. Quick are as many as bring
        each case together with each value that ``others`` have anywhere, and each of ``others`` with some case."""

        def pairs(names: Iterable[str], of: Iterable[str]) -> dict[str, Any]:
            return {f"{name}: {other}": (self.cases[name], others[other]) for name in names for other in of}

        values = {name: {*enumerate(of if isinstance(of, tuple) else (of,))} for name, of in others.items()}
        quick, used = set[str](), collections.Counter[str]()
        # the few first, which are to see all of the others by themselves
        for name in dict.fromkeys((*self.few, *self.cases)):
            missing = set.union(*values.values())
            while missing:
                # what was used least, of what brings anything new
                best = min(
                    (o for o in others if values[o] & missing), key=lambda o: (used[o], -len(values[o] & missing))
                )
                missing -= values[best]
                used[best] += 1
                quick.add(f"{name}: {best}")
        seen = pairs(self.interpreted, interpreted)
        return Table(pairs(self.cases, others), tuple(pairs(self.few, others)), tuple(seen), frozenset(quick))


@contextlib.contextmanager
def exact_and_fused() -> Iterator[None]:
    """Kernels of a backend's own wherever it has them, and no TF32 in the library: the rule compares IEEE float32."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        if not isinstance(select.load("triton"), str):
            from fusedres.backends.triton import use_plan

            stack.enter_context(use_plan("fused"))
        yield


def each(
    table: Table | None = None, *, eager: bool = False, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> Callable[[Callable], Callable]:
    """Run a test for every backend and dtype (of ``dtypes``) as the argument ``config``, and for every case that ``table`` has for it as
    ``case``. ``eager``: also for eager in the dtypes in which it is the measure."""

    def mark(test: Callable) -> Callable:
        test.each = table, eager, dtypes
        return test

    return mark


def parametrize(metafunc: pytest.Metafunc) -> None:
    """What ``pytest_generate_tests`` does for tests that are marked by :func:`each`."""
    if "config" not in metafunc.fixturenames:
        return
    table, eager, dtypes = metafunc.function.each
    found = [c for c in configs(metafunc.config.getoption("--backend"), eager=eager) if c.dtype in dtypes]
    if table is None:
        metafunc.parametrize("config", found, ids=str)
        return
    # a case's dtypes and backends side by side: what they are given and compared with is made once (support.Draw, _Reference)
    rows = [
        pytest.param(
            config, table.cases[name], id=f"{config}-{name}", marks=[pytest.mark.slow] * waits(config, table, name)
        )
        for name in table.cases
        for dtype in dtypes
        for config in found
        if config.dtype == dtype and name in table.of(config)
    ]
    metafunc.parametrize(("config", "case"), rows)


#: the dtypes of an interpreter, which take turns: of each case one is seen by default, the others are slow
TURNS = (torch.float32, torch.bfloat16, torch.float16)


def waits(config: Config, table: Table, name: str) -> bool:
    """Whether a case is slow: it is another dtype's turn, or others bring together what it does."""
    if config.interpreted:
        turn = table.of(config).index(name) % len(TURNS)
        return config.dtype in TURNS and TURNS.index(config.dtype) != turn
    return table.quick is not None and name not in table.quick


Step = Callable[[Backend, Draw], dict[str, Tensor | None]]


def conforms(config: Config, step: Step, *, values: int = 10**4, pad: tuple[int, int] = (3, 5)) -> None:
    """Assert that what ``step(backend, draw)`` returns is on config's backend as right as on eager, against the definition in float64;
    that the step wrote nothing but that; and that a second run gives the same bits.

    Fresh numbers are drawn several times and medians compared: over few ``values``, eager is right by luck too often. What is not floating
    point has to be equal to eager's.
    """
    seeds = 1 if config.interpreted or config.dtype == torch.float64 else 5 if values < 2000 else 3

    def run(backend: Backend, seeds: int = seeds, truth: bool = False) -> list[dict[str, Tensor]]:
        every = []
        for seed in range(seeds):
            draw = config.draw(seed, truth=truth, pad=pad)
            found = step(backend, draw)
            draw.check()
            every.append({key: value for key, value in found.items() if value is not None})
        return every

    ours = run(config.backend)
    eager, truth = _REFERENCE.of(
        config, step, (seeds, pad), lambda: (run(select.get("eager")), run(DEFINITION, truth=True))
    )
    for key, value in ours[0].items():
        mine, theirs = ([found[key] for found in side] for side in (ours, eager))
        if not value.is_floating_point():
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), key
        elif config.interpreted and key.endswith(REDUCED):
            assert_reduction(key, mine[0], theirs[0], truth[0][key])
        else:
            assert_parity(mine, theirs, [found[key] for found in truth], key)
    if not config.interpreted:
        for key, value in run(config.backend, seeds=1)[0].items():
            assert torch.equal(value, ours[0][key]), f"{key}: two runs differ"


class _Reference:
    """What eager and the definition make of the last step. The next backend in the same dtype makes the same step: its code on the very
    same things but for the ``config``, which says nothing else to it than whether it is interpreted."""

    def __init__(self) -> None:
        self._step: tuple[Any, ...] = ()
        self._found: Any = None

    def of(self, config: Config, step: Step, more: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Of ``step``, made where it is not that of the last call."""
        closed = [cell.cell_contents for cell in step.__closure__ or ()]
        around = [None if isinstance(value, Config) else value for value in closed]
        key = (step.__code__, config.dtype, config.device, config.interpreted, *more, *around)
        # by identity: a step that notes what happens does so in a list of its own
        if len(key) != len(self._step) or not all(a is b or _same(a, b) for a, b in zip(key, self._step, strict=True)):
            self._step, self._found = key, make()
        return self._found


def _same(a: Any, b: Any) -> bool:
    """Of what has no identity."""
    return type(a) is type(b) and isinstance(a, (bool, int, str, tuple)) and a == b


_REFERENCE = _Reference()


def assert_reduction(key: str, ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The rule for a reduction by Triton's interpreter."""
    for mine, theirs in zip(error(ours, truth), error(eager, truth), strict=True):
        assert mine <= 2 * theirs + INTERPRETED_REDUCTION, f"{key}: error {mine:.3g}, eager's own {theirs:.3g}"


def moments(stats: Tensor, values: int, prefix: str = "") -> dict[str, Tensor]:
    """Statistics of maps of so many ``values`` as results: M2, and the mean beside the deviation, by which its error is measured."""
    mean, m2 = stats[0], stats[1]
    return {f"{prefix}moments": torch.stack([mean, (m2 * mean.numel() / values).sqrt()]), f"{prefix}M2": m2}


def sums_of(sums: Tensor | None, prefix: str = "") -> dict[str, Tensor]:
    """A BatchNorm's sums as a result, where there are any: both, which are sums of as many terms of the same size, of which one alone may
    happen to cancel."""
    return {} if sums is None else {f"{prefix}sums": sums}


def fresh(value: Tensor) -> Tensor:
    """``value``, which has to be a channels_last map of its own."""
    assert value.is_contiguous(memory_format=torch.channels_last)
    return value


# ---- cases -----------------------------------------------------------------------------------------------------------


class Convolution(NamedTuple):
    """The shapes of a convolution. ``deep``: its weight is given channels_last, as where few pixels meet a large one."""

    shape: tuple[int, ...]
    outputs: int
    kernel: tuple[int, int]
    geometry: Geometry
    deep: bool = False

    @property
    def weight(self) -> tuple[int, ...]:
        """The weight's shape."""
        return (self.outputs, self.shape[1] // self.geometry.groups, *self.kernel)

    @property
    def out(self) -> tuple[int, ...]:
        """The output's shape."""
        return (self.shape[0], self.outputs, *self.geometry.out_size(self.shape[2:], self.kernel))

    @property
    def values(self) -> int:
        """Of the smaller of both maps."""
        return min(math.prod(self.shape), math.prod(self.out))

    def draw_weight(self, draw: Draw) -> Tensor:
        """A random weight."""
        weight = draw.weight(*self.weight)
        return draw.placed(weight.to(memory_format=torch.channels_last)) if self.deep else weight


def _conv(n, c, h, w, k, kernel, stride=1, padding=0, dilation=1, groups=1, deep=False) -> Convolution:
    pairs = ((v, v) if isinstance(v, int) else v for v in (kernel, stride, padding, dilation))
    kernel, *geometry = pairs
    return Convolution((n, c, h, w), k, kernel, Geometry(*geometry, groups), deep)


SMALL = {
    "1x1": _conv(2, 16, 5, 4, 32, 1),  # the plain product, aligned: no padding, no masked taps
    "1x1 odd": _conv(2, 5, 7, 5, 35, 1),  # nothing divides a tile or 8
    "1x1 tiles": _conv(2, 72, 9, 9, 136, 1),  # more than one tile in rows, outputs and the reduced dimension
    "1x1 stride 2": _conv(2, 6, 7, 6, 9, 1, 2),  # a projection: three of four residues meet no tap
    "1x1 padded": _conv(1, 5, 4, 5, 6, 1, 1, 1),  # the border is a product of zeros, after scale and shift
    "3x3": _conv(2, 8, 6, 5, 8, 3, 1, 1),
    "3x3 odd": _conv(1, 35, 5, 9, 19, 3, 1, 1),
    "3x3 valid": _conv(2, 5, 6, 5, 7, 3),  # no padding, yet the input gradient reaches over the border
    "3x3 stride 2": _conv(2, 5, 8, 7, 6, 3, 2, 1),  # even and odd sizes: residues of different extent
    "3x3 stride 3": _conv(1, 5, 10, 8, 6, 3, 3),  # the last column meets no window
    "3x3 dilated": _conv(2, 5, 8, 9, 6, 3, 1, 2, 2),
    "3x3 dilated, stride 2": _conv(1, 5, 9, 8, 6, 3, 2, 2, 2),  # dilation and stride share a factor
    "3x3 dilated by 3, stride 2": _conv(1, 5, 9, 10, 6, 3, 2, 3, 3),
    "mixed": _conv(1, 5, 7, 9, 6, (3, 2), (2, 1), (0, 1), (1, 2)),  # the dimensions told apart
    "groups": _conv(2, 9, 5, 4, 15, 3, 1, 1, 1, 3),
    "depthwise": _conv(2, 3, 6, 5, 3, 3, 1, 1, 1, 3),
    "depthwise multiplier": _conv(1, 2, 6, 5, 4, 3, 2, 1, 1, 2),
    "stem": _conv(1, 3, 9, 11, 16, 7, 2, 3),
    "pixel": _conv(3, 5, 1, 1, 6, 1),  # maps of one pixel, whose strides say nothing
    "row": _conv(2, 5, 1, 9, 6, 3, 1, 1),
}
LARGER = {
    "1x1 of many channels": _conv(2, 600, 5, 5, 130, 1),
    "1x1 strided": _conv(2, 48, 9, 8, 64, 1, 2),
    "3x3 strided": _conv(2, 32, 9, 10, 48, 3, 2, 1),
    "3x3 dilated, aligned": _conv(1, 16, 11, 9, 16, 3, 1, 2, 2),
    "7x7 strided": _conv(2, 3, 19, 18, 24, 7, 2, 3),
    "3x1": _conv(2, 16, 7, 6, 16, (3, 1), 1, (1, 0)),
    "1x1 of a pixel": _conv(1, 64, 1, 1, 64, 1),
    # 3x3 of stride 1 on maps that are worth Winograd's algorithm
    "even sizes": _conv(2, 64, 20, 20, 64, 3, 1, 1),
    "odd sizes, tiles across images": _conv(5, 32, 13, 11, 48, 3, 1, 1),
    "channels beyond one chunk": _conv(2, 528, 14, 10, 64, 3, 1, 1),
    "outputs not of a register": _conv(2, 48, 16, 17, 37, 3, 1, 1),
    "growth rate": _conv(2, 128, 14, 14, 32, 3, 1, 1),
    "rests of both tiles, outputs not of a register": _conv(2, 80, 16, 17, 37, 3, 1, 1),
    "one row": _conv(6, 32, 1, 70, 32, 3, 1, 1),
    "one column": _conv(6, 32, 70, 1, 32, 3, 1, 1),
    "without padding": _conv(2, 32, 17, 18, 32, 3),
    "wide padding": _conv(2, 32, 15, 12, 32, 3, 1, 2),
    "wide rows": _conv(1, 32, 6, 120, 32, 3, 1, 1),
    # outputs of several panels, on so few pixels that their weights are packed where they are multiplied, or else keep to a thread
    "a panel's own weights, 1x1": _conv(1, 256, 9, 8, 272, 1),
    "a panel's own weights": _conv(1, 64, 12, 12, 272, 3, 1, 1),
    "a panel's own weights in the input gradient": _conv(1, 256, 12, 12, 64, 3, 1, 1),
    "panel after panel": _conv(2, 64, 13, 12, 272, 3, 1, 1),
    # groups that are wide enough for kernels, each a slice
    "groups, 1x1": _conv(2, 16, 7, 6, 24, 1, groups=4),
    "groups, 1x1 strided": _conv(2, 24, 7, 6, 48, 1, 2, groups=3),
    "groups of a register": _conv(2, 48, 9, 8, 48, 3, 1, 1, groups=3),
    "groups that narrow, strided": _conv(1, 64, 9, 10, 16, 3, 2, 1, groups=2),
    # narrow ones that share vectors, in one block and in several
    "groups of 2 abreast, dilated": _conv(3, 32, 8, 9, 32, 3, 1, 2, 2, 16),
    "groups of 4 abreast": _conv(2, 96, 9, 7, 96, 3, 1, 1, 1, 24),
    "groups of 4 abreast, 1x1 strided": _conv(2, 64, 7, 6, 64, 1, 2, groups=16),
    "groups of 4 abreast, of many pixels": _conv(2, 64, 24, 25, 64, 3, 1, 1, groups=16),
    "groups of 8 abreast, strided": _conv(2, 80, 11, 9, 80, 3, 2, 1, 1, 10),
    # and those whose last vector holds fewer than the others, or that are less than one
    "13 groups of 8 abreast": _conv(2, 104, 9, 8, 104, 3, 1, 1, 1, 13),
    "5 groups of 4 abreast, strided": _conv(2, 20, 11, 9, 20, 3, 2, 1, 1, 5),
    "3 groups of 2 abreast, 1x1": _conv(3, 6, 8, 7, 6, 1, groups=3),
    "groups of 16 abreast, 5x5": _conv(1, 64, 9, 8, 64, 5, 1, 2, groups=4),
    "depthwise, wide": _conv(2, 48, 9, 8, 48, 3, 1, 1, groups=48),
    "depthwise, no register full": _conv(2, 37, 9, 21, 37, 3, 1, 1, groups=37),
    "depthwise 5x5, strided": _conv(2, 40, 12, 11, 40, 5, 2, 2, groups=40),
    "depthwise 7x7": _conv(1, 32, 9, 19, 32, 7, 1, 3, groups=32),
    "depthwise 4x6, strided along a row": _conv(2, 24, 9, 14, 24, (4, 6), (1, 2), (0, 3), groups=24),
    "depthwise 1x2, strided": _conv(2, 24, 9, 8, 24, (1, 2), 2, groups=24),
    "depthwise, rows dilated, most outside": _conv(2, 24, 3, 9, 24, 3, (2, 1), (4, 1), (3, 1), 24),
    "depthwise, more rows than a tile": _conv(2, 32, 30, 26, 32, 3, 1, 1, groups=32),
    "depthwise, more channels than a task": _conv(1, 600, 6, 48, 600, 3, 1, 1, groups=600),
    "depthwise, wide padding": _conv(2, 24, 5, 4, 24, 3, 1, 3, groups=24),
    "groups worth Winograd's algorithm": _conv(2, 64, 20, 20, 64, 3, 1, 1, groups=2),
    "a phase of a strided 5x5's input gradient": _conv(2, 32, 24, 25, 32, 5, 2, 2),
    # so few pixels that a channels_last weight is read as it lies
    "few pixels, 3x3": _conv(2, 64, 4, 3, 96, 3, 1, 1, deep=True),
    "few pixels, 3x3, odd outputs": _conv(1, 48, 5, 4, 37, 3, 1, 1, deep=True),
    "few pixels, 1x1, a rest of channels": _conv(2, 72, 2, 2, 40, 1),
    "few pixels, 3x3, a rest of channels": _conv(1, 44, 4, 4, 40, 3, 1, 1, deep=True),
    "few pixels, 1x1, groups, a rest of channels": _conv(2, 120, 2, 2, 60, 1, groups=3, deep=True),
    "few pixels, deep 1x1": _conv(1, 528, 2, 3, 80, 1, deep=True),
    "few pixels, 3x3 strided": _conv(3, 32, 5, 6, 48, 3, 2, 1, deep=True),
    "few pixels, 1x1 strided": _conv(2, 32, 7, 6, 64, 1, 2, deep=True),
    "few pixels, 3x3 dilated": _conv(1, 32, 6, 5, 16, 3, 1, 2, 2, deep=True),
    "few pixels, most of them outside": _conv(2, 32, 1, 1, 16, (5, 3), 1, (2, 1), deep=True),
    "few outputs of many pixels": _conv(1, 32, 12, 11, 32, 3, 3, deep=True),
    "few pixels, groups": _conv(2, 64, 4, 3, 64, 3, 1, 1, groups=2, deep=True),
    "few pixels, many groups": _conv(1, 192, 5, 5, 96, 3, 1, 1, groups=6, deep=True),
    "few pixels, groups, 1x1": _conv(2, 128, 4, 4, 64, 1, groups=4, deep=True),
    "pixels that only the gradients call few": _conv(1, 32, 7, 7, 48, 3, 1, 1, deep=True),
    # and one as it is allocated, with unfolded pixels
    "few pixels, unfolded": _conv(2, 64, 4, 3, 96, 3, 1, 1),
    "few pixels, unfolded, odd outputs, strided": _conv(3, 32, 5, 6, 37, 3, 2, 1),
    "few pixels, unfolded, groups": _conv(2, 96, 3, 4, 96, 3, 1, 1, groups=3),
    "few pixels, unfolded, dilated": _conv(1, 32, 6, 5, 16, 3, 1, 2, 2),
    "few pixels, unfolded, most of them outside": _conv(2, 16, 1, 1, 16, (5, 3), 1, (2, 1)),
    "unfolded for the weight's gradient alone": _conv(1, 32, 7, 7, 48, 3, 1, 1),
}
CONVOLUTIONS = Table(
    {**SMALL, **LARGER}, ("1x1", "3x3 stride 2", "mixed", "groups", "pixel", "even sizes"), tuple(SMALL)
)


class Maps(NamedTuple):
    """A map's shape, and the channels of NaN before and behind it (a map of its own with none)."""

    shape: tuple[int, ...]
    pad: tuple[int, int] = (3, 5)

    @property
    def values(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


OWN = (0, 0)
SHAPES = Table(
    {
        "odd": Maps((2, 5, 3, 7)),
        "aligned": Maps((2, 16, 4, 4)),
        "wide": Maps((1, 131, 3, 5)),  # more channels than a block
        "long": Maps((2, 35, 9, 13)),  # several tiles of rows
        "channels of a register": Maps((2, 32, 7, 5), OWN),
        "channels not of a register": Maps((2, 67, 6, 5), OWN),
        "three channels: rows folded": Maps((3, 3, 9, 7), OWN),
        "five channels: rows folded, a rest": Maps((1, 5, 7, 7), OWN),
        "one channel": Maps((2, 1, 5, 5), OWN),
        "odd and too wide to fold": Maps((1, 513, 3, 3), OWN),
        "more channels than a chunk": Maps((2, 1040, 3, 3), OWN),
        "one row": Maps((1, 48, 1, 1), OWN),
        "one pixel an image": Maps((5, 24, 1, 1), OWN),
        "many tiles": Maps((2, 20, 30, 31), OWN),
        "several tiles of wide rows": Maps((1, 144, 13, 11), OWN),
        "slices": Maps((2, 32, 5, 6), (32, 32)),
        "narrow slices: no folding": Maps((2, 5, 6, 4), (3, 3)),
        "one channel of many": Maps((2, 1, 4, 5), (3, 3)),
    },
    (
        "channels not of a register",
        "five channels: rows folded, a rest",
        "slices",
        "several tiles of wide rows",
        "odd",
    ),
    ("odd", "aligned", "wide", "long"),
)


class Pooling(NamedTuple):
    """A pool of a map."""

    shape: tuple[int, ...]
    pool: Pool
    pad: tuple[int, int] = (3, 5)

    @property
    def out(self) -> tuple[int, ...]:
        """The output's shape."""
        return self.pool.out_shape(self.shape)

    @property
    def values(self) -> int:
        """Of the output."""
        return math.prod(self.out)


POOLS = {
    "stem": Pool("max", (3, 3), (2, 2), (1, 1)),
    "plain": Pool("max", (2, 2), (2, 2), (0, 0)),
    "apart": Pool("max", (2, 2), (3, 3), (0, 0)),  # pixels that lie in no window
    "overlapping": Pool("max", (3, 2), (1, 1), (1, 1)),
    "mixed": Pool("max", (3, 2), (1, 2), (1, 0)),
    "uneven": Pool("max", (3, 1), (2, 1), (1, 0)),
    "transition": Pool("mean", (2, 2), (2, 2), (0, 0)),  # an odd size drops its remainder
    "remainder": Pool("mean", (3, 2), (3, 2), (0, 0)),
    "mean of many": Pool("mean", (4, 5), (4, 5), (0, 0)),
    "mean of a pixel": Pool("mean", (1, 1), (1, 1), (0, 0)),
}
POOLED = {
    "aligned": Maps((2, 32, 8, 10), OWN),
    "odd": Maps((2, 19, 7, 9), OWN),
    "three channels": Maps((2, 3, 9, 11), OWN),
    "more channels than a chunk": Maps((1, 530, 5, 5), OWN),
    "many tiles": Maps((2, 4, 17, 19), OWN),
    "slices": Maps((2, 8, 7, 8), (8, 8)),
    "five of thirteen": Maps((2, 5, 5, 7)),
    "sixteen of many": Maps((2, 16, 5, 7)),
}


@functools.cache
def poolings() -> Table:
    """Every pool of every map, half of them slow; the interpreter sees two of the maps, and the mean of a whole one."""
    cases = {
        f"{name} {of}": Pooling(maps.shape, pool, maps.pad)
        for name, pool in POOLS.items()
        for of, maps in POOLED.items()
    }
    head = Pooling((2, 5, 5, 7), Pool("mean", (5, 7), (5, 7), (0, 0)))
    few = tuple(name for name in cases if name.endswith(("odd", "slices")))
    shared = ("stem", "plain", "apart", "mixed", "transition")
    interpreted = tuple(f"{name} {of}" for name in shared for of in ("five of thirteen", "sixteen of many"))
    # every other map of a pool, and the other ones of the next
    turns = (f"{name} {of}" for i, name in enumerate(POOLS) for j, of in enumerate(POOLED) if (i + j) % 2 == 0)
    return Table({**cases, "head": head}, few, (*interpreted, "head"), frozenset((*turns, *few, "head")))
