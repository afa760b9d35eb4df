// Threads for the CPU kernels. The library that links them decides where they come from (here: torch's pool).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace ivl {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls f on disjoint ranges that cover [0, n); ranges have at least `grain` items but for the last.
void parallel_ranges(int64_t n, int64_t grain, RangeFunction f, void* context);
int thread_count();

template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  if (n <= grain) return f(int64_t{0}, n);
  using Body = std::remove_reference_t<F>;
  parallel_ranges(
      n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); },
      const_cast<std::remove_const_t<Body>*>(&f));
}

// task(i) for every i in [0, count), in whichever thread is free.
template <class F>
void run_tasks(int64_t count, F&& task) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(thread_count(), count), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  });
}

// The same for small tasks: task(i, then) may fetch what task `then` (count: none) of the same thread begins with.
template <class F>
void run_small_tasks(int64_t count, F&& task) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(thread_count(), count), 1, [&](int64_t, int64_t) {
    int64_t i = next.fetch_add(1, std::memory_order_relaxed);
    while (i < count) {
      const int64_t then = std::min(next.fetch_add(1, std::memory_order_relaxed), count);
      task(i, then);
      i = then;
    }
  });
}

// `panels` cut evenly into groups of at most `most` for one task each, a multiple of the threads.
struct Groups {
  int64_t panels, count;
  Groups(int64_t panels, int64_t most) : panels(panels) {
    const int64_t threads = thread_count();
    count = std::min(panels, (panels + most * threads - 1) / (most * threads) * threads);
  }
  int64_t begin(int64_t i) const { return panels * i / count; }
};

}  // namespace ivl
