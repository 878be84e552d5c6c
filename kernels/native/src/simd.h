// Vectors of floats of the instruction set that a source is compiled for.
//
// Vf holds kLanes floats, Vi as many int32, Vd as many doubles. load and store convert from and to
// bf16 and fp16, rounding to nearest even; with a count they touch the first `count` lanes alone,
// and load zeroes the others; keep_lanes zeroes the others of a vector. + - * / work on Vf lane by
// lane, each rounded on its own; fma is fused where the processor can.
//
// Everything is local to the source: a function that the linker could share between instruction
// sets would run instructions that the processor lacks. For the same reason the sources of
// operations use nothing of the standard library but plain C, and have no static objects with
// constructors.
#ifndef FASTSCORE_SIMD_H
#define FASTSCORE_SIMD_H

#include "common.h"

#if defined(FS_ISA_AVX512) || defined(FS_ISA_AVX2)
#include <immintrin.h>
#elif defined(FS_ISA_NEON)
#include <arm_neon.h>
#endif

namespace fs::FS_ISA {

#if defined(FS_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(FS_ISA_AVX2)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

FS_INLINE Vf zero() { return broadcast(0.0f); }

// e^x for x in [-87.3, 88.3], relative error below 5e-7
FS_INLINE Vf exp_within(Vf x) {
  // adding this rounds to an integer and leaves it, with the bias of the exponent, in the low bits
  const Vf magic = broadcast(0x1.8000fep23f);
  const Vf shifted = fma(x, broadcast(0x1.715476p+0f), magic);
  const Vf n = shifted - magic;
  const Vf scale = as_float(as_int(shifted) << 23);
#if defined(FS_ISA_PORTABLE)
  // without a fused product ln 2 comes in two parts, the first of which is exact times n
  const Vf r = fnma(n, broadcast(-2.12194440e-4f), fnma(n, broadcast(0.693359375f), x));
#else
  const Vf r = fnma(n, broadcast(0x1.62e43p-1f), x);
#endif
  // minimax polynomial on [-ln 2 / 2, ln 2 / 2]
  Vf p = fma(broadcast(0x1.0f9f9cp-7f), r, broadcast(0x1.573a1ap-5f));
  p = fma(p, r, broadcast(0x1.555a80p-3f));
  p = fma(p, r, broadcast(0x1.fffdc6p-2f));
  p = fma(p, r, broadcast(0x1.fffff6p-1f));
  return fma(p, r * scale, scale);
}

FS_INLINE Vf exp_clamped(Vf x) {
  return exp_within(minimum(broadcast(88.3f), maximum(broadcast(-87.3f), x)));
}

// e^x. Below -87.3 it is 0, above 88.3 it stays at e^88.3.
FS_INLINE Vf exp(Vf x) { return zero_where_less(exp_clamped(x), x, -87.3f); }

// 1 / (1 + e^-x) and x / (1 + e^-x), relative error below 1e-6 above -87 and next to 0 below. The
// division has its own unit, which a product with a reciprocal would leave idle.
FS_INLINE Vf sigmoid(Vf x) { return broadcast(1.0f) / (broadcast(1.0f) + exp_clamped(zero() - x)); }
FS_INLINE Vf silu(Vf x) { return x / (broadcast(1.0f) + exp_clamped(zero() - x)); }

// Lanes to take of `size` elements from `begin` on.
FS_INLINE int lanes_left(int64_t size, int64_t begin) {
  return size - begin < kLanes ? static_cast<int>(size - begin) : kLanes;
}

// load and store of whole vectors or, when `count` is less, of their first lanes
template <class T>
FS_INLINE Vf load_lanes(const T* p, int count) {
  return count == kLanes ? load(p) : load(p, count);
}
template <class T>
FS_INLINE void store_lanes(T* p, Vf v, int count) {
  if (count == kLanes) {
    store(p, v);
  } else {
    store(p, v, count);
  }
}

}  // namespace fs::FS_ISA

#endif  // FASTSCORE_SIMD_H
