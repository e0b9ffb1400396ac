#include "neighbors.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace softcl::cpu {

namespace {

// A strict total order (no two candidates of a row share an index, and NaN never enters).
bool is_better(const Neighbor& a, const Neighbor& b) {
  return a.value > b.value || (a.value == b.value && a.index < b.index);
}

}  // namespace

void reset(const NeighborLists& lists, std::int64_t rows) {
  if (lists.k == 0) return;
  std::fill_n(lists.threshold, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(lists.count, rows, std::int64_t{0});
}

void push(const NeighborLists& lists, std::int64_t row, float value, std::int64_t index) {
  Neighbor* items = lists.items + row * lists.capacity;
  std::int64_t& count = lists.count[row];
  items[count++] = {value, index};
  // A capacity of k or less means that every queue row fits.
  if (count < lists.capacity || lists.capacity <= lists.k) return;
  std::nth_element(items, items + (lists.k - 1), items + count, is_better);
  count = lists.k;
  lists.threshold[row] = items[lists.k - 1].value;
}

void push_best(const NeighborLists& lists, std::int64_t row, const Column& column) {
  float values[kMaxColumnRows];
  std::int64_t above = 0;
  for (std::int64_t i = 0; i < column.rows; ++i) {
    values[above] = column.values[i * column.stride];
    above += values[above] > lists.threshold[row];
  }
  std::nth_element(values, values + (lists.k - 1), values + above, std::greater<float>());
  const float bound = values[lists.k - 1];  // reached by k values: what is below it is not needed
  for (std::int64_t i = 0; i < column.rows; ++i) {
    const float value = column.values[i * column.stride];
    // The threshold rises meanwhile. What equals it need not enter: its index is higher.
    if (value >= bound && value > lists.threshold[row]) push(lists, row, value, column.first + i);
  }
}

std::int64_t sort_best(Neighbor* items, std::int64_t count, std::int64_t k) {
  const std::int64_t kept = std::min(k, count);
  if (kept < count) std::nth_element(items, items + kept, items + count, is_better);
  std::sort(items, items + kept, is_better);
  return kept;
}

}  // namespace softcl::cpu
