// Types that every instruction set shares. Nothing here has code that a compiler flag could change.
#ifndef FASTSCORE_COMMON_H
#define FASTSCORE_COMMON_H

#include <stddef.h>
#include <stdint.h>

#include "fastscore_native.h"

// a member function out of line could be shared between instruction sets by the linker
#define FS_ALWAYS_INLINE inline __attribute__((always_inline))
#define FS_INLINE static FS_ALWAYS_INLINE

namespace fs {

struct Bf16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

// A dense [B, C, N] tensor.
template <class T>
struct Tensor {
  T* data;
  int64_t batch, channel, position;  // strides in elements
};

// Half-open range of work items.
struct Range {
  int64_t begin, end;
};

}  // namespace fs

#endif  // FASTSCORE_COMMON_H
