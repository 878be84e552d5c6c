// Means and sums of squared deviations. Within a block the mean is taken first, so that the squares
// are of deviations from it: no shift has to be guessed and a large mean costs no precision. Blocks
// are combined as in Chan, Golub and LeVeque (1983).
#ifndef FASTSCORE_MOMENTS_H
#define FASTSCORE_MOMENTS_H

#include "norm.h"

namespace fs::FS_ISA {

struct Moments {
  double count, mean, squares;

  FS_ALWAYS_INLINE void merge(double other_count, double other_mean, double other_squares) {
    const double total = count + other_count;
    const double delta = other_mean - mean;
    mean += delta * (other_count / total);
    squares += other_squares + delta * delta * (count * other_count / total);
    count = total;
  }
};

// V vectors of channels over `rows` positions of a channels-last tensor; the last vector has
// `lanes` lanes.
template <int V, bool Partial, class T>
FS_INLINE void strip_moments(const T* x, int64_t stride, int64_t rows, int lanes, float* mean,
                             float* squares) {
  // four chains of sums in all: fewer would wait for their own results
  constexpr int kRows = V >= 4 ? 1 : 4 / V;
  const auto get = [&](const T* p) { return Partial ? load(p, lanes) : load(p); };
  Vf total[kRows][V] = {};
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    for (int u = 0; u < kRows; ++u) {
      for (int v = 0; v < V; ++v) total[u][v] += get(x + (row + u) * stride + v * kLanes);
    }
  }
  for (; row < rows; ++row) {
    for (int v = 0; v < V; ++v) total[0][v] += get(x + row * stride + v * kLanes);
  }
  Vf center[V];
  for (int v = 0; v < V; ++v) {
    for (int u = 1; u < kRows; ++u) total[0][v] += total[u][v];
    center[v] = total[0][v] / broadcast(static_cast<float>(rows));
    store(mean + v * kLanes, center[v]);
  }
  Vf square[kRows][V] = {};
  const auto add = [&](int u, int v, const T* p) {
    const Vf deviation = get(p) - center[v];
    square[u][v] = fma(deviation, deviation, square[u][v]);
  };
  for (row = 0; row + kRows <= rows; row += kRows) {
    for (int u = 0; u < kRows; ++u) {
      for (int v = 0; v < V; ++v) add(u, v, x + (row + u) * stride + v * kLanes);
    }
  }
  for (; row < rows; ++row) {
    for (int v = 0; v < V; ++v) add(0, v, x + row * stride + v * kLanes);
  }
  for (int v = 0; v < V; ++v) {
    for (int u = 1; u < kRows; ++u) square[0][v] += square[u][v];
    store(squares + v * kLanes, square[0][v]);
  }
}

// Mean and sum of squared deviations of every channel over `rows` positions; arrays of
// padded(channels).
template <class T>
FS_INLINE void block_moments(const T* x, int64_t stride, int64_t rows, int64_t channels,
                             float* mean, float* squares) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
    strip_moments<4, false>(x + c, stride, rows, kLanes, mean + c, squares + c);
  }
  for (; c + 2 * kLanes <= channels; c += 2 * kLanes) {
    strip_moments<2, false>(x + c, stride, rows, kLanes, mean + c, squares + c);
  }
  for (; c + kLanes <= channels; c += kLanes) {
    strip_moments<1, false>(x + c, stride, rows, kLanes, mean + c, squares + c);
  }
  if (c < channels) {
    strip_moments<1, true>(x + c, stride, rows, static_cast<int>(channels - c), mean + c,
                           squares + c);
  }
}

// The moments of whole channels from those of their blocks: block b's are at mean and squares + b *
// step. One lane a channel; the result has one double a channel.
static inline void merge_blocks(const float* mean, const float* squares, int64_t step,
                                Blocks blocks, int64_t channels, double* channel_mean,
                                double* channel_squares) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vd m = widen(load(mean + c)), q = widen(load(squares + c));
    double count = static_cast<double>(blocks.rows_of(0).end);
    for (int64_t b = 1; b < blocks.count; ++b) {
      const Range range = blocks.rows_of(b);
      const double rows = static_cast<double>(range.end - range.begin);
      const double share = rows / (count + rows);
      const Vd delta = add(widen(load(mean + b * step + c)), scaled(m, -1.0));
      m = fma(delta, broadcast_double(share), m);
      q = fma(delta, scaled(delta, count * share), add(q, widen(load(squares + b * step + c))));
      count += rows;
    }
    store(channel_mean + c, m);
    store(channel_squares + c, q);
  }
}

// The moments of a group from those of its channels, `positions` values each.
FS_INLINE Moments group_moments(const double* mean, const double* squares, int64_t channels,
                                int64_t positions) {
  double center = 0.0, sum_squares = 0.0;
  for (int64_t c = 0; c < channels; ++c) center += mean[c];
  center /= static_cast<double>(channels);
  const double rows = static_cast<double>(positions);
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = mean[c] - center;
    sum_squares += squares[c] + rows * delta * delta;
  }
  return {rows * static_cast<double>(channels), center, sum_squares};
}

// The moments of `count` values in a row, merged into `moments`.
template <class T>
FS_INLINE void run_moments(const T* x, int64_t count, Moments& moments) {
  constexpr int64_t kChunk = 64 * kLanes;
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const T* p = x + begin;
    const int64_t size = count - begin < kChunk ? count - begin : kChunk;
    const int64_t whole = size / kLanes * kLanes, quad = size / (4 * kLanes) * (4 * kLanes);
    const int rest = static_cast<int>(size - whole);
    Vf total[4] = {};
    for (int64_t i = 0; i < quad; i += 4 * kLanes) {
      for (int u = 0; u < 4; ++u) total[u] += load(p + i + u * kLanes);
    }
    for (int64_t i = quad; i < whole; i += kLanes) total[0] += load(p + i);
    if (rest > 0) total[1] += load(p + whole, rest);
    const float mean =
        sum((total[0] + total[1]) + (total[2] + total[3])) / static_cast<float>(size);
    const Vf center = broadcast(mean);
    Vf square[4] = {};
    for (int64_t i = 0; i < quad; i += 4 * kLanes) {
      for (int u = 0; u < 4; ++u) {
        const Vf deviation = load(p + i + u * kLanes) - center;
        square[u] = fma(deviation, deviation, square[u]);
      }
    }
    for (int64_t i = quad; i < whole; i += kLanes) {
      const Vf deviation = load(p + i) - center;
      square[0] = fma(deviation, deviation, square[0]);
    }
    if (rest > 0) {
      const Vf deviation = keep_lanes(load(p + whole, rest) - center, rest);
      square[1] = fma(deviation, deviation, square[1]);
    }
    const float squares = sum((square[0] + square[1]) + (square[2] + square[3]));
    moments.merge(static_cast<double>(size), mean, squares);
  }
}

// The moments of `channels` rows of `positions` values each, `stride` apart.
template <class T>
FS_INLINE Moments rows_moments(const T* x, int64_t stride, int64_t channels, int64_t positions) {
  Moments moments{0.0, 0.0, 0.0};
  if (stride == positions) {
    run_moments(x, channels * positions, moments);
  } else {
    for (int64_t c = 0; c < channels; ++c) run_moments(x + c * stride, positions, moments);
  }
  return moments;
}

FS_INLINE float inverse_deviation(const Moments& moments, double eps) {
  return static_cast<float>(1.0 / __builtin_sqrt(moments.squares / moments.count + eps));
}

}  // namespace fs::FS_ISA

#endif  // FASTSCORE_MOMENTS_H
