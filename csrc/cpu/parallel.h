// Threads: as many as torch.get_num_threads(), from the OpenMP pool that torch uses.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sr3fast::cpu {

constexpr int64_t kGrain = 8192;  // elements below which a second thread costs more than it brings

inline __attribute__((always_inline)) int threads_for(int threads, int64_t elements) {
  const int64_t most = elements / kGrain + 1;
  return threads < most ? threads : static_cast<int>(most);
}

// f(begin, end) over [0, n) in one contiguous share a thread.
template <class F>
inline __attribute__((always_inline)) void parallel_ranges(int threads, int64_t n, F&& f) {
  if (threads > n) threads = static_cast<int>(n);
#if defined(_OPENMP)
  if (threads > 1) {  // one thread opens no region: a forked worker would hang in it
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), i = omp_get_thread_num();
      f(n * i / team, n * (i + 1) / team);
    }
    return;
  }
#endif
  f(0, n);
}

// f(rank, team, barrier) on each of `threads` threads.
template <class F>
inline __attribute__((always_inline)) void parallel_team(int threads, F&& f) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      f(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
      });
    }
    return;
  }
#endif
  f(0, 1, [] {});
}

}  // namespace sr3fast::cpu
