// What a kernel is given of Python's tensors: raw pointers, sizes, strides. No torch header anywhere in csrc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SR3FAST_HD __host__ __device__ __forceinline__
#else
// always inlined: csrc/cpu is compiled once an instruction set, and no copy may leak from one into another
#define SR3FAST_HD inline __attribute__((always_inline))
#endif

namespace sr3fast {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

// [B, C, H, W], strides in elements. data is null for a tensor that was not given.
struct Tensor {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};

  SR3FAST_HD explicit operator bool() const { return data != nullptr; }
  SR3FAST_HD int64_t numel() const { return size[0] * size[1] * size[2] * size[3]; }
  SR3FAST_HD int64_t offset(int64_t b, int64_t c, int64_t h, int64_t w) const {
    return b * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
  }
  SR3FAST_HD bool channels_last() const { return stride[1] == 1 && size[1] > 1; }
};

// A vector of parameters: weight or bias [C], shift [B, C]. Contiguous.
struct Vector {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;

  SR3FAST_HD explicit operator bool() const { return data != nullptr; }
};

// Host values, or a pointer into the device's memory that the kernel reads (a captured graph replays with
// new ones). On a CPU they are always host values or host memory.
template <class T>
struct Scalar {
  T value{};
  const T* device = nullptr;

  SR3FAST_HD T read() const { return device ? *device : value; }
};

// Sample i has the seed value + i, or device[per_sample ? i : 0] (+ i where it is one base for all).
struct Seeds {
  int64_t value = 0;
  const int64_t* device = nullptr;
  bool per_sample = false;

  SR3FAST_HD uint64_t of(int64_t i) const {
    if (device && per_sample) return static_cast<uint64_t>(device[i]);
    return static_cast<uint64_t>(device ? *device : value) + static_cast<uint64_t>(i);
  }
};

struct Origin {
  int64_t h = 0, w = 0;
};

}  // namespace sr3fast
