// Planes of NCHW maps staged for a window, and the two sums every pass is made of. Included once per target namespace.
//
// A tile is a band of rows of one unit: one image and one weight channel with the J = C/Cw channels that share it.
// Its planes are staged so that tap (u, v) of a whole run of positions is one contiguous stream at a fixed offset;
// a run is the band itself where rows follow each other without gaps ("flat"), otherwise one row.

// Maps up to this many vectors wide get one column-shifted copy per column tap, so that a run spans all rows: a 7-wide
// row would leave most lanes of a vector idle. Wider maps get a single padded copy, which is less to write.
constexpr int64_t kNarrowVectors = 1;
constexpr int64_t kArenaBytes = 192 * 1024;  // scratch of one tile: stays in a second-level cache
constexpr int64_t kMaxTileRows = 64;

// Scratch handed out in aligned pieces; each piece may be overrun by one vector.
template <class acc>
class Arena {
 public:
  explicit Arena(int64_t elements) : scratch_(size_t(elements + 2 * kLanes<acc>) * sizeof(acc)) {}

  static int64_t piece(int64_t elements) { return (elements + 2 * kLanes<acc> - 1) / kLanes<acc> * kLanes<acc>; }
  acc* take(int64_t elements) {
    acc* const start = scratch_.template as<acc>() + used_;
    used_ += piece(elements);
    return start;
  }
  int64_t mark() const { return used_; }
  void reset(int64_t mark) { used_ = mark; }

 private:
  Scratch scratch_;
  int64_t used_ = 0;
};

// How the planes under a window are laid out in scratch.
struct Staging {
  int64_t width;     // positions in a row of the map being computed
  int64_t copies;    // column-shifted copies of a plane: one per column tap, or 1 when shifted loads serve them all
  int64_t length;    // elements of a staged row
  int64_t pitch;     // from one staged row to the next; padded rows start on a vector, so that one tap in kw is aligned
  int64_t row_step;  // staged rows from one computed row to the next
  bool blockwise;    // copies are whole blocks of rows shifted sideways

  bool flat() const { return pitch == width && row_step == 1; }
};

// A map as wide as its output, narrow, with taps that reach no further than the gap between copies.
template <class acc>
bool is_narrow(const Axis& cols) {
  return cols.stride == 1 && cols.in == cols.out && cols.in <= kNarrowVectors * kLanes<acc> && cols.padding < cols.in;
}

template <class acc>
int64_t staged_pitch(const Staging& s) {
  return s.length == s.width ? s.width : ceil_div(s.length, kLanes<acc>) * kLanes<acc>;
}

// Input planes, read by the output positions (forward, gradient of the weights).
template <class acc>
Staging gather_staging(const AggregationProblem& p) {
  const Axis& cols = p.cols;
  Staging s;
  s.width = cols.out;
  s.row_step = p.rows.stride;
  s.blockwise = s.row_step == 1 && !p.reflect && is_narrow<acc>(cols);
  s.copies = s.blockwise || cols.stride > 1 ? cols.kernel : 1;
  s.length = s.copies == 1 ? cols.out + cols.extent() : cols.out;
  s.pitch = staged_pitch<acc>(s);
  return s;
}

// Gradient planes, read by the input positions (gradient of the input). Zero padding only.
template <class acc>
Staging spread_staging(const AggregationProblem& p) {
  const Axis& cols = p.cols;
  Staging s;
  s.width = cols.in;
  s.row_step = 1;
  s.blockwise = p.rows.stride == 1 && is_narrow<acc>(cols);
  s.copies = s.blockwise || cols.stride > 1 ? cols.kernel : 1;
  s.length = s.copies == 1 ? cols.in + cols.extent() : cols.in;
  s.pitch = staged_pitch<acc>(s);
  return s;
}

// Staged rows under `tile_rows` computed rows, and offsets of the taps from a computed position.
inline int64_t staged_rows(const AggregationProblem& p, const Staging& s, int64_t tile_rows) {
  return (tile_rows - 1) * s.row_step + p.rows.extent() + 1;
}
// From one copy of a plane to the next. Copies of blocks have a gap between them: the vector stored at the start of one
// reaches up to its shift to the left, and the last vector of the one before up to a shift and a vector to the right.
template <class acc>
int64_t copy_stride(const Staging& s, int64_t rows) {
  return rows * s.pitch + (s.blockwise ? 3 * kLanes<acc> : 0);
}
template <class acc>
void gather_offsets(const AggregationProblem& p, const Staging& s, int64_t rows, int64_t* offsets) {
  for (int64_t u = 0; u < p.rows.kernel; ++u)
    for (int64_t v = 0; v < p.cols.kernel; ++v)
      *offsets++ = u * p.rows.dilation * s.pitch + (s.copies == 1 ? v * p.cols.dilation : v * copy_stride<acc>(s, rows));
}
template <class acc>
void spread_offsets(const AggregationProblem& p, const Staging& s, int64_t rows, int64_t* offsets) {
  for (int64_t u = p.rows.kernel - 1; u >= 0; --u)
    for (int64_t v = 0; v < p.cols.kernel; ++v)
      *offsets++ = u * p.rows.dilation * s.pitch +
                   (s.copies == 1 ? (p.cols.kernel - 1 - v) * p.cols.dilation : v * copy_stride<acc>(s, rows));
}

// Which columns stay within the row when moved by `shift`, as lane masks over `rows` rows.
template <class acc>
void column_mask(int64_t rows, int64_t width, int64_t shift, LaneMask<acc>* mask) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < width; ++column)
      *mask++ = column + shift >= 0 && column + shift < width ? -1 : 0;
}

// Rows z_begin, z_begin + 1, ... of a plane that exist, as one block.
struct Block {
  int64_t top, size, bottom;  // elements of zero rows above, of the block, of zero rows below
  int64_t start;              // first element in the plane
};
inline Block block_of(int64_t height, int64_t width, int64_t z_begin, int64_t z_count) {
  const int64_t begin = std::clamp(int64_t(0), z_begin, z_begin + z_count);
  const int64_t end = std::clamp(height, begin, z_begin + z_count);
  return {(begin - z_begin) * width, (end - begin) * width, (z_begin + z_count - end) * width, begin * width};
}

// One copy: to[q] = plane[q + shift] of that block, zero where that leaves the row; `mask` says where it does not.
template <class scalar_t>
void stage_block(const scalar_t* plane, int64_t height, int64_t width, int64_t z_begin, int64_t z_count, int64_t shift,
                 const LaneMask<acc_t<scalar_t>>* mask, acc_t<scalar_t>* to) {
  const Block b = block_of(height, width, z_begin, z_count);
  stage_zeros(to, b.top);
  stage_block_shifted(to + b.top, plane + b.start, b.size, shift, mask);
  stage_zeros(to + b.top + b.size, b.bottom);
}

// All copies of `channels` planes at once, shifted by first_shift, first_shift + shift_step, ...: each vector is loaded
// once and stored to every copy, moved by its shift. Here `masks` are by source: the columns of the plane that a copy
// keeps, the same for all channels. kCopies is the number of copies, or 0 for `copies`.
template <int kCopies, class scalar_t>
void stage_block_copies(const scalar_t* plane, int64_t plane_stride, int64_t channels, const Block& b, int64_t copies,
                        int64_t first_shift, int64_t shift_step, const LaneMask<acc_t<scalar_t>>* masks, int64_t mask_stride,
                        acc_t<scalar_t>* to, int64_t copy_stride, int64_t channel_stride) {
  using acc = acc_t<scalar_t>;
  if (kCopies) copies = kCopies;
  for (int64_t j = 0; j < channels; ++j)
    for (int64_t v = 0; v < copies; ++v)
      stage_zeros(to + j * channel_stride + v * copy_stride, b.top + std::max<int64_t>(-(first_shift + v * shift_step), 0));
  for (int64_t q = 0; q < b.size; q += kLanes<acc>) {
    Mask<acc> kept[kCopies ? kCopies : 1];
    for (int v = 0; v < kCopies; ++v) std::memcpy(&kept[v], masks + v * mask_stride + q, sizeof(Mask<acc>));
    for (int64_t j = 0; j < channels; ++j) {
      const Vec<acc> x = load_upto(plane + j * plane_stride + b.start + q, b.size - q);
      acc* const start = to + j * channel_stride + b.top + q - first_shift;
      for (int64_t v = 0; v < copies; ++v) {
        if (!kCopies) std::memcpy(&kept[0], masks + v * mask_stride + q, sizeof(Mask<acc>));
        store(start + v * (copy_stride - shift_step), keep(kept[kCopies ? v : 0], x));
      }
    }
  }
  for (int64_t j = 0; j < channels; ++j)
    for (int64_t v = 0; v < copies; ++v) {
      const int64_t missing = std::max<int64_t>(first_shift + v * shift_step, 0);
      stage_zeros(to + j * channel_stride + v * copy_stride + b.top + b.size - missing, missing + b.bottom);
    }
}

// Copy `v` of an input plane row by row: staged row i holds input row z_begin + i.
template <class scalar_t>
void stage_gather(const AggregationProblem& p, const Staging& s, const scalar_t* plane, int64_t z_begin, int64_t z_count,
                  int64_t v, acc_t<scalar_t>* to) {
  const int64_t first = v * p.cols.dilation - p.cols.padding;
  for (int64_t z = z_begin; z < z_begin + z_count; ++z, to += s.pitch) {
    const bool inside = z >= 0 && z < p.rows.in;
    if (!inside && !p.reflect) {
      stage_zeros(to, s.length);
      continue;
    }
    // A row beyond the last tap of the last output row may lie outside even the reflection; nothing reads it.
    const int64_t row = std::clamp(reflected(z, p.rows.in), int64_t(0), p.rows.in - 1);
    stage_row(to, plane + row * p.cols.in, s.length, first, p.cols.stride, p.cols.in, p.reflect);
  }
}

// A plane of the output map seen from the input: staged row i holds the output row that input row z_begin + i - padding
// feeds, or zeros; `first` is the same shift for columns. `plane` points at output row `plane_row`.
template <class scalar_t>
void stage_spread(const AggregationProblem& p, const Staging& s, const scalar_t* plane, int64_t plane_row, int64_t z_begin,
                  int64_t z_count, int64_t first, int64_t length, int64_t pitch, const LaneMask<acc_t<scalar_t>>* mask,
                  acc_t<scalar_t>* to) {
  if (s.blockwise)
    return stage_block(plane - plane_row * p.cols.out, p.rows.out, p.cols.out, z_begin, z_count, first, mask, to);
  for (int64_t z = z_begin; z < z_begin + z_count; ++z, to += pitch) {
    const int64_t row = output_of(z, p.rows.stride, p.rows.out);
    if (row < 0)
      stage_zeros(to, length);
    else
      stage_row_spread(to, plane + (row - plane_row) * p.cols.out, length, first, p.cols.stride, p.cols.out);
  }
}

// Lines to ask for while a tile is computed: what the thread's next task reads. Staging is a copy and waits for memory,
// summing does not; asking ahead lets the two overlap.
template <class scalar_t>
struct Ahead {
  const scalar_t* start;  // what the next task reads for the first position of this run
  int64_t streams;        // planes, `stride` elements apart
  int64_t stride;

  COTNET_INLINE void fetch(int64_t q) const {
    for (int64_t i = 0; i < streams; ++i) __builtin_prefetch(start + q + i * stride, 0, 2);
  }
};

// Two sets of planes to ask for.
template <class scalar_t>
struct AheadTwice {
  Ahead<scalar_t> first, second;

  COTNET_INLINE void fetch(int64_t q) const {
    first.fetch(q);
    second.fetch(q);
  }
  AheadTwice at(int64_t offset) const {
    return {{first.start + offset, first.streams, first.stride}, {second.start + offset, second.streams, second.stride}};
  }
};

// ---- where the values under a window come from -------------------------------------------------------------------------
// move_to(q) chooses a vector of positions; tap(t) then hands out what tap t reads for it, channel by channel.

// Staged planes: every tap is a stream at its own offset.
template <class acc>
struct StagedPlanes {
  const acc* staged;
  const int64_t* offsets;  // of the taps
  int64_t channel_stride;
  const acc* at = nullptr;

  struct Tap {
    const acc* at;
    int64_t channel_stride;
    COTNET_INLINE Vec<acc> channel(int64_t j) const { return load(at + j * channel_stride); }
  };
  COTNET_INLINE void move_to(int64_t q) { at = staged + q; }
  COTNET_INLINE Tap tap(int64_t t) const { return {at + offsets[t], channel_stride}; }
};

// ---- the two sums ------------------------------------------------------------------------------------------------

// y[j] = sum over taps of w[t] * x[j][t] for kChannels channels, from `first` on, of one vector of positions: each weight
// vector is loaded once for all of them, and their chains of additions run in parallel.
// The loop over taps stays a loop: unrolled, the compiler computes one address per product instead of one per tap.
template <int kChannels, int kTaps, class Planes, class scalar_t>
COTNET_INLINE void sum_channels(const Vec<acc_t<scalar_t>>* w, int64_t taps, const Planes& planes, int64_t first, scalar_t* y,
                                int64_t y_stride, int64_t count) {
  using acc = acc_t<scalar_t>;
  Vec<acc> sums[kChannels] = {};
#pragma GCC unroll 1
  for (int64_t t = 0; t < (kTaps ? kTaps : taps); ++t) {
    auto tap = planes.tap(t);
    tap.at += first * tap.channel_stride;
    const Vec<acc> wt = w[t];
#pragma GCC unroll 8
    for (int j = 0; j < kChannels; ++j) sums[j] += wt * tap.channel(j);
  }
  for (int j = 0; j < kChannels; ++j) {
    fetch_for_store(y + (first + j) * y_stride, kStoreAhead * kLanes<acc>);
    store_upto(y + (first + j) * y_stride, sums[j], count);
  }
}

// y[j][q] = sum over taps of weights(t, position + q) * x[j][t] for a run of positions q.
// The last vector of a run is moved back to end with it: positions computed twice get the same value twice.
template <int kTaps, class Weights, class Planes, class Next, class scalar_t>
void weighted_sum(const Weights& weights, int64_t position, int64_t length, int64_t taps, Planes& planes, int64_t channels,
                  Vec<acc_t<scalar_t>>* buffer, scalar_t* y, int64_t y_stride, const Next& next) {
  using acc = acc_t<scalar_t>;
  constexpr int lanes = kLanes<acc>;
  Vec<acc> registers[kTaps ? kTaps : 1];
  Vec<acc>* const w = kTaps ? registers : buffer;
  for (int64_t q = 0; q < length; q += lanes) {
    if (q + lanes > length && length >= lanes) q = length - lanes;
    const int64_t count = std::min<int64_t>(lanes, length - q);
    next.fetch(q);
    planes.move_to(q);
    weights.template block<kTaps>(w, position + q, count);
    int64_t j = 0;
    for (; j + 8 <= channels; j += 8) sum_channels<8, kTaps>(w, taps, planes, j, y + q, y_stride, count);
    for (; j + 2 <= channels; j += 2) sum_channels<2, kTaps>(w, taps, planes, j, y + q, y_stride, count);
    if (j < channels) sum_channels<1, kTaps>(w, taps, planes, j, y + q, y_stride, count);
  }
}

// products[t] = sum over channels of g[j] * x[j][t] for kChunk taps, from `first` on, of one vector of positions.
template <int kChunk, class Planes, class scalar_t>
COTNET_INLINE void sum_over_channels(const scalar_t* g, int64_t g_stride, const Planes& planes, int64_t first, int64_t channels,
                                     int64_t count, Vec<acc_t<scalar_t>>* products) {
  using acc = acc_t<scalar_t>;
  Vec<acc> sums[kChunk] = {};
  decltype(planes.tap(0)) tap[kChunk];
  for (int t = 0; t < kChunk; ++t) tap[t] = planes.tap(first + t);
  for (int64_t j = 0; j < channels; ++j) {
    const Vec<acc> gj = load_upto(g + j * g_stride, count);
    for (int t = 0; t < kChunk; ++t) sums[t] += gj * tap[t].channel(j);
  }
  for (int t = 0; t < kChunk; ++t) products[first + t] = sums[t];
}

// sink(position + q, products, count, fresh) for every vector of a run, where products[t] is the gradient of weight t:
// sum over channels of g[j][q] * x[j][t]. Lanes before `fresh` were handed over already.
template <class Sink, class Planes, class Next, class scalar_t>
void correlate(Sink& sink, int64_t position, int64_t length, int64_t taps, Planes& planes, const scalar_t* g, int64_t g_stride,
               int64_t channels, Vec<acc_t<scalar_t>>* products, const Next& next) {
  using acc = acc_t<scalar_t>;
  constexpr int lanes = kLanes<acc>;
  for (int64_t q = 0, done = 0; q < length; q += lanes) {
    if (q + lanes > length && length >= lanes) q = length - lanes;
    const int64_t count = std::min<int64_t>(lanes, length - q);
    next.fetch(q);
    planes.move_to(q);
    int64_t t = 0;
    for (; t + 9 <= taps; t += 9) sum_over_channels<9>(g + q, g_stride, planes, t, channels, count, products);
    for (; t + 3 <= taps; t += 3) sum_over_channels<3>(g + q, g_stride, planes, t, channels, count, products);
    for (; t < taps; ++t) sum_over_channels<1>(g + q, g_stride, planes, t, channels, count, products);
    sink(position + q, products, count, done - q);
    done = q + lanes;
  }
}

// ---- the same for two rows of a 3x3 window at once -------------------------------------------------------------------
// Nearly every load of a shifted row crosses a cache line, and that is what the sums above wait for. Neighbouring rows
// share two of their three input rows: computed together they need 12 loads for 18 products instead of 18. It takes
// 18 vectors of weights in registers, so only targets with 32 of them do it.

constexpr bool kPairsRows = COTNET_VECTOR_BYTES == 64;

// Tap of row `r`, column `v` of the staged window; a gradient's window is staged turned around.
template <bool kTurned>
constexpr int tap_at(int r, int v) {
  return kTurned ? 8 - (3 * r + v) : 3 * r + v;
}

template <bool kTurned, class Weights, class Next, class scalar_t, class acc>
void weighted_sum_pair(const Weights& weights, int64_t position, int64_t length, int64_t column_step, const acc* staged,
                       int64_t pitch, int64_t channel_stride, int64_t channels, scalar_t* y, int64_t y_stride,
                       const Next& next) {
  constexpr int lanes = kLanes<acc>;
  for (int64_t q = 0; q < length; q += lanes) {
    if (q + lanes > length && length >= lanes) q = length - lanes;
    const int64_t count = std::min<int64_t>(lanes, length - q);
    next.fetch(q);
    next.fetch(length + q);
    Vec<acc> upper[9], lower[9];
    weights.template block<9>(upper, position + q, count);
    weights.template block<9>(lower, position + length + q, count);
    for (int64_t j = 0; j < channels; ++j) {
      Vec<acc> above = {}, below = {};
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < 3; ++v) {
          Vec<acc> x = load(staged + j * channel_stride + r * pitch + v * column_step + q);
          keep_loaded(x);
          if (r < 3) above += upper[tap_at<kTurned>(r, v)] * x;
          if (r > 0) below += lower[tap_at<kTurned>(r - 1, v)] * x;
        }
      }
      for (int64_t row = 2; row < 4; ++row) fetch_for_store(y + j * y_stride + q, row * length);
      store_upto(y + j * y_stride + q, above, count);
      store_upto(y + j * y_stride + length + q, below, count);
    }
  }
}

template <class Sink, class Next, class scalar_t, class acc>
void correlate_pair(Sink& sink, int64_t position, int64_t length, int64_t column_step, const scalar_t* g, int64_t g_stride,
                    const acc* staged, int64_t pitch, int64_t channel_stride, int64_t channels, const Next& next) {
  constexpr int lanes = kLanes<acc>;
  for (int64_t q = 0, done = 0; q < length; q += lanes) {
    if (q + lanes > length && length >= lanes) q = length - lanes;
    const int64_t count = std::min<int64_t>(lanes, length - q);
    next.fetch(q);
    next.fetch(length + q);
    Vec<acc> upper[9] = {}, lower[9] = {};
    for (int64_t j = 0; j < channels; ++j) {
      const Vec<acc> above = load_upto(g + j * g_stride + q, count), below = load_upto(g + j * g_stride + length + q, count);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < 3; ++v) {
          Vec<acc> x = load(staged + j * channel_stride + r * pitch + v * column_step + q);
          keep_loaded(x);
          if (r < 3) upper[3 * r + v] += above * x;
          if (r > 0) lower[3 * r - 3 + v] += below * x;
        }
      }
    }
    sink(position + q, upper, count, done - q);
    sink(position + length + q, lower, count, done - q);
    done = q + lanes;
  }
}
