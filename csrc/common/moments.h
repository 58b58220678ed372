// Count, mean and M2 (the sum of squared distances from the mean), merged by Chan's formula (Chan, Golub and
// LeVeque 1983): exact bookkeeping where E[h^2] - E[h]^2 loses the variance of data with a large mean.
#pragma once

#include <cmath>

#include "tensor.h"

namespace sr3fast {

struct Moments {
  float count = 0.0f, mean = 0.0f, m2 = 0.0f;

  SR3FAST_HD void merge(const Moments& other) {
    const float total = count + other.count;
    if (other.count == 0.0f) return;
    const float delta = other.mean - mean, share = other.count / total;
    mean = mean + delta * share;
    m2 = m2 + other.m2 + delta * delta * (count * share);
    count = total;
  }
  SR3FAST_HD float rstd(double eps) const {
    return static_cast<float>(1.0 / sqrt(static_cast<double>(m2) / static_cast<double>(count) + eps));
  }
};

}  // namespace sr3fast
