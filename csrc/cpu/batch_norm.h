// Loops of BatchNorm with what follows it. A norm is three numbers a channel, m, a and b:
//     z = (x - m)*a + b        y = z or max(z, 0)
//     grad_x = a*(grad_z - c - (x - m)*d)
// where c and d are 0 for given statistics; for those of the batch, c is the mean of grad_z and d the mean of
// grad_z*(x - m), times f*f, where f = 1/sqrt(variance + eps).
// Included once per target namespace by foreach_target.h.
#include "cpu/norm_table.h"

template <class scalar_t, bool kRelu>
struct NormForward {
  using acc = acc_t<scalar_t>;
  static constexpr int kCoefficients = 3, kImageCoefficients = 0, kSums = 0;
  const scalar_t* x;
  scalar_t* y;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, const Vec<acc>* norm, Vec<acc>*) const {
    prefetch_ahead(y + at);
    const Vec<acc> z = normed(vector.read(x + at), norm);
    vector.write(y + at, kRelu ? rectified(z) : z);
  }
};

// grad_z at an element.
template <bool kRelu, class V>
COTNET_INLINE V grad_before_relu(V g, V centred, const V* norm) {
  if constexpr (!kRelu) return g;
  return centred * norm[1] + norm[2] <= 0 ? V{} : g;
}

// Sums of grad_z, and of grad_z*(x - m).
template <class scalar_t, bool kRelu>
struct NormSums {
  using acc = acc_t<scalar_t>;
  static constexpr int kCoefficients = 3, kImageCoefficients = 0, kSums = 2;
  const scalar_t* grad_y;
  const scalar_t* x;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, const Vec<acc>* norm, Vec<acc>* sums) const {
    const Vec<acc> centred = vector.read(x + at) - norm[0];
    const Vec<acc> grad_z = vector.fresh(grad_before_relu<kRelu>(vector.read(grad_y + at), centred, norm));
    sums[0] += grad_z;
    sums[1] += vector.fresh(grad_z * centred);
  }
};

template <class scalar_t, bool kRelu>
struct NormBackward {
  using acc = acc_t<scalar_t>;
  static constexpr int kCoefficients = 5, kImageCoefficients = 0, kSums = 0;  // m, a, b, c, d
  const scalar_t* grad_y;
  const scalar_t* x;
  scalar_t* grad_x;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, const Vec<acc>* norm, Vec<acc>*) const {
    prefetch_ahead(grad_x + at);
    const Vec<acc> centred = vector.read(x + at) - norm[0];
    const Vec<acc> grad_z = grad_before_relu<kRelu>(vector.read(grad_y + at), centred, norm);
    vector.write(grad_x + at, norm[1] * (grad_z - norm[3] - centred * norm[4]));
  }
};

template <class scalar_t, class Parallel>
void norm_forward(const MapProblem& p, const scalar_t* x, const acc_t<scalar_t>* norm, bool relu, scalar_t* y,
                  const Parallel& parallel) {
  const SweepTables<acc_t<scalar_t>> tables{norm, nullptr};
  acc_t<scalar_t>* const none = nullptr;
  if (relu)
    sweep(p, tables, NormForward<scalar_t, true>{x, y}, none, parallel);
  else
    sweep(p, tables, NormForward<scalar_t, false>{x, y}, none, parallel);
}

template <class scalar_t, bool kRelu, class Parallel>
void norm_backward_of(const MapProblem& p, const scalar_t* grad_y, const scalar_t* x, const NormOf<acc_t<scalar_t>>& norm,
                      scalar_t* grad_x, acc_t<scalar_t>* grad_weight, acc_t<scalar_t>* grad_bias, const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  const Scratch sum_memory(size_t(2 * p.batch * p.channels) * sizeof(acc)), table_memory(size_t(5 * p.channels) * sizeof(acc));
  acc* const sums = sum_memory.as<acc>();
  acc* const table = table_memory.as<acc>();
  sweep(p, SweepTables<acc>{norm.table, nullptr}, NormSums<scalar_t, kRelu>{grad_y, x}, sums, parallel);
  for (int64_t c = 0; c < p.channels; ++c) {
    double grad_z = 0, with_x = 0;
    for (int64_t n = 0; n < p.batch; ++n) {
      grad_z += double(sums[(2 * n) * p.channels + c]);
      with_x += double(sums[(2 * n + 1) * p.channels + c]);
    }
    norm_backward_row(p, norm, c, grad_z, with_x, table, grad_weight, grad_bias);
  }
  acc* const none = nullptr;
  sweep(p, SweepTables<acc>{table, nullptr}, NormBackward<scalar_t, kRelu>{grad_y, x, grad_x}, none, parallel);
}

template <class scalar_t, class Parallel>
void norm_backward(const MapProblem& p, const scalar_t* grad_y, const scalar_t* x, const NormOf<acc_t<scalar_t>>& norm, bool relu,
                   scalar_t* grad_x, acc_t<scalar_t>* grad_weight, acc_t<scalar_t>* grad_bias, const Parallel& parallel) {
  if (relu)
    norm_backward_of<scalar_t, true>(p, grad_y, x, norm, grad_x, grad_weight, grad_bias, parallel);
  else
    norm_backward_of<scalar_t, false>(p, grad_y, x, norm, grad_x, grad_weight, grad_bias, parallel);
}

// ---- statistics ------------------------------------------------------------------------------------------------------

// A chunk is read twice, the second time from the cache: first for its mean, then for the squares around that mean. The mean is
// rounded, so the second turn also adds up what is left of it.
template <class acc>
struct ChunkSums {
  Vec<acc> mean, rest, squares;
};
struct MeanTurn {
  template <class acc>
  COTNET_INLINE void operator()(ChunkSums<acc>& sums, Vec<acc> x) const {
    sums.mean += x;
  }
};
struct SquaresTurn {
  template <class acc>
  COTNET_INLINE void operator()(ChunkSums<acc>& sums, Vec<acc> x) const {
    sums.rest += x;
    sums.squares += x * x;
  }
};

// The bodies of for_plane and for_pixels. The first turn finds means of zero.
template <class scalar_t, class Turn>
struct PlaneStatistics {
  using acc = acc_t<scalar_t>;
  const scalar_t* x;
  ChunkSums<acc> sums;
  Vec<acc> mean;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, int64_t) {
    Turn()(sums, vector.fresh(vector.read(x + at) - mean));
  }
};
template <class scalar_t, class Turn>
struct ImageStatistics {
  using acc = acc_t<scalar_t>;
  const scalar_t* x;
  ChunkSums<acc>* sums;

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t k, int64_t at) {
    Vec<acc> value = vector.read(x + at);
    if constexpr (std::is_same_v<Turn, SquaresTurn>) value -= sums[k].mean;
    Turn()(sums[k], vector.fresh(value));
  }
};

constexpr int kStatistics = 3;  // of a chunk: its mean, the mean of what is left of it, the sum of squares

template <class scalar_t>
void chunk_statistics(const MapCut& cut, const scalar_t* x, int64_t begin, int64_t end, ChunkSums<acc_t<scalar_t>>* memory,
                      acc_t<scalar_t>* partial /* [kStatistics, pitch] */) {
  using acc = acc_t<scalar_t>;
  const acc count = acc(std::max<int64_t>((end - begin) / cut.pitch, 1));
  if (!cut.channels_last) {
    PlaneStatistics<scalar_t, MeanTurn> first{x, {}, {}};
    for_plane<acc>(begin, end, first);
    const Vec<acc> mean = sum_everywhere<acc>(first.sums.mean) / count;
    PlaneStatistics<scalar_t, SquaresTurn> second{x, {}, mean};
    for_plane<acc>(begin, end, second);
    partial[0] = mean[0];
    partial[1] = sum_everywhere<acc>(second.sums.rest)[0] / count;
    partial[2] = sum_everywhere<acc>(second.sums.squares)[0];
    return;
  }
  for (int64_t k = 0; k < cut.vectors; ++k) memory[k] = ChunkSums<acc>{};
  ImageStatistics<scalar_t, MeanTurn> first{x, memory};
  for_pixels<acc>(cut.pitch, begin, end, first);
  for (int64_t k = 0; k < cut.vectors; ++k) memory[k].mean = memory[k].mean / count;
  ImageStatistics<scalar_t, SquaresTurn> second{x, memory};
  for_pixels<acc>(cut.pitch, begin, end, second);
  for (int64_t k = 0; k < cut.vectors; ++k) {
    acc* const own = partial + first_channel<acc>(cut.pitch, k);
    store_upto(own, memory[k].mean, cut.pitch);
    store_upto(own + cut.pitch, memory[k].rest / count, cut.pitch);
    store_upto(own + 2 * cut.pitch, memory[k].squares, cut.pitch);
  }
}

template <class scalar_t>
void statistics_of_chunks(const MapCut& cut, const scalar_t* x, acc_t<scalar_t>* partial, int64_t first, int64_t last) {
  using Sums = ChunkSums<acc_t<scalar_t>>;
  const Scratch memory(cut.channels_last ? size_t(cut.vectors) * sizeof(Sums) : 0);
  for (int64_t t = first; t < last; ++t) {
    const int64_t unit = t / cut.chunks, chunk = t % cut.chunks;
    acc_t<scalar_t>* const own = partial + kStatistics * t * cut.pitch;
    chunk_statistics(cut, x, cut.begin(unit, chunk), cut.end(unit, chunk), memory.as<Sums>(), own);
  }
}

// Adds a part to (count, mean, squares around the mean), as in Chan, Golub and LeVeque, 1983.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void add(double part_count, double part_mean, double part_squares) {
    if (part_count == 0) return;
    const double total = count + part_count, apart = part_mean - mean;
    mean += apart * (part_count / total);
    squares += part_squares + apart * apart * (count * (part_count / total));
    count = total;
  }
};

// The norm [3, C] of BatchNorm with the statistics of the batch, f [C], and the variance [C] (the biased one) over images and
// pixels, merged in order; of nothing they are 0. Weight and bias [C] may be null.
template <class scalar_t, class Parallel>
void norm_statistics(const MapProblem& p, const scalar_t* x, const acc_t<scalar_t>* weight, const acc_t<scalar_t>* bias,
                     double eps, acc_t<scalar_t>* norm, acc_t<scalar_t>* factor, acc_t<scalar_t>* variance,
                     const Parallel& parallel) {
  using acc = acc_t<scalar_t>;
  const MapCut cut = cut_map<acc>(p, kSweepElements);
  const Scratch memory(size_t(kStatistics * cut.units * cut.chunks * cut.pitch) * sizeof(acc));
  acc* const partial = memory.as<acc>();
  parallel(cut.units * cut.chunks, kSweepWork * cut.pixels * cut.pitch,
           [&](int64_t first, int64_t last) { statistics_of_chunks(cut, x, partial, first, last); });
  parallel(p.channels, 16 * p.batch * cut.chunks, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      Moments all;
      for (int64_t n = 0; n < p.batch; ++n)
        for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
          const int64_t unit = cut.channels_last ? n : n * p.channels + c;
          const acc* const own = partial + kStatistics * (unit * cut.chunks + chunk) * cut.pitch + (cut.channels_last ? c : 0);
          const double count = double((cut.end(unit, chunk) - cut.begin(unit, chunk)) / cut.pitch), rest = double(own[cut.pitch]);
          all.add(count, double(own[0]) + rest, double(own[2 * cut.pitch]) - rest * rest * count);
        }
      const double mean_square = all.squares / std::max(all.count, 1.0), f = 1 / std::sqrt(mean_square + eps);
      norm[c] = acc(all.mean);
      norm[p.channels + c] = acc(weight ? f * double(weight[c]) : f);
      norm[2 * p.channels + c] = bias ? bias[c] : acc(0);
      factor[c] = acc(f);
      variance[c] = acc(mean_square);
    }
  });
}
