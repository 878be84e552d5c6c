// Attention fusion and its vector-Jacobian product against doubles, on every instruction set.
#include "tokens.h"

using check::Attention;
using check::Buffer;
using check::Exact;
using check::Tokens;

namespace {

struct Shape {
  int64_t batch, channels, positions, heads;
};

constexpr Shape kShapes[] = {{1, 32, 35, 4},  {2, 80, 13, 4}, {3, 112, 20, 4}, {2, 30, 9, 3},
                             {1, 7, 1, 7},    {2, 36, 15, 1}, {1, 128, 50, 4}, {1, 8, 67, 1},
                             {1, 144, 33, 4}, {1, 1, 3, 1}};

struct Problem {
  Shape shape;
  int taps, dtype;
  bool spatial;
  Tokens query, first, second, grad, out, grad_query, grad_first, grad_second;

  Problem(const Shape& s, int taps, int dtype, bool spatial)
      : shape(s),
        taps(taps),
        dtype(dtype),
        spatial(spatial),
        query(s.batch, s.channels, s.positions, dtype, 3),
        first(s.batch, 2 * s.channels, s.positions, dtype, 1),
        second(s.batch, 2 * s.channels, s.positions, dtype, 0),
        grad(s.batch, s.channels, s.positions, dtype, 0),
        out(s.batch, s.channels, s.positions, dtype, 5),
        grad_query(s.batch, s.channels, s.positions, dtype, 2),
        grad_first(s.batch, 2 * s.channels, s.positions, dtype, 1),
        grad_second(s.batch, 2 * s.channels, s.positions, dtype, 4) {
    uint64_t seed = 7;
    for (Tokens* t : {&query, &first, &second, &grad}) t->buffer.fill(seed++, 1.5f);
  }

  int forward(int64_t b, int64_t rows) {
    return fs_tap_fuse(query.at(b), query.batch_stride, query.position_stride, first.at(b),
                       first.batch_stride, first.position_stride, taps > 1 ? second.at(b) : nullptr,
                       second.batch_stride, second.position_stride, out.at(b), out.batch_stride,
                       out.position_stride, dtype, rows, shape.channels, shape.positions,
                       shape.heads, spatial);
  }
  int backward(int64_t b, int64_t rows) {
    return fs_tap_fuse_backward(
        grad.at(b), grad.batch_stride, grad.position_stride, query.at(b), query.batch_stride,
        query.position_stride, first.at(b), first.batch_stride, first.position_stride,
        taps > 1 ? second.at(b) : nullptr, second.batch_stride, second.position_stride,
        grad_query.at(b), grad_query.batch_stride, grad_query.position_stride, grad_first.at(b),
        grad_first.batch_stride, grad_first.position_stride, taps > 1 ? grad_second.at(b) : nullptr,
        grad_second.batch_stride, grad_second.position_stride, dtype, rows, shape.channels,
        shape.positions, shape.heads, spatial);
  }
  void poison() {
    for (Tokens* t : {&out, &grad_query, &grad_first, &grad_second}) t->buffer.poison();
  }
  bool kept_to_itself() const {
    return out.kept_to_itself() && grad_query.kept_to_itself() && grad_first.kept_to_itself() &&
           grad_second.kept_to_itself();
  }
};

struct Expected {
  Exact out, query, first, second;
};

Expected expect(const Problem& p) {
  const Exact q(p.query), k1(p.first), k2(p.second), g(p.grad);
  Attention attention{q, {&k1}, p.shape.heads, p.spatial};
  if (p.taps > 1) attention.taps.push_back(&k2);
  const Shape& s = p.shape;
  Expected e{attention.forward(), Exact(s.batch, s.channels, s.positions),
             Exact(s.batch, 2 * s.channels, s.positions),
             Exact(s.batch, 2 * s.channels, s.positions)};
  const int64_t width = attention.width();
  const double scale = 1 / std::sqrt(static_cast<double>(width));
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t begin = 0; begin < s.channels; begin += width) {
      for (int64_t n = 0; n < s.positions; ++n) {
        // what changes a weight changes the output by the value's distance from the output
        attention.each(b, begin / width, n, [&](size_t i, int64_t m, double weight) {
          const Exact& tap = *attention.taps[i];
          Exact& to = i == 0 ? e.first : e.second;
          double score = 0;
          for (int64_t c = begin; c < begin + width; ++c) {
            score += g.at(b, c, n) * (tap.at(b, s.channels + c, m) - e.out.at(b, c, n));
            to.at(b, s.channels + c, m) += weight * g.at(b, c, n);
          }
          score *= weight * scale;
          for (int64_t c = begin; c < begin + width; ++c) {
            e.query.at(b, c, n) += score * tap.at(b, c, m);
            to.at(b, c, m) += score * q.at(b, c, n);
          }
        });
      }
    }
  }
  return e;
}

void test(const char* isa, Problem& p, const Expected& e) {
  fs_set_isa(isa);
  const double limit = check::tolerance(p.dtype);
  const auto name = [&](const char* what) {
    static char text[160];
    std::snprintf(text, sizeof text, "%s of %s, dtype %d, channels %d, positions %d, taps %d, %s",
                  what, isa, p.dtype, static_cast<int>(p.shape.channels),
                  static_cast<int>(p.shape.positions), p.taps, p.spatial ? "spatial" : "local");
    return text;
  };
  fs_set_threads(1);
  p.poison();
  CHECK(p.forward(0, p.shape.batch) == FS_OK && p.backward(0, p.shape.batch) == FS_OK, "%s", isa);
  CHECK(check::error(e.out, p.out) < limit, "%s: %g", name("output"), check::error(e.out, p.out));
  CHECK(check::error(e.query, p.grad_query) < limit, "%s: %g", name("query's gradient"),
        check::error(e.query, p.grad_query));
  CHECK(check::error(e.first, p.grad_first) < limit, "%s: %g", name("first gradient"),
        check::error(e.first, p.grad_first));
  if (p.taps > 1) {
    CHECK(check::error(e.second, p.grad_second) < limit, "%s: %g", name("second gradient"),
          check::error(e.second, p.grad_second));
  }
  CHECK(p.kept_to_itself(), "%s", name("writes"));
  const Problem once = p;
  const auto same = [&] {
    return p.out.buffer == once.out.buffer && p.grad_query.buffer == once.grad_query.buffer &&
           p.grad_first.buffer == once.grad_first.buffer &&
           p.grad_second.buffer == once.grad_second.buffer;
  };
  for (const int threads : {2, 3}) {
    fs_set_threads(threads);
    p.poison();
    CHECK(p.forward(0, p.shape.batch) == FS_OK && p.backward(0, p.shape.batch) == FS_OK && same(),
          "%s with %d threads", name("bits"), threads);
  }
  p.poison();
  for (int64_t b = 0; b < p.shape.batch; ++b) {
    CHECK(p.forward(b, 1) == FS_OK && p.backward(b, 1) == FS_OK, "%s", isa);
  }
  CHECK(same(), "%s", name("bits of samples alone"));
  fs_set_threads(0);
}

// enough work for several threads, which small shapes never start
void test_threads(const char* isa) {
  fs_set_isa(isa);
  for (const bool spatial : {false, true}) {
    for (const int64_t heads : {1, 3, 4}) {
      Problem p({3, 48, 150, heads}, 2, FS_F32, spatial);
      fs_set_threads(1);
      CHECK(p.forward(0, 3) == FS_OK && p.backward(0, 3) == FS_OK, "%s", isa);
      const Problem once = p;
      for (const int threads : {2, 3, 4}) {
        fs_set_threads(threads);
        p.poison();
        CHECK(p.forward(0, 3) == FS_OK && p.backward(0, 3) == FS_OK &&
                  p.out.buffer == once.out.buffer && p.grad_first.buffer == once.grad_first.buffer,
              "%s, %d heads, %d threads", isa, static_cast<int>(heads), threads);
      }
    }
  }
  fs_set_threads(0);
}

// scores far apart: a softmax without its largest score taken off would overflow
void test_large_scores(const char* isa) {
  fs_set_isa(isa);
  for (const bool spatial : {false, true}) {
    Problem p({1, 16, 21, 2}, 2, FS_F32, spatial);
    p.query.buffer.fill(3, 300.0f);
    p.first.buffer.fill(4, 30.0f);
    p.second.buffer.fill(5, 30.0f);
    CHECK(p.forward(0, 1) == FS_OK, "%s", isa);
    const Exact q(p.query), k1(p.first), k2(p.second);
    const Exact expected = Attention{q, {&k1, &k2}, 2, spatial}.forward();
    CHECK(check::error(expected, p.out) < 5e-3, "%s: %g", isa, check::error(expected, p.out));
  }
}

void test_bad_arguments() {
  Problem p({2, 8, 4, 2}, 2, FS_F32, true);
  const auto call = [&](const void* query, int64_t stride, int dtype, int64_t batch,
                        int64_t channels, int64_t positions, int64_t heads) {
    return fs_tap_fuse(query, 64, stride, p.first.at(0), 128, 17, p.second.at(0), 128, 16,
                       p.out.at(0), 128, 13, dtype, batch, channels, positions, heads, 1);
  };
  const void* q = p.query.at(0);
  CHECK(call(nullptr, 11, FS_F32, 1, 8, 4, 2) == FS_BAD_ARGUMENT, "null");
  CHECK(call(q, 11, 3, 1, 8, 4, 2) == FS_BAD_ARGUMENT, "dtype");
  CHECK(call(q, -1, FS_F32, 1, 8, 4, 2) == FS_BAD_ARGUMENT, "stride");
  CHECK(call(q, 11, FS_F32, 1, 8, 4, 3) == FS_BAD_ARGUMENT, "heads");
  CHECK(call(q, 11, FS_F32, 1, 8, 4, 0) == FS_BAD_ARGUMENT, "no heads");
  for (const int64_t size : {int64_t(0), int64_t(-1), INT64_MAX}) {
    CHECK(call(q, 11, FS_F32, size, 8, 4, 2) == FS_BAD_ARGUMENT, "batch");
    CHECK(call(q, 11, FS_F32, 1, size, 4, 2) == FS_BAD_ARGUMENT, "channels");
    CHECK(call(q, 11, FS_F32, 1, 8, size, 2) == FS_BAD_ARGUMENT, "positions");
  }
  p.dtype = 9;
  CHECK(p.backward(0, 1) == FS_BAD_ARGUMENT, "dtype");
  for (int64_t i = 0; i < p.out.buffer.size(); ++i) {
    CHECK(p.out.buffer.poisoned(i), "a refused call wrote");
  }
}

}  // namespace

int main() {
  const auto isas = check::instruction_sets();
  for (const Shape& shape : kShapes) {
    for (const int dtype : {FS_F32, FS_BF16, FS_F16}) {
      for (const int taps : {1, 2}) {
        for (const bool spatial : {false, true}) {
          Problem p(shape, taps, dtype, spatial);
          const Expected e = expect(p);
          for (const char* isa : isas) test(isa, p, e);
        }
      }
    }
  }
  for (const char* isa : isas) {
    test_threads(isa);
    test_large_scores(isa);
  }
  test_bad_arguments();
  return check::result();
}
