// Vector-Jacobian product of norm_act in two passes over memory: the sums that the means of a group need,
// then the gradient. With xhat = (x - mean) * rstd, z = scale * xhat + shift and dz = grad * act'(z),
//   grad_x = rstd * (scale * dz - mean_g(scale * dz) - xhat * mean_g(scale * dz * xhat)).
#include "norm.h"

namespace fs::FS_ISA {
namespace {

struct Problem {
  Affine affine;
  const float *mean, *rstd;  // [B, groups]
  float* sums;               // [2, copies * B, C] or null
  int64_t batch, copies, channels, positions, groups;
};

// Per-channel values of a sample, [padded] each, and of each of its cotangents.
struct Coefficients {
  float *mean, *rstd, *scale, *shift;  // scale, shift: of xhat
  float *factor;                       // rstd * scale
  float *offset, *slope;               // [copies, padded]: grad_x = factor * dz + offset + slope * (x - mean)
  int64_t step;

  FS_ALWAYS_INLINE static int64_t arrays(int64_t copies) { return 5 + 2 * copies; }
  FS_ALWAYS_INLINE Coefficients(float* p, int64_t step, int64_t copies)
      : mean(p),
        rstd(p + step),
        scale(p + 2 * step),
        shift(p + 3 * step),
        factor(p + 4 * step),
        offset(p + 5 * step),
        slope(p + (5 + copies) * step),
        step(step) {}

  // what does not depend on the cotangent
  void load_sample(const Problem& problem, int64_t sample) const {
    problem.affine.fold(sample, scale, shift, mean, rstd);
    const int64_t size = problem.channels / problem.groups;
    for (int64_t group = 0; group < problem.groups; ++group) {
      const float center = problem.mean[sample * problem.groups + group];
      const float inverse = problem.rstd[sample * problem.groups + group];
      for (int64_t c = group * size; c < (group + 1) * size; ++c) {
        mean[c] = center;
        rstd[c] = inverse;
        factor[c] = inverse * scale[c];
      }
    }
  }

  // what the sums over positions of dz and dz * xhat of a group's channels determine
  FS_ALWAYS_INLINE void load_sums(const Problem& problem, int64_t copy, int64_t group, const double* plain, const double* hat) const {
    const int64_t size = problem.channels / problem.groups, begin = group * size;
    double first = 0.0, second = 0.0;
    for (int64_t c = begin; c < begin + size; ++c) {
      first += plain[c] * scale[c];
      second += hat[c] * scale[c];
    }
    const double inverse = rstd[begin], count = static_cast<double>(size) * static_cast<double>(problem.positions);
    const float constant = static_cast<float>(-inverse * first / count);
    const float linear = static_cast<float>(-inverse * inverse * second / count);
    for (int64_t c = begin; c < begin + size; ++c) {
      offset[copy * step + c] = constant;
      slope[copy * step + c] = linear;
    }
  }
};

// act'(z)
template <bool Act>
FS_INLINE Vf slope_of(Vf z) {
  if (!Act) return broadcast(1.0f);
  const Vf s = sigmoid(z);
  return fma(z * s, broadcast(1.0f) - s, s);
}

// The first pass may keep dz, which saves the second the activation: where grad_x goes if that is fp32, else
// in scratch memory, as long as that stays below this many floats a sample.
constexpr int64_t kMostKept = int64_t{1} << 20;

struct Kept {
  float* data;
  int64_t stride, copy;  // from one position and from one cotangent to the next

  FS_ALWAYS_INLINE Kept from(int64_t channel) const { return {data == nullptr ? data : data + channel, stride, copy}; }
};

// Sums over a block for K cotangents of one vector of channels from c on; cotangent k is at g + k * g_copy.
template <int K, bool Act, bool Partial, bool Keep, class T>
FS_INLINE void strip_sums(const T* x, int64_t x_stride, const T* g, int64_t g_stride, int64_t g_copy, Kept kept,
                          int64_t rows, int lanes, const Coefficients& at,
                          int64_t c, float* plain, float* hat, int64_t sums_copy) {
  const Vf mean = load(at.mean + c), rstd = load(at.rstd + c), scale = load(at.scale + c), shift = load(at.shift + c);
  Vf first[K] = {}, second[K] = {};
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * x_stride;
    const Vf xhat = ((Partial ? load(from, lanes) : load(from)) - mean) * rstd;
    const Vf slope = slope_of<Act>(fma(xhat, scale, shift));
    for (int k = 0; k < K; ++k) {
      const T* p = g + row * g_stride + k * g_copy;
      const Vf dz = (Partial ? load(p, lanes) : load(p)) * slope;
      first[k] += dz;
      second[k] = fma(dz, xhat, second[k]);
      if (Keep) {
        float* to = kept.data + row * kept.stride + k * kept.copy;
        if (Partial) {
          store(to, dz, lanes);
        } else {
          store(to, dz);
        }
      }
    }
  }
  for (int k = 0; k < K; ++k) {
    store(plain + k * sums_copy, first[k]);
    store(hat + k * sums_copy, second[k]);
  }
}

// One thread's part of a channels-last tensor.
template <bool Act, bool Keep, class T>
struct ChannelsLast {
  const Problem& problem;
  Tensor<const T> grad, x;
  Tensor<T> out;  // data null: no gradient wanted
  Blocks blocks;
  float* partial;  // [slots, blocks, copies, 2, step]
  float* stash;    // [slots, copies, positions, step], null where nothing is kept there
  Coefficients at;
  double *plain, *hat;  // [step]
  int64_t loaded = -1;

  FS_ALWAYS_INLINE void prepare(int64_t sample) {
    if (loaded != sample) at.load_sample(problem, sample);
    loaded = sample;
  }

  template <int K>
  FS_ALWAYS_INLINE void sums(int64_t sample, int64_t slot, int64_t copy, Range rows, float* to) const {
    const T* from_x = x.data + sample * x.batch + rows.begin * x.position;
    const int64_t row = copy * problem.batch + sample, count = rows.end - rows.begin;
    const T* from_g = grad.data + row * grad.batch + rows.begin * grad.position;
    const int64_t g_copy = problem.batch * grad.batch;
    const Kept kept = Keep ? kept_rows(sample, slot, copy, rows.begin) : Kept{nullptr, 0, 0};
    const int64_t whole = problem.channels / kLanes * kLanes;
    for (int64_t c = 0; c < whole; c += kLanes) {
      strip_sums<K, Act, false, Keep>(from_x + c, x.position, from_g + c, grad.position, g_copy, kept.from(c), count,
                                      kLanes, at, c, to + c, to + at.step + c, 2 * at.step);
    }
    if (whole < problem.channels) {
      strip_sums<K, Act, true, Keep>(from_x + whole, x.position, from_g + whole, grad.position, g_copy,
                                     kept.from(whole), count, static_cast<int>(problem.channels - whole), at, whole,
                                     to + whole, to + at.step + whole, 2 * at.step);
    }
  }

  FS_ALWAYS_INLINE Kept kept_rows(int64_t sample, int64_t slot, int64_t copy, int64_t row) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      float* data = out.data + (copy * problem.batch + sample) * out.batch + row * out.position;
      return {data, out.position, problem.batch * out.batch};
    } else {
      float* data = stash + ((slot * problem.copies + copy) * problem.positions + row) * at.step;
      return {data, at.step, problem.positions * at.step};
    }
  }

  FS_ALWAYS_INLINE float* partial_of(int64_t slot, int64_t block, int64_t copy) const {
    return partial + ((slot * blocks.count + block) * problem.copies + copy) * 2 * at.step;
  }

  void first(int64_t sample, int64_t slot, int64_t block) {
    prepare(sample);
    const Range rows = blocks.rows_of(block);
    int64_t copy = 0;
    // two cotangents share what depends on x alone
    for (; copy + 2 <= problem.copies; copy += 2) sums<2>(sample, slot, copy, rows, partial_of(slot, block, copy));
    if (copy < problem.copies) sums<1>(sample, slot, copy, rows, partial_of(slot, block, copy));
  }

  void finish(int64_t sample, int64_t slot, bool owner) {
    prepare(sample);
    const int64_t all = problem.copies * problem.batch;
    for (int64_t copy = 0; copy < problem.copies; ++copy) {
      for (int64_t c = 0; c < problem.channels; c += kLanes) {
        Vd first = broadcast_double(0.0), second = first;
        for (int64_t block = 0; block < blocks.count; ++block) {
          const float* from = partial_of(slot, block, copy) + c;
          first = add(first, widen(load(from)));
          second = add(second, widen(load(from + at.step)));
        }
        store(plain + c, first);
        store(hat + c, second);
      }
      for (int64_t group = 0; group < problem.groups; ++group) at.load_sums(problem, copy, group, plain, hat);
      if (!owner || problem.sums == nullptr) continue;
      float* to = problem.sums + (copy * problem.batch + sample) * problem.channels;
      for (int64_t c = 0; c < problem.channels; ++c) {
        to[c] = static_cast<float>(plain[c]);
        to[all * problem.channels + c] = static_cast<float>(hat[c]);
      }
    }
  }

  template <bool Partial>
  FS_ALWAYS_INLINE void gradient(const T* from_x, const T* from_g, const float* kept, T* to, int64_t c, int64_t copy,
                                 int lanes) const {
    const auto get = [&](const auto* p) { return Partial ? load(p + c, lanes) : load(p + c); };
    const Vf deviation = get(from_x) - load(at.mean + c);
    Vf dz;
    if constexpr (Keep) {
      dz = get(kept);
    } else {
      dz = get(from_g) *
           slope_of<Act>(fma(deviation * load(at.rstd + c), load(at.scale + c), load(at.shift + c)));
    }
    const Vf rest = fma(deviation, load(at.slope + copy * at.step + c), load(at.offset + copy * at.step + c));
    store_lanes(to + c, fma(dz, load(at.factor + c), rest), Partial ? lanes : kLanes);
  }

  void second(int64_t sample, int64_t slot, int64_t block) const {
    if (out.data == nullptr) return;
    const Range rows = blocks.rows_of(block);
    const int64_t whole = problem.channels / kLanes * kLanes;
    const int rest = static_cast<int>(problem.channels - whole);
    for (int64_t copy = 0; copy < problem.copies; ++copy) {
      const int64_t index = copy * problem.batch + sample;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const T* from_x = x.data + sample * x.batch + row * x.position;
        const T* from_g = grad.data + index * grad.batch + row * grad.position;
        const float* kept = Keep ? kept_rows(sample, slot, copy, row).data : nullptr;
        T* to = out.data + index * out.batch + row * out.position;
        for (int64_t c = 0; c < whole; c += kLanes) gradient<false>(from_x, from_g, kept, to, c, copy, kLanes);
        if (rest > 0) gradient<true>(from_x, from_g, kept, to, whole, copy, rest);
      }
    }
  }
};

// floats of scratch memory that dz takes
template <bool Keep, class T>
FS_INLINE int64_t stash_size(int64_t floats) {
  return Keep && sizeof(T) != sizeof(float) ? floats : 0;
}

template <bool Act, bool Keep, class T>
int channels_last(const Problem& problem, Tensor<const T> grad, Tensor<const T> x, Tensor<T> out) {
  const Blocks blocks = blocks_of(problem.positions);
  const int64_t step = padded(problem.channels), arrays = Coefficients::arrays(problem.copies);
  const int threads = threads_for(problem.copies * problem.batch * problem.channels * problem.positions,
                                  problem.batch * blocks.count);
  const int64_t partial_size = slots_of(threads) * blocks.count * problem.copies * 2 * step;
  const int64_t stash = stash_size<Keep, T>(slots_of(threads) * problem.copies * problem.positions * step);
  void* memory = scratch(Carver::bytes<float>(partial_size) + Carver::bytes<float>(threads * arrays * step) +
                         Carver::bytes<double>(threads * 2 * step) + Carver::bytes<float>(stash));
  if (memory == nullptr) return FS_NO_MEMORY;
  Carver carver(memory);
  float* partial = carver.take<float>(partial_size);
  float* coefficients = carver.take<float>(threads * arrays * step);
  double* sums = carver.take<double>(threads * 2 * step);
  float* kept = carver.take<float>(stash);
  parallel(threads, [&](Team team) {
    double* own = sums + team.id * 2 * step;
    ChannelsLast<Act, Keep, T> work{
        problem, grad, x, out, blocks, partial, kept,
        Coefficients(coefficients + team.id * arrays * step, step, problem.copies), own, own + step};
    two_passes(team, problem.batch, blocks.count, work);
  });
  return FS_OK;
}

// One channel's row of positions: the sums of dz and dz * xhat, added up in double precision every few vectors.
template <bool Act, bool Keep, class T>
FS_INLINE void run_sums(const T* x, const T* g, float* kept, int64_t count, const Coefficients& at, int64_t c,
                        double* plain, double* hat) {
  constexpr int64_t kChunk = 64 * kLanes;
  const Vf mean = broadcast(at.mean[c]), rstd = broadcast(at.rstd[c]);
  const Vf scale = broadcast(at.scale[c]), shift = broadcast(at.shift[c]);
  plain[c] = hat[c] = 0.0;
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t end = count - begin < kChunk ? count : begin + kChunk;
    const int64_t whole = begin + (end - begin) / kLanes * kLanes;
    Vf first = zero(), second = zero();
    const auto add = [&](Vf value, Vf cotangent) {
      const Vf xhat = (value - mean) * rstd;
      const Vf dz = cotangent * slope_of<Act>(fma(xhat, scale, shift));
      first += dz;
      second = fma(dz, xhat, second);
      return dz;
    };
    for (int64_t i = begin; i < whole; i += kLanes) {
      const Vf dz = add(load(x + i), load(g + i));
      if (Keep) store(kept + i, dz);
    }
    if (whole < end) {
      // lanes beyond the end have a cotangent of 0
      const int rest = static_cast<int>(end - whole);
      const Vf dz = add(load(x + whole, rest), load(g + whole, rest));
      if (Keep) store(kept + whole, dz, rest);
    }
    plain[c] += sum(first);
    hat[c] += sum(second);
  }
}

template <bool Act, bool Keep, class T>
FS_INLINE void run_gradient(const T* x, const T* g, const float* kept, T* out, int64_t count, const Coefficients& at,
                            int64_t c, int64_t copy) {
  const Vf mean = broadcast(at.mean[c]), rstd = broadcast(at.rstd[c]), scale = broadcast(at.scale[c]);
  const Vf shift = broadcast(at.shift[c]), factor = broadcast(at.factor[c]);
  const Vf offset = broadcast(at.offset[copy * at.step + c]), slope = broadcast(at.slope[copy * at.step + c]);
  const auto result = [&](Vf value, Vf cotangent) {
    const Vf deviation = value - mean;
    const Vf dz = Keep ? cotangent : cotangent * slope_of<Act>(fma(deviation * rstd, scale, shift));
    return fma(dz, factor, fma(deviation, slope, offset));
  };
  const auto run = [&](const auto* source) {
    const int64_t whole = count / kLanes * kLanes;
    const int rest = static_cast<int>(count - whole);
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, result(load(x + i), load(source + i)));
    if (rest > 0) store(out + whole, result(load(x + whole, rest), load(source + whole, rest)), rest);
  };
  if constexpr (Keep) {
    run(kept);
  } else {
    run(g);
  }
}

// Groups are contiguous in memory here: a thread takes whole ones, with all their cotangents.
template <bool Act, bool Keep, class T>
int contiguous(const Problem& problem, Tensor<const T> grad, Tensor<const T> x, Tensor<T> out) {
  const int64_t groups = problem.groups, items = problem.batch * groups, size = problem.channels / groups;
  const int64_t step = padded(problem.channels), arrays = Coefficients::arrays(problem.copies);
  const int threads = threads_for(problem.copies * problem.batch * problem.channels * problem.positions, items);
  const int64_t stash = stash_size<Keep, T>(size * problem.positions);
  void* memory = scratch(Carver::bytes<float>(threads * arrays * step) + Carver::bytes<double>(threads * 2 * step) +
                         Carver::bytes<float>(threads * stash));
  if (memory == nullptr) return FS_NO_MEMORY;
  Carver carver(memory);
  float* coefficients = carver.take<float>(threads * arrays * step);
  double* sums = carver.take<double>(threads * 2 * step);
  float* stashes = carver.take<float>(threads * stash);
  parallel(threads, [&](Team team) {
    const Coefficients at(coefficients + team.id * arrays * step, step, problem.copies);
    double *plain = sums + team.id * 2 * step, *hat = plain + step;
    const Range mine = team.share(items);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const int64_t sample = item / groups, group = item % groups, begin = group * size;
      if (item == mine.begin || group == 0) at.load_sample(problem, sample);
      for (int64_t copy = 0; copy < problem.copies; ++copy) {
        const int64_t row = copy * problem.batch + sample;
        const auto x_row = [&](int64_t c) { return x.data + sample * x.batch + c * x.channel; };
        const auto grad_row = [&](int64_t c) { return grad.data + row * grad.batch + c * grad.channel; };
        const auto out_row = [&](int64_t c) { return out.data + row * out.batch + c * out.channel; };
        const auto kept_row = [&](int64_t c) -> float* {
          if constexpr (!Keep) return nullptr;
          if constexpr (sizeof(T) == sizeof(float)) return reinterpret_cast<float*>(out_row(c));
          return stashes + team.id * stash + (c - begin) * problem.positions;
        };
        for (int64_t c = begin; c < begin + size; ++c) {
          run_sums<Act, Keep>(x_row(c), grad_row(c), kept_row(c), problem.positions, at, c, plain, hat);
          if (problem.sums == nullptr) continue;
          problem.sums[row * problem.channels + c] = static_cast<float>(plain[c]);
          problem.sums[(problem.copies * problem.batch + row) * problem.channels + c] = static_cast<float>(hat[c]);
        }
        if (out.data == nullptr) continue;
        at.load_sums(problem, copy, group, plain, hat);
        for (int64_t c = begin; c < begin + size; ++c) {
          run_gradient<Act, Keep>(x_row(c), grad_row(c), kept_row(c), out_row(c), problem.positions, at, c, copy);
        }
      }
    }
  });
  return FS_OK;
}

template <bool Act, bool Keep, class T>
int run(const Problem& problem, Tensor<const T> grad, Tensor<const T> x, Tensor<T> out) {
  const bool last = out.data == nullptr ? is_channels_last(problem.channels, problem.positions, grad, x)
                                        : is_channels_last(problem.channels, problem.positions, grad, x, out);
  return last ? channels_last<Act, Keep>(problem, grad, x, out) : contiguous<Act, Keep>(problem, grad, x, out);
}

}  // namespace

int norm_act_backward(const void* grad, int64_t g_batch, int64_t g_channel, int64_t g_position, const void* x,
                      int64_t x_batch, int64_t x_channel, int64_t x_position, void* grad_x, int64_t o_batch,
                      int64_t o_channel, int64_t o_position, int dtype, const void* weight, const void* bias,
                      int parameter_dtype, const void* film, int64_t film_stride, int film_dtype, const float* mean,
                      const float* rstd, float* sums, int64_t batch, int64_t copies, int64_t channels,
                      int64_t positions, int64_t groups, int act) {
  const Problem problem{{weight, bias, parameter_dtype, film, film_stride, film_dtype, channels},
                        mean,
                        rstd,
                        sums,
                        batch,
                        copies,
                        channels,
                        positions,
                        groups};
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Tensor<const T> g{static_cast<const T*>(grad), g_batch, g_channel, g_position};
    const Tensor<const T> from{static_cast<const T*>(x), x_batch, x_channel, x_position};
    const Tensor<T> to{static_cast<T*>(grad_x), o_batch, o_channel, o_position};
    const bool keep = sizeof(T) == sizeof(float) || copies * padded(channels) * positions <= kMostKept;
    if (keep && act && grad_x != nullptr) return run<true, true>(problem, g, from, to);
    return act ? run<true, false>(problem, g, from, to) : run<false, false>(problem, g, from, to);
  });
}

}  // namespace fs::FS_ISA
