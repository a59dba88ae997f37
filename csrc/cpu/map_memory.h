// Memory of maps, which stays here between one map and the next.
//
// malloc gives a large block back to the system when it is freed, and the system zeroes the pages of the next one while
// a kernel stores into them. Here pages are kept, and are large ones where the system has them.
#pragma once

#include <cstdint>

namespace fusedres {

// `bytes` uninitialised bytes, aligned for whole vectors. Null where they are better asked of torch: too few to be
// worth it, no room here, or switched off (FUSEDRES_MAP_MEMORY=0).
void* take_map(int64_t bytes);
void give_map(void* data);

// `used`: bytes that maps lie in; `held`: up to the last that has ever had a page, unless it was given back.
struct MapMemory {
  int64_t used, held;
};
MapMemory map_memory();

// Gives pages that no map lies in back to the system.
void release_maps();

}  // namespace fusedres
