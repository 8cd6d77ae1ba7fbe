// The CUDA kernels of torch.ops.dwswap._pointwise_product and _pointwise_residual_: check,
// allocate, and call torch's own matrix product, which is cuBLAS, past its dispatcher. Schemas:
// dwswap/schema.py. Everything else: dwswap/pointwise.py.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/tensor.h"

namespace dwswap {
namespace {

constexpr const char* kProduct = "dwswap._pointwise_product";
constexpr const char* kResidual = "dwswap._pointwise_residual_";

// Whether pixels are rows of one matrix: what _rows of dwswap/pointwise.py makes a view of.
bool has_rows(const Image& image) {
  const Strides& stride = image.stride;
  return stride.c == 1 && stride.h == image.w * stride.w && stride.n == image.h * stride.h &&
         suggests_channels_last(image);
}

// aten's shims do not ask what its dispatcher does.
bool is_like(const Tensor& tensor, const Tensor& input) {
  return tensor.is_cuda() && tensor.get_device_index() == input.get_device_index() &&
         tensor.scalar_type() == input.scalar_type();
}

// Whether one product is the convolution: of such an input, and a weight (K, C, 1, 1) or (K, C)
// without gaps.
bool covers(const Tensor& input, const Tensor& weight) {
  const ScalarType type = input.scalar_type();
  if (type != ScalarType::Half && type != ScalarType::BFloat16) return false;
  if (!is_like(weight, input) || input.dim() != 4 || !has_rows(Image(input))) return false;
  const auto sizes = weight.sizes(), strides = weight.strides();
  const size_t d = sizes.size();
  if (d != 2 && (d != 4 || sizes[2] != 1 || sizes[3] != 1)) return false;
  return sizes[0] > 0 && sizes[1] == input.size(1) && strides[0] == sizes[1] && strides[1] == 1;
}

// The memory of `tensor` as a matrix. A view by an operator of aten's costs a dispatch, and keeps
// account of what it is a view of.
Tensor as_matrix(const char* op, const Tensor& tensor, const int64_t (&sizes)[2],
                 const int64_t (&strides)[2]) {
  AtenTensorHandle handle = nullptr;
  DWSWAP_CHECK_IN(op,
                  aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, 0, &handle) ==
                      AOTI_TORCH_SUCCESS,
                  "no view of a tensor of shape ", shape_string(tensor));
  return Tensor(handle);
}

// (N H W, C) of what has_rows.
Tensor as_rows(const char* op, const Tensor& tensor) {
  const Image image(tensor);
  const int64_t rows = image.n * image.h * image.w;
  // aten gives the only row of a view the stride that it has where there are no gaps.
  return as_matrix(op, tensor, {rows, image.c}, {rows == 1 ? image.c : image.stride.w, 1});
}

// sums = (added, if any) + rows of input @ weight^T
void multiply(const char* op, const Tensor& input, const Tensor& weight, const Tensor* added,
              const Tensor& sums) {
  const int64_t channels = weight.size(1);
  const Tensor rows = as_rows(op, input);
  const Tensor matrix = as_matrix(op, weight, {channels, weight.size(0)}, {1, channels});
  const AOTITorchError error =
      added == nullptr
          ? aoti_torch_cuda_mm_out(sums.get(), rows.get(), matrix.get())
          : aoti_torch_cuda_addmm_out(sums.get(), added->get(), rows.get(), matrix.get(), 1, 1);
  DWSWAP_CHECK_IN(op, error == AOTI_TORCH_SUCCESS, "the matrix product failed for shapes ",
                  shape_string(input), ", ", shape_string(weight));
}

Tensor pointwise_product(const Tensor& input, const Tensor& weight,
                         const std::optional<Tensor>& bias) {
  check_cuda(kProduct, input);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const bool adds = bias.has_value();
  if (!covers(input, weight) ||
      (adds && !(bias->dim() == 1 && bias->size(0) == weight.size(0) && is_like(*bias, input))))
    return call_instead(kProduct, "dwswap::_pointwise_product_aten", "aten", input, weight, bias);

  const Image image(input);
  const int64_t outputs = weight.size(0);
  const Strides strides = dense_strides(outputs, image.h, image.w, Layout::kChannelsLast);
  const Tensor output =
      allocate_image(kProduct, "output", image.n, outputs, image.h, image.w, strides, input);
  multiply(kProduct, input, weight, adds ? &*bias : nullptr, as_rows(kProduct, output));
  return output;
}

// False where `residual` is left as it is.
bool pointwise_residual_(const Tensor& input, const Tensor& weight, const Tensor& residual) {
  check_cuda(kResidual, input);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  if (!covers(input, weight) || !is_like(residual, input) || residual.dim() != 4) return false;
  const Image image(input), target(residual);
  const bool fits = target.n == image.n && target.c == weight.size(0) && target.h == image.h &&
                    target.w == image.w;
  if (!fits || !has_rows(target)) return false;
  const Tensor sums = as_rows(kResidual, residual);
  multiply(kResidual, input, weight, &sums, sums);
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dwswap, CUDA, m) {
  m.impl("_pointwise_product", TORCH_BOX(&pointwise_product));
  m.impl("_pointwise_residual_", TORCH_BOX(&pointwise_residual_));
}

}  // namespace dwswap
