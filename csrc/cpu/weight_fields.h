// Where the weights of a whole call come from: as they are, through a softmax or through a group norm; and where their
// gradients go. Included once per target namespace.

// at() gives the source of weights (weights.h) of one image, head and weight channel.
template <class scalar_t>
struct PlainField {
  using scalar = scalar_t;
  using View = PlainWeights<scalar_t>;
  const scalar_t* w;  // [N, G, Cw, K, Ho, Wo]
  const scalar_t* raw_weights() const { return w; }

  View at(const AggregationProblem& p, int64_t n, int64_t g, int64_t m, acc_t<scalar_t>*) const {
    return {w + p.group(n, g, m) * p.taps() * p.out_plane(), p.taps(), p.out_plane()};
  }
};

template <class scalar_t>
struct SoftmaxField {
  using scalar = scalar_t;
  using View = SoftmaxWeights<scalar_t>;
  PlainField<scalar_t> logits;
  const scalar_t* raw_weights() const { return logits.w; }

  View at(const AggregationProblem& p, int64_t n, int64_t g, int64_t m, acc_t<scalar_t>* table) const {
    return {logits.at(p, n, g, m, table)};
  }
};

template <class scalar_t>
struct NormField {
  using scalar = scalar_t;
  using View = NormWeights<scalar_t>;
  PlainField<scalar_t> raw;
  const acc_t<scalar_t>* mean;  // [N, G*Cw]
  const acc_t<scalar_t>* rstd;  // [N, G*Cw]
  const scalar_t* gamma;        // [G*Cw*K] or null
  const scalar_t* beta;         // [G*Cw*K] or null
  const scalar_t* raw_weights() const { return raw.w; }

  View at(const AggregationProblem& p, int64_t n, int64_t g, int64_t m, acc_t<scalar_t>* table) const {
    const int64_t taps = p.taps(), group = g * p.weight_channels + m;
    const acc_t<scalar_t> scale = rstd[p.group(n, g, m)], centre = mean[p.group(n, g, m)];
    for (int64_t t = 0; t < taps; ++t) {
      table[t] = gamma ? scale * widen(gamma[group * taps + t]) : scale;
      table[taps + t] = (beta ? widen(beta[group * taps + t]) : acc_t<scalar_t>(0)) - centre * table[t];
    }
    return {raw.at(p, n, g, m, table), table, table + taps};
  }
};

// Writes the gradient of plain weights.
template <class scalar_t>
struct PlainSink {
  scalar_t* grad_w;  // [K, plane] of one image, head and weight channel
  int64_t taps;
  int64_t plane;

  COTNET_INLINE void operator()(int64_t position, const Vec<acc_t<scalar_t>>* grads, int64_t count, int64_t) {
    for (int64_t t = 0; t < taps; ++t) {
      fetch_for_store(grad_w + t * plane + position, kStoreAhead * kLanes<acc_t<scalar_t>>);
      store_upto(grad_w + t * plane + position, grads[t], count);
    }
  }
};
