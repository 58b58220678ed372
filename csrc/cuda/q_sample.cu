// q_sample. Compile with --fmad=false: every operation rounds by itself (row.h, noise.h).
#include "tile.cuh"

namespace sr3fast::cuda {
namespace {

struct Arguments {
  Range range;
  Draw draw;
  View out, eps_out, into, y_0, eps;
  Mix mix;                   // of a gamma on the host
  const double* gamma;       // in device memory: [B], or one number
  bool per_sample, crossed;  // crossed: a vector's elements may lie in two samples
  int mix_bytes;             // a tile's mixes in shared memory
};

// T is the type of y_0, eps and out. A thread has 8 elements: vectors of 16 bytes, of 4 or 8 elements.
// given: eps is, it is not drawn.
template <class T, bool given, bool direct>
__global__ void __launch_bounds__(kMaxThreads, given ? 4 : 5) q_sample_kernel(const Arguments a) {
  constexpr int N = 16 / sizeof(T), kVectors = kThreadElements / N;
  const Tile<N> tile(a.range);
  Vec<T, N> y_raw[kVectors], eps_raw[kVectors];
#pragma unroll
  for (int u = 0; u < kVectors; ++u)
    y_raw[u] = load<T, N>(a.y_0, a.range, tile.start + tile.at(u), tile.valid(u), tile.whole);
  if (given) {
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      eps_raw[u] = load<T, N>(a.eps, a.range, tile.start + tile.at(u), tile.valid(u), tile.whole);
  }

  char* shared = shared_memory();
  Head& head = *reinterpret_cast<Head*>(shared);
  Mix* mixes = reinterpret_cast<Mix*>(shared + sizeof(Head));
  float* shared_z = reinterpret_cast<float*>(shared + sizeof(Head) + a.mix_bytes);
  if (a.gamma && threadIdx.x < 32) {  // square roots in double precision: once a tile and sample
    uint32_t first = 0, last = 0;
    if (a.per_sample) {
      first = a.range.place(tile.start).at[3];
      last = a.range.place(tile.start + tile.count - 1).at[3];
    }
    for (uint32_t b = first + threadIdx.x; b <= last; b += 32) mixes[b - first] = q_sample_mix(a.gamma[b]);
  }
  if (threadIdx.x == 32)  // another warp
    a.draw.template prepare<direct || given>(a.range, tile.start, tile.count, head);
  __syncthreads();
  float z[kQuads][4];
  if (!given && direct) {
    a.draw.in_registers(a.range, tile, head, z);
  } else if (!given) {
    a.draw.in_shared(a.range, tile.count, head, shared_z);
    __syncthreads();
  }

  const bool many = a.per_sample && !head.one_sample;
  const auto mix_of = [&](uint32_t i) { return mixes[many ? a.range.place(i).at[3] - head.first.at[3] : 0]; };
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    if (tile.valid(u) <= 0) continue;
    const uint32_t i = tile.start + tile.at(u);
    float y[N], eps[N], out[N];
    if (given) {
      eps_raw[u].floats(eps);
    } else {
#pragma unroll
      for (int k = 0; k < N; k += 4) {
        float (&quad)[4] = z[(u * N + k) / 4];
        if (!direct) Vec<float, 4>::load(shared_z + tile.at(u) + k).floats(quad);
#pragma unroll
        for (int j = 0; j < 4; ++j) eps[k + j] = quad[j];
      }
    }
    y_raw[u].floats(y);
    Mix mix = a.mix;
    if (a.gamma) mix = mix_of(i);
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = mix.signal * y[k] + mix.noise * eps[k];
    if (a.crossed && many) {
#pragma unroll
      for (int k = 1; k < N; ++k) {
        if (k >= tile.valid(u)) continue;
        mix = mix_of(i + k);
        out[k] = mix.signal * y[k] + mix.noise * eps[k];
      }
    }
    store<T>(a.out, a.range, i, tile.valid(u), tile.whole, out);
    if (a.eps_out) store<T>(a.eps_out, a.range, i, tile.valid(u), tile.whole, eps);
    if (a.into) store_any(a.into, a.range, i, tile.valid(u), tile.whole, out);
  }
}

// Bytes of the mixes of the samples that a tile touches.
int mix_bytes(const Tensor& y_0, bool per_sample) {
  const int64_t sample = y_0.numel() / y_0.size[0], tile = kMaxThreads * kThreadElements;
  const int64_t touched = per_sample ? ceil_divide(tile, sample) + 1 : 1;
  return static_cast<int>(ceil_divide((touched < y_0.size[0] ? touched : y_0.size[0]) * sizeof(Mix), 16) *
                          16);
}

}  // namespace

void q_sample(Tensor out, Tensor eps_out, Tensor into, Tensor y_0, Scalar<double> gamma,
              bool gamma_per_sample, Seeds seed, Scalar<int64_t> step, Tensor eps, Origin origin, Exec exec) {
  const OnDevice on(exec.device);
  const Draw draw(y_0, seed, step, kTrain, origin);
  each_range(y_0, [&](const Range& range) {
    with_type(y_0.dtype, [&](auto zero) {
      using T = decltype(zero);
      const auto view = [&](const Tensor& t) { return View(t, range, 16 / sizeof(T)); };
      Arguments a{range,
                  draw,
                  view(out),
                  view(eps_out),
                  view(into),
                  view(y_0),
                  view(eps),
                  {},
                  gamma.device,
                  gamma_per_sample,
                  gamma_per_sample && y_0.numel() / y_0.size[0] % (16 / sizeof(T)) != 0,
                  gamma.device ? mix_bytes(y_0, gamma_per_sample) : 0};
      if (!gamma.device) a.mix = q_sample_mix(gamma.value);
      const auto kernel = eps           ? q_sample_kernel<T, true, false>
                          : draw.direct ? q_sample_kernel<T, false, true>
                                        : q_sample_kernel<T, false, false>;
      launch("q_sample", kernel, tiles(range, eps || draw.direct, sizeof(Head) + a.mix_bytes, exec), a);
    });
  });
}

}  // namespace sr3fast::cuda
