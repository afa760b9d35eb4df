// The backward of attention for one instruction set; see attention_kernels.h.
#include "ivl/attention_kernels.h"

namespace ivl::IVL_NAMESPACE {
namespace {

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
