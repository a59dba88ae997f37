"""Which convolutions are fused where nobody has measured: those of which a small model says so, for the GPU at hand.

A convolution by the library is surrounded by passes, whose bytes and launches the fused kernel saves; the fused kernel's product is slower,
because it issues more instructions between two matrix instructions. Both times follow from the bytes and FLOPs of the problem, what the
GPU's vendor says of its memory and its matrix units, and shares that were read from the loops of compiled kernels. It prefers not to
lose: fused only where that is faster by a margin. One kernel for both gradients of a 1x1 reads once what two read twice, and is taken
where it is faster than the best of all other ways. Measured plans (:func:`fusedres.tune`) take its place.
"""

# fusedres.kernels is the folder kernels/, which setup.py says and a type checker does not see
# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

from ..activations import KINDS
from ..kernels.tiles import DEFAULT_ARCH, GATHERED, Arch, cdiv
from .plans import Problem


class Speed(NamedTuple):
    """Of a GPU, by its vendor: bytes of memory a second, FLOPs of dense 16-bit products with float32 sums a second, and a cycle of one
    multiprocessor."""

    bandwidth: float
    products: float
    per_cycle: int


#: by family; of several GPUs the one in data centres
SPEEDS = {
    "sm_80": Speed(1.56e12, 312e12, 2048),  # A100
    "sm_86": Speed(0.70e12, 150e12, 1024),  # A40
    "sm_89": Speed(0.86e12, 362e12, 1024),  # L40S
    "sm_90": Speed(3.35e12, 989e12, 4096),  # H100
    "sm_100": Speed(8.0e12, 2250e12, 8192),  # B200
    "sm_103": Speed(8.0e12, 2500e12, 8192),  # B300
    "sm_120": Speed(1.79e12, 500e12, 1024),  # RTX PRO 6000
    "gfx90a": Speed(1.6e12, 191e12, 1024),  # half an MI250X
    "gfx942": Speed(5.3e12, 1307e12, 2048),  # MI300X
    "gfx1100": Speed(0.96e12, 123e12, 512),  # RX 7900 XTX
}

#: of the matrix units' rate: what a well-shaped convolution of the library reaches, and what a fused kernel is trusted to
LIBRARY_SHARE, FUSED_SHARE = 0.7, 0.5
# what the kernels' loops can reach on sm_90, by the instructions that they issue for one matrix instruction; matrix units that are slower
# in relation to the issue of instructions leave more time for these
ISSUE_SHARES = {"forward": 0.5, "dgrad": 0.27, "wgrad": 0.27, "backward": 0.38}
#: outputs below which the kernel of both gradients reaches less: what it issues for a pixel's input is the same for few outputs
FEW_OUTPUTS = 128
#: how much faster than memory a cache is, from which that kernel reads the gradient again for each tile of columns
CACHE = 1.6
ISSUED_BESIDE = SPEEDS["sm_90"].per_cycle
#: how much of the shorter one of loads and products is not hidden behind the longer one, in a fused kernel
EXPOSED = 0.5
#: seconds from one kernel's end to the next one's work
LAUNCH = 3e-6
#: a fused kernel has to be estimated faster than the library by this factor
MARGIN = 1.2


class Cost(NamedTuple):
    """Of one way to run a convolution: bytes moved together with its product, those of passes beside it, and how many kernels it is."""

    bytes: int
    pass_bytes: int
    kernels: int


class Costs(NamedTuple):
    """Of the fused kernel, of the library's convolution between passes, and the bytes of the pass in front of it that corrects the
    gradient: one for both gradients, where either is the library's."""

    fused: Cost
    library: Cost
    correction: int


class Seconds(NamedTuple):
    """The times of :class:`Costs`."""

    fused: float
    library: float
    correction: float


_ACTIVATIONS = frozenset(KINDS)
_EPILOGUES = frozenset(("residual", "out_scale_shift", *(f"out_{kind}" for kind in KINDS)))


def costs(problem: Problem) -> Costs:
    """What each way moves; maps are of 16 bits."""
    has = frozenset(problem.features)
    x = 2 * math.prod(problem.x)
    y = 2 * problem.x[0] * problem.weight[0] * math.prod(problem.out_size)
    pending = "scale_shift" in has or not has.isdisjoint(_ACTIVATIONS)
    materialised = 2 * x if pending else 0
    if problem.op == "forward":
        added = y if "residual" in has else 0
        # statistics are reduced by the pass that applies an epilogue, where there is one
        behind = 2 * y + added if not has.isdisjoint(_EPILOGUES) else y if "stats" in has else 0
        library = Cost(x + y, materialised + behind, 1 + (materialised > 0) + (behind > 0))
        return Costs(Cost(x + y + added, 0, 1), library, 0)
    read = _gradient(problem, y)
    correction = read + y if "coeff" in has else 0
    weight = Cost(y + x, materialised, 1 + (materialised > 0))
    if problem.op == "wgrad":
        return Costs(Cost(read + x, 0, 1), weight, correction)
    below = x if pending or "sums" in has else 0
    old = x if has & {"base", "accumulate"} else 0
    behind = 2 * x + below + old if below or old or "scaled" in has else 0
    library = Cost(y + x, behind, 1 + (behind > 0))
    if problem.op == "backward":
        library = Cost(*map(sum, zip(weight, library, strict=True)))
        return Costs(Cost(read + x + x + old, 0, 1), library, correction)
    return Costs(Cost(read + x + below + old, 0, 1), library, correction)


def _gradient(problem: Problem, y: int) -> int:
    """The bytes of a convolution's gradient, whose output's are ``y``."""
    return y * (2 if "raw" in problem.features else 1)


def _asked(problem: Problem, fused: Cost) -> int:
    """The bytes that programs ask for, from memory or from a cache."""
    if problem.op != "backward":
        return fused.bytes
    outputs, channels, *_ = problem.weight
    columns = cdiv(channels, GATHERED // max(FEW_OUTPUTS, outputs))
    y = 2 * problem.x[0] * outputs * math.prod(problem.out_size)
    return fused.bytes + (columns - 1) * _gradient(problem, y)


def seconds(problem: Problem, arch: Arch) -> Seconds:
    """How long each way takes. A family that is not in :data:`SPEEDS` counts as the default one."""
    speed = SPEEDS.get(arch.family, SPEEDS[DEFAULT_ARCH.family])
    fused, library, correction = costs(problem)
    rows = problem.x[0] * math.prod(problem.out_size)
    flops = (4 if problem.op == "backward" else 2) * rows * math.prod(problem.weight)
    narrow = min(1.0, problem.weight[0] / FEW_OUTPUTS) if problem.op == "backward" else 1.0
    share = min(FUSED_SHARE, narrow * ISSUE_SHARES[problem.op] * ISSUED_BESIDE / speed.per_cycle)
    loads = max(fused.bytes, _asked(problem, fused) / CACHE) / speed.bandwidth
    products = flops / (share * speed.products)
    convolution = max(library.bytes / speed.bandwidth, flops / (LIBRARY_SHARE * speed.products))
    return Seconds(
        max(loads, products) + EXPOSED * min(loads, products) + LAUNCH * fused.kernels,
        convolution + library.pass_bytes / speed.bandwidth + LAUNCH * library.kernels,
        correction / speed.bandwidth + LAUNCH if correction else 0.0,
    )


def has_wide_accesses(problem: Problem) -> bool:
    """Whether it is of the form whose kernels run at full width: a dense 1x1 of stride 1 in 16 bits with aligned channels and pitches."""
    outputs, channels, *kernel = problem.weight
    return (
        all(size == 1 for size in (*kernel, *problem.stride, problem.groups))
        and not any(problem.padding)
        and problem.dtype in ("float16", "bfloat16")
        and all(size % 8 == 0 for size in (channels, outputs, problem.x_pitch, problem.y_pitch))
        and min(channels, outputs) >= 32
    )


def _fastest(gradients: tuple[Seconds, ...]) -> tuple[tuple[bool, ...], float]:
    """Which of these are fused where all of them together take least, and how long that is: the library's share one correction."""

    def total(fused: tuple[bool, ...]) -> float:
        each = [MARGIN * g.fused if f else g.library for g, f in zip(gradients, fused, strict=True)]
        return sum(each) + (0.0 if all(fused) else max(g.correction for g in gradients))

    best = min(itertools.product((False, True), repeat=len(gradients)), key=total)
    return best, total(best)


@functools.lru_cache(4096)
def is_fused(problem: Problem, arch: Arch) -> bool:
    """Whether the fused kernel is the default; of a convolution's two gradients (feature ``both``) in view of the other one, and of one
    kernel for both in view of two.

    Convolutions of several taps, strided, grouped, unaligned and float32 ones are the library's, whatever the model says: their loops are
    further from what it assumes.
    """
    if not has_wide_accesses(problem):
        return False
    if "both" in problem.features:
        ops = ("dgrad", "wgrad")
        chosen, total = _fastest(tuple(seconds(problem._replace(op=op), arch) for op in ops))
        if problem.op == "backward":
            return MARGIN * seconds(problem, arch).fused < total
        return chosen[ops.index(problem.op)]
    return _fastest((seconds(problem, arch),))[0][0]
