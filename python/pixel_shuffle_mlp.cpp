#include "ivl/pixel_shuffle_mlp.h"

#include <string>
#include <vector>

#include "tensor.h"

namespace ivl {
namespace {

// Tensors that may be missing come as empty ones.
template <class T>
T* out_or_null(const Tensor& t) {
  return t.numel() ? out<T>(t) : nullptr;
}

// x [T, skip + height * width, C], tiles [K] or empty for all.
template <class T, class Element>
ShuffledTokens<Element> shuffled(const Tensor& x, Element* data, int64_t merge, int64_t height, int64_t width,
                                 int64_t skip, bool transposed, const Tensor& tiles) {
  return {data,   x.stride(0), x.stride(1), x.size(2), merge, height, width, skip, transposed,
          tiles.numel() ? in<int64_t>(tiles) : nullptr};
}

void norm(Tensor x, Tensor weight, Tensor bias, int64_t merge, int64_t height, int64_t width, int64_t skip,
          bool transposed, double eps, Tensor tiles, int64_t first, Tensor result) {
  dispatch_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    shuffle_norm(shuffled<T>(x, in<T>(x), merge, height, width, skip, transposed, tiles), first, result.size(0),
                 in<T>(weight), in<T>(bias), eps, out<T>(result));
  });
}

void norm_backward(Tensor x, Tensor weight, int64_t merge, int64_t height, int64_t width, int64_t skip, bool transposed,
                   double eps, Tensor tiles, int64_t first, Tensor grad, Tensor dx, Tensor sums) {
  dispatch_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto tokens = shuffled<T>(x, in<T>(x), merge, height, width, skip, transposed, tiles);
    // dx holds one tile for each selected one.
    ShuffledTokens<T> to{out_or_null<T>(dx), dx.numel() ? dx.stride(0) : 0, dx.numel() ? dx.stride(1) : 0, x.size(2),
                         merge, height, width, skip, transposed, nullptr};
    shuffle_norm_backward(tokens, first, grad.size(0), in<T>(weight), eps, in<T>(grad), to, out_or_null<Sum<T>>(sums));
  });
}

template <class T>
RowMap<T> row_map(const Tensor& values, int64_t tile_rows, const Tensor& starts) {
  return {out<T>(values), values.stride(0), tile_rows, starts.numel() ? in<int64_t>(starts) : nullptr};
}

void gelu_grad(Tensor pre, Tensor activated, Tensor grad, Tensor dbias) {
  dispatch_float(pre.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gelu_backward(in<T>(pre), pre.stride(0), pre.size(0), pre.size(1), out_or_null<T>(activated),
                  activated.numel() ? activated.stride(0) : 0, out_or_null<T>(grad),
                  out_or_null<Sum<T>>(dbias));
  });
}

void projector(Tensor x, Tensor norm_weight, Tensor norm_bias, std::vector<Tensor> weights, std::vector<Tensor> biases,
               int64_t merge, int64_t height, int64_t width, int64_t skip, bool transposed, double eps, Tensor tiles,
               int64_t rows, Tensor result, Tensor starts, Tensor pre) {
  dispatch_widened(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<LinearLayer<T>> layers;
    for (size_t i = 0; i < weights.size(); ++i)
      layers.push_back(
          {in<T>(weights[i]), weights[i].size(0), weights[i].size(1), weights[i].stride(0), in<T>(biases[i])});
    auto tokens = shuffled<T>(x, in<T>(x), merge, height, width, skip, transposed, tiles);
    project(tokens, rows, in<T>(norm_weight), in<T>(norm_bias), eps, layers.data(), int64_t(layers.size()),
            row_map<T>(result, tokens.cells(), starts), out_or_null<T>(pre), pre.numel() ? pre.stride(0) : 0);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def(
      "shuffle_norm(Tensor x, Tensor weight, Tensor bias, int merge, int height, int width, int skip, bool transposed, "
      "float eps, Tensor tiles, int first, Tensor(a!) out) -> ()");
  m.def(
      "shuffle_norm_backward(Tensor x, Tensor weight, int merge, int height, int width, int skip, bool transposed, "
      "float eps, Tensor tiles, int first, Tensor grad, Tensor(a!) dx, Tensor(b!) sums) -> ()");
  m.def("gelu_backward(Tensor pre, Tensor(a!) activated, Tensor(b!) grad, Tensor(c!) dbias) -> ()");
  m.def(
      "pixel_shuffle_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor[] weights, Tensor[] biases, int merge, "
      "int height, int width, int skip, bool transposed, float eps, Tensor tiles, int rows, Tensor(a!) out, "
      "Tensor starts, Tensor(b!) pre) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("shuffle_norm", TORCH_BOX(&norm));
  m.impl("shuffle_norm_backward", TORCH_BOX(&norm_backward));
  m.impl("gelu_backward", TORCH_BOX(&gelu_grad));
  m.impl("pixel_shuffle_mlp", TORCH_BOX(&projector));
}

}  // namespace ivl
