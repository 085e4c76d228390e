/* The operands of a bfloat16 product: pair, pair_rounded, round; see dots.h. Included once by each body of `dot`.
 *
 * A vector of pairs is LANES times 32 bits with the even row's number in the lower half. */

typedef uint16_t u16_any __attribute__((aligned(2), may_alias));
typedef float f32_any __attribute__((aligned(4), may_alias));
typedef u32v u32v_any __attribute__((aligned(2), may_alias));

enum { LANES = F32_LANES };

/* `n` numbers, then zeros if that is less than LANES */
FLORA_INLINE u16v load_bits(const uint16_t *p, int64_t n) {
    if (n < LANES)
        return u16_load_part(p, n);
    return *(const u16v_any *)p;
}

/* The same from float, rounded */
FLORA_INLINE u16v load_rounded(const f32_any *p, int64_t n) {
    if (n >= LANES)
        return bf16_narrow(*(const f32v_any *)p);
#if FLORA_VECTOR_BYTES == 64 && defined(__AVX512BW__)
    return bf16_narrow(f32_load_part((const float *)p, n));
#else
    f32v v = {0}; /* f32_load_part may not read what is rounded in its place */
    for (int64_t q = 0; q < n; q++)
        v[q] = p[q];
    return bf16_narrow(v);
#endif
}

FLORA_INLINE void store_pairs(uint16_t *p, u16v even, u16v odd) {
    *(u32v_any *)p = __builtin_convertvector(even, u32v) | (__builtin_convertvector(odd, u32v) << 16);
}

static void pair(uint16_t *to, int64_t width, const uint16_t *from, int64_t from_k, int64_t k, int64_t n) {
    const u16v zero = {0};
    for (int64_t l = 0; l < k; l += 2, to += 2 * width, from += 2 * from_k) {
        const int both = k - l > 1;
        int64_t j = 0;
        for (int64_t next = 0; next < n; next += 32) { /* a line holds 32; the rows after the next two */
            __builtin_prefetch(from + 4 * from_k + next);
            __builtin_prefetch(from + 5 * from_k + next);
        }
        if (both)
            for (; j + LANES <= n; j += LANES)
                store_pairs(to + 2 * j, *(const u16v_any *)(from + j), *(const u16v_any *)(from + from_k + j));
        for (; j < n; j += LANES)
            store_pairs(to + 2 * j, load_bits(from + j, n - j), both ? load_bits(from + from_k + j, n - j) : zero);
        for (; j < width; j += LANES)
            store_pairs(to + 2 * j, zero, zero);
    }
}

static void pair_rounded(void *to_, int64_t width, const void *from_, int64_t from_k, int64_t k, int64_t n) {
    const u16v zero = {0};
    uint16_t *to = to_;
    const f32_any *from = from_;
    for (int64_t l = 0; l < k; l += 2, to += 2 * width, from += 2 * from_k) {
        int64_t j = 0;
        for (; j < n; j += LANES)
            store_pairs(to + 2 * j, load_rounded(from + j, n - j),
                        k - l > 1 ? load_rounded(from + from_k + j, n - j) : zero);
        for (; j < width; j += LANES)
            store_pairs(to + 2 * j, zero, zero);
    }
}

static void round_rows(void *to_, int64_t to_m, int64_t width, const void *from_, int64_t from_m, int64_t m,
                       int64_t n) {
    u16_any *to = to_;
    const f32_any *from = from_;
    for (int64_t i = 0; i < m; i++, to += to_m, from += from_m)
        for (int64_t j = 0; j < width; j += LANES) {
            const u16v v = j < n ? load_rounded(from + j, n - j) : (u16v){0};
            if (width - j < LANES)
                u16_store_part((uint16_t *)(to + j), v, width - j);
            else
                *(u16v_any *)(to + j) = v;
        }
}
