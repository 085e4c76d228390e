/* The eight matrix registers of AMX, of 16 rows of 64 bytes each, in two bindings: the instructions where the including
 * file is compiled for them, else the same in plain C, so that what is written over them runs on any CPU.
 *
 * Tile numbers are literals. `depth` is the number of pairs that a product sums over: the tiles of `FLORA_TILE_A` have
 * as many columns of 4 bytes, those of `FLORA_TILE_B` as many rows.
 *     tile_configure(depth)                 all tiles become zero
 *     tile_release()                        none may be used from here on
 *     TILE_ZERO(t)
 *     TILE_LOAD(t, base, stride)            rows `stride` bytes apart
 *     TILE_STORE(t, base, stride)
 *     TILE_MULTIPLY(c, a, b)                c (16, 16) float += a (16, depth, 2) · b (depth, 16, 2) bfloat16
 */
#ifndef FLORA_TILE_H
#define FLORA_TILE_H

#include <stdint.h>
#include <string.h>

enum {
    TILE_ROWS = 16,
    TILE_BYTES = 64, /* of a row */
    TILE_PAIRS = 16, /* in a row of a, and the rows of b */
    TILE_A = 4,      /* tiles 0 to 3 are sums, 4 and 5 of kind a, 6 and 7 of kind b */
    TILE_B = 6,
    TILES = 8
};

#if defined(__AMX_BF16__)

#    include <immintrin.h>

/* gcc's intrinsics do not tell the compiler that they touch memory. */
#    define TILE_BARRIER() __asm__ volatile("" ::: "memory")

static inline void tile_configure(int depth) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } layout = {.palette = 1};
    for (int t = 0; t < TILES; t++) {
        layout.rows[t] = (uint8_t)(t < TILE_B ? TILE_ROWS : depth);
        layout.row_bytes[t] = (uint16_t)(t < TILE_A || t >= TILE_B ? TILE_BYTES : 4 * depth);
    }
    TILE_BARRIER();
    _tile_loadconfig(&layout);
}

static inline void tile_release(void) {
    _tile_release();
}

#    define TILE_ZERO(t) _tile_zero(t)
#    define TILE_LOAD(t, base, stride)                                                                                 \
        (__extension__({                                                                                               \
            TILE_BARRIER();                                                                                            \
            _tile_loadd(t, base, stride);                                                                              \
        }))
#    define TILE_STORE(t, base, stride)                                                                                \
        (__extension__({                                                                                               \
            _tile_stored(t, base, stride);                                                                             \
            TILE_BARRIER();                                                                                            \
        }))
#    define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

#else

static _Thread_local struct {
    int depth; /* 0: not configured */
    union {
        float sum[TILE_ROWS][TILE_BYTES / 4];
        uint16_t half[TILE_ROWS][TILE_BYTES / 2];
        char byte[TILE_ROWS][TILE_BYTES];
    } tile[TILES];
} tiles;

static inline void tile_configure(int depth) {
    memset(&tiles, 0, sizeof tiles);
    tiles.depth = depth;
}

static inline void tile_release(void) {
    tiles.depth = 0;
}

static inline int tile_rows(int t) {
    if (tiles.depth == 0)
        __builtin_trap(); /* as the instructions do */
    return t < TILE_B ? TILE_ROWS : tiles.depth;
}

static inline size_t tile_row_bytes(int t) {
    return (size_t)(t < TILE_A || t >= TILE_B ? TILE_BYTES : 4 * tiles.depth);
}

static inline void tile_load(int t, const void *base, int64_t stride) {
    memset(&tiles.tile[t], 0, sizeof tiles.tile[t]);
    for (int row = 0; row < tile_rows(t); row++)
        memcpy(tiles.tile[t].byte[row], (const char *)base + row * stride, tile_row_bytes(t));
}

static inline void tile_store(int t, void *base, int64_t stride) {
    for (int row = 0; row < tile_rows(t); row++)
        memcpy((char *)base + row * stride, tiles.tile[t].byte[row], tile_row_bytes(t));
}

static inline float tile_number(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static inline void tile_multiply(int c, int a, int b) {
    for (int row = 0; row < tile_rows(c); row++)
        for (int k = 0; k < tiles.depth; k++) {
            const float even = tile_number(tiles.tile[a].half[row][2 * k]);
            const float odd = tile_number(tiles.tile[a].half[row][2 * k + 1]);
            for (int n = 0; n < TILE_BYTES / 4; n++) {
                tiles.tile[c].sum[row][n] += even * tile_number(tiles.tile[b].half[k][2 * n]);
                tiles.tile[c].sum[row][n] += odd * tile_number(tiles.tile[b].half[k][2 * n + 1]);
            }
        }
}

#    define TILE_ZERO(t) memset(&tiles.tile[t], 0, (size_t)tile_rows(t) * TILE_BYTES)
#    define TILE_LOAD(t, base, stride) tile_load(t, base, stride)
#    define TILE_STORE(t, base, stride) tile_store(t, base, stride)
#    define TILE_MULTIPLY(c, a, b) tile_multiply(c, a, b)

#endif

#endif
