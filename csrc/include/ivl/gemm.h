// Layout of the row operand of ivl's own float32 matrix product (gemm_kernels.h).
#pragma once

#include <algorithm>
#include <cstdint>

namespace ivl {

// Rows in panels of kPanel, columns in blocks of kDepth; inside, a row's kDepth columns are contiguous and rows are
// kPanelStride apart (a little more than kDepth, so that the rows of a panel fall into different cache sets).
constexpr int64_t kDepth = 512, kPanel = 12, kPanelStride = kDepth + 16;

struct PackedRows {
  float* data;
  int64_t rows, columns;

  static int64_t floats(int64_t rows, int64_t columns) {
    return (columns + kDepth - 1) / kDepth * panels(rows) * kPanel * kPanelStride;
  }
  static int64_t panels(int64_t rows) { return (rows + kPanel - 1) / kPanel; }
  // Address of (row, column); columns up to the end of its block of kDepth follow it.
  float* at(int64_t row, int64_t column) const {
    return data + ((column / kDepth) * panels(rows) * kPanel + row) * kPanelStride + column % kDepth;
  }
};

// Element (k, n) at data[n * n_stride + k * k_stride]; one of the strides should be 1.
template <class T>
struct ColumnOperand {
  const T* data;
  int64_t n_stride, k_stride;
};

}  // namespace ivl
