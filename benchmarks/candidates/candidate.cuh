// What the candidates share: tensors, times, and whether a candidate agrees with what stands in csrc.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cuda/norm.cuh"

namespace sr3fast::candidate {

// The text of an error, or null.
template <class F>
const char* error(F&& f) {
  static std::string message;
  try {
    f();
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
  return nullptr;
}

// Slices as a grid's are, in parts of so many bytes; bytes(slice) in a pixel. bfloat16 in channels_last.
template <class Bytes>
cuda::Cut unit_cut(const cuda::Sizes& sizes, int64_t batch, Bytes&& bytes, int64_t unit_bytes, int device) {
  const cuda::Cut whole = cuda::grid_cut<true>(sizes, batch, 8, 2, sizes.pixels, bytes, device);
  const uint32_t slice = whole.parts ? whole.slice : sizes.channels;
  const int64_t parts = cuda::ceil_divide(sizes.pixels * bytes(slice), unit_bytes);
  return cuda::cut_into(sizes.channels, slice, sizes.pixels, std::min(parts, cuda::most_parts(sizes.pixels)));
}

// As many blocks as run at once; a slice's parts must.
template <class Arguments>
void launch_units(void (*kernel)(const Arguments, float2*), int64_t shared, const Exec& exec,
                  const Arguments& a, float2* stats) {
  const int64_t at_once = cuda::blocks_at_once(kernel, cuda::kThreads, shared, exec.device);
  if (a.cut.parts > at_once)
    throw std::runtime_error("a slice's " + std::to_string(a.cut.parts) +
                             " parts must run at once: " + std::to_string(at_once) + " do");
  cuda::launch("lag", kernel,
               {std::min<int64_t>(a.units, at_once), cuda::kThreads, shared, 1, exec.stream, true}, a, stats);
}

#if !defined(SR3FAST_EMULATE)

using cuda::bf16;
using cuda::check;

// bfloat16 in channels_last; of a norm, forward or backward.
struct Case {
  int64_t B, C, H, W;
  Tensor out, h, grad, other;
  float *mean, *rstd, *dweight, *dbias, *weight, *bias;
  Norm norm;
  Exec exec;
};

__global__ void fill(bf16* p, int64_t n, float mean, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    float sum = 0.0f;
    for (int k = 0; k < 4; ++k) {
      x = (x ^ (x >> 15)) * 2246822519u;
      sum += static_cast<float>(x >> 8) * (1.0f / 16777216.0f) - 0.5f;
    }
    p[i] = __float2bfloat16_rn(mean + 1.7f * sum);
  }
}

template <class T>
T* device_memory(int64_t n) {
  void* p = nullptr;
  check(cudaMalloc(&p, static_cast<size_t>(n) * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(p);
}

inline Tensor tensor(int64_t B, int64_t C, int64_t H, int64_t W, float mean, uint32_t seed) {
  Tensor t;
  t.dtype = Dtype::bf16;
  const int64_t size[4] = {B, C, H, W}, stride[4] = {H * W * C, 1, W * C, C};
  std::copy(size, size + 4, t.size);
  std::copy(stride, stride + 4, t.stride);
  bf16* p = device_memory<bf16>(t.numel());
  fill<<<1024, 256>>>(p, t.numel(), mean, seed);
  t.data = p;
  return t;
}

inline float* floats(int64_t n, float first) {
  std::vector<float> host(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) host[i] = first + 0.01f * static_cast<float>(i % 37);
  float* p = device_memory<float>(n);
  check(cudaMemcpy(p, host.data(), host.size() * 4, cudaMemcpyHostToDevice), "cudaMemcpy");
  return p;
}

inline Case make(int64_t B, int64_t C, int64_t H, int64_t W) {
  Case c{B,
         C,
         H,
         W,
         tensor(B, C, H, W, 0.0f, 1),
         tensor(B, C, H, W, 0.3f, 2),
         tensor(B, C, H, W, 0.0f, 3),
         tensor(B, C, H, W, 0.0f, 4)};
  c.weight = floats(C, 0.8f), c.bias = floats(C, -0.2f);
  c.mean = floats(B * 32, 0.0f), c.rstd = floats(B * 32, 1.0f);
  c.dweight = floats(C, 0.0f), c.dbias = floats(C, 0.0f);
  c.norm = {c.h, {}, {}, {c.weight, Dtype::f32}, {c.bias, Dtype::f32}, {}, 32, 1e-5, true};
  const int64_t scratch = B * C * cuda::scratch_floats(H * W);
  c.exec.scratch = device_memory<float>(scratch);
  return c;
}

inline void free(const Case& c) {
  for (void* p : {c.out.data, c.h.data, c.grad.data, c.other.data, static_cast<void*>(c.weight),
                  static_cast<void*>(c.bias), static_cast<void*>(c.mean), static_cast<void*>(c.rstd),
                  static_cast<void*>(c.dweight), static_cast<void*>(c.dbias), c.exec.scratch})
    check(cudaFree(p), "cudaFree");
}

// us, the median
template <class F>
double time_of(F&& f) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> ms(21);
  for (int i = 0; i < 3; ++i) f();
  for (float& t : ms) {
    check(cudaEventRecord(begin), "cudaEventRecord");
    f();
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    check(cudaEventElapsedTime(&t, begin, end), "cudaEventElapsedTime");
  }
  std::nth_element(ms.begin(), ms.begin() + 10, ms.end());
  return 1e3 * ms[10];
}

__global__ void differences(const bf16* a, const bf16* b, int64_t n, unsigned* most) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float d = fabsf(__bfloat162float(a[i]) - __bfloat162float(b[i]));
    const unsigned bits = __float_as_uint(d == d ? d : INFINITY);
    if (bits > *most) atomicMax(most, bits);
  }
}

inline double largest_difference(const Tensor& a, const Tensor& b) {
  unsigned *most = device_memory<unsigned>(1), host = 0;
  check(cudaMemset(most, 0, 4), "cudaMemset");
  differences<<<1024, 256>>>(static_cast<const bf16*>(a.data), static_cast<const bf16*>(b.data), a.numel(),
                             most);
  check(cudaMemcpy(&host, most, 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
  check(cudaFree(most), "cudaFree");
  float f;
  std::memcpy(&f, &host, 4);
  return f;
}

// Times run(case, unit bytes, blocks of a multiprocessor), and run(case, 0, 0), which is what stands in csrc;
// `passes`: bytes moved for an element of bfloat16, at least, over 2. Writes OUT/NAME.json; whether all
// agree.
template <class Run>
bool timed(const char* name, int passes, Run&& run) {
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  const char* out = std::getenv("OUT");
  const std::string path =
      std::string(out ? out : "benchmarks/results") + "/candidate-" + name + "-cuda.json";
  std::FILE* file = std::fopen((path + ".part").c_str(), "w");
  if (!file) throw std::runtime_error("cannot write " + path);
  const char* commit = std::getenv("SR3FAST_COMMIT");
  int runtime = 0, driver = 0;
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  std::fprintf(file,
               "{\"device\": \"%s\", \"runtime\": %d, \"driver\": %d, \"commit\": \"%s\", \"records\": [",
               device.name, runtime, driver, commit ? commit : "");
  bool agree = true;
  const char* comma = "";
  for (const int64_t C : {64, 128, 192}) {
    Case c = make(64, C, 128, 128);
    const size_t bytes = static_cast<size_t>(c.out.numel()) * 2;
    const double copy = time_of([&] {
      check(cudaMemcpyAsync(c.other.data, c.h.data, bytes, cudaMemcpyDeviceToDevice), "cudaMemcpyAsync");
    });
    const auto show = [&](int64_t unit, int blocks, double us, double difference) {
      const double share = 100.0 * copy * passes / 2.0 / us;
      std::printf("%-28s 64x%lldx128x128 unit %6lld blocks %d %8.1f us %5.1f %% of copy, differs by %g\n",
                  name, static_cast<long long>(C), static_cast<long long>(unit), blocks, us, share,
                  difference);
      std::fprintf(file,
                   "%s\n{\"op\": \"%s\", \"shape\": \"64x%lldx128x128\", \"dtype\": \"bfloat16\", "
                   "\"layout\": \"channels_last\", \"unit\": %lld, \"blocks\": %d, \"us\": %.2f, "
                   "\"%% of copy\": %.1f, \"differs by\": %g}",
                   comma, name, static_cast<long long>(C), static_cast<long long>(unit), blocks, us, share,
                   difference);
      std::fflush(file), std::fflush(stdout);
      comma = ",";
    };
    show(0, 0, time_of([&] { run(c, 0, 0); }), 0.0);
    check(cudaMemcpy(c.other.data, c.out.data, bytes, cudaMemcpyDeviceToDevice), "cudaMemcpy");
    for (const int blocks : {2, 3, 4})
      for (const int64_t unit : {8 << 10, 16 << 10, 24 << 10, 32 << 10, 48 << 10, 64 << 10}) {
        check(cudaMemset(c.out.data, 0xff, bytes), "cudaMemset");
        if (const char* why = error([&] { run(c, unit, blocks); })) {
          std::printf("%s, unit %lld: %s\n", name, static_cast<long long>(unit), why);
          continue;
        }
        const double difference = largest_difference(c.out, c.other);
        agree = agree && difference <= 0.0625;
        show(unit, blocks, time_of([&] { run(c, unit, blocks); }), difference);
      }
    free(c);
  }
  std::fprintf(file, "\n]}\n");
  std::fclose(file);
  std::rename((path + ".part").c_str(), path.c_str());
  return agree;
}

template <class Run>
int compare(const char* name, int passes, Run&& run) {
  bool agree = false;
  const char* why = error([&] { agree = timed(name, passes, run); });
  if (why) std::fprintf(stderr, "%s: %s\n", name, why);
  return agree ? 0 : 1;
}

#endif

}  // namespace sr3fast::candidate
