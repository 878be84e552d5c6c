// Waves to files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace draw {

// 16-bit PCM, complete or not at all: written beside `path`, synced and renamed. Throws Refusal where
// that is not possible.
void write_wav(const std::string& path, const std::vector<float>& wave, int64_t sample_rate);

}  // namespace draw
