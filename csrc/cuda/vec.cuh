// Elements that one instruction loads or stores.
#pragma once

#include "gpu.cuh"

namespace sr3fast::cuda {

template <int bytes>
struct RawBytes;
template <>
struct RawBytes<16> {
  using type = uint4;
};
template <>
struct RawBytes<8> {
  using type = uint2;
};
template <>
struct RawBytes<4> {
  using type = uint32_t;
};
template <>
struct RawBytes<2> {
  using type = uint16_t;
};

// 32-bit words, by an index that the compiler knows: copying bytes instead makes it split the access.
__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ uint32_t word(const uint2& v, int i) { return i == 0 ? v.x : v.y; }
__device__ __forceinline__ uint32_t word(const uint32_t& v, int) { return v; }
__device__ __forceinline__ uint32_t word(const uint16_t& v, int) { return v; }

// N elements of type T as they lie in memory: loaded first, made floats where they are used, so that several
// loads are under way at once. Addresses are multiples of its size.
template <class T, int N>
struct Vec {
  using Raw = typename RawBytes<sizeof(T) * N>::type;
  Raw raw;

  static __device__ __forceinline__ Vec load(const T* p) { return {*reinterpret_cast<const Raw*>(p)}; }
  // of memory that no thread of this kernel writes
  static __device__ __forceinline__ Vec load_constant(const T* p) {
    return {__ldg(reinterpret_cast<const Raw*>(p))};
  }
  __device__ __forceinline__ void store(T* p) const { store_global(reinterpret_cast<Raw*>(p), raw); }
  __device__ __forceinline__ void keep(T* p) const { store_shared(reinterpret_cast<Raw*>(p), raw); }

  static __device__ __forceinline__ void copy(T* shared, const T* global) {
    copy_later(reinterpret_cast<Raw*>(shared), reinterpret_cast<const Raw*>(global));
  }

  __device__ __forceinline__ float at(int i) const {
    return unpack<T>(word(raw, i * static_cast<int>(sizeof(T)) / 4), i);
  }
  __device__ __forceinline__ void floats(float (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = at(i);
  }
  static __device__ __forceinline__ Vec of(const float (&x)[N]) {
    uint32_t w[4] = {};
#pragma unroll
    for (int i = 0; i < N; i += 4 / sizeof(T)) w[i * sizeof(T) / 4] = pack<T>(x[i], x[i + 1 < N ? i + 1 : i]);
    return of_words(w);
  }
  static __device__ __forceinline__ Vec of_words(const uint32_t (&w)[4]) {
    if constexpr (sizeof(Raw) == 16)
      return {uint4{w[0], w[1], w[2], w[3]}};
    else if constexpr (sizeof(Raw) == 8)
      return {uint2{w[0], w[1]}};
    else
      return {static_cast<Raw>(w[0])};
  }
};

}  // namespace sr3fast::cuda
