// Classify a picture with an AOTInductor package of dwswap.export.save(..., format="aoti").
//
//   classify PACKAGE.pt2 PICTURE.ppm [LIBRARY.so]
//
// The picture is a binary PPM of the size that the package is for, as export_and_serve.py writes
// it. A package for CUDA needs the operator library of `dwswap build --standalone -o LIBRARY.so`.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>

namespace {

// (1, 3, H, W), uint8.
at::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, largest = 0;
  file >> magic >> width >> height >> largest;
  file.get();  // the one white space before the pixels
  if (!file || magic != "P6" || largest != 255)
    throw std::runtime_error(path + " must be a binary PPM with 8 bits per sample");
  at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
  file.read(static_cast<char*>(pixels.mutable_data_ptr()), pixels.numel());
  if (!file) throw std::runtime_error(path + " ends before its last pixel");
  return pixels.permute({2, 0, 1}).unsqueeze(0);
}

// What torchvision's models take: ImageNet's mean and standard deviation, per channel.
at::Tensor normalize(const at::Tensor& pixels) {
  const at::Tensor mean = at::tensor({0.485F, 0.456F, 0.406F}).view({1, 3, 1, 1});
  const at::Tensor deviation = at::tensor({0.229F, 0.224F, 0.225F}).view({1, 3, 1, 1});
  return (pixels.to(at::kFloat) / 255 - mean) / deviation;
}

void classify(const std::string& package, const std::string& picture, const char* library) {
  if (library != nullptr && dlopen(library, RTLD_NOW | RTLD_GLOBAL) == nullptr)
    throw std::runtime_error(dlerror());
  at::globalContext().setAllowTF32CuDNN(false);  // float32 is float32
  // Compiled code takes its inputs for what the example inputs were. This lets it look.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 1);
  torch::inductor::AOTIModelPackageLoader model(package);
  auto metadata = model.get_metadata();

  at::Tensor input = normalize(read_ppm(picture)).contiguous();
  if (metadata["dwswap_dtype"] == "float16") input = input.to(at::kHalf);
  if (metadata["dwswap_dtype"] == "bfloat16") input = input.to(at::kBFloat16);
  if (metadata["AOTI_DEVICE_KEY"] == "cuda") input = input.to(at::kCUDA);

  const at::Tensor output = model.run({input}).at(0).to(at::kCPU, at::kFloat);
  const auto [probabilities, classes] = output.softmax(1).topk(5);
  for (int64_t i = 0; i < 5; ++i)
    std::printf("%ld %.4f\n", classes[0][i].item<int64_t>(), probabilities[0][i].item<double>());
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 && count != 4) {
    std::cerr << "usage: classify PACKAGE.pt2 PICTURE.ppm [LIBRARY.so]\n";
    return 2;
  }
  try {
    classify(arguments[1], arguments[2], count == 4 ? arguments[3] : nullptr);
  } catch (const c10::Error& error) {
    std::cerr << "classify: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "classify: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
