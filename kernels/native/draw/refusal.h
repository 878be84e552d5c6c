// What ends the program with one sentence and exit code 2.
#pragma once

#include <stdexcept>
#include <string>

namespace draw {

struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace draw
