// All that the kernels use of CUDA, and the only file that says it in CUDA's words. Under COTNET_EMULATED the same names
// come from tests/cuda_emulator/emulator.h, so that a C++ compiler builds the kernels and the tests run them on a CPU.
//
// Both sides have threadIdx, blockIdx, blockDim, gridDim, and in namespace cotnet:
//     sync_block, sync_warp, shuffle, shuffle_xor, shuffle_down, shuffle_up, ballot     masks name the lanes that take part
//     load_words, store_words, load_words_streaming, load_words_if                      1 to 16 bytes in one access
//     cp_async_16, cp_async_commit, cp_async_wait                                       global to shared memory (sm_80)
//     mbarrier_*, bulk_load, bulk_store, bulk_store_wait, fence_proxy_async             the same by the run (sm_90)
//     fma, exponential, fast_exponential, fast_reciprocal, inverse_sqrt                 the same roundings on both sides
//     launch_kernel                                                                     a launch on a stream
#pragma once

#include "core/types.h"
#include "core/window.h"
#include "cuda/launch.h"

#if defined(COTNET_EMULATED)
#include "emulator.h"
#else

#include <cuda_runtime.h>

// Kernels and functions of kernels. `threads` is the largest block it is launched with, `min_blocks` how many of them one
// multiprocessor should hold: what registers are rationed by.
#define COTNET_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)
#define COTNET_DEVICE __device__ __forceinline__
#define COTNET_PRAGMA(text) _Pragma(#text)
#define COTNET_UNROLL COTNET_PRAGMA(unroll)
#define COTNET_UNROLL_BY(count) COTNET_PRAGMA(unroll count)

// Shared memory: type (&name)[size], and the unsigned char* that Launch::shared_bytes asks for (16-byte aligned).
#define COTNET_SHARED(type, name, size) __shared__ type name[size]
#define COTNET_SHARED_DYNAMIC(name) extern __shared__ __align__(16) unsigned char name[]

namespace cotnet {

using Stream = cudaStream_t;

// Launches and returns; the caller checks for errors of the launch. Empty grids launch nothing.
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const Launch& launch, Stream stream, const Arguments&... arguments) {
  if (launch.empty()) return;
  if (launch.shared_bytes > 48 * 1024)  // beyond what every kernel may have
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(launch.shared_bytes));
  const dim3 grid(launch.grid_x, launch.grid_y, launch.grid_z);
  kernel<<<grid, launch.threads, launch.shared_bytes, stream>>>(Parameters(arguments)...);
}

// ---- barriers and collectives

constexpr unsigned kAllLanes = 0xffffffffu;

COTNET_DEVICE void sync_block() { __syncthreads(); }
COTNET_DEVICE void sync_warp(unsigned mask = kAllLanes) { __syncwarp(mask); }
template <class T>
COTNET_DEVICE T shuffle(unsigned mask, T value, int lane) {
  return __shfl_sync(mask, value, lane);
}
template <class T>
COTNET_DEVICE T shuffle_xor(unsigned mask, T value, int distance) {
  return __shfl_xor_sync(mask, value, distance);
}
// From the lane `distance` above; a lane without one gets its own value.
template <class T>
COTNET_DEVICE T shuffle_down(unsigned mask, T value, unsigned distance) {
  return __shfl_down_sync(mask, value, distance);
}
template <class T>
COTNET_DEVICE T shuffle_up(unsigned mask, T value, unsigned distance) {
  return __shfl_up_sync(mask, value, distance);
}
COTNET_DEVICE unsigned ballot(unsigned mask, bool vote) { return __ballot_sync(mask, vote); }

// ---- arithmetic

COTNET_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
COTNET_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
COTNET_DEVICE float exponential(float a) { return ::expf(a); }  // within 2 ulp
COTNET_DEVICE double exponential(double a) { return ::exp(a); }
// Two instructions in place of eight. Within 2 + 1.2*|a| ulp, as the rounding of a*log2(e) grows with a; results below the
// normal numbers are zero. For distances from a maximum: exp(a) is small where its error is large.
COTNET_DEVICE float fast_exponential(float a) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(a * 1.44269504f));
  return power;
}
COTNET_DEVICE double fast_exponential(double a) { return ::exp(a); }
// One instruction in place of a division, within 1 ulp; numbers and results below the normal ones count as zero.
COTNET_DEVICE float fast_reciprocal(float a) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a));
  return inverse;
}
COTNET_DEVICE double fast_reciprocal(double a) { return 1.0 / a; }
COTNET_DEVICE float inverse_sqrt(float a) { return 1.0f / ::sqrtf(a); }
COTNET_DEVICE double inverse_sqrt(double a) { return 1.0 / ::sqrt(a); }

// ---- global memory. Loads are of memory that nothing writes while the kernel runs, so the compiler may move them.
// In assembly, because the compiler sometimes splits what is written as one 16-byte access.

template <int kBytes>
struct Words;  // as many bytes as one access moves

template <>
struct Words<2> {
  uint16_t a;
};
template <>
struct Words<4> {
  uint32_t a;
};
template <>
struct alignas(8) Words<8> {
  uint32_t a, b;
};
template <>
struct alignas(16) Words<16> {
  uint32_t a, b, c, d;
};

#define COTNET_LOADS(suffix, instruction)                                                                                  \
  COTNET_DEVICE void load##suffix(Words<2>& to, const void* from) {                                                        \
    asm(instruction ".u16 %0, [%1];" : "=h"(to.a) : "l"(from));                                                            \
  }                                                                                                                        \
  COTNET_DEVICE void load##suffix(Words<4>& to, const void* from) {                                                        \
    asm(instruction ".u32 %0, [%1];" : "=r"(to.a) : "l"(from));                                                            \
  }                                                                                                                        \
  COTNET_DEVICE void load##suffix(Words<8>& to, const void* from) {                                                        \
    asm(instruction ".v2.u32 {%0, %1}, [%2];" : "=r"(to.a), "=r"(to.b) : "l"(from));                                       \
  }                                                                                                                        \
  COTNET_DEVICE void load##suffix(Words<16>& to, const void* from) {                                                       \
    asm(instruction ".v4.u32 {%0, %1, %2, %3}, [%4];"                                                                      \
        : "=r"(to.a), "=r"(to.b), "=r"(to.c), "=r"(to.d)                                                                   \
        : "l"(from));                                                                                                      \
  }
COTNET_LOADS(_plain, "ld.global.nc")
COTNET_LOADS(_once, "ld.global.nc.L1::no_allocate")
#undef COTNET_LOADS

// A branch would make the compiler wait for each load before the next: predicates keep a batch of loads a batch.
#define COTNET_IF "{\n.reg .pred p;\nsetp.ne.u32 p, %"
COTNET_DEVICE void load_guarded(Words<2>& to, const void* from, unsigned ok) {
  asm(COTNET_IF "2, 0;\n@p ld.global.nc.u16 %0, [%1];\n}" : "+h"(to.a) : "l"(from), "r"(ok));
}
COTNET_DEVICE void load_guarded(Words<4>& to, const void* from, unsigned ok) {
  asm(COTNET_IF "2, 0;\n@p ld.global.nc.u32 %0, [%1];\n}" : "+r"(to.a) : "l"(from), "r"(ok));
}
COTNET_DEVICE void load_guarded(Words<8>& to, const void* from, unsigned ok) {
  asm(COTNET_IF "3, 0;\n@p ld.global.nc.v2.u32 {%0, %1}, [%2];\n}" : "+r"(to.a), "+r"(to.b) : "l"(from), "r"(ok));
}
COTNET_DEVICE void load_guarded(Words<16>& to, const void* from, unsigned ok) {
  asm(COTNET_IF "5, 0;\n@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(to.a), "+r"(to.b), "+r"(to.c), "+r"(to.d)
      : "l"(from), "r"(ok));
}
#undef COTNET_IF

template <int kBytes>
COTNET_DEVICE Words<kBytes> load_words(const void* from) {
  Words<kBytes> words;
  load_plain(words, from);
  return words;
}
// For what is read once: passes by the L1 cache.
template <int kBytes>
COTNET_DEVICE Words<kBytes> load_words_streaming(const void* from) {
  Words<kBytes> words;
  load_once(words, from);
  return words;
}
// Zeros where `ok` is false; `from` is not looked at then.
template <int kBytes>
COTNET_DEVICE Words<kBytes> load_words_if(const void* from, bool ok) {
  Words<kBytes> words{};
  load_guarded(words, from, ok);
  return words;
}

COTNET_DEVICE void store_words(void* to, const Words<2>& words) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"(words.a) : "memory");
}
COTNET_DEVICE void store_words(void* to, const Words<4>& words) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(words.a) : "memory");
}
COTNET_DEVICE void store_words(void* to, const Words<8>& words) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(words.a), "r"(words.b) : "memory");
}
COTNET_DEVICE void store_words(void* to, const Words<16>& words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.a), "r"(words.b), "r"(words.c), "r"(words.d)
               : "memory");
}

// ---- asynchronous copies. What was copied may be read after the wait by the thread that copied it, after a barrier that
// follows the wait by the others.

COTNET_DEVICE unsigned shared_address(const void* shared) { return unsigned(__cvta_generic_to_shared(shared)); }

// 16 bytes, zeros where `ok` is false. Below sm_80 a load and a store.
COTNET_DEVICE void cp_async_16(void* shared, const void* global, bool ok = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(ok ? 16 : 0)
               : "memory");
#else
  *static_cast<Words<16>*>(shared) = load_words_if<16>(global, ok);
#endif
}
COTNET_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all but the last kPending committed groups of this thread.
template <int kPending>
COTNET_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Bulk copies: one thread moves a whole run; addresses and sizes are multiples of 16 bytes. Kernels with them are launched
// on sm_90 and later only, and do nothing when compiled for less.
#if __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
#define COTNET_BULK(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kBulkCopies = false;
#define COTNET_BULK(...)
#endif

// A barrier in shared memory that `arrivals` threads arrive at; visible to others after sync_block.
COTNET_DEVICE void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  COTNET_BULK("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  COTNET_BULK("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and announces how many bytes bulk loads will bring in this phase.
COTNET_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  COTNET_BULK("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first, then 1, 0, ...
COTNET_DEVICE void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  COTNET_BULK("{\n.reg .pred done;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
                  shared_address(barrier)),
              "r"(parity)
              : "memory");
}
COTNET_DEVICE void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  COTNET_BULK("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                  shared_address(shared)),
              "l"(global), "r"(bytes), "r"(shared_address(barrier))
              : "memory");
}
// After writing shared memory that bulk_store will read: by every thread that wrote, before the barrier.
COTNET_DEVICE void fence_proxy_async() { COTNET_BULK("fence.proxy.async.shared::cta;" ::: "memory"); }
COTNET_DEVICE void bulk_store(void* global, const void* shared, unsigned bytes) {
  COTNET_BULK("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)), "r"(bytes)
              : "memory");
}
// Waits until the bulk stores of this thread have read shared memory: needed before it is reused or the block ends.
COTNET_DEVICE void bulk_store_wait() {
  COTNET_BULK("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
#undef COTNET_BULK

}  // namespace cotnet
#endif

namespace cotnet {

// kCount neighbouring elements, aligned as the widest access that moves them.
template <class scalar_t, int kCount>
struct alignas(sizeof(scalar_t) * kCount > 16 ? 16 : sizeof(scalar_t) * kCount) Pack {
  scalar_t at[kCount];
};

// Access of `Words` that moves a pack: its size, 16 bytes for larger ones.
template <class scalar_t, int kCount>
constexpr int kAccessBytes = sizeof(scalar_t) * kCount > 16 ? 16 : int(sizeof(scalar_t)) * kCount;

template <class scalar_t, int kCount, class Load>
COTNET_DEVICE Pack<scalar_t, kCount> load_pack(const scalar_t* from, const Load& load) {
  constexpr int kBytes = kAccessBytes<scalar_t, kCount>;
  Pack<scalar_t, kCount> pack;
  COTNET_UNROLL
  for (int i = 0; i < int(sizeof(pack)) / kBytes; ++i) {
    const Words<kBytes> words = load(reinterpret_cast<const char*>(from) + i * kBytes);
    std::memcpy(reinterpret_cast<char*>(&pack) + i * kBytes, &words, kBytes);
  }
  return pack;
}

// `from` must be aligned as the pack.
template <int kCount, class scalar_t>
COTNET_DEVICE Pack<scalar_t, kCount> load_vec(const scalar_t* from) {
  constexpr int kBytes = kAccessBytes<scalar_t, kCount>;
  return load_pack<scalar_t, kCount>(from, [](const void* at) { return load_words<kBytes>(at); });
}
template <int kCount, class scalar_t>
COTNET_DEVICE Pack<scalar_t, kCount> load_streaming(const scalar_t* from) {
  constexpr int kBytes = kAccessBytes<scalar_t, kCount>;
  return load_pack<scalar_t, kCount>(from, [](const void* at) { return load_words_streaming<kBytes>(at); });
}
template <int kCount, class scalar_t>
COTNET_DEVICE Pack<scalar_t, kCount> load_vec_if(const scalar_t* from, bool ok) {
  constexpr int kBytes = kAccessBytes<scalar_t, kCount>;
  return load_pack<scalar_t, kCount>(from, [ok](const void* at) { return load_words_if<kBytes>(at, ok); });
}

template <class scalar_t, int kCount>
COTNET_DEVICE void store_vec(scalar_t* to, const Pack<scalar_t, kCount>& pack) {
  constexpr int kBytes = kAccessBytes<scalar_t, kCount>;
  COTNET_UNROLL
  for (int i = 0; i < int(sizeof(pack)) / kBytes; ++i) {
    Words<kBytes> words;
    std::memcpy(&words, reinterpret_cast<const char*>(&pack) + i * kBytes, kBytes);
    store_words(reinterpret_cast<char*>(to) + i * kBytes, words);
  }
}

// One element, widened to the type it is summed in; zero where `ok` is false.
template <class scalar_t>
COTNET_DEVICE acc_t<scalar_t> load_wide(const scalar_t* from) {
  return widen(load_vec<1>(from).at[0]);
}
template <class scalar_t>
COTNET_DEVICE acc_t<scalar_t> load_wide_if(const scalar_t* from, bool ok) {
  return widen(load_vec_if<1>(from, ok).at[0]);
}
template <class scalar_t>
COTNET_DEVICE void store_narrow(scalar_t* to, acc_t<scalar_t> value) {
  store_vec(to, Pack<scalar_t, 1>{{narrow<scalar_t>(value)}});
}

// Blocks of `threads` that cover `items`; the x axis of a grid takes this many for all that fits into memory.
inline unsigned blocks_for(int64_t items, int64_t threads) { return unsigned(ceil_div(items, threads)); }

// The largest power of two that divides an address, up to 16: what accesses it allows.
inline int alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return int(address % 16 == 0 ? 16 : address & -address & 15);
}

}  // namespace cotnet
