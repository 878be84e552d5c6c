// Linear layers on every instruction set: the product, and rows that do not see each other.
#include <algorithm>
#include <vector>

#include "buffers.h"

using check::Buffer;

namespace {

void test_shape(const char* isa, int64_t rows, int64_t in, int64_t out, bool transposed) {
  Buffer x(rows * in, FS_F32), weight(in * out, FS_F32), bias(out, FS_F32), y(rows * out, FS_F32);
  Buffer packed(16 + (in + 1) * ((out + 15) / 16 * 16), FS_F32);
  x.fill(1);
  weight.fill(2, 0.3f);
  bias.fill(3);
  const int64_t out_step = transposed ? 1 : in, in_step = transposed ? out : 1;
  CHECK(fs_linear_pack(weight.floats(), out_step, in_step, bias.floats(), packed.floats(), in,
                       out) == FS_OK,
        "%s", isa);
  CHECK(packed.guarded(), "%s: packing wrote outside", isa);
  CHECK(fs_linear(x.floats(), packed.floats(), y.floats(), rows, in, out) == FS_OK, "%s", isa);
  CHECK(y.guarded(), "%s: wrote outside", isa);
  Buffer alone(out, FS_F32);
  for (int64_t r = 0; r < rows; ++r) {
    fs_linear(x.floats() + r * in, packed.floats(), alone.floats(), 1, in, out);
    for (int64_t c = 0; c < out; ++c) {
      double expected = bias.get(c);
      for (int64_t k = 0; k < in; ++k)
        expected += double(x.get(r * in + k)) * weight.get(c * out_step + k * in_step);
      CHECK(std::fabs(y.get(r * out + c) - expected) <= check::tolerance(FS_F32),
            "%s: row %ld, column %ld", isa, static_cast<long>(r), static_cast<long>(c));
      CHECK(alone.get(c) == y.get(r * out + c), "%s: row %ld depends on others", isa,
            static_cast<long>(r));
    }
  }
}

void test_refusals() {
  Buffer some(256, FS_F32);
  some.fill(1);
  float* p = some.floats();
  CHECK(fs_linear(p, p, p, 1, 2, 2) == FS_UNSUPPORTED, "not a packed weight");
  CHECK(fs_linear(p, p, p, 0, 2, 2) == FS_BAD_ARGUMENT, "no row");
  CHECK(fs_linear(p, p, nullptr, 1, 2, 2) == FS_BAD_ARGUMENT, "null");
  CHECK(fs_linear(p, p, p, INT64_MAX, 2, 2) == FS_BAD_ARGUMENT, "too large");
  CHECK(fs_linear_pack(p, 2, 1, nullptr, nullptr, 2, 2) == FS_BAD_ARGUMENT, "null");
  CHECK(fs_linear_pack(p, -2, 1, nullptr, p, 2, 2) == FS_BAD_ARGUMENT, "stride");
  CHECK(fs_linear_pack(p, 2, 1, nullptr, p, -2, 2) == FS_BAD_ARGUMENT, "no input");
}

}  // namespace

int main() {
  for (const char* isa : check::instruction_sets()) {
    fs_set_isa(isa);
    for (int threads : {1, 3}) {
      fs_set_threads(threads);
      for (int64_t rows : {1, 2, 5, 30}) {
        test_shape(isa, rows, 3, 7, false);
        test_shape(isa, rows, 32, 128, true);
        test_shape(isa, rows, 100, 50, true);
      }
      test_shape(isa, 70, 128, 256, false);
    }
  }
  test_refusals();
  return check::result();
}
