// From a tensor's dtype to a template argument.
#pragma once

#include "core/types.h"
#include "host/checks.h"

namespace cotnet {

template <class T>
struct TypeTag {
  using type = T;
};

// body(TypeTag<scalar_t>{}) for the dtype of a checked tensor.
template <class Body>
void dispatch_dtype(const Tensor& tensor, Body&& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return body(TypeTag<double>{});
    case ScalarType::Float: return body(TypeTag<float>{});
    case ScalarType::Half: return body(TypeTag<Half>{});
    default: return body(TypeTag<BFloat16>{});
  }
}

}  // namespace cotnet
