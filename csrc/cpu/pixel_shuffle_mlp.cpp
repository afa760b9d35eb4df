#include "ivl/pixel_shuffle_mlp.h"

#include "ivl/gemm.h"

#define IVL_KERNELS "ivl/pixel_shuffle_mlp_kernels.h"
#include "ivl/foreach_isa.h"

namespace ivl {
template <class T>
void shuffle_norm(ShuffledTokens<const T> tokens, int64_t first, int64_t count, const T* weight, const T* bias,
                  double eps, T* out) {
  IVL_CALL(shuffle_norm, tokens, first, count, weight, bias, eps, out);
}

template <class T>
void shuffle_norm_backward(ShuffledTokens<const T> tokens, int64_t first, int64_t count, const T* weight, double eps,
                           const T* grad, ShuffledTokens<T> dx, Sum<T>* sums) {
  IVL_CALL(shuffle_norm_backward, tokens, first, count, weight, eps, grad, dx, sums);
}

template <class T>
void gelu_backward(const T* pre, int64_t pre_stride, int64_t rows, int64_t columns, T* activated,
                   int64_t activated_stride, T* grad, Sum<T>* dbias) {
  IVL_CALL(gelu_backward, pre, pre_stride, rows, columns, activated, activated_stride, grad, dbias);
}

template <class T>
void project(ShuffledTokens<const T> tokens, int64_t rows, const T* norm_weight, const T* norm_bias, double eps,
             const LinearLayer<T>* layers, int64_t layer_count, RowMap<T> out, T* pre, int64_t pre_stride) {
  IVL_CALL(project, tokens, rows, norm_weight, norm_bias, eps, layers, layer_count, out, pre, pre_stride);
}

#define IVL_INSTANTIATE(T)                                                                                           \
  template void shuffle_norm(ShuffledTokens<const T>, int64_t, int64_t, const T*, const T*, double, T*);             \
  template void shuffle_norm_backward(ShuffledTokens<const T>, int64_t, int64_t, const T*, double, const T*,         \
                                      ShuffledTokens<T>, Sum<T>*);                                                   \
  template void gelu_backward(const T*, int64_t, int64_t, int64_t, T*, int64_t, T*, Sum<T>*);
#define IVL_INSTANTIATE_PRODUCTS(T)                                                                                  \
  template void project(ShuffledTokens<const T>, int64_t, const T*, const T*, double, const LinearLayer<T>*, int64_t, \
                        RowMap<T>, T*, int64_t);
IVL_FLOAT_TYPES(IVL_INSTANTIATE)
IVL_WIDENED_TYPES(IVL_INSTANTIATE_PRODUCTS)

}  // namespace ivl
