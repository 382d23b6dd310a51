// The table of a norm's backward: a kernel that sums up what it is made of.
#pragma once

#include "core/norm_table.h"
#include "cuda/map_sweep.cuh"

namespace cotnet {

// Gradients of weight and bias [C], and the table [5, C] for the backward: m, a, b, c, d.
template <class acc>
struct NormGradients {
  acc* table;
  acc* grad_weight;
  acc* grad_bias;
};

// A block has 8 channels, 32 bytes of a row; its threads share what there is of each in slices.
constexpr int kTableThreads = 512;
constexpr int kTableChannels = 8;
constexpr int kTableSlices = kTableThreads / kTableChannels;
inline Launch choose_tables(int64_t channels) {
  Launch launch;
  launch.threads = kTableThreads;
  launch.grid_x = unsigned(ceil_div(channels, kTableChannels));
  return launch;
}

// The channel and the slice of a thread.
struct TablePlace {
  int lane, slice;
  int64_t channel;

  COTNET_DEVICE TablePlace()
      : lane(int(threadIdx.x) % kTableChannels),
        slice(int(threadIdx.x) / kTableChannels),
        channel(int64_t(blockIdx.x) * kTableChannels + lane) {}
};

// The sum over the slices of a channel, in order, for all its threads. All threads of the block must call it, with memory that
// no other call has.
constexpr int kTableMemory = kTableThreads / 32 * kTableChannels;
COTNET_DEVICE double sum_slices(double value, double* memory /* [warps, channels] */) {
  for (int d = kTableChannels; d < 32; d *= 2) value += shuffle_xor(kAllLanes, value, d);
  const int lane = int(threadIdx.x) % 32;
  if (lane < kTableChannels) memory[int(threadIdx.x) / 32 * kTableChannels + lane] = value;
  sync_block();
  double sum = 0;
  for (int i = 0; i < kTableThreads / 32; ++i) sum += memory[i * kTableChannels + lane % kTableChannels];
  return sum;
}

// What the backward sums up for an image or a chunk of a channel: grad_z, and grad_z*(x - m).
struct GradSums {
  double grad_z, with_x;
};

// `terms(part, c)` are those of a part of channel c. share: the norm's.
template <class acc, class Terms>
COTNET_KERNEL(kTableThreads, 1)
norm_table_kernel(const Terms terms, int64_t parts, int64_t channels, const NormOf<acc> norm, double share,
                  const NormGradients<acc> to) {
  COTNET_SHARED(double, memory, 2 * kTableMemory);
  const TablePlace place;
  const int64_t c = place.channel;
  double grad_z = 0, with_x = 0;
  if (c < channels) {
    COTNET_UNROLL_BY(4)
    for (int64_t part = place.slice; part < parts; part += kTableSlices) {
      const GradSums next = terms(part, c, channels);
      grad_z += next.grad_z;
      with_x += next.with_x;
    }
  }
  grad_z = sum_slices(grad_z, memory);
  with_x = sum_slices(with_x, memory + kTableMemory);
  if (place.slice > 0 || c >= channels) return;
  const NormColumn<acc> column(grad_z, with_x, double(load_wide(norm.factor + c)), share);
  for (int row = 0; row < 3; ++row) store_narrow(to.table + row * channels + c, load_wide(norm.table + row * channels + c));
  store_narrow(to.table + 3 * channels + c, column.c);
  store_narrow(to.table + 4 * channels + c, column.d);
  store_narrow(to.grad_weight + c, column.grad_weight);
  store_narrow(to.grad_bias + c, column.grad_bias);
}

template <class acc, class Terms>
void launch_norm_table(const MapProblem& p, int64_t parts, const Terms& terms, const NormOf<acc>& norm,
                       const NormGradients<acc>& to, Stream stream) {
  launch_kernel(norm_table_kernel<acc, Terms>, choose_tables(p.channels), stream, terms, parts, p.channels, norm, norm.share(p),
                to);
}

}  // namespace cotnet
