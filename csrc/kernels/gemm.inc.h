/* The skinny product, for one activation type and one instruction set.
 *
 * Contents: gemm, c (m, n) = c_in (m, n) + Σ_t Σ_l a_t(m, l) · b_t(l, n), with a and b real, c act.
 * Sums: real, in registers over all taps and the whole of k; c_in is added last and the result is rounded once, so the
 * error of a sum that is built tile by tile grows with the tile and with the number of tiles, not with their product.
 *
 * The naive version:
 *     for i < m, j < n:  c[i][j] = c_in[i][j] + sum(a[a_taps[t] + i·a_m + l·a_k] · b[b_taps[t] + l·b_k + j])
 * Here a block of `rows` × `vecs` sums stays in registers, each step of l loads `vecs` vectors of b once and broadcasts
 * one scalar of a for each row. Every sum runs in the order of t and l whatever the block, so results do not depend on
 * how m and n are cut.
 */

/* c (rows, (vecs - 1) · LANES + width) from a, b of the same block; rows and vecs are constants after inlining.
 * Fetches the next block's a (if not NULL) or c into the cache meanwhile. */
FLORA_INLINE void PRIVATE(block)(const int rows, const int vecs, const flora_gemm *g, const real *a, const real *b,
                                 const act *c_in, act *c, int64_t width, const real *a_next, const act *c_next) {
    vec sum[16][2];
    const int64_t a_m = g->a_m, a_k = g->a_k, b_k = g->b_k, c_m = g->c_m;
    const int64_t line = 64 / sizeof(real), a_step = a_k == 1 ? a_m : a_k, a_line = a_k == 1 ? line : line * a_k;
    FLORA_UNROLL
    for (int i = 0; i < rows; i++) {
        FLORA_UNROLL
        for (int j = 0; j < vecs; j++) {
            sum[i][j] = (vec){0};
            if (c_next != NULL)
                __builtin_prefetch(c_next + i * c_m + j * LANES, 1);
        }
    }
    for (int64_t t = 0; t < g->taps; t++) {
        const real *a_l = g->a_taps ? a + g->a_taps[t] : a;
        const real *b_l = g->b_taps ? b + g->b_taps[t] : b;
        for (int64_t left = g->k; left > 0; left -= line) {
            if (a_next != NULL) {
                FLORA_UNROLL
                for (int q = 0; q < 16; q++)
                    __builtin_prefetch(a_next + q * a_step);
                a_next += a_line;
            }
            const real *upper = a_l + 8 * a_m;
            __asm__("" : "+r"(upper)); /* a base of its own, else 16 rows need more index registers than there are */
            for (int64_t l = left < line ? left : line; l > 0; l--, a_l += a_k, upper += a_k, b_l += b_k) {
                FLORA_UNROLL
                for (int i = 0; i < rows; i++) {
                    FLORA_UNROLL
                    for (int j = 0; j < vecs; j++)
                        sum[i][j] += (i < 8 ? a_l[i * a_m] : upper[(i - 8) * a_m]) * REAL(load)(b_l + j * LANES);
                }
            }
        }
    }
    FLORA_UNROLL
    for (int i = 0; i < rows; i++) {
        FLORA_UNROLL
        for (int j = 0; j < vecs; j++) {
            const int64_t at = i * c_m + j * LANES;
            if (j == vecs - 1 && width < LANES)
                ACT(store_part)(c + at, c_in ? ACT(load_part)(c_in + at, width) + sum[i][j] : sum[i][j], width);
            else
                ACT(store)(c + at, c_in ? ACT(load)(c_in + at) + sum[i][j] : sum[i][j]);
        }
    }
}

/* c (rows, n), rows a constant: panels of two vectors, then of one. */
FLORA_INLINE void PRIVATE(strip)(const int rows, const flora_gemm *g, int64_t i) {
    const real *a = (const real *)g->a + i * g->a_m, *b = g->b;
    const act *c_in = g->c_in ? (const act *)g->c_in + i * g->c_m : NULL;
    act *c = (act *)g->c + i * g->c_m;
    const real *a_next = g->ahead == NULL ? NULL : i + rows < g->m ? a + rows * g->a_m : g->ahead;
    int64_t j = 0;
    for (; g->n - j > LANES; j += 2 * LANES) {
        int64_t width = g->n - j - LANES;
        const act *c_next = j + 2 * LANES < g->n ? c + j + 2 * LANES : c + rows * g->c_m;
        PRIVATE(block)(rows, 2, g, a, b + j, c_in ? c_in + j : NULL, c + j, width < LANES ? width : LANES,
                       j ? NULL : a_next, c_next);
    }
    if (j < g->n)
        PRIVATE(block)(rows, 1, g, a, b + j, c_in ? c_in + j : NULL, c + j, g->n - j, NULL, c + rows * g->c_m);
}

/* The same where n is one vector at most. */
FLORA_INLINE void PRIVATE(narrow_strip)(const int rows, const flora_gemm *g, int64_t i) {
    const real *a = (const real *)g->a + i * g->a_m;
    const real *a_next = g->ahead == NULL ? NULL : i + rows < g->m ? a + rows * g->a_m : g->ahead;
    PRIVATE(block)(rows, 1, g, a, g->b, g->c_in ? (const act *)g->c_in + i * g->c_m : NULL, (act *)g->c + i * g->c_m,
                   g->n, a_next, NULL);
}

/* Rows are taken in blocks of the register tile's height, the rest in halves of it; a height of 0 drops out. Where
 * nothing is added, the last block is shifted back over rows that have been computed already: few rows would wait for
 * their sums. */
static void NAME(gemm)(const flora_gemm *g) {
    int64_t i = 0;
    if (g->n <= LANES) {
        for (; g->m - i >= NARROW_ROWS; i += NARROW_ROWS)
            PRIVATE(narrow_strip)(NARROW_ROWS, g, i);
        if (g->c_in == NULL && g->m >= NARROW_ROWS / 2) {
            const int64_t last = g->m - NARROW_ROWS / 2;
            for (; g->m - i > NARROW_ROWS / 4; i += NARROW_ROWS / 2)
                PRIVATE(narrow_strip)(NARROW_ROWS / 2, g, i < last ? i : last);
            if (i < g->m)
                PRIVATE(narrow_strip)(NARROW_ROWS / 4, g, g->m - NARROW_ROWS / 4);
            return;
        }
        for (; NARROW_ROWS / 2 > 1 && g->m - i >= NARROW_ROWS / 2; i += NARROW_ROWS / 2)
            PRIVATE(narrow_strip)(NARROW_ROWS / 2, g, i);
        for (; NARROW_ROWS / 4 > 1 && g->m - i >= NARROW_ROWS / 4; i += NARROW_ROWS / 4)
            PRIVATE(narrow_strip)(NARROW_ROWS / 4, g, i);
        for (; i < g->m; i++)
            PRIVATE(narrow_strip)(1, g, i);
    } else {
        for (; g->m - i >= WIDE_ROWS; i += WIDE_ROWS)
            PRIVATE(strip)(WIDE_ROWS, g, i);
        if (g->c_in == NULL && g->m >= WIDE_ROWS) {
            if (g->m - i > WIDE_ROWS / 2)
                PRIVATE(strip)(WIDE_ROWS, g, g->m - WIDE_ROWS);
            else if (i < g->m)
                PRIVATE(strip)(WIDE_ROWS / 2, g, g->m - WIDE_ROWS / 2);
            return;
        }
        for (; WIDE_ROWS / 2 > 1 && g->m - i >= WIDE_ROWS / 2; i += WIDE_ROWS / 2)
            PRIVATE(strip)(WIDE_ROWS / 2, g, i);
        for (; i < g->m; i++)
            PRIVATE(strip)(1, g, i);
    }
}
