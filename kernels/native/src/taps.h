// Statistics of a feature tap and its gradient tap, and the maps that normalise them: what tap_norm and the
// tap path share.
//
// A gradient's magnitude spans many decades over the noise level, so its sums are taken in double precision,
// where neither squares of 1e-25 nor of 1e25 leave the range. Division by the root mean square is
// folded into the group norm: (g / rms - mean / rms) / sqrt(var / rms^2 + eps).
#ifndef FASTSCORE_TAPS_H
#define FASTSCORE_TAPS_H

#include "moments.h"

namespace fs::FS_ISA {

struct TapProblem {
  const void *feature_weight, *feature_bias, *gradient_weight, *gradient_bias;
  int parameter_dtype;
  float *log_rms, *stats;  // [B]; [B, groups, 4] or null
  int64_t batch, channels, positions, groups;
  double eps;
};

constexpr double kFloor = 1e-30;
constexpr double kLargest = 3.4028234663852886e38;

// y = ((x - mean) * rstd) * weight + shift
struct Map {
  float *mean, *rstd, *weight, *shift;

  FS_ALWAYS_INLINE Map(float* p, int64_t step)
      : mean(p), rstd(p + step), weight(p + 2 * step), shift(p + 3 * step) {}

  FS_ALWAYS_INLINE void set(int64_t begin, int64_t size, double center, double inverse) const {
    const float rounded = static_cast<float>(center), factor = static_cast<float>(inverse);
    // what rounding the mean leaves out
    const float rest = static_cast<float>((center - rounded) * inverse);
    for (int64_t c = begin; c < begin + size; ++c) {
      mean[c] = rounded;
      rstd[c] = factor;
      shift[c] -= rest * weight[c];
    }
  }

  template <class T, class U>
  FS_ALWAYS_INLINE void row(const T* x, U* y, int64_t channels) const {
    const int64_t whole = channels / kLanes * kLanes;
    for (int64_t c = 0; c < whole; c += kLanes) store(y + c, apply(load(x + c), c));
    const int rest = static_cast<int>(channels - whole);
    if (rest > 0) store(y + whole, apply(load(x + whole, rest), whole), rest);
  }

  FS_ALWAYS_INLINE Vf apply(Vf x, int64_t c) const {
    return fma((x - load(mean + c)) * load(rstd + c), load(weight + c), load(shift + c));
  }
};

// Sums and sums of squares of one vector of channels over `rows` positions.
template <bool Partial, class T>
FS_INLINE void strip_sums(const T* x, int64_t stride, int64_t rows, int lanes, double* total,
                          double* squares) {
  Vd first[2] = {broadcast_double(0.0), broadcast_double(0.0)};
  Vd second[2] = {first[0], first[0]};
  const auto add_row = [&](int u, const T* p) {
    const Vd value = widen(Partial ? load(p, lanes) : load(p));
    first[u] = add(first[u], value);
    second[u] = fma(value, value, second[u]);
  };
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2) {
    add_row(0, x + row * stride);
    add_row(1, x + (row + 1) * stride);
  }
  if (row < rows) add_row(0, x + row * stride);
  store(total, add(first[0], first[1]));
  store(squares, add(second[0], second[1]));
}

#if defined(__clang__)
#define FS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

// y[row, channel] = x[channel, row], four by four
FS_INLINE void transpose_words(const float* x, int64_t x_stride, float* y, int64_t y_stride) {
  typedef uint32_t Words __attribute__((vector_size(16)));
  Words in[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&in[i], x + i * x_stride, sizeof in[i]);
  const Words a = FS_SHUFFLE(in[0], in[1], 0, 4, 1, 5), b = FS_SHUFFLE(in[0], in[1], 2, 6, 3, 7);
  const Words c = FS_SHUFFLE(in[2], in[3], 0, 4, 1, 5), d = FS_SHUFFLE(in[2], in[3], 2, 6, 3, 7);
  const Words out[4] = {FS_SHUFFLE(a, c, 0, 1, 4, 5), FS_SHUFFLE(a, c, 2, 3, 6, 7),
                        FS_SHUFFLE(b, d, 0, 1, 4, 5), FS_SHUFFLE(b, d, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) __builtin_memcpy(y + i * y_stride, &out[i], sizeof out[i]);
}
template <class Half>
FS_INLINE void transpose_words(const Half* x, int64_t x_stride, Half* y, int64_t y_stride) {
  for (int row = 0; row < 4; ++row) {
    for (int c = 0; c < 4; ++c) y[row * y_stride + c] = x[c * x_stride + row];
  }
}

#undef FS_SHUFFLE

// Positions `rows` of a contiguous sample, channels-last.
template <class T>
FS_INLINE void transpose(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows,
                         int64_t channels) {
  const int64_t row_blocks = rows / 4 * 4, channel_blocks = channels / 4 * 4;
  for (int64_t row = 0; row < row_blocks; row += 4) {
    for (int64_t c = 0; c < channel_blocks; c += 4) {
      transpose_words(x + c * x_stride + row, x_stride, y + row * y_stride + c, y_stride);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = row < row_blocks ? channel_blocks : 0; c < channels; ++c) {
      y[row * y_stride + c] = x[c * x_stride + row];
    }
  }
}

// One of the two inputs. What is contiguous is first transposed to where its result goes, and
// normalised there.
template <class T>
struct Input {
  Tensor<const T> given;
  Tensor<T> place;
  bool transposed;

  FS_ALWAYS_INLINE Input(Tensor<const T> x, Tensor<T> out, int64_t channels, int64_t positions)
      : given(x), place(out), transposed(!is_channels_last(channels, positions, x)) {}

  FS_ALWAYS_INLINE int64_t stride() const { return transposed ? place.position : given.position; }
  FS_ALWAYS_INLINE const T* at(int64_t sample, int64_t row) const {
    return transposed ? target(sample, row)
                      : given.data + sample * given.batch + row * given.position;
  }
  FS_ALWAYS_INLINE T* target(int64_t sample, int64_t row) const {
    return place.data + sample * place.batch + row * place.position;
  }

  FS_ALWAYS_INLINE void prepare(int64_t sample, Range rows, int64_t channels) const {
    if (!transposed) return;
    // positions have stride 1 unless there is one alone
    transpose(given.data + sample * given.batch + rows.begin, given.channel,
              target(sample, rows.begin), place.position, rows.end - rows.begin, channels);
  }

  FS_ALWAYS_INLINE void map_rows(const Map& map, int64_t sample, Range rows,
                                 int64_t channels) const {
    for (int64_t row = rows.begin; row < rows.end; ++row)
      map.row(at(sample, row), target(sample, row), channels);
  }
};

// One thread's part.
template <class T>
struct Taps {
  const TapProblem& problem;
  Input<T> feature, gradient;
  Blocks blocks;
  int64_t step;
  float* moments;  // [slots, blocks, 2, step], of the feature
  double* sums;    // [slots, blocks, 2, step], of the gradient
  Map feature_map, gradient_map;
  double *first_channel, *second_channel;  // [step]

  FS_ALWAYS_INLINE int64_t partial(int64_t slot, int64_t block) const {
    return (slot * blocks.count + block) * 2 * step;
  }

  void first(int64_t sample, int64_t slot, int64_t block) const {
    const Range rows = blocks.rows_of(block);
    feature.prepare(sample, rows, problem.channels);
    gradient.prepare(sample, rows, problem.channels);
    float* to = moments + partial(slot, block);
    block_moments(feature.at(sample, rows.begin), feature.stride(), rows.end - rows.begin,
                  problem.channels, to, to + step);
    gradient_sums(gradient.at(sample, rows.begin), rows.end - rows.begin,
                  sums + partial(slot, block));
  }

  FS_ALWAYS_INLINE void gradient_sums(const T* x, int64_t rows, double* to) const {
    const int64_t whole = problem.channels / kLanes * kLanes;
    for (int64_t c = 0; c < whole; c += kLanes) {
      strip_sums<false>(x + c, gradient.stride(), rows, kLanes, to + c, to + step + c);
    }
    const int rest = static_cast<int>(problem.channels - whole);
    if (rest > 0)
      strip_sums<true>(x + whole, gradient.stride(), rows, rest, to + whole, to + step + whole);
  }

  void finish(int64_t sample, int64_t slot, bool owner) const {
    float* stats = owner && problem.stats ? problem.stats + sample * problem.groups * 4 : nullptr;
    finish_feature(moments + partial(slot, 0), stats);
    const double rms = finish_gradient(sums + partial(slot, 0), stats);
    if (owner) problem.log_rms[sample] = static_cast<float>(__builtin_log(rms));
  }

  FS_ALWAYS_INLINE void finish_feature(const float* from, float* stats) const {
    to_floats(problem.feature_weight, problem.parameter_dtype, 0, problem.channels,
              feature_map.weight);
    to_floats(problem.feature_bias, problem.parameter_dtype, 0, problem.channels,
              feature_map.shift);
    merge_blocks(from, from + step, 2 * step, blocks, problem.channels, first_channel,
                 second_channel);
    const int64_t size = problem.channels / problem.groups;
    for (int64_t group = 0; group < problem.groups; ++group) {
      const int64_t c = group * size;
      const Moments of =
          group_moments(first_channel + c, second_channel + c, size, problem.positions);
      const float inverse = inverse_deviation(of, problem.eps);
      feature_map.set(c, size, of.mean, inverse);
      if (stats == nullptr) continue;
      stats[group * 4] = static_cast<float>(of.mean);
      stats[group * 4 + 1] = inverse;
    }
  }

  // returns the root mean square of the sample
  FS_ALWAYS_INLINE double finish_gradient(const double* from, float* stats) const {
    to_floats(problem.gradient_weight, problem.parameter_dtype, 0, problem.channels,
              gradient_map.weight);
    to_floats(problem.gradient_bias, problem.parameter_dtype, 0, problem.channels,
              gradient_map.shift);
    double all = 0.0;
    for (int64_t c = 0; c < problem.channels; ++c) {
      double total = 0.0, squares = 0.0;
      for (int64_t block = 0; block < blocks.count; ++block) {
        total += from[block * 2 * step + c];
        squares += from[block * 2 * step + step + c];
      }
      first_channel[c] = total;
      second_channel[c] = squares;
      all += squares;
    }
    const double positions = static_cast<double>(problem.positions);
    double rms = __builtin_sqrt(all / (positions * static_cast<double>(problem.channels)));
    // a nan stays
    if (rms < kFloor) rms = kFloor;
    const int64_t size = problem.channels / problem.groups;
    const double count = positions * static_cast<double>(size);
    for (int64_t group = 0; group < problem.groups; ++group) {
      double mean = 0.0, squares = 0.0;
      for (int64_t c = group * size; c < (group + 1) * size; ++c) {
        mean += first_channel[c];
        squares += second_channel[c];
      }
      mean /= count;
      double variance = squares / count - mean * mean;
      if (variance < 0.0) variance = 0.0;
      double inverse = 1.0 / __builtin_sqrt(variance + problem.eps * rms * rms);
      // times 0 it must stay 0
      if (inverse > kLargest) inverse = kLargest;
      gradient_map.set(group * size, size, mean, inverse);
      if (stats == nullptr) continue;
      stats[group * 4 + 2] = static_cast<float>(mean);
      stats[group * 4 + 3] = static_cast<float>(inverse);
    }
    return rms;
  }

  void second(int64_t sample, int64_t, int64_t block) const {
    feature.map_rows(feature_map, sample, blocks.rows_of(block), problem.channels);
    gradient.map_rows(gradient_map, sample, blocks.rows_of(block), problem.channels);
  }
};

}  // namespace fs::FS_ISA

#endif  // FASTSCORE_TAPS_H
