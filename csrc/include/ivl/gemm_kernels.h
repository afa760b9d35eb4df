// float32 matrix product for one instruction set. The column operand may be of any float type: it is widened while it
// is packed, and every weight is read once.

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int kWide = 2 * kLanes;  // columns of a tile: two vectors
constexpr int kRows = kLanes == 16 ? 12 : 6;  // rows of a tile, as the registers allow
constexpr int64_t kChain = 128;    // products added up in one register: bounds the rounding error
constexpr int kGroup = 8;          // packed column panels that stay in the second-level cache

// c [R, kWide] (+)= a [R, depth] b [depth, kWide]
template <int R>
inline void tile(int64_t depth, const float* a, const float* b, float* c, int64_t c_stride, bool accumulate) {
  vf left[R], right[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) left[r] = right[r] = vf{};
  for (int64_t k = 0; k < depth; ++k) {
    const vf b0 = load(b + k * kWide), b1 = load(b + k * kWide + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const vf x = splat(a[r * kPanelStride + k]);
      left[r] = fma(x, b0, left[r]);
      right[r] = fma(x, b1, right[r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    float* row = c + r * c_stride;
    store(row, accumulate ? load(row) + left[r] : left[r]);
    store(row + kLanes, accumulate ? load(row + kLanes) + right[r] : right[r]);
  }
}

inline void tile_rows(int64_t rows, int64_t depth, const float* a, const float* b, float* c, int64_t c_stride,
                      bool accumulate) {
  while (rows > 0) {
    int done;
    if (kRows == 12 && rows >= 12) {
      tile<kRows>(depth, a, b, c, c_stride, accumulate), done = 12;
    } else if (rows >= 6) {
      tile<6>(depth, a, b, c, c_stride, accumulate), done = 6;
    } else if (rows >= 4) {
      tile<4>(depth, a, b, c, c_stride, accumulate), done = 4;
    } else if (rows >= 2) {
      tile<2>(depth, a, b, c, c_stride, accumulate), done = 2;
    } else {
      tile<1>(depth, a, b, c, c_stride, accumulate), done = 1;
    }
    rows -= done, a += done * kPanelStride, c += done * c_stride;
  }
}

// to [depth, kWide] = columns [n, n + columns) of `from`, k in [k, k + depth); missing columns are zero.
template <class T>
void pack_columns(ColumnOperand<T> from, int64_t n, int64_t columns, int64_t k, int64_t depth, float* to) {
  const T* source = from.data + n * from.n_stride + k * from.k_stride;
  if (from.n_stride == 1) {
    for (int64_t i = 0; i < depth; ++i) {
      const T* row = source + i * from.k_stride;
      if (columns == kWide) {
        store(to + i * kWide, load(row));
        store(to + i * kWide + kLanes, load(row + kLanes));
      } else {
        for (int64_t j = 0; j < kWide; ++j) to[i * kWide + j] = j < columns ? widen(row[j]) : 0;
      }
    }
    return;
  }
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t first = half * kLanes, here = std::clamp<int64_t>(columns - first, 0, kLanes);
    int64_t i = 0;
    if (from.k_stride == 1 && here == kLanes) {
      for (; i + kLanes <= depth; i += kLanes) {
        vf v[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) v[j] = load(source + (first + j) * from.n_stride + i);
        transpose(v);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(to + (i + j) * kWide + first, v[j]);
      }
    }
    for (; i < depth; ++i)
      for (int64_t j = 0; j < kLanes; ++j)
        to[i * kWide + first + j] =
            j < here ? widen(source[(first + j) * from.n_stride + i * from.k_stride]) : 0;
  }
}

// `to` = a matrix with element (m, k) at data[m * m_stride + k * k_stride].
template <class T>
void pack_rows(const T* data, int64_t m_stride, int64_t k_stride, PackedRows to) {
  const int64_t panels = PackedRows::panels(to.rows);
  parallel_for(panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = 0; block < to.columns; block += kDepth) {
      const int64_t depth = std::min(kDepth, to.columns - block);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * kPanel, last = std::min(first + kPanel, to.rows);
        float* target = to.at(first, block);
        const T* source = data + first * m_stride + block * k_stride;
        if (k_stride == 1) {
          for (int64_t m = first; m < last; ++m, source += m_stride, target += kPanelStride) {
            int64_t k = 0;
            for (; k + kLanes <= depth; k += kLanes) store(target + k, load(source + k));
            for (; k < depth; ++k) target[k] = widen(source[k]);
          }
        } else {
          for (int64_t k = 0; k < depth; ++k)
            for (int64_t m = 0; m < last - first; ++m)
              target[m * kPanelStride + k] = widen(source[m * m_stride + k * k_stride]);
        }
      }
    }
  });
}

// finish(row, rows, column, columns, values, stride) gets every finished tile of a b^T [a.rows, n], from `c`, a buffer
// of a.rows rows of `c_stride` >= n rounded up to kWide.
template <class T, class Finish>
void gemm(PackedRows a, ColumnOperand<T> b, int64_t n, float* c, int64_t c_stride, Finish&& finish) {
  const int64_t panels = (n + kWide - 1) / kWide;
  // Few columns and many threads: split the rows too.
  const int64_t row_panels = PackedRows::panels(a.rows);
  const int64_t splits = std::clamp<int64_t>(thread_count() / panels, 1, row_panels);
  parallel_for(panels * splits, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> packed(kGroup * kDepth * kWide);
    for (int64_t split = begin / panels; split * panels < end; ++split) {
      const int64_t from = std::max(begin - split * panels, int64_t{0}), to = std::min(end - split * panels, panels);
      const int64_t first_row = row_panels * split / splits * kPanel;
      const int64_t last_row = std::min(row_panels * (split + 1) / splits * kPanel, a.rows);
      for (int64_t block = 0; block < a.columns; block += kDepth) {
        const int64_t depth = std::min(kDepth, a.columns - block);
        const bool last = block + depth == a.columns;
        for (int64_t group = from; group < to; group += kGroup) {
          const int64_t group_end = std::min(group + kGroup, to);
          for (int64_t p = group; p < group_end; ++p)
            pack_columns(b, p * kWide, std::min<int64_t>(kWide, n - p * kWide), block, depth,
                         packed.get() + (p - group) * depth * kWide);
          for (int64_t row = first_row; row < last_row; row += kPanel) {
            const int64_t rows = std::min(kPanel, last_row - row);
            for (int64_t p = group; p < group_end; ++p) {
              float* target = c + row * c_stride + p * kWide;
              const float* columns = packed.get() + (p - group) * depth * kWide;
              for (int64_t k = 0; k < depth; k += kChain)
                tile_rows(rows, std::min(kChain, depth - k), a.at(row, block) + k, columns + k * kWide, target, c_stride,
                          block + k > 0);
              if (last) finish(row, rows, p * kWide, std::min<int64_t>(kWide, n - p * kWide), target, c_stride);
            }
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
