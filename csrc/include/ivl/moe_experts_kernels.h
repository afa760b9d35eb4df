// The forward of the mixture-of-experts feed-forward for one instruction set; see foreach_isa.h.
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

// How the products read an expert's matrices: f(source) with the panels of gate and up, or of down, from `panel` on, and
// where those begin.
template <class T, class F>
void with_up_panels(const ExpertWeights<T>& experts, ExpertShape shape, int64_t e, int64_t panel, F&& f) {
  const int64_t inner = shape.inner, width = shape.width;
  if (experts.interleaved) {
    f([&](int64_t p) { return column_panel(experts.gate[e], 2 * inner, 2 * inner, (panel + p) * kPanel, true); });
  } else {
    f([&](int64_t p) {
      const int64_t column = (panel + p) * kHalf, n = std::min(kHalf, inner - column), start = column * width;
      return RowPanel<T>{experts.gate[e] + start, experts.up[e] + start, width, n, n};
    });
  }
}
template <class T, class F>
void with_down_panels(const ExpertWeights<T>& experts, ExpertShape shape, int64_t e, int64_t panel, F&& f) {
  const T* const down = experts.down[e];
  if (experts.interleaved)
    f([&](int64_t p) { return column_panel(down, shape.width, shape.width, (panel + p) * kPanel); });
  else f([&](int64_t p) { return row_panel(down, shape.inner, shape.width, (panel + p) * kPanel); });
}
template <class T>
const T* up_start(const ExpertWeights<T>& experts, ExpertShape shape, int64_t e, int64_t panel) {
  return experts.gate[e] + panel * (experts.interleaved ? kPanel : kHalf * shape.width);
}
template <class T>
const T* down_start(const ExpertWeights<T>& experts, ExpertShape shape, int64_t e, int64_t panel) {
  return experts.down[e] + panel * kPanel * (experts.interleaved ? 1 : shape.inner);
}
template <class T>
bool in_columns(const ExpertWeights<T>& experts) { return experts.interleaved; }

template <class Experts>
using ElementOfExperts = std::remove_cvref_t<decltype(*up_start(std::declval<const Experts&>(), {}, 0, 0))>;

template <class T, class A, class Experts>
struct ForwardCall {
  ExpertShape shape;
  GatedActivation options;
  const Experts& experts;
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

  void up(int64_t e, int64_t row, int64_t rows, int64_t panel, int64_t panels,
          const ElementOfExperts<Experts>* after) const {
    const auto finish = [&](int64_t r, int64_t n, int64_t p, const float* c) {
      finish_up(e, row + r, n, (panel + p) * kHalf, c);
    };
    with_up_panels(experts, shape, e, panel, [&](auto&& source) {
      multiply(inputs + row, rows, shape.width, panels, source, finish, after);
    });
  }

  // sums += weight * (rows times the panels of `down`)
  void down(int64_t e, const A* const* from, int64_t rows, int64_t panel, int64_t panels, const int32_t* tokens,
            const float* weights, const TokenSums& sums, const ElementOfExperts<Experts>* after) const {
    const int64_t width = shape.width;
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
    with_down_panels(experts, shape, e, panel, [&](auto&& source) {
      multiply(from, rows, shape.inner, panels, source, finish, after);
    });
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

template <class T, class A, class Experts>
void forward_with(const ExpertsArgs<T, A, Experts>& args, T* out, T* pre) {
  using Element = ElementOfExperts<Experts>;
  const ExpertShape& shape = args.shape;
  const Experts& experts = args.experts;
  const bool columns = in_columns(experts);
  const int32_t* const offsets = args.offsets;
  const int64_t used = offsets[shape.experts], width = shape.width, inner = shape.inner;
  const Turns turns(offsets, shape.experts, 4096);
  const Scratch<const A*> inputs(used);
  const Scratch<A*> actives(used);
  const Scratch<int32_t> tokens(used);
  const Scratch<float> scales(used);
  const Scratch<A> active(turns.most * inner);
  for (int64_t turn = 0; turn < turns.count(); ++turn)
    for (int64_t first = offsets[turns.begin[turn]], row = first; row < offsets[turns.begin[turn + 1]]; ++row) {
      const int32_t slot = args.permutation[row];
      tokens[row] = static_cast<int32_t>(slot / shape.top_k);
      scales[row] = args.weights[slot];
      inputs[row] = args.hidden + tokens[row] * width;
      actives[row] = active.get() + (row - first) * inner;
    }
  const bool in_place = std::is_same_v<T, float> || turns.count() == 1;
  const Scratch<float> between(in_place ? 0 : shape.tokens * width);
  float* const kept = kept_sums(out, between);
  const ForwardCall<T, A, Experts> call{shape, args.activation, experts, inputs.get(), actives.get(), pre};

  for (int64_t turn = 0; turn < turns.count(); ++turn) {
    const int64_t first = turns.begin[turn], last = turns.begin[turn + 1];
    const std::vector<UpTask> tasks =
        list_tasks(offsets, first, last, (inner + kHalf - 1) / kHalf, columns);
    const int64_t count = tasks.size();
    run_small_tasks(count, [&](int64_t i, int64_t then) {
      const UpTask& t = tasks[i];
      const Element* after = nullptr;
      if (then < count) after = up_start(experts, shape, tasks[then].expert, tasks[then].panel);
      call.up(t.expert, t.row, t.rows, t.panel, t.panels, after);
    });

    const int64_t average = (offsets[last] - offsets[first]) / (last - first);
    const Groups groups((width + kPanel - 1) / kPanel, group_panels(columns, average));
    run_tasks(groups.count, [&](int64_t g) {
      const int64_t panel = groups.begin(g), panels = groups.begin(g + 1) - panel;
      const TokenSums sums(shape.tokens, width, panel, panels, first ? kept : nullptr);
      for (int64_t e = first, then; e < last; e = then) {
        for (then = e + 1; then < last && offsets[then] == offsets[then + 1];) ++then;
        const int64_t row = offsets[e], rows = offsets[e + 1] - row;
        const Element* after = nullptr;
        if (then < last) after = down_start(experts, shape, then, panel);
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

template <class T, class Experts>
void forward(const ExpertsArgs<T, T, Experts>& args, T* out, T* pre) {
  if constexpr (std::is_same_v<T, float>) {
    return forward_with(args, out, pre);
  } else {
#if IVL_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, bfloat16>)
      if (use_units(args.shape)) return forward_with(args, out, pre);
#endif
    const int64_t size = args.shape.tokens * args.shape.width;
    const Scratch<float> wide(size);
    widen_all(args.hidden, size, wide.get());
    forward_with(args.with_hidden(static_cast<const float*>(wide.get())), out, pre);
  }
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
