// Compiles one file of loops once per vector width: define COTNET_LOOPS as its path, then include this.
// The loops land in cotnet::baseline, cotnet::avx2 and cotnet::avx512; COTNET_ON_TARGET calls the one that
// this processor runs. Loops are written against simd.h and know neither width nor instruction set.
// Vectors appear in named functions and functors only: GCC instantiates a lambda of a template for the baseline target.
// The standard headers come first, so that no inline function of the library is compiled for a wider target.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "core/norm_table.h"
#include "core/operands.h"
#include "core/problem.h"
#include "core/types.h"
#include "core/window.h"
#include "cpu/capability.h"
#include "cpu/scratch.h"

#if COTNET_X86
#include <immintrin.h>
#endif

// GCC 12 warns of its own placeholder for "any value" inside the AVX-512 conversions.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define COTNET_INLINE inline __attribute__((always_inline))

namespace cotnet {
namespace baseline {
#define COTNET_VECTOR_BYTES 16
#define COTNET_F16C 0
#include "cpu/simd.h"
#include COTNET_LOOPS
#undef COTNET_F16C
#undef COTNET_VECTOR_BYTES
}  // namespace baseline

#if COTNET_X86
#define COTNET_F16C 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define COTNET_VECTOR_BYTES 32
#include "cpu/simd.h"
#include COTNET_LOOPS
#undef COTNET_VECTOR_BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace avx512 {
#define COTNET_VECTOR_BYTES 64
#include "cpu/simd.h"
#include COTNET_LOOPS
#undef COTNET_VECTOR_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#undef COTNET_F16C
#endif  // COTNET_X86
}  // namespace cotnet

// COTNET_ON_TARGET((forward<float>), problem, x): the call, in the namespace of this processor's target.
#define COTNET_STRIP(...) __VA_ARGS__
#if COTNET_X86
#define COTNET_ON_TARGET(function, ...)                                                 \
  switch (::cotnet::cpu_capability()) {                                                 \
    case ::cotnet::Capability::avx512: ::cotnet::avx512::COTNET_STRIP function(__VA_ARGS__); break; \
    case ::cotnet::Capability::avx2: ::cotnet::avx2::COTNET_STRIP function(__VA_ARGS__); break;     \
    default: ::cotnet::baseline::COTNET_STRIP function(__VA_ARGS__);                    \
  }
#else
#define COTNET_ON_TARGET(function, ...) ::cotnet::baseline::COTNET_STRIP function(__VA_ARGS__)
#endif
