#include "recipe.h"

#include <caffe2/serialize/inline_container.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "refusal.h"

namespace draw {
namespace {

const char* const record = "extra/fastscore_draw.txt";
const char* const format = "fastscore-draw 1";

std::string read_text(const std::string& package) {
  if (!std::ifstream(package)) throw Refusal(package + " does not exist or cannot be read");
  try {
    caffe2::serialize::PyTorchStreamReader reader(package);
    if (reader.hasRecord(record)) {
      const auto [data, size] = reader.getRecord(record);
      return std::string(static_cast<const char*>(data.get()), size);
    }
  } catch (const std::exception&) {
    throw Refusal(package + " is damaged, truncated or no .pt2 file; export the model again");
  }
  throw Refusal(package + " was not written by fastscore export; choose a .pt2 file that was");
}

// strtod, as streams do not read hexadecimal floats
double number(std::istream& line) {
  std::string word;
  line >> word;
  char* end = nullptr;
  const double value = std::strtod(word.c_str(), &end);
  if (word.empty() || *end != '\0') line.setstate(std::ios::failbit);
  return value;
}

Step step(std::istream& line) {
  Step found{};
  line >> found.guided;
  for (double* value :
       {&found.sigma, &found.keep, &found.pull, &found.pull_old, &found.pull_older, &found.kick}) {
    *value = number(line);
  }
  return found;
}

// One line into the recipe; false where it is not understood.
bool take(Recipe& recipe, const std::string& text) {
  std::istringstream line(text);
  std::string name;
  line >> name;
  if (name == "label") {
    recipe.labels.push_back(text.substr(std::min(text.size(), name.size() + 1)));
    return true;
  }
  if (name == "processor") {
    for (std::string word; line >> word;) recipe.processor.push_back(word);
    return true;
  }
  if (name == "plan") {
    recipe.plans.emplace_back();
    line >> recipe.plans.back().evaluations >> recipe.plans.back().sampler;
  } else if (name == "step") {
    if (recipe.plans.empty()) return false;
    recipe.plans.back().steps.push_back(step(line));
  } else if (name == "device") {
    line >> recipe.device;
  } else if (name == "torch") {
    line >> recipe.torch;
  } else if (name == "sample_rate") {
    line >> recipe.sample_rate;
  } else if (name == "bands") {
    line >> recipe.bands;
  } else if (name == "frames") {
    line >> recipe.frames;
  } else if (name == "evaluations") {
    line >> recipe.evaluations;
  } else if (name == "mean") {
    recipe.mean = number(line);
  } else if (name == "std") {
    recipe.std = number(line);
  } else if (name == "log_min") {
    recipe.log_min = number(line);
  } else if (name == "guidance") {
    recipe.guidance = number(line);
  } else {
    return false;
  }
  return !line.fail();
}

bool complete(const Recipe& recipe) {
  const auto has_steps = [](const Plan& plan) { return !plan.steps.empty(); };
  return recipe.sample_rate > 0 && recipe.bands > 0 && recipe.frames > 0 && recipe.std > 0 &&
         !recipe.labels.empty() && !recipe.device.empty() && !recipe.torch.empty() &&
         std::all_of(recipe.plans.begin(), recipe.plans.end(), has_steps);
}

template <typename T, typename Text>
std::string listed(const std::vector<T>& values, Text text) {
  std::string found;
  for (const T& value : values) found += (found.empty() ? "" : ", ") + text(value);
  return found;
}

}  // namespace

int64_t Recipe::label(const std::string& name) const {
  const auto found = std::find(labels.begin(), labels.end(), name);
  if (found == labels.end()) {
    const auto same = [](const std::string& label) { return label; };
    throw Refusal("label '" + name + "' is unknown; choose from " + listed(labels, same));
  }
  return found - labels.begin();
}

const Plan& Recipe::plan(int64_t asked) const {
  for (const Plan& plan : plans) {
    if (plan.evaluations == asked) return plan;
  }
  if (plans.empty()) {
    throw Refusal("this preset's sampler takes more than one evaluation a step, which only Python can do");
  }
  const auto count = [](const Plan& plan) { return std::to_string(plan.evaluations); };
  throw Refusal("--nfe " + std::to_string(asked) + " is not among the plans of this file; choose from " +
                listed(plans, count));
}

Recipe read_recipe(const std::string& package) {
  std::istringstream lines(read_text(package));
  std::string line;
  std::getline(lines, line);
  if (line != format) {
    throw Refusal(package + " was written for another version of this program ('" + line + "', not '" +
                  format + "'); export the model again");
  }
  Recipe recipe;
  while (std::getline(lines, line) && line != "end") {
    if (!take(recipe, line)) throw Refusal(package + " has a damaged line '" + line + "'; export it again");
  }
  if (line != "end" || !complete(recipe)) {
    throw Refusal(package + " does not say all that drawing needs; export the model again");
  }
  return recipe;
}

}  // namespace draw
