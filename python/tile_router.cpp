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

void pool(Tensor z, Tensor u, Tensor pooled, Tensor lse) {
  dispatch_float(z.scalar_type(), [&](auto element) {
    using T = decltype(element);
    tile_pool<T>(tiles_of<const T>(z), in<Sum<T>>(u), u.stride(0), u.size(1), out<Sum<T>>(pooled), out<Sum<T>>(lse));
  });
}

// An empty dz: not wanted.
void pool_backward(Tensor z, Tensor u, Tensor pooled, Tensor lse, Tensor grad, Tensor du, Tensor dz) {
  dispatch_float(z.scalar_type(), [&](auto element) {
    using T = decltype(element);
    Tiles<T> target{};
    if (dz.numel()) target = tiles_of<T>(dz);
    tile_pool_backward<T>(tiles_of<const T>(z), in<Sum<T>>(u), u.stride(0), u.size(1), in<Sum<T>>(pooled),
                          in<Sum<T>>(lse), in<Sum<T>>(grad), out<Sum<T>>(du), target);
  });
}

void linear(Tensor x, Tensor w, Tensor bias, Tensor result) {
  dispatch_float(w.scalar_type(), [&](auto element) {
    using T = decltype(element);
    few_rows_linear<T>(in<Sum<T>>(x), in<T>(w), w.stride(0), bias.numel() ? in<T>(bias) : nullptr, x.size(0), x.size(1),
                       w.size(0), w.size(1), out<Sum<T>>(result));
  });
}

void linear_transposed(Tensor x, Tensor w, Tensor result) {
  dispatch_float(w.scalar_type(), [&](auto element) {
    using T = decltype(element);
    few_rows_linear_transposed<T>(in<Sum<T>>(x), in<T>(w), w.stride(0), x.size(0), x.size(1), w.size(0), w.size(1),
                                  out<Sum<T>>(result));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ivl_native, m) {
  m.def("tile_pool(Tensor z, Tensor u, Tensor(a!) pooled, Tensor(b!) lse) -> ()");
  m.def(
      "tile_pool_backward(Tensor z, Tensor u, Tensor pooled, Tensor lse, Tensor grad, Tensor(a!) du, Tensor(b!) dz) -> "
      "()");
  m.def("few_rows_linear(Tensor x, Tensor w, Tensor bias, Tensor(a!) out) -> ()");
  m.def("few_rows_linear_transposed(Tensor x, Tensor w, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ivl_native, CPU, m) {
  m.impl("tile_pool", TORCH_BOX(&pool));
  m.impl("tile_pool_backward", TORCH_BOX(&pool_backward));
  m.impl("few_rows_linear", TORCH_BOX(&linear));
  m.impl("few_rows_linear_transposed", TORCH_BOX(&linear_transposed));
}

}  // namespace ivl
