/* The images of a convolution that is not pointwise: h with its padding, dk with its margins, and dh; and the small
 * convolutions between them. Formulas are in tucker_layer.c's head, the arithmetic in docs/kernels.md. */
#include "tucker_plan.h"

#include <string.h>

/* h of one image and group as bfloat16 */
static uint16_t *h_rows(const flora_plan *p, int64_t image, int64_t group) {
    return (uint16_t *)at(p, p->h_rows) + (image * p->layer->groups + group) * p->layer->padded_pixels * p->h_w;
}

static uint16_t *h_planes(const flora_plan *p, int64_t image, int64_t group) {
    return (uint16_t *)at(p, p->h_planes) +
           (image * p->layer->groups + group) * p->layer->padded_pixels * p->layer->r_in;
}

/* Both of them, for one image and group. */
void flora_round_h(const flora_plan *p, int chunk, int64_t slice) {
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

/* out (pixels, width) = Σ_tap image (pixel at tap, depth) · matrix_tap (depth, width): the small convolution. The first
 * pixel's tap 0 is `first` numbers into the image, rows of a matrix are `matrix_w` apart. */
static void correlate(const flora_plan *p, const flora_tile *t, const flora_pixels *pixels, const void *image,
                      int64_t first, int64_t channel, int64_t depth, const int64_t *taps, const void *matrix,
                      const int64_t *matrix_taps, int64_t matrix_w, int64_t width, void *span_room, void *out) {
    for (int64_t done = 0, taken; done < t->pixels; done += taken) {
        int64_t span, run;
        const int64_t offset = first + flora_pixel_at(pixels, t->first + done, &run);
        taken = correlated(pixels, t->first + done, t->pixels - done, &span);
        void *to = span == taken ? reals(p, out, done * width) : span_room;
        if (p->dots != NULL)
            p->dots->dot(&(flora_dot){.m = span,
                                      .n = width,
                                      .k = depth,
                                      .a = (const uint16_t *)image + offset,
                                      .a_m = flora_pixel_stride(pixels),
                                      .b = matrix,
                                      .b_w = matrix_w,
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
                                     .b_k = matrix_w,
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

/* h of the tile's image and group, and in *first where its first pixel is in it */
static const void *h_of(const flora_plan *p, int chunk, const flora_tile *t, int64_t *first) {
    *first = p->windows ? -t->window : t->image * p->h_batch + t->group * p->layer->r_in * p->h_channel;
    return p->windows ? in_room(p, chunk, p->window) : p->h;
}

/* k (pixels, out_w) = Σ_tap h(at tap) · G_tapᵀ, from the padded image h */
void flora_convolve(const flora_plan *p, int chunk, const flora_tile *t, void *k_tile) {
    const flora_layer *layer = p->layer;
    const void *matrix = at(p, p->core), *matrix_taps = at(p, p->taps_core);
    void *span = in_room(p, chunk, p->span);
    if (p->dots != NULL) {
        correlate(p, t, &p->rows_out, h_rows(p, t->image, t->group), 0, 1, layer->r_in, at(p, p->taps_rows), matrix,
                  matrix_taps, p->out_w, p->out_w, span, k_tile);
        return;
    }
    int64_t first;
    const void *image = h_of(p, chunk, t, &first);
    correlate(p, t, &p->h_out, image, first, p->h_channel, layer->r_in, at(p, p->taps_a), matrix, matrix_taps,
              p->core_w, p->out_w, span, k_tile);
}

/* dh (pixels, width) = Σ_tap dk(at tap) · G_tap of the input channels from `channel` on, from dk's image with its
 * margins */
void flora_convolve_back(const flora_plan *p, int chunk, const flora_tile *t, int64_t channel, int64_t width,
                         void *dh_tile) {
    const void *image = (char *)at(p, p->dk) + (t->image * p->layer->groups + t->group) * p->dk_size * p->number;
    correlate(p, t, &p->dk_in, image, 0, 1, p->layer->r_out, at(p, p->taps_dk), reals(p, at(p, p->core_t), channel),
              at(p, p->taps_core_t), p->core_t_w, width, in_room(p, chunk, p->span), dh_tile);
}

/* dG_tap (r_in, out_w) += h(at tap)ᵀ · dk, transposed so that h, whose rows are not padded, is the broadcast side; of a
 * window, whose rows are padded and long, dG (r_out, at tap, in_w) += dkᵀ · h(at tap). Runs of equal length are the
 * taps of one product, so that its sums stay in registers. */
void flora_core_gradient(const flora_plan *p, int chunk, const flora_tile *t, const void *dk, void *sums) {
    const flora_layer *layer = p->layer;
    const flora_pixels *pixels = p->by_planes ? &p->planes_out : &p->h_out;
    const int64_t *taps = at(p, p->by_planes ? p->taps_planes : p->taps_a);
    int64_t *runs_h = in_room(p, chunk, p->runs_h), *runs_dk = in_room(p, chunk, p->runs_dk);
    int64_t first = 0;
    const void *image = p->by_planes ? NULL : h_of(p, chunk, t, &first);
    for (int64_t done = 0; done < t->pixels;) {
        int64_t run = 0, runs = 0;
        uint16_t *pairs = in_room(p, chunk, p->block), *pairs_end = pairs;
        for (int64_t length; done < t->pixels; done += length) {
            const int64_t offset = flora_pixel_at(pixels, t->first + done, &length);
            length = flora_min(length, t->pixels - done);
            if (runs > 0 && length != run)
                break;
            run = length;
            runs_h[runs] = first + offset;
            runs_dk[runs++] = p->by_planes ? pairs_end - pairs : done * p->out_w;
            if (p->by_planes) {
                p->dots->pair_rounded(pairs_end, p->out_w, reals(p, dk, done * p->out_w), p->out_w, run, layer->r_out);
                pairs_end += (run + 1) / 2 * 2 * p->out_w;
            }
        }
        for (int64_t tap = 0; tap < layer->taps; tap++) {
            void *sum = reals(p, sums, tap * (p->windows ? p->in_w : layer->r_in * p->out_w));
            if (p->windows) {
                multiply(p, (flora_gemm){.m = layer->r_out,
                                         .n = layer->r_in,
                                         .k = run,
                                         .a = dk,
                                         .a_m = 1,
                                         .a_k = p->out_w,
                                         .b = reals(p, image, taps[tap]),
                                         .b_k = flora_pixel_stride(&p->h_out),
                                         .taps = runs,
                                         .a_taps = runs_dk,
                                         .b_taps = runs_h,
                                         .c_in = sum,
                                         .c = sum,
                                         .c_m = layer->taps * p->in_w});
                continue;
            }
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
void flora_store_dk(const flora_plan *p, const flora_tile *t, const void *dk_tile) {
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
void flora_pad_line(const flora_plan *p, int64_t line) {
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
void flora_fold(const flora_plan *p, int64_t slice) {
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
                p->kernels->add(reals(p, dh, (o * extent + target) * inner), 0, reals(p, dh, (o * extent + i) * inner),
                                0, 1, inner);
        }
        outer *= extent;
    }
}

/* The transposed convolution --------------------------------------------------------------------------------------- */

/* dh (pixels [begin, end) of a line, in_w) = Σ_tap dk(at tap) · G_tap; `line` counts images, groups and all padded
 * positions but the last. Outer taps are gathered in one product; along the last mode each tap scatters to its own
 * pixels, which with a stride are not neighbours. */
void flora_transposed_line(const flora_plan *p, int64_t line, int64_t begin, int64_t end, int64_t *taps_dk,
                           int64_t *taps_core) {
    const flora_layer *layer = p->layer;
    const flora_geometry *geometry = &layer->geometry;
    const int last = layer->ndim - 1;
    const int64_t stride = geometry->stride[last], core_size = p->core_t_tap;
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
                                     .b_k = p->core_t_w,
                                     .taps = count,
                                     .a_taps = taps_dk,
                                     .b_taps = taps_core,
                                     .c_in = to,
                                     .c = to,
                                     .c_m = stride * p->in_w});
    }
}

/* dh's tile (pixels, width) of the input channels from `channel` on, interior pixels only. */
void flora_load_dh(const flora_plan *p, const flora_tile *t, int64_t channel, int64_t width, void *dh_tile) {
    const flora_layer *layer = p->layer;
    const int64_t image = (t->image * layer->groups + t->group) * layer->padded_pixels * p->in_w + p->dh_interior;
    for (int64_t done = 0, run; done < t->pixels; done += run) {
        const int64_t offset = flora_pixel_at(&p->dh_in, t->first + done, &run);
        run = flora_min(run, t->pixels - done);
        p->kernels->copy(reals(p, dh_tile, done * width), width, reals(p, at(p, p->dh), image + offset + channel),
                         flora_pixel_stride(&p->dh_in), 1, run, width);
    }
}

/* Zeros in the margins of dk's image of one image and group, line by line. */
void flora_clear_margins(const flora_plan *p, int64_t slice) {
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
