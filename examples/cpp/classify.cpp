// Runs an AOTInductor package of a CoT network without Python.
//
//   classify NETWORK.pt2 IMAGES.pt
//
// The package is what `cotnet-ext export --format aoti` writes; the images are a tensor [N, 3, H, W]
// that `torch.save` wrote. Prints the best class of each image and its probability. The operators of
// the package are registered by the library `cotnet_ext`, which this program is linked with.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>

int main(int count, char** arguments) try {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s NETWORK.pt2 IMAGES.pt\n", arguments[0]);
    return 2;
  }
  std::ifstream file(arguments[2], std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const at::Tensor images = torch::jit::pickle_load(bytes).toTensor();

  torch::inductor::AOTIModelPackageLoader network(arguments[1]);
  const at::Tensor probabilities = network.run({images}).at(0).to(at::kFloat).softmax(1);

  const auto [best, classes] = probabilities.max(1);
  for (int64_t i = 0; i < images.size(0); ++i)
    std::printf("image %d: class %d, %.4f\n", int(i), int(classes[i].item<int64_t>()), best[i].item<float>());
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
