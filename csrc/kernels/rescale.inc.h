/* A weight rescaled, and what its gradient is to the scales, for one activation type: rescale, rescale_sums.
 *
 * Sums and products are real. Both are bound by memory: a line of the weight is read once, whatever is done with it. */

/* out (n) = weight (n) · (1 + factor · along (n)) */
static void NAME(rescale)(void *out_, int64_t out_step, const void *weight_, int64_t weight_step, const void *along_,
                          double factor, int64_t n) {
    act *out = out_;
    const act *weight = weight_;
    const real *along = along_, f = (real)factor;
    int64_t j = 0;
    if (out_step == 1 && weight_step == 1)
        for (; j + LANES <= n; j += LANES) {
            ACT(store)(out + j, ACT(load)(weight + j) * (1 + f * REAL(load)(along + j)));
        }
    for (; j < n; j += LANES) { /* through a vector in memory */
        const int64_t width = n - j < LANES ? n - j : LANES;
        act lane[LANES] = {0};
        for (int64_t q = 0; q < width; q++)
            lane[q] = weight[(j + q) * weight_step];
        ACT(store)(lane, ACT(load)(lane) * (1 + f * REAL(load)(along + j)));
        for (int64_t q = 0; q < width; q++)
            out[(j + q) * out_step] = lane[q];
    }
}

/* `lines` lines, a constant after inlining; the sums of a line are vectors until its end. */
FLORA_INLINE void PRIVATE(rescale_lines)(const int lines, const flora_rescale_sums *g, int64_t line) {
    const act *dw = (const act *)g->d_weight + line * g->d_weight_line;
    const act *w = (const act *)g->weight + line * g->weight_line;
    const real *along = g->along, *across = (const real *)g->across + line;
    real *along_sums = g->along_sums, *across_sums = (real *)g->across_sums + line;
    vec sum[4];
    FLORA_UNROLL
    for (int i = 0; i < lines; i++)
        sum[i] = (vec){0};
    for (int64_t j = 0; j < g->n; j += LANES) {
        const int64_t width = g->n - j;
        const vec scales = REAL(load)(along + j);
        vec total = REAL(load)(along_sums + j);
        FLORA_UNROLL
        for (int i = 0; i < lines; i++) {
            const int64_t d_at = i * g->d_weight_line + j, at = i * g->weight_line + j;
            const vec product = width < LANES ? ACT(load_part)(dw + d_at, width) * ACT(load_part)(w + at, width)
                                              : ACT(load)(dw + d_at) * ACT(load)(w + at);
            sum[i] += product * scales;
            total += product * across[i];
        }
        REAL(store)(along_sums + j, total);
    }
    FLORA_UNROLL
    for (int i = 0; i < lines; i++)
        for (int q = 0; q < LANES; q++)
            across_sums[i] += sum[i][q];
}

static void NAME(rescale_sums)(const flora_rescale_sums *g) {
    int64_t line = 0;
    for (; g->lines - line >= 4; line += 4)
        PRIVATE(rescale_lines)(4, g, line);
    for (; line < g->lines; line++)
        PRIVATE(rescale_lines)(1, g, line);
}
