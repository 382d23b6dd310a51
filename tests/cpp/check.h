// The smallest of test frameworks: checks are counted, failures shown, and main returns report().
#pragma once

#include <cstdio>
#include <iostream>

inline int checks_made = 0;
inline int checks_failed = 0;

template <class A, class B>
void check_equal(const A& found, const B& expected, const char* what, const char* file, int line) {
  ++checks_made;
  if (found == expected) return;
  ++checks_failed;
  std::cerr << file << ':' << line << ": " << what << " is " << found << ", not " << expected
            << '\n';
}

#define CHECK_EQ(found, expected) check_equal(found, expected, #found, __FILE__, __LINE__)
#define CHECK(condition) CHECK_EQ(static_cast<bool>(condition), true)

// A program that checked nothing has failed.
inline int report() {
  std::printf("%d checks, %d failed\n", checks_made, checks_failed);
  return checks_made > 0 && checks_failed == 0 ? 0 : 1;
}
