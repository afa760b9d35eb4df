// Single elements to and from what they are computed in (vec.h has the same for vectors). Rounding is to the nearest,
// ties to even; a NaN becomes the quiet one.
#pragma once

#include <cstdint>
#include <cstring>

#include "ivl/types.h"

namespace ivl {

template <class To, class From>
inline To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return same_bits<float>(uint32_t{x.bits} << 16); }
inline float widen(float16 x) {
  // Shift exponent and mantissa into place, then scale by 2^112: subnormals come out right too.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  const bool special = (x.bits & 0x7c00) == 0x7c00;
  const uint32_t bits = special ? rest | 0x7f800000u : same_bits<uint32_t>(same_bits<float>(rest) * 0x1p112f);
  return same_bits<float>(bits | sign);
}

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, bfloat16* to) {
  const uint32_t bits = same_bits<uint32_t>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
inline void narrow(float x, float16* to) {
  const uint32_t bits = same_bits<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    half = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | sign);
}

}  // namespace ivl
