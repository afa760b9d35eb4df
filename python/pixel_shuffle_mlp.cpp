#include "ivl/pixel_shuffle_mlp.h"

#include "tensor.h"

namespace ivl {
namespace {

// x [T, skip + height * width, C], tiles [K] or all.
template <class T, class Element>
ShuffledTokens<Element> shuffled(const Tensor& x, Element* data, int64_t merge, int64_t height, int64_t width,
                                 int64_t skip, bool transposed, const OptionalTensor& tiles) {
  return {data,   x.stride(0), x.stride(1), x.size(2), merge, height, width, skip, transposed,
          in<int64_t>(tiles)};
}

void norm(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t merge, int64_t height, int64_t width,
          int64_t skip, bool transposed, double eps, const OptionalTensor& tiles, int64_t first, Tensor& result) {
  dispatch_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    shuffle_norm(shuffled<T>(x, in<T>(x), merge, height, width, skip, transposed, tiles), first, result.size(0),
                 in<T>(weight), in<T>(bias), eps, out<T>(result));
  });
}

void norm_backward(const Tensor& x, const Tensor& weight, int64_t merge, int64_t height, int64_t width, int64_t skip,
                   bool transposed, double eps, const OptionalTensor& tiles, int64_t first, const Tensor& grad, Tensor& dx,
                   Tensor& sums) {
  dispatch_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto tokens = shuffled<T>(x, in<T>(x), merge, height, width, skip, transposed, tiles);
    // dx holds one tile for each selected one.
    ShuffledTokens<T> to{wanted<T>(dx), dx.numel() ? dx.stride(0) : 0, dx.numel() ? dx.stride(1) : 0, x.size(2),
                         merge, height, width, skip, transposed, nullptr};
    shuffle_norm_backward(tokens, first, grad.size(0), in<T>(weight), eps, in<T>(grad), to, wanted<Sum<T>>(sums));
  });
}

template <class T>
RowMap<T> row_map(const Tensor& values, int64_t tile_rows, const OptionalTensor& starts) {
  return {out<T>(values), values.stride(0), tile_rows, in<int64_t>(starts)};
}

void gelu_grad(const Tensor& pre, Tensor& activated, Tensor& grad, Tensor& dbias) {
  dispatch_float(pre.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gelu_backward(in<T>(pre), pre.stride(0), pre.size(0), pre.size(1), wanted<T>(activated),
                  activated.numel() ? activated.stride(0) : 0, wanted<T>(grad),
                  wanted<Sum<T>>(dbias));
  });
}

void projector(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensors& weights,
               const Tensors& biases, int64_t merge, int64_t height, int64_t width, int64_t skip, bool transposed,
               double eps, const OptionalTensor& tiles, int64_t rows, Tensor& result, const OptionalTensor& starts, Tensor& pre) {
  dispatch_widened(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<LinearLayer<T>> layers;
    for (size_t i = 0; i < weights.size(); ++i)
      layers.push_back(
          {in<T>(weights[i]), weights[i].size(0), weights[i].size(1), weights[i].stride(0), in<T>(biases[i])});
    auto tokens = shuffled<T>(x, in<T>(x), merge, height, width, skip, transposed, tiles);
    project(tokens, rows, in<T>(norm_weight), in<T>(norm_bias), eps, layers.data(), int64_t(layers.size()),
            row_map<T>(result, tokens.cells(), starts), wanted<T>(pre), pre.numel() ? pre.stride(0) : 0);
  });
}

IVL_OPERATOR(shuffle_norm, norm)
IVL_OPERATOR(shuffle_norm_backward, norm_backward)
IVL_OPERATOR(gelu_backward, gelu_grad)
IVL_OPERATOR(pixel_shuffle_mlp, projector)

}  // namespace
}  // namespace ivl
