/* Winograd's transforms F(2 × 2, 3 × 3) of LANES channels at once, for one compute type. Reals in, reals out.
 *
 * Two neighbours of a correlation with three taps, y(i) = d(i)·g(0) + d(i + 1)·g(1) + d(i + 2)·g(2), take four
 * multiplications instead of six:
 *
 *     m(0) = (d(0) - d(2)) · g(0)                        y(0) = m(0) + m(1) + m(2)
 *     m(1) = (d(1) + d(2)) · (g(0) + g(1) + g(2)) / 2    y(1) = m(1) - m(2) - m(3)
 *     m(2) = (d(2) - d(1)) · (g(0) - g(1) + g(2)) / 2
 *     m(3) = (d(1) - d(3)) · g(2)
 *
 * In two modes it is done along one and then along the other: 16 multiplications instead of 36, where each of the 16 is
 * a matrix product over channels. Here are the three linear maps around them.
 * Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308, section 4.1.
 */

/* taps (3, 3, LANES) from LANES channels with nine taps each, `channel` apart */
static void NAME(winograd_taps)(void *taps_, const void *from_, int64_t channel) {
    real *taps = taps_;
    const real *from = from_;
    FLORA_UNROLL
    for (int first = 0; first < 9; first += LANES) {
        const int count = 9 - first < LANES ? 9 - first : LANES;
        vec square[LANES];
        FLORA_UNROLL
        for (int q = 0; q < LANES; q++)
            square[q] = REAL(load_part)(from + q * channel + first, count);
        PRIVATE(transpose_square)(square);
        FLORA_UNROLL
        for (int q = 0; q < LANES; q++)
            if (q < count)
                REAL(store)(taps + (first + q) * LANES, square[q]);
    }
}

/* parts (16, LANES), `part` apart, from taps (3, 3, LANES) in reverse: the other way round, as a gradient needs them */
static void NAME(winograd_filter)(void *parts_, int64_t part, const void *taps_) {
    real *parts = parts_;
    const real *taps = taps_;
    vec half[4][3]; /* transformed along the first mode */
    FLORA_UNROLL
    for (int j = 0; j < 3; j++) {
        const vec a = REAL(load)(taps + (8 - j) * LANES), b = REAL(load)(taps + (5 - j) * LANES),
                  c = REAL(load)(taps + (2 - j) * LANES), outer = (real)0.5 * (a + c), inner = (real)0.5 * b;
        half[0][j] = a, half[1][j] = outer + inner, half[2][j] = outer - inner, half[3][j] = c;
    }
    FLORA_UNROLL
    for (int i = 0; i < 4; i++) {
        const vec a = half[i][0], c = half[i][2], outer = (real)0.5 * (a + c), inner = (real)0.5 * half[i][1];
        REAL(store)(parts + (4 * i) * part, a);
        REAL(store)(parts + (4 * i + 1) * part, outer + inner);
        REAL(store)(parts + (4 * i + 2) * part, outer - inner);
        REAL(store)(parts + (4 * i + 3) * part, c);
    }
}

/* parts (16, tiles, LANES), `part` and `tile` apart, from lines (4, 2 · tiles + 2, LANES) that are `line` apart */
static void NAME(winograd_input)(void *parts_, int64_t part, int64_t tile, const void *lines_, int64_t line,
                                 int64_t tiles) {
    real *to = parts_;
    const real *from = lines_;
    vec left[4][2]; /* the two columns that a tile shares with the one before it, transformed along the first mode */
    FLORA_UNROLL
    for (int j = 0; j < 2; j++) {
        const vec a = REAL(load)(from + j * LANES), b = REAL(load)(from + line + j * LANES),
                  c = REAL(load)(from + 2 * line + j * LANES), d = REAL(load)(from + 3 * line + j * LANES);
        left[0][j] = a - c, left[1][j] = b + c, left[2][j] = c - b, left[3][j] = b - d;
    }
    for (int64_t t = 0; t < tiles; t++, to += tile) {
        from += 2 * LANES;
        vec right[4][2];
        FLORA_UNROLL
        for (int j = 0; j < 2; j++) {
            const vec a = REAL(load)(from + j * LANES), b = REAL(load)(from + line + j * LANES),
                      c = REAL(load)(from + 2 * line + j * LANES), d = REAL(load)(from + 3 * line + j * LANES);
            right[0][j] = a - c, right[1][j] = b + c, right[2][j] = c - b, right[3][j] = b - d;
        }
        FLORA_UNROLL
        for (int i = 0; i < 4; i++) {
            REAL(store)(to + (4 * i) * part, left[i][0] - right[i][0]);
            REAL(store)(to + (4 * i + 1) * part, left[i][1] + right[i][0]);
            REAL(store)(to + (4 * i + 2) * part, right[i][0] - left[i][1]);
            REAL(store)(to + (4 * i + 3) * part, left[i][1] - right[i][1]);
            left[i][0] = right[i][0], left[i][1] = right[i][1];
        }
    }
}

/* lines (2, 2 · tiles, LANES), `line` apart, from parts (16, tiles, LANES) that are `part` and `tile` apart */
static void NAME(winograd_output)(void *lines_, int64_t line, const void *parts_, int64_t part, int64_t tile,
                                  int64_t tiles) {
    real *to = lines_;
    const real *from = parts_;
    for (int64_t t = 0; t < tiles; t++, from += tile, to += 2 * LANES) {
        vec half[2][4];
        FLORA_UNROLL
        for (int j = 0; j < 4; j++) {
            const vec a = REAL(load)(from + j * part), b = REAL(load)(from + (4 + j) * part),
                      c = REAL(load)(from + (8 + j) * part), d = REAL(load)(from + (12 + j) * part);
            half[0][j] = a + b + c, half[1][j] = b - c - d;
        }
        FLORA_UNROLL
        for (int i = 0; i < 2; i++) {
            REAL(store)(to + i * line, half[i][0] + half[i][1] + half[i][2]);
            REAL(store)(to + i * line + LANES, half[i][1] - half[i][2] - half[i][3]);
        }
    }
}
