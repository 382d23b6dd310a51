// Three mistakes on purpose, to prove that the sanitizers see them in the process of the tests.
#include <cstdint>
#include <limits>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Reads one element past `count`: a kernel that runs over the end of a tensor.
EXPORT float read_past_end(const float* values, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i <= count; ++i) sum += values[i];
  return sum;
}

// Reads memory that was given back: a kernel that keeps a pointer too long.
EXPORT int read_after_delete() {
  volatile int* value = new int(1);
  delete value;
  return *value;
}

// Index arithmetic in 32 bits where 64 are needed.
EXPORT int overflow_index(int rows) { return rows * std::numeric_limits<int>::max(); }
