"""What the launches of the CUDA C++ kernels share: how a pass is cut into blocks, a kernel's arguments, reductions and their merges."""

# fusedres.kernels is the folder kernels/, which setup.py says and a type checker does not see
# pyright: reportMissingImports=false
from __future__ import annotations

import ctypes
import functools
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from .. import activations
from ..kernels import requests
from ..kernels.pitch import pitch_of
from ..kernels.requests import Request
from ..operands import LazyMap
from .contract import accum_dtype
from .nvrtc import CHANNELS, MAPS, THREADS, Program, Runtime

#: bytes of the widest access, and the most threads side by side (csrc/cuda/rows.cuh)
WIDEST, MOST_LANES = 16, 64
#: rows that a thread walks where nothing is reduced; the fewest and most where its results are, and about how many blocks are to reduce
ROWS, FEWEST_ROWS, MOST_ROWS, BLOCKS = 8, 4, 32, 1024
#: channels of a block of the kernels over numbers per channel (csrc/cuda/batchnorm.cuh)
CHANNELS_OF_BLOCK = 8
#: tiles that one block merges; more are shared out among blocks first
ONE_LEVEL, CHUNK = 1024, 64
#: as csrc/cuda/batchnorm.cuh numbers them
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
#: as csrc/cuda/activation.cuh numbers them
_KINDS = ("none", "relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "mish")

#: the type of CUDA's cuLaunchKernel
_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
)


def _quotient_up(a: int, b: int) -> int:
    return -(-a // b)


class Cut(NamedTuple):
    """A pass in blocks: the grid, the ``lanes`` of a block, and the ``chunk`` of rows that it walks."""

    grid: tuple[int, int]
    lanes: int
    chunk: int


@functools.lru_cache(4096)
def cut(rows: int, channels: int, width: int, reduces: bool) -> Cut:
    """The pass over a map in vectors of ``width``; the same on every GPU, so that a reduction's order is. Never without a block, so that
    the sums of no rows are zero."""
    columns = channels // width
    blocks = _quotient_up(columns, MOST_LANES)
    lanes = _quotient_up(columns, blocks)
    beside = THREADS // lanes
    each = ROWS
    if reduces:
        wanted = _quotient_up(rows, beside * max(1, BLOCKS // blocks))
        each = min(max(wanted, FEWEST_ROWS), MOST_ROWS)
    chunk = beside * each
    return Cut((max(1, _quotient_up(rows, chunk)), blocks), lanes, chunk)


class Arguments:
    """A kernel's arguments in the order in which its ``Args`` has them: addresses and numbers, 8 bytes each."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        #: of each the tensor and the bytes behind its address, or -1 and the bits of a number
        self.parameters: list[tuple[int, int]] = []
        #: whether all maps allow accesses of 16 bytes
        self.is_aligned = True

    def address(self, t: Tensor | None, elements: int = 0) -> None:
        """Of a tensor, so many elements on; 0 of none."""
        if t is None:
            self.parameters.append((-1, 0))
        else:
            self.parameters.append((len(self.tensors), elements * t.element_size()))
            self.tensors.append(t)

    def map(self, x: Tensor | None) -> None:
        """A map: its address and pitch. ValueError where it is none."""
        self.address(x)
        if x is None:
            self.integers(0)
        else:
            pitch, size = pitch_of(x.shape, x.stride()), x.element_size()
            self.integers(pitch)
            # an index of one byte a value has as many values a vector as the maps beside it
            if size > 1 and (pitch * size % WIDEST or x.data_ptr() % WIDEST):
                self.is_aligned = False

    def row(self, of: Tensor | None, row: int = 0) -> None:
        """A row of a per-channel tensor, or a vector."""
        self.address(of, 0 if of is None else row * of.stride(0) if of.dim() > 1 else 0)

    def rows(self, of: Tensor | None, count: int) -> None:
        """The first rows of a per-channel tensor."""
        for row in range(count):
            self.row(of, row)

    def parameter(self, t: Tensor | None, row: int = 0) -> None:
        """A row of a dtype of its own."""
        self.row(t, row)
        self.integers(0 if t is None else _DTYPES[t.dtype])

    def integers(self, *values: int) -> None:
        """64-bit integers."""
        self.parameters += [(-1, value) for value in values]

    def real(self, value: float) -> None:
        """A double."""
        self.parameters.append((-1, int.from_bytes(struct.pack("<d", value), "little", signed=True)))

    def act(self, name: str) -> None:
        """An activation. ValueError for one that is unknown, or that no kernel computes."""
        found = activations.parse(name)
        if found.kind not in _KINDS:
            raise ValueError(f"csrc/cuda/activation.cuh has no activation {found.kind!r}")
        self.integers(_KINDS.index(found.kind))
        self.real(found.slope)


def launch(runtime: Runtime, program: Program, kernel: str, grid: tuple[int, int], arguments: Arguments) -> None:
    """One launch, on the current stream of the device of the tensors. RuntimeError where the driver refuses it."""
    device = arguments.tensors[0].device
    with runtime.on(device):
        functions = runtime.load(program, device)
        tensors, parameters = arguments.tensors, arguments.parameters
        addresses = [t.data_ptr() for t in tensors]
        values = (ctypes.c_int64 * len(parameters))(
            *[rest if at < 0 else addresses[at] + rest for at, rest in parameters]
        )
        # the kernel takes them as one argument
        pointer = ctypes.c_void_p(ctypes.addressof(values))
        handle = functions.handles[kernel]
        error = _LAUNCHER(runtime.launcher)(
            handle, *grid, 1, THREADS, 1, 1, 0, runtime.stream(device), ctypes.addressof(pointer), None
        )
    if error:
        raise RuntimeError(f"fusedres: the driver has refused to launch {kernel}: error {error}")
    observer = requests.observer()
    if observer is not None:
        observer(Request(functions.owner, handle, (*grid, 1), THREADS, 0, tuple(parameters)), tensors)


# ---- passes over maps ------------------------------------------------------------------------------------------------


class Pass(Arguments):
    """A pass of a ``kernel`` over the rows of the map ``walked``, with the arguments that it has so far."""

    def __init__(self, runtime: Runtime, kernel: str, walked: Tensor) -> None:
        super().__init__()
        self.runtime, self.kernel, self.walked = runtime, kernel, walked
        self.rows_walked, self.channels = walked.shape[0] * walked.shape[2] * walked.shape[3], walked.shape[1]
        #: where partials stand among the parameters, and how many there are for each block and channel
        self._partials: list[tuple[int, int]] = []
        #: the rows of a tile of partials
        self.chunk = 0

    def operand(self, x: LazyMap | None) -> None:
        """A map with its scale and shift."""
        self.map(None if x is None else x.raw)
        self.rows(None if x is None else x.scale_shift, 2)

    def mean_invstd(self, x: LazyMap | None, reduces: bool) -> None:
        """What sums read of a map, where it ``reduces``. ValueError where that is not there."""
        found = None if x is None or not reduces else x.mean_invstd
        if reduces and found is None:
            raise ValueError("sums are asked for of a map without its mean_invstd")
        self.rows(found, 2)

    def partials(self, parts: int) -> None:
        """Room for so many partial results of a block per channel; none of 0."""
        if parts:
            self._partials.append((len(self.parameters), parts))
        self.integers(0)

    def run(self) -> list[Tensor]:
        """Launch it; what was reduced, ``[parts, tiles, C]`` for each of the partials."""
        width = WIDEST // self.walked.element_size()
        wide = self.is_aligned and self.channels % width == 0
        grid, lanes, self.chunk = cut(self.rows_walked, self.channels, width if wide else 1, bool(self._partials))
        found = []
        for at, parts in self._partials:
            made = torch.empty(
                (parts, grid[0], self.channels), dtype=accum_dtype(self.walked.dtype), device=self.walked.device
            )
            self.parameters[at] = len(self.tensors), 0
            self.tensors.append(made)
            found.append(made)
        self.integers(self.rows_walked, self.channels, lanes, self.chunk)
        launch(
            self.runtime, Program(MAPS, self.walked.dtype), f"{self.kernel}_{'wide' if wide else 'narrow'}", grid, self
        )
        return found


# ---- reductions ------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Two partial results per tile and channel, ``[tiles, C]`` each; of moments with what their mean cannot hold, and with the rows of a
    tile and of all."""

    first: Tensor
    second: Tensor
    rest: Tensor | None = None
    tile_rows: int = 0
    rows: int = 0

    def add_to(self, arguments: Arguments) -> None:
        """As a kernel's argument."""
        arguments.address(self.first)
        arguments.address(self.second)
        arguments.address(self.rest)
        arguments.integers(self.first.shape[0], self.tile_rows, self.rows, self.first.shape[1])


def one_tile(reduced: Tensor, rows: int = 0) -> Tiles:
    """A tensor ``[2, C]`` that holds a reduction of so many rows."""
    return Tiles(reduced[0:1], reduced[1:2], None, rows, rows)


class Reduction:
    """The two moments or sums of a map per channel that one kernel reads next, and merges from the partials.

    In the place of a tensor ``[2, C]`` wherever a primitive reduces; ``bn_coefficients`` takes it for the statistics, ``bn_backward`` for
    the sums, whose values it has afterwards.
    """

    def __init__(self) -> None:
        self.tiles: Tiles | None = None
        #: the sums, in the dtype of arithmetic, and perhaps rounded to that of a parameter
        self.values: Tensor | None = None
        self.rounded: Tensor | None = None

    @property
    def reduced(self) -> Tiles:
        """The partials. ValueError where nothing has been reduced yet."""
        if self.tiles is None:
            raise ValueError("a reduction is read before anything was reduced into it")
        return self.tiles

    def __getitem__(self, row: int, /) -> Tensor:
        if self.values is None:
            raise ValueError("sums are read before bn_backward has merged them")
        return self.values[row]

    def as_gradient(self, row: int, dtype: torch.dtype) -> Tensor:
        """A row of the sums in the dtype of a parameter."""
        rounded = self.rounded
        return rounded[row] if rounded is not None and rounded.dtype == dtype else self[row].to(dtype)


def channel_launch(
    runtime: Runtime, kernel: str, dtype: torch.dtype, channels: int, arguments: Arguments, y: int = 1
) -> None:
    """A launch of a kernel over numbers per channel, in accumulation ``dtype``."""
    launch(runtime, Program(CHANNELS, dtype), kernel, (_quotient_up(channels, CHANNELS_OF_BLOCK), y), arguments)


def _merge(runtime: Runtime, tiles: Tiles, chunk: int, first: Tensor, second: Tensor, rest: Tensor | None) -> None:
    """Chunks of tiles into the rows of ``first``, ``second`` and ``rest``."""
    arguments = Arguments()
    tiles.add_to(arguments)
    arguments.integers(chunk, int(tiles.rows > 0))
    for to in (first, second, rest):
        arguments.address(to)
    count, channels = tiles.first.shape
    channel_launch(runtime, "merge", tiles.first.dtype, channels, arguments, max(1, _quotient_up(count, chunk)))


def merge(runtime: Runtime, tiles: Tiles, out: Tensor | Reduction) -> None:
    """``out`` from the tiles: at once, or what is left of many tiles to the kernel that reads a :class:`Reduction`."""
    count, channels = tiles.first.shape
    if count > ONE_LEVEL:
        level = torch.empty(
            (3, _quotient_up(count, CHUNK), channels), dtype=tiles.first.dtype, device=tiles.first.device
        )
        _merge(runtime, tiles, CHUNK, level[0], level[1], level[2])
        tiles = Tiles(level[0], level[1], level[2], tiles.tile_rows * CHUNK, tiles.rows)
    if isinstance(out, Reduction):
        out.tiles = tiles
    else:
        _merge(runtime, tiles, max(1, tiles.first.shape[0]), out[0], out[1], None)
