// What all kernels share, compiled once per CPU capability: integers, scratch memory and the parallel loop.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "memory.h"
#include "parallel.h"

namespace fusedres {
namespace FUSEDRES_CAPABILITY {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// Uninitialised values, freed with the owner; aligned for whole vectors, of which one may be read behind the end. It
// grows and never shrinks.
template <class T>
struct Buffer {
  T* data = nullptr;
  int64_t size = 0;

  Buffer() = default;
  explicit Buffer(int64_t count) { get(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }

  // Room for `count` values; what was there before is lost.
  T* get(int64_t count) {
    if (count > size || data == nullptr) {
      std::free(data);
      data = nullptr;  // allocate may throw
      size = 0;
      data = static_cast<T*>(allocate(count * int64_t(sizeof(T))));
      size = count;
    }
    return data;
  }
};

// Work on fewer values than this is done by the caller, because waking the threads costs microseconds.
constexpr int64_t kSerial = 16 * 1024;
constexpr int64_t kClaims = 1024;

// Runs body(i) for i in [0, n), which is work on `values` values. A thread that is done with its own part goes on with
// what the others have not begun, from the far end of theirs: cores are never equally fast.
template <class F>
void run_parallel(Parallel parallel, int64_t n, int64_t values, F&& body) {
  struct Context {
    F* body;
    int64_t n;
    bool shared;
    bool claimed[kClaims];

    // one copy of the body, which is large, for all loops
    __attribute__((noinline)) void call(int64_t i) { (*body)(i); }
    void run(int64_t i) {
      if (!shared || !__atomic_exchange_n(&claimed[i], true, __ATOMIC_RELAXED)) call(i);
    }
  } context;
  context.body = &body;
  context.n = n;
  if (n <= 1 || values < kSerial) {
    for (int64_t i = 0; i < n; ++i) context.call(i);
    return;
  }
  context.shared = n <= kClaims;
  if (context.shared) std::memset(context.claimed, 0, static_cast<size_t>(n));
  parallel(
      n,
      [](void* pointer, int64_t begin, int64_t end) {
        Context& context = *static_cast<Context*>(pointer);
        for (int64_t i = begin; i < end; ++i) context.run(i);
        if (!context.shared) return;
        for (int64_t i = begin - 1; i >= 0; --i) context.run(i);
        for (int64_t i = context.n - 1; i >= end; --i) context.run(i);
      },
      &context);
}

}  // namespace
}  // namespace FUSEDRES_CAPABILITY
}  // namespace fusedres
