// group_norm_silu on the CPU, forward and backward, NCHW and channels_last.
//
// Moments are kept per (sample, channel) as (mean, M2), block by block from the first-level cache, and merged
// by Chan's formula: no E[h^2] - E[h]^2, a shift only moves the mean, and a pair costs nothing. NCHW gives a
// thread whole groups; channels_last splits a sample's pixels between the threads.
#include <cmath>
#include <cstdlib>

#include "../common/moments.h"
#include "../common/ops.h"
#include "pages.h"
#include "parallel.h"
#include "simd.h"

namespace sr3fast::cpu::SR3FAST_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // elements of a block: 16 KB of float32
constexpr int kUnroll = 4;
constexpr int64_t kSummed = 256;  // elements that a lane sums up in float32: then double takes over

template <class T>
class Buffer {
 public:
  SR3FAST_INLINE explicit Buffer(int64_t n) : data_(static_cast<T*>(std::calloc(n > 0 ? n : 1, sizeof(T)))) {}
  SR3FAST_INLINE ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  SR3FAST_INLINE T& operator[](int64_t i) const { return data_[i]; }
  SR3FAST_INLINE T* at(int64_t i) const { return data_ + i; }

 private:
  T* data_;
};

// The pair (h, h2) as one tensor: where channel c of sample b lives.
template <class T>
struct Pair {
  const T *first, *second;
  int64_t c1, channels, hw;

  SR3FAST_INLINE Pair(const Norm& norm)
      : first(static_cast<const T*>(norm.h.data)),
        second(static_cast<const T*>(norm.h2.data)),
        c1(norm.h.size[1]),
        channels(norm.h.size[1] + (norm.h2 ? norm.h2.size[1] : 0)),
        hw(norm.h.size[2] * norm.h.size[3]) {}
  SR3FAST_INLINE const T* plane(int64_t b, int64_t c) const {
    return c < c1 ? first + (b * c1 + c) * hw : second + (b * (channels - c1) + c - c1) * hw;
  }
};

// What normalises one channel: n = ((h + shift) - mean) rstd weight + bias = (h - mean_h) scale + bias.
struct Affine {
  float mean, scale, bias;
};

// (h - mean) scale + bias. To a result of 16 bits the mean may go into the bias beforehand; a float's would
// lose what a large mean leaves.
template <class T>
SR3FAST_INLINE float bias_for(const Affine& a) {
  return sizeof(T) == 2 ? a.bias - a.mean * a.scale : a.bias;
}
template <class T, class Mean, class Scale, class Bias>
SR3FAST_INLINE Floats normal(Floats h, Mean mean, Scale scale, Bias bias_for) {
  return sizeof(T) == 2 ? h * scale + bias_for : (h - mean) * scale + bias_for;
}

SR3FAST_INLINE Affine affine(const Norm& norm, int64_t b, int64_t c, int64_t channels, float mean,
                             float rstd) {
  const float shift = norm.shift ? read(norm.shift, b * channels + c) : 0.0f;
  return {mean - shift, rstd * read(norm.weight, c), read(norm.bias, c)};
}

template <bool with_silu, class T>
SR3FAST_INLINE Floats activate(Floats n) {
  return with_silu ? silu<T>(n) : n;
}

// d silu(n)/dn
template <class T>
SR3FAST_INLINE Floats silu_slope(Floats n) {
  const Floats s = sigmoid<T>(n);
  return s + n * s * (1.0f - s);
}

// Moments of a contiguous stretch.
template <class T>
SR3FAST_INLINE Moments moments_of(const T* p, int64_t n) {
  Moments total;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = n - begin < kBlock ? n - begin : kBlock;
    const T* q = p + begin;
    const int64_t whole = count / (kUnroll * kLanes) * (kUnroll * kLanes);
    Floats sums[kUnroll] = {};
    for (int64_t i = 0; i < whole; i += kUnroll * kLanes)
      for (int u = 0; u < kUnroll; ++u) sums[u] += load(q + i + u * kLanes);
    for (int64_t i = whole; i < count; i += kLanes) sums[0] += load_some(q + i, count - i, 0.0f);
    const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(count);
    // the rounding of that sum puts the mean off; the distances from it say by how much
    Floats squares[kUnroll] = {}, rest[kUnroll] = {};
    for (int64_t i = 0; i < whole; i += kUnroll * kLanes)
      for (int u = 0; u < kUnroll; ++u) {
        const Floats d = load(q + i + u * kLanes) - mean;
        rest[u] += d;
        squares[u] += d * d;
      }
    for (int64_t i = whole; i < count; i += kLanes) {
      const Floats d = load_some(q + i, count - i, mean) - mean;
      rest[0] += d;
      squares[0] += d * d;
    }
    const float n_block = static_cast<float>(count);
    const float off = sum((rest[0] + rest[1]) + (rest[2] + rest[3])) / n_block;
    const float m2 = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) - n_block * off * off;
    total.merge({n_block, mean + off, m2 < 0.0f ? 0.0f : m2});
  }
  return total;
}

// s = h + shift + residual, rounded to T; returns nothing else: the statistics read s.
template <class T>
SR3FAST_INLINE void add_plane(T* s, const T* h, const T* residual, float shift, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats v = (load_some(h + i, n - i, 0.0f) + shift) + load_some(residual + i, n - i, 0.0f);
    store_some(s + i, n - i, v);
  }
}

template <bool silu, class T>
SR3FAST_INLINE void normalise_plane(T* out, const T* h, int64_t n, Affine a, bool far) {
  const float bias = bias_for<T>(a);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    put(out + i, kLanes, activate<silu, T>(normal<T>(load(h + i), a.mean, a.scale, bias)), far);
  if (i < n) {
    const Floats last = load_some(h + i, n - i, 0.0f);
    store_some(out + i, n - i, activate<silu, T>(normal<T>(last, a.mean, a.scale, bias)));
  }
}

// ---------------------------------------------------------------------------------------------- forward,
// NCHW

template <bool silu, class T>
void forward_nchw(T* out, T* s, float* mean, float* rstd, const Norm& norm, bool far, Exec exec) {
  const Pair<T> h(norm);
  const int64_t B = norm.h.size[0], C = h.channels, HW = h.hw, D = C / norm.groups;
  parallel_ranges(threads_for(exec.threads, B * C * HW), B * norm.groups, [&](int64_t begin, int64_t end) {
    for (int64_t bg = begin; bg < end; ++bg) {
      const int64_t b = bg / norm.groups, first = bg % norm.groups * D;
      Moments group;
      for (int64_t c = first; c < first + D; ++c) {
        const T* plane = h.plane(b, c);
        const float shift = norm.shift ? read(norm.shift, b * C + c) : 0.0f;
        Moments channel;
        if (s) {
          T* sum_plane = s + (b * C + c) * HW;
          add_plane(sum_plane, plane, static_cast<const T*>(norm.residual.data) + (b * C + c) * HW, shift,
                    HW);
          channel = moments_of(sum_plane, HW);
        } else {
          channel = moments_of(plane, HW);
          channel.mean += shift;
        }
        group.merge(channel);
      }
      mean[bg] = group.mean;
      rstd[bg] = group.rstd(norm.eps);
      for (int64_t c = first; c < first + D; ++c) {
        Affine a = affine(norm, b, c, C, mean[bg], rstd[bg]);
        if (s) a.mean = mean[bg];
        normalise_plane<silu>(out + (b * C + c) * HW, s ? s + (b * C + c) * HW : h.plane(b, c), HW, a, far);
      }
    }
    if (far) end_stream();
  });
}

// -------------------------------------------------------------------------------------- forward,
// channels_last

// One side of the pair in channels_last: pixels of `channels` channels that are channels first .. of the
// whole.
template <class T>
struct Side {
  const T* data;
  int64_t channels, first;
};

template <class T>
struct Sides {
  Side<T> side[2];
  int count;
  SR3FAST_INLINE Sides(const Norm& norm)
      : side{{static_cast<const T*>(norm.h.data), norm.h.size[1], 0},
             {static_cast<const T*>(norm.h2.data), norm.h2.size[1], norm.h.size[1]}},
        count(norm.h2 ? 2 : 1) {}
};

// Merges the moments of `pixels` pixels of channels-last data into mean[c], m2[c] that hold `seen` pixels.
template <class T>
SR3FAST_INLINE void merge_pixels(const T* p, int64_t channels, int64_t pixels, float* mean, float* m2,
                                 int64_t seen) {
  const float n = static_cast<float>(pixels), total = static_cast<float>(seen + pixels);
  constexpr int kWide = 4;  // vectors of channels side by side: independent sums
  for (int64_t c0 = 0; c0 < channels; c0 += kWide * kLanes) {
    const int64_t left = channels - c0;
    const int wide = static_cast<int>(left >= kWide * kLanes ? kWide : (left + kLanes - 1) / kLanes);
    Floats sums[kWide] = {}, squares[kWide] = {};
    if (left >= kWide * kLanes) {
      for (int64_t i = 0; i < pixels; ++i)
        for (int u = 0; u < kWide; ++u) sums[u] += load(p + i * channels + c0 + u * kLanes);
      for (int u = 0; u < kWide; ++u) sums[u] /= n;
      for (int64_t i = 0; i < pixels; ++i)
        for (int u = 0; u < kWide; ++u) {
          const Floats d = load(p + i * channels + c0 + u * kLanes) - sums[u];
          squares[u] += d * d;
        }
    } else {
      for (int u = 0; u < wide; ++u) {
        const int64_t c = c0 + u * kLanes;
        for (int64_t i = 0; i < pixels; ++i) sums[u] += load_some(p + i * channels + c, channels - c, 0.0f);
        sums[u] /= n;
        for (int64_t i = 0; i < pixels; ++i) {
          const Floats d = load_some(p + i * channels + c, channels - c, 0.0f) - sums[u];
          squares[u] += d * d;
        }
      }
    }
    for (int u = 0; u < wide; ++u) {
      const int64_t c = c0 + u * kLanes;
      const Floats old = load_some(mean + c, channels - c, 0.0f);
      const Floats delta = sums[u] - old;
      store_some(mean + c, channels - c, old + delta * (n / total));
      store_some(m2 + c, channels - c,
                 load_some(m2 + c, channels - c, 0.0f) + squares[u] +
                     delta * delta * (static_cast<float>(seen) * n / total));
    }
  }
}

template <bool silu, class T>
SR3FAST_INLINE void normalise_pixels(T* out, int64_t out_channels, const T* h, int64_t channels,
                                     int64_t pixels, const float* mean, const float* scale, const float* bias,
                                     bool far) {
  int64_t c = 0;
  constexpr int kWide = 4;
  for (; c + kWide * kLanes <= channels; c += kWide * kLanes) {
    Floats means[kWide], scales[kWide], biases[kWide];
    for (int u = 0; u < kWide; ++u) {
      means[u] = load(mean + c + u * kLanes);
      scales[u] = load(scale + c + u * kLanes);
      biases[u] = load(bias + c + u * kLanes);
    }
    for (int64_t i = 0; i < pixels; ++i)
      for (int u = 0; u < kWide; ++u) {
        const Floats v = load(h + i * channels + c + u * kLanes);
        put(out + i * out_channels + c + u * kLanes, kLanes,
            activate<silu, T>(normal<T>(v, means[u], scales[u], biases[u])), far);
      }
  }
  for (; c < channels; c += kLanes) {
    const int64_t left = channels - c;
    const Floats m = load_some(mean + c, left, 0.0f), k = load_some(scale + c, left, 0.0f),
                 b = load_some(bias + c, left, 0.0f);
    for (int64_t i = 0; i < pixels; ++i)
      put(out + i * out_channels + c, left,
          activate<silu, T>(normal<T>(load_some(h + i * channels + c, left, 0.0f), m, k, b)), far);
  }
}

// Threads of a sample: all of them, or, where the batch gives each its own, one.
SR3FAST_INLINE int split_of(int threads, int64_t B) { return B % threads == 0 && threads > 2 ? 1 : threads; }

template <bool silu, class T>
void forward_channels_last(T* out, T* s, float* mean, float* rstd, const Norm& norm, bool far, Exec exec) {
  const Sides<T> sides(norm);
  const int64_t B = norm.h.size[0], HW = norm.h.size[2] * norm.h.size[3];
  const int64_t C = norm.h.size[1] + (norm.h2 ? norm.h2.size[1] : 0), D = C / norm.groups;
  const int threads = threads_for(exec.threads, B * C * HW);
  const Buffer<float> partial(int64_t{threads} * 2 * C);  // [thread][mean, M2][C]
  const int64_t pixels_a_block = kBlock / C > 0 ? kBlock / C : 1;
  parallel_team(threads, [&](int rank, int team, auto&& barrier) {
    const int split = split_of(team, B);
    const int64_t begin = HW * (rank % split) / split, end = HW * (rank % split + 1) / split;
    const Buffer<float> coefficients(4 * C);  // mean, scale, bias, shift of each channel
    float *means = coefficients.at(0), *scales = coefficients.at(C), *biases = coefficients.at(2 * C),
          *shifts = coefficients.at(3 * C);
    for (int64_t b = split == 1 ? rank : 0; b < B; b += split == 1 ? team : 1) {
      float *my_mean = partial.at(int64_t{rank} * 2 * C), *my_m2 = my_mean + C;
      std::memset(my_mean, 0, 2 * C * sizeof(float));
      for (int64_t c = 0; norm.shift && c < C; ++c) shifts[c] = read(norm.shift, b * C + c);
      for (int64_t i = begin; i < end; i += pixels_a_block) {
        const int64_t pixels = end - i < pixels_a_block ? end - i : pixels_a_block;
        if (s) {
          const int64_t at = (b * HW + i) * C;
          for (int64_t p = 0; p < pixels; ++p)
            for (int64_t c = 0; c < C; c += kLanes) {
              const int64_t left = C - c, j = at + p * C + c;
              const Floats v = (load_some(static_cast<const T*>(norm.h.data) + j, left, 0.0f) +
                                load_some(shifts + c, left, 0.0f)) +
                               load_some(static_cast<const T*>(norm.residual.data) + j, left, 0.0f);
              store_some(s + j, left, v);
            }
          merge_pixels(s + at, C, pixels, my_mean, my_m2, i - begin);
        } else {
          for (int k = 0; k < sides.count; ++k) {
            const Side<T>& side = sides.side[k];
            merge_pixels(side.data + (b * HW + i) * side.channels, side.channels, pixels,
                         my_mean + side.first, my_m2 + side.first, i - begin);
          }
        }
      }
      if (split > 1) barrier();
      for (int64_t g = 0; g < norm.groups; ++g) {
        Moments group;
        for (int64_t c = g * D; c < (g + 1) * D; ++c) {
          Moments channel;
          for (int r = 0; r < split; ++r) {
            const float* theirs = partial.at(int64_t{split == 1 ? rank : r} * 2 * C);
            const int64_t share = HW * (r + 1) / split - HW * r / split;
            channel.merge({static_cast<float>(share), theirs[c], theirs[C + c]});
          }
          if (norm.shift && !s) channel.mean += read(norm.shift, b * C + c);
          group.merge(channel);
        }
        const float group_rstd = group.rstd(norm.eps);
        if (rank % split == 0) {
          mean[b * norm.groups + g] = group.mean;
          rstd[b * norm.groups + g] = group_rstd;
        }
        for (int64_t c = g * D; c < (g + 1) * D; ++c) {
          Affine a = affine(norm, b, c, C, group.mean, group_rstd);
          if (s) a.mean = group.mean;
          means[c] = a.mean;
          scales[c] = a.scale;
          biases[c] = bias_for<T>(a);
        }
      }
      // backwards: the last blocks are still in the cache
      for (int64_t i = begin + (end - begin - 1) / pixels_a_block * pixels_a_block; i >= begin && end > begin;
           i -= pixels_a_block) {
        const int64_t pixels = end - i < pixels_a_block ? end - i : pixels_a_block;
        for (int k = 0; k < sides.count; ++k) {
          const Side<T>& side = sides.side[k];
          const T* data = s ? s : side.data;
          normalise_pixels<silu>(out + (b * HW + i) * C + side.first, C, data + (b * HW + i) * side.channels,
                                 side.channels, pixels, means + side.first, scales + side.first,
                                 biases + side.first, far);
        }
      }
      if (split > 1) barrier();  // the partials are read until here
    }
    if (far) end_stream();
  });
}

// ----------------------------------------------------------------------------------------------------
// backward

// With d = h - mean, x_hat = d rstd, n = w x_hat + b and g = grad silu'(n), over a group of N elements
//   dh = (w g - <w g> - x_hat <w g x_hat>) rstd (+ grad_s)
// and per channel dbias = sum g, dweight = sum g x_hat, dshift = sum dh. With Affine's scale, w rstd,
//   dh = scale g + slope d + offset
struct Gradient {
  float slope, offset;

  SR3FAST_INLINE Gradient(float rstd, double mean_wg, double mean_wgx)
      : slope(static_cast<float>(-mean_wgx * rstd * rstd)), offset(static_cast<float>(-mean_wg * rstd)) {}
};

template <bool silu, class T>
SR3FAST_INLINE Floats g_of(Floats grad, Floats d, Floats scale, Floats bias) {
  return silu ? grad * silu_slope<T>(d * scale + bias) : grad;
}

template <bool silu, class T>
void backward_nchw(T* dh, T* dh2, float* dweight_of, float* dbias_of, float* dshift, const T* grad,
                   const T* grad_s, const float* mean, const float* rstd, const Norm& norm, bool far,
                   Exec exec) {
  const Pair<T> h(norm);
  const int64_t B = norm.h.size[0], C = h.channels, HW = h.hw, D = C / norm.groups;
  constexpr int64_t kStretch = kSummed * kLanes;
  parallel_ranges(threads_for(exec.threads, B * C * HW), B * norm.groups, [&](int64_t begin, int64_t end) {
    for (int64_t bg = begin; bg < end; ++bg) {
      const int64_t b = bg / norm.groups, first = bg % norm.groups * D;
      double wg = 0.0, wgx = 0.0;
      for (int64_t c = first; c < first + D; ++c) {
        const Affine a = affine(norm, b, c, C, mean[bg], rstd[bg]);
        const float weight = read(norm.weight, c);
        const T *plane = h.plane(b, c), *g_plane = grad + (b * C + c) * HW;
        double sum_g = 0.0, sum_gx = 0.0;
        for (int64_t block = 0; block < HW; block += kStretch) {
          const int64_t stop = HW - block < kStretch ? HW : block + kStretch;
          Floats gs = {}, gds = {};
          for (int64_t i = block; i < stop; i += kLanes) {
            const Floats d = load_some(plane + i, stop - i, a.mean) - a.mean;
            const Floats g =
                g_of<silu, T>(load_some(g_plane + i, stop - i, 0.0f), d, all(a.scale), all(a.bias));
            gs += g;
            gds += g * d;
          }
          sum_g += sum(gs);
          sum_gx += sum(gds) * static_cast<double>(rstd[bg]);
        }
        dbias_of[b * C + c] = static_cast<float>(sum_g);
        dweight_of[b * C + c] = static_cast<float>(sum_gx);
        wg += weight * sum_g;
        wgx += weight * sum_gx;
      }
      const double n = static_cast<double>(D * HW);
      const Gradient to(rstd[bg], wg / n, wgx / n);
      for (int64_t c = first; c < first + D; ++c) {
        const Affine a = affine(norm, b, c, C, mean[bg], rstd[bg]);
        const T *plane = h.plane(b, c), *g_plane = grad + (b * C + c) * HW;
        T* d_plane = c < h.c1 ? dh + (b * h.c1 + c) * HW : dh2 + (b * (C - h.c1) + c - h.c1) * HW;
        double total = 0.0;
        for (int64_t block = 0; block < HW; block += kStretch) {
          const int64_t stop = HW - block < kStretch ? HW : block + kStretch;
          Floats sums = {};
          for (int64_t i = block; i < stop; i += kLanes) {
            const Floats d = load_some(plane + i, stop - i, a.mean) - a.mean;
            const Floats g =
                g_of<silu, T>(load_some(g_plane + i, stop - i, 0.0f), d, all(a.scale), all(a.bias));
            Floats d_h = g * a.scale + (d * to.slope + to.offset);
            if (grad_s) d_h += load_some(grad_s + (b * C + c) * HW + i, stop - i, 0.0f);
            put(d_plane + i, stop - i, d_h, far);
            if (stop - i < kLanes)
              for (int64_t k = stop - i; k < kLanes; ++k) d_h[k] = 0.0f;
            sums += d_h;
          }
          total += sum(sums);
        }
        if (dshift) dshift[b * C + c] = static_cast<float>(total);
      }
    }
    if (far) end_stream();
  });
}

// Numbers of N vectors of channels, the last of them cut short where N is 1.
template <int N>
struct Channels {
  Floats v[N];

  SR3FAST_INLINE Channels(const float* p, int64_t left) {
    for (int u = 0; u < N; ++u) v[u] = load_some(p + u * kLanes, left, 0.0f);
  }
  SR3FAST_INLINE void put(float* p, int64_t left) const {
    for (int u = 0; u < N; ++u) store_some(p + u * kLanes, left, v[u]);
  }
};

template <bool silu, class T>
void backward_channels_last(T* dh, T* dh2, float* dweight_of, float* dbias_of, float* dshift, const T* grad,
                            const T* grad_s, const float* mean, const float* rstd, const Norm& norm, bool far,
                            Exec exec) {
  const Sides<T> sides(norm);
  const int64_t B = norm.h.size[0], HW = norm.h.size[2] * norm.h.size[3];
  const int64_t C = norm.h.size[1] + (norm.h2 ? norm.h2.size[1] : 0), D = C / norm.groups;
  const int threads = threads_for(exec.threads, B * C * HW);
  constexpr int kWide = 2;                                 // vectors of channels side by side
  const Buffer<double> partial(int64_t{threads} * 3 * C);  // [thread][sum g, sum g d, sum dh][C]
  const int64_t pixels_a_block = kBlock / C > 0 ? kBlock / C : 1;
  parallel_team(threads, [&](int rank, int team, auto&& barrier) {
    const int split = split_of(team, B);
    const int64_t begin = HW * (rank % split) / split, end = HW * (rank % split + 1) / split;
    const Buffer<float> coefficients(5 * C);
    float *means = coefficients.at(0), *scales = coefficients.at(C), *biases = coefficients.at(2 * C),
          *slopes = coefficients.at(3 * C), *offsets = coefficients.at(4 * C);
    const Buffer<float> recent(2 * C);
    const auto theirs = [&](int r) { return partial.at(int64_t{split == 1 ? rank : r} * 3 * C); };
    for (int64_t b = split == 1 ? rank : 0; b < B; b += split == 1 ? team : 1) {
      double* mine = partial.at(int64_t{rank} * 3 * C);
      std::memset(mine, 0, 3 * C * sizeof(double));
      for (int64_t c = 0; c < C; ++c) {
        const int64_t bg = b * norm.groups + c / D;
        const Affine a = affine(norm, b, c, C, mean[bg], rstd[bg]);
        means[c] = a.mean;
        scales[c] = a.scale;
        biases[c] = a.bias;
      }
      // f(size, side, c, i, pixels): `size` vectors of channels from c on, of the pixels from i on; both
      // passes walk the same way. It adds to `recent`, which go to `sums` before they are too many for a
      // float32.
      const auto walk = [&](bool backwards, int64_t kinds, double* sums, auto&& f) {
        const int64_t blocks = (end - begin + pixels_a_block - 1) / pixels_a_block;
        int64_t summed = 0;
        for (int64_t j = 0; j < blocks; ++j) {
          const int64_t i = begin + (backwards ? blocks - 1 - j : j) * pixels_a_block;
          const int64_t pixels = end - i < pixels_a_block ? end - i : pixels_a_block;
          for (int k = 0; k < sides.count; ++k) {
            int64_t c = 0;
            for (; c + kWide * kLanes <= sides.side[k].channels; c += kWide * kLanes)
              f(std::integral_constant<int, kWide>(), k, c, i, pixels);
            for (; c < sides.side[k].channels; c += kLanes)
              f(std::integral_constant<int, 1>(), k, c, i, pixels);
          }
          summed += pixels;
          if (summed < kSummed && j < blocks - 1) continue;
          for (int64_t c = 0; c < kinds * C; ++c) {
            sums[c] += recent[c];
            recent[c] = 0.0f;
          }
          summed = 0;
        }
      };
      walk(false, 2, mine, [&](auto size, int k, int64_t c, int64_t i, int64_t pixels) SR3FAST_INLINE_LAMBDA {
        constexpr int N = size;
        const Side<T>& side = sides.side[k];
        const int64_t left = N > 1 ? N * kLanes : side.channels - c, all_c = side.first + c;
        const Channels<N> mean(means + all_c, left), scale(scales + all_c, left), bias(biases + all_c, left);
        Channels<N> gs(&recent[all_c], left), gds(&recent[C + all_c], left);
        for (int64_t p = b * HW + i; p < b * HW + i + pixels; ++p)
          for (int u = 0; u < N; ++u) {
            const int64_t at = c + u * kLanes, all_at = all_c + u * kLanes;
            const Floats d = load_some(side.data + p * side.channels + at, left, 0.0f) - mean.v[u];
            const Floats g =
                g_of<silu, T>(load_some(grad + p * C + all_at, left, 0.0f), d, scale.v[u], bias.v[u]);
            gs.v[u] += g;
            gds.v[u] += g * d;
          }
        gs.put(&recent[all_c], left);
        gds.put(&recent[C + all_c], left);
      });
      if (split > 1) barrier();
      for (int64_t g = 0; g < norm.groups; ++g) {
        const float group_rstd = rstd[b * norm.groups + g];
        double wg = 0.0, wgx = 0.0;
        for (int64_t c = g * D; c < (g + 1) * D; ++c) {
          double sum_g = 0.0, sum_gx = 0.0;
          for (int r = 0; r < split; ++r) {
            sum_g += theirs(r)[c];
            sum_gx += theirs(r)[C + c] * group_rstd;
          }
          if (rank % split == 0) {
            dbias_of[b * C + c] = static_cast<float>(sum_g);
            dweight_of[b * C + c] = static_cast<float>(sum_gx);
          }
          wg += read(norm.weight, c) * sum_g;
          wgx += read(norm.weight, c) * sum_gx;
        }
        const double n = static_cast<double>(D * HW);
        const Gradient to(group_rstd, wg / n, wgx / n);
        for (int64_t c = g * D; c < (g + 1) * D; ++c) {
          slopes[c] = to.slope;
          offsets[c] = to.offset;
        }
      }
      walk(true, 1, mine + 2 * C,
           [&](auto size, int k, int64_t c, int64_t i, int64_t pixels) SR3FAST_INLINE_LAMBDA {
             constexpr int N = size;
             const Side<T>& side = sides.side[k];
             const int64_t left = N > 1 ? N * kLanes : side.channels - c, all_c = side.first + c;
             const Channels<N> mean(means + all_c, left), scale(scales + all_c, left),
                 bias(biases + all_c, left), slope(slopes + all_c, left), offset(offsets + all_c, left);
             T* d_side = k == 0 ? dh : dh2;
             Channels<N> sums(&recent[all_c], left);
             for (int64_t p = b * HW + i; p < b * HW + i + pixels; ++p)
               for (int u = 0; u < N; ++u) {
                 const int64_t at = p * side.channels + c + u * kLanes, all_at = p * C + all_c + u * kLanes;
                 const Floats d = load_some(side.data + at, left, 0.0f) - mean.v[u];
                 const Floats g =
                     g_of<silu, T>(load_some(grad + all_at, left, 0.0f), d, scale.v[u], bias.v[u]);
                 Floats d_h = g * scale.v[u] + (d * slope.v[u] + offset.v[u]);
                 if (grad_s) d_h += load_some(grad_s + all_at, left, 0.0f);
                 put(d_side + at, left, d_h, far);
                 sums.v[u] += d_h;
               }
             sums.put(&recent[all_c], left);
           });
      if (split > 1) barrier();
      if (dshift && rank % split == 0)
        for (int64_t c = 0; c < C; ++c) {
          double total = 0.0;
          for (int r = 0; r < split; ++r) total += theirs(r)[2 * C + c];
          dshift[b * C + c] = static_cast<float>(total);
        }
      if (split > 1) barrier();
    }
    if (far) end_stream();
  });
}

}  // namespace

void group_norm_silu(Tensor out, Tensor s, float* mean, float* rstd, const Norm& norm, Exec exec) {
  ask_for_huge_pages(out);
  ask_for_huge_pages(s);
  with_type(norm.h, [&](auto* data) {
    using T = std::remove_reference_t<decltype(*data)>;
    const auto run = norm.h.channels_last() || out.channels_last()
                         ? (norm.silu ? forward_channels_last<true, T> : forward_channels_last<false, T>)
                         : (norm.silu ? forward_nchw<true, T> : forward_nchw<false, T>);
    run(static_cast<T*>(out.data), static_cast<T*>(s.data), mean, rstd, norm, is_large(out), exec);
  });
}

void group_norm_silu_backward(Tensor dh, Tensor dh2, float* dweight, float* dbias, float* dshift, Tensor grad,
                              Tensor grad_s, const float* mean, const float* rstd, const Norm& norm,
                              Exec exec) {
  ask_for_huge_pages(dh);
  ask_for_huge_pages(dh2);
  const int64_t B = grad.size[0], C = grad.size[1];
  const Buffer<float> per_sample(2 * B * C);
  float *dweight_of = per_sample.at(0), *dbias_of = per_sample.at(B * C);
  with_type(norm.h, [&](auto* data) {
    using T = std::remove_reference_t<decltype(*data)>;
    const auto run = norm.h.channels_last() || grad.channels_last()
                         ? (norm.silu ? backward_channels_last<true, T> : backward_channels_last<false, T>)
                         : (norm.silu ? backward_nchw<true, T> : backward_nchw<false, T>);
    run(static_cast<T*>(dh.data), static_cast<T*>(dh2.data), dweight_of, dbias_of, dshift,
        static_cast<const T*>(grad.data), static_cast<const T*>(grad_s.data), mean, rstd, norm, is_large(dh),
        exec);
  });
  for (int64_t c = 0; c < C; ++c) {
    double weight = 0.0, bias = 0.0;
    for (int64_t b = 0; b < B; ++b) {
      weight += dweight_of[b * C + c];
      bias += dbias_of[b * C + c];
    }
    dweight[c] = static_cast<float>(weight);
    dbias[c] = static_cast<float>(bias);
  }
}

}  // namespace sr3fast::cpu::SR3FAST_ISA
