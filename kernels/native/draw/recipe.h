// What an exported model says of how to draw from it: extra/fastscore_draw.txt of the package.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace draw {

// One update x' = keep x + pull x0 + pull_old old + kick z + pull_older older at level sigma.
struct Step {
  bool guided;
  double sigma, keep, pull, pull_old, pull_older, kick;
};

struct Plan {
  int64_t evaluations;
  std::string sampler;
  std::vector<Step> steps;
};

struct Recipe {
  std::string device, torch;
  std::vector<std::string> processor;
  int64_t sample_rate = 0, bands = 0, frames = 0, evaluations = 0;
  double mean = 0, std = 0, log_min = 0, guidance = 0;
  std::vector<std::string> labels;
  std::vector<Plan> plans;

  // Throw Refusal where there is none.
  int64_t label(const std::string& name) const;
  const Plan& plan(int64_t evaluations) const;
};

// Throws Refusal, naming `package`, where it is no archive of fastscore's, or damaged.
Recipe read_recipe(const std::string& package);

}  // namespace draw
