// The screen's kernels, written once; screen_<isa>.cpp includes this with the macros of
// sweep_kernel.h.
//
// Tiling. As the sweep's first product: a tile of queue rows is fixed once per block of rows, and
// ROWS queue rows x lanes of sums stay in registers over the dimensions, two of them at a step.
// The largest product of every lane in such a group of rows is taken from the registers; only
// groups with one above its lane's threshold are searched.
//
// Traffic. The queue is read from memory once per block of rows, and fixed there: 4 bytes in, 2 out
// per element; a tile passes through L1 once per strip.

namespace softcl::cpu {

namespace SOFTCL_ISA {

namespace {

#include "simd.h"

constexpr int kVectors = SOFTCL_VECTORS;
constexpr int kRows = SOFTCL_ROWS;
constexpr int kLanes = kWidth * kVectors;
static_assert(kScreenTileRows % kRows == 0, "a tile must hold whole groups of rows");

// Pairs of a strip that all rows of a tile visit before the next ones: 16 KB stay in L1.
constexpr std::int64_t kPairBlock = 4096 / kLanes;
// A list that a cut leaves this full has too many near ties.
constexpr std::int64_t kFullAfterCut = 7;  // eighths
constexpr int kBisections = 24;

inline std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

inline IntVector load_ints(const std::int32_t* p) {
  return *reinterpret_cast<const IntVector*>(p);
}

inline void store_ints(std::int32_t* p, IntVector x) {
  *reinterpret_cast<IntVector*>(p) = x;
}

inline IntVector larger(IntVector x, IntVector y) {
  return x > y ? x : y;
}

inline std::int32_t fixed(float x) {
  return static_cast<std::int32_t>(__builtin_rintf(x * kFixedOne));
}

inline std::int32_t paired(std::int32_t low, std::int32_t high) {
  return (low & 0xffff) | static_cast<std::int32_t>(static_cast<std::uint32_t>(high) << 16);
}

void fix_strip(const float* strip, std::int64_t dim, std::int32_t* pairs, std::int32_t* threshold) {
  float scale[kLanes] = {};
  for (std::int64_t d = 0; d < dim; ++d) {
    for (int i = 0; i < kLanes; ++i) scale[i] += strip[d * kLanes + i] * strip[d * kLanes + i];
  }
  // A row without a direction has no nearest rows, and all its products would tie.
  for (int i = 0; i < kLanes; ++i) {
    const bool valid = scale[i] > 0.0f && scale[i] < __builtin_inff();
    scale[i] = valid ? 1.0f / __builtin_sqrtf(scale[i]) : 0.0f;
    threshold[i] = valid ? INT32_MIN : INT32_MAX;
  }
  for (std::int64_t p = 0; p < num_pairs(dim); ++p) {
    const float* low = strip + 2 * p * kLanes;
    const bool has_high = 2 * p + 1 < dim;
    for (int i = 0; i < kLanes; ++i) {
      const float high = has_high ? low[kLanes + i] * scale[i] : 0.0f;
      const bool valid = scale[i] > 0.0f;
      pairs[p * kLanes + i] = valid ? paired(fixed(low[i] * scale[i]), fixed(high)) : 0;
    }
  }
}

// Fixes queue rows into the tile and clears the rest of it. False if one is too long or not finite.
bool fix_tile(const ScreenTask& task, std::int64_t first, std::int64_t rows) {
  const std::int64_t D = task.dim, stride = pair_stride(D);
  bool good = true;
  for (std::int64_t j = 0; j < rows; ++j) {
    const std::int64_t start = (first + j) * D;
    auto* out = reinterpret_cast<std::int16_t*>(task.tile + j * stride);
    float squares = 0.0f;
    const auto fix_row = [&](const auto& element) {
      Vector sum = {};
      std::int64_t d = 0;
      for (; d + kWidth <= D; d += kWidth) {
        Vector x;
        for (int i = 0; i < kWidth; ++i) x[i] = element(d + i);
        sum += x * x;
        for (int i = 0; i < kWidth; ++i) out[d + i] = static_cast<std::int16_t>(fixed(x[i]));
      }
      for (; d < D; ++d) {
        const float x = element(d);
        squares += x * x;
        out[d] = static_cast<std::int16_t>(fixed(x));
      }
      for (int i = 0; i < kWidth; ++i) squares += sum[i];
    };
    if (task.queue_type == ElementType::kFloat32) {
      const float* row = static_cast<const float*>(task.queue) + start;
      fix_row([row](std::int64_t d) { return row[d]; });
    } else if (task.queue_type == ElementType::kBFloat16) {
      const auto* row = static_cast<const std::uint16_t*>(task.queue) + start;
      fix_row([row](std::int64_t d) { return from_bfloat16(row[d]); });
    } else {
      const auto* row = static_cast<const std::uint16_t*>(task.queue) + start;
      fix_row([row](std::int64_t d) { return from_float16(row[d]); });
    }
    if (D % 2 == 1) out[D] = 0;
    good &= squares <= kLargestNorm * kLargestNorm;  // false for NaN
  }
  const std::int64_t padded = (rows + kRows - 1) / kRows * kRows;
  for (std::int64_t j = rows; j < padded; ++j) {
    for (std::int64_t p = 0; p < num_pairs(D); ++p) task.tile[j * stride + p] = 0;
  }
  return good;
}

// out (kRows, lanes) {=, +=} tile rows . strip over `pairs` pairs; the largest of every lane.
__attribute__((always_inline)) inline void multiply_group(
    const std::int32_t* tile, std::int64_t stride, const std::int32_t* strip, std::int64_t pairs,
    bool add, std::int32_t* out, IntVector (&largest)[kVectors]) {
  IntVector sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = IntVector{};
  }
  const std::int32_t* const end = strip + pairs * kLanes;
  do {
    IntVector column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load_ints(strip + v * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const IntVector pair = tile[r * stride] - IntVector{};
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = multiply_add_pairs(sum[r][v], pair, column[v]);
      }
    }
    strip += kLanes;
    ++tile;
  } while (strip != end);
  asm volatile("" ::: "memory");  // as in the sweep: no registers are left for `out`
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      std::int32_t* p = out + r * kLanes + v * kWidth;
      const IntVector total = add ? load_ints(p) + sum[r][v] : sum[r][v];
      store_ints(p, total);
      largest[v] = r == 0 ? total : larger(total, largest[v]);
    }
  }
}

// Cuts a full list to the candidates that may still be among the k nearest: those within the margin
// of its k-th best product, or of a product that at least k exceed. False if too many are left.
bool cut(const ScreenLists& lists, std::int64_t row) {
  std::int32_t* products = lists.products + row * lists.capacity;
  std::int32_t* indices = lists.indices + row * lists.capacity;
  const std::int32_t count = lists.count[row];
  std::int32_t low = products[0], high = products[0];
  for (std::int32_t i = 1; i < count; ++i) {
    low = products[i] < low ? products[i] : low;
    high = products[i] > high ? products[i] : high;
  }
  // Invariant: at least k products are >= low. Counting has no branch that could mispredict.
  for (int step = 0; step < kBisections && low < high; ++step) {
    const auto middle = static_cast<std::int32_t>((std::int64_t{low} + high + 1) >> 1);
    std::int32_t reach = 0;
    for (std::int32_t i = 0; i < count; ++i) reach += products[i] >= middle;
    if (reach < lists.k) {
      high = middle - 1;
      continue;
    }
    low = middle;
    if (reach <= lists.k + lists.k / 16) break;
  }
  const std::int64_t bound = std::int64_t{low} - lists.margin;
  lists.threshold[row] = bound < INT32_MIN ? INT32_MIN : static_cast<std::int32_t>(bound);
  std::int32_t kept = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    const std::int32_t product = products[i], index = indices[i];
    products[kept] = product;
    indices[kept] = index;
    kept += product > lists.threshold[row];
  }
  lists.count[row] = kept;
  return 8 * kept <= kFullAfterCut * lists.capacity;
}

// Enters the products of a group of rows that are above their lane's threshold.
bool collect(const ScreenLists& lists, std::int64_t start, std::int64_t first,
             const std::int32_t* products, std::int64_t rows) {
  for (std::int64_t j = 0; j < rows; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      const std::int32_t* x = products + j * kLanes + v * kWidth;
      const std::int64_t row = start + v * kWidth;
      unsigned lanes = greater_int_lanes(load_ints(x), load_ints(lists.threshold + row));
      for (; lanes != 0; lanes &= lanes - 1) {
        const int i = __builtin_ctz(lanes);
        std::int32_t& count = lists.count[row + i];
        const std::int64_t place = (row + i) * lists.capacity + count++;
        lists.products[place] = x[i];
        lists.indices[place] = static_cast<std::int32_t>(first + j);
        if (count == lists.capacity && !cut(lists, row + i)) return false;
      }
    }
  }
  return true;
}

bool screen_tile(const ScreenTask& task, std::int64_t first, std::int64_t rows,
                 std::int64_t strip) {
  const std::int64_t pairs = num_pairs(task.dim), stride = pair_stride(task.dim);
  const std::int32_t* own = task.rows + strip * pairs * kLanes;
  for (std::int64_t block = 0; block < pairs; block += kPairBlock) {
    const std::int64_t size = smaller(kPairBlock, pairs - block);
    for (std::int64_t j = 0; j < rows; j += kRows) {
      IntVector largest[kVectors];
      std::int32_t* products = task.products + j * kLanes;
      multiply_group(task.tile + j * stride + block, stride, own + block * kLanes, size, block > 0,
                     products, largest);
      if (block + size < pairs) continue;
      bool some = false;
      for (int v = 0; v < kVectors; ++v) {
        const std::int32_t* limit = task.lists.threshold + strip * kLanes + v * kWidth;
        some |= greater_int_lanes(largest[v], load_ints(limit)) != 0;
      }
      if (some &&
          !collect(task.lists, strip * kLanes, first + j, products, smaller(kRows, rows - j))) {
        return false;
      }
    }
  }
  return true;
}

bool screen(const ScreenTask& task) {
  for (std::int64_t first = task.begin; first < task.end; first += kScreenTileRows) {
    const std::int64_t rows = smaller(kScreenTileRows, task.end - first);
    if (!fix_tile(task, first, rows)) return false;
    for (std::int64_t strip = 0; strip < task.strips; ++strip) {
      if (!screen_tile(task, first - task.begin, rows, strip)) return false;
    }
  }
  return true;
}

void compare(const float* v, const void* queue, ElementType queue_type, std::int64_t dim,
             const std::int64_t* index, std::int64_t count, float* scratch, float* out) {
  const std::int64_t row_bytes = dim * size_of(queue_type);
  const char* base = static_cast<const char*>(queue);
  for (std::int64_t i = 0; i < count; ++i) {
    const char* place = base + index[i] * row_bytes;
    if (i + 1 < count) {
      // Rows lie scattered: the first lines of the next one, and the hardware goes on from there.
      const char* next = base + index[i + 1] * row_bytes;
      for (std::int64_t b = 0; b < smaller(row_bytes, 512); b += 64) {
        __builtin_prefetch(next + b, 0, 3);
      }
    }
    const float* row = reinterpret_cast<const float*>(place);
    if (queue_type != ElementType::kFloat32) {
      for (std::int64_t d = 0; d < dim; ++d) scratch[d] = load_element(place, queue_type, d);
      row = scratch;
    }
    Vector sum[4] = {};
    std::int64_t d = 0;
    for (; d + 4 * kWidth <= dim; d += 4 * kWidth) {
      for (int s = 0; s < 4; ++s) sum[s] += load(row + d + s * kWidth) * load(v + d + s * kWidth);
    }
    for (; d + kWidth <= dim; d += kWidth) sum[0] += load(row + d) * load(v + d);
    const Vector all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    float total = 0.0f;
    for (int lane = 0; lane < kWidth; ++lane) total += all[lane];
    for (; d < dim; ++d) total += row[d] * v[d];
    out[i] = total;
  }
}

}  // namespace

}  // namespace SOFTCL_ISA

}  // namespace softcl::cpu
