// Choices that take longer than a launch are made once per problem.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <shared_mutex>

namespace dwswap {

// The value of `key`, computed on its first use; for all threads. Each call in the source has
// values of its own. Keys are compared with `<`.
template <typename Key, typename Compute>
auto memoized(const Key& key, Compute&& compute) {
#ifdef DWSWAP_EXPLORE
  return compute();  // what a search finds changes: see search.h
#else
  constexpr size_t kMost = 4096;  // problems of changing size must not fill the memory
  static std::map<Key, decltype(compute())> known;
  static std::shared_mutex mutex;
  {
    const std::shared_lock lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
  }
  const auto value = compute();  // twice where two threads ask at once
  const std::unique_lock lock(mutex);
  if (known.size() == kMost) known.clear();
  return known.emplace(key, value).first->second;
#endif
}

}  // namespace dwswap
