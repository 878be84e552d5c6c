// Noise: known answers, the same bits everywhere. Solver update: every product and sum rounded on
// its own.
#include "buffers.h"

#define FS_ISA portable
#define FS_ISA_PORTABLE
#include "../src/philox.h"

using check::Buffer;

namespace {

constexpr int64_t kWord = 0xffffffff;

// Random123's kat_vectors for philox4x32 with 10 rounds
void test_philox() {
  using namespace fs::portable;
  struct Case {
    uint32_t counter[4], key[2], answer[4];
  };
  const Case cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
  for (const Case& c : cases) {
    PhiloxWords counter;
    for (int i = 0; i < 4; ++i) counter.word[i] = Words{} + uint64_t(c.counter[i]);
    const PhiloxWords words = philox(counter, uint64_t(c.key[1]) << 32 | c.key[0]);
    for (int i = 0; i < 4; ++i) {
      CHECK(words.word[i][0] == c.answer[i] && words.word[i][1] == c.answer[i], "word %d", i);
    }
  }
}

// what the Python reference computes
void test_golden() {
  struct Case {
    int64_t seed, sample, step, draw, size;
    uint32_t last[6];
  };
  const Case cases[] = {
      {0, 0, 0, 0, 6, {0xbf7dbb33, 0x3f6cb6b0, 0x3f1e1b9f, 0x3ef6d1b2, 0x3e1d5357, 0xbe392a6d}},
      {INT64_MAX,
       kWord,
       kWord,
       kWord,
       6,
       {0x3fd9cd62, 0x3f0a9b39, 0xbf28fe50, 0x3ec90c95, 0xbfec95f2, 0x3ed3d712}},
      {1234567890123456789,
       7,
       42,
       1,
       4099,
       {0xbcca2490, 0x3fdabddd, 0x3f89195d, 0xbf7005b0, 0x3f3d5825, 0xbf8f922c}}};
  for (const Case& c : cases) {
    Buffer out(c.size, FS_F32);
    CHECK(fs_normals(&c.seed, &c.sample, &c.step, c.draw, out.floats(), 1, 1, c.size) == FS_OK,
          "size %ld", static_cast<long>(c.size));
    CHECK(std::memcmp(out.floats() + c.size - 6, c.last, sizeof c.last) == 0, "seed %ld",
          static_cast<long>(c.seed));
    CHECK(out.guarded(), "wrote outside");
  }
}

// one thread, one sample and step at a time
Buffer one_by_one(const std::vector<int64_t>& seeds, const std::vector<int64_t>& samples,
                  const std::vector<int64_t>& steps, int64_t size) {
  const int64_t batch = static_cast<int64_t>(seeds.size()),
                count = static_cast<int64_t>(steps.size());
  Buffer all(batch * count * size, FS_F32);
  fs_set_threads(1);
  for (int64_t i = 0; i < batch * count; ++i) {
    fs_normals(&seeds[i % batch], &samples[i % batch], &steps[i / batch], 3,
               all.floats() + i * size, 1, 1, size);
  }
  return all;
}

void test_normals_everywhere(const char* isa) {
  const std::vector<int64_t> seeds{5, 0, INT64_MAX}, samples{0, kWord, 17}, steps{1, 900};
  for (const int64_t size : {1, 3, 4, 31, 513, 5120, 20001}) {
    fs_set_isa("portable");
    const Buffer expected = one_by_one(seeds, samples, steps, size);
    fs_set_isa(isa);
    for (const int threads : {1, 2, 3}) {
      fs_set_threads(threads);
      Buffer out(expected.size(), FS_F32);
      CHECK(fs_normals(seeds.data(), samples.data(), steps.data(), 3, out.floats(), 2, 3, size) ==
                FS_OK,
            "%s", isa);
      CHECK(out == expected, "%s, %d threads, size %ld", isa, threads, static_cast<long>(size));
    }
  }
  fs_set_threads(0);
}

struct Problem {
  int64_t batch, size;
  bool raw, guidance, old, noise;
  Buffer x, raw_values, guidance_values, denoised, old_values, coefficients;
  std::vector<int64_t> counters;

  Problem(int64_t batch, int64_t size, int dtype, int options)
      : batch(batch),
        size(size),
        raw(options & 1),
        guidance(raw && (options & 2)),
        old(options & 4),
        noise(options & 8),
        x(batch * size, FS_F32),
        raw_values(batch * size, dtype),
        guidance_values(batch * size, dtype),
        denoised(batch * size, FS_F32),
        old_values(batch * size, FS_F32),
        coefficients(7 * batch, FS_F32) {
    uint64_t seed = 1;
    for (Buffer* b : {&x, &raw_values, &guidance_values, &denoised, &old_values, &coefficients})
      b->fill(seed++);
    for (int64_t b = 0; b < batch; ++b) counters.insert(counters.end(), {100 + b, b, 3});
  }
  int run(Buffer* next, Buffer* x0, int64_t b, int64_t rows) {
    const int64_t at = b * size, width = raw_values.dtype() == FS_F32 ? 4 : 2;
    auto half = [&](Buffer& from) { return static_cast<char*>(from.data()) + at * width; };
    return fs_solver_step(
        x.floats() + at, raw ? half(raw_values) : nullptr,
        guidance ? half(guidance_values) : nullptr, raw_values.dtype(),
        raw ? nullptr : denoised.floats() + at, old ? old_values.floats() + at : nullptr,
        coefficients.floats() + 7 * b, noise ? counters.data() + 3 * b : nullptr, 2,
        next ? next->floats() + at : nullptr, x0 ? x0->floats() + at : nullptr, rows, size);
  }
};

// volatile: no compiler flag may fuse a product and a sum here
float plus(float total, float factor, float value) {
  const volatile float product = factor * value;
  const volatile float result = total + product;
  return result;
}

void expect(const Problem& p, Buffer* next, Buffer* x0) {
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<float> z(static_cast<size_t>(p.size));
    const int64_t* n = &p.counters[static_cast<size_t>(3 * b)];
    fs_normals(n, n + 1, n + 2, 2, z.data(), 1, 1, p.size);
    auto c = [&](int k) { return p.coefficients.get(7 * b + k); };
    for (int64_t i = b * p.size; i < (b + 1) * p.size; ++i) {
      float d = p.denoised.get(i);
      if (p.raw) {
        const volatile float skip = c(0) * p.x.get(i);
        d = plus(skip, c(1), p.raw_values.get(i));
        if (p.guidance) d = plus(d, c(2), p.guidance_values.get(i));
      }
      const volatile float keep = c(3) * p.x.get(i);
      float v = plus(keep, c(4), d);
      if (p.old) v = plus(v, c(5), p.old_values.get(i));
      if (p.noise) v = plus(v, c(6), z[static_cast<size_t>(i - b * p.size)]);
      x0->set(i, d);
      next->set(i, v);
    }
  }
}

void test_step(const char* isa) {
  fs_set_isa(isa);
  for (const int dtype : {FS_F32, FS_BF16, FS_F16}) {
    for (int options = 0; options < 16; ++options) {
      for (const int64_t size : {1, 37, 515, 5121}) {
        Problem p(3, size, dtype, options);
        Buffer next(3 * size, FS_F32), x0(3 * size, FS_F32), expected_next = next,
                                                             expected_x0 = next;
        expect(p, &expected_next, &expected_x0);
        for (const int threads : {1, 2}) {
          fs_set_threads(threads);
          next.poison(), x0.poison();
          CHECK(p.run(&next, &x0, 0, 3) == FS_OK, "%s", isa);
          CHECK(next == expected_next && x0 == expected_x0, "%s, dtype %d, options %d, size %ld",
                isa, dtype, options, static_cast<long>(size));
        }
        // a sample alone, and either output alone
        next.poison(), x0.poison();
        for (int64_t b = 0; b < 3; ++b) {
          CHECK(p.run(&next, nullptr, b, 1) == FS_OK && p.run(nullptr, &x0, b, 1) == FS_OK, "%s",
                isa);
        }
        CHECK(next == expected_next && x0 == expected_x0, "%s alone, options %d", isa, options);
        // in place
        CHECK(p.run(&p.x, nullptr, 0, 3) == FS_OK && p.x == expected_next,
              "%s in place, options %d", isa, options);
      }
    }
  }
  fs_set_threads(0);
}

void test_bad_arguments() {
  const int64_t good = 1, negative = -1, large = kWord + 1;
  Buffer out(8, FS_F32);
  float* o = out.floats();
  CHECK(fs_normals(nullptr, &good, &good, 0, o, 1, 1, 8) == FS_BAD_ARGUMENT, "seeds");
  CHECK(fs_normals(&good, &good, &good, 0, nullptr, 1, 1, 8) == FS_BAD_ARGUMENT, "out");
  CHECK(fs_normals(&good, &negative, &good, 0, o, 1, 1, 8) == FS_BAD_ARGUMENT, "sample");
  CHECK(fs_normals(&good, &good, &large, 0, o, 1, 1, 8) == FS_BAD_ARGUMENT, "step");
  CHECK(fs_normals(&good, &good, &good, large, o, 1, 1, 8) == FS_BAD_ARGUMENT, "draw");
  for (const int64_t size : {int64_t(0), negative, INT64_MAX}) {
    CHECK(fs_normals(&good, &good, &good, 0, o, 1, 1, size) == FS_BAD_ARGUMENT, "size");
  }
  Problem p(1, 8, FS_F32, 15);
  p.counters[1] = large;
  CHECK(p.run(&out, nullptr, 0, 1) == FS_BAD_ARGUMENT, "sample");
  p.counters[1] = 0;
  CHECK(p.run(nullptr, nullptr, 0, 1) == FS_BAD_ARGUMENT, "no output");
  CHECK(p.run(&out, nullptr, 0, 0) == FS_BAD_ARGUMENT, "no sample");
  float* x = p.x.floats();
  CHECK(fs_solver_step(x, x, nullptr, 7, nullptr, nullptr, x, nullptr, 0, o, nullptr, 1, 1) ==
            FS_BAD_ARGUMENT,
        "dtype");
  CHECK(fs_solver_step(x, x, nullptr, 0, x, nullptr, x, nullptr, 0, o, nullptr, 1, 1) ==
            FS_BAD_ARGUMENT,
        "two x0");
  CHECK(fs_solver_step(x, nullptr, nullptr, 0, nullptr, nullptr, x, nullptr, 0, o, nullptr, 1, 1) ==
            FS_BAD_ARGUMENT,
        "no x0");
  for (int64_t i = 0; i < 8; ++i) CHECK(out.poisoned(i), "a refused call wrote");
}

}  // namespace

int main() {
  test_philox();
  for (const char* isa : check::instruction_sets()) {
    fs_set_isa(isa);
    test_golden();
    test_normals_everywhere(isa);
    test_step(isa);
  }
  test_bad_arguments();
  return check::result();
}
