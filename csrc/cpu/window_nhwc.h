// Pixels of NHWC maps staged for a window, and the three loops every pass is made of. Included once per target namespace.
//
// Channels are contiguous here, so vectors run along them. Channel c = j*Cw + m meets weight m at every j: the weights of
// a pixel, stored [m][t], are staged transposed as one row of m per tap, and a row serves all vectors of channels.

// How channels and weights lie in vectors.
struct ChannelLayout {
  int64_t weights;   // Cw
  int64_t channels;  // C
  int64_t pitch;     // elements of a staged pixel: whole vectors
  int64_t period;    // channels from one vector to the next that meets the same weights
  int64_t repeats;   // how often the vectors of one period meet each weight
  int64_t together;  // pixels that share a row of staged weights, side by side, where Cw is half a vector or a quarter
  int64_t used;      // a row of one pixel continues periodically up to here, for vectors that start at any m
  int64_t row;       // elements of a staged row of weights: whole vectors
};

inline int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }

// Transposition in blocks of 4 x 4 needs shuffles, and four of both.
#if defined(__clang__) || __GNUC__ >= 12
#define COTNET_SHUFFLES 1
#else
#define COTNET_SHUFFLES 0
#endif
template <class acc>
constexpr int kQuads = kLanes<acc> / 4;
template <class acc>
bool in_quads(int64_t weights, int64_t taps) {
  return COTNET_SHUFFLES && kQuads<acc> > 0 && weights % 4 == 0 && taps >= 4;
}

template <class acc>
ChannelLayout channel_layout(const AggregationProblem& p) {
  constexpr int64_t lanes = kLanes<acc>;
  ChannelLayout l;
  l.weights = p.weight_channels;
  l.channels = p.channels;
  l.pitch = round_up(l.channels, lanes);
  const int64_t common = std::min(l.weights & -l.weights, lanes);  // greatest common divisor: lanes is a power of two
  l.period = std::min(l.weights / common * lanes, l.pitch);
  l.repeats = std::min(lanes / common, p.sharing());
  l.together = in_quads<acc>(l.weights, p.taps()) && lanes % l.weights == 0 ? lanes / l.weights : 1;
  l.used = l.together > 1 ? lanes : l.weights - common + lanes;
  l.row = round_up(std::max(l.used, l.period), lanes);
  return l;
}

// ---- shuffles ----------------------------------------------------------------------------------------------------
#if COTNET_SHUFFLES

template <class acc>
struct QuadOf;
template <>
struct QuadOf<float> {
  typedef float type __attribute__((vector_size(16)));
};
template <>
struct QuadOf<double> {
  typedef double type __attribute__((vector_size(32)));
};
template <class acc>
using Quad = typename QuadOf<acc>::type;

template <class acc>
COTNET_INLINE Quad<acc> load_quad(const acc* p) {
  Quad<acc> q;
  std::memcpy(&q, p, sizeof(q));
  return q;
}
template <class acc>
COTNET_INLINE void store_quad(acc* p, Quad<acc> q) {
  std::memcpy(p, &q, sizeof(q));
}

// The quads at p[0] + at, p[1] + at, ... side by side, and the first `count` of them back.
template <class acc>
COTNET_INLINE Vec<acc> join_quads(const acc* const* p, int64_t at) {
  if constexpr (kQuads<acc> == 1) return load_quad(p[0] + at);
  else return __builtin_shufflevector(load_quad(p[0] + at), load_quad(p[1] + at), 0, 1, 2, 3, 4, 5, 6, 7);
}
template <class acc>
COTNET_INLINE void part_quads(acc* const* p, int64_t at, int count, Vec<acc> v) {
  if constexpr (kQuads<acc> == 1) {
    store_quad<acc>(p[0] + at, v);
  } else {
    store_quad<acc>(p[0] + at, __builtin_shufflevector(v, v, 0, 1, 2, 3));
    if (count > 1) store_quad<acc>(p[1] + at, __builtin_shufflevector(v, v, 4, 5, 6, 7));
  }
}
#if COTNET_X86 && COTNET_VECTOR_BYTES == 64
template <>
COTNET_INLINE Vec<float> join_quads<float>(const float* const* p, int64_t at) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p[0] + at));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p[1] + at), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p[2] + at), 2);
  return (Vec<float>)_mm512_insertf32x4(v, _mm_loadu_ps(p[3] + at), 3);
}
template <>
COTNET_INLINE void part_quads<float>(float* const* p, int64_t at, int count, Vec<float> v) {
  _mm_storeu_ps(p[0] + at, _mm512_castps512_ps128((__m512)v));
  if (count > 1) _mm_storeu_ps(p[1] + at, _mm512_extractf32x4_ps((__m512)v, 1));
  if (count > 2) _mm_storeu_ps(p[2] + at, _mm512_extractf32x4_ps((__m512)v, 2));
  if (count > 3) _mm_storeu_ps(p[3] + at, _mm512_extractf32x4_ps((__m512)v, 3));
}
#endif

// Entry i of a shuffle of two vectors of `lanes` that does to every quad what {a, b, c, d} does to the first.
template <int a, int b, int c, int d>
constexpr int quad_entry(int i, int lanes) {
  constexpr int entries[4] = {a, b, c, d};
  return i / 4 * 4 + entries[i % 4] % 4 + (entries[i % 4] >= 4 ? lanes : 0);
}
template <int a, int b, int c, int d, class V, int... i>
COTNET_INLINE V shuffle_quads(V v, V w, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, w, quad_entry<a, b, c, d>(i, sizeof...(i))...);
}
// Transposes every quad of four vectors with the same quad of the others: shuffles within quads are the cheap ones.
template <class acc>
COTNET_INLINE void transpose_quads(Vec<acc>* v) {
  constexpr auto all = std::make_integer_sequence<int, kLanes<acc>>();
  const Vec<acc> a = shuffle_quads<0, 4, 1, 5>(v[0], v[1], all), b = shuffle_quads<2, 6, 3, 7>(v[0], v[1], all);
  const Vec<acc> c = shuffle_quads<0, 4, 1, 5>(v[2], v[3], all), d = shuffle_quads<2, 6, 3, 7>(v[2], v[3], all);
  v[0] = shuffle_quads<0, 1, 4, 5>(a, c, all);
  v[1] = shuffle_quads<2, 3, 6, 7>(a, c, all);
  v[2] = shuffle_quads<0, 1, 4, 5>(b, d, all);
  v[3] = shuffle_quads<2, 3, 6, 7>(b, d, all);
}

// Lane i becomes lane (i + shift) % modulus.
template <int shift, int modulus, class V, int... i>
COTNET_INLINE V turn(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i + shift) % modulus...);
}

// The first of kTogether parts of a vector, repeated.
template <int kTogether, class acc>
COTNET_INLINE Vec<acc> load_repeated(const acc* p) {
#if COTNET_X86 && COTNET_VECTOR_BYTES == 64  // broadcasts cost no shuffle, but GCC does not find them by itself
  if constexpr (kTogether == 2 && std::is_same_v<acc, float>) return (Vec<float>)_mm512_broadcast_f32x8(_mm256_loadu_ps(p));
  if constexpr (kTogether == 4) return (Vec<float>)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
  if constexpr (kTogether == 2 && std::is_same_v<acc, double>) return (Vec<double>)_mm512_broadcast_f64x4(_mm256_loadu_pd(p));
#elif COTNET_X86 && COTNET_VECTOR_BYTES == 32
  if constexpr (kTogether == 2) return (Vec<float>)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#endif
  if constexpr (kTogether == 1) return load(p);
  else return turn<0, kLanes<acc> / kTogether>(load(p), std::make_integer_sequence<int, kLanes<acc>>());
}
// Stores the sum of kTogether parts of a vector.
template <int kTogether, class acc>
COTNET_INLINE void store_folded(acc* p, Vec<acc> v) {
  constexpr int lanes = kLanes<acc>;
  constexpr auto all = std::make_integer_sequence<int, lanes>();
  if constexpr (kTogether >= 2) v += turn<lanes / 2, lanes>(v, all);
  if constexpr (kTogether == 4) v += turn<lanes / 4, lanes>(v, all);
  std::memcpy(p, &v, sizeof(v) / kTogether);
}

#else
template <int kTogether, class acc>
COTNET_INLINE Vec<acc> load_repeated(const acc* p) {
  return load(p);
}
template <int kTogether, class acc>
COTNET_INLINE void store_folded(acc* p, Vec<acc> v) {
  store(p, v);
}
#endif

// body(std::integral_constant) of l.together.
template <class acc, class Body>
void with_together(const ChannelLayout& l, const Body& body) {
  if constexpr (kQuads<acc> >= 4)
    if (l.together == 4) return body(std::integral_constant<int, 4>());
  if constexpr (kQuads<acc> >= 2)
    if (l.together == 2) return body(std::integral_constant<int, 2>());
  body(std::integral_constant<int, 1>());
}

// ---- transposition -----------------------------------------------------------------------------------------------

// Start of the next four taps; the last four are moved back to end with the taps, and written twice alike.
inline int64_t next_taps(int64_t t, int64_t taps) { return t + 4 < taps ? std::min(t + 4, taps - 4) : taps; }

// Stages the weights of `count` pixels that share rows, each [Cw][K] and `pixel` elements after the one before:
// to[t][i*Cw + m] = from[i][m][t]. A single pixel continues periodically; pixels that are missing repeat the last one.
template <class acc>
void taps_first(const ChannelLayout& l, int64_t taps, const acc* from, int64_t pixel, int64_t count, acc* to) {
  const int64_t weights = l.weights, used = l.used, row = l.row;
#if COTNET_SHUFFLES
  if constexpr (kQuads<acc> > 0)
    if (in_quads<acc>(weights, taps)) {
      const int64_t step = l.together > 1 ? pixel : 0;
      for (int64_t c = 0, m = 0, i = 0; c < used; c += kLanes<acc>) {
        const acc* quads[kQuads<acc>];
        for (auto& quad : quads) {
          quad = from + std::min(i, count - 1) * step + m * taps;
          if ((m += 4) == weights) m = 0, ++i;
        }
        for (int64_t t = 0; t < taps; t = next_taps(t, taps)) {
          Vec<acc> v[4];
          for (int k = 0; k < 4; ++k) v[k] = join_quads<acc>(quads, t + k * taps);
          transpose_quads<acc>(v);
          for (int k = 0; k < 4; ++k) store(to + (t + k) * row + c, v[k]);
        }
      }
      return;
    }
#endif
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t m = 0; m < used; ++m) to[t * row + m] = m < weights ? from[m * taps + t] : to[t * row + m - weights];
}

// The way back, for their gradients: to[i][m][t] = from[t][i*Cw + m].
template <class acc>
void channels_first(const ChannelLayout& l, int64_t taps, const acc* from, int64_t pixel, int64_t count, acc* to) {
  const int64_t weights = l.weights, row = l.row, used = count * weights;
#if COTNET_SHUFFLES
  if constexpr (kQuads<acc> > 0)
    if (in_quads<acc>(weights, taps)) {
      for (int64_t c = 0, m = 0, i = 0; c < used; c += kLanes<acc>) {
        acc* quads[kQuads<acc>];
        for (auto& quad : quads) {
          quad = to + i * pixel + m * taps;
          if ((m += 4) == weights) m = 0, ++i;
        }
        const int present = int(std::min<int64_t>((used - c) / 4, kQuads<acc>));
        for (int64_t t = 0; t < taps; t = next_taps(t, taps)) {
          Vec<acc> v[4];
          for (int k = 0; k < 4; ++k) v[k] = load(from + (t + k) * row + c);
          transpose_quads<acc>(v);
          for (int k = 0; k < 4; ++k) part_quads<acc>(quads, t + k * taps, present, v[k]);
        }
      }
      return;
    }
#endif
  for (int64_t m = 0; m < weights; ++m)
    for (int64_t t = 0; t < taps; ++t) to[m * taps + t] = from[t * row + m];
}

// ---- pixels ------------------------------------------------------------------------------------------------------

// Narrows `count` contiguous elements: the way back from stage_run. The last vector is moved back to end with the run.
template <class scalar_t>
COTNET_INLINE void unstage_run(scalar_t* to, const acc_t<scalar_t>* from, int64_t count) {
  constexpr int lanes = kLanes<acc_t<scalar_t>>;
  if (count < lanes) return store_first(to, load(from), count);
  for (int64_t i = 0; i + lanes < count; i += lanes) store(to + i, load(from + i));
  store(to + count - lanes, load(from + count - lanes));
}

// `count` pixels of a map as staged pixels, and back.
template <class scalar_t>
void stage_pixels(const ChannelLayout& l, const scalar_t* from, int64_t count, acc_t<scalar_t>* to) {
  if (l.pitch == l.channels) return stage_run(to, from, count * l.channels);
  for (; count > 0; --count, to += l.pitch, from += l.channels) stage_run(to, from, l.channels);
}
template <class scalar_t>
void unstage_pixels(const ChannelLayout& l, const acc_t<scalar_t>* from, int64_t count, scalar_t* to) {
  if (l.pitch == l.channels) return unstage_run(to, from, count * l.channels);
  for (; count > 0; --count, to += l.channels, from += l.pitch) unstage_run(to, from, l.channels);
}

// to[i] += from[i] for `count` elements, whole vectors.
template <class acc>
void add_run(const acc* from, acc* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<acc>) store(to + i, load(to + i) + load(from + i));
}

// Asks for the cache lines of `count` elements; the address may lie beyond the tensor.
enum Access { kRead, kWrite };
template <Access access, class scalar_t>
COTNET_INLINE void prefetch_run(const scalar_t* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(scalar_t))) __builtin_prefetch(from + i, access == kWrite, 3);
}

// What a pixel asks for while it is computed: the same channels of pixels that come later. One line for each vector of work,
// because loads wait behind a burst.
template <class scalar_t>
struct Later {
  const scalar_t* read;
  const scalar_t* written;

  COTNET_INLINE void fetch(int64_t c) const {
    __builtin_prefetch(read + c, 0, 3);
    __builtin_prefetch(written + c, 0, 3);
  }
};

// ---- the three loops ---------------------------------------------------------------------------------------------
// Vectors that start at the same m ("phase") are taken together, so that a vector of weights is loaded once for them.

// y[c] = sum over taps of w[t] * x[t][c] for kVectors vectors of one phase; `left` channels remain.
template <int kVectors, int kTaps, class scalar_t, class acc>
COTNET_INLINE void sum_taps(const Vec<acc>* w, const acc* const* x, int64_t c, int64_t period, scalar_t* y, int64_t left,
                            const Later<scalar_t>& later) {
  for (int i = 0; i < kVectors; ++i) later.fetch(c + i * period);
  Vec<acc> sums[kVectors];
  for (int i = 0; i < kVectors; ++i) sums[i] = w[0] * load(x[0] + c + i * period);
  for (int t = 1; t < kTaps; ++t)
    for (int i = 0; i < kVectors; ++i) sums[i] += w[t] * load(x[t] + c + i * period);
  for (int i = 0; i < kVectors; ++i) store_upto(y + c + i * period, sums[i], left - i * period);
}

// The same for any number of taps: the vectors of channels stay in registers instead of the weights.
template <int kVectors, int kTogether, class scalar_t, class acc>
COTNET_INLINE void sum_vectors(int64_t row, int64_t taps, const acc* w, const acc* x, const int64_t* offsets, int64_t period,
                               scalar_t* y, int64_t left, const Later<scalar_t>& later, int64_t c) {
  for (int i = 0; i < kVectors; ++i) later.fetch(c + i * period);
  Vec<acc> sums[kVectors] = {};
  for (int64_t t = 0; t < taps; ++t) {
    const Vec<acc> wt = load_repeated<kTogether>(w + t * row);
    for (int i = 0; i < kVectors; ++i) sums[i] += wt * load(x + offsets[t] + i * period);
  }
  for (int i = 0; i < kVectors; ++i) store_upto(y + i * period, sums[i], left - i * period);
}

// One output pixel: y[c] = sum over taps of w[t][c % Cw] * x[offsets[t] + c].
template <int kTogether, class scalar_t, class acc>
COTNET_INLINE void sum_pixel(const ChannelLayout& l, int64_t taps, const acc* w, const acc* x, const int64_t* offsets, scalar_t* y,
                             const Later<scalar_t>& later) {
  const int64_t period = l.period, channels = l.channels, row = l.row;
  for (int64_t phase = 0; phase < period; phase += kLanes<acc>) {
    const acc* const from = w + (phase < l.weights ? phase : phase % l.weights);
    int64_t c = phase;
    if (taps == 9) {
      Vec<acc> weights[9];
      const acc* places[9];
      for (int t = 0; t < 9; ++t) {
        weights[t] = load_repeated<kTogether>(from + t * row);
        places[t] = x + offsets[t];
      }
      for (; c + period < channels; c += 2 * period) sum_taps<2, 9>(weights, places, c, period, y, channels - c, later);
      if (c < channels) sum_taps<1, 9>(weights, places, c, period, y, channels - c, later);
      continue;
    }
    for (; c + 7 * period < channels; c += 8 * period)
      sum_vectors<8, kTogether>(row, taps, from, x + c, offsets, period, y + c, channels - c, later, c);
    for (; c + period < channels; c += 2 * period)
      sum_vectors<2, kTogether>(row, taps, from, x + c, offsets, period, y + c, channels - c, later, c);
    if (c < channels) sum_vectors<1, kTogether>(row, taps, from, x + c, offsets, period, y + c, channels - c, later, c);
  }
}

// products[t] = sum over the vectors of one phase of g[c] * x[offsets[t] + c], for kTaps taps.
template <int kTaps, int kTogether, class scalar_t, class acc>
COTNET_INLINE void multiply_taps(const ChannelLayout& l, int64_t phase, const scalar_t* g, const acc* x, const int64_t* offsets,
                                 acc* products, const scalar_t* later) {
  const int64_t period = l.period, channels = l.channels, row = l.row;
  const acc* places[kTaps];
  for (int t = 0; t < kTaps; ++t) places[t] = x + offsets[t];
  Vec<acc> sums[kTaps] = {};
  for (int64_t c = phase; c < channels; c += period) {
    if (later) __builtin_prefetch(later + c, 0, 3);
    const Vec<acc> gc = load_upto(g + c, channels - c);
    for (int t = 0; t < kTaps; ++t) sums[t] += gc * load(places[t] + c);
  }
  for (int t = 0; t < kTaps; ++t) store_folded<kTogether>(products + t * row + phase, sums[t]);
}

// Gradient of the weights of one pixel, [t][m]; where pixels do not share rows, before add_repeats.
template <int kTogether, class scalar_t, class acc>
COTNET_INLINE void multiply_pixel(const ChannelLayout& l, int64_t taps, const scalar_t* g, const acc* x, const int64_t* offsets,
                                  acc* products, const scalar_t* later) {
  for (int64_t phase = 0; phase < l.period; phase += kLanes<acc>) {
    int64_t t = 0;
    for (; t + 9 <= taps; t += 9) multiply_taps<9, kTogether>(l, phase, g, x, offsets + t, products + t * l.row, t == 0 ? later : nullptr);
    for (; t + 3 <= taps; t += 3) multiply_taps<3, kTogether>(l, phase, g, x, offsets + t, products + t * l.row, t == 0 ? later : nullptr);
    for (; t < taps; ++t) multiply_taps<1, kTogether>(l, phase, g, x, offsets + t, products + t * l.row, t == 0 ? later : nullptr);
  }
}

// products[t][m] = sum of products[t][m + r*Cw] over the repeats of a period. In place: a vector is overwritten after all
// that reads it.
template <class acc>
void add_repeats(const ChannelLayout& l, int64_t rows, acc* products) {
  if (l.repeats == 1 || l.together > 1) return;
  for (acc* const end = products + rows * l.row; products < end; products += l.row)
    for (int64_t m = 0; m < l.weights; m += kLanes<acc>) {
      Vec<acc> sum = load(products + m);
      for (int64_t r = 1; r < l.repeats; ++r) sum += load(products + m + r * l.weights);
      store(products + m, sum);
    }
}

// to[offsets[t] + c] += w[rows[t] + m] * g[c] for kTaps taps and the vectors of one phase. Taps may share an offset where a
// border is reflected, so each is read after the one before is written.
template <int kTaps, int kTogether, class scalar_t, class acc>
COTNET_INLINE void scatter_taps(const ChannelLayout& l, int64_t phase, const scalar_t* g, const acc* w, const int64_t* rows,
                                acc* to, const int64_t* offsets, const Later<scalar_t>& later) {
  const int64_t period = l.period, channels = l.channels;
  Vec<acc> weights[kTaps];
  acc* places[kTaps];
  for (int t = 0; t < kTaps; ++t) {
    weights[t] = load_repeated<kTogether>(w + rows[t]);
    places[t] = to + offsets[t];
  }
  for (int64_t c = phase; c < channels; c += period) {
    later.fetch(c);
    const Vec<acc> gc = load_upto(g + c, channels - c);
    for (int t = 0; t < kTaps; ++t) store(places[t] + c, load(places[t] + c) + weights[t] * gc);
  }
}

// What one output pixel adds to the gradient of the input; rows[t] is where the weights of a tap are.
template <int kTogether, class scalar_t, class acc>
COTNET_INLINE void scatter_pixel(const ChannelLayout& l, int64_t taps, const scalar_t* g, const acc* w, const int64_t* rows,
                                 acc* to, const int64_t* offsets, const Later<scalar_t>& later) {
  for (int64_t phase = 0; phase < l.period; phase += kLanes<acc>) {
    const acc* const from = w + (phase < l.weights ? phase : phase % l.weights);
    int64_t t = 0;
    for (; t + 9 <= taps; t += 9) scatter_taps<9, kTogether>(l, phase, g, from, rows + t, to, offsets + t, later);
    for (; t + 3 <= taps; t += 3) scatter_taps<3, kTogether>(l, phase, g, from, rows + t, to, offsets + t, later);
    for (; t < taps; ++t) scatter_taps<1, kTogether>(l, phase, g, from, rows + t, to, offsets + t, later);
  }
}
