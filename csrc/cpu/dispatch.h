#pragma once

#include <string>

namespace sr3fast::cpu {

// "avx512", "avx2" or "baseline"; SR3FAST_ISA forces one, and throws where it is not to be had.
std::string isa();

}  // namespace sr3fast::cpu
