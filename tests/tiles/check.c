/* Compares the soft tiles of csrc/kernels/tile.h with what clang makes of the AMX types where it turns them into scalar
 * code, so on any CPU. From the root of the repository, with clang 14 or later:
 *     clang -O0 -march=x86-64-v4 -mamx-tile -mamx-bf16 -mamx-int8 -mllvm -enable-x86-scalar-amx=true -I csrc \
 *         tests/tiles/check.c -o build/check-tiles && build/check-tiles
 */
#include <immintrin.h>
#include <stdio.h>

#undef __AMX_BF16__ /* the binding in plain C */
#include "kernels/tile.h"

static uint16_t number(void) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    const float quarters = (float)((int)(state >> 16) % 33 - 16) / 4;
    uint32_t bits;
    memcpy(&bits, &quarters, sizeof bits);
    return (uint16_t)(bits >> 16);
}

int main(void) {
    int wrong = 0;
    for (int depth = 1; depth <= TILE_PAIRS; depth++) {
        uint16_t a[16][32], b[16][32];
        float soft[16][16], real[16][16];
        for (int i = 0; i < 16; i++) {
            for (int j = 0; j < 32; j++)
                a[i][j] = number(), b[i][j] = number();
            for (int j = 0; j < 16; j++)
                soft[i][j] = real[i][j] = (float)(i - j);
        }
        tile_configure(depth);
        TILE_LOAD(4, a, sizeof *a);
        TILE_LOAD(6, b, sizeof *b);
        TILE_LOAD(0, soft, sizeof *soft);
        TILE_MULTIPLY(0, 4, 6);
        TILE_STORE(0, soft, sizeof *soft);
        tile_release();

        __tile1024i tile_a = {16, (unsigned short)(4 * depth)}, tile_b = {(unsigned short)depth, 64}, sum = {16, 64};
        __tile_loadd(&tile_a, a, sizeof *a);
        __tile_loadd(&tile_b, b, sizeof *b);
        __tile_loadd(&sum, real, sizeof *real);
        __tile_dpbf16ps(&sum, tile_a, tile_b);
        __tile_stored(real, sizeof *real, sum);
        if (memcmp(soft, real, sizeof soft) != 0) {
            printf("tiles of depth %d differ\n", depth);
            wrong = 1;
        }
    }
    return wrong;
}
