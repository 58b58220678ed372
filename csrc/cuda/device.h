// What Python asks before it offers the CUDA home, and the memory that its norms work in.
#pragma once

#include <cstdint>

namespace sr3fast::cuda {

int driver_version();   // 13000 for 13.0
int runtime_version();  // of the runtime that is linked in

// Bytes of device memory that Exec::scratch must point to for a norm of [B, C, H, W], forward or backward.
int64_t scratch_bytes(int64_t batch, int64_t channels, int64_t height, int64_t width);

}  // namespace sr3fast::cuda
