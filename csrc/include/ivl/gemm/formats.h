// Weights in few bits: how 2 kLanes neighbouring ones of a row become floats, or bfloat16 units, in registers.
// A format has kBlock: the k, and kScaleRows: the rows, that share a scale; kBytes: of 2 kLanes weights; Ready: a scale
// as expand() takes it; kSplit: whether expand() gives those at even k and then those at odd k, or lower and upper half;
// kScaledSums: the rows up to which dot products of units scale their sums, not the weights.

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int64_t kStep = 2 * kLanes;  // weights expanded at a time

// kLanes bytes, each in a lane.
inline vu load_bytes(const uint8_t* at) {
#if IVL_VECTOR_BYTES == 64
  return (vu)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#elif IVL_VECTOR_BYTES == 32
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
#else
  return vu{at[0], at[1], at[2], at[3]};
#endif
}

// Two values a byte, the first in the low half: sign, two bits of exponent, one of mantissa. A scale byte b is 2^(b-127).
struct Mxfp4 {
  using Scale = uint8_t;
  using Ready = vf;  // the scaled values: of the codes 0 to 15, or where a vector has fewer lanes of 0 to 7
  static constexpr int64_t kBlock = 32, kScaleRows = 1, kBytes = kStep / 2;
  static constexpr bool kSplit = true;
  static constexpr int kScaledSums = 2;

  static constexpr uint32_t kTiny = 0x00400000;  // byte 0: 2^-127, a subnormal

  // The last vector overlaps the one before.
  static void widen_scales(const uint8_t* from, int64_t count, float* to) {
    const auto bits_of = [](auto byte) { return byte << 23; };
    int64_t i = 0;
    for (; i + kLanes <= count; i = i + kLanes < count && i + 2 * kLanes > count ? count - kLanes : i + kLanes) {
      const vu bits = bits_of(load_bytes(from + i));
      store(to + i, (vf)(bits != 0 ? bits : vu{} + kTiny));
    }
    for (; i < count; ++i) to[i] = same_bits<float>(from[i] ? bits_of(uint32_t{from[i]}) : kTiny);
  }

  static Ready ready(const float* scale) {
#if IVL_VECTOR_BYTES == 64
    const vf values{0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    return values * splat(*scale);
#elif IVL_VECTOR_BYTES == 32
    const vf values{0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    return values * splat(*scale);
#else
    return splat(*scale);
#endif
  }

  static void expand(const uint8_t* at, Ready table, vf& evens, vf& odds) {
#if IVL_VECTOR_BYTES == 64
    const vu pairs = load_bytes(at);
    evens = (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)pairs, (__m512)table);
    odds = (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(pairs >> 4), (__m512)table);
#elif IVL_VECTOR_BYTES == 32
    const vu pairs = load_bytes(at);
    const auto value = [&](vu code) {
      const vu size = (vu)_mm256_permutevar8x32_ps((__m256)table, (__m256i)code);
      return (vf)(size ^ ((code << 28) & 0x80000000u));
    };
    evens = value(pairs), odds = value(pairs >> 4);
#else
    constexpr float kValues[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    float low[kLanes], high[kLanes];
    for (int i = 0; i < kLanes; ++i) low[i] = kValues[at[i] & 15], high[i] = kValues[at[i] >> 4];
    evens = load(low) * table, odds = load(high) * table;
#endif
  }

#if IVL_VECTOR_BYTES == 64
  // Each byte in both halves of 32 bits, the lower half shifted down by `low` and the upper by `high`.
  static __m512i codes(const uint8_t* at, short low, short high) {
    const __m512i bytes = _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    const vi places = vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x01010101;
    const __m512i pairs = _mm512_maskz_shuffle_epi8(~0ull, bytes, (__m512i)places);
    return _mm512_maskz_srlv_epi16(~0u, pairs, _mm512_set1_epi32(high << 16 | low));
  }
  // kStep weights as units, k in order: the upper half of a float of the table is the weight in bfloat16, exactly.
  static vf expand_units(const uint8_t* at, Ready table) {
    const vu odd = (vu)codes(at, 7, 3) | 0x00010001u;  // 2 code + 1 in the low five bits of 16
    return (vf)_mm512_maskz_permutexvar_epi16(~0u, (__m512i)odd, (__m512i)table);
  }
  // The same without a scale. A code is in the low four bits; the fifth may be anything, so there are two tables.
  static vf expand_units(const uint8_t* at) {
    const __m256i table = _mm256_setr_epi16(0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, -0x8000, -0x4100,
                                            -0x4080, -0x4040, -0x4000, -0x3fc0, -0x3f80, -0x3f40);
    const __m512i twice = _mm512_maskz_broadcast_i64x4(0xff, table);
    return (vf)_mm512_maskz_permutexvar_epi16(~0u, codes(at, 0, 4), twice);
  }
#endif
};

// E4M3 without infinities; a scale is a float.
struct Fp8 {
  using Scale = float;
  using Ready = vf;
  static constexpr int64_t kBlock = 128, kScaleRows = 128, kBytes = kStep;
  static constexpr bool kSplit = false;
  static constexpr int kScaledSums = 6;

  static void widen_scales(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
  static Ready ready(const float* scale) { return splat(*scale); }

  static vf expand(const uint8_t* at) {
    const vu x = load_bytes(at);
    // Exponent and mantissa in their places, then 2^120 for the other bias: subnormals come out right too.
    const vf size = (vf)((x << 20) & 0x07f00000u) * splat(0x1p120f);
    const vu nan = (vu)((x & 0x7fu) == 0x7fu);
    return (vf)((vu)size | ((x << 24) & 0x80000000u) | (nan & 0x7fc00000u));
  }
  static void expand(const uint8_t* at, Ready scale, vf& low, vf& high) {
    low = expand(at) * scale, high = expand(at + kLanes) * scale;
  }

#if IVL_VECTOR_BYTES == 64
  static vf upper_halves(vu low, vu high) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return (vf)_mm512_maskz_permutex2var_epi16(~0u, (__m512i)low, odd, (__m512i)high);
  }
  // Rounded to bfloat16 after the scale, or exact without one.
  static vf expand_units(const uint8_t* at, Ready scale) {
    return upper_halves(bfloat16_bits<false, 16>(expand(at) * scale),
                        bfloat16_bits<false, 16>(expand(at + kLanes) * scale));
  }
  static vf expand_units(const uint8_t* at) { return upper_halves((vu)expand(at), (vu)expand(at + kLanes)); }
#endif
};

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
