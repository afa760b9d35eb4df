// MoE routing (a warp a token) and the stable sort of the (token, choice) slots by expert.
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

__device__ float warp_max(float x) {
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
  return x;
}

__device__ float warp_sum(float x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

// Lane l holds the experts l, l + 32, ...; the sum with the bias is rounded to the logits' type, as torch does.
template <int N, class T>
__device__ void load_scores(float (&score)[N], const T* logits, const T* bias, int64_t token, int experts) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = threadIdx.x % 32 + 32 * i;
    score[i] = NOTHING;
    if (e >= experts) continue;
    T value = logits[token * experts + e];
    if (bias) narrow(value, widen(value) + widen(bias[e]));
    score[i] = widen(value);
  }
}

template <int N>
__device__ void softmax(float (&score)[N]) {
  float top = NOTHING, sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) top = fmaxf(top, score[i]);
  top = warp_max(top);
#pragma unroll
  for (int i = 0; i < N; ++i) sum += score[i] = expf(score[i] - top);
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < N; ++i) score[i] /= sum;
}

template <int N, class T>
__device__ void route(const T* logits, const T* bias, int64_t* ids, T* weights, int64_t tokens, int experts, int top_k,
                      bool topk_first, bool renormalize) {
  const int64_t token = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (token >= tokens) return;
  const int lane = threadIdx.x % 32;
  float score[N];
  load_scores(score, logits, bias, token, experts);
  if (!topk_first) {
    softmax(score);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (lane + 32 * i >= experts) score[i] = NOTHING;
  }
  float value = NOTHING;  // of choice number `lane`
  int picked = 0;
  for (int j = 0; j < top_k; ++j) {
    float best = NOTHING;
    int expert = INT32_MAX;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool better = score[i] > best || (score[i] == best && lane + 32 * i < expert && lane + 32 * i < experts);
      best = better ? score[i] : best;
      expert = better ? lane + 32 * i : expert;
    }
    for (int step = 16; step; step /= 2) {
      const float other = __shfl_xor_sync(ALL, best, step);
      const int other_expert = __shfl_xor_sync(ALL, expert, step);
      const bool better = other > best || (other == best && other_expert < expert);
      best = better ? other : best;
      expert = better ? other_expert : expert;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (expert == lane + 32 * i) score[i] = NOTHING;
    if (lane == j) value = best, picked = expert;
  }
  const bool mine = lane < top_k;
  const float largest = __shfl_sync(ALL, value, 0);
  if (topk_first) value = expf(value - largest);
  const float sum = warp_sum(mine ? value : 0.f);
  if (topk_first || renormalize) value /= sum;
  if (mine) {
    ids[token * top_k + lane] = picked;
    narrow(weights[token * top_k + lane], value);
  }
}

// Gradient of the logits; over_all: the softmax ran over all experts, otherwise over the picked ones.
template <int N, class T>
__device__ void route_backward(const T* grad, const T* logits, const T* bias, const int64_t* ids, T* out, int64_t tokens,
                               int experts, int top_k, bool over_all) {
  const int64_t token = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (token >= tokens) return;
  const int lane = threadIdx.x % 32;
  float score[N], from_out[N];
  load_scores(score, logits, bias, token, experts);
  const bool mine = lane < top_k;
  const int my_id = mine ? static_cast<int>(ids[token * top_k + lane]) : 0;
  const float my_grad = mine ? widen(grad[token * top_k + lane]) : 0.f;
  unsigned picked = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) from_out[i] = 0;
  for (int j = 0; j < top_k; ++j) {
    const int expert = __shfl_sync(ALL, my_id, j);
    const float value = __shfl_sync(ALL, my_grad, j);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (expert == lane + 32 * i) from_out[i] += value, picked |= 1u << i;
  }
  if (!over_all)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!(picked >> i & 1)) score[i] = NOTHING;
  softmax(score);
  float dot = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) dot += score[i] * from_out[i];
  dot = warp_sum(dot);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = lane + 32 * i;
    if (e < experts) narrow(out[token * experts + e], score[i] * (from_out[i] - dot));
  }
}

template <class I>
__device__ int expert_of(const I* ids, int64_t slot, int64_t slots, int experts) {
  const I e = slot < slots ? ids[slot] : experts;
  return e < 0 || e > experts ? experts : static_cast<int>(e);
}

// Each warp of a block owns a run of consecutive slots; `count` [warps][experts + 1] gets its counts.
template <class I>
__device__ void count_runs(int* count, const I* ids, int64_t slots, int experts, int64_t run) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int e = threadIdx.x; e < warps * (experts + 1); e += blockDim.x) count[e] = 0;
  __syncthreads();
  const int64_t first = (int64_t{blockIdx.x} * warps + warp) * run;
  for (int64_t at = first; at < first + run && at < slots; at += 32) {
    const int e = expert_of(ids, at + lane, slots, experts);
    const unsigned same = __match_any_sync(ALL, e);
    if (at + lane < slots && lane == __ffs(same) - 1)
      count[warp * (experts + 1) + e] += __popc(same & (slots - at >= 32 ? ALL : (1u << (slots - at)) - 1));
    __syncwarp();
  }
  __syncthreads();
}

template <class I>
__device__ void dispatch_count(const I* ids, int64_t slots, int experts, int64_t run, int* block_counts) {
  extern __shared__ int count[];
  count_runs(count, ids, slots, experts, run);
  const int warps = blockDim.x / 32;
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) {
    int sum = 0;
    for (int w = 0; w < warps; ++w) sum += count[w * (experts + 1) + e];
    block_counts[int64_t{blockIdx.x} * (experts + 1) + e] = sum;
  }
}

// block_counts is null when there is one block. `tiles` is null without a tile map.
template <class I>
__device__ void dispatch_place(const I* ids, int64_t slots, int experts, int64_t run, const int* block_counts,
                               int* permutation, int* inverse, int* counts, int* offsets, int2* tiles,
                               int64_t num_tiles, int tile) {
  extern __shared__ int count[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, stride = experts + 1;
  int* start = count + warps * stride;  // [experts + 1] first row of each expert
  int* tile_start = start + stride;     // [experts + 1] first tile of each expert
  count_runs(count, ids, slots, experts, run);
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) {
    int before = 0, total = 0;  // rows of this expert in earlier blocks; in all
    if (block_counts)
      for (unsigned b = 0; b < gridDim.x; ++b) {
        if (b == blockIdx.x) before = total;
        total += block_counts[int64_t{b} * stride + e];
      }
    int here = before;
    for (int w = 0; w < warps; ++w) {
      const int n = count[w * stride + e];
      count[w * stride + e] = here;
      here += n;
    }
    start[e] = block_counts ? total : here;
  }
  __syncthreads();
  if (warp == 0) {
    int rows = 0, used = 0;
    for (int first = 0; first <= experts; first += 32) {
      const int e = first + lane;
      const int n = e < experts ? start[e] : 0, t = tile ? (n + tile - 1) / tile : 0;
      int n_sum = n, t_sum = t;
      for (int step = 1; step < 32; step *= 2) {
        const int a = __shfl_up_sync(ALL, n_sum, step), b = __shfl_up_sync(ALL, t_sum, step);
        if (lane >= step) n_sum += a, t_sum += b;
      }
      if (e <= experts) {
        start[e] = rows + n_sum - n;
        tile_start[e] = used + t_sum - t;
        if (blockIdx.x == 0) {
          offsets[e] = start[e];
          if (e < experts) counts[e] = n;
        }
      }
      rows += __shfl_sync(ALL, n_sum, 31);
      used += __shfl_sync(ALL, t_sum, 31);
    }
  }
  __syncthreads();
  int* next = count + warp * stride;
  const int64_t first = (int64_t{blockIdx.x} * warps + warp) * run;
  for (int64_t at = first; at < first + run && at < slots; at += 32) {
    const int64_t slot = at + lane;
    const int e = expert_of(ids, slot, slots, experts);
    const unsigned same = __match_any_sync(ALL, e);
    const int row = start[e] + next[e] + __popc(same & ((1u << lane) - 1));
    if (slot < slots) {
      permutation[row] = static_cast<int>(slot);
      inverse[slot] = row;
    }
    __syncwarp();
    if (lane == __ffs(same) - 1) next[e] += __popc(same);
    __syncwarp();
  }
  const int total = start[experts];
  for (int64_t t = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; t < num_tiles; t += int64_t{gridDim.x} * blockDim.x) {
    int low = 0, high = experts;  // the last expert whose first tile is at most t and that has tiles
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (tile_start[middle] <= t)
        low = middle;
      else
        high = middle - 1;
    }
    const int row = low == experts ? total : start[low] + static_cast<int>(t - tile_start[low]) * tile;
    tiles[t] = make_int2(low, row);
  }
}

}  // namespace

#define ROUTING(NAME, T, N)                                                                                           \
  extern "C" __global__ void moe_routing_##NAME##_##N(const T* logits, const T* bias, int64_t* ids, T* weights,       \
                                                      int64_t tokens, int64_t experts, int64_t top_k,                 \
                                                      bool topk_first, bool renormalize) {                            \
    route<N>(logits, bias, ids, weights, tokens, static_cast<int>(experts), static_cast<int>(top_k), topk_first,      \
             renormalize);                                                                                            \
  }                                                                                                                   \
  extern "C" __global__ void moe_routing_backward_##NAME##_##N(const T* grad, const T* logits, const T* bias,         \
                                                               const int64_t* ids, T* out, int64_t tokens,            \
                                                               int64_t experts, int64_t top_k, bool over_all) {       \
    route_backward<N>(grad, logits, bias, ids, out, tokens, static_cast<int>(experts), static_cast<int>(top_k),       \
                      over_all);                                                                                      \
  }
#define ROUTING_SIZES(NAME, T) ROUTING(NAME, T, 1) ROUTING(NAME, T, 4) ROUTING(NAME, T, 16)
ROUTING_SIZES(float32, float)
ROUTING_SIZES(float16, __half)
ROUTING_SIZES(bfloat16, __nv_bfloat16)

#define DISPATCH(NAME, I)                                                                                             \
  extern "C" __global__ void moe_dispatch_count_##NAME(const I* ids, int64_t slots, int64_t experts, int64_t run,     \
                                                       int* block_counts) {                                           \
    dispatch_count(ids, slots, static_cast<int>(experts), run, block_counts);                                         \
  }                                                                                                                   \
  extern "C" __global__ void moe_dispatch_place_##NAME(const I* ids, int64_t slots, int64_t experts, int64_t run,     \
                                                       const int* block_counts, int* permutation, int* inverse,       \
                                                       int* counts, int* offsets, int2* tiles, int64_t num_tiles,     \
                                                       int64_t tile) {                                                \
    dispatch_place(ids, slots, static_cast<int>(experts), run, block_counts, permutation, inverse, counts, offsets,   \
                   tiles, num_tiles, static_cast<int>(tile));                                                         \
  }
DISPATCH(int64, int64_t)
DISPATCH(int32, int32_t)
