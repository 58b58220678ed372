// Noise v1: the arithmetic that the CPU and CUDA homes compile alike, over one counter (`One`, here) or over
// a vector of them (`Lanes`, csrc/cpu/simd.h).
//
// Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller in float32 operations that round one by one, so the
// bits are the same everywhere. sr3fast/noise.py is the specification. Compile with -ffp-contract=off and
// --fmad=false.
#pragma once

#include "tensor.h"

#if defined(__FAST_MATH__)
#error "noise v1 needs IEEE arithmetic: compile without -ffast-math"
#endif

#if !defined(__CUDA_ARCH__)
#include <cmath>
#include <cstring>
#endif

namespace sr3fast {

// What the draws are for; part of the counter.
enum Domain : uint32_t { kInitial = 0, kRefine = 1, kTrain = 2, kLevel = 3, kAugment = 4 };

// The primitives of one lane: a word, a signed word and a float.
struct One {
  using Word = uint32_t;
  using Int = int32_t;
  using Float = float;

  static SR3FAST_HD Float as_float(Word i) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(i);
#else
    float f;
    std::memcpy(&f, &i, sizeof f);
    return f;
#endif
  }
  static SR3FAST_HD Word as_word(Float f) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(f);
#else
    uint32_t i;
    std::memcpy(&i, &f, sizeof i);
    return i;
#endif
  }
  static SR3FAST_HD Float to_float(Int i) { return static_cast<float>(i); }  // to nearest even
  static SR3FAST_HD Float sqrt(Float x) {                                    // correctly rounded
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return std::sqrt(x);
#endif
  }
  static SR3FAST_HD void multiply(uint32_t m, Word a, Word& high, Word& low) {
#if defined(__CUDA_ARCH__)
    high = __umulhi(m, a);
    low = m * a;
#else
    const uint64_t product = static_cast<uint64_t>(m) * a;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
#endif
  }
};

template <class L>
struct WordsOf {
  typename L::Word a0, a1, a2, a3;
};

template <class L>
struct NormalsOf {
  typename L::Float z0, z1, z2, z3;
};

using Words = WordsOf<One>;
using Normals = NormalsOf<One>;

template <class L = One>
SR3FAST_HD WordsOf<L> philox(uint64_t seed, typename L::Word c0, typename L::Word c1, typename L::Word c2,
                             typename L::Word c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__) || defined(__clang__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    typename L::Word high0, low0, high1, low1;
    L::multiply(0xD2511F53u, c0, high0, low0);
    L::multiply(0xCD9E8D57u, c2, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// ((a >> 9) + 0.5) 2^-23, exact
template <class L = One>
SR3FAST_HD typename L::Float uniform(typename L::Word a) {
  return (L::to_float((typename L::Int)(a >> 9)) + 0.5f) * 1.1920928955078125e-7f;
}

// a gives the radius, b the angle
template <class L = One>
SR3FAST_HD void box_muller(typename L::Word a, typename L::Word b, typename L::Float& first,
                           typename L::Float& second) {
  using Word = typename L::Word;
  using Int = typename L::Int;
  using Float = typename L::Float;
  const Word i = L::as_word(uniform<L>(a));
  const Int exponent = (Int)(i - 0x3f3504f3u) >> 23;
  const Float f = L::as_float(i - ((Word)exponent << 23)) - 1.0f;
  const Float e = L::to_float(exponent);
  const Float s = f * f;
  Float p = 7.0376836292e-2f * f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  Float y = p * f * s;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * s;
  const Float log_u = (f + y) + e * 0.693359375f;
  const Float r = L::sqrt(-2.0f * log_u);

  const Word q = (((b >> 29) + 1u) >> 1) & 3u;
  const Float v = L::to_float((Int)(b - (q << 30))) * static_cast<float>(1.5707963267948966 / 1073741824.0);
  const Float v2 = v * v;
  const Float sin_v = ((-1.9515295891e-4f * v2 + 8.3321608736e-3f) * v2 - 1.6666654611e-1f) * v2 * v + v;
  const Float cos_v =
      ((2.443315711809948e-5f * v2 - 1.388731625493765e-3f) * v2 + 4.166664568298827e-2f) * v2 * v2 -
      0.5f * v2 + 1.0f;
  // swap them where q is odd; cos is negative where q is 1 or 2, sin where it is 2 or 3
  const Word sin_bits = L::as_word(sin_v), cos_bits = L::as_word(cos_v);
  const Word swap = (sin_bits ^ cos_bits) & (0u - (q & 1u));
  first = r * L::as_float(cos_bits ^ swap ^ (((q + 1u) & 2u) << 30));
  second = r * L::as_float(sin_bits ^ swap ^ ((q & 2u) << 30));
}

// The normals of pixels w = 4 w4 .. 4 w4 + 3, in the coordinates of the whole image.
template <class L = One>
SR3FAST_HD NormalsOf<L> normals(uint64_t seed, uint32_t domain, uint32_t step, uint32_t c, uint32_t h,
                                typename L::Word w4) {
  using Word = typename L::Word;
  const WordsOf<L> a = philox<L>(seed, w4, Word{} + h, Word{} + step, Word{} + (domain * 65536u + c));
  NormalsOf<L> z;
  box_muller<L>(a.a0, a.a1, z.z0, z.z1);
  box_muller<L>(a.a2, a.a3, z.z2, z.z3);
  return z;
}

}  // namespace sr3fast
