/* The steps on one tile of pixels: a pass over x or dy, an update of y or dx, and h's tile from and to its image.
 *
 * Everything that has `rank` columns lies channels last, padded to the vector; x, y, dy and dx are where the caller has
 * them, in either layout. See tucker_plan.h. */
#include "tucker_plan.h"

#include <string.h>

/* A block (tile pixels, channels) of a field as reals: where it is if its type and strides allow, else a copy. */
static const void *block_of(const flora_plan *p, const flora_field *field, const flora_tile *t, int64_t channel,
                            int64_t channels, void *room, int64_t *a_pixel, int64_t *a_channel) {
    int64_t run, offset = flora_pixel_at(&field->pixels, t->first, &run);
    const int64_t step = flora_pixel_stride(&field->pixels);
    if (p->kernels->act_size == p->kernels->real_size && run >= t->pixels) {
        *a_pixel = step;
        *a_channel = field->channel;
        return field_at(p, field, t->image, channel, offset);
    }
    const int by_rows = field->channel == 1;
    *a_pixel = by_rows ? channels : 1;
    *a_channel = by_rows ? 1 : t->pixels;
    for (int64_t done = 0; done < t->pixels; done += run) {
        offset = flora_pixel_at(&field->pixels, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        const char *from = field_at(p, field, t->image, channel, offset);
        if (by_rows)
            p->kernels->widen(reals(p, room, done * channels), channels, from, step, 1, run, channels);
        else
            p->kernels->widen(reals(p, room, done), t->pixels, from, field->channel, step, channels, run);
    }
    return room;
}

static flora_dot_tile dot_tile(const flora_plan *p, const flora_field *field, const flora_tile *t, int64_t channels,
                               void *room) {
    return (flora_dot_tile){.kernels = p->kernels,
                            .dots = p->dots,
                            .field = field,
                            .image = t->image,
                            .channel = t->group * channels,
                            .first = t->first,
                            .pixels = t->pixels,
                            .tile = p->tile,
                            .width = flora_max(p->in_w, p->out_w),
                            .room = room};
}

/* Whether the sums (channels, width) of a gradient over a field's pixels are kept as (rank, channels) instead. */
int flora_turned_sums(const flora_plan *p, const flora_field *field) {
    return p->dots != NULL && flora_dots_by_rows(field);
}

/* The width of those sums, of `channels` channels in all. */
int64_t flora_sums_w(const flora_plan *p, const flora_field *field, int64_t channels, int64_t width) {
    return flora_turned_sums(p, field) ? flora_round_up(channels, p->lanes) : width;
}

/* One pass over a tile (pixels, channels) of x or dy:
 *     product (pixels, width) = tile · matrix (channels, rank)     if product is not NULL
 *     sums (channels, rank) += tileᵀ · with (pixels, width)        if sums is not NULL */
void flora_sweep(const flora_plan *p, const flora_field *field, const flora_tile *t, int64_t channels, int64_t rank,
                 void *room, void *product, const void *matrix, int64_t width, void *sums, int64_t sum_w,
                 const void *with) {
    if (p->dots != NULL) {
        const flora_dot_tile dots = dot_tile(p, field, t, channels, room);
        flora_dots_sweep(&dots, channels, rank, product, matrix, width, sums, sum_w, with);
        return;
    }
    if (channels == 0 && product != NULL)
        memset(product, 0, (size_t)(t->pixels * width) * p->kernels->real_size);
    for (int64_t c = 0; c < channels; c += BLOCK) {
        const int64_t count = flora_min(BLOCK, channels - c);
        int64_t a_pixel, a_channel;
        const void *a = block_of(p, field, t, t->group * channels + c, count, room, &a_pixel, &a_channel);
        const void *ahead = a == room              ? NULL
                            : c + BLOCK < channels ? reals(p, a, BLOCK * a_channel)
                                                   : reals(p, a, t->pixels * a_pixel - c * a_channel);
        if (product != NULL)
            multiply(p, (flora_gemm){.m = t->pixels,
                                     .n = width,
                                     .k = count,
                                     .a = a,
                                     .a_m = a_pixel,
                                     .a_k = a_channel,
                                     .b = reals(p, matrix, c * width),
                                     .b_k = width,
                                     .c_in = c ? product : NULL,
                                     .c = product,
                                     .c_m = width,
                                     .ahead = ahead});
        if (sums != NULL)
            multiply(p, (flora_gemm){.m = count,
                                     .n = width,
                                     .k = t->pixels,
                                     .a = a,
                                     .a_m = a_channel,
                                     .a_k = a_pixel,
                                     .b = with,
                                     .b_k = width,
                                     .c_in = reals(p, sums, c * sum_w),
                                     .c = reals(p, sums, c * sum_w),
                                     .c_m = sum_w,
                                     .ahead = product == NULL ? ahead : NULL});
    }
}

/* y (pixels, channels) += k (pixels, rank) · Uᵀ, y a tile of an output field in either layout.
 * u: (rank, channels, padded) of the group if channels are the vector; (channels, rank) if pixels are. */
void flora_expand(const flora_plan *p, const flora_field *field, const flora_tile *t, int64_t channels, const void *k,
                  int64_t k_w, int64_t rank, const void *u, int64_t u_w, void *room) {
    const int64_t width = p->tile;
    if (rank == 0 || channels == 0)
        return;
    if (p->dots != NULL) {
        const flora_dot_tile dots = dot_tile(p, field, t, channels, room);
        flora_dots_expand(&dots, channels, rank, k, k_w, u, u_w);
        return;
    }
    if (field->planes)
        p->kernels->transpose(room, width, k, k_w, t->pixels, rank);
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(&field->pixels, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        char *y = field_at(p, field, t->image, t->group * channels, offset);
        flora_gemm g = {.k = rank, .taps = 1, .c_in = y, .c = y};
        if (field->planes) {
            g.m = channels, g.n = run;
            g.a = u, g.a_m = rank, g.a_k = 1;
            g.b = reals(p, room, done), g.b_k = width;
            g.c_m = field->channel;
        } else {
            g.m = run, g.n = channels;
            g.a = reals(p, k, done * k_w), g.a_m = k_w, g.a_k = 1;
            g.b = u, g.b_k = u_w;
            g.c_m = flora_pixel_stride(&field->pixels);
        }
        p->kernels->gemm_act(&g);
    }
}

/* h's tile (pixels, in_w) from or to the image h, interior pixels only. */
void flora_load_h(const flora_plan *p, const flora_tile *t, void *h_tile) {
    const int64_t r = p->layer->r_in;
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(&p->h_in, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        const void *from = reals(p, p->h, t->image * p->h_batch + p->h_interior + t->group * r * p->h_channel + offset);
        p->kernels->pack(reals(p, h_tile, done * p->in_w), p->in_w, from, flora_pixel_stride(&p->h_in), p->h_channel,
                         run, r, 1.0);
    }
}

void flora_store_h(const flora_plan *p, const flora_tile *t, const void *h_tile) {
    const int64_t r = p->layer->r_in;
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(&p->h_in, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        void *to = reals(p, p->h, t->image * p->h_batch + p->h_interior + t->group * r + offset);
        p->kernels->copy(to, flora_pixel_stride(&p->h_in), reals(p, h_tile, done * p->in_w), p->in_w, 1, run, r);
    }
}
