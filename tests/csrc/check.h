// A test is a program: CHECK prints what failed and where, and the last line of main returns
// exit_code().
#pragma once

#include <cmath>
#include <cstdio>

namespace check {

inline int& failures() {
  static int count = 0;
  return count;
}

inline int exit_code() {
  if (failures() > 0) std::printf("%d checks failed\n", failures());
  return failures() > 0 ? 1 : 0;
}

inline void that(bool holds, const char* text, const char* file, int line) {
  if (holds) return;
  ++failures();
  std::printf("%s:%d: %s\n", file, line, text);
}

// NaN is never close to anything.
inline void close(double got, double expected, double tolerance, const char* text, const char* file,
                  int line) {
  if (std::abs(got - expected) <= tolerance) return;
  ++failures();
  std::printf("%s:%d: %s is %.9g, expected %.9g within %.3g\n", file, line, text, got, expected,
              tolerance);
}

}  // namespace check

#define CHECK(condition) check::that(condition, #condition, __FILE__, __LINE__)
#define CHECK_CLOSE(got, expected, tolerance) \
  check::close(got, expected, tolerance, #got, __FILE__, __LINE__)
