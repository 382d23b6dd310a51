// Loops of group_norm_aggregation_pool: what an aggregation left, and its mean together with another map,
//     y[c] = silu(y0[c] + shift[c])        means[n, c] = mean over the map of y + k
// y0 is in memory for a moment only: each plane (NCHW) or band of rows (NHWC) is read back from cache as soon as the kernel
// of the aggregation has written it, and y takes its place. From memory come the operands of the aggregation and k, once; and
// the aggregation stays the one of group_norm_aggregation.h. (16-bit y0 is rounded on its way.)
// Included once per target namespace by foreach_target.h.
#include "cpu/group_norm_aggregation.h"
#include "cpu/map_chunks.h"
#include "cpu/activations.h"

// Vectors summed in acc_t before their sum moves into a double.
constexpr int64_t kPoolVectors = 256;

template <class scalar_t>
struct PoolOperands {
  scalar_t* y;                     // [N, G*C, Ho, Wo]
  const scalar_t* k;               // the same, or null
  const acc_t<scalar_t>* shift;    // [G*C]
  acc_t<scalar_t>* partial;        // [N, G*C], or of NHWC [N, Ho, G*C]
};

template <class scalar_t>
class PoolTail {
 public:
  using acc = acc_t<scalar_t>;
  PoolTail(const AggregationProblem& p, const PoolOperands<scalar_t>& a) : p_(p), a_(a), channels_(p.heads * p.channels) {}

  void planes(int64_t n, int64_t m) const {
    for (int64_t c = m; c < channels_; c += p_.weight_channels) plane(n, c);
  }
  template <class Parallel>
  void all_planes(const Parallel& parallel) const {
    parallel(p_.batch * channels_, 8 * p_.out_plane(), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) plane(unit / channels_, unit % channels_);
    });
  }
  void rows(int64_t n, Rows own) const {
    for (int64_t i = own.begin; i < own.end; ++i) row(n * p_.rows.out + i);
  }

 private:
  void plane(int64_t n, int64_t c) const {
    const int64_t size = p_.out_plane(), unit = n * channels_ + c, begin = unit * size, step = kPoolVectors * kLanes<acc>;
    const Vec<acc> shift = splat<acc>(a_.shift[c]);
    double total = 0;
    for (int64_t first = 0; first < size; first += step) {
      const int64_t end = begin + std::min(first + step, size);
      Vec<acc> sum = {};
      int64_t at = begin + first;
      for (; at + kLanes<acc> <= end; at += kLanes<acc>) element(WholeVector(), at, shift, sum);
      if (at < end) element(part(end - at), at, shift, sum);
      total += double(sum_lanes<acc>(sum));
    }
    a_.partial[unit] = acc(total);
  }
  // Channel by channel, where lanes are channels: sums stay in registers along the row.
  void row(int64_t row) const {
    for (int64_t c = 0; c < channels_; c += kLanes<acc>) {
      if (c + kLanes<acc> <= channels_) column(WholeVector(), row, c, kLanes<acc>);
      else column(part(channels_ - c), row, c, channels_ - c);
    }
  }
  template <class Vector>
  COTNET_INLINE void column(const Vector& vector, int64_t row, int64_t c, int64_t count) const {
    const Vec<acc> shift = load_upto(a_.shift + c, count);
    Vec<acc> sum = {};
    for (int64_t q = row * p_.cols.out; q < (row + 1) * p_.cols.out; ++q) element(vector, q * channels_ + c, shift, sum);
    store_upto(a_.partial + row * channels_ + c, sum, count);
  }
  static COTNET_INLINE PartVector<acc> part(int64_t count) { return {count, ~lanes_from<acc>(count)}; }

  template <class Vector>
  COTNET_INLINE void element(const Vector& vector, int64_t at, Vec<acc> shift, Vec<acc>& sum) const {
    const Vec<acc> y = silu(vector.read(a_.y + at) + shift);
    vector.write(a_.y + at, y);
    sum += vector.fresh(a_.k ? y + vector.read(a_.k + at) : y);
  }

  const AggregationProblem& p_;
  const PoolOperands<scalar_t> a_;
  const int64_t channels_;
};

// means [N, G*C] of the sums over planes, or over rows, which are added in order.
template <class acc>
void pool_means(const AggregationProblem& p, const acc* partial, acc* means) {
  const int64_t channels = p.heads * p.channels, rows = p.channels_last ? p.rows.out : 1;
  const Scratch memory(size_t(channels) * sizeof(double));
  double* const totals = memory.as<double>();
  for (int64_t n = 0; n < p.batch; ++n) {
    std::fill(totals, totals + channels, 0.0);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < channels; ++c) totals[c] += double(partial[(n * rows + i) * channels + c]);
    for (int64_t c = 0; c < channels; ++c) means[n * channels + c] = acc(totals[c] / double(p.out_plane()));
  }
}

// y and k [N, G*C, Ho, Wo], k may be null; means [N, G*C].
template <class scalar_t, class Parallel>
void group_norm_aggregation_pool(const AggregationProblem& p, const GroupNormOperands<scalar_t>& a, double eps,
                                 const acc_t<scalar_t>* shift, const scalar_t* k, scalar_t* y, acc_t<scalar_t>* means,
                                 const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  const int64_t sums = p.batch * p.heads * p.channels * (p.channels_last ? p.rows.out : 1);
  const std::unique_ptr<acc[]> partial(new acc[size_t(sums)]);
  group_norm_aggregation_forward(p, a, eps, y, parallel, PoolTail<scalar_t>(p, {y, k, shift, partial.get()}));
  pool_means(p, partial.get(), means);
}
