// Staging: rows of a map are copied, widened to acc_t, into scratch where no tap falls outside any more. Borders,
// reflection and stride are settled here, once per element, so that the loops over taps are plain streams.
// Included once per target namespace, after simd.h.

//
// Everything is staged in ascending order, so whole vectors are written and what they write too much is overwritten by
// what comes next; scratch has room for one vector more.

template <class acc>
COTNET_INLINE void stage_zeros(acc* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<acc>) store(to + i, Vec<acc>{});
}

// `count` positions outside a row, from position `from` on.
template <class scalar_t>
COTNET_INLINE void stage_border(acc_t<scalar_t>* to, const scalar_t* row, int64_t from, int64_t count, int64_t width,
                                bool reflect) {
  if (!reflect) return stage_zeros(to, count);
  for (int64_t i = 0; i < count; ++i) to[i] = widen(row[reflected(from + i, width)]);
}

// Widens `count` contiguous elements. The last vector is moved back to end with the run.
template <class scalar_t>
COTNET_INLINE void stage_run(acc_t<scalar_t>* to, const scalar_t* from, int64_t count) {
  constexpr int lanes = kLanes<acc_t<scalar_t>>;
  if (count < lanes) {
    if (count > 0) store(to, load_first(from, count));
    return;
  }
  for (int64_t i = 0; i + lanes < count; i += lanes) store(to + i, load(from + i));
  store(to + count - lanes, load(from + count - lanes));
}

// to[i] = row[first + i*step] for i < count; positions outside the row are zero or reflected.
template <class scalar_t>
void stage_row(acc_t<scalar_t>* to, const scalar_t* row, int64_t count, int64_t first, int64_t step, int64_t width,
               bool reflect) {
  if (step == 1) {
    const int64_t begin = std::clamp(-first, int64_t(0), count);
    const int64_t end = std::clamp(width - first, begin, count);
    stage_border(to, row, first, begin, width, reflect);
    stage_run(to + begin, row + first + begin, end - begin);
    stage_border(to + end, row, first + end, count - end, width, reflect);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = first + i * step;
    const bool inside = at >= 0 && at < width;
    to[i] = inside || reflect ? widen(row[inside ? at : reflected(at, width)]) : acc_t<scalar_t>(0);
  }
}

// The transposed view, for gradients: to[i] = row[(first + i) / stride] where that is a position of the row, else zero.
template <class scalar_t>
void stage_row_spread(acc_t<scalar_t>* to, const scalar_t* row, int64_t count, int64_t first, int64_t stride,
                      int64_t width) {
  if (stride == 1) return stage_row(to, row, count, first, 1, width, false);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = output_of(first + i, stride, width);
    to[i] = at < 0 ? acc_t<scalar_t>(0) : widen(row[at]);
  }
}

// A whole block of rows shifted sideways: to[q] = block[q + shift] for q < size, or zero where that leaves the row;
// `inside` masks the positions where it does not. One stream instead of a copy per row: what makes maps narrower than a
// vector as fast as wide ones.
template <class scalar_t>
void stage_block_shifted(acc_t<scalar_t>* to, const scalar_t* block, int64_t size, int64_t shift,
                         const LaneMask<acc_t<scalar_t>>* inside) {
  using acc = acc_t<scalar_t>;
  const int64_t begin = std::clamp(-shift, int64_t(0), size);
  const int64_t end = std::clamp(size - shift, begin, size);
  stage_zeros(to, begin);
  for (int64_t q = begin; q < end; q += kLanes<acc>) {
    Mask<acc> mask;
    std::memcpy(&mask, inside + q, sizeof(mask));
    store(to + q, keep(mask, load_upto(block + q + shift, end - q)));
  }
  stage_zeros(to + end, size - end);
}
