// Standard normals from Philox 4x32-10 and Box-Muller, lane for lane what the reference computes.
//
// Only additions, multiplications, divisions and square roots of doubles occur, which IEEE 754
// rounds exactly, so no vector width changes a bit. The library is compiled with -ffp-contract=off:
// a fused multiply-add would round once where the reference rounds twice.
#ifndef FASTSCORE_PHILOX_H
#define FASTSCORE_PHILOX_H

#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fs::FS_ISA {

#if defined(FS_ISA_AVX512)
constexpr int kBlockLanes = 8;
#elif defined(FS_ISA_AVX2)
constexpr int kBlockLanes = 4;
#else
constexpr int kBlockLanes = 2;
#endif

typedef double Doubles __attribute__((vector_size(8 * kBlockLanes)));
typedef uint64_t Words __attribute__((vector_size(8 * kBlockLanes)));
typedef uint32_t HalfWords __attribute__((vector_size(4 * kBlockLanes)));
typedef float Singles __attribute__((vector_size(4 * kBlockLanes)));

constexpr uint64_t kLowMask = 0xffffffffu;

// 64-bit product of the low 32 bits; compilers do not find the instruction for it by themselves
FS_INLINE Words multiply_low(Words a, uint64_t multiplier) {
  const Words b = Words{} + multiplier;
#if defined(FS_ISA_AVX512)
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(FS_ISA_AVX2)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(FS_ISA_NEON)
  return (Words)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & kLowMask) * b;
#endif
}

FS_INLINE Doubles square_root(Doubles x) {
#if defined(FS_ISA_AVX512)
  return (Doubles)_mm512_sqrt_pd((__m512d)x);
#elif defined(FS_ISA_AVX2)
  return (Doubles)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  return (Doubles)_mm_sqrt_pd((__m128d)x);
#elif defined(FS_ISA_NEON)
  return (Doubles)vsqrtq_f64((float64x2_t)x);
#else
  for (int i = 0; i < kBlockLanes; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// whole numbers below 2^52 to double, exactly: they become the mantissa of a number in [2^52, 2^53)
FS_INLINE Doubles to_double(Words x) {
  return (Doubles)(x | uint64_t(0x4330000000000000)) - 4503599627370496.0;
}

struct PhiloxWords {
  Words word[4];
};

// Salmon et al. 2011: words hold 32 bits each; the upper half of words 1 and 3 is only cleared at
// the end
FS_INLINE PhiloxWords philox(PhiloxWords counter, uint64_t seed) {
  Words w0 = counter.word[0], w1 = counter.word[1], w2 = counter.word[2], w3 = counter.word[3];
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words p0 = multiply_low(w0, 0xD2511F53u);
    const Words p2 = multiply_low(w2, 0xCD9E8D57u);
    w0 = ((p2 >> 32) ^ w1 ^ uint64_t(key0)) & kLowMask;
    w2 = ((p0 >> 32) ^ w3 ^ uint64_t(key1)) & kLowMask;
    w1 = p2;
    w3 = p0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{w0, w1 & kLowMask, w2, w3 & kLowMask}};
}

template <int kTerms>
FS_INLINE Doubles horner(const double (&terms)[kTerms], Doubles x) {
  Doubles total = x * terms[kTerms - 1];
  for (int k = kTerms - 2; k > 0; --k) total = (total + terms[k]) * x;
  return total + terms[0];
}

// sqrt(-2 log u) for u = (word + 1/2) / 2^32 = mantissa * 2^exponent, sqrt(1/2) <= mantissa <
// sqrt(2)
FS_INLINE Doubles normal_length(Words word) {
  // log((1 + q) / (1 - q)) = 2 q sum q^2k / (2k + 1), times -2
  static constexpr double terms[] = {-4.0,      -4.0 / 3,  -4.0 / 5,  -4.0 / 7, -4.0 / 9,
                                     -4.0 / 11, -4.0 / 13, -4.0 / 15, -4.0 / 17};
  constexpr uint64_t half_root = 0x3FE6A09E667F3BCD;
  constexpr uint64_t offset = uint64_t(64) << 52;
  const Doubles u = (to_double(word) + 0.5) * (1.0 / 4294967296.0);
  const Words bits = (Words)u - half_root;
  // shifted up by 64 so that a logical shift will do: not every processor has the arithmetic one
  const Doubles exponent = to_double((bits + offset) >> 52) - 64.0;
  const Doubles mantissa = (Doubles)((bits & ((uint64_t(1) << 52) - 1)) + half_root);
  const Doubles q = (mantissa - 1.0) / (mantissa + 1.0);
  const Doubles length = horner(terms, q * q) * q;
  return square_root(length + exponent * (-2 * 0.6931471805599453));
}

// cosine and sine of 2 pi (word + 1/2 - 2^31) / 2^32, from the sine of a quarter of it, doubled
// twice
FS_INLINE void unit_circle(Words word, Doubles* cosine, Doubles* sine) {
  static constexpr double terms[] = {
      1.0,          -1.0 / 6,        1.0 / 120,          -1.0 / 5040,
      1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800.0, -1.0 / 1307674368000.0};
  constexpr double half_pi = 3.141592653589793 / 2;
  const Doubles quarter = (to_double(word) + (0.5 - 2147483648.0)) * (half_pi / 4294967296.0);
  const Doubles s = horner(terms, quarter * quarter) * quarter;
  const Doubles square = s * s;
  const Doubles half_sine = square_root(1.0 - square) * s * 2.0;
  const Doubles half_cosine = 1.0 - square * 2.0;
  *sine = half_cosine * half_sine * 2.0;
  *cosine = 1.0 - half_sine * half_sine * 2.0;
}

// two floats a lane, the cosine's in the low half
FS_INLINE Words normal_pairs(Words radius, Words angle) {
  Doubles cosine, sine;
  unit_circle(angle, &cosine, &sine);
  const Doubles length = normal_length(radius);
  const Singles first = __builtin_convertvector(cosine * length, Singles);
  const Singles second = __builtin_convertvector(sine * length, Singles);
  const Words low = __builtin_convertvector((HalfWords)first, Words);
  const Words high = __builtin_convertvector((HalfWords)second, Words);
  return low | (high << 32);
}

struct NoiseCounter {
  uint64_t seed;
  uint32_t sample, step, draw;
};

// normals of kBlockLanes blocks from first_block on
FS_INLINE void normal_blocks(const NoiseCounter& counter, uint64_t first_block, float* out) {
  Words block;
  for (int i = 0; i < kBlockLanes; ++i) block[i] = first_block + i;
  const Words zero{};
  const PhiloxWords words =
      philox({{block, zero + uint64_t(counter.step), zero + uint64_t(counter.sample),
               zero + uint64_t(counter.draw)}},
             counter.seed);
  // words 0 and 2 give radii, words 1 and 3 angles
  const Words even = normal_pairs(words.word[0], words.word[1]);
  const Words odd = normal_pairs(words.word[2], words.word[3]);
  uint64_t pairs[2 * kBlockLanes];
  for (int i = 0; i < kBlockLanes; ++i) {
    pairs[2 * i] = even[i];
    pairs[2 * i + 1] = odd[i];
  }
  __builtin_memcpy(out, pairs, sizeof pairs);
}

}  // namespace fs::FS_ISA

#endif  // FASTSCORE_PHILOX_H
