// y = x W^T + bias with a prepared weight. Every element is one chain of sums over the inputs in
// order, whatever the number of rows and threads, which products of a library's are not.
#include "gemm.h"
#include "table.h"

namespace fs::FS_ISA {
namespace {

// what a packed weight starts with: the layout is that of one instruction set
constexpr int64_t kHeader = 16;
// products worth a thread of their own: about 10 microseconds
constexpr int64_t kProductGrain = 1 << 19;
// rows between a product and their place in y
constexpr int64_t kRows = 24;

}  // namespace

int linear_pack(const float* weight, int64_t out_stride, int64_t in_stride, const float* bias,
                float* packed, int64_t in, int64_t out) {
  const Panels panels(out, in);
  for (int64_t i = 0; i < kHeader + panels.padded_columns(); ++i) packed[i] = 0.0f;
  packed[0] = kLanes;
  packed[1] = kTileVectors;
  float* start = packed + kHeader;
  for (int64_t i = 0; bias != nullptr && i < out; ++i) start[i] = bias[i];
  float* to = start + panels.padded_columns();
  for (int64_t column = 0; column < out; ++column) {
    const Place place = place_of(panels, to, column);
    for (int64_t k = 0; k < in; ++k)
      place.at[k * place.step] = weight[column * out_stride + k * in_stride];
  }
  pack_padding(panels, to);
  return FS_OK;
}

int linear(const float* x, const float* packed, float* y, int64_t rows, int64_t in, int64_t out) {
  if (packed[0] != kLanes || packed[1] != kTileVectors) return FS_UNSUPPORTED;
  const Panels panels(out, in);
  const int64_t stride = panels.padded_columns();
  const float* start = packed + kHeader;
  const float* weight = start + stride;
  const int threads = threads_for(rows * in * out, panels.count, kProductGrain);
  if (stride == out) {
    // whole vectors: nothing lies past the end of a row
    parallel_for(threads, panels.count, [&](int64_t begin, int64_t end) {
      gemm_panels<Start::kRow>(panels, {begin, end}, rows, {x, in, 1}, weight, start, y, out);
    });
    return FS_OK;
  }
  float* some = static_cast<float*>(scratch(Carver::bytes<float>(kRows * stride)));
  if (some == nullptr) return FS_NO_MEMORY;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t count = rows - row < kRows ? rows - row : kRows;
    gemm<Start::kRow>(panels, count, {x + row * in, in, 1}, weight, start, some, stride);
    for (int64_t r = 0; r < count; ++r) convert_row(some + r * stride, out, y + (row + r) * out);
  }
  return FS_OK;
}

}  // namespace fs::FS_ISA
