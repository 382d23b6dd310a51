// Vectors of COTNET_VECTOR_BYTES, written with the vector extension of GCC and Clang. Included once per target
// namespace by foreach_target.h (so no include guard): the same source becomes SSE2/NEON, AVX2 and AVX-512.
// A vector holds acc_t lanes; loads widen 16-bit floats and stores round them, so loops only see acc_t.

template <class acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(COTNET_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(COTNET_VECTOR_BYTES)));
  typedef int32_t lane_mask;
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(COTNET_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(COTNET_VECTOR_BYTES)));
  typedef int64_t lane_mask;
};
template <class acc>
using Vec = typename VectorOf<acc>::type;
template <class acc>
using Mask = typename VectorOf<acc>::mask;
template <class acc>
using LaneMask = typename VectorOf<acc>::lane_mask;

template <class acc>
constexpr int kLanes = COTNET_VECTOR_BYTES / int(sizeof(acc));

template <class acc>
COTNET_INLINE Vec<acc> splat(acc a) {
  return Vec<acc>{} + a;
}

// ---- loads and stores --------------------------------------------------------------------------------------

COTNET_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
COTNET_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
COTNET_INLINE void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
COTNET_INLINE void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }

typedef uint16_t Bits16 __attribute__((vector_size(COTNET_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(COTNET_VECTOR_BYTES)));

// A bfloat16 is the upper half of a float. Stores round to nearest even; a NaN stays a quiet NaN. The compiler makes twice as
// many instructions of the portable conversions, hence the ones for AVX-512.
#if COTNET_X86 && COTNET_VECTOR_BYTES == 64
COTNET_INLINE Vec<float> widen_bits(__m256i bits) { return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16); }
COTNET_INLINE Vec<float> load(const BFloat16* p) {
  return widen_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
COTNET_INLINE void store(BFloat16* p, Vec<float> v) {
  const __m512i bits = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
}
#else
COTNET_INLINE Vec<float> load(const BFloat16* p) {
  Bits16 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (Vec<float>)(__builtin_convertvector(bits, Bits32) << 16);
}
COTNET_INLINE void store(BFloat16* p, Vec<float> v) {
  const Bits32 bits = (Bits32)v;
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 quiet = (bits >> 16) | 0x40;
  const Mask<float> is_nan = v != v;
  const Bits16 narrow = __builtin_convertvector(((Bits32)is_nan & quiet) | (~(Bits32)is_nan & rounded), Bits16);
  std::memcpy(p, &narrow, sizeof(narrow));
}
#endif

COTNET_INLINE Vec<float> load(const Half* p) {
#if COTNET_F16C && COTNET_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif COTNET_F16C
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}
COTNET_INLINE void store(Half* p, Vec<float> v) {
#if COTNET_F16C && COTNET_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif COTNET_F16C
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = narrow<Half>(v[i]);
#endif
}

// The first `count` lanes; the others are zero, and memory behind them is not touched.
template <class scalar_t>
COTNET_INLINE Vec<acc_t<scalar_t>> load_first(const scalar_t* p, int64_t count) {
  scalar_t lanes[kLanes<acc_t<scalar_t>>] = {};
  std::memcpy(lanes, p, size_t(count) * sizeof(scalar_t));
  return load(lanes);
}
template <class scalar_t>
COTNET_INLINE void store_first(scalar_t* p, Vec<acc_t<scalar_t>> v, int64_t count) {
  scalar_t lanes[kLanes<acc_t<scalar_t>>];
  store(lanes, v);
  std::memcpy(p, lanes, size_t(count) * sizeof(scalar_t));
}
#if COTNET_X86 && COTNET_VECTOR_BYTES == 64
COTNET_INLINE Vec<float> load_first(const float* p, int64_t count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}
COTNET_INLINE void store_first(float* p, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
}
#endif

// `count` lanes, where a full vector is the common case.
template <class scalar_t>
COTNET_INLINE Vec<acc_t<scalar_t>> load_upto(const scalar_t* p, int64_t count) {
  return count >= kLanes<acc_t<scalar_t>> ? load(p) : load_first(p, count);
}
template <class scalar_t>
COTNET_INLINE void store_upto(scalar_t* p, Vec<acc_t<scalar_t>> v, int64_t count) {
  if (count >= kLanes<acc_t<scalar_t>>)
    store(p, v);
  else
    store_first(p, v, count);
}

// Keeps a loaded vector in its register. Otherwise the compiler loads it again for every product that it enters, and
// the products wait for the load ports.
template <class V>
COTNET_INLINE void keep_loaded([[maybe_unused]] V& v) {
#if COTNET_X86
  asm("" : "+v"(v));
#endif
}

// Asks for lines that will be written a little later. A store fetches its line first; a thread that waits for that can
// keep only a few stores under way.
constexpr int kStoreAhead = 4;  // vectors
template <class scalar_t>
COTNET_INLINE void fetch_for_store(scalar_t* p, int64_t distance) {
  __builtin_prefetch(p + distance, 0, 3);
}

// ---- arithmetic --------------------------------------------------------------------------------------------

template <class V>
COTNET_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}
// Lanes where `mask` is set keep `v`, the others become zero: selection, so that an Inf or NaN there is dropped.
COTNET_INLINE Vec<float> keep(Mask<float> mask, Vec<float> v) { return (Vec<float>)((Mask<float>)v & mask); }
COTNET_INLINE Vec<double> keep(Mask<double> mask, Vec<double> v) { return (Vec<double>)((Mask<double>)v & mask); }

template <class acc>
COTNET_INLINE Mask<acc> first_lanes(int64_t count) {
  Mask<acc> mask;
  for (int i = 0; i < kLanes<acc>; ++i) mask[i] = i < count ? -1 : 0;
  return mask;
}
template <class acc>
COTNET_INLINE acc sum_lanes(Vec<acc> v) {  // fixed order: halves are folded onto each other
  acc lanes[kLanes<acc>];
  store(lanes, v);
  for (int width = kLanes<acc> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
template <class acc>
COTNET_INLINE acc max_lanes(Vec<acc> v) {
  acc best = v[0];
  for (int i = 1; i < kLanes<acc>; ++i) best = v[i] > best || v[i] != v[i] ? v[i] : best;
  return best;
}

// exp(x) for x <= 0, as every softmax here subtracts its maximum first: x = n*ln2 + r with |r| <= ln2/2, a polynomial of
// degree 6 for exp(r) (Cephes' coefficients), n added to the exponent. Below 2 ulp; results under 2^-126 become 0;
// NaN stays NaN. The float64 version asks the library, lane by lane.
COTNET_INLINE Vec<float> exponential(Vec<float> x) {
  const Mask<float> tiny = x < -87.33654f;
  const Vec<float> biased = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: low bits hold the nearest integer
  const Vec<float> n = biased - 12582912.0f;
  const Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Bits32 two_to_n = ((Bits32)biased << 23) + 0x3f800000;
  return keep(~tiny, p * (Vec<float>)two_to_n);
}
COTNET_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
