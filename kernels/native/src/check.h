// Checks of arguments: what no tensor can have is refused before anything is touched.
#ifndef FASTSCORE_CHECK_H
#define FASTSCORE_CHECK_H

#include <initializer_list>

#include "common.h"

namespace fs {

inline bool known_dtype(int dtype) {
  return dtype == FS_F32 || dtype == FS_BF16 || dtype == FS_F16;
}

// True when every size is positive and their product (times 16 bytes) fits into 63 bits.
template <class... Sizes>
bool sizes_fit(Sizes... sizes) {
  int64_t product = 16;
  bool fit = true;
  for (const int64_t size : {static_cast<int64_t>(sizes)...}) {
    fit = fit && size > 0 && !__builtin_mul_overflow(product, size, &product);
  }
  return fit;
}

struct Strides {
  int64_t batch, channel, position;
};

// A dimension of size 1 fits whatever its stride is. With `disjoint` no element may lie on another,
// as in what is written to.
inline bool channels_last(Strides s, int64_t batch, int64_t channels, int64_t positions,
                          bool disjoint) {
  if (channels > 1 && s.channel != 1) return false;
  if (positions > 1 && s.position < (disjoint ? channels : 0)) return false;
  const int64_t extent = (positions > 1 ? (positions - 1) * s.position : 0) + channels;
  return batch == 1 || s.batch >= (disjoint ? extent : 0);
}

inline bool contiguous(Strides s, int64_t batch, int64_t channels, int64_t positions,
                       bool disjoint) {
  return channels_last({s.batch, s.position, s.channel}, batch, positions, channels, disjoint);
}

}  // namespace fs

#endif  // FASTSCORE_CHECK_H
