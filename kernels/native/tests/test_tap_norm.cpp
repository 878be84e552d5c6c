// tap_norm against plain double precision, over all magnitudes of a gradient.
#include "tensors.h"

using check::Buffer;
using check::Difference;
using check::Layout;
using check::Shape;
using check::Tensor;

namespace {

constexpr double kEps = 1e-5;

struct Problem {
  Shape shape;
  Layout feature_layout, gradient_layout;
  int dtype, parameter_dtype;
  int64_t gap;
  double magnitude;  // of the gradient
};

class Case {
 public:
  explicit Case(const Problem& problem)
      : p(problem),
        s(problem.shape),
        feature(s.batch, s.channels, s.positions, p.feature_layout, p.dtype, p.gap),
        gradient(s.batch, s.channels, s.positions, p.gradient_layout, p.dtype, p.gap),
        taps(s.batch, 2 * s.channels, s.positions, Layout::kChannelsLast, p.dtype, p.gap),
        parameters(4 * s.channels, p.parameter_dtype),
        log_rms(s.batch, FS_F32),
        stats(s.batch * s.groups * 4, FS_F32) {
    feature.buffer.fill(1, 1.0f, 0.3f);
    gradient.buffer.fill(2, static_cast<float>(p.magnitude),
                         0.2f * static_cast<float>(p.magnitude));
    parameters.fill(3);
  }

  int run(int64_t from, int64_t batch, bool want_stats = true) {
    const auto parameter = [&](int64_t which) {
      return static_cast<unsigned char*>(parameters.data()) +
             which * s.channels * (p.parameter_dtype == FS_F32 ? 4 : 2);
    };
    return fs_tap_norm(feature.data_of(from), feature.sample, feature.channel, feature.position,
                       gradient.data_of(from), gradient.sample, gradient.channel, gradient.position,
                       taps.data_of(from), taps.sample, taps.position, p.dtype, parameter(0),
                       parameter(1), parameter(2), parameter(3), p.parameter_dtype,
                       log_rms.floats() + from,
                       want_stats ? stats.floats() + from * s.groups * 4 : nullptr, batch,
                       s.channels, s.positions, s.groups, kEps);
  }

  void check_values() {
    CHECK(run(0, s.batch) == FS_OK, "%s", label());
    Difference output, magnitudes, statistics;
    for (int64_t i = 0; i < s.batch; ++i) {
      double squares = 0.0;
      for (int64_t j = 0; j < s.channels; ++j) {
        for (int64_t k = 0; k < s.positions; ++k)
          squares += gradient.get(i, j, k) * gradient.get(i, j, k);
      }
      const double rms =
          std::fmax(std::sqrt(squares / static_cast<double>(s.channels * s.positions)), 1e-30);
      magnitudes.add(log_rms.get(i), std::log(rms));
      for (int64_t g = 0; g < s.groups; ++g) {
        add_group(feature, i, g, 1.0, 0, &output, &statistics);
        add_group(gradient, i, g, rms, 1, &output, &statistics);
      }
    }
    CHECK(output.largest() < check::tolerance(p.dtype), "%s: %g", label(), output.largest());
    CHECK(magnitudes.largest() < 1e-6, "%s: %g", label(), magnitudes.largest());
    CHECK(statistics.largest() < 2e-6, "%s: %g", label(), statistics.largest());
    CHECK(taps.gaps_untouched() && log_rms.guarded() && stats.guarded(), "%s", label());
  }

  const char* label() {
    std::snprintf(text_, sizeof text_, "%s [%ld, %ld, %ld] groups %ld %s and %s dtype %d, %g",
                  fs_isa(), static_cast<long>(s.batch), static_cast<long>(s.channels),
                  static_cast<long>(s.positions), static_cast<long>(s.groups),
                  name_of(p.feature_layout), name_of(p.gradient_layout), p.dtype, p.magnitude);
    return text_;
  }

  Problem p;
  Shape s;
  Tensor feature, gradient, taps;
  Buffer parameters, log_rms, stats;

 private:
  // `unit`: what the values are divided by first
  void add_group(const Tensor& x, int64_t i, int64_t group, double unit, int64_t which,
                 Difference* output, Difference* statistics) const {
    const int64_t size = s.channels / s.groups, begin = group * size;
    const double count = static_cast<double>(size * s.positions);
    double mean = 0.0, squares = 0.0;
    for (int64_t j = begin; j < begin + size; ++j) {
      for (int64_t k = 0; k < s.positions; ++k) mean += x.get(i, j, k) / unit / count;
    }
    for (int64_t j = begin; j < begin + size; ++j) {
      for (int64_t k = 0; k < s.positions; ++k) {
        squares += (x.get(i, j, k) / unit - mean) * (x.get(i, j, k) / unit - mean);
      }
    }
    const double rstd = 1.0 / std::sqrt(squares / count + kEps);
    const float* found = reinterpret_cast<const float*>(const_cast<Buffer&>(stats).data()) +
                         (i * s.groups + group) * 4 + which * 2;
    statistics->add(found[0] / unit, mean);
    statistics->add(found[1] * unit / rstd, 1.0);
    for (int64_t j = begin; j < begin + size; ++j) {
      const double weight = parameters.get(2 * which * s.channels + j);
      const double bias = parameters.get((2 * which + 1) * s.channels + j);
      for (int64_t k = 0; k < s.positions; ++k) {
        output->add(taps.get(i, which * s.channels + j, k),
                    weight * (x.get(i, j, k) / unit - mean) * rstd + bias);
      }
    }
  }

  char text_[200];
};

const Layout kLayouts[] = {Layout::kChannelsLast, Layout::kContiguous};

void test_values() {
  int turn = 0;
  for (const Shape& shape :
       {Shape{1, 1, 1, 1}, Shape{2, 3, 5, 3}, Shape{1, 8, 7, 2}, Shape{3, 20, 9, 4},
        Shape{2, 33, 70, 11}, Shape{1, 80, 130, 8}, Shape{2, 112, 33, 8}}) {
    for (const Layout feature : kLayouts) {
      for (const Layout gradient : kLayouts) {
        for (const int dtype : {FS_F32, FS_BF16, FS_F16}) {
          ++turn;
          Case({shape, feature, gradient, dtype, turn % 2 ? FS_F32 : dtype, turn % 3 == 0 ? 5 : 0,
                1.0})
              .check_values();
        }
      }
    }
  }
}

// down to where the floor of the root mean square rules, and up to where squares leave even fp64's
// neighbourhood of fp32
void test_magnitudes() {
  for (const double magnitude : {0.0, 1e-37, 1e-30, 1e-25, 1e-12, 1e12, 1e25, 1e37}) {
    for (const Layout layout : kLayouts) {
      Case({{2, 40, 66, 8}, layout, layout, FS_F32, FS_F32, 0, magnitude}).check_values();
      if (magnitude != 1e-37)
        Case({{2, 40, 66, 8}, layout, layout, FS_BF16, FS_F32, 0, magnitude}).check_values();
    }
  }
}

// a gradient of zeros becomes the bias, exactly
void test_zeros() {
  Case tested({{2, 24, 50, 4}, Layout::kChannelsLast, Layout::kContiguous, FS_F32, FS_F32, 0, 0.0});
  tested.run(0, 2);
  for (int64_t j = 0; j < 24; ++j) {
    CHECK(tested.taps.get(1, 24 + j, 7) == tested.parameters.get(3 * 24 + j), "%s", tested.label());
  }
  CHECK(std::fabs(tested.log_rms.get(0) - std::log(1e-30)) < 1e-5, "%s: %g", tested.label(),
        tested.log_rms.get(0));
}

void test_threads_and_slots() {
  for (const Shape& shape : {Shape{1, 48, 1300, 4}, Shape{3, 64, 300, 8}, Shape{5, 40, 97, 8}}) {
    for (const Layout layout : kLayouts) {
      const Problem problem{shape, layout, layout, FS_F32, FS_F32, 0, 1e-9};
      Case one(problem), alone(problem);
      fs_set_threads(1);
      one.run(0, shape.batch);
      for (int64_t i = 0; i < shape.batch; ++i) alone.run(i, 1);
      fs_set_threads(0);
      const auto same = [&](const Case& other) {
        return other.taps.buffer == one.taps.buffer && other.log_rms == one.log_rms &&
               other.stats == one.stats;
      };
      CHECK(same(alone), "%s: sample by sample", one.label());
      check::with_threads({2, 3, 5}, [&](int threads) {
        Case many(problem);
        many.run(0, shape.batch);
        CHECK(same(many), "%s: %d threads", one.label(), threads);
      });
      Case without(problem);
      without.run(0, shape.batch, false);
      CHECK(without.taps.buffer == one.taps.buffer && without.stats.poisoned(0), "%s: no stats",
            one.label());
    }
  }
}

void test_bad_arguments() {
  Buffer x(64, FS_F32), taps(128, FS_F32), w(8, FS_F32), log_rms(1, FS_F32);
  struct Arguments {
    void *x, *taps, *w;
    float* log_rms;
    int64_t channel = 1, position = 8, taps_position = 16;
    int dtype = FS_F32, parameter_dtype = FS_F32;
    int64_t batch = 1, channels = 8, positions = 8, groups = 4;
    double eps = kEps;
  };
  const Arguments good{x.data(), taps.data(), w.data(), log_rms.floats()};
  x.fill(1);
  w.fill(2);
  const auto call = [&](const Arguments& a) {
    return fs_tap_norm(a.x, 64, a.channel, a.position, a.x, 64, a.channel, a.position, a.taps, 128,
                       a.taps_position, a.dtype, a.w, a.w, a.w, a.w, a.parameter_dtype, a.log_rms,
                       nullptr, a.batch, a.channels, a.positions, a.groups, a.eps);
  };
  const auto refused = [&](const char* what, auto&& change) {
    Arguments bad = good;
    change(bad);
    CHECK(call(bad) == FS_BAD_ARGUMENT, "%s", what);
  };
  refused("no input", [](Arguments& a) { a.x = nullptr; });
  refused("no output", [](Arguments& a) { a.taps = nullptr; });
  refused("no parameters", [](Arguments& a) { a.w = nullptr; });
  refused("nowhere to put the magnitudes", [](Arguments& a) { a.log_rms = nullptr; });
  refused("dtype", [](Arguments& a) { a.dtype = 9; });
  refused("parameter dtype", [](Arguments& a) { a.parameter_dtype = -2; });
  refused("no samples", [](Arguments& a) { a.batch = 0; });
  refused("negative channels", [](Arguments& a) { a.channels = -8; });
  refused("no positions", [](Arguments& a) { a.positions = 0; });
  refused("groups that do not divide", [](Arguments& a) { a.groups = 5; });
  refused("negative groups", [](Arguments& a) { a.groups = -4; });
  refused("neither layout", [](Arguments& a) { a.channel = 3; });
  refused("overlapping taps", [](Arguments& a) { a.taps_position = 15; });
  refused("overlapping samples", [](Arguments& a) { a.batch = 2, a.taps_position = 17; });
  refused("too large", [](Arguments& a) { a.batch = a.positions = int64_t{1} << 40; });
  refused("negative eps", [](Arguments& a) { a.eps = -1e-5; });
  CHECK(taps.poisoned(0) && taps.guarded() && log_rms.poisoned(0), "a refused call writes nothing");
  CHECK(call(good) == FS_OK && !taps.poisoned(0), "what the others differ from is fine");
}

}  // namespace

int main() {
  for (const char* isa : check::instruction_sets()) {
    fs_set_isa(isa);
    test_values();
    test_magnitudes();
    test_zeros();
    test_threads_and_slots();
    test_bad_arguments();
  }
  return check::result();
}
