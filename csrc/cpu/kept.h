// Weights that stay packed from call to call.
//
// Declarations alone: what is compiled for one instruction set must not define what is linked for all.
#pragma once

#include <cstdint>
#include <memory>

namespace fusedres {

// How a weight is packed: everything that the order and number of its values depend on.
struct PackedLayout {
  int64_t numbers[11];
  int64_t size;  // floats
};

// A weight's place, packed in one layout at a time, and by which version of the weight.
class KeptWeight;

// What a call has of a kept weight: nobody writes there while it lives.
class KeptUse {
 public:
  // `kept` may be null. Where the weight is packed otherwise, or of another version, this call is the one to pack it,
  // unless another call is at it or reads what is there. Throws std::runtime_error without memory.
  KeptUse(KeptWeight* kept, int64_t version, const PackedLayout& layout);
  ~KeptUse();
  KeptUse(const KeptUse&) = delete;
  KeptUse& operator=(const KeptUse&) = delete;

  // Where it is packed; null: the call has to pack for itself.
  float* data() const { return data_; }
  // Whether this call packs.
  bool fills() const { return fills_; }
  // It has.
  void filled();

 private:
  KeptWeight* kept_ = nullptr;
  float* data_ = nullptr;
  bool fills_ = false;
};

// Keeps what begins at `address` from now on. The caller sees to it that nothing else ever begins there until it is
// forgotten.
void keep_weight(const void* address);
void forget_weight(const void* address);
// Null where it is not kept.
std::shared_ptr<KeptWeight> find_kept(const void* address);
// Of all packed weights together.
int64_t kept_bytes();

}  // namespace fusedres
