// Row movement of token packing: one warp a row, 16 bytes a lane where the addresses allow it.
#include <cstdint>

namespace {

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
