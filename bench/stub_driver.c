/* A CUDA driver without a GPU, for bench.host: everything succeeds, a launch only counts. What Triton's own driver module links against, by
   the names and argument lists of the CUDA driver's interface; handles are numbers that nobody follows. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef int Device;
typedef void *Handle;

static Handle const SOME = (Handle)1;

/* attributes of a device and of a function, of those that Triton asks for */
enum { MULTIPROCESSORS = 16, WARP_SIZE = 10, MAX_REGISTERS = 12, MAJOR = 75, MINOR = 76, SHARED_OPTIN = 97 };
enum { MAX_THREADS = 0 };

/* all launches, and of these the dependent ones */
long fusedres_stub_launches = 0, fusedres_stub_dependent = 0;

Result cuInit(unsigned flags) { (void)flags; return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGet(Device *device, int ordinal) { *device = ordinal; return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, Device device) {
  (void)device;
  switch (attribute) {
  case MULTIPROCESSORS: *value = 132; break;
  case WARP_SIZE: *value = 32; break;
  case MAX_REGISTERS: *value = 65536; break;
  case MAJOR: *value = 9; break;
  case MINOR: *value = 0; break;
  case SHARED_OPTIN: *value = 232448; break;
  default: *value = 49152;
  }
  return 0;
}
Result cuDevicePrimaryCtxRetain(Handle *context, Device device) { (void)device; *context = SOME; return 0; }
Result cuCtxGetCurrent(Handle *context) { *context = SOME; return 0; }
Result cuCtxSetCurrent(Handle context) { (void)context; return 0; }
Result cuCtxGetDevice(Device *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { (void)limit; *value = 1 << 20; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { (void)limit; (void)value; return 0; }
Result cuModuleLoadData(Handle *module, const void *image) { (void)image; *module = SOME; return 0; }
Result cuModuleUnload(Handle module) { (void)module; return 0; }
Result cuModuleGetFunction(Handle *function, Handle module, const char *name) {
  (void)module; (void)name; *function = SOME; return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, Handle function) {
  (void)function; *value = attribute == MAX_THREADS ? 1024 : 0; return 0;
}
Result cuFuncSetAttribute(Handle function, int attribute, int value) {
  (void)function; (void)attribute; (void)value; return 0;
}
Result cuFuncSetCacheConfig(Handle function, int config) { (void)function; (void)config; return 0; }
Result cuGetErrorString(Result error, const char **text) { (void)error; *text = "the stub driver knows no errors"; return 0; }
Result cuPointerGetAttribute(void *data, int attribute, void *pointer) {
  (void)attribute; *(void **)data = pointer; return 0;
}
/* of a tensor map what tests read again: the address, the sizes, the distance of rows, and the box */
Result cuTensorMapEncodeTiled(unsigned long long *map, int type, unsigned rank, void *address, const unsigned long long *sizes,
                              const unsigned long long *strides, const unsigned *box, const unsigned *steps, int interleave,
                              int swizzle, int promotion, int fill) {
  (void)type; (void)steps; (void)interleave; (void)swizzle; (void)promotion; (void)fill;
  memset(map, 0, 128);
  if (rank != 2) return 1; /* a map is a matrix here */
  const unsigned long long found[] = {(unsigned long long)address, sizes[0], sizes[1], strides[0], box[0], box[1]};
  memcpy(map, found, sizeof found);
  return 0;
}
/* who wants to see what is asked for: the grid, the threads of a block, its shared memory, the stream, the function and its parameters */
void (*fusedres_stub_watcher)(const unsigned *grid, const unsigned *block, unsigned shared, Handle stream, Handle function,
                              void **parameters) = 0;

static Result launched(const unsigned *grid, const unsigned *block, unsigned shared, Handle stream, Handle function, void **parameters) {
  fusedres_stub_launches++;
  if (fusedres_stub_watcher) fusedres_stub_watcher(grid, block, shared, stream, function, parameters);
  return 0;
}
Result cuLaunchKernel(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                      unsigned block_z, unsigned shared, Handle stream, void **parameters, void **extra) {
  const unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
  (void)extra;
  return launched(grid, block, shared, stream, function, parameters);
}
struct Attribute { int name, gap, value[16]; };
struct Config { unsigned grid[3], block[3], shared; Handle stream; const struct Attribute *attributes; unsigned count; };
Result cuLaunchKernelEx(const struct Config *config, Handle function, void **parameters, void **extra) {
  (void)extra;
  if (config->count) {
    /* CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: no kernel here asks for more */
    if (config->count > 1 || config->attributes->name != 6 || config->attributes->value[0] != 1) return 1;
    fusedres_stub_dependent++;
  }
  return launched(config->grid, config->block, config->shared, config->stream, function, parameters);
}
Result cuOccupancyMaxActiveClusters(int *clusters, Handle function, const void *config) {
  (void)function; (void)config; *clusters = 1; return 0;
}
