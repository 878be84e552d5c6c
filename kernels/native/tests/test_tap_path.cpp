// A whole scale of the tap path against doubles, on every instruction set.
#include "tokens.h"

using check::Attention;
using check::Buffer;
using check::Exact;
using check::Tokens;

namespace {

constexpr double kEps = 1e-5;

struct Shape {
  int64_t batch, channels, width, positions, groups, heads;
};

constexpr Shape kShapes[] = {{1, 32, 32, 35, 8, 4}, {2, 64, 80, 20, 8, 4}, {3, 24, 112, 15, 8, 4},
                             {2, 30, 30, 9, 5, 3},  {1, 7, 7, 1, 1, 7},    {2, 36, 36, 15, 2, 1},
                             {5, 16, 12, 63, 4, 2}, {2, 1, 3, 12, 1, 3},   {1, 48, 144, 100, 4, 4}};

// parameters are of the tensors' type or fp32
struct Types {
  int tensors, parameters;
};

constexpr Types kTypes[] = {
    {FS_F32, FS_F32}, {FS_BF16, FS_F32}, {FS_BF16, FS_BF16}, {FS_F16, FS_F32}, {FS_F16, FS_F16}};

struct Parameters {
  // of normalisations, then of query, both keys and values, skip and projection
  Buffer feature_weight, feature_bias, gradient_weight, gradient_bias;
  Buffer weight[5], bias[5];
  int64_t rows[5], depth[5];

  Parameters(const Shape& s, int dtype)
      : rows{s.width, 2 * s.width, 2 * s.width, s.width, s.width},
        depth{s.channels, s.channels, s.channels, 2 * s.channels, s.width} {
    uint64_t seed = 40;
    for (Buffer* b : {&feature_weight, &gradient_weight}) {
      *b = Buffer(s.channels, dtype);
      b->fill(seed++, 0.5f, 1.0f);
    }
    for (Buffer* b : {&feature_bias, &gradient_bias}) {
      *b = Buffer(s.channels, dtype);
      b->fill(seed++);
    }
    for (int i = 0; i < 5; ++i) {
      weight[i] = Buffer(rows[i] * depth[i], dtype);
      weight[i].fill(seed++, 1.0f / std::sqrt(static_cast<float>(depth[i])));
      bias[i] = Buffer(rows[i], dtype);
      bias[i].fill(seed++);
    }
  }
};

struct Problem {
  Shape shape;
  int dtype, parameter_dtype;
  bool spatial;
  Tokens feature, gradient, out;
  Parameters parameters;
  Buffer log_rms;

  Problem(const Shape& s, int dtype, int parameter_dtype, bool spatial, float scale)
      : shape(s),
        dtype(dtype),
        parameter_dtype(parameter_dtype),
        spatial(spatial),
        feature(s.batch, s.channels, s.positions, dtype, 2),
        gradient(s.batch, s.channels, s.positions, dtype, 0),
        out(s.batch, s.width, s.positions, dtype, 3),
        parameters(s, parameter_dtype),
        log_rms(s.batch, FS_F32) {
    feature.buffer.fill(1, 2.0f, 0.5f);
    gradient.buffer.fill(2, scale, 0.3f * scale);
  }

  int run(int64_t b, int64_t rows) {
    Parameters& p = parameters;
    const auto w = [&](int i) { return p.weight[i].data(); };
    const auto bias = [&](int i) { return p.bias[i].data(); };
    return fs_tap_path(feature.at(b), feature.batch_stride, feature.position_stride, gradient.at(b),
                       gradient.batch_stride, gradient.position_stride, out.at(b), out.batch_stride,
                       out.position_stride, dtype, p.feature_weight.data(), p.feature_bias.data(),
                       p.gradient_weight.data(), p.gradient_bias.data(), w(0), bias(0), w(1),
                       bias(1), w(2), bias(2), w(3), bias(3), w(4), bias(4), parameter_dtype,
                       log_rms.floats() + b, rows, shape.channels, shape.width, shape.positions,
                       shape.groups, shape.heads, spatial, kEps);
  }
  void poison() {
    out.buffer.poison();
    log_rms.poison();
  }
};

// group normalisation of x / rms, into channels from `to` on
void normalise(const Tokens& x, int64_t b, double rms, int64_t groups, const Buffer& weight,
               const Buffer& bias, int64_t to, Exact* out) {
  const int64_t size = x.channels / groups;
  for (int64_t g = 0; g < groups; ++g) {
    double mean = 0, variance = 0;
    const double count = static_cast<double>(size * x.positions);
    const auto each = [&](auto&& body) {
      for (int64_t c = g * size; c < (g + 1) * size; ++c) {
        for (int64_t n = 0; n < x.positions; ++n) body(c, n, x.get(b, c, n) / rms);
      }
    };
    each([&](int64_t, int64_t, double v) { mean += v / count; });
    each([&](int64_t, int64_t, double v) { variance += (v - mean) * (v - mean) / count; });
    each([&](int64_t c, int64_t n, double v) {
      out->at(b, to + c, n) = (v - mean) / std::sqrt(variance + kEps) * weight.get(c) + bias.get(c);
    });
  }
}

double root_mean_square(const Tokens& x, int64_t b) {
  double total = 0;
  for (int64_t c = 0; c < x.channels; ++c) {
    for (int64_t n = 0; n < x.positions; ++n) total += x.get(b, c, n) * x.get(b, c, n);
  }
  return std::fmax(std::sqrt(total / static_cast<double>(x.channels * x.positions)), 1e-30);
}

// adds weight x + bias, x in channels from `from` on
void project(const Parameters& p, int i, const Exact& x, int64_t from, Exact* out) {
  for (int64_t b = 0; b < x.batch; ++b) {
    for (int64_t n = 0; n < x.positions; ++n) {
      for (int64_t o = 0; o < p.rows[i]; ++o) {
        double sum = p.bias[i].get(o);
        for (int64_t k = 0; k < p.depth[i]; ++k) {
          sum += p.weight[i].get(o * p.depth[i] + k) * x.at(b, from + k, n);
        }
        out->at(b, o, n) += sum;
      }
    }
  }
}

struct Expected {
  Exact out;
  std::vector<double> log_rms;
};

Expected expect(const Problem& p) {
  const Shape& s = p.shape;
  Exact taps(s.batch, 2 * s.channels, s.positions);
  Expected e{Exact(s.batch, s.width, s.positions), {}};
  for (int64_t b = 0; b < s.batch; ++b) {
    const double rms = root_mean_square(p.gradient, b);
    e.log_rms.push_back(std::log(rms));
    const Parameters& q = p.parameters;
    normalise(p.feature, b, 1, s.groups, q.feature_weight, q.feature_bias, 0, &taps);
    normalise(p.gradient, b, rms, s.groups, q.gradient_weight, q.gradient_bias, s.channels, &taps);
  }
  Exact query(s.batch, s.width, s.positions), first(s.batch, 2 * s.width, s.positions);
  Exact second = first;
  project(p.parameters, 0, taps, 0, &query);
  project(p.parameters, 1, taps, 0, &first);
  project(p.parameters, 2, taps, s.channels, &second);
  const Exact fused = Attention{query, {&first, &second}, s.heads, p.spatial}.forward();
  project(p.parameters, 3, taps, 0, &e.out);
  project(p.parameters, 4, fused, 0, &e.out);
  return e;
}

void test(const char* isa, Problem& p, const Expected& e) {
  fs_set_isa(isa);
  const Shape& s = p.shape;
  char name[160];
  std::snprintf(name, sizeof name, "%s, dtypes %d %d, channels %d, width %d, positions %d, %s", isa,
                p.dtype, p.parameter_dtype, static_cast<int>(s.channels), static_cast<int>(s.width),
                static_cast<int>(s.positions), p.spatial ? "spatial" : "local");
  fs_set_threads(1);
  p.poison();
  CHECK(p.run(0, s.batch) == FS_OK, "%s", name);
  CHECK(check::error(e.out, p.out) < check::tolerance(p.dtype), "%s: %g", name,
        check::error(e.out, p.out));
  for (int64_t b = 0; b < s.batch; ++b) {
    const double difference = std::fabs(p.log_rms.get(b) - e.log_rms[static_cast<size_t>(b)]);
    CHECK(difference < 1e-4, "%s: log rms %g", name, difference);
  }
  CHECK(p.out.kept_to_itself() && p.log_rms.guarded(), "%s wrote outside", name);
  const Buffer once = p.out.buffer, once_log = p.log_rms;
  const auto same = [&] { return p.out.buffer == once && p.log_rms == once_log; };
  for (const int threads : {2, 3}) {
    fs_set_threads(threads);
    p.poison();
    CHECK(p.run(0, s.batch) == FS_OK && same(), "%s, %d threads", name, threads);
  }
  p.poison();
  for (int64_t b = 0; b < s.batch; ++b) CHECK(p.run(b, 1) == FS_OK, "%s", name);
  CHECK(same(), "%s: a sample alone has other bits", name);
  fs_set_threads(0);
}

// enough work for several threads, which small shapes never start: samples alone and shared, and
// with few positions by columns
void test_threads(const char* isa) {
  fs_set_isa(isa);
  struct Case {
    int64_t width, positions, heads;
    int dtype;
  };
  const Case cases[] = {{48, 210, 3, FS_F32}, {144, 100, 4, FS_F32}, {132, 90, 3, FS_BF16}};
  for (const Case& c : cases) {
    for (const bool spatial : {false, true}) {
      for (const int64_t batch : {1, 2, 5}) {
        Problem p({batch, 40, c.width, c.positions, 4, c.heads}, c.dtype, FS_F32, spatial, 1.0f);
        fs_set_threads(1);
        CHECK(p.run(0, batch) == FS_OK, "%s", isa);
        const Buffer once = p.out.buffer;
        for (const int threads : {2, 3, 4}) {
          fs_set_threads(threads);
          p.poison();
          CHECK(p.run(0, batch) == FS_OK && p.out.buffer == once,
                "%s, width %d, batch %d, %d threads", isa, static_cast<int>(c.width),
                static_cast<int>(batch), threads);
        }
      }
    }
  }
  fs_set_threads(0);
}

void test_zero_gradient(const char* isa) {
  fs_set_isa(isa);
  Problem p({1, 16, 8, 10, 4, 2}, FS_F32, FS_F32, true, 0.0f);
  CHECK(p.run(0, 1) == FS_OK, "%s", isa);
  CHECK(check::error(expect(p).out, p.out) < 1e-5, "%s", isa);
  CHECK(std::fabs(p.log_rms.get(0) - std::log(1e-30)) < 1e-4, "%s: %g", isa, p.log_rms.get(0));
}

void test_bad_arguments() {
  const Shape good{1, 8, 8, 4, 2, 2};
  const auto code = [&](auto&& change) {
    Problem p(good, FS_F32, FS_F32, true, 1.0f);
    change(p);
    const int result = p.run(0, p.shape.batch);
    for (int64_t i = 0; i < p.out.buffer.size(); ++i) {
      if (!p.out.buffer.poisoned(i)) return static_cast<int>(FS_OK);
    }
    return result;
  };
  CHECK(code([](Problem& p) { p.dtype = 5; }) == FS_BAD_ARGUMENT, "dtype");
  CHECK(code([](Problem& p) { p.parameter_dtype = -1; }) == FS_BAD_ARGUMENT, "parameter dtype");
  CHECK(code([](Problem& p) { p.shape.groups = 3; }) == FS_BAD_ARGUMENT, "groups");
  CHECK(code([](Problem& p) { p.shape.groups = 0; }) == FS_BAD_ARGUMENT, "no groups");
  CHECK(code([](Problem& p) { p.shape.heads = 3; }) == FS_BAD_ARGUMENT, "heads");
  CHECK(code([](Problem& p) { p.out.position_stride = 7; }) == FS_BAD_ARGUMENT, "overlap");
  CHECK(code([](Problem& p) { p.feature.position_stride = -10; }) == FS_BAD_ARGUMENT, "stride");
  for (const int64_t size : {int64_t(0), int64_t(-1), INT64_MAX}) {
    CHECK(code([&](Problem& p) { p.shape.channels = size; }) == FS_BAD_ARGUMENT, "channels");
    CHECK(code([&](Problem& p) { p.shape.width = size; }) == FS_BAD_ARGUMENT, "width");
    CHECK(code([&](Problem& p) { p.shape.positions = size; }) == FS_BAD_ARGUMENT, "positions");
    CHECK(code([&](Problem& p) { p.shape.batch = size; }) == FS_BAD_ARGUMENT, "batch");
  }
}

}  // namespace

int main() {
  const auto isas = check::instruction_sets();
  for (const Shape& shape : kShapes) {
    for (const bool spatial : {false, true}) {
      for (const Types& types : kTypes) {
        Problem p(shape, types.tensors, types.parameters, spatial, 1.0f);
        const Expected e = expect(p);
        for (const char* isa : isas) test(isa, p, e);
      }
      for (const float scale : {1e-25f, 1e25f}) {
        Problem p(shape, FS_F32, FS_F32, spatial, scale);
        const Expected e = expect(p);
        for (const char* isa : isas) test(isa, p, e);
      }
    }
  }
  for (const char* isa : isas) {
    test_threads(isa);
    test_zero_gradient(isa);
  }
  test_bad_arguments();
  return check::result();
}
