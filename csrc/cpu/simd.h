// Vectors of float in GCC's and Clang's portable extension, as wide as the instruction set that this file is
// compiled for, and loads and stores of the three dtypes.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/tensor.h"

#if !defined(SR3FAST_ISA)
#error "csrc/cpu is compiled once an instruction set: CMake defines SR3FAST_ISA"
#endif

#define SR3FAST_INLINE inline __attribute__((always_inline))

namespace sr3fast::cpu::SR3FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Words16 __attribute__((vector_size(kLanes * 2)));

// The primitives of csrc/common/noise.h over a vector of counters.
struct Lanes {
  using Word = Words32;
  using Int = Ints;
  using Float = Floats;

  static SR3FAST_INLINE Float as_float(Word i) { return (Floats)i; }
  static SR3FAST_INLINE Word as_word(Float f) { return (Words32)f; }
  static SR3FAST_INLINE Float to_float(Int i) { return __builtin_convertvector(i, Floats); }
  static SR3FAST_INLINE Float sqrt(Float x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
  }
  // 32 x 32 bits to high and low words: the even lanes and the odd ones each take one widening multiplication
  static SR3FAST_INLINE void multiply(uint32_t m, Word a, Word& high, Word& low) {
#if defined(__AVX512F__)
    const __m512i v = (__m512i)a, k = _mm512_set1_epi32(static_cast<int>(m));
    const __m512i even = _mm512_mul_epu32(v, k), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), k);
    high = (Words32)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
    low = (Words32)_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
    const __m256i v = (__m256i)a, k = _mm256_set1_epi32(static_cast<int>(m));
    const __m256i even = _mm256_mul_epu32(v, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), k);
    high = (Words32)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    low = (Words32)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t product = static_cast<uint64_t>(m) * a[i];
      high[i] = static_cast<uint32_t>(product >> 32);
      low[i] = static_cast<uint32_t>(product);
    }
#endif
  }
};

// Four vectors a, b, c, d as a0 b0 c0 d0 a1 b1 ..: four neighbouring pixels a lane.
SR3FAST_INLINE void store_interleaved(float* p, Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX512F__)
  const __m512 ab0 = _mm512_unpacklo_ps((__m512)a, (__m512)b), ab1 = _mm512_unpackhi_ps((__m512)a, (__m512)b);
  const __m512 cd0 = _mm512_unpacklo_ps((__m512)c, (__m512)d), cd1 = _mm512_unpackhi_ps((__m512)c, (__m512)d);
  const auto pairs = [](__m512 x, __m512 y, bool high) {
    return high ? _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)))
                : _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  // each holds one quad in each of its four 128-bit parts: quads i, i + 4, i + 8, i + 12
  const __m512 q[4] = {pairs(ab0, cd0, false), pairs(ab0, cd0, true), pairs(ab1, cd1, false),
                       pairs(ab1, cd1, true)};
  const __m512 s0 = _mm512_shuffle_f32x4(q[0], q[1], 0x44), s1 = _mm512_shuffle_f32x4(q[2], q[3], 0x44);
  const __m512 s2 = _mm512_shuffle_f32x4(q[0], q[1], 0xee), s3 = _mm512_shuffle_f32x4(q[2], q[3], 0xee);
  _mm512_storeu_ps(p, _mm512_shuffle_f32x4(s0, s1, 0x88));
  _mm512_storeu_ps(p + 16, _mm512_shuffle_f32x4(s0, s1, 0xdd));
  _mm512_storeu_ps(p + 32, _mm512_shuffle_f32x4(s2, s3, 0x88));
  _mm512_storeu_ps(p + 48, _mm512_shuffle_f32x4(s2, s3, 0xdd));
#else
  for (int i = 0; i < kLanes; ++i) {
    p[4 * i] = a[i];
    p[4 * i + 1] = b[i];
    p[4 * i + 2] = c[i];
    p[4 * i + 3] = d[i];
  }
#endif
}

struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;

SR3FAST_INLINE Floats all(float x) { return Floats{} + x; }

// float

SR3FAST_INLINE float to_float(float x) { return x; }
SR3FAST_INLINE float to_float(f16 x) { return static_cast<float>(x); }
SR3FAST_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <class T>
SR3FAST_INLINE T from_float(float x) {
  return static_cast<T>(x);
}
// to nearest even; NaN stays a quiet NaN
template <>
SR3FAST_INLINE bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

SR3FAST_INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SR3FAST_INLINE Floats load(const bf16* p) {
  Words16 half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<Floats>(__builtin_convertvector(half, Words32) << 16);
}
SR3FAST_INLINE Floats load(const f16* p) {
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}

SR3FAST_INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
SR3FAST_INLINE void store(bf16* p, Floats v) {
  const Words32 bits = reinterpret_cast<Words32>(v);
  const Words32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words32 kept = v == v ? rounded : Words32{} + 0x7fc0u;
  const Words16 half = __builtin_convertvector(kept, Words16);
  std::memcpy(p, &half, sizeof half);
}
SR3FAST_INLINE void store(f16* p, Floats v) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<f16>(v[i]);
}

// The last, short vector of a stretch: n elements, the rest is padding.
template <class T>
SR3FAST_INLINE Floats load_some(const T* p, int64_t n, float pad) {
  if (n >= kLanes) return load(p);
  Floats v = all(pad);
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}

template <class T>
SR3FAST_INLINE void store_some(T* p, int64_t n, Floats v) {
  if (n >= kLanes) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
}

SR3FAST_INLINE float sum(Floats v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// 1/(1 + exp(-x)): exp by a degree 6 polynomial on [-ln2/2, ln2/2], within 2 ulp
SR3FAST_INLINE Floats sigmoid(Floats x) {
  Floats t = -x;
  t = t > all(88.0f) ? all(88.0f) : t;
  t = t < all(-87.0f) ? all(-87.0f) : t;
  const Floats magic = all(12582912.0f);  // 1.5 2^23: the sum's low bits hold the rounded integer
  const Floats shifted = t * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = (t - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = all(1.3888889e-3f);
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints exponent = (reinterpret_cast<Ints>(shifted) - 0x4b400000 + 127) << 23;
  return 1.0f / (1.0f + p * reinterpret_cast<Floats>(exponent));
}

// A parameter vector element of any dtype.
SR3FAST_INLINE float read(const Vector& v, int64_t i) {
  switch (v.dtype) {
    case Dtype::f32:
      return static_cast<const float*>(v.data)[i];
    case Dtype::f16:
      return to_float(static_cast<const f16*>(v.data)[i]);
    default:
      return to_float(static_cast<const bf16*>(v.data)[i]);
  }
}

// Calls f(T*) with the tensor's element type.
template <class F>
SR3FAST_INLINE void with_type(const Tensor& t, F&& f) {
  switch (t.dtype) {
    case Dtype::f32:
      f(static_cast<float*>(t.data));
      break;
    case Dtype::f16:
      f(static_cast<f16*>(t.data));
      break;
    case Dtype::bf16:
      f(static_cast<bf16*>(t.data));
      break;
  }
}

}  // namespace sr3fast::cpu::SR3FAST_ISA
