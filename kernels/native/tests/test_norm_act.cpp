// norm_act and its vector-Jacobian product against plain double precision.
#include "tensors.h"

using check::Buffer;
using check::Difference;
using check::Layout;
using check::Shape;
using check::Tensor;

namespace {

constexpr double kEps = 1e-5;

double sigmoid(double z) { return 1.0 / (1.0 + std::exp(-z)); }

struct Problem {
  Shape shape;
  Layout layout;
  int dtype, parameter_dtype, film_dtype, act, copies;
  bool film;
  int64_t gap;
  double mean;  // of x
};

// Inputs, outputs and a plain implementation of one problem.
class Case {
 public:
  explicit Case(const Problem& problem)
      : p(problem),
        s(problem.shape),
        x(s.batch, s.channels, s.positions, p.layout, p.dtype, p.gap),
        y(x),
        grad(p.copies * s.batch, s.channels, s.positions, p.layout, p.dtype, p.gap),
        grad_x(grad),
        weight(s.channels, p.parameter_dtype),
        bias(s.channels, p.parameter_dtype),
        film_stride(2 * s.channels + p.gap),
        film(s.batch * film_stride, p.film_dtype),
        mean(s.batch * s.groups, FS_F32),
        rstd(s.batch * s.groups, FS_F32),
        sums(2 * p.copies * s.batch * s.channels, FS_F32) {
    x.buffer.fill(1, 1.0f, static_cast<float>(p.mean));
    grad.buffer.fill(2);
    weight.fill(3, 0.5f, 1.0f);
    bias.fill(4);
    film.fill(5, 0.5f);
  }

  // `batch` samples from sample `from` on
  int forward(int64_t from, int64_t batch) {
    return fs_norm_act(x.data_of(from), x.sample, x.channel, x.position, y.data_of(from), y.sample,
                       y.channel, y.position, p.dtype, weight.data(), bias.data(),
                       p.parameter_dtype, film_of(from), film_stride, p.film_dtype,
                       mean.floats() + from * s.groups, rstd.floats() + from * s.groups, batch,
                       s.channels, s.positions, s.groups, p.act, kEps);
  }

  int backward(bool want_gradient = true, bool want_sums = true) {
    return fs_norm_act_backward(
        grad.data(), grad.sample, grad.channel, grad.position, x.data(), x.sample, x.channel,
        x.position, want_gradient ? grad_x.data() : nullptr, grad_x.sample, grad_x.channel,
        grad_x.position, p.dtype, weight.data(), bias.data(), p.parameter_dtype, film_of(0),
        film_stride, p.film_dtype, mean.floats(), rstd.floats(),
        want_sums ? sums.floats() : nullptr, s.batch, p.copies, s.channels, s.positions, s.groups,
        p.act);
  }

  void* film_of(int64_t i) {
    if (!p.film) return nullptr;
    return static_cast<unsigned char*>(film.data()) +
           i * film_stride * (p.film_dtype == FS_F32 ? 4 : 2);
  }
  double scale(int64_t i, int64_t j) const {
    return weight.get(j) * (p.film ? 1.0 + film.get(i * film_stride + j) : 1.0);
  }
  double shift(int64_t i, int64_t j) const {
    if (!p.film) return bias.get(j);
    return bias.get(j) * (1.0 + film.get(i * film_stride + j)) +
           film.get(i * film_stride + s.channels + j);
  }

  void check_forward() {
    CHECK(forward(0, s.batch) == FS_OK, "%s", label());
    Difference output, statistics;
    const int64_t size = s.channels / s.groups;
    for (int64_t i = 0; i < s.batch; ++i) {
      for (int64_t g = 0; g < s.groups; ++g) {
        double center, inverse;
        moments(i, g, &center, &inverse);
        statistics.add(mean.get(i * s.groups + g), center);
        statistics.add(rstd.get(i * s.groups + g) / inverse, 1.0);
        for (int64_t j = g * size; j < (g + 1) * size; ++j) {
          for (int64_t k = 0; k < s.positions; ++k) {
            const double z = scale(i, j) * (x.get(i, j, k) - center) * inverse + shift(i, j);
            output.add(y.get(i, j, k), p.act ? z * sigmoid(z) : z);
          }
        }
      }
    }
    CHECK(output.largest() < check::tolerance(p.dtype), "%s: %g", label(), output.largest());
    CHECK(statistics.largest() < 2e-6, "%s: %g", label(), statistics.largest());
    CHECK(y.gaps_untouched() && mean.guarded() && rstd.guarded(), "%s", label());
  }

  void check_backward() {
    CHECK(backward() == FS_OK, "%s", label());
    Difference output, total;
    for (int64_t row = 0; row < p.copies * s.batch; ++row) {
      for (int64_t g = 0; g < s.groups; ++g) add_group(row, g, &output, &total);
    }
    // groups of few values nearly cancel, and that as often as there are cases
    CHECK(output.largest() < 3 * check::tolerance(p.dtype), "%s: %g", label(), output.largest());
    CHECK(total.largest() < 5e-5, "%s: %g", label(), total.largest());
    CHECK(grad_x.gaps_untouched() && sums.guarded(), "%s", label());
  }

  const char* label() {
    std::snprintf(
        text_, sizeof text_,
        "%s [%ld, %ld, %ld] groups %ld %s dtype %d parameters %d film %d act %d copies %d gap %ld",
        fs_isa(), static_cast<long>(s.batch), static_cast<long>(s.channels),
        static_cast<long>(s.positions), static_cast<long>(s.groups), name_of(p.layout), p.dtype,
        p.parameter_dtype, p.film ? p.film_dtype : -1, p.act, p.copies, static_cast<long>(p.gap));
    return text_;
  }

  Problem p;
  Shape s;
  Tensor x, y, grad, grad_x;
  Buffer weight, bias;
  int64_t film_stride;
  Buffer film, mean, rstd, sums;

 private:
  void moments(int64_t i, int64_t group, double* center, double* inverse) const {
    const int64_t size = s.channels / s.groups;
    double total = 0.0, squares = 0.0;
    const double count = static_cast<double>(size * s.positions);
    for (int64_t j = group * size; j < (group + 1) * size; ++j) {
      for (int64_t k = 0; k < s.positions; ++k) total += x.get(i, j, k);
    }
    *center = total / count;
    for (int64_t j = group * size; j < (group + 1) * size; ++j) {
      for (int64_t k = 0; k < s.positions; ++k) {
        squares += (x.get(i, j, k) - *center) * (x.get(i, j, k) - *center);
      }
    }
    *inverse = 1.0 / std::sqrt(squares / count + kEps);
  }

  void add_group(int64_t row, int64_t group, Difference* output, Difference* total) const {
    const int64_t i = row % s.batch, size = s.channels / s.groups;
    // the statistics that were handed over: fp32, so that their rounding is no error of this
    // function
    const double center = mean.get(i * s.groups + group), inverse = rstd.get(i * s.groups + group);
    double first = 0.0, second = 0.0;
    const auto hat = [&](int64_t j, int64_t k) { return (x.get(i, j, k) - center) * inverse; };
    const auto dz = [&](int64_t j, int64_t k) {
      const double z = scale(i, j) * hat(j, k) + shift(i, j), sig = sigmoid(z);
      return grad.get(row, j, k) * (p.act ? sig * (1.0 + z * (1.0 - sig)) : 1.0);
    };
    for (int64_t j = group * size; j < (group + 1) * size; ++j) {
      double plain = 0.0, weighted = 0.0;
      for (int64_t k = 0; k < s.positions; ++k) {
        const double value = dz(j, k);
        plain += value;
        weighted += value * hat(j, k);
      }
      total->add(sums.get(row * s.channels + j), plain);
      total->add(sums.get((p.copies * s.batch + row) * s.channels + j), weighted);
      first += scale(i, j) * plain;
      second += scale(i, j) * weighted;
    }
    const double count = static_cast<double>(size * s.positions);
    for (int64_t j = group * size; j < (group + 1) * size; ++j) {
      for (int64_t k = 0; k < s.positions; ++k) {
        const double wanted =
            inverse * (scale(i, j) * dz(j, k) - first / count - hat(j, k) * second / count);
        // a group without variance divides by sqrt(eps): measured against what was multiplied
        output->add(grad_x.get(row, j, k) / inverse, wanted / inverse);
      }
    }
  }

  char text_[256];
};

const Shape kShapes[] = {{1, 1, 1, 1},    {2, 3, 5, 3},    {1, 8, 7, 2},    {3, 20, 9, 4},
                         {2, 33, 70, 11}, {1, 80, 130, 8}, {2, 112, 33, 8}, {1, 26, 300, 2}};

void test_values() {
  int turn = 0;
  for (const Shape& shape : kShapes) {
    for (const Layout layout : {Layout::kChannelsLast, Layout::kContiguous}) {
      for (const int dtype : {FS_F32, FS_BF16, FS_F16}) {
        for (const int copies : {1, 2, 3}) {
          // what matters less takes turns
          ++turn;
          const Problem problem{
              shape,         layout, dtype,         turn % 2 ? FS_F32 : dtype, turn % 3,
              turn % 4 != 0, copies, turn % 5 != 0, turn % 3 == 0 ? 5 : 0,     0.0};
          Case tested(problem);
          tested.check_forward();
          tested.check_backward();
        }
      }
    }
  }
}

// a mean of 300 with a deviation of 1, where fp16 has steps of 1/4 and squares in fp32 lose the
// variance
void test_large_mean() {
  for (const Layout layout : {Layout::kChannelsLast, Layout::kContiguous}) {
    for (const int dtype : {FS_F32, FS_BF16, FS_F16}) {
      Case tested({{2, 48, 700, 8}, layout, dtype, FS_F32, FS_F32, 1, 1, true, 0, 300.0});
      tested.check_forward();
    }
  }
}

// more than the second pass of a 16-bit gradient may keep in memory
void test_large_sample() {
  for (const Layout layout : {Layout::kChannelsLast, Layout::kContiguous}) {
    Case tested({{1, 16, 66000, 8}, layout, FS_BF16, FS_F32, FS_F32, 1, 1, true, 0, 0.0});
    tested.check_forward();
    tested.check_backward();
  }
}

// what is no number spoils its group and nothing else
void test_nan() {
  for (const Layout layout : {Layout::kChannelsLast, Layout::kContiguous}) {
    Case tested({{2, 24, 50, 4}, layout, FS_F32, FS_F32, FS_F32, 1, 1, true, 0, 0.0});
    tested.x.set(1, 7, 31, std::nan(""));
    tested.forward(0, 2);
    tested.backward();
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < 24; ++j) {
        const bool spoilt = i == 1 && j / 6 == 1;
        CHECK(std::isnan(tested.y.get(i, j, 3)) == spoilt, "%s: %ld %ld", tested.label(),
              static_cast<long>(i), static_cast<long>(j));
        CHECK(std::isnan(tested.grad_x.get(i, j, 3)) == spoilt, "%s: %ld %ld", tested.label(),
              static_cast<long>(i), static_cast<long>(j));
      }
    }
  }
}

void test_threads() {
  for (const Shape& shape : {Shape{1, 48, 1300, 4}, Shape{3, 64, 300, 8}, Shape{5, 40, 97, 8}}) {
    for (const Layout layout : {Layout::kChannelsLast, Layout::kContiguous}) {
      for (const int dtype : {FS_F32, FS_BF16}) {
        Case one({shape, layout, dtype, FS_F32, FS_F32, 1, 2, true, 0, 0.0});
        fs_set_threads(1);
        one.forward(0, shape.batch);
        one.backward();
        fs_set_threads(0);
        check::with_threads({2, 3, 5}, [&](int threads) {
          Case many(one.p);
          many.forward(0, shape.batch);
          many.backward();
          CHECK(many.y.buffer == one.y.buffer && many.mean == one.mean && many.rstd == one.rstd,
                "%s: %d threads", one.label(), threads);
          CHECK(many.grad_x.buffer == one.grad_x.buffer && many.sums == one.sums, "%s: %d threads",
                one.label(), threads);
        });
      }
    }
  }
}

// a sample's bits depend neither on the batch nor on its place in it
void test_slots() {
  for (const Layout layout : {Layout::kChannelsLast, Layout::kContiguous}) {
    Case together({{5, 40, 150, 8}, layout, FS_F32, FS_F32, FS_F32, 1, 1, true, 0, 0.0});
    Case alone(together.p);
    check::with_threads({2}, [&](int) { together.forward(0, 5); });
    for (int64_t i = 0; i < 5; ++i) alone.forward(i, 1);
    CHECK(together.y.buffer == alone.y.buffer && together.mean == alone.mean, "%s",
          together.label());
  }
}

// what is not asked for is not written, and the rest is the same
void test_optional_outputs() {
  for (const Layout layout : {Layout::kChannelsLast, Layout::kContiguous}) {
    for (const int dtype : {FS_F32, FS_F16}) {
      const Problem problem{{2, 24, 50, 4}, layout, dtype, FS_F32, FS_F32, 1, 2, true, 0, 0.0};
      Case all(problem), gradient(problem), sums(problem), none(problem);
      for (Case* each : {&all, &gradient, &sums, &none}) each->forward(0, 2);
      CHECK(all.backward() == FS_OK && gradient.backward(true, false) == FS_OK, "%s", all.label());
      CHECK(sums.backward(false, true) == FS_OK && none.backward(false, false) == FS_OK, "%s",
            all.label());
      CHECK(gradient.grad_x.buffer == all.grad_x.buffer && sums.sums == all.sums, "%s",
            all.label());
      CHECK(gradient.sums.poisoned(0) && sums.grad_x.buffer == none.grad_x.buffer, "%s",
            all.label());
      Case no_statistics(problem);
      Tensor &x = no_statistics.x, &y = no_statistics.y;
      const int code =
          fs_norm_act(x.data(), x.sample, x.channel, x.position, y.data(), y.sample, y.channel,
                      y.position, dtype, no_statistics.weight.data(), no_statistics.bias.data(),
                      FS_F32, no_statistics.film.data(), no_statistics.film_stride, FS_F32, nullptr,
                      nullptr, 2, 24, 50, 4, 1, kEps);
      CHECK(code == FS_OK && y.buffer == all.y.buffer, "%s", all.label());
    }
  }
}

void test_bad_arguments() {
  Buffer x(64, FS_F32), y(64, FS_F32), w(8, FS_F32), stats(64, FS_F32);
  struct Arguments {
    void *x, *y, *w;
    int64_t sample = 64, channel = 1, position = 8;
    int dtype = FS_F32, parameter_dtype = FS_F32;
    int64_t batch = 1, channels = 8, positions = 8, groups = 4, copies = 1;
    double eps = kEps;
  };
  const Arguments good{x.data(), y.data(), w.data()};
  const auto forward = [&](const Arguments& a) {
    return fs_norm_act(a.x, a.sample, a.channel, a.position, a.y, a.sample, a.channel, a.position,
                       a.dtype, a.w, a.w, a.parameter_dtype, nullptr, 0, FS_F32, nullptr, nullptr,
                       a.batch, a.channels, a.positions, a.groups, 1, a.eps);
  };
  const auto backward = [&](const Arguments& a) {
    return fs_norm_act_backward(a.x, a.sample, a.channel, a.position, a.x, a.sample, a.channel,
                                a.position, a.y, a.sample, a.channel, a.position, a.dtype, a.w, a.w,
                                a.parameter_dtype, nullptr, 0, FS_F32, stats.floats(),
                                stats.floats(), nullptr, a.batch, a.copies, a.channels, a.positions,
                                a.groups, 1);
  };
  const auto refused = [&](const char* what, auto&& change) {
    Arguments bad = good;
    change(bad);
    CHECK(forward(bad) == FS_BAD_ARGUMENT && backward(bad) == FS_BAD_ARGUMENT, "%s", what);
  };
  refused("no input", [](Arguments& a) { a.x = nullptr; });
  refused("no parameters", [](Arguments& a) { a.w = nullptr; });
  refused("dtype", [](Arguments& a) { a.dtype = 3; });
  refused("negative dtype", [](Arguments& a) { a.dtype = -1; });
  refused("parameter dtype", [](Arguments& a) { a.parameter_dtype = 7; });
  refused("no samples", [](Arguments& a) { a.batch = 0; });
  refused("negative channels", [](Arguments& a) { a.channels = -8; });
  refused("no positions", [](Arguments& a) { a.positions = 0; });
  refused("no groups", [](Arguments& a) { a.groups = 0; });
  refused("groups that do not divide", [](Arguments& a) { a.groups = 3; });
  refused("neither layout", [](Arguments& a) { a.channel = 2, a.position = 16; });
  refused("overlapping rows", [](Arguments& a) { a.position = 7; });
  refused("overlapping samples", [](Arguments& a) { a.batch = 2, a.sample = 63; });
  refused("negative stride", [](Arguments& a) { a.position = -8; });
  refused("too large", [](Arguments& a) { a.batch = a.positions = int64_t{1} << 40; });
  Arguments bad = good;
  bad.eps = -1.0;
  CHECK(forward(bad) == FS_BAD_ARGUMENT, "negative eps");
  bad.eps = std::nan("");
  CHECK(forward(bad) == FS_BAD_ARGUMENT, "eps that is no number");
  bad = good;
  bad.y = nullptr;
  CHECK(forward(bad) == FS_BAD_ARGUMENT, "no output");
  bad = good;
  bad.copies = 0;
  CHECK(backward(bad) == FS_BAD_ARGUMENT, "no cotangents");
  CHECK(y.poisoned(0) && y.guarded(), "a refused call writes nothing");
  CHECK(forward(good) == FS_OK, "what the others differ from is fine");
}

}  // namespace

int main() {
  for (const char* isa : check::instruction_sets()) {
    fs_set_isa(isa);
    test_values();
    test_large_mean();
    test_large_sample();
    test_nan();
    test_threads();
    test_slots();
    test_optional_outputs();
    test_bad_arguments();
  }
  return check::result();
}
