// Matrix products of the BLAS that torch was built with (threads: torch's; one when called inside a parallel loop).
#pragma once

#include <cstdint>

namespace ivl {

// A view of a float32 matrix: element (i, j) at data[i * row_stride + j * column_stride].
struct Matrix {
  const float* data;
  int64_t rows, columns, row_stride, column_stride;
};

// out [a.rows, b.columns] with contiguous columns: out = a b, or out += a b when accumulate.
void matmul(Matrix a, Matrix b, float* out, int64_t out_row_stride, bool accumulate = false);

}  // namespace ivl
