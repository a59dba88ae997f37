"""Run by test_cuda.py in a process of its own: the calls of NVIDIA's own Python bindings by which a program is loaded, over a stub of the
CUDA driver.

    python tests/backends/loading.py STUB

``STUB`` is the library that :data:`SOURCE` makes. What is to be loaded is in the cache already, for compute capability 8.6: NVRTC asks a
driver for more than this one has. Prints the handles of the kernels, the current stream and the current context.
"""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from unittest import mock

SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
static void *context, *only = &context;
int cuInit(unsigned flags) { return 0; }
int cuModuleLoadData(void** module, const void* image) {
  *module = only;
  return memcmp(image, "\\177ELF", 4) ? 200 : 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)(0x1000 + strlen(name));
  return module == only ? 0 : 400;
}
int cuCtxGetCurrent(void** found) { *found = context; return 0; }
int cuCtxSetCurrent(void* chosen) { context = chosen; return 0; }
int cuDevicePrimaryCtxRetain(void** found, int device) { *found = (void*)(long)(70 + device); return 0; }
int cuLaunchKernel(void) { return 0; }
int cuGetProcAddress_v2(const char* name, void** found, int version, unsigned long long flags, int* status) {
  *found = dlsym(RTLD_DEFAULT, name);
  if (status) *status = !*found;
  return *found ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** found, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""


def main(stub: str) -> None:
    """Load and print."""
    ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
    import torch

    from fusedres.backends.nvrtc import CHANNELS, Nvrtc, Program, _bindings

    device, runtime = torch.device("cuda", 0), Nvrtc()
    with mock.patch.multiple(
        torch.cuda,
        current_device=lambda: 0,
        is_current_stream_capturing=lambda: False,
        get_device_capability=lambda index: (8, 6),
        current_stream=lambda of: SimpleNamespace(cuda_stream=5),
    ):
        handles = runtime.load(Program(CHANNELS, torch.float32), device).handles
        assert runtime.launcher
        stream = runtime.stream(device)
    print(*handles.values(), stream, int(_bindings()[0].cuCtxGetCurrent()[1]))


if __name__ == "__main__":
    main(sys.argv[1])
