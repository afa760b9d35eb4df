#include "ivl/scratch.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ivl {
namespace {

constexpr int64_t kAlignment = 64, kHugePage = int64_t{2} << 20, kKept = int64_t{32} << 20;
constexpr size_t kBlocks = 8;

struct Block {
  void* memory;
  int64_t capacity;
};

struct Store {
  std::vector<Block> blocks;
  ~Store() {
    for (Block b : blocks) std::free(b.memory);
  }
};

thread_local Store store;

}  // namespace

void* take_scratch(int64_t bytes, int64_t* capacity) {
  bytes = std::max(bytes, kAlignment);
  auto best = store.blocks.end();
  for (auto b = store.blocks.begin(); b != store.blocks.end(); ++b)
    if (b->capacity >= bytes && (best == store.blocks.end() || b->capacity < best->capacity)) best = b;
  if (best != store.blocks.end()) {
    const Block found = *best;
    store.blocks.erase(best);
    *capacity = found.capacity;
    return found.memory;
  }
  const int64_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
  *capacity = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, *capacity);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kHugePage) madvise(memory, *capacity, MADV_HUGEPAGE);
#endif
  return memory;
}

void give_scratch(void* memory, int64_t capacity) {
  if (capacity > kKept) return std::free(memory);
  store.blocks.push_back({memory, capacity});
  if (store.blocks.size() > kBlocks) {
    auto smallest = std::min_element(store.blocks.begin(), store.blocks.end(),
                                     [](const Block& a, const Block& b) { return a.capacity < b.capacity; });
    std::free(smallest->memory);
    store.blocks.erase(smallest);
  }
}

}  // namespace ivl
