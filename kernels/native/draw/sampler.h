// The sampler: noise, the plan's steps, the vocoder.
#pragma once

#include <cstdint>
#include <vector>

#include "graphs.h"
#include "recipe.h"

namespace draw {

struct Request {
  int64_t label;  // -1: none
  double gamma;
  int64_t seed, number;
};

// Samples of a wave, full scale 1, as Python's pipeline computes them. Throws Refusal where sampling
// diverges.
std::vector<float> sample(const std::string& package, const Recipe& recipe, const Plan& plan,
                          const Request& request);

}  // namespace draw
