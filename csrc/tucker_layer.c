/* The Tucker update of a Linear or convolution, applied without forming it.
 *
 * Types: activations act, everything else real (float, or double for float64); all sums real.
 * Source: FLoRA, arXiv 2405.14739. For a pixel, with taps of the core's kernel modes:
 *     h = x · U_in              k = Σ_tap h(at tap) · G_tapᵀ        y += s · k · U_outᵀ
 * and backward
 *     dk = s · dy · U_out       dh = Σ_tap dk(at tap) · G_tap        dx += dh · U_inᵀ
 *     dU_out = s · dyᵀ · k      dG_tap = dkᵀ · h(at tap)             dU_in = xᵀ · dh
 * The naive versions are flora/reference.py's tucker_linear_* and tucker_conv_*.
 *
 * Work is cut into tiles of pixels of one image and one group. Everything that has `rank` columns lives in tiles with
 * channels last, padded to the vector width, in scratch; x, y, dy and dx are read and written where they are, once.
 * A pointwise layer (a Linear, or a 1×1 convolution) does a whole tile, forward or backward, in one go. Otherwise h is
 * a padded image of its own, and backward runs the small transposed convolution dk → dh between the two halves.
 *
 * Every element of y, dx and h is computed by one task in one order. Gradients of the parameters are sums over pixels:
 * each chunk of tasks has its own, and they are added in the order of the chunks.
 */
#include "tucker_layer.h"
#include "parallel.h"
#include "tucker_dots.h"

#include <string.h>

enum {
    ROW_TILE = 64,    /* pixels of a tile: enough for a parameter gradient to be loaded and stored rarely … */
    PLANE_TILE = 128, /* … and, where pixels are the vector, for lines long enough to prefetch */
    BLOCK = 128,      /* channels taken at a time, so that a block of a tile stays in the first-level cache */
    LINE_TILE = 256,  /* pixels of dh's lines in a task of the transposed convolution */
    MOST_GAP = 16     /* pixels between two lines that are computed in vain, at most */
};

/* Layer, scratch and the places in it. Names ending in _w are row widths (ranks padded to the vector). */
typedef struct {
    const flora_layer *layer;
    const flora_kernels *kernels;
    const flora_dots *dots; /* NULL: activations are widened for products of reals */
    flora_scratch scratch;
    int64_t tile, in_tile, out_tile; /* pixels: the most of any tile, and of one of input or output pixels */
    int64_t lanes, in_w, out_w, y_w, dx_w;

    /* packed factors */
    size_t u_in;      /* (c_in, in_w) */
    size_t u_out;     /* (groups · c_out, out_w) · scale */
    size_t core;      /* (taps, r_in, out_w) */
    size_t core_t;    /* (taps, r_out, in_w) */
    size_t to_y;      /* U_out · scale as `expand` wants it for y */
    size_t to_dx;     /* U_in as `expand` wants it for dx */
    size_t taps_a;    /* (taps) int64: where a tap's pixel is in h */
    size_t taps_core; /* (taps) int64: where a tap is in `core` */

    /* images */
    char *h;                                                 /* (batch, *padded, groups · r_in), or NULL */
    int64_t h_batch, h_stride[FLORA_MAX_SPATIAL], h_channel; /* its strides … */
    int64_t h_interior;                                      /* … and the first pixel that is not padding */
    flora_pixels h_in, h_out; /* its pixels as the input numbers them, and (for tap 0) the output */
    int owns_h;               /* h is scratch, since the caller has none */
    size_t h_scratch;
    size_t dk; /* (batch, groups, *(out + margins), out_w) */
    int64_t dk_size, dk_margin[FLORA_MAX_SPATIAL][2], dk_interior;
    flora_pixels dk_out, dk_in;  /* its pixels as the output numbers them, and as the input does (for offset 0) */
    int gathers;                 /* dh's tiles are gathered from dk's image, whose margins are zero */
    size_t taps_dk, taps_core_t; /* (taps) int64: where dh's taps are in dk's image, and in `core_t` */
    size_t dh;                   /* (batch, groups, *padded, in_w), unless gathered */
    int64_t dh_interior;
    flora_pixels dh_in;

    /* with dots, dk's image has numbers of bfloat16, and h is read from copies of such */
    int64_t number;          /* the bytes of a number of dk's image */
    int64_t numbers;         /* how many numbers of a packed core are in the place of a real */
    size_t h_rows, h_planes; /* (batch, groups, *padded, h_w) and (batch, groups, r_in, *padded) */
    int64_t h_w;
    int by_planes; /* h_planes is there and serves the gradient of the core */
    flora_pixels h_all, rows_out, planes_out;
    size_t taps_rows, taps_planes;

    /* per chunk */
    int chunks;
    size_t rooms, sums;
    int64_t room_size, sums_size;                                 /* bytes */
    size_t h_tile, k_tile, dk_tile, dh_tile, turned, block, span; /* within a room */
    size_t line_taps_dk, line_taps_core, runs_h, runs_dk;
    /* within the sums: (c_in, in_w), (taps, r_in, out_w), (groups · c_out, out_w), or as turned_sums says */
    size_t d_u_in, d_core, d_u_out;
} plan;

static void *at(const plan *p, size_t offset) {
    return p->scratch.base + offset;
}

static void *in_room(const plan *p, int chunk, size_t offset) {
    return p->scratch.base + p->rooms + chunk * p->room_size + offset;
}

static void *in_sums(const plan *p, int chunk, size_t offset) {
    return p->scratch.base + p->sums + chunk * p->sums_size + offset;
}

/* `n` reals from `base` on */
static void *reals(const plan *p, const void *base, int64_t n) {
    return (char *)base + n * (int64_t)p->kernels->real_size;
}

/* Fields ----------------------------------------------------------------------------------------------------------- */

flora_field flora_field_of(const flora_view *view, int rows) {
    flora_field field = {.data = view->data, .batch = rows ? 0 : view->strides[0], .channel = view->strides[1]};
    field.pixels = rows ? flora_pixels_of(1, view->shape, view->strides)
                        : flora_pixels_of(view->ndim - 2, view->shape + 2, view->strides + 2);
    return field;
}

flora_status flora_expect_writable(flora_field *field, const flora_view *view, const char *name, char *error) {
    const int64_t channels = view->shape[1], pixels = field->pixels.count;
    const int by_rows = channels <= 1 || field->channel == 1;
    const int last = view->ndim - 1, spatial = last > 1;
    int by_planes = pixels <= 1 || flora_pixel_stride(&field->pixels) == 1;
    if (!by_rows && !by_planes && spatial &&
        view->shape[last] == 1) { /* runs of a single pixel, whatever the strides */
        field->pixels.extent[field->pixels.ndim] = field->pixels.stride[field->pixels.ndim] = 1;
        field->pixels.ndim++;
        by_planes = 1;
    }
    if (!by_rows && !by_planes && view->shape[0] > 0)
        return flora_fail(error, FLORA_BAD_LAYOUT,
                          "%s must have unit stride in its channels or its last mode, not strides of %lld and %lld",
                          name, (long long)view->strides[1], (long long)view->strides[spatial ? last : 0]);
    field->planes = by_planes && (!by_rows || channels < pixels);
    return FLORA_OK;
}

static char *field_at(const plan *p, const flora_field *field, int64_t image, int64_t channel, int64_t offset) {
    return flora_at(field->data, image * field->batch + channel * field->channel + offset, p->kernels->act_size);
}

/* Steps on one tile ------------------------------------------------------------------------------------------------ */

/* The tile: `pixels` pixels from `first` on, of one image and group. */
typedef struct {
    int64_t image, group, first, pixels;
} tile;

static void multiply(const plan *p, flora_gemm g) {
    if (g.taps == 0)
        g.taps = 1;
    p->kernels->gemm(&g);
}

/* A block (tile pixels, channels) of a field as reals: where it is if its type and strides allow, else a copy. */
static const void *block_of(const plan *p, const flora_field *field, const tile *t, int64_t channel, int64_t channels,
                            void *room, int64_t *a_pixel, int64_t *a_channel) {
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

static flora_dot_tile dot_tile(const plan *p, const flora_field *field, const tile *t, int64_t channels, void *room) {
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
static int turned_sums(const plan *p, const flora_field *field) {
    return p->dots != NULL && flora_dots_by_rows(field);
}

/* The width of those sums, of `channels` channels in all. */
static int64_t sums_w(const plan *p, const flora_field *field, int64_t channels, int64_t width) {
    return turned_sums(p, field) ? flora_round_up(channels, p->lanes) : width;
}

/* One pass over a tile (pixels, channels) of x or dy:
 *     product (pixels, width) = tile · matrix (channels, rank)     if product is not NULL
 *     sums (channels, rank) += tileᵀ · with (pixels, width)        if sums is not NULL */
static void sweep(const plan *p, const flora_field *field, const tile *t, int64_t channels, int64_t rank, void *room,
                  void *product, const void *matrix, int64_t width, void *sums, int64_t sum_w, const void *with) {
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
static void expand(const plan *p, const flora_field *field, const tile *t, int64_t channels, const void *k, int64_t k_w,
                   int64_t rank, const void *u, int64_t u_w, void *room) {
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
static void load_h(const plan *p, const tile *t, void *h_tile) {
    const int64_t r = p->layer->r_in;
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(&p->h_in, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        const void *from = reals(p, p->h, t->image * p->h_batch + p->h_interior + t->group * r * p->h_channel + offset);
        p->kernels->pack(reals(p, h_tile, done * p->in_w), p->in_w, from, flora_pixel_stride(&p->h_in), p->h_channel,
                         run, r, 1.0);
    }
}

static void store_h(const plan *p, const tile *t, const void *h_tile) {
    const int64_t r = p->layer->r_in;
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(&p->h_in, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        void *to = reals(p, p->h, t->image * p->h_batch + p->h_interior + t->group * r + offset);
        p->kernels->copy(to, flora_pixel_stride(&p->h_in), reals(p, h_tile, done * p->in_w), p->in_w, 1, run, r);
    }
}

/* h of one image and group as bfloat16 */
static uint16_t *h_rows(const plan *p, int64_t image, int64_t group) {
    return (uint16_t *)at(p, p->h_rows) + (image * p->layer->groups + group) * p->layer->padded_pixels * p->h_w;
}

static uint16_t *h_planes(const plan *p, int64_t image, int64_t group) {
    return (uint16_t *)at(p, p->h_planes) +
           (image * p->layer->groups + group) * p->layer->padded_pixels * p->layer->r_in;
}

/* Both of them, for one image and group. */
static void round_h(const plan *p, int chunk, int64_t slice) {
    const flora_layer *layer = p->layer;
    const int64_t r = layer->r_in, pixels = layer->padded_pixels;
    const int64_t image = slice / layer->groups, group = slice % layer->groups;
    void *h_tile = in_room(p, chunk, p->h_tile), *turned = in_room(p, chunk, p->turned);
    for (int64_t done = 0, run; done < pixels; done += run) {
        const int64_t offset = flora_pixel_at(&p->h_all, done, &run);
        run = flora_min(flora_min(run, pixels - done), p->tile);
        p->kernels->pack(h_tile, p->in_w, reals(p, p->h, image * p->h_batch + group * r * p->h_channel + offset),
                         flora_pixel_stride(&p->h_all), p->h_channel, run, r, 1.0);
        p->dots->round(h_rows(p, image, group) + done * p->h_w, p->h_w, p->h_w, h_tile, p->in_w, run, r);
        if (!p->by_planes)
            continue;
        p->kernels->transpose(turned, p->tile, h_tile, p->in_w, run, r);
        p->dots->round(h_planes(p, image, group) + done, pixels, run, turned, p->tile, r, run);
    }
}

/* How many pixels of a tile, from `first` on, one product of `correlate` takes; *span: the pixels it computes for them.
 * Lines are short where images are deep, and a product with few rows is slow. So it runs on over the pixels between two
 * lines, if they are few, and what it computes there is dropped. */
static int64_t correlated(const flora_pixels *pixels, int64_t first, int64_t count, int64_t *span) {
    const int last = pixels->ndim - 1;
    const int64_t line = pixels->extent[last], column = first % line;
    *span = flora_min(line - column, count);
    if (last == 0 || pixels->stride[last] < 1 || pixels->stride[last - 1] % pixels->stride[last] != 0)
        return *span;
    const int64_t pitch = pixels->stride[last - 1] / pixels->stride[last], gap = pitch - line;
    if (gap < 0 || gap > MOST_GAP || 2 * gap > line)
        return *span;
    const int64_t taken =
        flora_min(count, (pixels->extent[last - 1] - first / line % pixels->extent[last - 1]) * line - column);
    *span = taken + (column + taken - 1) / line * gap;
    return taken;
}

/* out (pixels, width) = Σ_tap image (pixel at tap, depth) · matrix_tap (depth, width): the small convolution */
static void correlate(const plan *p, const tile *t, const flora_pixels *pixels, const void *image, int64_t channel,
                      int64_t depth, const int64_t *taps, const void *matrix, const int64_t *matrix_taps, int64_t width,
                      void *span_room, void *out) {
    for (int64_t done = 0, taken; done < t->pixels; done += taken) {
        int64_t span, run;
        const int64_t offset = flora_pixel_at(pixels, t->first + done, &run);
        taken = correlated(pixels, t->first + done, t->pixels - done, &span);
        void *to = span == taken ? reals(p, out, done * width) : span_room;
        if (p->dots != NULL)
            p->dots->dot(&(flora_dot){.m = span,
                                      .n = width,
                                      .k = depth,
                                      .a = (const uint16_t *)image + offset,
                                      .a_m = flora_pixel_stride(pixels),
                                      .b = matrix,
                                      .b_w = width,
                                      .taps = p->layer->taps,
                                      .a_taps = taps,
                                      .b_taps = matrix_taps,
                                      .c = to,
                                      .c_m = width});
        else
            multiply(p, (flora_gemm){.m = span,
                                     .n = width,
                                     .k = depth,
                                     .a = reals(p, image, offset),
                                     .a_m = flora_pixel_stride(pixels),
                                     .a_k = channel,
                                     .b = matrix,
                                     .b_k = width,
                                     .taps = p->layer->taps,
                                     .a_taps = taps,
                                     .b_taps = matrix_taps,
                                     .c = to,
                                     .c_m = width});
        if (span == taken)
            continue;
        const int64_t line = pixels->extent[pixels->ndim - 1];
        for (int64_t kept = 0, from = 0; kept < taken; kept += run) {
            run = flora_min(line - (t->first + done + kept) % line, taken - kept);
            memcpy(reals(p, out, (done + kept) * width), reals(p, span_room, from * width),
                   (size_t)(run * width) * p->kernels->real_size);
            from += run + pixels->stride[pixels->ndim - 2] / pixels->stride[pixels->ndim - 1] - line;
        }
    }
}

/* k (pixels, out_w) = Σ_tap h(at tap) · G_tapᵀ, from the padded image h */
static void convolve(const plan *p, int chunk, const tile *t, void *k_tile) {
    const flora_layer *layer = p->layer;
    const void *matrix = at(p, p->core), *matrix_taps = at(p, p->taps_core);
    void *span = in_room(p, chunk, p->span);
    if (p->dots != NULL)
        correlate(p, t, &p->rows_out, h_rows(p, t->image, t->group), 1, layer->r_in, at(p, p->taps_rows), matrix,
                  matrix_taps, p->out_w, span, k_tile);
    else
        correlate(p, t, &p->h_out, reals(p, p->h, t->image * p->h_batch + t->group * layer->r_in * p->h_channel),
                  p->h_channel, layer->r_in, at(p, p->taps_a), matrix, matrix_taps, p->out_w, span, k_tile);
}

/* dh (pixels, in_w) = Σ_tap dk(at tap) · G_tap, from dk's image with its margins */
static void convolve_back(const plan *p, int chunk, const tile *t, void *dh_tile) {
    const void *image = (char *)at(p, p->dk) + (t->image * p->layer->groups + t->group) * p->dk_size * p->number;
    correlate(p, t, &p->dk_in, image, 1, p->layer->r_out, at(p, p->taps_dk), at(p, p->core_t), at(p, p->taps_core_t),
              p->in_w, in_room(p, chunk, p->span), dh_tile);
}

/* dG_tap (r_in, out_w) += h(at tap)ᵀ · dk, transposed so that h, whose rows are not padded, is the broadcast side. Runs
 * of equal length are the taps of one product, so that its sums stay in registers. */
static void core_gradient(const plan *p, int chunk, const tile *t, const void *dk, void *sums) {
    const flora_layer *layer = p->layer;
    const flora_pixels *pixels = p->by_planes ? &p->planes_out : &p->h_out;
    const int64_t *taps = at(p, p->by_planes ? p->taps_planes : p->taps_a);
    int64_t *runs_h = in_room(p, chunk, p->runs_h), *runs_dk = in_room(p, chunk, p->runs_dk);
    const void *image = reals(p, p->h, t->image * p->h_batch + t->group * layer->r_in * p->h_channel);
    for (int64_t done = 0; done < t->pixels;) {
        int64_t run = 0, runs = 0;
        uint16_t *pairs = in_room(p, chunk, p->block), *pairs_end = pairs;
        for (int64_t length; done < t->pixels; done += length) {
            const int64_t offset = flora_pixel_at(pixels, t->first + done, &length);
            length = flora_min(length, t->pixels - done);
            if (runs > 0 && length != run)
                break;
            run = length;
            runs_h[runs] = offset;
            runs_dk[runs++] = p->by_planes ? pairs_end - pairs : done * p->out_w;
            if (p->by_planes) {
                p->dots->pair_rounded(pairs_end, p->out_w, reals(p, dk, done * p->out_w), p->out_w, run, layer->r_out);
                pairs_end += (run + 1) / 2 * 2 * p->out_w;
            }
        }
        for (int64_t tap = 0; tap < layer->taps; tap++) {
            void *sum = reals(p, sums, tap * layer->r_in * p->out_w);
            if (p->by_planes) {
                p->dots->dot(&(flora_dot){.m = layer->r_in,
                                          .n = p->out_w,
                                          .k = run,
                                          .a = h_planes(p, t->image, t->group) + taps[tap],
                                          .a_m = layer->padded_pixels,
                                          .b = pairs,
                                          .b_w = p->out_w,
                                          .taps = runs,
                                          .a_taps = runs_h,
                                          .b_taps = runs_dk,
                                          .c_in = sum,
                                          .c = sum,
                                          .c_m = p->out_w});
                continue;
            }
            multiply(p, (flora_gemm){.m = layer->r_in,
                                     .n = p->out_w,
                                     .k = run,
                                     .a = reals(p, image, taps[tap]),
                                     .a_m = p->h_channel,
                                     .a_k = flora_pixel_stride(&p->h_out),
                                     .b = dk,
                                     .b_k = p->out_w,
                                     .taps = runs,
                                     .a_taps = runs_h,
                                     .b_taps = runs_dk,
                                     .c_in = sum,
                                     .c = sum,
                                     .c_m = p->out_w});
        }
    }
}

/* dk's tile into its image */
static void store_dk(const plan *p, const tile *t, const void *dk_tile) {
    const int64_t interior = (t->image * p->layer->groups + t->group) * p->dk_size + p->dk_interior;
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(&p->dk_out, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        char *to = (char *)at(p, p->dk) + (interior + offset) * p->number;
        const void *from = reals(p, dk_tile, done * p->out_w);
        const int64_t step = flora_pixel_stride(&p->dk_out);
        if (p->dots != NULL)
            p->dots->round(to, step, p->out_w, from, p->out_w, run, p->out_w);
        else
            p->kernels->copy(to, step, from, p->out_w, 1, run, p->out_w);
    }
}

/* Padding ---------------------------------------------------------------------------------------------------------- */

/* The input position that padded position `i` of a mode shows, or -1 for a zero. */
static int64_t shown(const flora_layer *layer, int mode, int64_t i) {
    return flora_pad_source(layer->geometry.mode, i - layer->geometry.padding[mode][0], layer->in[mode]);
}

static int is_padding(const flora_layer *layer, int mode, int64_t i) {
    return i < layer->geometry.padding[mode][0] || i >= layer->geometry.padding[mode][0] + layer->in[mode];
}

/* Fills the padding of one line of h (line: an image and all spatial positions but the last) from its interior. */
static void pad_line(const plan *p, int64_t line) {
    const flora_layer *layer = p->layer;
    const int last = layer->ndim - 1;
    const size_t bytes = (size_t)(layer->groups * layer->r_in) * p->kernels->real_size;
    int64_t to = 0, from = 0;
    int interior = 1, zero = 0;
    for (int mode = last - 1; mode >= 0; mode--) {
        const int64_t i = line % layer->padded[mode], source = shown(layer, mode, i);
        line /= layer->padded[mode];
        interior = interior && !is_padding(layer, mode, i);
        zero = zero || source < 0;
        to += i * p->h_stride[mode];
        from += (source + layer->geometry.padding[mode][0]) * p->h_stride[mode];
    }
    to += line * p->h_batch;
    from += line * p->h_batch;
    for (int64_t i = 0; i < layer->padded[last]; i++) {
        if (interior && !is_padding(layer, last, i)) {
            i += layer->in[last] - 1;
            continue;
        }
        const int64_t source = zero ? -1 : shown(layer, last, i);
        void *pixel = reals(p, p->h, to + i * p->h_stride[last]);
        if (source < 0)
            memset(pixel, 0, bytes);
        else
            memcpy(pixel, reals(p, p->h, from + (source + layer->geometry.padding[last][0]) * p->h_stride[last]),
                   bytes);
    }
}

/* The adjoint of padding for one image and group (`slice`) of dh: what the padding received goes to what it showed. */
static void fold(const plan *p, int64_t slice) {
    const flora_layer *layer = p->layer;
    char *dh = reals(p, at(p, p->dh), slice * layer->padded_pixels * p->in_w);
    int64_t outer = 1, inner = layer->padded_pixels * p->in_w;
    for (int mode = 0; mode < layer->ndim; mode++) {
        const int64_t extent = layer->padded[mode], before = layer->geometry.padding[mode][0];
        inner /= extent;
        for (int64_t i = 0; i < extent; i++) {
            if (!is_padding(layer, mode, i))
                continue;
            const int64_t target = before + shown(layer, mode, i);
            for (int64_t o = 0; o < outer; o++)
                p->kernels->add(reals(p, dh, (o * extent + target) * inner), reals(p, dh, (o * extent + i) * inner),
                                inner);
        }
        outer *= extent;
    }
}

/* The transposed convolution --------------------------------------------------------------------------------------- */

/* dh (pixels [begin, end) of a line, in_w) = Σ_tap dk(at tap) · G_tap; `line` counts images, groups and all padded
 * positions but the last. Outer taps are gathered in one product; along the last mode each tap scatters to its own
 * pixels, which with a stride are not neighbours. */
static void transposed_line(const plan *p, int64_t line, int64_t begin, int64_t end, int64_t *taps_dk,
                            int64_t *taps_core) {
    const flora_layer *layer = p->layer;
    const flora_geometry *geometry = &layer->geometry;
    const int last = layer->ndim - 1;
    const int64_t stride = geometry->stride[last], core_size = layer->r_out * p->in_w;
    char *dh = reals(p, at(p, p->dh), line * layer->padded[last] * p->in_w);
    int64_t position[FLORA_MAX_SPATIAL], outer_taps = 1, count = 0;
    for (int mode = last - 1; mode >= 0; mode--) {
        position[mode] = line % layer->padded[mode];
        line /= layer->padded[mode];
        outer_taps *= layer->kernel[mode];
    }

    /* the outer taps that reach this line, and the lines of dk they come from */
    for (int64_t outer = 0; outer < outer_taps; outer++) {
        int64_t rest = outer, from = 0, lines = 1;
        int reaches = 1;
        for (int mode = last - 1; mode >= 0; mode--) {
            const int64_t i = position[mode] - rest % layer->kernel[mode] * geometry->dilation[mode];
            rest /= layer->kernel[mode];
            reaches =
                reaches && i >= 0 && i % geometry->stride[mode] == 0 && i / geometry->stride[mode] < layer->out[mode];
            from += i / geometry->stride[mode] * lines;
            lines *= layer->out[mode];
        }
        if (reaches) {
            taps_dk[count] = from * layer->out[last] * p->out_w;
            taps_core[count++] = outer * layer->kernel[last] * core_size * p->numbers;
        }
    }

    memset(reals(p, dh, begin * p->in_w), 0, (size_t)((end - begin) * p->in_w) * p->kernels->real_size);
    for (int64_t tap = 0; count > 0 && tap < layer->kernel[last]; tap++) {
        const int64_t shift =
            tap * geometry->dilation[last]; /* output pixel o reaches padded pixel o · stride + shift */
        const int64_t first = shift >= begin ? 0 : (begin - shift + stride - 1) / stride;
        const int64_t past = shift >= end ? 0 : flora_min((end - shift + stride - 1) / stride, layer->out[last]);
        if (first >= past)
            continue;
        void *to = reals(p, dh, (first * stride + shift) * p->in_w);
        const void *from = (char *)at(p, p->dk) + (line * layer->out_pixels + first) * p->out_w * p->number;
        const void *core = reals(p, at(p, p->core_t), tap * core_size);
        if (p->dots != NULL)
            p->dots->dot(&(flora_dot){.m = past - first,
                                      .n = p->in_w,
                                      .k = layer->r_out,
                                      .a = from,
                                      .a_m = p->out_w,
                                      .b = core,
                                      .b_w = p->in_w,
                                      .taps = count,
                                      .a_taps = taps_dk,
                                      .b_taps = taps_core,
                                      .c_in = to,
                                      .c = to,
                                      .c_m = stride * p->in_w});
        else
            multiply(p, (flora_gemm){.m = past - first,
                                     .n = p->in_w,
                                     .k = layer->r_out,
                                     .a = from,
                                     .a_m = p->out_w,
                                     .a_k = 1,
                                     .b = core,
                                     .b_k = p->in_w,
                                     .taps = count,
                                     .a_taps = taps_dk,
                                     .b_taps = taps_core,
                                     .c_in = to,
                                     .c = to,
                                     .c_m = stride * p->in_w});
    }
}

/* dh's tile (pixels, in_w), interior pixels only. */
static void load_dh(const plan *p, const tile *t, void *dh_tile) {
    const flora_layer *layer = p->layer;
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(&p->dh_in, t->first + done, &run) + p->dh_interior;
        run = flora_min(run, t->pixels - done);
        p->kernels->copy(
            reals(p, dh_tile, done * p->in_w), p->in_w,
            reals(p, at(p, p->dh), (t->image * layer->groups + t->group) * layer->padded_pixels * p->in_w + offset),
            flora_pixel_stride(&p->dh_in), 1, run, p->in_w);
    }
}

/* Zeros in the margins of dk's image of one image and group, line by line. */
static void clear_margins(const plan *p, int64_t slice) {
    const flora_layer *layer = p->layer;
    const int last = layer->ndim - 1;
    const size_t pixel = (size_t)(p->out_w * p->number);
    const int64_t before = p->dk_margin[last][0], after = p->dk_margin[last][1],
                  length = before + layer->out[last] + after;
    const int64_t lines = p->dk_size / (length * p->out_w);
    for (int64_t line = 0; line < lines; line++) {
        char *begin = (char *)at(p, p->dk) + (slice * p->dk_size + line * length * p->out_w) * p->number;
        int inside = 1;
        for (int64_t mode = last - 1, rest = line; mode >= 0; mode--) {
            const int64_t extent = p->dk_margin[mode][0] + layer->out[mode] + p->dk_margin[mode][1];
            const int64_t i = rest % extent - p->dk_margin[mode][0];
            inside = inside && i >= 0 && i < layer->out[mode];
            rest /= extent;
        }
        if (inside) {
            memset(begin, 0, (size_t)before * pixel);
            memset(begin + (size_t)(before + layer->out[last]) * pixel, 0, (size_t)after * pixel);
        } else {
            memset(begin, 0, (size_t)length * pixel);
        }
    }
}

/* Tiles as tasks --------------------------------------------------------------------------------------------------- */

static int64_t tile_count(const plan *p, int64_t pixels, int64_t most) {
    return p->layer->batch * p->layer->groups * ((pixels + most - 1) / most);
}

static int64_t in_tiles(const plan *p) {
    return tile_count(p, p->layer->in_pixels, p->in_tile);
}

static int64_t out_tiles(const plan *p) {
    return tile_count(p, p->layer->out_pixels, p->out_tile);
}

/* The tile of a task: tiles of a group, groups of an image, images. */
static tile tile_of(const plan *p, int64_t task, int64_t pixels, int64_t most) {
    const int64_t tiles = (pixels + most - 1) / most, slice = task / tiles, first = task % tiles * most;
    return (tile){.image = slice / p->layer->groups,
                  .group = slice % p->layer->groups,
                  .first = first,
                  .pixels = flora_min(most, pixels - first)};
}

static tile in_tile_of(const plan *p, int64_t task) {
    return tile_of(p, task, p->layer->in_pixels, p->in_tile);
}

static tile out_tile_of(const plan *p, int64_t task) {
    return tile_of(p, task, p->layer->out_pixels, p->out_tile);
}

/* Whole lines, if any fit in a tile. */
static int64_t whole_lines(int64_t most, int64_t line) {
    return line > 0 && line <= most ? most / line * line : most;
}

typedef struct {
    const plan *plan;
    void (*body)(int chunk, const plan *p);
} loop;

static void run_chunk(int chunk, void *loop_) {
    const loop *l = loop_;
    const flora_dots *dots = l->plan->dots;
    if (dots != NULL && dots->begin != NULL)
        dots->begin();
    l->body(chunk, l->plan);
    if (dots != NULL && dots->end != NULL)
        dots->end();
}

/* body(chunk, p) for all chunks */
static void in_parallel(const plan *p, void (*body)(int chunk, const plan *p)) {
    loop l = {.plan = p, .body = body};
    flora_parallel(p->chunks, run_chunk, &l);
}

static void project_x(const plan *p, const tile *t, void *room, void *h_tile) {
    sweep(p, &p->layer->x, t, p->layer->c_in, p->layer->r_in, room, h_tile, at(p, p->u_in), p->in_w, NULL, 0, NULL);
}

static void pad_chunk(int chunk, const plan *p) {
    const int64_t lines = p->layer->batch * (p->layer->padded_pixels / p->layer->padded[p->layer->ndim - 1]);
    for (int64_t line = flora_chunk_begin(lines, chunk, p->chunks);
         line < flora_chunk_begin(lines, chunk + 1, p->chunks); line++)
        pad_line(p, line);
}

/* h of all images, tile by tile, in zeros */
static void project_chunk(int chunk, const plan *p) {
    const int64_t tasks = in_tiles(p);
    void *h_tile = in_room(p, chunk, p->h_tile), *block = in_room(p, chunk, p->block);
    if (p->layer->geometry.mode == FLORA_PAD_ZEROS)
        pad_chunk(chunk, p);
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const tile t = in_tile_of(p, task);
        project_x(p, &t, block, h_tile);
        store_h(p, &t, h_tile);
    }
}

/* The padded image h from x. */
static void project(plan *p) {
    in_parallel(p, project_chunk);
    if (p->layer->geometry.mode != FLORA_PAD_ZEROS) /* which shows the interior, so that has to be there */
        in_parallel(p, pad_chunk);
}

/* k from h's tile: k = h · Gᵀ, or h itself without a core */
static const void *mix(const plan *p, const tile *t, const void *h_tile, void *k_tile) {
    if (p->layer->core == NULL)
        return h_tile;
    multiply(p, (flora_gemm){.m = t->pixels,
                             .n = p->out_w,
                             .k = p->layer->r_in,
                             .a = h_tile,
                             .a_m = p->in_w,
                             .a_k = 1,
                             .b = at(p, p->core),
                             .b_k = p->out_w,
                             .c = k_tile,
                             .c_m = p->out_w});
    return k_tile;
}

static void forward_chunk(int chunk, const plan *p) {
    const flora_layer *layer = p->layer;
    const int64_t tasks = out_tiles(p);
    void *h_tile = in_room(p, chunk, p->h_tile), *k_tile = in_room(p, chunk, p->k_tile);
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const tile t = out_tile_of(p, task);
        const void *k = k_tile;
        if (layer->pointwise) {
            project_x(p, &t, in_room(p, chunk, p->block), h_tile);
            if (p->h != NULL)
                store_h(p, &t, h_tile);
            k = mix(p, &t, h_tile, k_tile);
        } else {
            convolve(p, chunk, &t, k_tile);
        }
        const int64_t u = layer->y.planes ? t.group * layer->c_out * layer->r_out : t.group * layer->r_out * p->y_w;
        expand(p, &layer->y, &t, layer->c_out, k, p->out_w, layer->r_out, reals(p, at(p, p->to_y), u), p->y_w,
               in_room(p, chunk, p->turned));
    }
}

/* The second half of backward for one tile of input pixels: dU_in and dx from dh. */
static void finish_tile(const plan *p, int chunk, const tile *t, const void *dh_tile) {
    const flora_layer *layer = p->layer;
    if (layer->d_u_in != NULL)
        sweep(p, &layer->x, t, layer->c_in, layer->r_in, in_room(p, chunk, p->block), NULL, NULL, p->in_w,
              in_sums(p, chunk, p->d_u_in), sums_w(p, &layer->x, layer->c_in, p->in_w), dh_tile);
    if (layer->dx.data != NULL)
        expand(p, &layer->dx, t, layer->c_in, dh_tile, p->in_w, layer->r_in, at(p, p->to_dx), p->dx_w,
               in_room(p, chunk, p->turned));
}

static void margins_chunk(int chunk, const plan *p) {
    const int64_t slices = p->layer->batch * p->layer->groups;
    for (int64_t slice = flora_chunk_begin(slices, chunk, p->chunks);
         slice < flora_chunk_begin(slices, chunk + 1, p->chunks); slice++)
        clear_margins(p, slice);
}

/* Output pixels: dk, dU_out and dG; for a pointwise layer also dh and all the rest. */
static void backward_chunk(int chunk, const plan *p) {
    const flora_layer *layer = p->layer;
    const int64_t tasks = out_tiles(p);
    const int needs_k = layer->d_u_out != NULL, needs_h = needs_k || layer->d_core != NULL;
    void *h_tile = in_room(p, chunk, p->h_tile), *k_tile = in_room(p, chunk, p->k_tile);
    void *dh_tile = in_room(p, chunk, p->dh_tile), *block = in_room(p, chunk, p->block);
    memset(in_sums(p, chunk, 0), 0, (size_t)p->sums_size);
    if (p->gathers)
        margins_chunk(chunk, p);
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const tile t = out_tile_of(p, task);
        const void *k = k_tile;
        void *dk = in_room(p, chunk, p->dk_tile);
        if (layer->pointwise && needs_h) {
            if (p->h != NULL)
                load_h(p, &t, h_tile);
            else
                project_x(p, &t, block, h_tile);
            if (needs_k)
                k = mix(p, &t, h_tile, k_tile);
        } else if (needs_k) {
            convolve(p, chunk, &t, k_tile);
        }
        const int64_t u = t.group * layer->c_out * p->out_w;
        const int64_t sum = turned_sums(p, &layer->dy) ? t.group * layer->c_out : u;
        sweep(p, &layer->dy, &t, layer->c_out, layer->r_out, block, dk, reals(p, at(p, p->u_out), u), p->out_w,
              needs_k ? reals(p, in_sums(p, chunk, p->d_u_out), sum) : NULL,
              sums_w(p, &layer->dy, layer->groups * layer->c_out, p->out_w), k);
        if (!layer->pointwise) {
            if (layer->d_core != NULL)
                core_gradient(p, chunk, &t, dk, in_sums(p, chunk, p->d_core));
            if (p->dk_size > 0)
                store_dk(p, &t, dk);
            continue;
        }
        if (layer->d_core != NULL)
            multiply(p, (flora_gemm){.m = layer->r_in,
                                     .n = p->out_w,
                                     .k = t.pixels,
                                     .a = h_tile,
                                     .a_m = 1,
                                     .a_k = p->in_w,
                                     .b = dk,
                                     .b_k = p->out_w,
                                     .c_in = in_sums(p, chunk, p->d_core),
                                     .c = in_sums(p, chunk, p->d_core),
                                     .c_m = p->out_w});
        if (layer->core != NULL)
            multiply(p, (flora_gemm){.m = t.pixels,
                                     .n = p->in_w,
                                     .k = layer->r_out,
                                     .a = dk,
                                     .a_m = p->out_w,
                                     .a_k = 1,
                                     .b = at(p, p->core_t),
                                     .b_k = p->in_w,
                                     .c = dh_tile,
                                     .c_m = p->in_w});
        finish_tile(p, chunk, &t, layer->core != NULL ? dh_tile : dk);
    }
}

static void transposed_chunk(int chunk, const plan *p) {
    const flora_layer *layer = p->layer;
    const int64_t length = layer->padded[layer->ndim - 1], pieces = (length + LINE_TILE - 1) / LINE_TILE;
    const int64_t tasks = layer->batch * layer->groups * (layer->padded_pixels / length) * pieces;
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const int64_t begin = task % pieces * LINE_TILE;
        transposed_line(p, task / pieces, begin, flora_min(begin + LINE_TILE, length),
                        in_room(p, chunk, p->line_taps_dk), in_room(p, chunk, p->line_taps_core));
    }
}

static void round_h_chunk(int chunk, const plan *p) {
    const int64_t slices = p->layer->batch * p->layer->groups;
    for (int64_t slice = flora_chunk_begin(slices, chunk, p->chunks);
         slice < flora_chunk_begin(slices, chunk + 1, p->chunks); slice++)
        round_h(p, chunk, slice);
}

static void fold_chunk(int chunk, const plan *p) {
    const int64_t slices = p->layer->batch * p->layer->groups;
    for (int64_t slice = flora_chunk_begin(slices, chunk, p->chunks);
         slice < flora_chunk_begin(slices, chunk + 1, p->chunks); slice++)
        fold(p, slice);
}

static void finish_chunk(int chunk, const plan *p) {
    const int64_t tasks = in_tiles(p);
    void *dh_tile = in_room(p, chunk, p->dh_tile);
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const tile t = in_tile_of(p, task);
        if (p->gathers)
            convolve_back(p, chunk, &t, dh_tile);
        else
            load_dh(p, &t, dh_tile);
        finish_tile(p, chunk, &t, dh_tile);
    }
}

/* The sums of all chunks, rows [begin, end) of the gradient of a factor that meets `field`. */
static void add_up(const plan *p, const flora_view *view, const flora_field *field, size_t sums, int64_t width,
                   int chunk, double scale) {
    const int64_t begin = flora_chunk_begin(view->shape[0], chunk, p->chunks);
    const int64_t end = flora_chunk_begin(view->shape[0], chunk + 1, p->chunks);
    if (begin >= end)
        return;
    void *to = flora_at(view->data, begin * view->strides[0], p->kernels->real_size);
    const int64_t part = p->sums_size / (int64_t)p->kernels->real_size;
    const int64_t sum_w = sums_w(p, field, view->shape[0], width);
    if (turned_sums(p, field))
        p->kernels->sum(to, view->strides[1], view->strides[0], reals(p, in_sums(p, 0, sums), begin), sum_w, p->chunks,
                        part, view->shape[1], end - begin, scale);
    else
        p->kernels->sum(to, view->strides[0], view->strides[1], reals(p, in_sums(p, 0, sums), begin * width), sum_w,
                        p->chunks, part, end - begin, view->shape[1], scale);
}

/* The offset of a tap in a core with modes (r_out, r_in, *kernel); taps count in row-major order. */
static int64_t core_tap(const flora_layer *layer, const flora_view *core, int64_t tap) {
    int64_t offset = 0;
    for (int mode = layer->ndim - 1; mode >= 0; mode--) {
        offset += tap % layer->kernel[mode] * core->strides[2 + mode];
        tap /= layer->kernel[mode];
    }
    return offset;
}

static void add_up_chunk(int chunk, const plan *p) {
    const flora_layer *layer = p->layer;
    if (layer->d_u_in != NULL)
        add_up(p, layer->d_u_in, &layer->x, p->d_u_in, p->in_w, chunk, 1.0);
    if (layer->d_u_out != NULL)
        add_up(p, layer->d_u_out, &layer->dy, p->d_u_out, p->out_w, chunk, layer->scale);
    if (layer->d_core == NULL || layer->d_core->data == NULL)
        return;
    for (int64_t tap = flora_chunk_begin(layer->taps, chunk, p->chunks);
         tap < flora_chunk_begin(layer->taps, chunk + 1, p->chunks); tap++)
        p->kernels->sum(flora_at(layer->d_core->data, core_tap(layer, layer->d_core, tap), p->kernels->real_size),
                        layer->d_core->strides[1], layer->d_core->strides[0],
                        reals(p, in_sums(p, 0, p->d_core), tap * layer->r_in * p->out_w), p->out_w, p->chunks,
                        p->sums_size / (int64_t)p->kernels->real_size, layer->r_in, layer->r_out, 1.0);
}

/* Packing ---------------------------------------------------------------------------------------------------------- */

/* A factor (groups · channels, ranks padded to width) as `sweep` wants it for `field`. */
static void pack_factor(const plan *p, size_t to, const flora_view *u, const flora_field *field, int64_t groups,
                        int64_t width, double scale) {
    const int64_t channels = u->shape[0] / groups;
    if (p->dots == NULL)
        p->kernels->pack(at(p, to), width, u->data, u->strides[0], u->strides[1], u->shape[0], u->shape[1], scale);
    else
        for (int64_t g = 0; g < groups; g++)
            flora_dots_pack_sweep(p->kernels, p->dots, field, reals(p, at(p, to), g * channels * width), width, u,
                                  g * channels, channels, scale);
}

/* A factor as `expand` wants it for `field`, groups one after another: see there. */
static void pack_expand(const plan *p, size_t to, const flora_view *u, const flora_field *field, int64_t groups,
                        int64_t width, double scale) {
    const int64_t channels = u->shape[0] / groups, rank = u->shape[1];
    if (p->dots != NULL)
        for (int64_t g = 0; g < groups; g++)
            flora_dots_pack_expand(p->kernels, p->dots, field,
                                   reals(p, at(p, to), g * rank * (field->planes ? channels : width)), width, u,
                                   g * channels, channels, scale);
    else if (field->planes)
        p->kernels->pack(at(p, to), rank, u->data, u->strides[0], u->strides[1], u->shape[0], rank, scale);
    else
        for (int64_t g = 0; g < groups; g++)
            p->kernels->pack(reals(p, at(p, to), g * rank * width), width,
                             flora_at(u->data, g * channels * u->strides[0], p->kernels->real_size), u->strides[1],
                             u->strides[0], rank, channels, scale);
}

/* (taps, r_in, out_w), the core of the forward convolution */
static void pack_core(const plan *p) {
    const flora_layer *layer = p->layer;
    const flora_view *core = layer->core;
    for (int64_t tap = 0; core != NULL && tap < layer->taps; tap++) {
        void *to = reals(p, at(p, p->core), tap * layer->r_in * p->out_w);
        p->kernels->pack(to, p->out_w, flora_at(core->data, core_tap(layer, core, tap), p->kernels->real_size),
                         core->strides[1], core->strides[0], layer->r_in, layer->r_out, 1.0);
        if (p->numbers > 1)
            p->dots->pair_rounded(to, p->out_w, to, p->out_w, layer->r_in, layer->r_out);
    }
}

/* (taps, r_out, in_w), the core of the transposed convolution */
static void pack_core_t(const plan *p) {
    const flora_layer *layer = p->layer;
    const flora_view *core = layer->core;
    for (int64_t tap = 0; core != NULL && tap < layer->taps; tap++) {
        void *to = reals(p, at(p, p->core_t), tap * layer->r_out * p->in_w);
        p->kernels->pack(to, p->in_w, flora_at(core->data, core_tap(layer, core, tap), p->kernels->real_size),
                         core->strides[0], core->strides[1], layer->r_out, layer->r_in, 1.0);
        if (p->numbers > 1)
            p->dots->pair_rounded(to, p->in_w, to, p->in_w, layer->r_out, layer->r_in);
    }
}

/* Plans ------------------------------------------------------------------------------------------------------------ */

static int64_t taps_or_none(const flora_layer *layer) {
    return layer->core != NULL ? layer->taps : 0;
}

/* Multiplications of one pass over all pixels, of the whole layer. */
static double cost(const flora_layer *layer) {
    const double in = (double)layer->in_pixels * (double)layer->c_in * (double)layer->r_in;
    const double out = (double)layer->out_pixels * (double)layer->r_out;
    const double slices = (double)layer->batch * (double)layer->groups;
    return 2 * slices * (in + out * ((double)layer->c_out + (double)taps_or_none(layer) * (double)layer->r_in));
}

/* Sizes and strides that forward and backward share. `spare_h`: h is wanted although the caller has none. */
static void plan_common(plan *p, const flora_layer *layer, int planes, int spare_h) {
    const size_t real = layer->kernels->real_size;
    p->layer = layer;
    p->kernels = layer->kernels;
    p->dots = flora_isa_dots(layer->act, cost(layer));
    p->numbers = p->dots != NULL && !layer->pointwise ? 2 : 1;
    p->number = p->dots != NULL ? (int64_t)sizeof(uint16_t) : (int64_t)real;
    p->tile = planes ? PLANE_TILE : ROW_TILE;
    p->in_tile = layer->pointwise ? p->tile : whole_lines(p->tile, layer->in[layer->ndim - 1]);
    p->out_tile = layer->pointwise ? p->tile : whole_lines(p->tile, layer->out[layer->ndim - 1]);
    p->lanes = p->dots != NULL ? flora_max(p->kernels->lanes, FLORA_PAIR_LANES) : p->kernels->lanes;
    p->in_w = flora_round_up(layer->r_in, p->lanes);
    p->out_w = flora_round_up(layer->r_out, p->lanes);
    p->y_w = flora_round_up(layer->c_out, p->lanes);
    p->dx_w = flora_round_up(layer->c_in, p->lanes);

    /* h's own layout, or the caller's */
    int64_t pixel = layer->groups * layer->r_in, stride[FLORA_MAX_SPATIAL];
    p->h_channel = 1;
    for (int mode = layer->ndim - 1; mode >= 0; mode--) {
        p->h_stride[mode] = pixel;
        pixel *= layer->padded[mode];
    }
    p->h_batch = pixel;
    if (layer->h != NULL && layer->ndim == 0) {
        p->h_channel = layer->h->strides[1];
        p->h_in = flora_pixels_of(1, layer->h->shape, layer->h->strides);
    } else if (layer->h != NULL) {
        p->h_channel = layer->h->strides[layer->ndim + 1];
        p->h_batch = layer->h->strides[0];
        memcpy(p->h_stride, layer->h->strides + 1, sizeof p->h_stride);
    } else if (spare_h) {
        p->owns_h = 1;
        p->h_scratch =
            flora_reserve(&p->scratch, layer->batch, layer->padded_pixels, layer->groups * layer->r_in, real);
    }
    if (layer->ndim > 0) {
        p->h_in = flora_pixels_of(layer->ndim, layer->in, p->h_stride);
        p->h_interior = p->dh_interior = 0;
        int64_t dh_stride[FLORA_MAX_SPATIAL], size = p->in_w;
        for (int mode = layer->ndim - 1; mode >= 0; mode--) {
            dh_stride[mode] = size;
            size *= layer->padded[mode];
            stride[mode] = p->h_stride[mode] * layer->geometry.stride[mode];
            p->h_interior += layer->geometry.padding[mode][0] * p->h_stride[mode];
            p->dh_interior += layer->geometry.padding[mode][0] * dh_stride[mode];
        }
        p->h_out = flora_pixels_of(layer->ndim, layer->out, stride);
        p->dh_in = flora_pixels_of(layer->ndim, layer->in, dh_stride);
    }
    p->core = flora_reserve(&p->scratch, taps_or_none(layer), layer->r_in, p->out_w, real);
    p->taps_a = flora_reserve(&p->scratch, layer->taps, 1, 1, sizeof(int64_t));
    p->taps_core = flora_reserve(&p->scratch, layer->taps, 1, 1, sizeof(int64_t));
}

/* The copies of h. The gradient of the core sums over pixels, which must be neighbours for it. */
static void plan_h_copies(plan *p, int core_gradient) {
    const flora_layer *layer = p->layer;
    int64_t rows[FLORA_MAX_SPATIAL], planes[FLORA_MAX_SPATIAL], pixels = 1;
    p->h_w = layer->r_in + layer->r_in % 2;
    for (int mode = layer->ndim - 1; mode >= 0; mode--) {
        planes[mode] = pixels * layer->geometry.stride[mode];
        rows[mode] = planes[mode] * p->h_w;
        pixels *= layer->padded[mode];
    }
    p->h_all = flora_pixels_of(layer->ndim, layer->padded, p->h_stride);
    p->rows_out = flora_pixels_of(layer->ndim, layer->out, rows);
    p->planes_out = flora_pixels_of(layer->ndim, layer->out, planes);
    p->by_planes = core_gradient && flora_pixel_stride(&p->planes_out) == 1;
    p->h_rows = flora_reserve(&p->scratch, layer->batch * layer->groups, pixels, p->h_w, sizeof(uint16_t));
    p->taps_rows = flora_reserve(&p->scratch, layer->taps, 1, 1, sizeof(int64_t));
    if (p->by_planes) {
        p->h_planes = flora_reserve(&p->scratch, layer->batch * layer->groups, pixels, layer->r_in, sizeof(uint16_t));
        p->taps_planes = flora_reserve(&p->scratch, layer->taps, 1, 1, sizeof(int64_t));
    }
}

/* dk's image: with margins, such that all taps of every input pixel are in it, where dh can be gathered from it. Else,
 * with strides, or a padding that receives a gradient of its own, the transposed convolution scatters. */
static void plan_dk(plan *p) {
    const flora_layer *layer = p->layer;
    int64_t stride[FLORA_MAX_SPATIAL];
    p->gathers = layer->geometry.mode == FLORA_PAD_ZEROS || layer->padded_pixels == layer->in_pixels;
    for (int mode = 0; mode < layer->ndim; mode++)
        p->gathers = p->gathers && layer->geometry.stride[mode] == 1;
    p->dk_size = p->out_w;
    p->dk_interior = 0;
    for (int mode = layer->ndim - 1; mode >= 0; mode--) {
        const int64_t reach = (layer->kernel[mode] - 1) * layer->geometry.dilation[mode];
        for (int side = 0; side < 2; side++)
            p->dk_margin[mode][side] = p->gathers ? flora_max(0, reach - layer->geometry.padding[mode][side]) : 0;
        stride[mode] = p->dk_size;
        p->dk_interior += p->dk_margin[mode][0] * p->dk_size;
        p->dk_size *= p->dk_margin[mode][0] + layer->out[mode] + p->dk_margin[mode][1];
    }
    p->dk_out = flora_pixels_of(layer->ndim, layer->out, stride);
    p->dk_in = flora_pixels_of(layer->ndim, layer->in, stride);
    p->dk = flora_reserve(&p->scratch, layer->batch * layer->groups, p->dk_size, 1, (size_t)p->number);
    if (p->gathers) {
        p->taps_dk = flora_reserve(&p->scratch, layer->taps, 1, 1, sizeof(int64_t));
        p->taps_core_t = flora_reserve(&p->scratch, layer->taps, 1, 1, sizeof(int64_t));
    } else {
        p->dh = flora_reserve(&p->scratch, layer->batch * layer->groups, layer->padded_pixels, p->in_w,
                              p->kernels->real_size);
    }
}

/* The tiles that every chunk has for itself. */
static void plan_rooms(plan *p, int64_t line_taps) {
    const size_t real = p->kernels->real_size;
    flora_scratch room = {.size = 0};
    p->h_tile = flora_reserve(&room, p->tile, p->in_w, 1, real);
    p->k_tile = flora_reserve(&room, p->tile, p->out_w, 1, real);
    p->dk_tile = flora_reserve(&room, p->tile, p->out_w, 1, real);
    p->dh_tile = flora_reserve(&room, p->tile, p->in_w, 1, real);
    p->turned = flora_reserve(&room, p->tile, flora_max(p->in_w, p->out_w), 1, real);
    if (p->dots != NULL)
        p->block = p->turned = flora_reserve(&room, flora_dots_room(p->tile, flora_max(p->in_w, p->out_w)), 1, 1, 1);
    else
        p->block = flora_reserve(&room, p->tile, BLOCK, 1, real);
    if (!p->layer->pointwise) {
        p->span = flora_reserve(&room, 2 * p->tile, flora_max(p->in_w, p->out_w), 1, real);
        p->runs_h = flora_reserve(&room, p->tile, 1, 1, sizeof(int64_t));
        p->runs_dk = flora_reserve(&room, p->tile, 1, 1, sizeof(int64_t));
    }
    p->line_taps_dk = flora_reserve(&room, line_taps, 1, 1, sizeof(int64_t));
    p->line_taps_core = flora_reserve(&room, line_taps, 1, 1, sizeof(int64_t));
    p->room_size = (int64_t)room.size;
    p->rooms = flora_reserve(&p->scratch, p->chunks, p->room_size, 1, 1);
    p->scratch.overflow |= room.overflow;
}

/* Where the taps are, once scratch exists. */
static void place_taps(plan *p) {
    const flora_layer *layer = p->layer;
    int64_t *taps = at(p, p->taps_a), *core = at(p, p->taps_core);
    for (int64_t tap = 0; tap < layer->taps; tap++) {
        int64_t rest = tap, offset = 0;
        for (int mode = layer->ndim - 1; mode >= 0; mode--) {
            offset += rest % layer->kernel[mode] * layer->geometry.dilation[mode] * p->h_stride[mode];
            rest /= layer->kernel[mode];
        }
        taps[tap] = offset;
        core[tap] = tap * layer->r_in * p->out_w * p->numbers;
    }
    for (int64_t tap = 0; p->h_w > 0 && tap < layer->taps; tap++) {
        int64_t rest = tap, offset = 0, size = 1;
        for (int mode = layer->ndim - 1; mode >= 0; mode--) {
            offset += rest % layer->kernel[mode] * layer->geometry.dilation[mode] * size;
            rest /= layer->kernel[mode];
            size *= layer->padded[mode];
        }
        ((int64_t *)at(p, p->taps_rows))[tap] = offset * p->h_w;
        if (p->by_planes)
            ((int64_t *)at(p, p->taps_planes))[tap] = offset;
    }
    for (int64_t tap = 0; p->gathers && tap < layer->taps; tap++) {
        int64_t *taps_dk = at(p, p->taps_dk), *core_t = at(p, p->taps_core_t);
        int64_t rest = tap, offset = 0, size = p->out_w;
        for (int mode = layer->ndim - 1; mode >= 0; mode--) {
            const int64_t before = layer->geometry.padding[mode][0] + p->dk_margin[mode][0];
            offset += (before - rest % layer->kernel[mode] * layer->geometry.dilation[mode]) * size;
            rest /= layer->kernel[mode];
            size *= p->dk_margin[mode][0] + layer->out[mode] + p->dk_margin[mode][1];
        }
        taps_dk[tap] = offset;
        core_t[tap] = tap * layer->r_out * p->in_w * p->numbers;
    }
    p->h = layer->h != NULL ? layer->h->data : p->owns_h ? at(p, p->h_scratch) : NULL;
}

flora_status flora_layer_forward(const flora_layer *layer, char *error) {
    plan p = {.chunks = 1};
    if (layer->batch == 0 || layer->r_in == 0)
        return FLORA_OK;
    const size_t real = layer->kernels->real_size;
    plan_common(&p, layer, layer->y.planes, !layer->pointwise);
    p.chunks = flora_chunks(flora_max(in_tiles(&p), out_tiles(&p)), cost(layer));
    plan_rooms(&p, 0);
    p.u_in = flora_reserve(&p.scratch, layer->c_in, p.in_w, 1, real);
    p.to_y = flora_reserve(&p.scratch, layer->groups, layer->r_out, p.y_w, real);
    if (p.dots != NULL && !layer->pointwise)
        plan_h_copies(&p, 0);
    flora_status status = flora_allocate(&p.scratch, error);
    if (status != FLORA_OK)
        return status;

    place_taps(&p);
    pack_factor(&p, p.u_in, layer->u_in, &layer->x, 1, p.in_w, 1.0);
    pack_core(&p);
    pack_expand(&p, p.to_y, layer->u_out, &layer->y, layer->groups, p.y_w, layer->scale);
    if (!layer->pointwise)
        project(&p);
    if (p.h_w > 0)
        in_parallel(&p, round_h_chunk);
    in_parallel(&p, forward_chunk);
    flora_release(&p.scratch);
    return FLORA_OK;
}

flora_status flora_layer_backward(const flora_layer *layer, char *error) {
    plan p = {.chunks = 1};
    const size_t real = layer->kernels->real_size;
    const int needs_h = layer->d_u_out != NULL || layer->d_core != NULL;
    const int needs_dh = layer->d_u_in != NULL || layer->dx.data != NULL;
    const int empty = layer->batch == 0 || layer->r_in == 0 || layer->r_out == 0; /* all gradients are zero */
    const int projects = needs_h && layer->h == NULL && !empty;
    flora_scratch sums = {.size = 0};
    plan_common(&p, layer, layer->dx.planes, projects && !layer->pointwise);
    p.chunks = flora_chunks(flora_max(in_tiles(&p), out_tiles(&p)), 2 * cost(layer));
    plan_rooms(&p, needs_dh && !layer->pointwise ? layer->taps : 0);
    p.u_out = flora_reserve(&p.scratch, layer->groups * layer->c_out, p.out_w, 1, real);
    p.core_t = flora_reserve(&p.scratch, taps_or_none(layer), layer->r_out, p.in_w, real);
    if (projects)
        p.u_in = flora_reserve(&p.scratch, layer->c_in, p.in_w, 1, real);
    if (layer->dx.data != NULL)
        p.to_dx = flora_reserve(&p.scratch, layer->r_in, p.dx_w, 1, real);
    if (!layer->pointwise && needs_dh)
        plan_dk(&p);
    if (p.dots != NULL && !layer->pointwise && needs_h && !empty)
        plan_h_copies(&p, layer->d_core != NULL);
    p.d_u_in = flora_reserve(&sums, layer->d_u_in != NULL ? flora_round_up(layer->c_in, p.lanes) : 0, p.in_w, 1, real);
    p.d_core = flora_reserve(&sums, layer->d_core != NULL ? layer->taps : 0, layer->r_in, p.out_w, real);
    p.d_u_out = flora_reserve(&sums, layer->d_u_out != NULL ? flora_round_up(layer->groups * layer->c_out, p.lanes) : 0,
                              p.out_w, 1, real);
    p.sums_size = (int64_t)sums.size;
    p.sums = flora_reserve(&p.scratch, p.chunks, p.sums_size, 1, 1);
    p.scratch.overflow |= sums.overflow;
    flora_status status = flora_allocate(&p.scratch, error);
    if (status != FLORA_OK)
        return status;

    place_taps(&p);
    pack_factor(&p, p.u_out, layer->u_out, &layer->dy, layer->groups, p.out_w, layer->scale);
    pack_core(&p);
    pack_core_t(&p);
    if (projects)
        pack_factor(&p, p.u_in, layer->u_in, &layer->x, 1, p.in_w, 1.0);
    if (layer->dx.data != NULL)
        pack_expand(&p, p.to_dx, layer->u_in, &layer->dx, 1, p.dx_w, 1.0);
    if (projects && !layer->pointwise)
        project(&p);
    if (p.h_w > 0)
        in_parallel(&p, round_h_chunk);
    if (empty)
        p.chunks = 1, memset(in_sums(&p, 0, 0), 0, (size_t)p.sums_size);
    else
        in_parallel(&p, backward_chunk);
    if (!empty && !layer->pointwise && needs_dh) {
        if (!p.gathers)
            in_parallel(&p, transposed_chunk);
        if (layer->geometry.mode != FLORA_PAD_ZEROS && layer->padded_pixels != layer->in_pixels)
            in_parallel(&p, fold_chunk);
        in_parallel(&p, finish_chunk);
    }
    in_parallel(&p, add_up_chunk);
    flora_release(&p.scratch);
    return FLORA_OK;
}
