#include "device.h"
#include "norm.cuh"

namespace sr3fast::cuda {

int driver_version() {
  int version = 0;  // stays 0 where there is no driver
  cudaDriverGetVersion(&version);
  return version;
}

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

int64_t scratch_bytes(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return batch * channels * scratch_floats(height * width) * static_cast<int64_t>(sizeof(float));
}

}  // namespace sr3fast::cuda
