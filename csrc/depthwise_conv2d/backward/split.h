// How the columns of grad_output are divided among the threads that sum them up.
#pragma once

#include <cstdint>

namespace dwswap {

// Threads walk down columns (of one or more pixels), or strips of them.
struct Walks {
  int64_t columns;    // of all images, for a thread each
  int64_t height;     // rows of grad_output
  int64_t more_rows;  // that a walk takes beyond its own
  int64_t walkers;    // threads of a block with columns of their own
  int64_t blocks;     // with the same columns: they have other channels
  int64_t resident;   // blocks on all multiprocessors at once
  int64_t reduction;  // rows that could be walked in the time of a second kernel
  // Percent of the resident blocks with which a kernel is as fast as with all.
  int64_t enough_blocks;
};

struct Split {
  int64_t rows;    // of grad_output, per strip
  int64_t share;   // strips of a block
  int64_t shares;  // blocks that share all strips; none is empty
};

// Strips that a column may be cut into.
int64_t most_strips(const Walks& walks);
// The split that takes the least time by a simple estimate, in rows that are walked.
struct BestSplit {
  Split split;
  double time;
};
BestSplit search_shares(const Walks& walks, int64_t strips);
// The same of any number of strips; searched once per problem.
Split choose_split(const Walks& walks);

}  // namespace dwswap
