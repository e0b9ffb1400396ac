// The nearest rows of every vector, collected while their similarities stream past.
//
// A list holds up to 2k candidates. A candidate enters if its value is above the list's threshold;
// when the list is full it is cut to its k best or a few more, and the threshold rises to below the
// worst of them. So a list is visited about 1.4 k ln(K/k) times on a queue in random order,
// whatever k is, and each visit costs O(1) amortised; on a queue in ascending order it is visited K
// times.
//
// Queue rows arrive in ascending order, so a later equal value need not enter: among equal values
// the lowest row wins.

#pragma once

#include <cstdint>

namespace softcl::cpu {

struct Neighbor {
  float value;         // v . Q_j
  std::int64_t index;  // j
};

struct NeighborLists {
  std::int64_t k = 0;             // 0: nothing is collected
  std::int64_t capacity = 0;      // of a list: min(2k, queue rows that pass by)
  float* threshold = nullptr;     // (rows,) a value must be above it to enter
  std::int64_t* count = nullptr;  // (rows,)
  Neighbor* items = nullptr;      // (rows, capacity)
};

/// Empties the lists of rows 0 .. rows - 1.
void reset(const NeighborLists& lists, std::int64_t rows);

/// Enters a candidate into the list of `row`; its value must be above the list's threshold.
void push(const NeighborLists& lists, std::int64_t row, float value, std::int64_t index);

/// One column of a tile of similarities: value i is values[i * stride], of queue row first + i.
struct Column {
  const float* values;
  std::int64_t stride;
  std::int64_t rows;  // at most kMaxColumnRows
  std::int64_t first;
};

inline constexpr std::int64_t kMaxColumnRows = 128;

/// Enters the k best values of a column, of which more than k are above the threshold of `row`.
void push_best(const NeighborLists& lists, std::int64_t row, const Column& column);

/// The best min(k, count) of `count` candidates go to the front, best first; returns their number.
std::int64_t sort_best(Neighbor* items, std::int64_t count, std::int64_t k);

}  // namespace softcl::cpu
