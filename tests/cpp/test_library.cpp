// A C++ program that links the library and calls an operator through PyTorch's dispatcher.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>
#include <vector>

#include "check.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace boxed = torch::stable::detail;

namespace {

// With a 1x1 window, y[n, c, i, j] = w[n, 0, c % Cw, 0, i, j] * x[n, c, i, j].
void test_local_aggregation() {
  const Tensor x = torch::stable::full({1, 4, 3, 5}, 2.0, ScalarType::Float);
  const Tensor w = torch::stable::full({1, 1, 2, 1, 3, 5}, 0.25, ScalarType::Float);
  const std::vector<int64_t> ones{1, 1}, zeros{0, 0};
  std::array<StableIValue, 7> stack{boxed::from(x),    boxed::from(w),     boxed::from(ones),
                                    boxed::from(ones), boxed::from(zeros), boxed::from(ones),
                                    boxed::from(std::string("zeros"))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("cotnet_ext::local_aggregation", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor y = boxed::to<Tensor>(stack[0]);
  CHECK_EQ(y.numel(), 4 * 3 * 5);
  const float* values = y.const_data_ptr<float>();
  for (int64_t i = 0; i < y.numel(); ++i) CHECK_EQ(values[i], 0.5f);
}

}  // namespace

int main() {
  test_local_aggregation();
  return report();
}
