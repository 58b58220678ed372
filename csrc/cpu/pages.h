// Large outputs come fresh from the system: half of an op's time can go into 4 KB page faults.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/tensor.h"

namespace sr3fast::cpu {

// Hints that a dense tensor be backed by 2 MB pages, as far as it covers them whole. Below 32 MB malloc may
// hand out memory of its heap again, whose pages are there already or had better stay as they are.
inline __attribute__((always_inline)) void ask_for_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20, kMapped = uintptr_t{32} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.data);
  const uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * (t.dtype == Dtype::f32 ? 4 : 2);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (t && end - begin >= kMapped) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

}  // namespace sr3fast::cpu
