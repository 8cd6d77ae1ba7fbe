// What the nodes of graphs of autograd have in common, and all of libtorch's headers that they
// need: its stable ABI has no such graphs, and with its macro these headers refuse to be included.
// Built for one version of PyTorch, as the library is that they are part of.
#pragma once

#undef TORCH_TARGET_VERSION
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <exception>
#include <optional>
#include <string_view>
#include <utility>

namespace dwswap::autograd {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// That of a dense image.
inline at::MemoryFormat layout_of(const Tensor& image) {
  return image.is_contiguous(at::MemoryFormat::ChannelsLast) ? at::MemoryFormat::ChannelsLast
                                                             : at::MemoryFormat::Contiguous;
}

// The operator of that name; the lookup takes a lock.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

// What `run` returns. Errors of kernels are texts behind the stable ABI: running out of memory gets
// its type back, as raise_typed of dwswap/checks.py gives it.
template <typename Run>
auto with_typed_errors(const Run& run) {
  try {
    return run();
  } catch (const c10::Error&) {
    throw;
  } catch (const std::exception& error) {
    const std::string_view text = error.what();
    TORCH_CHECK_WITH(OutOfMemoryError, text.find("CUDA out of memory.") == text.npos, text);
    throw;
  }
}

// What `op` returns.
template <typename Operator, typename... Arguments>
auto call(const Operator& op, Arguments&&... arguments) {
  return with_typed_errors([&] { return op.call(std::forward<Arguments>(arguments)...); });
}

// Whether a backward with `grad` is differentiated or mapped itself, for which kernels have no
// rules: by create_graph, a transform of functorch, forward AD, or is_grads_batched.
inline bool is_transformed(const Tensor& grad) {
  const DispatchKeySet active = c10::impl::tls_local_dispatch_key_set().included_;
  return at::GradMode::is_enabled() || active.has(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         active.has(DispatchKey::FuncTorchDynamicLayerBackMode) ||
         grad.key_set().has(DispatchKey::Batched) || grad._fw_grad(/*level=*/0).defined();
}

}  // namespace dwswap::autograd
