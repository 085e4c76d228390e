/* The weight gradient of a convolution with one input channel for each output channel, channels being the vector, for
 * one compute type: tap_sums. Reals in, reals out, sums in registers.
 *
 *     sums (rows, columns, LANES) += Σ_line Σ_pixel dy (line, pixel, LANES) · x (line, pixel, at tap, LANES)
 *
 * A pixel's dy is loaded once for a block of taps; each tap is one load of x and one fused multiply-add. A block is
 * `columns` neighbours along the last kernel mode in `rows` lines of taps: enough sums to hide the latency of the
 * multiply-add, and few enough for 16 registers.
 */

/* A block of taps; rows, columns and (if dilation is 1) step are constants after inlining. */
FLORA_INLINE void PRIVATE(tap_block)(const int rows, const int columns, const int64_t step, const flora_tap_sums *g,
                                     const int64_t *row_at, const real *x_column, real *sums) {
    vec sum[4][8];
    FLORA_UNROLL
    for (int r = 0; r < rows; r++) {
        FLORA_UNROLL
        for (int c = 0; c < columns; c++)
            sum[r][c] = REAL(load)(sums + (r * g->columns + c) * LANES);
    }
    for (int64_t line = 0; line < g->lines; line++) {
        const real *dy = (const real *)g->dy + line * g->dy_line;
        const real *x[4];
        FLORA_UNROLL
        for (int r = 0; r < rows; r++)
            x[r] = x_column + row_at[r] + line * g->x_line;
        for (int64_t pixel = g->pixels; pixel > 0; pixel--, dy += LANES) {
            const vec d = REAL(load)(dy);
            FLORA_UNROLL
            for (int r = 0; r < rows; r++) {
                FLORA_UNROLL
                for (int c = 0; c < columns; c++)
                    sum[r][c] += d * REAL(load)(x[r] + c * step);
                x[r] += g->x_pixel;
            }
        }
    }
    FLORA_UNROLL
    for (int r = 0; r < rows; r++) {
        FLORA_UNROLL
        for (int c = 0; c < columns; c++)
            REAL(store)(sums + (r * g->columns + c) * LANES, sum[r][c]);
    }
}

/* All rows of taps, `height` at a time, for `columns` neighbours from `column` on. */
FLORA_INLINE void PRIVATE(tap_columns)(const int height, const int columns, const flora_tap_sums *g, int64_t column) {
    const real *x = (const real *)g->x + column * g->tap_step;
    real *sums = (real *)g->sums + column * LANES;
    const int64_t row_sums = g->columns * LANES;
    int64_t row = 0;
    if (g->tap_step == LANES) {
        for (; g->rows - row >= height; row += height)
            PRIVATE(tap_block)(height, columns, LANES, g, g->row_at + row, x, sums + row * row_sums);
        for (; row < g->rows; row++)
            PRIVATE(tap_block)(1, columns, LANES, g, g->row_at + row, x, sums + row * row_sums);
    }
    for (; row < g->rows; row++)
        PRIVATE(tap_block)(1, columns, g->tap_step, g, g->row_at + row, x, sums + row * row_sums);
}

static void NAME(tap_sums)(const flora_tap_sums *g) {
    for (int64_t column = 0; column < g->columns;) {
        /* a wide kernel in even parts of at most 8 */
        const int64_t left = g->columns - column, parts = (left + 7) / 8, columns = (left + parts - 1) / parts;
        switch (columns) { /* height · columns <= 14 */
        case 1:
            PRIVATE(tap_columns)(4, 1, g, column);
            break;
        case 2:
            PRIVATE(tap_columns)(4, 2, g, column);
            break;
        case 3:
            PRIVATE(tap_columns)(3, 3, g, column);
            break;
        case 4:
            PRIVATE(tap_columns)(3, 4, g, column);
            break;
        case 5:
            PRIVATE(tap_columns)(2, 5, g, column);
            break;
        case 6:
            PRIVATE(tap_columns)(2, 6, g, column);
            break;
        case 7:
            PRIVATE(tap_columns)(2, 7, g, column);
            break;
        default:
            PRIVATE(tap_columns)(1, 8, g, column);
            break;
        }
        column += columns;
    }
}
