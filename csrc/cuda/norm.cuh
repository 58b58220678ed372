// What GroupNorm's kernels share, forward and backward: how a tensor is cut up, and moments.
//
// A block takes a part of a slice: in channels_last a range of pixels of some whole groups' channels, in NCHW
// a range of one group's elements. Sums of its threads, then of a slice's blocks, are merged in an order that
// the sizes alone decide, so results are deterministic.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <type_traits>

#include "../common/divide.h"
#include "device.h"
#include "vec.cuh"

namespace sr3fast::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// One division of the work: sample, slice, part.
struct Cut {
  uint32_t slice, slices;       // channels of a slice (whole groups; NCHW: one group); slices of a sample
  uint32_t parts, size, total;  // blocks of a slice; pixels (NCHW: vectors) of a block, of them all
  Divide by_columns;            // channels_last: vectors of channels in a pixel of the slice
  Divide by_rows;               // and pixels that a block's threads have at once
  uint32_t rows;

  SR3FAST_HD uint32_t begin(uint32_t part) const { return part * size < total ? part * size : total; }
  SR3FAST_HD uint32_t length(uint32_t part) const { return begin(part + 1) - begin(part); }
};

struct Block {
  uint32_t part, slice;
  int64_t b;

  __device__ __forceinline__ Block(const Cut& cut, uint32_t index, int64_t first_sample) {
    part = index % cut.parts;
    const uint32_t unit = index / cut.parts;
    slice = unit % cut.slices;
    b = first_sample + unit / cut.slices;
  }
};

// f(i, of) for the channels i of a slice that are this thread's; the first is fetched before, to be under way
// early.
template <class Fetched, class Arguments>
__device__ __forceinline__ Fetched fetch(const Arguments& a, const Block& block) {
  return threadIdx.x < a.cut.slice ? Fetched(a, block, threadIdx.x) : Fetched{};
}
template <class Fetched, class Arguments, class F>
__device__ __forceinline__ void each_channel(const Arguments& a, const Block& block, const Fetched& first,
                                             F&& f) {
  if (threadIdx.x < a.cut.slice) f(threadIdx.x, first);
  for (uint32_t i = threadIdx.x + kThreads; i < a.cut.slice; i += kThreads) f(i, Fetched(a, block, i));
}

// f(k, what was told at from[k * stride]) for k < n, n <= K: all asked for at once, and again until they are
// there.
template <int K, class F>
__device__ __forceinline__ void hear_some(const float2* from, int64_t stride, uint32_t n, F&& f) {
  float2 of[K];
  bool there[K];
#pragma unroll
  for (int k = 0; k < K; ++k) there[k] = static_cast<uint32_t>(k) >= n || hear(from + k * stride, of[k]);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    while (!there[k]) there[k] = hear(from + k * stride, of[k]);
    if (static_cast<uint32_t>(k) < n) f(k, of[k]);
  }
}

struct Sizes {
  uint32_t channels, first, pixels;  // C; of them in h, the rest in h2; H W
  uint32_t groups, width;            // width = C / groups
  Divide by_width;
  Divide by_row;  // NCHW: vectors of a channel; of no use in channels_last

  Sizes(const Norm& norm, int elements)
      : channels(static_cast<uint32_t>(norm.h.size[1] + (norm.h2 ? norm.h2.size[1] : 0))),
        first(static_cast<uint32_t>(norm.h.size[1])),
        pixels(static_cast<uint32_t>(norm.h.size[2] * norm.h.size[3])),
        groups(static_cast<uint32_t>(norm.groups)),
        width(channels / groups),
        by_width(width),
        by_row(pixels % elements == 0 ? pixels / elements : 1) {
    const int64_t size = int64_t{width} * norm.h.size[2] * norm.h.size[3] / elements;
    if (size >= int64_t{1} << 31)
      throw std::runtime_error("a group must hold fewer than 2^31 vectors: got " + std::to_string(size) +
                               " of " + std::to_string(elements) + " elements");
  }
};

// h or h2, whichever has the channel.
template <class T>
struct Pair {
  const T *h, *h2;

  // the channel's first element
  __device__ __forceinline__ const T* nchw(const Sizes& s, int64_t b, uint32_t c) const {
    if (c < s.first) return h + (b * s.first + c) * s.pixels;
    return h2 + (b * (s.channels - s.first) + (c - s.first)) * s.pixels;
  }
  // channel c of a pixel, and the elements from one pixel to the next
  __device__ __forceinline__ const T* nhwc(const Sizes& s, int64_t b, uint32_t pixel, uint32_t c,
                                           uint32_t& stride) const {
    stride = c < s.first ? s.first : s.channels - s.first;
    return (c < s.first ? h + c : h2 + (c - s.first)) + (b * s.pixels + pixel) * stride;
  }
};

// channels_last: a thread has the vector of channels `column` of every `rows`-th pixel from `row` on, then
// the next column `step` further where a slice has more columns than a block has threads.
template <int V>
struct Columns {
  uint32_t count, column, step, rows, row;

  __device__ __forceinline__ explicit Columns(const Cut& cut)
      : count(cut.by_columns.divisor), rows(cut.rows) {
    const bool fits = count < kThreads;
    row = fits ? cut.by_columns.quotient(threadIdx.x) : 0;
    column = threadIdx.x - row * count;
    step = fits ? count : kThreads;
    if (row >= rows) column = count;  // nothing to do
  }
};

// Sums over 2^k neighbouring lanes; every thread of the warp takes part.
__device__ __forceinline__ float lane_sum(float x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// Sum over the block; `shared` has kWarps floats that nothing else uses.
__device__ __forceinline__ float block_sum(float x, float* shared) {
  x = lane_sum(x, 32);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) x += shared[i];
  return x;
}

// f(item, lane, lanes, whether this team is the item's) for the items of a block, by teams of lanes; a team
// with none repeats the last, since all lanes of a warp take part.
template <class F>
__device__ __forceinline__ void by_teams(uint32_t items, F&& f) {
  // as many lanes as leave a team for each item
  const int log = items > 128 ? 0 : items > 64 ? 1 : items > 32 ? 2 : items > 16 ? 3 : items > 8 ? 4 : 5;
  const int lanes = 1 << log;
  for (uint32_t round = 0; round < items; round += kThreads >> log) {
    const uint32_t own = round + (threadIdx.x >> log);
    f(min(own, items - 1), static_cast<int>(threadIdx.x & (lanes - 1)), lanes, own < items);
  }
}

// Chan's formula for many at once: n, mean and M2 of lanes' items i, each item(i, n, mean, m2), merged over
// the team.
template <class Item>
__device__ __forceinline__ float2 merge(uint32_t items, float total, int lane, int lanes, Item&& item) {
  float n, mean, m2, sum = 0.0f;
#pragma unroll 4
  for (uint32_t i = lane; i < items; i += lanes) {
    item(i, n, mean, m2);
    sum += n * mean;
  }
  const float merged = lane_sum(sum, lanes) / total;
  sum = 0.0f;
#pragma unroll 4
  for (uint32_t i = lane; i < items; i += lanes) {
    item(i, n, mean, m2);
    const float delta = mean - merged;
    sum += m2 + n * (delta * delta);
  }
  return make_float2(merged, lane_sum(sum, lanes));
}

// Running moments of V sequences of one length, fed K at a time: mean and M2 of the K, then Chan's formula.
template <int V>
struct Running {
  float count = 0.0f, mean[V] = {}, m2[V] = {};

  template <bool all, int K, class Element>
  __device__ __forceinline__ void add_some(int n, Element&& element) {
    const float added = all ? K : n, share = added / (count + added), spread = count * share,
                inverse = 1.0f / added;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float x[K], sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        x[k] = element(k, v);
        if (all || k < n) sum += x[k];
      }
      const float own = sum * inverse;
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (all || k < n) squares += (x[k] - own) * (x[k] - own);
      const float delta = own - mean[v];
      mean[v] += delta * share;
      m2[v] += squares + delta * delta * spread;
    }
    count += added;
  }
  // of n vectors, from their distances to the first
  template <class Vector>
  __device__ __forceinline__ void of(uint32_t n, Vector&& vector) {
    if (n == 0) return;
    float pivot[V], sum[V] = {};
    vector(0u).floats(pivot);
#pragma unroll 2
    for (uint32_t i = 1; i < n; ++i) {
      const auto x = vector(i);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float d = x.at(v) - pivot[v];
        sum[v] += d;
        m2[v] += d * d;
      }
    }
    count = static_cast<float>(n);
    const float inverse = 1.0f / count;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float distance = sum[v] * inverse;
      mean[v] = pivot[v] + distance;
      m2[v] = fmaxf(m2[v] - sum[v] * distance, 0.0f);
    }
  }
  // the first n of K; n > 0
  template <int K, class Element>
  __device__ __forceinline__ void add(int n, Element&& element) {
    if (n == K)
      add_some<true, K>(n, element);
    else
      add_some<false, K>(n, element);
  }
};

// silu and its derivative, of a channel's n = scale x + bias. To a half's rounding tanh does, of n / 2;
// `half` says what scale and bias are to be multiplied by.
template <class T, bool silu>
struct Activation {
  static constexpr float half = silu && sizeof(T) == 2 ? 0.5f : 1.0f;

  static __device__ __forceinline__ float sigmoid(float n) {
    const float d = 1.0f + expf(-fmaxf(n, -87.0f)),
                r = reciprocal_fast(d);  // d stays finite for the Newton step
    return r + r * (1.0f - d * r);
  }
  static __device__ __forceinline__ float of(float n) {
    if (!silu) return n;
    if (sizeof(T) == 2) return n + n * tanh_fast(n);
    return n * sigmoid(n);
  }
  static __device__ __forceinline__ float derivative(float n) {
    if (!silu) return 1.0f;
    if (sizeof(T) == 2) {
      const float t = tanh_fast(n), s = 0.5f + 0.5f * t;
      return s + s * (n - n * t);
    }
    const float s = sigmoid(n);
    return s * (1.0f + n * (1.0f - s));
  }
};

// f(whether silu follows), a branch for many elements.
template <class F>
__device__ __forceinline__ void with_silu(bool silu, F&& f) {
  if (silu)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// Where the pieces of a block's shared memory start, in bytes.
struct Layout {
  int64_t bytes = 0;
  uint32_t add(int64_t size) {
    const int64_t at = bytes;
    bytes += ceil_divide(size, 16) * 16;
    return static_cast<uint32_t>(at);
  }
};

template <class X>
__device__ __forceinline__ X* shared_at(uint32_t offset) {
  return reinterpret_cast<X*>(shared_memory() + offset);
}

// The elements of a vector: 16 bytes where every row (NCHW) or pixel (channels_last) starts at a multiple of
// that, or one.
inline bool vectors_fit(const Norm& norm, std::initializer_list<const void*> others) {
  const int64_t n = 16 / (norm.h.dtype == Dtype::f32 ? 4 : 2);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  bool fit = norm.h.channels_last() ? norm.h.size[1] % n == 0 && norm.h2.size[1] % n == 0
                                    : norm.h.size[2] * norm.h.size[3] % n == 0;
  for (const void* p : {static_cast<const void*>(norm.h.data), static_cast<const void*>(norm.h2.data),
                        static_cast<const void*>(norm.residual.data)})
    fit = fit && aligned(p);
  for (const void* p : others) fit = fit && aligned(p);
  return fit;
}

// What a block of a cluster keeps in its shared memory; all of that memory, at most; such blocks of a
// multiprocessor.
struct Room {
  int64_t kept, shared;
  int blocks;
};
constexpr int64_t kBlockBytes = 64 * 1024;
constexpr int64_t kClusterBytes = 48 * 1024;  // of a multiprocessor, where clusters meet
// Where all blocks of a launch meet: what each keeps; blocks of a multiprocessor.
constexpr int64_t kGridBytes = 92 * 1024;
constexpr int kGridBlocks = 2;
constexpr Room kRooms[] = {{kBlockBytes, 110 * 1024, 2}, {160 * 1024, 220 * 1024, 1}};
constexpr int64_t kLeastBytes = 4 * 1024;  // kept in each block of a cluster
constexpr int64_t kLine = 128;             // bytes
constexpr int64_t kChunkBytes =
    30 << 20;  // in L2 from one kernel to the next, or half of L2 where that is less

// Most parts of a slice, for the size of the scratch memory.
constexpr int64_t most_parts(int64_t pixels) {
  const int64_t parts = ceil_divide(pixels, 128);
  return parts < 512 ? parts : 512;
}

// How a channels_last slice lies before a block's threads.
inline void lay_columns(Cut& cut, int vector) {
  const uint32_t columns = cut.slice / vector;
  cut.by_columns = Divide(columns);
  cut.rows = columns < kThreads ? kThreads / columns : 1;
  cut.by_rows = Divide(cut.rows);
}

inline Cut cut_into(uint32_t channels, uint32_t slice, uint32_t total, int64_t parts) {
  Cut cut{};
  cut.slice = slice;
  cut.slices = channels / slice;
  cut.total = total;
  cut.size = static_cast<uint32_t>(ceil_divide(total, parts));
  cut.parts = static_cast<uint32_t>(ceil_divide(total, cut.size));
  return cut;
}

// Whether a channels_last slice is whole groups, whole runs of `run` channels and a whole part of the
// channels.
inline bool slice_fits(const Sizes& s, uint32_t slice, uint32_t run) {
  return slice == s.channels || (slice % s.width == 0 && slice % run == 0 && s.channels % slice == 0);
}

// Channels of whole 32-byte sectors of memory for each block, or at least of whole vectors.
inline std::array<uint32_t, 2> runs(int vector, int element_bytes) {
  return {static_cast<uint32_t>(vector > 1 ? 32 / element_bytes : 1), static_cast<uint32_t>(vector)};
}

// Slice and cluster where one kernel does the work: a slice of `total` pixels or vectors, bytes(slice) in
// each, in the shared memory of a cluster's blocks. The smallest cluster and widest slice that fill the
// device, or as many blocks as there can be. parts = 0 where a slice does not fit, or where a block that has
// a multiprocessor to itself would leave many without one.
template <bool nhwc, class Bytes>
Cut cluster_cut(const Sizes& s, int64_t batch, int vector, int element_bytes, uint32_t total, Bytes&& bytes,
                const Room& room, int widest, int device) {
  const int64_t multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device),
                enough = room.blocks * multiprocessors,
                least = room.blocks == 1 ? ceil_divide(3 * multiprocessors, 4) : 1;
  Cut best{};
  int64_t best_blocks = 0;
  for (const uint32_t run : runs(vector, element_bytes)) {
    for (int64_t cluster = 1; cluster <= widest; cluster *= 2) {
      for (uint32_t slices = 1; slices <= s.groups; ++slices) {
        const uint32_t slice = s.channels / slices;
        if (s.channels % slices != 0 || !(nhwc ? slice_fits(s, slice, run) : slice == s.width)) continue;
        const Cut cut = cut_into(s.channels, slice, total, cluster);
        const int64_t kept = cut.size * bytes(slice), blocks = batch * cut.slices * cut.parts;
        if (cut.parts != cluster || kept > room.kept || (cluster > 1 && kept < kLeastBytes)) continue;
        // as many blocks as run at once; more only where they need no cluster
        if (best_blocks >= enough || blocks <= best_blocks || (blocks > enough && cluster > 1)) continue;
        best = cut;
        best_blocks = blocks;
      }
    }
    if (best_blocks >= least) return best;
  }
  return Cut{};
}

// Slice and parts where the blocks of one launch meet: whole lines of memory, kGridBytes a part or what fills
// the blocks that run at once. parts = 0 where a slice's parts would be more than those.
template <bool nhwc, class Bytes>
Cut grid_cut(const Sizes& s, int64_t batch, int vector, int element_bytes, uint32_t total, Bytes&& bytes,
             int device) {
  uint32_t slice = nhwc ? s.channels : s.width;
  for (uint32_t slices = s.groups; nhwc && slices > 1; --slices)
    if (s.channels % slices == 0 && s.channels / slices * element_bytes >= kLine &&
        slice_fits(s, s.channels / slices, runs(vector, element_bytes)[0])) {
      slice = s.channels / slices;
      break;
    }
  const int64_t at_once = kGridBlocks * attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t size = total * bytes(slice), fill = at_once / (batch * (s.channels / slice));
  int64_t parts = std::max(ceil_divide(size, kGridBytes), std::min(fill, size / kLeastBytes));
  parts = std::max<int64_t>(1, std::min(parts, most_parts(s.pixels)));
  const Cut cut = cut_into(s.channels, slice, total, parts);
  return cut.parts <= at_once && cut.size * bytes(slice) <= kGridBytes ? cut : Cut{};
}

// Slice and parts where two kernels do, a slice of at most 64 vectors, some kBlockBytes a block.
template <bool nhwc, class Bytes>
Cut chunk_cut(const Sizes& s, int vector, int element_bytes, uint32_t total, Bytes&& bytes) {
  uint32_t slice = nhwc ? s.channels : s.width;
  for (const uint32_t run : runs(vector, element_bytes))
    for (uint32_t slices = 2; nhwc && slice > 64u * vector && slices <= s.groups; ++slices)
      if (s.channels % slices == 0 && slice_fits(s, s.channels / slices, run)) slice = s.channels / slices;
  const int64_t parts = ceil_divide(total * bytes(slice), kBlockBytes), most = most_parts(s.pixels);
  return cut_into(s.channels, slice, total, parts < most ? parts : most);
}

// Small tensors meet in clusters, whose barrier is quicker; large ones in the grid, whose blocks start one by
// one.
inline bool meets_in_clusters(int64_t bytes, int device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9 &&
         bytes <= kClusterBytes * attribute(cudaDevAttrMultiProcessorCount, device);
}

// f(first sample, samples) for as many at a time as two kernels leave in the L2 cache.
template <class F>
void each_chunk(int64_t batch, int64_t sample_bytes, int device, F&& f) {
  const int64_t half = attribute(cudaDevAttrL2CacheSize, device) / 2;
  const int64_t fit = (half < kChunkBytes ? half : kChunkBytes) / sample_bytes, chunk = fit < 1 ? 1 : fit;
  for (int64_t first = 0; first < batch; first += chunk)
    f(first, batch - first < chunk ? batch - first : chunk);
}

inline void check_scratch(const char* op, const Exec& exec) {
  if (!exec.scratch)
    throw std::runtime_error(std::string(op) + ": Exec::scratch must point to scratch_bytes()");
}

// A block has some numbers of every channel of its slice, at least of a group.
inline void check_shared(const char* op, const Cut& cut, int64_t bytes, int device) {
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (bytes > most)
    throw std::runtime_error(std::string(op) + ": what a block keeps of its groups' channels must fit in " +
                             std::to_string(most) + " bytes of shared memory: got " + std::to_string(bytes) +
                             " bytes for " + std::to_string(cut.slice) + " channels");
}

// Sets what the parts will tell each other to nothing.
inline void clear(const char* op, float2* told, int64_t items, void* stream) {
  check(cudaMemsetAsync(told, 0xff, static_cast<size_t>(items) * sizeof(float2),
                        static_cast<cudaStream_t>(stream)),
        op);
}

// Floats of scratch memory for a channel of a sample: the backward's two in all, three of each part, and two
// of each group and part. The forward's two moments of each group and part are fewer.
constexpr int64_t scratch_floats(int64_t pixels) { return 5 * most_parts(pixels) + 2; }

}  // namespace sr3fast::cuda
