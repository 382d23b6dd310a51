// group_norm_aggregation on NHWC maps. Included once per target namespace, after aggregation_nhwc.h.
//
// A group, the K taps of one weight channel over the map, is K neighbouring values of every pixel here, between those of
// other groups. So bands of rows are taken one by one, all groups of a unit together, and their sums merged in the order of
// the bands. The bands are those of kNormThreads threads whoever runs them, so results do not depend on the threads.

constexpr int64_t kNormThreads = 8;
constexpr int64_t kMomentBytes = 32 * 1024;  // weights read twice from the first-level cache: for the mean, then around it

// Mean and sum of squared distances from it.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, apart = other.mean - mean;
    squares += other.squares + apart * apart * count * other.count / total;
    mean += apart * other.count / total;
    count = total;
  }
};

// sums[e] = sum over `count` pixels of w[e] - centres[e], and squares[e] of its square, for kVectors vectors.
template <int kVectors, class scalar_t, class acc>
COTNET_INLINE void sum_pixels(const scalar_t* w, int64_t pixel, int64_t count, int64_t left, const acc* centres, acc* sums,
                              acc* squares) {
  Vec<acc> centre[kVectors], sum[kVectors] = {}, square[kVectors] = {};
  for (int i = 0; i < kVectors; ++i) centre[i] = load(centres + i * kLanes<acc>);
  for (int64_t q = 0; q < count; ++q, w += pixel)
    for (int i = 0; i < kVectors; ++i) {
      const Vec<acc> apart = load_upto(w + i * kLanes<acc>, left - i * kLanes<acc>) - centre[i];
      sum[i] += apart;
      square[i] += apart * apart;
    }
  for (int i = 0; i < kVectors; ++i) {
    store(sums + i * kLanes<acc>, sum[i]);
    store(squares + i * kLanes<acc>, square[i]);
  }
}

template <class scalar_t>
class NhwcMoments {
 public:
  using acc = acc_t<scalar_t>;
  NhwcMoments(const AggregationProblem& p, const ChannelLayout& l)
      : part_(l.part), taps_(p.taps()), run_(l.part * p.taps()), pixel_(p.heads * p.weight_channels * p.taps()),
        arena_(3 * Arena<acc>::piece(run_)), centres_(arena_.take(run_)), sums_(arena_.take(run_)), squares_(arena_.take(run_)) {}

  // Adds `count` pixels from `w` on to the moments of `part` groups.
  void add(const scalar_t* w, int64_t count, Moments* moments) {
    const int64_t piece = std::max<int64_t>(kMomentBytes / (run_ * int64_t(sizeof(scalar_t))), 16);
    for (int64_t q = 0; q < count; q += piece) add_piece(w + q * pixel_, std::min(piece, count - q), moments);
  }

 private:
  // The mean first; the distances from it correct what rounding left of it.
  void add_piece(const scalar_t* w, int64_t count, Moments* moments) {
    std::fill(centres_, centres_ + run_, acc(0));
    sum(w, count);
    const double elements = double(count * taps_);
    for (int64_t m = 0; m < part_; ++m) {
      const acc mean = acc(total(sums_, m) / elements);
      std::fill(centres_ + m * taps_, centres_ + (m + 1) * taps_, mean);
    }
    sum(w, count);
    for (int64_t m = 0; m < part_; ++m) {
      const double rest = total(sums_, m) / elements;
      moments[m].merge({elements, double(centres_[m * taps_]) + rest, total(squares_, m) - elements * rest * rest});
    }
  }
  void sum(const scalar_t* w, int64_t count) {
    constexpr int64_t four = 4 * kLanes<acc>;
    int64_t e = 0;
    for (; e + four <= run_; e += four) sum_pixels<4>(w + e, pixel_, count, run_ - e, centres_ + e, sums_ + e, squares_ + e);
    for (; e < run_; e += kLanes<acc>) sum_pixels<1>(w + e, pixel_, count, run_ - e, centres_ + e, sums_ + e, squares_ + e);
  }
  double total(const acc* values, int64_t m) const {
    double sum = 0;
    for (int64_t t = m * taps_; t < (m + 1) * taps_; ++t) sum += double(values[t]);
    return sum;
  }

  const int64_t part_, taps_, run_, pixel_;
  Arena<acc> arena_;
  acc *const centres_, *const sums_, *const squares_;  // [part][K]
};

// Sums, per weight channel and tap of a band, the gradient d of the normalised weights and d * (w - mean) * rstd.
template <class scalar_t>
class NormSums {
 public:
  static constexpr bool kReadsWeights = true;
  using acc = acc_t<scalar_t>;
  // sums [2][G*Cw*K] belongs to this unit and band.
  NormSums(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, int64_t n, double* sums)
      : parameters_(p.heads * p.weight_channels * p.taps()), mean_(a.mean + p.group(n, 0, 0)), rstd_(a.rstd + p.group(n, 0, 0)),
        sums_(sums) {}

  void operator()(const Strip<acc>& s) const {
    for (int64_t m = 0; m < s.part; m += kLanes<acc>) {
      const int64_t lanes = std::min<int64_t>(kLanes<acc>, s.part - m);
      const Vec<acc> mean = load_upto(mean_ + s.channel + m, lanes), rstd = load_upto(rstd_ + s.channel + m, lanes);
      for (int64_t t = 0; t < s.taps; ++t) {
        Vec<acc> sum = {}, sum_normed = {};
        for (int64_t at = t * s.row + m, end = s.count * s.taps * s.row; at < end; at += s.taps * s.row) {
          const Vec<acc> d = load(s.grads + at);
          sum += d;
          sum_normed += d * ((load(s.raw + at) - mean) * rstd);
        }
        double* const to = sums_ + (s.channel + m) * s.taps + t;
        for (int64_t i = 0; i < lanes; ++i) {
          to[i * s.taps] += double(sum[i]);
          to[parameters_ + i * s.taps] += double(sum_normed[i]);
        }
      }
    }
  }

 private:
  const int64_t parameters_;
  const acc *mean_, *rstd_;  // [G*Cw]
  double* sums_;
};

// From the gradient d of the normalised weights to that of the weights: a_t * d + b * (w - mean) + c.
template <class scalar_t>
class NormGrads {
 public:
  static constexpr bool kReadsWeights = true;
  using acc = acc_t<scalar_t>;
  // sums [2][G*Cw*K] of the image.
  NormGrads(const AggregationProblem& p, const ChannelLayout& l, const GroupNormOperands<scalar_t>& a, int64_t n, int64_t first,
            const double* sums)
      : per_head_((p.taps() + 3) * l.row), arena_(p.heads * per_head_), table_(arena_.take(p.heads * per_head_)) {
    const int64_t taps = p.taps(), parameters = p.heads * p.weight_channels * taps;
    const double elements = double(taps * p.out_plane());
    std::fill(table_, table_ + p.heads * per_head_, acc(0));
    for (int64_t g = 0; g < p.heads; ++g)
      for (int64_t m = 0; m < l.part; ++m) {
        const int64_t channel = g * p.weight_channels + first + m, group = p.group(n, 0, 0) + channel;
        acc* const at = table_ + g * per_head_ + m;
        double sum = 0, sum_normed = 0;
        for (int64_t t = 0; t < taps; ++t) {
          const acc gamma = a.gamma ? widen(a.gamma[channel * taps + t]) : acc(1);
          at[t * l.row] = a.rstd[group] * gamma;
          sum += double(gamma) * sums[channel * taps + t];
          sum_normed += double(gamma) * sums[parameters + channel * taps + t];
        }
        const double rstd = double(a.rstd[group]);
        at[taps * l.row] = acc(-rstd * rstd * sum_normed / elements);
        at[(taps + 1) * l.row] = acc(-rstd * sum / elements);
        at[(taps + 2) * l.row] = a.mean[group];
      }
  }

  void operator()(const Strip<acc>& s) const {
    const acc* const table = table_ + s.head * per_head_;
    for (int64_t m = 0; m < s.part; m += kLanes<acc>) {
      const Vec<acc> b = load(table + s.taps * s.row + m), c = load(table + (s.taps + 1) * s.row + m);
      const Vec<acc> mean = load(table + (s.taps + 2) * s.row + m);
      for (int64_t t = 0; t < s.taps; ++t) {
        const Vec<acc> a = load(table + t * s.row + m);
        for (int64_t at = t * s.row + m, end = s.count * s.taps * s.row; at < end; at += s.taps * s.row)
          store(s.grads + at, a * load(s.grads + at) + (b * (load(s.raw + at) - mean) + c));
      }
    }
  }

 private:
  const int64_t per_head_;
  Arena<acc> arena_;
  acc* const table_;  // [G][K + 3][row]: a_t, b, c, mean
};

template <class scalar_t, class Parallel>
void group_norm_forward_nhwc(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, double eps, scalar_t* y,
                             const Parallel& parallel) {
  const int64_t bands = NhwcTiles<PlainField<scalar_t>>::bands(p, kNormThreads), groups = p.heads * p.weight_channels;
  std::unique_ptr<Moments[]> moments(new Moments[size_t(bands * p.batch * groups)]);
  for_bands(p, PlainField<scalar_t>{a.w}, parallel, kNormThreads, [&](auto& tiles, int64_t n, int64_t unit, int64_t band) {
    const ChannelLayout& l = tiles.layout();
    const auto rows = tiles.rows_of(band, p.rows.out);
    NhwcMoments<scalar_t> unit_moments(p, l);
    for (int64_t g = 0; g < p.heads && !rows.empty(); ++g) {
      const int64_t channel = g * p.weight_channels + unit * l.part;
      unit_moments.add(a.w + ((n * p.out_plane() + rows.begin * p.cols.out) * groups + channel) * p.taps(),
                       (rows.end - rows.begin) * p.cols.out, &moments[(band * p.batch + n) * groups + channel]);
    }
  });
  for (int64_t i = 0; i < p.batch * groups; ++i) {
    Moments group;
    for (int64_t band = 0; band < bands; ++band) group.merge(moments[band * p.batch * groups + i]);
    a.mean[i] = acc_t<scalar_t>(group.mean);
    a.rstd[i] = acc_t<scalar_t>(1 / std::sqrt(group.squares / group.count + eps));
  }
  for_bands(p, NormField<scalar_t>{{a.w}, a.mean, a.rstd, a.gamma, a.beta}, parallel, parallel.threads(),
            [&](auto& tiles, int64_t n, int64_t unit, int64_t band) { tiles.forward(n, unit, band, a.x, y); });
}

// Any gradient may be null; grad_gamma and grad_beta are [N, G*Cw*K].
template <class scalar_t, class Parallel>
void group_norm_backward_nhwc(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, const scalar_t* grad_y,
                              scalar_t* grad_x, scalar_t* grad_w, acc_t<scalar_t>* grad_gamma, acc_t<scalar_t>* grad_beta,
                              const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  const NormField<scalar_t> field{{a.w}, a.mean, a.rstd, a.gamma, a.beta};
  if (!grad_w && !grad_gamma && !grad_beta)
    return for_bands(p, field, parallel, parallel.threads(), [&](auto& tiles, int64_t n, int64_t unit, int64_t band) {
      tiles.backward(n, unit, band, a.x, grad_y, grad_x, static_cast<scalar_t*>(nullptr), KeepGrads());
    });
  const int64_t bands = NhwcTiles<NormField<scalar_t>>::bands(p, kNormThreads);
  const int64_t parameters = p.heads * p.weight_channels * p.taps(), size = 2 * parameters;
  std::unique_ptr<double[]> sums(new double[size_t(p.batch * bands * size)]());
  for_bands(p, field, parallel, kNormThreads, [&](auto& tiles, int64_t n, int64_t unit, int64_t band) {
    tiles.backward(n, unit, band, a.x, grad_y, grad_x, static_cast<scalar_t*>(nullptr),
                   NormSums<scalar_t>(p, a, n, sums.get() + (n * bands + band) * size));
  });
  for (int64_t n = 0; n < p.batch; ++n) {
    double* const total = sums.get() + n * bands * size;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t band = 1; band < bands; ++band) total[i] += total[band * size + i];
    for (int64_t i = 0; i < parameters; ++i) {
      if (grad_beta) grad_beta[n * parameters + i] = acc(total[i]);
      if (grad_gamma) grad_gamma[n * parameters + i] = acc(total[parameters + i]);
    }
  }
  if (!grad_w) return;
  for_bands(p, field, parallel, parallel.threads(), [&](auto& tiles, int64_t n, int64_t unit, int64_t band) {
    const ChannelLayout& l = tiles.layout();
    tiles.backward(n, unit, band, a.x, grad_y, static_cast<scalar_t*>(nullptr), grad_w,
                   NormGrads<scalar_t>(p, l, a, n, unit * l.part, sums.get() + n * bands * size));
  });
}
