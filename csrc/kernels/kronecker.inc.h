/* The gradient of a Kronecker product to its factors, for one compute type: kronecker_sums. Reals in, reals out.
 *
 *     d_a (t, j) += Σ_i b (i) · d (t, i, j)        d_b (i, lanes) += Σ_t Σ_j d (t, i, j) · a (t, j), lane by lane
 *
 * Each element of d is loaded once and meets two multiply-adds. A block of d_a's sums stays in registers over all i,
 * and so does its part of a; a vector of d_b's sums is loaded and stored once for the block. */

/* A block (rows, vecs) of d_a, constants after inlining; width: of the last vector. */
FLORA_INLINE void PRIVATE(kronecker_block)(const int rows, const int vecs, const flora_kronecker_sums *g, const real *d,
                                           const real *a, real *d_a, int64_t width) {
    vec sum[8][2], factor[8][2];
    const real *b = g->b;
    real *d_b = g->d_b;
    FLORA_UNROLL
    for (int t = 0; t < rows; t++) {
        FLORA_UNROLL
        for (int j = 0; j < vecs; j++) {
            sum[t][j] = REAL(load)(d_a + t * g->a_row + j * LANES);
            factor[t][j] = REAL(load)(a + t * g->a_row + j * LANES);
        }
    }
    for (int64_t i = 0; i < g->n; i++, d += g->q, d_b += LANES) {
        vec total = REAL(load)(d_b);
        FLORA_UNROLL
        for (int t = 0; t < rows; t++) {
            FLORA_UNROLL
            for (int j = 0; j < vecs; j++) {
                const real *at = d + t * g->d_row + j * LANES;
                const vec v = j == vecs - 1 && width < LANES ? REAL(load_part)(at, width) : REAL(load)(at);
                sum[t][j] += b[i] * v;
                total += factor[t][j] * v;
            }
        }
        REAL(store)(d_b, total);
    }
    FLORA_UNROLL
    for (int t = 0; t < rows; t++) {
        FLORA_UNROLL
        for (int j = 0; j < vecs; j++)
            REAL(store)(d_a + t * g->a_row + j * LANES, sum[t][j]);
    }
}

FLORA_INLINE void PRIVATE(kronecker_rows)(const int rows, const flora_kronecker_sums *g, int64_t t) {
    const real *d = (const real *)g->d + t * g->d_row, *a = (const real *)g->a + t * g->a_row;
    real *d_a = (real *)g->d_a + t * g->a_row;
    int64_t j = 0;
    for (; g->q - j > LANES; j += 2 * LANES) {
        const int64_t width = g->q - j - LANES;
        PRIVATE(kronecker_block)(rows, 2, g, d + j, a + j, d_a + j, width < LANES ? width : LANES);
    }
    if (j < g->q)
        PRIVATE(kronecker_block)(rows, 1, g, d + j, a + j, d_a + j, g->q - j);
}

/* A quarter of the registers for the sums, one for a: the rest is b, d and the total. */
static void NAME(kronecker_sums)(const flora_kronecker_sums *g) {
    const int most = FLORA_REGISTERS / 8;
    int64_t t = 0;
    for (; g->rows - t >= most; t += most)
        PRIVATE(kronecker_rows)(most, g, t);
    for (; t < g->rows; t++)
        PRIVATE(kronecker_rows)(1, g, t);
}
