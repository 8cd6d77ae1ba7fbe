#include "squeeze_excitation/launch.cuh"

namespace dwswap {

cudaError_t launch_squeeze_excitation(const SqueezeExcitationParams& params,
                                      const ExcitationCut& cut, cudaStream_t stream) {
  return visit_fast_type(params.dtype, [&]<typename T>() {
    return launch_squeeze_excitation_of<T>(params, cut, stream);
  });
}

}  // namespace dwswap
