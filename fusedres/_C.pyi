"""The C++ extension, for type checkers: importing it also registers the operators ``torch.ops.fusedres_cpp``."""

__file__: str

def activations() -> list[str]:
    """The names of the activations, each at the place that is its number."""

def cpu_capabilities() -> list[str]:
    """The instruction sets that this CPU supports, the best last."""

def cpu_capability() -> str:
    """The instruction set of the CPU kernels in this process: 'default', 'avx2', 'avx512' or 'avx512_bf16'; ``FUSEDRES_CPU_CAPABILITY``
    overrides it."""
