// MoE routing (1 to 32 lanes a token) and the stable sort of the (token, choice) slots by expert.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr float NOTHING = -INFINITY;

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void narrow(float& to, float x) { to = x; }
__device__ void narrow(__half& to, float x) { to = __float2half(x); }
__device__ void narrow(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }

// A row of scores over a group of 1 to 32 lanes, N a lane: runs of 16 bytes, dealt to the lanes in turn.
template <class T, int N>
struct Row {
  static constexpr int RUN = 16 / sizeof(T) < N ? 16 / sizeof(T) : N;
  int lanes, lane;  // of the group

  __device__ explicit Row(int group) : lanes(group), lane(threadIdx.x % group) {}
  __device__ int expert(int i) const { return (i / RUN * lanes + lane) * RUN + i % RUN; }

  __device__ float max(float x) const {
    for (int step = lanes / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
  }

  __device__ float sum(float x) const {
    for (int step = lanes / 2; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
  }

  // The sum with the bias is rounded to the logits' type, as torch does. Past the last expert: NOTHING.
  __device__ void load(float (&score)[N], const T* logits, const T* bias, int experts) const {
    alignas(16) T value[N];
    const bool runs = experts % RUN == 0 && reinterpret_cast<uint64_t>(logits) % (RUN * sizeof(T)) == 0;
#pragma unroll
    for (int i = 0; i < N; i += RUN) {
      const int first = expert(i);
      if (RUN * sizeof(T) == 16 && runs) {
        if (first < experts) *reinterpret_cast<uint4*>(value + i) = *reinterpret_cast<const uint4*>(logits + first);
      } else {
#pragma unroll
        for (int j = 0; j < RUN; ++j)
          if (first + j < experts) value[i + j] = logits[first + j];
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool inside = expert(i) < experts;
      if (bias && inside) narrow(value[i], widen(value[i]) + widen(bias[expert(i)]));
      score[i] = inside ? widen(value[i]) : NOTHING;
    }
  }

  __device__ void store(T* out, const float (&value)[N], int experts) const {
    alignas(16) T narrowed[N];
    const bool runs = experts % RUN == 0 && reinterpret_cast<uint64_t>(out) % (RUN * sizeof(T)) == 0;
#pragma unroll
    for (int i = 0; i < N; ++i) narrow(narrowed[i], value[i]);
#pragma unroll
    for (int i = 0; i < N; i += RUN) {
      const int first = expert(i);
      if (RUN * sizeof(T) == 16 && runs) {
        if (first < experts) *reinterpret_cast<uint4*>(out + first) = *reinterpret_cast<const uint4*>(narrowed + i);
      } else {
#pragma unroll
        for (int j = 0; j < RUN; ++j)
          if (first + j < experts) out[first + j] = narrowed[i + j];
      }
    }
  }

  __device__ void softmax(float (&score)[N]) const {
    float top = NOTHING, total = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) top = fmaxf(top, score[i]);
    top = max(top);
#pragma unroll
    for (int i = 0; i < N; ++i) total += score[i] = expf(score[i] - top);
    total = sum(total);
#pragma unroll
    for (int i = 0; i < N; ++i) score[i] /= total;
  }
};

// `group` lanes a token, at least top_k. Lanes of tokens past the end work on the last token and store nothing.
template <int N, class T>
__device__ void route(const T* logits, const T* bias, int64_t* ids, T* weights, int64_t tokens, int experts, int top_k,
                      int group, bool topk_first, bool renormalize) {
  const Row<T, N> row(group);
  const int64_t wanted = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / group;
  const int64_t token = wanted < tokens ? wanted : tokens - 1;
  float score[N];
  row.load(score, logits + token * experts, bias, experts);
  if (!topk_first) {
    row.softmax(score);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (row.expert(i) >= experts) score[i] = NOTHING;
  }
  float value = NOTHING;  // of choice number `lane`
  int picked = 0;
  for (int j = 0; j < top_k; ++j) {
    // The first of equals: a lane's experts ascend.
    float best = score[0];
    int expert = row.expert(0);
#pragma unroll
    for (int i = 1; i < N; ++i) {
      const bool better = score[i] > best;
      best = better ? score[i] : best;
      expert = better ? row.expert(i) : expert;
    }
    for (int step = group / 2; step; step /= 2) {
      const float other = __shfl_xor_sync(ALL, best, step);
      const int other_expert = __shfl_xor_sync(ALL, expert, step);
      const bool better = other > best || (other == best && other_expert < expert);
      best = better ? other : best;
      expert = better ? other_expert : expert;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (expert == row.expert(i)) score[i] = NOTHING;
    if (row.lane == j) value = best, picked = expert;
  }
  const bool mine = row.lane < top_k;
  if (topk_first) value = expf(value - __shfl_sync(ALL, value, 0, group));
  const float sum = row.sum(mine ? value : 0.f);
  if (topk_first || renormalize) value /= sum;
  if (mine && wanted < tokens) {
    ids[token * top_k + row.lane] = picked;
    narrow(weights[token * top_k + row.lane], value);
  }
}

// Gradient of the logits; over_all: the softmax ran over all experts, otherwise over the picked ones.
template <int N, class T>
__device__ void route_backward(const T* grad, const T* logits, const T* bias, const int64_t* ids, T* out,
                               int64_t tokens, int experts, int top_k, int group, bool over_all) {
  const Row<T, N> row(group);
  const int64_t wanted = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / group;
  const int64_t token = wanted < tokens ? wanted : tokens - 1;
  float score[N], from_out[N];
  row.load(score, logits + token * experts, bias, experts);
  const bool mine = row.lane < top_k;
  const int my_id =
      mine ? static_cast<int>(__ldg(reinterpret_cast<const long long*>(ids) + token * top_k + row.lane)) : 0;
  const float my_grad = mine ? widen(grad[token * top_k + row.lane]) : 0.f;
  unsigned picked = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) from_out[i] = 0;
  for (int j = 0; j < top_k; ++j) {
    const int expert = __shfl_sync(ALL, my_id, j, group);
    const float value = __shfl_sync(ALL, my_grad, j, group);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (expert == row.expert(i)) from_out[i] += value, picked |= 1u << i;
  }
  if (!over_all)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!(picked >> i & 1)) score[i] = NOTHING;
  row.softmax(score);
  float dot = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) dot += score[i] * from_out[i];
  dot = row.sum(dot);
#pragma unroll
  for (int i = 0; i < N; ++i) from_out[i] = score[i] * (from_out[i] - dot);
  if (wanted < tokens) row.store(out + token * experts, from_out, experts);
}

// What a block knows about its slots: each warp owns `run` consecutive ones, a multiple of 64.
struct Slots {
  int *count, *start, *shift, *tile_start;  // [warps][experts + 1], then [experts + 1] each
  uint16_t *expert, *rank, *order;          // [warps * run]

  __device__ Slots(int* shared, int experts, int run) {
    const int warps = blockDim.x / 32, stride = experts + 1;
    count = shared;
    start = count + warps * stride;
    shift = start + stride;
    tile_start = shift + stride;
    expert = reinterpret_cast<uint16_t*>(tile_start + stride);
    rank = expert + warps * run;
    order = rank + warps * run;
  }
};

// Reads the block's ids once: `expert` of each slot (`experts`: none), its `rank` among the equal ones of its warp, and
// the warps' `count`.
template <class I>
__device__ void read_slots(const Slots& mine, const I* ids, int64_t slots, int experts, int run) {
  constexpr int RUN = 16 / sizeof(I);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, stride = experts + 1;
  const int64_t first = int64_t{blockIdx.x} * warps * run;
  for (int e = threadIdx.x; e < warps * stride; e += blockDim.x) mine.count[e] = 0;
  const bool runs = reinterpret_cast<uint64_t>(ids) % 16 == 0;
  for (int at = threadIdx.x * RUN; at < warps * run; at += blockDim.x * RUN) {
    alignas(16) I value[RUN];
    if (runs && first + at + RUN <= slots)
      *reinterpret_cast<int4*>(value) = *reinterpret_cast<const int4*>(ids + first + at);
    else
      for (int j = 0; j < RUN; ++j) value[j] = first + at + j < slots ? ids[first + at + j] : I(experts);
#pragma unroll
    for (int j = 0; j < RUN; ++j)
      mine.expert[at + j] = static_cast<uint16_t>(value[j] < 0 || value[j] > experts ? experts : value[j]);
  }
  __syncthreads();
  for (int at = warp * run + lane; at < (warp + 1) * run && first + at - lane < slots; at += 32) {
    const bool live = first + at < slots;
    const int e = live ? mine.expert[at] : -1;
    const unsigned same = __match_any_sync(ALL, e);
    const int before = live ? mine.count[warp * stride + e] : 0;
    mine.rank[at] = static_cast<uint16_t>(before + __popc(same & ((1u << lane) - 1)));
    __syncwarp();
    if (live && lane == __ffs(same) - 1) mine.count[warp * stride + e] = before + __popc(same);
    __syncwarp();
  }
  __syncthreads();
}

template <class I>
__device__ void dispatch_count(const I* ids, int64_t slots, int experts, int run, int* block_counts) {
  extern __shared__ int shared[];
  const Slots mine(shared, experts, run);
  read_slots(mine, ids, slots, experts, run);
  const int warps = blockDim.x / 32;
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) {
    int sum = 0;
    for (int w = 0; w < warps; ++w) sum += mine.count[w * (experts + 1) + e];
    block_counts[int64_t{blockIdx.x} * (experts + 1) + e] = sum;
  }
}

// block_counts is null when there is one block. `tiles` is null without a tile map.
template <class I>
__device__ void dispatch_place(const I* ids, int64_t slots, int experts, int run, const int* block_counts,
                               int* permutation, int* inverse, int* counts, int* offsets, int2* tiles,
                               int64_t num_tiles, int tile) {
  extern __shared__ int shared[];
  const Slots mine(shared, experts, run);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, stride = experts + 1;
  read_slots(mine, ids, slots, experts, run);
  // An expert's rows in earlier blocks, here (each warp's after those of the warps before), and in all.
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) {
    int before = 0, total = 0, here = 0;
    if (block_counts)
      for (unsigned b = 0; b < gridDim.x; ++b) {
        if (b == blockIdx.x) before = total;
        total += block_counts[int64_t{b} * stride + e];
      }
    for (int w = 0; w < warps; ++w) {
      const int n = mine.count[w * stride + e];
      mine.count[w * stride + e] = here;
      here += n;
    }
    mine.start[e] = block_counts ? total : here;
    mine.shift[e] = before;
    mine.tile_start[e] = here;
  }
  __syncthreads();
  if (warp == 0) {
    int rows = 0, used = 0, placed = 0;
    for (int first = 0; first <= experts; first += 32) {
      const int e = first + lane;
      const bool inside = e <= experts;
      const int n = inside ? mine.start[e] : 0, here = inside ? mine.tile_start[e] : 0;
      const int t = tile && e < experts ? (n + tile - 1) / tile : 0;
      int n_sum = n, t_sum = t, here_sum = here;
      for (int step = 1; step < 32; step *= 2) {
        const int a = __shfl_up_sync(ALL, n_sum, step), b = __shfl_up_sync(ALL, t_sum, step);
        const int c = __shfl_up_sync(ALL, here_sum, step);
        if (lane >= step) n_sum += a, t_sum += b, here_sum += c;
      }
      if (inside) {
        const int start = rows + n_sum - n;
        mine.start[e] = start;
        mine.tile_start[e] = used + t_sum - t;
        // From a slot's place among the block's, in expert order, to its row.
        mine.shift[e] += start - (placed + here_sum - here);
        for (int w = 0; w < warps; ++w) mine.count[w * stride + e] += placed + here_sum - here;
        if (blockIdx.x == 0) {
          offsets[e] = start;
          if (e < experts) counts[e] = n;
        }
      }
      rows += __shfl_sync(ALL, n_sum, 31);
      used += __shfl_sync(ALL, t_sum, 31);
      placed += __shfl_sync(ALL, here_sum, 31);
    }
  }
  __syncthreads();
  // Sorted in shared memory first, so that consecutive threads write consecutive rows.
  const int64_t first = int64_t{blockIdx.x} * warps * run;
  const int here = static_cast<int>(slots - first < warps * run ? slots - first : warps * run);
  for (int at = warp * run + lane; at < (warp + 1) * run && at < here; at += 32) {
    const int e = mine.expert[at], place = mine.count[warp * stride + e] + mine.rank[at];
    mine.order[place] = static_cast<uint16_t>(at);
    inverse[first + at] = place + mine.shift[e];
  }
  __syncthreads();
  for (int place = threadIdx.x; place < here; place += blockDim.x) {
    const int at = mine.order[place];
    permutation[place + mine.shift[mine.expert[at]]] = static_cast<int>(first + at);
  }
  const int total = mine.start[experts];
  for (int64_t t = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; t < num_tiles;
       t += int64_t{gridDim.x} * blockDim.x) {
    int low = 0, high = experts;  // the last expert whose first tile is at most t and that has tiles
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (mine.tile_start[middle] <= t)
        low = middle;
      else
        high = middle - 1;
    }
    const int row = low == experts ? total : mine.start[low] + static_cast<int>(t - mine.tile_start[low]) * tile;
    tiles[t] = make_int2(low, row);
  }
}

}  // namespace

#define ROUTING(NAME, T, N)                                                                                           \
  extern "C" __global__ void moe_routing_##NAME##_##N(const T* logits, const T* bias, int64_t* ids, T* weights,       \
                                                      int64_t tokens, int64_t experts, int64_t top_k, int64_t group,  \
                                                      bool topk_first, bool renormalize) {                            \
    route<N>(logits, bias, ids, weights, tokens, static_cast<int>(experts), static_cast<int>(top_k),                  \
             static_cast<int>(group), topk_first, renormalize);                                                       \
  }                                                                                                                   \
  extern "C" __global__ void moe_routing_backward_##NAME##_##N(                                                       \
      const T* grad, const T* logits, const T* bias, const int64_t* ids, T* out, int64_t tokens, int64_t experts,     \
      int64_t top_k, int64_t group, bool over_all) {                                                                  \
    route_backward<N>(grad, logits, bias, ids, out, tokens, static_cast<int>(experts), static_cast<int>(top_k),       \
                      static_cast<int>(group), over_all);                                                             \
  }
#define ROUTING_SIZES(NAME, T) ROUTING(NAME, T, 4) ROUTING(NAME, T, 8) ROUTING(NAME, T, 16)
ROUTING_SIZES(float32, float)
ROUTING_SIZES(float16, __half)
ROUTING_SIZES(bfloat16, __nv_bfloat16)

#define DISPATCH(NAME, I)                                                                                            \
  extern "C" __global__ void moe_dispatch_count_##NAME(const I* ids, int64_t slots, int64_t experts, int64_t run,    \
                                                       int* block_counts) {                                          \
    dispatch_count(ids, slots, static_cast<int>(experts), static_cast<int>(run), block_counts);                      \
  }                                                                                                                  \
  extern "C" __global__ void moe_dispatch_place_##NAME(                                                              \
      const I* ids, int64_t slots, int64_t experts, int64_t run, const int* block_counts, int* permutation,          \
      int* inverse, int* counts, int* offsets, int2* tiles, int64_t num_tiles, int64_t tile) {                       \
    dispatch_place(ids, slots, static_cast<int>(experts), static_cast<int>(run), block_counts, permutation, inverse, \
                   counts, offsets, tiles, num_tiles, static_cast<int>(tile));                                       \
  }
DISPATCH(int64, int64_t)
DISPATCH(int32, int32_t)
