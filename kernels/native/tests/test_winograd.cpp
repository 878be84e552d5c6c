// Winograd's convolution on every instruction set against the plain sum in double precision.
#include <vector>

#include "buffers.h"

using check::Buffer;

namespace {

struct Shape {
  int64_t batch, height, width, in, out;
};

// U[4, 4, out, in] = G g G^T of weights [out, in, 3, 3]
std::vector<float> transformed(const Shape& s, Buffer& weight) {
  const double g[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  std::vector<float> u(static_cast<size_t>(16 * s.in * s.out));
  for (int64_t pair = 0; pair < s.out * s.in; ++pair) {
    for (int a = 0; a < 4; ++a) {
      for (int b = 0; b < 4; ++b) {
        double total = 0;
        for (int i = 0; i < 9; ++i) total += g[a][i / 3] * g[b][i % 3] * weight.get(9 * pair + i);
        u[static_cast<size_t>((4 * a + b) * s.in * s.out + pair)] = static_cast<float>(total);
      }
    }
  }
  return u;
}

double plain(const Shape& s, const Buffer& x, const Buffer& weight, const Buffer& bias, int64_t b,
             int64_t r, int64_t c, int64_t k) {
  double total = bias.get(k);
  for (int64_t i = 0; i < 9; ++i) {
    const int64_t row = r + i / 3 - 1, column = c + i % 3 - 1;
    if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
    for (int64_t j = 0; j < s.in; ++j) {
      total += double(x.get(((b * s.height + row) * s.width + column) * s.in + j)) *
               weight.get((k * s.in + j) * 9 + i);
    }
  }
  return total;
}

void test_shape(const char* isa, const Shape& s) {
  Buffer x(s.batch * s.height * s.width * s.in, FS_F32), weight(9 * s.in * s.out, FS_F32);
  Buffer bias(s.out, FS_F32), y(s.batch * s.height * s.width * s.out, FS_F32);
  Buffer packed(16 + 16 * s.in * ((s.out + 15) / 16 * 16), FS_F32);
  x.fill(1);
  weight.fill(2, 0.3f);
  bias.fill(3);
  const std::vector<float> u = transformed(s, weight);
  CHECK(fs_winograd_pack(u.data(), packed.floats(), s.in, s.out) == FS_OK, "%s", isa);
  CHECK(packed.guarded(), "%s: packing wrote outside", isa);
  CHECK(fs_winograd(x.floats(), packed.floats(), bias.floats(), y.floats(), s.batch, s.height,
                    s.width, s.in, s.out) == FS_OK,
        "%s", isa);
  CHECK(y.guarded(), "%s: wrote outside", isa);
  for (int64_t i = 0; i < y.size(); ++i) {
    const int64_t k = i % s.out, at = i / s.out, pixel = at % (s.height * s.width);
    const double expected = plain(s, x, weight, bias, at / (s.height * s.width), pixel / s.width,
                                  pixel % s.width, k);
    CHECK(std::fabs(y.get(i) - expected) <= check::tolerance(FS_F32), "%s: %ld is %g, not %g", isa,
          static_cast<long>(i), y.get(i), expected);
  }
}

void test_refusals() {
  Buffer some(1024, FS_F32);
  some.fill(1);
  float* p = some.floats();
  CHECK(fs_winograd(p, p, nullptr, p, 1, 2, 2, 1, 1) == FS_UNSUPPORTED, "not a packed weight");
  CHECK(fs_winograd(p, p, nullptr, p, 0, 2, 2, 1, 1) == FS_BAD_ARGUMENT, "no sample");
  CHECK(fs_winograd(p, p, nullptr, p, 1, 2, 2, 1, -1) == FS_BAD_ARGUMENT, "no channel");
  CHECK(fs_winograd(p, p, nullptr, p, INT64_MAX, 2, 2, 1, 1) == FS_BAD_ARGUMENT, "too large");
  CHECK(fs_winograd(nullptr, p, nullptr, p, 1, 2, 2, 1, 1) == FS_BAD_ARGUMENT, "null");
  CHECK(fs_winograd_pack(nullptr, p, 1, 1) == FS_BAD_ARGUMENT, "null");
  CHECK(fs_winograd_pack(p, p, 0, 1) == FS_BAD_ARGUMENT, "no channel");
  CHECK(fs_winograd_pack(p, p, INT64_MAX / 2, 4) == FS_BAD_ARGUMENT, "too large");
}

}  // namespace

int main() {
  for (const char* isa : check::instruction_sets()) {
    fs_set_isa(isa);
    for (int threads : {1, 3}) {
      fs_set_threads(threads);
      for (const Shape& s : {Shape{1, 1, 1, 1, 1}, Shape{2, 3, 5, 3, 7}, Shape{1, 4, 6, 17, 70},
                             Shape{3, 8, 9, 33, 20}, Shape{2, 20, 16, 16, 24}}) {
        test_shape(isa, s);
      }
    }
  }
  test_refusals();
  return check::result();
}
