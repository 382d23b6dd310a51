// Element types of the kernels: two 16-bit floats as plain bits, and the type each dtype is summed in.
// Nothing of torch: the same bits arrive from tensors, from NumPy arrays and from an emulated GPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace cotnet {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Sums are kept in float32, for float64 in float64.
template <class scalar_t>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class scalar_t>
using acc_t = typename Accumulate<scalar_t>::type;

template <class To, class From>
COTNET_HD inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

COTNET_HD inline float widen(float a) { return a; }
COTNET_HD inline double widen(double a) { return a; }
COTNET_HD inline float widen(BFloat16 a) { return bit_cast<float>(uint32_t(a.bits) << 16); }
COTNET_HD inline float widen(Half a) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(a.bits));
  return f;
#else
  // Exponent and mantissa move into a float whose exponent is then rebased by a multiplication, which is
  // exact for subnormals too; infinities and NaNs get the float exponent by hand.
  const uint32_t magnitude = uint32_t(a.bits & 0x7fff) << 13;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;
  return bit_cast<float>(bits | uint32_t(a.bits & 0x8000) << 16);
#endif
}

// Two neighbours at once, as one word of memory holds them: their halves are not cut out first.
template <class scalar_t>
COTNET_HD inline void widen_pair(uint32_t word, float& first, float& second);
template <>
COTNET_HD inline void widen_pair<BFloat16>(uint32_t word, float& first, float& second) {
  first = bit_cast<float>(word << 16);
#if defined(__CUDA_ARCH__)  // the compiler would load the second half once more
  asm("and.b32 %0, %1, 0xffff0000;" : "=r"(word) : "r"(word));
#endif
  second = bit_cast<float>(word & 0xffff0000u);
}
template <>
COTNET_HD inline void widen_pair<Half>(uint32_t word, float& first, float& second) {
  first = widen(Half{uint16_t(word)});
  second = widen(Half{uint16_t(word >> 16)});
}

template <class scalar_t>
COTNET_HD scalar_t narrow(acc_t<scalar_t> a);

template <>
COTNET_HD inline float narrow<float>(float a) {
  return a;
}
template <>
COTNET_HD inline double narrow<double>(double a) {
  return a;
}
template <>
COTNET_HD inline BFloat16 narrow<BFloat16>(float a) {  // round to nearest, ties to even
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(a));
  return b;
#else
  const uint32_t bits = bit_cast<uint32_t>(a);
  if (a != a) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}
template <>
COTNET_HD inline Half narrow<Half>(float a) {  // round to nearest, ties to even
#if defined(__CUDA_ARCH__)
  Half h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(a));
  return h;
#else
  const uint32_t bits = bit_cast<uint32_t>(a);
  const uint32_t sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {
    // Below 2^-14 the result is subnormal: adding 0.5 lets the float adder do the rounding at 2^-24.
    const float sum = bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(sum) - 0x3f000000))};
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return {uint16_t(sign | (magnitude - 0x38000000) >> 13)};
#endif
}

}  // namespace cotnet
