// The machine that emulator.h runs kernels on: blocks and their threads, turns, barriers, shared memory and copies under way.
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

}  // namespace cotnet
