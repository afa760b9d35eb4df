#include "ivl/moe_routing.h"

#include <climits>

#define IVL_KERNELS "ivl/moe_routing_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {

template <class T>
void route(RoutingOptions options, const T* logits, const T* bias, int64_t* ids, T* weights) {
  IVL_CALL(route, options, logits, bias, ids, weights);
}

template <class T>
void route_backward(RoutingOptions options, const T* grad, const T* logits, const T* bias, const int64_t* ids,
                    T* grad_logits) {
  IVL_CALL(route_backward, options, grad, logits, bias, ids, grad_logits);
}

#define IVL_INSTANTIATE(T)                                                      \
  template void route(RoutingOptions, const T*, const T*, int64_t*, T*);        \
  template void route_backward(RoutingOptions, const T*, const T*, const T*, const int64_t*, T*);
IVL_WIDENED_TYPES(IVL_INSTANTIATE)

void sort_by_expert(const int64_t* ids, int64_t slots, int64_t experts, int32_t* permutation, int32_t* inverse,
                    int32_t* counts, int32_t* offsets) {
  const auto bucket = [&](int64_t slot) { return ids[slot] < 0 || ids[slot] >= experts ? experts : ids[slot]; };
  std::vector<int32_t> next(experts + 1, 0);
  for (int64_t slot = 0; slot < slots; ++slot) ++next[bucket(slot)];
  int32_t total = 0;
  for (int64_t e = 0; e <= experts; ++e) {
    const int32_t count = next[e];
    offsets[e] = next[e] = total;
    if (e < experts) counts[e] = count;
    total += count;
  }
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t row = next[bucket(slot)]++;
    permutation[row] = static_cast<int32_t>(slot);
    inverse[slot] = row;
  }
}

void list_tiles(const int32_t* offsets, int64_t experts, int64_t tile, int64_t tiles, int32_t* result) {
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t row = offsets[e]; row < offsets[e + 1]; row += tile, --tiles, result += 2)
      result[0] = static_cast<int32_t>(e), result[1] = static_cast<int32_t>(row);
  for (; tiles > 0; --tiles, result += 2) result[0] = static_cast<int32_t>(experts), result[1] = offsets[experts];
}

}  // namespace ivl
