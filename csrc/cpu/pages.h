// Large outputs: they come fresh from the system, so half of an op's time can go into 4 KB page faults, and
// no cache holds them.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/tensor.h"

namespace sr3fast::cpu {

// From here on malloc asks the system for each tensor; below, it may hand out memory of its heap again, whose
// pages are there already or had better stay as they are.
constexpr int64_t kLarge = int64_t{32} << 20;  // bytes

inline __attribute__((always_inline)) int64_t bytes(const Tensor& t) {
  return t.numel() * (t.dtype == Dtype::f32 ? 4 : 2);
}
inline __attribute__((always_inline)) bool is_large(const Tensor& t) { return t && bytes(t) >= kLarge; }

// Hints that a large dense tensor be backed by 2 MB pages, as far as it covers them whole.
inline __attribute__((always_inline)) void ask_for_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.data);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes(t)) / kPage * kPage;
  if (is_large(t)) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

}  // namespace sr3fast::cpu
