// Rows times panels of weights, by the form of tiles.h that suits their number. All accumulate in float32.
// A is the type of the inputs: float, or bfloat16 when the processor multiplies that itself; then two neighbouring k
// form one 32-bit unit, held in a float's bits, and vectors of units are multiplied by dot products.
#include "ivl/gemm/panels.h"
#include "ivl/gemm/tiles.h"

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int64_t kDotBytes = 2048;  // of a row, in a block of several tiles of dot products
constexpr int64_t kDotLimit = 64;    // rows that dot products may have

// Packed weights [depth, panels * kPanel] and sums [rows, panels * kPanel] together fit the L2 cache; `step` rows of a
// panel are packed before the next panel's.
struct Blocking {
  int64_t depth, rows, step;
};
template <class Panel>
constexpr Blocking kBlocking = Panel::kRows ? Blocking{1024, 1152, 1024} : Blocking{256, 256, 2};

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

template <class Source>
using PanelOf = std::invoke_result_t<Source&, int64_t>;
template <class Source>
using ElementOf = typename PanelOf<Source>::Element;

template <class A, class Source, class Finish>
void multiply_packed(const A* const* rows, int64_t count, int64_t depth, int64_t panels, Source& source, Finish& finish,
                     const ElementOf<Source>* after) {
  using Panel = PanelOf<Source>;
  using T = typename Panel::Element;
  constexpr Blocking block = kBlocking<Panel>;
  constexpr int64_t unit = std::is_same_v<A, bfloat16> ? 2 : 1;
  const int64_t chunks = (count + block.rows - 1) / block.rows, chunk = (count + chunks - 1) / chunks;
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
          float* c = sums.get() + (deep == depth ? 0 : (p * chunk + begin) * kPanel);
          const Fetch fetch = next ? share(front, next, panels, tile * panels + p, tiles * panels, unit) : Fetch{};
          packed_rows<A>(size, a, packed.get() + p * units * kPanel, units, c, k > 0, fetch);
          if (k + deep == depth) finish(first + begin, size, p, c);
        }
      }
    }
  }
}

template <class A, class Source, class Finish>
void multiply_dot(const A* const* rows, int64_t count, int64_t depth, int64_t panels, Source& source, Finish& finish,
                  const ElementOf<Source>* after) {
  using T = ElementOf<Source>;
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

template <class A, class Source, class Finish>
void multiply_stream(const A* const* rows, int64_t count, int64_t depth, int64_t panels, int64_t columns,
                     Source& source, Finish& finish, const ElementOf<Source>* after) {
  const auto front = source(0);
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
  const Scratch<float> c(count * kPanel);
  for (int64_t p = 0; p < panels; ++p) {
    const ColumnPanel<float> natural{nullptr, 0, source(p).columns, front.paired};
    for (int64_t r = 0; r < count; ++r)
      pack_row(natural, sums.get() + r * columns + p * kPanel, c.get() + r * kPanel);
    finish(0, count, p, c.get());
  }
}

// Rows [count] of length `depth` times the panels source(0) ... source(panels - 1); finish(row, rows, panel, c) gets
// every tile of sums, c [rows, kPanel]. `after`, when not null, is where the weights of the next product begin: they
// are fetched while the last are multiplied. Up to `few` rows are not packed; 0: every row's sums are in the same
// order, whatever the number of rows.
template <class A, class Source, class Finish>
void multiply(const A* const* rows, int64_t count, int64_t depth, int64_t panels, Source&& source, Finish&& finish,
              const ElementOf<Source>* after = nullptr, int64_t few = kDotLimit) {
  if (count <= few) {
    if constexpr (PanelOf<Source>::kRows) {
      if (depth % (std::is_same_v<A, bfloat16> ? 2 * kLanes : kLanes) == 0)
        return multiply_dot(rows, count, depth, panels, source, finish, after);
    } else {
      int64_t columns = 0;
      for (int64_t p = 0; p < panels; ++p) columns += source(p).columns;
      if (count <= kStreamRows && columns % (source(0).paired ? 2 * kLanes : kLanes) == 0)
        return multiply_stream(rows, count, depth, panels, columns, source, finish, after);
    }
  }
  multiply_packed(rows, count, depth, panels, source, finish, after);
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
