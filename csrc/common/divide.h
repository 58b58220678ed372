// Division of 31-bit numbers by a divisor that is known when the kernel is launched: a multiplication and a
// shift (Granlund and Montgomery 1994), where the machine's own division takes some 20 instructions.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace sr3fast {

struct Divide {
  uint32_t divisor = 1, magic = 1, shift = 0;

  Divide() = default;
  explicit Divide(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }

  // n < 2^31
  SR3FAST_HD uint32_t quotient(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    return (__umulhi(n, magic) + n) >> shift;
#else
    return (static_cast<uint32_t>((static_cast<uint64_t>(n) * magic) >> 32) + n) >> shift;
#endif
  }
};

}  // namespace sr3fast
