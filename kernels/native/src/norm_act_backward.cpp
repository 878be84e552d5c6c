// Vector-Jacobian product of norm_act in two passes over memory: the sums that the means of a group
// need, then the gradient. With xhat = (x - mean) * rstd, z = scale * xhat + shift and dz = grad *
// act'(z),
//   grad_x = rstd * (scale * dz - mean_g(scale * dz) - xhat * mean_g(scale * dz * xhat)).
#include "vjp_contiguous.h"

namespace fs::FS_ISA {
namespace {

struct Kept {
  float* data;
  int64_t stride, copy;  // from one position and from one cotangent to the next

  FS_ALWAYS_INLINE Kept from(int64_t channel) const {
    return {data == nullptr ? data : data + channel, stride, copy};
  }
};

// Sums over a block for K cotangents of one vector of channels from c on; cotangent k is at g + k *
// g_copy.
template <int K, bool Act, bool Partial, bool Keep, class T>
FS_INLINE void strip_sums(const T* x, int64_t x_stride, const T* g, int64_t g_stride,
                          int64_t g_copy, Kept kept, int64_t rows, int lanes,
                          const Coefficients& at, int64_t c, float* plain, float* hat,
                          int64_t sums_copy) {
  const Vf mean = load(at.mean + c), rstd = load(at.rstd + c), scale = load(at.scale + c),
           shift = load(at.shift + c);
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
  const VjpProblem& problem;
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
  FS_ALWAYS_INLINE void sums(int64_t sample, int64_t slot, int64_t copy, Range rows,
                             float* to) const {
    const T* from_x = x.data + sample * x.batch + rows.begin * x.position;
    const int64_t row = copy * problem.batch + sample, count = rows.end - rows.begin;
    const T* from_g = grad.data + row * grad.batch + rows.begin * grad.position;
    const int64_t g_copy = problem.batch * grad.batch;
    const Kept kept = Keep ? kept_rows(sample, slot, copy, rows.begin) : Kept{nullptr, 0, 0};
    const int64_t whole = problem.channels / kLanes * kLanes;
    for (int64_t c = 0; c < whole; c += kLanes) {
      strip_sums<K, Act, false, Keep>(from_x + c, x.position, from_g + c, grad.position, g_copy,
                                      kept.from(c), count, kLanes, at, c, to + c, to + at.step + c,
                                      2 * at.step);
    }
    if (whole < problem.channels) {
      strip_sums<K, Act, true, Keep>(from_x + whole, x.position, from_g + whole, grad.position,
                                     g_copy, kept.from(whole), count,
                                     static_cast<int>(problem.channels - whole), at, whole,
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
    for (; copy + 2 <= problem.copies; copy += 2)
      sums<2>(sample, slot, copy, rows, partial_of(slot, block, copy));
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
      for (int64_t group = 0; group < problem.groups; ++group)
        at.load_sums(problem, copy, group, plain, hat);
      if (!owner || problem.sums == nullptr) continue;
      float* to = problem.sums + (copy * problem.batch + sample) * problem.channels;
      for (int64_t c = 0; c < problem.channels; ++c) {
        to[c] = static_cast<float>(plain[c]);
        to[all * problem.channels + c] = static_cast<float>(hat[c]);
      }
    }
  }

  template <bool Partial>
  FS_ALWAYS_INLINE void gradient(const T* from_x, const T* from_g, const float* kept, T* to,
                                 int64_t c, int64_t copy, int lanes) const {
    const auto get = [&](const auto* p) { return Partial ? load(p + c, lanes) : load(p + c); };
    const Vf deviation = get(from_x) - load(at.mean + c);
    Vf dz;
    if constexpr (Keep) {
      dz = get(kept);
    } else {
      dz = get(from_g) * slope_of<Act>(fma(deviation * load(at.rstd + c), load(at.scale + c),
                                           load(at.shift + c)));
    }
    const Vf rest =
        fma(deviation, load(at.slope + copy * at.step + c), load(at.offset + copy * at.step + c));
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
        for (int64_t c = 0; c < whole; c += kLanes)
          gradient<false>(from_x, from_g, kept, to, c, copy, kLanes);
        if (rest > 0) gradient<true>(from_x, from_g, kept, to, whole, copy, rest);
      }
    }
  }
};

template <bool Act, bool Keep, class T>
int channels_last(const VjpProblem& problem, Tensor<const T> grad, Tensor<const T> x,
                  Tensor<T> out) {
  const Blocks blocks = blocks_of(problem.positions);
  const int64_t step = padded(problem.channels), arrays = Coefficients::arrays(problem.copies);
  const int threads =
      threads_for(problem.copies * problem.batch * problem.channels * problem.positions,
                  problem.batch * blocks.count);
  const int64_t partial_size = slots_of(threads) * blocks.count * problem.copies * 2 * step;
  const int64_t stash =
      stash_size<Keep, T>(slots_of(threads) * problem.copies * problem.positions * step);
  void* memory =
      scratch(Carver::bytes<float>(partial_size) + Carver::bytes<float>(threads * arrays * step) +
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
        problem, grad,
        x,       out,
        blocks,  partial,
        kept,    Coefficients(coefficients + team.id * arrays * step, step, problem.copies),
        own,     own + step};
    two_passes(team, problem.batch, blocks.count, work);
  });
  return FS_OK;
}

template <bool Act, bool Keep, class T>
int run(const VjpProblem& problem, Tensor<const T> grad, Tensor<const T> x, Tensor<T> out) {
  const bool last = out.data == nullptr
                        ? is_channels_last(problem.channels, problem.positions, grad, x)
                        : is_channels_last(problem.channels, problem.positions, grad, x, out);
  return last ? channels_last<Act, Keep>(problem, grad, x, out)
              : contiguous<Act, Keep>(problem, grad, x, out);
}

}  // namespace

int norm_act_backward(const void* grad, int64_t g_batch, int64_t g_channel, int64_t g_position,
                      const void* x, int64_t x_batch, int64_t x_channel, int64_t x_position,
                      void* grad_x, int64_t o_batch, int64_t o_channel, int64_t o_position,
                      int dtype, const void* weight, const void* bias, int parameter_dtype,
                      const void* film, int64_t film_stride, int film_dtype, const float* mean,
                      const float* rstd, float* sums, int64_t batch, int64_t copies,
                      int64_t channels, int64_t positions, int64_t groups, int act) {
  const VjpProblem problem{{weight, bias, parameter_dtype, film, film_stride, film_dtype, channels},
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
    const bool keep =
        sizeof(T) == sizeof(float) || copies * padded(channels) * positions <= kMostKept;
    if (keep && act && grad_x != nullptr) return run<true, true>(problem, g, from, to);
    return act ? run<true, false>(problem, g, from, to) : run<false, false>(problem, g, from, to);
  });
}

}  // namespace fs::FS_ISA
