// A candidate for group_norm_silu of large tensors, backward: as group_norm_silu_lag.cu.
#include "../../csrc/cuda/group_norm_silu_backward.cu"
#include "candidate.cuh"

namespace sr3fast::cuda {
namespace {

constexpr int kVector = 8;    // bfloat16 in 16 bytes
constexpr uint32_t kLag = 2;  // rounds from a unit's sums to its result

template <int blocks>
__global__ void __launch_bounds__(kThreads, blocks) lag_kernel(const Arguments a, float2* stats) {
  using Work = Work<bf16, kVector, true, true>;
  const uint32_t parts = a.cut.parts, groups = a.cut.slice / a.sizes.width;
  float2* stat = shared_at<float2>(a.stat);
  const auto stats_of = [&](const Block& block) {
    return stats + block.b * a.sizes.groups + block.slice * groups;
  };
  for (uint32_t index = blockIdx.x; index < a.units + kLag * gridDim.x; index += gridDim.x) {
    if (index < a.units) {
      const Block block(a.cut, index, a.first_sample);
      Channel<bf16, true>::put(a, block, fetch<Fetched>(a, block));
      __syncthreads();
      const Work work(a, block, nullptr);
      work.template sums<false>();
      __syncthreads();
      Letters<false>(a, block).send(work);
      __syncthreads();
    }
    const uint32_t before = index - gridDim.x;
    if (index >= gridDim.x && before < a.units && before % parts == parts - 1) {
      const Block block(a.cut, before, a.first_sample);
      const float2* means = Letters<false>(a, block).means();
      for (uint32_t i = threadIdx.x; i < groups; i += kThreads) tell(stats_of(block) + i, means[i]);
      __syncthreads();
    }
    if (index < kLag * gridDim.x) continue;
    const Block block(a.cut, index - kLag * gridDim.x, a.first_sample);
    const Fetched fetched = fetch<Fetched>(a, block);
    Channel<bf16, true>::put(a, block, fetched);
    for (uint32_t i = threadIdx.x; i < groups; i += kThreads)
      hear_some<1>(stats_of(block) + i, 0, 1, [&](int, float2 of) { stat[i] = of; });
    __syncthreads();
    Gradient<bf16>::put(a, block, fetched, [&](uint32_t group) { return stat[group]; });
    __syncthreads();
    Work(a, block, nullptr).template apply<false>(false, block);
    __syncthreads();
  }
}

}  // namespace

// As group_norm_silu_backward, of bfloat16 in channels_last, with silu: units of so many bytes of h and grad,
// `blocks` of a multiprocessor at once.
void group_norm_silu_backward_lag(Tensor dh, Tensor dh2, float* dweight, float* dbias, float* dshift,
                                  Tensor grad, Tensor grad_s, const float* mean, const float* rstd,
                                  const Norm& norm, Exec exec, int64_t unit_bytes, int blocks) {
  const OnDevice on(exec.device);
  const char* op = "group_norm_silu_backward_lag";
  Arguments a{norm.h.data, norm.h2.data, grad.data,      grad_s.data,          dh.data,
              dh2.data,    norm.weight,  norm.bias,      norm.shift,           mean,
              rstd,        dshift,       norm.h.size[0], Sizes(norm, kVector), {}};
  using Plan = Plan<bf16, kVector, true, true>;
  const Plan plan{a.sizes};
  a.cut = candidate::unit_cut(
      a.sizes, a.batch, [&](uint32_t slice) { return plan.bytes(slice); }, unit_bytes, exec.device);
  const int64_t shared = Plan::lay_out(a, false, false), groups = a.batch * a.sizes.groups;
  Plan::lay_out_scratch(a, exec);
  float2* stats = a.group_parts + groups * a.cut.parts;
  a.channel_parts += 2 * groups;
  clear(op, a.group_parts, groups * (a.cut.parts + 1), exec.stream);
  a.units = static_cast<uint32_t>(a.batch * a.cut.slices * a.cut.parts);
  candidate::launch_units(blocks == 4   ? lag_kernel<4>
                          : blocks == 3 ? lag_kernel<3>
                                        : lag_kernel<2>,
                          shared, exec, a, stats);
  Plan::leave_totals(op, a, exec);
  launch(op, finish_kernel,
         {ceil_divide(a.sizes.channels, 32), kThreads, kThreads * sizeof(float2), 1, exec.stream},
         static_cast<const float*>(a.totals), a.batch, static_cast<int64_t>(a.sizes.channels), dweight,
         dbias);
}

}  // namespace sr3fast::cuda

using namespace sr3fast;

#if defined(SR3FAST_EMULATE)
extern "C" void emulate_schedule(int schedule) {
  emulate::schedule = static_cast<emulate::Schedule>(schedule);
}
extern "C" const char* group_norm_silu_backward_lag(const Tensor* dh, const Tensor* dh2, float* dweight,
                                                    float* dbias, float* dshift, const Tensor* grad,
                                                    const Tensor* grad_s, const float* mean,
                                                    const float* rstd, const Norm* norm, const Exec* exec) {
  return candidate::error([&] {
    cuda::group_norm_silu_backward_lag(*dh, *dh2, dweight, dbias, dshift, *grad, *grad_s, mean, rstd, *norm,
                                       *exec, 8192, 2);
  });
}
#else
int main() {
  return candidate::compare(
      "group_norm_silu_backward_lag", 3, [](const candidate::Case& c, int64_t unit, int blocks) {
        if (unit == 0)
          cuda::group_norm_silu_backward(c.out, {}, c.dweight, c.dbias, nullptr, c.grad, {}, c.mean, c.rstd,
                                         c.norm, c.exec);
        else
          cuda::group_norm_silu_backward_lag(c.out, {}, c.dweight, c.dbias, nullptr, c.grad, {}, c.mean,
                                             c.rstd, c.norm, c.exec, unit, blocks);
      });
}
#endif
