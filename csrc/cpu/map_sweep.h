// Sweeps over maps [N, C, H*W]: every vector of the maps is read once, with coefficients of its channel and image at hand; a
// sweep may write maps, and may leave sums over each map. Included once per target namespace, after simd.h.
//
// What a sweep does with a vector is a struct, the pass:
//     using scalar_t;  kCoefficients of a channel;  kImageCoefficients of a channel of an image;  kSums
//     operator()(vector, at, coefficients, sums): `at` is the vector's first element, coefficients of the channel come first
#include "cpu/map_chunks.h"

// Of a chunk. A lane adds up at most 256 numbers before they go into a sum in double.
constexpr int64_t kSweepElements = 256 * kLanes<float>;
constexpr int64_t kSweepWork = 8;  // multiply-adds for an element

template <class acc>
struct SweepTables {
  const acc* channel;  // [kCoefficients, C]
  const acc* image;    // [N, kImageCoefficients, C], or null
};

template <class Pass>
constexpr int kAllCoefficients = Pass::kCoefficients + Pass::kImageCoefficients;
template <class Pass>
constexpr int kSumSlots = Pass::kSums > 0 ? Pass::kSums : 1;

// ---- coefficients ----------------------------------------------------------------------------------------------------

// Row q of the tables for image n.
template <class Pass, class acc>
COTNET_INLINE const acc* table_row(const SweepTables<acc>& tables, int64_t channels, int64_t n, int q) {
  if (q < Pass::kCoefficients) return tables.channel + q * channels;
  return tables.image + (n * Pass::kImageCoefficients + q - Pass::kCoefficients) * channels;
}
template <class Pass, class acc>
COTNET_INLINE void coefficients_of_channel(const SweepTables<acc>& tables, int64_t channels, int64_t n, int64_t c, Vec<acc>* to) {
  for (int q = 0; q < kAllCoefficients<Pass>; ++q) to[q] = splat<acc>(table_row<Pass>(tables, channels, n, q)[c]);
}
// channels_last: [vectors, coefficients].
template <class Pass, class acc>
void coefficients_of_image(const MapCut& cut, const SweepTables<acc>& tables, int64_t n, Vec<acc>* to) {
  for (int64_t k = 0; k < cut.vectors; ++k)
    for (int q = 0; q < kAllCoefficients<Pass>; ++q)
      to[k * kAllCoefficients<Pass> + q] =
          load_upto(table_row<Pass>(tables, cut.pitch, n, q) + first_channel<acc>(cut.pitch, k), cut.pitch);
}

// ---- one chunk -------------------------------------------------------------------------------------------------------

template <class Pass, class acc>
struct PlaneSweep {
  const Pass& pass;
  Vec<acc> coefficients[kAllCoefficients<Pass>];
  Vec<acc> sums[kSumSlots<Pass>];

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t at, int64_t) {
    pass(vector, at, coefficients, sums);
  }
};
template <class Pass, class acc>
struct ImageSweep {
  const Pass& pass;
  const Vec<acc>* const coefficients;  // [vectors, coefficients]
  Vec<acc>* const sums;                // [vectors, sums]

  template <class Vector>
  COTNET_INLINE void operator()(const Vector& vector, int64_t k, int64_t at) {
    pass(vector, at, coefficients + k * kAllCoefficients<Pass>, sums + k * Pass::kSums);
  }
};

// The sums over one chunk go to `partial` [kSums, pitch].
template <class Pass, class acc>
COTNET_INLINE void sweep_plane(const MapCut& cut, const SweepTables<acc>& tables, int64_t channels, int64_t unit, int64_t chunk,
                               const Pass& pass, acc* partial) {
  PlaneSweep<Pass, acc> body{pass, {}, {}};
  coefficients_of_channel<Pass>(tables, channels, unit / channels, unit % channels, body.coefficients);
  for_plane<acc>(cut.begin(unit, chunk), cut.end(unit, chunk), body);
  for (int i = 0; i < Pass::kSums; ++i) partial[i] = sum_everywhere<acc>(body.sums[i])[0];
}
template <class Pass, class acc>
void sweep_pixels(const MapCut& cut, int64_t unit, int64_t chunk, const Pass& pass, const Vec<acc>* coefficients, Vec<acc>* sums,
                  acc* partial) {
  for (int64_t i = 0; i < cut.vectors * Pass::kSums; ++i) sums[i] = Vec<acc>{};
  ImageSweep<Pass, acc> body{pass, coefficients, sums};
  for_pixels<acc>(cut.pitch, cut.begin(unit, chunk), cut.end(unit, chunk), body);
  for (int i = 0; i < Pass::kSums; ++i)
    for (int64_t k = 0; k < cut.vectors; ++k)
      store_upto(partial + i * cut.pitch + first_channel<acc>(cut.pitch, k), sums[k * Pass::kSums + i], cut.pitch);
}

// ---- whole maps ------------------------------------------------------------------------------------------------------

// Chunks [first, last) of all units; partial [units, chunks, kSums, pitch].
template <class Pass, class acc>
void sweep_chunks(const MapCut& cut, const SweepTables<acc>& tables, int64_t channels, const Pass& pass, acc* partial,
                  int64_t first, int64_t last) {
  const int64_t vectors = cut.channels_last ? cut.vectors : 0;
  const Scratch coefficient_memory(size_t(vectors * kAllCoefficients<Pass>) * sizeof(Vec<acc>));
  const Scratch sum_memory(size_t(vectors * Pass::kSums) * sizeof(Vec<acc>));
  Vec<acc>* const coefficients = coefficient_memory.as<Vec<acc>>();
  for (int64_t t = first; t < last; ++t) {
    const int64_t unit = t / cut.chunks, chunk = t % cut.chunks;
    acc* const own = partial + t * Pass::kSums * cut.pitch;
    if (!cut.channels_last) {
      sweep_plane(cut, tables, channels, unit, chunk, pass, own);
      continue;
    }
    if (t == first || chunk == 0) coefficients_of_image<Pass>(cut, tables, unit, coefficients);
    sweep_pixels(cut, unit, chunk, pass, coefficients, sum_memory.as<Vec<acc>>(), own);
  }
}

// sums [N, kSums, C] from those of the chunks, added in order.
template <class acc>
void add_chunks(const MapCut& cut, const acc* partial, int kinds, int64_t channels, acc* sums) {
  const int64_t images = cut.channels_last ? cut.units : cut.units / std::max<int64_t>(channels, 1);
  const int64_t stride = kinds * cut.pitch;  // of a chunk
  for (int64_t n = 0; n < images; ++n)
    for (int i = 0; i < kinds; ++i)
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t unit = cut.channels_last ? n : n * channels + c;
        const acc* const own = partial + unit * cut.chunks * stride + i * cut.pitch + (cut.channels_last ? c : 0);
        double total = 0;
        for (int64_t k = 0; k < cut.chunks; ++k) total += double(own[k * stride]);
        sums[(n * kinds + i) * channels + c] = acc(total);
      }
}

// `sums` [N, kSums, C], or null for a pass without any.
template <class Pass, class acc, class Parallel>
void sweep(const MapProblem& p, const SweepTables<acc>& tables, const Pass& pass, acc* sums, const Parallel& parallel) {
  const MapCut cut = cut_map<acc>(p, kSweepElements);
  const Scratch memory(size_t(cut.units * cut.chunks * Pass::kSums * cut.pitch) * sizeof(acc));
  acc* const partial = memory.as<acc>();
  parallel(cut.units * cut.chunks, kSweepWork * cut.pixels * cut.pitch, [&](int64_t first, int64_t last) {
    sweep_chunks(cut, tables, p.channels, pass, partial, first, last);
  });
  if constexpr (Pass::kSums > 0) add_chunks(cut, partial, Pass::kSums, p.channels, sums);
}
