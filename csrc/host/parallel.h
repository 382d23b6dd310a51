// Hands independent tasks to PyTorch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace cotnet {

// Multiply-adds that make a thread worth waking; PyTorch's own grain for element-wise loops.
constexpr int64_t kGrainWork = 32768;

struct Parallel {
  int64_t threads() const { return torch::stable::get_num_threads(); }

  // body(begin, end) over `tasks` tasks of about `work` multiply-adds each. The body must not throw.
  template <class Body>
  void operator()(int64_t tasks, int64_t work, const Body& body) const {
    if (tasks <= 0) return;
    const int64_t grain = std::max<int64_t>(1, kGrainWork / std::max<int64_t>(1, work));
    if (tasks <= grain) return body(0, tasks);
    torch::stable::parallel_for(0, tasks, grain, body);
  }
};

}  // namespace cotnet
