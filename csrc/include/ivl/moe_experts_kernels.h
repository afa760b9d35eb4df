// Kernels of the mixture-of-experts feed-forward for one instruction set; see foreach_isa.h.
#include "ivl/activations.h"
#include "ivl/gemm/multiply.h"

namespace ivl::IVL_NAMESPACE {
namespace {

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
      multiply(from, rows, shape.width, panels, source, finish, after);
    } else {
      const auto source = [&](int64_t p) {
        const int64_t column = (panel + p) * kHalf, n = std::min(kHalf, inner - column), start = column * shape.width;
        return RowPanel<T>{experts.gate[e] + start, experts.up[e] + start, shape.width, n, n};
      };
      multiply(from, rows, shape.width, panels, source, finish, after);
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
      multiply(from, rows, inner, panels, source, finish, after);
    } else {
      const auto source = [&](int64_t p) { return row_panel(experts.down[e], inner, width, (panel + p) * kPanel); };
      multiply(from, rows, inner, panels, source, finish, after);
    }
  }
};

// Some rows of an expert times some panels.
struct UpTask {
  int64_t expert, row, rows, panel, panels;
};

// Tasks for all rows of the experts [first, last); `columns`: whether weights are column panels.
inline std::vector<UpTask> list_tasks(const int32_t* offsets, int64_t first, int64_t last, int64_t panels,
                                      bool columns) {
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
        multiply(grads + t.row, t.rows, width, t.panels, source, finish);
      } else {
        const auto source = [&](int64_t p) { return column_panel(down, inner, inner, (t.panel + p) * kPanel); };
        multiply(grads + t.row, t.rows, width, t.panels, source, finish);
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
          multiply(changes + row, rows, 2 * inner, panels, source, finish);
          continue;
        }
        const Scratch<const A*> from(rows);
        for (bool up : {false, true}) {
          for (int64_t r = 0; r < rows; ++r) from[r] = changes[row + r] + (up ? inner : 0);
          const auto source = [&](int64_t p) {
            return column_panel((up ? experts.up : experts.gate)[e], width, width, (panel + p) * kPanel);
          };
          multiply(from.get(), rows, inner, panels, source, finish);
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
              const int32_t* permutation, const int32_t* inverse, const int32_t* offsets,
              const ExpertWeights<T>& experts, const T* pre, const ExpertGradients<T>& to) {
  if constexpr (std::is_same_v<T, float>) {
    return backward_with<T, float>(shape, options, grad, hidden, weights, permutation, inverse, offsets, experts, pre,
                                   to);
  } else {
#if IVL_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, bfloat16>)
      if (use_units(shape))
        return backward_with<T, T>(shape, options, grad, hidden, weights, permutation, inverse, offsets, experts, pre,
                                   to);
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
