"""Every tile of every kernel: the defaults by kernel, taps and architecture (:data:`ROWS`), and the candidates that tuning measures.

Tiles for a new GPU are rows at the top of :data:`ROWS`, with that GPU's family; launchers, tuner and cross-compiler all read them here. A
convolution of several taps (3x3) is the library's in the default plan, so that its rows only show where a measured plan or
``use_plan("fused")`` says so: measure them there. Nothing here imports Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .operands import Geometry

EPILOGUE_BYTES = 24 * 1024  # shared memory that epilogues use beside the loop's stages, at most
STEP_BYTES = 128  # of the reduced dimension, a step: what a warp's widest loads take of a row
REGISTERS = 224  # of a thread's 255, so that addresses and masks find room


class Arch(NamedTuple):
    """What tiles must know of a device: its ``family`` as compilers name it (``"sm_90"``, ``"gfx942"``), the bytes of shared memory that a
    block may take, the threads of a warp, how many multiprocessors it has, and whether launches there are ``dependent``
    (launch.py)."""

    family: str
    shared: int
    warp: int
    multiprocessors: int = 132
    dependent: bool = False


#: where no device says otherwise
DEFAULT_ARCH = Arch("sm_80", 163 * 1024, 32)


@functools.cache
def arch_of_gpu(device: torch.device) -> Arch:
    """The architecture of a GPU that is here; :data:`DEFAULT_ARCH` for a device that is none."""
    if device.type != "cuda":
        return DEFAULT_ARCH
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name, *_ = properties.gcnArchName.split(":")
        return Arch(name, properties.shared_memory_per_block, properties.warp_size, properties.multi_processor_count)
    return Arch(
        f"sm_{properties.major}{properties.minor}",
        properties.shared_memory_per_block_optin,
        properties.warp_size,
        properties.multi_processor_count,
    )


def is_since_hopper(arch: Arch) -> bool:
    """Whether it is NVIDIA's, of compute capability 9.0 or newer."""
    return arch.family.startswith("sm_") and int(arch.family[3:].rstrip("af")) >= 90


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. (Triton's own is a wrapper for constexprs that takes microseconds on the host.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def block(size: int, smallest: int, largest: int) -> int:
    """The power of two that covers ``size``, within limits that are powers of two."""
    return max(smallest, min(largest, next_power_of_2(size)))


@dataclass(frozen=True)
class ConvConfig:
    """The tile of a convolution: BLOCK_M rows, BLOCK_N columns, BLOCK_K of the reduced dimension a step; warps of 32 threads. With
    ``descriptors`` a 1x1 that has such a form (:func:`is_described`) loads and stores by tensor descriptors (conv_pointwise_forward.py);
    everything else is as without. ``registers``: the most that a thread takes on an NVIDIA GPU, so that more programs run on a
    multiprocessor at once; 0: as many as the compiler likes.

    Raises ValueError for what is no tile: blocks are powers of two from 16 on, warps powers of two up to 16, stages at least 1, registers 0
    or from 32 to 255.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    registers: int = 0

    def __post_init__(self) -> None:
        values = (self.BLOCK_M, self.BLOCK_N, self.BLOCK_K, self.num_warps, self.num_stages)
        powers = all(type(v) is int and v > 0 for v in values) and all(v & (v - 1) == 0 for v in values[:4])
        powers = powers and type(self.descriptors) is bool and type(self.registers) is int
        if not powers or min(values[:3]) < 16 or self.num_warps > 16 or self.registers not in (0, *range(32, 256)):
            raise ValueError(
                f"{self} is no tile: blocks are powers of two from 16 on, num_warps a power of two up to 16, num_stages at least 1, "
                "registers 0 or from 32 to 255"
            )

    def __str__(self) -> str:
        blocks = f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K}"
        by = ", descriptors" if self.descriptors else ""
        by += f", {self.registers} registers" if self.registers else ""
        return f"{blocks}, {self.num_warps} warps, {self.num_stages} stages{by}"


class ConvSize(NamedTuple):
    """What decides a convolution's tile. ``rows`` are pixels: of the output, or for dgrad of one residue of the input; ``channels`` and
    ``outputs`` are those of one group; ``taps`` is R * S, for dgrad times the number of residues (1 is the plain product); ``pending``: the
    gradient is read from two maps."""

    rows: int
    channels: int
    outputs: int
    taps: int
    itemsize: int
    pending: bool = False


class Row(NamedTuple):
    """The tile of a kernel: ``block_m`` x ``block_n`` at most, ``few_n`` columns where there are few rows (FEW_ROWS), ``pending_n`` where
    the gradient is read from two maps; eight warps where the tile has ``eight_from`` values or more, else four, ``max_warps`` at most;
    ``most_stages`` stages at most, and ``step_bytes`` of the reduced dimension a step. With ``paired_stages`` a program of ``paired_warps``
    in 16 bits takes so many stages at most and half a multiprocessor's registers, so that two run on it.
    Without a ``block_m`` there is no such kernel."""

    kernel: str
    taps: str
    family: str
    block_m: int
    block_n: int
    few_n: int
    pending_n: int
    eight_from: int
    max_warps: int = 8
    most_stages: int = 3
    step_bytes: int = STEP_BYTES
    paired_stages: int = 0
    paired_warps: int = 8


MULTIPROCESSOR_REGISTERS = 64 * 1024  # of an NVIDIA GPU, all threads together
FEW_ROWS = 128 * 128  # below, a tile of half the columns gives twice as many programs

# The first row that fits counts: "one" is the plain product, "many" everything else, "any" every architecture.
#
# Forward and dgrad of several taps stay at four warps, measured plans included: they run one flattened loop over (channel, tap) with its
# divisions, and convolution templates of that shape have been miscompiled at eight warps by Triton (wrong values, no error) in other
# projects. A row may raise max_warps once tests/backends have passed with it on a GPU of its family.
ROWS = (
    # of gfx1100 the accumulator and the operands share 256 registers with the epilogue, which spills in the tiles of all others; a thread
    # holds the pending scale and shift of all channels of a step, and of every stage
    Row("forward", "one", "gfx1100", 128, 64, 64, 64, eight_from=128 * 64, most_stages=1, step_bytes=64),
    Row("forward", "many", "gfx1100", 64, 64, 64, 64, eight_from=128 * 64, max_warps=4),
    # as for any; in four warps the compiler stops at 168 registers for a third program, and spills, for which shared memory had no room
    Row("forward", "one", "sm_120", 128, 128, 64, 128, eight_from=128 * 128, paired_stages=2, paired_warps=4),
    # 128 x 128 where there are columns enough: the prologue is repeated for every tile of columns
    Row("forward", "one", "any", 128, 128, 64, 128, eight_from=128 * 128),
    Row("forward", "many", "any", 128, 64, 64, 64, eight_from=128 * 128, max_warps=4),
    # the epilogue's x, base and sums live beside the accumulator, which at 128 x 128 leaves no registers. Before every product its operands
    # go through registers to shared memory, for which all of a program's warps wait: on sm_80 and sm_90 two programs of 128 registers fit
    # without a spill (results/cross-compile.md), of which one loads while the other multiplies
    Row("dgrad", "one", "sm_80", 128, 64, 64, 64, eight_from=128 * 64, paired_stages=2),
    Row("dgrad", "one", "sm_90", 128, 64, 64, 64, eight_from=128 * 64, paired_stages=2),
    Row("dgrad", "one", "any", 128, 64, 64, 64, eight_from=128 * 64),
    # there the next step waits in registers, which spills where the gradient is pending; without it as many warps run at once, or more
    Row("dgrad", "many", "gfx90a", 64, 64, 64, 64, eight_from=128 * 64, max_warps=4, most_stages=1),
    Row("dgrad", "many", "gfx942", 64, 64, 64, 64, eight_from=128 * 64, max_warps=4, most_stages=1),
    # with a third stage only one program fits in shared memory, and it spills
    Row("dgrad", "many", "sm_120", 64, 64, 64, 64, eight_from=128 * 64, max_warps=4, most_stages=2),
    Row("dgrad", "many", "any", 64, 64, 64, 64, eight_from=128 * 64, max_warps=4),
    # BLOCK_M of C by BLOCK_N of K, at one tap: the matrix instructions of sm_90 and sm_100 want 64 rows at least, and a growth rate is
    # narrower than that; a pending gradient is two maps, for which 128 columns leave no registers. Pairs as for dgrad,
    # but not of several taps on sm_80, which would spill
    Row("wgrad", "one", "sm_80", 128, 128, 128, 64, eight_from=64 * 128, paired_stages=2),
    Row("wgrad", "any", "sm_90", 128, 128, 128, 64, eight_from=64 * 128, paired_stages=3),
    # as for any; a third stage spills
    Row("wgrad", "many", "sm_100", 128, 128, 128, 64, eight_from=64 * 128, most_stages=2),
    Row("wgrad", "many", "sm_103", 128, 128, 128, 64, eight_from=64 * 128, most_stages=2),
    # of gfx1100 128 columns leave no registers with one map either
    Row("wgrad", "any", "gfx1100", 128, 64, 64, 64, eight_from=64 * 128),
    Row("wgrad", "any", "any", 128, 128, 128, 64, eight_from=64 * 128),
    # both gradients of a 1x1: BLOCK_M pixels a step, BLOCK_N of C, all of K. gfx1100 has no registers for two accumulators; where operands
    # of a matrix instruction are registers, those of the weight stay in them
    Row("backward", "one", "gfx1100", 0, 0, 0, 0, eight_from=0),
    Row("backward", "one", "sm_90", 32, 128, 128, 128, eight_from=0),
    Row("backward", "one", "sm_100", 32, 128, 128, 128, eight_from=0),
    Row("backward", "one", "sm_103", 32, 128, 128, 128, eight_from=0),
    Row("backward", "one", "any", 32, 64, 64, 64, eight_from=0),
)

#: of the kernel of both gradients: the values of a weight's gradient that a program gathers in registers, and the most outputs of which it
#: holds a step; fewer where products are float32's own, whose operands are all registers
GATHERED = 128 * 128
MOST_OUTPUTS, MOST_EXACT_OUTPUTS = 256, 64


def row(kernel: str, taps: int, arch: Arch) -> Row:
    """The row of :data:`ROWS` for a kernel with so many taps: forward, dgrad, wgrad, or backward (of one tap). ValueError for another."""
    for found in ROWS:
        if (
            found.kernel == kernel
            and found.taps in ("any", "one" if taps == 1 else "many")
            and found.family in ("any", arch.family)
        ):
            return found
    raise ValueError(
        f"no tile for kernel {kernel!r}, {taps} taps on {arch.family}: expected forward, dgrad, wgrad, or backward of one tap"
    )


def stages(bytes_per_stage: int, arch: Arch) -> int:
    """How many steps of a loop can be in flight in shared memory, three at most. It changes no result."""
    # warps of 64 are AMD's, where the newest step waits in registers, if it is small enough for them
    waiting = int(arch.warp == 64 and 2 * bytes_per_stage <= arch.shared)
    return max(1, min(3, (arch.shared - EPILOGUE_BYTES) // bytes_per_stage + waiting))


class _Product(NamedTuple):
    """A convolution as a product of m x k by k x n: how many maps are loaded for a tile of each operand, and how many float32 tiles live
    beside the accumulator in the epilogue."""

    m: int
    n: int
    k: int
    maps: tuple[int, int]
    epilogue: int


def _product(kernel: str, size: ConvSize) -> _Product:
    gradients = 2 if size.pending else 1
    if kernel == "forward":
        return _Product(size.rows, size.outputs, size.channels, (1, 1), 1)
    if kernel == "dgrad":
        return _Product(size.rows, size.channels, size.outputs, (gradients, 1), 2)
    return _Product(size.channels, size.outputs, size.rows, (1, gradients), 0)


def has_both(outputs: int, exact: bool, arch: Arch) -> bool:
    """Whether one kernel makes both gradients of a 1x1 convolution of so many ``outputs``, all of which a program holds. ``exact``: whether
    float32 is multiplied as it is."""
    return outputs <= (MOST_EXACT_OUTPUTS if exact else MOST_OUTPUTS) and row("backward", 1, arch).block_m > 0


def backward_config(size: ConvSize, arch: Arch) -> ConvConfig:
    """The default tile of both gradients of a 1x1 convolution in one kernel."""
    found, block_k = row("backward", 1, arch), block(size.outputs, 16, MOST_OUTPUTS)
    block_m, block_n = found.block_m, min(found.block_n, GATHERED // block_k)
    if size.itemsize > 2:  # which fills registers and shared memory twice
        block_m, block_n = block_m // 2, min(32, block_n)
    return _backward_tile(block_m, block(size.channels, 16, block_n), block_k, found.max_warps, size, arch)


def _backward_tile(block_m: int, block_n: int, block_k: int, warps: int, size: ConvSize, arch: Arch) -> ConvConfig:
    """With as many stages as fit beside the weight, and beside what is multiplied, which is stored once more, in float32 in two orders."""
    orders = 2 if size.itemsize > 2 else 1
    kept = (block_k * block_n + orders * block_m * (block_k + block_n)) * size.itemsize
    step = ((2 if size.pending else 1) * block_k + block_n) * block_m * size.itemsize + 3 * 4 * block_k
    return ConvConfig(block_m, block_n, block_k, warps, max(1, min(3, 1 + (arch.shared - kept) // step)))


def conv_config(kernel: str, size: ConvSize, arch: Arch) -> ConvConfig:
    """The default tile of a convolution's kernel: forward, dgrad, wgrad, or backward of one tap."""
    if kernel == "backward":
        return backward_config(size, arch)
    found, product = row(kernel, size.taps, arch), _product(kernel, size)
    largest_n = found.few_n if size.rows < FEW_ROWS else found.block_n
    largest_n = min(largest_n, found.pending_n) if size.pending else largest_n
    block_m, block_n = block(product.m, 16, found.block_m), block(product.n, 16, largest_n)
    block_k = block(product.k, 16, found.step_bytes // size.itemsize)
    warps = min(found.max_warps, 8 if block_m * block_n >= found.eight_from else 4)
    most_stages = min(found.most_stages, stages(_step(product, block_m, block_n, block_k, size.itemsize), arch))
    if found.paired_stages and warps == found.paired_warps and size.itemsize == 2:
        registers = min(255, MULTIPROCESSOR_REGISTERS // (2 * 32 * warps))
        return ConvConfig(block_m, block_n, block_k, warps, min(found.paired_stages, most_stages), registers=registers)
    return ConvConfig(block_m, block_n, block_k, warps, most_stages)


def _step(product: _Product, block_m: int, block_n: int, block_k: int, itemsize: int) -> int:
    """The bytes that a step of the loop loads."""
    return (product.maps[0] * block_m + product.maps[1] * block_n) * block_k * itemsize


def forward_config(size: ConvSize, arch: Arch) -> ConvConfig:
    """The default tile of a convolution."""
    return conv_config("forward", size, arch)


def dgrad_config(size: ConvSize, arch: Arch) -> ConvConfig:
    """The default tile of an input gradient."""
    return conv_config("dgrad", size, arch)


def wgrad_config(size: ConvSize, arch: Arch) -> ConvConfig:
    """The default tile of a weight gradient."""
    return conv_config("wgrad", size, arch)


def smaller(config: ConvConfig) -> list[ConvConfig]:
    """Tiles that need less shared memory and fewer registers than ``config``, the nearest first: fewer stages, two at least, then also half
    the columns. What is smaller still is not worth a kernel."""
    staged = [replace(config, num_stages=stages) for stages in range(config.num_stages - 1, 1, -1)]
    if config.BLOCK_N == 16:
        return staged
    return [*staged, replace(config, BLOCK_N=config.BLOCK_N // 2, num_stages=min(2, config.num_stages))]


# of both gradients: BLOCK_M, BLOCK_N, warps
BACKWARD_CANDIDATES = (
    (16, 64, 8),
    (32, 32, 4),
    (32, 32, 8),
    (32, 64, 4),
    (32, 64, 8),
    (32, 128, 8),
    (64, 32, 8),
    (64, 64, 8),
)


def _backward_candidates(size: ConvSize, arch: Arch) -> list[ConvConfig]:
    """As :func:`conv_candidates`."""
    block_k, maps, found = block(size.outputs, 16, MOST_OUTPUTS), 2 if size.pending else 1, list[ConvConfig]()
    for block_m, block_n, warps in BACKWARD_CANDIDATES:
        # the weight's gradient, two sums and a product; in the storage's type a step's maps
        registers = (
            block_k * block_n + 4 * block_m * block_n + block_m * (maps * block_k + block_n) * size.itemsize // 4
        )
        if registers // (32 * warps) <= REGISTERS and block_n < 2 * size.channels:
            tile = _backward_tile(block_m, block_n, block_k, warps, size, arch)
            found += [tile] if tile.num_stages > 1 or arch.warp == 64 else []
    return found


def check(kernel: str, taps: int, arch: Arch, config: ConvConfig) -> ConvConfig:
    """``config`` itself; ValueError where its warps are more than the kernel's row allows."""
    most = row(kernel, taps, arch).max_warps
    if config.num_warps > most:
        raise ValueError(f"{kernel} of {taps} taps runs with {most} warps at most on {arch.family}, found {config}")
    return config


# BLOCK_M, BLOCK_N, warps
CANDIDATES = (
    (64, 32, 4), (64, 64, 4), (64, 128, 4), (64, 256, 8), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8),
    (128, 256, 8), (256, 64, 8), (256, 128, 8),
)  # fmt: skip


def conv_candidates(kernel: str, size: ConvSize, arch: Arch) -> list[ConvConfig]:
    """The tiles that are worth a measurement beside :func:`conv_config`.

    Left out is what needs more registers or shared memory than there are, or more warps than its row allows, and what computes a quarter
    more outside the result than the best.
    """
    if kernel == "backward":
        return _backward_candidates(size, arch)
    product, allowed = _product(kernel, size), row(kernel, size.taps, arch)

    def waste(config: ConvConfig) -> float:
        padded = cdiv(product.m, config.BLOCK_M) * config.BLOCK_M * cdiv(product.n, config.BLOCK_N) * config.BLOCK_N
        return padded / (product.m * product.n)

    found = []
    for block_m, block_n, warps in CANDIDATES:
        block_k = block(product.k, 16, allowed.step_bytes // size.itemsize)
        step = _step(product, block_m, block_n, block_k, size.itemsize)
        registers = (block_m * block_n * (1 + product.epilogue) + step // 4) // (32 * warps)
        if registers <= REGISTERS and step <= arch.shared and warps <= allowed.max_warps:
            found.append(ConvConfig(block_m, block_n, block_k, warps, stages(step, arch)))
    least = min(map(waste, found), default=0.0)
    return [config for config in found if waste(config) <= 1.25 * least]


# ---- by tensor descriptors -------------------------------------------------------------------------------------------

MOST_BOX = 256  # values of a side of what a descriptor moves at once
#: what a descriptor's base, and the distance of its rows, are multiples of, in bytes
DESCRIPTOR_ALIGN = 16
#: families whose matrix units keep sums in memory of their own, from which warps of their own can finish a tile
SPECIALIZED = ("sm_100", "sm_103")
# BLOCK_M, BLOCK_N, warps
DESCRIBED_CANDIDATES = (
    (128, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (128, 256, 8), (256, 64, 8),
    (256, 128, 8),
)  # fmt: skip


def is_described(size: ConvSize, pitches: tuple[int, ...], geometry: Geometry) -> bool:
    """Whether descriptors can say a forward of that ``size``: a product of matrices (one tap, stride 1, no padding, no groups), whose
    weight and maps, of so many ``pitches``, have aligned rows. What is pending on its input they cannot."""
    plain = size.taps == 1 and max(geometry.stride) == 1 and not any(geometry.padding) and geometry.groups == 1
    aligned = all(pitch * size.itemsize % DESCRIPTOR_ALIGN == 0 for pitch in (size.channels, *pitches))
    return plain and aligned and min(size.rows, size.channels, size.outputs) > 0


def described_bytes(config: ConvConfig, size: ConvSize, has_residual: bool) -> int:
    """The shared memory of a program by descriptors: a residual is loaded like an operand where all channels are one step, else in the
    epilogue."""
    whole, out = config.BLOCK_K >= size.channels, config.BLOCK_M * config.BLOCK_N * size.itemsize
    step = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * size.itemsize + (out if has_residual and whole else 0)
    return config.num_stages * step + out + (out if has_residual and not whole else 0) + 1024


def described_candidates(size: ConvSize, features: Collection[str], arch: Arch) -> list[ConvConfig]:
    """The tiles by descriptors that are worth a measurement: steps of a line of shared memory (STEP_BYTES), and of all channels where
    that are two lines, whose loop is only that over tiles. ``features``: a problem's, by which a residual is found, and whether it is
    normalised. None on a GPU without descriptors."""
    if not is_since_hopper(arch):
        return []
    line = STEP_BYTES // size.itemsize
    has_residual, specialized = "residual" in features, arch.family in SPECIALIZED
    # sums of a thread: with more, they spill beside a residual, and where warps that finish tiles have registers of their own
    most = 64 if has_residual or specialized else 128
    most_in_steps = 32 if "residual_scale_shift" in features and specialized else most
    found: list[ConvConfig] = []
    for block_m, block_n, warps in DESCRIBED_CANDIDATES:
        sums = block_m * block_n // (32 * warps)
        for block_k in {block(size.channels, 16, line), block(size.channels, 16, 2 * line)}:
            whole = block_k >= size.channels
            if (
                sums > (most if whole else most_in_steps)
                or block_n >= 2 * size.outputs
                or (block_k > line and not whole)
            ):
                continue
            tile = ConvConfig(block_m, block_n, block_k, warps, 4, True)
            while tile.num_stages > 1 and described_bytes(tile, size, has_residual) > arch.shared:
                tile = replace(tile, num_stages=tile.num_stages - 1)
            found += [tile] if tile.num_stages > 1 else []
    return sorted(found, key=lambda config: config.BLOCK_K)


@dataclass(frozen=True)
class PassConfig:
    """A program of a pass walks ``chunk`` rows of ``BLOCK_C`` channels in tiles of ``BLOCK_M`` rows."""

    BLOCK_M: int
    BLOCK_C: int
    chunk: int
    num_warps: int = 4


def pass_config(rows: int, channels: int, tile: int = 2048) -> PassConfig:
    """Tiles of ``tile`` values (16 a thread: two 128-bit loads a map in 16-bit storage), whole cache lines of channels, and rows per
    program such that thousands of programs are left: enough for any GPU, few enough that partials stay below a hundredth of the traffic.
    """
    block_c = block(channels, 8, 128)
    block_m = block(rows, 1, tile // block_c)
    tiles = cdiv(rows, block_m) * cdiv(channels, block_c)
    return PassConfig(block_m, block_c, block_m * max(1, min(32, tiles // 4096)))
