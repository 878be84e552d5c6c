// Arrays for tests: any element type, poisoned with NaN, and guarded against writes past either
// end.
#ifndef FASTSCORE_TESTS_BUFFERS_H
#define FASTSCORE_TESTS_BUFFERS_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <vector>

#include "check.h"
#include "fastscore_native.h"

namespace check {

// the instruction sets that this build and processor have
inline std::vector<const char*> instruction_sets() {
  std::vector<const char*> found;
  for (const char* name : {"portable", "avx2", "avx512", "neon"}) {
    if (fs_set_isa(name) == FS_OK) found.push_back(name);
  }
  fs_set_isa("auto");
  return found;
}

inline float half_to_float(uint16_t bits, int dtype) {
  const uint32_t wide = static_cast<uint32_t>(bits);
  if (dtype == FS_BF16) {
    const uint32_t word = wide << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  const int exponent = static_cast<int>(wide >> 10 & 31), mantissa = static_cast<int>(wide & 1023);
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  if (exponent == 31) {
    value =
        mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  }
  return wide & 0x8000 ? -value : value;
}

// Round to nearest even, for finite values well within the range.
inline uint16_t float_to_half(float value, int dtype) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (dtype == FS_BF16) return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  const float size = std::fabs(value);
  int exponent;
  std::frexp(size, &exponent);
  if (exponent < -13) exponent = -13;
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  // 1024 .. 2047 steps a binade; a carry moves on to the next exponent by itself
  const int bits = steps < 1024 ? steps : ((exponent + 13) << 10) + steps;
  return static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0));
}

// `size` elements of a dtype, all NaN at first, with guard bytes before and after.
class Buffer {
 public:
  Buffer() : Buffer(1, FS_F32) {}
  Buffer(int64_t size, int dtype)
      : size_(size),
        dtype_(dtype),
        width_(dtype == FS_F32 ? 4 : 2),
        bytes_(static_cast<size_t>(size * width_) + 2 * kGuard, 0xa5) {
    poison();
  }

  void* data() { return bytes_.data() + kGuard; }
  float* floats() { return static_cast<float*>(data()); }
  int64_t size() const { return size_; }
  int dtype() const { return dtype_; }

  float get(int64_t i) const {
    const unsigned char* at = bytes_.data() + kGuard + i * width_;
    if (dtype_ == FS_F32) {
      float value;
      std::memcpy(&value, at, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    return half_to_float(bits, dtype_);
  }
  void set(int64_t i, float value) {
    unsigned char* at = bytes_.data() + kGuard + i * width_;
    if (dtype_ == FS_F32) {
      std::memcpy(at, &value, 4);
    } else {
      const uint16_t bits = float_to_half(value, dtype_);
      std::memcpy(at, &bits, 2);
    }
  }
  // numbers of an order of one
  void fill(uint64_t seed, float scale = 1.0f, float shift = 0.0f) {
    uint64_t state = seed * 0x9e3779b97f4a7c15u + 0x1234567u;
    for (int64_t i = 0; i < size_; ++i) {
      float total = -2.0f;
      for (int k = 0; k < 4; ++k) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        total += static_cast<float>(state >> 40) * 0x1p-24f;
      }
      set(i, total * 1.7f * scale + shift);
    }
  }
  void poison() {
    for (int64_t i = 0; i < size_ * width_; ++i) bytes_[static_cast<size_t>(kGuard + i)] = 0xff;
  }
  bool guarded() const {
    for (size_t i = 0; i < size_t(kGuard); ++i) {
      if (bytes_[i] != 0xa5 || bytes_[bytes_.size() - 1 - i] != 0xa5) return false;
    }
    return true;
  }
  // elements untouched since the poisoning
  bool poisoned(int64_t i) const {
    for (int k = 0; k < width_; ++k) {
      if (bytes_[static_cast<size_t>(kGuard + i * width_ + k)] != 0xff) return false;
    }
    return true;
  }
  bool operator==(const Buffer& other) const { return bytes_ == other.bytes_; }

 private:
  static constexpr int kGuard = 256;
  int64_t size_;
  int dtype_, width_;
  std::vector<unsigned char> bytes_;
};

// what rounding to a dtype and working in fp32 may cost, relative to numbers of an order of one
inline double tolerance(int dtype) {
  return dtype == FS_F32 ? 2e-5 : dtype == FS_F16 ? 4e-3 : 3e-2;
}

}  // namespace check

#endif  // FASTSCORE_TESTS_BUFFERS_H
