/* Copies around the product, for one compute type: copy, pack, sum. All real in, real out; sums are real.
 *
 * Rows of the strided side may have any strides; unit strides are the vectorised case. */

/* to (m, n), row stride to_m = from (m, n) */
static void NAME(copy)(void *to_, int64_t to_m, const void *from_, int64_t from_m, int64_t from_n, int64_t m,
                       int64_t n) {
    for (int64_t i = 0; i < m && n > 0; i++) { /* without elements an array may be NULL, which memcpy does not take */
        real *to = (real *)to_ + i * to_m;
        const real *from = (const real *)from_ + i * from_m;
        if (from_n == 1)
            memcpy(to, from, (size_t)n * sizeof(real));
        else
            for (int64_t j = 0; j < n; j++)
                to[j] = from[j * from_n];
    }
}

/* Transposes a square of LANES × LANES in registers. The perfect shuffle: interleaving row i with row i + LANES / 2,
 * for all i, log2(LANES) times. */
FLORA_INLINE void PRIVATE(transpose_square)(vec square[LANES]) {
    vec next[LANES];
    FLORA_UNROLL
    for (int step = 1; step < LANES; step *= 2) {
        FLORA_UNROLL
        for (int q = 0; q < LANES / 2; q++) {
            next[2 * q] = REAL(interleave_low)(square[q], square[q + LANES / 2]);
            next[2 * q + 1] = REAL(interleave_high)(square[q], square[q + LANES / 2]);
        }
        FLORA_UNROLL
        for (int q = 0; q < LANES; q++)
            square[q] = next[q];
    }
}

/* to (n, m) = the transpose of from (m, n), both scratch */
static void NAME(transpose)(void *to_, int64_t to_n, const void *from_, int64_t from_m, int64_t m, int64_t n) {
    for (int64_t i = 0; i < m; i += LANES)
        for (int64_t j = 0; j < n; j += LANES) {
            vec square[LANES];
            FLORA_UNROLL
            for (int q = 0; q < LANES; q++)
                square[q] = REAL(load)((const real *)from_ + (i + q) * from_m + j);
            PRIVATE(transpose_square)(square);
            FLORA_UNROLL
            for (int q = 0; q < LANES; q++)
                REAL(store)((real *)to_ + (j + q) * to_n + i, square[q]);
        }
}

/* pack's case of unit stride along m: `from` is a row-major (n, m), read in squares. width is a multiple of LANES. */
static void PRIVATE(pack_transposed)(real *to, int64_t width, const real *from, int64_t from_n, int64_t m, int64_t n,
                                     real scale) {
    for (int64_t j = 0; j < width; j += LANES)
        for (int64_t i = 0; i < m; i += LANES) {
            const int64_t rows = m - i, columns = n - j;
            vec square[LANES];
            if (rows >= LANES && columns >= LANES) {
                FLORA_UNROLL
                for (int q = 0; q < LANES; q++)
                    square[q] = REAL(load)(from + (j + q) * from_n + i);
                PRIVATE(transpose_square)(square);
                FLORA_UNROLL
                for (int q = 0; q < LANES; q++)
                    REAL(store)(to + (i + q) * width + j, scale * square[q]);
                continue;
            }
            for (int64_t q = 0; q < LANES; q++) {
                if (q >= columns)
                    square[q] = (vec){0};
                else if (rows >= LANES)
                    square[q] = REAL(load)(from + (j + q) * from_n + i);
                else
                    square[q] = REAL(load_part)(from + (j + q) * from_n + i, rows);
            }
            PRIVATE(transpose_square)(square);
            for (int64_t q = 0; q < LANES && q < rows; q++)
                REAL(store)(to + (i + q) * width + j, scale * square[q]);
        }
}

/* to (m, width >= n) = scale · from (m, n), then zeros */
static void NAME(pack)(void *to_, int64_t width, const void *from_, int64_t from_m, int64_t from_n, int64_t m,
                       int64_t n, double scale) {
    const real s = (real)scale;
    if (from_m == 1 && from_n != 1 && width % LANES == 0) {
        PRIVATE(pack_transposed)(to_, width, from_, from_n, m, n, s);
        return;
    }
    for (int64_t i = 0; i < m && width > 0; i++) {
        real *to = (real *)to_ + i * width;
        const real *from = (const real *)from_ + i * from_m;
        if (from_n == 1)
            for (int64_t j = 0; j < n; j++)
                to[j] = s * from[j];
        else
            for (int64_t j = 0; j < n; j++)
                to[j] = s * from[j * from_n];
        for (int64_t j = n; j < width; j++)
            to[j] = 0;
    }
}

/* to (m, n) = scale · Σ_p from_p (m, n), row stride from_m; p ascends, so the result is always the same */
static void NAME(sum)(void *to_, int64_t to_m, int64_t to_n, const void *from_, int64_t from_m, int64_t parts,
                      int64_t part, int64_t m, int64_t n, double scale) {
    const real s = (real)scale;
    for (int64_t i = 0; i < m && n > 0; i++)
        for (int64_t j = 0; j < n; j += LANES) {
            const real *from = (const real *)from_ + i * from_m + j;
            real *to = (real *)to_ + i * to_m + j * to_n;
            vec total = REAL(load)(from);
            for (int64_t p = 1; p < parts; p++)
                total += REAL(load)(from + p * part);
            total *= s;
            if (to_n == 1 && n - j >= LANES)
                REAL(store)(to, total);
            else
                for (int64_t q = 0; q < LANES && q < n - j; q++)
                    to[q * to_n] = total[q];
        }
}
