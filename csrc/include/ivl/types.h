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

// What T is computed and summed in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace ivl
