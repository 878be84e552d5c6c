// Group normalisation, affine, film and SiLU in two passes over memory: moments, then the map.
#include "moments.h"

namespace fs::FS_ISA {
namespace {

struct Problem {
  Affine affine;
  float *mean, *rstd;  // [B, groups] or null
  int64_t batch, channels, positions, groups;
  double eps;
};

template <bool Act>
FS_INLINE Vf map(Vf x, Vf mean, Vf scale, Vf shift) {
  // subtracted first: with a mean far from 0, x * scale + shift would cancel
  const Vf z = fma(x - mean, scale, shift);
  return Act ? silu(z) : z;
}

template <bool Act, class T>
FS_INLINE void map_rows(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows,
                        int64_t channels, const float* mean, const float* scale,
                        const float* shift) {
  const int64_t whole = channels / kLanes * kLanes;
  const int rest = static_cast<int>(channels - whole);
  for (int64_t row = 0; row < rows; ++row, x += x_stride, y += y_stride) {
    for (int64_t c = 0; c < whole; c += kLanes) {
      store(y + c, map<Act>(load(x + c), load(mean + c), load(scale + c), load(shift + c)));
    }
    if (rest > 0) {
      store(y + whole,
            map<Act>(load(x + whole, rest), load(mean + whole), load(scale + whole),
                     load(shift + whole)),
            rest);
    }
  }
}

// One thread's part of a channels-last tensor.
template <bool Act, class T>
struct ChannelsLast {
  const Problem& problem;
  Tensor<const T> x;
  Tensor<T> y;
  Blocks blocks;
  float* partial;                       // [slots, blocks, 2, padded]
  float *mean, *scale, *shift, *spare;  // [padded]
  double *channel_mean, *channel_squares;

  FS_ALWAYS_INLINE float* moments_of(int64_t slot, int64_t block) const {
    return partial + (slot * blocks.count + block) * 2 * padded(problem.channels);
  }

  FS_ALWAYS_INLINE void first(int64_t sample, int64_t slot, int64_t block) const {
    const Range rows = blocks.rows_of(block);
    float* out = moments_of(slot, block);
    block_moments(x.data + sample * x.batch + rows.begin * x.position, x.position,
                  rows.end - rows.begin, problem.channels, out, out + padded(problem.channels));
  }

  void finish(int64_t sample, int64_t slot, bool owner) const {
    const float* from = moments_of(slot, 0);
    const int64_t step = padded(problem.channels), size = problem.channels / problem.groups;
    merge_blocks(from, from + step, 2 * step, blocks, problem.channels, channel_mean,
                 channel_squares);
    problem.affine.fold(sample, scale, shift, mean, spare);
    for (int64_t group = 0; group < problem.groups; ++group) {
      const int64_t c = group * size;
      const Moments moments =
          group_moments(channel_mean + c, channel_squares + c, size, problem.positions);
      const float center = static_cast<float>(moments.mean),
                  inverse = inverse_deviation(moments, problem.eps);
      // what rounding the mean leaves out
      const float rest = static_cast<float>(moments.mean - center);
      for (int64_t i = c; i < c + size; ++i) {
        mean[i] = center;
        scale[i] *= inverse;
        shift[i] -= rest * scale[i];
      }
      if (owner && problem.mean) problem.mean[sample * problem.groups + group] = center;
      if (owner && problem.rstd) problem.rstd[sample * problem.groups + group] = inverse;
    }
  }

  FS_ALWAYS_INLINE void second(int64_t sample, int64_t, int64_t block) const {
    const Range rows = blocks.rows_of(block);
    map_rows<Act>(x.data + sample * x.batch + rows.begin * x.position, x.position,
                  y.data + sample * y.batch + rows.begin * y.position, y.position,
                  rows.end - rows.begin, problem.channels, mean, scale, shift);
  }
};

template <bool Act, class T>
int channels_last(const Problem& problem, Tensor<const T> x, Tensor<T> y) {
  const Blocks blocks = blocks_of(problem.positions);
  const int64_t step = padded(problem.channels);
  const int threads = threads_for(problem.batch * problem.channels * problem.positions,
                                  problem.batch * blocks.count);
  const int64_t partial_size = slots_of(threads) * blocks.count * 2 * step;
  void* memory = scratch(Carver::bytes<float>(partial_size) +
                         static_cast<size_t>(threads) *
                             (Carver::bytes<float>(4 * step) + Carver::bytes<double>(2 * step)));
  if (memory == nullptr) return FS_NO_MEMORY;
  Carver carver(memory);
  float* partial = carver.take<float>(partial_size);
  float* coefficients = carver.take<float>(threads * 4 * step);
  double* channels = carver.take<double>(threads * 2 * step);
  parallel(threads, [&](Team team) {
    float* own = coefficients + team.id * 4 * step;
    double* sums = channels + team.id * 2 * step;
    ChannelsLast<Act, T> work{problem,        x,    y,          blocks,
                              partial,        own,  own + step, own + 2 * step,
                              own + 3 * step, sums, sums + step};
    two_passes(team, problem.batch, blocks.count, work);
  });
  return FS_OK;
}

template <bool Act, class T>
FS_INLINE void map_run(const T* x, T* y, int64_t count, Vf mean, Vf scale, Vf shift) {
  const int64_t whole = count / kLanes * kLanes;
  const int rest = static_cast<int>(count - whole);
  for (int64_t i = 0; i < whole; i += kLanes)
    store(y + i, map<Act>(load(x + i), mean, scale, shift));
  if (rest > 0) store(y + whole, map<Act>(load(x + whole, rest), mean, scale, shift), rest);
}

// Groups are contiguous in memory here: a thread takes whole ones.
template <bool Act, class T>
int contiguous(const Problem& problem, Tensor<const T> x, Tensor<T> y) {
  const int64_t groups = problem.groups, items = problem.batch * groups,
                size = problem.channels / groups;
  const int64_t step = padded(problem.channels);
  const int threads = threads_for(problem.batch * problem.channels * problem.positions, items);
  float* memory =
      static_cast<float*>(scratch(static_cast<size_t>(threads) * Carver::bytes<float>(4 * step)));
  if (memory == nullptr) return FS_NO_MEMORY;
  parallel(threads, [&](Team team) {
    float* scale = memory + team.id * 4 * step;
    float* shift = scale + step;
    const Range mine = team.share(items);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t sample = item / groups, begin = item % groups * size;
      if (item == mine.begin || begin == 0) {
        problem.affine.fold(sample, scale, shift, scale + 2 * step, scale + 3 * step);
      }
      const T* from = x.data + sample * x.batch + begin * x.channel;
      T* to = y.data + sample * y.batch + begin * y.channel;
      const Moments moments = rows_moments(from, x.channel, size, problem.positions);
      const float mean = static_cast<float>(moments.mean),
                  rstd = inverse_deviation(moments, problem.eps);
      const float rest = static_cast<float>(moments.mean - mean);
      for (int64_t c = 0; c < size; ++c) {
        const float factor = rstd * scale[begin + c];
        map_run<Act>(from + c * x.channel, to + c * y.channel, problem.positions, broadcast(mean),
                     broadcast(factor), broadcast(shift[begin + c] - rest * factor));
      }
      if (problem.mean) problem.mean[item] = mean;
      if (problem.rstd) problem.rstd[item] = rstd;
    }
  });
  return FS_OK;
}

template <bool Act, class T>
int run(const Problem& problem, Tensor<const T> x, Tensor<T> y) {
  return is_channels_last(problem.channels, problem.positions, x, y)
             ? channels_last<Act>(problem, x, y)
             : contiguous<Act>(problem, x, y);
}

}  // namespace

int norm_act(const void* x, int64_t x_batch, int64_t x_channel, int64_t x_position, void* y,
             int64_t y_batch, int64_t y_channel, int64_t y_position, int dtype, const void* weight,
             const void* bias, int parameter_dtype, const void* film, int64_t film_stride,
             int film_dtype, float* mean, float* rstd, int64_t batch, int64_t channels,
             int64_t positions, int64_t groups, int act, double eps) {
  const Problem problem{{weight, bias, parameter_dtype, film, film_stride, film_dtype, channels},
                        mean,
                        rstd,
                        batch,
                        channels,
                        positions,
                        groups,
                        eps};
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Tensor<const T> from{static_cast<const T*>(x), x_batch, x_channel, x_position};
    const Tensor<T> to{static_cast<T*>(y), y_batch, y_channel, y_position};
    return act ? run<true>(problem, from, to) : run<false>(problem, from, to);
  });
}

}  // namespace fs::FS_ISA
