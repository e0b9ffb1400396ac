#include "search/neighbors.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace softcl::cpu {

namespace {

// A strict total order (no two candidates of a row share an index, and NaN never enters).
struct IsBetter {
  bool operator()(const Neighbor& a, const Neighbor& b) const {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
  }
};

constexpr std::int64_t kMaxBisected = 2048;
constexpr int kBisections = 16;

// A value that at least k of the `count` candidates exceed, and at most k + k / 8, found by
// counting: some passes of compares without a branch, where a selection would mispredict at every
// candidate. False if the bisection does not come to one, as with many equal values.
bool bisect(const Neighbor* items, std::int64_t count, std::int64_t k, float& bound) {
  if (count > kMaxBisected) return false;
  float values[kMaxBisected];
  for (std::int64_t i = 0; i < count; ++i) values[i] = items[i].value;
  float low = *std::min_element(values, values + count);
  float high = *std::max_element(values, values + count);
  for (int step = 0; step < kBisections; ++step) {
    bound = 0.5f * low + 0.5f * high;
    std::int32_t above = 0;
    for (std::int64_t i = 0; i < count; ++i) above += values[i] > bound;
    if (above >= k && above <= k + k / 8) return true;
    (above >= k ? low : high) = bound;
  }
  return false;
}

// Cuts a full list to its best, k of them or a few more, and raises the threshold accordingly.
void cut(const NeighborLists& lists, std::int64_t row, Neighbor* items, std::int64_t& count) {
  float bound;
  if (bisect(items, count, lists.k, bound)) {
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const Neighbor item = items[i];
      items[kept] = item;
      kept += item.value > bound;
    }
    count = kept;
    lists.threshold[row] = bound;
    return;
  }
  std::nth_element(items, items + (lists.k - 1), items + count, IsBetter());
  count = lists.k;
  lists.threshold[row] = items[lists.k - 1].value;
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
  if (lists.k <= kSortedNeighbors) {
    std::int64_t place = count < lists.capacity ? count++ : count - 1;
    for (; place > 0 && items[place - 1].value < value; --place) items[place] = items[place - 1];
    items[place] = {value, index};
    if (count == lists.k) lists.threshold[row] = items[count - 1].value;
    return;
  }
  items[count++] = {value, index};
  // A capacity of k or less means that every queue row fits.
  if (count == lists.capacity && lists.capacity > lists.k) cut(lists, row, items, count);
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
  if (kept < count) std::nth_element(items, items + kept, items + count, IsBetter());
  std::sort(items, items + kept, IsBetter());
  return kept;
}

}  // namespace softcl::cpu
