// Vectors of SOFTCL_VECTOR_WIDTH floats as the compiler's own types (GCC and Clang), and the few
// operations they lack. Products followed by sums become FMAs (-ffp-contract=fast) where there are
// any.
//
// Included by the files of one instruction set only, inside their own namespace: see
// sweep_kernel.h.

constexpr int kWidth = SOFTCL_VECTOR_WIDTH;
constexpr int kVectorBytes = kWidth * 4;

// aligned(4), may_alias: also the type to load and store through.
typedef float Vector __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef std::int32_t IntVector __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

inline Vector load(const float* p) {
  return *reinterpret_cast<const Vector*>(p);
}

inline void store(float* p, Vector x) {
  *reinterpret_cast<Vector*>(p) = x;
}

inline Vector broadcast(float x) {
  return x - Vector{};
}

/// Larger of the two; y where x is NaN.
inline Vector max(Vector x, Vector y) {
#if defined(__AVX512F__)
  // The masked form: GCC 12 warns of an uninitialised value inside the plain one.
  return (Vector)_mm512_maskz_max_ps(__mmask16(-1), (__m512)x, (__m512)y);
#elif defined(__AVX2__)
  return (Vector)_mm256_max_ps((__m256)x, (__m256)y);
#else
  return x > y ? x : y;
#endif
}

/// Smaller of the two; y where x is NaN.
inline Vector min(Vector x, Vector y) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_min_ps(__mmask16(-1), (__m512)x, (__m512)y);
#elif defined(__AVX2__)
  return (Vector)_mm256_min_ps((__m256)x, (__m256)y);
#else
  return x < y ? x : y;
#endif
}

/// Bit i: x[i] > y[i].
inline unsigned greater_lanes(Vector x, Vector y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)y, _CMP_GT_OQ)));
#else
  const IntVector mask = x > y;
  unsigned lanes = 0;
  for (int i = 0; i < kWidth; ++i) lanes |= static_cast<unsigned>(mask[i] & 1) << i;
  return lanes;
#endif
}

/// Bit i: x[i] > y[i].
inline unsigned greater_int_lanes(IntVector x, IntVector y) {
#if defined(__AVX512F__)
  return _mm512_cmpgt_epi32_mask((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
  const __m256i mask = _mm256_cmpgt_epi32((__m256i)x, (__m256i)y);
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask));
#else
  const IntVector mask = x > y;
  unsigned lanes = 0;
  for (int i = 0; i < kWidth; ++i) lanes |= static_cast<unsigned>(mask[i] & 1) << i;
  return lanes;
#endif
}

// sum + a.low b.low + a.high b.high in every lane, of the signed 16-bit halves of a and b.
#if defined(__AVX512VNNI__)
inline IntVector multiply_add_pairs(IntVector sum, IntVector a, IntVector b) {
  return (IntVector)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
inline IntVector multiply_add_pairs(IntVector sum, IntVector a, IntVector b) {
  return sum + (IntVector)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
#elif defined(__SSE2__) && !defined(__AVX512F__)
inline IntVector multiply_add_pairs(IntVector sum, IntVector a, IntVector b) {
  typedef short Shorts __attribute__((vector_size(16)));  // as emmintrin.h's, which is not needed
  return sum + (IntVector)__builtin_ia32_pmaddwd128((Shorts)a, (Shorts)b);
}
#elif !defined(__AVX512F__)
inline IntVector multiply_add_pairs(IntVector sum, IntVector a, IntVector b) {
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}
#endif

/// Some x[i] > y[i].
inline bool any_greater(Vector x, Vector y) {
  return greater_lanes(x, y) != 0;
}

/// 2^x for x <= 127 to 1.2e-7 relative; 0 for x < -126.5; NaN for NaN.
///
/// x = n + f, n integer, |f| <= 1/2: adding 1.5 * 2^23 rounds x to an integer in the low mantissa
/// bits. 2^f by the minimax polynomial of degree 5 for the relative error on [-1/2, 1/2]
/// (Remez: 7.5e-8).
inline Vector exp2(Vector x) {
  x = max(broadcast(-127.0f), x);  // in this order NaN passes through
  const Vector shifted = x + (0x1.8p23f + 127.0f);
  const Vector f = x - (shifted - (0x1.8p23f + 127.0f));
  Vector p = f * 0x1.5c08e4p-10f + 0x1.3d0c54p-7f;
  p = p * f + 0x1.c6b6e4p-5f;
  p = p * f + 0x1.ebf918p-3f;
  p = p * f + 0x1.62e428p-1f;
  p = p * f + 0x1.000002p+0f;
  // A product, and not an addition to the exponent: it keeps NaN and gives 0 for n = -127.
  return p * (Vector)((IntVector)shifted << 23);
}
