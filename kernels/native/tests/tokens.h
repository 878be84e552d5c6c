// Channels-last tensors for tests, with gaps between positions and samples that nobody may write
// to.
#ifndef FASTSCORE_TESTS_TOKENS_H
#define FASTSCORE_TESTS_TOKENS_H

#include "buffers.h"

namespace check {

// [batch, channels, positions]
struct Tokens {
  int64_t batch, channels, positions, position_stride, batch_stride;
  Buffer buffer;

  Tokens(int64_t batch, int64_t channels, int64_t positions, int dtype, int64_t gap)
      : batch(batch),
        channels(channels),
        positions(positions),
        position_stride(channels + gap),
        batch_stride(positions * (channels + gap) + gap),
        buffer(batch * batch_stride, dtype) {}

  int64_t index(int64_t b, int64_t c, int64_t n) const {
    return b * batch_stride + n * position_stride + c;
  }
  double get(int64_t b, int64_t c, int64_t n) const { return buffer.get(index(b, c, n)); }
  // a sample's first element
  void* at(int64_t b) {
    const int64_t width = buffer.dtype() == FS_F32 ? 4 : 2;
    return static_cast<char*>(buffer.data()) + b * batch_stride * width;
  }
  // neither gaps nor what lies before and after was written to
  bool kept_to_itself() const {
    for (int64_t i = 0; i < buffer.size(); ++i) {
      const int64_t within = i % batch_stride;
      const bool gap =
          within >= positions * position_stride || within % position_stride >= channels;
      if (gap && !buffer.poisoned(i)) return false;
    }
    return buffer.guarded();
  }
};

// Dense doubles [batch, channels, positions].
struct Exact {
  int64_t batch, channels, positions;
  std::vector<double> values;

  Exact(int64_t batch, int64_t channels, int64_t positions)
      : batch(batch),
        channels(channels),
        positions(positions),
        values(static_cast<size_t>(batch * channels * positions)) {}
  explicit Exact(const Tokens& t) : Exact(t.batch, t.channels, t.positions) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t n = 0; n < positions; ++n) at(b, c, n) = t.get(b, c, n);
      }
    }
  }
  double& at(int64_t b, int64_t c, int64_t n) {
    return values[static_cast<size_t>((b * channels + c) * positions + n)];
  }
  double at(int64_t b, int64_t c, int64_t n) const {
    return values[static_cast<size_t>((b * channels + c) * positions + n)];
  }
  double largest() const {
    double most = 0;
    for (const double v : values) most = std::fmax(most, std::fabs(v));
    return most;
  }
};

// The largest error relative to the largest value; infinite where something is not a number.
inline double error(const Exact& expected, const Tokens& got) {
  double worst = 0;
  for (int64_t b = 0; b < got.batch; ++b) {
    for (int64_t c = 0; c < got.channels; ++c) {
      for (int64_t n = 0; n < got.positions; ++n) {
        const double difference = std::fabs(expected.at(b, c, n) - got.get(b, c, n));
        if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
      }
    }
  }
  return worst / std::fmax(expected.largest(), 1e-3);
}

// Softmax weights of one query over all tokens it sees, each (tap, position).
struct Attention {
  const Exact& query;
  std::vector<const Exact*> taps;
  int64_t heads;
  bool spatial;

  int64_t width() const { return query.channels / heads; }
  int64_t first(int64_t n) const { return spatial ? 0 : n; }
  int64_t last(int64_t n) const { return spatial ? query.positions : n + 1; }

  // body(tap, position, weight)
  template <class Body>
  void each(int64_t b, int64_t head, int64_t n, Body&& body) const {
    double most = -INFINITY, total = 0;
    const auto score = [&](const Exact& tap, int64_t m) {
      double sum = 0;
      for (int64_t c = head * width(); c < (head + 1) * width(); ++c) {
        sum += query.at(b, c, n) * tap.at(b, c, m);
      }
      return sum / std::sqrt(static_cast<double>(width()));
    };
    for (const Exact* tap : taps) {
      for (int64_t m = first(n); m < last(n); ++m) most = std::fmax(most, score(*tap, m));
    }
    for (const Exact* tap : taps) {
      for (int64_t m = first(n); m < last(n); ++m) total += std::exp(score(*tap, m) - most);
    }
    for (size_t i = 0; i < taps.size(); ++i) {
      for (int64_t m = first(n); m < last(n); ++m) {
        body(i, m, std::exp(score(*taps[i], m) - most) / total);
      }
    }
  }

  Exact forward() const {
    Exact out(query.batch, query.channels, query.positions);
    for (int64_t b = 0; b < query.batch; ++b) {
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t n = 0; n < query.positions; ++n) {
          each(b, head, n, [&](size_t tap, int64_t m, double weight) {
            for (int64_t c = head * width(); c < (head + 1) * width(); ++c) {
              out.at(b, c, n) += weight * taps[tap]->at(b, query.channels + c, m);
            }
          });
        }
      }
    }
    return out;
  }
};

}  // namespace check

#endif  // FASTSCORE_TESTS_TOKENS_H
