// Noise v1 of one counter: the per-element arithmetic that the CPU and CUDA homes compile alike.
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

struct Words {
  uint32_t a0, a1, a2, a3;
};

struct Normals {
  float z0, z1, z2, z3;
};

SR3FAST_HD float bits_to_float(uint32_t i) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(i);
#else
  float f;
  std::memcpy(&f, &i, sizeof f);
  return f;
#endif
}

SR3FAST_HD uint32_t float_to_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t i;
  std::memcpy(&i, &f, sizeof i);
  return i;
#endif
}

SR3FAST_HD float sqrt_rn(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

SR3FAST_HD uint32_t mulhi(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

SR3FAST_HD Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = mulhi(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
    const uint32_t hi1 = mulhi(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// ((a >> 9) + 0.5) 2^-23, exact
SR3FAST_HD float uniform(uint32_t a) {
  return (static_cast<float>(static_cast<int32_t>(a >> 9)) + 0.5f) * 1.1920928955078125e-7f;
}

// a gives the radius, b the angle
SR3FAST_HD void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  const uint32_t i = float_to_bits(uniform(a));
  const int32_t exponent = static_cast<int32_t>(i - 0x3f3504f3u) >> 23;
  const float f = bits_to_float(i - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  const float s = f * f;
  float p = 7.0376836292e-2f;
  p = p * f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  float y = p * f * s;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * s;
  const float log_u = (f + y) + e * 0.693359375f;
  const float r = sqrt_rn(-2.0f * log_u);

  const uint32_t q = (((b >> 29) + 1u) >> 1) & 3u;
  const float v = static_cast<float>(static_cast<int32_t>(b - (q << 30))) *
                  static_cast<float>(1.5707963267948966 / 1073741824.0);
  const float v2 = v * v;
  const float sin_v =
      ((-1.9515295891e-4f * v2 + 8.3321608736e-3f) * v2 - 1.6666654611e-1f) * v2 * v + v;
  const float cos_v =
      ((2.443315711809948e-5f * v2 - 1.388731625493765e-3f) * v2 + 4.166664568298827e-2f) * v2 * v2 -
      0.5f * v2 + 1.0f;
  const bool odd = q & 1u;
  const uint32_t cos_sign = ((q + 1u) & 2u) << 30;  // q is 1 or 2
  const uint32_t sin_sign = (q & 2u) << 30;         // q is 2 or 3
  const uint32_t cos_bits = odd ? float_to_bits(sin_v) : float_to_bits(cos_v);
  const uint32_t sin_bits = odd ? float_to_bits(cos_v) : float_to_bits(sin_v);
  first = r * bits_to_float(cos_bits ^ cos_sign);
  second = r * bits_to_float(sin_bits ^ sin_sign);
}

// The normals of pixels w = 4 w4 .. 4 w4 + 3, in the coordinates of the whole image.
SR3FAST_HD Normals normals(uint64_t seed, uint32_t domain, uint32_t step, uint32_t c, uint32_t h, uint32_t w4) {
  const Words a = philox(seed, w4, h, step, domain * 65536u + c);
  Normals z;
  box_muller(a.a0, a.a1, z.z0, z.z1);
  box_muller(a.a2, a.a3, z.z2, z.z3);
  return z;
}

}  // namespace sr3fast
