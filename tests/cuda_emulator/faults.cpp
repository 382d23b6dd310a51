// Small kernels that are right, and the same with one classic mistake each: what the emulator must catch. `fault` names
// the mistake by its number in the list at the end; test_cuda_emulator.py runs them all.
#include "bindings.h"

namespace cotnet {
namespace {

constexpr int kThreads = 96;

// y[i] = sum of x[i-1], x[i], x[i+1] within tiles of kThreads, zeros outside of the map. Thread i owns element i of a tile.
// The tile comes into shared memory by plain accesses, or by 16-byte asynchronous copies of the first threads.
COTNET_KERNEL(kThreads, 1)
tile_kernel(const float* x /* [size] */, float* y /* [size] */, int64_t size, bool async, int fault) {
  COTNET_SHARED_DYNAMIC(memory);
  float* const tile = reinterpret_cast<float*>(memory);  // [kThreads + 8]: four elements of halo on both sides
  const int i = int(threadIdx.x);
  const int64_t begin = int64_t(blockIdx.x) * kThreads;
  if (async) {
    const int64_t from = begin - 4 + 4 * i;
    if (i < (kThreads + 8) / 4 && !(fault == 1 && i == 3)) {
      const bool inside = fault == 2 || (from >= 0 && from < size);
      cp_async_16(tile + 4 * i, x + (inside ? from : 0), inside);
    }
    cp_async_commit();
    if (fault != 3) cp_async_wait<0>();
  } else {
    for (int k = i; k < kThreads + 8 + (fault == 4 ? 1 : 0); k += kThreads) {
      const int64_t from = begin - 4 + k;
      tile[k] = load_wide_if(x + from, from >= 0 && from < size);
    }
  }
  if (fault == 5 && i > 60) return;
  if (fault != 6) {
    if (fault == 7 && i % 2) sync_block();
    else sync_block();
  }
  const float sum = tile[i + 3] + tile[i + 4] + tile[i + 5];
  if (fault == 8) tile[i + 4] = sum;
  store_narrow(y + begin + i + (fault == 9 && begin + kThreads == size ? 1 : 0), sum);
}

// y[b] = sum of x[b*96 .. b*96+95]: shuffles within each warp, then shared memory.
COTNET_KERNEL(kThreads, 1) sum_kernel(const float* x /* [blocks * 96] */, float* y /* [blocks] */, int fault) {
  COTNET_SHARED(float, sums, kThreads / 32);
  const unsigned i = threadIdx.x;
  float sum = load_wide(x + int64_t(blockIdx.x) * kThreads + i);
  const unsigned lanes = fault == 11 && i % 32 < 16 ? 0x0000ffffu : kAllLanes;
  if (fault == 12 && i == 40) return;
  for (int distance = 16; distance > 0; distance /= 2)
    sum += shuffle_xor(fault == 13 ? kAllLanes & ~(1u << 5) : lanes, sum, distance);
  if (fault == 14) {
    if (i % 32 < 3) sum = shuffle(0x7u, sum, 3);  // reads a lane that does not take part
  }
  if (i % 32 == 0) sums[i / 32] = sum;
  if (fault != 10) sync_block();
  if (i == 0) store_narrow(y + blockIdx.x, sums[0] + sums[1] + sums[2 + (fault == 15)]);
}

// y[i] = 2 * x[i], by bulk copies of one thread in and out.
COTNET_KERNEL(kThreads, 1) bulk_kernel(const float* x /* [blocks * 96] */, float* y /* [blocks * 96] */, int fault) {
  COTNET_SHARED_DYNAMIC(memory);
  float* const tile = reinterpret_cast<float*>(memory);
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(memory + kThreads * sizeof(float));
  const unsigned i = threadIdx.x;
  constexpr unsigned kBytes = kThreads * sizeof(float);
  if (i == 0 && fault != 20) mbarrier_init(barrier, fault == 21 ? 2 : 1);
  sync_block();
  if (i == 0) {
    mbarrier_arrive_expect(barrier, fault == 22 ? kBytes + 16 : kBytes);
    bulk_load(tile, x + int64_t(blockIdx.x) * kThreads + (fault == 23), kBytes, barrier);
  }
  if (fault != 24) mbarrier_wait(barrier, 0);
  tile[i] = 2 * tile[i];
  if (fault != 25) fence_proxy_async();
  if (fault != 26) sync_block();
  if (i == 0) {
    bulk_store(y + int64_t(blockIdx.x) * kThreads, tile, kBytes);
    if (fault != 27) bulk_store_wait();
  }
}

}  // namespace
}  // namespace cotnet

COTNET_BINDINGS(m) {
  using namespace cotnet;
  using namespace cotnet::bindings;
  // x and y: a multiple of 96 floats, for sum_kernel y one for each 96 of x.
  m.def("run_faulty", [](const std::string& kernel, const py::object& x, const py::object& y, int64_t size, int fault) {
    Launch launch;
    launch.grid_x = unsigned(size / kThreads);
    launch.threads = kThreads;
    const float* const from = in<float>(x);
    float* const to = out<float>(y);
    if (kernel == "sum") return launch_kernel(sum_kernel, launch, Stream{}, from, to, fault);
    if (kernel == "bulk") {
      launch.shared_bytes = kThreads * sizeof(float) + sizeof(uint64_t);
      return launch_kernel(bulk_kernel, launch, Stream{}, from, to, fault);
    }
    launch.shared_bytes = (kThreads + 8) * sizeof(float);
    launch_kernel(tile_kernel, launch, Stream{}, from, to, size, kernel == "async tile", fault);
  });
}
