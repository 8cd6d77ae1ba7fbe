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

#include <optional>

namespace dwswap::autograd {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// The operator of that name; the lookup takes a lock.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

// The dtypes of a backward are those of its forward, whatever region it is called in.
class WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard_{c10::autocast_dispatch_keyset};
};

// Whether a backward with `grad` is differentiated or mapped itself, for which kernels have no
// rules: by create_graph, a transform of functorch, or is_grads_batched.
inline bool is_transformed(const Tensor& grad) {
  const c10::DispatchKeySet active = c10::impl::tls_local_dispatch_key_set().included_;
  return at::GradMode::is_enabled() ||
         active.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         active.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         grad.key_set().has(c10::DispatchKey::Batched);
}

}  // namespace dwswap::autograd
