// The kernels of dispatch key AutogradCUDA. Calls that nothing records, as those of graphs that
// torch.compile has made, go on below it at once. What is recorded or differentiated goes to the
// kernel of every other device, which is Python: dwswap/registration.py, backward.py and
// excitation_registration.py.
#include <algorithm>

#include "autograd/node.h"

namespace dwswap::autograd {
namespace {

using c10::IValue;

// A call with `argument` is recorded, or differentiated by forward AD; or it is complex, which
// Python has other operators for.
bool is_for_python(const IValue& argument) {
  if (!argument.isTensor()) return false;
  const Tensor& tensor = argument.toTensor();
  return (tensor.requires_grad() && at::GradMode::is_enabled()) ||
         tensor._fw_grad(/*level=*/0).defined() || tensor.is_complex();
}

void call_below(const c10::OperatorHandle& op, DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  if (std::any_of(arguments.begin(), arguments.end(), is_for_python)) {
    // What has no kernel of its own for autograd has the one from Python.
    op.redispatchBoxed(DispatchKeySet(DispatchKey::AutogradOther), stack);
    return;
  }
  const at::AutoDispatchBelowAutograd below;
  with_typed_errors([&] { op.redispatchBoxed(keys & c10::after_autograd_keyset, stack); });
}

}  // namespace

TORCH_LIBRARY_IMPL(dwswap, AutogradCUDA, m) {
  for (const char* name : {"depthwise_conv2d", "_depthwise_conv2d_backward", "squeeze_excitation"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&call_below>());
}

}  // namespace dwswap::autograd
