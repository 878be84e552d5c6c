// The command line.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace draw {

struct Arguments {
  std::string package;
  std::optional<std::string> label;
  std::string out;
  int64_t seed = 0;
  int64_t first = 0;
  std::optional<double> guidance;
  std::optional<int64_t> evaluations;
  int threads = 0;  // 0: as many as PyTorch would take
};

extern const char* const usage;

// Throws Refusal for an argument that is unknown, missing or out of range.
Arguments parse_arguments(int count, char** values);

}  // namespace draw
