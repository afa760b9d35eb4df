// Attention for one instruction set, block by block with an online softmax: no [queries, keys] matrix in memory.
//
// A row is a query of one head; the rows of a key head are its queries with all the heads that share it, so that keys
// are never repeated. Both products are tiles of c [R, kWide] = a [R, depth] b [depth, kWide]: a in rows kStride apart,
// b in panels [depth][kWide] made from keys or values. Scores are in units of log2, and the softmax is of powers of 2.
#include "ivl/attention_tiles.h"

namespace ivl::IVL_NAMESPACE {
namespace {

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

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
