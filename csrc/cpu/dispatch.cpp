// The CPU home: picks, once, the widest instruction set that this build has and this machine runs.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../common/ops.h"
#include "conv3x3.h"

// clang-format off
#define SR3FAST_EACH_OP(X)                                                                     \
  X(noise) X(refine) X(solver_step) X(q_sample) X(group_norm_silu) X(group_norm_silu_backward) \
  X(conv3x3_pack) X(conv3x3_scratch) X(conv3x3)
// clang-format on

namespace sr3fast::cpu {

#define SR3FAST_DECLARE_ISA(isa) \
  namespace isa {                \
  SR3FAST_DECLARE_OPS;           \
  SR3FAST_DECLARE_CONV3X3;       \
  }

#if defined(SR3FAST_X86)
SR3FAST_DECLARE_ISA(avx512)
SR3FAST_DECLARE_ISA(avx2)
#endif
SR3FAST_DECLARE_ISA(baseline)

namespace {

struct Table {
  const char* name;
#define SR3FAST_FIELD(op) decltype(&cpu::op) op;
  SR3FAST_EACH_OP(SR3FAST_FIELD)
};

#define SR3FAST_ENTRY_avx512(op) &avx512::op,
#define SR3FAST_ENTRY_avx2(op) &avx2::op,
#define SR3FAST_ENTRY_baseline(op) &baseline::op,

Table choose() {
  const char* asked = std::getenv("SR3FAST_ISA");
  const std::string name = asked ? asked : "";
#if defined(SR3FAST_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (name.empty() || name == "avx512"))
    return {"avx512", SR3FAST_EACH_OP(SR3FAST_ENTRY_avx512)};
  if (has_avx2 && (name.empty() || name == "avx2")) return {"avx2", SR3FAST_EACH_OP(SR3FAST_ENTRY_avx2)};
#endif
  if (name.empty() || name == "baseline") return {"baseline", SR3FAST_EACH_OP(SR3FAST_ENTRY_baseline)};
  throw std::invalid_argument("SR3FAST_ISA=" + name +
                              " was asked for, but this build or this machine does not have it");
}

const Table& table() {
  static const Table chosen = choose();
  return chosen;
}

}  // namespace

std::string isa() { return table().name; }

void noise(Tensor out, Seeds seed, Scalar<int64_t> step, uint32_t domain, Origin origin, Exec exec) {
  table().noise(out, seed, step, domain, origin, exec);
}

void refine(Tensor out, Tensor into, Tensor y, Tensor eps_hat, Scalar<double> alpha, Scalar<double> gamma,
            Seeds seed, Scalar<int64_t> step, Tensor z, Origin origin, Exec exec) {
  table().refine(out, into, y, eps_hat, alpha, gamma, seed, step, z, origin, exec);
}

void solver_step(Tensor out, Tensor m, Tensor into, Tensor y, Tensor eps_hat, Scalar<Row> row, Seeds seed,
                 Scalar<int64_t> step, Tensor m1, Tensor m2, Tensor z, Origin origin, Exec exec) {
  table().solver_step(out, m, into, y, eps_hat, row, seed, step, m1, m2, z, origin, exec);
}

void q_sample(Tensor out, Tensor eps_out, Tensor into, Tensor y_0, Scalar<double> gamma,
              bool gamma_per_sample, Seeds seed, Scalar<int64_t> step, Tensor eps, Origin origin, Exec exec) {
  table().q_sample(out, eps_out, into, y_0, gamma, gamma_per_sample, seed, step, eps, origin, exec);
}

void group_norm_silu(Tensor out, Tensor s, float* mean, float* rstd, const Norm& norm, Exec exec) {
  table().group_norm_silu(out, s, mean, rstd, norm, exec);
}

void group_norm_silu_backward(Tensor dh, Tensor dh2, float* dweight, float* dbias, float* dshift, Tensor grad,
                              Tensor grad_s, const float* mean, const float* rstd, const Norm& norm,
                              Exec exec) {
  table().group_norm_silu_backward(dh, dh2, dweight, dbias, dshift, grad, grad_s, mean, rstd, norm, exec);
}

void conv3x3_pack(float* packed, const float* weight, int64_t N, int64_t C, int threads) {
  table().conv3x3_pack(packed, weight, N, C, threads);
}

int64_t conv3x3_scratch(const Tensor& out, int64_t channels, int threads) {
  return table().conv3x3_scratch(out, channels, threads);
}

void conv3x3(Tensor out, Tensor h, const float* packed, const float* bias, Tensor onto, Exec exec) {
  table().conv3x3(out, h, packed, bias, onto, exec);
}

}  // namespace sr3fast::cpu
