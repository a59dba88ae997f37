"""Memory that maps leave behind on a CPU."""

from __future__ import annotations


def release_memory() -> None:
    """Give the memory that feature maps of fused blocks have left on the CPU back to the system.

    A fused block's maps and its weights' gradients lie in memory that the C++ extension keeps when they are freed, because the next step
    wants as much again: in pages that the system does not have to find and zero anew. Held are at most twice the bytes that were in use at
    once among the last few thousand maps, and until others come. Call this when a training has ended and the process goes on with something
    else. Tensors that still live are not touched.

    ``FUSEDRES_MAP_MEMORY=0`` in the environment keeps none. GPUs have PyTorch's own ``torch.cuda.empty_cache``.
    """
    try:
        from fusedres import _C
    except ImportError:
        return
    _C.release_maps()
