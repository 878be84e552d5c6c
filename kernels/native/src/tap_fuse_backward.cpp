// Vector-Jacobian product of the attention fusion. Weights are computed again from the inputs; a
// head's tokens collect their gradients in one thread, query after query, so results do not depend
// on threads.
#include "attention.h"
#include "table.h"

namespace fs::FS_ISA {
namespace {

constexpr int64_t kRows = 32;
// products worth a thread of their own: about 10 microseconds
constexpr int64_t kProductGrain = 1 << 19;

template <class T>
struct Gradients {
  const T* out;
  T* query;
  T* tap[2];
  int64_t out_stride, query_stride, tap_stride[2];
};

// Everything of one sample.
template <class T>
struct Sample {
  TapTokens<T> tokens;
  Gradients<T> gradients;
};

template <class T>
struct Batch {
  Sample<T> first;
  int64_t query_batch, tap_batch[2], out_batch, grad_query_batch, grad_tap_batch[2], batch;

  Sample<T> sample(int64_t b) const {
    Sample<T> s = first;
    s.tokens.query += b * query_batch;
    s.gradients.out += b * out_batch;
    s.gradients.query += b * grad_query_batch;
    for (int i = 0; i < s.tokens.taps(); ++i) {
      s.tokens.tap[i] += b * tap_batch[i];
      s.gradients.tap[i] += b * grad_tap_batch[i];
    }
    return s;
  }
};

// Memory for one head: packed keys (both ways) and values, gradients of its tokens, and what a few
// queries need.
struct HeadMemory {
  float *keys, *values, *key_rows, *key_gradients, *value_gradients;
  float *query, *gradient, *packed_query, *packed_gradient, *weights, *scores, *result;

  static size_t bytes(int64_t tokens, int64_t width) {
    const size_t packed = Carver::bytes<float>(Panels(tokens, width).size());
    const size_t rows = Carver::bytes<float>(tokens * padded(width));
    return 2 * packed + 3 * rows + 5 * Carver::bytes<float>(kQueryRows * padded(width)) +
           2 * Carver::bytes<float>(kQueryRows * score_stride(tokens));
  }
  HeadMemory(void* memory, int64_t tokens, int64_t width) {
    Carver carver(memory);
    const int64_t packed = Panels(tokens, width).size();
    keys = carver.take<float>(packed);
    values = carver.take<float>(packed);
    key_rows = carver.take<float>(tokens * padded(width));
    key_gradients = carver.take<float>(tokens * padded(width));
    value_gradients = carver.take<float>(tokens * padded(width));
    query = carver.take<float>(kQueryRows * padded(width));
    gradient = carver.take<float>(kQueryRows * padded(width));
    packed_query = carver.take<float>(kQueryRows * padded(width));
    packed_gradient = carver.take<float>(kQueryRows * padded(width));
    result = carver.take<float>(kQueryRows * padded(width));
    weights = carver.take<float>(kQueryRows * score_stride(tokens));
    scores = carver.take<float>(kQueryRows * score_stride(tokens));
  }
};

// From a row of exponentials to weights, and from gradients of the weights to those of the scores:
// weight * (gradient - sum of weight * gradient) * scale.
void softmax_gradient(float* weights, float inverse, float* gradients, int64_t tokens,
                      float scale) {
  Vf total = zero();
  for (int64_t i = 0; i < tokens; i += kLanes) {
    const int lanes = lanes_left(tokens, i);
    const Vf weight = load_lanes(weights + i, lanes) * broadcast(inverse);
    store_lanes(weights + i, weight, lanes);
    total = fma(weight, load_lanes(gradients + i, lanes), total);
  }
  const Vf mean = broadcast(sum(total));
  for (int64_t i = 0; i < tokens; i += kLanes) {
    const int lanes = lanes_left(tokens, i);
    const Vf gradient = load_lanes(gradients + i, lanes) - mean;
    store_lanes(gradients + i, gradient * load_lanes(weights + i, lanes) * broadcast(scale), lanes);
  }
}

template <class T>
struct Head {
  Sample<T> s;
  int64_t head;
  HeadMemory m;

  void pack() const {
    const TapTokens<T>& t = s.tokens;
    pack_keys(t, head, 0, m.keys);
    pack_keys(t, head, t.channels, m.values);
    pack_values(t, head, 0, m.key_rows);
    const size_t bytes = static_cast<size_t>(t.tokens() * padded(t.width())) * sizeof(float);
    __builtin_memset(m.key_gradients, 0, bytes);
    __builtin_memset(m.value_gradients, 0, bytes);
  }

  void queries(int64_t begin, int64_t rows) const {
    const TapTokens<T>& t = s.tokens;
    const int64_t width = t.width(), tokens = t.tokens(), stride = score_stride(tokens);
    const Panels across(tokens, width), per_query(width, tokens), per_token(width, rows);
    const T* query = t.query + begin * t.query_stride + head * width;
    const T* gradient = s.gradients.out + begin * s.gradients.out_stride + head * width;
    pack_depths(per_token, m.packed_query, 0, rows, query, t.query_stride);
    pack_depths(per_token, m.packed_gradient, 0, rows, gradient, s.gradients.out_stride);
    for (int64_t r = 0; r < rows; ++r) {
      scale_row(query + r * t.query_stride, width, static_cast<float>(t.scale() * kLog2E),
                m.query + r * width);
      convert_row(gradient + r * s.gradients.out_stride, width, m.gradient + r * width);
    }
    gemm<Start::kZero>(across, rows, {m.query, width, 1}, m.keys, nullptr, m.weights, stride);
    gemm<Start::kZero>(across, rows, {m.gradient, width, 1}, m.values, nullptr, m.scores, stride);
    for (int64_t r = 0; r < rows; ++r) {
      float* weights = m.weights + r * stride;
      const float inverse = exponentials(weights, tokens);
      softmax_gradient(weights, inverse, m.scores + r * stride, tokens,
                       static_cast<float>(t.scale()));
    }
    gemm<Start::kZero>(per_query, rows, {m.scores, stride, 1}, m.key_rows, nullptr, m.result,
                       padded(width));
    for (int64_t r = 0; r < rows; ++r) {
      convert_row(m.result + r * padded(width), width,
                  s.gradients.query + (begin + r) * s.gradients.query_stride + head * width);
    }
    gemm<Start::kHeld>(per_token, tokens, {m.weights, 1, stride}, m.packed_gradient, nullptr,
                       m.value_gradients, padded(width));
    gemm<Start::kHeld>(per_token, tokens, {m.scores, 1, stride}, m.packed_query, nullptr,
                       m.key_gradients, padded(width));
  }

  void store_tokens() const {
    const TapTokens<T>& t = s.tokens;
    const int64_t step = padded(t.width());
    for (int64_t i = 0; i < t.tokens(); ++i) {
      const int64_t tap = i / t.positions;
      T* to =
          s.gradients.tap[tap] + i % t.positions * s.gradients.tap_stride[tap] + head * t.width();
      convert_row(m.key_gradients + i * step, t.width(), to);
      convert_row(m.value_gradients + i * step, t.width(), to + t.channels);
    }
  }

  void run() const {
    pack();
    const int64_t count = s.tokens.positions;
    for (int64_t n = 0; n < count; n += kQueryRows) {
      queries(n, count - n < kQueryRows ? count - n : kQueryRows);
    }
    store_tokens();
  }
};

template <class T>
int across_positions(const Batch<T>& f) {
  const TapTokens<T>& t = f.first.tokens;
  const int64_t pairs = f.batch * t.heads;
  const int threads =
      threads_for(5 * pairs * t.positions * t.tokens() * t.width(), pairs, kProductGrain);
  const size_t bytes = HeadMemory::bytes(t.tokens(), t.width());
  char* memory = static_cast<char*>(scratch(bytes * static_cast<size_t>(threads)));
  if (memory == nullptr) return FS_NO_MEMORY;
  parallel(threads, [&](Team team) {
    const HeadMemory own(memory + bytes * static_cast<size_t>(team.id), t.tokens(), t.width());
    const Range mine = team.share(pairs);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      Head<T>{f.sample(i / t.heads), i % t.heads, own}.run();
    }
  });
  return FS_OK;
}

// sum over a head of a * (c - b)
template <class T>
FS_INLINE float difference(const T* a, const T* b, const T* c, int64_t width) {
  Vf total = zero();
  for (int64_t i = 0; i < width; i += kLanes) {
    const int lanes = lanes_left(width, i);
    total =
        fma(load_lanes(a + i, lanes), load_lanes(c + i, lanes) - load_lanes(b + i, lanes), total);
  }
  return sum(total);
}

// Gradients of one position and head from the second token's weight and the gradient of its score.
template <class T>
FS_INLINE void spread(const Sample<T>& s, int64_t n, int64_t begin, float weight, float score) {
  const TapTokens<T>& t = s.tokens;
  const Gradients<T>& g = s.gradients;
  const T *k1 = t.tap[0] + n * t.tap_stride[0], *k2 = t.tap[1] + n * t.tap_stride[1];
  T *to1 = g.tap[0] + n * g.tap_stride[0], *to2 = g.tap[1] + n * g.tap_stride[1];
  for (int64_t c = begin; c < begin + t.width(); c += kLanes) {
    const int lanes = lanes_left(begin + t.width(), c);
    const Vf query = load_lanes(t.query + n * t.query_stride + c, lanes) * broadcast(score);
    const Vf out = load_lanes(g.out + n * g.out_stride + c, lanes);
    const Vf keys = load_lanes(k2 + c, lanes) - load_lanes(k1 + c, lanes);
    store_lanes(g.query + n * g.query_stride + c, keys * broadcast(score), lanes);
    store_lanes(to1 + c, zero() - query, lanes);
    store_lanes(to2 + c, query, lanes);
    store_lanes(to1 + t.channels + c, out * broadcast(1.0f - weight), lanes);
    store_lanes(to2 + t.channels + c, out * broadcast(weight), lanes);
  }
}

template <class T>
void two_tokens(const Sample<T>& s, Range positions, float* weights, float* slopes) {
  const TapTokens<T>& t = s.tokens;
  const int64_t width = t.width();
  int64_t pairs = 0;
  for (int64_t n = positions.begin; n < positions.end; ++n) {
    const T *q = t.query + n * t.query_stride, *g = s.gradients.out + n * s.gradients.out_stride;
    const T *k1 = t.tap[0] + n * t.tap_stride[0], *k2 = t.tap[1] + n * t.tap_stride[1];
    for (int64_t c = 0; c < t.channels; c += width, ++pairs) {
      weights[pairs] = difference(q + c, k1 + c, k2 + c, width);
      slopes[pairs] = difference(g + c, k1 + t.channels + c, k2 + t.channels + c, width);
    }
  }
  const Vf scale = broadcast(static_cast<float>(t.scale()));
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const Vf weight = sigmoid(load(weights + i) * scale);
    store(weights + i, weight);
    store(slopes + i, weight * (broadcast(1.0f) - weight) * load(slopes + i) * scale);
  }
  for (int64_t i = 0; i < pairs; ++i) {
    spread(s, positions.begin + i / t.heads, i % t.heads * width, weights[i], slopes[i]);
  }
}

// one token a position: its weight is one, whatever query and key are
template <class T>
void one_token(const Sample<T>& s, Range positions) {
  const Gradients<T>& g = s.gradients;
  const size_t bytes = static_cast<size_t>(s.tokens.channels) * sizeof(T);
  for (int64_t n = positions.begin; n < positions.end; ++n) {
    T* to = g.tap[0] + n * g.tap_stride[0];
    __builtin_memset(g.query + n * g.query_stride, 0, bytes);
    __builtin_memset(to, 0, bytes);
    __builtin_memcpy(to + s.tokens.channels, g.out + n * g.out_stride, bytes);
  }
}

template <class T>
int within_positions(const Batch<T>& f) {
  const TapTokens<T>& t = f.first.tokens;
  const int64_t positions = t.positions, blocks = (positions + kRows - 1) / kRows;
  const int threads = threads_for(6 * f.batch * t.channels * positions, f.batch * blocks);
  const int64_t pairs = padded(kRows * t.heads);
  const size_t bytes = 2 * Carver::bytes<float>(pairs);
  char* memory = static_cast<char*>(scratch(bytes * static_cast<size_t>(threads)));
  if (memory == nullptr) return FS_NO_MEMORY;
  parallel(threads, [&](Team team) {
    Carver carver(memory + bytes * static_cast<size_t>(team.id));
    float* weights = carver.take<float>(pairs);
    float* slopes = carver.take<float>(pairs);
    const Range mine = team.share(f.batch * blocks);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t begin = i % blocks * kRows;
      const Range rows{begin, positions - begin < kRows ? positions : begin + kRows};
      if (t.taps() == 1) {
        one_token(f.sample(i / blocks), rows);
      } else {
        two_tokens(f.sample(i / blocks), rows, weights, slopes);
      }
    }
  });
  return FS_OK;
}

}  // namespace

int tap_fuse_backward(const void* grad, int64_t grad_batch, int64_t grad_position,
                      const void* query, int64_t q_batch, int64_t q_position, const void* first,
                      int64_t first_batch, int64_t first_position, const void* second,
                      int64_t second_batch, int64_t second_position, void* grad_query,
                      int64_t gq_batch, int64_t gq_position, void* grad_first, int64_t gfirst_batch,
                      int64_t gfirst_position, void* grad_second, int64_t gsecond_batch,
                      int64_t gsecond_position, int dtype, int64_t batch, int64_t channels,
                      int64_t positions, int64_t heads, int spatial) {
  return with_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const TapTokens<T> tokens{static_cast<const T*>(query),
                              {static_cast<const T*>(first), static_cast<const T*>(second)},
                              q_position,
                              {first_position, second_position},
                              channels,
                              positions,
                              heads};
    const Gradients<T> gradients{static_cast<const T*>(grad),
                                 static_cast<T*>(grad_query),
                                 {static_cast<T*>(grad_first), static_cast<T*>(grad_second)},
                                 grad_position,
                                 gq_position,
                                 {gfirst_position, gsecond_position}};
    const Batch<T> all{
        {tokens, gradients},           q_batch, {first_batch, second_batch}, grad_batch, gq_batch,
        {gfirst_batch, gsecond_batch}, batch};
    return spatial ? across_positions(all) : within_positions(all);
  });
}

}  // namespace fs::FS_ISA
