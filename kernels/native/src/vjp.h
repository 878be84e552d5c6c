// What the vector-Jacobian products of norm_act in both layouts share.
#ifndef FASTSCORE_VJP_H
#define FASTSCORE_VJP_H

#include "norm.h"

namespace fs::FS_ISA {

struct VjpProblem {
  Affine affine;
  const float *mean, *rstd;  // [B, groups]
  float* sums;               // [2, copies * B, C] or null
  int64_t batch, copies, channels, positions, groups;
};

// Per-channel values of a sample, [padded] each, and of each of its cotangents.
struct Coefficients {
  float *mean, *rstd, *scale, *shift;  // scale, shift: of xhat
  float* factor;                       // rstd * scale
  float *offset, *slope;  // [copies, padded]: grad_x = factor * dz + offset + slope * (x - mean)
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
  void load_sample(const VjpProblem& problem, int64_t sample) const {
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
  FS_ALWAYS_INLINE void load_sums(const VjpProblem& problem, int64_t copy, int64_t group,
                                  const double* plain, const double* hat) const {
    const int64_t size = problem.channels / problem.groups, begin = group * size;
    double first = 0.0, second = 0.0;
    for (int64_t c = begin; c < begin + size; ++c) {
      first += plain[c] * scale[c];
      second += hat[c] * scale[c];
    }
    const double inverse = rstd[begin],
                 count = static_cast<double>(size) * static_cast<double>(problem.positions);
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

// The first pass may keep dz, which saves the second the activation: where grad_x goes if that is
// fp32, else in scratch memory, as long as that stays below this many floats a sample.
constexpr int64_t kMostKept = int64_t{1} << 20;

// floats of scratch memory that dz takes
template <bool Keep, class T>
FS_INLINE int64_t stash_size(int64_t floats) {
  return Keep && sizeof(T) != sizeof(float) ? floats : 0;
}

}  // namespace fs::FS_ISA

#endif  // FASTSCORE_VJP_H
