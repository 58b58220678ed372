// The engine's own convolution on a CPU: no op with homes, so it stands beside them.
#pragma once

#include "../common/ops.h"

#define SR3FAST_DECLARE_CONV3X3                                                                        \
  /* weight [N, C, 3, 3] as conv3x3 reads it: packed [ceil(N / 32), 36, C, 32] */                      \
  void conv3x3_pack(float* packed, const float* weight, int64_t N, int64_t C, int threads);            \
  /* floats of exec.scratch for `channels` of h */                                                     \
  int64_t conv3x3_scratch(const Tensor& out, int64_t channels, int threads);                           \
  /* out = weight * h + bias + onto, float32, channels_last, padding 1; bias [N] and onto may be null, \
     onto may be out */                                                                                \
  void conv3x3(Tensor out, Tensor h, const float* packed, const float* bias, Tensor onto, Exec)

namespace sr3fast::cpu {
SR3FAST_DECLARE_CONV3X3;
}
