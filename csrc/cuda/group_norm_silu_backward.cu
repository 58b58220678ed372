// group_norm_silu, backward. With x_hat = (s - mean) rstd, n = weight x_hat + bias, g = grad act'(n) and <.>
// the mean over a group:
//     dh = (weight g - <weight g> - x_hat <weight g x_hat>) rstd (+ grad_s)
//     dweight = sum g x_hat,  dbias = sum g,  dshift = sum dh
// All of these follow from three sums a channel and sample: of g, of g x_hat and of x_hat.
//
// As in the forward, one kernel where a slice of h and g fits into a cluster's shared memory, else two
// over as many samples at a time as stay in L2; then one that sums dweight and dbias over the samples.
#include "norm.cuh"

namespace sr3fast::cuda {
namespace {

constexpr int kInFlight = 4;  // 16-byte loads of a thread, of h and of grad each

struct Sums {
  float g = 0.0f, gx = 0.0f, x = 0.0f;
};

struct Arguments {
  const void *h, *h2, *grad, *grad_s;
  void *dh, *dh2;
  Vector weight, bias, shift;
  const float *mean, *rstd;
  float* dshift;
  float* totals;    // sums of g and of g x_hat: [2, B, C]
  float* partials;  // of the parts, where a slice's blocks do not meet: [B, C, 3, parts]
  bool silu;
  int64_t batch;
  Sizes sizes;
  Cut cut;
  int64_t first_sample;
  // shared memory
  uint32_t data, partial, parameters, received, total, stat;
};

// Of a slice's channels, in shared memory.
struct Parameters {
  float *mean, *rstd, *weight, *bias;  // the mean less the shift

  __device__ __forceinline__ explicit Parameters(const Arguments& a) {
    mean = shared_at<float>(a.parameters);
    rstd = mean + a.cut.slice;
    weight = rstd + a.cut.slice;
    bias = weight + a.cut.slice;
  }
  __device__ __forceinline__ void load(const Arguments& a, const Block& block) const {
    for (uint32_t i = threadIdx.x; i < a.cut.slice; i += kThreads) {
      const uint32_t c = block.slice * a.cut.slice + i;
      const int64_t group = block.b * a.sizes.groups + a.sizes.by_width.quotient(c);
      mean[i] = a.mean[group] - (a.shift ? read(a.shift, block.b * a.sizes.channels + c) : 0.0f);
      rstd[i] = a.rstd[group];
      weight[i] = read(a.weight, c);
      bias[i] = read(a.bias, c);
    }
  }
};

// <weight g> and <weight g x_hat> of a group.
struct Means {
  float g, gx;
};

// One branch a vector, not one an element.
template <class F>
__device__ __forceinline__ void with_silu(bool silu, F&& f) {
  if (silu)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// What an element's gradient needs of its channel.
struct Channel {
  float mean, rstd, weight, bias;

  Channel() = default;
  __device__ __forceinline__ Channel(const Parameters& p, uint32_t i)
      : mean(p.mean[i]), rstd(p.rstd[i]), weight(p.weight[i]), bias(p.bias[i]) {}

  template <class T, bool silu>
  __device__ __forceinline__ void differentiate(float h, float grad, float& x_hat, float& g) const {
    x_hat = (h - mean) * rstd;
    g = grad;
    if (silu) {
      const float n = x_hat * weight + bias, s = sigmoid<T>(n);
      g *= s * (1.0f + n * (1.0f - s));
    }
  }
  // g
  template <class T, bool silu>
  __device__ __forceinline__ float add(float h, float grad, Sums& sums) const {
    float x_hat, g;
    differentiate<T, silu>(h, grad, x_hat, g);
    sums.g += g;
    sums.gx += g * x_hat;
    sums.x += x_hat;
    return g;
  }
  template <class T, bool silu>
  __device__ __forceinline__ float gradient(float h, float grad, const Means& mean_of) const {
    float x_hat, g;
    differentiate<T, silu>(h, grad, x_hat, g);
    return (weight * g - mean_of.g - x_hat * mean_of.gx) * rstd;
  }
};

// The same of a g that was kept.
struct Kept {
  float mean, h, g, offset;

  Kept() = default;
  __device__ __forceinline__ Kept(const Channel& channel, const Means& mean_of)
      : mean(channel.mean),
        h(-channel.rstd * channel.rstd * mean_of.gx),
        g(channel.weight * channel.rstd),
        offset(-channel.rstd * mean_of.g) {}
  __device__ __forceinline__ float gradient(float h_, float g_) const {
    return g * g_ + (h * (h_ - mean) + offset);
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

template <class T, int V>
struct Nhwc {
  const Arguments& a;
  const Block& block;
  uint32_t begin, length;
  Columns<V> columns;
  using Elements = Vec<T, V>;

  __device__ __forceinline__ Nhwc(const Arguments& a_, const Block& block_)
      : a(a_),
        block(block_),
        begin(a_.cut.begin(block_.part)),
        length(a_.cut.length(block_.part)),
        columns(a_.cut.slice) {}

  __device__ __forceinline__ T* kept_h() const { return shared_at<T>(a.data); }
  __device__ __forceinline__ T* kept_g() const { return kept_h() + a.cut.size * a.cut.slice; }
  // of the part's first pixel, in a tensor with all channels
  __device__ __forceinline__ int64_t whole(uint32_t c) const {
    return (block.b * a.sizes.pixels + begin) * a.sizes.channels + c;
  }
  __device__ __forceinline__ int left(uint32_t p) const {
    return static_cast<int>(min(static_cast<uint32_t>(kInFlight), (length - p - 1) / columns.rows + 1));
  }

  // into shared memory: [3, row, channel of the slice]
  template <bool one>
  __device__ __forceinline__ void sums(const Parameters& parameters) const {
    float* partial = shared_at<float>(a.partial);
    for (uint32_t column = columns.column; column < columns.count; column += columns.step) {
      const uint32_t c = block.slice * a.cut.slice + column * V;
      uint32_t stride;
      const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
      const T* h = pair.nhwc(a.sizes, block.b, begin, c, stride);
      const T* grad = static_cast<const T*>(a.grad) + whole(c);
      Channel channel[V];
#pragma unroll
      for (int v = 0; v < V; ++v) channel[v] = Channel(parameters, column * V + v);
      Sums sums[V];
      for (uint32_t p = columns.row; p < length; p += kInFlight * columns.rows) {
        const int n = left(p);
        Elements x[kInFlight] = {}, g[kInFlight] = {};
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (k >= n) continue;
          const uint32_t pixel = p + k * columns.rows;
          x[k] = Elements::load_constant(h + static_cast<int64_t>(pixel) * stride);
          g[k] = Elements::load_constant(grad + static_cast<int64_t>(pixel) * a.sizes.channels);
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (k >= n) continue;
          float known[V];
          with_silu(a.silu, [&](auto silu) {
#pragma unroll
            for (int v = 0; v < V; ++v)
              known[v] = channel[v].template add<T, silu.value>(x[k].at(v), g[k].at(v), sums[v]);
          });
          if (one) {
            const uint32_t at = (p + k * columns.rows) * a.cut.slice + column * V;
            x[k].keep(kept_h() + at);
            Elements::of(known).keep(kept_g() + at);
          }
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const uint32_t at = entry(column * V + v, columns.row);
        partial[at] = sums[v].g;
        partial[plane() + at] = sums[v].gx;
        partial[2 * plane() + at] = sums[v].x;
      }
    }
  }
  // and their number and places for channel i of the slice
  __device__ __forceinline__ uint32_t entries() const { return columns.rows; }
  __device__ __forceinline__ uint32_t plane() const { return Columns<V>::places(a.cut.slice); }
  __device__ __forceinline__ uint32_t entry(uint32_t i, uint32_t row) const { return columns.place(row, i); }

  template <bool one>
  __device__ __forceinline__ void apply(const Parameters& parameters, const Means* means) const {
    for (uint32_t column = columns.column; column < columns.count; column += columns.step) {
      const uint32_t c = block.slice * a.cut.slice + column * V;
      Channel channel[V];
      Means mean[V];
      Kept kept[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        channel[v] = Channel(parameters, column * V + v);
        mean[v] = means[a.sizes.by_width.quotient(column * V + v)];
        kept[v] = Kept(channel[v], mean[v]);
      }
      uint32_t stride;
      const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
      const T* h = pair.nhwc(a.sizes, block.b, begin, c, stride);
      const Pair<T> out{static_cast<const T*>(a.dh), static_cast<const T*>(a.dh2)};
      T* dh = const_cast<T*>(out.nhwc(a.sizes, block.b, begin, c, stride));
      const T* grad = static_cast<const T*>(a.grad) + whole(c);
      for (uint32_t p = columns.row; p < length; p += kInFlight * columns.rows) {
        const int n = left(p);
        Elements x[kInFlight] = {}, g[kInFlight] = {};
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (k >= n) continue;
          const uint32_t pixel = p + k * columns.rows, at = pixel * a.cut.slice + column * V;
          x[k] = one ? Elements::load(kept_h() + at)
                     : Elements::load_constant(h + static_cast<int64_t>(pixel) * stride);
          g[k] = one ? Elements::load(kept_g() + at)
                     : Elements::load_constant(grad + static_cast<int64_t>(pixel) * a.sizes.channels);
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (k >= n) continue;
          const uint32_t pixel = p + k * columns.rows;
          float result[V];
          if constexpr (one) {
#pragma unroll
            for (int v = 0; v < V; ++v) result[v] = kept[v].gradient(x[k].at(v), g[k].at(v));
          } else {
            with_silu(a.silu, [&](auto silu) {
#pragma unroll
              for (int v = 0; v < V; ++v)
                result[v] = channel[v].template gradient<T, silu.value>(x[k].at(v), g[k].at(v), mean[v]);
            });
          }
          finish<T, V>(a, result, whole(c) + static_cast<int64_t>(pixel) * a.sizes.channels)
              .store(dh + static_cast<int64_t>(pixel) * stride);
        }
      }
    }
  }
};

// ---- NCHW: a slice is a group, a part some vectors of each of its channels. A team of lanes takes a piece
// of a channel.

template <class T, int V>
struct Nchw {
  const Arguments& a;
  const Block& block;
  uint32_t begin, length;
  uint32_t lanes, teams, pieces, piece;  // pieces of a channel, vectors of a piece
  using Elements = Vec<T, V>;

  static SR3FAST_HD uint32_t lanes_for(uint32_t length) { return length >= 64 ? 32 : 8; }
  static SR3FAST_HD uint32_t pieces_for(uint32_t length, uint32_t channels) {
    const uint32_t teams = kThreads / lanes_for(length);
    return channels < teams ? teams / channels : 1;
  }

  __device__ __forceinline__ Nchw(const Arguments& a_, const Block& block_)
      : a(a_), block(block_), begin(a_.cut.begin(block_.part)), length(a_.cut.length(block_.part)) {
    lanes = lanes_for(a.cut.size);
    teams = kThreads / lanes;
    pieces = pieces_for(a.cut.size, a.cut.slice);
    piece = (length + pieces - 1) / pieces;
  }

  // f(item, channel of the slice, first vector, end of the vectors) for this thread's share; every thread of
  // a warp makes the same number of calls
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    const uint32_t items = a.cut.slice * pieces, lane = threadIdx.x % lanes;
    for (uint32_t round = 0; round < items; round += teams) {
      const uint32_t item = round + threadIdx.x / lanes;
      const uint32_t i = item / pieces, first = (item - i * pieces) * piece;
      f(item, i, first + lane, item < items ? min(first + piece, length) : 0);
    }
  }
  __device__ __forceinline__ T* kept_h() const { return shared_at<T>(a.data); }
  __device__ __forceinline__ T* kept_g() const { return kept_h() + a.cut.size * a.cut.slice * V; }
  __device__ __forceinline__ int64_t whole(uint32_t c) const {
    return (block.b * a.sizes.channels + c) * a.sizes.pixels + static_cast<int64_t>(begin) * V;
  }
  __device__ __forceinline__ int left(uint32_t p, uint32_t end) const {
    return static_cast<int>(min(static_cast<uint32_t>(kInFlight), (end - p - 1) / lanes + 1));
  }

  // into shared memory: [3, item]
  template <bool one>
  __device__ __forceinline__ void sums(const Parameters& parameters) const {
    float* partial = shared_at<float>(a.partial);
    each([&](uint32_t item, uint32_t i, uint32_t first, uint32_t end) {
      Sums sums;
      if (first < end) {
        const Channel channel(parameters, i);
        const uint32_t c = block.slice * a.cut.slice + i;
        const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
        const T* h = pair.nchw(a.sizes, block.b, c) + static_cast<int64_t>(begin) * V;
        const T* grad = static_cast<const T*>(a.grad) + whole(c);
        for (uint32_t p = first; p < end; p += kInFlight * lanes) {
          const int n = left(p, end);
          Elements x[kInFlight] = {}, g[kInFlight] = {};
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) {
            if (k >= n) continue;
            x[k] = Elements::load_constant(h + static_cast<int64_t>(p + k * lanes) * V);
            g[k] = Elements::load_constant(grad + static_cast<int64_t>(p + k * lanes) * V);
          }
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) {
            if (k >= n) continue;
            float known[V];
            with_silu(a.silu, [&](auto silu) {
#pragma unroll
              for (int v = 0; v < V; ++v)
                known[v] = channel.template add<T, silu.value>(x[k].at(v), g[k].at(v), sums);
            });
            if (one) {
              const uint32_t at = (i * a.cut.size + p + k * lanes) * V;
              x[k].keep(kept_h() + at);
              Elements::of(known).keep(kept_g() + at);
            }
          }
        }
      }
      const float g = lane_sum(sums.g, lanes), gx = lane_sum(sums.gx, lanes), x = lane_sum(sums.x, lanes);
      if (threadIdx.x % lanes == 0 && i < a.cut.slice) {
        partial[item] = g;
        partial[plane() + item] = gx;
        partial[2 * plane() + item] = x;
      }
    });
  }
  __device__ __forceinline__ uint32_t entries() const { return pieces; }
  __device__ __forceinline__ uint32_t plane() const { return a.cut.slice * pieces; }
  __device__ __forceinline__ uint32_t entry(uint32_t i, uint32_t k) const { return i * pieces + k; }

  template <bool one>
  __device__ __forceinline__ void apply(const Parameters& parameters, const Means* means) const {
    each([&](uint32_t, uint32_t i, uint32_t first, uint32_t end) {
      if (first >= end) return;
      const Channel channel(parameters, i);
      const Means mean = means[0];
      const Kept kept(channel, mean);
      const uint32_t c = block.slice * a.cut.slice + i;
      const Pair<T> pair{static_cast<const T*>(a.h), static_cast<const T*>(a.h2)};
      const Pair<T> out{static_cast<const T*>(a.dh), static_cast<const T*>(a.dh2)};
      const T* h = pair.nchw(a.sizes, block.b, c) + static_cast<int64_t>(begin) * V;
      T* dh = const_cast<T*>(out.nchw(a.sizes, block.b, c)) + static_cast<int64_t>(begin) * V;
      const T* grad = static_cast<const T*>(a.grad) + whole(c);
      for (uint32_t p = first; p < end; p += kInFlight * lanes) {
        const int n = left(p, end);
        Elements x[kInFlight] = {}, g[kInFlight] = {};
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (k >= n) continue;
          const uint32_t q = p + k * lanes, at = (i * a.cut.size + q) * V;
          x[k] =
              one ? Elements::load(kept_h() + at) : Elements::load_constant(h + static_cast<int64_t>(q) * V);
          g[k] = one ? Elements::load(kept_g() + at)
                     : Elements::load_constant(grad + static_cast<int64_t>(q) * V);
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (k >= n) continue;
          const int64_t q = static_cast<int64_t>(p + k * lanes) * V;
          float result[V];
          if constexpr (one) {
#pragma unroll
            for (int v = 0; v < V; ++v) result[v] = kept.gradient(x[k].at(v), g[k].at(v));
          } else {
            with_silu(a.silu, [&](auto silu) {
#pragma unroll
              for (int v = 0; v < V; ++v)
                result[v] = channel.template gradient<T, silu.value>(x[k].at(v), g[k].at(v), mean);
            });
          }
          finish<T, V>(a, result, whole(c) + q).store(dh + q);
        }
      }
    });
  }
};

// ---- both layouts

// The block's sums of each channel of the slice: f(channel, lane, lanes, sums), by a team of lanes.
template <class Work, class F>
__device__ __forceinline__ void channel_sums(const Arguments& a, const Work& work, F&& f) {
  const float* partial = shared_at<float>(a.partial);
  const int lanes = team_for(a.cut.slice), teams = kThreads / lanes, lane = threadIdx.x % lanes;
  for (uint32_t round = 0; round < a.cut.slice; round += teams) {
    const uint32_t i =
        min(round + threadIdx.x / lanes, a.cut.slice - 1);  // a team with none repeats the last
    Sums sums;
#pragma unroll 4
    for (uint32_t k = lane; k < work.entries(); k += lanes) {
      const uint32_t at = work.entry(i, k);
      sums.g += partial[at];
      sums.gx += partial[work.plane() + at];
      sums.x += partial[2 * work.plane() + at];
    }
    sums.g = lane_sum(sums.g, lanes);
    sums.gx = lane_sum(sums.gx, lanes);
    sums.x = lane_sum(sums.x, lanes);
    f(i, lane, lanes, sums);
  }
}

// Sums over a slice's parts, source(channel, part); from them the means of the slice's groups, in shared
// memory, and what the slice's first block leaves behind: totals for dweight and dbias, and dshift.
template <class Source>
__device__ __forceinline__ const Means* merge_parts(const Arguments& a, const Block& block,
                                                    const Parameters& parameters, Source&& source) {
  const uint32_t slice = a.cut.slice, width = a.sizes.width, groups = slice / width;
  Sums* total = shared_at<Sums>(a.total);
  Means* means = shared_at<Means>(a.stat);
  const int64_t c0 = block.b * a.sizes.channels + block.slice * slice;
  {
    const int lanes = team_for(slice), teams = kThreads / lanes, lane = threadIdx.x % lanes;
    for (uint32_t round = 0; round < slice; round += teams) {
      const uint32_t own = round + threadIdx.x / lanes, i = min(own, slice - 1);
      Sums sums;
#pragma unroll 4
      for (uint32_t part = lane; part < a.cut.parts; part += lanes) {
        const Sums of = source(i, part);
        sums.g += of.g;
        sums.gx += of.gx;
        sums.x += of.x;
      }
      sums.g = lane_sum(sums.g, lanes);
      sums.gx = lane_sum(sums.gx, lanes);
      sums.x = lane_sum(sums.x, lanes);
      if (lane != 0 || own >= slice) continue;
      total[i] = sums;
      if (block.part == 0) {
        a.totals[c0 + i] = sums.g;
        a.totals[a.batch * a.sizes.channels + c0 + i] = sums.gx;
      }
    }
  }
  __syncthreads();
  {
    const int lanes = team_for(groups), teams = kThreads / lanes, lane = threadIdx.x % lanes;
    const float count = static_cast<float>(width) * a.sizes.pixels;
    for (uint32_t round = 0; round < groups; round += teams) {
      const uint32_t own = round + threadIdx.x / lanes, group = min(own, groups - 1);
      float g = 0.0f, gx = 0.0f;
      for (uint32_t i = group * width + lane; i < (group + 1) * width; i += lanes) {
        g += parameters.weight[i] * total[i].g;
        gx += parameters.weight[i] * total[i].gx;
      }
      g = lane_sum(g, lanes) / count;
      gx = lane_sum(gx, lanes) / count;
      if (lane == 0 && own < groups) means[group] = {g, gx};
    }
  }
  __syncthreads();
  if (a.dshift && block.part == 0) {
    for (uint32_t i = threadIdx.x; i < slice; i += kThreads) {
      const Means mean = means[a.sizes.by_width.quotient(i)];
      a.dshift[c0 + i] =
          (parameters.weight[i] * total[i].g - a.sizes.pixels * mean.g - total[i].x * mean.gx) *
          parameters.rstd[i];
    }
  }
  return means;
}

template <class Work>
__global__ void __launch_bounds__(kThreads, 2) one_kernel(const Arguments a) {
  cluster_arrive_relaxed();  // a peer's shared memory is there once the peer has started
  const Block block(a.cut, a.first_sample);
  const Parameters parameters(a);
  parameters.load(a, block);
  __syncthreads();
  const Work work(a, block);
  work.template sums<true>(parameters);
  __syncthreads();
  cluster_wait();
  Sums* received = shared_at<Sums>(a.received);  // [part, channel]
  channel_sums(a, work, [&](uint32_t i, int lane, int lanes, const Sums& sums) {
    for (uint32_t peer = lane; peer < a.cut.parts; peer += lanes)
      cluster_peer(received, peer)[block.part * a.cut.slice + i] = sums;
  });
  cluster_arrive();
  cluster_wait();
  const Means* means = merge_parts(
      a, block, parameters, [&](uint32_t i, uint32_t part) { return received[part * a.cut.slice + i]; });
  work.template apply<true>(parameters, means);
}

__device__ __forceinline__ float* partials_of(const Arguments& a, const Block& block, uint32_t i) {
  return a.partials + (block.b * a.sizes.channels + block.slice * a.cut.slice + i) * 3 * a.cut.parts;
}

template <class Work>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(const Arguments a) {
  const Block block(a.cut, a.first_sample);
  const Parameters parameters(a);
  parameters.load(a, block);
  __syncthreads();
  const Work work(a, block);
  work.template sums<false>(parameters);
  __syncthreads();
  channel_sums(a, work, [&](uint32_t i, int lane, int, const Sums& sums) {
    if (lane != 0) return;
    float* to = partials_of(a, block, i) + block.part;
    to[0] = sums.g;
    to[a.cut.parts] = sums.gx;
    to[2 * a.cut.parts] = sums.x;
  });
}

template <class Work>
__global__ void __launch_bounds__(kThreads, 2) apply_kernel(const Arguments a) {
  const Block block(a.cut, a.first_sample);
  const Parameters parameters(a);
  parameters.load(a, block);
  __syncthreads();
  const Means* means = merge_parts(a, block, parameters, [&](uint32_t i, uint32_t part) {
    const float* from = partials_of(a, block, i) + part;
    return Sums{from[0], from[a.cut.parts], from[2 * a.cut.parts]};
  });
  Work(a, block).template apply<false>(parameters, means);
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

template <class T, int V, bool nhwc>
struct Plan {
  using Work = std::conditional_t<nhwc, Nhwc<T, V>, Nchw<T, V>>;
  const Sizes& s;

  // vectors of a channel, or pixels; bytes of h and grad in each
  uint32_t total() const { return nhwc ? s.pixels : s.pixels / V; }
  int64_t bytes(uint32_t slice) const { return 2 * int64_t{slice} * (nhwc ? 1 : V) * sizeof(T); }

  static int64_t lay_out(Arguments& a, bool one) {
    Layout layout;
    const uint32_t slice = a.cut.slice;
    const uint32_t places =
        nhwc ? Columns<V>::places(slice) : slice * Nchw<T, V>::pieces_for(a.cut.size, slice);
    if (one) a.data = layout.add(a.cut.size * Plan{a.sizes}.bytes(slice));
    a.partial = layout.add(int64_t{places} * sizeof(Sums));
    a.parameters = layout.add(int64_t{4} * slice * sizeof(float));
    if (one) a.received = layout.add(int64_t{a.cut.parts} * slice * sizeof(Sums));
    a.total = layout.add(int64_t{slice} * sizeof(Sums));
    a.stat = layout.add(slice / a.sizes.width * sizeof(Means));
    return layout.bytes;
  }

  // Whether a cluster can hold a slice; then it is done.
  static bool run_one(const char* op, Arguments& a, const Exec& exec) {
    const Plan plan{a.sizes};
    const auto kernel = one_kernel<Work>;
    for (const Room& room : kRooms) {
      a.cut = cluster_cut<nhwc>(
          a.sizes, a.batch, V, sizeof(T), plan.total(), [&](uint32_t slice) { return plan.bytes(slice); },
          room, widest_cluster(kernel, kThreads, room.shared, exec.device), exec.device);
      if (a.cut.parts == 0) continue;
      const int64_t shared = lay_out(a, true);
      if (shared > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, exec.device)) continue;
      launch(op, kernel,
             {a.batch * a.cut.slices * a.cut.parts, kThreads, shared, static_cast<int>(a.cut.parts),
              exec.stream},
             a);
      return true;
    }
    return false;
  }

  static void run(Arguments a, float* dweight, float* dbias, const Exec& exec) {
    const char* op = "group_norm_silu_backward";
    if (!run_one(op, a, exec)) {
      const Plan plan{a.sizes};
      a.cut = chunk_cut<nhwc>(a.sizes, V, sizeof(T), plan.total(),
                              [&](uint32_t slice) { return plan.bytes(slice); });
      const int64_t shared = lay_out(a, false);
      check_shared(op, a.cut, shared, exec.device);
      each_chunk(a.batch, a.sizes.channels * int64_t{a.sizes.pixels} * 2 * sizeof(T), exec.device,
                 [&](int64_t first, int64_t samples) {
                   a.first_sample = first;
                   const Launch blocks{samples * a.cut.slices * a.cut.parts, kThreads, shared, 1,
                                       exec.stream};
                   launch(op, sums_kernel<Work>, blocks, a);
                   launch(op, apply_kernel<Work>, blocks, a);
                 });
    }
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
  if (dshift && grad_s) throw std::runtime_error("group_norm_silu_backward: dshift does not count grad_s in");
  check_scratch("group_norm_silu_backward", exec);
  const OnDevice on(exec.device);
  const bool vectors = vectors_fit(norm, {dh.data, dh2.data, grad.data, grad_s.data});
  with_type(norm.h.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = 16 / sizeof(T);
    const Sizes sizes(norm, vectors ? V : 1);
    const int64_t batch = norm.h.size[0];
    float* totals = static_cast<float*>(exec.scratch);
    const Arguments a{norm.h.data,
                      norm.h2.data,
                      grad.data,
                      grad_s.data,
                      dh.data,
                      dh2.data,
                      norm.weight,
                      norm.bias,
                      norm.shift,
                      mean,
                      rstd,
                      dshift,
                      totals,
                      totals + 2 * batch * sizes.channels,
                      norm.silu,
                      batch,
                      sizes,
                      {},
                      0,
                      0,
                      0,
                      0,
                      0,
                      0,
                      0};
    if (norm.h.channels_last())
      vectors ? Plan<T, V, true>::run(a, dweight, dbias, exec)
              : Plan<T, 1, true>::run(a, dweight, dbias, exec);
    else
      vectors ? Plan<T, V, false>::run(a, dweight, dbias, exec)
              : Plan<T, 1, false>::run(a, dweight, dbias, exec);
  });
}

}  // namespace sr3fast::cuda
