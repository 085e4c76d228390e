/* The bfloat16 product over matrix registers, for either binding of tile.h.
 *
 * A block of 32 × 32 sums is four tiles; each step of 16 pairs loads two tiles of a and two of b and multiplies every
 * one with every other. The sums go through a small room to c, which adds c_in last and rounds where c is bfloat16.
 *
 * Where k is less than a step, the tiles are configured for it. What else does not fill a tile is copied to one that is
 * zero elsewhere: the last rows of a, the last step of a longer k, and an odd k, whose last pair would read beyond it.
 */

enum { DEPTH = 2 * TILE_PAIRS, SIDE = TILE_ROWS };

static _Thread_local int configured; /* the pairs that this thread's tiles are configured for, or 0 */

static void begin(void) {
    configured = 0;
}

static void end(void) {
    if (configured != 0)
        tile_release();
    configured = 0;
}

/* Both operands of one step, at most 2 · `pairs` numbers deep. */
typedef struct {
    uint16_t a[SIDE][DEPTH];
    uint16_t b[TILE_PAIRS][2 * SIDE];
} room;

/* `rows` rows of a from row i and number l on; a copy if that is less than a tile. */
static const uint16_t *a_tile(const flora_dot *g, const uint16_t *a, int64_t i, int64_t l, int64_t depth,
                              uint16_t copy[SIDE][DEPTH], int64_t *stride) {
    const int64_t rows = g->m - i < SIDE ? g->m - i : SIDE, left = g->k - l < depth ? g->k - l : depth;
    a += i * g->a_m + l;
    if (rows == SIDE && left == depth) {
        *stride = g->a_m;
        return a;
    }
    memset(copy, 0, sizeof(uint16_t[SIDE][DEPTH]));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t q = 0; q < left; q++)
            copy[r][q] = a[r * g->a_m + q];
    *stride = DEPTH;
    return copy[0];
}

/* The pairs of b from number l and column j on. */
static const uint16_t *b_tile(const flora_dot *g, const uint16_t *b, int64_t l, int64_t j, int64_t depth,
                              uint16_t copy[TILE_PAIRS][2 * SIDE], int64_t *stride) {
    const int64_t pairs = (g->k - l + 1) / 2;
    b += l * g->b_w + 2 * j;
    *stride = 2 * g->b_w;
    if (2 * pairs >= depth)
        return b;
    memset(copy, 0, sizeof(uint16_t[TILE_PAIRS][2 * SIDE]));
    for (int64_t r = 0; r < pairs; r++)
        memcpy(copy[r], b + r * *stride, sizeof copy[r]);
    *stride = 2 * SIDE;
    return copy[0];
}

/* c from row i and column j on = c_in + sums */
FLORA_INLINE void write_tile(const int act, const flora_dot *g, int64_t i, int64_t j, float sums[SIDE][SIDE]) {
    const int64_t rows = g->m - i < SIDE ? g->m - i : SIDE, columns = g->n - j < SIDE ? g->n - j : SIDE;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t q = 0; q < columns; q += LANES) {
            const int64_t at = (i + r) * g->c_m + j + q, width = columns - q;
            f32v sum = f32_load(sums[r] + q);
            if (act) {
                const uint16_t *c_in = (const uint16_t *)g->c_in + at;
                uint16_t *c = (uint16_t *)g->c + at;
                if (width < LANES)
                    bf16_store_part(c, bf16_load_part(c_in, width) + sum, width);
                else
                    bf16_store(c, bf16_load(c_in) + sum);
            } else {
                const float *c_in = g->c_in ? (const float *)g->c_in + at : NULL;
                float *c = (float *)g->c + at;
                if (c_in != NULL)
                    sum += width < LANES ? f32_load_part(c_in, width) : f32_load(c_in);
                if (width < LANES)
                    f32_store_part(c, sum, width);
                else
                    f32_store(c, sum);
            }
        }
}

FLORA_INLINE void block(const int act, const flora_dot *g, int64_t i, int64_t j, int64_t depth) {
    room rooms[2];
    float sums[SIDE][SIDE];
    const int below = i + SIDE < g->m, beside = j + SIDE < g->n;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t t = 0; t < g->taps; t++) {
        const uint16_t *a = g->a_taps ? g->a + g->a_taps[t] : g->a;
        const uint16_t *b = g->b_taps ? g->b + g->b_taps[t] : g->b;
        for (int64_t l = 0; l < g->k; l += depth) {
            int64_t stride;
            const uint16_t *from = a_tile(g, a, i, l, depth, rooms[0].a, &stride);
            TILE_LOAD(4, from, 2 * stride);
            from = b_tile(g, b, l, j, depth, rooms[0].b, &stride);
            TILE_LOAD(6, from, 2 * stride);
            TILE_MULTIPLY(0, 4, 6);
            if (below) {
                from = a_tile(g, a, i + SIDE, l, depth, rooms[1].a, &stride);
                TILE_LOAD(5, from, 2 * stride);
                TILE_MULTIPLY(1, 5, 6);
            }
            if (beside) {
                from = b_tile(g, b, l, j + SIDE, depth, rooms[1].b, &stride);
                TILE_LOAD(7, from, 2 * stride);
                TILE_MULTIPLY(2, 4, 7);
            }
            if (below && beside)
                TILE_MULTIPLY(3, 5, 7);
        }
    }
    TILE_STORE(0, sums, sizeof *sums);
    write_tile(act, g, i, j, sums);
    if (below) {
        TILE_STORE(1, sums, sizeof *sums);
        write_tile(act, g, i + SIDE, j, sums);
    }
    if (beside) {
        TILE_STORE(2, sums, sizeof *sums);
        write_tile(act, g, i, j + SIDE, sums);
    }
    if (below && beside) {
        TILE_STORE(3, sums, sizeof *sums);
        write_tile(act, g, i + SIDE, j + SIDE, sums);
    }
}

FLORA_INLINE void blocks(const int act, const flora_dot *g) {
    const int64_t depth = g->k < 2 ? 2 : g->k < DEPTH ? (g->k + 1) / 2 * 2 : DEPTH;
    if (depth / 2 != configured) {
        configured = (int)depth / 2;
        tile_configure(configured);
    }
    for (int64_t i = 0; i < g->m; i += 2 * SIDE)
        for (int64_t j = 0; j < g->n; j += 2 * SIDE)
            block(act, g, i, j, depth);
}

static void dot(const flora_dot *g) {
    blocks(0, g);
}

static void dot_act(const flora_dot *g) {
    blocks(1, g);
}
