// Denoiser assembly, guidance, a solver's linear update and its noise, in one pass over memory.
#include "parallel.h"
#include "philox.h"
#include "simd.h"
#include "table.h"

namespace fs::FS_ISA {
namespace {

// elements worked on at once: what lies between two stages stays in the first-level cache
constexpr int64_t kTile = 512;
// normals worth a thread of their own: about 10 microseconds
constexpr int64_t kNoiseGrain = 2048;
constexpr int64_t kUpdateGrain = 16384;

struct Step {
  const float* x;
  const void* raw;
  const void* guidance;
  const float* denoised;
  const float* old;
  const float* coefficients;
  const int64_t* counters;
  int64_t draw;
  float* x_next;
  float* x0;
  int64_t size;
};

bool is_word(int64_t v) { return v >= 0 && v <= int64_t(kLowMask); }

NoiseCounter noise_counter(int64_t seed, int64_t sample, int64_t step, int64_t draw) {
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(sample), static_cast<uint32_t>(step),
          static_cast<uint32_t>(draw)};
}

// `count` normals of one sample and step from the first of first_block on
void normal_span(const NoiseCounter& counter, uint64_t first_block, int64_t count, float* out) {
  constexpr int64_t stride = 4 * kBlockLanes;
  int64_t done = 0;
  for (; done + stride <= count; done += stride)
    normal_blocks(counter, first_block + done / 4, out + done);
  if (done < count) {
    float rest[stride];
    normal_blocks(counter, first_block + done / 4, rest);
    __builtin_memcpy(out + done, rest, static_cast<size_t>(count - done) * sizeof(float));
  }
}

// total += factor * values, the product rounded on its own
FS_INLINE Vf plus(Vf total, float factor, Vf values) { return total + broadcast(factor) * values; }

// elements begin .. begin + count of sample b, count at most kTile and begin a multiple of 4
template <class T>
void step_tile(const Step& s, int64_t b, int64_t begin, int64_t count) {
  const int64_t at = b * s.size + begin;
  const float* c = s.coefficients + 7 * b;
  alignas(64) float noise[kTile];
  const bool noisy = s.counters != nullptr && s.x_next != nullptr;
  if (noisy) {
    const int64_t* n = s.counters + 3 * b;
    normal_span(noise_counter(n[0], n[1], n[2], s.draw), begin / 4, count, noise);
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = lanes_left(count, i);
    const Vf x = load_lanes(s.x + at + i, lanes);
    Vf x0;
    if (s.raw != nullptr) {
      x0 =
          plus(broadcast(c[0]) * x, c[1], load_lanes(static_cast<const T*>(s.raw) + at + i, lanes));
      if (s.guidance != nullptr) {
        x0 = plus(x0, c[2], load_lanes(static_cast<const T*>(s.guidance) + at + i, lanes));
      }
    } else {
      x0 = load_lanes(s.denoised + at + i, lanes);
    }
    Vf next = plus(broadcast(c[3]) * x, c[4], x0);
    if (s.old != nullptr) next = plus(next, c[5], load_lanes(s.old + at + i, lanes));
    if (noisy) next = plus(next, c[6], load_lanes(noise + i, lanes));
    if (s.x0 != nullptr) store_lanes(s.x0 + at + i, x0, lanes);
    if (s.x_next != nullptr) store_lanes(s.x_next + at + i, next, lanes);
  }
}

template <class T>
void run_step(const Step& s, int64_t batch) {
  const int64_t tiles = (s.size + kTile - 1) / kTile;
  const int64_t grain = s.counters != nullptr ? kNoiseGrain : kUpdateGrain;
  const int threads = threads_for(batch * s.size, batch * tiles, grain);
  parallel_for(threads, batch * tiles, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % tiles * kTile;
      step_tile<T>(s, i / tiles, start, s.size - start < kTile ? s.size - start : kTile);
    }
  });
}

}  // namespace

int solver_step(const float* x, const void* raw, const void* guidance, int raw_dtype,
                const float* denoised, const float* old, const float* coefficients,
                const int64_t* counters, int64_t draw, float* x_next, float* x0, int64_t batch,
                int64_t size) {
  if (counters != nullptr) {
    if (!is_word(draw)) return FS_BAD_ARGUMENT;
    for (int64_t b = 0; b < batch; ++b) {
      if (!is_word(counters[3 * b + 1]) || !is_word(counters[3 * b + 2])) return FS_BAD_ARGUMENT;
    }
  }
  const Step s{x, raw, guidance, denoised, old, coefficients, counters, draw, x_next, x0, size};
  if (raw != nullptr && raw_dtype == FS_BF16) {
    run_step<Bf16>(s, batch);
  } else if (raw != nullptr && raw_dtype == FS_F16) {
    run_step<F16>(s, batch);
  } else {
    run_step<float>(s, batch);
  }
  return FS_OK;
}

int normals(const int64_t* seeds, const int64_t* samples, const int64_t* steps, int64_t draw,
            float* out, int64_t step_count, int64_t batch, int64_t size) {
  if (!is_word(draw)) return FS_BAD_ARGUMENT;
  for (int64_t b = 0; b < batch; ++b) {
    if (!is_word(samples[b])) return FS_BAD_ARGUMENT;
  }
  for (int64_t s = 0; s < step_count; ++s) {
    if (!is_word(steps[s])) return FS_BAD_ARGUMENT;
  }
  const int64_t rows = step_count * batch;
  const int64_t tiles = (size + kTile - 1) / kTile;
  parallel_for(threads_for(rows * size, rows * tiles, kNoiseGrain), rows * tiles,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t row = i / tiles, start = i % tiles * kTile;
                   const int64_t count = size - start < kTile ? size - start : kTile;
                   const NoiseCounter counter = noise_counter(
                       seeds[row % batch], samples[row % batch], steps[row / batch], draw);
                   normal_span(counter, start / 4, count, out + row * size + start);
                 }
               });
  return FS_OK;
}

}  // namespace fs::FS_ISA
