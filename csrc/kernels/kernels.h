/* The kernel table: what an instruction set offers to the operations in tucker_*.c.
 *
 * There is one multiplication, `gemm`, and a few copies around it. Every product of a Tucker or Kronecker update
 * (projections, small convolutions, their gradients, mode products) is that one, with other strides. What has no
 * product in it has a body of its own: the weight gradient of a grouped convolution (`tap_sums`), the passes over a
 * weight or its gradient that meet every element a time or two (`kronecker_sums`, `rescale`, `rescale_sums`), and
 * transforms (`winograd_…`, `spectra`).
 *
 * Here "act" is the activation type (float, double, or bfloat16 and float16 as 16 raw bits) and "real" the compute type
 * (double for double, else float). Kernels allocate nothing, know no threads, and check nothing.
 */
#ifndef FLORA_KERNELS_H
#define FLORA_KERNELS_H

#include "spectra.h"

#include <stddef.h>
#include <stdint.h>

/* c (m, n) = c_in (m, n) + sum over t < taps and l < k of a_t(i, l) · b_t(l, j)
 *
 * n is the vector: c, c_in and b have unit stride along it. `a` is read one scalar at a time through any strides.
 * b is scratch and must stay readable up to the next multiple of the vector width of its last row. */
typedef struct {
    int64_t m, n, k;
    const void *a; /* real */
    int64_t a_m, a_k;
    const void *b; /* real */
    int64_t b_k;
    int64_t taps;                   /* 1 for a plain product */
    const int64_t *a_taps, *b_taps; /* where each tap's a and b start; NULL: taps is 1 and both start at 0 */
    const void *c_in;               /* NULL: zero; may be c itself */
    void *c;                        /* real in gemm, act in gemm_act */
    int64_t c_m;                    /* row stride of c and c_in */
    const void
        *ahead; /* not NULL: a comes from memory, and this is the a of the next product, to be fetched meanwhile */
} flora_gemm;

/* sums (rows, columns, lanes) += sum over lines and pixels of dy (line, pixel, lanes) · x (line, pixel, at tap, lanes)
 *
 * All real; the taps of row r start row_at[r] after x, its columns follow at tap_step. Strides count reals; a pixel of
 * dy follows the one before it. */
typedef struct {
    int64_t lines, pixels, rows, columns;
    const void *dy, *x;
    int64_t dy_line, x_line, x_pixel, tap_step;
    const int64_t *row_at;
    void *sums;
} flora_tap_sums;

/* With d (rows, n, q), rows of d_row reals and neither padding nor gaps within one:
 *     d_a (rows, q) += sum over i of b (i) · d (rows, i, q)
 *     d_b (n, lanes) += sums of d (t, i, j) · a (t, j), where adding up the lanes is left to the caller
 *
 * All real. a and d_a have rows of a_row reals; they, and d_b, are scratch up to the next multiple of the vector width,
 * where a is zero. */
typedef struct {
    int64_t rows, n, q;
    const void *d, *a, *b;
    int64_t d_row, a_row;
    void *d_a, *d_b;
} flora_kronecker_sums;

/* With g (line, j) = d_weight (line, j) · weight (line, j), both act and of unit stride along j < n:
 *     across_sums (line) += sum over j of g · along (j)
 *     along_sums (j) += sum over lines of g · across (line)
 *
 * The vectors are real; along and along_sums are scratch up to the next multiple of the vector width. */
typedef struct {
    int64_t lines, n;
    const void *d_weight, *weight;
    int64_t d_weight_line, weight_line;
    const void *along, *across;
    void *along_sums, *across_sums;
} flora_rescale_sums;

/* Products of a factor (n, rank), lines of unit stride, and few rows of it: see few.inc.h. All real. Wide (rows, n) and
 * narrow (rows, rank) are scratch up to the next multiple of the vector width; narrow is zero or written there. */
typedef struct {
    int64_t rows, n, rank;
    void *wide, *narrow, *factor;
    int64_t wide_m, narrow_m, factor_n;
    double scale;
} flora_few;

typedef struct {
    size_t act_size, real_size; /* bytes */
    int64_t lanes;              /* reals in a vector: rows of packed matrices are padded to a multiple of it */

    void (*gemm)(const flora_gemm *g);
    void (*gemm_act)(const flora_gemm *g);

    /* to (m, n) real, row stride to_m = from (m, n) act through any strides */
    void (*widen)(void *to, int64_t to_m, const void *from, int64_t from_m, int64_t from_n, int64_t m, int64_t n);
    /* the same from real */
    void (*copy)(void *to, int64_t to_m, const void *from, int64_t from_m, int64_t from_n, int64_t m, int64_t n);
    /* to (m, width >= n) real = scale · from (m, n) real, then zeros */
    void (*pack)(void *to, int64_t width, const void *from, int64_t from_m, int64_t from_n, int64_t m, int64_t n,
                 double scale);
    /* to (n, m) real, row stride to_n = the transpose of from (m, n) real, row stride from_m. Both are scratch: rows
     * and columns up to the next multiple of the vector width are read and written too. */
    void (*transpose)(void *to, int64_t to_n, const void *from, int64_t from_m, int64_t m, int64_t n);
    /* to (m, n) real, any strides = scale · sum over p < parts of from + p · part (m, n), row stride from_m; from is
     * scratch whose rows are read up to the next multiple of the vector width */
    void (*sum)(void *to, int64_t to_m, int64_t to_n, const void *from, int64_t from_m, int64_t parts, int64_t part,
                int64_t m, int64_t n, double scale);
    /* to (m, n) real += from (m, n) real, of these row strides */
    void (*add)(void *to, int64_t to_m, const void *from, int64_t from_m, int64_t m, int64_t n);
    /* the same to act */
    void (*add_act)(void *to, int64_t to_m, const void *from, int64_t from_m, int64_t m, int64_t n);
    void (*tap_sums)(const flora_tap_sums *sums);
    void (*kronecker_sums)(const flora_kronecker_sums *sums);
    /* out (n) act = weight (n) act · (1 + factor · along (n) real), any steps; along is scratch up to the next multiple
     * of the vector width */
    void (*rescale)(void *out, int64_t out_step, const void *weight, int64_t weight_step, const void *along,
                    double factor, int64_t n);
    void (*rescale_sums)(const flora_rescale_sums *sums);

    /* narrow = scale · wide · factor;  wide = scale · narrow · factorᵀ;  factor = scale · wideᵀ · narrow */
    void (*few_project)(const flora_few *f);
    void (*few_expand)(const flora_few *f);
    void (*few_outer)(const flora_few *f);

    /* The transforms of Winograd's F(2 × 2, 3 × 3), LANES channels at once, all real: see winograd.inc.h. `from` has
     * nine reals a channel, the rest is scratch. */
    void (*winograd_taps)(void *taps, const void *from, int64_t channel);
    void (*winograd_filter)(void *parts, int64_t part, const void *taps);
    void (*winograd_input)(void *parts, int64_t part, int64_t tile, const void *lines, int64_t line, int64_t tiles);
    void (*winograd_output)(void *lines, int64_t line, const void *parts, int64_t part, int64_t tile, int64_t tiles);

    void (*slide)(const flora_slide *s);
    const flora_spectra *spectra; /* of the compute type */
} flora_kernels;

/* One table an instruction set, indexed by flora_dtype. */
extern const flora_kernels flora_kernels_portable[4];
#if defined(__x86_64__)
extern const flora_kernels flora_kernels_v3[4];
extern const flora_kernels flora_kernels_v4[4];
#elif defined(__aarch64__)
extern const flora_kernels flora_kernels_neon[4];
#endif

#endif
