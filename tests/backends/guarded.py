"""Every primitive of a backend on memory between guard pages: a read or a write beside a map, a weight or a vector ends the process.

    python tests/backends/guarded.py SIDE [--backend NAME] [--dtype NAME] [--overhang]

``SIDE`` is ``before`` (all that is allocated begins where a page ends that nobody may touch) or ``behind`` (it ends where one begins).
Prints each case before it runs, and at last how many there were. ``--overhang`` asks for one channel more than there is memory, to see
that this is found. For :mod:`test_guard_pages`, which runs it in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).parents[1]))

from contract import CONVOLUTIONS, SHAPES, Convolution, Maps, Pooling, poolings
from support import Draw

from fusedres.backends import select
from fusedres.backends.contract import PRIMITIVES, Backend, Wrapped
from fusedres.operands import Epilogue, GradTarget, LazyMap
from fusedres.specs import Norm

PAGE = mmap.PAGESIZE
FORBIDDEN = 0
_libc = ctypes.CDLL(None, use_errno=True)


def between_pages(size: int, side: str, overhang: int = 0) -> Tensor:
    """``size`` bytes, of which ``overhang`` lie in the guard page."""
    room = -(-size // PAGE) * PAGE
    pages = mmap.mmap(-1, room + 2 * PAGE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for guard in (first, first + PAGE + room):
        if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), FORBIDDEN):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = PAGE - overhang if side == "before" else PAGE + room - size + overhang
    return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=start)


def moved(tensor: Tensor, side: str) -> Tensor:
    """``tensor`` as it is, in memory of its own between guard pages."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return tensor
    memory = between_pages(storage.nbytes(), side)
    memory.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
    return memory.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


class GuardedDraw(Draw):
    """Operands between guard pages."""

    def __init__(self, side: str, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(dtype, **options)
        self.side = side

    def placed(self, value: Tensor) -> Tensor:
        return moved(value, self.side)


class GuardPages(TorchDispatchMode):
    """Whatever comes to be inside lies between guard pages, with the strides that torch gave it."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        known = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        return tree_map_only(Tensor, lambda t: t if _memory(t) in known else moved(t, self.side), found)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Guarded(Wrapped):
    """A backend whose own memory lies between guard pages; notes which primitives were called."""

    def __init__(self, inner: Backend, side: str) -> None:
        super().__init__(inner)
        self.pages, self.primitives = GuardPages(side), set[str]()

    def call(self, primitive: str, *args: Any, **kwargs: Any) -> Any:
        self.primitives.add(primitive)
        with self.pages:
            return super().call(primitive, *args, **kwargs)


def convolve(b: Backend, d: Draw, case: Convolution) -> None:
    """In training with everything pending, in inference with everything behind, on plain maps; backward of a chain, of a dense layer, of
    plain maps."""
    c, k = case.shape[1], case.outputs
    weight, bias, geometry = case.draw_weight(d), d.parameter(k), case.geometry
    x, plain = d.lazy(*case.shape, act="relu"), LazyMap(d.map(*case.shape))
    b.conv_forward(x, weight, bias, geometry, Epilogue(d.hole(*case.out), d.room(2, k)))
    b.conv_forward(plain, weight, None, geometry)
    behind = Epilogue(scale_shift=d.scale_shift(k), residual=d.lazy(*case.out), act="relu")
    b.conv_forward(plain, weight, None, geometry, behind)
    b.conv_backward(d.gradient(*case.out), x, weight, geometry, GradTarget(d.hole(*case.shape), sums=d.room(2, c)))
    into = GradTarget(d.filled(*case.shape), accumulate=True, scaled=True, sums=d.room(2, c))
    b.conv_backward(d.gradient(*case.out), x, weight, geometry, into)
    b.conv_backward(d.gradient(*case.out, pending="none"), plain, weight, geometry, GradTarget(base=d.map(*case.shape)))


def passes(b: Backend, d: Draw, case: Maps) -> None:
    """Every pass of one map, with all that may be there and with nothing."""
    shape, c = case.shape, case.shape[1]
    x, residual, grad = d.lazy(*shape), d.lazy(*shape), d.map(*shape)
    plain = LazyMap(d.map(*shape))
    b.statistics(plain.raw, d.room(2, c))
    for operand, added in ((x, residual), (x, plain), (x, None), (plain, None)):
        for act in ("relu", "silu"):
            b.add_act_forward(operand, added, act, out=d.hole(*shape), stats=d.room(2, c))
            b.add_act_forward(operand, added, act)
    b.add_act_backward(grad, x, residual, "relu", sums=d.room(2, c), residual_sums=d.room(2, c))
    b.add_act_backward(grad, x, plain, "relu", sums=d.room(2, c))
    b.add_act_backward(grad, plain, None, "silu")
    for pending in ("raw", "coeff"):
        b.apply_grad_coeff(d.gradient(*shape, pending=pending))
        b.apply_grad_coeff(d.gradient(*shape, pending=pending), out=d.hole(*shape))
    lazy = x._replace(act="relu")
    b.dgrad_epilogue(d.filled(*shape), lazy, GradTarget(d.hole(*shape), base=d.map(*shape), sums=d.room(2, c)))
    b.dgrad_epilogue(
        d.filled(*shape), lazy, GradTarget(d.filled(*shape), accumulate=True, scaled=True, sums=d.room(2, c))
    )
    b.dgrad_epilogue(d.filled(*shape), plain, GradTarget(d.hole(*shape)))
    b.highway_forward(x, residual, grad, out=d.hole(*shape))
    b.highway_backward(grad, x, residual, plain.raw, sums=d.room(2, c), gate_sums=d.room(2, c))
    b.highway_backward(grad, plain, plain, plain.raw)


def pool(b: Backend, d: Draw, case: Pooling) -> None:
    """A pool, and both calls of its backward."""
    c = case.shape[1]
    x, grad = d.lazy(*case.shape, act="relu"), d.map(*case.out)
    _, index = b.pool_forward(x, case.pool, out=d.hole(*case.out), stats=d.room(2, c))
    b.pool_forward(LazyMap(x.raw), case.pool)
    b.pool_backward(grad, index, x, case.pool, sums=d.room(2, c))
    b.pool_backward(grad, index, x, case.pool, coeff=d.vectors(3, c), dx=d.hole(*case.shape))
    b.pool_backward(grad, index, x, case.pool, coeff=d.vectors(3, c))


def norm(b: Backend, d: Draw, c: int) -> None:
    """BatchNorm's numbers."""
    weight, bias, mean, variance = (d.parameter(c, positive=True) for _ in range(4))
    batch = Norm(weight, bias, mean, variance, True, 0.1, 1e-5, "none")
    b.bn_coefficients(batch, d.moments(c, 7), 7)
    b.bn_frozen(batch, d.accum)
    b.bn_backward(batch, d.vectors(2, c), 7, d.mean_invstd(c), d.kept(3, c), accumulate=True)
    b.bn_backward(batch, d.vectors(2, c), 7, d.mean_invstd(c), d.room(3, c))


Case = tuple[str, Callable[[Backend, Draw, Any], None], Any]


def cases() -> Iterator[Case]:
    """All of them, by name."""
    yield from ((f"convolution {name}", convolve, case) for name, case in CONVOLUTIONS.cases.items())
    yield from ((f"passes {name}", passes, case) for name, case in SHAPES.cases.items())
    yield from ((f"pool {name}", pool, case) for name, case in poolings().cases.items())
    yield from ((f"norm {c}", norm, c) for c in (1, 5, 16, 37))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("before", "behind"))
    parser.add_argument("--backend", default="cpp")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--overhang", action="store_true")
    parser.add_argument(
        "--turn", type=int, choices=(0, 1), help="a half of the cases: each of these with one of its two maps"
    )
    args = parser.parse_args()
    dtype, backend = getattr(torch, args.dtype), Guarded(select.get(args.backend), args.side)
    torch.set_num_threads(2)
    if args.overhang:
        size = 4 * 5 * 7 * dtype.itemsize
        x = between_pages(size, args.side, overhang=dtype.itemsize).view(dtype).view(4, 7, 1, 5).permute(0, 3, 1, 2)
        print("overhang", flush=True)
        backend.statistics(x, torch.empty(2, 5))
        return
    # a slice whose own end is the buffer's, and a map of its own
    beside = (0, 5) if args.side == "before" else (5, 0)
    count = 0
    for i, (name, run, case) in enumerate(cases()):
        for j, pad in enumerate((beside, (0, 0))):
            if args.turn == (i + j) % 2:
                continue
            print(name, pad, flush=True)
            run(backend, GuardedDraw(args.side, dtype, pad=pad, columns=beside), case)
            count += 1
    missing = set(PRIMITIVES) - backend.primitives
    if missing:
        sys.exit(f"not called: {', '.join(sorted(missing))}")
    print(f"{count} cases")


if __name__ == "__main__":
    main()
