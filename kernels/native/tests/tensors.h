// [B, C, N] tensors for tests in any layout, with gaps between rows, and what all normalisations
// are checked for.
#ifndef FASTSCORE_TESTS_TENSORS_H
#define FASTSCORE_TESTS_TENSORS_H

#include <omp.h>

#include "buffers.h"

namespace check {

struct Shape {
  int64_t batch, channels, positions, groups;
};

enum class Layout { kChannelsLast, kContiguous };

inline const char* name_of(Layout layout) {
  return layout == Layout::kChannelsLast ? "channels-last" : "contiguous";
}

class Tensor {
 public:
  // gap: elements between rows (positions or channels) and between samples, and before the first,
  // so that no row is aligned
  Tensor(int64_t batch, int64_t channels, int64_t positions, Layout layout, int dtype, int64_t gap)
      : b(batch), c(channels), n(positions), offset_(gap) {
    const bool last = layout == Layout::kChannelsLast;
    const int64_t row = (last ? c : n) + gap, rows = last ? n : c;
    channel = last ? 1 : row;
    position = last ? row : 1;
    sample = rows * row + gap;
    buffer = Buffer(offset_ + b * sample, dtype);
  }

  int64_t b, c, n, sample, channel, position;  // sizes, then strides
  Buffer buffer;

  int64_t index(int64_t i, int64_t j, int64_t k) const {
    return offset_ + i * sample + j * channel + k * position;
  }
  double get(int64_t i, int64_t j, int64_t k) const { return buffer.get(index(i, j, k)); }
  void set(int64_t i, int64_t j, int64_t k, double value) {
    buffer.set(index(i, j, k), static_cast<float>(value));
  }
  void* data() {
    return static_cast<unsigned char*>(buffer.data()) +
           offset_ * (buffer.dtype() == FS_F32 ? 4 : 2);
  }
  void* data_of(int64_t i) {
    return static_cast<unsigned char*>(data()) + i * sample * (buffer.dtype() == FS_F32 ? 4 : 2);
  }

  // True where neither the guards nor what lies between the rows was written to.
  bool gaps_untouched() const {
    std::vector<bool> mine(static_cast<size_t>(buffer.size()), false);
    for (int64_t i = 0; i < b; ++i) {
      for (int64_t j = 0; j < c; ++j) {
        for (int64_t k = 0; k < n; ++k) mine[static_cast<size_t>(index(i, j, k))] = true;
      }
    }
    for (int64_t i = 0; i < buffer.size(); ++i) {
      if (!mine[static_cast<size_t>(i)] && !buffer.poisoned(i)) return false;
    }
    return buffer.guarded();
  }

 private:
  int64_t offset_;
};

// The largest |a - b| / (1 + |b|), infinite where a is not finite.
class Difference {
 public:
  void add(double a, double b) {
    const double error = std::isfinite(a) ? std::fabs(a - b) / (1.0 + std::fabs(b))
                                          : std::numeric_limits<double>::infinity();
    if (!(error <= largest_)) largest_ = error;
  }
  double largest() const { return largest_; }

 private:
  double largest_ = 0.0;
};

// Runs body(threads) with that many threads allowed, whatever the machine has.
template <class Body>
void with_threads(std::initializer_list<int> counts, Body&& body) {
  for (const int threads : counts) {
    omp_set_num_threads(threads);
    body(threads);
  }
  omp_set_num_threads(omp_get_num_procs());
}

}  // namespace check

#endif  // FASTSCORE_TESTS_TENSORS_H
