// A GPU for one CPU thread: csrc/cuda compiles against this in place of CUDA's headers, so that a machine
// without a GPU runs the kernels themselves. Every CUDA thread is a fiber, which gives way at barriers and
// shuffles only; a cluster's blocks run side by side, clusters one after another. Shared memory starts as
// NaN. The order in which threads run can be turned round or shuffled: results that depend on it lack a
// barrier.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx(0), blockIdx(0), blockDim(0), gridDim(0);

namespace emulate {

struct Device {
  int capability, multiprocessors, shared, l2, widest_cluster;
  int taken = 0;  // multiprocessors that are not for this process, which occupancy does not know
};
// chosen by their index, so that a test can have several
constexpr Device devices[] = {
    {9, 4, 232448, 1 << 20, 16},  // small, so that small tensors fill it
    {9, 4, 232448, 1 << 20, 8},   // no clusters of 16
    {8, 4, 166912, 1 << 20, 1},   // no clusters
    {8, 4, 166912, 1 << 12, 1},   // an L2 cache that holds one sample
    {9, 132, 232448, 50 << 20, 16},
    {9, 4, 232448, 1 << 20, 2},  // a part of a GPU, with room for narrow clusters only
    {9, 4, 232448, 1 << 20, 1},
    {9, 4, 232448, 1 << 20, 1, 4},
};
constexpr int kDevices = sizeof devices / sizeof devices[0];
inline int device = 0;
enum class Schedule { forward, backward, shuffled };
inline Schedule schedule = Schedule::forward;
inline int launches = 0, largest_cluster = 0, grids = 0, told = 0;  // told: attributes of kernels
// what kernels were told on a device, and those whose clusters were asked about
inline std::map<std::pair<const void*, int>, std::map<int, int>> allowed;
inline std::set<std::pair<const void*, int>> asked;

constexpr size_t kStack = 256 * 1024;

struct Block;
struct Fiber {
  ucontext_t start;
  jmp_buf context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Block* block;
  unsigned thread;
  bool started, done;
  const unsigned* counter;  // waits until *counter > above; null: for nothing
  unsigned above;
  unsigned block_barriers, warp_barriers, cluster_barriers;
};
struct Warp {
  unsigned live = 0, arrived = 0, passed = 0;
  float slots[32];
};
struct Cluster {
  unsigned threads = 0, arrivals = 0;
  std::vector<Block*> blocks;
};
struct Block {
  unsigned index, live, arrived = 0, passed = 0;
  std::vector<Warp> warps;
  uint4* shared;
  Cluster* cluster;
  unsigned rank;
};

inline std::vector<std::unique_ptr<Fiber>> pool;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline ucontext_t scheduler_start;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// Back to the scheduler: jumps, once started, since contexts ask the system at every switch.
inline void give_way() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

inline void wait_until_above(const unsigned* counter, unsigned above) {
  if (*counter > above) return;
  current->counter = counter;
  current->above = above;
  give_way();
}

inline void block_barrier() {
  Block* b = current->block;
  const unsigned mine = current->block_barriers++;
  if (++b->arrived == b->live) {
    b->arrived = 0;
    ++b->passed;
  }
  wait_until_above(&b->passed, mine);
}

inline void warp_barrier() {
  Warp* w = &current->block->warps[current->thread / 32];
  const unsigned mine = current->warp_barriers++;
  if (++w->arrived == w->live) {
    w->arrived = 0;
    ++w->passed;
  }
  wait_until_above(&w->passed, mine);
}

inline float exchange(float value, unsigned lane) {
  Warp& w = current->block->warps[current->thread / 32];
  w.slots[current->thread % 32] = value;
  warp_barrier();
  const float got = w.slots[lane];
  warp_barrier();
  return got;
}

inline void trampoline() {
  body();
  current->done = true;
  if (current->block->arrived != 0) fail("a thread ended while its block waits at a barrier");
  _longjmp(scheduler, 1);
}

inline void resume(Fiber* f) {
  current = f;
  threadIdx.x = f->thread;
  blockIdx.x = f->block->index;
  if (_setjmp(scheduler) != 0) return;
  if (f->started) _longjmp(f->context, 1);
  f->started = true;
  swapcontext(&scheduler_start, &f->start);
}

inline void run_cluster(unsigned first, unsigned size, unsigned threads, size_t shared) {
  Cluster cluster;
  cluster.threads = size * threads;
  std::vector<Block> blocks(size);
  std::vector<std::unique_ptr<uint4[]>> memory;
  while (pool.size() < size * threads) pool.emplace_back(new Fiber);
  std::vector<Fiber*> fibers;
  for (unsigned i = 0; i < size; ++i) {
    memory.emplace_back(new uint4[shared / 16 + 1]);
    std::fill_n(reinterpret_cast<float*>(memory.back().get()), (shared / 16 + 1) * 4,
                std::numeric_limits<float>::quiet_NaN());
    Block& b = blocks[i];
    b.index = first + i;
    b.live = threads;
    b.warps.resize((threads + 31) / 32);
    b.shared = memory.back().get();
    b.cluster = &cluster;
    b.rank = i;
    cluster.blocks.push_back(&b);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber* f = pool[i * threads + t].get();
      f->block = &b;
      f->thread = t;
      f->started = f->done = false;
      f->counter = nullptr;
      f->block_barriers = f->warp_barriers = f->cluster_barriers = 0;
      ++b.warps[t / 32].live;
      getcontext(&f->start);
      f->start.uc_stack.ss_sp = f->stack.get();
      f->start.uc_stack.ss_size = kStack;
      f->start.uc_link = nullptr;
      makecontext(&f->start, trampoline, 0);
      fibers.push_back(f);
    }
  }
  if (schedule == Schedule::backward) std::reverse(fibers.begin(), fibers.end());
  std::mt19937 random(first);
  while (!fibers.empty()) {
    if (schedule == Schedule::shuffled) std::shuffle(fibers.begin(), fibers.end(), random);
    bool moved = false;
    for (Fiber* f : fibers) {
      if (f->counter && *f->counter <= f->above) continue;
      f->counter = nullptr;
      moved = true;
      resume(f);
    }
    if (!moved) fail("every thread waits: a barrier that some threads never reach");
    if (std::none_of(fibers.begin(), fibers.end(), [](Fiber* f) { return f->done; })) continue;
    fibers.erase(std::remove_if(fibers.begin(), fibers.end(), [](Fiber* f) { return f->done; }),
                 fibers.end());
  }
}

}  // namespace emulate

inline void __syncthreads() { emulate::block_barrier(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return emulate::exchange(value, (emulate::current->thread % 32) ^ static_cast<unsigned>(mask));
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }

// the runtime

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorCooperativeLaunchTooLarge = 720 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrL2CacheSize,
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetDevice(int* d) { return *d = emulate::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= emulate::kDevices) return cudaErrorInvalidValue;
  return emulate::device = d, cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* v) { return *v = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  const emulate::Device& d = emulate::devices[device];
  const int values[] = {d.multiprocessors, d.capability, d.shared, d.l2};
  *value = values[name];
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, int attribute, int value) {
  int& now = emulate::allowed[{kernel, emulate::device}][attribute];
  if (value < now ||
      value > emulate::devices[emulate::device].shared)  // less could fail another thread's launch
    return cudaErrorInvalidValue;
  ++emulate::told;
  now = value;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel, const cudaLaunchConfig_t* c) {
  emulate::asked.insert({reinterpret_cast<const void*>(kernel), emulate::device});
  *clusters =
      c->attrs->val.clusterDim.x <= static_cast<unsigned>(emulate::devices[emulate::device].widest_cluster);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t shared) {
  *blocks = std::min<int>(2, emulate::devices[emulate::device].shared / static_cast<int>(shared + 1024));
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const bool together = c->numAttrs && c->attrs->id == cudaLaunchAttributeCooperative;
  const unsigned size = c->numAttrs && !together ? c->attrs->val.clusterDim.x : 1;
  auto& allowed = emulate::allowed[{reinterpret_cast<const void*>(kernel), emulate::device}];
  const int shared = std::max(48 * 1024, allowed[cudaFuncAttributeMaxDynamicSharedMemorySize]);
  if (c->dynamicSmemBytes > static_cast<size_t>(shared) ||
      (size > 8 && !allowed[cudaFuncAttributeNonPortableClusterSizeAllowed]))
    return cudaErrorInvalidValue;
  if (c->gridDim.x == 0 || c->gridDim.x % size != 0 || c->blockDim.x == 0 || c->blockDim.x > 1024 ||
      c->dynamicSmemBytes > static_cast<size_t>(emulate::devices[emulate::device].shared) ||
      (size > 1 && (emulate::devices[emulate::device].capability < 9 ||
                    size > static_cast<unsigned>(emulate::devices[emulate::device].widest_cluster))))
    return cudaErrorInvalidValue;
  int at_once = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, kernel, 0, c->dynamicSmemBytes);
  const emulate::Device& device = emulate::devices[emulate::device];
  if (together && c->gridDim.x > static_cast<unsigned>(at_once * (device.multiprocessors - device.taken)))
    return cudaErrorCooperativeLaunchTooLarge;
  ++emulate::launches;
  emulate::grids += together;
  emulate::largest_cluster = std::max(emulate::largest_cluster, static_cast<int>(size));
  gridDim = c->gridDim;
  blockDim = c->blockDim;
  emulate::body = [&] { kernel(arguments...); };
  const unsigned side_by_side = together ? gridDim.x : size;
  for (unsigned i = 0; i < gridDim.x; i += side_by_side)
    emulate::run_cluster(i, side_by_side, blockDim.x, c->dynamicSmemBytes);
  return cudaSuccess;
}

namespace sr3fast::cuda {

using f16 = _Float16;
struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(f16 x) { return static_cast<float>(x); }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
template <class T>
T from_float(float x) {
  return static_cast<T>(x);
}
template <>
inline bf16 from_float<bf16>(float x) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <class T>
float unpack(uint32_t word, int i) {
  if (sizeof(T) == 2) word = i % 2 ? word >> 16 : word & 0xffffu;
  T x;
  std::memcpy(&x, &word, sizeof x);
  return to_float(x);
}
template <class T>
uint32_t pack(float lower, float upper) {
  const T x[2] = {from_float<T>(lower), from_float<T>(upper)};
  uint32_t word;
  std::memcpy(&word, x, 4);
  return word;
}

inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float tanh_fast(float x) { return std::tanh(x); }

template <class Raw>
void store_global(Raw* p, const Raw& v) {
  *p = v;
}
template <class Raw>
void store_shared(Raw* p, const Raw& v) {
  *p = v;
}

template <class Raw>
void copy_later(Raw* shared, const Raw* global) {
  *shared = *global;
}
inline void wait_for_copies() {}

inline char* shared_memory() { return reinterpret_cast<char*>(emulate::current->block->shared); }
inline void cluster_arrive() { ++emulate::current->block->cluster->arrivals; }
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  emulate::Cluster* c = emulate::current->block->cluster;
  const unsigned mine = ++emulate::current->cluster_barriers;
  emulate::wait_until_above(&c->arrivals, mine * c->threads - 1);
}
inline void tell(float2* p, const float2& value) { *p = value; }
inline bool hear(const float2* p, float2& value) {
  const float2 nothing = *p;
  value = nothing;
  uint64_t bits;
  std::memcpy(&bits, &nothing, sizeof bits);
  if (~bits == 0) emulate::give_way();
  return ~bits != 0;
}
template <class T>
T* cluster_peer(T* p, uint32_t rank) {
  emulate::Block* own = emulate::current->block;
  if (rank >= own->cluster->blocks.size()) emulate::fail("no such block in the cluster");
  const auto offset = reinterpret_cast<char*>(p) - reinterpret_cast<char*>(own->shared);
  return reinterpret_cast<T*>(reinterpret_cast<char*>(own->cluster->blocks[rank]->shared) + offset);
}

}  // namespace sr3fast::cuda
