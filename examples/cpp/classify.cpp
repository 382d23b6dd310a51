// Runs an AOTInductor package of a CoT network without Python.
//
//   classify NETWORK.pt2 IMAGES.pt [LIBRARY]
//
// The package is what `cotnet-ext export --format aoti` writes; the images are a tensor [N, 3, H, W]
// that `torch.save` wrote. LIBRARY registers the fused operators that the package calls: the file
// `_C.abi3.so` of an installed cotnet_ext, or `libcotnet_ext.so` of the CMake build. A package that
// was exported with `--decompose` needs none.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>

int main(int count, char** arguments) try {
  if (count < 3) throw std::invalid_argument("usage: classify NETWORK.pt2 IMAGES.pt [LIBRARY]");
  // Lazily: the symbols of Python that the library of the Python package names are never called.
  if (count > 3 && !dlopen(arguments[3], RTLD_LAZY)) throw std::runtime_error(dlerror());

  std::ifstream file(arguments[2], std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const at::Tensor images = torch::jit::pickle_load(bytes).toTensor();

  torch::inductor::AOTIModelPackageLoader network(arguments[1]);
  const at::Tensor logits = network.run({images}).at(0);
  const auto [best, classes] = logits.to(at::kFloat).softmax(1).max(1);
  for (int64_t i = 0; i < images.size(0); ++i)
    std::printf("image %d: class %d, %.4f\n", int(i), classes[i].item<int>(), best[i].item<float>());
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "classify: %s\n", error.what());
  return 1;
}
