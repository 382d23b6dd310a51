// The passes of an aggregation over one band of rows of an NHWC map, for every source of weights (weights.h). Included
// once per target namespace. Output pixels are taken in order: their weights are transposed and transformed in scratch,
// the input rows under them wait there widened and padded, and each tensor is read and written once.

constexpr int64_t kStripBytes = 16 * 1024;    // weights of a strip: with the rows of the window in the first-level cache
constexpr int64_t kMaxStrip = 16;             // pixels; enough for stores to have left for the cache before they are loaded
constexpr int64_t kPrefetchBytes = 4 * 1024;  // weights are asked for this early: hardware stops at the end of a page
constexpr int64_t kTasksPerThread = 2;

// Neighbouring output pixels of one row with the weights of one head, [count][K][row]: element (i, t, m) of each array is
// at (i*taps + t)*row + m for m < part; what lies between part and row is finite filling.
template <class acc>
struct Strip {
  int64_t head;
  int64_t channel;  // the unit's first, in [G*Cw]
  int64_t count;
  int64_t taps;
  int64_t part;
  int64_t row;
  const acc* raw;      // the weights as they are in memory
  const acc* weights;  // transformed
  acc* grads;          // gradient of the transformed weights
};

// What happens to a strip's gradients before they are written: nothing, where the weights are plain.
struct KeepGrads {
  static constexpr bool kReadsWeights = false;
  template <class acc>
  void operator()(const Strip<acc>&) const {}
};

// From the gradient d of probabilities to that of their logits: p_t * (d_t - sum over s of p_s * d_s).
struct SoftmaxGrads {
  static constexpr bool kReadsWeights = true;
  template <class acc>
  void operator()(const Strip<acc>& s) const {
    for (int64_t i = 0; i < s.count; ++i)
      for (int64_t m = 0; m < s.part; m += kLanes<acc>) {
        const acc* const p = s.weights + i * s.taps * s.row + m;
        acc* const d = s.grads + i * s.taps * s.row + m;
        Vec<acc> mean = {};
        for (int64_t t = 0; t < s.taps; ++t) mean += load(p + t * s.row) * load(d + t * s.row);
        for (int64_t t = 0; t < s.taps; ++t) store(d + t * s.row, load(p + t * s.row) * (load(d + t * s.row) - mean));
      }
  }
};

// ---- sources of weights ------------------------------------------------------------------------------------------
// What turns one pixel's staged weights into those of the window. Plain weights are what they are.

// Fills a table [2][K][row] for head g and weight channels first, first + 1, ... of image n.
template <class Field, class acc>
void prepare_rows(const Field&, const AggregationProblem&, const ChannelLayout&, int64_t, int64_t, int64_t, acc*) {}

// Scale and shift of GroupNorm.
template <class scalar_t, class acc>
void prepare_rows(const NormField<scalar_t>& field, const AggregationProblem& p, const ChannelLayout& l, int64_t n, int64_t g,
                  int64_t first, acc* table) {
  const int64_t taps = p.taps();
  for (int64_t m = 0; m < l.used; ++m) {
    const int64_t channel = g * p.weight_channels + first + m % l.part, group = p.group(n, 0, 0) + channel;
    for (int64_t t = 0; t < taps; ++t) {
      const acc scale = field.gamma ? field.rstd[group] * widen(field.gamma[channel * taps + t]) : field.rstd[group];
      table[t * l.row + m] = scale;
      table[(taps + t) * l.row + m] = (field.beta ? widen(field.beta[channel * taps + t]) : acc(0)) - field.mean[group] * scale;
    }
  }
}

// weights [K][row] from raw [K][row].
template <class scalar_t, class acc>
void transform_rows(const SoftmaxField<scalar_t>&, const ChannelLayout& l, int64_t taps, const acc* raw, const acc*, acc* weights) {
  for (int64_t m = 0; m < l.used; m += kLanes<acc>) {
    Vec<acc> top = load(raw + m), sum = {};
    for (int64_t t = 1; t < taps; ++t) top = maximum(top, load(raw + t * l.row + m));
    for (int64_t t = 0; t < taps; ++t) {
      const Vec<acc> chance = exponential(load(raw + t * l.row + m) - top);
      sum += chance;
      store(weights + t * l.row + m, chance);
    }
    const Vec<acc> scale = acc(1) / sum;
    for (int64_t t = 0; t < taps; ++t) store(weights + t * l.row + m, load(weights + t * l.row + m) * scale);
  }
}
template <class scalar_t, class acc>
void transform_rows(const NormField<scalar_t>&, const ChannelLayout& l, int64_t taps, const acc* raw, const acc* table, acc* weights) {
  for (int64_t i = 0; i < taps * l.row; i += kLanes<acc>)
    store(weights + i, load(raw + i) * load(table + i) + load(table + taps * l.row + i));
}

struct Rows {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  bool holds(int64_t i) const { return i >= begin && i < end; }
  int64_t clamp(int64_t i) const { return std::clamp(i, begin, end); }
};

// Scratch and layout of one thread for one call.
template <class Field>
class NhwcTiles {
 public:
  using scalar_t = typename Field::scalar;
  using acc = acc_t<scalar_t>;

  NhwcTiles(const AggregationProblem& problem, const Field& field, int64_t bands)
      : p_(problem), field_(field), l_(channel_layout<scalar_t>(problem)), bands_(bands), strip_(strip_pixels()),
        arena_(elements()), offsets_(new int64_t[size_t(3 * p_.taps())]), staged_(new int64_t[size_t(ring_rows())]) {
    const int64_t rows = p_.taps() * l_.row;
    sums_ = arena_.take(sum_rows() * sum_row_);
    ring_ = take(ring_rows() * ring_row());
    line_ = take(p_.taps() * l_.part);
    raw_ = take(strip_ * rows);
    weights_ = kPlain ? raw_ : take(strip_ * rows);
    grads_ = take(strip_ * rows);
    tables_ = take(kPlain ? 0 : 2 * p_.heads * rows);
  }

  const ChannelLayout& layout() const { return l_; }
  Rows rows_of(int64_t band, int64_t height) const {
    const int64_t rows = ceil_div(height, bands_);
    return {std::min(band * rows, height), std::min(band * rows + rows, height)};
  }

  // Units of an image: parts of its weight channels.
  static int64_t units(const AggregationProblem& p) { return p.weight_channels / channel_layout<scalar_t>(p).part; }

  // Bands of rows of a unit: as many as `threads` need and no more, since the backward pass reads extent() rows beyond
  // those it owns. Results do not depend on them: each is a sum over one pixel or in the order of the output pixels.
  static int64_t bands(const AggregationProblem& p, int64_t threads) {
    const int64_t height = std::max(p.rows.in, p.rows.out);
    const int64_t least = std::max<int64_t>(2 * p.rows.extent(), 1);
    int64_t rows = std::max(height * p.batch * units(p) / (kTasksPerThread * threads), least);
    if (p.reflect) rows = std::min(rows, reflected_rows(p));
    return ceil_div(height, std::min(rows, height));
  }

  // y [N, Ho, Wo, G*C]: one band of output rows of a unit.
  void forward(int64_t n, int64_t unit, int64_t band, const scalar_t* x, scalar_t* y) {
    const Rows own = rows_of(band, p_.rows.out);
    enter(n, unit, x);
    for (int64_t i = own.begin; i < own.end; ++i) {
      stage_window(i);
      for (int64_t q = 0; q < p_.cols.out; q += strip_)
        for (int64_t g = 0; g < p_.heads; ++g) {
          const Strip<acc> s = stage_weights(i, q, g);
          for (int64_t k = 0; k < s.count; ++k)
            sum_pixel(l_, s.taps, s.weights + k * s.taps * s.row, window(q + k), taps_, y + pixel_of(i, q + k, g));
        }
    }
  }

  // Gradients of one band: grad_w [N, Ho, Wo, G*Cw*K] of its output rows as `change` leaves it, grad_x [N, H, W, C] of its
  // input rows. Either may be null; `change` gets every strip of the output rows, unless it is KeepGrads without grad_w.
  template <class Change>
  void backward(int64_t n, int64_t unit, int64_t band, const scalar_t* x, const scalar_t* grad_y, scalar_t* grad_x,
                scalar_t* grad_w, const Change& change) {
    const bool for_weights = grad_w || !std::is_same_v<Change, KeepGrads>;
    const Rows own = for_weights ? rows_of(band, p_.rows.out) : Rows{0, 0};
    const Rows inputs = grad_x ? rows_of(band, p_.rows.in) : Rows{0, 0};
    const Rows reach = rows_reaching(inputs);
    const Rows sweep = own.empty() ? reach : reach.empty() ? own : Rows{std::min(own.begin, reach.begin), std::max(own.end, reach.end)};
    enter(n, unit, x);
    closed_ = opened_ = inputs.begin;
    for (int64_t i = sweep.begin; i < sweep.end; ++i) {
      const bool is_own = own.holds(i);
      const int64_t targets = grad_x ? open_inputs(i, inputs, grad_x) : 0;
      if (is_own) stage_window(i);
      if (!is_own && targets == 0) continue;
      for (int64_t q = 0; q < p_.cols.out; q += strip_)
        for (int64_t g = 0; g < p_.heads; ++g) {
          const Strip<acc> s = targets > 0 || Change::kReadsWeights ? stage_weights(i, q, g) : strip(q, g);
          if (targets > 0) scatter_strip(s, i, q, targets, grad_y);
          if (!is_own) continue;
          multiply_strip(s, i, q, grad_y);
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
  static int64_t sum_row(const AggregationProblem& p) {
    return (p.cols.in + 2 * p.cols.padding) * channel_layout<scalar_t>(p).pitch;
  }
  static int64_t reflected_rows(const AggregationProblem& p) {
    return std::max<int64_t>(kArenaBytes / (sum_row(p) * int64_t(sizeof(acc))), 1);
  }
  int64_t strip_pixels() const {
    return std::clamp<int64_t>(kStripBytes / (p_.taps() * l_.row * int64_t(sizeof(acc))), 1, std::min(kMaxStrip, p_.cols.out));
  }
  int64_t elements() const {
    using A = Arena<acc>;
    const int64_t rows = p_.taps() * l_.row;
    return A::piece(sum_rows() * sum_row_) + A::piece(ring_rows() * ring_row()) + A::piece(p_.taps() * l_.part) + (kPlain ? 2 : 3) * A::piece(strip_ * rows) +
           A::piece(kPlain ? 0 : 2 * p_.heads * rows);
  }
  // A cleared piece: what no tensor fills stays finite, and the columns outside a zero-padded map stay zero.
  acc* take(int64_t elements) {
    acc* const piece = arena_.take(elements);
    std::fill(piece, piece + Arena<acc>::piece(elements), acc(0));
    return piece;
  }
  // ---- positions in the maps, of the unit's first channel
  int64_t output_pixel(int64_t i, int64_t q) const { return (n_ * p_.rows.out + i) * p_.cols.out + q; }
  int64_t pixel_of(int64_t i, int64_t q, int64_t g) const { return (output_pixel(i, q) * p_.heads + g) * p_.channels + first_; }
  int64_t weights_of(int64_t i, int64_t q, int64_t g) const {
    return ((output_pixel(i, q) * p_.heads + g) * p_.weight_channels + first_) * p_.taps();
  }
  int64_t input_row(int64_t z) const { return (n_ * p_.rows.in + z) * p_.cols.in * p_.channels + first_; }

  // Begins work on a unit. Bands of one unit that follow each other find the rows they share still staged.
  void enter(int64_t n, int64_t unit, const scalar_t* x) {
    if (n == n_ && unit * l_.part == first_ && x == x_) return;
    n_ = n;
    first_ = unit * l_.part;
    x_ = x;
    std::fill(staged_.get(), staged_.get() + ring_rows(), kNoRow);
    for (int64_t g = 0; g < p_.heads; ++g) prepare_rows(field_, p_, l_, n, g, first_, tables_ + 2 * g * p_.taps() * l_.row);
  }

  // ---- input
  // Stages what is missing of the rows under output row i; taps_[t] is where tap t of the first output pixel is.
  void stage_window(int64_t i) {
    for (int64_t u = 0, t = 0; u < p_.rows.kernel; ++u) {
      const int64_t z = p_.rows.source(i, u), slot = (z + p_.rows.padding) % ring_rows();
      if (staged_[slot] != z) stage_row_at(z, ring_ + slot * ring_row());
      staged_[slot] = z;
      for (int64_t v = 0; v < p_.cols.kernel; ++v, ++t) taps_[t] = slot * ring_row() + v * p_.cols.dilation * l_.pitch;
    }
  }
  const acc* window(int64_t q) const { return ring_ + q * p_.cols.stride * l_.pitch; }

  void stage_row_at(int64_t z, acc* to) const {
    const bool inside = z >= 0 && z < p_.rows.in;
    if (!inside && !p_.reflect) return std::fill(to, to + ring_row(), acc(0));
    const scalar_t* const row = x_ + input_row(reflected(z, p_.rows.in));
    const int64_t padding = p_.cols.padding, begin = std::min(padding, ring_cols());
    const int64_t end = std::clamp(padding + p_.cols.in, begin, ring_cols());
    stage_pixels(l_, row, p_.channels, p_.weight_channels, end - begin, to + begin * l_.pitch);
    for (int64_t c = 0; p_.reflect && c < ring_cols(); ++c)
      if (c < begin || c >= end)
        stage_pixels(l_, row + reflected(c - padding, p_.cols.in) * p_.channels, p_.channels, p_.weight_channels, 1, to + c * l_.pitch);
  }

  // ---- weights
  Strip<acc> strip(int64_t q, int64_t g) const {
    return {g,       g * p_.weight_channels + first_, std::min(strip_, p_.cols.out - q), p_.taps(), l_.part, l_.row, raw_, weights_, grads_};
  }
  Strip<acc> stage_weights(int64_t i, int64_t q, int64_t g) {
    const Strip<acc> s = strip(q, g);
    const int64_t run = l_.part * s.taps, pixel = p_.heads * p_.weight_channels * s.taps;
    const int64_t ahead = ceil_div(kPrefetchBytes, run * int64_t(sizeof(scalar_t))) * pixel;
    const scalar_t* from = field_.raw_weights() + weights_of(i, q, g);
    acc* const table = tables_ + 2 * g * s.taps * s.row;
    for (int64_t k = 0; k < s.count; ++k, from += pixel) {
      const int64_t at = k * s.taps * s.row;
      prefetch_run(from + ahead, run);
      if constexpr (std::is_same_v<scalar_t, acc>) {
        taps_first(l_, s.taps, from, raw_ + at);
      } else {
        stage_run(line_, from, run);
        taps_first(l_, s.taps, line_, raw_ + at);
      }
    }
    if constexpr (!kPlain)
      for (int64_t at = 0; at < s.count * s.taps * s.row; at += s.taps * s.row)
        transform_rows(field_, l_, s.taps, raw_ + at, table, weights_ + at);
    return s;
  }

  // ---- gradient of the weights
  void multiply_strip(const Strip<acc>& s, int64_t i, int64_t q, const scalar_t* grad_y) {
    for (int64_t k = 0; k < s.count; ++k)
      multiply_pixel(l_, s.taps, grad_y + pixel_of(i, q + k, s.head), window(q + k), taps_, s.grads + k * s.taps * s.row);
    add_repeats(l_, s.count * s.taps, s.grads);
  }
  void write_strip(const Strip<acc>& s, int64_t i, int64_t q, scalar_t* grad_w) {
    for (int64_t k = 0; k < s.count; ++k) {
      const acc* const grads = s.grads + k * s.taps * s.row;
      scalar_t* const to = grad_w + weights_of(i, q + k, s.head);
      if constexpr (std::is_same_v<scalar_t, acc>) {
        channels_first(l_, s.taps, grads, to);
      } else {
        channels_first(l_, s.taps, grads, line_);
        unstage_run(to, line_, l_.part * s.taps);
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
  int64_t sum_rows() const {
    return p_.reflect ? ceil_div(p_.rows.in, bands_) : p_.rows.extent() + 1;
  }
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
      unstage_pixels(l_, row, p_.channels, p_.weight_channels, p_.cols.in, grad_x + input_row(closed_));
    }
  }

  // Prepares the band's rows that output row i adds to and returns how many taps do: scatter_rows_ says where their weights
  // are, scatter_to_ where the first output pixel adds. A row of the reflected border adds to the row it mirrors.
  int64_t open_inputs(int64_t i, Rows inputs, scalar_t* grad_x) {
    if (!p_.reflect) close_inputs(inputs.clamp(p_.rows.source(i, 0)), grad_x);
    const int64_t end = p_.reflect ? inputs.end : inputs.clamp(p_.rows.source(i, p_.rows.kernel - 1) + 1);
    while (opened_ < end) open_row(opened_);
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
  void scatter_strip(const Strip<acc>& s, int64_t i, int64_t q, int64_t targets, const scalar_t* grad_y) {
    for (int64_t k = 0; k < s.count; ++k)
      scatter_pixel(l_, targets, grad_y + pixel_of(i, q + k, s.head), s.weights + k * s.taps * s.row, scatter_rows_,
                    sums_ + (q + k) * p_.cols.stride * l_.pitch, scatter_to_);
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
  const int64_t bands_, strip_;
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
  int64_t n_ = -1, first_ = -1;  // image and first weight channel of the unit
  int64_t closed_ = 0, opened_ = 0;
};
