/* Reals added to activations: add. Each sum is real and rounded once. */

/* to (m, n), row stride to_m += from (m, n), row stride from_m */
static void NAME(add)(void *to_, int64_t to_m, const void *from_, int64_t from_m, int64_t m, int64_t n) {
    for (int64_t i = 0; i < m; i++) {
        act *to = (act *)to_ + i * to_m;
        const real *from = (const real *)from_ + i * from_m;
        int64_t j = 0;
        for (; j + LANES <= n; j += LANES)
            ACT(store)(to + j, ACT(load)(to + j) + REAL(load)(from + j));
        if (j < n)
            ACT(store_part)(to + j, ACT(load_part)(to + j, n - j) + REAL(load_part)(from + j, n - j), n - j);
    }
}
