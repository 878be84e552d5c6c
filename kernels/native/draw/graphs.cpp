#include "graphs.h"

#include <torch/headeronly/version.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <sstream>

#include "refusal.h"

namespace draw {
namespace {

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

// instruction sets as Linux names them; none where it does not say
std::vector<std::string> instruction_sets() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    return {std::istream_iterator<std::string>(words), {}};
  }
  return {};
}

}  // namespace

Graph::Graph(const std::string& package, const std::string& name, const std::string& device)
    : device_(device) {
  try {
    loader_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(package, name);
  } catch (const std::exception& error) {
    throw Refusal(package + " cannot be loaded (" + first_line(error.what()) + "); export it again");
  }
}

at::Tensor Graph::operator()(const std::vector<at::Tensor>& inputs) const {
  std::vector<at::Tensor> placed;
  for (const at::Tensor& input : inputs) placed.push_back(input.to(device_));
  return loader_->run(placed).at(0).to(at::kCPU).contiguous();
}

void require_fit(const Recipe& recipe, const std::string& package) {
  const std::string ours = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
  if (recipe.torch != ours) {
    throw Refusal(package + " was compiled for torch " + recipe.torch + ", and this program is built on torch " +
                  ours + "; export the model again");
  }
  const std::vector<std::string> present = instruction_sets();
  for (const std::string& name : recipe.processor) {
    if (std::find(present.begin(), present.end(), name) == present.end()) {
      throw Refusal(package + " was compiled for a processor with " + name +
                    ", which this one lacks; export the model on this machine");
    }
  }
}

}  // namespace draw
