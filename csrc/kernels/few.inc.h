/* The three products of a factor and few rows, for one compute type: all real, sums real.
 *
 * The factor is used where it lies: for so few rows, packing it would cost more than the products do.
 *
 * The naive versions:
 *     few_project:  narrow[i][j] = scale · Σ_c wide[i][c] · factor[c][j]
 *     few_expand:   wide[i][c] = scale · Σ_j narrow[i][j] · factor[c][j]
 *     few_outer:    factor[c][j] = scale · Σ_i wide[i][c] · narrow[i][j]
 */

enum { PRIVATE(few_sums) = 8 }; /* as many as hide the latency of a fused multiply-add */

/* narrow's vector from column j on, of one row */
FLORA_INLINE vec PRIVATE(few_project_row)(const flora_few *f, const real *wide, int64_t j, int64_t width) {
    const real *factor = (const real *)f->factor + j;
    vec sum[PRIVATE(few_sums)];
    FLORA_UNROLL
    for (int q = 0; q < PRIVATE(few_sums); q++)
        sum[q] = (vec){0};
    int64_t c = 0;
    for (; f->n - c >= PRIVATE(few_sums); c += PRIVATE(few_sums)) {
        FLORA_UNROLL
        for (int q = 0; q < PRIVATE(few_sums); q++) {
            const real *line = factor + (c + q) * f->factor_n;
            sum[q] += wide[c + q] * (width == LANES ? REAL(load)(line) : REAL(load_part)(line, width));
        }
    }
    for (; c < f->n; c++)
        sum[0] += wide[c] * REAL(load_part)(factor + c * f->factor_n, width);
    FLORA_UNROLL
    for (int q = 1; q < PRIVATE(few_sums); q++)
        sum[0] += sum[q];
    return (real)f->scale * sum[0];
}

static void NAME(few_project)(const flora_few *f) {
    for (int64_t i = 0; i < f->rows; i++)
        for (int64_t j = 0; j < f->rank; j += LANES) {
            const real *wide = (const real *)f->wide + i * f->wide_m;
            real *narrow = (real *)f->narrow + i * f->narrow_m + j;
            if (f->rank - j >= LANES)
                REAL(store)(narrow, PRIVATE(few_project_row)(f, wide, j, LANES));
            else
                REAL(store)(narrow, PRIVATE(few_project_row)(f, wide, j, f->rank - j));
        }
}

/* The factor's lines are the vector: squares of them are transposed in registers. */
static void NAME(few_expand)(const flora_few *f) {
    for (int64_t c = 0; c < f->n; c += LANES)
        for (int64_t j = 0; j < f->rank; j += LANES) {
            const int64_t lines = f->n - c, width = f->rank - j;
            const real *factor = (const real *)f->factor + c * f->factor_n + j;
            vec square[LANES];
            if (lines >= LANES && width >= LANES) {
                FLORA_UNROLL
                for (int q = 0; q < LANES; q++)
                    square[q] = REAL(load)(factor + q * f->factor_n);
            } else {
                for (int q = 0; q < LANES; q++)
                    square[q] = q >= lines       ? (vec){0}
                                : width >= LANES ? REAL(load)(factor + q * f->factor_n)
                                                 : REAL(load_part)(factor + q * f->factor_n, width);
            }
            PRIVATE(transpose_square)(square);
            for (int64_t i = 0; i < f->rows; i++) {
                const real *narrow = (const real *)f->narrow + i * f->narrow_m + j;
                real *wide = (real *)f->wide + i * f->wide_m + c;
                vec even = {0}, odd = {0};
                FLORA_UNROLL
                for (int q = 0; q < LANES; q += 2) {
                    if (q < width)
                        even += narrow[q] * square[q];
                    if (q + 1 < width)
                        odd += narrow[q + 1] * square[q + 1];
                }
                even = (real)f->scale * (even + odd);
                REAL(store)(wide, j ? REAL(load)(wide) + even : even);
            }
        }
}

static void NAME(few_outer)(const flora_few *f) {
    for (int64_t c = 0; c < f->n; c++)
        for (int64_t j = 0; j < f->rank; j += LANES) {
            real *factor = (real *)f->factor + c * f->factor_n + j;
            const real *wide = (const real *)f->wide + c, *narrow = (const real *)f->narrow + j;
            vec sum = {0};
            for (int64_t i = 0; i < f->rows; i++)
                sum += wide[i * f->wide_m] * REAL(load)(narrow + i * f->narrow_m);
            sum *= (real)f->scale;
            if (f->rank - j >= LANES)
                REAL(store)(factor, sum);
            else
                REAL(store_part)(factor, sum, f->rank - j);
        }
}
