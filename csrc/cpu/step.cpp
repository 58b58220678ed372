// noise, refine, solver_step and q_sample on the CPU.
//
// A tile is a stretch of one image row: all its noise is drawn into a small buffer, then one pass updates it.
// In NCHW a tile is one channel's pixels, in channels_last the pixels with their channels between them.
#include <type_traits>

#include "../common/noise.h"
#include "../common/ops.h"
#include "parallel.h"
#include "simd.h"

namespace sr3fast::cpu::SR3FAST_ISA {
namespace {

constexpr int kQuad = 4 * kLanes;  // pixels drawn side by side: a counter a lane
constexpr int kChannels = 16;      // channels of a tile, channels_last
constexpr int kTile = 1024;        // elements of a tile

// Place of a tile: sample b, channels c .. c + channels, rows h .. h + rows, columns w .. w + pixels. With
// more than one row it spans the image's width and has one channel.
struct Tile {
  int64_t b, c, channels, h, rows, w, pixels;

  SR3FAST_INLINE int64_t numel() const { return channels * rows * pixels; }
};

// Stretches that a tile will read or write after its noise is drawn: asked for bit by bit meanwhile, so that
// memory and arithmetic overlap.
struct Ahead {
  const float* stretch[3] = {nullptr, nullptr, nullptr};

  SR3FAST_INLINE void touch(int64_t i, int64_t n) const {
    for (const float* p : stretch)
      for (int64_t k = 0; p && k < n; k += 16) __builtin_prefetch(p + i + k);
  }
};

// The normals of N x kLanes quads from `quad` on, in the order of the pixels.
template <int N>
SR3FAST_INLINE void draw_quads(float* z, uint64_t seed, uint32_t domain, uint32_t step, uint32_t c,
                               uint32_t h, uint32_t quad) {
  Group<Words32, N> w4;
  for (int i = 0; i < N; ++i) w4.v[i] = quad_of_lane() + (quad + static_cast<uint32_t>(i * kLanes));
  const auto a = philox<Lanes<N>>(seed, w4, h, step, domain * 65536u + c);
  Group<Words32, 2 * N> radius, angle;
  for (int i = 0; i < N; ++i) {
    radius.v[i] = a.a0.v[i], angle.v[i] = a.a1.v[i];
    radius.v[N + i] = a.a2.v[i], angle.v[N + i] = a.a3.v[i];
  }
  Group<Floats, 2 * N> first, second;
  box_muller<Lanes<2 * N>>(radius, angle, first, second);
  for (int i = 0; i < N; ++i)
    store_interleaved(z + i * kQuad, first.v[i], second.v[i], first.v[N + i], second.v[N + i]);
}

// z of pixels w .. w + pixels of one channel, stride apart.
SR3FAST_INLINE void draw(float* z, int64_t stride, uint64_t seed, uint32_t domain, uint32_t step, int64_t c,
                         int64_t h, int64_t w, int64_t pixels, const Ahead& ahead, int64_t ahead_at) {
  for (int64_t quad = w / 4; quad * 4 < w + pixels;) {
    const int64_t first = quad * 4 - w;  // may be negative: the quad starts left of the tile
    const int vectors = first + kQuad < pixels ? 2 : 1;
    const int64_t past = first + vectors * kQuad;
    ahead.touch(ahead_at + (first < 0 ? 0 : first) * stride,
                (past < pixels ? past : pixels) - (first < 0 ? 0 : first));
    const bool in_place = stride == 1 && first >= 0 && past <= pixels;
    float buffer[2 * kQuad];
    float* drawn = in_place ? z + first : buffer;
    const auto c32 = static_cast<uint32_t>(c), h32 = static_cast<uint32_t>(h),
               quad32 = static_cast<uint32_t>(quad);
    if (vectors == 2)
      draw_quads<2>(drawn, seed, domain, step, c32, h32, quad32);
    else
      draw_quads<1>(drawn, seed, domain, step, c32, h32, quad32);
    if (!in_place)
      for (int64_t i = first < 0 ? -first : 0; first + i < (past < pixels ? past : pixels); ++i)
        z[(first + i) * stride] = drawn[i];
    quad += vectors * kLanes;
  }
}

SR3FAST_INLINE void draw_tile(float* z, const Tile& t, uint64_t seed, uint32_t domain, uint32_t step,
                              Origin origin, const Ahead& ahead = {}) {
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t i = 0; i < t.channels; ++i)
      draw(z + r * t.pixels + i, t.channels, seed, domain, step, t.c + i, t.h + r + origin.h, t.w + origin.w,
           t.pixels, ahead, r * t.pixels);
}

// The tiles of an image in y's layout, shared between threads; f(tile, offset of its first element in y).
// A tile's elements are contiguous in y unless it is channels_last with more than kChannels channels, when
// its channels are: then f runs once a pixel.
template <class F>
SR3FAST_INLINE void each_tile(const Tensor& y, int threads, F&& f) {
  const int64_t B = y.size[0], C = y.size[1], H = y.size[2], W = y.size[3];
  threads = threads_for(threads, y.numel());
  if (!y.channels_last()) {
    const int64_t rows_a_tile = W <= kTile ? kTile / W : 1;
    const int64_t bands = (H + rows_a_tile - 1) / rows_a_tile;  // of a plane
    parallel_ranges(threads, B * C * bands, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t plane = i / bands, h = i % bands * rows_a_tile;
        const int64_t rows = H - h < rows_a_tile ? H - h : rows_a_tile;
        for (int64_t w = 0; w < W; w += kTile)
          f(Tile{plane / C, plane % C, 1, h, rows, w, W - w < kTile ? W - w : kTile},
            (plane * H + h) * W + w);
      }
    });
    return;
  }
  const int64_t pixels_a_tile = C <= kChannels ? (kTile / C) / kQuad * kQuad : kQuad;
  parallel_ranges(threads, B * H, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t w = 0; w < W; w += pixels_a_tile)
        for (int64_t c = 0; c < C; c += kChannels) {
          const int64_t channels = C - c < kChannels ? C - c : kChannels;
          const int64_t pixels = W - w < pixels_a_tile ? W - w : pixels_a_tile;
          f(Tile{i / H, c, channels, i % H, 1, w, pixels}, (i * W + w) * C + c);
        }
  });
}

// Runs of a tile that are contiguous in y: f(offset in y, offset in the tile's buffers, length).
template <class F>
SR3FAST_INLINE void each_run(const Tensor& y, const Tile& t, int64_t offset, F&& f) {
  if (t.channels == 1 ? !y.channels_last() : t.channels == y.size[1]) {
    f(offset, 0, t.numel());
    return;
  }
  for (int64_t i = 0; i < t.pixels; ++i) f(offset + i * y.size[1], i * t.channels, t.channels);
}

// A tile of a tensor with any dtype and strides as floats in the tile's order. Returns `buffer`, or the
// tensor's own memory where it is that already.
SR3FAST_INLINE bool in_tile_order(const Tensor& t, const Tile& tile) {
  const bool pixels = tile.channels > 1 ? t.stride[3] == tile.channels : t.stride[3] == 1;
  return t.dtype == Dtype::f32 && (pixels || tile.pixels == 1) && (tile.channels == 1 || t.stride[1] == 1) &&
         (tile.rows == 1 || t.stride[2] == tile.pixels);
}

// The update of n elements; every element is read before it is written, so out may be y and m may be m1 or
// m2.
template <class T>
SR3FAST_INLINE void update_run(const Row& row, int64_t n, const float* y, const T* f, const float* m1,
                               const float* m2, const float* z, float* out, float* m, float* copy) {
  const Floats a = all(row.a), b = all(row.b), recip = all(row.recip), ratio = all(row.ratio);
  const Floats top = all(row.clip), bottom = all(-row.clip);
  const bool estimates = m || row.c0 != 0.0f;
  int64_t i = 0;
  if (!estimates && row.c1 == 0.0f && row.c2 == 0.0f && row.s != 0.0f &&
      !copy)  // refine: no branch in the loop
    for (; i + kLanes <= n; i += kLanes)
      store(out + i, a * load(y + i) + b * load(f + i) + row.s * load(z + i));
  for (; i < n; i += kLanes) {
    const int64_t left = n - i;
    const auto term = [&](float coefficient, const float* p, Floats sum) {
      return coefficient != 0.0f ? sum + coefficient * load_some(p + i, left, 0.0f) : sum;
    };
    const Floats y_i = load_some(y + i, left, 0.0f), f_i = load_some(f + i, left, 0.0f);
    Floats next = a * y_i + b * f_i;
    if (estimates) {
      Floats m_i = recip * y_i - ratio * f_i;
      m_i = m_i < bottom ? bottom : (m_i > top ? top : m_i);
      if (row.c0 != 0.0f) next = next + row.c0 * m_i;
      next = term(row.c2, m2, term(row.c1, m1, next));
      if (m) store_some(m + i, left, m_i);
    } else {
      next = term(row.c2, m2, term(row.c1, m1, next));
    }
    next = term(row.s, z, next);
    store_some(out + i, left, next);
    if (copy) store_some(copy + i, left, next);
  }
}

SR3FAST_INLINE const float* gather(const Tensor& t, const Tile& tile, float* buffer) {
  const int64_t start = t.offset(tile.b, tile.c, tile.h, tile.w);
  if (in_tile_order(t, tile)) return static_cast<const float*>(t.data) + start;
  with_type(t, [&](auto* data) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const auto* p = data + start + r * t.stride[2];
      float* q = buffer + r * tile.pixels;
      if (tile.channels == 1 && t.stride[3] == 1) {
        for (int64_t w = 0; w < tile.pixels; ++w) q[w] = to_float(p[w]);
      } else {
        for (int64_t w = 0; w < tile.pixels; ++w)
          for (int64_t c = 0; c < tile.channels; ++c)
            q[w * tile.channels + c] = to_float(p[w * t.stride[3] + c * t.stride[1]]);
      }
    }
  });
  return buffer;
}

SR3FAST_INLINE void scatter(const float* buffer, const Tensor& t, const Tile& tile) {
  const int64_t start = t.offset(tile.b, tile.c, tile.h, tile.w);
  with_type(t, [&](auto* data) {
    using T = std::remove_reference_t<decltype(*data)>;
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* p = data + start + r * t.stride[2];
      const float* q = buffer + r * tile.pixels;
      if (tile.channels == 1 && t.stride[3] == 1) {
        for (int64_t w = 0; w < tile.pixels; ++w) p[w] = from_float<T>(q[w]);
      } else {
        for (int64_t w = 0; w < tile.pixels; ++w)
          for (int64_t c = 0; c < tile.channels; ++c)
            p[w * t.stride[3] + c * t.stride[1]] = from_float<T>(q[w * tile.channels + c]);
      }
    }
  });
}

}  // namespace

void noise(Tensor out, Seeds seed, Scalar<int64_t> step, uint32_t domain, Origin origin, Exec exec) {
  const auto t = static_cast<uint32_t>(step.read());
  each_tile(out, exec.threads, [&](const Tile& tile, int64_t) {
    float z[kTile];
    draw_tile(z, tile, seed.of(tile.b), domain, t, origin);
    scatter(z, out, tile);
  });
}

void solver_step(Tensor out, Tensor m, Tensor into, Tensor y, Tensor eps_hat, Scalar<Row> row_or_address,
                 Seeds seed, Scalar<int64_t> step, Tensor m1, Tensor m2, Tensor z, Origin origin, Exec exec) {
  const Row row = row_or_address.read();
  const auto t = static_cast<uint32_t>(step.read());
  const auto* y_data = static_cast<const float*>(y.data);
  const auto* m1_data = static_cast<const float*>(m1.data);
  const auto* m2_data = static_cast<const float*>(m2.data);
  const auto* z_data = static_cast<const float*>(z.data);
  auto* out_data = static_cast<float*>(out.data);
  auto* m_data = static_cast<float*>(m.data);
  each_tile(y, exec.threads, [&](const Tile& tile, int64_t tile_offset) {
    float z_buffer[kTile], f_buffer[kTile], copy[kTile];
    const bool draws = row.s != 0.0f && !z_data;
    if (draws) {
      Ahead ahead{{y_data + tile_offset, nullptr, out_data == y_data ? nullptr : out_data + tile_offset}};
      if (in_tile_order(eps_hat, tile))
        ahead.stretch[1] =
            static_cast<const float*>(eps_hat.data) + eps_hat.offset(tile.b, tile.c, tile.h, tile.w);
      draw_tile(z_buffer, tile, seed.of(tile.b), kRefine, t, origin, ahead);
    }
    const float* f_tile = gather(eps_hat, tile, f_buffer);
    each_run(y, tile, tile_offset, [&](int64_t at, int64_t start, int64_t n) {
      update_run(row, n, y_data + at, f_tile + start, m1_data + at, m2_data + at,
                 draws ? z_buffer + start : z_data + at, out_data + at, m_data ? m_data + at : nullptr,
                 into ? copy + start : nullptr);
    });
    if (into) scatter(copy, into, tile);
  });
}

void refine(Tensor out, Tensor into, Tensor y, Tensor eps_hat, Scalar<double> alpha, Scalar<double> gamma,
            Seeds seed, Scalar<int64_t> step, Tensor z, Origin origin, Exec exec) {
  Scalar<Row> row;
  row.value = refine_row(alpha.read(), gamma.read(), step.read());
  solver_step(out, Tensor{}, into, y, eps_hat, row, seed, step, Tensor{}, Tensor{}, z, origin, exec);
}

void q_sample(Tensor out, Tensor eps_out, Tensor into, Tensor y_0, Scalar<double> gamma,
              bool gamma_per_sample, Seeds seed, Scalar<int64_t> step, Tensor eps, Origin origin, Exec exec) {
  const auto t = static_cast<uint32_t>(step.read());
  each_tile(y_0, exec.threads, [&](const Tile& tile, int64_t) {
    float z_buffer[kTile], y_buffer[kTile], y_t[kTile];
    const Mix mix = q_sample_mix(gamma_per_sample ? gamma.device[tile.b] : gamma.read());
    const float* z = z_buffer;
    if (eps) {
      z = gather(eps, tile, z_buffer);
    } else {
      Ahead ahead;
      const auto want = [&](int i, const Tensor& x) {
        if (x && in_tile_order(x, tile))
          ahead.stretch[i] = static_cast<const float*>(x.data) + x.offset(tile.b, tile.c, tile.h, tile.w);
      };
      want(0, y_0);
      want(1, out);
      want(2, eps_out);
      draw_tile(z_buffer, tile, seed.of(tile.b), kTrain, t, origin, ahead);
      if (eps_out) scatter(z_buffer, eps_out, tile);
    }
    const float* y = gather(y_0, tile, y_buffer);
    const int64_t n = tile.numel();
    for (int64_t i = 0; i < n; ++i) y_t[i] = mix.signal * y[i] + mix.noise * z[i];
    scatter(y_t, out, tile);
    if (into) scatter(y_t, into, tile);
  });
}

}  // namespace sr3fast::cpu::SR3FAST_ISA
