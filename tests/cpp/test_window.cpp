// Index arithmetic of sliding windows against counting by hand, over every small case.
#include "check.h"
#include "core/problem.h"
#include "core/window.h"

using namespace cotnet;

namespace {

// Windows that fit between the padded ends, found by sliding one along.
int64_t count_windows(int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                      int64_t dilation) {
  int64_t count = 0;
  while (count * stride + (kernel - 1) * dilation < in + 2 * padding) ++count;
  return count;
}

void test_output_size() {
  for (int64_t in = 1; in <= 9; ++in)
    for (int64_t kernel = 1; kernel <= 5; ++kernel)
      for (int64_t stride = 1; stride <= 4; ++stride)
        for (int64_t padding = 0; padding <= 3; ++padding)
          for (int64_t dilation = 1; dilation <= 3; ++dilation)
            CHECK_EQ(output_size(in, kernel, stride, padding, dilation),
                     count_windows(in, kernel, stride, padding, dilation));
}

void test_output_size_past_32_bits() {
  const int64_t in = int64_t(1) << 40;
  CHECK_EQ(output_size(in, 3, 1, 1, 1), in);
  CHECK_EQ(output_size(in, 3, 2, 1, 1), in / 2);
}

void test_reflected() {
  // A map 0 1 2 3 continued on both sides, ends not repeated.
  const int64_t expected[] = {3, 2, 1, 0, 1, 2, 3, 2, 1, 0};
  for (int64_t i = -3; i <= 6; ++i) CHECK_EQ(reflected(i, 4), expected[i + 3]);
}

void test_output_of() {
  // Reads of row `z` after padding: exactly the outputs whose window starts there.
  for (int64_t stride = 1; stride <= 3; ++stride)
    for (int64_t out = 1; out <= 4; ++out)
      for (int64_t z = -4; z <= 14; ++z) {
        int64_t expected = -1;
        for (int64_t i = 0; i < out; ++i)
          if (i * stride == z) expected = i;
        CHECK_EQ(output_of(z, stride, out), expected);
      }
}

void test_axis() {
  const Axis axis{/*in=*/7, /*out=*/3, /*kernel=*/3, /*stride=*/2, /*padding=*/2, /*dilation=*/3};
  CHECK_EQ(axis.source(0, 0), -2);
  CHECK_EQ(axis.source(2, 1), 2 * 2 - 2 + 3);
  CHECK_EQ(axis.extent(), 6);
}

void test_problem() {
  AggregationProblem p{};
  p.channels = 12;
  p.weight_channels = 4;
  p.rows = {8, 4, 3, 2, 1, 1};
  p.cols = {10, 5, 5, 2, 2, 1};
  CHECK_EQ(p.taps(), 15);
  CHECK_EQ(p.sharing(), 3);
  CHECK_EQ(p.in_plane(), 80);
  CHECK_EQ(p.out_plane(), 20);
}

void test_ceil_div() {
  CHECK_EQ(ceil_div(0, 4), 0);
  CHECK_EQ(ceil_div(8, 4), 2);
  CHECK_EQ(ceil_div(9, 4), 3);
}

}  // namespace

int main() {
  test_output_size();
  test_output_size_past_32_bits();
  test_reflected();
  test_output_of();
  test_axis();
  test_problem();
  test_ceil_div();
  return report();
}
