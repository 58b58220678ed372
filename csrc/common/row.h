// The update every solver shares: a row of nine numbers, and the arithmetic that both C++ homes compile.
// Compile with -ffp-contract=off and --fmad=false.
#pragma once

#include <cmath>

#include "tensor.h"

namespace sr3fast {

// m = clip(recip y - ratio f);  y' = A y + B f + C0 m + C1 m1 + C2 m2 + S z
struct Row {
  float recip, ratio, clip, a, b, c0, c1, c2, s;
};

// The paper's step (Algorithm 2, line 4) as a row.
SR3FAST_HD Row refine_row(double alpha, double gamma, int64_t step) {
  Row row{};
  row.recip = 1.0f;
  row.clip = INFINITY;
  row.a = static_cast<float>(1.0 / sqrt(alpha));
  row.b = static_cast<float>(-((1.0 - alpha) / sqrt(1.0 - gamma)) / sqrt(alpha));
  row.s = step == 1 ? 0.0f : static_cast<float>(sqrt(1.0 - alpha));
  return row;
}

// NaN stays NaN
SR3FAST_HD float estimate(const Row& row, float y, float f) {
  const float m = row.recip * y - row.ratio * f;
  return m < -row.clip ? -row.clip : (m > row.clip ? row.clip : m);
}

// A term whose coefficient is 0 is left out; the branches are uniform over a tensor.
SR3FAST_HD float update(const Row& row, float y, float f, float m, float m1, float m2, float z) {
  float out = row.a * y + row.b * f;
  if (row.c0 != 0.0f) out = out + row.c0 * m;
  if (row.c1 != 0.0f) out = out + row.c1 * m1;
  if (row.c2 != 0.0f) out = out + row.c2 * m2;
  if (row.s != 0.0f) out = out + row.s * z;
  return out;
}

// q_sample: y_t = signal y_0 + noise eps
struct Mix {
  float signal, noise;
};

SR3FAST_HD Mix q_sample_mix(double gamma) {
  return {static_cast<float>(sqrt(gamma)), static_cast<float>(sqrt(1.0 - gamma))};
}

}  // namespace sr3fast
