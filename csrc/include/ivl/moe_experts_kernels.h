// Kernels of the mixture-of-experts feed-forward for one instruction set; see foreach_isa.h.
//
// Products of a few rows (the tokens of one expert) with a weight matrix, in three forms:
//   dot     weights with contiguous k, few rows: every weight is read once, straight into a dot product
//   stream  weights with contiguous columns, very few rows: weights times broadcast inputs, sums in the L1 cache
//   packed  otherwise: a panel of columns is widened and packed in the L2 cache, then multiplied tile by tile
// All accumulate in float32. A is the type of the inputs: float, or bfloat16 when the processor multiplies that itself;
// then two neighbouring k form one 32-bit unit, held in a float's bits, and vectors of units are multiplied by dot2.
#include "ivl/activations.h"

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int kParts = kLanes == 16 ? 4 : 2;       // vectors of a panel's row
constexpr int64_t kPanel = kParts * kLanes;        // columns of a panel; the first half are gates, the second ups
constexpr int64_t kHalf = kPanel / 2;
constexpr int64_t kTileRows = 6;
constexpr int64_t kDotRows = kLanes == 16 ? 6 : 4, kDotColumns = kLanes == 16 ? 4 : 2;
constexpr int64_t kStreamRows = 4;
constexpr int64_t kChain = 128;                    // additions in a row: sums of sums keep more digits
constexpr int64_t kStreamAhead = 16;               // rows fetched ahead by stream
constexpr int64_t kAhead = 8;                      // rows of column panels to prefetch


// Columns are rows of memory: column j of half h is (h ? second : first) + j * stride, contiguous in k.
template <class T>
struct RowPanel {
  const T* first;
  const T* second;
  int64_t stride, first_columns, second_columns;
};

// Element (k, j) is data[k * stride + j]; `paired`: gate j is data[k * stride + 2 j] and up j the one after it.
template <class T>
struct ColumnPanel {
  const T* data;
  int64_t stride, columns;
  bool paired;
};

// Columns [column, column + kPanel) of a matrix, as far as there are any: one row of memory each, or neighbours in it.
template <class T>
RowPanel<T> row_panel(const T* matrix, int64_t stride, int64_t columns, int64_t column) {
  const T* first = matrix + column * stride;
  const int64_t n = std::min(kPanel, columns - column);
  return {first, first + kHalf * stride, stride, std::min(kHalf, n), std::max<int64_t>(0, n - kHalf)};
}
template <class T>
ColumnPanel<T> column_panel(const T* matrix, int64_t stride, int64_t columns, int64_t column, bool paired = false) {
  return {matrix + column, stride, std::min(kPanel, columns - column), paired};
}

inline vf low_halves(vf pair) { return (vf)((vu)pair << 16); }           // bfloat16 at even places, widened
inline vf high_halves(vf pair) { return (vf)((vu)pair & 0xffff0000u); }  // and at odd places

// to [depth, kPanel] = the panel's k in [k, k + depth), or [depth / 2, kPanel] units when A is bfloat16.
template <class A, class T>
void pack(const RowPanel<T>& from, int64_t k, int64_t depth, float* to) {
  constexpr bool units = std::is_same_v<A, bfloat16>;
  for (int64_t part = 0; part < kParts; ++part) {
    const bool second = part >= kParts / 2;
    const int64_t place = (part - (second ? kParts / 2 : 0)) * kLanes;
    const int64_t columns = std::clamp<int64_t>((second ? from.second_columns : from.first_columns) - place, 0, kLanes);
    const T* source = (second ? from.second : from.first) + place * from.stride + k;
    float* target = to + part * kLanes;
    int64_t i = 0;
    if (columns == kLanes) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        for (; i + 2 * kLanes <= depth; i += 2 * kLanes) {
          vf v[kLanes];
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j) std::memcpy(&v[j], source + j * from.stride + i, sizeof(vf));
          transpose(v);
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j) {
            if constexpr (units) {
              store(target + (i / 2 + j) * kPanel, v[j]);
            } else {
              store(target + (i + 2 * j) * kPanel, low_halves(v[j]));
              store(target + (i + 2 * j + 1) * kPanel, high_halves(v[j]));
            }
          }
        }
      } else {
        for (; i + kLanes <= depth; i += kLanes) {
          vf v[kLanes];
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j) v[j] = load(source + j * from.stride + i);
          transpose(v);
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j) store(target + (i + j) * kPanel, v[j]);
        }
      }
    }
    if constexpr (units) {
      for (; i < depth; i += 2)
        for (int64_t j = 0; j < kLanes; ++j) {
          target[i / 2 * kPanel + j] = 0;
          if (j < columns) std::memcpy(target + i / 2 * kPanel + j, source + j * from.stride + i, 4);
        }
    } else {
      for (; i < depth; ++i)
        for (int64_t j = 0; j < kLanes; ++j)
          target[i * kPanel + j] = j < columns ? widen(source[j * from.stride + i]) : 0.0f;
    }
  }
}

// One row of a column panel, its elements widened, and put in the panel's order.
template <class T>
void pack_row(const ColumnPanel<T>& from, const T* row, float* to) {
  if (from.columns < kPanel) {
    T whole[kPanel] = {};
    std::memcpy(whole, row, from.columns * sizeof(T));
    for (int64_t j = 0; j < kPanel; ++j) to[from.paired ? (j % 2) * kHalf + j / 2 : j] = widen(whole[j]);
  } else if (!from.paired) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) store(to + part * kLanes, load(row + part * kLanes));
  } else {
#pragma GCC unroll 2
    for (int part = 0; part < kParts / 2; ++part) {
      const T* source = row + 2 * part * kLanes;
      if constexpr (std::is_same_v<T, bfloat16>) {
        vf pair;
        std::memcpy(&pair, source, sizeof pair);
        store(to + part * kLanes, low_halves(pair));
        store(to + kHalf + part * kLanes, high_halves(pair));
      } else {
        const vf a = load(source), b = load(source + kLanes);
        store(to + part * kLanes, even(a, b));
        store(to + kHalf + part * kLanes, odd(a, b));
      }
    }
  }
}

// Two rows of a column panel as a row of units, in the panel's order; `second` may be null for zeros.
inline void pack_units(const ColumnPanel<bfloat16>& from, const bfloat16* first, const bfloat16* second, float* to) {
  bfloat16 whole[2][kPanel];
  if (from.columns < kPanel || second == nullptr) {
    std::memset(static_cast<void*>(whole), 0, sizeof whole);
    std::memcpy(whole[0], first, from.columns * sizeof(bfloat16));
    if (second) std::memcpy(whole[1], second, from.columns * sizeof(bfloat16));
    first = whole[0], second = whole[1];
  }
#pragma GCC unroll 2
  for (int part = 0; part < kParts / 2; ++part) {
    vu a, b;  // each lane two neighbouring columns
    std::memcpy(&a, first + 2 * part * kLanes, sizeof a);
    std::memcpy(&b, second + 2 * part * kLanes, sizeof b);
    const vf evens = (vf)((a & 0xffffu) | (b << 16)), odds = (vf)((a >> 16) | (b & 0xffff0000u));
    if (from.paired) {
      store(to + part * kLanes, evens);
      store(to + kHalf + part * kLanes, odds);
    } else {
      store(to + 2 * part * kLanes, interleave_low(evens, odds));
      store(to + (2 * part + 1) * kLanes, interleave_high(evens, odds));
    }
  }
}

template <class A, class T>
void pack(const ColumnPanel<T>& from, int64_t k, int64_t depth, float* to) {
  const T* row = from.data + k * from.stride;
  for (int64_t i = 0; i < depth; ++i)  // long strides are beyond the hardware's prefetchers
    for (int64_t j = 0; j < kPanel; j += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(row + (i + kAhead) * from.stride + j);
  if constexpr (std::is_same_v<A, bfloat16>) {
    for (int64_t i = 0; i < depth; i += 2, row += 2 * from.stride, to += kPanel)
      pack_units(from, row, row + from.stride, to);
  } else {
    for (int64_t i = 0; i < depth; ++i, row += from.stride, to += kPanel) pack_row(from, row, to);
  }
}


// c + a b; for units, c + the dot product of the two bfloat16 of each.
template <class A>
inline vf multiply_add(vf a, vf b, vf c) {
#if IVL_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<A, bfloat16>) {
    // As assembly, so that only this needs the instruction; dot_bf16() is asked before.
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
#endif
  return fma(a, b, c);
}

// Memory to fetch into the L2 cache while a product runs: in each step of k `count` lines, `apart` bytes apart.
struct Fetch {
  const char* at;
  int64_t count, step, apart;
};

// c [R, kPanel] (+)= a's rows [depth] times the packed panel b [depth, kPanel]; depth counts units.
template <class A, int R, int kFetch>
void packed_tile(const float* const* a, const float* b, int64_t depth, float* c, bool accumulate, const Fetch& fetch) {
  vf sums[R][kParts];
  const float* row[R];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    row[r] = a[r];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) sums[r][p] = vf{};
  }
  const char* line = fetch.at;
  for (int64_t k = 0; k < depth; ++k, b += kPanel, line += fetch.step) {
    vf w[kParts];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) w[p] = load(b + p * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kFetch; ++i) __builtin_prefetch(line + i * fetch.apart, 0, 2);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf x = (vf)(vi{} + reinterpret_cast<const int32_t*>(row[r])[k]);
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) sums[r][p] = multiply_add<A>(x, w[p], sums[r][p]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      float* to = c + r * kPanel + p * kLanes;
      store(to, accumulate ? load(to) + sums[r][p] : sums[r][p]);
    }
}

template <class A, int R>
void packed_tile(const float* const* a, const float* b, int64_t depth, float* c, bool accumulate, const Fetch& fetch) {
  if (fetch.count == 0) packed_tile<A, R, 0>(a, b, depth, c, accumulate, fetch);
  else if (fetch.count == 1) packed_tile<A, R, 1>(a, b, depth, c, accumulate, fetch);
  else if (fetch.count == 2) packed_tile<A, R, 2>(a, b, depth, c, accumulate, fetch);
  else packed_tile<A, R, 4>(a, b, depth, c, accumulate, fetch);
}

template <class A>
void packed_rows(int64_t rows, const float* const* a, const float* b, int64_t depth, float* c, bool accumulate,
                 Fetch fetch = {}) {
  const float* row[kTileRows];
  std::copy_n(a, rows, row);
  for (int64_t k = 0; k < depth; k += kChain, b += kChain * kPanel, accumulate = true) {
    const int64_t deep = std::min(kChain, depth - k);
    switch (rows) {
      case 1: packed_tile<A, 1>(row, b, deep, c, accumulate, fetch); break;
      case 2: packed_tile<A, 2>(row, b, deep, c, accumulate, fetch); break;
      case 3: packed_tile<A, 3>(row, b, deep, c, accumulate, fetch); break;
      case 4: packed_tile<A, 4>(row, b, deep, c, accumulate, fetch); break;
      case 5: packed_tile<A, 5>(row, b, deep, c, accumulate, fetch); break;
      default: packed_tile<A, 6>(row, b, deep, c, accumulate, fetch);
    }
    for (int64_t r = 0; r < rows; ++r) row[r] += deep;
    fetch.at += deep * fetch.step;
  }
}

// The sums of the lanes of kDotColumns vectors.
inline void store_sums(float* to, const vf (&v)[kDotColumns]) {
#if IVL_VECTOR_BYTES == 64
  const vf a = interleave_low(v[0], v[1]) + interleave_high(v[0], v[1]);
  const vf b = interleave_low(v[2], v[3]) + interleave_high(v[2], v[3]);
  typedef double vd __attribute__((vector_size(64)));
  typedef int64_t vl __attribute__((vector_size(64)));
  const vf low = (vf)__builtin_shuffle((vd)a, (vd)b, vl{0, 8, 1, 9, 2, 10, 3, 11});
  const vf high = (vf)__builtin_shuffle((vd)a, (vd)b, vl{4, 12, 5, 13, 6, 14, 7, 15});
  const __m512 all = (__m512)(low + high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int j = 0; j < kDotColumns; ++j) to[j] = sum(v[j]);
#endif
}

// sums [R, kDotColumns] (+)= dot products, lane by lane, of a's rows with rows of weights, both contiguous in k. When c
// is not null, the sums of their lanes go there instead (row stride kPanel). Each step fetches its share, one of
// kShares, of the weights that come next: `next` is where, and is left where the following tile goes on.
template <class A, int R, int kShares, class T>
void dot_tile(const A* const* a, const T* const* w, int64_t depth, const char*& next, vf (*sums)[kDotColumns],
              bool accumulate, float* c) {
  constexpr int step = std::is_same_v<A, bfloat16> ? 2 * kLanes : kLanes;
  constexpr int kShare = kDotColumns * step * sizeof(T) / kShares;
  vf v[R][kDotColumns] = {};
  const A* row[R];
  const T* weight[kDotColumns];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) row[r] = a[r];
#pragma GCC unroll 4
  for (int j = 0; j < kDotColumns; ++j) weight[j] = w[j];
  const char* fetch = next;
  for (int64_t k = 0; k < depth; k += step, fetch += kShare) {
    vf y[kDotColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kDotColumns; ++j) {
      if constexpr (step == 2 * kLanes) {
        std::memcpy(&y[j], weight[j] + k, sizeof(vf));
      } else {
        y[j] = load(weight[j] + k);
      }
    }
#pragma GCC unroll 4
    for (int line = 0; line < kShare; line += 64) __builtin_prefetch(fetch + line, 0, 2);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      vf x;
      std::memcpy(&x, row[r] + k, sizeof x);
#pragma GCC unroll 4
      for (int j = 0; j < kDotColumns; ++j) v[r][j] = multiply_add<A>(x, y[j], v[r][j]);
    }
  }
  next = fetch;
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

template <class A, int kShares, class T>
void dot_rows(int64_t rows, const A* const* a, const T* const* w, int64_t depth, const char*& next,
              vf (*sums)[kDotColumns], bool accumulate, float* c) {
  switch (rows) {
    case 1: return dot_tile<A, 1, kShares>(a, w, depth, next, sums, accumulate, c);
    case 2: return dot_tile<A, 2, kShares>(a, w, depth, next, sums, accumulate, c);
    case 3: return dot_tile<A, 3, kShares>(a, w, depth, next, sums, accumulate, c);
    case 4: return dot_tile<A, 4, kShares>(a, w, depth, next, sums, accumulate, c);
#if IVL_VECTOR_BYTES == 64
    case 5: return dot_tile<A, 5, kShares>(a, w, depth, next, sums, accumulate, c);
    case 6: return dot_tile<A, 6, kShares>(a, w, depth, next, sums, accumulate, c);
#endif
  }
}

// c [R, columns] += a's rows times w [depth, columns] (row stride `stride`), columns % kLanes == 0.
// Rows are fetched kStreamAhead before their use, at the end those of the next weights, at `after`.
template <int R, class T>
void stream_tile(const float* const* a, const T* w, int64_t stride, int64_t depth, int64_t columns, const T* after,
                 float* c) {
  constexpr int kDeep = 4;
  int64_t k = 0;
  for (; k + kDeep <= depth; k += kDeep, w += kDeep * stride) {
    const int64_t beyond = k + kStreamAhead - depth;
    const T* fetch = beyond < 0 || after == nullptr ? w + kStreamAhead * stride : after + beyond * stride;
    vf x[R][kDeep];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int d = 0; d < kDeep; ++d) x[r][d] = splat(a[r][k + d]);
    for (int64_t j = 0; j < columns; j += kLanes) {
      vf v[kDeep];
#pragma GCC unroll 4
      for (int d = 0; d < kDeep; ++d) {
        v[d] = load(w + d * stride + j);
        __builtin_prefetch(fetch + d * stride + j, 0, 2);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        vf total = load(c + r * columns + j);
#pragma GCC unroll 4
        for (int d = 0; d < kDeep; ++d) total = fma(x[r][d], v[d], total);
        store(c + r * columns + j, total);
      }
    }
  }
  for (; k < depth; ++k, w += stride)
    for (int r = 0; r < R; ++r)
      for (int64_t j = 0; j < columns; j += kLanes)
        store(c + r * columns + j, fma(splat(a[r][k]), load(w + j), load(c + r * columns + j)));
}

template <class T>
void stream_rows(int64_t rows, const float* const* a, const T* w, int64_t stride, int64_t depth, int64_t columns,
                 const T* after, float* c) {
  switch (rows) {
    case 1: return stream_tile<1>(a, w, stride, depth, columns, after, c);
    case 2: return stream_tile<2>(a, w, stride, depth, columns, after, c);
    case 3: return stream_tile<3>(a, w, stride, depth, columns, after, c);
    default: return stream_tile<4>(a, w, stride, depth, columns, after, c);
  }
}


constexpr int64_t kDotBytes = 2048;  // of a row, in a block of several tiles of dot products
constexpr int64_t kDotLimit = 64;  // rows up to which dot products beat packing

// Packed weights [depth, panels * kPanel] and sums [chunk, panels * kPanel] together fit the L2 cache; `step` rows of
// a panel are packed before the next panel's.
struct Blocking {
  int64_t depth, chunk, step;
};
template <class T>
constexpr Blocking blocking(const RowPanel<T>*) {
  return {1024, 512, 1024};
}
template <class T>
constexpr Blocking blocking(const ColumnPanel<T>*) {
  return {256, 256, 2};
}

// The share of call `call` of `calls` in fetching the next block of weights, which begins at `from`: whole rows of row
// panels, one line of every row of column panels. `unit`: the k of a step.
template <class T>
Fetch share(const RowPanel<T>& panel, const T* from, int64_t, int64_t call, int64_t calls, int64_t unit) {
  const int64_t row = kPanel * call / calls, rows = kPanel * (call + 1) / calls - row;
  if (row >= kHalf) from += panel.second - panel.first - kHalf * panel.stride;
  const int64_t stride = panel.stride * sizeof(T);
  return {reinterpret_cast<const char*>(from) + row * stride, rows, static_cast<int64_t>(unit * sizeof(T)), stride};
}
template <class T>
Fetch share(const ColumnPanel<T>& panel, const T* from, int64_t panels, int64_t call, int64_t calls, int64_t unit) {
  const int64_t all = panels * kPanel * sizeof(T) / 64, line = all * call / calls;
  const int64_t lines = all * (call + 1) / calls - line;
  const int64_t stride = panel.stride * sizeof(T);
  const char* at = reinterpret_cast<const char*>(from) + line * 64;
  if (unit == 1) return {at, lines, stride, 64};
  return {at, lines ? 2 : 0, 2 * stride, stride};
}

template <class T>
const T* start(const RowPanel<T>& panel, int64_t k) { return panel.first + k; }
template <class T>
const T* start(const ColumnPanel<T>& panel, int64_t k) { return panel.data + k * panel.stride; }

// Rows [count] of length `depth` times the panels source(0) ... source(panels - 1); finish(row, rows, panel, c) gets
// every tile of sums, c [rows, kPanel]. `after`, when not null, is where the weights of the next product begin: those of
// the next block are fetched while this one's are multiplied.
template <class A, class T, class Source, class Finish>
void multiply_packed(const A* const* rows, int64_t count, int64_t depth, int64_t panels, Source&& source,
                     Finish&& finish, const T* after) {
  using Panel = decltype(source(0));
  constexpr Blocking block = blocking(static_cast<Panel*>(nullptr));
  constexpr int64_t unit = std::is_same_v<A, bfloat16> ? 2 : 1;
  const int64_t chunk = std::min(block.chunk, count);
  const Scratch<float> packed(panels * block.depth / unit * kPanel), sums(panels * chunk * kPanel);
  const Panel front = source(0);
  for (int64_t first = 0; first < count; first += chunk) {
    const int64_t here = std::min(chunk, count - first), tiles = (here + kTileRows - 1) / kTileRows;
    for (int64_t k = 0; k < depth; k += block.depth) {
      const int64_t deep = std::min(block.depth, depth - k), units = deep / unit;
      // Some rows of every panel at a time: of column panels those are neighbours in memory.
      for (int64_t i = 0; i < deep; i += block.step) {
        const int64_t step = std::min(block.step, deep - i);
        for (int64_t p = 0; p < panels; ++p)
          pack<A>(source(p), k + i, step, packed.get() + (p * units + i / unit) * kPanel);
      }
      const T* next = k + deep < depth ? start(front, k + deep) : first + here < count ? start(front, 0) : after;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t begin = here * tile / tiles, size = here * (tile + 1) / tiles - begin;
        const float* a[kTileRows];
        for (int64_t r = 0; r < size; ++r) a[r] = reinterpret_cast<const float*>(rows[first + begin + r] + k);
        for (int64_t p = 0; p < panels; ++p) {
          float* c = sums.get() + (p * chunk + begin) * kPanel;
          const Fetch fetch = next ? share(front, next, panels, tile * panels + p, tiles * panels, unit) : Fetch{};
          packed_rows<A>(size, a, packed.get() + p * units * kPanel, units, c, k > 0, fetch);
          if (k + deep == depth) finish(first + begin, size, p, c);
        }
      }
    }
  }
}

// `after`, when not null, is where the weights of the next product begin, for fetching them ahead.
template <class A, class T, class Source, class Finish>
void multiply(const A* const* rows, int64_t count, int64_t depth, int64_t panels, const RowPanel<T>*, Source&& source,
              Finish&& finish, const T* after = nullptr) {
  if (count > kDotLimit || depth % (std::is_same_v<A, bfloat16> ? 2 * kLanes : kLanes) != 0)
    return multiply_packed(rows, count, depth, panels, source, finish, after);
  float c[kDotLimit * kPanel];
  vf sums[kDotLimit][kDotColumns];
  const int64_t tiles = (count + kDotRows - 1) / kDotRows;
  // With several tiles, weights and inputs of a block stay in the L1 cache.
  const int64_t block = tiles == 1 ? kChain * kLanes : kDotBytes / static_cast<int64_t>(sizeof(A));
  const auto valid_from = [](const RowPanel<T>& panel, int64_t column) {  // columns left in this half
    return (column < kHalf ? panel.first_columns : panel.second_columns) - column % kHalf;
  };
  const auto start = [](const RowPanel<T>& panel, int64_t column) {
    return (column < kHalf ? panel.first : panel.second) + column % kHalf * panel.stride;
  };
  for (int64_t p = 0; p < panels; ++p) {
    const RowPanel<T> panel = source(p);
    for (int64_t column = 0; column < kPanel; column += kDotColumns) {
      const int64_t valid = valid_from(panel, column);
      if (valid <= 0) continue;
      const T* w[kDotColumns];
      for (int64_t j = 0; j < kDotColumns; ++j) w[j] = start(panel, column) + std::min(j, valid - 1) * panel.stride;
      int64_t then = column + kDotColumns;
      while (then < kPanel && valid_from(panel, then) <= 0) then += kDotColumns;
      const T* following = then < kPanel ? start(panel, then) : p + 1 < panels ? source(p + 1).first : after;
      const char* next = reinterpret_cast<const char*>(following ? following : w[0]);
      for (int64_t k = 0; k < depth; k += block) {
        const int64_t deep = std::min(block, depth - k);
        const bool last = k + deep == depth;
        const T* weight[kDotColumns];
        for (int64_t j = 0; j < kDotColumns; ++j) weight[j] = w[j] + k;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t begin = count * tile / tiles, size = count * (tile + 1) / tiles - begin;
          const A* row[kDotRows];
          for (int64_t r = 0; r < size; ++r) row[r] = rows[begin + r] + k;
          float* to = last ? c + begin * kPanel + column : nullptr;
          if (tiles == 1) dot_rows<A, 1>(size, row, weight, deep, next, sums, k > 0, to);
          else if (tiles < 4) dot_rows<A, 2>(size, row, weight, deep, next, sums + begin, k > 0, to);
          else dot_rows<A, 4>(size, row, weight, deep, next, sums + begin, k > 0, to);
        }
      }
    }
    finish(0, count, p, c);
  }
}

template <class A, class T, class Source, class Finish>
void multiply(const A* const* rows, int64_t count, int64_t depth, int64_t panels, const ColumnPanel<T>*,
              Source&& source, Finish&& finish, const T* after = nullptr) {
  int64_t columns = 0;
  for (int64_t p = 0; p < panels; ++p) columns += source(p).columns;
  const ColumnPanel<T> front = source(0);
  if (count > kStreamRows || columns % (front.paired ? 2 * kLanes : kLanes) != 0)
    return multiply_packed(rows, count, depth, panels, source, finish, after);
  const Scratch<float> sums(count * columns), wide(std::is_same_v<A, float> ? 0 : count * depth);
  const float* a[kStreamRows];
  for (int64_t r = 0; r < count; ++r) {
    if constexpr (std::is_same_v<A, float>) {
      a[r] = rows[r];
    } else {
      for (int64_t k = 0; k < depth; ++k) wide[r * depth + k] = widen(rows[r][k]);
      a[r] = wide.get() + r * depth;
    }
  }
  std::memset(sums.get(), 0, count * columns * sizeof(float));
  stream_rows(count, a, front.data, front.stride, depth, columns, after, sums.get());
  alignas(64) float c[kStreamRows * kPanel];
  for (int64_t p = 0; p < panels; ++p) {
    const ColumnPanel<float> natural{nullptr, 0, source(p).columns, front.paired};
    for (int64_t r = 0; r < count; ++r) pack_row(natural, sums.get() + r * columns + p * kPanel, c + r * kPanel);
    finish(0, count, p, c);
  }
}


// Reads gate and up columns [at, at + n) of a row of `pre` or of a gradient of it, and writes them.
template <class T>
inline void load_pair(const T* row, int64_t inner, int64_t at, int64_t n, bool interleaved, vf& gate, vf& up) {
  if (interleaved) {
    const vf low = load_some(row + 2 * at, std::min<int64_t>(kLanes, 2 * n));
    const vf high = 2 * n > kLanes ? load_some(row + 2 * at + kLanes, 2 * n - kLanes) : vf{};
    gate = even(low, high), up = odd(low, high);
  } else {
    gate = load_some(row + at, n), up = load_some(row + inner + at, n);
  }
}
template <class T>
inline void store_pair(T* row, int64_t inner, int64_t at, int64_t n, bool interleaved, vf gate, vf up) {
  if (interleaved) {
    store_some(row + 2 * at, interleave_low(gate, up), std::min<int64_t>(kLanes, 2 * n));
    if (2 * n > kLanes) store_some(row + 2 * at + kLanes, interleave_high(gate, up), 2 * n - kLanes);
  } else {
    store_some(row + at, gate, n), store_some(row + inner + at, up, n);
  }
}

template <class F>
void run_tasks(int64_t count, F&& task) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(thread_count(), count), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  });
}

// The same for small tasks: task(i, then) may fetch what task `then` (count: none) of the same thread begins with.
template <class F>
void run_small_tasks(int64_t count, F&& task) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(thread_count(), count), 1, [&](int64_t, int64_t) {
    int64_t i = next.fetch_add(1, std::memory_order_relaxed);
    while (i < count) {
      const int64_t then = std::min(next.fetch_add(1, std::memory_order_relaxed), count);
      task(i, then);
      i = then;
    }
  });
}

// Groups of panels for one task: `panels` cut evenly into pieces of at most `most`, a multiple of the threads.
struct Groups {
  int64_t panels, count;
  Groups(int64_t panels, int64_t most) : panels(panels) {
    const int64_t threads = thread_count();
    count = std::min(panels, (panels + most * threads - 1) / (most * threads) * threads);
  }
  int64_t begin(int64_t i) const { return panels * i / count; }
};

inline int64_t group_panels(bool interleaved, int64_t rows) { return !interleaved ? 1 : rows <= kStreamRows ? 8 : 4; }

// Experts take turns, as many at a time as have `rows` rows: what lies between two products is as large as one turn's.
struct Turns {
  std::vector<int64_t> begin{0};  // experts; the last is the end
  int64_t most = 0;               // rows of a turn

  Turns(const int32_t* offsets, int64_t experts, int64_t rows) {
    for (int64_t e = 1; e <= experts; ++e) {
      if (e < experts && offsets[e + 1] - offsets[begin.back()] <= rows) continue;
      most = std::max<int64_t>(most, offsets[e] - offsets[begin.back()]);
      begin.push_back(e);
    }
  }
  int64_t count() const { return begin.size() - 1; }
};

// Some panels of the sums over each token's experts; between turns `kept` [S, H] holds them.
struct TokenSums {
  int64_t tokens, width, first, columns;
  Scratch<float> sums;

  TokenSums(int64_t tokens, int64_t width, int64_t panel, int64_t panels, const float* kept)
      : tokens(tokens), width(width), first(panel * kPanel), columns(panels * kPanel), sums(tokens * columns) {
    if (!kept) std::memset(sums.get(), 0, tokens * columns * sizeof(float));
    else
      for (int64_t t = 0; t < tokens; ++t)
        std::memcpy(sums.get() + t * columns, kept + t * width + first, valid() * sizeof(float));
  }
  int64_t valid() const { return std::min(columns, width - first); }

  float* at(int64_t token, int64_t panel) const { return sums.get() + token * columns + panel * kPanel; }

  template <class T>
  void write(T* to) const {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t j = 0; j < valid(); j += kLanes) {
        const vf value = load(at(t, 0) + j);
        T* const place = to + t * width + first + j;
        if (valid() - j >= kLanes) store(place, value);
        else store_some(place, value, valid() - j);
      }
  }
};

// Where sums stay between turns: in a float32 result itself.
template <class T>
float* kept_sums(T* result, const Scratch<float>& sums) {
  if constexpr (std::is_same_v<T, float>) return result;
  else return sums.get();
}

template <class T, class A>
struct ForwardCall {
  ExpertShape shape;
  GatedActivation options;
  const ExpertWeights<T>& experts;
  const A* const* inputs;  // by sorted row, as all that follow
  A* const* actives;
  T* pre;

  void finish_up(int64_t e, int64_t row, int64_t rows, int64_t column, const float* c) const {
    const int64_t inner = shape.inner, columns = std::min(kHalf, inner - column);
    for (int64_t r = 0; r < rows; ++r, c += kPanel) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, columns - j), at = column + j;
        vf gate = load(c + j), up = load(c + kHalf + j);
        if (const T* bias = experts.gate_up_bias) {
          vf gate_bias, up_bias;
          load_pair(bias + e * 2 * inner, inner, at, n, experts.interleaved, gate_bias, up_bias);
          gate += gate_bias, up += up_bias;
        }
        if (pre) store_pair(pre + (row + r) * 2 * inner, inner, at, n, experts.interleaved, gate, up);
        store_some(actives[row + r] + at, gated(gate, up, options), n);
      }
    }
  }

  void up(int64_t e, int64_t row, int64_t rows, int64_t panel, int64_t panels, const T* after) const {
    const int64_t inner = shape.inner;
    const A* const* from = inputs + row;
    const auto finish = [&](int64_t r, int64_t n, int64_t p, const float* c) {
      finish_up(e, row + r, n, (panel + p) * kHalf, c);
    };
    if (experts.interleaved) {
      const auto source = [&](int64_t p) {
        return column_panel(experts.gate[e], 2 * inner, 2 * inner, (panel + p) * kPanel, true);
      };
      multiply(from, rows, shape.width, panels, static_cast<ColumnPanel<T>*>(nullptr), source, finish, after);
    } else {
      const auto source = [&](int64_t p) {
        const int64_t column = (panel + p) * kHalf, n = std::min(kHalf, inner - column), start = column * shape.width;
        return RowPanel<T>{experts.gate[e] + start, experts.up[e] + start, shape.width, n, n};
      };
      multiply(from, rows, shape.width, panels, static_cast<RowPanel<T>*>(nullptr), source, finish, after);
    }
  }

  // sums += weight * (rows times the panels of `down`)
  void down(int64_t e, const A* const* from, int64_t rows, int64_t panel, int64_t panels, const int32_t* tokens,
            const float* weights, const TokenSums& sums, const T* after) const {
    const int64_t width = shape.width, inner = shape.inner;
    const auto finish = [&](int64_t r, int64_t n, int64_t p, const float* c) {
      for (int64_t i = 0; i < n; ++i, c += kPanel) {
        float* to = sums.at(tokens[r + i], p);
        const vf scale = splat(weights[r + i]);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const int64_t column = (panel + p) * kPanel + part * kLanes;
          vf value = load(c + part * kLanes);
          if (experts.down_bias && column < width)
            value += load_some(experts.down_bias + e * width + column, std::min<int64_t>(kLanes, width - column));
          store(to + part * kLanes, fma(scale, value, load(to + part * kLanes)));
        }
      }
    };
    if (experts.interleaved) {
      const auto source = [&](int64_t p) { return column_panel(experts.down[e], width, width, (panel + p) * kPanel); };
      multiply(from, rows, inner, panels, static_cast<ColumnPanel<T>*>(nullptr), source, finish, after);
    } else {
      const auto source = [&](int64_t p) { return row_panel(experts.down[e], inner, width, (panel + p) * kPanel); };
      multiply(from, rows, inner, panels, static_cast<RowPanel<T>*>(nullptr), source, finish, after);
    }
  }
};

// Some rows of an expert times some panels.
struct UpTask {
  int64_t expert, row, rows, panel, panels;
};

// Tasks for all rows of the experts [first, last); `columns`: whether weights are column panels.
inline std::vector<UpTask> list_tasks(const int32_t* offsets, int64_t first, int64_t last, int64_t panels, bool columns) {
  constexpr int64_t kTaskRows = 2048;
  std::vector<UpTask> tasks;
  for (int64_t e = first; e < last; ++e)
    for (int64_t row = offsets[e]; row < offsets[e + 1]; row += kTaskRows) {
      const int64_t rows = std::min<int64_t>(kTaskRows, offsets[e + 1] - row);
      const Groups groups(panels, group_panels(columns, rows));
      for (int64_t g = 0; g < groups.count; ++g)
        tasks.push_back({e, row, rows, groups.begin(g), groups.begin(g + 1) - groups.begin(g)});
    }
  return tasks;
}

template <class T, class A>
void forward_with(ExpertShape shape, GatedActivation options, const A* hidden, const float* weights,
                  const int32_t* permutation, const int32_t* offsets, const ExpertWeights<T>& experts, T* out, T* pre) {
  const int64_t used = offsets[shape.experts], width = shape.width, inner = shape.inner;
  const Turns turns(offsets, shape.experts, 4096);
  const Scratch<const A*> inputs(used);
  const Scratch<A*> actives(used);
  const Scratch<int32_t> tokens(used);
  const Scratch<float> scales(used);
  const Scratch<A> active(turns.most * inner);
  for (int64_t turn = 0; turn < turns.count(); ++turn)
    for (int64_t first = offsets[turns.begin[turn]], row = first; row < offsets[turns.begin[turn + 1]]; ++row) {
      const int32_t slot = permutation[row];
      tokens[row] = static_cast<int32_t>(slot / shape.top_k);
      scales[row] = weights[slot];
      inputs[row] = hidden + tokens[row] * width;
      actives[row] = active.get() + (row - first) * inner;
    }
  const bool in_place = std::is_same_v<T, float> || turns.count() == 1;
  const Scratch<float> between(in_place ? 0 : shape.tokens * width);
  float* const kept = kept_sums(out, between);
  const ForwardCall<T, A> call{shape, options, experts, inputs.get(), actives.get(), pre};

  for (int64_t turn = 0; turn < turns.count(); ++turn) {
    const int64_t first = turns.begin[turn], last = turns.begin[turn + 1];
    const std::vector<UpTask> tasks =
        list_tasks(offsets, first, last, (inner + kHalf - 1) / kHalf, experts.interleaved);
    const int64_t count = tasks.size();
    run_small_tasks(count, [&](int64_t i, int64_t then) {
      const UpTask& t = tasks[i];
      const T* after = nullptr;
      if (then < count)
        after = experts.gate[tasks[then].expert] + tasks[then].panel * (experts.interleaved ? kPanel : kHalf * width);
      call.up(t.expert, t.row, t.rows, t.panel, t.panels, after);
    });

    const int64_t average = (offsets[last] - offsets[first]) / (last - first);
    const Groups groups((width + kPanel - 1) / kPanel, group_panels(experts.interleaved, average));
    run_tasks(groups.count, [&](int64_t g) {
      const int64_t panel = groups.begin(g), panels = groups.begin(g + 1) - panel;
      const TokenSums sums(shape.tokens, width, panel, panels, first ? kept : nullptr);
      for (int64_t e = first, then; e < last; e = then) {
        for (then = e + 1; then < last && offsets[then] == offsets[then + 1];) ++then;
        const int64_t row = offsets[e], rows = offsets[e + 1] - row;
        const T* after = nullptr;
        if (then < last) after = experts.down[then] + panel * kPanel * (experts.interleaved ? 1 : inner);
        if (rows > 0)
          call.down(e, actives.get() + row, rows, panel, panels, tokens.get() + row, scales.get() + row, sums, after);
      }
      if (last < shape.experts) sums.write(kept);
      else sums.write(out);
    });
  }
}

template <class T>
void widen_all(const T* from, int64_t size, float* to) {
  parallel_for(size, 1 << 14, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(to + i, load(from + i));
    for (; i < end; ++i) to[i] = widen(from[i]);
  });
}

// Whether the inputs stay bfloat16: every depth must be whole units, and the processor must have the instruction.
inline bool use_units(ExpertShape shape) {
  return dot_bf16() && shape.width % (2 * kLanes) == 0 && shape.inner % (2 * kLanes) == 0;
}

template <class T>
void forward(ExpertShape shape, GatedActivation options, const T* hidden, const float* weights,
             const int32_t* permutation, const int32_t* offsets, const ExpertWeights<T>& experts, T* out, T* pre) {
  if constexpr (std::is_same_v<T, float>) {
    return forward_with<T, float>(shape, options, hidden, weights, permutation, offsets, experts, out, pre);
  } else {
#if IVL_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, bfloat16>)
      if (use_units(shape))
        return forward_with<T, T>(shape, options, hidden, weights, permutation, offsets, experts, out, pre);
#endif
    const Scratch<float> wide(shape.tokens * shape.width);
    widen_all(hidden, shape.tokens * shape.width, wide.get());
    forward_with<T, float>(shape, options, wide.get(), weights, permutation, offsets, experts, out, pre);
  }
}



// result [R, C] (row stride C) = sum over m of left[m][r] * right[m][c].
template <class A, class T>
void outer_product(const A* const* left, const A* const* right, int64_t count, int64_t first, int64_t rows, int64_t columns,
                   T* result) {
  constexpr bool units = std::is_same_v<A, bfloat16>;
  const int64_t deep = units ? (count + 1) / 2 : count, stride = units ? 2 * deep : deep;
  const Scratch<A> turned(rows * stride);
  const Scratch<float> packed(deep * kPanel);
  for (int64_t m = 0; m < count; ++m)
    for (int64_t r = 0; r < rows; ++r) turned[r * stride + m] = left[m][first + r];
  if (stride > count)
    for (int64_t r = 0; r < rows; ++r) turned[r * stride + count] = A{};
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int64_t here = std::min(kPanel, columns - column);
    for (int64_t m = 0; m < deep; ++m) {
      float* to = packed.get() + m * kPanel;
      const ColumnPanel<A> panel{nullptr, 0, here, false};
      if constexpr (units) {
        pack_units(panel, right[2 * m] + column, 2 * m + 1 < count ? right[2 * m + 1] + column : nullptr, to);
      } else {
        pack_row(panel, right[m] + column, to);
      }
    }
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = rows * tile / tiles, size = rows * (tile + 1) / tiles - begin;
      const float* a[kTileRows];
      alignas(64) float c[kTileRows * kPanel];
      for (int64_t r = 0; r < size; ++r) a[r] = reinterpret_cast<const float*>(turned.get() + (begin + r) * stride);
      packed_rows<A>(size, a, packed.get(), deep, c, false);
      for (int64_t r = 0; r < size; ++r)
        for (int64_t j = 0; j < here; j += kLanes) {
          T* to = result + (begin + r) * columns + column + j;
          const vf value = load(c + r * kPanel + j);
          if (here - j >= kLanes) store(to, value);
          else store_some(to, value, here - j);
        }
    }
  }
}

// result [columns] = the sum of the rows, each times its scale (null: 1).
template <class A, class T>
void column_sums(const A* const* rows, const float* scales, int64_t count, int64_t columns, T* result) {
  constexpr int64_t kShort = 16;  // chains as short as torch's
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, columns - j);
    vf total{};
    for (int64_t first = 0; first < count; first += kShort) {
      vf part{};
      for (int64_t r = first; r < std::min(first + kShort, count); ++r)
        part = fma(splat(scales ? scales[r] : 1.0f), n == kLanes ? load(rows[r] + j) : load_some(rows[r] + j, n), part);
      total += part;
    }
    store_some(result + j, total, n);
  }
}

template <class A, class T>
float dot(const A* a, const T* b, int64_t size) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = fma(load(a + i + j * kLanes), load(b + i + j * kLanes), sums[j]);
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < size; ++i) total += widen(a[i]) * widen(b[i]);
  return total;
}

// The backward of the experts [first, last), whose rows alone have their `active` and `change`.
template <class T, class A>
struct BackwardCall {
  ExpertShape shape;
  GatedActivation options;
  const int32_t* offsets;
  const ExpertWeights<T>& experts;
  const T* pre;
  const ExpertGradients<T>& to;
  const A* const* grads;   // by sorted row, as all that follow
  const A* const* inputs;
  A* const* actives;       // the activations, times the routing weights; null when `down` needs no gradient
  A* const* changes;       // the gradients of pre
  const int32_t* tokens;
  const float* scales;
  float* dots;             // [rows, inner_panels()]: parts of the gradients of the routing weights, or null
  float* hidden_sums;      // [S, H], of the experts so far
  int64_t first, last;

  int64_t inner_panels() const { return (shape.inner + kPanel - 1) / kPanel; }

  // Through the down projection: gradients of the activations, of pre, and a part of the routing weights' per panel.
  void through_down() const {
    const int64_t width = shape.width, inner = shape.inner, inner_panels = this->inner_panels();
    const bool interleaved = experts.interleaved;
    const std::vector<UpTask> tasks = list_tasks(offsets, first, last, inner_panels, !interleaved);
    run_tasks(tasks.size(), [&](int64_t i) {
      const UpTask t = tasks[i];
      const auto finish = [&](int64_t begin, int64_t count, int64_t p, const float* c) {
        const int64_t column = (t.panel + p) * kPanel, columns = std::min(kPanel, inner - column);
        for (int64_t r = t.row + begin; r < t.row + begin + count; ++r, c += kPanel) {
          const vf scale = splat(scales[r]);
          vf dot{};
          for (int64_t j = 0; j < columns; j += kLanes) {
            const int64_t n = std::min<int64_t>(kLanes, columns - j), at = column + j;
            vf gate, up;
            load_pair(pre + r * 2 * inner, inner, at, n, interleaved, gate, up);
            const GateGradient d = gate_gradient(gate, up, options);
            const vf from = load_some(c + j, n), scaled = scale * from;  // nothing was summed in other columns
            dot = fma(from, d.active, dot);
            store_pair(changes[r], inner, at, n, interleaved, scaled * d.gate, scaled * d.up);
            if (to.down) store_some(actives[r] + at, scale * d.active, n);
          }
          if (dots) dots[r * inner_panels + t.panel + p] = sum(dot);
        }
      };
      const T* const down = experts.down[t.expert];
      if (interleaved) {
        const auto source = [&](int64_t p) { return row_panel(down, width, inner, (t.panel + p) * kPanel); };
        multiply(grads + t.row, t.rows, width, t.panels, static_cast<RowPanel<T>*>(nullptr), source, finish);
      } else {
        const auto source = [&](int64_t p) { return column_panel(down, inner, inner, (t.panel + p) * kPanel); };
        multiply(grads + t.row, t.rows, width, t.panels, static_cast<ColumnPanel<T>*>(nullptr), source, finish);
      }
    });
  }

  // Through gate_up, added to the sums over each token's experts; the last experts' turn writes the result.
  void through_gate_up() const {
    const int64_t width = shape.width, inner = shape.inner;
    const Groups groups((width + kPanel - 1) / kPanel,
                        group_panels(!experts.interleaved, (offsets[last] - offsets[first]) / (last - first)));
    run_tasks(groups.count, [&](int64_t g) {
      const int64_t panel = groups.begin(g), panels = groups.begin(g + 1) - panel;
      const TokenSums sums(shape.tokens, width, panel, panels, first ? hidden_sums : nullptr);
      for (int64_t e = first; e < last; ++e) {
        const int64_t row = offsets[e], rows = offsets[e + 1] - row;
        if (rows == 0) continue;
        const auto finish = [&](int64_t begin, int64_t count, int64_t p, const float* c) {
          for (int64_t r = row + begin; r < row + begin + count; ++r, c += kPanel) {
            float* sum = sums.at(tokens[r], p);
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part)
              store(sum + part * kLanes, load(sum + part * kLanes) + load(c + part * kLanes));
          }
        };
        if (experts.interleaved) {
          const auto source = [&](int64_t p) {
            return row_panel(experts.gate[e], 2 * inner, width, (panel + p) * kPanel);
          };
          multiply(changes + row, rows, 2 * inner, panels, static_cast<RowPanel<T>*>(nullptr), source, finish);
          continue;
        }
        const Scratch<const A*> from(rows);
        for (bool up : {false, true}) {
          for (int64_t r = 0; r < rows; ++r) from[r] = changes[row + r] + (up ? inner : 0);
          const auto source = [&](int64_t p) {
            return column_panel((up ? experts.up : experts.gate)[e], width, width, (panel + p) * kPanel);
          };
          multiply(from.get(), rows, inner, panels, static_cast<ColumnPanel<T>*>(nullptr), source, finish);
        }
      }
      if (last < shape.experts) sums.write(hidden_sums);
      else sums.write(to.hidden);
    });
  }

  // Gradients of the matrices and biases: outer products over an expert's rows, in blocks of rows of the result.
  void matrices() const {
    const int64_t width = shape.width, inner = shape.inner;
    const bool interleaved = experts.interleaved;
    struct Task {
      int64_t expert, kind, first, rows;
    };
    std::vector<Task> tasks;
    constexpr int64_t kBlock = 96;
    const int64_t up_rows = interleaved ? width : inner, down_rows = interleaved ? inner : width;
    for (int64_t e = first; e < last; ++e) {
      if (to.gate)
        for (int64_t kind = 0; kind < (interleaved ? 1 : 2); ++kind)
          for (int64_t r = 0; r < up_rows; r += kBlock) tasks.push_back({e, kind, r, std::min(kBlock, up_rows - r)});
      if (to.down)
        for (int64_t r = 0; r < down_rows; r += kBlock) tasks.push_back({e, 2, r, std::min(kBlock, down_rows - r)});
      if (to.gate_up_bias || to.down_bias) tasks.push_back({e, 3, 0, 0});
    }
    run_tasks(tasks.size(), [&](int64_t i) {
      const Task t = tasks[i];
      const int64_t row = offsets[t.expert], rows = offsets[t.expert + 1] - row;
      if (t.kind == 3) {
        if (T* bias = to.gate_up_bias) column_sums(changes + row, nullptr, rows, 2 * inner, bias + t.expert * 2 * inner);
        if (T* bias = to.down_bias) column_sums(grads + row, scales + row, rows, width, bias + t.expert * width);
        return;
      }
      const bool down = t.kind == 2;
      const int64_t columns = down ? (interleaved ? width : inner) : (interleaved ? 2 * inner : width);
      T* result = (down ? to.down : t.kind == 1 ? to.up : to.gate)[t.expert] + t.first * columns;
      if (rows == 0) {
        std::memset(static_cast<void*>(result), 0, t.rows * columns * sizeof(T));
        return;
      }
      const A *const *left = (down ? grads : changes) + row, *const *right = (down ? actives : inputs) + row;
      if (interleaved) std::swap(left, right);
      outer_product(left, right, rows, t.first + (t.kind == 1 ? inner : 0), t.rows, columns, result);
    });
  }
};

template <class T, class A>
void backward_with(ExpertShape shape, GatedActivation options, const A* grad, const A* hidden, const float* weights,
                   const int32_t* permutation, const int32_t* inverse, const int32_t* offsets,
                   const ExpertWeights<T>& experts, const T* pre, const ExpertGradients<T>& to) {
  const int64_t used = offsets[shape.experts], width = shape.width, inner = shape.inner;
  const Turns turns(offsets, shape.experts, 2048);
  const Scratch<const A*> grads(used), inputs(used);
  const Scratch<A*> actives(used), changes(used);
  const Scratch<int32_t> tokens(used);
  const Scratch<float> scales(used);
  const Scratch<A> change(turns.most * 2 * inner), active(to.down ? turns.most * inner : 0);
  for (int64_t turn = 0; turn < turns.count(); ++turn)
    for (int64_t first = offsets[turns.begin[turn]], row = first; row < offsets[turns.begin[turn + 1]]; ++row) {
      const int32_t slot = permutation[row];
      const int64_t place = row - first;
      tokens[row] = static_cast<int32_t>(slot / shape.top_k);
      scales[row] = weights[slot];
      inputs[row] = hidden + tokens[row] * width;
      grads[row] = grad + tokens[row] * width;
      actives[row] = active.get() + place * inner;
      changes[row] = change.get() + place * 2 * inner;
    }
  const int64_t inner_panels = (inner + kPanel - 1) / kPanel;
  const Scratch<float> dots(to.weights ? used * inner_panels : 0);
  const bool in_place = std::is_same_v<T, float> || !to.hidden || turns.count() == 1;
  const Scratch<float> hidden_sums(in_place ? 0 : shape.tokens * width);
  BackwardCall<T, A> call{shape, options, offsets, experts, pre, to, grads.get(), inputs.get(), actives.get(),
                          changes.get(), tokens.get(), scales.get(), to.weights ? dots.get() : nullptr,
                          kept_sums(to.hidden, hidden_sums), 0, 0};
  for (int64_t turn = 0; turn < turns.count(); ++turn) {
    call.first = turns.begin[turn], call.last = turns.begin[turn + 1];
    call.through_down();
    if (to.hidden) call.through_gate_up();
    call.matrices();
  }
  if (!to.weights) return;
  parallel_for(shape.tokens * shape.top_k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t row = inverse[slot];
      float total = 0;
      if (row < used) {
        for (int64_t p = 0; p < inner_panels; ++p) total += dots[row * inner_panels + p];
        if (experts.down_bias) {
          const int64_t e = std::upper_bound(offsets, offsets + shape.experts, row) - offsets - 1;
          total += dot(grads[row], experts.down_bias + e * width, width);
        }
      }
      to.weights[slot] = total;
    }
  });
}

template <class T>
void backward(ExpertShape shape, GatedActivation options, const T* grad, const T* hidden, const float* weights,
              const int32_t* permutation, const int32_t* inverse, const int32_t* offsets, const ExpertWeights<T>& experts,
              const T* pre, const ExpertGradients<T>& to) {
  if constexpr (std::is_same_v<T, float>) {
    return backward_with<T, float>(shape, options, grad, hidden, weights, permutation, inverse, offsets, experts, pre, to);
  } else {
#if IVL_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, bfloat16>)
      if (use_units(shape))
        return backward_with<T, T>(shape, options, grad, hidden, weights, permutation, inverse, offsets, experts, pre, to);
#endif
    const int64_t size = shape.tokens * shape.width;
    const Scratch<float> wide_grad(size), wide_hidden(size);
    widen_all(grad, size, wide_grad.get());
    widen_all(hidden, size, wide_hidden.get());
    backward_with<T, float>(shape, options, wide_grad.get(), wide_hidden.get(), weights, permutation, inverse, offsets,
                            experts, pre, to);
  }
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
