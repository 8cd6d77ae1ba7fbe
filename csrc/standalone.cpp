// The schemas of torch.ops.dwswap for processes without Python. Only the library of
// `dwswap build --standalone` has this file; everywhere else dwswap/schema.py defines the
// operators.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

namespace dwswap {
namespace {

// The operators that graphs for inference call. A test compares them with those of Python.
constexpr const char* kSchemas[] = {
    "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, Tensor? input_bias=None, "
    "str input_activation=\"none\", str activation=\"none\") -> Tensor",
    "squeeze_excitation(Tensor input, Tensor reduce_weight, Tensor? reduce_bias, "
    "Tensor expand_weight, Tensor? expand_bias, str activation, str gate) -> Tensor",
};

// Not STABLE_TORCH_LIBRARY: it goes on with a handle that it never got where the namespace has an
// owner, as in a process that has imported dwswap. There these schemas are not needed.
class Schemas {
 public:
  Schemas() {
    STD_TORCH_CHECK(aoti_torch_library_init_fragment("dwswap", "standalone.cpp", __LINE__,
                                                     &library_) == AOTI_TORCH_SUCCESS,
                    "dwswap: the operator library could not be registered");
    for (const char* schema : kSchemas) aoti_torch_library_def(library_, schema);
  }
  ~Schemas() { aoti_torch_delete_library_object(library_); }
  Schemas(const Schemas&) = delete;
  Schemas& operator=(const Schemas&) = delete;

 private:
  TorchLibraryHandle library_ = nullptr;
};

const Schemas kRegistered;

}  // namespace
}  // namespace dwswap
