#include "ivl/token_packing.h"

#include <cstring>

#include "ivl/parallel.h"

namespace ivl {
namespace {

constexpr int64_t kBytesPerTask = 64 * 1024;

int64_t rows_per_task(int64_t row_bytes) { return std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, row_bytes)); }

}  // namespace

void place_rows(RowGrid grid, const int64_t* positions, const char* rows, int64_t count, int64_t row_bytes) {
  parallel_for(count, rows_per_task(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) std::memcpy(grid.row(positions[m]), rows + m * row_bytes, row_bytes);
  });
}

void take_rows(RowGrid grid, const int64_t* positions, char* rows, int64_t count, int64_t row_bytes) {
  parallel_for(count, rows_per_task(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) std::memcpy(rows + m * row_bytes, grid.row(positions[m]), row_bytes);
  });
}

}  // namespace ivl
