// From products to weights, in the registers of the Hopper streaming kernel.

#pragma once

#include "stream_hopper_state.h"

#if defined(SOFTCL_HAS_WARPGROUPS)

namespace softcl::cuda {

/// Where the student's products with the same queue rows are, for z.mu.
struct NoProducts {
  static constexpr bool kExist = false;
  SOFTCL_DEVICE ptx::Vector of(int) const { return {}; }
};

template <typename S>
struct OwnProducts {
  static constexpr bool kExist = true;
  const float (&s)[S::kTileRows / 8][4];
  SOFTCL_DEVICE ptx::Vector of(int n) const {
    return {{ptx::bits_of(s[n][0]), ptx::bits_of(s[n][1]), ptx::bits_of(s[n][2]),
             ptx::bits_of(s[n][3])}};
  }
};

struct SentProducts {
  static constexpr bool kExist = true;
  std::uint32_t memory;
  static SOFTCL_DEVICE std::uint32_t address(std::uint32_t memory, int n) {
    return memory + (n * kWarpgroup + threadIdx.x % kWarpgroup) * 16;
  }
  SOFTCL_DEVICE ptx::Vector of(int n) const { return ptx::load_shared_here(address(memory, n)); }
};

/// What needs the products as they are: columns past the queue's end, ranks, chunk maxima.
template <typename S, bool kTeacher>
SOFTCL_DEVICE void count_products(RowSums& sums, float (&s)[S::kTileRows / 8][4],
                                  const StreamParams& p, int row_tile, int tile) {
  const int left = static_cast<int>(p.queue_size) - tile * S::kTileRows;  // of at most 2^30
  if (left < S::kTileRows) {
    SOFTCL_UNROLL
    for (int n = 0; n < S::kTileRows / 8; ++n) {
      SOFTCL_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (8 * n + accumulator_column(lane_index(), e) >= left) {
          s[n][e] = kAbsent;
        }
      }
    }
  }
  if (!kTeacher && p.has_ranks) {
    SOFTCL_UNROLL
    for (int n = 0; n < S::kTileRows / 8; ++n) {
      SOFTCL_UNROLL
      for (int e = 0; e < 4; ++e) sums.rank[e / 2] += s[n][e] > sums.positive[e / 2];
    }
  }
  if ((kTeacher || !S::kPair) && p.has_maxima) {
    store_chunk_maxima<S>(sums, s, p, row_tile, tile);
  }
}

/// Raises the running maximum of both rows to the tile's; carry: what the sums so far are worth.
template <typename S>
SOFTCL_DEVICE void raise_maximum(RowSums& sums, const float (&x)[S::kTileRows / 8][4],
                                 float (&carry)[2], float scale) {
  SOFTCL_UNROLL
  for (int i = 0; i < 2; ++i) {
    float largest = kAbsent;
    SOFTCL_UNROLL
    for (int n = 0; n < S::kTileRows / 8; ++n) {
      largest = fmaxf(largest, fmaxf(x[n][2 * i], x[n][2 * i + 1]));
    }
    largest = fmaxf(largest, ptx::shuffle_xor(largest, 1));
    largest = fmaxf(largest, ptx::shuffle_xor(largest, 2));
    const float maximum = fmaxf(sums.maximum[i], largest * scale);
    const float drop = sums.maximum[i] - maximum;
    carry[i] = ptx::exp2_approx(drop);
    sums.maximum[i] = maximum;
    sums.cosine[i] = (sums.cosine[i] + drop * sums.weight[i]) * carry[i];
    sums.weight[i] *= carry[i];
    sums.student[i] *= carry[i];
  }
}

/// Turns the products x of one tile into weights, in place, and adds up their sums. With a running
/// maximum, mean and mean_weight are left to be multiplied by carry.
template <typename T, typename S, bool kEntropy, typename Students>
SOFTCL_DEVICE void add_weights(RowSums& sums, float (&x)[S::kTileRows / 8][4], float (&carry)[2],
                               float scale, const Students& students) {
  constexpr bool kRunning = kHasMaximum<T>;
  if constexpr (kRunning) raise_maximum<S>(sums, x, carry, scale);
  // Summed over the tile first: one rounding per tile in the long sums, not one per product.
  float weight[2] = {}, cosine[2] = {}, student[2] = {};
  SOFTCL_UNROLL
  for (int n = 0; n < S::kTileRows / 8; ++n) {
    const ptx::Vector z = students.of(n);
    SOFTCL_UNROLL
    for (int e = 0; e < 4; ++e) {
      const float logit = kRunning ? fmaf(x[n][e], scale, -sums.maximum[e / 2]) : x[n][e] * scale;
      const float w = ptx::exp2_approx(logit);
      weight[e / 2] += w;
      if constexpr (kEntropy) cosine[e / 2] = fmaf(w, kRunning ? logit : x[n][e], cosine[e / 2]);
      if constexpr (Students::kExist) {
        student[e / 2] = fmaf(w, ptx::float_of(z.x[e]), student[e / 2]);
      }
      x[n][e] = w;
    }
  }
  SOFTCL_UNROLL
  for (int i = 0; i < 2; ++i) {
    sums.weight[i] += weight[i];
    if constexpr (kEntropy) sums.cosine[i] += cosine[i];
    if constexpr (Students::kExist) sums.student[i] += student[i];
  }
}

/// add_weights as one tile of rows wants it, without z.mu.
template <typename T, typename S, bool kTeacher>
SOFTCL_DEVICE void add_role_weights(RowSums& sums, float (&x)[S::kTileRows / 8][4],
                                    float (&carry)[2], const StreamParams& p) {
  if (kTeacher || (!S::kPair && p.entropy)) {
    add_weights<T, S, true>(sums, x, carry, p.scale[kTeacher ? 1 : 0], NoProducts());
  } else if constexpr (!kTeacher) {
    add_weights<T, S, false>(sums, x, carry, p.scale[0], NoProducts());
  }
}

/// Everything about the products of tile i of the split, by a warpgroup with means: counts, then
/// weights in place.
template <typename T, typename S, bool kTeacher>
SOFTCL_DEVICE void visit_products(RowSums& sums, float (&s)[S::kTileRows / 8][4], float (&carry)[2],
                                  const StreamParams& p, std::uint32_t memory, int row_tile,
                                  int first_tile, int i, int tiles) {
  count_products<S, kTeacher>(sums, s, p, row_tile, first_tile + i);
  const std::uint32_t sent = memory + S::kSentAt;
  if constexpr (S::kSends && kTeacher) {
    ptx::named_barrier_sync(kProductsSent, kConsumers);
    add_weights<T, S, true>(sums, s, carry, p.scale[1], SentProducts{sent});
    if (i + 1 < tiles) ptx::named_barrier_arrive(kProductsTaken, kConsumers);
  } else {
    if constexpr (S::kSends) {
      if (i > 0) ptx::named_barrier_sync(kProductsTaken, kConsumers);
      SOFTCL_UNROLL
      for (int n = 0; n < S::kTileRows / 8; ++n) {
        ptx::store_shared(SentProducts::address(sent, n), OwnProducts<S>{s}.of(n));
      }
      ptx::named_barrier_arrive(kProductsSent, kConsumers);
    }
    add_role_weights<T, S, kTeacher>(sums, s, carry, p);
  }
}

/// Weights as the second product takes them, (64, 16) a fragment; in two parts, then what rounding
/// left of them.
template <typename S, int kParts>
struct Weights {
  ptx::Vector parts[kParts][S::kTileRows / 16] = {};

  SOFTCL_DEVICE void settle() {
    SOFTCL_UNROLL
    for (int part = 0; part < kParts; ++part) ptx::settle(parts[part]);
  }
};

/// A pair of weights of one row, rounded; takes what it stands for away from them and returns it.
template <typename T>
SOFTCL_DEVICE std::uint32_t pack_pair(float& first, float& second, float& sum) {
  std::uint32_t packed;
  float rounded[2];
  if constexpr (kHasMaximum<T>) {
    packed = ptx::pack_fp16(first, second);
    rounded[0] = ptx::float_of_fp16(static_cast<std::uint16_t>(packed & 0xffff));
    rounded[1] = ptx::float_of_fp16(static_cast<std::uint16_t>(packed >> 16));
  } else {
    packed = ptx::pack_bf16(first, second);
    rounded[0] = ptx::float_of(packed << 16);
    rounded[1] = ptx::float_of(packed & 0xffff0000u);
  }
  first -= rounded[0];
  second -= rounded[1];
  sum += rounded[0] + rounded[1];
  return packed;
}

/// The weights w of a tile as fragments, and the sums of what those stand for.
template <typename T, typename S, int kParts>
SOFTCL_DEVICE void pack_weights(Weights<S, kParts>& weights, RowSums& sums,
                                float (&w)[S::kTileRows / 8][4]) {
  float sum[2] = {};
  SOFTCL_UNROLL
  for (int part = 0; part < kParts; ++part) {
    SOFTCL_UNROLL
    for (int k = 0; k < S::kTileRows / 16; ++k) {
      SOFTCL_UNROLL
      for (int i = 0; i < 4; ++i) {
        float* pair = &w[2 * k + i / 2][i % 2 * 2];
        if (kHasMaximum<T> && part == 0) {
          pair[0] *= kHeadroom;
          pair[1] *= kHeadroom;
        }
        weights.parts[part][k].x[i] = pack_pair<T>(pair[0], pair[1], sum[i % 2]);
      }
    }
  }
  SOFTCL_UNROLL
  for (int i = 0; i < 2; ++i) sums.mean_weight[i] += sum[i];
}

/// The mean so far, relative to the new maximum.
template <typename T, typename S>
SOFTCL_DEVICE void carry_mean(float (&mean)[S::kDim / 8][4], RowSums& sums,
                              const float (&carry)[2]) {
  if constexpr (kHasMaximum<T>) {
    SOFTCL_UNROLL
    for (int n = 0; n < S::kDim / 8; ++n) {
      SOFTCL_UNROLL
      for (int e = 0; e < 4; ++e) mean[n][e] *= carry[e / 2];
    }
    SOFTCL_UNROLL
    for (int i = 0; i < 2; ++i) sums.mean_weight[i] *= carry[i];
  }
}

}  // namespace softcl::cuda

#endif
