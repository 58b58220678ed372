// Dense tensors cut into tiles of consecutive elements, whatever the layout, and the noise of a tile.
//
// Noise comes in quads of pixels along w. Where a quad is 4 neighbours in memory, 4-aligned there and in the
// image (NCHW; W and the origin multiples of 4), a thread draws what it needs into registers. Anything else
// (rows that end inside a quad, channels_last) is drawn quad by quad into shared memory, in memory order, and
// read back from there. So global memory is read and written in whole vectors either way.
#pragma once

#include "../common/divide.h"
#include "../common/noise.h"
#include "vec.cuh"

namespace sr3fast::cuda {

constexpr int kThreadElements = 8, kQuads = kThreadElements / 4;
constexpr int kMaxThreads = 256;
#if defined(SR3FAST_EMULATE)
constexpr int64_t kLaunchElements = 1 << 13;
#else
constexpr int64_t kLaunchElements = int64_t{1}
                                    << 30;  // of one launch: indices within it have 31 bits to divide
#endif

// Place of an element, sizes fastest first: W H C B, or C W H B in channels_last.
struct Place {
  uint32_t at[4];
};

// The elements first .. first + count of a dense tensor, which one launch takes, and where they lie.
struct Range {
  int64_t first, count;
  Place start;
  Divide size[3];
  bool channels_last;

  Range(const Tensor& t, int64_t first_) : first(first_), channels_last(t.channels_last()) {
    const int64_t left = t.numel() - first;
    count = left < kLaunchElements ? left : kLaunchElements;
    int64_t quotient = first;
    for (int i = 0; i < 4; ++i) {
      const int64_t n = t.size[dim(i)];
      if (i < 3) size[i] = Divide(n);
      start.at[i] = static_cast<uint32_t>(i < 3 ? quotient % n : quotient);
      quotient /= n;
    }
  }
  int dim(int i) const {
    const int nchw[4] = {3, 2, 1, 0}, nhwc[4] = {1, 3, 2, 0};
    return channels_last ? nhwc[i] : nchw[i];
  }
  // of element `i` of the range
  __device__ __forceinline__ Place place(uint32_t i) const { return after<3>(start, i); }
  // of the element that comes `i` after one at `from`; dims = 2: in the same sample
  template <int dims>
  __device__ __forceinline__ Place after(const Place& from, uint32_t i) const {
    Place p = from;
    uint32_t carry = i;
#pragma unroll
    for (int d = 0; d < dims; ++d) {
      const uint32_t n = from.at[d] + carry;
      carry = size[d].quotient(n);
      p.at[d] = n - carry * size[d].divisor;
    }
    p.at[dims] += carry;
    return p;
  }
};

// Runs f(range) over a tensor, a launch at a time.
template <class F>
void each_range(const Tensor& t, F&& f) {
  for (int64_t first = 0; first < t.numel(); first += kLaunchElements) f(Range(t, first));
}

// What a block does of a range. A thread has vectors of N elements; a block's vectors u lie side by side.
template <int N>
struct Tile {
  uint32_t start;
  int count;
  bool whole;

  __device__ __forceinline__ explicit Tile(const Range& range) {
    const int size = blockDim.x * kThreadElements;
    start = blockIdx.x * size;
    whole = range.count - start >= size;
    count = whole ? size : static_cast<int>(range.count - start);
  }
  __device__ __forceinline__ int at(int u) const { return (u * blockDim.x + threadIdx.x) * N; }
  __device__ __forceinline__ int valid(int u) const { return min(N, count - at(u)); }
  // the thread's elements as quads, j of kQuads
  __device__ __forceinline__ int quad(int j) const { return at(j * 4 / N) + j * 4 % N; }
};

// Blocks, threads and shared memory: `bytes`, and the tile's noise where it is not drawn into registers.
inline Launch tiles(const Range& range, bool direct, int64_t bytes, const Exec& exec) {
  // small tensors in small blocks, so that they reach every multiprocessor
  const int threads = range.count >= (1 << 20) ? kMaxThreads : 64, size = threads * kThreadElements;
  return {ceil_divide(range.count, size), threads, bytes + (direct ? 0 : size * 4), 1, exec.stream};
}

// A tensor of the same sizes and any strides: element i of a range is the same place in each.
struct View {
  char* data = nullptr;  // dense: of the range's first element
  Dtype dtype = Dtype::f32;
  bool dense = true;     // the range's order in memory, nothing between the elements
  bool vectors = false;  // dense, and aligned for vectors of N elements
  int64_t stride[4] = {0, 0, 0, 0};

  View(const Tensor& t, const Range& range, int elements) : data(static_cast<char*>(t.data)), dtype(t.dtype) {
    if (!t) return;
    int64_t next = 1;
    for (int i = 0; i < 4; ++i) {
      const int d = range.dim(i);
      stride[i] = t.stride[d];
      dense = dense && (t.size[d] == 1 || stride[i] == next);
      next *= t.size[d];
    }
    const int bytes = dtype == Dtype::f32 ? 4 : 2;
    if (dense) data += range.first * bytes;
    vectors = dense && reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(elements * bytes) == 0;
  }
  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }

  // of elements i .. i + N; a tensor that must be dense has no use for the rest of the code
  template <bool strides, int N>
  __device__ __forceinline__ void offsets(const Range& range, uint32_t i, int64_t (&offset)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      offset[k] = i + k;
      if (strides && !dense) {
        const Place p = range.place(i + k);
        offset[k] = p.at[0] * stride[0] + p.at[1] * stride[1] + p.at[2] * stride[2] + p.at[3] * stride[3];
      }
    }
  }
};

// Elements i .. i + valid of a range; whole: the tile is, so that vectors may be read.
template <class T, int N, bool strides = false>
__device__ __forceinline__ Vec<T, N> load(const View& from, const Range& range, uint32_t i, int valid,
                                          bool whole) {
  const T* data = reinterpret_cast<const T*>(from.data);
  if (whole && from.vectors) return Vec<T, N>::load(data + i);
  int64_t offset[N];
  from.template offsets<strides>(range, i, offset);
  float x[N] = {};  // to a float and back is exact
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (k < valid) x[k] = to_float(data[offset[k]]);
  return Vec<T, N>::of(x);
}

template <class T, bool strides = false, int N>
__device__ __forceinline__ void store(const View& to, const Range& range, uint32_t i, int valid, bool whole,
                                      const float (&x)[N]) {
  T* data = reinterpret_cast<T*>(to.data);
  if (whole && to.vectors) {
    Vec<T, N>::of(x).store(data + i);
    return;
  }
  int64_t offset[N];
  to.template offsets<strides>(range, i, offset);
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (k < valid) data[offset[k]] = from_float<T>(x[k]);
}

// into a tensor of any type and strides
template <int N>
__device__ __forceinline__ void store_any(const View& to, const Range& range, uint32_t i, int valid,
                                          bool whole, const float (&x)[N]) {
#pragma unroll
  for (int k = 0; k < N; k += 4) {
    const float quad[4] = {x[k], x[k + 1], x[k + 2], x[k + 3]};
    switch (to.dtype) {
      case Dtype::f32:
        store<float, true>(to, range, i + k, valid - k, whole, quad);
        break;
      case Dtype::f16:
        store<f16, true>(to, range, i + k, valid - k, whole, quad);
        break;
      case Dtype::bf16:
        store<bf16, true>(to, range, i + k, valid - k, whole, quad);
        break;
    }
  }
}

// What the noise of a tile needs, in shared memory: one thread finds it for all.
struct alignas(16) Head {
  Place first;     // of the tile
  RoundKeys keys;  // of the tile's sample, where it lies in one
  uint32_t step;
  bool one_sample;
  uint32_t quad, items;  // not direct: the tile's first quad, and what is to be drawn
};

// Noise v1 of the elements of a range.
struct Draw {
  Seeds seed;
  Scalar<int64_t> step;
  uint32_t domain;
  uint32_t h0, quad0, lead;  // of the tensor's first pixel in the image: row, quad, place in the quad
  Divide quads;              // of a row
  bool direct;

  Draw(const Tensor& t, Seeds seed_, Scalar<int64_t> step_, uint32_t domain_, Origin origin)
      : seed(seed_), step(step_), domain(domain_) {
    h0 = static_cast<uint32_t>(origin.h);
    quad0 = static_cast<uint32_t>(origin.w / 4);
    lead = static_cast<uint32_t>(origin.w % 4);
    quads = Divide((t.size[3] + lead + 3) / 4);
    direct = !t.channels_last() && t.size[3] % 4 == 0 && lead == 0;
  }

  // elements i .. i + count, by one thread; a barrier must follow
  template <bool direct>
  __device__ __forceinline__ void prepare(const Range& range, uint32_t i, int count, Head& head) const {
    const Place p = range.place(i);
    head.first = p;
    head.step = static_cast<uint32_t>(step.read());
    head.one_sample = range.after<3>(p, count - 1).at[3] == p.at[3];
    const uint64_t key = seed.of(p.at[3]);
#pragma unroll
    for (int round = 0; round < kRounds; ++round) head.keys.of[round] = round_key(key, round);
    if (direct) return;
    const bool nhwc = range.channels_last;
    const Divide& width = range.size[nhwc ? 1 : 0];
    const uint32_t w0 = nhwc ? p.at[1] : p.at[0];
    const uint32_t last_pixel = w0 + (nhwc ? range.size[0].quotient(p.at[0] + count - 1) : count - 1);
    const uint32_t last_row = width.quotient(last_pixel);
    const uint32_t last = last_row * quads.divisor + (last_pixel - last_row * width.divisor + lead) / 4;
    head.quad = (w0 + lead) / 4;
    head.items = (last - head.quad + 1) * (nhwc ? range.size[0].divisor : 1);
  }

  // direct: this thread's quads of a tile. Nearly every tile lies in one sample: its places and keys are
  // cheaper, and quads after its end are drawn for nothing.
  template <int N>
  __device__ __forceinline__ void in_registers(const Range& range, const Tile<N>& tile, const Head& head,
                                               float (&z)[kQuads][4]) const {
    if (head.one_sample) {
#pragma unroll
      for (int j = 0; j < kQuads; ++j)
        quad(head.keys, range.after<2>(head.first, tile.quad(j)), head.step, z[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const Place p = range.after<3>(head.first, tile.quad(j));
        if (tile.quad(j) < tile.count) quad(seed.of(p.at[3]), p, head.step, z[j]);
      }
    }
  }
  template <class Key>
  __device__ __forceinline__ void quad(const Key& key, const Place& p, uint32_t t, float (&z)[4]) const {
    const Normals n = normals(key, domain, t, p.at[2], p.at[1] + h0, p.at[0] / 4 + quad0);
    z[0] = n.z0;
    z[1] = n.z1;
    z[2] = n.z2;
    z[3] = n.z3;
  }

  // the tile's elements into z, by the whole block; a barrier must follow
  __device__ __forceinline__ void in_shared(const Range& range, int count, const Head& head, float* z) const {
    if (head.one_sample)
      each_item<true>(range, count, head, z);
    else
      each_item<false>(range, count, head, z);
  }
  template <bool one_sample>
  __device__ __forceinline__ void each_item(const Range& range, int count, const Head& head, float* z) const {
    // rows of w; in channels_last `inner` channels within a pixel, in NCHW one
    const bool nhwc = range.channels_last;
    const Place p = head.first;
    const uint32_t items = head.items;
    const uint32_t c0 = nhwc ? p.at[0] : 0, w0 = nhwc ? p.at[1] : p.at[0], row0 = nhwc ? p.at[2] : p.at[1];
    const int inner = nhwc ? static_cast<int>(range.size[0].divisor) : 1;
    const int wide = static_cast<int>(range.size[nhwc ? 1 : 0].divisor);
    const Divide& height = range.size[nhwc ? 2 : 1];

    for (uint32_t item = threadIdx.x; item < items; item += blockDim.x) {
      const uint32_t k = nhwc ? range.size[0].quotient(item) : item, c = item - k * inner;
      const uint32_t row = quads.quotient(head.quad + k), q = head.quad + k - row * quads.divisor;
      const uint32_t below = one_sample && nhwc ? 0 : height.quotient(row0 + row);
      const uint32_t h = row0 + row - below * height.divisor;
      uint32_t channel = c, b = p.at[3] + below;
      if (!nhwc) {
        const uint32_t over = one_sample ? 0 : range.size[2].quotient(p.at[2] + below);
        channel = p.at[2] + below - over * range.size[2].divisor;
        b = p.at[3] + over;
      }
      Normals n;
      if constexpr (one_sample)
        n = normals(head.keys, domain, head.step, channel, h + h0, q + quad0);
      else
        n = normals(seed.of(b), domain, head.step, channel, h + h0, q + quad0);
      const float pixel[4] = {n.z0, n.z1, n.z2, n.z3};
      const int w = static_cast<int>(4 * q) - static_cast<int>(lead);
      const int e = (static_cast<int>(row) * wide + w - static_cast<int>(w0)) * inner + static_cast<int>(c) -
                    static_cast<int>(c0);
      if (w >= 0 && w + 3 < wide && e >= 0 && e + 3 * inner < count) {  // most
#pragma unroll
        for (int j = 0; j < 4; ++j) z[e + j * inner] = pixel[j];
        continue;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = e + j * inner;
        if (w + j >= 0 && w + j < wide && at >= 0 && at < count) z[at] = pixel[j];
      }
    }
  }
};

}  // namespace sr3fast::cuda
