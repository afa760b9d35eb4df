#include "ivl/tile_router.h"

#include "tensor.h"

namespace ivl {
namespace {

template <class T>
Tiles<T> tiles_of(const Tensor& z) {
  return {const_cast<T*>(static_cast<const T*>(z.const_data_ptr())),
          z.size(0),
          z.size(1),
          z.size(2),
          z.stride(0),
          z.stride(1)};
}

template <class T>
GroupedWeights<T> weights_of(const Tensor& x, const Tensor& w) {
  return {in<T>(w), w.stride(0), x.size(0), x.size(1), w.size(0), w.size(1)};
}

void pool(const Tensor& z, const Tensor& u, Tensor& pooled, Tensor& lse) {
  dispatch_float(z.scalar_type(), [&](auto element) {
    using T = decltype(element);
    tile_pool<T>({tiles_of<const T>(z), in<Sum<T>>(u), u.stride(0), u.size(1)}, out<Sum<T>>(pooled), out<Sum<T>>(lse));
  });
}

// An empty dz: not wanted.
void pool_backward(const Tensor& z, const Tensor& u, const Tensor& pooled, const Tensor& lse, const Tensor& grad,
                   Tensor& dz, Tensor& du) {
  dispatch_float(z.scalar_type(), [&](auto element) {
    using T = decltype(element);
    Tiles<T> target{};
    if (dz.numel()) target = tiles_of<T>(dz);
    tile_pool_backward<T>({tiles_of<const T>(z), in<Sum<T>>(u), u.stride(0), u.size(1)}, in<Sum<T>>(pooled),
                          in<Sum<T>>(lse), in<Sum<T>>(grad), out<Sum<T>>(du), target);
  });
}

void linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias, Tensor& result) {
  dispatch_float(w.scalar_type(), [&](auto element) {
    using T = decltype(element);
    few_rows_linear<T>(in<Sum<T>>(x), weights_of<T>(x, w), in<T>(bias), out<Sum<T>>(result));
  });
}

void linear_transposed(const Tensor& x, const Tensor& w, Tensor& result) {
  dispatch_float(w.scalar_type(), [&](auto element) {
    using T = decltype(element);
    few_rows_linear_transposed<T>(in<Sum<T>>(x), weights_of<T>(x, w), out<Sum<T>>(result));
  });
}

IVL_OPERATOR(tile_pool, pool)
IVL_OPERATOR(tile_pool_backward, pool_backward)
IVL_OPERATOR(few_rows_linear, linear)
IVL_OPERATOR(few_rows_linear_transposed, linear_transposed)

}  // namespace
}  // namespace ivl
