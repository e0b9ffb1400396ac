// Exact top-k of one row from its chunk maxima, by one block of threads.
//
// The k best columns of a row lie within the k chunks that have the largest maxima: a chunk left
// out holds nothing above its maximum, and k columns at least as good are among those kept. So
//
//     1. pick the k chunks with the largest maxima,
//     2. compute v.Q_j again for their columns, in fp32,
//     3. pick the k best of those and sort them.
//
// Picking is a radix search, eight bits at a time, over 64-bit keys: the value's order, then the
// lowest index. No two keys are equal, so the result does not depend on the order of the threads.
// Traffic per row: the maxima a few times, the first one from HBM; k chunks of queue rows from L2.

#pragma once

#include "layout.h"
#include "rows.h"

namespace softcl::cuda {

inline constexpr int kFinishThreads = 128;
inline constexpr int kMostNeighbors = 1024;

// What a NaN, or minus infinity, counts as: below every cosine, above what is not a column at all.
inline constexpr float kWorst = -1e20f;

/// Shared memory of a block that selects up to k neighbours, beginning at `base`.
struct SelectMemory {
  std::uint32_t base;
  int k;

  SOFTCL_HOST_DEVICE std::uint32_t keys() const { return base; }                    // (k,) 64 bits
  SOFTCL_HOST_DEVICE std::uint32_t sorted() const { return base + k * 8; }          // (k,) 64 bits
  SOFTCL_HOST_DEVICE std::uint32_t chunks() const { return base + k * 16; }         // (k,)
  SOFTCL_HOST_DEVICE std::uint32_t histogram() const { return chunks() + k * 4; }   // (256,)
  SOFTCL_HOST_DEVICE std::uint32_t found() const { return histogram() + 256 * 4; }  // (4,)
  SOFTCL_HOST_DEVICE std::uint32_t vector() const { return found() + 4 * 4; }       // (256,) fp32
  SOFTCL_HOST_DEVICE std::uint32_t end() const { return vector() + 256 * 4; }
};

/// Integers in the order of fp32 values, none of them 0.
SOFTCL_DEVICE std::uint32_t ordered(float x) {
  const std::uint32_t bits = ptx::bits_of(x == x ? fmaxf(x, kWorst) : kWorst);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

SOFTCL_DEVICE std::uint64_t key_of(float x, std::uint32_t index) {
  return std::uint64_t(ordered(x)) << 32 | (0xffffffffu - index);
}

SOFTCL_DEVICE float value_of(std::uint64_t key) {
  const auto high = static_cast<std::uint32_t>(key >> 32);
  return ptx::float_of(high >> 31 != 0 ? high & 0x7fffffffu : ~high);
}

SOFTCL_DEVICE std::uint32_t index_of(std::uint64_t key) {
  return 0xffffffffu - static_cast<std::uint32_t>(key);
}

/// A key that exactly k of key_at(0) .. key_at(n - 1) reach. Keys are distinct, apart from zeros,
/// which are none; there are at least k. Called by all threads; the same in all. Whatever they
/// wrote before the call is there for key_at.
template <typename KeyAt>
SOFTCL_DEVICE std::uint64_t kth_largest(const SelectMemory& memory, int n, int k, KeyAt key_at) {
  std::uint64_t prefix = 0;
  int wanted = k;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kFinishThreads) {
      ptx::store_shared<std::uint32_t>(memory.histogram() + i * 4, 0);
    }
    ptx::sync_threads();
    for (int i = threadIdx.x; i < n; i += kFinishThreads) {
      const std::uint64_t key = key_at(i);
      if (key != 0 && (key >> shift) >> 8 == prefix) {
        ptx::atomic_add_shared(memory.histogram() + (key >> shift & 255) * 4, 1);
      }
    }
    ptx::sync_threads();
    if (threadIdx.x < kWarp) {
      // Lane i looks at eight digits, the largest ones in lane 0.
      int counts[8], own = 0;
      SOFTCL_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int digit = 255 - 8 * static_cast<int>(threadIdx.x) - i;
        counts[i] = ptx::load_shared<std::uint32_t>(memory.histogram() + digit * 4);
        own += counts[i];
      }
      int reached = own;
      SOFTCL_UNROLL
      for (int delta = 1; delta < kWarp; delta *= 2) {
        const int before = ptx::shuffle_up(reached, delta);
        if (static_cast<int>(threadIdx.x) >= delta) reached += before;
      }
      int before = reached - own;
      SOFTCL_UNROLL
      for (int i = 0; i < 8; ++i) {
        if (before < wanted && wanted <= before + counts[i]) {
          ptx::store_shared<std::uint32_t>(memory.found(), 255 - 8 * threadIdx.x - i);
          ptx::store_shared<std::uint32_t>(memory.found() + 4, wanted - before);
          ptx::store_shared<std::uint32_t>(memory.found() + 8, counts[i]);
        }
        before += counts[i];
      }
    }
    ptx::sync_threads();
    prefix = prefix << 8 | ptx::load_shared<std::uint32_t>(memory.found());
    wanted = ptx::load_shared<std::uint32_t>(memory.found() + 4);
    const int count = ptx::load_shared<std::uint32_t>(memory.found() + 8);
    if (count == wanted) return prefix << shift;  // all that begin like this are in
  }
  return prefix;
}

/// take(position, i) for every i < n whose key reaches `least`, positions from 0 on in any order.
template <typename KeyAt, typename Take>
SOFTCL_DEVICE void take_largest(const SelectMemory& memory, int n, std::uint64_t least,
                                KeyAt key_at, Take take) {
  const std::uint32_t counter = memory.found() + 12;
  if (threadIdx.x == 0) ptx::store_shared<std::uint32_t>(counter, 0);
  ptx::sync_threads();
  for (int i = threadIdx.x; i < n; i += kFinishThreads) {
    const std::uint64_t key = key_at(i);
    if (key >= least) take(ptx::atomic_add_shared(counter, 1), i, key);
  }
  ptx::sync_threads();
}

/// An array (.., D) in global memory.
struct Rows {
  const void* elements;
  ElementType type;
  int dim;
  bool aligned;  // rows begin at multiples of 16 bytes
};

/// v.Q_column for the v in shared memory, by eight neighbouring lanes; the same in all of them.
SOFTCL_DEVICE float cosine_with(const SelectMemory& memory, const Rows& queue,
                                std::int64_t column) {
  float sum = 0.0f;
  for (int piece = threadIdx.x % 8; piece * 8 < queue.dim; piece += 8) {
    float q[8];
    load_floats(q, queue.elements, queue.type, column, piece, queue.dim, queue.aligned);
    SOFTCL_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (piece * 8 + i >= queue.dim) continue;
      const auto v = ptx::load_shared<float>(memory.vector() + (piece * 8 + i) * 4);
      sum = fmaf(v, q[i], sum);
    }
  }
  SOFTCL_UNROLL
  for (int mask = 4; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
  return sum;
}

/// How the chunks of a row were laid out, see layout.h.
struct Chunks {
  int count;  // that hold any column
  int shift;  // see layout.h
  std::int64_t queue_size;
};

/// The k largest v.Q_j of the row v in memory.vector(), best first, equal ones by lowest j, as keys
/// in memory.sorted(). k <= K. candidates: room for k chunks of columns. By all threads.
SOFTCL_DEVICE void select_neighbors(const SelectMemory& memory, const float* maxima,
                                    const Chunks& chunks, const Rows& queue, float* candidates) {
  const int kept = min(memory.k, chunks.count);
  const auto chunk_key = [&](int i) { return key_of(ptx::load_global(maxima + i), i); };
  take_largest(memory, chunks.count, kth_largest(memory, chunks.count, kept, chunk_key), chunk_key,
               [&](std::uint32_t position, int i, std::uint64_t) {
                 ptx::store_shared<std::uint32_t>(memory.chunks() + position * 4, i);
               });

  const int shift = kChunkShiftPerStep + chunks.shift, total = kept << shift;
  const auto column_of = [&](int i) {
    const int chunk = ptx::load_shared<std::uint32_t>(memory.chunks() + (i >> shift) * 4);
    return chunk_column(chunk, i & ((1 << shift) - 1), chunks.shift);
  };
  // Eight lanes a candidate, all lanes of a warp in step.
  for (int first = threadIdx.x / kWarp * 4; first < total; first += kFinishThreads / 8) {
    const int i = first + threadIdx.x % kWarp / 8;
    const std::int64_t column = i < total ? column_of(i) : chunks.queue_size;
    const bool exists = column < chunks.queue_size;
    const float x = cosine_with(memory, queue, exists ? column : 0);
    if (i < total && threadIdx.x % 8 == 0) ptx::store_global(candidates + i, x);
  }
  // kth_largest synchronises before it reads the first of them.
  const auto candidate_key = [&](int i) -> std::uint64_t {
    const std::int64_t column = column_of(i);
    return column < chunks.queue_size
               ? key_of(ptx::load_global(candidates + i), static_cast<std::uint32_t>(column))
               : 0;
  };
  take_largest(memory, total, kth_largest(memory, total, memory.k, candidate_key), candidate_key,
               [&](std::uint32_t position, int, std::uint64_t key) {
                 ptx::store_shared(memory.keys() + position * 8, key);
               });
  for (int i = threadIdx.x; i < memory.k; i += kFinishThreads) {
    const auto key = ptx::load_shared<std::uint64_t>(memory.keys() + i * 8);
    int better = 0;
    for (int j = 0; j < memory.k; ++j) {
      better += ptx::load_shared<std::uint64_t>(memory.keys() + j * 8) > key;
    }
    ptx::store_shared(memory.sorted() + better * 8, key);
  }
  ptx::sync_threads();
}

}  // namespace softcl::cuda
