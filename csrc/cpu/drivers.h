// Distributes the tiles of an aggregation over threads. Included once per target namespace, after the tiles.

// body(tiles, n, m, first band, last band + 1), where a unit's bands are shared out as `tasks` consecutive pieces.
template <class Field, class Parallel, class Body>
void for_whole_units(const AggregationProblem& p, const Field& field, const Parallel& parallel, int64_t tasks, const Body& body) {
  const int64_t bands = NchwTiles<Field>::bands(p), each = ceil_div(bands, tasks), units = p.batch * p.weight_channels;
  const int64_t work = p.heads * p.sharing() * p.taps() * std::max(p.in_plane(), p.out_plane()) / tasks;
  parallel(units * tasks, work, [&](int64_t begin, int64_t end) {
    NchwTiles<Field> tiles(p, field);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task / tasks, first = task % tasks * each;
      body(tiles, unit / p.weight_channels, unit % p.weight_channels, first, std::min(first + each, bands));
    }
  });
}

// body(tiles, n, m, band) for every unit and band, with one set of scratch per thread.
template <class Field, class Parallel, class Body>
void for_units(const AggregationProblem& p, const Field& field, const Parallel& parallel, const Body& body) {
  const int64_t bands = NchwTiles<Field>::bands(p);
  for_whole_units(p, field, parallel, bands, [&](auto& tiles, int64_t n, int64_t m, int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) body(tiles, n, m, band);
  });
}

// The same for NHWC maps: body(tiles, n, band), with bands for `threads` threads.
template <class Field, class Parallel, class Body>
void for_bands(const AggregationProblem& p, const Field& field, const Parallel& parallel, int64_t threads, const Body& body) {
  const int64_t bands = NhwcTiles<Field>::bands(p, threads);
  const int64_t work = p.heads * p.channels * p.taps() * std::max(p.in_plane(), p.out_plane()) / bands;
  parallel(p.batch * bands, work, [&](int64_t begin, int64_t end) {
    NhwcTiles<Field> tiles(p, field, bands);
    for (int64_t task = begin; task < end; ++task) body(tiles, task / bands, task % bands);
  });
}

// Either, by layout: body(tiles, place...).
template <class Field, class Parallel, class Body>
void for_tiles(const AggregationProblem& p, const Field& field, const Parallel& parallel, const Body& body) {
  if (p.channels_last) for_bands(p, field, parallel, parallel.threads(), body);
  else for_units(p, field, parallel, body);
}

// Sinks that write the gradient of plain weights, one per head.
template <class scalar_t>
auto plain_sinks(const AggregationProblem& p, int64_t n, int64_t m, scalar_t* grad_w) {
  return [&p, n, m, grad_w](int64_t g) {
    return PlainSink<scalar_t>{grad_w + p.group(n, g, m) * p.taps() * p.out_plane(), p.taps(), p.out_plane()};
  };
}
