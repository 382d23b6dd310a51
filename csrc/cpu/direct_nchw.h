// Planes of NCHW maps read where they are: where rows follow each other without gaps in the input as in the output, a tap
// is the whole run moved, and lanes that leave the row or the plane are masked. AVX-512 masks a load for nothing, so nothing
// is staged; other targets, and float64, stage. Included once per target namespace.

template <class scalar_t>
struct DirectWindow {
  static constexpr bool kPossible = false;
};

#if COTNET_X86 && COTNET_VECTOR_BYTES == 64
// Lanes of the mask; the others are zero, and their memory is not touched.
COTNET_INLINE Vec<float> load_masked(const float* p, __mmask16 mask) { return (Vec<float>)_mm512_maskz_loadu_ps(mask, p); }
COTNET_INLINE Vec<float> load_masked(const BFloat16* p, __mmask16 mask) {
  return widen_bits(_mm256_maskz_loadu_epi16(mask, p));
}
COTNET_INLINE Vec<float> load_masked(const Half* p, __mmask16 mask) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
}

constexpr int64_t kDirectTaps = 49;  // at most

// The window over planes of the channels that share a weight; stands in for StagedPlanes.
template <class scalar_t>
struct DirectPlanes {
  const scalar_t* plane;       // of the first channel
  int64_t channel_stride;
  int64_t size, width;         // of a plane, of a row
  int64_t position;            // where the run starts
  int64_t reach;               // rows' taps are at most so far from a position
  int64_t rows, cols;          // taps
  const int64_t* offsets;      // [rows * cols], from a position to what its taps read
  const int64_t* row_offsets;  // [rows], the rows' part of them
  const uint16_t* columns;     // [cols][width]: which lanes stay in their row, by the column of the first lane
  int64_t at = 0;              // first position of the vector
  int64_t column = 0;          // and its column
  uint16_t masks[kDirectTaps] = {};

  struct Tap {
    const scalar_t* at;
    int64_t channel_stride;
    __mmask16 mask;
    COTNET_INLINE Vec<float> channel(int64_t j) const { return load_masked(at + j * channel_stride, mask); }
  };
  COTNET_INLINE void move_to(int64_t q) {
    column += position + q - at;
    at = position + q;
    if (column < 0 || column >= 4 * width) column = at % width;  // the first vector, and the last, which overlaps the one before
    while (column >= width) column -= width;
    const uint16_t* const inside_row = columns + column;
    const bool inside_plane = at >= reach && at + 16 + reach <= size;
    for (int64_t u = 0; u < rows; ++u) {
      const uint32_t inside = inside_plane ? 0xffff : inside_from(at + row_offsets[u]);
      for (int64_t v = 0; v < cols; ++v) masks[u * cols + v] = uint16_t(inside & inside_row[v * width]);
    }
  }
  // Which of the lanes from `start` on are positions of the plane.
  COTNET_INLINE uint32_t inside_from(int64_t start) const {
    const int64_t first = std::clamp<int64_t>(-start, 0, 16), last = std::clamp<int64_t>(size - start, 0, 16);
    return ((1u << last) - 1) & ~((1u << first) - 1);
  }
  COTNET_INLINE Tap tap(int64_t t) const { return {plane + at + offsets[t], channel_stride, masks[t]}; }
};

// The weights through which positions of the input are read, for a gradient.
template <class w_t, class Planes>
struct DirectWeights {
  const w_t* w;        // of the first tap, for position 0
  int64_t tap_stride;
  const Planes* window;

  template <int kTaps>
  COTNET_INLINE void block(Vec<float>* out, int64_t, int64_t) const {
    for (int64_t t = 0; t < (kTaps ? kTaps : window->rows * window->cols); ++t)
      out[t] = load_masked(w + t * tap_stride + window->at + window->offsets[t], window->masks[t]);
  }
};

// A window as offsets and masks: with sign 1 from an output position to the input, with -1 back.
template <class scalar_t>
class MaskedWindow {
 public:
  static constexpr bool kPossible = true;

  // Rows of the input are as long as those of the output, and a step down moves by one of them.
  static bool fits(const AggregationProblem& p) {
    return !p.reflect && p.rows.stride == 1 && p.cols.stride == 1 && p.cols.in == p.cols.out && p.taps() <= kDirectTaps;
  }
  void prepare(const AggregationProblem& p, int64_t sign) {
    const Axis& rows = p.rows;
    const Axis& cols = p.cols;
    width_ = cols.in, rows_ = rows.kernel, cols_ = cols.kernel, reach_ = 0;
    for (int64_t u = 0; u < rows_; ++u) {
      row_offsets_[u] = sign * (u * rows.dilation - rows.padding) * width_;
      reach_ = std::max(reach_, std::abs(row_offsets_[u]));
      for (int64_t v = 0; v < cols_; ++v) offsets_[u * cols_ + v] = row_offsets_[u] + sign * (v * cols.dilation - cols.padding);
    }
    columns_.reset(new uint16_t[size_t(cols_ * width_)]());
    for (int64_t v = 0; v < cols_; ++v)
      for (int64_t first = 0; first < width_; ++first)
        for (int64_t lane = 0, column = first; lane < 16; ++lane, column = column + 1 < width_ ? column + 1 : 0) {
          const int64_t source = column + sign * (v * cols.dilation - cols.padding);
          if (source >= 0 && source < width_) columns_[v * width_ + first] |= uint16_t(1 << lane);
        }
  }
  DirectPlanes<scalar_t> planes(const scalar_t* plane, int64_t channel_stride, int64_t size, int64_t position) const {
    return {plane, channel_stride, size, width_, position, reach_, rows_, cols_, offsets_, row_offsets_, columns_.get()};
  }
  // `w` of the first tap; raw, or already widened.
  template <class w_t>
  DirectWeights<w_t, DirectPlanes<scalar_t>> weights(const w_t* w, int64_t tap_stride, const DirectPlanes<scalar_t>& planes) const {
    return {w, tap_stride, &planes};
  }

 private:
  int64_t width_ = 0, rows_ = 0, cols_ = 0, reach_ = 0;
  int64_t offsets_[kDirectTaps], row_offsets_[kDirectTaps];
  std::unique_ptr<uint16_t[]> columns_;
};

template <>
struct DirectWindow<float> : MaskedWindow<float> {};
template <>
struct DirectWindow<BFloat16> : MaskedWindow<BFloat16> {};
template <>
struct DirectWindow<Half> : MaskedWindow<Half> {};
#endif
