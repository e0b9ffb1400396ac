#include "neighbors.h"

#include <algorithm>
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

std::int64_t sort_best(Neighbor* items, std::int64_t count, std::int64_t k) {
  const std::int64_t kept = std::min(k, count);
  if (kept < count) std::nth_element(items, items + kept, items + count, is_better);
  std::sort(items, items + kept, is_better);
  return kept;
}

}  // namespace softcl::cpu
