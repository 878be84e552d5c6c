// Small matrix products C = A B (+ bias) in fp32: rows of A are positions, columns of B are
// channels.
//
// B is packed into panels of a few vectors of columns, depth after depth, so that the inner loop
// reads it in order; A is read in place, one broadcast element a product. A tile of C stays in
// registers for the whole depth, which is some hundreds at most. Every element of C is one chain of
// sums over the depth in order: its bits depend neither on its tile nor on how rows are shared
// among threads.
#ifndef FASTSCORE_GEMM_H
#define FASTSCORE_GEMM_H

#include "norm.h"

namespace fs::FS_ISA {

// A tile's accumulators, one row of B and an element of A fit into the registers.
#if defined(FS_ISA_AVX512) || defined(FS_ISA_NEON)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
#if defined(FS_ISA_PORTABLE)
constexpr int kTileRows = 4;
#else
constexpr int kTileRows = 6;
#endif

// How columns are cut into panels: nearly equal ones, since narrow tiles are slow.
struct Panels {
  int64_t columns, depth, vectors, count;

  FS_ALWAYS_INLINE Panels(int64_t columns, int64_t depth)
      : columns(columns),
        depth(depth),
        vectors((columns + kLanes - 1) / kLanes),
        count((vectors + kTileVectors - 1) / kTileVectors) {}
  // columns of a panel, the last one's rounded up to whole vectors
  FS_ALWAYS_INLINE Range columns_of(int64_t panel) const {
    return {vectors * panel / count * kLanes, vectors * (panel + 1) / count * kLanes};
  }
  FS_ALWAYS_INLINE int64_t padded_columns() const { return vectors * kLanes; }
  // floats of all panels
  FS_ALWAYS_INLINE int64_t size() const { return padded_columns() * depth; }
};

// Where column `c` of the product is in the packed panels at depth 0, and how far the next depth
// is.
struct Place {
  float* at;
  int64_t step;
};

FS_INLINE Place place_of(const Panels& panels, float* packed, int64_t column) {
  // the panel is found by the inverse of columns_of, which rounds down: at most one too low
  const int64_t vector = column / kLanes;
  int64_t panel = vector * panels.count / panels.vectors;
  if (panels.columns_of(panel).end <= column) ++panel;
  const Range range = panels.columns_of(panel);
  return {packed + range.begin * panels.depth + (column - range.begin), range.end - range.begin};
}

typedef float Quad __attribute__((vector_size(16)));
#if defined(__clang__)
#define FS_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t QuadIndex __attribute__((vector_size(16)));
#define FS_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, QuadIndex{i, j, k, l})
#endif

FS_INLINE Quad load_quad(const float* p) {
  Quad v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FS_INLINE void store_quad(float* p, Quad v) { __builtin_memcpy(p, &v, sizeof v); }

// place.at[k * place.step + r] = rows[r * stride + k] for four rows
FS_INLINE void transpose_four(const float* rows, int64_t stride, int64_t depth, Place place) {
  const float *r0 = rows, *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
  float* out = place.at;
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    const Quad a = load_quad(r0 + k), b = load_quad(r1 + k), c = load_quad(r2 + k),
               d = load_quad(r3 + k);
    const Quad ab = FS_SHUFFLE(a, b, 0, 4, 1, 5), cd = FS_SHUFFLE(c, d, 0, 4, 1, 5);
    const Quad ab_high = FS_SHUFFLE(a, b, 2, 6, 3, 7), cd_high = FS_SHUFFLE(c, d, 2, 6, 3, 7);
    store_quad(out, FS_SHUFFLE(ab, cd, 0, 1, 4, 5));
    store_quad(out + place.step, FS_SHUFFLE(ab, cd, 2, 3, 6, 7));
    store_quad(out + 2 * place.step, FS_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5));
    store_quad(out + 3 * place.step, FS_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7));
    out += 4 * place.step;
  }
  for (; k < depth; ++k, out += place.step) {
    out[0] = r0[k];
    out[1] = r1[k];
    out[2] = r2[k];
    out[3] = r3[k];
  }
}
#undef FS_SHUFFLE

// to = from, of either type
template <class T, class U>
FS_INLINE void convert_row(const T* from, int64_t count, U* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = lanes_left(count, i);
    store_lanes(to + i, load_lanes(from + i, lanes), lanes);
  }
}

// Packs columns first .. first + count of B for `depth` depths from `start` on: column first + r is
// the row of `depth` elements at rows + r * stride, as weights [out, in] and keys [token, channel]
// have it.
static inline void pack_rows(const Panels& panels, float* packed, int64_t first, int64_t count,
                             int64_t start, int64_t depth, const float* rows, int64_t stride) {
  for (int64_t r = 0; r < count;) {
    Place place = place_of(panels, packed, first + r);
    place.at += start * place.step;
    // whole vectors are multiples of four lanes, so four such columns lie side by side
    if ((first + r) % 4 == 0 && r + 4 <= count) {
      transpose_four(rows + r * stride, stride, depth, place);
      r += 4;
    } else {
      for (int64_t k = 0; k < depth; ++k) place.at[k * place.step] = rows[r * stride + k];
      ++r;
    }
  }
}
template <class T>
static inline void pack_rows(const Panels& panels, float* packed, int64_t first, int64_t count,
                             int64_t start, int64_t depth, const T* rows, int64_t stride) {
  constexpr int64_t kRows = 4, kDepth = 128;
  float buffer[kRows * kDepth];
  for (int64_t r = 0; r < count;) {
    int64_t some = kRows - (first + r) % kRows;
    if (some > count - r) some = count - r;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = depth - k < kDepth ? depth - k : kDepth;
      for (int64_t i = 0; i < some; ++i)
        convert_row(rows + (r + i) * stride + k, part, buffer + i * kDepth);
      pack_rows(panels, packed, first + r, some, start + k, part, buffer, kDepth);
    }
    r += some;
  }
}

// Packs depths start .. start + count of B: depth start + r is the row of all columns at rows + r *
// stride.
template <class T>
static inline void pack_depths(const Panels& panels, float* packed, int64_t start, int64_t count,
                               const T* rows, int64_t stride) {
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const Range columns = panels.columns_of(panel);
    const int64_t step = columns.end - columns.begin;
    float* out = packed + columns.begin * panels.depth + start * step;
    for (int64_t r = 0; r < count; ++r, out += step) {
      for (int64_t c = 0; c < step; c += kLanes) {
        store(out + c, load_lanes(rows + r * stride + columns.begin + c,
                                  lanes_left(panels.columns, columns.begin + c)));
      }
    }
  }
}

// Zeroes the columns that fill up the last vector.
static inline void pack_padding(const Panels& panels, float* packed) {
  for (int64_t c = panels.columns; c < panels.padded_columns(); ++c) {
    const Place place = place_of(panels, packed, c);
    for (int64_t k = 0; k < panels.depth; ++k) place.at[k * place.step] = 0.0f;
  }
}

// A matrix that is read: element (row, k) is at data[row * row_stride + k * depth_stride].
struct Left {
  const float* data;
  int64_t row_stride, depth_stride;
};

// What C starts from: nothing, a row that is the same for all rows, or what it holds.
enum class Start { kZero, kRow, kHeld };

template <int N>
struct Constant {
  static constexpr int value = N;
};

#define FS_INLINE_LAMBDA __attribute__((always_inline))

// body(0), .., body(N - 1) with the numbers known to the compiler: what a plain loop leaves of a
// tile is an array in memory that registers are copied from and to.
template <int N, int I = 0, class Body>
FS_INLINE void each(const Body& body) {
  if constexpr (I < N) {
    body(Constant<I>{});
    each<N, I + 1>(body);
  }
}

template <Start kStart, int Rows, int Vectors>
FS_INLINE void gemm_tile(Left a, const float* b, int64_t b_step, int64_t depth, const float* row,
                         float* c, int64_t c_stride) {
  Vf total[Rows][Vectors];
  const auto each_sum = [&](const auto& body) FS_INLINE_LAMBDA {
    each<Rows>([&](auto r) FS_INLINE_LAMBDA {
      each<Vectors>([&](auto v) FS_INLINE_LAMBDA { body(r, v); });
    });
  };
  if constexpr (kStart == Start::kZero) {
    each_sum([&](auto r, auto v) FS_INLINE_LAMBDA { total[r.value][v.value] = zero(); });
  } else if constexpr (kStart == Start::kRow) {
    each_sum([&](auto r, auto v)
                 FS_INLINE_LAMBDA { total[r.value][v.value] = load(row + v.value * kLanes); });
  } else {
    each_sum([&](auto r, auto v) FS_INLINE_LAMBDA {
      total[r.value][v.value] = load(c + r.value * c_stride + v.value * kLanes);
    });
  }
  // a pointer for three rows each: base + index * {0, 1, 2} is one address
  const float* p[2] = {a.data, a.data + 3 * a.row_stride};
  for (int64_t k = 0; k < depth; ++k) {
    Vf right[Vectors];
    each<Vectors>([&](auto v) FS_INLINE_LAMBDA { right[v.value] = load(b + v.value * kLanes); });
    each<Rows>([&](auto r) FS_INLINE_LAMBDA {
      const Vf left = broadcast(p[r.value / 3][(r.value % 3) * a.row_stride]);
      each<Vectors>([&](auto v) FS_INLINE_LAMBDA {
        total[r.value][v.value] = fma(left, right[v.value], total[r.value][v.value]);
      });
    });
    b += b_step;
    p[0] += a.depth_stride;
    p[1] += a.depth_stride;
  }
  each_sum([&](auto r, auto v) FS_INLINE_LAMBDA {
    store(c + r.value * c_stride + v.value * kLanes, total[r.value][v.value]);
  });
}

// All rows of one panel.
template <Start kStart, int Vectors>
static void gemm_panel(int64_t rows, Left a, const float* b, int64_t depth, const float* row,
                       float* c, int64_t c_stride) {
  constexpr int64_t step = Vectors * kLanes;
  const auto tile = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    gemm_tile<kStart, kRows, Vectors>(a, b, step, depth, row, c, c_stride);
    a.data += kRows * a.row_stride;
    c += kRows * c_stride;
    rows -= kRows;
  };
  while (rows >= kTileRows) tile(Constant<kTileRows>{});
  if (kTileRows > 4 && rows >= 4) tile(Constant<4>{});
  if (rows >= 2) tile(Constant<2>{});
  if (rows >= 1) tile(Constant<1>{});
}

// C [rows, columns rounded up to whole vectors] = start + A [rows, depth] times the packed B, in
// the columns of some panels.
template <Start kStart>
static inline void gemm_panels(const Panels& panels, Range some, int64_t rows, Left a,
                               const float* packed, const float* row, float* c, int64_t c_stride) {
  for (int64_t panel = some.begin; panel < some.end; ++panel) {
    const Range columns = panels.columns_of(panel);
    const float* b = packed + columns.begin * panels.depth;
    const float* r = kStart == Start::kRow ? row + columns.begin : nullptr;
    float* out = c + columns.begin;
    switch ((columns.end - columns.begin) / kLanes) {
      case 1:
        gemm_panel<kStart, 1>(rows, a, b, panels.depth, r, out, c_stride);
        break;
      case 2:
        gemm_panel<kStart, 2>(rows, a, b, panels.depth, r, out, c_stride);
        break;
#if defined(FS_ISA_AVX512) || defined(FS_ISA_NEON)
      case 3:
        gemm_panel<kStart, 3>(rows, a, b, panels.depth, r, out, c_stride);
        break;
      case 4:
        gemm_panel<kStart, 4>(rows, a, b, panels.depth, r, out, c_stride);
        break;
#endif
    }
  }
}

template <Start kStart>
static inline void gemm(const Panels& panels, int64_t rows, Left a, const float* packed,
                        const float* row, float* c, int64_t c_stride) {
  gemm_panels<kStart>(panels, {0, panels.count}, rows, a, packed, row, c, c_stride);
}

}  // namespace fs::FS_ISA

#endif  // FASTSCORE_GEMM_H
