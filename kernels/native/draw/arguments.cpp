#include "arguments.h"

#include <cerrno>
#include <cmath>
#include <cstdlib>

#include "refusal.h"

namespace draw {

const char* const usage =
    "usage: fastscore_draw FILE.pt2 [LABEL] --out FILE.wav [--seed N] [--first N] [--guidance GAMMA]\n"
    "                      [--nfe N] [--threads N]\n"
    "\n"
    "Draws LABEL, or without guidance where none is named, from what fastscore export wrote.\n";

namespace {

int64_t whole(const std::string& name, const std::string& text, int64_t least, int64_t most) {
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0 || value < least || value > most) {
    throw Refusal(name + " " + text + " is not a whole number from " + std::to_string(least) + " to " +
                  std::to_string(most));
  }
  return value;
}

double strength(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(value) || value < 0) {
    throw Refusal("--guidance " + text + " must be a finite number, 0 or more; 0 is unguided");
  }
  return value;
}

void take(Arguments& arguments, const std::string& name, const std::string& value) {
  if (name == "--out") {
    arguments.out = value;
  } else if (name == "--seed") {
    arguments.seed = whole(name, value, 0, INT64_MAX);
  } else if (name == "--first") {
    arguments.first = whole(name, value, 0, UINT32_MAX);
  } else if (name == "--guidance") {
    arguments.guidance = strength(value);
  } else if (name == "--nfe") {
    arguments.evaluations = whole(name, value, 1, 100000);
  } else if (name == "--threads") {
    arguments.threads = static_cast<int>(whole(name, value, 1, 4096));
  } else {
    throw Refusal("argument " + name + " is unknown; see fastscore_draw --help");
  }
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

Arguments parse_arguments(int count, char** values) {
  Arguments arguments;
  int named = 0;
  for (int i = 1; i < count; ++i) {
    const std::string text = values[i];
    if (text.rfind("--", 0) == 0) {
      if (i + 1 == count) throw Refusal("argument " + text + " needs a value");
      take(arguments, text, values[++i]);
    } else if (named == 0) {
      arguments.package = text;
      ++named;
    } else if (named == 1) {
      arguments.label = text;
      ++named;
    } else {
      throw Refusal("argument " + text + " is one too many: one file and one label are taken");
    }
  }
  if (named == 0) throw Refusal("no file was named; see fastscore_draw --help");
  if (!ends_with(arguments.out, ".wav")) {
    throw Refusal("--out " + arguments.out + " must name a .wav file");
  }
  return arguments;
}

}  // namespace draw
