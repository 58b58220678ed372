// Threads: as many as torch.get_num_threads(), from the OpenMP pool that torch uses.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

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

// f(rank, i) for i < n, each on whichever thread is free: cores differ in speed.
template <class F>
inline __attribute__((always_inline)) void parallel_items(int threads, int64_t n, F&& f) {
#if defined(_OPENMP)
  if (threads > 1) {
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(omp_get_thread_num(), i);
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) f(0, i);
}

// All of a team wait here for each other. OpenMP's own barrier puts a thread to sleep as soon as there are
// more threads than cores, and waking it takes longer than the work between two barriers.
class Barrier {
 public:
  explicit Barrier(int team) : team_(team) {}
  void operator()() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }

 private:
  const int team_;
  std::atomic<int> arrived_{0}, round_{0};
};

// f(rank, team, barrier) on each of `threads` threads.
template <class F>
inline __attribute__((always_inline)) void parallel_team(int threads, F&& f) {
#if defined(_OPENMP)
  if (threads > 1) {
    std::unique_ptr<Barrier> barrier;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      barrier = std::make_unique<Barrier>(omp_get_num_threads());  // which may be fewer than asked for
      f(omp_get_thread_num(), omp_get_num_threads(), *barrier);
    }
    return;
  }
#endif
  Barrier alone(1);
  f(0, 1, alone);
}

}  // namespace sr3fast::cpu
