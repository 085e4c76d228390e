/* A layer without input factor: the core's convolution runs on x itself, c_in channels deep.
 *
 * The padded image that it needs would be as large as x. So each chunk has a window of it in its room: the padded
 * positions of the first spatial mode that some output positions depend on, whole in the other modes, channels last
 * whatever the layout of x, small enough for the second-level cache. It moves on when a tile needs more. See
 * tucker_plan.h. */
#include "tucker_plan.h"

#include <string.h>

enum {
    WINDOW_BYTES = 256 << 10, /* of a window, about: a quarter of a usual second-level cache */
    LINE_BYTES = 64,
    SETS = 8 /* rows of a multiple of so many cache lines share too few sets of the first level */
};

/* Positions of mode 0 of the padded input that `rows` neighbouring ones of the output depend on. */
static int64_t padded_rows(const flora_layer *layer, int64_t rows) {
    return (rows - 1) * layer->geometry.stride[0] + (layer->kernel[0] - 1) * layer->geometry.dilation[0] + 1;
}

/* Output pixels at one position of mode 0. */
static int64_t row_pixels(const flora_layer *layer) {
    return layer->out_pixels / layer->out[0];
}

/* Extents and strides of the windows. */
void flora_plan_window(flora_plan *p) {
    const flora_layer *layer = p->layer;
    const int64_t real = (int64_t)p->kernels->real_size, line = LINE_BYTES / real;
    const int64_t lines = (layer->c_in + line - 1) / line, pixel = (lines + (lines % SETS == 0)) * line;
    const int64_t inner = layer->padded_pixels / layer->padded[0];
    const int64_t tile_rows = flora_min(layer->out[0], (p->out_tile - 1) / row_pixels(layer) + 2);
    const int64_t fits = WINDOW_BYTES / real / (pixel * inner);
    const int64_t rows = (fits - padded_rows(layer, 1)) / layer->geometry.stride[0] + 1;
    p->window_rows = flora_min(layer->out[0], flora_max(tile_rows, rows));
    p->window_pixels = padded_rows(layer, p->window_rows) * inner;
    p->h_stride[layer->ndim - 1] = pixel;
    for (int mode = layer->ndim - 1; mode > 0; mode--)
        p->h_stride[mode - 1] = p->h_stride[mode] * layer->padded[mode];
}

/* Copies `count` pixels of x, from its pixel `from` on, to pixels of the window that follow each other. */
static void copy_pixels(const flora_plan *p, const flora_tile *t, int64_t from, int64_t count, char *to, void *room) {
    const flora_field *x = &p->layer->x;
    const int64_t channels = p->layer->c_in, pixel = p->h_stride[p->layer->ndim - 1];
    int64_t step = flora_pixel_stride(&x->pixels), channel = x->channel;
    for (int64_t run; count > 0; count -= run, from += run, to = reals(p, to, run * pixel)) {
        const int64_t offset = flora_pixel_at(&x->pixels, from, &run);
        const void *source = field_at(p, x, t->image, t->group * channels, offset);
        run = flora_min(flora_min(run, count), p->tile);
        if (channel == 1 || channels == 1) {
            p->kernels->widen(to, pixel, source, step, 1, run, channels);
            continue;
        }
        if (p->kernels->act_size != p->kernels->real_size) {
            p->kernels->widen(room, p->tile, source, channel, step, channels, run);
            p->kernels->pack(to, pixel, room, 1, p->tile, run, channels, 1.0);
        } else {
            p->kernels->pack(to, pixel, source, step, channel, run, channels, 1.0);
        }
    }
}

/* Fills padded positions [begin, end) of the last mode, of a line whose first pixel in x is `from`, or -1 for zeros. */
static void fill_line(const flora_plan *p, const flora_tile *t, int64_t from, int64_t begin, int64_t end, char *to,
                      void *room) {
    const flora_layer *layer = p->layer;
    const int last = layer->ndim - 1;
    const int64_t first = layer->geometry.padding[last][0], past = first + layer->in[last], pixel = p->h_stride[last];
    for (int64_t i = begin, run; i < end; i += run, to = reals(p, to, run * pixel)) {
        const int64_t source = flora_pad_source(layer->geometry.mode, i - first, layer->in[last]);
        run = from < 0 ? end - i : flora_min(end, i < first ? first : i < past ? past : end) - i;
        if (from < 0 || source < 0) {
            memset(to, 0, (size_t)(run * pixel) * p->kernels->real_size);
        } else {
            run = i < first || i >= past ? 1 : run;
            copy_pixels(p, t, from + source, run, to, room);
        }
    }
}

/* The first pixel in x of line `i` of a window, whose padded positions of mode 0 are `rows` from `begin` on; -1: zeros.
 */
static int64_t line_source(const flora_layer *layer, int64_t begin, int64_t rows, int64_t i) {
    int64_t from = 0, step = layer->in[layer->ndim - 1];
    for (int mode = layer->ndim - 2; mode >= 0; mode--) {
        const int64_t extent = mode == 0 ? rows : layer->padded[mode], at = i % extent + (mode == 0 ? begin : 0);
        const int64_t source =
            flora_pad_source(layer->geometry.mode, at - layer->geometry.padding[mode][0], layer->in[mode]);
        if (source < 0)
            return -1;
        i /= extent;
        from += source * step;
        step *= layer->in[mode];
    }
    return from;
}

/* Moves the window to a tile's output positions and on, unless it has them already, and tells the tile where it is. */
void flora_move_window(const flora_plan *p, int chunk, flora_window *w, flora_tile *t) {
    const flora_layer *layer = p->layer;
    const int last = layer->ndim - 1;
    const int64_t first = t->first / row_pixels(layer), end = (t->first + t->pixels - 1) / row_pixels(layer) + 1;
    const int64_t slice = t->image * layer->groups + t->group;
    if (w->slice != slice || first < w->begin || end > w->end) {
        *w = (flora_window){.slice = slice, .begin = first, .end = flora_min(first + p->window_rows, layer->out[0])};
        void *window = in_room(p, chunk, p->window), *room = in_room(p, chunk, p->line);
        const int64_t begin = first * layer->geometry.stride[0], rows = padded_rows(layer, w->end - first);
        const int64_t length = layer->padded[last];
        if (last == 0)
            fill_line(p, t, 0, begin, begin + rows, window, room);
        else
            for (int64_t i = 0; i < rows * (layer->padded_pixels / layer->padded[0] / length); i++)
                fill_line(p, t, line_source(layer, begin, rows, i), 0, length,
                          reals(p, window, i * p->h_stride[last - 1]), room);
    }
    t->window = w->begin * layer->geometry.stride[0] * p->h_stride[0];
}

/* The core ----------------------------------------------------------------------------------------------------------*/

/* A core c_in deep is large, and its taps are next to each other in memory: packed with the taps inside, it is read in
 * squares, and so is its gradient written. */

/* Whether the taps of a core follow each other in memory. */
static int dense_taps(const flora_layer *layer, const flora_view *core) {
    int64_t stride = 1;
    int dense = 1;
    for (int mode = layer->ndim - 1; mode >= 0; mode--) {
        dense = dense && (layer->kernel[mode] == 1 || core->strides[2 + mode] == stride);
        stride *= layer->kernel[mode];
    }
    return dense;
}

/* to (outer, taps, width) = the core with its mode `outer` first, then the taps, then the other mode, padded */
static void pack_taps_inside(const flora_plan *p, char *to, int outer, int64_t width) {
    const flora_layer *layer = p->layer;
    const flora_view *core = layer->core;
    const int64_t inner = core->strides[1 - outer], run = dense_taps(layer, core) ? layer->taps : 1;
    for (int64_t i = 0; i < core->shape[outer]; i++)
        for (int64_t tap = 0; tap < layer->taps; tap += run)
            p->kernels->pack(reals(p, to, (i * layer->taps + tap) * width), width,
                             reals(p, core->data, i * core->strides[outer] + flora_core_tap(layer, core, tap)), 1,
                             inner, run, core->shape[1 - outer], 1.0);
}

/* (c_in, taps, out_w), the core of the forward convolution */
void flora_pack_long_core(const flora_plan *p) {
    pack_taps_inside(p, at(p, p->core), 1, p->out_w);
}

/* (r_out, taps, in_w), the core of the transposed convolution */
void flora_pack_long_core_t(const flora_plan *p) {
    pack_taps_inside(p, at(p, p->core_t), 0, p->in_w);
}

/* Rows [begin, end) of mode out of the core's gradient from the sums (r_out, taps, in_w) of all chunks. */
void flora_add_up_long_core(const flora_plan *p, int chunk, int64_t begin, int64_t end) {
    const flora_layer *layer = p->layer;
    const flora_view *d_core = layer->d_core;
    const int64_t taps = layer->taps, part = p->sums_size / (int64_t)p->kernels->real_size;
    const int dense = dense_taps(layer, d_core);
    for (int64_t i = begin; i < end; i++) {
        char *sums = reals(p, in_sums(p, 0, p->d_core), i * taps * p->in_w);
        for (int64_t c = 0; dense && c < layer->c_in; c += p->tile) {
            const int64_t count = flora_min(p->tile, layer->c_in - c), width = flora_round_up(taps, p->lanes);
            void *summed = in_room(p, chunk, p->summed_taps), *turned = in_room(p, chunk, p->turned_taps),
                 *to = reals(p, d_core->data, i * d_core->strides[0] + c * d_core->strides[1]);
            p->kernels->sum(summed, p->tile, 1, reals(p, sums, c), p->in_w, p->chunks, part, taps, count, 1.0);
            p->kernels->transpose(turned, width, summed, p->tile, taps, count);
            p->kernels->copy(to, d_core->strides[1], turned, width, 1, count, taps);
        }
        for (int64_t tap = 0; !dense && tap < taps; tap++)
            p->kernels->sum(reals(p, d_core->data, i * d_core->strides[0] + flora_core_tap(layer, d_core, tap)), 0,
                            d_core->strides[1], reals(p, sums, tap * p->in_w), p->in_w, p->chunks, part, 1, layer->c_in,
                            1.0);
    }
}
