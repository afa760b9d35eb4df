// Kernels of the mixture-of-experts feed-forward for one instruction set. Needs vec_kernels.h, ivl/moe_experts.h,
// ivl/parallel.h, ivl/scratch.h, <atomic>, <algorithm>.
//
// Products of a few rows (the tokens of one expert) with a weight matrix, in three forms:
//   dot     weights with contiguous k, few rows: every weight is read once, straight into a dot product
//   stream  weights with contiguous columns, very few rows: weights times broadcast inputs, sums in the L1 cache
//   packed  otherwise: a panel of columns is widened and packed in the L2 cache, then multiplied tile by tile
// All accumulate in float32. A is the type of the inputs: float, or bfloat16 when the processor multiplies that itself;
// then two neighbouring k form one 32-bit unit, held in a float's bits, and vectors of units are multiplied by dot2.

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int kParts = kLanes == 16 ? 4 : 2;       // vectors of a panel's row
constexpr int64_t kPanel = kParts * kLanes;        // columns of a panel; the first half are gates, the second ups
constexpr int64_t kHalf = kPanel / 2;
constexpr int64_t kTileRows = 6;
constexpr int64_t kDotRows = kLanes == 16 ? 6 : 4, kDotColumns = kLanes == 16 ? 4 : 2;
constexpr int64_t kStreamRows = 4;
constexpr int64_t kChain = 128;                    // additions in a row: sums of sums keep more digits
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

inline vf zip_low(vf a, vf b) {
#if IVL_VECTOR_BYTES == 64
  return __builtin_shuffle(a, b, vi{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#elif IVL_VECTOR_BYTES == 32
  return __builtin_shuffle(a, b, vi{0, 8, 1, 9, 2, 10, 3, 11});
#else
  return __builtin_shuffle(a, b, vi{0, 4, 1, 5});
#endif
}
inline vf zip_high(vf a, vf b) {
#if IVL_VECTOR_BYTES == 64
  return __builtin_shuffle(a, b, vi{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#elif IVL_VECTOR_BYTES == 32
  return __builtin_shuffle(a, b, vi{4, 12, 5, 13, 6, 14, 7, 15});
#else
  return __builtin_shuffle(a, b, vi{2, 6, 3, 7});
#endif
}
inline vf even(vf a, vf b) {
#if IVL_VECTOR_BYTES == 64
  return __builtin_shuffle(a, b, vi{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
#elif IVL_VECTOR_BYTES == 32
  return __builtin_shuffle(a, b, vi{0, 2, 4, 6, 8, 10, 12, 14});
#else
  return __builtin_shuffle(a, b, vi{0, 2, 4, 6});
#endif
}
inline vf odd(vf a, vf b) {
#if IVL_VECTOR_BYTES == 64
  return __builtin_shuffle(a, b, vi{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
#elif IVL_VECTOR_BYTES == 32
  return __builtin_shuffle(a, b, vi{1, 3, 5, 7, 9, 11, 13, 15});
#else
  return __builtin_shuffle(a, b, vi{1, 3, 5, 7});
#endif
}

// Rows become columns, in log2(kLanes) perfect shuffles.
inline void transpose_square(vf (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    vf next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = zip_low(v[i], v[i + kLanes / 2]);
      next[2 * i + 1] = zip_high(v[i], v[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
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
          transpose_square(v);
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
          transpose_square(v);
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
          target[i * kPanel + j] = j < columns ? to_float(source[j * from.stride + i]) : 0.0f;
    }
  }
}

// One row of a column panel, its elements widened, and put in the panel's order.
template <class T>
void pack_row(const ColumnPanel<T>& from, const T* row, float* to) {
  if (from.columns < kPanel) {
    T whole[kPanel] = {};
    std::memcpy(whole, row, from.columns * sizeof(T));
    for (int64_t j = 0; j < kPanel; ++j) to[from.paired ? (j % 2) * kHalf + j / 2 : j] = to_float(whole[j]);
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

template <class A, class T>
void pack(const ColumnPanel<T>& from, int64_t k, int64_t depth, float* to) {
  const T* row = from.data + k * from.stride;
  for (int64_t i = 0; i < depth; ++i)  // long strides are beyond the hardware's prefetchers
    for (int64_t j = 0; j < kPanel; j += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(row + (i + kAhead) * from.stride + j);
  if constexpr (std::is_same_v<A, bfloat16>) {
    for (int64_t i = 0; i < depth; i += 2, row += 2 * from.stride, to += kPanel) {
      alignas(64) float pair[2][kPanel];
      pack_row(from, row, pair[0]);
      pack_row(from, row + from.stride, pair[1]);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const vu low = (vu)load(pair[0] + part * kLanes) >> 16, high = (vu)load(pair[1] + part * kLanes);
        store(to + part * kLanes, (vf)(low | high));
      }
    }
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

// c [R, kPanel] (+)= a's rows [depth] times the packed panel b [depth, kPanel]; depth counts units.
template <class A, int R>
void packed_tile(const float* const* a, const float* b, int64_t depth, float* c, bool accumulate) {
  vf sums[R][kParts];
  const float* row[R];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    row[r] = a[r];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) sums[r][p] = vf{};
  }
  for (int64_t k = 0; k < depth; ++k, b += kPanel) {
    vf w[kParts];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) w[p] = load(b + p * kLanes);
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

template <class A>
void packed_rows(int64_t rows, const float* const* a, const float* b, int64_t depth, float* c, bool accumulate) {
  const float* row[kTileRows];
  std::copy_n(a, rows, row);
  for (int64_t k = 0; k < depth; k += kChain, b += kChain * kPanel, accumulate = true) {
    const int64_t deep = std::min(kChain, depth - k);
    switch (rows) {
      case 1: packed_tile<A, 1>(row, b, deep, c, accumulate); break;
      case 2: packed_tile<A, 2>(row, b, deep, c, accumulate); break;
      case 3: packed_tile<A, 3>(row, b, deep, c, accumulate); break;
      case 4: packed_tile<A, 4>(row, b, deep, c, accumulate); break;
      case 5: packed_tile<A, 5>(row, b, deep, c, accumulate); break;
      default: packed_tile<A, 6>(row, b, deep, c, accumulate);
    }
    for (int64_t r = 0; r < rows; ++r) row[r] += deep;
  }
}

// The sums of the lanes of kDotColumns vectors.
inline void store_sums(float* to, const vf (&v)[kDotColumns]) {
#if IVL_VECTOR_BYTES == 64
  const vf a = zip_low(v[0], v[1]) + zip_high(v[0], v[1]), b = zip_low(v[2], v[3]) + zip_high(v[2], v[3]);
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
template <int R, class T>
void stream_tile(const float* const* a, const T* w, int64_t stride, int64_t depth, int64_t columns, float* c) {
  constexpr int kDeep = 4;
  int64_t k = 0;
  for (; k + kDeep <= depth; k += kDeep, w += kDeep * stride) {
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
        __builtin_prefetch(w + (d + kDeep) * stride + j);
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
                 float* c) {
  switch (rows) {
    case 1: return stream_tile<1>(a, w, stride, depth, columns, c);
    case 2: return stream_tile<2>(a, w, stride, depth, columns, c);
    case 3: return stream_tile<3>(a, w, stride, depth, columns, c);
    default: return stream_tile<4>(a, w, stride, depth, columns, c);
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

// Rows [count] of length `depth` times the panels source(0) ... source(panels - 1); finish(row, rows, panel, c) gets
// every tile of sums, c [rows, kPanel].
template <class A, class Source, class Finish>
void multiply_packed(const A* const* rows, int64_t count, int64_t depth, int64_t panels, Source&& source,
                     Finish&& finish) {
  using Panel = decltype(source(0));
  constexpr Blocking block = blocking(static_cast<Panel*>(nullptr));
  constexpr int64_t unit = std::is_same_v<A, bfloat16> ? 2 : 1;
  const int64_t chunk = std::min(block.chunk, count);
  const Scratch<float> packed(panels * block.depth / unit * kPanel), sums(panels * chunk * kPanel);
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
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t begin = here * tile / tiles, size = here * (tile + 1) / tiles - begin;
        const float* a[kTileRows];
        for (int64_t r = 0; r < size; ++r) a[r] = reinterpret_cast<const float*>(rows[first + begin + r] + k);
        for (int64_t p = 0; p < panels; ++p) {
          float* c = sums.get() + (p * chunk + begin) * kPanel;
          packed_rows<A>(size, a, packed.get() + p * units * kPanel, units, c, k > 0);
          if (k + deep == depth) finish(first + begin, size, p, c);
        }
      }
    }
  }
}

// `after`, when not null, is where the weights of the next product begin, for fetching them ahead.
template <class A, class T, class Source, class Finish>
void multiply(const A* const* rows, int64_t count, int64_t depth, int64_t panels, const RowPanel<T>*, Source&& source,
              Finish&& finish, const void* after = nullptr) {
  if (count > kDotLimit || depth % (std::is_same_v<A, bfloat16> ? 2 * kLanes : kLanes) != 0)
    return multiply_packed(rows, count, depth, panels, source, finish);
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
      const void* following = then < kPanel ? start(panel, then) : p + 1 < panels ? source(p + 1).first : after;
      const char* next = static_cast<const char*>(following ? following : w[0]);
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
              Source&& source, Finish&& finish) {
  int64_t columns = 0;
  for (int64_t p = 0; p < panels; ++p) columns += source(p).columns;
  const ColumnPanel<T> front = source(0);
  if (count > kStreamRows || columns % (front.paired ? 2 * kLanes : kLanes) != 0)
    return multiply_packed(rows, count, depth, panels, source, finish);
  const Scratch<float> sums(count * columns), wide(std::is_same_v<A, float> ? 0 : count * depth);
  const float* a[kStreamRows];
  for (int64_t r = 0; r < count; ++r) {
    if constexpr (std::is_same_v<A, float>) {
      a[r] = rows[r];
    } else {
      for (int64_t k = 0; k < depth; ++k) wide[r * depth + k] = to_float(rows[r][k]);
      a[r] = wide.get() + r * depth;
    }
  }
  std::memset(sums.get(), 0, count * columns * sizeof(float));
  stream_rows(count, a, front.data, front.stride, depth, columns, sums.get());
  alignas(64) float c[kStreamRows * kPanel];
  for (int64_t p = 0; p < panels; ++p) {
    const ColumnPanel<float> natural{nullptr, 0, source(p).columns, front.paired};
    for (int64_t r = 0; r < count; ++r) pack_row(natural, sums.get() + r * columns + p * kPanel, c + r * kPanel);
    finish(0, count, p, c);
  }
}


inline vf sigmoid(vf x) {
  const vi negative = x < vf{};
  const vf e = exp_negative(negative ? x : -x);
  const vf positive = splat(1.0f) / (splat(1.0f) + e);
  return negative ? e * positive : positive;
}

inline vf gated(vf gate, vf up, const ExpertOptions& options) {
  if (options.gating == Gating::silu) return gate * sigmoid(gate) * up;
  const vf limit = splat(options.limit);
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate * sigmoid(splat(options.alpha) * gate) * (up + splat(1.0f));
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
    store_some(row + 2 * at, zip_low(gate, up), std::min<int64_t>(kLanes, 2 * n));
    if (2 * n > kLanes) store_some(row + 2 * at + kLanes, zip_high(gate, up), 2 * n - kLanes);
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

template <class T, class A>
struct ForwardCall {
  ExpertShape shape;
  ExpertOptions options;
  const ExpertWeights<T>& experts;
  const A* const* inputs;  // by sorted row
  A* active;               // [slots, I]
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
        store_some(active + (row + r) * inner + at, gated(gate, up, options), n);
      }
    }
  }

  void up(int64_t e, int64_t row, int64_t rows, int64_t panel, int64_t panels, const void* after) const {
    const int64_t inner = shape.inner;
    const A* const* from = inputs + row;
    const auto finish = [&](int64_t r, int64_t n, int64_t p, const float* c) {
      finish_up(e, row + r, n, (panel + p) * kHalf, c);
    };
    if (experts.interleaved) {
      const auto source = [&](int64_t p) {
        const int64_t column = (panel + p) * kPanel;
        return ColumnPanel<T>{experts.gate[e] + column, 2 * inner, std::min(kPanel, 2 * inner - column), true};
      };
      multiply(from, rows, shape.width, panels, static_cast<ColumnPanel<T>*>(nullptr), source, finish);
    } else {
      const auto source = [&](int64_t p) {
        const int64_t column = (panel + p) * kHalf, n = std::min(kHalf, inner - column), start = column * shape.width;
        return RowPanel<T>{experts.gate[e] + start, experts.up[e] + start, shape.width, n, n};
      };
      multiply(from, rows, shape.width, panels, static_cast<RowPanel<T>*>(nullptr), source, finish, after);
    }
  }

  // sums [S, panels * kPanel] += weight * (rows times the panels of `down`)
  void down(int64_t e, const A* const* from, int64_t rows, int64_t panel, int64_t panels, const int32_t* tokens,
            const float* weights, float* sums, const void* after) const {
    const int64_t width = shape.width, inner = shape.inner;
    const auto finish = [&](int64_t r, int64_t n, int64_t p, const float* c) {
      for (int64_t i = 0; i < n; ++i, c += kPanel) {
        float* to = sums + (tokens[r + i] * panels + p) * kPanel;
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
      const auto source = [&](int64_t p) {
        const int64_t column = (panel + p) * kPanel;
        return ColumnPanel<T>{experts.down[e] + column, width, std::min(kPanel, width - column), false};
      };
      multiply(from, rows, inner, panels, static_cast<ColumnPanel<T>*>(nullptr), source, finish);
    } else {
      const auto source = [&](int64_t p) {
        const int64_t column = (panel + p) * kPanel, n = std::min(kPanel, width - column);
        const T* first = experts.down[e] + column * inner;
        return RowPanel<T>{first, first + kHalf * inner, inner, std::min(kHalf, n), std::max<int64_t>(0, n - kHalf)};
      };
      multiply(from, rows, inner, panels, static_cast<RowPanel<T>*>(nullptr), source, finish, after);
    }
  }
};

struct UpTask {
  int64_t expert, row, rows, panel, panels;
};

template <class T, class A>
void forward_with(ExpertShape shape, ExpertOptions options, const A* hidden, const float* weights,
                  const int32_t* permutation, const int32_t* offsets, const ExpertWeights<T>& experts, T* out, T* pre) {
  const int64_t used = offsets[shape.experts], width = shape.width, inner = shape.inner;
  const Scratch<const A*> inputs(used), actives(used);
  const Scratch<int32_t> tokens(used);
  const Scratch<float> scales(used);
  const Scratch<A> active(used * inner);
  for (int64_t row = 0; row < used; ++row) {
    const int32_t slot = permutation[row];
    tokens[row] = static_cast<int32_t>(slot / shape.top_k);
    scales[row] = weights[slot];
    inputs[row] = hidden + tokens[row] * width;
    actives[row] = active.get() + row * inner;
  }
  const ForwardCall<T, A> call{shape, options, experts, inputs.get(), active.get(), pre};

  constexpr int64_t kTaskRows = 2048;
  std::vector<UpTask> tasks;
  const int64_t up_panels = (inner + kHalf - 1) / kHalf;
  for (int64_t e = 0; e < shape.experts; ++e) {
    for (int64_t row = offsets[e]; row < offsets[e + 1]; row += kTaskRows) {
      const int64_t rows = std::min<int64_t>(kTaskRows, offsets[e + 1] - row);
      const Groups groups(up_panels, group_panels(experts.interleaved, rows));
      for (int64_t g = 0; g < groups.count; ++g)
        tasks.push_back({e, row, rows, groups.begin(g), groups.begin(g + 1) - groups.begin(g)});
    }
  }
  const int64_t count = tasks.size();
  run_small_tasks(count, [&](int64_t i, int64_t then) {
    const UpTask& t = tasks[i];
    const void* after = nullptr;
    if (!experts.interleaved && then < count) after = experts.gate[tasks[then].expert] + tasks[then].panel * kHalf * width;
    call.up(t.expert, t.row, t.rows, t.panel, t.panels, after);
  });

  const int64_t average = used / std::max<int64_t>(1, shape.experts);
  const Groups groups((width + kPanel - 1) / kPanel, group_panels(experts.interleaved, average));
  run_tasks(groups.count, [&](int64_t g) {
    const int64_t panel = groups.begin(g), panels = groups.begin(g + 1) - panel, columns = panels * kPanel;
    const Scratch<float> sums(shape.tokens * columns);
    std::memset(sums.get(), 0, shape.tokens * columns * sizeof(float));
    for (int64_t e = 0, then; e < shape.experts; e = then) {
      for (then = e + 1; then < shape.experts && offsets[then] == offsets[then + 1];) ++then;
      const int64_t row = offsets[e], rows = offsets[e + 1] - row;
      const void* after = nullptr;
      if (!experts.interleaved && then < shape.experts) after = experts.down[then] + panel * kPanel * inner;
      if (rows > 0)
        call.down(e, actives.get() + row, rows, panel, panels, tokens.get() + row, scales.get() + row, sums.get(), after);
    }
    for (int64_t t = 0; t < shape.tokens; ++t)
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t column = panel * kPanel + j, n = std::min<int64_t>(kLanes, width - column);
        const vf value = load(sums.get() + t * columns + j);
        if (n == kLanes) store(out + t * width + column, value);
        else if (n > 0) store_some(out + t * width + column, value, n);
      }
  });
}

template <class T>
void widen(const T* from, int64_t size, float* to) {
  parallel_for(size, 1 << 14, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) store(to + i, load(from + i));
    for (; i < end; ++i) to[i] = to_float(from[i]);
  });
}

// Whether the inputs stay bfloat16: every depth must be whole units, and the processor must have the instruction.
inline bool use_units(ExpertShape shape) {
  return dot_bf16() && shape.width % (2 * kLanes) == 0 && shape.inner % (2 * kLanes) == 0;
}

template <class T>
void forward(ExpertShape shape, ExpertOptions options, const T* hidden, const float* weights,
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
    widen(hidden, shape.tokens * shape.width, wide.get());
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
        alignas(64) float pair[2][kPanel] = {};
        pack_row(panel, right[2 * m] + column, pair[0]);
        if (2 * m + 1 < count) pack_row(panel, right[2 * m + 1] + column, pair[1]);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part)
          store(to + part * kLanes,
                (vf)((vu)load(pair[0] + part * kLanes) >> 16 | (vu)load(pair[1] + part * kLanes)));
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

struct GateGradient {
  vf active, gate, up;  // d active / d gate, d active / d up
};

inline GateGradient gate_gradient(vf gate, vf up, const ExpertOptions& options) {
  const vf one = splat(1.0f);
  if (options.gating == Gating::silu) {
    const vf s = sigmoid(gate), silu = gate * s;
    return {silu * up, up * s * (one + gate * (one - s)), silu};
  }
  const vf limit = splat(options.limit), alpha = splat(options.alpha);
  const vi inside_gate = gate <= limit, inside_up = (up <= limit) & (up >= -limit);
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  const vf s = sigmoid(alpha * gate), glu = gate * s;
  const vf by_gate = (up + one) * s * (one + alpha * gate * (one - s));
  return {glu * (up + one), inside_gate ? by_gate : vf{}, inside_up ? glu : vf{}};
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
  for (; i < size; ++i) total += to_float(a[i]) * to_float(b[i]);
  return total;
}

template <class T, class A>
void backward_with(ExpertShape shape, ExpertOptions options, const A* grad, const A* hidden, const float* weights,
                   const int32_t* permutation, const int32_t* inverse, const int32_t* offsets,
                   const ExpertWeights<T>& experts, const T* pre, const ExpertGradients<T>& to) {
  const int64_t used = offsets[shape.experts], width = shape.width, inner = shape.inner;
  const bool interleaved = experts.interleaved, need_down = to.down != nullptr;
  const Scratch<const A*> grads(used), inputs(used), actives(used), changes(used);
  const Scratch<int32_t> tokens(used);
  const Scratch<float> scales(used);
  const Scratch<A> change(used * 2 * inner), active(need_down ? used * inner : 0);  // change: the gradient of pre
  for (int64_t row = 0; row < used; ++row) {
    const int32_t slot = permutation[row];
    tokens[row] = static_cast<int32_t>(slot / shape.top_k);
    scales[row] = weights[slot];
    inputs[row] = hidden + tokens[row] * width;
    grads[row] = grad + tokens[row] * width;
    actives[row] = active.get() + row * inner;
    changes[row] = change.get() + row * 2 * inner;
  }

  // Through the down projection: gradients of the activations, of pre, and a part of the routing weights' per panel.
  const int64_t inner_panels = (inner + kPanel - 1) / kPanel;
  const Scratch<float> dots(to.weights ? used * inner_panels : 0);
  constexpr int64_t kTaskRows = 2048;
  std::vector<UpTask> tasks;
  for (int64_t e = 0; e < shape.experts; ++e)
    for (int64_t row = offsets[e]; row < offsets[e + 1]; row += kTaskRows) {
      const int64_t rows = std::min<int64_t>(kTaskRows, offsets[e + 1] - row);
      const Groups groups(inner_panels, group_panels(!interleaved, rows));
      for (int64_t g = 0; g < groups.count; ++g)
        tasks.push_back({e, row, rows, groups.begin(g), groups.begin(g + 1) - groups.begin(g)});
    }
  run_tasks(tasks.size(), [&](int64_t i) {
    const UpTask t = tasks[i];
    const auto finish = [&](int64_t first, int64_t count, int64_t p, const float* c) {
      const int64_t column = (t.panel + p) * kPanel, columns = std::min(kPanel, inner - column);
      for (int64_t r = t.row + first; r < t.row + first + count; ++r, c += kPanel) {
        const vf scale = splat(scales[r]);
        vf dot{};
        for (int64_t j = 0; j < columns; j += kLanes) {
          const int64_t n = std::min<int64_t>(kLanes, columns - j), at = column + j;
          vf gate, up;
          load_pair(pre + r * 2 * inner, inner, at, n, interleaved, gate, up);
          const GateGradient d = gate_gradient(gate, up, options);
          const vf from = load_some(c + j, n), scaled = scale * from;  // nothing was summed in other columns
          dot = fma(from, d.active, dot);
          store_pair(change.get() + r * 2 * inner, inner, at, n, interleaved, scaled * d.gate, scaled * d.up);
          if (need_down) store_some(active.get() + r * inner + at, scale * d.active, n);
        }
        if (to.weights) dots[r * inner_panels + t.panel + p] = sum(dot);
      }
    };
    if (interleaved) {
      const auto source = [&](int64_t p) {
        const int64_t column = (t.panel + p) * kPanel, n = std::min(kPanel, inner - column);
        const T* first = experts.down[t.expert] + column * width;
        return RowPanel<T>{first, first + kHalf * width, width, std::min(kHalf, n), std::max<int64_t>(0, n - kHalf)};
      };
      multiply(grads.get() + t.row, t.rows, width, t.panels, static_cast<RowPanel<T>*>(nullptr), source, finish);
    } else {
      const auto source = [&](int64_t p) {
        const int64_t column = (t.panel + p) * kPanel;
        return ColumnPanel<T>{experts.down[t.expert] + column, inner, std::min(kPanel, inner - column), false};
      };
      multiply(grads.get() + t.row, t.rows, width, t.panels, static_cast<ColumnPanel<T>*>(nullptr), source, finish);
    }
  });

  if (to.weights) {
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

  if (to.hidden) {  // through gate_up, summed over each token's experts
    const int64_t average = used / std::max<int64_t>(1, shape.experts);
    const Groups groups((width + kPanel - 1) / kPanel, group_panels(!interleaved, average));
    run_tasks(groups.count, [&](int64_t g) {
      const int64_t panel = groups.begin(g), panels = groups.begin(g + 1) - panel, columns = panels * kPanel;
      const Scratch<float> sums(shape.tokens * columns);
      std::memset(sums.get(), 0, shape.tokens * columns * sizeof(float));
      for (int64_t e = 0; e < shape.experts; ++e) {
        const int64_t row = offsets[e], rows = offsets[e + 1] - row;
        if (rows == 0) continue;
        const auto finish = [&](int64_t first, int64_t count, int64_t p, const float* c) {
          for (int64_t r = row + first; r < row + first + count; ++r, c += kPanel) {
            float* sum = sums.get() + (tokens[r] * panels + p) * kPanel;
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part)
              store(sum + part * kLanes, load(sum + part * kLanes) + load(c + part * kLanes));
          }
        };
        if (interleaved) {
          const auto source = [&](int64_t p) {
            const int64_t column = (panel + p) * kPanel, n = std::min(kPanel, width - column);
            const T* first = experts.gate[e] + column * 2 * inner;
            return RowPanel<T>{first, first + kHalf * 2 * inner, 2 * inner, std::min(kHalf, n),
                               std::max<int64_t>(0, n - kHalf)};
          };
          multiply(changes.get() + row, rows, 2 * inner, panels, static_cast<RowPanel<T>*>(nullptr), source, finish);
          continue;
        }
        const Scratch<const A*> up_changes(rows);
        for (int64_t r = 0; r < rows; ++r) up_changes[r] = changes[row + r] + inner;
        for (bool up : {false, true}) {
          const auto source = [&](int64_t p) {
            const int64_t column = (panel + p) * kPanel;
            return ColumnPanel<T>{(up ? experts.up[e] : experts.gate[e]) + column, width,
                                  std::min(kPanel, width - column), false};
          };
          const A* const* from = up ? up_changes.get() : changes.get() + row;
          multiply(from, rows, inner, panels, static_cast<ColumnPanel<T>*>(nullptr), source, finish);
        }
      }
      for (int64_t t = 0; t < shape.tokens; ++t)
        for (int64_t j = 0; j < columns; j += kLanes) {
          const int64_t column = panel * kPanel + j, n = std::min<int64_t>(kLanes, width - column);
          if (n > 0) store_some(to.hidden + t * width + column, load(sums.get() + t * columns + j), n);
        }
    });
  }

  // Gradients of the matrices and biases: outer products over an expert's rows, in blocks of rows of the result.
  struct OuterTask {
    int64_t expert, kind, first, rows;
  };
  std::vector<OuterTask> outer;
  constexpr int64_t kBlock = 96;
  const int64_t up_rows = interleaved ? width : inner, down_rows = interleaved ? inner : width;
  for (int64_t e = 0; e < shape.experts; ++e) {
    if (to.gate)
      for (int64_t kind = 0; kind < (interleaved ? 1 : 2); ++kind)
        for (int64_t r = 0; r < up_rows; r += kBlock) outer.push_back({e, kind, r, std::min(kBlock, up_rows - r)});
    if (to.down)
      for (int64_t r = 0; r < down_rows; r += kBlock) outer.push_back({e, 2, r, std::min(kBlock, down_rows - r)});
    if (to.gate_up_bias || to.down_bias) outer.push_back({e, 3, 0, 0});
  }
  run_tasks(outer.size(), [&](int64_t i) {
    const OuterTask t = outer[i];
    const int64_t row = offsets[t.expert], rows = offsets[t.expert + 1] - row;
    if (t.kind == 3) {
      if (T* bias = to.gate_up_bias) column_sums(changes.get() + row, nullptr, rows, 2 * inner, bias + t.expert * 2 * inner);
      if (T* bias = to.down_bias) column_sums(grads.get() + row, scales.get() + row, rows, width, bias + t.expert * width);
    } else if (t.kind == 2) {
      const int64_t columns = interleaved ? width : inner;
      T* result = to.down[t.expert] + t.first * columns;
      const A *const *left = actives.get() + row, *const *right = grads.get() + row;
      if (!interleaved) std::swap(left, right);
      if (rows) outer_product(left, right, rows, t.first, t.rows, columns, result);
      else std::memset(static_cast<void*>(result), 0, t.rows * columns * sizeof(T));
    } else {
      const int64_t columns = interleaved ? 2 * inner : width;
      T* result = (t.kind == 1 ? to.up : to.gate)[t.expert] + t.first * columns;
      const A *const *left = changes.get() + row, *const *right = inputs.get() + row;
      if (interleaved) std::swap(left, right);
      const int64_t first = t.first + (t.kind == 1 ? inner : 0);
      if (rows) outer_product(left, right, rows, first, t.rows, columns, result);
      else std::memset(static_cast<void*>(result), 0, t.rows * columns * sizeof(T));
    }
  });
}

template <class T>
void backward(ExpertShape shape, ExpertOptions options, const T* grad, const T* hidden, const float* weights,
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
    widen(grad, size, wide_grad.get());
    widen(hidden, size, wide_hidden.get());
    backward_with<T, float>(shape, options, wide_grad.get(), wide_hidden.get(), weights, permutation, inverse, offsets,
                            experts, pre, to);
  }
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
