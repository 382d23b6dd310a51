// The passes of an aggregation over one tile of an NCHW map, for every source of weights (weights.h). Included once per
// target namespace. Per output position and channel a pass reads K staged values and K/J weights; from memory it reads
// and writes each tensor once.

// Scratch and layout of one thread for one call.
template <class Field>
class NchwTiles {
 public:
  using scalar_t = typename Field::scalar;
  using acc = acc_t<scalar_t>;

  NchwTiles(const AggregationProblem& problem, const Field& field)
      : p_(problem), field_(field), spread_(unpadded(problem)), gather_layout_(gather_staging<acc>(p_)),
        spread_layout_(spread_staging<acc>(spread_)), rows_(tile_rows(problem)), bands_(bands(problem, rows_)),
        band_rows_in_(ceil_div(p_.rows.in, bands_)), band_rows_out_(ceil_div(p_.rows.out, bands_)),
        arena_(elements(problem, rows_)) {
    const int64_t taps = p_.taps(), heads = p_.heads;
    gather_rows_ = staged_rows(p_, gather_layout_, rows_);
    spread_rows_ = staged_rows(spread_, spread_layout_, rows_);
    offsets_.reset(new int64_t[size_t(taps * (1 + heads))]);
    gather_offsets<acc>(p_, gather_layout_, gather_rows_, offsets_.get());
    for (int64_t g = 0; g < heads; ++g) {
      int64_t* const own = offsets_.get() + taps * (1 + g);
      spread_offsets<acc>(spread_, spread_layout_, spread_rows_, own);
      for (int64_t t = 0; t < taps; ++t) own[t] += g * p_.sharing() * spread_channel();
    }
    prepare_masks();
    weights_ = reinterpret_cast<Vec<acc>*>(arena_.take(taps * heads * kLanes<acc>));
    products_ = reinterpret_cast<Vec<acc>*>(arena_.take(taps * kLanes<acc>));
    tables_ = arena_.take(2 * taps * heads);
    mark_ = arena_.mark();
  }

  // Rows of a tile: as many as keep its scratch within kArenaBytes, at least one, spread evenly over the map. A function
  // of the problem alone, so that results do not depend on the number of threads.
  static int64_t tile_rows(const AggregationProblem& p) {
    const int64_t height = std::max<int64_t>(p.rows.in + 2 * p.rows.padding, p.rows.out);
    const int64_t one = elements(p, 1), step = std::max<int64_t>(elements(p, 2) - one, 1);
    const int64_t fit = 1 + (kArenaBytes / int64_t(sizeof(acc)) - one) / step;
    const int64_t rows = std::clamp<int64_t>(fit, 1, kMaxTileRows);
    return ceil_div(height, ceil_div(height, rows));
  }
  static int64_t bands(const AggregationProblem& p, int64_t rows) { return ceil_div(std::max(p.rows.in, p.rows.out), rows); }
  static int64_t bands(const AggregationProblem& p) { return bands(p, tile_rows(p)); }

  // Room for one vector per tap, free while sinks run.
  Vec<acc>* tap_buffer() { return weights_; }

  // The weights of head g.
  typename Field::View view(int64_t n, int64_t g, int64_t m) {
    return field_.at(p_, n, g, m, tables_ + 2 * p_.taps() * g);
  }

  // y [N, G*C, Ho, Wo]: one band of the output rows of unit (n, m).
  void forward(int64_t n, int64_t m, int64_t band, const scalar_t* x, scalar_t* y) {
    const auto rows = rows_of(band, p_.rows.out);
    const int64_t begin = rows.first, end = rows.second;
    if (begin >= end) return;
    const acc* const staged = direct_ ? nullptr : stage_input(n, m, begin, end, x);
    const Place next = place_after(n, m, band);
    for (int64_t g = 0; g < p_.heads; ++g) {
      const auto weights = view(n, g, m);
      scalar_t* const out = y + plane_of(n, g, m) * p_.out_plane();
      const AheadTwice<scalar_t> ahead{input_ahead(next, x), weights_ahead(next, g)};
      int64_t row = begin;
      if (!direct_ && pairs_rows(gather_layout_))
        for (; row + 2 <= end; row += 2)
          weighted_sum_pair<false>(weights, row * p_.cols.out, p_.cols.out, p_.cols.dilation,
                                   staged + (row - begin) * gather_layout_.pitch, gather_layout_.pitch, gather_channel(),
                                   p_.sharing(), out + row * p_.cols.out, p_.weight_channels * p_.out_plane(),
                                   ahead.at((row - begin) * p_.cols.out));
      for_input_runs(n, m, begin, row, end, x, staged, [&](int64_t position, int64_t length, auto& planes) {
        const auto next_run = ahead.at(position - begin * p_.cols.out);
        if (p_.taps() == 9) run<9>(weights, position, length, planes, out, next_run);
        else if (p_.taps() == 25) run<25>(weights, position, length, planes, out, next_run);
        else if (p_.taps() == 49) run<49>(weights, position, length, planes, out, next_run);
        else run<0>(weights, position, length, planes, out, next_run);
      });
    }
  }

  // Gradient of the (transformed) weights for one band of output rows; sinks(g) consumes it vector by vector.
  template <class Sinks>
  void grad_weight(int64_t n, int64_t m, int64_t band, const scalar_t* x, const scalar_t* grad_y, const Sinks& sinks) {
    const auto rows = rows_of(band, p_.rows.out);
    if (rows.first >= rows.second) return;
    const acc* const staged = direct_ ? nullptr : stage_input(n, m, rows.first, rows.second, x);
    for (int64_t g = 0; g < p_.heads; ++g) correlate_rows(n, g, m, band, rows, staged, x, grad_y, sinks(g));
  }

  // The same for one head.
  template <class Sink>
  void grad_weight_of(int64_t n, int64_t g, int64_t m, int64_t band, const scalar_t* x, const scalar_t* grad_y, Sink&& sink) {
    const auto rows = rows_of(band, p_.rows.out);
    if (rows.first < rows.second)
      correlate_rows(n, g, m, band, rows, direct_ ? nullptr : stage_input(n, m, rows.first, rows.second, x), x, grad_y, sink);
  }

  // grad_x [N, C, H, W]: one band of the input rows of unit (n, m). With reflect padding the gradient of the padded map
  // is computed whole and folded back, so there the first band does all of it.
  void grad_input(int64_t n, int64_t m, int64_t band, const scalar_t* grad_y, scalar_t* grad_x) {
    scalar_t* const out = grad_x + (n * p_.channels + m) * p_.in_plane();
    if (!p_.reflect) {
      const auto [begin, end] = rows_of(band, p_.rows.in);
      if (begin < end)
        grad_input_rows(n, m, begin, end, grad_y, out + begin * p_.cols.in, p_.weight_channels * p_.in_plane(),
                        weights_ahead(place_after(n, m, band), 0));
    } else if (band == 0) {
      const int64_t plane = spread_.in_plane();
      if (!padded_) padded_.reset(new acc[size_t(p_.sharing() * plane)]);
      for (int64_t begin = 0; begin < spread_.rows.in; begin += rows_)
        grad_input_rows(n, m, begin, std::min(begin + rows_, spread_.rows.in), grad_y,
                        padded_.get() + begin * spread_.cols.in, plane, Ahead<scalar_t>{nullptr, 0, 0});
      for (int64_t j = 0; j < p_.sharing(); ++j)
        fold(padded_.get() + j * plane, out + j * p_.weight_channels * p_.in_plane());
    }
  }

 private:
  using Masks = std::unique_ptr<LaneMask<acc>[]>;
  // Whether planes may be read where they are.
  using Direct = DirectWindow<scalar_t>;
  static constexpr bool kDirect = Direct::kPossible;

  // The same problem on a map that already contains its reflected border.
  static AggregationProblem unpadded(AggregationProblem p) {
    if (!p.reflect) return p;
    p.reflect = false;
    for (Axis* axis : {&p.rows, &p.cols}) {
      axis->in += 2 * axis->padding;
      axis->padding = 0;
    }
    return p;
  }

  static int64_t elements(const AggregationProblem& problem, int64_t rows) {
    using A = Arena<acc>;
    const AggregationProblem spread = unpadded(problem);
    const Staging in = gather_staging<acc>(problem), out = spread_staging<acc>(spread);
    const int64_t taps = problem.taps(), heads = problem.heads, sharing = problem.sharing();
    const int64_t gathered = A::piece(sharing * in.copies * copy_stride<acc>(in, staged_rows(problem, in, rows)) + kLanes<acc>);
    const int64_t grads =
        A::piece(heads * sharing * out.copies * copy_stride<acc>(out, staged_rows(spread, out, rows)) + kLanes<acc>);
    const int64_t weights = A::piece(heads * taps * rows * out.width);
    const int64_t transformed =
        Field::View::kPlain ? 0 : A::piece(taps * (ceil_div(rows + spread.rows.extent(), spread.rows.stride) + 1) * spread.cols.out);
    return A::piece(taps * heads * kLanes<acc>) + A::piece(taps * kLanes<acc>) + A::piece(2 * taps * heads) +
           std::max(gathered, grads + weights + transformed);
  }

  static int64_t left_gap(const Staging& s) { return s.blockwise ? kLanes<acc> : 0; }
  int64_t gather_channel() const { return gather_layout_.copies * copy_stride<acc>(gather_layout_, gather_rows_); }
  int64_t spread_channel() const { return spread_layout_.copies * copy_stride<acc>(spread_layout_, spread_rows_); }
  int64_t plane_of(int64_t n, int64_t g, int64_t m) const { return (n * p_.heads + g) * p_.channels + m; }

  std::pair<int64_t, int64_t> rows_of(int64_t band, int64_t height) const {
    const int64_t rows = height == p_.rows.out ? band_rows_out_ : band_rows_in_;
    return {std::min(band * rows, height), std::min(band * rows + rows, height)};
  }

  void prepare_masks() {
    if constexpr (kDirect) {
      direct_ = Direct::fits(p_);
      if (direct_) {
        gathering_.prepare(p_, 1);
        spreading_.prepare(p_, -1);
        if (p_.heads == 1) return;
      }
    }
    mask_size_ = std::max(gather_rows_, spread_rows_) * std::max(p_.cols.in, p_.cols.out) + kLanes<acc>;
    const auto fill = [&](Masks& masks, const Axis& cols, int64_t sign) {
      masks.reset(new LaneMask<acc>[size_t(cols.kernel * mask_size_)]());
      for (int64_t v = 0; v < cols.kernel; ++v)
        column_mask<acc>(std::max(gather_rows_, spread_rows_), cols.in, sign * (v * cols.dilation - cols.padding),
                         masks.get() + v * mask_size_);
    };
    // The copies of both stagings mask by source, the weights by destination; a gradient moves against the taps.
    if (gather_layout_.blockwise) fill(against_taps_, p_.cols, -1);
    if (spread_layout_.blockwise) {
      fill(along_taps_, spread_.cols, 1);
      fill(against_taps_, spread_.cols, -1);
    }
  }

  // Whether neighbouring rows can be computed together.
  bool pairs_rows(const Staging& s) const {
    return kPairsRows && s.copies == 1 && s.row_step == 1 && !s.flat() && p_.rows.kernel == 3 && p_.cols.kernel == 3 &&
           p_.rows.dilation == 1;
  }

  // body(position in the map, length, offset in a staged plane) for every run of rows [first, end) of a tile that
  // starts at row `begin`.
  template <class Body>
  void for_runs(const Staging& s, int64_t begin, int64_t first, int64_t end, Body&& body) {
    if (s.flat()) return body(first * s.width, (end - first) * s.width, (first - begin) * s.width);
    for (int64_t i = first; i < end; ++i) body(i * s.width, s.width, (i - begin) * s.row_step * s.pitch);
  }

  // body(position in the map, length, planes) for the same runs, with the input planes of unit (n, m).
  template <class Body>
  void for_input_runs(int64_t n, int64_t m, int64_t begin, int64_t first, int64_t end, const scalar_t* x, const acc* staged,
                      Body&& body) {
    if constexpr (kDirect) {
      if (direct_) {
        const int64_t position = first * p_.cols.out;
        auto planes = gathering_.planes(x + (n * p_.channels + m) * p_.in_plane(), p_.weight_channels * p_.in_plane(),
                                        p_.in_plane(), position);
        return body(position, (end - first) * p_.cols.out, planes);
      }
    }
    for_runs(gather_layout_, begin, first, end, [&](int64_t position, int64_t length, int64_t offset) {
      StagedPlanes<acc> planes{staged + offset, offsets_.get(), gather_channel()};
      body(position, length, planes);
    });
  }

  template <int kTaps, class View, class Planes, class Next>
  void run(const View& weights, int64_t position, int64_t length, Planes& planes, scalar_t* out, const Next& next) {
    weighted_sum<kTaps>(weights, position, length, p_.taps(), planes, p_.sharing(), weights_, out + position,
                        p_.weight_channels * p_.out_plane(), next);
  }

  // The task that follows: the next band of the unit, or the first of the next unit.
  struct Place {
    int64_t n, m, band;
  };
  Place place_after(int64_t n, int64_t m, int64_t band) const {
    if (band + 1 < bands_) return {n, m, band + 1};
    return m + 1 < p_.weight_channels ? Place{n, m + 1, 0} : Place{std::min(n + 1, p_.batch - 1), 0, 0};
  }
  Ahead<scalar_t> input_ahead(const Place& next, const scalar_t* x) const {
    return {x + (next.n * p_.channels + next.m) * p_.in_plane() + rows_of(next.band, p_.rows.in).first * p_.cols.in,
            p_.sharing(), p_.weight_channels * p_.in_plane()};
  }
  Ahead<scalar_t> grad_ahead(const Place& next, int64_t g, const scalar_t* grad_y) const {
    return {grad_y + plane_of(next.n, g, next.m) * p_.out_plane() + rows_of(next.band, p_.rows.out).first * p_.cols.out,
            p_.sharing(), p_.weight_channels * p_.out_plane()};
  }
  Ahead<scalar_t> weights_ahead(const Place& next, int64_t g) const {
    return {field_.raw_weights() + p_.group(next.n, g, next.m) * p_.taps() * p_.out_plane() +
                rows_of(next.band, p_.rows.out).first * p_.cols.out,
            p_.taps(), p_.out_plane()};
  }

  template <class Sink>
  void correlate_rows(int64_t n, int64_t g, int64_t m, int64_t band, std::pair<int64_t, int64_t> rows, const acc* staged,
                      const scalar_t* x, const scalar_t* grad_y, Sink&& sink) {
    const Place next = place_after(n, m, band);
    const AheadTwice<scalar_t> ahead{input_ahead(next, x), grad_ahead(next, g, grad_y)};
    const scalar_t* const grad = grad_y + plane_of(n, g, m) * p_.out_plane();
    int64_t row = rows.first;
    if (!direct_ && pairs_rows(gather_layout_))
      for (; row + 2 <= rows.second; row += 2)
        correlate_pair(sink, row * p_.cols.out, p_.cols.out, p_.cols.dilation, grad + row * p_.cols.out,
                       p_.weight_channels * p_.out_plane(), staged + (row - rows.first) * gather_layout_.pitch,
                       gather_layout_.pitch, gather_channel(), p_.sharing(), ahead.at((row - rows.first) * p_.cols.out));
    for_input_runs(n, m, rows.first, row, rows.second, x, staged, [&](int64_t position, int64_t length, auto& planes) {
      correlate(sink, position, length, p_.taps(), planes, grad + position, p_.weight_channels * p_.out_plane(), p_.sharing(),
                products_, ahead.at(position - rows.first * p_.cols.out));
    });
  }

  // The channels of unit (n, m) under output rows [begin, end).
  const acc* stage_input(int64_t n, int64_t m, int64_t begin, int64_t end, const scalar_t* x) {
    arena_.reset(mark_);
    acc* const staged = arena_.take(p_.sharing() * gather_channel() + kLanes<acc>) + left_gap(gather_layout_);
    const int64_t z_begin = p_.rows.source(begin, 0);
    const int64_t z_count = staged_rows(p_, gather_layout_, end - begin);
    const int64_t stride = copy_stride<acc>(gather_layout_, gather_rows_);
    const int64_t plane_stride = p_.weight_channels * p_.in_plane();
    const scalar_t* const plane = x + (n * p_.channels + m) * p_.in_plane();
    if (gather_layout_.blockwise)
      stage_copies(plane, plane_stride, p_.sharing(), block_of(p_.rows.in, p_.cols.in, z_begin, z_count), -p_.cols.padding,
                   p_.cols.dilation, against_taps_.get(), staged, stride, gather_channel());
    else
      for (int64_t j = 0; j < p_.sharing(); ++j)
        for (int64_t v = 0; v < gather_layout_.copies; ++v)
          stage_gather(p_, gather_layout_, plane + j * plane_stride, z_begin, z_count, v, staged + j * gather_channel() + v * stride);
    return staged;
  }

  // One copy per column tap of `channels` planes.
  void stage_copies(const scalar_t* plane, int64_t plane_stride, int64_t channels, const Block& block, int64_t first_shift,
                    int64_t shift_step, const LaneMask<acc>* masks, acc* to, int64_t copy_stride, int64_t channel_stride) {
    const auto stage = p_.cols.kernel == 3 ? &stage_block_copies<3, scalar_t> : &stage_block_copies<0, scalar_t>;
    stage(plane, plane_stride, channels, block, p_.cols.kernel, first_shift, shift_step, masks, mask_size_, to, copy_stride,
          channel_stride);
  }

  // Sum over heads and taps of w[t] * grad_y, both shifted to the input position that the tap reads.
  template <class out_t>
  void grad_input_rows(int64_t n, int64_t m, int64_t begin, int64_t end, const scalar_t* grad_y, out_t* out, int64_t out_stride,
                       const Ahead<scalar_t>& ahead) {
    if constexpr (kDirect) {
      if (direct_ && p_.heads == 1) return grad_input_direct(n, m, begin, end, grad_y, out, out_stride, ahead);
    }
    arena_.reset(mark_);
    const Staging& s = spread_layout_;
    const int64_t taps = p_.taps(), sharing = p_.sharing(), kw = p_.cols.kernel, rows = end - begin;
    acc* const grads = arena_.take(p_.heads * sharing * spread_channel() + kLanes<acc>) + left_gap(s);
    acc* const weights = arena_.take(p_.heads * taps * rows * s.width);
    const int64_t z_begin = begin + spread_.rows.padding - spread_.rows.extent();
    const int64_t z_count = rows + spread_.rows.extent();
    const int64_t plane_stride = p_.weight_channels * p_.out_plane(), stride = copy_stride<acc>(s, spread_rows_);
    for (int64_t g = 0; g < p_.heads; ++g) {
      const scalar_t* const plane = grad_y + plane_of(n, g, m) * p_.out_plane();
      acc* const to = grads + g * sharing * spread_channel();
      if (s.blockwise)
        stage_copies(plane, plane_stride, sharing, block_of(p_.rows.out, p_.cols.out, z_begin, z_count), spread_.cols.padding,
                     -p_.cols.dilation, along_taps_.get(), to, stride, spread_channel());
      else
        for (int64_t j = 0; j < sharing; ++j)
          for (int64_t v = 0; v < s.copies; ++v)
            stage_spread(spread_, s, plane + j * plane_stride, 0, z_begin, z_count, spread_first(s.copies == 1 ? kw - 1 : v),
                         s.length, s.pitch, static_cast<const LaneMask<acc>*>(nullptr), to + j * spread_channel() + v * stride);
      stage_weights(view(n, g, m), begin, rows, weights + g * taps * rows * s.width);
    }
    const PlainWeights<acc> staged_weights{weights, p_.heads * taps, rows * s.width};
    int64_t row = 0;
    if (p_.heads == 1 && pairs_rows(s))
      for (; row + 2 <= rows; row += 2)
        weighted_sum_pair<true>(staged_weights, row * s.width, s.width, p_.cols.dilation, grads + row * s.pitch, s.pitch,
                                spread_channel(), sharing, out + row * s.width, out_stride,
                                Ahead<scalar_t>{ahead.start + row * s.width, ahead.streams, ahead.stride});
    for_runs(s, 0, row, rows, [&](int64_t position, int64_t length, int64_t offset) {
      const auto sum = [&](auto kTaps) {
        StagedPlanes<acc> planes{grads + offset, offsets_.get() + taps, spread_channel()};
        weighted_sum<decltype(kTaps)::value>(staged_weights, position, length, p_.heads * taps, planes, sharing, weights_,
                                             out + position, out_stride,
                                             Ahead<scalar_t>{ahead.start + position, ahead.streams, ahead.stride});
      };
      if (p_.heads * taps == 9) sum(std::integral_constant<int, 9>());
      else sum(std::integral_constant<int, 0>());
    });
  }

  // The same where nothing needs staging.
  template <class out_t>
  void grad_input_direct(int64_t n, int64_t m, int64_t begin, int64_t end, const scalar_t* grad_y, out_t* out,
                         int64_t out_stride, const Ahead<scalar_t>& ahead) {
    const int64_t position = begin * p_.cols.in, plane = p_.out_plane();
    auto planes = spreading_.planes(grad_y + plane_of(n, 0, m) * plane, p_.weight_channels * plane, plane, position);
    const auto sum = [&](auto kTaps, const auto& weights) {
      weighted_sum<decltype(kTaps)::value>(weights, 0, (end - begin) * p_.cols.in, p_.taps(), planes, p_.sharing(), weights_,
                                           out, out_stride, ahead);
    };
    const auto sum_with = [&](const auto& weights) {
      if (p_.taps() == 9) sum(std::integral_constant<int, 9>(), weights);
      else sum(std::integral_constant<int, 0>(), weights);
    };
    const auto source = view(n, 0, m);
    if constexpr (Field::View::kPlain) {
      sum_with(spreading_.weights(source.w, plane, planes));
    } else {
      arena_.reset(mark_);
      const auto [transformed, first, size] = transform_weights(source, begin, end - begin);
      sum_with(spreading_.weights(transformed - first * p_.cols.out, size, planes));
    }
  }

  int64_t spread_first(int64_t v) const { return spread_.cols.padding - v * spread_.cols.dilation; }

  // w[t] at the output position that input rows [begin, begin + rows) feed through tap t, or zero where there is none.
  void stage_weights(const typename Field::View& source, int64_t begin, int64_t rows, acc* to) {
    const Axis& axis = spread_.rows;
    const auto stage = [&](const auto* planes, int64_t plane_stride, int64_t plane_row) {
      for (int64_t t = 0; t < p_.taps(); ++t) {
        const int64_t u = t / p_.cols.kernel, v = t % p_.cols.kernel;
        stage_spread(spread_, spread_layout_, planes + t * plane_stride, plane_row, begin + axis.padding - u * axis.dilation,
                     rows, spread_first(v), spread_layout_.width, spread_layout_.width, against_taps_.get() + v * mask_size_,
                     to + t * rows * spread_layout_.width);
      }
    };
    if constexpr (Field::View::kPlain) {
      stage(source.w, source.plane, 0);
    } else {
      const int64_t before = arena_.mark();
      const auto [transformed, first, size] = transform_weights(source, begin, rows);
      stage(static_cast<const acc*>(transformed), size, first);
      arena_.reset(before);
    }
  }

  struct Transformed {
    acc* weights;        // [K, size]
    int64_t first, size;  // output row they start with, elements of a tap
  };
  // The transform mixes the taps of one output position: it runs once over the output rows that input rows
  // [begin, begin + rows) feed.
  Transformed transform_weights(const typename Field::View& source, int64_t begin, int64_t rows) {
    const Axis& axis = spread_.rows;
    const int64_t first = std::max<int64_t>(begin + axis.padding - axis.extent(), 0) / axis.stride;
    const int64_t last = std::min((begin + rows - 1 + axis.padding) / axis.stride, axis.out - 1);
    const int64_t size = std::max<int64_t>(last - first + 1, 0) * p_.cols.out;
    acc* const transformed = arena_.take(p_.taps() * size);
    for (int64_t q = 0; q < size; q += kLanes<acc>) {
      const int64_t count = std::min<int64_t>(kLanes<acc>, size - q);
      if (p_.taps() == 9) transform<9>(source, first * p_.cols.out + q, count, transformed + q, size);
      else transform<0>(source, first * p_.cols.out + q, count, transformed + q, size);
    }
    return {transformed, first, size};
  }
  template <int kTaps>
  COTNET_INLINE void transform(const typename Field::View& source, int64_t position, int64_t count, acc* to, int64_t size) {
    Vec<acc> registers[kTaps ? kTaps : 1];
    Vec<acc>* const w = kTaps ? registers : weights_;
    source.template block<kTaps>(w, position, count);
    for (int64_t t = 0; t < (kTaps ? kTaps : p_.taps()); ++t) store_upto(to + t * size, w[t], count);
  }

  // Adds the gradient of a reflected border to the positions it mirrors.
  void fold(const acc* padded, scalar_t* out) const {
    const int64_t pitch = spread_.cols.in;
    for (int64_t r = 0; r < p_.rows.in; ++r) {
      for (int64_t c = 0; c < p_.cols.in; ++c) {
        acc sum = 0;
        for_mirrors(p_.rows, r, [&](int64_t row) {
          for_mirrors(p_.cols, c, [&](int64_t col) { sum += padded[row * pitch + col]; });
        });
        out[r * p_.cols.in + c] = narrow<scalar_t>(sum);
      }
    }
  }
  // Positions of the padded map that hold input position i: itself and its mirror images.
  template <class Body>
  static void for_mirrors(const Axis& axis, int64_t i, Body&& body) {
    body(i + axis.padding);
    if (i > 0 && i <= axis.padding) body(axis.padding - i);
    const int64_t beyond = 2 * (axis.in - 1) - i;
    if (i < axis.in - 1 && beyond < axis.in + axis.padding) body(beyond + axis.padding);
  }

  const AggregationProblem p_;
  const Field field_;
  const AggregationProblem spread_;
  const Staging gather_layout_, spread_layout_;
  const int64_t rows_, bands_;
  const int64_t band_rows_in_, band_rows_out_;  // of a band of the input map, of the output map
  Arena<acc> arena_;
  int64_t gather_rows_ = 0, spread_rows_ = 0, mask_size_ = 0, mark_ = 0;
  std::unique_ptr<int64_t[]> offsets_;  // [1 + G][K]: taps in the staged input, then in the staged gradients of each head
  Masks along_taps_, against_taps_;     // [kw, mask_size_]
  std::unique_ptr<acc[]> padded_;
  bool direct_ = false;
  Direct gathering_, spreading_;  // if so: the window seen from the output, and from the input
  Vec<acc>* weights_;
  Vec<acc>* products_;
  acc* tables_;
};
