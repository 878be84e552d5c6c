// AVX-512 (F, BW, VL, DQ): included by simd.h inside the namespace of the instruction set.
constexpr int kLanes = 16;
typedef __m512 Vf;
typedef int32_t Vi __attribute__((vector_size(64)));
struct Vd {
  __m512d lo, hi;
};

FS_INLINE __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }
FS_INLINE __m512 from_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FS_INLINE __m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  // rounding must not carry a nan into infinity
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

FS_INLINE Vf broadcast(float v) { return _mm512_set1_ps(v); }
FS_INLINE Vf load(const float* p) { return _mm512_loadu_ps(p); }
FS_INLINE Vf load(const Bf16* p) {
  return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FS_INLINE Vf load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FS_INLINE Vf load(const float* p, int count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), p);
}
FS_INLINE Vf load(const Bf16* p, int count) {
  return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
FS_INLINE Vf load(const F16* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
FS_INLINE void store(float* p, Vf v) { _mm512_storeu_ps(p, v); }
FS_INLINE void store(Bf16* p, Vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v));
}
FS_INLINE void store(F16* p, Vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
FS_INLINE void store(float* p, Vf v, int count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }
FS_INLINE void store(Bf16* p, Vf v, int count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), to_bf16(v));
}
FS_INLINE void store(F16* p, Vf v, int count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

FS_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }
FS_INLINE Vf fnma(Vf a, Vf b, Vf c) { return _mm512_fnmadd_ps(a, b, c); }
// the second operand where either is nan
FS_INLINE Vf minimum(Vf a, Vf b) { return _mm512_min_ps(a, b); }
FS_INLINE Vf maximum(Vf a, Vf b) { return _mm512_max_ps(a, b); }
FS_INLINE Vf absolute(Vf v) { return _mm512_abs_ps(v); }
FS_INLINE Vf square_root(Vf v) { return _mm512_sqrt_ps(v); }
FS_INLINE Vf zero_where_less(Vf v, Vf x, float limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, broadcast(limit), _CMP_NLT_UQ), v);
}
FS_INLINE Vf keep_lanes(Vf v, int count) { return _mm512_maskz_mov_ps(first_lanes(count), v); }
FS_INLINE Vf reciprocal(Vf v) {
  const Vf r = _mm512_rcp14_ps(v);
  return fma(r, fnma(v, r, broadcast(1.0f)), r);
}
FS_INLINE Vf as_float(Vi v) { return (Vf)v; }
FS_INLINE Vi as_int(Vf v) { return (Vi)v; }
FS_INLINE float sum(Vf v) { return _mm512_reduce_add_ps(v); }
FS_INLINE float largest(Vf v) { return _mm512_reduce_max_ps(v); }

FS_INLINE Vd broadcast_double(double v) { return {_mm512_set1_pd(v), _mm512_set1_pd(v)}; }
FS_INLINE Vd widen(Vf v) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)),
          _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
}
FS_INLINE Vd add(Vd a, Vd b) { return {a.lo + b.lo, a.hi + b.hi}; }
FS_INLINE Vd scaled(Vd a, double factor) { return {a.lo * factor, a.hi * factor}; }
FS_INLINE Vd fma(Vd a, Vd b, Vd c) {
  return {_mm512_fmadd_pd(a.lo, b.lo, c.lo), _mm512_fmadd_pd(a.hi, b.hi, c.hi)};
}
FS_INLINE void store(double* p, Vd v) {
  _mm512_storeu_pd(p, v.lo);
  _mm512_storeu_pd(p + 8, v.hi);
}
FS_INLINE Vd load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
FS_INLINE double sum(Vd v) { return _mm512_reduce_add_pd(v.lo + v.hi); }
