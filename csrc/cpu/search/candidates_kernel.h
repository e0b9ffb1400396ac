// The search for neighbours in a tile's similarities, once per instruction set: included by
// sweep_kernel.h, in its namespace.

#include "pass/products_kernel.h"

// Rows of a tile that share a maximum per lane: a search looks into few of these groups.
constexpr std::int64_t kGroupRows = 12;
constexpr std::int64_t kMaxGroups = (kMaxColumnRows + kGroupRows - 1) / kGroupRows;

// Largest s of every lane, in groups[g] (lanes,) for the rows of group g and in maximum for all.
void tile_maxima(const float* s, std::int64_t rows, float (*groups)[kLanes],
                 Vector (&maximum)[kVectors]) {
  for (std::int64_t first = 0; first < rows; first += kGroupRows) {
    const std::int64_t end = smaller(first + kGroupRows, rows);
    Vector largest[kVectors];
    for (int v = 0; v < kVectors; ++v) largest[v] = load(s + first * kLanes + v * kWidth);
    for (std::int64_t j = first + 1; j < end; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        largest[v] = max(load(s + j * kLanes + v * kWidth), largest[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store(groups[first / kGroupRows] + v * kWidth, largest[v]);
      maximum[v] = first == 0 ? largest[v] : max(largest[v], maximum[v]);
    }
  }
}

// One tile at one strip.
struct Visit {
  std::int64_t strip;
  std::int64_t rows;   // queue rows in the tile
  std::int64_t first;  // the first of them
  std::int64_t tiles;  // visited before this one

  std::int64_t groups() const { return (rows + kGroupRows - 1) / kGroupRows; }
};

// count += number of s above their lane's limit.
void count_above(const float* limits, const float* s, std::int64_t rows,
                 IntVector (&count)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    const Vector limit = load(limits + v * kWidth);
    for (std::int64_t j = 0; j < rows; ++j) {
      count[v] -= (IntVector)(load(s + j * kLanes + v * kWidth) > limit);
    }
  }
}

// The largest float below x.
inline float just_below(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = x > 0.0f ? bits - 1 : x < 0.0f ? bits + 1 : std::int32_t(0x80000001u);
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// The k-th largest of a lane's group maxima, k <= groups: k of its s are at least as large.
float kth_group_maximum(const float (*groups)[kLanes], std::int64_t num_groups, int lane,
                        std::int64_t k) {
  float sorted[kMaxGroups];
  for (std::int64_t g = 0; g < num_groups; ++g) {
    std::int64_t place = g;
    for (; place > 0 && sorted[place - 1] < groups[g][lane]; --place) {
      sorted[place] = sorted[place - 1];
    }
    sorted[place] = groups[g][lane];
  }
  return sorted[k - 1];
}

// Some s of the group are above their lane's threshold.
inline bool group_exceeds(const float* maxima, const float* threshold) {
  bool some = false;
  for (int v = 0; v < kVectors; ++v) {
    some |= any_greater(load(maxima + v * kWidth), load(threshold + v * kWidth));
  }
  return some;
}

// Rare: enters the s above their lane's threshold into the lists.
void collect(const NeighborLists& lists, const Visit& visit, const float* s,
             const float (*groups)[kLanes]) {
  const std::int64_t start = visit.strip * kLanes, num_groups = visit.groups();
  float threshold[kLanes];
  for (int v = 0; v < kVectors; ++v) {
    store(threshold + v * kWidth, load(lists.threshold + start + v * kWidth));
  }
  IntVector above[kVectors] = {};
  for (std::int64_t g = 0; g < num_groups; ++g) {
    if (!group_exceeds(groups[g], threshold)) continue;
    const std::int64_t j = g * kGroupRows;
    count_above(threshold, s + j * kLanes, smaller(kGroupRows, visit.rows - j), above);
  }
  // Of more than k candidates in one tile not all are needed: most at the start of a queue, or all
  // along one in ascending order.
  for (int lane = 0; lane < kLanes; ++lane) {
    if (above[lane / kWidth][lane % kWidth] <= lists.k) continue;
    if (lists.k <= num_groups) {
      const float bound = kth_group_maximum(groups, num_groups, lane, lists.k);
      if (bound > threshold[lane]) threshold[lane] = just_below(bound);
    } else {
      push_best(lists, start + lane, {s + lane, kLanes, visit.rows, visit.first});
      threshold[lane] = __builtin_inff();  // this lane is done
    }
  }
  for (std::int64_t g = 0; g < num_groups; ++g) {
    if (!group_exceeds(groups[g], threshold)) continue;
    const std::int64_t end = smaller((g + 1) * kGroupRows, visit.rows);
    for (std::int64_t j = g * kGroupRows; j < end; ++j) {
      for (int v = 0; v < kVectors; ++v) {
        const float* x = s + j * kLanes + v * kWidth;
        unsigned lanes = greater_lanes(load(x), load(threshold + v * kWidth));
        for (; lanes != 0; lanes &= lanes - 1) {
          const int i = __builtin_ctz(lanes);
          const std::int64_t row = start + v * kWidth + i;
          push(lists, row, x[i], visit.first + j);
          float& limit = threshold[v * kWidth + i];
          if (lists.threshold[row] > limit) limit = lists.threshold[row];
        }
      }
    }
  }
}
