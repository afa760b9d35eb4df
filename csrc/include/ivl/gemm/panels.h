// The weight operand of a product, in panels of kPanel columns, and how they are packed: widened and, with bfloat16
// inputs, two neighbouring k to a unit. A new kind of weight is a new pack().

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int kParts = kLanes == 16 ? 4 : 2;  // vectors of a panel's row
constexpr int64_t kPanel = kParts * kLanes;   // columns of a panel; of gated experts one half are gates, one ups
constexpr int64_t kHalf = kPanel / 2;
constexpr int64_t kAhead = 8;  // rows of column panels to prefetch

// Columns are rows of memory: column j of half h is (h ? second : first) + j * stride, contiguous in k.
template <class T>
struct RowPanel {
  using Element = T;
  static constexpr bool kRows = true;
  const T* first;
  const T* second;
  int64_t stride, first_columns, second_columns;
};

// Element (k, j) is data[k * stride + j]; `paired`: gate j is data[k * stride + 2 j] and up j the one after it.
template <class T>
struct ColumnPanel {
  using Element = T;
  static constexpr bool kRows = false;
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

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
