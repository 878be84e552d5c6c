// Four lanes by the compiler's vector extensions, with NEON's conversions and fused operations
// where it is the instruction set: included by simd.h inside the namespace of the instruction set.
constexpr int kLanes = 4;
typedef float Vf __attribute__((vector_size(16)));
typedef int32_t Vi __attribute__((vector_size(16)));
typedef uint32_t Vu __attribute__((vector_size(16)));
typedef uint16_t Vh __attribute__((vector_size(8)));
typedef double Vdouble __attribute__((vector_size(16)));
struct Vd {
  Vdouble lo, hi;
};

FS_INLINE Vf broadcast(float v) { return Vf{v, v, v, v}; }
FS_INLINE Vf as_float(Vi v) { return (Vf)v; }
FS_INLINE Vi as_int(Vf v) { return (Vi)v; }
FS_INLINE Vu choose(Vi mask, Vu a, Vu b) { return ((Vu)mask & a) | (~(Vu)mask & b); }

FS_INLINE Vf from_bits(const Bf16*, Vh h) { return (Vf)(__builtin_convertvector(h, Vu) << 16); }
FS_INLINE Vh to_bits(const Bf16*, Vf v) {
  const Vu bits = (Vu)v;
  const Vu rounded = bits + 0x7fff + ((bits >> 16) & 1);
  // rounding must not carry a nan into infinity
  return __builtin_convertvector(choose(v != v, bits | 0x400000, rounded) >> 16, Vh);
}
#if defined(FS_ISA_NEON)
FS_INLINE Vf from_bits(const F16*, Vh h) { return (Vf)vcvt_f32_f16((float16x4_t)h); }
FS_INLINE Vh to_bits(const F16*, Vf v) { return (Vh)vcvt_f16_f32((float32x4_t)v); }
#else
FS_INLINE Vf from_bits(const F16*, Vh h) {
  const Vu wide = __builtin_convertvector(h, Vu);
  const Vu sign = (wide & 0x8000) << 16;
  const Vu magnitude = (wide & 0x7fff) << 13;
  // a product with 2^112 moves the exponent's bias, subnormal numbers included
  const Vf scaled = (Vf)magnitude * broadcast(0x1p112f);
  const Vi special = (Vi)(magnitude >= (0x7c00u << 13));
  return (Vf)(choose(special, magnitude | 0x7f800000u, (Vu)scaled) | sign);
}
FS_INLINE Vh to_bits(const F16*, Vf v) {
  const Vu bits = (Vu)v;
  const Vu sign = (bits >> 16) & 0x8000;
  const Vu magnitude = bits & 0x7fffffff;
  const Vu normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // below 2^-14 the sum with 0.5 rounds to multiples of 2^-24, and its low bits are the result
  const Vu subnormal = (Vu)((Vf)magnitude + broadcast(0.5f)) - 0x3f000000u;
  Vu half = choose((Vi)(magnitude < (113u << 23)), subnormal, normal);
  half = choose((Vi)(magnitude >= 0x477ff000u), (half & 0) + 0x7c00, half);
  half = choose(v != v, 0x7e00 | ((magnitude >> 13) & 0x3ff), half);
  return __builtin_convertvector(half | sign, Vh);
}
#endif

FS_INLINE Vf load(const float* p) {
  Vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class Half>
FS_INLINE Vf load(const Half* p) {
  Vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return from_bits(p, h);
}
FS_INLINE Vf load(const float* p, int count) {
  Vf v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(count) * 4);
  return v;
}
template <class Half>
FS_INLINE Vf load(const Half* p, int count) {
  Vh h = {};
  __builtin_memcpy(&h, p, static_cast<size_t>(count) * 2);
  return from_bits(p, h);
}
FS_INLINE void store(float* p, Vf v) { __builtin_memcpy(p, &v, sizeof v); }
template <class Half>
FS_INLINE void store(Half* p, Vf v) {
  const Vh h = to_bits(p, v);
  __builtin_memcpy(p, &h, sizeof h);
}
FS_INLINE void store(float* p, Vf v, int count) {
  __builtin_memcpy(p, &v, static_cast<size_t>(count) * 4);
}
template <class Half>
FS_INLINE void store(Half* p, Vf v, int count) {
  const Vh h = to_bits(p, v);
  __builtin_memcpy(p, &h, static_cast<size_t>(count) * 2);
}

#if defined(FS_ISA_NEON)
FS_INLINE Vf fma(Vf a, Vf b, Vf c) {
  return (Vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FS_INLINE Vf fnma(Vf a, Vf b, Vf c) {
  return (Vf)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FS_INLINE Vf square_root(Vf v) { return (Vf)vsqrtq_f32((float32x4_t)v); }
#else
// two roundings: fused in no instruction here
FS_INLINE Vf fma(Vf a, Vf b, Vf c) { return a * b + c; }
FS_INLINE Vf fnma(Vf a, Vf b, Vf c) { return c - a * b; }
FS_INLINE Vf square_root(Vf v) {
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
#endif
// the second operand where either is nan
FS_INLINE Vf minimum(Vf a, Vf b) { return (Vf)choose(a < b, (Vu)a, (Vu)b); }
FS_INLINE Vf maximum(Vf a, Vf b) { return (Vf)choose(a > b, (Vu)a, (Vu)b); }
FS_INLINE Vf absolute(Vf v) { return (Vf)((Vu)v & 0x7fffffff); }
FS_INLINE Vf zero_where_less(Vf v, Vf x, float limit) {
  return (Vf)(~(Vu)(x < broadcast(limit)) & (Vu)v);
}
FS_INLINE Vf keep_lanes(Vf v, int count) { return (Vf)((Vu)v & (Vu)(Vi{0, 1, 2, 3} < count)); }
FS_INLINE Vf reciprocal(Vf v) { return broadcast(1.0f) / v; }
FS_INLINE float sum(Vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
FS_INLINE float largest(Vf v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}

FS_INLINE Vd broadcast_double(double v) { return {Vdouble{v, v}, Vdouble{v, v}}; }
FS_INLINE Vd widen(Vf v) { return {Vdouble{v[0], v[1]}, Vdouble{v[2], v[3]}}; }
FS_INLINE Vd add(Vd a, Vd b) { return {a.lo + b.lo, a.hi + b.hi}; }
FS_INLINE Vd scaled(Vd a, double factor) { return {a.lo * factor, a.hi * factor}; }
FS_INLINE Vd fma(Vd a, Vd b, Vd c) { return {a.lo * b.lo + c.lo, a.hi * b.hi + c.hi}; }
FS_INLINE void store(double* p, Vd v) { __builtin_memcpy(p, &v, sizeof v); }
FS_INLINE Vd load(const double* p) {
  Vd v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FS_INLINE double sum(Vd v) {
  const Vdouble s = v.lo + v.hi;
  return s[0] + s[1];
}
