/* The bfloat16 product on AVX512-BF16: VDPBF16PS multiplies 16 pairs and adds each pair's two products to a float32
 * sum.
 *
 * A block of rows × vecs sums stays in registers; each pair of steps loads `vecs` vectors of b and broadcasts 32 bits
 * of a for each row. How a column is summed depends on n and k alone, not on how m is cut. Where c is float, c_in is
 * added last; where it is bfloat16, c_in is what the sums start from, and they are rounded once.
 */
#if defined(__x86_64__)

#    define FLORA_VECTOR_BYTES 64
#    include "dots.h"
#    include "vec.h"
#    include "pairs.inc.h"

/* The register block: sums in `ROWS` × 2 vectors leave room for b and the broadcast, and are more than the latency of
 * the multiplication (6 cycles) can hide. As many rows of x, whose addresses may differ by a multiple of a page, share
 * a set of the first-level cache, which has 8 or 12 ways: no more than 8. */
enum { ROWS = 8, LINE_PAIRS = 16 /* pairs in a line of the cache */ };

FLORA_INLINE __m512bh broadcast_pair(const uint16_t *p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* Row r of a: two bases and three strides reach 8 rows by x86's ways of addressing, where an offset for each needs more
 * registers than there are. */
FLORA_INLINE const uint16_t *row(int r, const uint16_t *lower, const uint16_t *upper, int64_t a_m, int64_t thrice) {
    const uint16_t *base = r < 4 ? lower : upper;
    return r % 4 == 3 ? base + thrice : base + r % 4 * a_m;
}

/* Where n is one vector, even and odd pairs of k have sums of their own, as `rows` sums are fewer than the latency
 * needs. The rows of a that come next (a_next, if not NULL), or the panel of a bfloat16 c that does, are fetched
 * meanwhile. */
FLORA_INLINE void block(const int rows, const int vecs, const int act, const flora_dot *g, int64_t i, int64_t j,
                        const uint16_t *a_next) {
    f32v sum[ROWS][2];
    const uint16_t *a = g->a + i * g->a_m, *b = g->b + 2 * j;
    const int64_t a_m = g->a_m, b_k = 2 * g->b_w, c_m = g->c_m, at = i * c_m + j;
    int64_t thrice = 3 * a_m;
    __asm__("" : "+r"(thrice)); /* see row() */
    const int64_t last = g->n - j - (vecs - 1) * LANES, width = last < LANES ? last : LANES;
    FLORA_UNROLL
    for (int r = 0; r < rows; r++) {
        FLORA_UNROLL
        for (int v = 0; v < vecs; v++) {
            sum[r][v] = (f32v){0};
            if (act) {
                const uint16_t *from = (const uint16_t *)g->c_in + at + r * c_m + v * LANES;
                sum[r][v] = v == vecs - 1 && width < LANES ? bf16_load_part(from, width) : bf16_load(from);
            }
        }
        if (vecs == 1)
            sum[r][1] = (f32v){0};
        if (act) /* a line is a panel's width; at a row's end, of the rows that follow */
            __builtin_prefetch(
                (const uint16_t *)g->c_in + (j + 2 * LANES < g->n ? at + 2 * LANES : at - j + rows * c_m) + r * c_m, 1);
    }
    for (int64_t t = 0; t < g->taps; t++) {
        const uint16_t *lower = g->a_taps ? a + g->a_taps[t] : a, *upper = lower + 4 * a_m;
        const uint16_t *b_l = g->b_taps ? b + g->b_taps[t] : b;
        int64_t l = g->k / 2;
        __asm__("" : "+r"(upper));
        if (vecs == 1) {
            for (; l > 1; l -= 2, lower += 4, upper += 4, b_l += 2 * b_k) {
                if (a_next != NULL && l % LINE_PAIRS < 2) {
                    FLORA_UNROLL
                    for (int r = 0; r < rows; r++)
                        __builtin_prefetch(a_next + r * a_m);
                    a_next += 2 * LINE_PAIRS;
                }
                const __m512bh even = (__m512bh)_mm512_loadu_si512(b_l), odd = (__m512bh)_mm512_loadu_si512(b_l + b_k);
                FLORA_UNROLL
                for (int r = 0; r < rows; r++) {
                    const uint16_t *a_r = row(r, lower, upper, a_m, thrice);
                    sum[r][0] = (f32v)_mm512_dpbf16_ps((__m512)sum[r][0], broadcast_pair(a_r), even);
                    sum[r][1] = (f32v)_mm512_dpbf16_ps((__m512)sum[r][1], broadcast_pair(a_r + 2), odd);
                }
            }
        }
        for (; l > 0; l--, lower += 2, upper += 2, b_l += b_k) {
            FLORA_UNROLL
            for (int r = 0; r < rows; r++) {
                FLORA_UNROLL
                for (int v = 0; v < vecs; v++)
                    sum[r][v] =
                        (f32v)_mm512_dpbf16_ps((__m512)sum[r][v], broadcast_pair(row(r, lower, upper, a_m, thrice)),
                                               (__m512bh)_mm512_loadu_si512(b_l + 2 * v * LANES));
            }
        }
        if (g->k % 2 != 0) {
            FLORA_UNROLL
            for (int r = 0; r < rows; r++) {
                const __m512bh single = (__m512bh)_mm512_set1_epi32(*row(r, lower, upper, a_m, thrice));
                FLORA_UNROLL
                for (int v = 0; v < vecs; v++)
                    sum[r][v] = (f32v)_mm512_dpbf16_ps((__m512)sum[r][v], single,
                                                       (__m512bh)_mm512_loadu_si512(b_l + 2 * v * LANES));
            }
        }
    }
    FLORA_UNROLL
    for (int r = 0; r < rows; r++) {
        if (vecs == 1)
            sum[r][0] += sum[r][1];
        FLORA_UNROLL
        for (int v = 0; v < vecs; v++) {
            const int64_t to = at + r * c_m + v * LANES;
            const int part = v == vecs - 1 && width < LANES;
            if (act) {
                if (part)
                    bf16_store_part((uint16_t *)g->c + to, sum[r][v], width);
                else
                    bf16_store((uint16_t *)g->c + to, sum[r][v]);
            } else {
                const float *from = g->c_in ? (const float *)g->c_in + to : NULL;
                if (from != NULL)
                    sum[r][v] += part ? f32_load_part(from, width) : f32_load(from);
                if (part)
                    f32_store_part((float *)g->c + to, sum[r][v], width);
                else
                    f32_store((float *)g->c + to, sum[r][v]);
            }
        }
    }
}

/* c (rows, n) from row i on, rows a constant: panels of two vectors, then of one. */
FLORA_INLINE void strip(const int rows, const int act, const flora_dot *g, int64_t i) {
    const uint16_t *a_next = g->ahead == NULL ? NULL : i + rows < g->m ? g->a + (i + rows) * g->a_m : g->ahead;
    int64_t j = 0;
    for (; g->n - j > LANES; j += 2 * LANES)
        block(rows, 2, act, g, i, j, NULL);
    if (j < g->n)
        block(rows, 1, act, g, i, j, j == 0 ? a_next : NULL);
}

FLORA_INLINE void strips(const int act, const flora_dot *g) {
    int64_t i = 0;
    for (; g->m - i >= ROWS; i += ROWS)
        strip(ROWS, act, g, i);
    for (; g->m - i >= ROWS / 2; i += ROWS / 2)
        strip(ROWS / 2, act, g, i);
    for (; i < g->m; i++)
        strip(1, act, g, i);
}

static void dot(const flora_dot *g) {
    strips(0, g);
}

static void dot_act(const flora_dot *g) {
    strips(1, g);
}

const flora_dots flora_dots_bf16 = {
    .dot = dot, .dot_act = dot_act, .pair = pair, .pair_rounded = pair_rounded, .round = round_rows};

#endif
