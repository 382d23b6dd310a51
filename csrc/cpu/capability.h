// Which of the compiled vector widths this processor runs. ATEN_CPU_CAPABILITY (default, avx2, avx512)
// lowers it, exactly as it does for PyTorch's own kernels.
#pragma once

#include <cstdlib>
#include <cstring>

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define COTNET_X86 1
#else
#define COTNET_X86 0
#endif

namespace cotnet {

enum class Capability { baseline, avx2, avx512 };

inline Capability detect_capability() {
#if COTNET_X86
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  if (wanted != nullptr && std::strcmp(wanted, "default") == 0) return Capability::baseline;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0 && avx2) return Capability::avx2;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return Capability::avx512;
  if (avx2) return Capability::avx2;
#endif
  return Capability::baseline;
}

inline Capability cpu_capability() {
  static const Capability found = detect_capability();
  return found;
}

inline const char* capability_name(Capability capability) {
  switch (capability) {
    case Capability::avx512: return "AVX512";
    case Capability::avx2: return "AVX2";
    default: return "DEFAULT";
  }
}

}  // namespace cotnet
