// Long sums of one order: in a thread, then over the threads of a block.
#pragma once

#include "cuda/device.cuh"

namespace cotnet {

// Sums a thread's terms: up to kRun of them in acc, and these runs in double, so that long sums are as exact as short ones.
template <class acc>
class LongSum {
 public:
  COTNET_DEVICE void add(acc term) {
    run_ += term;
    if (++terms_ < kRun) return;
    total_ += double(run_);
    run_ = 0;
    terms_ = 0;
  }
  COTNET_DEVICE double total() const { return total_ + double(run_); }

 private:
  static constexpr int kRun = 128;
  acc run_ = 0;
  int terms_ = 0;
  double total_ = 0;
};

// The sum over all kThreads threads of the block, for every thread: within warps, then over warps in order.
// All of them must call it; `warps` may be used again at once.
template <int kThreads>
COTNET_DEVICE double block_sum(double value, double (&warps)[kThreads / 32]) {
  for (int distance = 16; distance > 0; distance /= 2) value += shuffle_xor(kAllLanes, value, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  sync_block();
  double sum = 0;
  for (int i = 0; i < kThreads / 32; ++i) sum += warps[i];
  sync_block();
  return sum;
}

}  // namespace cotnet
