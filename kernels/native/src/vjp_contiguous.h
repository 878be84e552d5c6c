// The vector-Jacobian product of norm_act for contiguous tensors.
#ifndef FASTSCORE_VJP_CONTIGUOUS_H
#define FASTSCORE_VJP_CONTIGUOUS_H

#include "vjp.h"

namespace fs::FS_ISA {

// One channel's row of positions: the sums of dz and dz * xhat, added up in double precision every
// few vectors.
template <bool Act, bool Keep, class T>
FS_INLINE void run_sums(const T* x, const T* g, float* kept, int64_t count, const Coefficients& at,
                        int64_t c, double* plain, double* hat) {
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
FS_INLINE void run_gradient(const T* x, const T* g, const float* kept, T* out, int64_t count,
                            const Coefficients& at, int64_t c, int64_t copy) {
  const Vf mean = broadcast(at.mean[c]), rstd = broadcast(at.rstd[c]),
           scale = broadcast(at.scale[c]);
  const Vf shift = broadcast(at.shift[c]), factor = broadcast(at.factor[c]);
  const Vf offset = broadcast(at.offset[copy * at.step + c]),
           slope = broadcast(at.slope[copy * at.step + c]);
  const auto result = [&](Vf value, Vf cotangent) {
    const Vf deviation = value - mean;
    const Vf dz = Keep ? cotangent : cotangent * slope_of<Act>(fma(deviation * rstd, scale, shift));
    return fma(dz, factor, fma(deviation, slope, offset));
  };
  const auto run = [&](const auto* source) {
    const int64_t whole = count / kLanes * kLanes;
    const int rest = static_cast<int>(count - whole);
    for (int64_t i = 0; i < whole; i += kLanes)
      store(out + i, result(load(x + i), load(source + i)));
    if (rest > 0)
      store(out + whole, result(load(x + whole, rest), load(source + whole, rest)), rest);
  };
  if constexpr (Keep) {
    run(kept);
  } else {
    run(g);
  }
}

// Groups are contiguous in memory here: a thread takes whole ones, with all their cotangents.
template <bool Act, bool Keep, class T>
int contiguous(const VjpProblem& problem, Tensor<const T> grad, Tensor<const T> x, Tensor<T> out) {
  const int64_t groups = problem.groups, items = problem.batch * groups,
                size = problem.channels / groups;
  const int64_t step = padded(problem.channels), arrays = Coefficients::arrays(problem.copies);
  const int threads =
      threads_for(problem.copies * problem.batch * problem.channels * problem.positions, items);
  const int64_t stash = stash_size<Keep, T>(size * problem.positions);
  void* memory =
      scratch(Carver::bytes<float>(threads * arrays * step) +
              Carver::bytes<double>(threads * 2 * step) + Carver::bytes<float>(threads * stash));
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
        const auto grad_row = [&](int64_t c) {
          return grad.data + row * grad.batch + c * grad.channel;
        };
        const auto out_row = [&](int64_t c) {
          return out.data + row * out.batch + c * out.channel;
        };
        const auto kept_row = [&](int64_t c) -> float* {
          if constexpr (!Keep) return nullptr;
          if constexpr (sizeof(T) == sizeof(float)) return reinterpret_cast<float*>(out_row(c));
          return stashes + team.id * stash + (c - begin) * problem.positions;
        };
        for (int64_t c = begin; c < begin + size; ++c) {
          run_sums<Act, Keep>(x_row(c), grad_row(c), kept_row(c), problem.positions, at, c, plain,
                              hat);
          if (problem.sums == nullptr) continue;
          problem.sums[row * problem.channels + c] = static_cast<float>(plain[c]);
          problem.sums[(problem.copies * problem.batch + row) * problem.channels + c] =
              static_cast<float>(hat[c]);
        }
        if (out.data == nullptr) continue;
        at.load_sums(problem, copy, group, plain, hat);
        for (int64_t c = begin; c < begin + size; ++c) {
          run_gradient<Act, Keep>(x_row(c), grad_row(c), kept_row(c), out_row(c), problem.positions,
                                  at, c, copy);
        }
      }
    }
  });
  return FS_OK;
}

}  // namespace fs::FS_ISA

#endif  // FASTSCORE_VJP_CONTIGUOUS_H
