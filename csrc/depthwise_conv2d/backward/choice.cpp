// The launch choice of the gradients: the first family that covers a problem, and suits it.
#include <cstdlib>
#include <string_view>

#include "common/check.h"
#include "depthwise_conv2d/backward/params.h"

namespace dwswap {
namespace {

bool always(const GradientParams&) { return true; }

struct Family {
  GradientChoice choice;
  bool (*covers)(const GradientParams&);
  bool (*suits)(const GradientParams&) = always;
};

int64_t no_bytes(const GradientParams&) { return 0; }

constexpr Family kInputFamilies[] = {
    {{"flipped", flipped_workspace_bytes, launch_flipped}, covers_flipped},
    {{"channel_gather", no_bytes, launch_channel_gather}, covers_channel_gather},
    {{"plane_gather", no_bytes, launch_plane_gather}, covers_plane_gather},
    {{"general", no_bytes, launch_general_gather}, always},
};
constexpr Family kWeightFamilies[] = {
    {{"pixel_sums", no_bytes, launch_pixel_sums}, covers_pixel_sums, suits_pixel_sums},
    {{"column_sums", column_sums_workspace_bytes, launch_column_sums}, covers_column_sums},
    {{"diagonal_sums", diagonal_sums_workspace_bytes, launch_diagonal_sums}, covers_diagonal_sums},
    {{"channel_sums", channel_sums_workspace_bytes, launch_channel_sums}, covers_channel_sums},
    {{"gram_sums", gram_sums_workspace_bytes, launch_gram_sums}, covers_gram_sums, suits_gram_sums},
    {{"plane_sums", plane_sums_workspace_bytes, launch_plane_sums}, covers_plane_sums},
    {{"general", general_sums_workspace_bytes, launch_general_sums}, always},
};

template <typename Families>
bool knows(const Families& families, std::string_view name) {
  for (const Family& family : families) {
    if (name == family.choice.family) return true;
  }
  return false;
}

template <typename Families>
GradientChoice choose(const Families& families, const GradientParams& p) {
  // For tests and measurements: the family that this names, where it covers the problem.
  const char* wanted = std::getenv("DWSWAP_BACKWARD_FAMILY");
  if (wanted != nullptr && *wanted != '\0') {
    DWSWAP_CHECK(knows(kInputFamilies, wanted) || knows(kWeightFamilies, wanted),
                 "DWSWAP_BACKWARD_FAMILY must name a family of kernels, got '", wanted, "'");
    for (const Family& family : families) {
      if (std::string_view(family.choice.family) == wanted && family.covers(p))
        return family.choice;
    }
  }
  const Family* family = families;
  while (!family->suits(p) || !family->covers(p)) ++family;
  return family->choice;
}

}  // namespace

GradientChoice choose_input_gradient(const GradientParams& p) { return choose(kInputFamilies, p); }

GradientChoice choose_weight_gradient(const GradientParams& p) {
  return choose(kWeightFamilies, p);
}

}  // namespace dwswap
