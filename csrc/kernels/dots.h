/* Products of bfloat16 numbers with float32 sums, for CPUs that multiply bfloat16 themselves.
 *
 * c (m, n) = c_in (m, n) + sum over t < taps and l < k of a_t(i, l) · b_t(l, j)
 *
 * Both operands are read two steps of k at a time, as every such instruction wants them:
 *     a (m, k)                  k contiguous: a pair is 32 bits of a row
 *     b (⌈k / 2⌉, n, 2)         "pairs": rows 2l and 2l + 1 interleaved; n is padded to a multiple of FLORA_PAIR_LANES
 * For an odd k the second half of b's last row is zero, and a is not read beyond its k.
 *
 * A product's operands are numbers of bfloat16, or float32 numbers rounded once to it; sums are float32. The
 * instructions read and write subnormal numbers as zero.
 */
#ifndef FLORA_DOTS_H
#define FLORA_DOTS_H

#include <stdint.h>

#define FLORA_PAIR_LANES 16

typedef struct {
    int64_t m, n, k;
    const uint16_t *a;
    int64_t a_m; /* row stride in elements */
    const uint16_t *b;
    int64_t b_w;                    /* padded n: a row of pairs has 2 · b_w elements */
    int64_t taps;                   /* 1 for a plain product */
    const int64_t *a_taps, *b_taps; /* in elements; NULL: taps is 1 and both start at 0 */
    const void *c_in;               /* NULL: zero; may be c itself */
    void *c;                        /* float in dot, bfloat16 in dot_act */
    int64_t c_m;
    const uint16_t *ahead; /* not NULL: a comes from memory, and this is the a of the next product */
} flora_dot;

typedef struct {
    /* around every use of `dot` and `dot_act` on a thread; NULL: not needed */
    void (*begin)(void), (*end)(void);

    void (*dot)(const flora_dot *g);
    void (*dot_act)(const flora_dot *g);

    /* to (⌈k / 2⌉, width, 2) = the rows of from (k, n), row stride from_k, interleaved in pairs; zero beyond k and n */
    void (*pair)(uint16_t *to, int64_t width, const uint16_t *from, int64_t from_k, int64_t k, int64_t n);
    /* the same from float, rounded; `to` may be where `from` is if width <= from_k */
    void (*pair_rounded)(void *to, int64_t width, const void *from, int64_t from_k, int64_t k, int64_t n);
    /* to (m, width), row stride to_m = from (m, n) float, rounded, then zeros; `to` may be where `from` is if
     * to_m <= 2 · from_m */
    void (*round)(void *to, int64_t to_m, int64_t width, const void *from, int64_t from_m, int64_t m, int64_t n);
} flora_dots;

#if defined(__x86_64__)
extern const flora_dots flora_dots_bf16; /* AVX512-BF16 */
extern const flora_dots flora_dots_amx;  /* AMX-BF16 */
#endif
extern const flora_dots flora_dots_soft_tiles; /* the body of AMX-BF16 in plain C */

#endif
