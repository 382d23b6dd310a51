// Where the kernels of one call run: the tensor's device made current, PyTorch's stream on it, and its numbers.
// A host entry makes one first, before it allocates anything. Nothing here waits for the GPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>  // STD_CUDA_CHECK, and STD_CUDA_KERNEL_LAUNCH_CHECK for after each launch
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cuda/launch.h"

namespace cotnet {

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline DeviceNumbers read_device_numbers(int device) {
  DeviceNumbers numbers{};
  numbers.sm_count = device_attribute(cudaDevAttrMultiProcessorCount, device);
  numbers.arch = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
                 device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  numbers.shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return numbers;
}

// Read once for all devices; attributes are constants that the driver keeps on the host.
inline const DeviceNumbers& device_numbers(int device) {
  static const std::vector<DeviceNumbers> all = [] {
    int count = 0;
    STD_CUDA_CHECK(cudaGetDeviceCount(&count));
    std::vector<DeviceNumbers> numbers;
    for (int i = 0; i < count; ++i) numbers.push_back(read_device_numbers(i));
    return numbers;
  }();
  return all.at(device);
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

class CudaContext {
 public:
  explicit CudaContext(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()),
        stream(current_stream(tensor.get_device_index())),
        numbers(device_numbers(tensor.get_device_index())),
        like(tensor) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;  // first: the device is current from here to the end of the call

 public:
  const cudaStream_t stream;
  const DeviceNumbers& numbers;
  const torch::stable::Tensor& like;  // what memory for the kernels is on the device of
};

}  // namespace cotnet
