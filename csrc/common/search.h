// The search for the cut of a problem: of all that are considered, the one of the least estimate.
#pragma once

#include <limits>

#ifdef DWSWAP_EXPLORE
#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <utility>
#include <vector>
#endif

namespace dwswap {

#ifndef DWSWAP_EXPLORE

template <typename Cut>
class Search {
 public:
  void consider(double estimate, const Cut& cut) {
    if (estimate < least_) least_ = estimate, best_ = cut;
  }
  // Cut{} where none was considered.
  Cut best() const { return best_; }

 private:
  double least_ = std::numeric_limits<double>::infinity();
  Cut best_{};
};

#else

// For measurements of other cuts than the best (scripts/explore_cuts.py): the one that is behind
// DWSWAP_CUT_RANK others, or the last.
template <typename Cut>
class Search {
 public:
  void consider(double estimate, const Cut& cut) { all_.emplace_back(estimate, cut); }
  Cut best() {
    if (all_.empty()) return Cut{};
    const char* rank = std::getenv("DWSWAP_CUT_RANK");
    const auto place = static_cast<size_t>(rank == nullptr ? 0 : std::atoi(rank));
    std::stable_sort(all_.begin(), all_.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    return all_[std::min(place, all_.size() - 1)].second;
  }

 private:
  std::vector<std::pair<double, Cut> > all_;
};

#endif

}  // namespace dwswap
