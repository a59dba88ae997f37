"""The C++ extension, for type checkers: importing it also registers the operators ``torch.ops.fusedres_cpp``."""

from typing import Any

__file__: str

def activations() -> list[str]:
    """The names of the activations, each at the place that is its number."""

def keep_packed(address: int) -> None:
    """From now on forward convolutions keep the weight that begins there packed, for as long as its version stays the same. Nothing else
    may begin there until :func:`forget_packed`."""

def forget_packed(address: int) -> None:
    """Ends :func:`keep_packed`."""

def packed_bytes() -> int:
    """Of all weights that are kept packed, as they are now."""

def map_bytes() -> int:
    """Of the memory that maps lie in, and that is kept for the next ones."""

def release_maps() -> None:
    """Gives what is kept of it back to the system."""

def cpu_capabilities() -> list[str]:
    """The instruction sets that this CPU supports, the best last."""

def cpu_capability() -> str:
    """The instruction set of the CPU kernels in this process: 'default', 'avx2', 'avx512' or 'avx512_bf16'; ``FUSEDRES_CPU_CAPABILITY``
    overrides it."""

def tape_operators() -> list[str]:
    """The names of the operators that a recorded schedule may hold, each at the place that is its number."""

def unchanged(
    three: tuple[Any, ...], mappings: tuple[dict[str, object], ...], lengths: bytes, values: tuple[object, ...]
) -> bool:
    """Whether every object of ``three`` (object, class, ``__dict__`` in turn) has that class and that ``__dict__`` still, and the
    dictionaries ``mappings`` hold, one after the other, ``lengths`` (32 bits each) values: the very objects of ``values``."""
