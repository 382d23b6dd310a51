// Runs of contiguous elements between global memory and tiles in shared memory.
#pragma once

#include "cuda/device.cuh"

namespace cotnet {

// Place of element `index` of an array within its 16 bytes, in elements. In the tile it has the same place.
template <class scalar_t>
COTNET_DEVICE int place_in_chunk(unsigned index) {
  return int(index & (16 / sizeof(scalar_t) - 1));
}

// The whole chunks of 16 bytes of a run, and the elements before and behind them.
template <class scalar_t>
struct Run {
  static constexpr int kChunk = 16 / sizeof(scalar_t);
  int head, chunks, tail;

  COTNET_DEVICE Run(int64_t begin, int elements) {
    head = (kChunk - place_in_chunk<scalar_t>(unsigned(begin))) & (kChunk - 1);
    head = head < elements ? head : elements;
    chunks = (elements - head) / kChunk;
    tail = elements - head - chunks * kChunk;
  }
  // Element with which loose element `i` of head + tail lies.
  COTNET_DEVICE int loose(int i) const { return i < head ? i : i + chunks * kChunk; }
};

// Copies elements [begin, begin + elements) of an array; `thread` of `threads` that share the work. They are at `to` after
// the wait for asynchronous copies and a barrier.
template <class scalar_t>
COTNET_DEVICE void load_run(scalar_t* to, const scalar_t* array, int64_t begin, int elements, int thread, int threads) {
  const Run<scalar_t> run(begin, elements);
  const scalar_t* const from = array + begin;
  COTNET_UNROLL_BY(2)  // copies do not wait for each other: more would only take registers
  for (int i = thread; i < run.chunks; i += threads) {
    const int element = run.head + i * run.kChunk;
    cp_async_16(to + element, from + element);
  }
  COTNET_UNROLL_BY(1)
  for (int i = thread; i < run.head + run.tail; i += threads) to[run.loose(i)] = load_vec<1>(from + run.loose(i)).at[0];
}

template <class scalar_t>
COTNET_DEVICE void store_run(scalar_t* array, const scalar_t* from, int64_t begin, int elements, int thread, int threads) {
  const Run<scalar_t> run(begin, elements);
  scalar_t* const to = array + begin;
  COTNET_UNROLL_BY(2)
  for (int i = thread; i < run.chunks; i += threads) {
    const int element = run.head + i * run.kChunk;
    store_vec(to + element, *reinterpret_cast<const Pack<scalar_t, Run<scalar_t>::kChunk>*>(from + element));
  }
  COTNET_UNROLL_BY(1)
  for (int i = thread; i < run.head + run.tail; i += threads)
    store_vec(to + run.loose(i), Pack<scalar_t, 1>{{from[run.loose(i)]}});
}

// How the runs of a tile come and go: whole, by one thread that hands them to the copy engine, when all are whole chunks
// (Tile::bulk), or by the 16 bytes. All threads of a block make one and call all but load and store together.
template <class scalar_t>
class TileCopies {
 public:
  // barrier: 8 bytes of shared memory. runs: how many are loaded before each wait.
  COTNET_DEVICE TileCopies(bool bulk, void* barrier, int runs)
      : bulk_(kBulkCopies && bulk), phase_(0), barrier_(static_cast<uint64_t*>(barrier)) {
    if (!bulk_) return;
    if (threadIdx.x == 0) mbarrier_init(barrier_, unsigned(runs));
    sync_block();
  }
  COTNET_DEVICE void load(scalar_t* to, const scalar_t* array, int64_t begin, int elements, int thread, int threads) const {
    if (!bulk_) return load_run(to, array, begin, elements, thread, threads);
    if (thread > 0) return;
    const unsigned bytes = unsigned(elements) * unsigned(sizeof(scalar_t));
    mbarrier_arrive_expect(barrier_, bytes);
    bulk_load(to, array + begin, bytes, barrier_);
  }
  // In place of a run that is there already.
  COTNET_DEVICE void load_nothing(int thread) const {
    if (bulk_ && thread == 0) mbarrier_arrive_expect(barrier_, 0);
  }
  // For all that the block has loaded.
  COTNET_DEVICE void wait() {
    if (bulk_) {
      mbarrier_wait(barrier_, phase_);
      phase_ ^= 1;
      return;
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
  }
  // Between writing what will be stored and the first store.
  COTNET_DEVICE void ready_to_store() const {
    if (bulk_) fence_proxy_async();
    sync_block();
  }
  COTNET_DEVICE void store(scalar_t* array, const scalar_t* from, int64_t begin, int elements, int thread,
                           int threads) const {
    if (!bulk_) return store_run(array, from, begin, elements, thread, threads);
    if (thread == 0) bulk_store(array + begin, from, unsigned(elements) * unsigned(sizeof(scalar_t)));
  }
  // After the last store.
  COTNET_DEVICE void finish() const {
    if (bulk_) bulk_store_wait();
  }

 private:
  bool bulk_;
  unsigned phase_;
  uint64_t* barrier_;
};

}  // namespace cotnet
