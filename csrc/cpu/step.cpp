// noise, refine, solver_step and q_sample on the CPU.
//
// A tile is a stretch of one image row, or a few short rows: NCHW one channel's pixels, channels_last the
// pixels with their channels between them. All its random words are drawn first, then they become normals,
// vector by vector, and each is used at once. Doing all three in one loop needs more registers than there
// are.
#include "../common/noise.h"
#include "../common/ops.h"
#include "parallel.h"
#include "simd.h"

namespace sr3fast::cpu::SR3FAST_ISA {
namespace {

constexpr int kVectorPixels = 4 * kQuads;  // of the quads drawn at a time
constexpr int kChannels = 16;              // channels of a tile, channels_last
constexpr int kTile = 1024;                // elements of a tile, at most
constexpr int kDrawn = 2 * kTile;          // normals drawn for a tile, at most: a line takes whole vectors
static_assert(kTile + kChannels * kVectorPixels <= kDrawn,
              "a line of pixels may begin and end within a vector");

// Place of a tile: sample b, channels c .. c + channels, rows h .. h + rows, columns w .. w + pixels. With
// more than one row it spans the image's width and has one channel.
struct Tile {
  int64_t b, c, channels, h, rows, w, pixels;

  SR3FAST_INLINE int64_t numel() const { return channels * rows * pixels; }
};

// The tiles of an image in y's layout, shared between threads.
template <class F>
SR3FAST_INLINE void each_tile(const Tensor& y, int threads, F&& f) {
  const int64_t B = y.size[0], C = y.size[1], H = y.size[2], W = y.size[3];
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  threads = threads_for(threads, y.numel());
  if (!y.channels_last()) {
    const int64_t line =
        (W + 3 + kVectorPixels - 1) / kVectorPixels * kVectorPixels;  // drawn for a row, wherever its origin
    const int64_t rows_a_tile = W <= kTile ? least(kTile / W, kDrawn / line) : 1;
    const int64_t bands = (H + rows_a_tile - 1) / rows_a_tile;  // of a plane
    parallel_ranges(threads, B * C * bands, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t plane = i / bands, h = i % bands * rows_a_tile;
        for (int64_t w = 0; w < W; w += kTile)
          f(Tile{plane / C, plane % C, 1, h, least(H - h, rows_a_tile), w, least(W - w, kTile)});
      }
    });
    return;
  }
  const int64_t pixels_a_tile = C <= kChannels ? (kTile / C) / kVectorPixels * kVectorPixels : kVectorPixels;
  parallel_ranges(threads, B * H, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t w = 0; w < W; w += pixels_a_tile)
        for (int64_t c = 0; c < C; c += kChannels)
          f(Tile{i / H, c, least(C - c, kChannels), i % H, 1, w, least(W - w, pixels_a_tile)});
  });
}

// f(size, i) over [0, n): size 4 as long as it fits, then 2, then 1. Vectors side by side, because one chain
// of dependent operations leaves the ports idle.
template <class F>
SR3FAST_INLINE void by_four(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) f(std::integral_constant<int, 4>(), i);
  if (i + 2 <= n) {
    f(std::integral_constant<int, 2>(), i);
    i += 2;
  }
  if (i < n) f(std::integral_constant<int, 1>(), i);
}

// The random words of a tile, vector by vector and line by line. A line is one channel of one row.
struct Words {
  alignas(64) uint32_t radius[kDrawn / 2], angle[kDrawn / 2];
  int64_t vectors = 0;         // in all
  int64_t vectors_a_line = 0;  // a line begins at a whole vector, with the quad of its first pixel
};

// What a tile reads and writes, asked for ahead of time, so that memory and arithmetic overlap: the next
// tile, most often the next in memory, comes as near as the second level of cache while this one is worked
// on, and this one into the first while its words are drawn.
template <int N>
struct Ahead {
  const float* p[N];

  SR3FAST_INLINE void this_tile(int64_t i, int64_t n) const {
    for (int64_t k = i; k < i + n; k += 16)
      for (int j = 0; j < N; ++j) __builtin_prefetch(p[j] + k, 0, 3);
  }
  SR3FAST_INLINE void next_tile(int64_t i) const {
    for (int j = 0; j < N; ++j) __builtin_prefetch(p[j] + kTile + i, 0, 2);
  }
};

template <int M>
SR3FAST_NOINLINE void draw_words(Words& words, const Tile& t, uint64_t seed, uint32_t domain, uint32_t step,
                                 Origin origin, const Ahead<M>& ahead) {
  const int64_t w = t.w + origin.w, first = w / 4, quads = (w + t.pixels + 3) / 4 - first;
  words.vectors_a_line = (quads + kQuads - 1) / kQuads;
  words.vectors = t.rows * t.channels * words.vectors_a_line;
  for (int64_t c = 0; c < t.channels; ++c)
    by_four(words.vectors_a_line, [&](auto size, int64_t v) SR3FAST_INLINE_LAMBDA {
      constexpr int N = size;
      Group<Words64, N> w4;
      for (int i = 0; i < N; ++i) w4.v[i] = quad_of_lane() + static_cast<uint64_t>(first + (v + i) * kQuads);
      const auto column =
          philox_column<WideLanes<N>>(seed, w4, step, domain * 65536u + static_cast<uint32_t>(t.c + c));
      for (int64_t r = 0; r < t.rows; ++r) {
        const PhiloxRow row = philox_row(seed, static_cast<uint32_t>(t.h + r + origin.h), step);
        const WordsOf<WideLanes<N>> a = philox(seed, column, row);
        const int64_t at = (r * t.channels + c) * words.vectors_a_line + v;
        for (int i = 0; i < N; ++i) {
          const Words32 radius = vector::narrow(a.a0.v[i], a.a2.v[i]),
                        angle = vector::narrow(a.a1.v[i], a.a3.v[i]);
          std::memcpy(words.radius + (at + i) * kLanes, &radius, sizeof radius);
          std::memcpy(words.angle + (at + i) * kLanes, &angle, sizeof angle);
        }
        ahead.this_tile(at * kVectorPixels, N * kVectorPixels);
      }
    });
}

// The normals of the words in their order, vector by vector: f(offset, z).
template <class F>
SR3FAST_INLINE void each_drawn(const Words& words, F&& f) {
  by_four(words.vectors, [&](auto size, int64_t v) SR3FAST_INLINE_LAMBDA {
    constexpr int N = size;
    Group<Words32, N> radius, angle;
    std::memcpy(&radius, words.radius + v * kLanes, sizeof radius);
    std::memcpy(&angle, words.angle + v * kLanes, sizeof angle);
    Group<Floats, N> first, second;
    box_muller<Lanes<N>>(radius, angle, first, second);
    for (int i = 0; i < N; ++i)
      each_pixels(first.v[i], second.v[i], [&](int at, Floats z) { f((v + i) * kVectorPixels + at, z); });
  });
}

// The normals of a tile whose lines begin or end within a quad or a vector, or alternate: into the tile's
// order.
SR3FAST_NOINLINE void reorder_drawn(const Words& words, const Tile& t, int64_t into_quad, float* z) {
  float drawn[kDrawn];
  each_drawn(words, [&](int64_t at, Floats v) { store(drawn + at, v); });
  const float* line = drawn + into_quad;
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t c = 0; c < t.channels; ++c, line += words.vectors_a_line * kVectorPixels)
      for (int64_t w = 0; w < t.pixels; ++w) z[(r * t.pixels + w) * t.channels + c] = line[w];
}

// Noise v1 of a tile in its order, vector by vector: f(offset, elements left, z).
template <int N, class F>
SR3FAST_NOINLINE void each_normal(const Tile& t, uint64_t seed, uint32_t domain, uint32_t step, Origin origin,
                                  const Ahead<N> ahead, F f) {
  Words words;
  draw_words(words, t, seed, domain, step, origin, ahead);
  const int64_t into_quad = (t.w + origin.w) % 4, n = t.numel();
  if (t.channels == 1 && into_quad == 0 && t.pixels == words.vectors_a_line * kVectorPixels) {
    each_drawn(words, [&](int64_t at, Floats z) {
      ahead.next_tile(at);
      f(at, int64_t{kLanes}, z);
    });
    return;
  }
  float z[kTile + kLanes];
  reorder_drawn(words, t, into_quad, z);
  for (int64_t i = 0; i < n; i += kLanes) f(i, n - i, load(z + i));
}

// Is the tile contiguous floats in t, in the tile's order?
SR3FAST_INLINE bool in_tile_order(const Tensor& t, const Tile& tile) {
  const bool pixels = tile.channels > 1 ? t.stride[3] == tile.channels : t.stride[3] == 1;
  return t.dtype == Dtype::f32 && (pixels || tile.pixels == 1) && (tile.channels == 1 || t.stride[1] == 1) &&
         (tile.rows == 1 || t.stride[2] == tile.pixels);
}

// f(element of t, offset in the tile) over a tile of t, whatever its dtype and strides.
template <class F>
SR3FAST_INLINE void each_element(const Tensor& t, const Tile& tile, F&& f) {
  const int64_t start = t.offset(tile.b, tile.c, tile.h, tile.w);
  with_type(t, [&](auto* data) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      auto* p = data + start + r * t.stride[2];
      const int64_t at = r * tile.pixels;
      if (tile.channels == 1 && t.stride[3] == 1) {
        for (int64_t w = 0; w < tile.pixels; ++w) f(p[w], at + w);
      } else {
        for (int64_t w = 0; w < tile.pixels; ++w)
          for (int64_t c = 0; c < tile.channels; ++c)
            f(p[w * t.stride[3] + c * t.stride[1]], (at + w) * tile.channels + c);
      }
    }
  });
}

// A tile of a tensor as floats in the tile's order: the tensor's own memory where it is that already, else a
// copy. Null where the tensor is.
class TileOf {
 public:
  SR3FAST_INLINE TileOf(const Tensor& t, const Tile& tile) : t_(t), tile_(tile) {
    if (t && in_tile_order(t, tile))
      data_ = static_cast<float*>(t.data) + t.offset(tile.b, tile.c, tile.h, tile.w);
    else if (t)
      data_ = copy_;
  }
  SR3FAST_INLINE float* data() const { return data_; }
  SR3FAST_INLINE const float* read() {
    if (data_ == copy_) fill();
    return data_;
  }
  SR3FAST_INLINE void write_back() {
    if (data_ == copy_) flush();
  }

 private:
  SR3FAST_NOINLINE void fill() {
    each_element(t_, tile_, [&](auto& x, int64_t i) { copy_[i] = to_float(x); });
  }
  SR3FAST_NOINLINE void flush() {
    each_element(t_, tile_,
                 [&](auto& x, int64_t i) { x = from_float<std::remove_reference_t<decltype(x)>>(copy_[i]); });
  }

  const Tensor& t_;
  const Tile& tile_;
  float* data_ = nullptr;
  float copy_[kTile];
};

}  // namespace

void noise(Tensor out, Seeds seed, Scalar<int64_t> step, uint32_t domain, Origin origin, Exec exec) {
  const auto t = static_cast<uint32_t>(step.read());
  each_tile(out, exec.threads, [&](const Tile& tile) {
    TileOf out_tile(out, tile);
    float* z = out_tile.data();
    each_normal(tile, seed.of(tile.b), domain, t, origin, Ahead<1>{{z}},
                [=](int64_t i, int64_t left, Floats z_i) { store_some(z + i, left, z_i); });
    out_tile.write_back();
  });
}

void solver_step(Tensor out, Tensor m, Tensor into, Tensor y, Tensor eps_hat, Scalar<Row> row_or_address,
                 Seeds seed, Scalar<int64_t> step, Tensor m1, Tensor m2, Tensor z, Origin origin, Exec exec) {
  const Row given = row_or_address.read();
  const auto t = static_cast<uint32_t>(step.read());
  const bool draws = given.s != 0.0f && !z;
  const bool estimates = m || given.c0 != 0.0f;
  const bool only_y_and_f = !estimates && given.c1 == 0.0f && given.c2 == 0.0f && !into;
  each_tile(y, exec.threads, [&](const Tile& tile) {
    TileOf y_tile(y, tile), f_tile(eps_hat, tile), m1_tile(m1, tile), m2_tile(m2, tile), z_tile(z, tile);
    TileOf out_tile(out, tile), m_tile(m, tile), into_tile(into, tile);
    const float *y_data = y_tile.read(), *f_data = f_tile.read(), *m1_data = m1_tile.read(),
                *m2_data = m2_tile.read(), *z_data = z_tile.read();
    float *out_data = out_tile.data(), *m_data = m_tile.data(), *into_data = into_tile.data();
    const Row row = given;

    // every element is read before it is written: out may be y, and m may be m1 or m2
    const auto update = [=](int64_t i, int64_t left, Floats z_i) {
      const auto at = [=](const float* p) { return load_some(p + i, left, 0.0f); };
      const Floats y_i = at(y_data), f_i = at(f_data);
      Floats next = row.a * y_i + row.b * f_i;
      Floats m_i{};
      if (estimates) {
        m_i = row.recip * y_i - row.ratio * f_i;
        m_i = m_i < -row.clip ? all(-row.clip) : (m_i > row.clip ? all(row.clip) : m_i);  // NaN stays NaN
        if (row.c0 != 0.0f) next = next + row.c0 * m_i;
      }
      if (row.c1 != 0.0f) next = next + row.c1 * at(m1_data);
      if (row.c2 != 0.0f) next = next + row.c2 * at(m2_data);
      if (row.s != 0.0f) next = next + row.s * z_i;
      if (m_data) store_some(m_data + i, left, m_i);
      store_some(out_data + i, left, next);
      if (into_data) store_some(into_data + i, left, next);
    };
    const auto refine = [=](int64_t i, int64_t left, Floats z_i) {  // the same without its branches
      const Floats y_i = load_some(y_data + i, left, 0.0f), f_i = load_some(f_data + i, left, 0.0f);
      store_some(out_data + i, left, row.a * y_i + row.b * f_i + row.s * z_i);
    };

    const Ahead<3> ahead{{y_data, f_data, out_data}};
    if (draws && only_y_and_f) {
      each_normal(tile, seed.of(tile.b), kRefine, t, origin, ahead, refine);
    } else if (draws) {
      each_normal(tile, seed.of(tile.b), kRefine, t, origin, ahead, update);
    } else {
      const int64_t n = tile.numel();
      for (int64_t i = 0; i < n; i += kLanes)
        update(i, n - i, z_data ? load_some(z_data + i, n - i, 0.0f) : Floats{});
    }
    out_tile.write_back();
    m_tile.write_back();
    into_tile.write_back();
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
  each_tile(y_0, exec.threads, [&](const Tile& tile) {
    TileOf y_tile(y_0, tile), eps_tile(eps, tile), out_tile(out, tile), eps_out_tile(eps_out, tile),
        into_tile(into, tile);
    const float *y_data = y_tile.read(), *eps_data = eps_tile.read();
    float *out_data = out_tile.data(), *eps_out_data = eps_out_tile.data(), *into_data = into_tile.data();
    const Mix mix = q_sample_mix(gamma_per_sample ? gamma.device[tile.b] : gamma.read());

    const auto diffuse = [=](int64_t i, int64_t left, Floats eps_i) {
      const Floats y_t = mix.signal * load_some(y_data + i, left, 0.0f) + mix.noise * eps_i;
      store_some(out_data + i, left, y_t);
      if (eps_out_data) store_some(eps_out_data + i, left, eps_i);
      if (into_data) store_some(into_data + i, left, y_t);
    };
    if (eps) {
      const int64_t n = tile.numel();
      for (int64_t i = 0; i < n; i += kLanes) diffuse(i, n - i, load_some(eps_data + i, n - i, 0.0f));
    } else {
      const Ahead<3> ahead{{y_data, out_data, eps_out_data ? eps_out_data : out_data}};
      each_normal(tile, seed.of(tile.b), kTrain, t, origin, ahead, diffuse);
    }
    out_tile.write_back();
    eps_out_tile.write_back();
    into_tile.write_back();
  });
}

}  // namespace sr3fast::cpu::SR3FAST_ISA
