/* W plus products of Toeplitz matrices, for one activation type and one instruction set: slide. See spectra.h.
 *
 * The product lives on the diagonals, one number each, and an element follows from the one before it on its diagonal by
 * two multiplications a term. So the work is that of a product of rank 2 · terms, whatever the inner extent; the errors
 * of a block's rows add up, which is why a block starts with a row that is computed directly.
 *
 * The naive version:
 *     for i < rows, j < columns:  out[i][j] = weight[i][j] + Σ_t Σ_{m < inner} l_t[i + m] · r_t[j + m]
 *
 * A vector of diagonals goes through SLIDE_ROWS rows in a register, one column to the right in each: where it is loaded
 * and stored row by row, every load waits for two stores that it overlaps.
 */
#define SLIDE_ROWS (LANES < 4 ? LANES : 4) /* so that the rows begin in one vector of diagonals */

/* The diagonals v, k rows below `left` and k + 1 columns right of `right`. */
FLORA_INLINE vec PRIVATE(slid)(const int64_t terms, const flora_slide *s, const real *left, const real *right, int k,
                               vec v) {
    for (int64_t t = 0; t < terms; t++, left += s->left_term, right += s->right_term) {
        v += left[k + s->inner] * REAL(load)(right + k + s->inner);
        v -= left[k] * REAL(load)(right + k);
    }
    return v;
}

/* Rows i to i + rows - 1; rows is a constant after inlining, and so is terms if it is 1. */
FLORA_INLINE void PRIVATE(slide_rows)(const int rows, const int64_t terms, const flora_slide *s, int64_t i) {
    const int64_t weight_row = s->weight_row, out_row = s->out_row;
    const act *weight = (const act *)s->weight + i * weight_row;
    act *out = (act *)s->out + i * out_row;
    const real *left = (const real *)s->left + i - 1, *right = (const real *)s->right - 1;
    real *diagonals = (real *)s->diagonals - i;
    int64_t j = -(s->rows - 1 - i + LANES - 1) / LANES * LANES; /* they reach the block in these or later rows */
    for (; j < 0; j += LANES) {
        vec v = REAL(load)(diagonals + j);
        FLORA_UNROLL
        for (int k = 0; k < rows; k++) {
            v = PRIVATE(slid)(terms, s, left, right + j, k, v);
            for (int q = 0; q < k && q < s->columns && j == -LANES; q++) { /* in these */
                const vec number = {v[LANES - k + q]};
                ACT(store_part)(out + k * out_row + q, ACT(load_part)(weight + k * weight_row + q, 1) + number, 1);
            }
        }
        REAL(store)(diagonals + j, v);
    }
    for (; j + rows - 1 + LANES <= s->columns; j += LANES) {
        vec v = REAL(load)(diagonals + j);
        FLORA_UNROLL
        for (int k = 0; k < rows; k++) {
            __builtin_prefetch(out + (k + rows) * out_row + j, 1);
            __builtin_prefetch(weight + (k + rows) * weight_row + j);
            v = PRIVATE(slid)(terms, s, left, right + j, k, v);
            ACT(store)(out + k * out_row + j + k, ACT(load)(weight + k * weight_row + j + k) + v);
        }
        REAL(store)(diagonals + j, v);
    }
    for (; j < s->columns; j += LANES) {
        vec v = REAL(load)(diagonals + j);
        FLORA_UNROLL
        for (int k = 0; k < rows; k++) {
            const int64_t at = j + k, width = s->columns - at < LANES ? s->columns - at : LANES;
            v = PRIVATE(slid)(terms, s, left, right + j, k, v);
            if (width == LANES)
                ACT(store)(out + k * out_row + at, ACT(load)(weight + k * weight_row + at) + v);
            else if (width > 0)
                ACT(store_part)(out + k * out_row + at, ACT(load_part)(weight + k * weight_row + at, width) + v, width);
        }
        REAL(store)(diagonals + j, v);
    }
}

FLORA_INLINE void PRIVATE(slide_terms)(const int64_t terms, const flora_slide *s) {
    int64_t i = 0;
    for (; s->rows - i >= SLIDE_ROWS; i += SLIDE_ROWS)
        PRIVATE(slide_rows)(SLIDE_ROWS, terms, s, i);
    for (; i < s->rows; i++)
        PRIVATE(slide_rows)(1, terms, s, i);
}

static void NAME(slide)(const flora_slide *s) {
    if (s->terms == 1)
        PRIVATE(slide_terms)(1, s);
    else if (s->terms > 1)
        PRIVATE(slide_terms)(s->terms, s);
    for (int64_t i = 0; i < s->rows && s->terms == 0; i++) {
        const act *weight = (const act *)s->weight + i * s->weight_row;
        act *out = (act *)s->out + i * s->out_row;
        const real *diagonals = (const real *)s->diagonals - i;
        for (int64_t j = 0; j < s->columns; j += LANES) {
            const int64_t width = s->columns - j;
            __builtin_prefetch(out + s->out_row + j, 1);
            __builtin_prefetch(weight + s->weight_row + j);
            if (width >= LANES)
                ACT(store)(out + j, ACT(load)(weight + j) + REAL(load)(diagonals + j));
            else
                ACT(store_part)(out + j, ACT(load_part)(weight + j, width) + REAL(load)(diagonals + j), width);
        }
    }
}

#undef SLIDE_ROWS
