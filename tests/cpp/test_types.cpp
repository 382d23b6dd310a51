// The 16-bit floats: every bit pattern survives a round trip, ties go to even, the ends are right.
// (tests/test_build.py compares them with the conversions of NumPy and PyTorch.)
#include "check.h"
#include "core/types.h"

#include <cmath>
#include <type_traits>

using namespace cotnet;

namespace {

template <class half_t>
void test_round_trip() {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const half_t value{uint16_t(bits)};
    const float wide = widen(value);
    if (std::isnan(wide)) {
      CHECK(std::isnan(widen(narrow<half_t>(wide))));
    } else {
      CHECK_EQ(narrow<half_t>(wide).bits, value.bits);
    }
  }
}

void test_half_rounding() {
  CHECK_EQ(narrow<Half>(1.0f).bits, 0x3c00);
  CHECK_EQ(narrow<Half>(1.0f + 0x1p-11f).bits, 0x3c00);             // half way: to even, below
  CHECK_EQ(narrow<Half>(1.0f + 0x1p-10f + 0x1p-11f).bits, 0x3c02);  // half way: to even, above
  CHECK_EQ(narrow<Half>(65519.996f).bits, 0x7bff);                  // largest that stays finite
  CHECK_EQ(narrow<Half>(65520.0f).bits, 0x7c00);
  CHECK_EQ(narrow<Half>(0x1p-24f).bits, 0x0001);  // smallest subnormal
  CHECK_EQ(narrow<Half>(0x1p-25f).bits, 0x0000);  // half way to it
  CHECK_EQ(narrow<Half>(-0.0f).bits, 0x8000);
  CHECK_EQ(narrow<Half>(-INFINITY).bits, 0xfc00);
}

void test_bfloat16_rounding() {
  CHECK_EQ(narrow<BFloat16>(1.0f).bits, 0x3f80);
  CHECK_EQ(narrow<BFloat16>(1.0f + 0x1p-8f).bits, 0x3f80);
  CHECK_EQ(narrow<BFloat16>(1.0f + 0x1p-7f + 0x1p-8f).bits, 0x3f82);
  CHECK_EQ(narrow<BFloat16>(3.4e38f).bits, 0x7f80);
  CHECK_EQ(narrow<BFloat16>(-INFINITY).bits, 0xff80);
}

void test_accumulate() {
  CHECK((std::is_same_v<acc_t<Half>, float>));
  CHECK((std::is_same_v<acc_t<BFloat16>, float>));
  CHECK((std::is_same_v<acc_t<float>, float>));
  CHECK((std::is_same_v<acc_t<double>, double>));
}

}  // namespace

int main() {
  test_round_trip<Half>();
  test_round_trip<BFloat16>();
  test_half_rounding();
  test_bfloat16_rounding();
  test_accumulate();
  return report();
}
