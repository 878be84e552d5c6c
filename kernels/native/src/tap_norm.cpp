// Normalisation of a feature tap and its gradient tap, side by side in one channels-last tensor.
#include "taps.h"

namespace fs::FS_ISA {
namespace {

template <class T>
int run(const TapProblem& problem, Tensor<const T> feature, Tensor<const T> gradient,
        Tensor<T> out) {
  const Blocks blocks = blocks_of(problem.positions);
  const int64_t step = padded(problem.channels);
  const int threads = threads_for(2 * problem.batch * problem.channels * problem.positions,
                                  problem.batch * blocks.count);
  const int64_t partial_size = slots_of(threads) * blocks.count * 2 * step;
  void* memory =
      scratch(Carver::bytes<float>(partial_size) + Carver::bytes<double>(partial_size) +
              Carver::bytes<float>(threads * 8 * step) + Carver::bytes<double>(threads * 2 * step));
  if (memory == nullptr) return FS_NO_MEMORY;
  Carver carver(memory);
  float* moments = carver.take<float>(partial_size);
  double* sums = carver.take<double>(partial_size);
  float* maps = carver.take<float>(threads * 8 * step);
  double* channels = carver.take<double>(threads * 2 * step);
  Tensor<T> beside = out;
  beside.data += problem.channels;
  parallel(threads, [&](Team team) {
    float* map = maps + team.id * 8 * step;
    double* own = channels + team.id * 2 * step;
    Taps<T> work{problem,
                 Input<T>(feature, out, problem.channels, problem.positions),
                 Input<T>(gradient, beside, problem.channels, problem.positions),
                 blocks,
                 step,
                 moments,
                 sums,
                 Map(map, step),
                 Map(map + 4 * step, step),
                 own,
                 own + step};
    two_passes(team, problem.batch, blocks.count, work);
  });
  return FS_OK;
}

}  // namespace

int tap_norm(const void* feature, int64_t f_batch, int64_t f_channel, int64_t f_position,
             const void* gradient, int64_t g_batch, int64_t g_channel, int64_t g_position,
             void* taps, int64_t taps_batch, int64_t taps_position, int dtype,
             const void* feature_weight, const void* feature_bias, const void* gradient_weight,
             const void* gradient_bias, int parameter_dtype, float* log_rms, float* stats,
             int64_t batch, int64_t channels, int64_t positions, int64_t groups, double eps) {
  const TapProblem problem{feature_weight,  feature_bias, gradient_weight, gradient_bias,
                           parameter_dtype, log_rms,      stats,           batch,
                           channels,        positions,    groups,          eps};
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return run(problem,
               Tensor<const T>{static_cast<const T*>(feature), f_batch, f_channel, f_position},
               Tensor<const T>{static_cast<const T*>(gradient), g_batch, g_channel, g_position},
               Tensor<T>{static_cast<T*>(taps), taps_batch, 1, taps_position});
  });
}

}  // namespace fs::FS_ISA
