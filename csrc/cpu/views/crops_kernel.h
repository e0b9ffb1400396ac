// One crop of a decoded image, written once; crops_<isa>.cpp includes this with
//     SOFTCL_ISA            a name, also of the namespace that keeps the copies apart
//     SOFTCL_VECTOR_WIDTH   32-bit numbers in a vector register
// No function that another file could also emit may be called inline from here (see convert.h).
//
// Tiling. A row of the result at a time. The image's rows under its filter are added up into a
// line, two rows in one multiplication; the line keeps two neighbouring pixels' channels side by
// side, so that the resize along the columns multiplies and adds two pixels at once, without a
// shuffle. Each output there is a sum of a few vectors that lie one after the other, wherever they
// begin: the filter may be as wide as it likes.
//
// Traffic. A byte of the box is read taps * rows / height times, from L1 or L2, and the result
// written once; the line and all weights of a crop of 224 px stay in L1.

namespace softcl::cpu {

namespace SOFTCL_ISA {

namespace {

#include "simd.h"
// After it: its vectors.
#include "views/crops_vectors.h"

constexpr int kQuads = kWidth / 4;  // pixels in a vector of sums
constexpr int kBlock = 4 * kQuads;  // pixels in a vector of bytes
constexpr std::int32_t kLineShift = kCropWeightBits - kCropLineBits;
constexpr std::int32_t kPixelShift = kCropWeightBits + kCropLineBits;
static_assert(kBlock <= kCropPadding, "blocks are written whole");

/// Pixels [0, kBlock) from `p` on of the image's rows, weighed and added up, into `line`. `kLast`:
/// the lowest row may end before the block does.
template <bool kLast>
void sum_rows(const CropTask& task, const std::uint8_t* p, const std::int32_t* weights,
              std::int32_t* line) {
  // In the order of interleave_low and interleave_high: the pixels 0, 1, 2, 3 of each 128 bits.
  IntVector sums[4];
  for (IntVector& sum : sums) sum = IntVector{} + (1 << (kLineShift - 1));
  for (std::int64_t t = 0; t < task.row_taps; t += 2, p += 2 * task.stride) {
    // An odd number of rows ends with one of no weight, which need not be there.
    const std::uint8_t* const next = t + 1 < task.row_taps ? p + task.stride : p;
    const Bytes above = kLast ? load_bytes(p, task.end) : load_bytes(p);
    const Bytes below = kLast ? load_bytes(next, task.end) : load_bytes(next);
    const IntVector weight = IntVector{} + *weights++;
    const Bytes low = interleave_low(above, below), high = interleave_high(above, below);
    sums[0] = multiply_add_pairs(sums[0], low_bytes_as_halves(low), weight);
    sums[1] = multiply_add_pairs(sums[1], high_bytes_as_halves(low), weight);
    sums[2] = multiply_add_pairs(sums[2], low_bytes_as_halves(high), weight);
    sums[3] = multiply_add_pairs(sums[3], high_bytes_as_halves(high), weight);
  }
  const IntVector first = sums[0] >> kLineShift | sums[1] >> kLineShift << 16;
  const IntVector second = sums[2] >> kLineShift | sums[3] >> kLineShift << 16;
  store_alternating(line, first, second);
}

/// A row of the result before its columns are resized.
void make_line(const CropTask& task, std::int64_t y) {
  const std::uint8_t* p = task.corner + task.first_row[y] * task.stride;
  const std::int32_t* const weights = task.row_weights + y * pairs_in(task.row_taps);
  const std::int64_t lowest = (task.row_taps - 1) * task.stride;
  std::int32_t* line = task.line;
  for (std::int64_t x = 0; x < task.width; x += kBlock, p += 4 * kBlock, line += 2 * kBlock) {
    if (__builtin_expect(task.end - p < lowest + 4 * kBlock, 0)) {
      sum_rows<true>(task, p, weights, line);
    } else {
      sum_rows<false>(task, p, weights, line);
    }
  }
}

/// Four pixels of the result from the line, of output x on.
inline void resize_four(const CropTask& task, std::int64_t x, std::int64_t pairs) {
  Quad sums[4];
  const std::int32_t* weights = task.column_weights + x * pairs * 4;
  for (int i = 0; i < 4; ++i, weights += pairs * 4) {
    const Quad sum = dot(task.line + task.first_pair[x + i] * 4, weights, pairs);
    sums[i] = (sum + (1 << (kPixelShift - 1))) >> kPixelShift;
  }
  store_pixels(task.pixels + 4 * x, sums);
}

template <int kPairs>
void resize_line(const CropTask& task) {
  const std::int64_t pairs = kPairs > 0 ? kPairs : task.column_pairs;
  for (std::int64_t x = 0; x < task.columns; x += 4) resize_four(task, x, pairs);
}

void make_crop(const CropTask& task) {
  const std::int64_t plane = task.rows * task.columns;
  for (std::int64_t y = 0; y < task.rows; ++y) {
    make_line(task, y);
    switch (task.column_pairs) {
      case 2:
        resize_line<2>(task);
        break;
      case 4:
        resize_line<4>(task);
        break;
      default:
        resize_line<0>(task);
    }
    store_planes(task.pixels, task.result + y * task.columns, plane, task.columns);
  }
}

}  // namespace

}  // namespace SOFTCL_ISA

}  // namespace softcl::cpu
