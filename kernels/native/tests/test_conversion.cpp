// Numbers of 16 bits are read exactly and written rounded to nearest even, and SiLU holds at its
// ends. With a weight of 0 the output of norm_act is its bias, which is how any number gets there.
#include "tensors.h"

using check::Buffer;

namespace {

constexpr double kEps = 1e-5;

// the distance of a 16-bit value from `value`, with infinity where the next number would be
double distance(uint16_t bits, int dtype, double value) {
  const uint16_t infinity = dtype == FS_F16 ? 0x7c00 : 0x7f80;
  double number = check::half_to_float(bits, dtype);
  if ((bits & 0x7fff) == infinity)
    number = std::copysign(dtype == FS_F16 ? 65536.0 : 0x1p128, number);
  return std::fabs(number - value);
}

// with a weight of 0 the output is the bias: every 16-bit number is read right
void test_reading() {
  for (const int dtype : {FS_BF16, FS_F16}) {
    Buffer x(65536, FS_F32), y(65536, FS_F32), weight(65536, dtype), bias(65536, dtype);
    x.fill(1);
    for (int64_t i = 0; i < 65536; ++i) {
      weight.set(i, 0.0f);
      const uint16_t bits = static_cast<uint16_t>(i);
      std::memcpy(static_cast<unsigned char*>(bias.data()) + 2 * i, &bits, 2);
    }
    CHECK(fs_norm_act(x.data(), 65536, 1, 65536, y.data(), 65536, 1, 65536, FS_F32, weight.data(),
                      bias.data(), dtype, nullptr, 0, FS_F32, nullptr, nullptr, 1, 65536, 1, 1, 0,
                      kEps) == FS_OK,
          "%s", fs_isa());
    for (int64_t i = 0; i < 65536; ++i) {
      const float wanted = check::half_to_float(static_cast<uint16_t>(i), dtype), got = y.get(i);
      CHECK(got == wanted || (got != got && wanted != wanted), "%s dtype %d bits %lx: %g", fs_isa(),
            dtype, static_cast<long>(i), got);
    }
  }
}

// and any number is rounded to the nearest, ties to even
void test_rounding() {
  constexpr int64_t kCount = 1 << 16;
  for (const int dtype : {FS_BF16, FS_F16}) {
    Buffer x(kCount, dtype), y(kCount, dtype), weight(kCount, FS_F32), bias(kCount, FS_F32);
    x.fill(1);
    for (int64_t i = 0; i < kCount; ++i) {
      weight.set(i, 0.0f);
      // all exponents, and mantissas next to ties
      const uint32_t word = static_cast<uint32_t>(i << 16) +
                            (i % 7 == 0   ? 0x8000u
                             : i % 7 == 1 ? 0x1000u
                                          : static_cast<uint32_t>(i * 2654435761u) & 0xffffu);
      std::memcpy(bias.floats() + i, &word, 4);
    }
    CHECK(fs_norm_act(x.data(), kCount, 1, kCount, y.data(), kCount, 1, kCount, dtype,
                      weight.data(), bias.data(), FS_F32, nullptr, 0, FS_F32, nullptr, nullptr, 1,
                      kCount, 1, 1, 0, kEps) == FS_OK,
          "%s", fs_isa());
    for (int64_t i = 0; i < kCount; ++i) {
      const float wanted = bias.get(i);
      uint16_t bits;
      std::memcpy(&bits, static_cast<unsigned char*>(y.data()) + 2 * i, 2);
      const uint16_t infinity = dtype == FS_F16 ? 0x7c00 : 0x7f80, magnitude = bits & 0x7fff;
      if (wanted != wanted || std::isinf(wanted)) {
        CHECK(std::isinf(wanted) ? magnitude == infinity : magnitude > infinity, "%s %g: %x",
              fs_isa(), wanted, bits);
        continue;
      }
      CHECK(magnitude <= infinity, "%s %g: %x", fs_isa(), wanted, bits);
      const double off =
          magnitude == infinity && std::fabs(wanted) > (dtype == FS_F16 ? 65536.0 : 3e38)
              ? 0.0
              : distance(bits, dtype, wanted);
      for (const int step : {-1, 1}) {
        const int next = magnitude + step;
        if (next < 0 || next > infinity) continue;
        const double other = distance(static_cast<uint16_t>((bits & 0x8000) | next), dtype, wanted);
        CHECK(off < other || (off == other && bits % 2 == 0), "%s dtype %d: %.9g became %x",
              fs_isa(), dtype, wanted, bits);
      }
    }
  }
}

// silu where its exponential leaves the range
void test_extremes() {
  const float values[] = {-1e30f, -1000.0f, -100.0f, -88.5f,  -87.0f,
                          0.0f,   87.0f,    88.5f,   1000.0f, 1e30f};
  constexpr int64_t kCount = 10;
  Buffer x(kCount, FS_F32), y(kCount, FS_F32), weight(kCount, FS_F32), bias(kCount, FS_F32);
  x.fill(1);
  for (int64_t i = 0; i < kCount; ++i) {
    weight.set(i, 0.0f);
    bias.set(i, values[i]);
  }
  fs_norm_act(x.data(), kCount, 1, kCount, y.data(), kCount, 1, kCount, FS_F32, weight.data(),
              bias.data(), FS_F32, nullptr, 0, FS_F32, nullptr, nullptr, 1, kCount, 1, 1, 1, kEps);
  for (int64_t i = 0; i < kCount; ++i) {
    const double z = values[i], wanted = z > 0 ? z : z * std::exp(z) / (1.0 + std::exp(z));
    CHECK(std::fabs(y.get(i) - wanted) <= 1e-6 * std::fabs(wanted) + 1e-7, "%s silu(%g) = %g",
          fs_isa(), z, y.get(i));
  }
}

}  // namespace

int main() {
  for (const char* isa : check::instruction_sets()) {
    fs_set_isa(isa);
    test_reading();
    test_rounding();
    test_extremes();
  }
  return check::result();
}
