// Memory for the kernels of one call, poisoned: the caching allocator hands out memory with anything in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

namespace cotnet::bindings {

template <class acc>
class PoisonedScratch {
 public:
  acc* operator()(int64_t count) const {
    held_.push_back(std::make_unique<std::vector<acc>>(size_t(count), std::numeric_limits<acc>::quiet_NaN()));
    return held_.back()->data();
  }

 private:
  mutable std::vector<std::unique_ptr<std::vector<acc>>> held_;
};

}  // namespace cotnet::bindings
