#include "map_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

// AddressSanitizer finds what is read after it was freed only where it is freed.
#if defined(__SANITIZE_ADDRESS__)
#define FUSEDRES_KEEPS_MAPS 0
#elif defined(__has_feature)
#define FUSEDRES_KEEPS_MAPS !__has_feature(address_sanitizer)
#else
#define FUSEDRES_KEEPS_MAPS 1
#endif

namespace fusedres {
namespace {

constexpr int64_t kLine = 64;
// A multiple of any system's pages.
constexpr int64_t kPages = 64 << 10;
// What malloc takes from the system block by block, unless it has learned otherwise.
constexpr int64_t kSmallest = 128 << 10;
// Maps after which what is held is compared with what was used: some steps of a DenseNet-201.
constexpr int64_t kWindow = 4096;

int64_t multiple_from(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

class Range;
Range& range();

// One range of addresses, as large as the machine's memory, without pages but where maps were. A map lies in the lowest
// part that it fits in: what is in use stays together, whatever the sizes.
class Range {
 public:
  void* take(int64_t bytes) {
    if (bytes < kSmallest) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!reserved_) reserve();
    // one line more: maps of 2^n bytes do not all begin in the same set of a cache, and kernels may read a vector on
    const int64_t size = multiple_from(bytes, kLine) + kLine;
    const auto found = std::find_if(free_.begin(), free_.end(), [&](const auto& part) { return part.second >= size; });
    if (found == free_.end()) return nullptr;
    const auto [begin, length] = *found;
    taken_[begin] = size;
    free_.erase(found);
    if (length > size) free_[begin + size] = length - size;
    used_ += size;
    most_ = std::max(most_, used_);
    held_ = std::max(held_, begin + size);
    if (++takes_ % kWindow == 0) {
      if (held_ > 2 * most_) release();
      most_ = used_;
    }
    return base_ + begin;
  }

  // Allocates nothing: what frees a tensor must not throw.
  void give(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto part = taken_.extract(static_cast<char*>(data) - base_);
    const int64_t begin = part.key();
    int64_t& size = part.mapped();
    used_ -= size;
    const auto next = free_.find(begin + size);
    if (next != free_.end()) {
      size += next->second;
      free_.erase(next);
    }
    const auto after = free_.lower_bound(begin);
    const auto before = after == free_.begin() ? free_.end() : std::prev(after);
    if (before != free_.end() && before->first + before->second == begin) before->second += size;
    else free_.insert(std::move(part));
  }

  MapMemory memory() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {used_, held_};
  }

  void release_free() {
    const std::lock_guard<std::mutex> lock(mutex_);
    release();
  }

 private:
  void reserve() {
    reserved_ = true;
    const char* wanted = std::getenv("FUSEDRES_MAP_MEMORY");
    if (!FUSEDRES_KEEPS_MAPS || (wanted != nullptr && std::strcmp(wanted, "0") == 0)) return;
#if defined(__linux__)
    const int64_t room = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / kPages * kPages;
    void* base = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return;
    madvise(base, room, MADV_HUGEPAGE);
    base_ = static_cast<char*>(base);
    free_[0] = room;
    // a child has what its parent had, and must not wait for a thread that only its parent has
    pthread_atfork([] { range().mutex_.lock(); }, [] { range().mutex_.unlock(); }, [] { range().mutex_.unlock(); });
#endif
  }

  void release() {
#if defined(__linux__)
    for (const auto& [offset, size] : free_) {
      const int64_t begin = multiple_from(offset, kPages), end = std::min(offset + size, held_) / kPages * kPages;
      if (begin < end) madvise(base_ + begin, end - begin, MADV_DONTNEED);
    }
#endif
    held_ = taken_.empty() ? 0 : taken_.rbegin()->first + taken_.rbegin()->second;
  }

  std::mutex mutex_;
  bool reserved_ = false;
  char* base_ = nullptr;
  std::map<int64_t, int64_t> free_, taken_;  // bytes, by where they begin
  int64_t used_ = 0, most_ = 0;              // now, and at most in this window
  int64_t held_ = 0;                         // no page lies behind
  int64_t takes_ = 0;
};

Range& range() {
  static Range& only = *new Range;  // never destroyed: the last maps may be freed behind all else
  return only;
}

}  // namespace

void* take_map(int64_t bytes) { return range().take(bytes); }
void give_map(void* data) { range().give(data); }
MapMemory map_memory() { return range().memory(); }
void release_maps() { range().release_free(); }

}  // namespace fusedres
