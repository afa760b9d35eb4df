// Threads for the CPU kernels. The library that links them decides where they come from (here: torch's pool).
#pragma once

#include <algorithm>
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

}  // namespace ivl
