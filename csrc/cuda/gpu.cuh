// What the kernels and their launches ask of the machine. tests/emulate.h answers the same calls on a CPU, so
// that a machine without a GPU can run the kernels.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../common/ops.h"

#if defined(SR3FAST_EMULATE)
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace sr3fast::cuda {

#if !defined(SR3FAST_EMULATE)
using f16 = __half;
using bf16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// Elements in 32-bit words: element i of a word (its only one, float32; or its lower and upper half), two to
// a word.
template <class T>
__device__ __forceinline__ float unpack(uint32_t word, int i);
template <>
__device__ __forceinline__ float unpack<float>(uint32_t word, int) {
  return __uint_as_float(word);
}
template <>
__device__ __forceinline__ float unpack<f16>(uint32_t word, int i) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? word >> 16 : word)));
}
template <>
__device__ __forceinline__ float unpack<bf16>(uint32_t word, int i) {
  return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
}

template <class T>
__device__ __forceinline__ uint32_t pack(float lower, float upper);
template <>
__device__ __forceinline__ uint32_t pack<float>(float x, float) {
  return __float_as_uint(x);
}
template <>
__device__ __forceinline__ uint32_t pack<f16>(float lower, float upper) {
  const __half2 h = __floats2half2_rn(lower, upper);
  return *reinterpret_cast<const uint32_t*>(&h);
}
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float lower, float upper) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(lower, upper);
  return *reinterpret_cast<const uint32_t*>(&h);
}

// 1/x within 2^-22, in one instruction
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh within 2^-11 of its value, in one instruction
__device__ __forceinline__ float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The compiler splits some 16-byte stores into words where it cannot put their alignment together again; not
// these.
__device__ __forceinline__ void store_global(uint4* p, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_global(uint2* p, const uint2& v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint4* p, const uint4& v) {
  asm volatile(
      "st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}
template <class Raw>
__device__ __forceinline__ void store_global(Raw* p, const Raw& v) {
  *p = v;
}
template <class Raw>
__device__ __forceinline__ void store_shared(Raw* p, const Raw& v) {
  *p = v;
}

// A copy into shared memory that this thread waits for later, before it reads it.
template <class Raw>
__device__ __forceinline__ void copy_later(Raw* shared, const Raw* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (sizeof(Raw) == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else if constexpr (sizeof(Raw) >= 4)
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(sizeof(Raw))
                 : "memory");
  else
    *shared = *global;
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// All of a block's shared memory is dynamic: one array, cut up by the kernel.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

// A cluster's blocks wait for each other between arrive and wait; a barrier of the block where there are no
// clusters.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}
// the same from a block that has nothing to show its peers but that it runs: no access waits for another
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive_relaxed();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}
// Two numbers that one block tells others of its launch, in global memory: told at once, and there once they
// are other than nothing, which is all bits set (no operation makes such NaNs).
__device__ __forceinline__ void tell(float2* p, const float2& value) {
  const auto bits =
      static_cast<unsigned long long>(__float_as_uint(value.y)) << 32 | __float_as_uint(value.x);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "l"(bits)
               : "memory");
}
__device__ __forceinline__ bool hear(const float2* p, float2& value) {
  unsigned long long bits;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
               : "=l"(bits)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  value = make_float2(__uint_as_float(static_cast<uint32_t>(bits)),
                      __uint_as_float(static_cast<uint32_t>(bits >> 32)));
  return ~bits != 0;
}

// p of the block with this rank in the cluster
template <class T>
__device__ __forceinline__ T* cluster_peer(T* p, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(p, rank));
#else
  return p;
#endif
}
#endif

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes exec's device the current one for the calls of this scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    moved_ = device != before_;
    if (moved_) check(cudaSetDevice(device), ("cudaSetDevice(" + std::to_string(device) + ")").c_str());
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared = 0;  // bytes
  int cluster = 1;     // blocks of a cluster; divides blocks
  void* stream = nullptr;
  bool together = false;  // all blocks run at once, and may wait for each other
};

inline cudaLaunchConfig_t configuration(const Launch& l, cudaLaunchAttribute& attribute) {
  if (l.together) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(l.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(l.blocks));
  config.blockDim = dim3(static_cast<unsigned>(l.threads));
  config.dynamicSmemBytes = static_cast<size_t>(l.shared);
  config.stream = static_cast<cudaStream_t>(l.stream);
  config.attrs = &attribute;
  config.numAttrs = l.together || l.cluster > 1 ? 1 : 0;
  return config;
}

// ask(), once a kernel, device and number: the driver takes microseconds to answer.
class Once {
 public:
  template <class Ask>
  int operator()(const void* kernel, int device, int64_t number, Ask&& ask) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto key = std::make_tuple(kernel, device, number);
    const auto found = known_.find(key);
    return found != known_.end() ? found->second : known_.emplace(key, ask()).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<std::tuple<const void*, int, int64_t>, int> known_;
};

// Above 48 KB of shared memory and clusters of 8, which run anywhere, a kernel must be told. It is told the
// most that its device has: a limit set for one launch could be another thread's too low one.
inline void allow(const char* what, const void* kernel, const Launch& l, int device) {
  if (l.shared <= 48 * 1024 && l.cluster <= 8) return;
  static Once once;
  once(kernel, device, 0, [&] {
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), what);
    if (attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what);
    return most;
  });
}

// Blocks of the largest cluster that this kernel can have: 16, 8, 4, 2, or 1, as always before Hopper.
template <class Kernel>
int widest_cluster(Kernel* kernel, int threads, int64_t shared, int device) {
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) < 9) return 1;
  static Once once;
  const void* address = reinterpret_cast<const void*>(kernel);
  return once(address, device, shared, [&] {
    const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    for (int widest = 16; widest > 1; widest /= 2) {
      const Launch l{widest, threads, shared < most ? shared : most, widest, nullptr};
      allow("cudaFuncSetAttribute", address, l, device);
      cudaLaunchAttribute cluster{};
      const cudaLaunchConfig_t config = configuration(l, cluster);
      int clusters = 0;
      if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0)
        return widest;
      cudaGetLastError();  // it was a question
    }
    return 1;
  });
}

// Blocks of a kernel that run at once.
template <class Kernel>
int64_t blocks_at_once(Kernel* kernel, int threads, int64_t shared, int device) {
  static Once once;
  const void* address = reinterpret_cast<const void*>(kernel);
  return once(address, device, shared, [&] {
    allow("cudaFuncSetAttribute", address, {1, threads, shared}, device);
    int blocks = 0;
    check(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks * attribute(cudaDevAttrMultiProcessorCount, device);
  });
}

// Whether it was launched: one whose blocks run together is not where this process may use less of the device
// than occupancy counts with.
template <class... Parameters, class... Arguments>
[[nodiscard]] bool launched(const char* op, void (*kernel)(Parameters...), const Launch& l,
                            const Arguments&... arguments) {
  const auto what = [&] {
    return std::string(op) + ": a launch of " + std::to_string(l.blocks) + " blocks of " +
           std::to_string(l.threads) + " threads, " + std::to_string(l.shared) + " bytes of shared memory, " +
           (l.together ? "all at once" : "clusters of " + std::to_string(l.cluster));
  };
  if (l.blocks > 0x7fffffff) throw std::runtime_error(what() + ": a grid holds at most 2^31 - 1 blocks");
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  allow(op, reinterpret_cast<const void*>(kernel), l, device);
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t config = configuration(l, cluster);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (l.together && error == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();  // it was a question
    return false;
  }
  if (error != cudaSuccess) check(error, what().c_str());
  return true;
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Launch& l, const Arguments&... arguments) {
  if (!launched(op, kernel, l, arguments...))
    throw std::runtime_error(std::string(op) + ": its " + std::to_string(l.blocks) +
                             " blocks cannot run at once");
}

// Calls f(T{}) with the element type.
template <class F>
void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      f(float{});
      break;
    case Dtype::f16:
      f(f16{});
      break;
    case Dtype::bf16:
      f(bf16{});
      break;
  }
}

// An element of a parameter vector.
__device__ __forceinline__ float read(const Vector& v, int64_t i) {
  switch (v.dtype) {
    case Dtype::f32:
      return static_cast<const float*>(v.data)[i];
    case Dtype::f16:
      return to_float(static_cast<const f16*>(v.data)[i]);
    default:
      return to_float(static_cast<const bf16*>(v.data)[i]);
  }
}

constexpr int64_t ceil_divide(int64_t n, int64_t d) { return (n + d - 1) / d; }

}  // namespace sr3fast::cuda
