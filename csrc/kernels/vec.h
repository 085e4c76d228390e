/* Vectors of FLORA_VECTOR_BYTES bytes by the vector extensions of gcc and clang, and how activations become them.
 *
 * For each activation type: `<dtype>_load` gives LANES elements as reals, `<dtype>_store` rounds them back (once, to
 * nearest even); `_load_part` and `_store_part` touch the first n < LANES elements only. NaN stays NaN.
 * Memory is read through memcpy-like unaligned, aliasing types, so no pointer has to be aligned.
 */
#ifndef FLORA_VEC_H
#define FLORA_VEC_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#    include <immintrin.h>
#elif defined(FLORA_NEON)
#    include <arm_neon.h>
#endif

#define F32_LANES (FLORA_VECTOR_BYTES / 4)
#define F64_LANES (FLORA_VECTOR_BYTES / 8)

typedef float f32v __attribute__((vector_size(FLORA_VECTOR_BYTES)));
typedef double f64v __attribute__((vector_size(FLORA_VECTOR_BYTES)));
typedef uint32_t u32v __attribute__((vector_size(FLORA_VECTOR_BYTES)));
typedef int32_t i32v __attribute__((vector_size(FLORA_VECTOR_BYTES)));
typedef uint16_t u16v __attribute__((vector_size(FLORA_VECTOR_BYTES / 2))); /* as many lanes as f32v */

typedef f32v f32v_any __attribute__((aligned(4), may_alias));
typedef f64v f64v_any __attribute__((aligned(8), may_alias));
typedef u16v u16v_any __attribute__((aligned(2), may_alias));

#define FLORA_INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#    define FLORA_UNROLL _Pragma("unroll")
#else
#    define FLORA_UNROLL _Pragma("GCC unroll 32")
#endif

/* float32 and float64 ------------------------------------------------------------------------------------------- */

FLORA_INLINE f32v f32_load(const float *p) {
    return *(const f32v_any *)p;
}

FLORA_INLINE void f32_store(float *p, f32v v) {
    *(f32v_any *)p = v;
}

FLORA_INLINE f64v f64_load(const double *p) {
    return *(const f64v_any *)p;
}

FLORA_INLINE void f64_store(double *p, f64v v) {
    *(f64v_any *)p = v;
}

#if FLORA_VECTOR_BYTES == 64 && defined(__AVX512BW__)

FLORA_INLINE f32v f32_load_part(const float *p, int64_t n) {
    return (f32v)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}

FLORA_INLINE void f32_store_part(float *p, f32v v, int64_t n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}

FLORA_INLINE f64v f64_load_part(const double *p, int64_t n) {
    return (f64v)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}

FLORA_INLINE void f64_store_part(double *p, f64v v, int64_t n) {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
}

FLORA_INLINE u16v u16_load_part(const uint16_t *p, int64_t n) {
    return (u16v)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
}

FLORA_INLINE void u16_store_part(uint16_t *p, u16v v, int64_t n) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)v);
}

#else

FLORA_INLINE f32v f32_load_part(const float *p, int64_t n) {
    f32v v = {0};
    for (int64_t i = 0; i < n; i++)
        v[i] = p[i];
    return v;
}

FLORA_INLINE void f32_store_part(float *p, f32v v, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        p[i] = v[i];
}

FLORA_INLINE f64v f64_load_part(const double *p, int64_t n) {
    f64v v = {0};
    for (int64_t i = 0; i < n; i++)
        v[i] = p[i];
    return v;
}

FLORA_INLINE void f64_store_part(double *p, f64v v, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        p[i] = v[i];
}

FLORA_INLINE u16v u16_load_part(const uint16_t *p, int64_t n) {
    u16v v = {0};
    for (int64_t i = 0; i < n; i++)
        v[i] = p[i];
    return v;
}

FLORA_INLINE void u16_store_part(uint16_t *p, u16v v, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        p[i] = v[i];
}

#endif

/* (a0, b0, a1, b1, …) of the lower and of the upper halves of two vectors */
#if FLORA_VECTOR_BYTES == 16
#    define F32_LOW 0, 4, 1, 5
#    define F32_HIGH 2, 6, 3, 7
#    define F64_LOW 0, 2
#    define F64_HIGH 1, 3
#elif FLORA_VECTOR_BYTES == 32
#    define F32_LOW 0, 8, 1, 9, 2, 10, 3, 11
#    define F32_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#    define F64_LOW 0, 4, 1, 5
#    define F64_HIGH 2, 6, 3, 7
#else
#    define F32_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#    define F32_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#    define F64_LOW 0, 8, 1, 9, 2, 10, 3, 11
#    define F64_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#endif

FLORA_INLINE f32v f32_interleave_low(f32v a, f32v b) {
    return __builtin_shufflevector(a, b, F32_LOW);
}

FLORA_INLINE f32v f32_interleave_high(f32v a, f32v b) {
    return __builtin_shufflevector(a, b, F32_HIGH);
}

FLORA_INLINE f64v f64_interleave_low(f64v a, f64v b) {
    return __builtin_shufflevector(a, b, F64_LOW);
}

FLORA_INLINE f64v f64_interleave_high(f64v a, f64v b) {
    return __builtin_shufflevector(a, b, F64_HIGH);
}

/* bfloat16: the upper half of a float32 ------------------------------------------------------------------------- */

FLORA_INLINE f32v bf16_widen(u16v v) {
    return (f32v)(__builtin_convertvector(v, u32v) << 16);
}

#if FLORA_VECTOR_BYTES == 64 && defined(__AVX512BF16__)

FLORA_INLINE u16v bf16_narrow(f32v v) { /* subnormal numbers become zero */
    return (u16v)_mm512_cvtneps_pbh((__m512)v);
}

#else

FLORA_INLINE u16v bf16_narrow(f32v v) {
    u32v bits = (u32v)v;
    u32v rounded = bits + 0x7fff + ((bits >> 16) & 1);
    u32v quiet = bits | 0x400000; /* rounding could turn a NaN into an infinity */
    u32v nan = (u32v)(v != v);
    return __builtin_convertvector(((rounded & ~nan) | (quiet & nan)) >> 16, u16v);
}

#endif

/* float16 --------------------------------------------------------------------------------------------------------- */

#if FLORA_VECTOR_BYTES == 64 && defined(__AVX512F__)

FLORA_INLINE f32v f16_widen(u16v v) {
    return (f32v)_mm512_cvtph_ps((__m256i)v);
}

FLORA_INLINE u16v f16_narrow(f32v v) {
    return (u16v)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif FLORA_VECTOR_BYTES == 32 && defined(__F16C__)

FLORA_INLINE f32v f16_widen(u16v v) {
    return (f32v)_mm256_cvtph_ps((__m128i)v);
}

FLORA_INLINE u16v f16_narrow(f32v v) {
    return (u16v)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(FLORA_NEON)

FLORA_INLINE f32v f16_widen(u16v v) {
    return (f32v)vcvt_f32_f16((float16x4_t)v);
}

FLORA_INLINE u16v f16_narrow(f32v v) {
    return (u16v)vcvt_f16_f32((float32x4_t)v);
}

#else

FLORA_INLINE u32v u32_select(i32v mask, u32v yes, u32v no) {
    return ((u32v)mask & yes) | (~(u32v)mask & no);
}

FLORA_INLINE f32v f16_widen(u16v v) {
    u32v bits = __builtin_convertvector(v, u32v), sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
    u32v normal = (rest << 13) + (112u << 23);                                 /* the exponent's bias: 127 - 15 */
    u32v small = (u32v)(__builtin_convertvector((i32v)rest, f32v) * 0x1p-24f); /* subnormal: a multiple of 2^-24 */
    u32v magnitude = u32_select((i32v)(rest < 0x400), small, normal);
    magnitude = u32_select((i32v)(rest >= 0x7c00), (rest << 13) | 0x7f800000, magnitude); /* infinity, NaN */
    return (f32v)(sign | magnitude);
}

FLORA_INLINE u16v f16_narrow(f32v v) {
    u32v bits = (u32v)v, sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    u32v normal = (rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
    u32v small =
        (u32v)((f32v)rest + 0.5f) - 0x3f000000; /* 0.5 has steps of 2^-24: the addition rounds to one of them */
    u32v nan = ((rest >> 13) & 0x3ff) | 0x7e00;
    u32v magnitude = u32_select((i32v)(rest < 0x38800000), small, normal);             /* below 2^-14 */
    magnitude = u32_select((i32v)(rest >= 0x47800000), (u32v){0} + 0x7c00, magnitude); /* 65536 and more */
    magnitude = u32_select((i32v)(rest > 0x7f800000), nan, magnitude);
    return __builtin_convertvector(sign | magnitude, u16v);
}

#endif

/* The four activation types under one set of names ---------------------------------------------------------------- */

FLORA_INLINE f32v bf16_load(const uint16_t *p) {
    return bf16_widen(*(const u16v_any *)p);
}

FLORA_INLINE f32v bf16_load_part(const uint16_t *p, int64_t n) {
    return bf16_widen(u16_load_part(p, n));
}

FLORA_INLINE void bf16_store(uint16_t *p, f32v v) {
    *(u16v_any *)p = bf16_narrow(v);
}

FLORA_INLINE void bf16_store_part(uint16_t *p, f32v v, int64_t n) {
    u16_store_part(p, bf16_narrow(v), n);
}

FLORA_INLINE f32v f16_load(const uint16_t *p) {
    return f16_widen(*(const u16v_any *)p);
}

FLORA_INLINE f32v f16_load_part(const uint16_t *p, int64_t n) {
    return f16_widen(u16_load_part(p, n));
}

FLORA_INLINE void f16_store(uint16_t *p, f32v v) {
    *(u16v_any *)p = f16_narrow(v);
}

FLORA_INLINE void f16_store_part(uint16_t *p, f32v v, int64_t n) {
    u16_store_part(p, f16_narrow(v), n);
}

#endif
