#include "kept.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "memory.h"

namespace fusedres {

class KeptWeight {
 public:
  KeptWeight() = default;
  ~KeptWeight() { release(); }
  KeptWeight(const KeptWeight&) = delete;
  KeptWeight& operator=(const KeptWeight&) = delete;

  // Of calls that read; kWriting: one writes.
  static constexpr int64_t kWriting = -1;
  std::atomic<int64_t> users{0};
  // What is there, where `data` is not null; written by who writes.
  float* data = nullptr;
  int64_t version = 0;
  PackedLayout layout{};

  bool holds(int64_t of_version, const PackedLayout& in) const {
    return data != nullptr && version == of_version && layout.size == in.size &&
           std::equal(std::begin(in.numbers), std::end(in.numbers), std::begin(layout.numbers));
  }
  void make_room(int64_t size) {
    if (data != nullptr && layout.size == size) return;
    release();
    data = static_cast<float*>(allocate(size * int64_t(sizeof(float))));
    total += size * int64_t(sizeof(float));
    layout.size = size;
  }
  void release() {
    if (data == nullptr) return;
    std::free(data);
    data = nullptr;
    total -= layout.size * int64_t(sizeof(float));
  }

  inline static std::atomic<int64_t> total{0};
};

KeptUse::KeptUse(KeptWeight* kept, int64_t version, const PackedLayout& layout) {
  if (kept == nullptr) return;
  int64_t users = kept->users.load();
  do {
    if (users == KeptWeight::kWriting) return;
  } while (!kept->users.compare_exchange_weak(users, users + 1));
  if (!kept->holds(version, layout)) {
    int64_t only_this = 1;
    if (!kept->users.compare_exchange_strong(only_this, KeptWeight::kWriting)) {
      --kept->users;
      return;
    }
    try {
      kept->make_room(layout.size);
    } catch (...) {
      kept->users = 0;
      throw;
    }
    kept->layout = layout;
    kept->version = version;
    fills_ = true;
  }
  kept_ = kept;
  data_ = kept->data;
}

KeptUse::~KeptUse() {
  if (kept_ == nullptr) return;
  if (fills_) {  // it never did
    kept_->release();
    kept_->users = 0;
  } else {
    --kept_->users;
  }
}

void KeptUse::filled() {
  if (!fills_) return;
  fills_ = false;
  kept_->users = 1;
}

namespace {

struct Registry {
  std::shared_mutex mutex;
  std::unordered_map<const void*, std::shared_ptr<KeptWeight>> weights;
  std::atomic<bool> any{false};  // of a process that keeps nothing, every call asks only this
};

// Never destroyed: threads may still run when a process ends.
Registry& registry() {
  static Registry& all = *new Registry;
  return all;
}

}  // namespace

void keep_weight(const void* address) {
  Registry& r = registry();
  const std::unique_lock lock(r.mutex);
  auto& place = r.weights[address];
  if (place == nullptr) place = std::make_shared<KeptWeight>();
  r.any = true;
}

void forget_weight(const void* address) {
  Registry& r = registry();
  const std::unique_lock lock(r.mutex);
  r.weights.erase(address);
  r.any = !r.weights.empty();
}

std::shared_ptr<KeptWeight> find_kept(const void* address) {
  Registry& r = registry();
  if (!r.any) return nullptr;
  const std::shared_lock lock(r.mutex);
  const auto found = r.weights.find(address);
  return found == r.weights.end() ? nullptr : found->second;
}

int64_t kept_bytes() { return KeptWeight::total; }

}  // namespace fusedres
