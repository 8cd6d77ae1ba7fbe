// Launches the kernels of squeeze_excitation between which the layers are matrix products.
#include "common/integer.h"
#include "squeeze_excitation/batched.cuh"

namespace dwswap {
namespace {

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(ceil_div(threads, BatchedTile::kThreads));
}

// visit<T, V, kChannelsLast>(blocks) of the kernels that go over planes.
template <typename Visit>
cudaError_t visit_planes(const SqueezeExcitationParams& p, Visit&& visit) {
  return visit_fast_type(p.dtype, [&]<typename T>() {
    const auto run = [&]<int V, bool kChannelsLast>() {
      const int64_t groups = groups_of<V, kChannelsLast>(p);
      visit.template operator()<T, V, kChannelsLast>(
          blocks_for(groups * group_threads<kChannelsLast>(p)));
      return cudaGetLastError();
    };
    constexpr int kWide = 16 / static_cast<int>(sizeof(T));
    if (p.layout == Layout::kChannelsLast) {
      return reads_vectors(p) ? run.template operator()<kWide, true>()
                              : run.template operator()<1, true>();
    }
    return reads_vectors(p) ? run.template operator()<kWide, false>()
                            : run.template operator()<1, false>();
  });
}

}  // namespace

cudaError_t launch_means(const SqueezeExcitationParams& p, void* means, cudaStream_t stream) {
  return visit_planes(p, [&]<typename T, int V, bool kChannelsLast>(unsigned blocks) {
    mean_kernel<T, V, kChannelsLast>
        <<<blocks, BatchedTile::kThreads, 0, stream>>>(p, static_cast<T*>(means));
  });
}

cudaError_t launch_activation(const SqueezeExcitationParams& p, void* hidden, cudaStream_t stream) {
  if (p.activation == Activation::kNone) return cudaSuccess;
  const int64_t count = int64_t{p.batch} * p.hidden;
  return visit_fast_type(p.dtype, [&]<typename T>() {
    activate_kernel<T><<<blocks_for(count), BatchedTile::kThreads, 0, stream>>>(
        static_cast<T*>(hidden), count, p.activation);
    return cudaGetLastError();
  });
}

cudaError_t launch_scaling(const SqueezeExcitationParams& p, const void* gate_inputs,
                           cudaStream_t stream) {
  return visit_planes(p, [&]<typename T, int V, bool kChannelsLast>(unsigned blocks) {
    scale_kernel<T, V, kChannelsLast>
        <<<blocks, BatchedTile::kThreads, 0, stream>>>(p, static_cast<const T*>(gate_inputs));
  });
}

}  // namespace dwswap
