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

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "fibers.h"

#define COTNET_KERNEL(threads, min_blocks) inline void
#define COTNET_DEVICE inline
#define COTNET_UNROLL
#define COTNET_UNROLL_BY(count)
#define COTNET_SHARED(type, name, size) \
  type(&name)[size] = *static_cast<type(*)[size]>(cotnet::emulator::static_shared(sizeof(type[size]), __FILE__, __LINE__))
#define COTNET_SHARED_DYNAMIC(name) unsigned char* const name = cotnet::emulator::machine().dynamic_shared->data()

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
// Set before each fiber gets its turn.
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace cotnet {

struct Stream {};  // everything is done when a launch returns

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Schedule { forward, backward, random };

// Where in a kernel something happens; default arguments that each caller fills in.
struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};
#define COTNET_PLACE const char * file = __builtin_FILE(), int line = __builtin_LINE()

// Memory of exact size, so that AddressSanitizer sees the first byte past it; NaN in every float type when poisoned.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes = 0) : bytes_(bytes), memory_(bytes ? std::aligned_alloc(16, (bytes + 15) / 16 * 16) : nullptr) {
    mark_tail(true);
    poison();
  }
  ~SharedMemory() {
    mark_tail(false);
    std::free(memory_);
  }
  SharedMemory(const SharedMemory&) = delete;
  void poison() {
    if (bytes_) std::memset(memory_, 0xff, bytes_);
  }
  unsigned char* data() const { return static_cast<unsigned char*>(memory_); }
  size_t size() const { return bytes_; }

 private:
  void mark_tail(bool forbidden) {
    if (bytes_ % 16) fibers::mark_memory(data() + bytes_, 16 - bytes_ % 16, forbidden);
  }
  size_t bytes_;
  void* memory_;
};

enum class State { ready, at_barrier, in_collective, at_mbarrier, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool zeros = false;
  void land() const {
    if (zeros) std::memset(to, 0, bytes);
    else std::memcpy(to, from, bytes);
  }
};

struct Thread {
  unsigned number = 0;
  State state = State::ready;
  fibers::Fiber* fiber = nullptr;
  Place waits_at{"", 0};
  uint64_t collective = 0;             // number of the collective it waits in
  std::vector<Copy> open_copies;       // cp_async_16 since the last commit
  std::vector<std::vector<Copy>> groups;  // committed
  std::vector<Copy> bulk_stores;
  bool fenced = false;  // fence_proxy_async since the last barrier

  unsigned lane() const { return number % 32; }
  unsigned warp() const { return number / 32; }
};

// Lanes meet in collectives one after the other. Values are kept in two sets by turns: a fast lane may bring its next
// value before a slow one has read the last.
struct Warp {
  uint64_t collective = 0;
  unsigned mask = 0, arrived = 0;
  unsigned alive = 0;  // lanes that have not ended
  const char* operation = "";
  Place place{"", 0};
  unsigned present[2] = {0, 0};
  uint64_t values[2][32];
};

struct Mbarrier {
  explicit Mbarrier(int count) : arrivals(count), missing(count) {}
  int arrivals, missing;
  int64_t expected_bytes = 0;
  unsigned phase = 0;
  std::vector<Copy> loads;
};

struct Machine {
  Schedule schedule = Schedule::forward;
  uint64_t seed = 1;

  std::function<void()> body;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* current = nullptr;
  unsigned waiting = 0, done = 0;
  Place barrier{"", 0};  // where the first of those waiting does
  bool stores_fenced = false;  // every thread called fence_proxy_async before the last barrier
  std::unique_ptr<SharedMemory> dynamic_shared;
  std::map<std::tuple<const char*, int, size_t>, std::unique_ptr<SharedMemory>> static_shared;
  std::map<void*, Mbarrier> mbarriers;
  std::string error;
  fibers::Pool pool;
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

// ---- errors: the first one ends the launch. Its fiber, and all others, never run again.

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}
inline std::string show(const Place& place) {
  const char* name = std::strrchr(place.file, '/');
  return join(name ? name + 1 : place.file, ":", place.line);
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  Machine& m = machine();
  m.error = join(parts..., " (block ", blockIdx.x, " ", blockIdx.y, " ", blockIdx.z, ", thread ", m.current->number, ")");
  fibers::leave_for_good(m.current->fiber);
}

// ---- turns

inline void wait(State state, const Place& place) {
  Thread& t = *machine().current;
  t.state = state;
  t.waits_at = place;
  fibers::pause(t.fiber);
}

// A thread that returned: what it may not leave behind.
inline void check_finished(const Thread& t) {
  if (!t.bulk_stores.empty()) fail("a thread ends before its bulk stores have read shared memory");
  bool pending = !t.open_copies.empty();
  for (const auto& group : t.groups) pending |= !group.empty();
  if (pending) fail("a thread ends with asynchronous copies that it never waited for");
}

inline void run_thread(void*) {
  Machine& m = machine();
  m.body();
  check_finished(*m.current);
  m.current->state = State::done;
  m.warps[m.current->warp()].alive &= ~(1u << m.current->lane());
  ++m.done;
}

inline void give_turn(Thread& t) {
  Machine& m = machine();
  m.current = &t;
  threadIdx.x = t.number;
  if (!t.fiber) t.fiber = m.pool.take(run_thread);
  fibers::resume(t.fiber);
  if (!m.error.empty()) throw Error(m.error);
  if (t.state == State::done) {
    m.pool.give_back(t.fiber);
    t.fiber = nullptr;
  }
}

inline const char* name_of(State state) {
  return state == State::at_barrier ? "sync_block" : state == State::in_collective ? "a collective of its warp" : "an mbarrier";
}

inline uint64_t next_random(uint64_t& state) {  // xorshift
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

inline void run_block(std::vector<unsigned>& order, uint64_t& random) {
  Machine& m = machine();
  while (m.done < m.threads.size()) {
    if (m.schedule == Schedule::random)
      for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[next_random(random) % (i + 1)]);
    bool any = false;
    for (const unsigned i : order) {
      if (m.threads[i].state != State::ready) continue;
      any = true;
      give_turn(m.threads[i]);
    }
    if (any) continue;
    for (const Thread& t : m.threads)
      if (t.state != State::done)
        throw Error(join("deadlock: thread ", t.number, " waits at ", show(t.waits_at), " in ", name_of(t.state), "; ", m.done, " threads have ended"));
  }
}

inline void prepare_block() {
  Machine& m = machine();
  m.waiting = m.done = 0;
  m.stores_fenced = false;
  m.mbarriers.clear();
  m.dynamic_shared->poison();
  for (auto& [place, memory] : m.static_shared) memory->poison();
  for (Warp& warp : m.warps) warp = Warp{};
  for (size_t i = 0; i < m.threads.size(); ++i) {
    m.threads[i] = Thread{};
    m.threads[i].number = unsigned(i);
    m.warps[i / 32].alive |= 1u << i % 32;
  }
}

inline void check_launch(const Launch& launch) {
  if (launch.threads == 0 || launch.threads > 1024) throw Error(join("a block of ", launch.threads, " threads"));
  if (launch.grid_x > 0x7fffffffu || launch.grid_y > 65535 || launch.grid_z > 65535)
    throw Error(join("a grid of ", launch.grid_x, " x ", launch.grid_y, " x ", launch.grid_z, " blocks"));
  if (launch.shared_bytes > 227 * 1024) throw Error(join(launch.shared_bytes, " bytes of shared memory"));
}

inline void run_grid(const Launch& launch, std::function<void()> body) {
  Machine& m = machine();
  check_launch(launch);
  m.body = std::move(body);
  m.error.clear();
  m.threads.assign(launch.threads, Thread{});
  m.warps.assign((launch.threads + 31) / 32, Warp{});
  m.static_shared.clear();
  m.dynamic_shared = std::make_unique<SharedMemory>(launch.shared_bytes);
  blockDim = {launch.threads, 1, 1};
  gridDim = {launch.grid_x, launch.grid_y, launch.grid_z};
  std::vector<unsigned> order(launch.threads);
  for (unsigned i = 0; i < launch.threads; ++i) order[i] = m.schedule == Schedule::backward ? launch.threads - 1 - i : i;
  uint64_t random = m.seed * 0x9E3779B97F4A7C15u + 1;
  // Blocks come in the order of the schedule as well: none may depend on another.
  const uint64_t blocks = uint64_t(launch.grid_x) * launch.grid_y * launch.grid_z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = m.schedule == Schedule::backward ? blocks - 1 - i : i;
    blockIdx = {unsigned(block % launch.grid_x), unsigned(block / launch.grid_x % launch.grid_y),
                unsigned(block / launch.grid_x / launch.grid_y)};
    prepare_block();
    run_block(order, random);
  }
}

inline void* static_shared(size_t bytes, const char* file, int line) {
  auto& memory = machine().static_shared[{file, line, bytes}];
  if (!memory) memory = std::make_unique<SharedMemory>(bytes);
  return memory->data();
}

// ---- collectives of a warp

// Brings a value and waits for the other lanes of the mask; the set of values of this collective.
inline int meet(unsigned mask, uint64_t value, const char* operation, const Place& place) {
  Machine& m = machine();
  Thread& t = *m.current;
  Warp& warp = m.warps[t.warp()];
  if (!(mask >> t.lane() & 1)) fail(operation, " at ", show(place), ": the lane is not in its own mask");
  if (const unsigned absent = mask & ~warp.alive)
    fail(operation, " at ", show(place), ": the mask names lane ", __builtin_ctz(absent), ", which has ended or never was");
  const int set = int(warp.collective % 2);
  if (!warp.arrived) {
    warp.mask = mask;
    warp.operation = operation;
    warp.place = place;
    warp.present[set] = 0;
  } else if (warp.mask != mask || std::strcmp(warp.operation, operation) || !(warp.place == place)) {
    fail("lanes of one warp meet in ", warp.operation, " at ", show(warp.place), " and in ", operation, " at ", show(place),
         ", or with different masks");
  }
  warp.values[set][t.lane()] = value;
  warp.arrived |= 1u << t.lane();
  if (warp.arrived != warp.mask) {
    t.collective = warp.collective;
    wait(State::in_collective, place);
    return set;
  }
  warp.present[set] = warp.arrived;
  warp.arrived = 0;
  const size_t first = t.warp() * 32, end = std::min(first + 32, m.threads.size());
  for (size_t i = first; i < end; ++i) {
    Thread& other = m.threads[i];
    if (other.state == State::in_collective && other.collective == warp.collective) other.state = State::ready;
  }
  ++warp.collective;
  return set;
}

// The value of another lane; of one that did not take part, NaN. `own` where the shuffle keeps its own.
template <class T>
T exchange(unsigned mask, T value, int lane, bool own, const char* operation, const Place& place) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const int set = meet(mask, bits, operation, place);
  if (own) return value;
  const Warp& warp = machine().warps[machine().current->warp()];
  T result;
  std::memset(&result, 0xff, sizeof(T));
  if (warp.present[set] >> lane & 1) std::memcpy(&result, &warp.values[set][lane], sizeof(T));
  return result;
}

inline int lane() { return int(machine().current->lane()); }

inline void check_alignment(const void* at, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail(what, " of ", bytes, " bytes at an address that is not a multiple of that");
}

inline Mbarrier& mbarrier_at(uint64_t* barrier) {
  const auto found = machine().mbarriers.find(barrier);
  if (found == machine().mbarriers.end()) fail("an mbarrier is used before mbarrier_init");
  return found->second;
}

}  // namespace emulator

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
