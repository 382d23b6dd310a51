// Runs CUDA kernels on a CPU, to find their mistakes. The other side of csrc/cuda/device.cuh: what that file says in CUDA,
// this one says in C++17.
//
// A block runs at a time, each of its threads as a fiber (a stack of its own) that runs until it has to wait. The order in
// which the fibers of a block get their turns is the schedule: forward, backward or random; a kernel without races gives
// the same bits under all of them. What is undefined on a GPU is made wrong here: shared memory is NaN before each block,
// asynchronous copies land at their wait and not before, an absent lane of a shuffle reads NaN, and barriers that not all
// threads reach are errors. With AddressSanitizer, an access out of bounds in global or shared memory ends the process.
//
// An error is an exception of launch_kernel with the place in the kernel. Not modelled: timing, caches, bank conflicts,
// memory order between threads that do not synchronise, blocks that run at the same time, registers and occupancy.
#pragma once

#include <cmath>
#include <cstring>

#include "machine.h"

namespace cotnet {

// ---- what kernels see, as listed in csrc/cuda/device.cuh

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const Launch& launch, Stream, const Arguments&... arguments) {
  if (launch.empty()) return;
  emulator::run_grid(launch, [&] { kernel(Parameters(arguments)...); });
}

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr bool kBulkCopies = true;

inline void sync_block(COTNET_PLACE) {
  using namespace emulator;
  const Place place{file, line};
  Machine& m = machine();
  if (m.done) fail("sync_block at ", show(place), " after ", m.done, " threads of the block have ended");
  if (!m.waiting) m.barrier = place;
  if (!(m.barrier == place)) fail("threads of one block wait in sync_block at ", show(m.barrier), " and at ", show(place));
  if (++m.waiting < m.threads.size()) return wait(State::at_barrier, place);
  m.waiting = 0;
  m.stores_fenced = true;
  for (Thread& other : m.threads) {
    m.stores_fenced &= other.fenced;
    other.fenced = false;
    other.state = State::ready;
  }
}
inline void sync_warp(unsigned mask = kAllLanes, COTNET_PLACE) { emulator::meet(mask, 0, "sync_warp", {file, line}); }
template <class T>
T shuffle(unsigned mask, T value, int lane, COTNET_PLACE) {
  return emulator::exchange(mask, value, lane & 31, false, "shuffle", {file, line});
}
template <class T>
T shuffle_xor(unsigned mask, T value, int distance, COTNET_PLACE) {
  return emulator::exchange(mask, value, (emulator::lane() ^ distance) & 31, false, "shuffle_xor", {file, line});
}
template <class T>
T shuffle_down(unsigned mask, T value, unsigned distance, COTNET_PLACE) {
  const int from = emulator::lane() + int(distance);
  return emulator::exchange(mask, value, from & 31, from > 31, "shuffle_down", {file, line});
}
template <class T>
T shuffle_up(unsigned mask, T value, unsigned distance, COTNET_PLACE) {
  const int from = emulator::lane() - int(distance);
  return emulator::exchange(mask, value, from & 31, from < 0, "shuffle_up", {file, line});
}
inline unsigned ballot(unsigned mask, bool vote, COTNET_PLACE) {
  const int set = emulator::meet(mask, vote, "ballot", {file, line});
  const emulator::Warp& warp = emulator::machine().warps[emulator::machine().current->warp()];
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (warp.present[set] >> lane & 1 && warp.values[set][lane]) votes |= 1u << lane;
  return votes;
}

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
inline float exponential(float a) { return std::exp(a); }
inline double exponential(double a) { return std::exp(a); }
inline float fast_exponential(float a) {
  const float power = std::exp2(a * 1.44269504f);
  return power < 0x1p-126f ? 0.0f : power;  // a NaN stays one
}
inline double fast_exponential(double a) { return std::exp(a); }
inline float fast_reciprocal(float a) { return 1.0f / a; }
inline double fast_reciprocal(double a) { return 1.0 / a; }
inline float inverse_sqrt(float a) { return 1.0f / std::sqrt(a); }
inline double inverse_sqrt(double a) { return 1.0 / std::sqrt(a); }

template <int kBytes>
struct Words {
  unsigned char bytes[kBytes];
};
template <int kBytes>
Words<kBytes> load_words(const void* from) {
  emulator::check_alignment(from, kBytes, "a load");
  Words<kBytes> words;
  std::memcpy(&words, from, kBytes);
  return words;
}
template <int kBytes>
Words<kBytes> load_words_streaming(const void* from) {
  return load_words<kBytes>(from);
}
template <int kBytes>
Words<kBytes> load_words_if(const void* from, bool ok) {
  return ok ? load_words<kBytes>(from) : Words<kBytes>{};
}
template <int kBytes>
void store_words(void* to, const Words<kBytes>& words) {
  emulator::check_alignment(to, kBytes, "a store");
  std::memcpy(to, &words, kBytes);
}

inline void cp_async_16(void* shared, const void* global, bool ok = true) {
  emulator::check_alignment(shared, 16, "an asynchronous copy");
  if (ok) emulator::check_alignment(global, 16, "an asynchronous copy");
  std::memset(shared, 0xff, 16);
  emulator::machine().current->open_copies.push_back({shared, global, 16, !ok});
}
inline void cp_async_commit() {
  emulator::Thread& t = *emulator::machine().current;
  t.groups.push_back(std::move(t.open_copies));
  t.open_copies.clear();
}
template <int kPending>
void cp_async_wait() {
  auto& groups = emulator::machine().current->groups;
  for (; groups.size() > size_t(kPending); groups.erase(groups.begin()))
    for (const emulator::Copy& copy : groups.front()) copy.land();
}

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  auto& all = emulator::machine().mbarriers;
  if (!all.try_emplace(barrier, emulator::Mbarrier(int(arrivals))).second)
    emulator::fail("mbarrier_init of an mbarrier that is in use");
}
inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  emulator::Mbarrier& b = emulator::mbarrier_at(barrier);
  b.expected_bytes += bytes;
  if (--b.missing < 0) emulator::fail("more arrivals at an mbarrier than it was initialised for");
  if (b.missing > 0) return;
  for (emulator::Thread& other : emulator::machine().threads)
    if (other.state == emulator::State::at_mbarrier) other.state = emulator::State::ready;
}
// The loads land, and the phase ends, when the first thread waits after the last arrival.
inline void mbarrier_wait(uint64_t* barrier, unsigned parity, COTNET_PLACE) {
  using namespace emulator;
  Mbarrier& b = mbarrier_at(barrier);
  const Place place{file, line};
  while (b.phase % 2 == parity) {
    if (b.missing > 0) {
      wait(State::at_mbarrier, place);
      continue;
    }
    for (const Copy& copy : b.loads) {
      copy.land();
      b.expected_bytes -= int64_t(copy.bytes);
    }
    if (b.expected_bytes) fail("mbarrier_wait at ", show(place), " never ends: off by ", b.expected_bytes, " bytes");
    b.loads.clear();
    b.missing = b.arrivals;
    ++b.phase;
  }
}
inline void check_bulk(const void* a, const void* b, size_t bytes) {
  emulator::check_alignment(a, 16, "a bulk copy");
  emulator::check_alignment(b, 16, "a bulk copy");
  if (bytes % 16) emulator::fail("a bulk copy of ", bytes, " bytes, not a multiple of 16");
}
inline void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  check_bulk(shared, global, bytes);
  std::memset(shared, 0xff, bytes);
  emulator::mbarrier_at(barrier).loads.push_back({shared, global, bytes});
}
inline void fence_proxy_async() { emulator::machine().current->fenced = true; }
inline void bulk_store(void* global, const void* shared, unsigned bytes) {
  check_bulk(global, shared, bytes);
  if (!emulator::machine().stores_fenced)
    emulator::fail("bulk_store, but not every thread called fence_proxy_async before the last sync_block");
  emulator::machine().current->bulk_stores.push_back({global, shared, bytes});
}
inline void bulk_store_wait() {
  auto& stores = emulator::machine().current->bulk_stores;
  for (const emulator::Copy& copy : stores) copy.land();
  stores.clear();
}

}  // namespace cotnet
