// Launches the kernels of squeeze_excitation between which the layers are matrix products.
#include "channel_means/params.h"
#include "common/integer.h"
#include "squeeze_excitation/batched.cuh"

namespace dwswap {
namespace {

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(ceil_div(threads, PlaneTile::kThreads));
}

template <typename T, int V, bool kChannelsLast>
cudaError_t scale(const SqueezeExcitationParams& p, const void* gate_inputs, cudaStream_t stream) {
  const int64_t groups = plane_groups<V, kChannelsLast>(p);
  scale_kernel<T, V, kChannelsLast>
      <<<blocks_for(groups * group_threads<kChannelsLast>(p)), PlaneTile::kThreads, 0, stream>>>(
          p, static_cast<const T*>(gate_inputs));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_means(const SqueezeExcitationParams& p, void* means, cudaStream_t stream) {
  ChannelMeansParams m{};
  static_cast<Planes&>(m) = p;
  m.input = p.input, m.means = means;
  m.activation = Activation::kNone;
  m.dtype = p.dtype, m.layout = p.layout;
  return launch_channel_means(m, stream);
}

cudaError_t launch_activation(const SqueezeExcitationParams& p, void* hidden, cudaStream_t stream) {
  if (p.activation == Activation::kNone) return cudaSuccess;
  const int64_t count = int64_t{p.batch} * p.hidden;
  return visit_fast_type(p.dtype, [&]<typename T>() {
    activate_kernel<T><<<blocks_for(count), PlaneTile::kThreads, 0, stream>>>(
        static_cast<T*>(hidden), count, p.activation);
    return cudaGetLastError();
  });
}

cudaError_t launch_scaling(const SqueezeExcitationParams& p, const void* gate_inputs,
                           cudaStream_t stream) {
  return visit_fast_type(p.dtype, [&]<typename T>() {
    constexpr int kWide = 16 / static_cast<int>(sizeof(T));
    if (p.layout == Layout::kChannelsLast) {
      return reads_vectors(p) ? scale<T, kWide, true>(p, gate_inputs, stream)
                              : scale<T, 1, true>(p, gate_inputs, stream);
    }
    return reads_vectors(p) ? scale<T, kWide, false>(p, gate_inputs, stream)
                            : scale<T, 1, false>(p, gate_inputs, stream);
  });
}

}  // namespace dwswap
