// Attention fusion of taps: across all positions, or within each position alone.
#include "attention.h"
#include "table.h"

namespace fs::FS_ISA {
namespace {

// positions that are fused at a time without attention across positions
constexpr int64_t kRows = 32;
// products worth a thread of their own: about 10 microseconds
constexpr int64_t kProductGrain = 1 << 19;

template <class T>
struct Fusion {
  TapTokens<T> tokens;  // of the first sample
  int64_t query_batch, tap_batch[2];
  T* out;
  int64_t out_batch, out_stride, batch;

  TapTokens<T> sample(int64_t b) const {
    TapTokens<T> t = tokens;
    t.query += b * query_batch;
    t.tap[0] += b * tap_batch[0];
    if (t.tap[1] != nullptr) t.tap[1] += b * tap_batch[1];
    return t;
  }
};

template <class T>
int across_positions(const Fusion<T>& f) {
  const TapTokens<T>& t = f.tokens;
  const int64_t pairs = f.batch * t.heads;
  const int64_t work = 2 * pairs * t.positions * t.tokens() * t.width();
  // a head's queries are shared out where there are too few heads; keys and values are then packed
  // again
  const int64_t parts = (t.positions + 2 * kQueryRows - 1) / (2 * kQueryRows);
  const int threads = threads_for(work, pairs * parts, kProductGrain);
  const int64_t share = pairs % threads == 0 || pairs >= 4 * threads ? 1
                        : parts < threads                            ? parts
                                                                     : threads;
  const size_t bytes = attend_memory(t.tokens(), t.width());
  char* memory = static_cast<char*>(scratch(bytes * static_cast<size_t>(threads)));
  if (memory == nullptr) return FS_NO_MEMORY;
  parallel(threads, [&](Team team) {
    const Range mine = team.share(pairs * share);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t pair = i / share, part = i % share;
      const Range queries{t.positions * part / share, t.positions * (part + 1) / share};
      attend(f.sample(pair / t.heads), pair % t.heads, queries,
             f.out + pair / t.heads * f.out_batch, f.out_stride,
             memory + bytes * static_cast<size_t>(team.id));
    }
  });
  return FS_OK;
}

// what a thread needs of memory: rows of floats where elements are of another type, and the weights
struct RowMemory {
  float *query, *tap[2], *out, *weights;
};

template <class T>
FS_INLINE const float* as_floats(const T* from, int64_t stride, int64_t rows, int64_t count,
                                 float* to) {
  for (int64_t r = 0; r < rows; ++r) convert_row(from + r * stride, count, to + r * count);
  return to;
}

void fuse_rows(const Fusion<float>& f, int64_t b, Range positions, const RowMemory& memory) {
  const TapTokens<float> t = f.sample(b);
  const int64_t n = positions.begin;
  const Rows rows{t.query + n * t.query_stride,
                  t.tap[0] + n * t.tap_stride[0],
                  t.tap[1] + n * t.tap_stride[1],
                  t.query_stride,
                  t.tap_stride[0],
                  t.tap_stride[1]};
  weigh_rows(rows, positions.end - n, t.channels, t.heads,
             f.out + b * f.out_batch + n * f.out_stride, f.out_stride, memory.weights);
}

template <class T>
void fuse_rows(const Fusion<T>& f, int64_t b, Range positions, const RowMemory& memory) {
  const TapTokens<T> t = f.sample(b);
  const int64_t n = positions.begin, count = positions.end - n, c = t.channels;
  const Rows rows{
      as_floats(t.query + n * t.query_stride, t.query_stride, count, c, memory.query),
      as_floats(t.tap[0] + n * t.tap_stride[0], t.tap_stride[0], count, 2 * c, memory.tap[0]),
      as_floats(t.tap[1] + n * t.tap_stride[1], t.tap_stride[1], count, 2 * c, memory.tap[1]),
      c,
      2 * c,
      2 * c};
  weigh_rows(rows, count, c, t.heads, memory.out, c, memory.weights);
  T* out = f.out + b * f.out_batch + n * f.out_stride;
  for (int64_t r = 0; r < count; ++r) convert_row(memory.out + r * c, c, out + r * f.out_stride);
}

// one token a position: its weight is one
template <class T>
void copy_rows(const Fusion<T>& f, int64_t b, Range positions) {
  const TapTokens<T> t = f.sample(b);
  for (int64_t n = positions.begin; n < positions.end; ++n) {
    __builtin_memcpy(f.out + b * f.out_batch + n * f.out_stride,
                     t.tap[0] + n * t.tap_stride[0] + t.channels,
                     static_cast<size_t>(t.channels) * sizeof(T));
  }
}

template <class T>
int within_positions(const Fusion<T>& f) {
  const int64_t c = f.tokens.channels, positions = f.tokens.positions;
  const int64_t blocks = (positions + kRows - 1) / kRows;
  const int threads = threads_for(3 * f.batch * c * positions, f.batch * blocks);
  const int64_t row_size = sizeof(T) == sizeof(float) ? 0 : kRows * c;
  const size_t bytes = 2 * Carver::bytes<float>(row_size) + 2 * Carver::bytes<float>(2 * row_size) +
                       Carver::bytes<float>(padded(kRows * f.tokens.heads));
  char* memory = static_cast<char*>(scratch(bytes * static_cast<size_t>(threads)));
  if (memory == nullptr) return FS_NO_MEMORY;
  parallel(threads, [&](Team team) {
    Carver carver(memory + bytes * static_cast<size_t>(team.id));
    RowMemory own;
    own.query = carver.take<float>(row_size);
    for (float*& tap : own.tap) tap = carver.take<float>(2 * row_size);
    own.out = carver.take<float>(row_size);
    own.weights = carver.take<float>(padded(kRows * f.tokens.heads));
    const Range mine = team.share(f.batch * blocks);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t begin = i % blocks * kRows;
      const Range rows{begin, positions - begin < kRows ? positions : begin + kRows};
      if (f.tokens.taps() == 1) {
        copy_rows(f, i / blocks, rows);
      } else {
        fuse_rows(f, i / blocks, rows, own);
      }
    }
  });
  return FS_OK;
}

}  // namespace

int tap_fuse(const void* query, int64_t q_batch, int64_t q_position, const void* first,
             int64_t first_batch, int64_t first_position, const void* second, int64_t second_batch,
             int64_t second_position, void* out, int64_t out_batch, int64_t out_position, int dtype,
             int64_t batch, int64_t channels, int64_t positions, int64_t heads, int spatial) {
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const TapTokens<T> tokens{static_cast<const T*>(query),
                              {static_cast<const T*>(first), static_cast<const T*>(second)},
                              q_position,
                              {first_position, second_position},
                              channels,
                              positions,
                              heads};
    const Fusion<T> fusion{
        tokens,       q_batch, {first_batch, second_batch}, static_cast<T*>(out), out_batch,
        out_position, batch};
    return spatial ? across_positions(fusion) : within_positions(fusion);
  });
}

}  // namespace fs::FS_ISA
