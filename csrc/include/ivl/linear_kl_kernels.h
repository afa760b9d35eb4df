// Kernels of the divergence between two heads for one instruction set.
#include "ivl/linear_logprob_kernels.h"

namespace ivl::IVL_NAMESPACE {
namespace {

// Of the logits of a row of both heads, or of some of them; `cross` is the sum of e^(t - teacher max) (t - z) over the
// teacher's logits t and the student's z.
struct PairPartial {
  float max, sum, teacher_max, teacher_sum, cross;
};

inline void rescale(float most, float& max, float& sum, float& other) {
  if (most <= max) return;
  const float scale = sum != 0 ? std::exp(max - most) : 0.0f;
  sum *= scale;
  other *= scale;
  max = most;
}

// Adds the logits z and t of a panel's row, `columns` of them valid.
inline void add(PairPartial& partial, const float* z, const float* t, int64_t columns) {
  vf student[kParts], teacher[kParts], top = splat(kLowest), teacher_top = splat(kLowest);
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
    student[p] = load(z + p * kLanes), teacher[p] = load(t + p * kLanes);
    for (int i = 0; columns < kPanel && i < kLanes; ++i)
      if (p * kLanes + i >= columns) student[p][i] = teacher[p][i] = -INFINITY;
    top = student[p] > top ? student[p] : top;
    teacher_top = teacher[p] > teacher_top ? teacher[p] : teacher_top;
  }
  float none = 0;
  rescale(largest(top), partial.max, partial.sum, none);
  rescale(largest(teacher_top), partial.teacher_max, partial.teacher_sum, partial.cross);
  vf sums = {}, teacher_sums = {}, crosses = {};
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
    const vf e = exp_negative(teacher[p] - partial.teacher_max);
    const vi nothing = e == vf{};
    sums += exp_negative(student[p] - partial.max);
    teacher_sums += e;
    crosses += nothing ? vf{} : e * (teacher[p] - student[p]);
  }
  partial.sum += sum(sums);
  partial.teacher_sum += sum(teacher_sums);
  partial.cross += sum(crosses);
}

// A row's results from its blocks, in their order.
inline void merge(const PairPartial* blocks, int64_t count, int64_t stride, float* kl, float* lse, float* teacher_lse) {
  float most = kLowest, teacher_most = kLowest;
  for (int64_t b = 0; b < count; ++b) {
    most = std::max(most, blocks[b * stride].max);
    teacher_most = std::max(teacher_most, blocks[b * stride].teacher_max);
  }
  double total = 0, teacher_total = 0, cross = 0;
  for (int64_t b = 0; b < count; ++b) {
    const PairPartial& partial = blocks[b * stride];
    total += std::exp(double{partial.max} - most) * partial.sum;
    const double scale = std::exp(double{partial.teacher_max} - teacher_most);
    teacher_total += scale * partial.teacher_sum;
    cross += scale * partial.cross;
  }
  const double own = most + std::log(total), other = teacher_most + std::log(teacher_total);
  const double found = cross / teacher_total - other + own;
  *kl = static_cast<float>(found < 0 ? 0 : found);
  *lse = static_cast<float>(own);
  *teacher_lse = static_cast<float>(other);
}

template <class A, class T, class W>
void kl_in(const KlArgs& args) {
  const Head &student = args.student, &teacher = args.teacher;
  const int64_t vocabulary = student.vocabulary, blocks = (vocabulary + kBlockColumns - 1) / kBlockColumns;
  const int64_t chunks = (student.rows + kBlockRows - 1) / kBlockRows;
  const auto panel_at = [&](const Head& head, int64_t column) {
    return row_panel(static_cast<const W*>(head.weight), head.weight_stride, vocabulary, column);
  };
  const PaddedBias none(student);
  const Transform transform = none.transform(student);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = student.rows * chunk / chunks, count = student.rows * (chunk + 1) / chunks - first;
    const auto operand = [&](const Head& head) {
      return Operand<A>(static_cast<const T*>(head.x) + first * head.x_stride, head.x_stride, count, head.width);
    };
    const Operand<A> x = operand(student), teacher_x = operand(teacher);
    const Scratch<PairPartial> partials(blocks * count);
    run_small_tasks(blocks, [&](int64_t block, int64_t then) {
      PairPartial* const partial = partials.get() + block * count;
      std::fill_n(partial, count, PairPartial{kLowest, 0, kLowest, 0, 0});
      const Scratch<float> logits(count * kPanel);
      const int64_t end = std::min(vocabulary, (block + 1) * kBlockColumns);
      for (int64_t column = block * kBlockColumns; column < end; column += kPanel) {
        const int64_t columns = std::min(kPanel, end - column);
        const int64_t next = column + kPanel < end ? column + kPanel : then * kBlockColumns;
        multiply(
            x.rows.get(), count, student.width, 1, [&](int64_t) { return panel_at(student, column); },
            [&](int64_t row, int64_t rows, int64_t, const float* y) {
              for (int64_t i = 0; i < rows * kPanel; i += kLanes)
                store(logits.get() + row * kPanel + i, transform(load(y + i), 0));
            },
            start(panel_at(teacher, column), 0), 0);
        multiply(
            teacher_x.rows.get(), count, teacher.width, 1, [&](int64_t) { return panel_at(teacher, column); },
            [&](int64_t row, int64_t rows, int64_t, const float* y) {
              for (int64_t r = row; r < row + rows; ++r, y += kPanel) {
                float t[kPanel];
                for (int64_t j = 0; j < kPanel; j += kLanes) store(t + j, transform(load(y + j), 0));
                add(partial[r], logits.get() + r * kPanel, t, columns);
              }
            },
            next < vocabulary ? start(panel_at(student, next), 0) : nullptr, 0);
      }
    });
    parallel_for(count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        merge(partials.get() + r, blocks, count, args.kl + first + r, args.lse + first + r,
              args.teacher_lse + first + r);
    });
  }
}

// p - q of gap = log q - log p: by expm1's series where they are close.
inline vf difference(vf p, vf q, vf gap) {
  vf series = splat(1.0f / 362880);
  for (const float one : {1.0f / 40320, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f})
    series = fma(series, gap, splat(one));
  const vi close = (gap < 0.5f) & (gap > -0.5f);
  return close ? -p * series * gap : p - q;
}

template <class A, class T, class W>
void kl_backward_in(const KlBackwardArgs& args) {
  const Head &student = args.student, &teacher = args.teacher;
  const int64_t count = student.rows, vocabulary = student.vocabulary;
  const PaddedBias none(student);
  const Transform transform = none.transform(student);
  const Operand<A> x(static_cast<const T*>(student.x), student.x_stride, count, student.width);
  const int64_t others = args.kept ? 0 : count;
  const Operand<A> teacher_x(static_cast<const T*>(teacher.x), teacher.x_stride, others, teacher.width);
  if (args.kl) std::memset(args.kl, 0, count * sizeof(float));
  head_gradients<A, T, W>(student, x, args.gradients, [&](const GradientTile<A>& tile, int64_t first, int64_t words) {
    // both(r, j, whole, n, z, t): the logits of row + r and column + j.
    const auto fill_from = [&](int64_t row, int64_t rows, int64_t column, int64_t columns, auto&& both) {
      vf divergence[kTileRows] = {};
      fill(tile, row, rows, column, columns, [&](int64_t r, int64_t j, auto whole, int64_t n) {
        vf z, t;
        both(r, j, whole, n, z, t);
        const vf log_p = z - args.lse[row + r], log_q = t - args.teacher_lse[row + r], gap = log_q - log_p;
        const vf p = exp_negative(log_p), q = exp_negative(log_q);
        vf term = q * gap;
        for (int64_t i = 0; i < kLanes; ++i)
          if (i >= n || q[i] == 0) term[i] = 0;
        divergence[r] += term;
        return difference(p, q, gap) * (args.grad[row + r] * student.inverse_temperature);
      });
      for (int64_t r = 0; args.kl && r < rows; ++r) args.kl[row + r] += sum(divergence[r]);
    };
    if (args.kept)
      return fill_all(tile, words, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
        const int64_t at = row * vocabulary + first + column;
        fill_from(row, rows, column, columns, [&](int64_t r, int64_t j, auto whole, int64_t n, vf& z, vf& t) {
          z = load(args.kept + at + r * vocabulary + j, whole, n);
          t = load(args.teacher_kept + at + r * vocabulary + j, whole, n);
        });
      });
    const int64_t stride = panel_count(words) * kPanel;
    const Scratch<float> logits(count * stride);
    words_product<A, W>(x, student, first, words, [&](int64_t row, int64_t n, int64_t column, int64_t, const float* y) {
      for (int64_t r = row; r < row + n; ++r, y += kPanel)
        std::memcpy(logits.get() + r * stride + column, y, kPanel * sizeof(float));
    });
    words_product<A, W>(
        teacher_x, teacher, first, words,
        [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* y) {
          fill_from(row, rows, column, columns, [&](int64_t r, int64_t j, auto, int64_t, vf& z, vf& t) {
            z = transform(load(logits.get() + (row + r) * stride + column + j), 0);
            t = transform(load(y + r * kPanel + j), 0);
          });
        });
  });
  if (args.kl)
    for (int64_t r = 0; r < count; ++r) args.kl[r] = args.kl[r] < 0 ? 0 : args.kl[r];
}

// Whether bfloat16 operands of both heads are multiplied as they are.
template <class T, class W>
bool as_bfloat16(const Head& student, const Head& teacher) {
  return as_bfloat16<T, W>(student) && as_bfloat16<T, W>(teacher);
}

template <class E>
void linear_kl(const KlArgs& args) {
  using T = typename E::X;
  using W = typename E::Weight;
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<W, bfloat16> && IVL_VECTOR_BYTES == 64)
    if (as_bfloat16<T, W>(args.student, args.teacher)) return kl_in<bfloat16, T, W>(args);
  kl_in<float, T, W>(args);
}

template <class E>
void linear_kl_backward(const KlBackwardArgs& args) {
  using T = typename E::X;
  using W = typename E::Weight;
  if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<W, bfloat16> && IVL_VECTOR_BYTES == 64)
    if (as_bfloat16<T, W>(args.student, args.teacher)) return kl_backward_in<bfloat16, T, W>(args);
  kl_backward_in<float, T, W>(args);
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
