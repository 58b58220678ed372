// group_norm_silu, backward. With x_hat = (s - mean) rstd, n = weight x_hat + bias, g = grad act'(n) and <.>
// the mean over a group:
//     dh = (weight g - <weight g> - x_hat <weight g x_hat>) rstd (+ grad_s)
//     dweight = sum g x_hat,  dbias = sum g,  dshift = sum dh
// All of these follow from three sums a channel and sample: of g, of g x_hat and of x_hat.
//
// As in the forward, one kernel where the blocks that run at once have room for a slice of h and grad, in
// clusters or, of large tensors, in a grid that goes from slice to slice; else two over as many samples at a
// time as stay in L2; then one that sums dweight and dbias over the samples.
#include "norm.cuh"

namespace sr3fast::cuda {
namespace {

constexpr int kInFlight = 4;  // 16-byte loads of a thread, of h and of grad each

// of g, g x_hat and x_hat; of a thread: of g, g (s - mean) and s - mean
struct Sums {
  float g = 0.0f, gx = 0.0f, x = 0.0f;

  __device__ __forceinline__ void add(const Sums& other) {
    g += other.g;
    gx += other.gx;
    x += other.x;
  }
  __device__ __forceinline__ void add_lane(int mask) {
    g += __shfl_xor_sync(0xffffffffu, g, mask);
    gx += __shfl_xor_sync(0xffffffffu, gx, mask);
    x += __shfl_xor_sync(0xffffffffu, x, mask);
  }
  // over a team of lanes
  __device__ __forceinline__ void over(int lanes) {
    for (int mask = lanes / 2; mask > 0; mask /= 2) add_lane(mask);
  }
};

// How the threads of a block share its part, and where the sums of each channel stand in shared memory:
// `entries` of them a channel, of each kind in a plane of its own.
struct Shares {
  uint32_t entries, plane;
  // channels_last: 2^log_rows rows lie in one warp and are merged in registers, over lanes that differ in the
  // bits from least_mask on; `apart` is odd, to keep the readers of a vector's channels apart
  uint32_t log_rows, least_mask, apart;
  // NCHW: a team of lanes takes a piece of a channel; vectors of a piece
  uint32_t log_lanes, pieces, piece;
  Divide by_pieces;

  static Shares nhwc(const Cut& cut, uint32_t vector) {
    Shares of{};
    const uint32_t count = cut.slice / vector;
    while (count << of.log_rows < 32) ++of.log_rows;
    if (count << of.log_rows != 32) of.log_rows = 0;
    of.least_mask = 32 >> of.log_rows;
    of.entries = cut.rows >> of.log_rows;
    of.apart = of.entries * count + 1;
    of.plane = vector * of.apart;
    return of;
  }
  static Shares nchw(const Cut& cut) {
    Shares of{};
    of.log_lanes = cut.size >= 64 ? 5 : 3;
    const uint32_t teams = kThreads >> of.log_lanes;
    of.pieces = cut.slice < teams ? teams / cut.slice : 1;
    of.piece = (cut.size + of.pieces - 1) / of.pieces;
    of.by_pieces = Divide(of.pieces);
    of.entries = of.pieces;
    of.plane = cut.slice * of.pieces;
    return of;
  }
  SR3FAST_HD uint32_t lanes() const { return 1u << log_lanes; }
};

struct Arguments {
  const void *h, *h2, *grad, *grad_s;
  void *dh, *dh2;
  Vector weight, bias, shift;
  const float *mean, *rstd;
  float* dshift;
  int64_t batch;
  Sizes sizes;
  Cut cut;
  uint32_t units;  // parts of all slices
  Shares shares;
  int64_t first_sample;
  // scratch memory
  float2* group_parts;   // sums of the parts: [B, groups, parts]
  float* totals;         // sums of g and of g x_hat: [2, B, C]
  float* channel_parts;  // [B, C, 3, parts]
  // shared memory
  uint32_t data, partial, channels, weights, gradients, group_received, channel_received, total, stat;
};

// What is given of a channel; mean: less the shift.
struct Fetched {
  float mean, rstd, weight, bias;

  Fetched() = default;
  __device__ __forceinline__ Fetched(const Arguments& a, const Block& block, uint32_t i) {
    const uint32_t c = block.slice * a.cut.slice + i;
    const int64_t group = block.b * a.sizes.groups + a.sizes.by_width.quotient(c);
    mean = a.mean[group] - (a.shift ? read(a.shift, block.b * a.sizes.channels + c) : 0.0f);
    rstd = a.rstd[group];
    weight = read(a.weight, c);
    bias = read(a.bias, c);
  }
};

// What g needs of its channel, in shared memory.
template <class T, bool silu>
struct Channel {
  using Act = Activation<T, silu>;
  float mean, scale, bias;

  Channel() = default;
  __device__ __forceinline__ Channel(const Arguments& a, uint32_t i) {
    const float4 of = shared_at<float4>(a.channels)[i];
    mean = of.x;
    scale = of.y;
    bias = of.z;
  }
  static __device__ __forceinline__ void put(const Arguments& a, const Block& block, const Fetched& first) {
    each_channel(a, block, first, [&](uint32_t i, const Fetched& of) {
      shared_at<float4>(a.channels)[i] =
          make_float4(of.mean, of.weight * of.rstd * Act::half, of.bias * Act::half, of.rstd);
      shared_at<float>(a.weights)[i] = of.weight;
    });
  }

  __device__ __forceinline__ float g(float h, float grad) const {
    return grad * Act::derivative((h - mean) * scale + bias);
  }
  // g, added to sums of g, of g d and of d = h - mean
  __device__ __forceinline__ float add(float h, float grad, Sums& sums) const {
    const float d = h - mean, of = grad * Act::derivative(d * scale + bias);
    sums.g += of;
    sums.gx += of * d;
    sums.x += d;
    return of;
  }
};

// dh of h and g: weight rstd g - rstd^2 <weight g x_hat> (h - mean) - rstd <weight g>. To a half's rounding
// the mean may go into the last term; a float's would lose what a large mean leaves.
template <class T>
struct Gradient {
  float g, h, offset, mean;

  Gradient() = default;
  __device__ __forceinline__ Gradient(const Arguments& a, uint32_t i) {
    const float4 of = shared_at<float4>(a.gradients)[i];
    g = of.x;
    h = of.y;
    offset = of.z;
    mean = of.w;
  }
  // mean_of(group of the slice): <weight g> and <weight g x_hat>
  template <class MeanOf>
  static __device__ __forceinline__ void put(const Arguments& a, const Block& block, const Fetched& first,
                                             MeanOf&& mean_of) {
    each_channel(a, block, first, [&](uint32_t i, const Fetched& of) {
      const float2 mean = mean_of(a.sizes.by_width.quotient(i));
      const float h = -of.rstd * of.rstd * mean.y;
      shared_at<float4>(a.gradients)[i] = make_float4(
          of.weight * of.rstd, h, -of.rstd * mean.x - (sizeof(T) == 2 ? h * of.mean : 0.0f), of.mean);
    });
  }
  __device__ __forceinline__ float operator()(float h_, float g_) const {
    return g * g_ + (h * (sizeof(T) == 2 ? h_ : h_ - mean) + offset);
  }
};

// The elements at `at` (in a tensor with all channels) of dh, with grad_s.
template <class T, int V>
__device__ __forceinline__ Vec<T, V> finish(const Arguments& a, float (&dh)[V], int64_t at) {
  if (a.grad_s) {
    float s[V];
    Vec<T, V>::load_constant(static_cast<const T*>(a.grad_s) + at).floats(s);
#pragma unroll
    for (int v = 0; v < V; ++v) dh[v] += s[v];
  }
  return Vec<T, V>::of(dh);
}

// ---- channels_last: the threads' columns are as in the forward

template <class T, int V, bool silu>
struct Nhwc {
  const Arguments& a;
  const Block& block;
  T* data;  // in shared memory: of h, then of grad or g
  uint32_t begin, length;
  Columns<V> columns;
  using Elements = Vec<T, V>;

  __device__ __forceinline__ Nhwc(const Arguments& a_, const Block& block_, T* data_)
      : a(a_),
        block(block_),
        data(data_),
        begin(a_.cut.begin(block_.part)),
        length(a_.cut.length(block_.part)),
        columns(a_.cut) {}

  __device__ __forceinline__ T* kept_h() const { return data; }
  __device__ __forceinline__ T* kept_g() const { return kept_h() + a.cut.size * a.cut.slice; }
  // of the part's first pixel, in a tensor with all channels
  __device__ __forceinline__ int64_t whole(uint32_t c) const {
    return (block.b * a.sizes.pixels + begin) * a.sizes.channels + c;
  }

  // h and grad into shared memory; a thread copies what it alone reads
  __device__ __forceinline__ void copy() const {
    const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
    for (uint32_t column = columns.column; column < columns.count; column += columns.step) {
      const uint32_t c = block.slice * a.cut.slice + column * V;
      uint32_t stride;
      const T* h = pair.nhwc(a.sizes, block.b, begin, c, stride);
      const T* grad = static_cast<const T*>(a.grad) + whole(c);
      for (uint32_t p = columns.row; p < length; p += columns.rows) {
        const uint32_t at = p * a.cut.slice + column * V;
        Elements::copy(kept_h() + at, h + int64_t{p} * stride);
        Elements::copy(kept_g() + at, grad + int64_t{p} * a.sizes.channels);
      }
    }
  }

  // into shared memory: [3, row, channel of the slice]
  template <bool one>
  __device__ __forceinline__ void sums() const {
    float* partial = shared_at<float>(a.partial);
    if (one) wait_for_copies();
    for (uint32_t column = columns.column; column < columns.count; column += columns.step) {
      const uint32_t c = block.slice * a.cut.slice + column * V;
      uint32_t stride;
      const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
      const T* h = pair.nhwc(a.sizes, block.b, begin, c, stride);
      const T* grad = static_cast<const T*>(a.grad) + whole(c);
      Channel<T, silu> channel[V];
#pragma unroll
      for (int v = 0; v < V; ++v) channel[v] = Channel<T, silu>(a, column * V + v);
      Sums sums[V];
      constexpr int K = one ? 2 : kInFlight;
      for (uint32_t p = columns.row; p < length; p += K * columns.rows) {
        Elements x[K] = {}, g[K] = {};
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (p + k * columns.rows >= length) continue;
          const uint32_t pixel = p + k * columns.rows, at = pixel * a.cut.slice + column * V;
          x[k] = one ? Elements::load(kept_h() + at)
                     : Elements::load_constant(h + static_cast<int64_t>(pixel) * stride);
          g[k] = one ? Elements::load(kept_g() + at)
                     : Elements::load_constant(grad + static_cast<int64_t>(pixel) * a.sizes.channels);
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (p + k * columns.rows >= length) continue;
          float known[V];
#pragma unroll
          for (int v = 0; v < V; ++v) known[v] = channel[v].add(x[k].at(v), g[k].at(v), sums[v]);
          if (one) Elements::of(known).keep(kept_g() + (p + k * columns.rows) * a.cut.slice + column * V);
        }
      }
      for (uint32_t mask = 16; mask >= a.shares.least_mask; mask /= 2) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums[v].add_lane(static_cast<int>(mask));
      }
      if (columns.row & ((1u << a.shares.log_rows) - 1)) continue;
      const uint32_t at = (columns.row >> a.shares.log_rows) * columns.count + column;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float* to = partial + at + v * a.shares.apart;
        to[0] = sums[v].g;
        to[a.shares.plane] = sums[v].gx;
        to[2 * a.shares.plane] = sums[v].x;
      }
    }
  }
  // place of the k-th sums of channel i of the slice
  __device__ __forceinline__ uint32_t entry(uint32_t i, uint32_t k) const {
    return i % V * a.shares.apart + k * columns.count + i / V;
  }

  // one: the places of what was read are for the same of `next`, where more is to come
  template <bool one>
  __device__ __forceinline__ void apply(bool more, const Block& next) const {
    const Nhwc after(a, next, data);
    const uint32_t next_length = one && more ? after.length : 0;
    const Pair<T> in{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
    const Pair<T> out{static_cast<const T*>(a.dh), static_cast<const T*>(a.dh2)};
    for (uint32_t column = columns.column; column < columns.count; column += columns.step) {
      Channel<T, silu> channel[V];
      Gradient<T> gradient[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (!one) channel[v] = Channel<T, silu>(a, column * V + v);
        gradient[v] = Gradient<T>(a, column * V + v);
      }
      // one: h and grad are those of `next`
      const Nhwc& from = one ? after : *this;
      const uint32_t c = block.slice * a.cut.slice + column * V;
      const uint32_t from_c = from.block.slice * a.cut.slice + column * V;
      uint32_t stride, dh_stride;
      const T* h = in.nhwc(a.sizes, from.block.b, from.begin, from_c, stride);
      h += int64_t{columns.row} * stride;
      const T* grad =
          static_cast<const T*>(a.grad) + from.whole(from_c) + int64_t{columns.row} * a.sizes.channels;
      T* dh = const_cast<T*>(out.nhwc(a.sizes, block.b, begin, c, dh_stride));
      dh += int64_t{columns.row} * dh_stride;
      T* kept = data + columns.row * a.cut.slice + column * V;
      int64_t at = whole(c) + int64_t{columns.row} * a.sizes.channels;
      const int64_t h_step = int64_t{columns.rows} * stride, dh_step = int64_t{columns.rows} * dh_stride,
                    step = int64_t{columns.rows} * a.sizes.channels;
      const uint32_t kept_step = columns.rows * a.cut.slice, to_g = a.cut.size * a.cut.slice;

      constexpr int K = one ? kInFlight : 2;
      uint32_t p = columns.row;
      const auto some = [&](auto every) {
        constexpr bool all = decltype(every)::value;
        Elements x[K], g[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (!all && p + k * columns.rows >= length) continue;
          x[k] = one ? Elements::load(kept + k * kept_step) : Elements::load_constant(h + k * h_step);
          g[k] = one ? Elements::load(kept + to_g + k * kept_step) : Elements::load_constant(grad + k * step);
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (!all && p + k * columns.rows >= length) continue;
          float result[V];
#pragma unroll
          for (int v = 0; v < V; ++v)
            result[v] = gradient[v](x[k].at(v), one ? g[k].at(v) : channel[v].g(x[k].at(v), g[k].at(v)));
          finish<T, V>(a, result, at + k * step).store(dh + k * dh_step);
        }
        if constexpr (one) {
#pragma unroll
          for (int k = 0; k < K; ++k) {
            if (p + k * columns.rows >= next_length) continue;
            Elements::copy(kept + k * kept_step, h + k * h_step);
            Elements::copy(kept + to_g + k * kept_step, grad + k * step);
          }
        }
        p += K * columns.rows;
        h += K * h_step;
        grad += K * step;
        dh += K * dh_step;
        at += K * step;
        kept += K * kept_step;
      };
      while (p + (K - 1) * columns.rows < length) some(std::true_type{});
      if (p < length) some(std::false_type{});
      if constexpr (one) {  // a longer next part
        for (; p < next_length; p += columns.rows, h += h_step, grad += step, kept += kept_step) {
          Elements::copy(kept, h);
          Elements::copy(kept + to_g, grad);
        }
      }
    }
  }
};

// ---- NCHW: a slice is a group, a part some vectors of each of its channels. A team of lanes takes a piece
// of a channel.

template <class T, int V, bool silu>
struct Nchw {
  const Arguments& a;
  const Block& block;
  T* data;
  uint32_t begin, length;
  using Elements = Vec<T, V>;

  __device__ __forceinline__ Nchw(const Arguments& a_, const Block& block_, T* data_)
      : a(a_),
        block(block_),
        data(data_),
        begin(a_.cut.begin(block_.part)),
        length(a_.cut.length(block_.part)) {}

  // f(item, channel of the slice, first vector, end of the vectors) for this thread's share; every thread of
  // a warp makes the same number of calls
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    const Shares& of = a.shares;
    const uint32_t items = a.cut.slice * of.pieces, lane = threadIdx.x & (of.lanes() - 1);
    for (uint32_t round = 0; round < items; round += kThreads >> of.log_lanes) {
      const uint32_t item = round + (threadIdx.x >> of.log_lanes);
      const uint32_t i = of.by_pieces.quotient(item), first = (item - i * of.pieces) * of.piece;
      f(item, i, first + lane, item < items ? min(first + of.piece, length) : 0);
    }
  }
  __device__ __forceinline__ T* kept_h() const { return data; }
  __device__ __forceinline__ T* kept_g() const { return kept_h() + a.cut.size * a.cut.slice * V; }
  __device__ __forceinline__ int64_t whole(uint32_t c) const {
    return (block.b * a.sizes.channels + c) * a.sizes.pixels + static_cast<int64_t>(begin) * V;
  }
  __device__ __forceinline__ void copy() const {
    each([&](uint32_t, uint32_t i, uint32_t first, uint32_t end) {
      for (uint32_t p = first; p < end; p += a.shares.lanes()) copy_one(i, p);
    });
  }
  // vector p of channel i, of h and grad, into shared memory
  __device__ __forceinline__ void copy_one(uint32_t i, uint32_t p) const {
    const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
    const uint32_t c = block.slice * a.cut.slice + i, at = (i * a.cut.size + p) * V;
    Elements::copy(kept_h() + at, pair.nchw(a.sizes, block.b, c) + static_cast<int64_t>(begin + p) * V);
    Elements::copy(kept_g() + at, static_cast<const T*>(a.grad) + whole(c) + static_cast<int64_t>(p) * V);
  }

  // into shared memory: [3, item]
  template <bool one>
  __device__ __forceinline__ void sums() const {
    float* partial = shared_at<float>(a.partial);
    const uint32_t lanes = a.shares.lanes();
    if (one) wait_for_copies();
    each([&](uint32_t item, uint32_t i, uint32_t first, uint32_t end) {
      Sums sums;
      if (first < end) {
        const Channel<T, silu> channel(a, i);
        const uint32_t c = block.slice * a.cut.slice + i;
        const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
        const T* h = pair.nchw(a.sizes, block.b, c) + static_cast<int64_t>(begin) * V;
        const T* grad = static_cast<const T*>(a.grad) + whole(c);
        for (uint32_t p = first; p < end; p += kInFlight * lanes) {
          Elements x[kInFlight] = {}, g[kInFlight] = {};
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) {
            if (p + k * lanes >= end) continue;
            const uint32_t q = p + k * lanes, at = (i * a.cut.size + q) * V;
            x[k] = one ? Elements::load(kept_h() + at)
                       : Elements::load_constant(h + static_cast<int64_t>(q) * V);
            g[k] = one ? Elements::load(kept_g() + at)
                       : Elements::load_constant(grad + static_cast<int64_t>(q) * V);
          }
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) {
            if (p + k * lanes >= end) continue;
            float known[V];
#pragma unroll
            for (int v = 0; v < V; ++v) known[v] = channel.add(x[k].at(v), g[k].at(v), sums);
            if (one) Elements::of(known).keep(kept_g() + (i * a.cut.size + p + k * lanes) * V);
          }
        }
      }
      sums.over(static_cast<int>(lanes));
      if ((threadIdx.x & (lanes - 1)) == 0 && i < a.cut.slice) {
        partial[item] = sums.g;
        partial[a.shares.plane + item] = sums.gx;
        partial[2 * a.shares.plane + item] = sums.x;
      }
    });
  }
  __device__ __forceinline__ uint32_t entry(uint32_t i, uint32_t k) const { return i * a.shares.pieces + k; }

  template <bool one>
  __device__ __forceinline__ void apply(bool more, const Block& next) const {
    const uint32_t lanes = a.shares.lanes();
    each([&](uint32_t, uint32_t i, uint32_t first, uint32_t end) {
      if (first >= end) return;
      const Channel<T, silu> channel(a, i);
      const Gradient<T> gradient(a, i);
      const uint32_t c = block.slice * a.cut.slice + i;
      const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
      const Pair<T> out{static_cast<const T*>(a.dh), static_cast<const T*>(a.dh2)};
      const T* h = pair.nchw(a.sizes, block.b, c) + static_cast<int64_t>(begin) * V;
      T* dh = const_cast<T*>(out.nchw(a.sizes, block.b, c)) + static_cast<int64_t>(begin) * V;
      const T* grad = static_cast<const T*>(a.grad) + whole(c);
      for (uint32_t p = first; p < end; p += kInFlight * lanes) {
        Elements x[kInFlight] = {}, g[kInFlight] = {};
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (p + k * lanes >= end) continue;
          const uint32_t q = p + k * lanes, at = (i * a.cut.size + q) * V;
          x[k] =
              one ? Elements::load(kept_h() + at) : Elements::load_constant(h + static_cast<int64_t>(q) * V);
          g[k] = one ? Elements::load(kept_g() + at)
                     : Elements::load_constant(grad + static_cast<int64_t>(q) * V);
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (p + k * lanes >= end) continue;
          const int64_t q = static_cast<int64_t>(p + k * lanes) * V;
          float result[V];
#pragma unroll
          for (int v = 0; v < V; ++v)
            result[v] = gradient(x[k].at(v), one ? g[k].at(v) : channel.g(x[k].at(v), g[k].at(v)));
          finish<T, V>(a, result, whole(c) + q).store(dh + q);
        }
      }
    });
    if (one && more) Nchw(a, next, data).copy();  // to where this thread read
  }
};

// ---- both layouts

// What the blocks of a slice tell each other, in a cluster's shared memory or in global memory: of the groups
// all, of the channels the one that sums them up.
template <bool cluster>
struct Letters {
  const Arguments& a;
  const Block& block;
  uint32_t groups;
  float* channels;  // [channel, 3, part]
  float2* group;    // [group, part]

  __device__ __forceinline__ Letters(const Arguments& a_, const Block& block_)
      : a(a_), block(block_), groups(a_.cut.slice / a_.sizes.width) {
    if (cluster) {
      channels = shared_at<float>(a.channel_received);
      group = shared_at<float2>(a.group_received);
    } else {
      channels = a.channel_parts + (block.b * a.sizes.channels + block.slice * a.cut.slice) * 3 * a.cut.parts;
      group = a.group_parts + (block.b * a.sizes.groups + block.slice * groups) * a.cut.parts;
    }
  }
  __device__ __forceinline__ void tell_channel(uint32_t i, const Sums& sums) const {
    float* to = (cluster ? cluster_peer(channels, 0) : channels) + i * 3 * a.cut.parts + block.part;
    to[0] = sums.g;
    to[a.cut.parts] = sums.gx;
    to[2 * a.cut.parts] = sums.x;
  }
  __device__ __forceinline__ void tell_group(uint32_t i, int lane, int lanes, float2 sums) const {
    const uint32_t at = i * a.cut.parts + block.part;
    if constexpr (cluster) {
      for (uint32_t peer = lane; peer < a.cut.parts; peer += lanes) cluster_peer(group, peer)[at] = sums;
    } else {
      if (lane == 0) tell(group + at, sums);
    }
  }

  // The block's sums, told to the others.
  template <class Work>
  __device__ __forceinline__ void send(const Work& work) const {
    const float* partial = shared_at<float>(a.partial);
    const float4* channel = shared_at<float4>(a.channels);
    const float* weight = shared_at<float>(a.weights);
    Sums* total = shared_at<Sums>(a.total);
    by_teams(a.cut.slice, [&](uint32_t i, int lane, int lanes, bool own) {
      Sums sums;
#pragma unroll 4
      for (uint32_t k = lane; k < a.shares.entries; k += lanes) {
        const uint32_t at = work.entry(i, k);
        sums.add({partial[at], partial[a.shares.plane + at], partial[2 * a.shares.plane + at]});
      }
      sums.over(lanes);
      if (lane != 0 || !own) return;
      sums.gx *= channel[i].w;
      sums.x *= channel[i].w;
      total[i] = sums;
      tell_channel(i, sums);
    });
    __syncthreads();
    by_teams(groups, [&](uint32_t of, int lane, int lanes, bool) {
      float g = 0.0f, gx = 0.0f;
      for (uint32_t i = of * a.sizes.width + lane; i < (of + 1) * a.sizes.width; i += lanes) {
        g += weight[i] * total[i].g;
        gx += weight[i] * total[i].gx;
      }
      g = lane_sum(g, lanes);
      gx = lane_sum(gx, lanes);
      tell_group(of, lane, lanes, make_float2(g, gx));
    });
  }

  // The means of the slice's groups, <weight g> and <weight g x_hat>, in shared memory.
  __device__ __forceinline__ const float2* means() const {
    float2* means = shared_at<float2>(a.stat);
    const float inverse = 1.0f / (static_cast<float>(a.sizes.width) * a.sizes.pixels);
    by_teams(groups, [&](uint32_t i, int lane, int lanes, bool own) {
      float g = 0.0f, gx = 0.0f;
      const auto add = [&](int, float2 of) {
        g += of.x;
        gx += of.y;
      };
      constexpr int K = 4;
      const float2* from = group + i * a.cut.parts;
      for (uint32_t part = lane; part < a.cut.parts; part += K * lanes) {
        const uint32_t n = (a.cut.parts - part + lanes - 1) / lanes;
        if constexpr (cluster) {
          for (uint32_t k = 0; k < n && k < K; ++k) add(0, from[part + k * lanes]);
        } else {
          hear_some<K>(from + part, lanes, n, add);
        }
      }
      g = lane_sum(g, lanes) * inverse;
      gx = lane_sum(gx, lanes) * inverse;
      if (lane == 0 && own) means[i] = make_float2(g, gx);
    });
    __syncthreads();
    return means;
  }
};

// What is left of a channel of a sample: totals for dweight and dbias, and dshift.
__device__ __forceinline__ void leave(const Arguments& a, const Block& block, uint32_t i, const Sums& sums,
                                      float2 mean) {
  const int64_t c = block.b * a.sizes.channels + block.slice * a.cut.slice + i;
  a.totals[c] = sums.g;
  a.totals[a.batch * a.sizes.channels + c] = sums.gx;
  if (!a.dshift) return;
  const Fetched channel(a, block, i);
  a.dshift[c] = (channel.weight * sums.g - a.sizes.pixels * mean.x - sums.x * mean.y) * channel.rstd;
}

template <class T, int V, bool nhwc, bool silu>
using Work = std::conditional_t<nhwc, Nhwc<T, V, silu>, Nchw<T, V, silu>>;

template <class T, int V, bool nhwc, bool silu>
__global__ void __launch_bounds__(kThreads, 2) cluster_kernel(const Arguments a) {
  cluster_arrive_relaxed();  // a peer's shared memory is there once the peer has started
  const Block block(a.cut, blockIdx.x, a.first_sample);
  const Fetched fetched = fetch<Fetched>(a, block);
  const Work<T, V, nhwc, silu> work(a, block, shared_at<T>(a.data));
  work.copy();
  Channel<T, silu>::put(a, block, fetched);
  __syncthreads();
  work.template sums<true>();
  __syncthreads();
  cluster_wait();
  const Letters<true> letters(a, block);
  letters.send(work);
  cluster_arrive();
  cluster_wait();
  const float2* means = letters.means();
  Gradient<T>::put(a, block, fetched, [&](uint32_t group) { return means[group]; });
  __syncthreads();
  work.template apply<true>(false, block);
  if (block.part != 0) return;
  by_teams(a.cut.slice, [&](uint32_t i, int lane, int lanes, bool own) {
    Sums sums;
    for (uint32_t part = lane; part < a.cut.parts; part += lanes) {
      const float* from = letters.channels + i * 3 * a.cut.parts + part;
      sums.add({from[0], from[a.cut.parts], from[2 * a.cut.parts]});
    }
    sums.over(lanes);
    if (lane == 0 && own) leave(a, block, i, sums, means[a.sizes.by_width.quotient(i)]);
  });
}

template <class T, int V, bool nhwc, bool silu>
__global__ void __launch_bounds__(kThreads, kGridBlocks) grid_kernel(const Arguments a) {
  using Work = Work<T, V, nhwc, silu>;
  T* data = shared_at<T>(a.data);
  Block next(a.cut, blockIdx.x, a.first_sample);
  Work(a, next, data).copy();
  for (uint32_t index = blockIdx.x; index < a.units;) {
    const Block block = next;
    index += gridDim.x;
    const bool more = index < a.units;
    if (more) next = Block(a.cut, index, a.first_sample);
    const Fetched fetched = fetch<Fetched>(a, block);
    Channel<T, silu>::put(a, block, fetched);
    __syncthreads();
    const Work work(a, block, data);
    work.template sums<true>();
    __syncthreads();
    const Letters<false> letters(a, block);
    letters.send(work);
    const float2* means = letters.means();
    Gradient<T>::put(a, block, fetched, [&](uint32_t group) { return means[group]; });
    __syncthreads();
    work.template apply<true>(more, next);
  }
}

template <class T, int V, bool nhwc, bool silu>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(const Arguments a) {
  const Block block(a.cut, blockIdx.x, a.first_sample);
  Channel<T, silu>::put(a, block, fetch<Fetched>(a, block));
  __syncthreads();
  const Work<T, V, nhwc, silu> work(a, block, nullptr);
  work.template sums<false>();
  __syncthreads();
  Letters<false>(a, block).send(work);
}

template <class T, int V, bool nhwc, bool silu>
__global__ void __launch_bounds__(kThreads, 2) apply_kernel(const Arguments a) {
  const Block block(a.cut, blockIdx.x, a.first_sample);
  const Fetched fetched = fetch<Fetched>(a, block);
  const float2* means = Letters<false>(a, block).means();
  Channel<T, silu>::put(a, block, fetched);
  Gradient<T>::put(a, block, fetched, [&](uint32_t group) { return means[group]; });
  __syncthreads();
  Work<T, V, nhwc, silu>(a, block, nullptr).template apply<false>(false, block);
}

// Where a slice's parts told each other through global memory: what is left of their channels, a warp for
// each.
__global__ void __launch_bounds__(kThreads) totals_kernel(const Arguments a) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (channel >= a.batch * a.sizes.channels) return;
  const int64_t b = channel / a.sizes.channels;
  const auto c = static_cast<uint32_t>(channel - b * a.sizes.channels);
  const float* from = a.channel_parts + channel * 3 * a.cut.parts;
  const float2* group = a.group_parts + (b * a.sizes.groups + a.sizes.by_width.quotient(c)) * a.cut.parts;
  Sums sums;
  float2 mean = make_float2(0.0f, 0.0f);
  for (uint32_t part = threadIdx.x % 32; part < a.cut.parts; part += 32) {
    sums.add({from[part], from[a.cut.parts + part], from[2 * a.cut.parts + part]});
    mean.x += group[part].x;
    mean.y += group[part].y;
  }
  sums.over(32);
  const float inverse = 1.0f / (static_cast<float>(a.sizes.width) * a.sizes.pixels);
  mean.x = lane_sum(mean.x, 32) * inverse;
  mean.y = lane_sum(mean.y, 32) * inverse;
  Block block(a.cut, 0, b);
  block.slice = c / a.cut.slice;
  if (threadIdx.x % 32 == 0) leave(a, block, c - block.slice * a.cut.slice, sums, mean);
}

// dweight and dbias: sums over the samples, 32 channels a block.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const float* totals, int64_t batch, int64_t channels, float* dweight, float* dbias) {
  float2* shared = shared_at<float2>(0);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  float g = 0.0f, gx = 0.0f;
  if (c < channels) {
    for (int64_t b = threadIdx.x / 32; b < batch; b += kWarps) {
      g += totals[b * channels + c];
      gx += totals[(batch + b) * channels + c];
    }
  }
  shared[threadIdx.x] = make_float2(g, gx);
  __syncthreads();
  if (threadIdx.x >= 32 || c >= channels) return;
  for (int i = 1; i < kWarps; ++i) {
    g += shared[i * 32 + threadIdx.x].x;
    gx += shared[i * 32 + threadIdx.x].y;
  }
  dbias[c] = g;
  dweight[c] = gx;
}

// ---- how the work is cut

template <class T, int V, bool nhwc, bool silu>
struct Plan {
  const Sizes& s;

  // vectors of a channel, or pixels; bytes of h and grad in each
  uint32_t total() const { return nhwc ? s.pixels : s.pixels / V; }
  int64_t bytes(uint32_t slice) const { return 2 * int64_t{slice} * (nhwc ? 1 : V) * sizeof(T); }

  static int64_t lay_out(Arguments& a, bool kept, bool received) {
    Layout layout;
    const uint32_t slice = a.cut.slice, groups = slice / a.sizes.width;
    if (nhwc) lay_columns(a.cut, V);
    a.shares = nhwc ? Shares::nhwc(a.cut, V) : Shares::nchw(a.cut);
    if (kept) a.data = layout.add(a.cut.size * Plan{a.sizes}.bytes(slice));
    a.partial = layout.add(int64_t{a.shares.plane} * sizeof(Sums));
    a.channels = layout.add(int64_t{slice} * sizeof(float4));
    a.weights = layout.add(int64_t{slice} * sizeof(float));
    a.gradients = layout.add(int64_t{slice} * sizeof(float4));
    if (received) a.group_received = layout.add(int64_t{a.cut.parts} * groups * sizeof(float2));
    if (received) a.channel_received = layout.add(int64_t{a.cut.parts} * slice * sizeof(Sums));
    a.total = layout.add(int64_t{slice} * sizeof(Sums));
    a.stat = layout.add(groups * sizeof(float2));
    return layout.bytes;
  }

  static void lay_out_scratch(Arguments& a, const Exec& exec) {
    a.totals = static_cast<float*>(exec.scratch);
    a.group_parts = reinterpret_cast<float2*>(a.totals + 2 * a.batch * a.sizes.channels);
    a.channel_parts = reinterpret_cast<float*>(a.group_parts + a.batch * a.sizes.groups * a.cut.parts);
  }

  // Whether a cluster can hold a slice; then it is done.
  static bool run_clusters(const char* op, Arguments& a, const Exec& exec) {
    const Plan plan{a.sizes};
    const auto kernel = cluster_kernel<T, V, nhwc, silu>;
    for (const Room& room : kRooms) {
      a.cut = cluster_cut<nhwc>(
          a.sizes, a.batch, V, sizeof(T), plan.total(), [&](uint32_t slice) { return plan.bytes(slice); },
          room, widest_cluster(kernel, kThreads, room.shared, exec.device), exec.device);
      if (a.cut.parts == 0) continue;
      const int64_t shared = lay_out(a, true, true), blocks = a.batch * a.cut.slices * a.cut.parts;
      if (shared > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, exec.device)) continue;
      lay_out_scratch(a, exec);
      launch(op, kernel, {blocks, kThreads, shared, static_cast<int>(a.cut.parts), exec.stream}, a);
      return true;
    }
    return false;
  }

  // Whether blocks that run at once can; then it is done.
  static bool run_grid(const char* op, Arguments& a, const Exec& exec) {
    const Plan plan{a.sizes};
    a.cut = grid_cut<nhwc>(
        a.sizes, a.batch, V, sizeof(T), plan.total(), [&](uint32_t slice) { return plan.bytes(slice); },
        exec.device);
    if (a.cut.parts == 0) return false;
    const int64_t units = a.batch * a.cut.slices * a.cut.parts;
    const bool alone = a.cut.parts == 1;  // a block has nobody to meet
    const int64_t shared = lay_out(a, true, alone);
    if (shared > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, exec.device)) return false;
    if (alone) {
      lay_out_scratch(a, exec);
      launch(op, cluster_kernel<T, V, nhwc, silu>, {units, kThreads, shared, 1, exec.stream}, a);
      return true;
    }
    const auto kernel = grid_kernel<T, V, nhwc, silu>;
    const int64_t at_once = blocks_at_once(kernel, kThreads, shared, exec.device);
    if (a.cut.parts > at_once) return false;
    lay_out_scratch(a, exec);
    clear(op, a.group_parts, a.batch * a.sizes.groups * a.cut.parts, exec.stream);
    a.units = static_cast<uint32_t>(units);
    if (!launched(op, kernel, {std::min(units, at_once), kThreads, shared, 1, exec.stream, true}, a))
      return false;
    leave_totals(op, a, exec);
    return true;
  }

  static void leave_totals(const char* op, const Arguments& a, const Exec& exec) {
    launch(op, totals_kernel, {ceil_divide(a.batch * a.sizes.channels, kWarps), kThreads, 0, 1, exec.stream},
           a);
  }

  static void run_two(const char* op, Arguments& a, const Exec& exec) {
    const Plan plan{a.sizes};
    a.cut = chunk_cut<nhwc>(a.sizes, V, sizeof(T), plan.total(),
                            [&](uint32_t slice) { return plan.bytes(slice); });
    const int64_t shared = lay_out(a, false, false);
    check_shared(op, a.cut, shared, exec.device);
    lay_out_scratch(a, exec);
    each_chunk(a.batch, a.sizes.channels * int64_t{a.sizes.pixels} * 2 * sizeof(T), exec.device,
               [&](int64_t first, int64_t samples) {
                 a.first_sample = first;
                 const Launch blocks{samples * a.cut.slices * a.cut.parts, kThreads, shared, 1, exec.stream};
                 launch(op, sums_kernel<T, V, nhwc, silu>, blocks, a);
                 launch(op, apply_kernel<T, V, nhwc, silu>, blocks, a);
               });
    leave_totals(op, a, exec);
  }

  static void run(Arguments a, float* dweight, float* dbias, const Exec& exec) {
    const char* op = "group_norm_silu_backward";
    const int64_t bytes = a.batch * a.sizes.channels * int64_t{a.sizes.pixels} * 2 * sizeof(T);
    if (!(meets_in_clusters(bytes, exec.device) ? run_clusters(op, a, exec) || run_grid(op, a, exec)
                                                : run_grid(op, a, exec) || run_clusters(op, a, exec)))
      run_two(op, a, exec);
    launch(op, finish_kernel,
           {ceil_divide(a.sizes.channels, 32), kThreads, kThreads * sizeof(float2), 1, exec.stream},
           static_cast<const float*>(a.totals), a.batch, static_cast<int64_t>(a.sizes.channels), dweight,
           dbias);
  }
};

}  // namespace

void group_norm_silu_backward(Tensor dh, Tensor dh2, float* dweight, float* dbias, float* dshift, Tensor grad,
                              Tensor grad_s, const float* mean, const float* rstd, const Norm& norm,
                              Exec exec) {
  if (grad.numel() == 0) return;
  check_scratch("group_norm_silu_backward", exec);
  const OnDevice on(exec.device);
  const bool vectors = vectors_fit(norm, {dh.data, dh2.data, grad.data, grad_s.data});
  with_type(norm.h.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    const Sizes sizes(norm, vectors ? V : 1);
    const int64_t batch = norm.h.size[0];
    const Arguments a{norm.h.data, norm.h2.data, grad.data, grad_s.data, dh.data,
                      dh2.data,    norm.weight,  norm.bias, norm.shift,  mean,
                      rstd,        dshift,       batch,     sizes,       {}};

    const auto run = [&](auto silu) {
      constexpr bool on = decltype(silu)::value;
      if (norm.h.channels_last())
        vectors ? Plan<T, V, true, on>::run(a, dweight, dbias, exec)
                : Plan<T, 1, true, on>::run(a, dweight, dbias, exec);
      else
        vectors ? Plan<T, V, false, on>::run(a, dweight, dbias, exec)
                : Plan<T, 1, false, on>::run(a, dweight, dbias, exec);
    };
    norm.silu ? run(std::true_type{}) : run(std::false_type{});
  });
}

}  // namespace sr3fast::cuda
