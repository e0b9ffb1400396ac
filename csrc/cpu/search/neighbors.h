// The nearest rows of every vector, collected while their similarities stream past.
//
// A candidate enters a list if its value is above the list's threshold. Up to k = kSortedNeighbors
// a list is its k best in order, and the threshold is the worst of them. Beyond, a list holds up to
// 2k candidates; when it is full it is cut to its k best or a few more, and the threshold rises to
// below the worst of them. So a list is visited between k ln(K/k) and 1.4 times as often on a queue
// in random order, and each visit costs little, whatever k is; on a queue in ascending order it is
// visited K times.
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

inline constexpr std::int64_t kSortedNeighbors = 16;

/// Candidates that a list has room for, where `rows` queue rows pass by.
inline std::int64_t list_capacity(std::int64_t k, std::int64_t rows) {
  const std::int64_t wanted = k <= kSortedNeighbors ? k : 2 * k;
  return wanted < rows ? wanted : rows;
}

struct NeighborLists {
  std::int64_t k = 0;             // 0: nothing is collected
  std::int64_t capacity = 0;      // of a list: see list_capacity
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
