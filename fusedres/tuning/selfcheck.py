"""The first launch of a convolution's fused kernel on a GPU model, beside the library's convolution: a kernel that computes something else
there, by a fault of its compiler or of ours, is not used.

What is compared is the kernel that is about to run, in its tile, on a map of a few pixels with the channels, pitches and operands of the
call; what only large maps need (offsets of 64 bits, sums in several parts) is not seen. Which kernels have passed or failed is kept on
disk, for the versions of torch, triton and this package.
"""

# fusedres.kernels is the folder kernels/, which setup.py says and a type checker does not see
# pyright: reportMissingImports=false
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..backends.eager import BACKEND as EAGER
from ..first_use import DRAWS, are_right
from ..kernels import launch
from ..kernels.conv_pointwise_forward import in_few_programs
from ..kernels.launch import arch_of
from ..kernels.tiles import ConvConfig, conv_config
from ..operands import Epilogue, GradTarget, LazyGrad, LazyMap
from ..specs import Geometry
from . import plans
from .convolutions import BOTH, Draw, by
from .plans import LIBRARY, Plan, Problem

if TYPE_CHECKING:
    from ..backends.triton import TritonBackend

Forward = tuple[LazyMap, Tensor, Tensor | None, Geometry, Epilogue]
Backward = tuple[LazyGrad, LazyMap, Tensor, Geometry, GradTarget]

#: pixels of a side, at most: of an odd size, so that tiles have rows without a pixel, and more than any dilated window here covers
SIDE = 11


def small(problem: Problem) -> Problem:
    """The problem on two images of a few pixels."""
    reach = (d * (k - 1) + 1 for d, k in zip(problem.dilation, problem.weight[2:], strict=True))
    size = (min(n, max(SIDE, r)) for n, r in zip(problem.x[2:], reach, strict=True))
    return problem._replace(x=(min(2, problem.x[0]), problem.x[1], *size))


def passes(backend: TritonBackend, problem: Problem, config: ConvConfig, device: torch.device) -> bool:
    """Whether the fused kernel of ``problem``, in the tile ``config``, is as right as the library's convolution between passes, on random
    operands. It raises where a kernel cannot be built."""
    wanted = small(problem)
    # of a small map, too, a persistent program computes several tiles
    with _apart(device), in_few_programs(1):
        return any(_is_right(backend, wanted, config, device, seed) for seed in range(DRAWS))


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Without gradients and autocast, with random states of its own."""
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.random.fork_rng(devices=devices):
        yield


def _generator(device: torch.device) -> torch.Generator:
    """The one that torch draws from there."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _is_right(backend: TritonBackend, problem: Problem, config: ConvConfig, device: torch.device, seed: int) -> bool:
    def solved(plan: Plan | None) -> list[Tensor]:
        _generator(device).manual_seed(seed)
        draw = Draw(problem, device)
        if problem.op == "forward":
            return _forward(backend, plan, draw.forward())
        return _backward(backend, plan, problem.op, draw.backward())

    return are_right(solved(Plan(True, config)), solved(LIBRARY), solved(None), getattr(torch, problem.dtype))


def _forward(backend: TritonBackend, plan: Plan | None, arguments: Forward) -> list[Tensor]:
    """What a forward writes, by ``plan``, or in float64 without one."""
    if plan is None:
        arguments = tree_map_only(Tensor, Tensor.double, arguments)
        y = EAGER.conv_forward(*arguments)
    else:
        y = backend.forward_by(plan, *arguments)
    stats = arguments[-1].stats
    return [y, stats] if isinstance(stats, Tensor) else [y]


def _backward(backend: TritonBackend, plan: Plan | None, op: str, arguments: Backward) -> list[Tensor]:
    """As :func:`_forward`, of one gradient, or of both by one kernel."""
    if plan is None:
        arguments = tree_map_only(Tensor, Tensor.double, arguments)
    grad, x, weight, geometry, target = arguments
    needed = BOTH if op == "backward" else (op,)
    goal, need_dw = target if "dgrad" in needed else None, "wgrad" in needed
    if plan is None:
        dx, dweight = EAGER.conv_backward(grad, x, weight, geometry, goal, need_dw)
    else:
        dx, dweight = backend.backward_by(by(plan, (op,)), grad, x, weight, geometry, goal, need_dw)
    sums = None if goal is None else target.sums
    return [t for t in (dx, dweight, sums) if isinstance(t, Tensor)]


# ---- on disk ---------------------------------------------------------------------------------------------------------


def _file(device: str) -> Path:
    return plans.cache_folder() / f"checked-{plans.file_name(device)}"


def name_of(problem: Problem, config: ConvConfig) -> str:
    """A kernel for people."""
    x, weight = ("x".join(map(str, sizes)) for sizes in (problem.x, problem.weight))
    return f"{problem.op} of input {x}, weight {weight}, {problem.dtype}, in a tile of {config}"


def key_of(problem: Problem, config: ConvConfig) -> str:
    """The name of a kernel with what it is launched for."""
    # of dependent launches every kernel is another program
    kind = ("dependent",) if launch.dependent else ()
    return hashlib.sha256(repr((small(problem), config, *kind)).encode()).hexdigest()[:32]


class Finding(NamedTuple):
    """What is known of a kernel: ``what`` it is, and how it was ``found``: RIGHT, or a word about what is wrong with it."""

    what: str
    found: str


RIGHT, DIFFERS = "right", "computes something else than the library"


def known(device: torch.device) -> dict[str, Finding]:
    """What is known of kernels on GPUs like ``device``, by their keys."""
    name = plans.device_name(device)
    try:
        content = json.loads(_file(name).read_text())
        if content["device"] != name or any(content[k] != v for k, v in plans.versions().items()):
            return {}
        return {str(key): Finding(str(what), str(found)) for key, (what, found) in content["kernels"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def remember(device: torch.device, key: str, finding: Finding) -> None:
    """Add to what is known, for later processes and ``doctor``; where nothing can be written, nothing is."""
    name = plans.device_name(device)
    try:
        with plans.replaced(_file(name)) as write:
            write({"device": name, **plans.versions(), "kernels": known(device) | {key: finding}})
    except OSError:
        pass


class Checker:
    """What a process has compared, of one backend's kernels."""

    def __init__(self, backend: TritonBackend) -> None:
        self._backend = backend
        self._right: set[tuple[Problem, Plan, torch.device, bool]] = set()
        self._known: dict[torch.device, dict[str, Finding]] = {}

    def compare(self, problem: Problem, plan: Plan, device: torch.device) -> str:
        """How the kernel that ``plan`` gives to the problem was found, at its first use on a GPU model: RIGHT or DIFFERS. It raises where
        it cannot be built."""
        this = problem, plan, device, launch.dependent
        if this in self._right:
            return RIGHT
        config, known = _tile(problem, plan, device), self._of(device)
        key = key_of(problem, config)
        if key not in known or known[key].found not in (RIGHT, DIFFERS):
            self.note(problem, plan, device, RIGHT if passes(self._backend, problem, config, device) else DIFFERS)
        if known[key].found == RIGHT:
            self._right.add(this)
        return known[key].found

    def note(self, problem: Problem, plan: Plan, device: torch.device, found: str) -> None:
        """Keep how the kernel was ``found``."""
        config = _tile(problem, plan, device)
        key = key_of(problem, config)
        finding = self._of(device)[key] = Finding(name_of(problem, config), found)
        remember(device, key, finding)

    def _of(self, device: torch.device) -> dict[str, Finding]:
        if device not in self._known:
            self._known[device] = known(device)
        return self._known[device]


def _tile(problem: Problem, plan: Plan, device: torch.device) -> ConvConfig:
    return plan.config or conv_config(problem.op, problem.size, arch_of(device))
