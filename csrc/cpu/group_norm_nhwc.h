// group_norm_aggregation on NHWC maps. Included once per target namespace, after aggregation_nhwc.h.
//
// A group, the K taps of one weight channel over the map, is K neighbouring values of every pixel here, between those of
// other groups. So bands of rows are taken one by one, all groups of an image together, and their sums merged in the order
// of the bands. The bands are those of kNormThreads threads whoever runs them, so results do not depend on the threads.

constexpr int64_t kNormThreads = 8;
constexpr int64_t kSumPixels = 256;          // summed in acc before their sum moves into a double
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
  explicit NhwcMoments(const AggregationProblem& p)
      : groups_(p.heads * p.weight_channels), taps_(p.taps()), run_(groups_ * taps_), arena_(3 * Arena<acc>::piece(run_)),
        centres_(arena_.take(run_)), sums_(arena_.take(run_)), squares_(arena_.take(run_)) {}

  // Adds `count` pixels from `w` on to the moments of their groups.
  void add(const scalar_t* w, int64_t count, Moments* moments) {
    const int64_t piece = std::max<int64_t>(kMomentBytes / (run_ * int64_t(sizeof(scalar_t))), 16);
    for (int64_t q = 0; q < count; q += piece) add_piece(w + q * run_, std::min(piece, count - q), moments);
  }

 private:
  // The mean first; the distances from it correct what rounding left of it.
  void add_piece(const scalar_t* w, int64_t count, Moments* moments) {
    std::fill(centres_, centres_ + run_, acc(0));
    sum(w, count);
    const double elements = double(count * taps_);
    for (int64_t m = 0; m < groups_; ++m) {
      const acc mean = acc(total(sums_, m) / elements);
      std::fill(centres_ + m * taps_, centres_ + (m + 1) * taps_, mean);
    }
    sum(w, count);
    for (int64_t m = 0; m < groups_; ++m) {
      const double rest = total(sums_, m) / elements;
      moments[m].merge({elements, double(centres_[m * taps_]) + rest, total(squares_, m) - elements * rest * rest});
    }
  }
  // Vectors along the run, the last one moved back to end with it: what it sums twice comes out alike.
  void sum(const scalar_t* w, int64_t count) {
    constexpr int64_t lanes = kLanes<acc>;
    int64_t e = 0;
    for (; e + 4 * lanes <= run_; e += 4 * lanes) sum_at<4>(w, count, e);
    for (; e + lanes <= run_; e += lanes) sum_at<1>(w, count, e);
    if (e < run_) sum_at<1>(w, count, std::max<int64_t>(run_ - lanes, 0));
  }
  template <int kVectors>
  void sum_at(const scalar_t* w, int64_t count, int64_t e) {
    sum_pixels<kVectors>(w + e, run_, count, run_ - e, centres_ + e, sums_ + e, squares_ + e);
  }
  double total(const acc* values, int64_t m) const {
    double sum = 0;
    for (int64_t t = m * taps_; t < (m + 1) * taps_; ++t) sum += double(values[t]);
    return sum;
  }

  const int64_t groups_, taps_, run_;
  Arena<acc> arena_;
  acc *const centres_, *const sums_, *const squares_;  // [G*Cw][K]
};

// Sums, per weight channel and tap of a band, the gradient d of the normalised weights and d * (w - mean) * rstd.
template <class scalar_t>
class NormSums {
 public:
  static constexpr bool kReadsWeights = true;
  using acc = acc_t<scalar_t>;
  // sums [2][G*Cw*K] belongs to this image and band.
  NormSums(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, int64_t n, double* sums)
      : heads_(p.heads), taps_(p.taps()), l_(channel_layout<acc>(p)), size_(2 * heads_ * (1 + taps_) * l_.row),
        arena_(size_), table_(arena_.take(size_)), partial_(table_ + 2 * heads_ * l_.row), sums_(sums) {
    std::fill(table_, table_ + size_, acc(0));
    for (int64_t g = 0; g < heads_; ++g)
      for (int64_t m = 0; m < l_.used; ++m) {
        table_[2 * g * l_.row + m] = a.mean[p.group(n, g, m % l_.weights)];
        table_[(2 * g + 1) * l_.row + m] = a.rstd[p.group(n, g, m % l_.weights)];
      }
  }

  void operator()(const Strip<acc>& s) {
    for (int64_t m = 0; m < s.width; m += kLanes<acc>) {
      const acc* const table = table_ + 2 * s.head * s.row + m;
      const Vec<acc> mean = load(table), rstd = load(table + s.row);
      for (int64_t t = 0; t < s.taps; ++t) {
        acc* const to = partial_ + 2 * (s.head * s.taps + t) * s.row + m;
        Vec<acc> sum = load(to), sum_normed = load(to + s.row);
        for (int64_t at = t * s.row + m; at < s.size(); at += s.taps * s.row) {
          const Vec<acc> d = load(s.grads + at);
          sum += d;
          sum_normed += d * ((load(s.raw + at) - mean) * rstd);
        }
        store(to, sum);
        store(to + s.row, sum_normed);
      }
    }
    pixels_ += s.count;
    if (pixels_ >= kSumPixels * heads_) flush();
  }

  // Moves what was summed in acc on to the sums: to be called at the end of the band.
  void flush() {
    const int64_t width = l_.together * l_.weights, parameters = heads_ * l_.weights * taps_;
    for (int64_t g = 0; g < heads_; ++g)
      for (int64_t t = 0; t < taps_; ++t) {
        const acc* const from = partial_ + 2 * (g * taps_ + t) * l_.row;
        for (int64_t m = 0; m < width; ++m) {
          double* const to = sums_ + (g * l_.weights + m % l_.weights) * taps_ + t;
          to[0] += double(from[m]);
          to[parameters] += double(from[l_.row + m]);
        }
      }
    std::fill(partial_, table_ + size_, acc(0));
    pixels_ = 0;
  }

 private:
  const int64_t heads_, taps_;
  const ChannelLayout l_;
  const int64_t size_;
  Arena<acc> arena_;
  acc* const table_;    // [G][2][row]: mean, rstd
  acc* const partial_;  // [G][K][2][row]
  double* const sums_;
  int64_t pixels_ = 0;
};

// From the gradient d of an image's normalised weights to that of its weights,
//     grad_w = rstd * (gamma_t * d - (sum of gamma*d)/M - xhat * (sum of gamma*d*xhat)/M) = a_t * d + b * (w - mean) + c
// with xhat = (w - mean) * rstd and M = K*Ho*Wo.
template <class scalar_t>
class NormGrads {
 public:
  using acc = acc_t<scalar_t>;
  // sums [2][G*Cw*K] are those of image n.
  NormGrads(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, int64_t n, const double* sums)
      : run_(p.heads * p.weight_channels * p.taps()), piece_(Arena<acc>::piece(run_)), arena_(4 * piece_), a_(arena_.take(run_)),
        b_(arena_.take(run_)), c_(arena_.take(run_)), mean_(arena_.take(run_)) {
    const int64_t taps = p.taps();
    const double elements = double(taps * p.out_plane());
    for (int64_t m = 0; m < run_; m += taps) {
      const int64_t group = p.group(n, 0, m / taps);
      const double rstd = double(a.rstd[group]);
      double sum = 0, sum_normed = 0;
      for (int64_t e = m; e < m + taps; ++e) {
        const acc gamma = a.gamma ? widen(a.gamma[e]) : acc(1);
        a_[e] = a.rstd[group] * gamma;
        sum += double(gamma) * sums[e];
        sum_normed += double(gamma) * sums[run_ + e];
      }
      std::fill(b_ + m, b_ + m + taps, acc(-rstd * rstd * sum_normed / elements));
      std::fill(c_ + m, c_ + m + taps, acc(-rstd * sum / elements));
      std::fill(mean_ + m, mean_ + m + taps, a.mean[group]);
    }
  }

  // `count` pixels of d, w and grad_w, which may be d.
  void apply(const acc* d, const scalar_t* w, int64_t count, scalar_t* grad_w) const {
    constexpr int64_t lanes = kLanes<acc>;
    for (; count > 0; --count, d += run_, w += run_, grad_w += run_) {
      prefetch_run<kRead>(w + kPrefetchBytes / sizeof(scalar_t), run_);
      // The last vector ends with the pixel and is computed first, before anything of d is overwritten.
      const int64_t last = std::max<int64_t>(run_ - lanes, 0);
      const Vec<acc> end = at(d, w, last);
      for (int64_t e = 0; e < last; e += lanes) store(grad_w + e, at(d, w, e));
      store_upto(grad_w + last, end, run_);
    }
  }

 private:
  COTNET_INLINE Vec<acc> at(const acc* d, const scalar_t* w, int64_t e) const {
    const Vec<acc> apart = load_upto(w + e, run_ - e) - load(mean_ + e);
    return load(a_ + e) * load_upto(d + e, run_ - e) + (load(b_ + e) * apart + load(c_ + e));
  }

  const int64_t run_, piece_;
  Arena<acc> arena_;
  acc *const a_, *const b_, *const c_, *const mean_;  // [G*Cw][K]
};

// body(tiles, n) for every image.
template <class Field, class Parallel, class Body>
void for_images(const AggregationProblem& p, const Field& field, const Parallel& parallel, int64_t bands, const Body& body) {
  parallel(p.batch, p.heads * p.channels * p.taps() * p.out_plane(), [&](int64_t begin, int64_t end) {
    NhwcTiles<Field> tiles(p, field, bands);
    for (int64_t n = begin; n < end; ++n) body(tiles, n);
  });
}
// Whether images are enough for the threads. Then a thread takes whole ones and finds them in cache when it looks again.
template <class Parallel>
bool images_suffice(const AggregationProblem& p, const Parallel& parallel) {
  return p.batch % parallel.threads() == 0 || p.batch >= 4 * parallel.threads();
}

// What follows the aggregation of an output: nothing here.
struct NoTail {
  // NCHW: the planes of weight channel m are there.
  void planes(int64_t /* n */, int64_t /* m */) const {}
  // NCHW, where bands of one plane are shared out: all planes are there.
  template <class Parallel>
  void all_planes(const Parallel&) const {}
  // NHWC: these rows are there.
  void rows(int64_t /* n */, Rows) const {}
};

template <class scalar_t, class Parallel, class Tail>
void group_norm_forward_nhwc(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, double eps, scalar_t* y,
                             const Parallel& parallel, const Tail& tail) {
  const NormField<scalar_t> field{{a.w}, a.mean, a.rstd, a.gamma, a.beta};
  const int64_t bands = NhwcTiles<NormField<scalar_t>>::bands(p, kNormThreads), groups = p.heads * p.weight_channels;
  const int64_t image = p.out_plane() * groups * p.taps();
  std::unique_ptr<Moments[]> moments(new Moments[size_t(p.batch * bands * groups)]);
  const auto measure = [&](int64_t n, int64_t band) {
    const Rows rows = rows_of_band(p.rows.out, bands, band);
    NhwcMoments<scalar_t>(p).add(a.w + n * image + rows.begin * p.cols.out * groups * p.taps(),
                                 (rows.end - rows.begin) * p.cols.out, &moments[size_t((n * bands + band) * groups)]);
  };
  const auto finish = [&](int64_t n) {
    for (int64_t i = 0; i < groups; ++i) {
      Moments group;
      for (int64_t band = 0; band < bands; ++band) group.merge(moments[size_t((n * bands + band) * groups + i)]);
      a.mean[n * groups + i] = acc_t<scalar_t>(group.mean);
      a.rstd[n * groups + i] = acc_t<scalar_t>(1 / std::sqrt(group.squares / group.count + eps));
    }
  };
  if (images_suffice(p, parallel))
    return for_images(p, field, parallel, bands, [&](auto& tiles, int64_t n) {
      for (int64_t band = 0; band < bands; ++band) measure(n, band);
      finish(n);
      for (int64_t band = 0; band < bands; ++band) {
        tiles.forward(n, band, a.x, y);
        tail.rows(n, rows_of_band(p.rows.out, bands, band));
      }
    });
  parallel(p.batch * bands, image / bands, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) measure(task / bands, task % bands);
  });
  for (int64_t n = 0; n < p.batch; ++n) finish(n);
  const int64_t own_bands = NhwcTiles<NormField<scalar_t>>::bands(p, parallel.threads());
  for_bands(p, field, parallel, parallel.threads(), [&](auto& tiles, int64_t n, int64_t band) {
    tiles.forward(n, band, a.x, y);
    tail.rows(n, rows_of_band(p.rows.out, own_bands, band));
  });
}

// Any gradient may be null; grad_gamma and grad_beta are [N, G*Cw*K]. The gradient d of the normalised weights waits in
// grad_w, or where that is of 16 bits, in scratch, until the sums over the image are known.
template <class scalar_t, class Parallel>
void group_norm_backward_nhwc(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, const scalar_t* grad_y,
                              scalar_t* grad_x, scalar_t* grad_w, acc_t<scalar_t>* grad_gamma, acc_t<scalar_t>* grad_beta,
                              const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  constexpr bool kInPlace = std::is_same_v<scalar_t, acc>;
  const NormField<scalar_t> field{{a.w}, a.mean, a.rstd, a.gamma, a.beta};
  if (!grad_w && !grad_gamma && !grad_beta)
    return for_bands(p, field, parallel, parallel.threads(), [&](auto& tiles, int64_t n, int64_t band) {
      tiles.backward(n, band, a.x, grad_y, grad_x, grad_w, KeepGrads());
    });
  const int64_t bands = NhwcTiles<NormField<scalar_t>>::bands(p, kNormThreads);
  const int64_t parameters = p.heads * p.weight_channels * p.taps(), image = p.out_plane() * parameters;
  std::unique_ptr<double[]> sums(new double[size_t(p.batch * bands * 2 * parameters)]());
  const auto sums_of = [&](int64_t n, int64_t band) { return sums.get() + (n * bands + band) * 2 * parameters; };

  const auto sweep = [&](auto& tiles, int64_t n, int64_t band, acc* d) {
    NormSums<scalar_t> add(p, a, n, sums_of(n, band));
    tiles.sweep(n, band, a.x, grad_y, grad_x, d, add);
    add.flush();
  };
  const auto finish = [&](int64_t n) {
    double* const total = sums_of(n, 0);
    for (int64_t band = 1; band < bands; ++band)
      for (int64_t i = 0; i < 2 * parameters; ++i) total[i] += sums_of(n, band)[i];
    for (int64_t i = 0; i < parameters; ++i) {
      if (grad_beta) grad_beta[n * parameters + i] = acc(total[i]);
      if (grad_gamma) grad_gamma[n * parameters + i] = acc(total[parameters + i]);
    }
  };
  const auto apply = [&](int64_t n, Rows rows, const acc* d) {
    const int64_t at = rows.begin * p.cols.out * parameters;
    NormGrads<scalar_t>(p, a, n, sums_of(n, 0))
        .apply(d + at, a.w + n * image + at, (rows.end - rows.begin) * p.cols.out, grad_w + n * image + at);
  };
  // Where d of image n waits; null if grad_w is.
  const auto place = [&](int64_t n, acc* scratch) -> acc* {
    if constexpr (kInPlace) return grad_w ? grad_w + n * image : nullptr;
    return grad_w ? scratch : nullptr;
  };

  if (images_suffice(p, parallel))
    return for_images(p, field, parallel, bands, [&](auto& tiles, int64_t n) {
      const Scratch scratch(kInPlace || !grad_w ? 0 : size_t(image) * sizeof(acc));
      acc* const d = place(n, scratch.template as<acc>());
      for (int64_t band = 0; band < bands; ++band) sweep(tiles, n, band, d);
      finish(n);
      if (grad_w) apply(n, {0, p.rows.out}, d);
    });
  std::unique_ptr<acc[]> scratch(kInPlace || !grad_w ? nullptr : new acc[size_t(p.batch * image)]);
  for_bands(p, field, parallel, kNormThreads,
            [&](auto& tiles, int64_t n, int64_t band) { sweep(tiles, n, band, place(n, scratch.get() + n * image)); });
  for (int64_t n = 0; n < p.batch; ++n) finish(n);
  if (!grad_w) return;
  parallel(p.batch * bands, image / bands, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      apply(task / bands, rows_of_band(p.rows.out, bands, task % bands), place(task / bands, scratch.get() + task / bands * image));
  });
}
