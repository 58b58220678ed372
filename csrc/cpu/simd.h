// Vectors of float in GCC's and Clang's portable extension, as wide as the instruction set that this file is
// compiled for, and loads and stores of the three dtypes.
#pragma once

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
    case Dtype::f32: return static_cast<const float*>(v.data)[i];
    case Dtype::f16: return to_float(static_cast<const f16*>(v.data)[i]);
    default: return to_float(static_cast<const bf16*>(v.data)[i]);
  }
}

// Calls f(T*) with the tensor's element type.
template <class F>
SR3FAST_INLINE void with_type(const Tensor& t, F&& f) {
  switch (t.dtype) {
    case Dtype::f32: f(static_cast<float*>(t.data)); break;
    case Dtype::f16: f(static_cast<f16*>(t.data)); break;
    case Dtype::bf16: f(static_cast<bf16*>(t.data)); break;
  }
}

}  // namespace sr3fast::cpu::SR3FAST_ISA
