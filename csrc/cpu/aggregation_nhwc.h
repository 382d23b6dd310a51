// The passes of an aggregation over one band of rows of an NHWC map, for every source of weights (weights.h). Included
// once per target namespace. Output pixels are taken in order: their weights are transposed and transformed in scratch,
// the input rows under them wait there widened and padded, and each tensor is read and written once.

constexpr int64_t kStripBytes = 16 * 1024;    // weights of a strip: with the rows of the window in the first-level cache
constexpr int64_t kMaxStrip = 16;             // pixels; enough for stores to have left for the cache before they are loaded
constexpr int64_t kPrefetchBytes = 4 * 1024;  // weights are asked for this early: hardware stops at the end of a page

// Neighbouring output pixels of one row with the weights of one head, [groups][K][row]. Where pixels share rows, lane
// i*Cw + m of a group's row is weight m of its i-th pixel; otherwise a group is a pixel and lane m is weight m. Lanes from
// `width` on are filling, finite wherever the tensors are; the gradients of pixels past the end of the row are zero.
template <class acc>
struct Strip {
  int64_t head;
  int64_t count;   // pixels
  int64_t groups;
  int64_t taps;
  int64_t width;
  int64_t row;
  const acc* raw;      // the weights as they are in memory
  const acc* weights;  // transformed
  acc* grads;          // gradient of the transformed weights

  int64_t size() const { return groups * taps * row; }
};

// What happens to a strip's gradients before they are written: nothing, where the weights are plain.
struct KeepGrads {
  static constexpr bool kReadsWeights = false;
  template <class acc>
  void operator()(const Strip<acc>&) {}
};

// From the gradient d of probabilities to that of their logits: p_t * (d_t - sum over s of p_s * d_s).
struct SoftmaxGrads {
  static constexpr bool kReadsWeights = true;
  template <class acc>
  void operator()(const Strip<acc>& s) {
    for (int64_t group = 0; group < s.size(); group += s.taps * s.row)
      for (int64_t m = 0; m < s.width; m += kLanes<acc>) {
        const acc* const p = s.weights + group + m;
        acc* const d = s.grads + group + m;
        Vec<acc> mean = {};
        for (int64_t t = 0; t < s.taps; ++t) mean += load(p + t * s.row) * load(d + t * s.row);
        for (int64_t t = 0; t < s.taps; ++t) store(d + t * s.row, load(p + t * s.row) * (load(d + t * s.row) - mean));
      }
  }
};

// ---- sources of weights ------------------------------------------------------------------------------------------
// What turns staged weights [K][row] into those of the window. Plain weights are what they are.

// Fills a table [2][K][row] for head g of image n.
template <class Field, class acc>
void prepare_rows(const Field&, const AggregationProblem&, const ChannelLayout&, int64_t, int64_t, acc*) {}

// Scale and shift of GroupNorm.
template <class scalar_t, class acc>
void prepare_rows(const NormField<scalar_t>& field, const AggregationProblem& p, const ChannelLayout& l, int64_t n, int64_t g,
                  acc* table) {
  const int64_t taps = p.taps();
  for (int64_t m = 0; m < l.used; ++m) {
    const int64_t channel = g * l.weights + m % l.weights, group = p.group(n, g, m % l.weights);
    for (int64_t t = 0; t < taps; ++t) {
      const acc scale = field.gamma ? field.rstd[group] * widen(field.gamma[channel * taps + t]) : field.rstd[group];
      table[t * l.row + m] = scale;
      table[(taps + t) * l.row + m] = (field.beta ? widen(field.beta[channel * taps + t]) : acc(0)) - field.mean[group] * scale;
    }
  }
}

template <class scalar_t, class acc>
void transform_rows(const SoftmaxField<scalar_t>&, const ChannelLayout& l, int64_t taps, const acc* raw, const acc*, acc* weights) {
  const int64_t row = l.row;
  for (int64_t m = 0; m < l.used; m += kLanes<acc>) {
    Vec<acc> top = load(raw + m), sum = {};
    for (int64_t t = 1; t < taps; ++t) top = maximum(top, load(raw + t * row + m));
    for (int64_t t = 0; t < taps; ++t) {
      const Vec<acc> chance = exponential(load(raw + t * row + m) - top);
      sum += chance;
      store(weights + t * row + m, chance);
    }
    const Vec<acc> scale = acc(1) / sum;
    for (int64_t t = 0; t < taps; ++t) store(weights + t * row + m, load(weights + t * row + m) * scale);
  }
}
template <class scalar_t, class acc>
void transform_rows(const NormField<scalar_t>&, const ChannelLayout& l, int64_t taps, const acc* raw, const acc* table, acc* weights) {
  const int64_t size = taps * l.row;
  for (int64_t i = 0; i < size; i += kLanes<acc>) store(weights + i, load(raw + i) * load(table + i) + load(table + size + i));
}

// ---- bands -------------------------------------------------------------------------------------------------------

struct Rows {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  bool holds(int64_t i) const { return i >= begin && i < end; }
  int64_t clamp(int64_t i) const { return std::clamp(i, begin, end); }
};

inline Rows rows_of_band(int64_t height, int64_t bands, int64_t band) {
  const int64_t rows = ceil_div(height, bands);
  return {std::min(band * rows, height), std::min(band * rows + rows, height)};
}

// How many bands an image is cut into: what keeps the busiest of `threads` threads shortest, where the backward pass does
// about half the work of a row on each of the extent() rows that a band reads beyond its own.
inline int64_t count_bands(const AggregationProblem& p, int64_t threads, int64_t most_rows) {
  const int64_t height = std::max(p.rows.in, p.rows.out);
  int64_t best = height, least_work = std::numeric_limits<int64_t>::max();
  for (int64_t bands = ceil_div(height, most_rows); bands <= std::min(height, std::max(threads, ceil_div(height, most_rows))); ++bands) {
    const int64_t work = ceil_div(p.batch * bands, threads) * (2 * ceil_div(height, bands) + p.rows.extent());
    if (work < least_work) best = bands, least_work = work;
  }
  return best;
}

// Scratch and layout of one thread for one call.
template <class Field>
class NhwcTiles {
 public:
  using scalar_t = typename Field::scalar;
  using acc = acc_t<scalar_t>;

  NhwcTiles(const AggregationProblem& problem, const Field& field, int64_t bands)
      : p_(problem), field_(field), l_(channel_layout<acc>(problem)), bands_(bands), strip_(strip_pixels()),
        arena_(elements()), offsets_(new int64_t[size_t(3 * p_.taps())]), staged_(new int64_t[size_t(ring_rows())]) {
    sums_ = arena_.take(sum_rows() * sum_row_);
    ring_ = take(ring_rows() * ring_row());
    line_ = take(l_.together * run_);
    raw_ = take(strip_ / l_.together * rows_);
    weights_ = kPlain ? raw_ : take(strip_ / l_.together * rows_);
    grads_ = take(strip_ / l_.together * rows_);
    tables_ = take(kPlain ? 0 : 2 * p_.heads * rows_);
  }

  // Bands of rows of an image, for so many threads. Results do not depend on them: each is a sum over one pixel or in the
  // order of the output pixels.
  static int64_t bands(const AggregationProblem& p, int64_t threads) {
    const int64_t fit = kArenaBytes / int64_t(sizeof(acc)) / sum_row(p);
    return count_bands(p, threads, p.reflect ? std::max<int64_t>(fit, 1) : std::max(p.rows.in, p.rows.out));
  }

  // y [N, Ho, Wo, G*C]: one band of output rows.
  void forward(int64_t n, int64_t band, const scalar_t* x, scalar_t* y) {
    const Rows own = rows_of_band(p_.rows.out, bands_, band);
    enter(n, x);
    for (int64_t i = own.begin; i < own.end; ++i) {
      stage_window(i);
      for (int64_t q = 0; q < p_.cols.out; q += strip_)
        for (int64_t g = 0; g < p_.heads; ++g) {
          const Strip<acc> s = stage_weights(i, q, g);
          with_together<acc>(l_, [&](auto together) { sum_strip<decltype(together)::value>(s, i, q, y); });
        }
    }
  }

  // Gradients of one band: grad_w [N, Ho, Wo, G*Cw*K] of its output rows as `change` leaves it, grad_x [N, H, W, C] of its
  // input rows. Either may be null; `change` gets every strip of the output rows, unless it is KeepGrads without grad_w.
  template <class Change>
  void backward(int64_t n, int64_t band, const scalar_t* x, const scalar_t* grad_y, scalar_t* grad_x, scalar_t* grad_w,
                Change&& change) {
    sweep(n, band, x, grad_y, grad_x, grad_w ? grad_w + n * p_.out_plane() * p_.heads * run_ : nullptr, change);
  }
  // The same with grad_w [Ho, Wo, G*Cw*K] of image n alone, of the tensors' type or of acc.
  template <class Change, class grad_t>
  void sweep(int64_t n, int64_t band, const scalar_t* x, const scalar_t* grad_y, scalar_t* grad_x, grad_t* grad_w, Change& change) {
    const bool for_weights = grad_w || !std::is_same_v<Change, KeepGrads>;
    const Rows own = for_weights ? rows_of_band(p_.rows.out, bands_, band) : Rows{0, 0};
    const Rows inputs = grad_x ? rows_of_band(p_.rows.in, bands_, band) : Rows{0, 0};
    const Rows reach = rows_reaching(inputs);
    const Rows all = own.empty() ? reach : reach.empty() ? own : Rows{std::min(own.begin, reach.begin), std::max(own.end, reach.end)};
    enter(n, x);
    closed_ = opened_ = inputs.begin;
    for (int64_t i = all.begin; i < all.end; ++i) {
      const bool is_own = own.holds(i);
      const int64_t targets = grad_x ? open_inputs(i, inputs, grad_x) : 0;
      if (is_own) stage_window(i);
      if (!is_own && targets == 0) continue;
      for (int64_t q = 0; q < p_.cols.out; q += strip_)
        for (int64_t g = 0; g < p_.heads; ++g) {
          const Strip<acc> s = targets > 0 || Change::kReadsWeights ? stage_weights(i, q, g) : strip(q, g);
          with_together<acc>(l_, [&](auto together) {
            if (targets > 0) scatter_strip<decltype(together)::value>(s, i, q, targets, grad_y);
            if (is_own) multiply_strip<decltype(together)::value>(s, i, q, grad_y);
          });
          if (!is_own) continue;
          change(s);
          if (grad_w) write_strip(s, i, q, grad_w);
        }
    }
    if (grad_x) close_inputs(inputs.end, grad_x);
  }

 private:
  static constexpr bool kPlain = Field::View::kPlain;
  static constexpr int64_t kNoRow = std::numeric_limits<int64_t>::min();

  // ---- sizes
  // Input rows under a window wait in a ring: row z in slot z modulo their number.
  int64_t ring_rows() const { return p_.rows.extent() + 1; }
  int64_t ring_cols() const { return (p_.cols.out - 1) * p_.cols.stride + p_.cols.extent() + 1; }
  int64_t ring_row() const { return ring_cols() * l_.pitch; }
  // So do rows of the gradient of the input while they are added to; under reflection, all rows of a band do.
  int64_t sum_rows() const { return p_.reflect ? ceil_div(p_.rows.in, bands_) : p_.rows.extent() + 1; }
  static int64_t sum_row(const AggregationProblem& p) { return (p.cols.in + 2 * p.cols.padding) * channel_layout<acc>(p).pitch; }

  int64_t strip_pixels() const {
    const int64_t fit = std::clamp<int64_t>(kStripBytes / int64_t(sizeof(acc)) / rows_ * l_.together, 1, kMaxStrip);
    return round_up(std::min(fit, p_.cols.out), l_.together);
  }
  int64_t elements() const {
    using A = Arena<acc>;
    return A::piece(sum_rows() * sum_row_) + A::piece(ring_rows() * ring_row()) + A::piece(l_.together * run_) +
           (kPlain ? 2 : 3) * A::piece(strip_ / l_.together * rows_) + A::piece(kPlain ? 0 : 2 * p_.heads * rows_);
  }
  // A cleared piece: what no tensor fills stays finite, and the columns outside a zero-padded map stay zero.
  acc* take(int64_t elements) {
    acc* const piece = arena_.take(elements);
    std::fill(piece, piece + Arena<acc>::piece(elements), acc(0));
    return piece;
  }

  // ---- positions in the maps, and in the weights of an image
  int64_t channels_at(int64_t i, int64_t q, int64_t g) const {
    return (((n_ * p_.rows.out + i) * p_.cols.out + q) * p_.heads + g) * p_.channels;
  }
  int64_t weights_at(int64_t i, int64_t q, int64_t g) const { return ((i * p_.cols.out + q) * p_.heads + g) * run_; }
  int64_t input_row(int64_t z) const { return (n_ * p_.rows.in + z) * p_.cols.in * p_.channels; }
  // Staged weights of pixel k of a strip.
  int64_t staged_at(int64_t k) const { return k / l_.together * rows_ + k % l_.together * l_.weights; }

  // The same `size` values of one head, some pixels later: those at least kPrefetchBytes away.
  template <class T>
  T* ahead(T* at, int64_t size) const {
    return at + ceil_div(kPrefetchBytes, size * int64_t(sizeof(T))) * size * p_.heads;
  }

  // Begins work on an image. Bands of one image that follow each other find the rows they share still staged.
  void enter(int64_t n, const scalar_t* x) {
    if (n == n_ && x == x_) return;
    n_ = n;
    x_ = x;
    std::fill(staged_.get(), staged_.get() + ring_rows(), kNoRow);
    for (int64_t g = 0; g < p_.heads; ++g) prepare_rows(field_, p_, l_, n, g, tables_ + 2 * g * rows_);
  }

  // ---- input
  // Stages what is missing of the rows under output row i; taps_[t] is where tap t of the first output pixel is, next_ what
  // will be staged next.
  void stage_window(int64_t i) {
    for (int64_t u = 0, t = 0; u < p_.rows.kernel; ++u) {
      const int64_t z = p_.rows.source(i, u), slot = (z + p_.rows.padding) % ring_rows();
      if (staged_[slot] != z) stage_row_at(z, ring_ + slot * ring_row());
      staged_[slot] = z;
      for (int64_t v = 0; v < p_.cols.kernel; ++v, ++t) taps_[t] = slot * ring_row() + v * p_.cols.dilation * l_.pitch;
    }
    // Behind the last row follow those of the next image.
    next_ = x_ + input_row(std::max<int64_t>(p_.rows.source(i + 1, p_.rows.kernel - 1), 0));
  }
  const scalar_t* next_input(int64_t q) const { return next_ + q * p_.cols.stride * p_.channels; }
  const acc* window(int64_t q) const { return ring_ + q * p_.cols.stride * l_.pitch; }

  void stage_row_at(int64_t z, acc* to) const {
    const bool inside = z >= 0 && z < p_.rows.in;
    if (!inside && !p_.reflect) return std::fill(to, to + ring_row(), acc(0));
    const scalar_t* const row = x_ + input_row(reflected(z, p_.rows.in));
    const int64_t padding = p_.cols.padding, begin = std::min(padding, ring_cols());
    const int64_t end = std::clamp(padding + p_.cols.in, begin, ring_cols());
    stage_pixels(l_, row, end - begin, to + begin * l_.pitch);
    for (int64_t c = 0; p_.reflect && c < ring_cols(); ++c)
      if (c < begin || c >= end) stage_pixels(l_, row + reflected(c - padding, p_.cols.in) * p_.channels, 1, to + c * l_.pitch);
  }

  // ---- weights
  Strip<acc> strip(int64_t q, int64_t g) const {
    const int64_t count = std::min(strip_, p_.cols.out - q);
    return {g, count, ceil_div(count, l_.together), p_.taps(), l_.together * l_.weights, l_.row, raw_, weights_, grads_};
  }
  Strip<acc> stage_weights(int64_t i, int64_t q, int64_t g) {
    const Strip<acc> s = strip(q, g);
    const int64_t pixel = p_.heads * run_;
    const scalar_t* from = field_.raw_weights() + n_ * p_.out_plane() * p_.heads * run_ + weights_at(i, q, g);
    acc* to = raw_;
    for (int64_t k = 0; k < s.count; k += l_.together, to += rows_) {
      const int64_t count = std::min(l_.together, s.count - k);
      if constexpr (std::is_same_v<scalar_t, acc>) {
        for (int64_t j = 0; j < count; ++j) prefetch_run<kRead>(ahead(from + j * pixel, run_), run_);
        taps_first(l_, s.taps, from, pixel, count, to);
        from += count * pixel;
      } else {
        for (int64_t j = 0; j < count; ++j, from += pixel) {
          prefetch_run<kRead>(ahead(from, run_), run_);
          stage_run(line_ + j * run_, from, run_);
        }
        taps_first(l_, s.taps, line_, run_, count, to);
      }
    }
    if constexpr (!kPlain)
      for (int64_t at = 0; at < s.size(); at += rows_) transform_rows(field_, l_, s.taps, raw_ + at, tables_ + 2 * g * rows_, weights_ + at);
    return s;
  }

  template <int kTogether>
  void sum_strip(const Strip<acc>& s, int64_t i, int64_t q, scalar_t* y) const {
    for (int64_t k = 0; k < s.count; ++k) {
      scalar_t* const to = y + channels_at(i, q + k, s.head);
      const Later<scalar_t> later{next_input(q + k), ahead(to, p_.channels)};
      sum_pixel<kTogether>(l_, s.taps, s.weights + staged_at(k), window(q + k), taps_, to, later);
    }
  }

  // ---- gradient of the weights
  template <int kTogether>
  void multiply_strip(const Strip<acc>& s, int64_t i, int64_t q, const scalar_t* grad_y) {
    if (s.count % kTogether != 0) std::fill(s.grads + (s.groups - 1) * rows_, s.grads + s.groups * rows_, acc(0));
    for (int64_t k = 0; k < s.count; ++k)
      multiply_pixel<kTogether>(l_, s.taps, grad_y + channels_at(i, q + k, s.head), window(q + k), taps_, s.grads + staged_at(k),
                                next_input(q + k));
    add_repeats(l_, s.groups * s.taps, s.grads);
  }
  template <class grad_t>
  void write_strip(const Strip<acc>& s, int64_t i, int64_t q, grad_t* grad_w) {
    const int64_t pixel = p_.heads * run_;
    grad_t* to = grad_w + weights_at(i, q, s.head);
    const acc* grads = s.grads;
    for (int64_t k = 0; k < s.count; k += l_.together, grads += rows_) {
      const int64_t count = std::min(l_.together, s.count - k);
      if constexpr (std::is_same_v<grad_t, acc>) {
        for (int64_t j = 0; j < count; ++j) prefetch_run<kWrite>(ahead(to + j * pixel, run_), run_);
        channels_first(l_, s.taps, grads, pixel, count, to);
        to += count * pixel;
      } else {
        channels_first(l_, s.taps, grads, run_, count, line_);
        for (int64_t j = 0; j < count; ++j, to += pixel) {
          prefetch_run<kWrite>(ahead(to, run_), run_);
          unstage_run(to, line_ + j * run_, run_);
        }
      }
    }
  }

  // ---- gradient of the input
  // Output rows that read one of the input rows, directly or in the reflected border.
  Rows rows_reaching(Rows inputs) const {
    const Axis& axis = p_.rows;
    if (inputs.empty()) return {0, 0};
    const bool top = p_.reflect && inputs.begin <= axis.padding, bottom = p_.reflect && inputs.end >= axis.in - axis.padding;
    const int64_t first = ceil_div(std::max<int64_t>(inputs.begin + axis.padding - axis.extent(), 0), axis.stride);
    const int64_t last = std::min((inputs.end - 1 + axis.padding) / axis.stride, axis.out - 1);
    return {top ? 0 : first, bottom ? axis.out : last + 1};
  }

  // Input rows [closed_, opened_) of the band are being added to, row z in slot z modulo sum_rows().
  acc* sums_of(int64_t z) const { return sums_ + z % sum_rows() * sum_row_; }
  void open_row(int64_t z) {
    std::fill(sums_of(z), sums_of(z) + sum_row_, acc(0));
    opened_ = z + 1;
  }
  // Writes the rows before `end`, which nothing adds to any more.
  void close_inputs(int64_t end, scalar_t* grad_x) {
    for (; closed_ < end; ++closed_) {
      if (closed_ == opened_) open_row(closed_);
      acc* const row = sums_of(closed_) + p_.cols.padding * l_.pitch;
      if (p_.reflect) fold_columns(row);
      unstage_pixels(l_, row, p_.cols.in, grad_x + input_row(closed_));
    }
  }
  // Prepares the band's rows that output row i adds to and returns how many taps do: scatter_rows_ says where their weights
  // are, scatter_to_ where the first output pixel adds. A row of the reflected border adds to the row it mirrors.
  int64_t open_inputs(int64_t i, Rows inputs, scalar_t* grad_x) {
    if (!p_.reflect) close_inputs(inputs.clamp(p_.rows.source(i, 0)), grad_x);
    const int64_t end = p_.reflect ? inputs.end : inputs.clamp(p_.rows.source(i, p_.rows.kernel - 1) + 1);
    while (opened_ < end) open_row(opened_);
    next_sum_ = grad_x + input_row(std::min(closed_, inputs.end - 1));
    int64_t count = 0;
    for (int64_t u = 0; u < p_.rows.kernel; ++u) {
      const int64_t source = p_.rows.source(i, u), z = p_.reflect ? reflected(source, p_.rows.in) : source;
      if (!inputs.holds(z)) continue;
      for (int64_t v = 0; v < p_.cols.kernel; ++v, ++count) {
        scatter_rows_[count] = (u * p_.cols.kernel + v) * l_.row;
        scatter_to_[count] = sums_of(z) - sums_ + v * p_.cols.dilation * l_.pitch;
      }
    }
    return count;
  }
  template <int kTogether>
  void scatter_strip(const Strip<acc>& s, int64_t i, int64_t q, int64_t targets, const scalar_t* grad_y) {
    for (int64_t k = 0; k < s.count; ++k) {
      const scalar_t* const g = grad_y + channels_at(i, q + k, s.head);
      const Later<scalar_t> later{ahead(g, p_.channels), next_sum_ + (q + k) * p_.cols.stride * p_.channels};
      scatter_pixel<kTogether>(l_, targets, g, s.weights + staged_at(k), scatter_rows_,
                               sums_ + (q + k) * p_.cols.stride * l_.pitch, scatter_to_, later);
    }
  }

  // Adds the columns of a reflected border to those they mirror; `row` points at column 0 of the map.
  void fold_columns(acc* row) const {
    const int64_t last = p_.cols.in - 1;
    for (int64_t c = 1; c <= p_.cols.padding; ++c) {
      add_run(row - c * l_.pitch, row + c * l_.pitch, l_.pitch);
      add_run(row + (last + c) * l_.pitch, row + (last - c) * l_.pitch, l_.pitch);
    }
  }

  const AggregationProblem p_;
  const Field field_;
  const ChannelLayout l_;
  const int64_t bands_;
  const int64_t run_ = p_.weight_channels * p_.taps();  // weights of a pixel and head in memory
  const int64_t rows_ = p_.taps() * l_.row;             // and staged, those of a group
  const int64_t strip_;
  const int64_t sum_row_ = sum_row(p_);
  Arena<acc> arena_;
  std::unique_ptr<int64_t[]> offsets_;  // [3][K]
  int64_t* const taps_ = offsets_.get();
  int64_t* const scatter_rows_ = taps_ + p_.taps();
  int64_t* const scatter_to_ = scatter_rows_ + p_.taps();
  std::unique_ptr<int64_t[]> staged_;  // which input row a slot of the ring holds
  acc* sums_;                          // [sum_rows()][W + 2*padding][pitch]
  acc *ring_, *line_, *raw_, *weights_, *grads_, *tables_;
  const scalar_t* x_ = nullptr;
  const scalar_t* next_ = nullptr;
  const scalar_t* next_sum_ = nullptr;  // the row of the gradient of the input that is written next
  int64_t n_ = -1;
  int64_t closed_ = 0, opened_ = 0;
};
