/* A layer without input factor: the core's convolution runs on x itself, c_in channels deep.
 *
 * Its padded image would be as large as x, so each chunk has a window of it in its room: the padded positions of the
 * first spatial mode that some output positions depend on, whole in the other modes, small enough for the second-level
 * cache. It lies as x does, channels last or plane by plane, and moves on when a tile needs more. See tucker_plan.h. */
#include "tucker_plan.h"

#include <string.h>

enum {
    WINDOW_BYTES = 256 << 10, /* of a window, about: a quarter of a usual second-level cache */
    LINE_BYTES = 64
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
    const int by_rows = layer->x.channel == 1;
    const int64_t inner = layer->padded_pixels / layer->padded[0];
    const int64_t tile_rows = flora_min(layer->out[0], (p->out_tile - 1) / row_pixels(layer) + 2);
    const int64_t fits = WINDOW_BYTES / (int64_t)p->kernels->real_size / flora_max(1, layer->c_in * inner);
    const int64_t rows = (fits - padded_rows(layer, 1)) / layer->geometry.stride[0] + 1;
    p->window_rows = flora_min(layer->out[0], flora_max(tile_rows, rows));
    const int64_t pixels = padded_rows(layer, p->window_rows) * inner;
    p->h_stride[layer->ndim - 1] = by_rows ? layer->c_in : 1;
    for (int mode = layer->ndim - 1; mode > 0; mode--)
        p->h_stride[mode - 1] = p->h_stride[mode] * layer->padded[mode];
    /* an odd number of cache lines from plane to plane, so that they share no set of the first level */
    const int64_t line = LINE_BYTES / (int64_t)p->kernels->real_size;
    p->h_channel = by_rows ? 1 : ((pixels + line - 1) / line | 1) * line;
    p->window_size = by_rows ? pixels * layer->c_in : layer->c_in * p->h_channel;
    p->window_lines = layer->ndim == 1 ? 1 : pixels / layer->padded[layer->ndim - 1];
}

/* A line of a window, the modes but the last: where it is, and where its source is in x, counted in pixels; -1: zero */
typedef struct {
    int64_t to, from;
} line;

size_t flora_window_line_size(void) {
    return sizeof(line);
}

/* The lines of the window whose first padded position of mode 0 is `begin`, with `rows` of them. */
static int64_t find_lines(const flora_plan *p, int64_t begin, int64_t rows, line *lines) {
    const flora_layer *layer = p->layer;
    const int last = layer->ndim - 1;
    int64_t count = rows;
    if (last == 0) {
        lines[0] = (line){0};
        return 1;
    }
    for (int mode = 1; mode < last; mode++)
        count *= layer->padded[mode];
    for (int64_t i = 0; i < count; i++) {
        int64_t rest = i, step = layer->in[last], from = 0;
        int zero = 0;
        lines[i].to = i * p->h_stride[last - 1];
        for (int mode = last - 1; mode >= 0; mode--) {
            const int64_t extent = mode == 0 ? rows : layer->padded[mode];
            const int64_t at = rest % extent + (mode == 0 ? begin : 0);
            const int64_t source =
                flora_pad_source(layer->geometry.mode, at - layer->geometry.padding[mode][0], layer->in[mode]);
            rest /= extent;
            zero = zero || source < 0;
            from += source * step;
            step *= layer->in[mode];
        }
        lines[i].from = zero ? -1 : from;
    }
    return count;
}

/* Copies `count` pixels of x, from its pixel `from` on, to pixels of the window that follow each other. */
static void copy_pixels(const flora_plan *p, const flora_tile *t, int64_t channel, int64_t channels, int64_t from,
                        int64_t count, char *to) {
    const flora_field *x = &p->layer->x;
    const int64_t step = flora_pixel_stride(&x->pixels), pixel = p->h_stride[p->layer->ndim - 1];
    for (int64_t run; count > 0; count -= run, from += run, to = reals(p, to, run * pixel)) {
        const int64_t offset = flora_pixel_at(&x->pixels, from, &run);
        const char *source = field_at(p, x, t->image, t->group * p->layer->c_in + channel, offset);
        run = flora_min(run, count);
        if (p->h_channel == 1)
            p->kernels->widen(to, pixel, source, step, 1, run, channels);
        else
            p->kernels->widen(to, p->h_channel, source, x->channel, step, channels, run);
    }
}

static void clear_pixels(const flora_plan *p, int64_t channels, int64_t count, char *to) {
    const size_t real = p->kernels->real_size;
    if (p->h_channel == 1)
        memset(to, 0, (size_t)(count * channels) * real);
    else
        for (int64_t c = 0; c < channels; c++)
            memset(reals(p, to, c * p->h_channel), 0, (size_t)count * real);
}

/* Fills padded positions [begin, end) of a line's last mode for some channels. */
static void fill_line(const flora_plan *p, const flora_tile *t, const line *l, int64_t begin, int64_t end,
                      int64_t channel, int64_t channels, char *to) {
    const flora_layer *layer = p->layer;
    const int last = layer->ndim - 1;
    const int64_t before = layer->geometry.padding[last][0], pixel = p->h_stride[last];
    for (int64_t i = begin, run; i < end; i += run, to = reals(p, to, run * pixel)) {
        const int64_t source = flora_pad_source(layer->geometry.mode, i - before, layer->in[last]);
        if (l->from < 0 || source < 0) {
            run = l->from < 0 || i >= before ? end - i : flora_min(end, before) - i;
            clear_pixels(p, channels, run, to);
        } else {
            const int inside = i >= before && i < before + layer->in[last];
            run = inside ? flora_min(end, before + layer->in[last]) - i : 1;
            copy_pixels(p, t, channel, channels, l->from + source, run, to);
        }
    }
}

/* Moves the window to a tile's output positions and on, unless it has them already, and tells the tile where it is. */
void flora_move_window(const flora_plan *p, int chunk, flora_window *w, flora_tile *t) {
    const flora_layer *layer = p->layer;
    const int64_t first = t->first / row_pixels(layer), last = (t->first + t->pixels - 1) / row_pixels(layer);
    const int64_t slice = t->image * layer->groups + t->group;
    if (w->slice != slice || first < w->begin || last >= w->end) {
        *w = (flora_window){.slice = slice, .begin = first, .end = flora_min(first + p->window_rows, layer->out[0])};
        line *lines = in_room(p, chunk, p->lines);
        char *window = in_room(p, chunk, p->window);
        const int64_t begin = first * layer->geometry.stride[0], rows = padded_rows(layer, w->end - first);
        const int64_t count = find_lines(p, begin, rows, lines);
        const int whole = layer->ndim > 1;
        const int64_t from = whole ? 0 : begin, to = whole ? layer->padded[layer->ndim - 1] : begin + rows;
        const int64_t channels = p->h_channel == 1 ? layer->c_in : 1; /* plane by plane, so that x is read in order */
        for (int64_t c = 0; c < layer->c_in; c += channels)
            for (int64_t i = 0; i < count; i++)
                fill_line(p, t, &lines[i], from, to, c, channels, reals(p, window, c * p->h_channel + lines[i].to));
    }
    t->window = w->begin * layer->geometry.stride[0] * p->h_stride[0];
}
