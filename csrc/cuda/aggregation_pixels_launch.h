// When an aggregation of channels_last maps is computed pixel by pixel, each thread from its own loads.
#pragma once

#include "core/problem.h"
#include "core/window.h"
#include "cuda/launch.h"

namespace cotnet {

// Channels of a thread that share a weight channel: what a weight is read and widened once for.
constexpr int kPixelSharers = 8;
// Threads of a block; three blocks on a multiprocessor, so that a thread may have 168 registers: 64 sums and the eight
// vectors of a tap on their way, which are 48 KB for the multiprocessor and so keep the memory of an H200 busy.
constexpr int kPixelThreads = 128;

// A thread owns one vector of 16 bytes of neighbouring weight channels at one pixel.
struct Pixels {
  int vectors = 0;      // of a pixel; 0: not possible
  int shares = 0;       // of a vector: chunks of kPixelSharers channels, or rows of taps
  int64_t threads = 0;  // with work, in all blocks
  Launch launch;

  bool possible() const { return vectors > 0; }
};

namespace pixels {

// Windows of any size, stride and dilation, on padding with zeros.
inline bool allows(const AggregationProblem& p, int element_bytes, bool aligned) {
  const auto small = [](const Axis& a) {  // what is counted in 32 bits
    return a.in < (1 << 24) && a.out < (1 << 24) && a.kernel < (1 << 12) && a.stride < (1 << 24) &&
           a.padding < (1 << 24) && a.dilation < (1 << 12);
  };
  return aligned && small(p.rows) && small(p.cols) && !p.reflect && p.channels_last && p.heads == 1 && p.batch > 0 &&
         element_bytes <= 4 && p.weight_channels * element_bytes % 16 == 0 && p.weight_channels < (1 << 24) &&
         p.sharing() < (1 << 16);
}

inline Pixels cover(const AggregationProblem& p, int element_bytes, int64_t plane, int64_t shares) {
  Pixels t;
  t.threads = p.batch * plane * shares * (p.weight_channels * element_bytes / 16);
  const int64_t blocks = ceil_div(t.threads, kPixelThreads);
  if (blocks == 0 || blocks > (int64_t(1) << 31) - 1) return t;
  t.vectors = int(p.weight_channels * element_bytes / 16);
  t.shares = int(shares);
  t.launch.grid_x = unsigned(blocks);
  t.launch.threads = kPixelThreads;
  return t;
}

}  // namespace pixels

// mirrored: the gradient of the input.
inline Pixels choose_aggregation_pixels(const AggregationProblem& p, int element_bytes, bool aligned, bool mirrored) {
  if (!pixels::allows(p, element_bytes, aligned) || p.sharing() % kPixelSharers != 0) return Pixels{};
  return pixels::cover(p, element_bytes, mirrored ? p.in_plane() : p.out_plane(), p.sharing() / kPixelSharers);
}

// The gradient of the weights, for rows of so many taps as kernels are compiled for.
inline Pixels choose_aggregation_pixels_grad_weight(const AggregationProblem& p, int element_bytes, bool aligned) {
  if (!pixels::allows(p, element_bytes, aligned) || (p.cols.kernel != 5 && p.cols.kernel != 7)) return Pixels{};
  return pixels::cover(p, element_bytes, p.out_plane(), p.rows.kernel);
}

}  // namespace cotnet
