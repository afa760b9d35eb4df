// The backward of the mixture-of-experts feed-forward for one instruction set; see foreach_isa.h.
#include "ivl/moe_experts_kernels.h"

namespace ivl::IVL_NAMESPACE {
namespace {

// result [R, C] (row stride C) = sum over m of left[m][r] * right[m][c].
template <class A, class T>
void outer_product(const A* const* left, const A* const* right, int64_t count, int64_t first, int64_t rows,
                   int64_t columns, T* result) {
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

// As with_up_panels, of the transposed matrices: f(source) with the panels of down^T, and f(depth, at, source) with every
// part of gate_up^T and the columns [at, at + depth) of a gradient of `pre` that go through it.
template <class T, class F>
void with_down_turned(const ExpertWeights<T>& experts, ExpertShape shape, int64_t e, int64_t panel, F&& f) {
  const T* const down = experts.down[e];
  if (experts.interleaved) f([&](int64_t p) { return row_panel(down, shape.width, shape.inner, (panel + p) * kPanel); });
  else f([&](int64_t p) { return column_panel(down, shape.inner, shape.inner, (panel + p) * kPanel); });
}
template <class T, class F>
void with_up_turned(const ExpertWeights<T>& experts, ExpertShape shape, int64_t e, int64_t panel, F&& f) {
  const int64_t width = shape.width, inner = shape.inner;
  if (experts.interleaved) {
    f(2 * inner, 0, [&](int64_t p) { return row_panel(experts.gate[e], 2 * inner, width, (panel + p) * kPanel); });
    return;
  }
  for (bool up : {false, true})
    f(inner, up ? inner : 0,
      [&](int64_t p) { return column_panel((up ? experts.up : experts.gate)[e], width, width, (panel + p) * kPanel); });
}
template <class T>
bool turned_in_columns(const ExpertWeights<T>& experts) { return !experts.interleaved; }

// The backward of the experts [first, last), whose rows alone have their `active` and `change`.
template <class T, class A, class Experts>
struct BackwardCall {
  ExpertShape shape;
  GatedActivation options;
  const int32_t* offsets;
  const Experts& experts;
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
    const std::vector<UpTask> tasks = list_tasks(offsets, first, last, inner_panels, turned_in_columns(experts));
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
      with_down_turned(experts, shape, t.expert, t.panel, [&](auto&& source) {
        multiply(grads + t.row, t.rows, width, t.panels, source, finish);
      });
    });
  }

  // Through gate_up, added to the sums over each token's experts; the last experts' turn writes the result.
  void through_gate_up() const {
    const int64_t width = shape.width;
    const Groups groups((width + kPanel - 1) / kPanel,
                        group_panels(turned_in_columns(experts), (offsets[last] - offsets[first]) / (last - first)));
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
        const Scratch<const A*> from(rows);
        with_up_turned(experts, shape, e, panel, [&](int64_t depth, int64_t at, auto&& source) {
          for (int64_t r = 0; r < rows; ++r) from[r] = changes[row + r] + at;
          multiply(from.get(), rows, depth, panels, source, finish);
        });
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
        if (T* bias = to.gate_up_bias)
          column_sums(changes + row, nullptr, rows, 2 * inner, bias + t.expert * 2 * inner);
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

template <class T, class A, class Experts>
void backward_with(const ExpertsArgs<T, A, Experts>& args, const A* grad, const T* pre, const ExpertGradients<T>& to) {
  const ExpertShape& shape = args.shape;
  const Experts& experts = args.experts;
  const int32_t* const offsets = args.offsets;
  const int64_t used = offsets[shape.experts], width = shape.width, inner = shape.inner;
  const Turns turns(offsets, shape.experts, 2048);
  const Scratch<const A*> grads(used), inputs(used);
  const Scratch<A*> actives(used), changes(used);
  const Scratch<int32_t> tokens(used);
  const Scratch<float> scales(used);
  const Scratch<A> change(turns.most * 2 * inner), active(to.down ? turns.most * inner : 0);
  for (int64_t turn = 0; turn < turns.count(); ++turn)
    for (int64_t first = offsets[turns.begin[turn]], row = first; row < offsets[turns.begin[turn + 1]]; ++row) {
      const int32_t slot = args.permutation[row];
      const int64_t place = row - first;
      tokens[row] = static_cast<int32_t>(slot / shape.top_k);
      scales[row] = args.weights[slot];
      inputs[row] = args.hidden + tokens[row] * width;
      grads[row] = grad + tokens[row] * width;
      actives[row] = active.get() + place * inner;
      changes[row] = change.get() + place * 2 * inner;
    }
  const int64_t inner_panels = (inner + kPanel - 1) / kPanel;
  const Scratch<float> dots(to.weights ? used * inner_panels : 0);
  const bool in_place = std::is_same_v<T, float> || !to.hidden || turns.count() == 1;
  const Scratch<float> hidden_sums(in_place ? 0 : shape.tokens * width);
  BackwardCall<T, A, Experts> call{shape, args.activation, offsets, experts, pre, to, grads.get(), inputs.get(), actives.get(),
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
      const int64_t row = args.inverse[slot];
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

template <class T, class Experts>
void backward(const ExpertsArgs<T, T, Experts>& args, const T* grad, const T* pre, const ExpertGradients<T>& to) {
  if constexpr (std::is_same_v<T, float>) {
    return backward_with(args, grad, pre, to);
  } else {
#if IVL_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, bfloat16>)
      if (use_units(args.shape)) return backward_with(args, grad, pre, to);
#endif
    const int64_t size = args.shape.tokens * args.shape.width;
    const Scratch<float> wide_grad(size), wide_hidden(size);
    widen_all(grad, size, wide_grad.get());
    widen_all(args.hidden, size, wide_hidden.get());
    const float *const hidden = wide_hidden.get(), *const wide = wide_grad.get();
    backward_with(args.with_hidden(hidden), wide, pre, to);
  }
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
