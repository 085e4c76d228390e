/* The passes of tucker_layer.c over tiles of bfloat16 activations, as products of bfloat16 with float32 sums.
 *
 * x and dy are operands as they lie in memory, either directly, where the sum runs along their unit stride, or with
 * neighbouring rows interleaved, where it runs across; what is neither (runs of few pixels, no unit stride) is copied
 * block by block. Everything else is small: factors are rounded to bfloat16 once a call, the tiles of rank columns once
 * a tile.
 *
 *                          channels have unit stride                     pixels have unit stride
 *     tile · matrix        tile, matrix in pairs                         matrixᵀ, tile in pairs: transposed
 *     tileᵀ · with         withᵀ, tile in pairs: transposed              tile, with in pairs
 *     y += k · Uᵀ          k, U in pairs                                 U, k in pairs
 */
#include "tucker_dots.h"

#include <string.h>

int64_t flora_dots_room(int64_t tile, int64_t width) {
    const int64_t block = tile * FLORA_DOT_BLOCK * (int64_t)sizeof(uint16_t);
    return 2 * block + 2 * tile * width * (int64_t)sizeof(float);
}

/* The room's parts: a copy of a block, a block in pairs, and two tiles of floats. */
static uint16_t *block_room(const flora_dot_tile *t) {
    return t->room;
}

static uint16_t *pair_room(const flora_dot_tile *t) {
    return block_room(t) + t->tile * FLORA_DOT_BLOCK;
}

static float *tile_room(const flora_dot_tile *t, int which) {
    return (float *)(void *)(pair_room(t) + t->tile * FLORA_DOT_BLOCK) + which * t->tile * t->width;
}

static int64_t even(int64_t n) {
    return n + n % 2;
}

int flora_dots_by_rows(const flora_field *field) {
    return field->channel == 1;
}

static uint16_t *field_at(const flora_dot_tile *t, int64_t channel, int64_t offset) {
    return flora_at(t->field->data, t->image * t->field->batch + (t->channel + channel) * t->field->channel + offset,
                    sizeof(uint16_t));
}

/* A block (pixels, count channels) with unit stride along channels or pixels, the other stride in *stride. */
static const uint16_t *block_of(const flora_dot_tile *t, int by_rows, int64_t channel, int64_t count, int64_t *stride) {
    const flora_pixels *pixels = &t->field->pixels;
    const int64_t step = flora_pixel_stride(pixels), channel_step = t->field->channel;
    int64_t run, offset = flora_pixel_at(pixels, t->first, &run);
    if (run >= t->pixels && (by_rows || step == 1)) {
        *stride = by_rows ? step : channel_step;
        return field_at(t, channel, offset);
    }
    uint16_t *to = block_room(t);
    *stride = by_rows ? count : t->pixels;
    for (int64_t done = 0; done < t->pixels; done += run) {
        offset = flora_pixel_at(pixels, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        const uint16_t *from = field_at(t, channel, offset);
        if (by_rows)
            for (int64_t p = 0; p < run; p++)
                memcpy(to + (done + p) * count, from + p * step, (size_t)count * sizeof *to);
        else
            for (int64_t c = 0; c < count; c++)
                for (int64_t p = 0; p < run; p++)
                    to[c * t->pixels + done + p] = from[c * channel_step + p * step];
    }
    return to;
}

void flora_dots_pack_sweep(const flora_kernels *kernels, const flora_dots *dots, const flora_field *field, void *to,
                           int64_t width, const flora_view *u, int64_t first_channel, int64_t channels, double scale) {
    const void *from = flora_at(u->data, first_channel * u->strides[0], sizeof(float));
    const int64_t rank = u->shape[1];
    if (flora_dots_by_rows(field)) {
        kernels->pack(to, width, from, u->strides[0], u->strides[1], channels, rank, scale);
        dots->pair_rounded(to, width, to, width, channels, rank);
    } else {
        kernels->pack(to, channels, from, u->strides[1], u->strides[0], rank, channels, scale);
        dots->round(to, even(channels), even(channels), to, channels, rank, channels);
    }
}

void flora_dots_pack_expand(const flora_kernels *kernels, const flora_dots *dots, const flora_field *field, void *to,
                            int64_t width, const flora_view *u, int64_t first_channel, int64_t channels, double scale) {
    const void *from = flora_at(u->data, first_channel * u->strides[0], sizeof(float));
    const int64_t rank = u->shape[1];
    if (field->planes) {
        kernels->pack(to, rank, from, u->strides[0], u->strides[1], channels, rank, scale);
        dots->round(to, even(rank), even(rank), to, rank, channels, rank);
    } else {
        kernels->pack(to, width, from, u->strides[1], u->strides[0], rank, channels, scale);
        dots->pair_rounded(to, width, to, width, rank, channels);
    }
}

static void sweep_rows(const flora_dot_tile *t, int64_t channels, int64_t rank, float *product, const uint16_t *matrix,
                       int64_t width, float *sums, int64_t sums_m, const float *with) {
    uint16_t *turned = (uint16_t *)(void *)tile_room(t, 0), *pairs = pair_room(t);
    if (sums != NULL) {
        t->kernels->transpose(turned, t->tile, with, width, t->pixels, rank);
        t->dots->round(turned, t->tile, t->tile, turned, t->tile, rank, t->pixels);
    }
    for (int64_t c = 0; c < channels; c += FLORA_DOT_BLOCK) {
        const int64_t count = flora_min(FLORA_DOT_BLOCK, channels - c);
        const int64_t padded = flora_round_up(count, FLORA_PAIR_LANES);
        int64_t stride;
        const uint16_t *block = block_of(t, 1, c, count, &stride);
        const uint16_t *ahead = block == block_room(t)           ? NULL
                                : c + FLORA_DOT_BLOCK < channels ? block + FLORA_DOT_BLOCK
                                                                 : block + t->pixels * stride - c;
        if (product != NULL)
            t->dots->dot(&(flora_dot){.m = t->pixels,
                                      .n = width,
                                      .k = count,
                                      .a = block,
                                      .a_m = stride,
                                      .b = matrix + c * width,
                                      .b_w = width,
                                      .taps = 1,
                                      .c_in = c ? product : NULL,
                                      .c = product,
                                      .c_m = width,
                                      .ahead = ahead});
        if (sums != NULL) {
            t->dots->pair(pairs, padded, block, stride, t->pixels, count);
            t->dots->dot(&(flora_dot){.m = rank,
                                      .n = count,
                                      .k = t->pixels,
                                      .a = turned,
                                      .a_m = t->tile,
                                      .b = pairs,
                                      .b_w = padded,
                                      .taps = 1,
                                      .c_in = sums + c,
                                      .c = sums + c,
                                      .c_m = sums_m});
        }
    }
}

static void sweep_planes(const flora_dot_tile *t, int64_t channels, int64_t rank, float *product,
                         const uint16_t *matrix, int64_t width, float *sums, int64_t sums_m, const float *with) {
    uint16_t *with_pairs = (uint16_t *)(void *)tile_room(t, 0), *pairs = pair_room(t);
    float *turned = tile_room(t, 1);
    const int64_t padded = flora_round_up(t->pixels, FLORA_PAIR_LANES);
    if (sums != NULL)
        t->dots->pair_rounded(with_pairs, width, with, width, t->pixels, rank);
    for (int64_t c = 0; c < channels; c += FLORA_DOT_BLOCK) {
        const int64_t count = flora_min(FLORA_DOT_BLOCK, channels - c);
        int64_t stride;
        const uint16_t *block = block_of(t, 0, c, count, &stride);
        if (sums != NULL)
            t->dots->dot(&(flora_dot){.m = count,
                                      .n = rank,
                                      .k = t->pixels,
                                      .a = block,
                                      .a_m = stride,
                                      .b = with_pairs,
                                      .b_w = width,
                                      .taps = 1,
                                      .c_in = sums + c * sums_m,
                                      .c = sums + c * sums_m,
                                      .c_m = sums_m});
        if (product != NULL) {
            t->dots->pair(pairs, padded, block, stride, count, t->pixels);
            t->dots->dot(&(flora_dot){.m = rank,
                                      .n = t->pixels,
                                      .k = count,
                                      .a = matrix + c,
                                      .a_m = even(channels),
                                      .b = pairs,
                                      .b_w = padded,
                                      .taps = 1,
                                      .c_in = c ? turned : NULL,
                                      .c = turned,
                                      .c_m = t->tile});
        }
    }
    if (product != NULL) {
        memset(turned + rank * t->tile, 0, (size_t)((width - rank) * t->tile) * sizeof *turned);
        t->kernels->transpose(product, width, turned, t->tile, rank, t->pixels);
    }
}

void flora_dots_sweep(const flora_dot_tile *t, int64_t channels, int64_t rank, float *product, const void *matrix,
                      int64_t width, float *sums, int64_t sums_m, const float *with) {
    if (channels == 0) {
        if (product != NULL)
            memset(product, 0, (size_t)(t->pixels * width) * sizeof *product);
    } else if (flora_dots_by_rows(t->field)) {
        sweep_rows(t, channels, rank, product, matrix, width, sums, sums_m, with);
    } else {
        sweep_planes(t, channels, rank, product, matrix, width, sums, sums_m, with);
    }
}

void flora_dots_expand(const flora_dot_tile *t, int64_t channels, int64_t rank, const float *k, int64_t width,
                       const void *u, int64_t u_w) {
    const flora_pixels *pixels = &t->field->pixels;
    uint16_t *rounded = (uint16_t *)(void *)tile_room(t, 0), *pairs = (uint16_t *)(void *)tile_room(t, 1);
    if (rank == 0 || channels == 0)
        return;
    t->dots->round(rounded, width, width, k, width, t->pixels, rank);
    if (t->field->planes) /* a pair of ranks moves as one float */
        t->kernels->transpose(pairs, t->tile, rounded, width / 2, t->pixels, even(rank) / 2);
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(pixels, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        uint16_t *y = field_at(t, 0, offset);
        flora_dot g = {.k = rank, .taps = 1, .c_in = y, .c = y};
        if (t->field->planes) {
            g.m = channels, g.n = run;
            g.a = u, g.a_m = even(rank);
            g.b = pairs + 2 * done, g.b_w = t->tile;
            g.c_m = t->field->channel;
        } else {
            g.m = run, g.n = channels;
            g.a = rounded + done * width, g.a_m = width;
            g.b = u, g.b_w = u_w;
            g.c_m = flora_pixel_stride(pixels);
        }
        t->dots->dot_act(&g);
    }
}
