// Token packing: scans over token ids (a block a batch row), and row movement (a warp a row, 16 bytes a lane where the
// addresses allow it).
#include <cstdint>

namespace {

constexpr int kWarps = 16;  // of the scanning kernels
constexpr int kStatus = 5;  // numbers about a batch row

// How many threads before this one have the flag set; `total`: how many of the block. All threads must call it.
__device__ int block_rank(bool flag, int* warp_counts, int& total) {
  const unsigned votes = __ballot_sync(~0u, flag);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    const int n = warp_counts[w];
    before += w < warp ? n : 0;
    total += n;
  }
  __syncthreads();
  return before + __popc(votes & ((1u << lane) - 1));
}

// before[i] = value(0) + ... + value(i - 1) for i < n; returns the sum of all. All threads must call it.
template <class F>
__device__ int block_scan(int n, F value, int* warp_sums, int* before) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int base = 0;
  for (int first = 0; first < n; first += blockDim.x) {
    const int i = first + threadIdx.x, mine = i < n ? value(i) : 0;
    int sum = mine;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int earlier = base;
    for (int w = 0; w < kWarps; ++w) {
      earlier += w < warp ? warp_sums[w] : 0;
      base += warp_sums[w];
    }
    if (i < n) before[i] = earlier + sum - mine;
    __syncthreads();
  }
  return base;
}

// Place in its packed row of token n, or -1; words [batch, ceil(columns / 32)]: the bits of the tokens that stay, and
// how many do before them.
__device__ int place_of(const int2* words, int64_t columns, int64_t row, int64_t n) {
  const int2 word = words[row * ((columns + 31) / 32) + n / 32];
  const unsigned bit = 1u << (n % 32);
  return word.x & bit ? word.y + __popc(word.x & (bit - 1)) : -1;
}

__device__ int64_t sum_before(const int64_t* values, int64_t n, int stride = 1) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += values[i * stride];
  return sum;
}

template <class T>
__device__ void copy_row(char* to, const char* from, int64_t bytes) {
  const int lane = threadIdx.x % 32;
  const T* source = reinterpret_cast<const T*>(from);
  T* target = reinterpret_cast<T*>(to);
  for (int64_t i = lane; i < bytes / int64_t{sizeof(T)}; i += 32) target[i] = source[i];
}

__device__ void copy_row(char* to, const char* from, int64_t bytes) {
  const uint64_t bits =
      reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from) | static_cast<uint64_t>(bytes);
  if (bits % 16 == 0)
    copy_row<uint4>(to, from, bytes);
  else if (bits % 4 == 0)
    copy_row<uint32_t>(to, from, bytes);
  else
    copy_row<uint16_t>(to, from, bytes);
}

__device__ char* grid_row(char* base, int64_t p, int64_t columns, int64_t batch_stride, int64_t token_stride) {
  return base + (p / columns) * batch_stride + (p % columns) * token_stride;
}

}  // namespace

// Row m of rows [count, row_bytes] -> row positions[m] of the grid; strides in bytes, row_bytes even.
extern "C" __global__ void place_rows(char* base, const int64_t* positions, const char* rows, int64_t count,
                                      int64_t columns, int64_t batch_stride, int64_t token_stride, int64_t row_bytes) {
  const int64_t m = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (m >= count) return;
  copy_row(grid_row(base, positions[m], columns, batch_stride, token_stride), rows + m * row_bytes, row_bytes);
}

// Row positions[m] of the grid -> row m of rows.
extern "C" __global__ void take_rows(char* base, const int64_t* positions, char* rows, int64_t count, int64_t columns,
                                     int64_t batch_stride, int64_t token_stride, int64_t row_bytes) {
  const int64_t m = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (m >= count) return;
  copy_row(rows + m * row_bytes, grid_row(base, positions[m], columns, batch_stride, token_stride), row_bytes);
}

// Row i of out = row ids[i] of table [vocabulary, row_bytes]; rows where ids == token are left alone, and an id outside
// the table makes a row of NaN (all bits set). row_bytes even.
extern "C" __global__ void embed_text(const int64_t* ids, const char* table, char* out, int64_t n, int64_t vocabulary,
                                      int64_t token, int64_t row_bytes) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (i >= n || ids[i] == token) return;
  char* row = out + i * row_bytes;
  if (ids[i] >= 0 && ids[i] < vocabulary)
    copy_row(row, table + ids[i] * row_bytes, row_bytes);
  else
    for (int64_t j = 2 * (threadIdx.x % 32); j < row_bytes; j += 64) *reinterpret_cast<uint16_t*>(row + j) = 0xffff;
}

// counts[block] = how many ids of the block's `columns` are the token.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    count_tokens(const int64_t* ids, int64_t* counts, int64_t columns, int64_t total, int64_t token) {
  __shared__ int warp_counts[kWarps];
  const int64_t begin = blockIdx.x * columns, end = begin + columns < total ? begin + columns : total;
  int mine = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) mine += ids[i] == token;
  for (int step = 16; step; step /= 2) mine += __shfl_xor_sync(~0u, mine, step);
  if (threadIdx.x % 32 == 0) warp_counts[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warp_counts[w];
    counts[blockIdx.x] = sum;
  }
}

// positions[0 .. capacity) = where ids == token, ascending; counts as count_tokens left them.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    list_tokens(const int64_t* ids, const int64_t* counts, int64_t* positions, int64_t columns, int64_t total,
                int64_t token, int64_t capacity) {
  __shared__ int warp_counts[kWarps];
  const int64_t begin = blockIdx.x * columns, end = begin + columns < total ? begin + columns : total;
  int64_t base = sum_before(counts, blockIdx.x);
  for (int64_t first = begin; first < end; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    const bool found = i < end && ids[i] == token;
    int count;
    const int64_t at = base + block_rank(found, warp_counts, count);
    if (found && at < capacity) positions[at] = i;
    base += count;
  }
}

// One block a batch row. keep [batch, columns]: whether a token stays; words: see `place_of`. status [batch, 5]:
// placeholders, tokens kept, last column of a run that is not a multiple of `full` (or -1), column of an id outside
// [0, vocabulary) (or -1), tokens present. tile_source [tiles]: first token of a tile. counts [batch], -1 on entry: how
// each row tells the later ones its placeholders; a block waits for blocks before it only, which started before it.
extern "C" __global__ void __launch_bounds__(32 * kWarps, 1)
    pack_scan(const int64_t* ids, const bool* mask, const bool* compress, volatile int64_t* counts, bool* keep,
              int2* words, int64_t* status, int64_t* tile_source, int64_t columns, int64_t tiles, int64_t token,
              int64_t full, int64_t small, int64_t vocabulary) {
  extern __shared__ unsigned shared[];
  __shared__ int warp_sums[kWarps];
  __shared__ unsigned long long bad_run, bad_id, tiles_before;
  const int size = static_cast<int>((columns + 31) / 32), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned *visual = shared, *present = visual + size;  // a bit a token; `present` becomes what stays
  int* before = reinterpret_cast<int*>(present + size);
  const int64_t row = blockIdx.x, start = row * columns;
  if (threadIdx.x == 0) bad_run = bad_id = ~0ull, tiles_before = 0;
  __syncthreads();
  for (int w = warp; w < size; w += kWarps) {
    const int64_t n = 32 * int64_t{w} + lane;
    const bool here = n < columns && (mask == nullptr || mask[start + n]);
    const int64_t id = n < columns ? ids[start + n] : 0;
    const unsigned all = __ballot_sync(~0u, here), placeholders = __ballot_sync(~0u, here && id == token);
    if (lane == 0) present[w] = all, visual[w] = placeholders;
    if (here && (id < 0 || id >= vocabulary)) atomicMin(&bad_id, static_cast<unsigned long long>(n));
  }
  __syncthreads();
  const int attended = block_scan(size, [&](int w) { return __popc(present[w]); }, warp_sums, before);
  const int found = block_scan(size, [&](int w) { return __popc(visual[w]); }, warp_sums, before);
  if (threadIdx.x == 0) counts[row] = found;
  for (int64_t earlier = threadIdx.x; earlier < row; earlier += blockDim.x) {
    int64_t count;
    while ((count = counts[earlier]) < 0) {
    }
    atomicAdd(&tiles_before, static_cast<unsigned long long>(count));
  }
  __syncthreads();
  const int64_t first_tile = static_cast<int64_t>(tiles_before) / full;
  for (int w = warp; w < size; w += kWarps) {
    const int64_t n = 32 * int64_t{w} + lane;
    const unsigned mine = visual[w];
    bool stays = present[w] >> lane & 1;
    if (mine >> lane & 1) {
      const int rank = before[w] + __popc(mine & ((1u << lane) - 1)), in_tile = rank % static_cast<int>(full);
      const int64_t tile = first_tile + rank / static_cast<int>(full);
      stays = in_tile < small || tile >= tiles || !compress[tile];
      if (in_tile == 0 && tile < tiles) tile_source[tile] = start + n;
      const bool more = lane < 31 ? mine >> (lane + 1) & 1 : w + 1 < size && (visual[w + 1] & 1);
      if (!more && in_tile + 1 != full) atomicMin(&bad_run, static_cast<unsigned long long>(n));
    }
    const unsigned staying = __ballot_sync(~0u, stays);
    if (lane == 0) present[w] = staying;
    if (n < columns) keep[start + n] = stays;
  }
  __syncthreads();
  const int length = block_scan(size, [&](int w) { return __popc(present[w]); }, warp_sums, before);
  for (int w = threadIdx.x; w < size; w += blockDim.x) words[row * size + w] = make_int2(present[w], before[w]);
  if (threadIdx.x == 0) {
    status[kStatus * row] = found;
    status[kStatus * row + 1] = length;
    status[kStatus * row + 2] = static_cast<int64_t>(bad_run);
    status[kStatus * row + 3] = static_cast<int64_t>(bad_id);
    status[kStatus * row + 4] = attended;
  }
}

// Grid (column blocks, batch). Each token that stays goes to its place, the rest of the packed buffer is padded.
// padding: 0 left, 1 right, 2 none (rows end to end in one row of `width`). labels and weights may be null.
extern "C" __global__ void pack_write(const int64_t* ids, const int64_t* labels, const float* weights,
                                      const int2* words, const int64_t* status, const int64_t* tile_source,
                                      int64_t* new_ids, int64_t* new_mask, int64_t* positions, int64_t* kept,
                                      int64_t* new_labels, float* new_weights, int64_t* tile_rows, int64_t batch,
                                      int64_t columns, int64_t width, int64_t tiles, int64_t padding, int64_t pad_id) {
  const int64_t row = blockIdx.y, n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x,
                length = status[kStatus * row + 1];
  const int64_t before = padding == 2 ? sum_before(status + 1, row, kStatus) : row * width;
  const int64_t start = padding == 0 ? before + width - length : before;
  const int p = n < columns ? place_of(words, columns, row, n) : -1;
  if (p >= 0) {
    const int64_t i = row * columns + n, o = start + p;
    new_ids[o] = ids[i];
    new_mask[o] = 1;
    positions[o] = p;
    kept[o] = i;
    if (labels) new_labels[o] = labels[i];
    if (weights) new_weights[o] = weights[i];
  }
  // Padding: what the row leaves of its width; with rows end to end, what all rows leave of the buffer.
  int64_t pad = -1;
  if (padding == 0 && n < width - length) pad = before + n;
  if (padding == 1 && n >= length && n < width) pad = before + n;
  if (padding == 2) {
    const int64_t total = sum_before(status + 1, batch, kStatus), rest = total + row * columns + n;
    if (n < columns && rest < width) pad = rest;
  }
  if (pad >= 0) {
    new_ids[pad] = pad_id;
    new_mask[pad] = 0;
    positions[pad] = 0;
    kept[pad] = -1;
    if (labels) new_labels[pad] = -100;
    if (weights) new_weights[pad] = 0.0f;
  }
  // The tiles of this batch row, dealt to its threads.
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t t = n; t < tiles; t += threads) {
    const int64_t source = tile_source[t];
    if (source < 0)
      tile_rows[t] = 0;  // more decisions than tiles: the caller raises, or does not look
    else if (source / columns == row)
      tile_rows[t] = start + place_of(words, columns, row, source % columns);
  }
}
