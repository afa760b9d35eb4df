// Matrix products on the engine of ivl/gemm/.
#pragma once

#include <cstdint>

#include "ivl/types.h"

namespace ivl {

// Element (i, j) at data[i * row_stride + j * column_stride].
template <class T>
struct StridedMatrix {
  const T* data;
  int64_t row_stride, column_stride;
};

// `packed`: a row's result does not depend on the number of rows; `best` takes what is fastest for the shape.
enum class Form { best, packed };

// out [m, n] = a [m, k] b [k, n], float32 inside; + bias [n] when not null, + out when `accumulate`. One of b's strides
// must be 1. T: float, bfloat16, float16.
template <class T>
struct Product {
  int64_t m, n, k;
  StridedMatrix<T> a, b;
  const T* bias;
  T* out;
  int64_t out_stride;
  bool accumulate;
  Form form;
};
template <class T>
void matmul(const Product<T>& product);

}  // namespace ivl
