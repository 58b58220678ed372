// A candidate for group_norm_silu of large tensors, forward.
//
// A block takes the moments of a unit two rounds before it applies them, and of the rounds between, one is
// for the slice's last block to merge them: by then they have long been told, and nobody waits. The unit is
// read a second time, from the L2 cache (or the first level's), so that no shared memory holds it, and blocks
// drift apart: some load while others compute.
#include "../../csrc/cuda/group_norm_silu.cu"
#include "candidate.cuh"

namespace sr3fast::cuda {
namespace {

constexpr int kVector = 8;    // bfloat16 in 16 bytes
constexpr uint32_t kLag = 2;  // rounds from a unit's moments to its result

template <int blocks>
__global__ void __launch_bounds__(kThreads, blocks) lag_kernel(const Arguments a, float2* stats) {
  bf16* const nowhere = nullptr;  // nothing is kept
  const uint32_t parts = a.cut.parts, groups = a.cut.slice / a.sizes.width;
  float2* received = shared_at<float2>(a.received);  // [group, part]
  float2* stat = shared_at<float2>(a.stat);
  for (uint32_t index = blockIdx.x; index < a.units + kLag * gridDim.x; index += gridDim.x) {
    if (index < a.units) {
      const Block block(a.cut, index, a.first_sample);
      float2* scratch = scratch_of(a, block);
      moments<bf16, kVector, true, false, false>(a, block, nowhere,
                                                 [&](uint32_t group, uint32_t lane, uint32_t, float2 of) {
                                                   if (lane == 0)
                                                     tell(scratch + group * parts + block.part, of);
                                                 });
      __syncthreads();
    }
    const uint32_t before = index - gridDim.x;
    if (index >= gridDim.x && before < a.units && before % parts == parts - 1) {
      Block block(a.cut, before, a.first_sample);
      block.part = 0;  // whose mean and rstd merge_parts leaves
      const float2* scratch = scratch_of(a, block);
      const uint32_t items = groups * parts;
      constexpr int K = 4;
      for (uint32_t i = threadIdx.x; i < items; i += K * kThreads)
        hear_some<K>(scratch + i, kThreads, (items - i + kThreads - 1) / kThreads,
                     [&](int k, float2 of) { received[i + k * kThreads] = of; });
      __syncthreads();
      merge_parts<kVector, true>(
          a, block, [&](uint32_t group, uint32_t part) { return received[group * parts + part]; });
      for (uint32_t i = threadIdx.x; i < groups; i += kThreads)
        tell(stats + groups_of(a, block) + i, stat[i]);
      __syncthreads();
    }
    if (index < kLag * gridDim.x) continue;
    const Block block(a.cut, index - kLag * gridDim.x, a.first_sample);
    const Fetched fetched = fetch<Fetched>(a, block);
    for (uint32_t i = threadIdx.x; i < groups; i += kThreads)
      hear_some<1>(stats + groups_of(a, block) + i, 0, 1, [&](int, float2 of) { stat[i] = of; });
    __syncthreads();
    apply<bf16, kVector, true, false>(
        a, block, fetched, [&](uint32_t group) { return stat[group]; }, nowhere, false, block);
    __syncthreads();
  }
}

}  // namespace

// As group_norm_silu, of bfloat16 in channels_last: units of so many bytes, `blocks` of a multiprocessor at
// once.
void group_norm_silu_lag(Tensor out, Tensor s, float* mean, float* rstd, const Norm& norm, Exec exec,
                         int64_t unit_bytes, int blocks) {
  const OnDevice on(exec.device);
  const int64_t batch = norm.h.size[0];
  Arguments a{norm.h.data,
              norm.h2.data,
              norm.residual.data,
              out.data,
              s.data,
              norm.weight,
              norm.bias,
              norm.shift,
              mean,
              rstd,
              nullptr,
              static_cast<float>(norm.eps),
              norm.silu,
              Sizes(norm, kVector),
              {}};
  using Plan = Plan<bf16, kVector, true>;
  const Plan plan(a);
  a.cut = candidate::unit_cut(
      a.sizes, batch, [&](uint32_t slice) { return plan.bytes(slice); }, unit_bytes, exec.device);
  Layout layout;
  layout.bytes = Plan::lay_out(a, false);
  a.received = layout.add(int64_t{a.cut.parts} * (a.cut.slice / a.sizes.width) * sizeof(float2));
  a.scratch = static_cast<float2*>(exec.scratch);
  const int64_t groups = batch * a.sizes.groups;
  float2* stats = a.scratch + groups * a.cut.parts;
  clear("group_norm_silu_lag", a.scratch, groups * (a.cut.parts + 1), exec.stream);
  a.units = static_cast<uint32_t>(batch * a.cut.slices * a.cut.parts);
  candidate::launch_units(blocks == 4   ? lag_kernel<4>
                          : blocks == 3 ? lag_kernel<3>
                                        : lag_kernel<2>,
                          layout.bytes, exec, a, stats);
}

}  // namespace sr3fast::cuda

using namespace sr3fast;

#if defined(SR3FAST_EMULATE)
extern "C" void emulate_schedule(int schedule) {
  emulate::schedule = static_cast<emulate::Schedule>(schedule);
}
extern "C" const char* group_norm_silu_lag(const Tensor* out, const Tensor* s, float* mean, float* rstd,
                                           const Norm* norm, const Exec* exec) {
  return candidate::error([&] { cuda::group_norm_silu_lag(*out, *s, mean, rstd, *norm, *exec, 4096, 2); });
}
#else
int main() {
  return candidate::compare("group_norm_silu_lag", 2, [](const candidate::Case& c, int64_t unit, int blocks) {
    if (unit == 0)
      cuda::group_norm_silu(c.out, {}, c.mean, c.rstd, c.norm, c.exec);
    else
      cuda::group_norm_silu_lag(c.out, {}, c.mean, c.rstd, c.norm, c.exec, unit, blocks);
  });
}
#endif
