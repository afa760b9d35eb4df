// Vectors of float for one instruction set: IVL_VECTOR_BYTES wide, in ivl::IVL_NAMESPACE (see foreach_isa.h).
// Needs <cstdint>, <cstring>, <cmath> and, on x86, <immintrin.h> included before.

namespace ivl::IVL_NAMESPACE {
namespace {

typedef float vf __attribute__((vector_size(IVL_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(IVL_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(IVL_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(IVL_VECTOR_BYTES / 2)));

constexpr int kLanes = IVL_VECTOR_BYTES / 4;

inline vf splat(float x) { return x - vf{}; }

inline vf fma(vf a, vf b, vf c) {
#if IVL_VECTOR_BYTES == 64
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif IVL_VECTOR_BYTES == 32
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Elements of the lower (upper) halves of a and b in turn.
inline vf interleave_low(vf a, vf b) {
#if IVL_VECTOR_BYTES == 64
  return __builtin_shuffle(a, b, vi{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#elif IVL_VECTOR_BYTES == 32
  return __builtin_shuffle(a, b, vi{0, 8, 1, 9, 2, 10, 3, 11});
#else
  return __builtin_shuffle(a, b, vi{0, 4, 1, 5});
#endif
}
inline vf interleave_high(vf a, vf b) {
#if IVL_VECTOR_BYTES == 64
  return __builtin_shuffle(a, b, vi{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#elif IVL_VECTOR_BYTES == 32
  return __builtin_shuffle(a, b, vi{4, 12, 5, 13, 6, 14, 7, 15});
#else
  return __builtin_shuffle(a, b, vi{2, 6, 3, 7});
#endif
}

// Rows become columns: log2(kLanes) perfect shuffles.
inline void transpose(vf (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    vf next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(v[i], v[i + kLanes / 2]);
      next[2 * i + 1] = interleave_high(v[i], v[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

// Elements at even (odd) places of a and then of b.
inline vf even(vf a, vf b) {
#if IVL_VECTOR_BYTES == 64
  return __builtin_shuffle(a, b, vi{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
#elif IVL_VECTOR_BYTES == 32
  return __builtin_shuffle(a, b, vi{0, 2, 4, 6, 8, 10, 12, 14});
#else
  return __builtin_shuffle(a, b, vi{0, 2, 4, 6});
#endif
}
inline vf odd(vf a, vf b) {
#if IVL_VECTOR_BYTES == 64
  return __builtin_shuffle(a, b, vi{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
#elif IVL_VECTOR_BYTES == 32
  return __builtin_shuffle(a, b, vi{1, 3, 5, 7, 9, 11, 13, 15});
#else
  return __builtin_shuffle(a, b, vi{1, 3, 5, 7});
#endif
}

inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(float16 x) {
  // Shift exponent and mantissa into place, then scale by 2^112: subnormals come out right too.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  const bool special = (x.bits & 0x7c00) == 0x7c00;
  const uint32_t magic = 239u << 23;
  float scale, y;
  std::memcpy(&scale, &magic, 4);
  std::memcpy(&y, &rest, 4);
  y *= scale;
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  bits = (special ? rest | 0x7f800000u : bits) | sign;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const bfloat16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline vf load(const float16* p) {
#if IVL_VECTOR_BYTES == 64
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif IVL_VECTOR_BYTES == 32
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// The first n < kLanes elements; the rest is zero.
template <class T>
inline vf load_some(const T* p, int64_t n) {
  T values[kLanes] = {};
  std::memcpy(values, p, n * sizeof(T));
  return load(values);
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline void store(bfloat16* p, vf v) {
  const vu bits = (vu)v;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vi nan = v != v;
  rounded = ((vu)nan & 0x7fc0) | (~(vu)nan & rounded);
  const vh h = __builtin_convertvector(rounded, vh);
  std::memcpy(p, &h, sizeof h);
}
inline void store(float16* p, vf v) {
#if IVL_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif IVL_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int i = 0; i < kLanes; ++i) {
    uint32_t bits;
    const float x = v[i];
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: let an addition do the rounding
      const float shifted = std::fabs(x) + 0.5f;
      std::memcpy(&half, &shifted, 4);
      half -= 0x3f000000;
    } else {
      half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    p[i].bits = static_cast<uint16_t>(half | sign);
  }
#endif
}

template <class T>
inline void store_some(T* p, vf v, int64_t n) {
  T values[kLanes];
  store(values, v);
  std::memcpy(p, values, n * sizeof(T));
}

// e^x for x <= 0, to one unit in the last place; 0 below -87.
inline vf exp_negative(vf x) {
  const vf low = splat(-87.0f);
  const vi under = x < low;
  x = under ? low : x;
  const vf magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  const vf shifted = fma(x, splat(1.44269504f), magic);
  const vf n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf y = splat(1.0f / 5040);
  y = fma(y, r, splat(1.0f / 720));
  y = fma(y, r, splat(1.0f / 120));
  y = fma(y, r, splat(1.0f / 24));
  y = fma(y, r, splat(1.0f / 6));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r, splat(1.0f));
  y = fma(y, r, splat(1.0f));
  const vf scale = (vf)(((vi)shifted - (vi)magic + 127) << 23);
  return under ? vf{} : y * scale;
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
