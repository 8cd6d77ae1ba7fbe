// Choices that take longer than a launch are made once per problem.
#pragma once

#include <cstddef>
#include <map>

namespace dwswap {

// The value of `key`, computed on its first use in this thread. Keys are compared with `<`.
template <typename Key, typename Compute>
auto memoized(const Key& key, Compute&& compute) {
  constexpr size_t kMost = 4096;  // problems of changing size must not fill the memory
  thread_local std::map<Key, decltype(compute())> known;
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() == kMost) known.clear();
  return known.emplace(key, compute()).first->second;
}

}  // namespace dwswap
