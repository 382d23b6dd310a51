// Where the weights of a window come from: as they are, softmaxed over the taps, or group-normalised. Each source hands
// out the K weights of one vector of positions, so the transformed weights never exist anywhere but in registers.
// Included once per target namespace, after simd.h.

// w [K, plane] of one image, head and weight channel.
template <class scalar_t>
struct PlainWeights {
  static constexpr bool kPlain = true;
  const scalar_t* w;
  int64_t taps;
  int64_t plane;  // elements from one tap to the next

  template <int kTaps>
  COTNET_INLINE void block(Vec<acc_t<scalar_t>>* out, int64_t position, int64_t count) const {
    const scalar_t* p = w + position;
    for (int64_t t = 0; t < (kTaps ? kTaps : taps); ++t) out[t] = load_upto(p + t * plane, count);
  }
};

// softmax over the taps of logits [K, plane].
template <class scalar_t>
struct SoftmaxWeights {
  static constexpr bool kPlain = false;
  PlainWeights<scalar_t> logits;

  template <int kTaps>
  COTNET_INLINE void block(Vec<acc_t<scalar_t>>* out, int64_t position, int64_t count) const {
    using acc = acc_t<scalar_t>;
    const int64_t taps = kTaps ? kTaps : logits.taps;
    logits.template block<kTaps>(out, position, count);
    Vec<acc> top = out[0];
    for (int64_t t = 1; t < taps; ++t) top = maximum(top, out[t]);
    Vec<acc> sum = {};
    for (int64_t t = 0; t < taps; ++t) {
      out[t] = exponential(out[t] - top);
      sum += out[t];
    }
    const Vec<acc> scale = acc(1) / sum;
    for (int64_t t = 0; t < taps; ++t) out[t] *= scale;
  }
};

// w * scale[t] + shift[t]: GroupNorm with its statistics and affine parameters folded into two numbers per tap.
template <class scalar_t>
struct NormWeights {
  static constexpr bool kPlain = false;
  PlainWeights<scalar_t> raw;
  const acc_t<scalar_t>* scale;  // [K]
  const acc_t<scalar_t>* shift;  // [K]

  template <int kTaps>
  COTNET_INLINE void block(Vec<acc_t<scalar_t>>* out, int64_t position, int64_t count) const {
    raw.template block<kTaps>(out, position, count);
    for (int64_t t = 0; t < (kTaps ? kTaps : raw.taps); ++t) out[t] = out[t] * scale[t] + shift[t];
  }
};
