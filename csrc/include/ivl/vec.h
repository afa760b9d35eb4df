// Vectors of float and double for one instruction set, in ivl::IVL_NAMESPACE (foreach_isa.h includes this): loads widen
// to the arithmetic type, stores round to the element type.

namespace ivl::IVL_NAMESPACE {
namespace {

template <class A, int N>
struct VecOf {
  typedef A type __attribute__((vector_size(N * sizeof(A))));
};
template <class A>
constexpr int lanes = IVL_VECTOR_BYTES / sizeof(A);
template <class A, int N = lanes<A>>
using Vec = typename VecOf<A, N>::type;

using vf = Vec<float>;
using vi = Vec<int32_t>;
using vu = Vec<uint32_t>;
constexpr int kLanes = lanes<float>;

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
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if IVL_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif IVL_VECTOR_BYTES == 32
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// ---- loads ----

template <int N, class A>
  requires std::is_floating_point_v<A>
inline Vec<A, N> load(const A* p) {
  Vec<A, N> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int N>
inline Vec<float, N> load(const bfloat16* p) {
#if IVL_VECTOR_BYTES == 64
  if constexpr (N == 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return same_bits<vf>(same_bits<vu>(_mm512_maskz_cvtepu16_epi32(0xffff, half)) << 16);
  }
#endif
  Vec<uint16_t, N> half;
  std::memcpy(&half, p, sizeof half);
  const Vec<uint32_t, N> bits = __builtin_convertvector(half, Vec<uint32_t, N>) << 16;
  return same_bits<Vec<float, N>>(bits);
}

template <int N>
inline Vec<float, N> load(const float16* p) {
#if IVL_VECTOR_BYTES == 64
  if constexpr (N == 16) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return same_bits<vf>(_mm512_maskz_cvtph_ps(0xffff, half));
  }
#endif
#if IVL_VECTOR_BYTES >= 32
  if constexpr (N == 8)
    return same_bits<Vec<float, N>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
  Vec<float, N> v;
  for (int i = 0; i < N; ++i) v[i] = widen(p[i]);
  return v;
}

template <class T>
inline Vec<Sum<T>> load(const T* p) {
  return load<lanes<Sum<T>>>(p);
}

// The first n < lanes elements; the rest is zero.
template <class T>
inline Vec<Sum<T>> load_some(const T* p, int64_t n) {
  T values[lanes<Sum<T>>] = {};
  std::memcpy(values, p, n * sizeof(T));
  return load(values);
}

// ---- stores ----

// float32 bits rounded to bfloat16, still in the upper half of 32 bits. Without `any_nan` it is faster, and a NaN stays
// one only if its low 16 bits are zero, as in all that is computed from bfloat16.
template <bool any_nan, int N>
inline Vec<uint32_t, N> bfloat16_bits(Vec<float, N> v) {
  const Vec<uint32_t, N> bits = same_bits<Vec<uint32_t, N>>(v);
#if IVL_VECTOR_BYTES == 64
  if constexpr (N == 16 && !any_nan) {
    const __m512i wide = same_bits<__m512i>(v), up = _mm512_add_epi32(wide, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(wide, _mm512_set1_epi32(0x10000));
    return same_bits<vu>(_mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1)));
  }
#endif
  const Vec<uint32_t, N> rounded = bits + 0x7fff + ((bits >> 16) & 1);
  if constexpr (!any_nan) return rounded;
  const Vec<uint32_t, N> nan = (Vec<uint32_t, N>)(v != v);
  return (nan & 0x7fc00000) | (~nan & rounded);
}

template <int N, bool any_nan = true, class A>
  requires std::is_floating_point_v<A>
inline void store(A* p, Vec<A, N> v) {
  std::memcpy(p, &v, sizeof v);
}

template <int N, bool any_nan = true>
inline void store(bfloat16* p, Vec<float, N> v) {
  const Vec<uint16_t, N> half = __builtin_convertvector(bfloat16_bits<any_nan, N>(v) >> 16, Vec<uint16_t, N>);
  std::memcpy(p, &half, sizeof half);
}

template <int N, bool any_nan = true>
inline void store(float16* p, Vec<float, N> v) {
#if IVL_VECTOR_BYTES == 64
  if constexpr (N == 16) {
    const __m256i half = _mm512_maskz_cvtps_ph(0xffff, same_bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
#endif
#if IVL_VECTOR_BYTES >= 32
  if constexpr (N == 8) {
    const __m128i half = _mm256_cvtps_ph(same_bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
#endif
  for (int i = 0; i < N; ++i) narrow(v[i], p + i);
}

template <class T>
inline void store(T* p, Vec<Sum<T>> v) {
  store<lanes<Sum<T>>>(p, v);
}

template <class T>
inline void store_some(T* p, Vec<Sum<T>> v, int64_t n) {
  T values[lanes<Sum<T>>];
  store(values, v);
  std::memcpy(p, values, n * sizeof(T));
}

// The value after a trip through T.
template <class T, int N, class A, bool any_nan = false>
inline Vec<A, N> rounded(Vec<A, N> v) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const Vec<uint32_t, N> bits = bfloat16_bits<any_nan, N>(v) & 0xffff0000u;
    return same_bits<Vec<float, N>>(bits);
  } else if constexpr (std::is_same_v<T, float16>) {
    float16 h[N];
    store<N>(h, v);
    return load<N>(static_cast<const float16*>(h));
  } else {
    return v;
  }
}

// ---- loops ----

// Calls f.template operator()<lanes>(i) over [begin, end): whole vectors first, then ever smaller ones.
template <int N, class F>
inline void over(int64_t begin, int64_t end, F&& f) {
  for (; begin + N <= end; begin += N) f.template operator()<N>(begin);
  if constexpr (N > 1) over<N / 2>(begin, end, f);
}

// Calls f(column, whole, count) for whole vectors, then once for the rest; the loads and stores below take `whole`.
template <class F>
inline void by_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, std::true_type{}, int64_t{kLanes});
  if (i < n) f(i, std::false_type{}, n - i);
}
template <class T, class Whole>
inline vf load(const T* p, Whole, int64_t n) {
  if constexpr (Whole::value) return load(p);
  return load_some(p, n);
}
template <class T, class Whole>
inline void store(T* p, vf v, Whole, int64_t n) {
  if constexpr (Whole::value) return store(p, v);
  store_some(p, v, n);
}

// ---- across lanes ----

// The sum of a vector's elements: halves are added to halves until kOrdered are left, and those one after the other.
template <int kOrdered, int N, class A>
inline A sum_of(Vec<A, N> v) {
  if constexpr (N <= kOrdered) {
    A total = v[0];
    for (int i = 1; i < N; ++i) total += v[i];
    return total;
  } else {
    Vec<A, N / 2> halves[2];
    std::memcpy(halves, &v, sizeof v);
    return sum_of<kOrdered, N / 2, A>(halves[0] + halves[1]);
  }
}
inline float sum(vf v) { return sum_of<kLanes, kLanes, float>(v); }

inline float largest(vf v) {
#if IVL_VECTOR_BYTES == 64
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
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

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
