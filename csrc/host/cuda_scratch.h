// Memory for the kernels of one call, from PyTorch's allocator: it may be used again by whatever the stream runs after them.
#pragma once

#include <vector>

#include "host/checks.h"

namespace cotnet {

// Memory for so many sums, on the device of a tensor, until this is gone.
template <class acc>
class CudaScratch {
 public:
  explicit CudaScratch(const Tensor& like) : like_(like) {}

  acc* operator()(int64_t count) const {
    held_.push_back(empty_vector(like_, {count}, sizeof(acc) == 8 ? ScalarType::Double : ScalarType::Float));
    return mutable_data<acc>(held_.back());
  }

 private:
  const Tensor& like_;
  mutable std::vector<Tensor> held_;
};

}  // namespace cotnet
