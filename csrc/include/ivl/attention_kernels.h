// Attention for one instruction set, block by block with an online softmax: no [queries, keys] matrix in memory.
//
// A row is a query of one head; the rows of a key head are its queries with all the heads that share it, so that keys
// are never repeated. Both products are tiles of c [R, kWide] = a [R, depth] b [depth, kWide]: a in rows kStride apart,
// b in panels [depth][kWide] made from keys or values. Scores are in units of log2, and the softmax is of powers of 2.

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int kWide = 2 * kLanes;             // columns of a tile: two vectors
constexpr int kRows = kLanes == 16 ? 12 : 6;  // rows of a tile, as the registers allow
constexpr int64_t kKeys = 256;                // keys of a block
constexpr int64_t kStride = kKeys + 16;  // between rows: a little more, so that they fall into different cache sets
constexpr int64_t kTaskRows = 32 * 12;   // rows that one task keeps in the second-level cache
constexpr int64_t kQueries = 48;         // rows of a block of the backward
constexpr int64_t kFewRows = 16;         // up to this, keys and values are read in place, and split over threads
constexpr int64_t kSplit = 512;          // keys of such a part
constexpr float kNothing = -1e30f;       // a maximum before any key
constexpr double kLog2e = 1.4426950408889634;

static_assert(kMaxHeadDim <= kKeys);

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline vf maximum(vf a, vf b) { return a > b ? a : b; }

inline float largest(vf v) {
#if IVL_VECTOR_BYTES == 64
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

inline float added(vf v) {
#if IVL_VECTOR_BYTES == 64
  return _mm512_reduce_add_ps((__m512)v);
#else
  return sum(v);
#endif
}

// 2^x for x <= 0, to 1.3 units in the last place; exactly 1 at 0, and 0 below -126.
inline vf exp2_negative(vf x) {
#if IVL_VECTOR_BYTES == 64
  const __m512 n = _mm512_roundscale_ps((__m512)x, 8);
  const vf r = x - (vf)n;
#else
  const vf magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const vi under = x < splat(-126.0f);
  const vf shifted = (under ? splat(-126.0f) : x) + magic;
  const vf r = x - (shifted - magic);
#endif
  vf y = fma(splat(1.3264726e-3f), r, splat(9.6715130e-3f));
  y = fma(y, r, splat(5.5507336e-2f));
  y = fma(y, r, splat(2.4022242e-1f));
  y = fma(y, r, splat(6.9314700e-1f));
  y = fma(y, r, splat(1.0f));
#if IVL_VECTOR_BYTES == 64
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // NaN too
  return (vf)_mm512_maskz_scalef_ps(kept, (__m512)y, n);
#else
  const vf scale = (vf)(((vi)shifted - (vi)magic + 127) << 23);
  return under ? vf{} : y * scale;
#endif
}

// How a product of two operands is added up: as float32, or as pairs of bfloat16 in 32 bits (only after dot_bf16()).
enum class Product { float32, bf16_pairs };

template <Product P>
inline vf spread(const float* a) {
  if constexpr (P == Product::float32) return splat(*a);
  int32_t bits;
  std::memcpy(&bits, a, sizeof bits);
  return (vf)(bits - vi{});
}

template <Product P>
inline vf multiply_add(vf a, vf b, vf c) {
#if IVL_VECTOR_BYTES == 64
  if constexpr (P == Product::bf16_pairs) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));  // as assembly, so that only this needs the instruction
    return c;
  }
#endif
  return fma(a, b, c);
}

enum class Store { set, add };

// c [R, V vectors] = factor a [R, depth] b, or += a b. Row r of a at a[r * RowStride + k * DepthStride], row k of b at
// b[k * b_stride].
template <int R, int V, int64_t RowStride, int64_t DepthStride, Store S, Product P, class B>
inline void tile(int64_t depth, const float* a, const B* b, int64_t b_stride, float factor, float* c,
                 int64_t c_stride) {
  vf sums[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = vf{};
  for (int64_t k = 0; k < depth; ++k, a += DepthStride, b += b_stride) {
    vf columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const vf x = spread<P>(a + r * RowStride);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add<P>(x, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_stride + v * kLanes;
      store(to, S == Store::add ? load(to) + sums[r][v] : sums[r][v] * splat(factor));
    }
}

// Any number of rows, and columns up to two vectors, of panels of b. Transposed: a is read down its columns.
template <Store S, Product P = Product::float32, bool Transposed = false>
inline void tiles(int64_t rows, int64_t columns, int64_t depth, const float* a, const float* b, float factor, float* c,
                  int64_t c_stride) {
  constexpr int64_t across = Transposed ? 1 : kStride, along = Transposed ? kStride : 1;
  const auto some = [&]<int R>() {
    if (columns > kLanes)
      tile<R, 2, across, along, S, P>(depth, a, b, kWide, factor, c, c_stride);
    else
      tile<R, 1, across, along, S, P>(depth, a, b, kWide, factor, c, c_stride);
    rows -= R, a += R * across, c += R * c_stride;
  };
  while (rows >= kRows) some.template operator()<kRows>();
  if (kRows > 8 && rows >= 8) some.template operator()<8>();
  if (rows >= 4) some.template operator()<4>();
  if (rows >= 2) some.template operator()<2>();
  if (rows >= 1) some.template operator()<1>();
}

template <class T>
inline vf get(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_some(p, n);
}

// A row in float32, times `scale`, filled with zeros up to whole vectors.
template <class T>
inline void widen(const T* from, int64_t n, float scale, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, get(from + i, n - i) * splat(scale));
}

// Panels [columns / kWide][rows][kWide] of a matrix [rows, columns]; missing columns are zero.
template <class T>
void pack(const T* from, int64_t stride, int64_t rows, int64_t columns, int64_t panel_rows, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += stride)
    for (int64_t i = 0; i < columns; i += kLanes)
      store(to + (i / kWide * panel_rows + r) * kWide + i % kWide, get(from + i, columns - i));
}

// Panels [rows / kWide][columns][kWide] of its transpose; missing rows up to whole panels are zero.
template <class T>
void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t i = 0; i < columns; i += kLanes) {
      vf v[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) v[j] = r + j < rows ? get(from + (r + j) * stride + i, columns - i) : vf{};
      transpose(v);
      float* target = to + (r / kWide * columns + i) * kWide + r % kWide;
      const int64_t here = std::min<int64_t>(kLanes, columns - i);
      for (int64_t j = 0; j < here; ++j) store(target + j * kWide, v[j]);
    }
  if (rows % kWide != 0 && rows % kWide <= kLanes)  // the other half of the last panel
    for (int64_t j = 0; j < columns; ++j) store(to + (rows / kWide * columns + j) * kWide + kLanes, vf{});
}

// Panels [columns / kWide][rows / 2][kWide] of pairs of rows of a bfloat16 matrix; a row that is missing is zero.
inline void pack_pairs(const bfloat16* from, int64_t stride, int64_t rows, int64_t columns, int64_t panel_rows,
                       float* to) {
  for (int64_t r = 0; r < rows; r += 2, from += 2 * stride)
    for (int64_t i = 0; i < columns; i += kLanes) {
      const vu first = (vu)get(from + i, columns - i),
               second = r + 1 < rows ? (vu)get(from + stride + i, columns - i) : vu{};
      store(to + (i / kWide * panel_rows + r / 2) * kWide + i % kWide, (vf)(first >> 16 | second));
    }
}

// One sequence: where its queries and keys are, and what a query sees.
struct Sequence {
  int64_t q_batch, q_first, queries, k_batch, k_first, keys;
  int64_t shift, window;
  bool causal;

  Sequence(const AttentionArgs& args, int64_t s) : window(args.window), causal(args.causal) {
    const bool packed = args.q_offsets != nullptr;
    q_batch = k_batch = packed ? 0 : s;
    q_first = packed ? args.q_offsets[s] : 0;
    queries = packed ? args.q_offsets[s + 1] - q_first : args.q_tokens;
    k_first = packed ? args.k_offsets[s] : 0;
    keys = packed ? args.k_offsets[s + 1] - k_first : args.k_tokens;
    shift = keys - queries;
  }
  // Keys [first(query), last(query)) are visible.
  int64_t last(int64_t query) const { return causal ? std::clamp<int64_t>(query + shift + 1, 0, keys) : keys; }
  int64_t first(int64_t query) const {
    return window > 0 ? std::clamp<int64_t>(query + shift + 1 - window, 0, keys) : 0;
  }
};

template <class T>
struct Rows {
  const T* data;
  int64_t token, head, group;  // strides; heads that share a key head
  Rows(const AttentionSide& side, int64_t batch, int64_t first, int64_t head_index, int64_t group)
      : data(static_cast<const T*>(side.data) + batch * side.batch + first * side.token + head_index * side.head),
        token(side.token),
        head(side.head),
        group(group) {}
  const T* at(int64_t row) const { return data + row / group * token + row % group * head; }
};

// A key head of one sequence, and the queries of the heads that share it.
template <class T>
struct Head {
  Sequence s;
  int64_t group, first, dim, width, rows;  // first: of the query heads; width: dim up to whole vectors
  Rows<T> queries, keys, values;
  Head(const AttentionArgs& args, int64_t sequence, int64_t kv_head)
      : s(args, sequence),
        group(args.q_heads / args.kv_heads),
        first(kv_head * group),
        dim(args.dim),
        width(up(dim, kLanes)),
        rows(s.queries * group),
        queries(args.q, s.q_batch, s.q_first, first, group),
        keys(args.k, s.k_batch, s.k_first, kv_head, 1),
        values(args.v, s.k_batch, s.k_first, kv_head, 1) {}
};

// Softmax of the rows of a block so far.
struct Running {
  float *maximum, *total;  // [rows]
  float* out;              // [rows, width], not yet divided by the total
  int64_t width;
};

// Weights to where they go: in place, or as bfloat16 from the row's begin on.
template <Product P>
inline void store_weights(float* row, int64_t j, vf p) {
#if IVL_VECTOR_BYTES == 64
  if constexpr (P == Product::bf16_pairs) {
    __m256i narrow;
    asm("vcvtneps2bf16 %1, %0" : "=v"(narrow) : "v"(p));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row) + j / kLanes, narrow);
    return;
  }
#endif
  store(row + j, p);
}

// Scores [rows, columns [begin, end)] become weights; what the block changes of the maximum is applied to `running`.
// visible(r, begin, end) narrows the columns of a row.
template <Product P = Product::float32, class Visible>
inline void softmax(int64_t rows, int64_t begin, int64_t end, float* scores, Running running, Visible&& visible) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * kStride;
    int64_t from = begin, to = end;
    visible(r, from, to);
    for (int64_t j = begin; j < std::min(from, end); ++j) row[j] = -INFINITY;
    for (int64_t j = std::max(begin, to); j < end; ++j) row[j] = -INFINITY;
    vf most = load(row + begin);
    for (int64_t j = begin + kLanes; j < end; j += kLanes) most = maximum(load(row + j), most);
    const float before = running.maximum[r], now = std::max(before, largest(most));
    if (now > before) {
      const float shrink = std::exp2(before - now);
      running.maximum[r] = now;
      running.total[r] *= shrink;
      float* out = running.out + r * running.width;
      for (int64_t i = 0; i < running.width; i += kLanes) store(out + i, load(out + i) * splat(shrink));
    }
    vf total = {};
    for (int64_t j = begin; j < end; j += kLanes) {
      const vf p = exp2_negative(load(row + j) - splat(now));
      store_weights<P>(row, j, p);
      total += p;
    }
    running.total[r] += added(total);
  }
}

inline void start(const AttentionArgs& args, int64_t head, int64_t group, int64_t row, int64_t rows, bool sinks,
                  Running running) {
  for (int64_t r = 0; r < rows; ++r) {
    const bool sink = sinks && args.sinks;
    running.maximum[r] = sink ? static_cast<float>(args.sinks[head + (row + r) % group] * kLog2e) : kNothing;
    running.total[r] = sink ? 1.0f : 0.0f;
  }
  std::memset(running.out, 0, rows * running.width * sizeof(float));
}

template <class T>
struct Output {
  T* out;
  float* lse;
  const AttentionArgs& args;
  // `row` of the rows of `head` and those that share its keys.
  void write(const Sequence& s, int64_t head, int64_t group, int64_t row, float maximum, float total,
             const float* from) const {
    const int64_t token = s.q_batch * args.q_tokens + s.q_first + row / group, h = head + row % group;
    T* to = out + (token * args.q_heads + h) * args.dim;
    const vf inverse = splat(total > 0 ? 1 / total : total == 0 ? 0.0f : total);  // NaN stays NaN
    for (int64_t i = 0; i < args.dim; i += kLanes) {
      const vf v = load(from + i) * inverse;
      args.dim - i >= kLanes ? store(to + i, v) : store_some(to + i, v, args.dim - i);
    }
    lse[h * args.batch * args.q_tokens + token] =
        total == 0 ? -INFINITY : static_cast<float>((maximum + std::log2(static_cast<double>(total))) / kLog2e);
  }
};

struct Task {
  int64_t sequence, kv_head, begin, end;  // rows, or keys where there are few rows
  int64_t cost;
};

// Calls f(task) for each, the most expensive first, on whichever thread is free.
template <class F>
void over_tasks(std::vector<Task>& tasks, F&& f) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  const int64_t count = tasks.size();
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(count, thread_count()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t t = next++; t < count; t = next++) f(tasks[t]);
  });
}

template <class T, Product P = Product::float32>
void attend_rows(const AttentionArgs& args, const Task& task, const Output<T>& output) {
  constexpr int64_t kParts = P == Product::float32 ? 1 : 2;  // numbers in 32 bits of an operand
  const auto [s, group, head, dim, width, all_rows, queries, keys, values] = Head<T>(args, task.sequence, task.kv_head);
  const int64_t rows = task.end - task.begin, depth = dim / kParts;
  Scratch<float> q(rows * kStride), packed_keys(kKeys * depth), packed_values(kKeys / kParts * up(dim, kWide));
  Scratch<float> scores(kRows * kStride), out(rows * width), statistics(2 * rows);
  const Running all{statistics.get(), statistics.get() + rows, out.get(), width};
  start(args, head, group, task.begin, rows, true, all);
  const float scale = static_cast<float>(args.scale * kLog2e);
  for (int64_t r = 0; r < rows; ++r) {
    if constexpr (P == Product::float32)
      widen(queries.at(task.begin + r), dim, scale, q.get() + r * kStride);
    else
      std::memcpy(q.get() + r * kStride, queries.at(task.begin + r), dim * sizeof(T));
  }
  const int64_t first = s.first(task.begin / group), last = s.last((task.end - 1) / group);
  for (int64_t key = first / kWide * kWide; key < last; key += kKeys) {
    const int64_t here = std::min(kKeys, last - key);
    int64_t packed = here;
    if constexpr (P == Product::float32) {
      pack_transposed(keys.at(key), keys.token, here, dim, packed_keys.get());
      pack(values.at(key), values.token, here, dim, kKeys, packed_values.get());
    } else {
      pack_transposed(reinterpret_cast<const float*>(keys.at(key)), keys.token / 2, here, depth, packed_keys.get());
      pack_pairs(values.at(key), values.token, here, dim, kKeys / 2, packed_values.get());
      packed = (here + 1) / 2;
    }
    // Up to whole panels of keys: a weight of zero must not meet what was left there.
    for (int64_t r = packed; r < up(here, kWide) / kParts; ++r)
      for (int64_t i = 0; i < width; i += kLanes)
        store(packed_values.get() + (i / kWide * (kKeys / kParts) + r) * kWide + i % kWide, vf{});
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - r), row = task.begin + r;
      // Panels of keys that any of these rows sees.
      const int64_t begin = std::max<int64_t>(0, (s.first(row / group) - key) / kWide * kWide);
      const int64_t end = up(std::min(here, s.last((row + count - 1) / group) - key), kWide);
      if (begin >= end) continue;
      for (int64_t j = begin; j < end; j += kWide)
        tiles<Store::set, P>(count, kWide, depth, q.get() + r * kStride, packed_keys.get() + j * depth,
                             P == Product::float32 ? 1 : scale, scores.get() + j, kStride);
      const Running some{all.maximum + r, all.total + r, all.out + r * width, width};
      softmax<P>(count, begin, end, scores.get(), some, [&](int64_t i, int64_t& from, int64_t& to) {
        const int64_t query = (row + i) / group;
        from = s.first(query) - key, to = std::min(here, s.last(query) - key);
      });
      for (int64_t i = 0; i < width; i += kWide)
        tiles<Store::add, P>(count, width - i, (end - begin) / kParts, scores.get() + begin / kParts,
                             packed_values.get() + i * (kKeys / kParts) + begin / kParts * kWide, 1, some.out + i,
                             width);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    output.write(s, head, group, task.begin + r, all.maximum[r], all.total[r], out.get() + r * width);
}

// scores [R, kLanes] = q [R, width] times `count` of k's rows, of which there is at least one.
template <int R, class K>
inline void dot_products(const float* q, int64_t width, const K* k, int64_t k_stride, int64_t count, float* scores) {
  constexpr int kGroup = 4;  // rows of k at a time: as many sums as hide a multiply-add's latency
  vf dots[R][kLanes];
#pragma GCC unroll 4
  for (int first = 0; first < kLanes; first += kGroup) {
    const K* rows[kGroup];
    for (int j = 0; j < kGroup; ++j) rows[j] = k + std::min<int64_t>(first + j, count - 1) * k_stride;
    vf sums[R][kGroup] = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      vf x[R];
      for (int r = 0; r < R; ++r) x[r] = load(q + r * width + i);
      for (int j = 0; j < kGroup; ++j) {
        const vf y = load(rows[j] + i);
        for (int r = 0; r < R; ++r) sums[r][j] = fma(x[r], y, sums[r][j]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < kGroup; ++j) dots[r][first + j] = sums[r][j];
  }
  for (int r = 0; r < R; ++r) {
    transpose(dots[r]);
    vf score = dots[r][0];
#pragma GCC unroll 16
    for (int lane = 1; lane < kLanes; ++lane) score += dots[r][lane];
    store(scores + r * kStride, score);
  }
}

// out [rows, columns] += weights [rows, count] v [count, columns], v's rows v_stride apart.
template <class V>
inline void add_weighted(int64_t rows, int64_t columns, int64_t count, const float* weights, const V* v,
                         int64_t v_stride, float* out, int64_t out_stride) {
  int64_t r = 0;
  const auto pairs = [&]<int R>() {
    for (; r + R <= rows; r += R)
      for (int64_t i = 0; i < columns;) {
        const auto some = [&]<int N>() {
          tile<R, N, kStride, 1, Store::add, Product::float32>(count, weights + r * kStride, v + i, v_stride, 1,
                                                               out + r * out_stride + i, out_stride);
          i += N * kLanes;
        };
        columns - i >= 4 * kLanes ? some.template operator()<4>() : some.template operator()<1>();
      }
  };
  pairs.template operator()<2>();
  pairs.template operator()<1>();
}

// Few rows, such as one new token: keys [begin, end) and their values are read once, in place.
template <class T>
void attend_keys(const AttentionArgs& args, const Task& task, Running running) {
  constexpr int64_t kBlock = 2 * kWide;
  const auto [s, group, head, dim, width, rows, queries, keys, values] = Head<T>(args, task.sequence, task.kv_head);
  const bool in_place = dim % kLanes == 0;  // else its rows are widened first, with zeros up to whole vectors
  Scratch<float> q(rows * width), scores(rows * kStride), wide(in_place ? 1 : kBlock * width);
  start(args, head, group, 0, rows, false, running);
  for (int64_t r = 0; r < rows; ++r)
    widen(queries.at(r), dim, static_cast<float>(args.scale * kLog2e), q.get() + r * width);
  const auto block = [&](const Rows<T>& from, int64_t key, int64_t count, auto&& f) {
    if (in_place) return f(from.at(key), from.token);
    for (int64_t j = 0; j < count; ++j) widen(from.at(key + j), dim, 1, wide.get() + j * width);
    f(static_cast<const float*>(wide.get()), width);
  };
  for (int64_t key = task.begin; key < task.end; key += kBlock) {
    const int64_t count = std::min(kBlock, task.end - key);
    block(keys, key, count, [&](const auto* k, int64_t stride) {
      for (int64_t j = 0; j < count; j += kLanes) {
        int64_t r = 0;
        for (; r + 2 <= rows; r += 2)
          dot_products<2>(q.get() + r * width, width, k + j * stride, stride, count - j,
                          scores.get() + r * kStride + j);
        if (r < rows)
          dot_products<1>(q.get() + r * width, width, k + j * stride, stride, count - j,
                          scores.get() + r * kStride + j);
      }
    });
    softmax(rows, 0, up(count, kLanes), scores.get(), running, [&](int64_t r, int64_t& from, int64_t& to) {
      from = s.first(r / group) - key, to = std::min(count, s.last(r / group) - key);
    });
    block(values, key, count, [&](const auto* v, int64_t stride) {
      add_weighted(rows, width, count, scores.get(), v, stride, running.out, width);
    });
  }
}

template <class T>
void attention(const AttentionArgs& args, T* out, float* lse) {
  const Output<T> output{out, lse, args};
  const int64_t group = args.q_heads / args.kv_heads, width = up(args.dim, kLanes);
  std::vector<Task> whole, parts;
  std::vector<int64_t> first_part;  // of each sequence and key head with few rows
  std::vector<Task> merged;
  for (int64_t i = 0; i < args.sequences; ++i) {
    const Sequence s(args, i);
    const int64_t rows = s.queries * group;
    if (rows == 0) continue;
    const int64_t first = s.first(0), last = s.last(s.queries - 1);
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      if (rows <= kFewRows) {
        merged.push_back({i, h, int64_t(parts.size()), 0, rows});
        for (int64_t key = first; key < last; key += kSplit)
          parts.push_back({i, h, key, std::min(last, key + kSplit), int64_t(parts.size())});
        merged.back().end = parts.size();
      } else {
        const int64_t tasks = (rows + kTaskRows - 1) / kTaskRows, each = up((rows + tasks - 1) / tasks, 12);
        for (int64_t row = 0; row < rows; row += each) {
          const int64_t end = std::min(rows, row + each);
          const int64_t seen = s.last((end - 1) / group) - s.first(row / group);
          whole.push_back({i, h, row, end, (end - row) * seen});
        }
      }
    }
  }
  if (!whole.empty())
    over_tasks(whole, [&](const Task& task) {
#if IVL_VECTOR_BYTES == 64
      if constexpr (std::is_same_v<T, bfloat16>)
        if (dot_bf16() && args.k.token % 2 == 0) return attend_rows<T, Product::bf16_pairs>(args, task, output);
#endif
      attend_rows<T>(args, task, output);
    });
  if (merged.empty()) return;
  // Of each part: maximum, total and unfinished result of its rows.
  const int64_t size = kFewRows * (2 + width);
  Scratch<float> partial(std::max<int64_t>(1, parts.size()) * size);
  const auto running = [&](int64_t part) {
    float* p = partial.get() + part * size;
    return Running{p, p + kFewRows, p + 2 * kFewRows, width};
  };
  parallel_for(parts.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) attend_keys<T>(args, parts[part], running(part));
  });
  parallel_for(merged.size(), 16, [&](int64_t begin, int64_t end) {
    Scratch<float> sum(width);
    for (int64_t m = begin; m < end; ++m) {
      const Sequence s(args, merged[m].sequence);
      const int64_t head = merged[m].kv_head * group;
      for (int64_t r = 0; r < merged[m].cost; ++r) {
        float maximum, total;
        start(args, head, group, r, 1, true, {&maximum, &total, sum.get(), width});
        const float sink = maximum;
        for (int64_t part = merged[m].begin; part < merged[m].end; ++part)
          maximum = std::max(maximum, running(part).maximum[r]);
        total *= std::exp2(sink - maximum);
        for (int64_t part = merged[m].begin; part < merged[m].end; ++part) {
          const Running from = running(part);
          const float factor = std::exp2(from.maximum[r] - maximum);
          total += factor * from.total[r];
          for (int64_t i = 0; i < width; i += kLanes)
            store(sum.get() + i, fma(splat(factor), load(from.out + r * width + i), load(sum.get() + i)));
        }
        output.write(s, head, group, r, maximum, total, sum.get());
      }
    }
  });
}

// Gradients of one sequence and key head. With p the weights: ds = p (dout v' - dout . out), dv = p' dout,
// dq = scale ds k, dk = scale ds' q.
template <class T>
void backward_head(const AttentionArgs& args, const AttentionGrads& grads, const Task& task, float* dsinks) {
  const auto [s, group, head, dim, width, rows, queries, keys, values] = Head<T>(args, task.sequence, task.kv_head);
  const int64_t padded = up(dim, kWide), first_token = s.q_batch * args.q_tokens + s.q_first;
  const Rows<T> upstream(grads.grad, s.q_batch, s.q_first, head, group);
  const AttentionSide results{grads.out, 0, args.q_heads * dim, dim};
  const Rows<T> out(results, 0, first_token, head, group);
  Scratch<float> dq(std::max<int64_t>(1, rows * width)), delta(std::max<int64_t>(1, rows)),
      lse(std::max<int64_t>(1, 2 * rows));
  std::memset(dq.get(), 0, rows * width * sizeof(float));
  for (int64_t g = 0; g < group; ++g) dsinks[g] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    vf dots = {};
    for (int64_t i = 0; i < dim; i += kLanes)
      dots = fma(get(upstream.at(r) + i, dim - i), get(out.at(r) + i, dim - i), dots);
    delta[r] = added(dots);
    const int64_t h = head + r % group;
    const float natural = grads.lse[h * args.batch * args.q_tokens + first_token + r / group];
    if (args.sinks) dsinks[r % group] -= std::exp(args.sinks[h] - natural) * delta[r];
    lse[2 * r] = static_cast<float>(natural * kLog2e);
    lse[2 * r + 1] = static_cast<float>(natural * kLog2e - lse[2 * r]);  // what rounding left of it
  }
  const auto write = [&](void* to, int64_t batch, int64_t tokens, int64_t token, int64_t heads, int64_t h,
                         const float* from, float scale) {
    T* row = static_cast<T*>(to) + ((batch * tokens + token) * heads + h) * dim;
    for (int64_t i = 0; i < dim; i += kLanes) {
      const vf v = load(from + i) * splat(scale);
      dim - i >= kLanes ? store(row + i, v) : store_some(row + i, v, dim - i);
    }
  };
  Scratch<float> keys_down(kKeys * dim), values_down(kKeys * dim), keys_across(kKeys * padded);
  Scratch<float> q(kQueries * kStride), dout(kQueries * kStride), q_across(kQueries * padded),
      dout_across(kQueries * padded);
  Scratch<float> weights(kQueries * kStride), changes(kQueries * kStride), dk(kKeys * width), dv(kKeys * width);
  for (int64_t key = 0; key < s.keys; key += kKeys) {
    const int64_t here = std::min(kKeys, s.keys - key);
    pack_transposed(keys.at(key), keys.token, here, dim, keys_down.get());
    pack_transposed(values.at(key), values.token, here, dim, values_down.get());
    std::memset(keys_across.get(), 0, kKeys * padded * sizeof(float));
    pack(keys.at(key), keys.token, here, dim, kKeys, keys_across.get());
    std::memset(dk.get(), 0, kKeys * width * sizeof(float));
    std::memset(dv.get(), 0, kKeys * width * sizeof(float));
    for (int64_t row = 0; row < rows; row += kQueries) {
      const int64_t count = std::min(kQueries, rows - row);
      const int64_t begin = std::max<int64_t>(0, (s.first(row / group) - key) / kWide * kWide);
      const int64_t end = up(std::min(here, s.last((row + count - 1) / group) - key), kWide);
      if (begin >= end) continue;
      for (int64_t r = 0; r < count; ++r) {
        widen(queries.at(row + r), dim, static_cast<float>(args.scale * kLog2e), q.get() + r * kStride);
        widen(upstream.at(row + r), dim, 1, dout.get() + r * kStride);
        pack(queries.at(row + r), 0, 1, dim, kQueries, q_across.get() + r * kWide);
        pack(upstream.at(row + r), 0, 1, dim, kQueries, dout_across.get() + r * kWide);
      }
      for (int64_t j = begin; j < end; j += kWide) {
        tiles<Store::set>(count, kWide, dim, q.get(), keys_down.get() + j * dim, 1, weights.get() + j, kStride);
        tiles<Store::set>(count, kWide, dim, dout.get(), values_down.get() + j * dim, 1, changes.get() + j, kStride);
      }
      for (int64_t r = 0; r < count; ++r) {
        float *p = weights.get() + r * kStride, *ds = changes.get() + r * kStride;
        const int64_t query = (row + r) / group;
        const int64_t from = s.first(query) - key, to = std::min(here, s.last(query) - key);
        for (int64_t j = begin; j < std::min(from, end); ++j) p[j] = -INFINITY, ds[j] = 0;
        for (int64_t j = std::max(begin, to); j < end; ++j) p[j] = -INFINITY, ds[j] = 0;
        if (from >= to) {  // such a row may see no key at all: its lse is -inf
          for (int64_t j = begin; j < end; ++j) p[j] = 0, ds[j] = 0;
          continue;
        }
        for (int64_t j = begin; j < end; j += kLanes) {
          const vf weight = exp2_negative(load(p + j) - splat(lse[2 * (row + r)]) - splat(lse[2 * (row + r) + 1]));
          store(p + j, weight);
          store(ds + j, weight * (load(ds + j) - splat(delta[row + r])));
        }
      }
      for (int64_t i = 0; i < width; i += kWide) {
        tiles<Store::add>(count, width - i, end - begin, changes.get() + begin,
                          keys_across.get() + i * kKeys + begin * kWide, 1, dq.get() + row * width + i, width);
        tiles<Store::add, Product::float32, true>(end - begin, width - i, count, weights.get() + begin,
                                                  dout_across.get() + i * kQueries, 1, dv.get() + begin * width + i,
                                                  width);
        tiles<Store::add, Product::float32, true>(end - begin, width - i, count, changes.get() + begin,
                                                  q_across.get() + i * kQueries, 1, dk.get() + begin * width + i,
                                                  width);
      }
    }
    for (int64_t j = 0; j < here; ++j) {
      const int64_t token = s.k_first + key + j;
      write(grads.dk, s.k_batch, args.k_tokens, token, args.kv_heads, task.kv_head, dk.get() + j * width,
            static_cast<float>(args.scale));
      write(grads.dv, s.k_batch, args.k_tokens, token, args.kv_heads, task.kv_head, dv.get() + j * width, 1);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    write(grads.dq, s.q_batch, args.q_tokens, s.q_first + r / group, args.q_heads, head + r % group,
          dq.get() + r * width, static_cast<float>(args.scale));
}

template <class T>
void attention_backward(const AttentionArgs& args, const AttentionGrads& grads) {
  std::vector<Task> tasks;
  const int64_t group = args.q_heads / args.kv_heads;
  for (int64_t i = 0; i < args.sequences; ++i) {
    const Sequence s(args, i);
    for (int64_t h = 0; h < args.kv_heads; ++h) tasks.push_back({i, h, 0, 0, s.queries * s.keys});
  }
  Scratch<float> dsinks(std::max<int64_t>(1, args.sequences * args.q_heads));
  over_tasks(tasks, [&](const Task& task) {
    backward_head<T>(args, grads, task, dsinks.get() + task.sequence * args.q_heads + task.kv_head * group);
  });
  if (grads.dsinks == nullptr) return;
  for (int64_t h = 0; h < args.q_heads; ++h) {
    grads.dsinks[h] = 0;
    for (int64_t i = 0; i < args.sequences; ++i) grads.dsinks[h] += dsinks[i * args.q_heads + h];
  }
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
