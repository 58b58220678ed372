// The contract of both C++ homes: namespace sr3fast::cpu and sr3fast::cuda declare the same functions.
// ops.py has checked every argument; outputs are dense in NCHW or channels_last, as y (or h) is.
#pragma once

#include "row.h"
#include "tensor.h"

namespace sr3fast {

// Where and how to run: threads on a CPU; the device's index and its current stream on a GPU.
struct Exec {
  int threads = 1;
  int device = 0;
  void* stream = nullptr;
  void* scratch = nullptr;  // cuda::scratch_bytes, for the norms; cpu::conv3x3_scratch floats
};

// Optional parts of a norm's input: s = h (++ h2) + shift (+ residual).
struct Norm {
  Tensor h, h2;         // [B, C1, H, W], [B, C2, H, W] or null: read as their concatenation
  Tensor residual;      // [B, C, H, W] or null
  Vector weight, bias;  // [C]
  Vector shift;         // [B, C] or null
  int64_t groups;
  double eps;
  bool silu;
};

#define SR3FAST_DECLARE_OPS                                                                                  \
  void noise(Tensor out, Seeds seed, Scalar<int64_t> step, uint32_t domain, Origin origin, Exec);            \
  /* the paper's step: alpha, gamma in place of a row */                                                     \
  void refine(Tensor out, Tensor into, Tensor y, Tensor eps_hat, Scalar<double> alpha, Scalar<double> gamma, \
              Seeds seed, Scalar<int64_t> step, Tensor z, Origin origin, Exec);                              \
  /* m may be null: not stored; m1, m2, z, into may be null */                                               \
  void solver_step(Tensor out, Tensor m, Tensor into, Tensor y, Tensor eps_hat, Scalar<Row> row, Seeds seed, \
                   Scalar<int64_t> step, Tensor m1, Tensor m2, Tensor z, Origin origin, Exec);               \
  /* gamma: one number or [B]; eps given, or drawn and stored in eps_out where that is not null */           \
  void q_sample(Tensor out, Tensor eps_out, Tensor into, Tensor y_0, Scalar<double> gamma,                   \
                bool gamma_per_sample, Seeds seed, Scalar<int64_t> step, Tensor eps, Origin origin, Exec);   \
  /* s (null unless a residual is given) receives the sum; mean, rstd: float32 [B, groups] */                \
  void group_norm_silu(Tensor out, Tensor s, float* mean, float* rstd, const Norm& norm, Exec);              \
  /* dh, dh2 may hold grad_s added; dweight, dbias float32 [C]; dshift float32 [B, C] or null */             \
  void group_norm_silu_backward(Tensor dh, Tensor dh2, float* dweight, float* dbias, float* dshift,          \
                                Tensor grad, Tensor grad_s, const float* mean, const float* rstd,            \
                                const Norm& norm, Exec)

namespace cpu {
SR3FAST_DECLARE_OPS;
}

namespace cuda {
SR3FAST_DECLARE_OPS;
}

}  // namespace sr3fast
