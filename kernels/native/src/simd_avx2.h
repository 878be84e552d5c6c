// AVX2 with FMA and F16C: included by simd.h inside the namespace of the instruction set.
constexpr int kLanes = 8;
typedef __m256 Vf;
typedef int32_t Vi __attribute__((vector_size(32)));
struct Vd {
  __m256d lo, hi;
};

FS_INLINE __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FS_INLINE __m256 from_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FS_INLINE __m128i to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  // rounding must not carry a nan into infinity
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
}
FS_INLINE __m128i load_halves(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
FS_INLINE __m128i load_halves(const void* p, int count) {
  alignas(16) uint16_t lanes[8] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(count) * 2);
  return load_halves(lanes);
}
FS_INLINE void store_halves(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
FS_INLINE void store_halves(void* p, __m128i v, int count) {
  alignas(16) uint16_t lanes[8];
  store_halves(lanes, v);
  __builtin_memcpy(p, lanes, static_cast<size_t>(count) * 2);
}
FS_INLINE __m128i to_f16(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

FS_INLINE Vf broadcast(float v) { return _mm256_set1_ps(v); }
FS_INLINE Vf load(const float* p) { return _mm256_loadu_ps(p); }
FS_INLINE Vf load(const Bf16* p) { return from_bf16(load_halves(p)); }
FS_INLINE Vf load(const F16* p) { return _mm256_cvtph_ps(load_halves(p)); }
FS_INLINE Vf load(const float* p, int count) { return _mm256_maskload_ps(p, first_lanes(count)); }
FS_INLINE Vf load(const Bf16* p, int count) { return from_bf16(load_halves(p, count)); }
FS_INLINE Vf load(const F16* p, int count) { return _mm256_cvtph_ps(load_halves(p, count)); }
FS_INLINE void store(float* p, Vf v) { _mm256_storeu_ps(p, v); }
FS_INLINE void store(Bf16* p, Vf v) { store_halves(p, to_bf16(v)); }
FS_INLINE void store(F16* p, Vf v) { store_halves(p, to_f16(v)); }
FS_INLINE void store(float* p, Vf v, int count) { _mm256_maskstore_ps(p, first_lanes(count), v); }
FS_INLINE void store(Bf16* p, Vf v, int count) { store_halves(p, to_bf16(v), count); }
FS_INLINE void store(F16* p, Vf v, int count) { store_halves(p, to_f16(v), count); }

FS_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm256_fmadd_ps(a, b, c); }
FS_INLINE Vf fnma(Vf a, Vf b, Vf c) { return _mm256_fnmadd_ps(a, b, c); }
// the second operand where either is nan
FS_INLINE Vf minimum(Vf a, Vf b) { return _mm256_min_ps(a, b); }
FS_INLINE Vf maximum(Vf a, Vf b) { return _mm256_max_ps(a, b); }
FS_INLINE Vf absolute(Vf v) { return _mm256_andnot_ps(broadcast(-0.0f), v); }
FS_INLINE Vf square_root(Vf v) { return _mm256_sqrt_ps(v); }
FS_INLINE Vf zero_where_less(Vf v, Vf x, float limit) {
  return _mm256_and_ps(_mm256_cmp_ps(x, broadcast(limit), _CMP_NLT_UQ), v);
}
FS_INLINE Vf keep_lanes(Vf v, int count) {
  return _mm256_and_ps(_mm256_castsi256_ps(first_lanes(count)), v);
}
FS_INLINE Vf reciprocal(Vf v) {
  const Vf r = _mm256_rcp_ps(v);
  return fma(r, fnma(v, r, broadcast(1.0f)), r);
}
FS_INLINE Vf as_float(Vi v) { return (Vf)v; }
FS_INLINE Vi as_int(Vf v) { return (Vi)v; }
FS_INLINE float sum(Vf v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
FS_INLINE float largest(Vf v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

FS_INLINE Vd broadcast_double(double v) { return {_mm256_set1_pd(v), _mm256_set1_pd(v)}; }
FS_INLINE Vd widen(Vf v) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
}
FS_INLINE Vd add(Vd a, Vd b) { return {a.lo + b.lo, a.hi + b.hi}; }
FS_INLINE Vd scaled(Vd a, double factor) { return {a.lo * factor, a.hi * factor}; }
FS_INLINE Vd fma(Vd a, Vd b, Vd c) {
  return {_mm256_fmadd_pd(a.lo, b.lo, c.lo), _mm256_fmadd_pd(a.hi, b.hi, c.hi)};
}
FS_INLINE void store(double* p, Vd v) {
  _mm256_storeu_pd(p, v.lo);
  _mm256_storeu_pd(p + 4, v.hi);
}
FS_INLINE Vd load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
FS_INLINE double sum(Vd v) {
  const __m256d s = v.lo + v.hi;
  const __m128d t = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
  return _mm_cvtsd_f64(t) + _mm_cvtsd_f64(_mm_unpackhi_pd(t, t));
}
