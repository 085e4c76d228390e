/* Products with Toeplitz matrices: by transforms of vectors of rows, and by sliding along diagonals.
 *
 * A transform evaluates the 2n real numbers of a row, as a polynomial modulo u^2n + 1, at that many roots of -1 (one of
 * each conjugate pair): number j is the real and number n + j the imaginary part of a polynomial of degree n modulo
 * u^n - i. Products of spectra are convolutions that come back with the opposite sign, 2n long; there is nothing to
 * separate, rows never meet, and shorter rows need no room for their zeros.
 *
 * A vector holds one number of `lanes` rows. data is (n, re and im, lanes): point after point, in the order of the
 * roots that the butterflies leave. Its 8 regions of n / 8 points can be treated one after the other between the first
 * butterflies and the last, which are the only ones that reach across.
 */
#ifndef FLORA_SPECTRA_H
#define FLORA_SPECTRA_H

#include <stddef.h>
#include <stdint.h>

enum { FLORA_REGIONS = 8, FLORA_MAX_STAGES = 40 };

typedef struct {
    int64_t n;                              /* points: FLORA_REGIONS times the product of the radices */
    int stages;                             /* inside a region */
    int radix[FLORA_MAX_STAGES];            /* 2, 3, 4, 5 or 8 */
    const void *twiddles[FLORA_MAX_STAGES]; /* real (blocks, radix - 1, 2) */
} flora_transform;

enum { FLORA_CONJUGATE = 1, FLORA_ACCUMULATE = 2 };

/* rows × columns of W + Σ_t L_t · R_t, one block. With l_t and r_t the diagonals of L_t and, reversed, of R_t, element
 * (i, j) of the product is Σ_{m < inner} l_t[i + m] · r_t[j + m], so that
 *     (i + 1, j + 1) = (i, j) + Σ_t l_t[i + inner] · r_t[j + inner] - l_t[i] · r_t[j]. */
typedef struct {
    int64_t rows, columns, terms, inner;
    const void *left,
        *right; /* real: l_t[first row] and r_t[first column]; all are readable `rows` + a vector before */
    int64_t left_term, right_term;
    void *diagonals;    /* real: the product's first row, which goes on to the left for `rows` + a vector */
    const void *weight; /* act */
    void *out;          /* act; may be weight */
    int64_t weight_row, out_row;
} flora_slide;

/* The adjoint of one step, row `row` of a block, from the last one on: d_row is added to the diagonals, and what they
 * are then to the gradients of what led here from the row before. */
typedef struct {
    int64_t row, rows, columns, terms, inner;
    const void *d_row; /* real (columns) */
    const void *left, *right;
    int64_t left_term, right_term;
    void *d_left, *d_right; /* laid out as left and right */
    void *diagonals;
} flora_slide_back;

typedef struct {
    /* data = the first butterflies of the transform of rows[0 … lanes), `count` <= 2n numbers each, then zeros */
    void (*enter)(const flora_transform *t, void *data, const void *const *rows, int64_t count);
    /* the others, of one region; and the inverse, n times too large */
    void (*forward)(const flora_transform *t, void *data, int64_t region);
    void (*inverse)(const flora_transform *t, void *data, int64_t region);
    /* to (lanes, count) = the end of the inverse transform; data is not changed */
    void (*leave)(const flora_transform *t, const void *data, void *to, int64_t to_row, int64_t count);
    /* leave, zero all from number `count` on, and enter again, where it is */
    void (*truncate)(const flora_transform *t, void *data, int64_t count);

    /* to (points, lanes) = or += from · by (points), or · its conjugate */
    void (*multiply)(void *to, const void *from, const void *by, int64_t points, int flags);
    /* re, im (points) += the sum over lanes of conjugate(a) · b */
    void (*correlate)(void *re, void *im, const void *a, const void *b, int64_t points);

    void (*slide_back)(const flora_slide_back *s);
} flora_spectra;

#endif
