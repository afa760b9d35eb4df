// Row movement of token packing. Rows are moved as bytes, so one kernel serves every dtype.
#pragma once

#include <cstdint>

namespace ivl {

// Row m of `rows` ([count] rows of `row_bytes`, contiguous) <-> the row of a [*, columns] grid of rows that starts at
// base + (p / columns) * batch_stride + (p % columns) * token_stride bytes, p = positions[m].
struct RowGrid {
  char* base;
  int64_t columns, batch_stride, token_stride;

  char* row(int64_t p) const { return base + (p / columns) * batch_stride + (p % columns) * token_stride; }
};

void place_rows(RowGrid grid, const int64_t* positions, const char* rows, int64_t count, int64_t row_bytes);
void take_rows(RowGrid grid, const int64_t* positions, char* rows, int64_t count, int64_t row_bytes);

}  // namespace ivl
