#include "ivl/linear_kl.h"

#include <optional>
#include <type_traits>

#include "tensor.h"

namespace ivl {
namespace {

using Optional = std::optional<Tensor>;

// Calls f with the element types of x and of the weight.
template <class F>
void dispatch_head(const Tensor& x, const Tensor& weight, F&& f) {
  dispatch_widened(x.scalar_type(), [&](auto zero) {
    using X = decltype(zero);
    if (weight.scalar_type() == ScalarType::Float) return f(Elements<X, float>{});
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight: expected the dtype of x or float32");
    f(Elements<X, X>{});
  });
}

Head head(const Tensor& x, const Tensor& weight, const Optional& bias, double softcap, double temperature) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "expected x [N, H], weight [V, H]");
  STD_TORCH_CHECK(x.stride(1) == 1 && weight.stride(1) == 1, "expected rows of adjacent elements");
  return {x.size(0),
          x.size(1),
          weight.size(0),
          x.const_data_ptr(),
          x.stride(0),
          weight.const_data_ptr(),
          weight.stride(0),
          bias ? in<float>(*bias) : nullptr,
          static_cast<float>(softcap),
          static_cast<float>(1 / temperature)};
}

const int64_t* targets_of(const Tensor& targets, const Head& head) {
  const int64_t* data = in<int64_t>(targets);
  STD_TORCH_CHECK(targets.numel() == head.rows, "targets: expected one a row");
  for (int64_t r = 0; r < head.rows; ++r)
    STD_TORCH_CHECK(data[r] >= 0 && data[r] < head.vocabulary, "targets: got ", data[r], ", expected tokens in [0, ",
                    head.vocabulary, ")");
  return data;
}

// Where a result goes; null when the caller does not want it and gave an empty tensor.
template <class T>
T* wanted(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

void forward(Tensor x, Tensor weight, Optional bias, Tensor targets, double temperature, double softcap, Tensor logp,
             Tensor lse, Tensor entropy, Tensor mean, Tensor kept) {
  const Head h = head(x, weight, bias, softcap, temperature);
  const LogprobArgs args = {h,
                            targets_of(targets, h),
                            out<float>(logp),
                            out<float>(lse),
                            out<float>(entropy),
                            out<float>(mean),
                            wanted<float>(kept)};
  dispatch_head(x, weight,
                [&](auto elements) { linear_logprob<decltype(elements)>(args); });
}

// grads [4, N]: of logp, lse, entropy and mean logit.
void backward(Tensor grads, Tensor x, Tensor weight, Optional bias, Tensor targets, Tensor logp, Tensor lse,
              Tensor entropy, Tensor kept, double temperature, double softcap, Tensor dx, Tensor dweight, Tensor dbias,
              bool accumulate) {
  const Head h = head(x, weight, bias, softcap, temperature);
  const float* grad = in<float>(grads);
  const LogprobBackwardArgs args = {h,
                                    targets_of(targets, h),
                                    in<float>(logp),
                                    in<float>(lse),
                                    in<float>(entropy),
                                    kept.numel() ? in<float>(kept) : nullptr,
                                    grad,
                                    grad + h.rows,
                                    grad + 2 * h.rows,
                                    grad + 3 * h.rows,
                                    {wanted<void>(dx), wanted<void>(dweight), wanted<float>(dbias), accumulate}};
  STD_TORCH_CHECK(!accumulate || weight.scalar_type() == ScalarType::Float, "accumulate: expected a float32 weight");
  dispatch_head(x, weight,
                [&](auto elements) { linear_logprob_backward<decltype(elements)>(args); });
}

// The other head of a divergence: as many rows and words, and the element types of the first.
Head teacher_head(const Tensor& x, const Tensor& weight, double temperature, const Head& student, const Tensor& like_x,
                  const Tensor& like_weight) {
  const Head h = head(x, weight, {}, 0, temperature);
  STD_TORCH_CHECK(h.rows == student.rows && h.vocabulary == student.vocabulary, "teacher: expected as many rows, words");
  STD_TORCH_CHECK(x.scalar_type() == like_x.scalar_type() && weight.scalar_type() == like_weight.scalar_type(),
                  "teacher: expected the dtypes of the student");
  return h;
}

void kl_forward(Tensor x, Tensor weight, Tensor teacher_x, Tensor teacher_weight, double temperature, Tensor kl,
                Tensor lse, Tensor teacher_lse) {
  const Head student = head(x, weight, {}, 0, temperature);
  const Head teacher = teacher_head(teacher_x, teacher_weight, temperature, student, x, weight);
  const KlArgs args = {student, teacher, out<float>(kl), out<float>(lse), out<float>(teacher_lse)};
  dispatch_head(x, weight, [&](auto elements) { linear_kl<decltype(elements)>(args); });
}

void kl_backward(Tensor grad, Tensor x, Tensor weight, Tensor teacher_x, Tensor teacher_weight, Tensor lse,
                 Tensor teacher_lse, Tensor kept, Tensor teacher_kept, double temperature, Tensor kl, Tensor dx,
                 Tensor dweight, bool accumulate) {
  const Head student = head(x, weight, {}, 0, temperature);
  const Head teacher = teacher_head(teacher_x, teacher_weight, temperature, student, x, weight);
  STD_TORCH_CHECK(!accumulate || weight.scalar_type() == ScalarType::Float, "accumulate: expected a float32 weight");
  const bool given = kept.numel() > 0;
  const KlBackwardArgs args = {student,
                               teacher,
                               in<float>(lse),
                               in<float>(teacher_lse),
                               in<float>(grad),
                               given ? in<float>(kept) : nullptr,
                               given ? in<float>(teacher_kept) : nullptr,
                               given ? wanted<float>(kl) : nullptr,
                               {wanted<void>(dx), wanted<void>(dweight), nullptr, accumulate}};
  dispatch_head(x, weight, [&](auto elements) { linear_kl_backward<decltype(elements)>(args); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_cpu, m) {
  m.def(
      "linear_logprob(Tensor x, Tensor weight, Tensor? bias, Tensor targets, float temperature, float softcap, "
      "Tensor(a!) logp, Tensor(b!) lse, Tensor(c!) entropy, Tensor(d!) mean, Tensor(e!) kept) -> ()");
  m.def(
      "linear_logprob_backward(Tensor grads, Tensor x, Tensor weight, Tensor? bias, Tensor targets, Tensor logp, "
      "Tensor lse, Tensor entropy, Tensor kept, float temperature, float softcap, Tensor(a!) dx, Tensor(b!) dweight, "
      "Tensor(c!) dbias, bool accumulate) -> ()");
  m.def(
      "linear_kl(Tensor x, Tensor weight, Tensor teacher_x, Tensor teacher_weight, float temperature, Tensor(a!) kl, "
      "Tensor(b!) lse, Tensor(c!) teacher_lse) -> ()");
  m.def(
      "linear_kl_backward(Tensor grad, Tensor x, Tensor weight, Tensor teacher_x, Tensor teacher_weight, Tensor lse, "
      "Tensor teacher_lse, Tensor kept, Tensor teacher_kept, float temperature, Tensor(a!) kl, Tensor(b!) dx, "
      "Tensor(c!) dweight, bool accumulate) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_cpu, CPU, m) {
  m.impl("linear_logprob", TORCH_BOX(&forward));
  m.impl("linear_logprob_backward", TORCH_BOX(&backward));
  m.impl("linear_kl", TORCH_BOX(&kl_forward));
  m.impl("linear_kl_backward", TORCH_BOX(&kl_backward));
}

}  // namespace ivl
