// Elements that one instruction loads or stores.
#pragma once

#include "gpu.cuh"

namespace sr3fast::cuda {

template <int bytes>
struct RawBytes;
template <>
struct RawBytes<16> { using type = uint4; };
template <>
struct RawBytes<8> { using type = uint2; };
template <>
struct RawBytes<4> { using type = uint32_t; };
template <>
struct RawBytes<2> { using type = uint16_t; };

// N elements of type T as they lie in memory: loaded first, made floats where they are used, so that several loads
// are under way at once. Addresses are multiples of its size.
template <class T, int N>
struct Vec {
  using Raw = typename RawBytes<sizeof(T) * N>::type;
  Raw raw;

  static __device__ __forceinline__ Vec load(const T* p) { return {*reinterpret_cast<const Raw*>(p)}; }
  // of memory that no thread of this kernel writes
  static __device__ __forceinline__ Vec load_constant(const T* p) { return {__ldg(reinterpret_cast<const Raw*>(p))}; }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<Raw*>(p) = raw; }

  __device__ __forceinline__ void floats(float (&x)[N]) const {
    T element[N];
    memcpy(element, &raw, sizeof raw);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(element[i]);
  }
  __device__ __forceinline__ float at(int i) const {
    T element[N];
    memcpy(element, &raw, sizeof raw);
    return to_float(element[i]);
  }
  static __device__ __forceinline__ Vec of_elements(const T (&element)[N]) {
    Vec v;
    memcpy(&v.raw, element, sizeof v.raw);
    return v;
  }
  static __device__ __forceinline__ Vec of(const float (&x)[N]) {
    T element[N];
#pragma unroll
    for (int i = 0; i < N; ++i) element[i] = from_float<T>(x[i]);
    return of_elements(element);
  }
};

}  // namespace sr3fast::cuda
