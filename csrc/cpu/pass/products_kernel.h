// The two products of a tile, once per instruction set: included by sweep_kernel.h, in its
// namespace.
//
//     S (tile_rows, lanes) = tile . strip      micro-kernel: ROWS queue rows x lanes, over D
//     O (D, lanes) += tile^T . E               micro-kernel: ROWS dimensions x lanes, over rows
// In both, ROWS * VECTORS accumulators stay in registers; each step loads VECTORS vectors of the
// strip (or of E) and broadcasts ROWS elements of the tile.

#include "simd.h"

constexpr int kVectors = SOFTCL_VECTORS;
constexpr int kRows = SOFTCL_ROWS;
constexpr int kLanes = kWidth * kVectors;
static_assert(kTileGranularity % kRows == 0, "a tile must hold whole groups of rows");

// Dimensions of a strip that all rows of a tile visit before the next ones: 16 KB stay in L1.
constexpr std::int64_t kDimBlock = 4096 / kLanes;
// Products summed one after the other; such sums are then added. Rounding grows with the length.
constexpr std::int64_t kDimChain = 32;  // of S
constexpr std::int64_t kRowChain = 24;  // of O

inline std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

// The micro-kernel of both products: out (R, lanes) {=, +=} sum_i b(r, i) x(i, :) over i in [0, n),
// n >= 1, b(r, i) = b[r * row_step + i * step]. R * kVectors accumulators, all in registers.
template <int R>
__attribute__((always_inline)) inline void multiply(const float* b, std::int64_t row_step,
                                                    std::int64_t step, const float* x,
                                                    std::int64_t n, bool add, float* out) {
  Vector sum[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector{};
  }
  const float* const end = x + n * kLanes;
  do {
    Vector column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load(x + v * kWidth);
    for (int r = 0; r < R; ++r) {
      const Vector element = broadcast(b[r * row_step]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += element * column[v];
    }
    x += kLanes;
    b += step;
  } while (x != end);
  // Or else the compiler keeps `out` in registers between calls, and there are none left for it.
  asm volatile("" ::: "memory");
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* p = out + r * kLanes + v * kWidth;
      store(p, add ? load(p) + sum[r][v] : sum[r][v]);
    }
  }
}

// s (tile_rows, lanes) = tile . strip: kRows queue rows at a time, over chains of dimensions.
void similarities(const float* tile, std::int64_t tile_rows, const float* strip, std::int64_t dim,
                  float* s) {
  const std::int64_t stride = tile_stride(dim);
  for (std::int64_t block = 0; block < dim; block += kDimBlock) {
    const std::int64_t block_end = smaller(block + kDimBlock, dim);
    for (std::int64_t j = 0; j < tile_rows; j += kRows) {
      for (std::int64_t d = block; d < block_end; d += kDimChain) {
        multiply<kRows>(tile + j * stride + d, stride, 1, strip + d * kLanes,
                        smaller(kDimChain, block_end - d), d > 0, s + j * kLanes);
      }
    }
  }
}

// o (R, lanes) {=, +=} tile columns (rows, R)^T . e (rows, lanes), R = size
template <int R>
void accumulate_group(int size, const float* tile, std::int64_t stride, const float* e,
                      std::int64_t rows, bool add, float* o) {
  if (size == R) {
    for (std::int64_t j = 0; j < rows; j += kRowChain) {
      multiply<R>(tile + j * stride, 1, stride, e + j * kLanes, smaller(kRowChain, rows - j),
                  add || j > 0, o);
    }
  } else if constexpr (R > 1) {
    accumulate_group<R - 1>(size, tile, stride, e, rows, add, o);
  }
}

// o (D, lanes) {=, +=} tile (rows, D)^T . e (rows, lanes), in nearly equal groups of dimensions.
void accumulate(const float* tile, std::int64_t rows, const float* e, std::int64_t dim, bool add,
                float* o) {
  const std::int64_t groups = (dim + kRows - 1) / kRows;
  const std::int64_t large = dim % groups;  // so many groups have one dimension more
  std::int64_t d = 0;
  for (std::int64_t g = 0; g < groups; ++g) {
    const int size = static_cast<int>(dim / groups + (g < large ? 1 : 0));
    accumulate_group<kRows>(size, tile + d, tile_stride(dim), e, rows, add, o + d * kLanes);
    d += size;
  }
}
