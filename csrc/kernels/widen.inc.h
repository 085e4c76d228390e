/* Activations of a 16-bit type as real, for blocks that stay in the first-level cache: widen. */

/* to (m, n), row stride to_m = from (m, n) */
static void NAME(widen)(void *to_, int64_t to_m, const void *from_, int64_t from_m, int64_t from_n, int64_t m,
                        int64_t n) {
    for (int64_t i = 0; i < m && n > 0; i++) {
        real *to = (real *)to_ + i * to_m;
        const act *from = (const act *)from_ + i * from_m;
        int64_t j = 0;
        if (from_n == 1) {
            for (; j + LANES <= n; j += LANES)
                REAL(store)(to + j, ACT(load)(from + j));
            if (j < n)
                REAL(store_part)(to + j, ACT(load_part)(from + j, n - j), n - j);
        } else {
            for (; j < n; j += LANES) { /* gather a vector, then widen it */
                const int64_t width = n - j < LANES ? n - j : LANES;
                act lane[LANES] = {0};
                for (int64_t q = 0; q < width; q++)
                    lane[q] = from[(j + q) * from_n];
                REAL(store_part)(to + j, ACT(load)(lane), width);
            }
        }
    }
}
