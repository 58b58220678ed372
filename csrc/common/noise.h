// Noise v1: the arithmetic that the CPU and CUDA homes compile alike, over one counter (`One`, here) or over
// vectors of them (csrc/cpu/simd.h).
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

constexpr uint32_t kPhilox0 = 0xD2511F53u, kPhilox1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;      // key increments

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
  static SR3FAST_HD Float negative(Float x) { return -x; }
  // correctly rounded, for x in [2^-100, inf): -2 log u is at least 2^-23
  static SR3FAST_HD Float sqrt(Float x) {
#if defined(__CUDA_ARCH__)
    // what the compiler makes of __fsqrt_rn, less its branch for what is outside that range
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    const float root = x * y;
    return fma(fma(-root, root, x), 0.5f * y, root);
#else
    return std::sqrt(x);
#endif
  }
  // the bits of 2^32 u, u = ((a >> 9) + 1/2) 2^-23
  static SR3FAST_HD Word uniform(Word a) {
#if defined(__CUDA_ARCH__)
    // 2^23 + (a >> 9) by its bits: one shift where a conversion needs its operand masked first
    return as_word(as_float(__funnelshift_r(a, 0x4B000000u >> 23, 9)) - 8388607.5f) + (9u << 23);
#else
    return as_word(static_cast<float>((a & 0xffffff00u) | 0x100u));
#endif
  }
  // a b + c where a b is exact, so that fusing it or not is the same
  static SR3FAST_HD Float fused(Float a, Float b, Float c) {
#if defined(__CUDA_ARCH__)
    return fma(a, b, c);
#else
    return a * b + c;
#endif
  }
  // a where a bit of `mask` is set in `bits`, else b
  static SR3FAST_HD Float where(Word bits, uint32_t mask, Float a, Float b) { return bits & mask ? a : b; }
  static SR3FAST_HD void multiply(uint32_t m, Word a, Word& high, Word& low) {
#if defined(__CUDA_ARCH__)
    // in one instruction: from __umulhi and a product, or 64 bits, the compiler makes two or three
    asm("{\n\t.reg .b64 p;\n\tmul.wide.u32 p, %2, %3;\n\tmov.b64 {%1, %0}, p;\n\t}"
        : "=r"(high), "=r"(low)
        : "r"(a), "r"(m));
#else
    const uint64_t product = static_cast<uint64_t>(m) * a;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
#endif
  }

 private:
#if defined(__CUDA_ARCH__)
  // in assembly: an fma that the compiler makes by itself stands out
  static SR3FAST_HD Float fma(Float a, Float b, Float c) {
    float d;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
  }
#endif
};

template <class L>
struct WordsOf {
  typename L::Word a0, a1, a2, a3;
};

struct Normals {
  float z0, z1, z2, z3;
};

// One round: (c0, c1, c2, c3) from the products M0 c0 = (high0, low0) and M1 c2 = (high1, low1).
template <class L>
SR3FAST_HD void philox_round(uint32_t k0, uint32_t k1, typename L::Word& c0, typename L::Word& c1,
                             typename L::Word& c2, typename L::Word& c3) {
  typename L::Word high0, low0, high1, low1;
  L::multiply(kPhilox0, c0, high0, low0);
  L::multiply(kPhilox1, c2, high1, low1);
  c0 = high1 ^ c1 ^ k0;
  c1 = low1;
  c2 = high0 ^ c3 ^ k1;
  c3 = low0;
}

// The key of a round: made of the seed, or kept.
struct RoundKey {
  uint32_t k0, k1;
};
constexpr int kRounds = 10;
struct RoundKeys {
  RoundKey of[kRounds];
};
SR3FAST_HD RoundKey round_key(uint64_t seed, uint32_t round) {
  return {static_cast<uint32_t>(seed) + round * kWeyl0, static_cast<uint32_t>(seed >> 32) + round * kWeyl1};
}
SR3FAST_HD RoundKey round_key(const RoundKeys& keys, uint32_t round) { return keys.of[round]; }

// Philox4x32-10 of an image's counters (column, row, step, draw) in parts, since a quarter of its products
// depend on the column or the row alone. A Word may be wider than 32 bits: only its low half counts, in the
// result too.
//
// What the first three rounds make of all but the row: word 3 of the first, 1 of the second, 3 of the third
// and the high product in its word 2.
template <class L>
struct PhiloxColumn {
  typename L::Word first3, second1, third3, third_high;
};
template <class L = One, class Key>
SR3FAST_HD PhiloxColumn<L> philox_column(const Key& key, typename L::Word column, uint32_t step,
                                         uint32_t draw) {
  PhiloxColumn<L> made;
  typename L::Word high;
  L::multiply(kPhilox0, column, high, made.first3);
  L::multiply(kPhilox1, high ^ (draw ^ round_key(key, 0).k1), high, made.second1);
  L::multiply(kPhilox0, high ^ ((kPhilox1 * step) ^ round_key(key, 1).k0), made.third_high, made.third3);
  return made;
}

// And of the row: its share in word 2 of the second and of the third.
struct PhiloxRow {
  uint32_t second2, third2;
};
template <class Key>
SR3FAST_HD PhiloxRow philox_row(const Key& key, uint32_t row, uint32_t step) {
  uint32_t high, low;
  One::multiply(kPhilox1, step, high, low);
  One::multiply(kPhilox0, high ^ row ^ round_key(key, 0).k0, high, low);
  return {high ^ round_key(key, 1).k1, low ^ round_key(key, 2).k1};
}

template <class L = One, class Key>
SR3FAST_HD WordsOf<L> philox(const Key& key, const PhiloxColumn<L>& column, PhiloxRow row) {
  typename L::Word a0, a1, a2 = column.third_high ^ row.third2, a3 = column.third3;
  L::multiply(kPhilox1, column.first3 ^ row.second2, a0, a1);
  a0 = a0 ^ column.second1 ^ round_key(key, 2).k0;
#if defined(__CUDACC__) || defined(__clang__)
#pragma unroll
#else
#pragma GCC unroll 8
#endif
  for (uint32_t round = 3; round < kRounds; ++round) {
    const RoundKey k = round_key(key, round);
    philox_round<L>(k.k0, k.k1, a0, a1, a2, a3);
  }
  return {a0, a1, a2, a3};
}

// a gives the radius, b the angle. The operations are those of sr3fast/noise.py but for powers of two, which
// change no rounding: u is 2^32 times its own, and g = -2 f and its polynomial lead to -2 log u without a
// last product.
template <class L = One>
SR3FAST_HD void box_muller(typename L::Word a, typename L::Word b, typename L::Float& first,
                           typename L::Float& second) {
  using Word = typename L::Word;
  using Int = typename L::Int;
  using Float = typename L::Float;
  // u = (1 + f) 2^e, 1 + f in [sqrt(1/2), sqrt(2))
  const Word i = L::uniform(a) - (0x3f3504f3u + (32u << 23));
  const Float e = L::to_float((Int)i >> 23);
  const Float g = 2.0f - L::as_float((i & 0x7fffffu) + (0x3f3504f3u + (1u << 23)));  // 2 - 2 (1 + f)
  const Float s = g * g;
  Float p = 7.0376836292e-2f / 1024.0f * g + 1.1514610310e-1f / 512.0f;
  p = p * g + 1.1676998740e-1f / 256.0f;
  p = p * g + 1.2420140846e-1f / 128.0f;
  p = p * g + 1.4249322787e-1f / 64.0f;
  p = p * g + 1.6668057665e-1f / 32.0f;
  p = p * g + 2.0000714765e-1f / 16.0f;
  p = p * g + 2.4999993993e-1f / 8.0f;
  p = p * g + 3.3333331174e-1f / 4.0f;
  Float y = p * g * s;
  y = y + e * (2.0f * 2.12194440e-4f);
  y = L::fused(Float{} + 0.25f, s, y);
  const Float r = L::sqrt(L::fused(e, Float{} + -2.0f * 0.693359375f, g + y));

  // The quadrant q is the top two bits of `turn`; what b leaves in it is its low 30 bits, signed: b << 2 is 4
  // times that
  const Word turn = b + 0x20000000u;
  const Float v = L::to_float((Int)(b << 2)) * static_cast<float>(1.5707963267948966 / 4294967296.0);
  const Float v2 = v * v;
  const Float sin_v = ((-1.9515295891e-4f * v2 + 8.3321608736e-3f) * v2 - 1.6666654611e-1f) * v2 * v + v;
  const Float cos_v =
      L::fused(
          Float{} - 0.5f, v2,
          ((2.443315711809948e-5f * v2 - 1.388731625493765e-3f) * v2 + 4.166664568298827e-2f) * v2 * v2) +
      1.0f;
  // q = 0: (cos, sin); 1: (-sin, cos); 2 and 3: the negatives of these
  constexpr uint32_t kSign = 0x80000000u, kOdd = 0x40000000u;
  const Float minus_sin = L::negative(sin_v);
  const Float signed_r = L::as_float(L::as_word(r) ^ (turn & kSign));
  first = signed_r * L::where(turn, kOdd, minus_sin, cos_v);
  second = signed_r * L::where(turn, kOdd, cos_v, sin_v);
}

// The normals of pixels w = 4 w4 .. 4 w4 + 3, in the coordinates of the whole image.
template <class Key>
SR3FAST_HD Normals normals(const Key& key, uint32_t domain, uint32_t step, uint32_t c, uint32_t h,
                           uint32_t w4) {
  const WordsOf<One> a =
      philox(key, philox_column(key, w4, step, domain * 65536u + c), philox_row(key, h, step));
  Normals z;
  box_muller(a.a0, a.a1, z.z0, z.z1);
  box_muller(a.a2, a.a3, z.z2, z.z3);
  return z;
}

}  // namespace sr3fast
