// Maps [N, C, H*W] cut into chunks of pixels, and the loops over one chunk. Included once per target namespace, after
// simd.h.
//
// Every sum here runs over the pixels of a map, separately for each image and channel. NCHW: a unit of work is the plane
// of one channel, and the lanes of a vector are neighbouring pixels. channels_last: a unit is an image, the lanes are
// channels, and memory is read in order however many channels there are. Units are cut into chunks whose sums are merged
// in order: the cuts depend on the sizes alone, so results do not depend on which thread computes a chunk.

constexpr int64_t kChunkElements = 16384;  // of a chunk: its exponentials stay in the second-level cache
constexpr int64_t kChunkPixels = 64;       // channels_last: at least, so that a chunk's sums are small beside it
constexpr int64_t kAheadBytes = 1024;      // how far ahead of a stream

// ---- lanes -----------------------------------------------------------------------------------------------------------

// 0, 1, 2, ...
template <class acc>
COTNET_INLINE Mask<acc> lane_numbers() {
  static constexpr LaneMask<acc> numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Mask<acc> lanes;
  std::memcpy(&lanes, numbers, sizeof(lanes));
  return lanes;
}
template <class acc>
COTNET_INLINE Mask<acc> lanes_from(int64_t first) {
  return lane_numbers<acc>() >= LaneMask<acc>(first);
}

// v with lane i taken from lane i ^ distance.
template <class acc>
COTNET_INLINE Vec<acc> swap_lanes(Vec<acc> v, int distance) {
#if defined(__clang__)
  Vec<acc> swapped;
  for (int i = 0; i < kLanes<acc>; ++i) swapped[i] = v[i ^ distance];
  return swapped;
#else
  return __builtin_shuffle(v, lane_numbers<acc>() ^ LaneMask<acc>(distance));
#endif
}
// The sum and the maximum of all lanes, in every lane.
template <class acc>
COTNET_INLINE Vec<acc> sum_everywhere(Vec<acc> v) {
  for (int distance = kLanes<acc> / 2; distance > 0; distance /= 2) v += swap_lanes<acc>(v, distance);
  return v;
}
template <class acc>
COTNET_INLINE Vec<acc> max_everywhere(Vec<acc> v) {
  for (int distance = kLanes<acc> / 2; distance > 0; distance /= 2) v = maximum(v, swap_lanes<acc>(v, distance));
  return v;
}

// ---- vectors of a map --------------------------------------------------------------------------------------------------

struct WholeVector {
  template <class scalar_t>
  COTNET_INLINE Vec<acc_t<scalar_t>> read(const scalar_t* p) const {
    return load(p);
  }
  template <class scalar_t>
  COTNET_INLINE void write(scalar_t* p, Vec<acc_t<scalar_t>> v) const {
    store(p, v);
  }
  template <class V>
  COTNET_INLINE V fresh(V v) const {
    return v;
  }
  template <class V>
  COTNET_INLINE V fresh_or(V v, V) const {
    return v;
  }
};

// `count` elements from where it is read. Lanes that are not fresh repeat elements of the vector before it or lie outside:
// they must not enter a sum, but may be written.
template <class acc>
struct PartVector {
  int64_t count;
  Mask<acc> mask;  // the fresh lanes

  template <class scalar_t>
  COTNET_INLINE Vec<acc> read(const scalar_t* p) const {
    return load_upto(p, count);
  }
  template <class scalar_t>
  COTNET_INLINE void write(scalar_t* p, Vec<acc> v) const {
    store_upto(p, v, count);
  }
  COTNET_INLINE Vec<acc> fresh(Vec<acc> v) const { return keep(mask, v); }
  COTNET_INLINE Vec<acc> fresh_or(Vec<acc> v, Vec<acc> other) const { return mask ? v : other; }
};

// Asks for what a stream reads or writes `bytes` further on, which may lie outside the tensor. For outputs this matters
// most: a store that has to fetch its line holds up all stores behind it.
template <class scalar_t>
COTNET_INLINE void prefetch_ahead(const scalar_t* p, int64_t bytes = kAheadBytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes)));
}

// ---- loops over one chunk ------------------------------------------------------------------------------------------------

// The bodies are structs, as a loop in a template must not be a lambda (foreach_target.h).

// NCHW: body(vector, at, slot) for the vectors of elements [begin, end), which lie in one plane: `at` is the first element
// and `slot` a place in scratch memory that has room for a full vector each. The last vector is moved back to end with the
// chunk.
template <class acc, class Body>
COTNET_INLINE void for_plane(int64_t begin, int64_t end, Body& body) {
  constexpr int lanes = kLanes<acc>;
  const int64_t size = end - begin, rest = size % lanes, whole = size - rest;
  for (int64_t q = 0; q < whole; q += lanes) body(WholeVector(), begin + q, q);
  if (rest == 0) return;
  if (size < lanes)
    body(PartVector<acc>{rest, ~lanes_from<acc>(rest)}, begin, whole);
  else
    body(PartVector<acc>{lanes, lanes_from<acc>(lanes - rest)}, end - lanes, whole);
}

// channels_last: the vectors that hold the channels of a pixel, and the first channel of each. The last vector is moved
// back to end with the channels: it computes some of them a second time.
template <class acc>
int64_t channel_vectors(int64_t channels) {
  return ceil_div(channels, kLanes<acc>);
}
template <class acc>
COTNET_INLINE int64_t first_channel(int64_t channels, int64_t k) {
  return std::min<int64_t>(k * kLanes<acc>, std::max<int64_t>(channels - kLanes<acc>, 0));
}

// body(vector, k, at) for each vector k of the channels of each pixel in elements [begin, end), where `at` is the vector's
// first element.
template <class acc, class Vector, class Body>
COTNET_INLINE void for_pixels_of(const Vector& vector, int64_t channels, int64_t begin, int64_t end, Body& body) {
  const int64_t vectors = channel_vectors<acc>(channels), last = first_channel<acc>(channels, vectors - 1);
  for (int64_t pixel = begin; pixel < end; pixel += channels)
    for (int64_t k = 0; k < vectors; ++k) body(vector, k, pixel + std::min<int64_t>(k * kLanes<acc>, last));
}
template <class acc, class Body>
COTNET_INLINE void for_pixels(int64_t channels, int64_t begin, int64_t end, Body& body) {
  if (channels >= kLanes<acc>)
    for_pixels_of<acc>(WholeVector(), channels, begin, end, body);
  else
    for_pixels_of<acc>(PartVector<acc>{channels, ~lanes_from<acc>(channels)}, channels, begin, end, body);
}

// ---- the cut -----------------------------------------------------------------------------------------------------------

struct MapCut {
  bool channels_last;
  int64_t units;    // planes or images
  int64_t vectors;  // sums of a unit: one, or one for each vector of channels
  int64_t pitch;    // elements of a pixel of the unit: 1 or C
  int64_t plane;    // pixels of a unit
  int64_t pixels;   // of a chunk; the last may have fewer
  int64_t chunks;   // of a unit, at least one

  // Elements [begin, end) of the map are the chunk.
  int64_t begin(int64_t unit, int64_t chunk) const { return (unit * plane + std::min(chunk * pixels, plane)) * pitch; }
  int64_t end(int64_t unit, int64_t chunk) const { return begin(unit, chunk + 1); }
};

template <class acc>
MapCut cut_map(const MapProblem& p, int64_t elements = kChunkElements) {
  MapCut cut;
  cut.channels_last = p.channels_last;
  cut.units = p.channels_last ? p.batch : p.batch * p.channels;
  cut.vectors = p.channels_last ? channel_vectors<acc>(p.channels) : 1;
  cut.pitch = p.channels_last ? p.channels : 1;
  cut.plane = p.plane;
  const int64_t most = std::max<int64_t>(elements / std::max<int64_t>(cut.pitch, 1), kChunkPixels);
  const int64_t pixels = ceil_div(p.plane, std::max<int64_t>(ceil_div(p.plane, most), 1));
  cut.pixels = std::max<int64_t>(ceil_div(pixels, kLanes<acc>), 1) * kLanes<acc>;
  cut.chunks = std::max<int64_t>(ceil_div(p.plane, cut.pixels), 1);
  return cut;
}
