// What the group normalisations share: types, parameters, and how a sample is cut into blocks.
#ifndef FASTSCORE_NORM_H
#define FASTSCORE_NORM_H

#include "parallel.h"
#include "simd.h"

namespace fs::FS_ISA {

// Calls body with a null pointer of the type that `dtype` (checked before) names.
template <class Body>
FS_INLINE int with_dtype(int dtype, Body&& body) {
  switch (dtype) {
    case FS_F32:
      return body(static_cast<float*>(nullptr));
    case FS_BF16:
      return body(static_cast<Bf16*>(nullptr));
    default:
      return body(static_cast<F16*>(nullptr));
  }
}

// `count` elements from element `begin` on, as floats
static inline void to_floats(const void* data, int dtype, int64_t begin, int64_t count,
                             float* out) {
  with_dtype(dtype, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(const_cast<void*>(data)) + begin;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int lanes = lanes_left(count, i);
      store_lanes(out + i, load_lanes(p + i, lanes), lanes);
    }
    return 0;
  });
}

// Whether tensors of which the C interface knows that they share a layout are channels-last.
template <class... Tensors>
FS_INLINE bool is_channels_last(int64_t channels, int64_t positions, const Tensors&... tensors) {
  if (channels > 1) return ((tensors.channel == 1) && ...);
  // a single channel is both unless its positions lie apart
  return positions > 1 && !((tensors.position == 1) && ...);
}

// channels, rounded up to whole vectors: the length of per-channel arrays in scratch memory
FS_INLINE int64_t padded(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// A sample's positions in blocks, which depend on their number alone: sums are taken in fp32 within
// a block and in double precision over blocks.
struct Blocks {
  int64_t positions, rows, count;

  FS_ALWAYS_INLINE Range rows_of(int64_t block) const {
    const int64_t begin = block * rows;
    return {begin, begin + rows < positions ? begin + rows : positions};
  }
};

FS_INLINE Blocks blocks_of(int64_t positions) {
  const int64_t most = positions <= 4096 ? 64 : 256;
  int64_t count = (positions + most - 1) / most;
  // four threads share a sample evenly
  if (count > 1) count = (count + 3) / 4 * 4;
  const int64_t rows = (positions + count - 1) / count;
  return {positions, rows, (positions + rows - 1) / rows};
}

// Slots for partial sums that two_passes needs: the samples that a thread does alone, and the
// shared ones.
FS_INLINE int64_t slots_of(int threads) {
  return threads > 1 ? 2 * static_cast<int64_t>(threads) : 1;
}

// Runs work.first(sample, slot, block) over all blocks of every sample, then, once a sample's are
// done, work.finish(sample, slot, owner) on every thread that needs its result, then
// work.second(sample, slot, block). Exactly one thread is the owner of a sample. Threads take whole
// samples as long as there are enough for all: they then wait for nobody, and a sample is still in
// the cache for its second pass.
template <class Work>
FS_INLINE void two_passes(Team team, int64_t batch, int64_t blocks, Work& work) {
  const int64_t alone = batch / team.count;
  for (int64_t sample = alone * team.id; sample < alone * (team.id + 1); ++sample) {
    for (int64_t block = 0; block < blocks; ++block) work.first(sample, team.id, block);
    work.finish(sample, team.id, true);
    for (int64_t block = 0; block < blocks; ++block) work.second(sample, team.id, block);
  }
  const int64_t start = alone * team.count;
  if (start == batch) return;
  const Range mine = team.share((batch - start) * blocks);
  for (int64_t item = mine.begin; item < mine.end; ++item) {
    work.first(start + item / blocks, team.count + item / blocks, item % blocks);
  }
  team.barrier();
  for (int64_t item = mine.begin; item < mine.end; ++item) {
    if (item == mine.begin || item % blocks == 0) {
      work.finish(start + item / blocks, team.count + item / blocks, item % blocks == 0);
    }
    work.second(start + item / blocks, team.count + item / blocks, item % blocks);
  }
}

// What a channel's normalised value is multiplied with and what is added: weight and bias, and the
// film of the sample where there is one.
struct Affine {
  const void *weight, *bias;
  int dtype;
  const void* film;
  int64_t film_stride;
  int film_dtype;
  int64_t channels;

  // the affine map of a sample's channels; four arrays of padded(channels), the last two are free
  // before and after
  void fold(int64_t sample, float* scale, float* shift, float* free_1, float* free_2) const {
    to_floats(weight, dtype, 0, channels, scale);
    to_floats(bias, dtype, 0, channels, shift);
    if (film == nullptr) return;
    to_floats(film, film_dtype, sample * film_stride, channels, free_1);
    to_floats(film, film_dtype, sample * film_stride + channels, channels, free_2);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const Vf factor = broadcast(1.0f) + load(free_1 + c);
      store(scale + c, factor * load(scale + c));
      store(shift + c, fma(factor, load(shift + c), load(free_2 + c)));
    }
  }
};

}  // namespace fs::FS_ISA

#endif  // FASTSCORE_NORM_H
