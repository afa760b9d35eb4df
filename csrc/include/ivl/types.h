// Element types of the kernels, and what they are summed in; no torch header, host and device.
#pragma once

#include <cstdint>
#include <type_traits>

namespace ivl {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// F(T) for every element type that is computed in float, for those of 16 bits, and with double.
#define IVL_NARROW_TYPES(F) F(bfloat16) F(float16)
#define IVL_WIDENED_TYPES(F) F(float) IVL_NARROW_TYPES(F)
#define IVL_FLOAT_TYPES(F) IVL_WIDENED_TYPES(F) F(double)

// What T is computed and summed in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace ivl
