// Draws one clip from a .pt2 that fastscore export wrote, without Python.

#include <ATen/Parallel.h>

#include <cstring>
#include <exception>
#include <iostream>

#include "arguments.h"
#include "graphs.h"
#include "recipe.h"
#include "refusal.h"
#include "sampler.h"
#include "wav.h"

namespace {

constexpr int refused = 2;

void run(const draw::Arguments& arguments) {
  if (arguments.threads > 0) at::set_num_threads(arguments.threads);
  const draw::Recipe recipe = draw::read_recipe(arguments.package);
  draw::Request request{-1, arguments.guidance.value_or(recipe.guidance), arguments.seed, arguments.first};
  // a strength of 0 is no guidance
  if (arguments.label) {
    const int64_t label = recipe.label(*arguments.label);
    if (request.gamma > 0) request.label = label;
  }
  const draw::Plan& plan = recipe.plan(arguments.evaluations.value_or(recipe.evaluations));
  draw::require_fit(recipe, arguments.package);
  const std::vector<float> wave = draw::sample(arguments.package, recipe, plan, request);
  draw::write_wav(arguments.out, wave, recipe.sample_rate);
  std::cout << arguments.out << "\n"
            << static_cast<double>(wave.size()) / static_cast<double>(recipe.sample_rate) << " s of speech, "
            << plan.steps.size() << " evaluations (" << plan.sampler << ", seed " << request.seed << ")\n";
}

}  // namespace

int main(int count, char** values) {
  if (count == 2 && std::strcmp(values[1], "--help") == 0) {
    std::cout << draw::usage;
    return 0;
  }
  try {
    run(draw::parse_arguments(count, values));
    return 0;
  } catch (const std::exception& error) {
    const std::string text = error.what();
    std::cerr << "fastscore_draw: error: " << text.substr(0, text.find('\n')) << "\n";
    return refused;
  }
}
