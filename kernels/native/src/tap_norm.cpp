// Normalisation of a feature tap and its gradient tap, side by side in one channels-last tensor.
//
// A gradient's magnitude spans many decades over the noise level, so its sums are taken in double precision,
// where neither squares of 1e-25 nor of 1e25 leave the range. Division by the root mean square is
// folded into the group norm: (g / rms - mean / rms) / sqrt(var / rms^2 + eps).
#include "moments.h"

namespace fs::FS_ISA {
namespace {

struct Problem {
  const void *feature_weight, *feature_bias, *gradient_weight, *gradient_bias;
  int parameter_dtype;
  float *log_rms, *stats;  // [B]; [B, groups, 4] or null
  int64_t batch, channels, positions, groups;
  double eps;
};

constexpr double kFloor = 1e-30;
constexpr double kLargest = 3.4028234663852886e38;
// positions of a contiguous tensor that are transposed at a time
constexpr int64_t kTile = 16;

// y = ((x - mean) * rstd) * weight + shift
struct Map {
  float *mean, *rstd, *weight, *shift;

  FS_ALWAYS_INLINE Map(float* p, int64_t step) : mean(p), rstd(p + step), weight(p + 2 * step), shift(p + 3 * step) {}

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

  template <class T>
  FS_ALWAYS_INLINE void row(const T* x, T* y, int64_t channels) const {
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
FS_INLINE void strip_sums(const T* x, int64_t stride, int64_t rows, int lanes, double* total, double* squares) {
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

// The same of a row of positions.
template <class T>
FS_INLINE void run_sums(const T* x, int64_t count, double* total, double* squares) {
  Vd first = broadcast_double(0.0), second = first;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vd value = widen(load_lanes(x + i, lanes_left(count, i)));
    first = add(first, value);
    second = fma(value, value, second);
  }
  *total = sum(first);
  *squares = sum(second);
}

// One thread's part.
template <class T>
struct Taps {
  const Problem& problem;
  Tensor<const T> feature, gradient;
  bool feature_last, gradient_last;  // channels-last or contiguous
  Tensor<T> out;
  Blocks blocks;
  int64_t step;
  float* moments;        // [slots, blocks, 2, step], of the feature
  double* sums;          // [slots, blocks, 2, step], of the gradient
  Map feature_map, gradient_map;
  double *first_channel, *second_channel;  // [step]
  T* tile;                                 // [kTile, channels]

  FS_ALWAYS_INLINE int64_t partial(int64_t slot, int64_t block) const { return (slot * blocks.count + block) * 2 * step; }

  void first(int64_t sample, int64_t slot, int64_t block) const {
    const Range rows = blocks.rows_of(block);
    feature_block(feature.data + sample * feature.batch + rows.begin * feature.position, rows.end - rows.begin,
                  moments + partial(slot, block));
    gradient_block(gradient.data + sample * gradient.batch + rows.begin * gradient.position, rows.end - rows.begin,
                   sums + partial(slot, block));
  }

  FS_ALWAYS_INLINE void feature_block(const T* x, int64_t rows, float* to) const {
    if (feature_last) {
      block_moments(x, feature.position, rows, problem.channels, to, to + step);
      return;
    }
    for (int64_t c = 0; c < problem.channels; ++c) {
      Moments run{0.0, 0.0, 0.0};
      run_moments(x + c * feature.channel, rows, run);
      to[c] = static_cast<float>(run.mean);
      to[step + c] = static_cast<float>(run.squares);
    }
  }

  FS_ALWAYS_INLINE void gradient_block(const T* x, int64_t rows, double* to) const {
    if (!gradient_last) {
      for (int64_t c = 0; c < problem.channels; ++c) run_sums(x + c * gradient.channel, rows, to + c, to + step + c);
      return;
    }
    const int64_t whole = problem.channels / kLanes * kLanes;
    for (int64_t c = 0; c < whole; c += kLanes) {
      strip_sums<false>(x + c, gradient.position, rows, kLanes, to + c, to + step + c);
    }
    const int rest = static_cast<int>(problem.channels - whole);
    if (rest > 0) strip_sums<true>(x + whole, gradient.position, rows, rest, to + whole, to + step + whole);
  }

  void finish(int64_t sample, int64_t slot, bool owner) const {
    float* stats = owner && problem.stats ? problem.stats + sample * problem.groups * 4 : nullptr;
    finish_feature(moments + partial(slot, 0), stats);
    const double rms = finish_gradient(sums + partial(slot, 0), stats);
    if (owner) problem.log_rms[sample] = static_cast<float>(__builtin_log(rms));
  }

  FS_ALWAYS_INLINE void finish_feature(const float* from, float* stats) const {
    to_floats(problem.feature_weight, problem.parameter_dtype, 0, problem.channels, feature_map.weight);
    to_floats(problem.feature_bias, problem.parameter_dtype, 0, problem.channels, feature_map.shift);
    merge_blocks(from, from + step, 2 * step, blocks, problem.channels, first_channel, second_channel);
    const int64_t size = problem.channels / problem.groups;
    for (int64_t group = 0; group < problem.groups; ++group) {
      const int64_t c = group * size;
      const Moments of = group_moments(first_channel + c, second_channel + c, size, problem.positions);
      const float inverse = inverse_deviation(of, problem.eps);
      feature_map.set(c, size, of.mean, inverse);
      if (stats == nullptr) continue;
      stats[group * 4] = static_cast<float>(of.mean);
      stats[group * 4 + 1] = inverse;
    }
  }

  // returns the root mean square of the sample
  FS_ALWAYS_INLINE double finish_gradient(const double* from, float* stats) const {
    to_floats(problem.gradient_weight, problem.parameter_dtype, 0, problem.channels, gradient_map.weight);
    to_floats(problem.gradient_bias, problem.parameter_dtype, 0, problem.channels, gradient_map.shift);
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

  void second(int64_t sample, int64_t block) const {
    const Range rows = blocks.rows_of(block);
    T* to = out.data + sample * out.batch;
    map_block(feature, feature_last, feature_map, sample, rows, to);
    map_block(gradient, gradient_last, gradient_map, sample, rows, to + problem.channels);
  }

  FS_ALWAYS_INLINE void map_block(const Tensor<const T>& x, bool last, const Map& map, int64_t sample, Range rows,
                                  T* to) const {
    const T* from = x.data + sample * x.batch;
    if (last) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        map.row(from + row * x.position, to + row * out.position, problem.channels);
      }
      return;
    }
    for (int64_t begin = rows.begin; begin < rows.end; begin += kTile) {
      const int64_t count = rows.end - begin < kTile ? rows.end - begin : kTile;
      for (int64_t c = 0; c < problem.channels; ++c) {
        const T* run = from + c * x.channel + begin * x.position;
        for (int64_t i = 0; i < count; ++i) tile[i * problem.channels + c] = run[i];
      }
      for (int64_t i = 0; i < count; ++i) {
        map.row(tile + i * problem.channels, to + (begin + i) * out.position, problem.channels);
      }
    }
  }
};

template <class T>
int run(const Problem& problem, Tensor<const T> feature, Tensor<const T> gradient, Tensor<T> out) {
  const Blocks blocks = blocks_of(problem.positions);
  const int64_t step = padded(problem.channels);
  const int threads =
      threads_for(2 * problem.batch * problem.channels * problem.positions, problem.batch * blocks.count);
  const int64_t partial_size = slots_of(threads) * blocks.count * 2 * step;
  void* memory =
      scratch(Carver::bytes<float>(partial_size) + Carver::bytes<double>(partial_size) +
              Carver::bytes<float>(threads * 8 * step) + Carver::bytes<double>(threads * 2 * step) +
              Carver::bytes<T>(threads * kTile * step));
  if (memory == nullptr) return FS_NO_MEMORY;
  Carver carver(memory);
  float* moments = carver.take<float>(partial_size);
  double* sums = carver.take<double>(partial_size);
  float* maps = carver.take<float>(threads * 8 * step);
  double* channels = carver.take<double>(threads * 2 * step);
  T* tiles = carver.take<T>(threads * kTile * step);
  parallel(threads, [&](Team team) {
    float* map = maps + team.id * 8 * step;
    double* own = channels + team.id * 2 * step;
    Taps<T> work{problem,
                 feature,
                 gradient,
                 is_channels_last(problem.channels, problem.positions, feature),
                 is_channels_last(problem.channels, problem.positions, gradient),
                 out,
                 blocks,
                 step,
                 moments,
                 sums,
                 Map(map, step),
                 Map(map + 4 * step, step),
                 own,
                 own + step,
                 tiles + team.id * kTile * step};
    two_passes(team, problem.batch, blocks.count, work);
  });
  return FS_OK;
}

}  // namespace

int tap_norm(const void* feature, int64_t f_batch, int64_t f_channel, int64_t f_position, const void* gradient,
             int64_t g_batch, int64_t g_channel, int64_t g_position, void* taps, int64_t taps_batch,
             int64_t taps_position, int dtype, const void* feature_weight, const void* feature_bias,
             const void* gradient_weight, const void* gradient_bias, int parameter_dtype, float* log_rms, float* stats,
             int64_t batch, int64_t channels, int64_t positions, int64_t groups, double eps) {
  const Problem problem{feature_weight, feature_bias, gradient_weight, gradient_bias, parameter_dtype, log_rms, stats,
                        batch,          channels,     positions,       groups,        eps};
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return run(problem, Tensor<const T>{static_cast<const T*>(feature), f_batch, f_channel, f_position},
               Tensor<const T>{static_cast<const T*>(gradient), g_batch, g_channel, g_position},
               Tensor<T>{static_cast<T*>(taps), taps_batch, 1, taps_position});
  });
}

}  // namespace fs::FS_ISA
