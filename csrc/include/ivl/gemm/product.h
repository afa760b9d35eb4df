// Whole products: rows by blocks and panels by groups, a task each. No sum depends on who computes it.
#include "ivl/gemm/multiply.h"

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int64_t kCopiedBytes = int64_t{16} << 20;  // of rows copied at a time

// Elements from row to row of a copy: whole vectors, and an odd number of cache lines, so that neighbouring rows fall
// into different cache sets.
template <class A>
constexpr int64_t padded_stride(int64_t depth) {
  constexpr int64_t kLine = 64 / sizeof(A);
  return ((depth + kLine - 1) / kLine | 1) * kLine;
}

inline int64_t panel_count(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Rows up to which weights are not packed: twice a tile's, and more where packing widens.
template <class A, class T>
constexpr int64_t kFewRows = std::is_same_v<A, T> || kLanes < 16 ? 11 : 40;

// Rows [count] of length `depth` times all the panels; finish as in multiply().
template <class A, class Source, class Finish>
void product(const A* const* rows, int64_t count, int64_t depth, int64_t panels, Source&& source, Finish&& finish,
             Form form = Form::best) {
  constexpr bool columns = !PanelOf<Source>::kRows;
  constexpr int64_t most = kBlocking<PanelOf<Source>>.rows;
  const int64_t blocks = (count + most - 1) / most;
  const int64_t few = form == Form::packed ? 0 : kFewRows<A, ElementOf<Source>>;
  // Rows that do not fit a cache are read once for every group of panels: as many columns whatever a panel's width.
  const int64_t wide = kLanes < 16 && count > few ? 4 : 1;
  const Groups groups(panels, !columns ? wide : count <= kStreamRows ? 8 : 4);
  const int64_t tasks = blocks * groups.count;
  run_small_tasks(tasks, [&](int64_t i, int64_t then) {
    const int64_t block = i / groups.count, first = count * block / blocks, last = count * (block + 1) / blocks;
    const int64_t panel = groups.begin(i % groups.count), end = groups.begin(i % groups.count + 1);
    const ElementOf<Source>* after = then < tasks ? start(source(groups.begin(then % groups.count)), 0) : nullptr;
    multiply(
        rows + first, last - first, depth, end - panel, [&](int64_t p) { return source(panel + p); },
        [&](int64_t row, int64_t n, int64_t p, const float* c) { finish(first + row, n, panel + p, c); }, after, few);
  });
}

// to [rows, padded_stride(depth)] = rows of `from`, what is beyond `depth` zero.
template <class A, class T>
void copy_rows(StridedMatrix<T> from, int64_t rows, int64_t depth, A* to) {
  const int64_t stride = padded_stride<A>(depth);
  parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t k = depth; k < stride; ++k) to[m * stride + k] = A{};
    if (from.column_stride == 1) {
      for (int64_t m = begin; m < end; ++m) {
        const T* row = from.data + m * from.row_stride;
        if constexpr (std::is_same_v<A, T>)
          std::memcpy(static_cast<void*>(to + m * stride), row, depth * sizeof(T));
        else
          by_vector(depth, [&](int64_t k, auto whole, int64_t n) {
            store(to + m * stride + k, load(row + k, whole, n), whole, n);
          });
      }
      return;
    }
    constexpr int64_t kSquare = 16;  // elements of a cache line, in either direction
    for (int64_t m0 = begin; m0 < end; m0 += kSquare)
      for (int64_t k0 = 0; k0 < depth; k0 += kSquare)
        for (int64_t m = m0; m < std::min(m0 + kSquare, end); ++m)
          for (int64_t k = k0; k < std::min(k0 + kSquare, depth); ++k) {
            const T value = from.data[m * from.row_stride + k * from.column_stride];
            if constexpr (std::is_same_v<A, T>)
              to[m * stride + k] = value;
            else
              to[m * stride + k] = widen(value);
          }
  });
}

// Rows times the columns of b, written by write(row, column, count, values): row by row, up to kPanel columns a call.
template <class A, class T, class Write>
void product_of(const A* const* rows, int64_t count, int64_t depth, StridedMatrix<T> b, int64_t columns, Form form,
                Write&& write) {
  const auto finish = [&](int64_t row, int64_t n, int64_t p, const float* c) {
    for (int64_t r = row; r < row + n; ++r, c += kPanel)
      write(r, p * kPanel, std::min(kPanel, columns - p * kPanel), c);
  };
  if (b.row_stride == 1 && b.column_stride != 1) {
    const auto source = [&](int64_t p) { return row_panel(b.data, b.column_stride, columns, p * kPanel); };
    product(rows, count, depth, panel_count(columns), source, finish, form);
  } else {
    const auto source = [&](int64_t p) { return column_panel(b.data, b.row_stride, columns, p * kPanel); };
    product(rows, count, depth, panel_count(columns), source, finish, form);
  }
}

template <class A, class T>
void matmul_in(const Product<T>& p) {
  const auto write_from = [&](int64_t first) {
    return [&p, first](int64_t row, int64_t column, int64_t columns, const float* values) {
      T* to = p.out + (first + row) * p.out_stride + column;
      by_vector(columns, [&](int64_t j, auto whole, int64_t n) {
        vf v = load(values + j);
        if (p.bias) v += load(p.bias + column + j, whole, n);
        if (p.accumulate) v += load(to + j, whole, n);
        store(to + j, v, whole, n);
      });
    };
  };
  if constexpr (std::is_same_v<A, T>) {
    if (p.a.column_stride == 1) {
      const Scratch<const A*> rows(p.m);
      for (int64_t m = 0; m < p.m; ++m) rows[m] = p.a.data + m * p.a.row_stride;
      return product_of(rows.get(), p.m, p.k, p.b, p.n, p.form, write_from(0));
    }
  }
  const int64_t stride = padded_stride<A>(p.k);
  const int64_t most = std::max<int64_t>(64, kCopiedBytes / (stride * int64_t{sizeof(A)}));
  const int64_t chunks = (p.m + most - 1) / most, chunk = chunks ? (p.m + chunks - 1) / chunks : 0;
  const Scratch<A> copy(chunk * stride);
  const Scratch<const A*> rows(chunk);
  for (int64_t m = 0; m < chunk; ++m) rows[m] = copy.get() + m * stride;
  for (int64_t first = 0; first < p.m; first += chunk) {
    const int64_t here = std::min(chunk, p.m - first);
    copy_rows(StridedMatrix<T>{p.a.data + first * p.a.row_stride, p.a.row_stride, p.a.column_stride}, here, p.k,
              copy.get());
    product_of(rows.get(), here, p.k, p.b, p.n, p.form, write_from(first));
  }
}

template <class T>
void matmul(const Product<T>& p) {
#if IVL_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, bfloat16>)
    if (dot_bf16() && p.form == Form::best && p.k % 2 == 0) return matmul_in<T>(p);
#endif
  matmul_in<float>(p);
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
