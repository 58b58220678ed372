// Vectors of float in GCC's and Clang's portable extension, as wide as the instruction set that this file is
// compiled for, and loads and stores of the three dtypes.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/tensor.h"

#if !defined(SR3FAST_ISA)
#error "csrc/cpu is compiled once an instruction set: CMake defines SR3FAST_ISA"
#endif

#define SR3FAST_INLINE inline __attribute__((always_inline))
#define SR3FAST_NOINLINE __attribute__((noinline))
#define SR3FAST_INLINE_LAMBDA __attribute__((always_inline))

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
typedef uint64_t Words64 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Words16 __attribute__((vector_size(kLanes * 2)));

// The primitives of csrc/common/noise.h on one vector.
namespace vector {

SR3FAST_INLINE Floats sqrt(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

SR3FAST_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

SR3FAST_INLINE Floats where(Words32 bits, uint32_t mask, Floats a, Floats b) {
#if defined(__AVX512F__)
  const __mmask16 set = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(static_cast<int>(mask)));
  return (Floats)_mm512_mask_mov_ps((__m512)b, set, (__m512)a);
#else
  return (bits & mask) != 0u ? a : b;
#endif
}

// see One::uniform
SR3FAST_INLINE Words32 uniform(Words32 a) {
#if defined(__AVX512F__)
  return (Words32)_mm512_cvtepu32_ps((__m512i)((a & 0xffffff00u) | 0x100u));
#else  // only signed numbers convert
  return (Words32) __builtin_convertvector((Ints)((a >> 8) | 1u), Floats) + (8u << 23);
#endif
}

// The 64 bits of m a from the low halves of a.
SR3FAST_INLINE Words64 product(uint32_t m, Words64 a) {
#if defined(__AVX512F__)
  return (Words64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (Words64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
  return (Words64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#elif defined(__aarch64__)
  return (Words64)vmull_n_u32(vmovn_u64((uint64x2_t)a), m);
#else
  return (a & 0xffffffffu) * m;
#endif
}

// The low halves of both, those of `even` in the even lanes.
SR3FAST_INLINE Words32 narrow(Words64 even, Words64 odd) {
#if defined(__AVX512F__)
  return (Words32)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
  return (Words32)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
#else
  return (Words32)((even & 0xffffffffu) | (odd << 32));
#endif
}

}  // namespace vector

// N vectors that go through the arithmetic side by side: its chains of dependent operations are long, and one
// alone leaves the ports idle.
template <class V, int N>
struct Group {
  V v[N];

  template <class U>
  SR3FAST_INLINE explicit operator Group<U, N>() const {
    return map(*this, [](V x) { return (U)x; });
  }
};

template <class V, int N, class F>
SR3FAST_INLINE auto map(const Group<V, N>& a, F&& f) {
  Group<decltype(f(a.v[0])), N> r;
  for (int i = 0; i < N; ++i) r.v[i] = f(a.v[i]);
  return r;
}

#define SR3FAST_GROUP_OPERATOR(op)                                                      \
  template <class V, int N>                                                             \
  SR3FAST_INLINE Group<V, N> operator op(Group<V, N> a, const Group<V, N>& b) {         \
    for (int i = 0; i < N; ++i) a.v[i] = a.v[i] op b.v[i];                              \
    return a;                                                                           \
  }                                                                                     \
  template <class V, int N, class S, class = std::enable_if_t<std::is_arithmetic_v<S>>> \
  SR3FAST_INLINE Group<V, N> operator op(const Group<V, N>& a, S b) {                   \
    return map(a, [b](V x) { return x op b; });                                         \
  }                                                                                     \
  template <class V, int N, class S, class = std::enable_if_t<std::is_arithmetic_v<S>>> \
  SR3FAST_INLINE Group<V, N> operator op(S a, const Group<V, N>& b) {                   \
    return map(b, [a](V x) { return a op x; });                                         \
  }
SR3FAST_GROUP_OPERATOR(+)
SR3FAST_GROUP_OPERATOR(-)
SR3FAST_GROUP_OPERATOR(*)
SR3FAST_GROUP_OPERATOR(^)
SR3FAST_GROUP_OPERATOR(&)
SR3FAST_GROUP_OPERATOR(|)
SR3FAST_GROUP_OPERATOR(<<)
SR3FAST_GROUP_OPERATOR(>>)
#undef SR3FAST_GROUP_OPERATOR

template <int N>
struct Lanes {
  using Word = Group<Words32, N>;
  using Int = Group<Ints, N>;
  using Float = Group<Floats, N>;

  static SR3FAST_INLINE Float as_float(const Word& i) { return (Float)i; }
  static SR3FAST_INLINE Word as_word(const Float& f) { return (Word)f; }
  static SR3FAST_INLINE Float to_float(const Int& i) {
    return map(i, [](Ints x) { return __builtin_convertvector(x, Floats); });
  }
  static SR3FAST_INLINE Float negative(const Float& x) { return as_float(as_word(x) ^ 0x80000000u); }
  static SR3FAST_INLINE Word uniform(const Word& a) { return map(a, vector::uniform); }
  static SR3FAST_INLINE Float sqrt(const Float& x) { return map(x, vector::sqrt); }
  static SR3FAST_INLINE Float fused(const Float& a, const Float& b, Float c) {
    for (int i = 0; i < N; ++i) c.v[i] = vector::fused(a.v[i], b.v[i], c.v[i]);
    return c;
  }
  static SR3FAST_INLINE Float where(const Word& bits, uint32_t mask, const Float& a, Float b) {
    for (int i = 0; i < N; ++i) b.v[i] = vector::where(bits.v[i], mask, a.v[i], b.v[i]);
    return b;
  }
};

// For philox: one counter a 64-bit lane, where a product needs no shuffling of its halves.
template <int N>
struct WideLanes {
  using Word = Group<Words64, N>;

  static SR3FAST_INLINE void multiply(uint32_t m, const Word& a, Word& high, Word& low) {
    low = map(a, [m](Words64 x) { return vector::product(m, x); });
    high = low >> 32;
  }
};

// Noise is drawn for kQuads quads at a time: the lanes of a Words64, in the order in which each_pixels needs
// the fewest shuffles. Their words make one vector of radii and one of angles, two pairs a quad.
constexpr int kQuads = kLanes / 2;
SR3FAST_INLINE Words64 quad_of_lane() {
  Words64 quad;
  for (int i = 0; i < kQuads; ++i) quad[i] = static_cast<uint64_t>(i / 2 + i % 2 * (kQuads / 2));
  return quad;
}

// First and second normals of pairs in that order, as vectors of neighbouring pixels: f(offset, vector).
template <class F>
SR3FAST_INLINE void each_pixels(Floats first, Floats second, F&& f) {
#if defined(__AVX512F__)
  f(0, (Floats)_mm512_unpacklo_ps((__m512)first, (__m512)second));
  f(kLanes, (Floats)_mm512_unpackhi_ps((__m512)first, (__m512)second));
#elif defined(__AVX2__)
  f(0, (Floats)_mm256_unpacklo_ps((__m256)first, (__m256)second));
  f(kLanes, (Floats)_mm256_unpackhi_ps((__m256)first, (__m256)second));
#else
  f(0, Floats{first[0], second[0], first[1], second[1]});
  f(kLanes, Floats{first[2], second[2], first[3], second[3]});
#endif
}

struct bf16 {
  uint16_t bits;
};
struct f16 {  // _Float16 came to x86 with GCC 12 and Clang 15
  uint16_t bits;
};

SR3FAST_INLINE Floats all(float x) { return Floats{} + x; }

SR3FAST_INLINE Floats from_f16(Words16 half) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)half);
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps((__m128i)half);
#else
  const Words32 words = __builtin_convertvector(half, Words32), magnitude = words & 0x7fffu;
  const Words32 normal = (magnitude << 13) + (112u << 23);
  const Words32 subnormal =
      (Words32)((Floats)(normal + (1u << 23)) - 0x1p-14f);  // exact where floats are flushed too
  const Words32 finite = magnitude < 0x400u ? subnormal : normal;
  return (Floats)((words & 0x8000u) << 16 | (magnitude < 0x7c00u ? finite : magnitude << 13 | 0x7f800000u));
#endif
}

// to nearest even; NaN stays a quiet NaN
SR3FAST_INLINE Words16 to_f16(Floats v) {
#if defined(__AVX512F__)
  return (Words16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (Words16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const Words32 bits = (Words32)v, magnitude = bits & 0x7fffffffu;
  const Words32 least =
      (Words32)((Floats)magnitude + 0.5f) - 0x3f000000u;  // 0.5's last bit is the least half
  const Words32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const Words32 special = magnitude > 0x7f800000u ? Words32{} + 0x7e00u : Words32{} + 0x7c00u;
  const Words32 finite =
      magnitude < 0x38800000u ? least : normal;  // from 2^-14 on normal, from 2^16 on infinite
  return __builtin_convertvector((magnitude < 0x47800000u ? finite : special) | (bits >> 16 & 0x8000u),
                                 Words16);
#endif
}

// float

SR3FAST_INLINE float to_float(float x) { return x; }
SR3FAST_INLINE float to_float(f16 x) { return from_f16(Words16{x.bits})[0]; }
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

template <>
SR3FAST_INLINE f16 from_float<f16>(float x) {
  return {to_f16(Floats{x})[0]};
}

SR3FAST_INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SR3FAST_INLINE Floats load(const bf16* p) {
  Words16 half;
  std::memcpy(&half, p, sizeof half);
#if defined(__AVX512F__)
  const auto words = (Words32)_mm512_cvtepu16_epi32((__m256i)half);
#else
  const auto words = __builtin_convertvector(half, Words32);
#endif
  return reinterpret_cast<Floats>(words << 16);
}
SR3FAST_INLINE Floats load(const f16* p) {
  Words16 half;
  std::memcpy(&half, p, sizeof half);
  return from_f16(half);
}

SR3FAST_INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
SR3FAST_INLINE Words16 to_bf16(Floats v) {
  const Words32 bits = reinterpret_cast<Words32>(v);
  const Words32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words32 kept = v == v ? rounded : Words32{} + 0x7fc0u;
#if defined(__AVX512F__)
  return (Words16)_mm512_cvtepi32_epi16((__m512i)kept);
#elif defined(__AVX2__)
  const __m256i both = _mm256_packus_epi32((__m256i)kept, (__m256i)kept);  // a half's low words, twice
  return (Words16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0x08));
#else
  return __builtin_convertvector(kept, Words16);
#endif
}
SR3FAST_INLINE void store(bf16* p, Floats v) {
  const Words16 half = to_bf16(v);
  std::memcpy(p, &half, sizeof half);
}
SR3FAST_INLINE void store(f16* p, Floats v) {
  const Words16 half = to_f16(v);
  std::memcpy(p, &half, sizeof half);
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

// Stores past the caches what is too large to be found there again: the lines need not be read first.
SR3FAST_INLINE void stream(float* p, Floats v) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(p) % sizeof v == 0) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(p) % sizeof v == 0) return _mm256_stream_ps(p, (__m256)v);
#endif
  store(p, v);
}
SR3FAST_INLINE void stream(bf16* p, Floats v) {
  const Words16 half = to_bf16(v);
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(p) % sizeof half == 0)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)half);
#elif defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(p) % sizeof half == 0)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)half);
#endif
  std::memcpy(p, &half, sizeof half);
}
SR3FAST_INLINE void stream(f16* p, Floats v) { store(p, v); }

// What was streamed is seen by whoever sees what this thread does next.
SR3FAST_INLINE void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
SR3FAST_INLINE void put(T* p, int64_t n, Floats v, bool far) {
  if (n >= kLanes && far)
    stream(p, v);
  else
    store_some(p, n, v);
}

SR3FAST_INLINE float sum(Floats v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// exp(-x) = 2^n 2^r, within 2 ulp, or for results of 16 bits within 2^-13: n the nearest integer, 2^r by a
// polynomial on [-1/2, 1/2].
template <class Result>
SR3FAST_INLINE Floats exp_minus(Floats x) {
  constexpr float kLog2E = 1.44269504f;
  const auto exp2 = [](Floats r) {
    if (sizeof(Result) == 2)
      return ((5.517167e-2f * r + 2.4261111e-1f) * r + 6.9326099e-1f) * r + 9.9992807e-1f;
    Floats p = all(1.3264727e-3f);
    p = p * r + 9.6715130e-3f;
    p = p * r + 5.5507336e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.9314700e-1f;
    return p * r + 1.0f;
  };
#if defined(__AVX512F__)
  const __m512 t = (__m512)(x * -kLog2E);
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (Floats)_mm512_scalef_ps((__m512)exp2(x * -kLog2E - (Floats)n), n);
#else
  Floats t = x * -kLog2E;
  t = t > all(126.0f) ? all(126.0f) : t;
  t = t < all(-126.0f) ? all(-126.0f) : t;
  const Floats shifted = t + 12582912.0f;  // 1.5 2^23: the sum's low bits hold the rounded integer
  const Ints exponent = (reinterpret_cast<Ints>(shifted) - 0x4b400000 + 127) << 23;
  return exp2(t - (shifted - 12582912.0f)) * reinterpret_cast<Floats>(exponent);
#endif
}

template <class Result>
SR3FAST_INLINE Floats sigmoid(Floats x) {
  return 1.0f / (1.0f + exp_minus<Result>(x));
}
template <class Result>
SR3FAST_INLINE Floats silu(Floats x) {
  return x / (1.0f + exp_minus<Result>(x));
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
