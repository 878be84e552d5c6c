// The compiled graphs of a package.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <memory>
#include <string>
#include <vector>

#include "recipe.h"

namespace draw {

class Graph {
 public:
  // Throws Refusal where the package lacks the graph or it cannot be loaded.
  Graph(const std::string& package, const std::string& name, const std::string& device);
  // Inputs and what is returned are on the CPU.
  at::Tensor operator()(const std::vector<at::Tensor>& inputs) const;

 private:
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
  at::Device device_;
};

// Throws Refusal where this program or this processor cannot run what the package holds.
void require_fit(const Recipe& recipe, const std::string& package);

}  // namespace draw
