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

/* A tile (pixels, width) from `rank` channels of an image of reals, whose pixels are numbered as the tile's. */
static void load_image(const flora_plan *p, const flora_tile *t, const flora_pixels *pixels, const void *image,
                       int64_t channel, int64_t rank, void *tile, int64_t width) {
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(pixels, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        p->kernels->pack(reals(p, tile, done * width), width, reals(p, image, offset), flora_pixel_stride(pixels),
                         channel, run, rank, 1.0);
    }
}

/* The same the other way, to channels of unit stride. */
static void store_image(const flora_plan *p, const flora_tile *t, const flora_pixels *pixels, void *image, int64_t rank,
                        const void *tile, int64_t width) {
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(pixels, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        p->kernels->copy(reals(p, image, offset), flora_pixel_stride(pixels), reals(p, tile, done * width), width, 1,
                         run, rank);
    }
}

/* h's tile (pixels, in_w) from or to the image h, interior pixels only. */
void flora_load_h(const flora_plan *p, const flora_tile *t, void *h_tile) {
    const int64_t r = p->layer->r_in;
    load_image(p, t, &p->h_in, reals(p, p->h, t->image * p->h_batch + p->h_interior + t->group * r * p->h_channel),
               p->h_channel, r, h_tile, p->in_w);
}

void flora_store_h(const flora_plan *p, const flora_tile *t, const void *h_tile) {
    const int64_t r = p->layer->r_in;
    store_image(p, t, &p->h_in, reals(p, p->h, t->image * p->h_batch + p->h_interior + t->group * r), r, h_tile,
                p->in_w);
}

/* k's tile (pixels, out_w) from or to the caller's k. */
static void *k_of(const flora_plan *p, const flora_tile *t, int64_t channel) {
    const flora_view *k = p->layer->k;
    return flora_at(k->data, t->image * k->strides[0] + t->group * p->layer->r_out * channel, p->kernels->real_size);
}

void flora_load_k(const flora_plan *p, const flora_tile *t, void *k_tile) {
    const int64_t channel = p->layer->k->strides[1 + p->layer->ndim];
    load_image(p, t, &p->k_out, k_of(p, t, channel), channel, p->layer->r_out, k_tile, p->out_w);
}

void flora_store_k(const flora_plan *p, const flora_tile *t, const void *k_tile) {
    store_image(p, t, &p->k_out, k_of(p, t, 1), p->layer->r_out, k_tile, p->out_w);
}

/* dx (pixels, channels from `channel` on) += dh's tile (pixels, width) */
void flora_add_dh(const flora_plan *p, const flora_tile *t, int64_t channel, int64_t channels, void *dh_tile,
                  int64_t width, void *room) {
    const flora_field *dx = &p->layer->dx;
    if (dx->planes)
        p->kernels->transpose(room, p->tile, dh_tile, width, t->pixels, channels);
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(&dx->pixels, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        char *to = field_at(p, dx, t->image, t->group * p->layer->c_in + channel, offset);
        if (dx->planes)
            p->kernels->add_act(to, dx->channel, reals(p, room, done), p->tile, channels, run);
        else
            p->kernels->add_act(to, flora_pixel_stride(&dx->pixels), reals(p, dh_tile, done * width), width, run,
                                channels);
    }
}
