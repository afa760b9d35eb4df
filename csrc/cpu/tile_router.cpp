#include "ivl/tile_router.h"

#include <memory>

#define IVL_KERNELS "ivl/tile_router_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {
namespace {

constexpr int64_t kTasks = 32;
constexpr int64_t kSplitRows = 128;  // at least, so that partial sums stay small beside the rows

// How many pieces the rows of a tile are cut into. Depends on the shape only: results do not on the threads.
int64_t splits_of(int64_t tiles, int64_t rows) {
  const int64_t wanted = (kTasks + tiles - 1) / std::max<int64_t>(1, tiles);
  return std::clamp<int64_t>(std::min(wanted, rows / kSplitRows), 1, kTasks);
}

struct Range {
  int64_t begin, count;
};

// Cut at multiples of 32 rows, the kernels' blocks.
Range split_rows(int64_t rows, int64_t splits, int64_t s) {
  const int64_t blocks = (rows + 31) / 32;
  const int64_t begin = blocks * s / splits * 32, end = std::min(rows, blocks * (s + 1) / splits * 32);
  return {begin, end - begin};
}

// Queries of all tiles in the layout of the score kernel; a query shared by all tiles is packed once.
template <class A>
struct PackedQueries {
  std::vector<A> data;
  int64_t step;

  PackedQueries(const A* u, int64_t tile_stride, int64_t tiles, int64_t heads, int64_t width) {
    const int64_t each = IVL_CALL(padded_heads<A>, heads) * width, count = tile_stride ? tiles : 1;
    step = tile_stride ? each : 0;
    data.resize(each * count);
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        IVL_CALL(pack_queries<A>, u + t * tile_stride, heads, width, &data[t * each]);
    });
  }
  const A* of(int64_t t) const { return data.data() + t * step; }
};

}  // namespace

template <class T>
void tile_pool(const PoolArgs<T>& args, Sum<T>* pooled, Sum<T>* lse) {
  using A = Sum<T>;
  const Tiles<const T> z = args.z;
  const int64_t heads = args.heads;
  if (z.tiles == 0) return;
  const PackedQueries<A> queries(args.u, args.query_stride, z.tiles, heads, z.width);
  const int64_t padded = IVL_CALL(padded_width<A>, z.width), all = IVL_CALL(padded_heads<A>, heads);
  const int64_t splits = splits_of(z.tiles, z.rows), count = z.tiles * splits;
  std::vector<A> largest(count * all), denominator(count * all);
  const std::unique_ptr<A[]> sums(new A[count * heads * padded]);
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / splits;
      const Range r = split_rows(z.rows, splits, i % splits);
      IVL_CALL(pool_range, z.row(t, r.begin), z.row_stride, r.count, z.width, queries.of(t), heads,
               &sums[i * heads * padded], &largest[i * all], &denominator[i * all]);
    }
  });
  parallel_for(z.tiles * heads, 4, [&](int64_t begin, int64_t end) {
    std::vector<A> factor(splits);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / heads, h = i % heads, first = t * splits;
      A top = largest[first * all + h], sum = 0;
      for (int64_t s = 1; s < splits; ++s) top = std::max(top, largest[(first + s) * all + h]);
      for (int64_t s = 0; s < splits; ++s) {
        factor[s] = std::exp(largest[(first + s) * all + h] - top);
        sum += factor[s] * denominator[(first + s) * all + h];
      }
      for (A& f : factor) f /= sum;
      IVL_CALL(combine_row<A>, &sums[(first * heads + h) * padded], heads * padded, factor.data(), splits, z.width,
               pooled + i * z.width);
      lse[i] = top + std::log(sum);
    }
  });
}

template <class T>
void tile_pool_backward(const PoolArgs<T>& args, const Sum<T>* pooled, const Sum<T>* lse, const Sum<T>* grad,
                        Sum<T>* du, Tiles<T> dz) {
  using A = Sum<T>;
  const Tiles<const T> z = args.z;
  const int64_t heads = args.heads;
  if (z.tiles == 0) return;
  const PackedQueries<A> queries(args.u, args.query_stride, z.tiles, heads, z.width);
  const PackedQueries<A> grads(grad, heads * z.width, z.tiles, heads, z.width);
  const int64_t padded = IVL_CALL(padded_width<A>, z.width), splits = splits_of(z.tiles, z.rows),
                count = z.tiles * splits;
  std::vector<A> delta(z.tiles * heads), both(z.tiles * 2 * heads * padded);
  const std::unique_ptr<A[]> sums(new A[count * heads * padded]);
  parallel_for(z.tiles * heads, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / heads, h = i % heads;
      const A* g = grad + i * z.width;
      const A* p = pooled + i * z.width;
      double sum = 0;
      for (int64_t c = 0; c < z.width; ++c) sum += double(g[c]) * double(p[c]);
      delta[i] = static_cast<A>(sum);
      A* rows = &both[t * 2 * heads * padded];
      std::copy(g, g + z.width, rows + h * padded);
      std::copy_n(args.u + t * args.query_stride + h * z.width, z.width, rows + (heads + h) * padded);
    }
  });
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    std::vector<const A*> rows(2 * heads);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / splits;
      const Range r = split_rows(z.rows, splits, i % splits);
      for (int64_t h = 0; h < 2 * heads; ++h) rows[h] = &both[(t * 2 * heads + h) * padded];
      IVL_CALL(pool_backward_range, z.row(t, r.begin), z.row_stride, r.count, z.width, queries.of(t), grads.of(t),
               heads, lse + t * heads, &delta[t * heads], rows.data(), &sums[i * heads * padded],
               dz.data ? dz.row(t, r.begin) : nullptr, dz.row_stride);
    }
  });
  parallel_for(z.tiles * heads, 4, [&](int64_t begin, int64_t end) {
    const std::vector<A> one(splits, A(1));
    for (int64_t i = begin; i < end; ++i)
      IVL_CALL(combine_row<A>, &sums[((i / heads) * splits * heads + i % heads) * padded], heads * padded, one.data(),
               splits, z.width, du + i * z.width);
  });
}

template <class T>
void few_rows_linear(const Sum<T>* x, const GroupedWeights<T>& weights, const T* bias, Sum<T>* out) {
  using A = Sum<T>;
  const int64_t rows = weights.rows, groups = weights.groups, outputs = weights.outputs, width = weights.width;
  if (rows == 0 || outputs == 0) return;
  const int64_t each = IVL_CALL(packed_inputs<A>, rows, width), per_group = outputs / groups;
  std::vector<A> packed(groups * each), b(outputs);
  if (bias) IVL_CALL(widen_row, bias, outputs, b.data());
  parallel_for(groups, 4, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      IVL_CALL(pack_inputs<A>, x + g * width, groups * width, rows, width, &packed[g * each]);
  });
  const int64_t grain = std::max<int64_t>(4, 65536 / std::max<int64_t>(1, width * rows));
  parallel_for(outputs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end;) {
      const int64_t g = n / per_group, stop = std::min(end, (g + 1) * per_group);
      IVL_CALL(linear_range, weights.w, weights.stride, b.data(), &packed[g * each], rows, width, n, stop, out, outputs);
      n = stop;
    }
  });
}

template <class T>
void few_rows_linear_transposed(const Sum<T>* x, const GroupedWeights<T>& weights, Sum<T>* out) {
  constexpr int64_t kColumns = 512;
  const int64_t groups = weights.groups, inputs = weights.outputs, width = weights.width, stride = weights.stride;
  const int64_t each = inputs / groups, parts = (width + kColumns - 1) / kColumns;
  parallel_for(groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / parts, first = i % parts * kColumns;
      IVL_CALL(transposed_range, x + g * each, inputs, weights.w + g * each * stride, stride, weights.rows, each, first,
               std::min(width, first + kColumns), out + g * width, groups * width);
    }
  });
}

#define IVL_INSTANTIATE(T) \
  template void tile_pool(const PoolArgs<T>&, Sum<T>*, Sum<T>*); \
  template void tile_pool_backward(const PoolArgs<T>&, const Sum<T>*, const Sum<T>*, const Sum<T>*, Sum<T>*, \
                                   Tiles<T>); \
  template void few_rows_linear(const Sum<T>*, const GroupedWeights<T>&, const T*, Sum<T>*); \
  template void few_rows_linear_transposed(const Sum<T>*, const GroupedWeights<T>&, Sum<T>*);

IVL_FLOAT_TYPES(IVL_INSTANTIATE)

}  // namespace ivl
