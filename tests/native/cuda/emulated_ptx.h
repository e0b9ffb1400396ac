// The instructions of csrc/cuda/ptx.h as functions of a host compiler, written from the PTX ISA.
//
// Where the ISA leaves rounding open, these stand at its rough end: matrix products align eight
// products and the sum so far to the largest of them and cut off what lies below, as measurements
// of the hardware have found, and 2^x is off by as much as is allowed.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"

#define SOFTCL_DEVICE inline
#define SOFTCL_UNROLL
#define SOFTCL_UNROLL_BY_4
#define SOFTCL_UNROLL_BY(constant)
#define SOFTCL_NO_UNROLL

namespace softcl::cuda::ptx {

using host::Access;
using host::Site;

struct alignas(16) Vector {
  std::uint32_t x[4];
};

// ---- Threads -----------------------------------------------------------------------------------

inline void sync_threads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::barrier({file, line});
}

inline void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::sync_warp({file, line});
}

inline void keep_order() {}

inline void wait_for_previous_grid(const char* file = __builtin_FILE(),
                                   int line = __builtin_LINE()) {
  host::wait_for_previous_grid({file, line});
}

template <typename T>
struct Shuffle {
  T value, result;
  int argument;
};

template <typename T>
T shuffle_xor(T x, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Shuffle<T> mine{x, x, mask};
  host::collect({file, line}, &mine, [](void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Shuffle<T>*>(lanes[lane]);
      to->result = static_cast<Shuffle<T>*>(lanes[(lane ^ to->argument) & 31])->value;
    }
  });
  return mine.result;
}

template <typename T>
T shuffle_up(T x, int delta, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Shuffle<T> mine{x, x, delta};
  host::collect({file, line}, &mine, [](void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Shuffle<T>*>(lanes[lane]);
      if (lane >= to->argument) {
        to->result = static_cast<Shuffle<T>*>(lanes[lane - to->argument])->value;
      }
    }
  });
  return mine.result;
}

// ---- Shared memory -----------------------------------------------------------------------------

inline std::uint32_t shared_memory() {
  return 0;
}

template <typename T>
T load_shared(std::uint32_t address) {
  T value;
  std::memcpy(&value, host::shared_bytes(address, sizeof(T), alignof(T), Access::kRead), sizeof(T));
  return value;
}

template <typename T>
void store_shared(std::uint32_t address, T value) {
  std::memcpy(host::shared_bytes(address, sizeof(T), alignof(T), Access::kWrite), &value,
              sizeof(T));
}

inline std::uint32_t atomic_add_shared(std::uint32_t address, std::uint32_t value) {
  char* bytes = host::shared_bytes(address, 4, 4, Access::kAtomic);
  std::uint32_t before;
  std::memcpy(&before, bytes, 4);
  value += before;
  std::memcpy(bytes, &value, 4);
  return before;
}

inline void atomic_add(std::int64_t* counter, std::int64_t value) {
  *counter += value;
}

template <typename T>
T load_global(const T* address) {
  host::watch_global(address, Access::kRead);
  return *address;
}

template <typename T>
void store_global(T* address, T value) {
  host::watch_global(address, Access::kWrite);
  *address = value;
}

inline void cp_async(std::uint32_t target, const void* source, int bytes) {
  host::start_copy(target, source, bytes);
}

inline void cp_async_commit() {
  host::commit_copies();
}

template <int kPending>
void cp_async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (host::is_kept({file, line})) host::wait_for_copies(kPending);
}

// ---- Numbers
// -------------------------------------------------------------------------------------

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float exp2_approx(float x) {
  // Exact by the ISA, subnormal arguments too: sums that nothing has to be carried in stay.
  if (std::fabs(x) < 0x1p-126f) return 1.0f;
  const float y = std::exp2(x);
  if (!(y >= 0x1p-126f)) return y < 1.0f ? 0.0f : y;
  // 2^-22 of it, up or down as the argument's last bits have it.
  return (bits_of(x) * 0x9E3779B9u >> 31) != 0 ? y + y * 0x1p-22f : y - y * 0x1p-22f;
}

inline std::uint32_t bf16_bits(float x) {
  const std::uint32_t bits = bits_of(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline std::uint32_t pack_bf16(float low, float high) {
  return bf16_bits(low) | bf16_bits(high) << 16;
}

inline float float_of_fp16(std::uint16_t bits) {
  const std::uint32_t size = bits & 0x7fff;
  float x = float_of((size << 13) + (112u << 23));
  if (size < 0x400) x = static_cast<float>(size) * 0x1p-24f;  // subnormal
  if (size >= 0x7c00) x = size == 0x7c00 ? INFINITY : NAN;
  return float_of(bits_of(x) | std::uint32_t(bits & 0x8000) << 16);
}

inline std::uint16_t fp16_of(float x) {
  const std::uint16_t sign = bits_of(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size == 0.0f) return sign;
  // Whole multiples of the last place; nearbyint rounds ties to even.
  int exponent = 0;
  std::frexp(size, &exponent);
  const int last_place = std::max(exponent - 11, -24);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, -last_place)));
  // From the smallest normal on, a unit carries into the exponent by itself.
  return sign |
         static_cast<std::uint16_t>(last_place == -24 ? units : units + ((last_place + 24) << 10));
}

inline std::uint32_t pack_fp16(float low, float high) {
  return fp16_of(low) | std::uint32_t(fp16_of(high)) << 16;
}

// ---- Matrices of 16-bit numbers
// ------------------------------------------------------------------

struct Ldmatrix {
  std::uint32_t address;
  Vector rows;  // the 16 bytes of this lane's row
  Vector result;
};

inline void distribute(void* const* lanes, bool transposed) {
  const auto element = [&](int matrix, int row, int column) -> std::uint32_t {
    std::uint16_t x;
    std::memcpy(&x,
                reinterpret_cast<const char*>(
                    &static_cast<const Ldmatrix*>(lanes[matrix * 8 + row])->rows) +
                    column * 2,
                2);
    return x;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      static_cast<Ldmatrix*>(lanes[lane])->result.x[matrix] =
          transposed ? element(matrix, 2 * t, g) | element(matrix, 2 * t + 1, g) << 16
                     : element(matrix, g, 2 * t) | element(matrix, g, 2 * t + 1) << 16;
    }
  }
}

inline Vector ldmatrix(std::uint32_t address, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  Ldmatrix mine{address, load_shared<Vector>(address), {}};
  host::collect({file, line}, &mine, [](void* const* lanes) { distribute(lanes, false); });
  return mine.result;
}

inline Vector ldmatrix_transposed(std::uint32_t address, const char* file = __builtin_FILE(),
                                  int line = __builtin_LINE()) {
  Ldmatrix mine{address, load_shared<Vector>(address), {}};
  host::collect({file, line}, &mine, [](void* const* lanes) { distribute(lanes, true); });
  return mine.result;
}

struct Mma {
  float* c;
  const Vector* a;
  std::uint32_t b[2];
};

// Eight columns at once; compilers without wider registers take two of four.
typedef float Floats __attribute__((vector_size(32)));
typedef std::int32_t Ints __attribute__((vector_size(32)));

// c (8,) += sum over eight k of a (8,) b (8, 8), aligned and cut.
inline void add_products(float* c, const float* a, const float (*b)[8]) {
  constexpr std::int32_t kInfinite = 255 << 23, kTiny = 40 << 23;  // exponents in their place
  Floats before, products[9];
  std::memcpy(&before, c, sizeof(before));
  products[8] = before;
  Floats plain = before;
  Ints largest = reinterpret_cast<Ints>(before) & kInfinite;
  for (int k = 0; k < 8; ++k) {
    Floats row;
    std::memcpy(&row, b[k], sizeof(row));
    products[k] = a[k] * row;
    plain += products[k];
    const Ints exponent = reinterpret_cast<Ints>(products[k]) & kInfinite;
    const Ints larger = exponent > largest;
    largest = (larger & exponent) | (~larger & largest);
  }
  std::int32_t most = 0;
  for (int n = 0; n < 8; ++n) most = std::max<std::int32_t>(most, largest[n]);
  if (most == kInfinite) {
    std::memcpy(c, &plain, sizeof(plain));
    return;
  }
  // In units one bit below the last place of the largest.
  const Ints tiny = largest < kTiny;
  const Ints exponent = (~tiny & largest) | (tiny & kTiny);
  const Floats inverse = reinterpret_cast<Floats>((127 + 24 << 23) - exponent + (127 << 23));
  const Floats unit = reinterpret_cast<Floats>(exponent - (24 << 23));
  Ints sum = {};
  for (int k = 0; k < 9; ++k) sum += __builtin_convertvector(products[k] * inverse, Ints);
  // To 24 bits, towards zero: the nearest float, or the one below where that is larger.
  const Ints sign = sum >> 31, size = (sum ^ sign) - sign;
  const Floats nearest = __builtin_convertvector(size, Floats);
  const Ints above = __builtin_convertvector(nearest, Ints) > size;  // -1 where it is
  const Ints cut = (reinterpret_cast<Ints>(nearest) + above) | (sign & INT32_MIN);
  const Ints whole = reinterpret_cast<Ints>(reinterpret_cast<Floats>(cut) * unit);
  const Ints result = (~tiny & whole) | (tiny & reinterpret_cast<Ints>(plain));  // as they are
  std::memcpy(c, &result, sizeof(result));
}

template <float (*to_float)(std::uint16_t)>
void multiply(void* const* lanes) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const auto* from = static_cast<const Mma*>(lanes[lane]);
    for (int i = 0; i < 8; ++i) {
      a[g + i / 2 % 2 * 8][2 * t + i / 4 * 8 + i % 2] =
          to_float(static_cast<std::uint16_t>(from->a->x[i / 2] >> i % 2 * 16));
    }
    for (int i = 0; i < 4; ++i) {
      b[2 * t + i / 2 * 8 + i % 2][g] =
          to_float(static_cast<std::uint16_t>(from->b[i / 2] >> i % 2 * 16));
      c[g + i / 2 * 8][2 * t + i % 2] = from->c[i];
    }
  }
  for (int row = 0; row < 16; ++row) {
    add_products(c[row], a[row], b);
    add_products(c[row], a[row] + 8, b + 8);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      static_cast<Mma*>(lanes[lane])->c[i] = c[g + i / 2 * 8][2 * t + i % 2];
    }
  }
}

inline float float_of_bf16(std::uint16_t bits) {
  return float_of(std::uint32_t(bits) << 16);
}

inline void mma_bf16(float (&c)[4], const Vector& a, std::uint32_t b0, std::uint32_t b1,
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Mma mine{c, &a, {b0, b1}};
  host::collect({file, line}, &mine, &multiply<float_of_bf16>);
}

inline void mma_fp16(float (&c)[4], const Vector& a, std::uint32_t b0, std::uint32_t b1,
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  Mma mine{c, &a, {b0, b1}};
  host::collect({file, line}, &mine, &multiply<float_of_fp16>);
}

}  // namespace softcl::cuda::ptx
