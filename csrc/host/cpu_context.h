// The CPU's twin of cuda_context.h: a call there makes nothing current and waits for nothing.
//
// Host entries, host/<op>.h, are written once for all devices: templates of a `Device`, which the file of kernels, cpu/<op>.cpp
// or cuda/<op>.cu, derives from its context and gives one member for each call of kernels.
#pragma once

#include "host/checks.h"
#include "host/parallel.h"

namespace cotnet {

struct CpuContext {
  explicit CpuContext(const Tensor&) {}

  const Parallel parallel{};
};

}  // namespace cotnet
