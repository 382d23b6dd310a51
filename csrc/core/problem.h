// What a kernel is asked to do, as plain numbers: sizes, window, layout. Built once in host/checks.cpp.
//
//     y[n, g*C + c, i, j] = sum over (u, v) of
//         w[n, g, c % Cw, u*kw + v, i, j] * x[n, c, i*sh - ph + u*dh, j*sw - pw + v*dw]
//
// Names: N batch, C channels, G heads, Cw weight channels, K = kh*kw taps, H x W input map, Ho x Wo output map.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace cotnet {

// Kernel, stride, padding and dilation along one axis of the map, with the sizes on both sides of it.
struct Axis {
  int64_t in;        // H or W
  int64_t out;       // Ho or Wo
  int64_t kernel;    // taps
  int64_t stride;
  int64_t padding;
  int64_t dilation;

  // Input position that tap `u` reads for output position `i`, before padding is applied.
  COTNET_HD int64_t source(int64_t i, int64_t u) const { return i * stride - padding + u * dilation; }
  // Distance between the first and the last tap.
  COTNET_HD int64_t extent() const { return (kernel - 1) * dilation; }
};

struct AggregationProblem {
  int64_t batch;            // N
  int64_t channels;         // C
  int64_t heads;            // G
  int64_t weight_channels;  // Cw
  Axis rows;                // kh, sh, ph, dh
  Axis cols;                // kw, sw, pw, dw
  bool reflect;             // padding mode: reflected input instead of zeros
  bool channels_last;       // every tensor is NHWC (weights: N, Ho, Wo, G*Cw*K) instead of NCHW
  bool tap_major = false;   // weights of channels_last maps with one head are N, Ho, Wo, K, Cw instead (CUDA)

  COTNET_HD int64_t taps() const { return rows.kernel * cols.kernel; }
  // Channels that share one weight channel: c = m, m + Cw, m + 2*Cw, ... (interleaved, as in CoTNet and SAN).
  COTNET_HD int64_t sharing() const { return channels / weight_channels; }
  // Index of one image's weight channel in [N, G, Cw].
  COTNET_HD int64_t group(int64_t n, int64_t g, int64_t m) const { return (n * heads + g) * weight_channels + m; }
  COTNET_HD int64_t in_plane() const { return rows.in * cols.in; }
  COTNET_HD int64_t out_plane() const { return rows.out * cols.out; }
};

// Softmax over the map and context fusion work on [N, C, H*W] with no window.
struct MapProblem {
  int64_t batch;
  int64_t channels;
  int64_t plane;  // H*W
  bool channels_last;
};

}  // namespace cotnet
