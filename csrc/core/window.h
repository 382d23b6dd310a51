// Index arithmetic of sliding windows, shared by every kernel.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace cotnet {

COTNET_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Output size of a window of `kernel` taps, as torch.nn.functional.unfold counts it; may come out <= 0.
COTNET_HD inline int64_t output_size(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t span = in + 2 * padding - dilation * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

// Position `i` mirrored at the borders without repeating them: -1 -> 1, size -> size - 2.
// One reflection is enough because reflect padding must be smaller than the map.
COTNET_HD inline int64_t reflected(int64_t i, int64_t size) {
  if (i < 0) i = -i;
  return i < size ? i : 2 * (size - 1) - i;
}

// Row of the output that reads input row `z - padding` through some tap, when output rows lie `stride` apart:
// z / stride if that is a row, otherwise -1.
COTNET_HD inline int64_t output_of(int64_t z, int64_t stride, int64_t out) {
  if (z < 0 || z % stride != 0) return -1;
  const int64_t i = z / stride;
  return i < out ? i : -1;
}

}  // namespace cotnet
