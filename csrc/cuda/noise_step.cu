// noise, refine and solver_step. Compile with --fmad=false: every operation rounds by itself (row.h,
// noise.h).
#include "tile.cuh"

namespace sr3fast::cuda {
namespace {

struct NoiseArguments {
  Range range;
  Draw draw;
  View out;
};

template <bool direct>
__global__ void __launch_bounds__(kMaxThreads) noise_kernel(const NoiseArguments a) {
  const Tile<4> tile(a.range);
  Head& head = *reinterpret_cast<Head*>(shared_memory());
  float* shared_z = reinterpret_cast<float*>(shared_memory() + sizeof(Head));
  if (threadIdx.x == 0) a.draw.template prepare<direct>(a.range, tile.start, tile.count, head);
  __syncthreads();
  float z[kQuads][4];
  if (direct) {
    a.draw.in_registers(a.range, tile, head, z);
  } else {
    a.draw.in_shared(a.range, tile.count, head, shared_z);
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kQuads; ++u) Vec<float, 4>::load(shared_z + tile.at(u)).floats(z[u]);
  }
#pragma unroll
  for (int u = 0; u < kQuads; ++u)
    store_any(a.out, a.range, tile.start + tile.at(u), tile.valid(u), tile.whole, z[u]);
}

struct StepArguments {
  Range range;
  Draw draw;
  View out, m, into, y, eps_hat, m1, m2, z;  // float32 but for eps_hat and into
  Scalar<Row> row;
  bool paper;  // the row is made here, of alpha, gamma and step, some of them in device memory
  Scalar<double> alpha, gamma;
};

struct StepShared {
  Head head;
  alignas(16) Row row;
};

// E is eps_hat's type: a quad is 16 bytes of y and 16 or 8 of eps_hat, and a warp's quads lie side by side in
// both. linear: the host knows that the step is the paper's, y' = A y + B f + S z with z drawn.
template <class E, bool direct, bool linear>
__global__ void __launch_bounds__(kMaxThreads, linear ? 5 : 4) step_kernel(const StepArguments a) {
  const Tile<4> tile(a.range);
  const auto load_quad = [&](const View& from, int u) {
    return load<float, 4>(from, a.range, tile.start + tile.at(u), tile.valid(u), tile.whole);
  };
  // every load before the first use: they are under way while the noise is drawn
  Vec<float, 4> y_raw[kQuads];
  Vec<E, 4> f_raw[kQuads];
#pragma unroll
  for (int u = 0; u < kQuads; ++u) y_raw[u] = load_quad(a.y, u);
#pragma unroll
  for (int u = 0; u < kQuads; ++u)
    f_raw[u] = load<E, 4, true>(a.eps_hat, a.range, tile.start + tile.at(u), tile.valid(u), tile.whole);

  // in shared memory, out of the way of the noise's registers
  auto& shared = *reinterpret_cast<StepShared*>(shared_memory());
  float* shared_z = reinterpret_cast<float*>(shared_memory() + sizeof(StepShared));
  Row& row = shared.row;
  if (threadIdx.x == 0)
    row = a.paper ? refine_row(a.alpha.read(), a.gamma.read(), a.draw.step.read()) : a.row.read();
  if (threadIdx.x == 32)  // another warp
    a.draw.template prepare<direct>(a.range, tile.start, tile.count, shared.head);
  __syncthreads();

  Vec<float, 4> m1_raw[kQuads] = {}, m2_raw[kQuads] = {};
  float z[kQuads][4] = {};
  if (!linear && row.s != 0.0f && a.z) {
#pragma unroll
    for (int u = 0; u < kQuads; ++u) load_quad(a.z, u).floats(z[u]);
  } else if (row.s != 0.0f) {
    if (direct) {
      a.draw.in_registers(a.range, tile, shared.head, z);
    } else {
      a.draw.in_shared(a.range, tile.count, shared.head, shared_z);
      __syncthreads();
#pragma unroll
      for (int u = 0; u < kQuads; ++u) Vec<float, 4>::load(shared_z + tile.at(u)).floats(z[u]);
    }
  }
  if (!linear && row.c1 != 0.0f) {
#pragma unroll
    for (int u = 0; u < kQuads; ++u) m1_raw[u] = load_quad(a.m1, u);
  }
  if (!linear && row.c2 != 0.0f) {
#pragma unroll
    for (int u = 0; u < kQuads; ++u) m2_raw[u] = load_quad(a.m2, u);
  }

  const bool estimated = !linear && (row.c0 != 0.0f || a.m);
  // without a branch for each term that the paper's step lacks
  const bool linear_row = linear || (!estimated && row.c1 == 0.0f && row.c2 == 0.0f);
  const Row paper_row{0.0f, 0.0f, 0.0f, row.a, row.b, 0.0f, 0.0f, 0.0f, row.s};
#pragma unroll
  for (int u = 0; u < kQuads; ++u) {
    if (tile.valid(u) <= 0) continue;
    float y[4], f[4], m[4] = {}, m1[4], m2[4], out[4];
    y_raw[u].floats(y);
    f_raw[u].floats(f);
    m1_raw[u].floats(m1);
    m2_raw[u].floats(m2);
    if (linear_row) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = update(paper_row, y[i], f[i], 0.0f, 0.0f, 0.0f, z[u][i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (estimated) m[i] = estimate(row, y[i], f[i]);
        out[i] = update(row, y[i], f[i], m[i], m1[i], m2[i], z[u][i]);
      }
    }
    const uint32_t i = tile.start + tile.at(u);
    store<float>(a.out, a.range, i, tile.valid(u), tile.whole, out);
    if (!linear && a.m) store<float>(a.m, a.range, i, tile.valid(u), tile.whole, m);
    if (a.into) store_any(a.into, a.range, i, tile.valid(u), tile.whole, out);
  }
}

void step(const char* op, Tensor out, Tensor m, Tensor into, Tensor y, Tensor eps_hat, Scalar<Row> row,
          bool paper, Scalar<double> alpha, Scalar<double> gamma, Seeds seed, Scalar<int64_t> t, Tensor m1,
          Tensor m2, Tensor z, Origin origin, const Exec& exec) {
  const OnDevice on(exec.device);
  const Draw draw(y, seed, t, kRefine, origin);
  const Row& r = row.value;
  const bool linear = !m && !z && (paper || (!row.device && r.c0 == 0.0f && r.c1 == 0.0f && r.c2 == 0.0f));
  each_range(y, [&](const Range& range) {
    const auto view = [&](const Tensor& x) { return View(x, range, 4); };
    const StepArguments a{range,    draw,     view(out), view(m), view(into), view(y), view(eps_hat),
                          view(m1), view(m2), view(z),   row,     paper,      alpha,   gamma};
    with_type(eps_hat.dtype, [&](auto zero) {
      using E = decltype(zero);
      const auto kernel = draw.direct ? linear ? step_kernel<E, true, true> : step_kernel<E, true, false>
                          : linear    ? step_kernel<E, false, true>
                                      : step_kernel<E, false, false>;
      launch(op, kernel, tiles(range, draw.direct, sizeof(StepShared), exec), a);
    });
  });
}

}  // namespace

void noise(Tensor out, Seeds seed, Scalar<int64_t> step, uint32_t domain, Origin origin, Exec exec) {
  const OnDevice on(exec.device);
  const Draw draw(out, seed, step, domain, origin);
  each_range(out, [&](const Range& range) {
    const NoiseArguments a{range, draw, View(out, range, 4)};
    launch("noise", draw.direct ? noise_kernel<true> : noise_kernel<false>,
           tiles(range, draw.direct, sizeof(Head), exec), a);
  });
}

void refine(Tensor out, Tensor into, Tensor y, Tensor eps_hat, Scalar<double> alpha, Scalar<double> gamma,
            Seeds seed, Scalar<int64_t> t, Tensor z, Origin origin, Exec exec) {
  Scalar<Row> row;
  const bool paper = alpha.device || gamma.device || t.device;
  if (!paper) row.value = refine_row(alpha.value, gamma.value, t.value);
  step("refine", out, {}, into, y, eps_hat, row, paper, alpha, gamma, seed, t, {}, {}, z, origin, exec);
}

void solver_step(Tensor out, Tensor m, Tensor into, Tensor y, Tensor eps_hat, Scalar<Row> row, Seeds seed,
                 Scalar<int64_t> t, Tensor m1, Tensor m2, Tensor z, Origin origin, Exec exec) {
  step("solver_step", out, m, into, y, eps_hat, row, false, {}, {}, seed, t, m1, m2, z, origin, exec);
}

}  // namespace sr3fast::cuda
