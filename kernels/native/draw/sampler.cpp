#include "sampler.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cmath>

#include "fastscore_native.h"
#include "refusal.h"

namespace draw {
namespace {

using Values = std::vector<float>;

void require(int code) {
  if (code != FS_OK) throw Refusal("the native library refused a step, code " + std::to_string(code));
}

// step 0 draws the start, step i of the plan draws at i + 1
Values start(const Request& request, double sigma, int64_t size) {
  const int64_t step = 0;
  Values x(size);
  require(fs_normals(&request.seed, &request.number, &step, 0, x.data(), 1, 1, size));
  for (float& value : x) value *= static_cast<float>(sigma);
  return x;
}

Values advance(const Step& step, int64_t number, const Request& request, const Values& x, const Values& x0,
               const Values& old, const Values& older) {
  const float weights[] = {0,
                           0,
                           0,
                           static_cast<float>(step.keep),
                           static_cast<float>(step.pull),
                           static_cast<float>(step.pull_old),
                           static_cast<float>(step.kick)};
  const int64_t counters[] = {request.seed, request.number, number + 1};
  Values next(x.size());
  require(fs_solver_step(x.data(), nullptr, nullptr, FS_F32, x0.data(), step.pull_old != 0 ? old.data() : nullptr,
                         weights, step.kick != 0 ? counters : nullptr, 0, next.data(), nullptr, 1,
                         static_cast<int64_t>(x.size())));
  if (step.pull_older != 0) {
    const float weight = static_cast<float>(step.pull_older);
    for (size_t i = 0; i < next.size(); ++i) next[i] += older[i] * weight;
  }
  return next;
}

bool finite(const Values& values) {
  return std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); });
}

class Denoiser {
 public:
  Denoiser(const std::string& package, const Recipe& recipe, const Request& request)
      : guided_(package, "guided", recipe.device),
        unguided_(package, "unguided", recipe.device),
        shape_{1, 1, recipe.bands, recipe.frames},
        label_(request.label),
        gamma_(static_cast<float>(request.gamma)) {}

  Values operator()(Values& x, const Step& step) {
    float sigma = static_cast<float>(step.sigma);
    std::vector<at::Tensor> inputs{at::from_blob(x.data(), shape_), at::from_blob(&sigma, {1})};
    const bool guided = step.guided && label_ >= 0;
    if (guided) {
      inputs.push_back(at::from_blob(&label_, {1}, at::kLong));
      inputs.push_back(at::from_blob(&gamma_, {1}));
    }
    const at::Tensor x0 = (guided ? guided_ : unguided_)(inputs);
    return {x0.const_data_ptr<float>(), x0.const_data_ptr<float>() + x.size()};
  }

 private:
  Graph guided_, unguided_;
  std::vector<int64_t> shape_;
  int64_t label_;
  float gamma_;
};

}  // namespace

std::vector<float> sample(const std::string& package, const Recipe& recipe, const Plan& plan,
                          const Request& request) {
  Denoiser denoise(package, recipe, request);
  const Graph vocoder(package, "vocoder", recipe.device);
  Values x = start(request, plan.steps.front().sigma, recipe.bands * recipe.frames), old, older;
  for (size_t i = 0; i + 1 < plan.steps.size(); ++i) {
    Values x0 = denoise(x, plan.steps[i]);
    x = advance(plan.steps[i], static_cast<int64_t>(i), request, x, x0, old, older);
    older = std::move(old);
    old = std::move(x0);
  }
  Values mels = denoise(x, plan.steps.back());
  const float deviation = static_cast<float>(recipe.std), mean = static_cast<float>(recipe.mean);
  const float least = static_cast<float>(recipe.log_min);
  for (float& value : mels) {
    value = value * deviation + mean;
    if (value < least) value = least;
  }
  const at::Tensor wave = vocoder({at::from_blob(mels.data(), {1, recipe.bands, recipe.frames})});
  const Values found(wave.const_data_ptr<float>(), wave.const_data_ptr<float>() + wave.numel());
  if (!finite(mels) || !finite(found)) {
    throw Refusal("sampling diverged at guidance " + std::to_string(request.gamma) + " with " + plan.sampler +
                  "; lower the guidance");
  }
  return found;
}

}  // namespace draw
