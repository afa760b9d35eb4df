// ivl's parallel loops run on torch's own thread pool, so they obey torch.set_num_threads.
#include <torch/csrc/stable/ops.h>

#include "ivl/parallel.h"

namespace ivl {

void parallel_ranges(int64_t n, int64_t grain, RangeFunction f, void* context) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { f(begin, end, context); });
}

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace ivl
