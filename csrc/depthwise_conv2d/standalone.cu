// The schema of torch.ops.dwswap.depthwise_conv2d for processes without Python. Only the library of
// `dwswap build --standalone` has this file; everywhere else dwswap/schema.py defines the operator.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

namespace dwswap {
namespace {

// A test compares it with that of Python.
constexpr const char* kSchema =
    "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, Tensor? input_bias=None, "
    "str input_activation=\"none\", str activation=\"none\") -> Tensor";

// Not STABLE_TORCH_LIBRARY: it goes on with a handle that it never got where the namespace has an
// owner, as in a process that has imported dwswap. There this schema is not needed.
class Schema {
 public:
  Schema() {
    STD_TORCH_CHECK(aoti_torch_library_init_fragment("dwswap", "standalone.cu", __LINE__,
                                                     &library_) == AOTI_TORCH_SUCCESS,
                    "dwswap: the operator library could not be registered");
    aoti_torch_library_def(library_, kSchema);
  }
  ~Schema() { aoti_torch_delete_library_object(library_); }
  Schema(const Schema&) = delete;
  Schema& operator=(const Schema&) = delete;

 private:
  TorchLibraryHandle library_ = nullptr;
};

const Schema kRegistered;

}  // namespace
}  // namespace dwswap
