/* W plus products of Toeplitz matrices, for one activation type and one instruction set: slide. See spectra.h.
 *
 * The product lives on the diagonals, one number each, and an element follows from the one before it on its diagonal by
 * two multiplications a term. So the work is that of a product of rank 2 · terms, whatever the inner extent; the errors
 * of a block's rows add up, which is why a block starts with a row that is computed directly.
 *
 * The naive version:
 *     for i < rows, j < columns:  out[i][j] = weight[i][j] + Σ_t Σ_{m < inner} l_t[i + m] · r_t[j + m]
 */

/* A vector of diagonals, a row further down. */
FLORA_INLINE vec PRIVATE(slid)(const flora_slide *s, int64_t i, int64_t j, vec v) {
    const real *left = (const real *)s->left + i - 1, *right = (const real *)s->right + j - 1;
    for (int64_t t = 0; t < s->terms; t++, left += s->left_term, right += s->right_term) {
        v += left[s->inner] * REAL(load)(right + s->inner);
        v -= left[0] * REAL(load)(right);
    }
    return v;
}

static void NAME(slide)(const flora_slide *s) {
    real *v = s->diagonals;
    for (int64_t i = 0; i < s->rows; i++, v--) {
        const act *weight = s->weight ? (const act *)s->weight + i * s->weight_row : NULL;
        act *out = (act *)s->out + i * s->out_row;
        const int64_t ahead = s->rows - 1 - i; /* diagonals that reach the block further down */
        for (int64_t j = -(ahead + LANES - 1) / LANES * LANES; j < 0 && i > 0 && s->terms > 0; j += LANES)
            REAL(store)(v + j, PRIVATE(slid)(s, i, j, REAL(load)(v + j)));
        for (int64_t j = 0; j < s->columns; j += LANES) {
            const int64_t width = s->columns - j < LANES ? s->columns - j : LANES;
            vec sum = REAL(load)(v + j);
            if (i > 0 && s->terms > 0) {
                sum = PRIVATE(slid)(s, i, j, sum);
                REAL(store)(v + j, sum);
            }
            if (width < LANES)
                ACT(store_part)(out + j, weight ? ACT(load_part)(weight + j, width) + sum : sum, width);
            else
                ACT(store)(out + j, weight ? ACT(load)(weight + j) + sum : sum);
        }
    }
}
