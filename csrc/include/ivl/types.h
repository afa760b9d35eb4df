// Element types of the kernels and their conversions to and from float32; no torch header, host and device.
#pragma once

#include <cstdint>
#include <cstring>

namespace ivl {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace ivl
