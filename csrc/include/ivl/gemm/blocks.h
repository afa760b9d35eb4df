// Products with weights in few bits (formats.h), rows contiguous in k, expanded where they are multiplied: up to
// kDotLimit rows straight into dot products, else into packed panels. Depths are multiples of 32. After multiply.h.
#include "ivl/gemm/formats.h"

namespace ivl::IVL_NAMESPACE {
namespace {

template <class Format>
struct BlockMatrix {
  const uint8_t* values;  // [rows, depth]
  const typename Format::Scale* scales;
  int64_t depth;

  static int64_t bytes(int64_t k) { return k * Format::kBytes / kStep; }
  int64_t scale_columns() const { return (depth + Format::kBlock - 1) / Format::kBlock; }
  const uint8_t* row(int64_t r) const { return values + r * bytes(depth); }
  const typename Format::Scale* row_scales(int64_t r) const {
    return scales + r / Format::kScaleRows * scale_columns();
  }
};

// As RowPanel. Columns of a half that share scales have one row of them, for scale_stride 0.
template <class Format>
struct BlockPanel {
  using Element = uint8_t;
  using Weights = Format;
  static constexpr bool kRows = true;
  const uint8_t *first, *second;
  const typename Format::Scale *first_scales, *second_scales;
  int64_t stride, scale_stride, first_columns, second_columns;

  int64_t left(int64_t column) const {  // columns from here to the end of the half
    return (column < kHalf ? first_columns : second_columns) - column % kHalf;
  }
  const uint8_t* at(int64_t column) const { return (column < kHalf ? first : second) + column % kHalf * stride; }
  const typename Format::Scale* scales(int64_t column) const {
    return (column < kHalf ? first_scales : second_scales) + column % kHalf * scale_stride;
  }
};

// As ColumnPanel: the product goes along the rows of the matrix.
template <class Format>
struct BlockColumns {
  using Element = uint8_t;
  using Weights = Format;
  static constexpr bool kRows = false;
  BlockMatrix<Format> matrix;
  int64_t column, columns;
};

template <class Panel>
concept InBlocks = requires { typename Panel::Weights; };

// The halves begin at rows `first` and `second` of the matrix and take every `step`-th; where Format::kScaleRows is
// more than one, they begin at multiples of kHalf and take every one.
template <class Format>
BlockPanel<Format> block_panel(const BlockMatrix<Format>& m, int64_t first, int64_t first_columns, int64_t second,
                               int64_t second_columns, int64_t step) {
  const int64_t apart = Format::kScaleRows == 1 ? step * m.scale_columns() : 0;
  return {m.row(first), m.row(second), m.row_scales(first), m.row_scales(second), step * m.bytes(m.depth), apart,
          first_columns, std::max<int64_t>(0, second_columns)};
}

template <class Format>
const uint8_t* start(const BlockPanel<Format>& panel, int64_t k) { return panel.first + BlockMatrix<Format>::bytes(k); }
template <class Format>
const uint8_t* start(const BlockColumns<Format>&, int64_t) { return nullptr; }

template <class Format>
Fetch share(const BlockPanel<Format>& panel, const uint8_t* from, int64_t, int64_t call, int64_t calls, int64_t unit) {
  const int64_t row = kPanel * call / calls, rows = kPanel * (call + 1) / calls - row;
  if (row >= kHalf) from += panel.second - panel.first - kHalf * panel.stride;
  return {reinterpret_cast<const char*>(from) + row * panel.stride, rows, BlockMatrix<Format>::bytes(unit),
          panel.stride};
}
template <class Format>
Fetch share(const BlockColumns<Format>&, const uint8_t*, int64_t, int64_t, int64_t, int64_t) { return {}; }

// Two neighbouring parts [kStep] of a row, k in order.
template <class Format>
void expand_in_order(const uint8_t* at, typename Format::Ready scale, vf& low, vf& high) {
  vf a, b;
  Format::expand(at, scale, a, b);
  low = Format::kSplit ? interleave_low(a, b) : a;
  high = Format::kSplit ? interleave_high(a, b) : b;
}

template <class A, class Format>
void pack(const BlockPanel<Format>& from, int64_t k, int64_t depth, float* to) {
  constexpr bool units = std::is_same_v<A, bfloat16>;
  const int64_t blocks = (depth + Format::kBlock - 1) / Format::kBlock;
  const Scratch<float> scales(kLanes * blocks);
  for (int64_t part = 0; part < kParts; ++part) {
    const int64_t column = part * kLanes, columns = std::clamp<int64_t>(from.left(column), 0, kLanes);
    for (int64_t j = 0; j < columns; ++j)
      Format::widen_scales(from.scales(column) + j * from.scale_stride + k / Format::kBlock, blocks,
                           scales.get() + j * blocks);
    const uint8_t* source = from.at(column) + BlockMatrix<Format>::bytes(k);
    float* target = to + column;
    for (int64_t i = 0; i < depth; i += kStep, source += Format::kBytes) {
      vf low[kLanes], high[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        low[j] = high[j] = vf{};
        if (j >= columns) continue;
        const auto scale = Format::ready(scales.get() + j * blocks + i / Format::kBlock);
        const uint8_t* at = source + j * from.stride;
#if IVL_VECTOR_BYTES == 64
        if constexpr (units) {
          low[j] = Format::expand_units(at, scale);
          continue;
        }
#endif
        Format::expand(at, scale, low[j], high[j]);
      }
      transpose(low);
      if constexpr (units) {
        for (int j = 0; j < kLanes; ++j) store(target + (i / 2 + j) * kPanel, low[j]);
      } else {
        transpose(high);
        for (int j = 0; j < kLanes; ++j) {
          store(target + (i + (Format::kSplit ? 2 * j : j)) * kPanel, low[j]);
          store(target + (i + (Format::kSplit ? 2 * j + 1 : kLanes + j)) * kPanel, high[j]);
        }
      }
    }
  }
}

template <class A, class Format>
void pack(const BlockColumns<Format>& from, int64_t k, int64_t depth, float* to) {
  alignas(64) float wide[2][kPanel] = {};
  const auto expand_row = [&](int64_t r, float* row) {
    for (int64_t j = 0; j < from.columns; j += kStep) {
      float scale;
      Format::widen_scales(from.matrix.row_scales(r) + (from.column + j) / Format::kBlock, 1, &scale);
      vf low, high;
      expand_in_order<Format>(from.matrix.row(r) + from.matrix.bytes(from.column + j), Format::ready(&scale), low,
                              high);
      store(row + j, low), store(row + j + kLanes, high);
    }
  };
  if constexpr (std::is_same_v<A, bfloat16>) {
    bfloat16 narrow_rows[2][kPanel];
    for (int64_t i = 0; i < depth; i += 2, to += kPanel) {
      for (int r = 0; r < 2; ++r) {
        expand_row(k + i + r, wide[r]);
        for (int64_t j = 0; j < kPanel; j += kLanes) store(narrow_rows[r] + j, load(wide[r] + j));
      }
      pack_units(ColumnPanel<bfloat16>{nullptr, 0, kPanel, false}, narrow_rows[0], narrow_rows[1], to);
    }
  } else {
    for (int64_t i = 0; i < depth; ++i, to += kPanel) {
      expand_row(k + i, wide[0]);
      std::copy_n(wide[0], kPanel, to);
    }
  }
}

constexpr int64_t kTilesAhead = 2;  // how far ahead weights are fetched: one tile takes less than memory does

// Lines of the rows that come next, fetched while others are multiplied: one of each row in turn.
struct RowFetch {
  const uint8_t* rows[kDotColumns];
  uint64_t line = 0;

  void one() {
    __builtin_prefetch(rows[line % kDotColumns] + line / kDotColumns * 64, 0, 2);
    ++line;
  }
};

// As dot_tile, with weights in blocks: w[j] points at the values of a column, s[j] at its scales, widened.
template <class A, int R, class Format>
void dot_blocks(const A* const* a, const uint8_t* const* w, const float* const* s, int64_t depth, RowFetch& fetch,
                vf (*sums)[kDotColumns], bool accumulate, float* c) {
  constexpr bool units = std::is_same_v<A, bfloat16>, scaled_sums = units && R <= Format::kScaledSums;
  constexpr int64_t kLine = 64 / kDotColumns;  // bytes of a row to a line of all
  vf v[R][kDotColumns] = {};
  const A* row[R];
  const uint8_t* weight[kDotColumns];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) row[r] = a[r];
#pragma GCC unroll 4
  for (int j = 0; j < kDotColumns; ++j) weight[j] = w[j];
  RowFetch next = fetch;
  for (int64_t k = 0, at = 0; k < depth; k += kStep, at += Format::kBytes) {
    if constexpr (Format::kBytes >= kLine) {
#pragma GCC unroll 4
      for (int i = 0; i < Format::kBytes / kLine; ++i) next.one();
    } else if (at % kLine == 0) {
      next.one();
    }
    vf y[kDotColumns], z[kDotColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kDotColumns; ++j) {
#if IVL_VECTOR_BYTES == 64
      if constexpr (scaled_sums) {
        y[j] = Format::expand_units(weight[j] + at);
        z[j] = splat(s[j][static_cast<uint64_t>(k) / Format::kBlock]);
        continue;
      }
#endif
      const auto scale = Format::ready(s[j] + static_cast<uint64_t>(k) / Format::kBlock);
#if IVL_VECTOR_BYTES == 64
      if constexpr (units) {
        y[j] = Format::expand_units(weight[j] + at, scale);
        continue;
      }
#endif
      Format::expand(weight[j] + at, scale, y[j], z[j]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      vf x;
      std::memcpy(&x, row[r] + k, sizeof x);
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j)
        v[r][j] = scaled_sums ? fma(multiply_add<A>(x, y[j], vf{}), z[j], v[r][j]) : multiply_add<A>(x, y[j], v[r][j]);
      if constexpr (!units) {
        x = load(row[r] + k + kLanes);
#pragma GCC unroll 4
        for (int j = 0; j < kDotColumns; ++j) v[r][j] = fma(x, z[j], v[r][j]);
      }
    }
  }
  fetch.line = next.line;
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    if (accumulate)
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j) v[r][j] += sums[r][j];
    if (c != nullptr) {
      store_sums(c + r * kPanel, v[r]);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j) sums[r][j] = v[r][j];
    }
  }
}

template <class A, class Format>
void dot_blocks_of(int64_t rows, const A* const* a, const uint8_t* const* w, const float* const* s, int64_t depth,
                   RowFetch& fetch, vf (*sums)[kDotColumns], bool accumulate, float* c) {
  switch (rows) {
    case 1: return dot_blocks<A, 1, Format>(a, w, s, depth, fetch, sums, accumulate, c);
    case 2: return dot_blocks<A, 2, Format>(a, w, s, depth, fetch, sums, accumulate, c);
    case 3: return dot_blocks<A, 3, Format>(a, w, s, depth, fetch, sums, accumulate, c);
    case 4: return dot_blocks<A, 4, Format>(a, w, s, depth, fetch, sums, accumulate, c);
#if IVL_VECTOR_BYTES == 64
    case 5: return dot_blocks<A, 5, Format>(a, w, s, depth, fetch, sums, accumulate, c);
    case 6: return dot_blocks<A, 6, Format>(a, w, s, depth, fetch, sums, accumulate, c);
#endif
  }
}

// to = every kStep of a row, its elements at even places first.
inline void split_row(const float* from, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; k += kStep) {
    const vf a = load(from + k), b = load(from + k + kLanes);
    store(to + k, even(a, b)), store(to + k + kLanes, odd(a, b));
  }
}

template <class A, class Source, class Finish>
void multiply_block_dots(const A* const* rows, int64_t count, int64_t depth, int64_t panels, Source& source,
                         Finish& finish, const uint8_t* after) {
  using Format = typename PanelOf<Source>::Weights;
  constexpr bool turn = Format::kSplit && std::is_same_v<A, float>;
  const Scratch<A> turned(turn ? count * depth : 0);
  const A* inputs[kDotLimit];
  for (int64_t r = 0; r < count; ++r) {
    inputs[r] = rows[r];
    if constexpr (turn) {
      split_row(rows[r], depth, turned.get() + r * depth);
      inputs[r] = turned.get() + r * depth;
    }
  }
  float c[kDotLimit * kPanel];
  vf sums[kDotLimit][kDotColumns];
  const int64_t tiles = (count + kDotRows - 1) / kDotRows, blocks = (depth + Format::kBlock - 1) / Format::kBlock;
  const int64_t block = tiles == 1 ? kChain * kLanes : kDotBytes / static_cast<int64_t>(sizeof(A));
  const Scratch<float> scales(kDotColumns * blocks);
  const float* scale[kDotColumns];
  // Where the tile at this column of a panel, or of the one behind it, begins; its scales are fetched.
  const auto place = [&](int64_t p, int64_t column) {
    for (; p < panels; ++p, column -= kPanel) {
      const auto panel = source(p);
      for (; column < kPanel; column += kDotColumns) {
        if (panel.left(column) <= 0) continue;
        const char* from = reinterpret_cast<const char*>(panel.scales(column));
        const char* end = reinterpret_cast<const char*>(panel.scales(column) + (kDotColumns - 1) * panel.scale_stride +
                                                        blocks);
        for (; from < end; from += 64) __builtin_prefetch(from, 0, 2);
        return panel.at(column);
      }
    }
    return after ? after + column * source(0).stride : nullptr;
  };
  for (int64_t p = 0; p < panels; ++p) {
    const auto panel = source(p);
    for (int64_t column = 0; column < kPanel; column += kDotColumns) {
      const int64_t valid = panel.left(column);
      if (valid <= 0) continue;
      const uint8_t* w[kDotColumns];
      RowFetch fetch;
      const uint8_t* ahead = place(p, column + kTilesAhead * kDotColumns);
      for (int64_t j = 0; j < kDotColumns; ++j) {
        const int64_t at = std::min(j, valid - 1);
        w[j] = panel.at(column) + at * panel.stride;
        fetch.rows[j] = ahead ? ahead + j * panel.stride : w[j];
        Format::widen_scales(panel.scales(column) + at * panel.scale_stride, blocks, scales.get() + j * blocks);
      }
      for (int64_t k = 0; k < depth; k += block) {
        const int64_t deep = std::min(block, depth - k);
        for (int64_t j = 0; j < kDotColumns; ++j) scale[j] = scales.get() + j * blocks + k / Format::kBlock;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t begin = count * tile / tiles, size = count * (tile + 1) / tiles - begin;
          const A* a[kDotRows];
          for (int64_t r = 0; r < size; ++r) a[r] = inputs[begin + r] + k;
          const uint8_t* values[kDotColumns];
          for (int64_t j = 0; j < kDotColumns; ++j) values[j] = w[j] + BlockMatrix<Format>::bytes(k);
          RowFetch again = fetch;  // only the first tile's goes on
          dot_blocks_of<A, Format>(size, a, values, scale, deep, tile ? again : fetch, sums + begin, k > 0,
                                   k + deep == depth ? c + begin * kPanel + column : nullptr);
        }
      }
    }
    finish(0, count, p, c);
  }
}

template <class A, class Source, class Finish>
  requires InBlocks<PanelOf<Source>>
void multiply(const A* const* rows, int64_t count, int64_t depth, int64_t panels, Source&& source, Finish&& finish,
              const ElementOf<Source>* after = nullptr, int64_t few = kDotLimit) {
  if constexpr (PanelOf<Source>::kRows)
    if (count <= few) return multiply_block_dots(rows, count, depth, panels, source, finish, after);
  multiply_packed(rows, count, depth, panels, source, finish, after);
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
