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
  const uint64_t bits = reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from) | static_cast<uint64_t>(bytes);
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

// Row i of out = row ids[i] of table [*, row_bytes]; rows where ids == token are left alone. row_bytes even.
extern "C" __global__ void embed_text(const int64_t* ids, const char* table, char* out, int64_t n, int64_t token,
                                      int64_t row_bytes) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (i < n && ids[i] != token) copy_row(out + i * row_bytes, table + ids[i] * row_bytes, row_bytes);
}

// counts[block] = how many unmasked ids of the block's `columns` are the token; mask may be null.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    count_tokens(const int64_t* ids, const bool* mask, int64_t* counts, int64_t columns, int64_t total, int64_t token) {
  __shared__ int warp_counts[kWarps];
  const int64_t begin = blockIdx.x * columns, end = begin + columns < total ? begin + columns : total;
  int mine = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) mine += ids[i] == token && (mask == nullptr || mask[i]);
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
    list_tokens(const int64_t* ids, const int64_t* counts, int64_t* positions, int64_t columns, int64_t total, int64_t token,
                int64_t capacity) {
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

// One block a batch row; counts: placeholders of each row. keep and place [batch, columns]: whether a token stays, and its
// place in the packed row (-1: dropped). status [batch, 5]: placeholders, tokens kept, last column of a run that is not a
// multiple of `full` (or -1), column of an id outside [0, vocabulary) (or -1), tokens present. tile_source [tiles]: first token of a tile.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    pack_scan(const int64_t* ids, const bool* mask, const bool* compress, const int64_t* counts, bool* keep, int32_t* place,
              int64_t* status, int64_t* tile_source, int64_t columns, int64_t tiles, int64_t token, int64_t full,
              int64_t small, int64_t vocabulary) {
  __shared__ int warp_counts[kWarps];
  __shared__ unsigned long long bad_run, bad_id;
  const int64_t row = blockIdx.x, start = row * columns, first_tile = sum_before(counts, row) / full;
  if (threadIdx.x == 0) bad_run = bad_id = ~0ull;
  int64_t seen = 0, length = 0, attended = 0;
  for (int64_t first = 0; first < columns; first += blockDim.x) {
    const int64_t n = first + threadIdx.x;
    const bool inside = n < columns;
    const int64_t id = inside ? ids[start + n] : 0;
    const bool present = inside && (mask == nullptr || mask[start + n]), visual = present && id == token;
    int count;
    const int64_t rank = seen + block_rank(visual, warp_counts, count);
    const int64_t tile = first_tile + rank / full;
    bool stays = present;
    if (visual) {
      stays = rank % full < small || tile >= tiles || !compress[tile];
      if (rank % full == 0 && tile < tiles) tile_source[tile] = start + n;
      const bool more = n + 1 < columns && ids[start + n + 1] == token && (mask == nullptr || mask[start + n + 1]);
      if (!more && (rank + 1) % full != 0) atomicMin(&bad_run, static_cast<unsigned long long>(n));
    }
    if (present && (id < 0 || id >= vocabulary)) atomicMin(&bad_id, static_cast<unsigned long long>(n));
    seen += count;
    const int64_t at = length + block_rank(stays, warp_counts, count);
    if (inside) {
      keep[start + n] = stays;
      place[start + n] = stays ? static_cast<int32_t>(at) : -1;
    }
    length += count;
    block_rank(present, warp_counts, count);
    attended += count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    status[kStatus * row] = counts[row];
    status[kStatus * row + 1] = length;
    status[kStatus * row + 2] = static_cast<int64_t>(bad_run);
    status[kStatus * row + 3] = static_cast<int64_t>(bad_id);
    status[kStatus * row + 4] = attended;
  }
}

// Grid (column blocks, batch). Each token that stays goes to its place, the rest of the packed buffer is padded.
// padding: 0 left, 1 right, 2 none (rows end to end in one row of `width`). labels and weights may be null.
extern "C" __global__ void pack_write(const int64_t* ids, const int64_t* labels, const float* weights, const int32_t* place,
                                      const int64_t* status, const int64_t* tile_source, int64_t* new_ids, int64_t* new_mask,
                                      int64_t* positions, int64_t* kept, int64_t* new_labels, float* new_weights,
                                      int64_t* tile_rows, int64_t batch, int64_t columns, int64_t width, int64_t tiles,
                                      int64_t padding, int64_t pad_id) {
  const int64_t row = blockIdx.y, n = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, length = status[kStatus * row + 1];
  const int64_t before = padding == 2 ? sum_before(status + 1, row, kStatus) : row * width;
  const int64_t start = padding == 0 ? before + width - length : before;
  if (n < columns && place[row * columns + n] >= 0) {
    const int64_t i = row * columns + n, p = place[i], o = start + p;
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
      tile_rows[t] = start + place[source];
  }
}
