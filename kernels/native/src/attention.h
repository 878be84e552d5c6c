// Attention of one head over the tokens of one or two taps, and of a position over its own tokens.
#ifndef FASTSCORE_ATTENTION_H
#define FASTSCORE_ATTENTION_H

#include "gemm.h"

namespace fs::FS_ISA {

// One sample: queries and the taps' tokens, keys in the first `channels` channels and values after
// them.
template <class T>
struct TapTokens {
  const T* query;
  const T* tap[2];  // the second may be null
  int64_t query_stride, tap_stride[2];
  int64_t channels, positions, heads;

  FS_ALWAYS_INLINE int64_t taps() const { return tap[1] != nullptr ? 2 : 1; }
  FS_ALWAYS_INLINE int64_t tokens() const { return taps() * positions; }
  FS_ALWAYS_INLINE int64_t width() const { return channels / heads; }
  FS_ALWAYS_INLINE double scale() const {
    return 1.0 / __builtin_sqrt(static_cast<double>(width()));
  }
};

constexpr double kLog2E = 1.4426950408889634;

// Queries whose scores over all tokens are held at once.
constexpr int64_t kQueryRows = 24;

// Scores lie a little apart from whole pages, so that rows do not compete for the same sets of the
// cache.
FS_INLINE int64_t score_stride(int64_t tokens) { return padded(tokens) + 16; }

// Keys [channel][token] and values [token][channel] of a head, packed as right sides of products.
template <class T>
static inline void pack_keys(const TapTokens<T>& t, int64_t head, int64_t offset, float* packed) {
  const Panels panels(t.tokens(), t.width());
  for (int64_t i = 0; i < t.taps(); ++i) {
    pack_rows(panels, packed, i * t.positions, t.positions, 0, t.width(),
              t.tap[i] + offset + head * t.width(), t.tap_stride[i]);
  }
  pack_padding(panels, packed);
}
template <class T>
static inline void pack_values(const TapTokens<T>& t, int64_t head, int64_t offset, float* packed) {
  const Panels panels(t.width(), t.tokens());
  for (int64_t i = 0; i < t.taps(); ++i) {
    pack_depths(panels, packed, i * t.positions, t.positions, t.tap[i] + offset + head * t.width(),
                t.tap_stride[i]);
  }
}

// to = from * factor, of either type
template <class T, class U>
FS_INLINE void scale_row(const T* from, int64_t count, float factor, U* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = lanes_left(count, i);
    store_lanes(to + i, load_lanes(from + i, lanes) * broadcast(factor), lanes);
  }
}

// 2^x of N vectors for x <= 0, relative error below 3e-7; not below 2^-126, which is nothing beside
// the largest score's 1. One step of all after the other: the chains of single vectors are long,
// and a processor that meets them one by one has not got room for enough of them.
template <int N>
FS_INLINE void powers_of_two(Vf (&x)[N]) {
  Vf scale[N], power[N];
  // adding this rounds to an integer and leaves it, with the bias of the exponent, in the low bits
  const Vf magic = broadcast(0x1.8000fep23f);
  for (int i = 0; i < N; ++i) x[i] = maximum(broadcast(-126.0f), x[i]);
  for (int i = 0; i < N; ++i) scale[i] = x[i] + magic;
  for (int i = 0; i < N; ++i) x[i] = x[i] - (scale[i] - magic);
  for (int i = 0; i < N; ++i) scale[i] = as_float(as_int(scale[i]) << 23);
  // minimax polynomial on [-1/2, 1/2]
  const float terms[] = {0x1.3d0c52p-7f, 0x1.c6b6e4p-5f, 0x1.ebf918p-3f, 0x1.62e428p-1f, 1.0f};
  for (int i = 0; i < N; ++i) power[i] = broadcast(0x1.5c08e4p-10f);
  for (const float term : terms) {
    for (int i = 0; i < N; ++i) power[i] = fma(power[i], x[i], broadcast(term));
  }
  for (int i = 0; i < N; ++i) x[i] = power[i] * scale[i];
}

// Turns a row of scores, in units of log 2, into 2^(score - largest); returns one over their sum.
// The row is padded to whole vectors, with what counts for nothing.
static inline float exponentials(float* scores, int64_t count) {
  const int64_t whole = padded(count);
  for (int64_t i = count; i < whole; ++i) scores[i] = -__builtin_inff();
  Vf most[2] = {load(scores), load(scores)};
  int64_t i = kLanes;
  for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) most[u] = maximum(most[u], load(scores + i + u * kLanes));
  }
  if (i < whole) most[0] = maximum(most[0], load(scores + i));
  const Vf top = broadcast(largest(maximum(most[0], most[1])));
  Vf total[2] = {zero(), zero()};
  constexpr int kTogether = sizeof(Vf) == 64 ? 4 : 2;
  for (i = 0; i + kTogether * kLanes <= whole; i += kTogether * kLanes) {
    Vf e[kTogether];
    for (int u = 0; u < kTogether; ++u) e[u] = load(scores + i + u * kLanes) - top;
    powers_of_two(e);
    for (int u = 0; u < kTogether; ++u) store(scores + i + u * kLanes, e[u]);
    for (int u = 0; u < kTogether; ++u) total[u % 2] += e[u];
  }
  for (; i < whole; i += kLanes) {
    Vf e[1] = {load(scores + i) - top};
    powers_of_two(e);
    store(scores + i, e[0]);
    total[0] += e[0];
  }
  return 1.0f / sum(total[0] + total[1]);
}

// Bytes of scratch memory that attend needs.
static inline size_t attend_memory(int64_t tokens, int64_t width) {
  return Carver::bytes<float>(Panels(tokens, width).size()) +
         Carver::bytes<float>(Panels(width, tokens).size()) +
         Carver::bytes<float>(kQueryRows * width) +
         Carver::bytes<float>(kQueryRows * score_stride(tokens)) +
         Carver::bytes<float>(kQueryRows * padded(width));
}

// Attention of a head's queries in `queries` over all tokens; out is the sample's first row and
// channel.
template <class T, class U>
static void attend(const TapTokens<T>& t, int64_t head, Range queries, U* out, int64_t out_stride,
                   void* memory) {
  const int64_t width = t.width(), tokens = t.tokens(), stride = score_stride(tokens);
  const Panels key_panels(tokens, width), value_panels(width, tokens);
  Carver carver(memory);
  float* keys = carver.take<float>(key_panels.size());
  float* values = carver.take<float>(value_panels.size());
  float* query = carver.take<float>(kQueryRows * width);
  float* scores = carver.take<float>(kQueryRows * stride);
  float* mixed = carver.take<float>(kQueryRows * padded(width));
  pack_keys(t, head, 0, keys);
  pack_values(t, head, t.channels, values);
  const float scale = static_cast<float>(t.scale() * kLog2E);
  for (int64_t n = queries.begin; n < queries.end; n += kQueryRows) {
    const int64_t rows = queries.end - n < kQueryRows ? queries.end - n : kQueryRows;
    for (int64_t r = 0; r < rows; ++r) {
      scale_row(t.query + (n + r) * t.query_stride + head * width, width, scale, query + r * width);
    }
    gemm<Start::kZero>(key_panels, rows, {query, width, 1}, keys, nullptr, scores, stride);
    float inverse[kQueryRows];
    for (int64_t r = 0; r < rows; ++r) inverse[r] = exponentials(scores + r * stride, tokens);
    gemm<Start::kZero>(value_panels, rows, {scores, stride, 1}, values, nullptr, mixed,
                       padded(width));
    for (int64_t r = 0; r < rows; ++r) {
      scale_row(mixed + r * padded(width), width, inverse[r],
                out + (n + r) * out_stride + head * width);
    }
  }
}

// Rows of floats: a query, and keys and values of two taps at one position each.
struct Rows {
  const float *query, *first, *second;
  int64_t query_stride, first_stride, second_stride;
};

// sum over a head of q * (k2 - k1), the difference of its two scores but for the scale
FS_INLINE float score_difference(const float* q, const float* k1, const float* k2, int64_t width) {
  Vf total = zero();
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes)
    total = fma(load(q + c), load(k2 + c) - load(k1 + c), total);
  if (c < width) {
    const int rest = static_cast<int>(width - c);
    total = fma(load(q + c, rest), load(k2 + c, rest) - load(k1 + c, rest), total);
  }
  return sum(total);
}

// Weighs the tokens of two taps at each of `rows` positions, head by head: a softmax over two
// scores is a sigmoid of their difference. `weights` has room for padded(rows * heads) floats.
static inline void weigh_rows(const Rows& t, int64_t rows, int64_t channels, int64_t heads,
                              float* out, int64_t out_stride, float* weights) {
  const int64_t width = channels / heads, pairs = rows * heads;
  float* at = weights;
  for (int64_t r = 0; r < rows; ++r) {
    const float *q = t.query + r * t.query_stride, *k1 = t.first + r * t.first_stride;
    const float* k2 = t.second + r * t.second_stride;
    for (int64_t c = 0; c < channels; c += width)
      *at++ = score_difference(q + c, k1 + c, k2 + c, width);
  }
  const Vf scale = broadcast(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(width))));
  for (int64_t i = 0; i < pairs; i += kLanes)
    store(weights + i, sigmoid(load(weights + i) * scale));
  at = weights;
  for (int64_t r = 0; r < rows; ++r) {
    const float *v1 = t.first + r * t.first_stride + channels,
                *v2 = t.second + r * t.second_stride + channels;
    float* to = out + r * out_stride;
    for (int64_t begin = 0; begin < channels; begin += width) {
      const Vf weight = broadcast(*at++);
      for (int64_t c = begin; c < begin + width; c += kLanes) {
        const int lanes = lanes_left(begin + width, c);
        const Vf a = load_lanes(v1 + c, lanes);
        store_lanes(to + c, fma(weight, load_lanes(v2 + c, lanes) - a, a), lanes);
      }
    }
  }
}

}  // namespace fs::FS_ISA

#endif  // FASTSCORE_ATTENTION_H
