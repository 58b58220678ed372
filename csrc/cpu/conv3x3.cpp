// A 3x3 convolution of stride 1 in float32, channels_last, by minimal filtering (Winograd; Lavin and Gray
// 2016, arXiv:1509.09308): 36 products a 4x4 tile of results, an input channel and an output channel, where
// the sum as it is written takes 144.
//
//   F(4, 3): y = A^T ((G g) * (B^T d)), 6 values d and 3 weights g to 4 results y; in two dimensions once
//   along each. A, B, G evaluate and interpolate polynomials at 0, +-11/16, +-3/2 and infinity. Their powers
//   are exact in binary, and rounding errors come out half as large as with the usual 0, +-1, +-2.
//
// A thread takes a block of tiles: their windows go to 36 matrices V [tiles, C], which the products with the
// weights U [C, 32] take to M [tiles, 32], 32 output channels at a time, and those to results. V and M
// stay in the second-level cache (of 2 MB, with up to some 400 channels); U streams through once a block.
#include "conv3x3.h"

#include <cstring>

#include "parallel.h"
#include "simd.h"

namespace sr3fast::cpu::SR3FAST_ISA {
namespace {

constexpr int kTile = 4, kWindow = 6, kPoints = kWindow * kWindow;
constexpr int64_t kColumns = 32;              // output channels of a panel
constexpr int kVectors = 2;                   // of columns, in a product's registers
constexpr int kRows = kLanes == 16 ? 14 : 6;  // tiles, most in a product's registers
constexpr int64_t kMostTiles = 32;            // of a block
constexpr int64_t kLeastTiles = 16;           // of a block, where threads share few
constexpr int64_t kDepth = 256;  // channels of a product: short sums, of a U in the first-level cache
constexpr int64_t kApart = 16;   // floats between the 36 matrices, which would else share few sets of a cache

constexpr float kA = 0.6875f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

// std::min is a weak symbol, of which the linker might keep another instruction set's
SR3FAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SR3FAST_INLINE int64_t ceil_divide(int64_t n, int64_t d) { return (n + d - 1) / d; }

// B^T d
SR3FAST_INLINE void window_transform(const Floats* d, Floats* v) {
  v[0] = d[4] - (kA2 + kB2) * d[2] + kA2 * kB2 * d[0];
  const Floats even_a = d[4] - kB2 * d[2], odd_a = d[3] - kB2 * d[1];
  const Floats even_b = d[4] - kA2 * d[2], odd_b = d[3] - kA2 * d[1];
  v[1] = even_a + kA * odd_a;
  v[2] = even_a - kA * odd_a;
  v[3] = even_b + kB * odd_b;
  v[4] = even_b - kB * odd_b;
  v[5] = d[5] - (kA2 + kB2) * d[3] + kA2 * kB2 * d[1];
}

// A^T m
SR3FAST_INLINE void result_transform(const Floats* m, Floats* y) {
  const Floats sum_a = m[1] + m[2], sum_b = m[3] + m[4], odd_a = m[1] - m[2], odd_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = kA * odd_a + kB * odd_b;
  y[2] = kA2 * sum_a + kB2 * sum_b;
  y[3] = m[5] + kA2 * kA * odd_a + kB2 * kB * odd_b;
}

// G g, of a panel's output channels side by side: g [3], u [6] of rows that lie `stride` apart
using Panel = double[kColumns];

SR3FAST_INLINE void weight_transform(const Panel* g, int stride, Panel* u) {
  const double points[kWindow - 1] = {0.0, kA, -kA, kB, -kB};
  for (int i = 0; i < kWindow - 1; ++i) {
    double others = 1.0;
    for (int j = 0; j < kWindow - 1; ++j)
      if (j != i) others *= points[i] - points[j];
    const double scale = 1.0 / others, x = points[i];
    for (int n = 0; n < kColumns; ++n)
      u[i][n] = scale * (g[0][n] + x * (g[stride][n] + x * g[2 * stride][n]));
  }
  for (int n = 0; n < kColumns; ++n) u[kWindow - 1][n] = g[2 * stride][n];
}

// m [R, 32] (+)= v [R, K] u [K, 32]
template <int R>
SR3FAST_NOINLINE void product(const float* v, int64_t stride, const float* u, int64_t K, float* m, bool add) {
  for (int64_t column = 0; column < kColumns; column += kVectors * kLanes) {
    Floats sums[R][kVectors] = {};
    for (int64_t k = 0; k < K; ++k) {
      Floats weights[kVectors];
      for (int64_t i = 0; i < kColumns && column == 0; i += 16)  // a line of what the next product reads
        __builtin_prefetch(u + (K + k) * kColumns + i, 0, 2);
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) weights[i] = load(u + k * kColumns + column + i * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; ++i) sums[r][i] += v[r * stride + k] * weights[i];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) {
        float* to = m + r * kColumns + column + i * kLanes;
        store(to, add ? load(to) + sums[r][i] : sums[r][i]);
      }
  }
}

using Product = void (*)(const float*, int64_t, const float*, int64_t, float*, bool);

template <int R>
Product product_of(int64_t rows) {
  if constexpr (R > 1)
    return rows == R ? product<R> : product_of<R - 1>(rows);
  else
    return product<1>;
}

// How a convolution is cut up: blocks of tiles, and, where those are fewer than threads, parts of the panels.
struct Plan {
  int64_t C, H, W;       // of the result: H, W
  int64_t across, down;  // tiles of a picture
  int64_t tiles, panels;
  int64_t rows;                  // of a product
  int64_t block, blocks, parts;  // tiles of a block
  int64_t padded_C, v_size, m_size;
  int threads;  // that have work

  Plan(const Tensor& out, int64_t channels, int threads_)
      : C(channels),
        H(out.size[2]),
        W(out.size[3]),
        across(ceil_divide(W, kTile)),
        down(ceil_divide(H, kTile)),
        tiles(out.size[0] * across * down),
        panels(ceil_divide(out.size[1], kColumns)) {
    const int64_t turns = ceil_divide(tiles, threads_ * kMostTiles);
    block = ceil_divide(tiles, least(turns * threads_, ceil_divide(tiles, kLeastTiles)));
    blocks = ceil_divide(tiles, block);
    parts = least(panels, ceil_divide(threads_, blocks));
    rows = ceil_divide(block, ceil_divide(block, kRows));
    padded_C = ceil_divide(C, kLanes) * kLanes;
    const int64_t padded_block = ceil_divide(block, rows) * rows;
    v_size = padded_block * padded_C + kApart;
    m_size = padded_block * kColumns + kApart;
    threads = static_cast<int>(least(threads_, blocks * parts));
  }

  int64_t thread_scratch() const { return kPoints * (v_size + m_size) + padded_C; }  // floats
};

// Where a tile's first result lies.
struct Place {
  int64_t b, y, x;

  Place(const Plan& plan, int64_t tile)
      : b(tile / (plan.across * plan.down)),
        y(tile / plan.across % plan.down * kTile),
        x(tile % plan.across * kTile) {}
};

// V of one tile; what lies outside the picture is 0.
SR3FAST_INLINE void read_window(float* V, const Tensor& h, const float* zeros, const Plan& plan,
                                Place place) {
  const float* pixels[kPoints];
  for (int i = 0; i < kPoints; ++i) {
    const int64_t y = place.y - 1 + i / kWindow, x = place.x - 1 + i % kWindow;
    const bool inside = y >= 0 && y < plan.H && x >= 0 && x < plan.W;
    pixels[i] = zeros;
    if (inside) pixels[i] = static_cast<const float*>(h.data) + h.offset(place.b, 0, y, x);
  }
  for (int64_t c = 0; c < plan.C; c += kLanes) {
    Floats columns[kWindow][kWindow];
#pragma GCC unroll 6
    for (int x = 0; x < kWindow; ++x) {
      Floats d[kWindow];
#pragma GCC unroll 6
      for (int y = 0; y < kWindow; ++y) d[y] = load_some(pixels[y * kWindow + x] + c, plan.C - c, 0.0f);
      window_transform(d, columns[x]);
    }
#pragma GCC unroll 6
    for (int y = 0; y < kWindow; ++y) {
      Floats d[kWindow], v[kWindow];
#pragma GCC unroll 6
      for (int x = 0; x < kWindow; ++x) d[x] = columns[x][y];
      window_transform(d, v);
#pragma GCC unroll 6
      for (int x = 0; x < kWindow; ++x) store(V + (y * kWindow + x) * plan.v_size + c, v[x]);
    }
  }
}

// The results of one tile, `columns` channels from `first` on.
SR3FAST_INLINE void write_tile(const Tensor& out, const float* M, const float* bias, const Tensor& onto,
                               const Plan& plan, Place place, int64_t first, int64_t columns) {
  const int64_t rows = least(kTile, plan.H - place.y);
  const int64_t width = least(kTile, plan.W - place.x);
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t left = columns - c;
    Floats halves[kWindow][kTile];
#pragma GCC unroll 6
    for (int x = 0; x < kWindow; ++x) {
      Floats m[kWindow];
#pragma GCC unroll 6
      for (int y = 0; y < kWindow; ++y) m[y] = load(M + (y * kWindow + x) * plan.m_size + c);
      result_transform(m, halves[x]);
    }
    const Floats add = bias ? load_some(bias + first + c, left, 0.0f) : Floats{};
    for (int64_t y = 0; y < rows; ++y) {
      Floats m[kWindow], r[kTile];
#pragma GCC unroll 6
      for (int x = 0; x < kWindow; ++x) m[x] = halves[x][y];
      result_transform(m, r);
      for (int64_t x = 0; x < width; ++x) {
        Floats v = r[x] + add;
        if (onto) {
          const int64_t at = onto.offset(place.b, first + c, place.y + y, place.x + x);
          v += load_some(static_cast<const float*>(onto.data) + at, left, 0.0f);
        }
        const int64_t at = out.offset(place.b, first + c, place.y + y, place.x + x);
        store_some(static_cast<float*>(out.data) + at, left, v);
      }
    }
  }
}

}  // namespace

int64_t conv3x3_scratch(const Tensor& out, int64_t channels, int threads) {
  const Plan plan(out, channels, threads);
  return plan.threads * plan.thread_scratch();
}

void conv3x3_pack(float* packed, const float* weight, int64_t N, int64_t C, int threads) {
  parallel_ranges(threads, ceil_divide(N, kColumns) * C, [&](int64_t begin, int64_t end) {
    Panel g[9], columns[3 * kWindow], u[kWindow];  // [3, 3]; [x, 6]; a row of [6, 6]
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / C * kColumns, c = item % C;
      for (int64_t n = 0; n < kColumns; ++n)
        for (int i = 0; i < 9; ++i) g[i][n] = first + n < N ? weight[((first + n) * C + c) * 9 + i] : 0.0f;
      for (int x = 0; x < 3; ++x) weight_transform(g + x, 3, columns + x * kWindow);
      for (int y = 0; y < kWindow; ++y) {
        weight_transform(columns + y, kWindow, u);
        for (int x = 0; x < kWindow; ++x) {
          float* to = packed + ((item / C * kPoints + y * kWindow + x) * C + c) * kColumns;
          for (int n = 0; n < kColumns; ++n) to[n] = static_cast<float>(u[x][n]);
        }
      }
    }
  });
}

void conv3x3(Tensor out, Tensor h, const float* packed, const float* bias, Tensor onto, Exec exec) {
  const Plan plan(out, h.size[1], exec.threads);
  const Product multiply = product_of<kRows>(plan.rows);
  const int64_t N = out.size[1];
  parallel_items(plan.threads, plan.blocks * plan.parts, [&](int rank, int64_t item) {
    float* V = static_cast<float*>(exec.scratch) + rank * plan.thread_scratch();
    float* M = V + kPoints * plan.v_size;
    float* zeros = M + kPoints * plan.m_size;
    std::memset(zeros, 0, plan.padded_C * sizeof(float));
    const int64_t first = item / plan.parts * plan.block, part = item % plan.parts;
    const int64_t tiles = least(plan.block, plan.tiles - first);
    for (int64_t i = 0; i < tiles; ++i)
      read_window(V + i * plan.padded_C, h, zeros, plan, Place(plan, first + i));
    for (int64_t n = plan.panels * part / plan.parts; n < plan.panels * (part + 1) / plan.parts; ++n) {
      for (int64_t point = 0; point < kPoints; ++point)
        for (int64_t k = 0; k < plan.C; k += kDepth)
          for (int64_t i = 0; i < tiles; i += plan.rows)
            multiply(V + point * plan.v_size + i * plan.padded_C + k, plan.padded_C,
                     packed + ((n * kPoints + point) * plan.C + k) * kColumns, least(kDepth, plan.C - k),
                     M + point * plan.m_size + i * kColumns, k > 0);
      for (int64_t i = 0; i < tiles; ++i)
        write_tile(out, M + i * kColumns, bias, onto, plan, Place(plan, first + i), n * kColumns,
                   least(kColumns, N - n * kColumns));
    }
  });
}

}  // namespace sr3fast::cpu::SR3FAST_ISA
