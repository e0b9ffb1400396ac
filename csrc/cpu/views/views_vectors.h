// What the views need of vectors beyond simd.h: pixels, masks, and the numbers of a line picked by
// index. Included by views_kernel.h only, after simd.h, inside its namespace.

inline IntVector load_ints(const std::int32_t* p) {
  return *reinterpret_cast<const IntVector*>(p);
}

inline void store_ints(std::int32_t* p, IntVector x) {
  *reinterpret_cast<IntVector*>(p) = x;
}

inline Vector clamp01(Vector x) {
  return max(min(x, broadcast(1.0f)), broadcast(0.0f));
}

inline Vector absolute(Vector x) {
  return (Vector)((IntVector)x & 0x7fffffff);
}

/// The nearest integer, |x| < 2^22.
inline Vector rounded(Vector x) {
  return (x + 0x1.8p23f) - 0x1.8p23f;
}

/// kWidth pixels as floats.
inline Vector load_bytes(const std::uint8_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __mmask16 all = -1;
  return (Vector)_mm512_maskz_cvtepi32_ps(all, _mm512_maskz_cvtepu8_epi32(all, bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
#else
  Vector x = {};
  for (int i = 0; i < kWidth; ++i) x[i] = float(p[i]);
  return x;
#endif
}

/// The same, 0 for the pixels at `end` and beyond, which are not read. Rare, and apart from the
/// loop that loads, which then has no copy on its stack.
__attribute__((noinline)) Vector load_last_bytes(const std::uint8_t* p, const std::uint8_t* end) {
  std::uint8_t copy[kWidth] = {};
  for (int i = 0; i < end - p; ++i) copy[i] = p[i];
  return load_bytes(copy);
}

/// The one or the other.
inline Vector load_bytes(const std::uint8_t* p, const std::uint8_t* end) {
  return __builtin_expect(end - p < kWidth, 0) ? load_last_bytes(p, end) : load_bytes(p);
}

#if defined(__AVX2__)

/// Two registers full of floats, to pick from by an index in [0, kWindow).
constexpr int kWindow = 2 * kWidth;
struct Window {
  Vector low, high;
};

inline Window window_at(const float* p) {
  return {load(p), load(p + kWidth)};
}

#else

constexpr int kWindow = 1 << 30;  // any index will do
struct Window {
  const float* start;
};

inline Window window_at(const float* p) {
  return {p};
}

#endif

inline Vector pick(const Window& window, IntVector index) {
#if defined(__AVX512F__)
  return (Vector)_mm512_permutex2var_ps((__m512)window.low, (__m512i)index, (__m512)window.high);
#elif defined(__AVX2__)
  // Both permutations take the lowest three bits; the fourth chooses.
  const __m256 low = _mm256_permutevar8x32_ps((__m256)window.low, (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps((__m256)window.high, (__m256i)index);
  return (Vector)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
  Vector x = {};
  for (int i = 0; i < kWidth; ++i) x[i] = window.start[index[i]];
  return x;
#endif
}

/// p[index], however far.
inline Vector gather(const float* p, IntVector index) {
#if defined(__AVX512F__)
  return (Vector)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), -1, (__m512i)index, p, 4);
#elif defined(__AVX2__)
  const __m256 all = (__m256)(IntVector{} - 1);
  return (Vector)_mm256_mask_i32gather_ps(_mm256_setzero_ps(), p, (__m256i)index, all, 4);
#else
  Vector x = {};
  for (int i = 0; i < kWidth; ++i) x[i] = p[index[i]];
  return x;
#endif
}
