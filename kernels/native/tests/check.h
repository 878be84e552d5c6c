// What the tests share: a failed check prints where and what, and makes the program fail at its
// end.
#ifndef FASTSCORE_TESTS_CHECK_H
#define FASTSCORE_TESTS_CHECK_H

#include <cstdio>
#include <cstdlib>

namespace check {

inline int failures = 0;

// Exit status of a test program.
inline int result() {
  if (failures > 0) std::fprintf(stderr, "%d checks failed\n", failures);
  return failures > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

}  // namespace check

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition) && ++check::failures <= 20) {                         \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
    }                                                                      \
  } while (false)

#endif  // FASTSCORE_TESTS_CHECK_H
