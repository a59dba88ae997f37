// Runs a package of fusedres.export_cpp without Python: one batch, and of each of its outputs the sum.
//
//     serve LIBRARY PACKAGE BATCH CHANNELS HEIGHT WIDTH
//
// LIBRARY is what fusedres.library_path() says. docs/guide.md has the commands that build and run this.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <exception>

namespace {

// In the place of images: the same numbers as in package.py, and in the memory format of its example.
at::Tensor images(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return at::linspace(-1, 1, batch * channels * height * width)
      .reshape({batch, channels, height, width})
      .contiguous(at::MemoryFormat::ChannelsLast);
}

void serve(const char* package, const at::Tensor& batch) {
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader loader(package);
  const at::Tensor sums = loader.run({batch})[0].to(at::kDouble).flatten(1).sum(1);
  for (int64_t i = 0; i < sums.size(0); ++i) std::printf("image %d: %.9g\n", int(i), sums[i].item<double>());
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 7) {
    std::fprintf(stderr, "usage: %s LIBRARY PACKAGE BATCH CHANNELS HEIGHT WIDTH\n", arguments[0]);
    return 2;
  }
  // registers the operators that the package calls
  if (dlopen(arguments[1], RTLD_NOW) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  try {
    serve(arguments[2],
          images(std::atoi(arguments[3]), std::atoi(arguments[4]), std::atoi(arguments[5]), std::atoi(arguments[6])));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
