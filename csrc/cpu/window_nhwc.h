// Pixels of NHWC maps staged for a window, and the three loops every pass is made of. Included once per target namespace.
//
// Channels are contiguous here, so vectors run along them. Channel c = j*Cw + m meets weight m at every j: the weights of
// a pixel, stored [m][t], are staged transposed as one row of m per tap, and a row serves all vectors of channels.

// Which channels a unit holds and how they lie in vectors. A unit is one image and `part` neighbouring weight channels
// with the J channels that share each of them: one cache line of every group of Cw, where Cw is made of whole lines.
// That splits small maps with many channels into more tasks, without halos, and keeps their windows in the first-level
// cache; the units of an image share no line.
struct ChannelLayout {
  int64_t part;      // weight channels
  int64_t channels;  // J * part
  int64_t pitch;     // elements of a staged pixel: whole vectors
  int64_t period;    // channels from one vector to the next that meets the same weights
  int64_t stride;    // the same distance in a map's pixel
  int64_t repeats;   // vectors of one period hold each weight channel this often
  int64_t used;      // a staged row continues periodically up to here, for vectors that start at any m
  int64_t row;       // elements of a staged row of weights
};

inline int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }

template <class scalar_t>
ChannelLayout channel_layout(const AggregationProblem& p) {
  constexpr int64_t lanes = kLanes<acc_t<scalar_t>>;
  constexpr int64_t line = std::max<int64_t>(lanes, 100000 / sizeof(scalar_t));
  ChannelLayout l;
  l.part = p.weight_channels % line == 0 ? line : p.weight_channels;
  l.channels = l.part * p.sharing();
  l.pitch = round_up(l.channels, lanes);
  const int64_t common = std::min(l.part & -l.part, lanes);  // greatest common divisor: lanes is a power of two
  l.period = std::min(l.part / common * lanes, l.pitch);
  l.stride = l.part % lanes == 0 ? p.weight_channels : l.period;
  l.repeats = std::min(lanes / common, p.sharing());
  l.used = l.part - common + lanes;
  l.row = round_up(std::max(l.used + (l.part % 4 ? 3 : 0), l.period), lanes);
  return l;
}

// ---- transposition -----------------------------------------------------------------------------------------------
// In blocks of 4 x 4, as many side by side as fit a vector: that suits any number of taps from four on, and the shuffles
// stay within quads of lanes, where they are cheap.

#if defined(__clang__) || __GNUC__ >= 12
#define COTNET_SHUFFLES 1

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
constexpr int kQuads = kLanes<acc> / 4;

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

// The quads at p[0] + at, p[1] + at, ... side by side in a vector; back to `count` quads `apart` elements apart.
template <class acc>
COTNET_INLINE Vec<acc> join_quads(const acc* const* p, int64_t at) {
  if constexpr (kQuads<acc> == 1) return load_quad(p[0] + at);
  else return __builtin_shufflevector(load_quad(p[0] + at), load_quad(p[1] + at), 0, 1, 2, 3, 4, 5, 6, 7);
}
template <class acc>
COTNET_INLINE void part_quads(acc* to, int64_t apart, int64_t count, Vec<acc> v) {
  if constexpr (kQuads<acc> == 1) {
    store_quad<acc>(to, v);
  } else {
    store_quad<acc>(to, __builtin_shufflevector(v, v, 0, 1, 2, 3));
    if (count > 1) store_quad<acc>(to + apart, __builtin_shufflevector(v, v, 4, 5, 6, 7));
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
COTNET_INLINE void part_quads<float>(float* to, int64_t apart, int64_t count, Vec<float> v) {
  _mm_storeu_ps(to, _mm512_castps512_ps128((__m512)v));
  if (count > 1) _mm_storeu_ps(to + apart, _mm512_extractf32x4_ps((__m512)v, 1));
  if (count > 2) _mm_storeu_ps(to + 2 * apart, _mm512_extractf32x4_ps((__m512)v, 2));
  if (count > 3) _mm_storeu_ps(to + 3 * apart, _mm512_extractf32x4_ps((__m512)v, 3));
}
#endif

// Entry i of a shuffle of two vectors of `lanes` that does to every quad what {a, b, c, d} does to the first.
template <int a, int b, int c, int d>
constexpr int in_quads(int i, int lanes) {
  constexpr int entries[4] = {a, b, c, d};
  return i / 4 * 4 + entries[i % 4] % 4 + (entries[i % 4] >= 4 ? lanes : 0);
}
template <int a, int b, int c, int d, class V, int... i>
COTNET_INLINE V shuffle_quads(V v, V w, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, w, in_quads<a, b, c, d>(i, sizeof...(i))...);
}

// Transposes every quad of four vectors with the same quad of the others.
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

// Start of the next four taps; the last four are moved back to end with the taps, and written twice alike.
inline int64_t next_taps(int64_t t, int64_t taps) { return t + 4 < taps ? std::min(t + 4, taps - 4) : taps; }
#else
#define COTNET_SHUFFLES 0
#endif

// Whether [part][taps] can be transposed in blocks.
template <class acc>
bool in_blocks(int64_t part, int64_t taps) {
  return COTNET_SHUFFLES && kLanes<acc> >= 4 && part % 4 == 0 && taps >= 4;
}

// to[t][m] = from[m % part][t] for m < l.used.
template <class acc>
void taps_first(const ChannelLayout& l, int64_t taps, const acc* from, acc* to) {
  const int64_t part = l.part, used = l.used, row = l.row;
#if COTNET_SHUFFLES
  if constexpr (kLanes<acc> >= 4) {
    if (in_blocks<acc>(part, taps)) {
      for (int64_t m = 0, at = 0; m < used; m += kLanes<acc>) {
        const acc* quads[kQuads<acc>];
        for (int i = 0; i < kQuads<acc>; ++i, at = at + 4 < part ? at + 4 : 0) quads[i] = from + at * taps;
        for (int64_t t = 0; t < taps; t = next_taps(t, taps)) {
          Vec<acc> v[4];
          for (int i = 0; i < 4; ++i) v[i] = join_quads(quads, t + i * taps);
          transpose_quads<acc>(v);
          for (int i = 0; i < 4; ++i) store(to + (t + i) * row + m, v[i]);
        }
      }
      return;
    }
  }
#endif
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t m = 0; m < used; ++m) to[t * row + m] = m < part ? from[m * taps + t] : to[t * row + m - part];
}

// to[m][t] = from[t][m] for m < part.
template <class acc>
void channels_first(const ChannelLayout& l, int64_t taps, const acc* from, acc* to) {
  const int64_t part = l.part, row = l.row;
#if COTNET_SHUFFLES
  if constexpr (kLanes<acc> >= 4) {
    if (in_blocks<acc>(part, taps)) {
      for (int64_t m = 0; m < part; m += kLanes<acc>) {
        const int64_t count = (part - m) / 4;
        for (int64_t t = 0; t < taps; t = next_taps(t, taps)) {
          Vec<acc> v[4];
          for (int i = 0; i < 4; ++i) v[i] = load(from + (t + i) * row + m);
          transpose_quads<acc>(v);
          for (int i = 0; i < 4; ++i) part_quads(to + (m + i) * taps + t, 4 * taps, count, v[i]);
        }
      }
      return;
    }
  }
#endif
  for (int64_t m = 0; m < part; ++m)
    for (int64_t t = 0; t < taps; ++t) to[m * taps + t] = from[t * row + m];
}

// ---- pixels ------------------------------------------------------------------------------------------------------

// Narrows `count` contiguous elements: the way back from stage_run.
template <class scalar_t>
void unstage_run(scalar_t* to, const acc_t<scalar_t>* from, int64_t count) {
  constexpr int lanes = kLanes<acc_t<scalar_t>>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load(from + i), count - i);
}

// `count` pixels of a map, `pixel` elements apart, as staged pixels: each of J groups `group` apart gives `part` channels.
template <class scalar_t>
void stage_pixels(const ChannelLayout& l, const scalar_t* from, int64_t pixel, int64_t group, int64_t count, acc_t<scalar_t>* to) {
  if (l.channels == pixel && l.channels == l.pitch) return stage_run(to, from, count * pixel);
  const int64_t run = l.part == group ? l.channels : l.part;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0, at = 0; c < l.channels; c += run, at += group) stage_run(to + i * l.pitch + c, from + i * pixel + at, run);
}
template <class scalar_t>
void unstage_pixels(const ChannelLayout& l, const acc_t<scalar_t>* from, int64_t pixel, int64_t group, int64_t count, scalar_t* to) {
  if (l.channels == pixel && l.channels == l.pitch) return unstage_run(to, from, count * pixel);
  const int64_t run = l.part == group ? l.channels : l.part;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0, at = 0; c < l.channels; c += run, at += group) unstage_run(to + i * pixel + at, from + i * l.pitch + c, run);
}

// to[i] += from[i] for `count` elements, whole vectors.
template <class acc>
void add_run(const acc* from, acc* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<acc>) store(to + i, load(to + i) + load(from + i));
}

// Asks for the cache lines of `count` elements; the address may lie beyond the tensor.
template <class scalar_t>
COTNET_INLINE void prefetch_run(const scalar_t* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(scalar_t))) __builtin_prefetch(from + i);
}

// ---- the three loops ---------------------------------------------------------------------------------------------
// Vectors that start at the same m ("phase") are taken together, so that a vector of weights is loaded once for them.

// y[c] = sum over taps of w[t][c % part] * x[offsets[t] + c] for kVectors vectors of one phase; `left` channels remain.
template <int kVectors, class scalar_t, class acc>
COTNET_INLINE void sum_vectors(const ChannelLayout& l, int64_t taps, const acc* w, const acc* x, const int64_t* offsets,
                               scalar_t* y, int64_t left) {
  Vec<acc> sums[kVectors] = {};
  for (int64_t t = 0; t < taps; ++t) {
    const Vec<acc> wt = load(w + t * l.row);
    for (int i = 0; i < kVectors; ++i) sums[i] += wt * load(x + offsets[t] + i * l.period);
  }
  for (int i = 0; i < kVectors; ++i) store_upto(y + i * l.stride, sums[i], left - i * l.period);
}

// One output pixel.
template <class scalar_t, class acc>
void sum_pixel(const ChannelLayout& l, int64_t taps, const acc* w, const acc* x, const int64_t* offsets, scalar_t* y) {
  for (int64_t phase = 0; phase < l.period; phase += kLanes<acc>) {
    const acc* const from = w + (phase < l.part ? phase : phase % l.part);
    scalar_t* to = y + phase;
    int64_t c = phase;
    for (; c + 7 * l.period < l.channels; c += 8 * l.period, to += 8 * l.stride)
      sum_vectors<8>(l, taps, from, x + c, offsets, to, l.channels - c);
    for (; c + 3 * l.period < l.channels; c += 4 * l.period, to += 4 * l.stride)
      sum_vectors<4>(l, taps, from, x + c, offsets, to, l.channels - c);
    for (; c < l.channels; c += l.period, to += l.stride) sum_vectors<1>(l, taps, from, x + c, offsets, to, l.channels - c);
  }
}

// products[t][lane] = sum over the vectors of one phase of g * x[offsets[t] + c], for kTaps taps.
template <int kTaps, class scalar_t, class acc>
COTNET_INLINE void multiply_taps(const ChannelLayout& l, int64_t phase, const scalar_t* g, const acc* x, const int64_t* offsets,
                                 acc* products) {
  Vec<acc> sums[kTaps] = {};
  for (int64_t c = phase; c < l.channels; c += l.period, g += l.stride) {
    const Vec<acc> gc = load_upto(g, l.channels - c);
    for (int t = 0; t < kTaps; ++t) sums[t] += gc * load(x + offsets[t] + c);
  }
  for (int t = 0; t < kTaps; ++t) store(products + t * l.row + phase, sums[t]);
}

// Gradient of the weights of one pixel, before the repeats of a period are added up.
template <class scalar_t, class acc>
void multiply_pixel(const ChannelLayout& l, int64_t taps, const scalar_t* g, const acc* x, const int64_t* offsets, acc* products) {
  for (int64_t phase = 0; phase < l.period; phase += kLanes<acc>) {
    int64_t t = 0;
    for (; t + 9 <= taps; t += 9) multiply_taps<9>(l, phase, g + phase, x, offsets + t, products + t * l.row);
    for (; t + 3 <= taps; t += 3) multiply_taps<3>(l, phase, g + phase, x, offsets + t, products + t * l.row);
    for (; t < taps; ++t) multiply_taps<1>(l, phase, g + phase, x, offsets + t, products + t * l.row);
  }
}

// products[t][m] = sum of products[t][m + r*part] over the repeats of a period. In place: a vector is read before it, and
// only it, is overwritten.
template <class acc>
void add_repeats(const ChannelLayout& l, int64_t rows, acc* products) {
  if (l.repeats == 1) return;
  for (acc* const end = products + rows * l.row; products < end; products += l.row)
    for (int64_t m = 0; m < l.part; m += kLanes<acc>) {
      Vec<acc> sum = load(products + m);
      for (int64_t r = 1; r < l.repeats; ++r) sum += load(products + m + r * l.part);
      store(products + m, sum);
    }
}

// to[offsets[t] + c] += w[t][c % part] * g[c] for kTaps taps and the vectors of one phase. Taps may share an offset where
// a border is reflected, so each is read after the one before is written.
template <int kTaps, class scalar_t, class acc>
COTNET_INLINE void scatter_taps(const ChannelLayout& l, int64_t phase, const scalar_t* g, const acc* w, const int64_t* rows,
                                acc* to, const int64_t* offsets) {
  Vec<acc> weights[kTaps];
  for (int t = 0; t < kTaps; ++t) weights[t] = load(w + rows[t]);
  for (int64_t c = phase; c < l.channels; c += l.period, g += l.stride) {
    const Vec<acc> gc = load_upto(g, l.channels - c);
    for (int t = 0; t < kTaps; ++t) {
      acc* const at = to + offsets[t] + c;
      store(at, load(at) + weights[t] * gc);
    }
  }
}

// What one output pixel adds to the gradient of the input: rows[t] is where the weights of a tap are.
template <class scalar_t, class acc>
void scatter_pixel(const ChannelLayout& l, int64_t taps, const scalar_t* g, const acc* w, const int64_t* rows, acc* to,
                   const int64_t* offsets) {
  for (int64_t phase = 0; phase < l.period; phase += kLanes<acc>) {
    const acc* const from = w + (phase < l.part ? phase : phase % l.part);
    int64_t t = 0;
    for (; t + 9 <= taps; t += 9) scatter_taps<9>(l, phase, g + phase, from, rows + t, to, offsets + t);
    for (; t + 3 <= taps; t += 3) scatter_taps<3>(l, phase, g + phase, from, rows + t, to, offsets + t);
    for (; t < taps; ++t) scatter_taps<1>(l, phase, g + phase, from, rows + t, to, offsets + t);
  }
}
