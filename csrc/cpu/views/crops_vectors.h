// What the crops need of vectors beyond simd.h: bytes, and sums that are made bytes again. Included
// by crops_kernel.h only, after simd.h, inside its namespace.

typedef std::uint8_t Bytes __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
/// The channels of a pixel.
typedef std::int32_t Quad __attribute__((vector_size(16), aligned(4), may_alias));

inline Bytes load_bytes(const std::uint8_t* p) {
  return *reinterpret_cast<const Bytes*>(p);
}

/// The same, 0 for what lies at `end` and beyond, which is not read.
__attribute__((noinline)) Bytes load_bytes(const std::uint8_t* p, const std::uint8_t* end) {
  Bytes bytes = {};
  const std::int64_t count = end - p < kVectorBytes ? end - p : kVectorBytes;
  for (std::int64_t i = 0; i < count; ++i) bytes[i] = p[i];
  return bytes;
}

// Within every 128 bits: the bytes of a and b in turn, of the first eight of each or of the rest.
#if defined(__AVX512BW__)
inline Bytes interleave_low(Bytes a, Bytes b) {
  return (Bytes)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b);
}
inline Bytes interleave_high(Bytes a, Bytes b) {
  return (Bytes)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__)
inline Bytes interleave_low(Bytes a, Bytes b) {
  return (Bytes)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
}
inline Bytes interleave_high(Bytes a, Bytes b) {
  return (Bytes)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
}
#else
  #if defined(__clang__)
    #define SOFTCL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
  #else
    #define SOFTCL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bytes{__VA_ARGS__})
  #endif
inline Bytes interleave_low(Bytes a, Bytes b) {
  return SOFTCL_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Bytes interleave_high(Bytes a, Bytes b) {
  return SOFTCL_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#endif

/// Numbers of 16 bits, two in each of 32.
inline IntVector low_bytes_as_halves(Bytes x) {
  return (IntVector)interleave_low(x, Bytes{});
}

inline IntVector high_bytes_as_halves(Bytes x) {
  return (IntVector)interleave_high(x, Bytes{});
}

/// 128 bits of the one and of the other in turn.
inline void store_alternating(std::int32_t* p, IntVector first, IntVector second) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi64((__m512i)first, low, (__m512i)second));
  _mm512_storeu_si512(p + 16, _mm512_permutex2var_epi64((__m512i)first, high, (__m512i)second));
#elif defined(__AVX2__)
  const __m256i a = (__m256i)first, b = (__m256i)second;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_permute2x128_si256(a, b, 0x31));
#else
  *reinterpret_cast<IntVector*>(p) = first;
  *reinterpret_cast<IntVector*>(p + 4) = second;
#endif
}

/// The sum of line (2 pairs, 4) times weights (pairs, 4), pixel by pixel.
inline Quad dot(const std::int32_t* line, const std::int32_t* weights, std::int64_t pairs) {
#if defined(__AVX2__)
  __m256i sum = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < pairs; i += 2) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 4 * i));
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 4 * i));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, w));
  }
  return (Quad)_mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
#else
  Quad sum = {};
  for (std::int64_t i = 0; i < pairs; ++i) {
    sum = multiply_add_pairs(sum, *reinterpret_cast<const Quad*>(line + 4 * i),
                             *reinterpret_cast<const Quad*>(weights + 4 * i));
  }
  return sum;
#endif
}

/// Four pixels in [0, 255], to 16 bytes.
inline void store_pixels(std::uint8_t* p, const Quad (&pixels)[4]) {
#if defined(__AVX2__)
  const __m128i low = _mm_packs_epi32((__m128i)pixels[0], (__m128i)pixels[1]);
  const __m128i high = _mm_packs_epi32((__m128i)pixels[2], (__m128i)pixels[3]);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(low, high));
#else
  for (int i = 0; i < 4; ++i) {
    for (int c = 0; c < 4; ++c) p[4 * i + c] = std::uint8_t(pixels[i][c]);
  }
#endif
}

/// The first three channels of pixels (count, 4) to red + plane * channel.
inline void store_planes(const std::uint8_t* pixels, std::uint8_t* red, std::int64_t plane,
                         std::int64_t count) {
  std::uint8_t* const green = red + plane;
  std::uint8_t* const blue = green + plane;
  std::int64_t x = 0;
#if defined(__AVX2__)
  const __m256i channels =
      _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                       0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i halves = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (; x + 8 <= count; x += 8) {
    __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixels + 4 * x));
    eight = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(eight, channels), halves);
    const __m128i low = _mm256_castsi256_si128(eight);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(red + x), low);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(green + x), _mm_unpackhi_epi64(low, low));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(blue + x), _mm256_extracti128_si256(eight, 1));
  }
#endif
  // Not a byte beyond the row: the next may be another thread's.
  for (; x < count; ++x) {
    red[x] = pixels[4 * x];
    green[x] = pixels[4 * x + 1];
    blue[x] = pixels[4 * x + 2];
  }
}
