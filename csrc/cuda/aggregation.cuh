// Aggregations of every shape: any kernel, stride, dilation, padding, heads, sharing, dtype and layout, on maps of any size.
// Fast paths are for what is common; this is for everything. A thread owns one position and up to kChannels channels that
// share a weight channel, so that a weight is read once for all of them. Nothing is shared between threads: sums have one
// order, and no gradient needs atomics.
#pragma once

#include <algorithm>

#include "core/problem.h"
#include "cuda/tails.cuh"
#include "cuda/weights.cuh"

namespace cotnet {

// Channels of a thread: CoTNet shares a weight among 8.
constexpr int kChannels = 8;
// Threads of a block. Any multiple of 32 would do: blocks share nothing.
constexpr int kAnyThreads = 256;

// Elements between neighbours of a map [N, channels, positions].
struct MapStrides {
  int64_t image, channel, position;
};

inline COTNET_HD MapStrides map_strides(int64_t channels, int64_t plane, bool channels_last) {
  if (channels_last) return {channels * plane, 1, channels};
  return {channels * plane, plane, 1};
}

inline WeightStrides weight_strides(const AggregationProblem& p) {
  const int64_t taps = p.taps(), plane = p.out_plane(), all = p.heads * p.weight_channels * taps;
  if (p.tap_major) return {plane * all, 1, p.weight_channels, all};
  if (p.channels_last) return {plane * all, taps, 1, all};
  return {plane * all, taps * plane, plane, 1};
}

// The remainder of `rest` by `size`; leaves the quotient in `rest`. Divisions of 64 bits take several times longer.
COTNET_DEVICE int64_t split(int64_t& rest, int64_t size) {
  if (((rest | size) >> 32) == 0) {
    const uint32_t quotient = uint32_t(rest) / uint32_t(size), remainder = uint32_t(rest) - quotient * uint32_t(size);
    rest = quotient;
    return remainder;
  }
  const int64_t quotient = rest / size, remainder = rest - quotient * size;
  rest = quotient;
  return remainder;
}

// What a thread works at. Neighbouring threads have neighbouring elements of memory: positions of a plane in NCHW, channels
// in NHWC.
struct Task {
  int64_t image, head, first_channel, position;  // first_channel: of the channels m, m + Cw, m + 2*Cw, ... its first
  int64_t weight_channel;                        // m
  int channels;                                  // how many of them
};

// `heads` and `chunks` of channels share the tasks of a position; false beyond the last task.
COTNET_DEVICE bool task_of_thread(const AggregationProblem& p, int64_t heads, int64_t chunks, int64_t plane, Task& task) {
  int64_t rest = int64_t(blockIdx.x) * kAnyThreads + threadIdx.x;
  if (p.channels_last) {
    task.weight_channel = split(rest, p.weight_channels);
    const int64_t chunk = split(rest, chunks);
    task.head = split(rest, heads);
    task.position = split(rest, plane);
    task.first_channel = task.weight_channel + chunk * kChannels * p.weight_channels;
    task.channels = int(p.sharing() - chunk * kChannels < kChannels ? p.sharing() - chunk * kChannels : kChannels);
  } else {
    task.position = split(rest, plane);
    task.weight_channel = split(rest, p.weight_channels);
    const int64_t chunk = split(rest, chunks);
    task.head = split(rest, heads);
    task.first_channel = task.weight_channel + chunk * kChannels * p.weight_channels;
    task.channels = int(p.sharing() - chunk * kChannels < kChannels ? p.sharing() - chunk * kChannels : kChannels);
  }
  task.image = rest;
  return rest < p.batch;
}

// Launch with a thread for each task.
inline Launch cover(int64_t tasks) {
  Launch launch;
  launch.grid_x = blocks_for(tasks, kAnyThreads);
  launch.threads = kAnyThreads;
  return launch;
}
inline int64_t channel_chunks(const AggregationProblem& p) { return ceil_div(p.sharing(), kChannels); }

// Input row (or column) that tap u reads for output row i, or -1 where there is none.
COTNET_DEVICE int64_t input_of(const Axis& axis, int64_t i, int64_t u, bool reflect) {
  const int64_t source = axis.source(i, u);
  if (reflect) return reflected(source, axis.in);
  return source >= 0 && source < axis.in ? source : -1;
}

// Places of the padded map that hold input row h: itself, and with reflection its mirror images. Finds one of the three,
// false where it is none.
COTNET_DEVICE bool image_of(const Axis& axis, int64_t h, int which, int64_t& place) {
  place = which == 0 ? h : which == 1 ? -h : 2 * (axis.in - 1) - h;
  return which == 0 || (which == 1 ? h > 0 && h <= axis.padding : h < axis.in - 1);
}

// ---- forward

// y[n, g*C + c, q] for up to kChannels channels c of one weight channel: taps in order, each weight read once.
template <class scalar_t, class Weights, class Tail>
COTNET_KERNEL(kAnyThreads, 1)
aggregation_forward_kernel(const AggregationProblem p, const Weights weights, const scalar_t* x /* [N, C, H, W] */,
                           scalar_t* y /* [N, G*C, Ho, Wo] */, const Tail tail) {
  using acc = acc_t<scalar_t>;
  Task task;
  const int64_t plane = p.out_plane(), taps = p.taps();
  if (!task_of_thread(p, p.heads, ceil_div(p.sharing(), kChannels), plane, task)) return;
  const int64_t groups = p.heads * p.weight_channels;
  const auto window = weights.open(
      {task.image, task.head * p.weight_channels + task.weight_channel, groups, task.position, plane, taps});
  const MapStrides in = map_strides(p.channels, p.in_plane(), p.channels_last);
  const MapStrides out = map_strides(p.heads * p.channels, plane, p.channels_last);
  const scalar_t* const from = x + task.image * in.image + task.first_channel * in.channel;
  const int64_t i = task.position / p.cols.out, j = task.position - i * p.cols.out;
  acc sums[kChannels] = {};
  for (int64_t u = 0; u < p.rows.kernel; ++u) {
    const int64_t h = input_of(p.rows, i, u, p.reflect);
    if (h < 0) continue;
    for (int64_t v = 0; v < p.cols.kernel; ++v) {
      const int64_t column = input_of(p.cols, j, v, p.reflect);
      if (column < 0) continue;
      const acc weight = window(u * p.cols.kernel + v);
      const scalar_t* const value = from + (h * p.cols.in + column) * in.position;
      COTNET_UNROLL
      for (int c = 0; c < kChannels; ++c)
        sums[c] = fma(weight, load_wide_if(value + c * p.weight_channels * in.channel, c < task.channels), sums[c]);
    }
  }
  const int64_t channel = task.head * p.channels + task.first_channel;
  scalar_t* const to = y + task.image * out.image + channel * out.channel + task.position * out.position;
  COTNET_UNROLL
  for (int c = 0; c < kChannels; ++c)
    if (c < task.channels)
      store_narrow(to + c * p.weight_channels * out.channel, tail.of(channel + c * p.weight_channels)(sums[c]));
}

// ---- gradient of the input

// grad_x[n, c, h, w] for up to kChannels channels: gathers from every output whose window reads this position, over heads,
// images of the position, and taps, in this order.
template <class scalar_t, class Weights>
COTNET_KERNEL(kAnyThreads, 1)
aggregation_grad_input_kernel(const AggregationProblem p, const Weights weights, const scalar_t* grad_y /* [N, G*C, Ho, Wo] */,
                              scalar_t* grad_x /* [N, C, H, W] */) {
  using acc = acc_t<scalar_t>;
  Task task;
  if (!task_of_thread(p, 1, ceil_div(p.sharing(), kChannels), p.in_plane(), task)) return;
  const int64_t plane = p.out_plane(), groups = p.heads * p.weight_channels;
  const MapStrides in = map_strides(p.channels, p.in_plane(), p.channels_last);
  const MapStrides out = map_strides(p.heads * p.channels, plane, p.channels_last);
  const int64_t h = task.position / p.cols.in;
  const int64_t column = task.position - h * p.cols.in;
  const int images = p.reflect ? 3 : 1;
  acc sums[kChannels] = {};
  const auto add_window = [&](int64_t head, int64_t i, int64_t j, int64_t tap) {
    const int64_t position = i * p.cols.out + j;
    const acc weight = weights.open({task.image, head * p.weight_channels + task.weight_channel, groups, position, plane,
                                     p.taps()})(tap);
    const scalar_t* const from =
        grad_y + task.image * out.image + (head * p.channels + task.first_channel) * out.channel + position * out.position;
    COTNET_UNROLL
    for (int c = 0; c < kChannels; ++c)
      sums[c] = fma(weight, load_wide_if(from + c * p.weight_channels * out.channel, c < task.channels), sums[c]);
  };
  for (int64_t head = 0; head < p.heads; ++head)
    for (int64_t a = 0, row; a < images; ++a) {
      if (!image_of(p.rows, h, int(a), row)) continue;
      for (int64_t u = 0; u < p.rows.kernel; ++u) {
        const int64_t i = output_of(row + p.rows.padding - u * p.rows.dilation, p.rows.stride, p.rows.out);
        if (i < 0) continue;
        for (int64_t b = 0, col; b < images; ++b) {
          if (!image_of(p.cols, column, int(b), col)) continue;
          for (int64_t v = 0; v < p.cols.kernel; ++v) {
            const int64_t j = output_of(col + p.cols.padding - v * p.cols.dilation, p.cols.stride, p.cols.out);
            if (j >= 0) add_window(head, i, j, u * p.cols.kernel + v);
          }
        }
      }
    }
  scalar_t* const to = grad_x + task.image * in.image + task.first_channel * in.channel + task.position * in.position;
  COTNET_UNROLL
  for (int c = 0; c < kChannels; ++c)
    if (c < task.channels) store_narrow(to + c * p.weight_channels * in.channel, sums[c]);
}

// ---- gradient of the weights

// The gradient of the weights of one window: for a tap, the sum over the channels that share the weight of grad_y * x.
// grad_y of the first kChannels is in registers; when more share, the others are read again for each tap.
template <class scalar_t>
class WindowGradient {
 public:
  using acc = acc_t<scalar_t>;

  COTNET_DEVICE WindowGradient(const AggregationProblem& p, int64_t image, int64_t head, int64_t weight_channel,
                               int64_t position, const scalar_t* grad_y, const scalar_t* x)
      : p_(p), in_(map_strides(p.channels, p.in_plane(), p.channels_last)),
        out_(map_strides(p.heads * p.channels, p.out_plane(), p.channels_last)) {
    x_ = x + image * in_.image + weight_channel * in_.channel;
    grad_y_ = grad_y + image * out_.image + (head * p.channels + weight_channel) * out_.channel + position * out_.position;
    i_ = position / p.cols.out;
    j_ = position - i_ * p.cols.out;
    load(0, first_);
  }

  COTNET_DEVICE acc operator()(int64_t u, int64_t v) const {
    const int64_t h = input_of(p_.rows, i_, u, p_.reflect), column = input_of(p_.cols, j_, v, p_.reflect);
    if (h < 0 || column < 0) return 0;
    const scalar_t* const value = x_ + (h * p_.cols.in + column) * in_.position;
    acc sum = add(value, 0, first_, 0);
    for (int64_t begin = kChannels; begin < p_.sharing(); begin += kChannels) {
      acc grads[kChannels];
      load(begin, grads);
      sum = add(value, begin, grads, sum);
    }
    return sum;
  }

 private:
  COTNET_DEVICE void load(int64_t begin, acc* grads) const {
    COTNET_UNROLL
    for (int c = 0; c < kChannels; ++c)
      grads[c] = load_wide_if(grad_y_ + (begin + c) * p_.weight_channels * out_.channel, begin + c < p_.sharing());
  }
  COTNET_DEVICE acc add(const scalar_t* value, int64_t begin, const acc* grads, acc sum) const {
    COTNET_UNROLL
    for (int c = 0; c < kChannels; ++c)
      sum = fma(grads[c], load_wide_if(value + (begin + c) * p_.weight_channels * in_.channel, begin + c < p_.sharing()), sum);
    return sum;
  }

  const AggregationProblem& p_;
  MapStrides in_, out_;
  const scalar_t* x_;
  const scalar_t* grad_y_;
  int64_t i_, j_;
  acc first_[kChannels];
};

// What becomes of the gradient d of a window's weights. Sinks are asked window by window: sink.write(place, gradient).
template <class scalar_t>
struct PlainSink {
  scalar_t* grad_w;  // [N, G, Cw, K, Ho, Wo]
  WeightStrides strides;

  COTNET_DEVICE void write(const AggregationProblem& p, const WeightPlace& at, const WindowGradient<scalar_t>& gradient) const {
    scalar_t* const to = grad_w + at.offset(strides);
    for (int64_t u = 0, t = 0; u < p.rows.kernel; ++u)
      for (int64_t v = 0; v < p.cols.kernel; ++v, ++t) store_narrow(to + t * strides.tap, gradient(u, v));
  }
};

// A thread owns one window: one head, weight channel and output position.
template <class scalar_t, class Sink>
COTNET_KERNEL(kAnyThreads, 1)
aggregation_grad_weight_kernel(const AggregationProblem p, const Sink sink, const scalar_t* grad_y /* [N, G*C, Ho, Wo] */,
                               const scalar_t* x /* [N, C, H, W] */) {
  Task task;
  if (!task_of_thread(p, p.heads, 1, p.out_plane(), task)) return;
  const WindowGradient<scalar_t> gradient(p, task.image, task.head, task.weight_channel, task.position, grad_y, x);
  sink.write(p,
             {task.image, task.head * p.weight_channels + task.weight_channel, p.heads * p.weight_channels, task.position,
              p.out_plane(), p.taps()},
             gradient);
}

// ---- launches, with a thread for each task

template <class scalar_t, class Weights, class Tail = NoTail>
void launch_aggregation_forward(const AggregationProblem& p, const Weights& weights, const scalar_t* x, scalar_t* y,
                                Stream stream, const Tail& tail = {}) {
  const int64_t tasks = p.batch * p.heads * p.weight_channels * channel_chunks(p) * p.out_plane();
  launch_kernel(aggregation_forward_kernel<scalar_t, Weights, Tail>, cover(tasks), stream, p, weights, x, y, tail);
}

template <class scalar_t, class Weights>
void launch_aggregation_grad_input(const AggregationProblem& p, const Weights& weights, const scalar_t* grad_y, scalar_t* grad_x,
                                   Stream stream) {
  const int64_t tasks = p.batch * p.weight_channels * channel_chunks(p) * p.in_plane();
  launch_kernel(aggregation_grad_input_kernel<scalar_t, Weights>, cover(tasks), stream, p, weights, grad_y, grad_x);
}

template <class scalar_t, class Sink>
void launch_aggregation_grad_weight(const AggregationProblem& p, const Sink& sink, const scalar_t* grad_y, const scalar_t* x,
                                    Stream stream) {
  const int64_t tasks = p.batch * p.heads * p.weight_channels * p.out_plane();
  launch_kernel(aggregation_grad_weight_kernel<scalar_t, Sink>, cover(tasks), stream, p, sink, grad_y, x);
}

}  // namespace cotnet
