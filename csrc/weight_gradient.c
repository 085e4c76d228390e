/* The weight gradient of a grouped convolution, for groups of few channels (depthwise above all).
 *
 * Types: x and dy act, d_weight real; sums real.
 *     dW[o, c, tap] = Σ_image Σ_pixel dy[image, o, pixel] · x[image, group(o)·width + c, pixel at tap]
 * The naive version is flora/reference/conv.py's conv_weight_gradient.
 *
 * A general convolution is a matrix product with the weight gradient as its result; here there is nothing to share
 * between channels, so the vector runs over them: LANES output channels are taken together, their planes of dy, and of
 * the input channels that they see, copied to scratch as (pixels, LANES), x with its padding. One body then serves
 * every layout, stride, dilation, kernel and number of spatial modes, and planes of 7 × 7 waste no lane.
 *
 * A task is a block of LANES output channels in some of the images. How the images are cut depends on the extents
 * alone, and the parts are added in order, so the result does not depend on the number of threads.
 */
#include "parallel.h"
#include "tucker.h"

#include <string.h>

enum {
    MODES = FLORA_MAX_SPATIAL, /* fewer spatial modes get leading ones of extent 1 */
    TASKS = 16,                /* blocks are cut by images until there are as many tasks as this */
    MOST_LANES = 16,           /* floats in the widest vector, 64 bytes */
    LINES = 8                  /* lines of dy at a time, so that what they see of x stays in the first-level cache */
};

typedef struct {
    const flora_kernels *kernels;
    const flora_view *d_weight, *dy, *x;
    flora_scratch scratch;
    int64_t batch, width, d_out, outputs; /* width: input channels of a group; outputs: output channels of a group */
    int64_t in[MODES], padded[MODES], out[MODES], kernel[MODES];
    int64_t x_stride[MODES], dy_stride[MODES]; /* of the caller's views */
    int64_t before[MODES], stride[MODES], dilation[MODES];
    flora_padding_mode mode;
    int64_t rows, blocks, parts; /* lines of taps; blocks of output channels; parts of the batch */
    int chunks;
    size_t row_at; /* (rows) int64: where a line of taps starts in a padded tile */
    size_t sums;   /* (parts, blocks, width, taps, LANES) */
    size_t rooms, x_tile, dy_tile, line, turned;
    int64_t room_size;
} gradient;

static int64_t taps_of(const gradient *g) {
    return g->rows * g->kernel[MODES - 1];
}

static char *reals(const gradient *g, size_t offset, int64_t n) {
    return g->scratch.base + offset + n * (int64_t)g->kernels->real_size;
}

static char *in_room(const gradient *g, int chunk, size_t offset) {
    return g->scratch.base + g->rooms + chunk * g->room_size + offset;
}

static char *element(const gradient *g, void *base, int64_t n) {
    return (char *)base + n * (int64_t)g->kernels->real_size;
}

/* tile (pixels, LANES) = one line of `view` from `offset` on: `pixels` of the `count` channels that are named.
 */
static void load_line(const gradient *g, int chunk, const flora_view *view, int64_t offset, int64_t pixels,
                      int64_t pixel_stride, const int64_t *channels, int64_t count, char *tile) {
    const flora_kernels *k = g->kernels;
    if (pixels == 0)
        return;
    const int64_t lanes = k->lanes, stride = view->strides[1];
    const int64_t line_w = flora_round_up(pixels, lanes);
    const int64_t step = count > 1 ? channels[1] - channels[0] : 1;
    int even = 1;
    for (int64_t q = 1; q < count; q++)
        even &= channels[q] - channels[q - 1] == step;
    const size_t size = k->act_size;
    if (even && step * stride == 1) { /* channels last: pixels as rows, as the tile has them */
        k->widen(tile, lanes, flora_at(view->data, offset + channels[0], size), pixel_stride, 1, pixels, count);
        return;
    }
    char *line = in_room(g, chunk, g->line), *turned = in_room(g, chunk, g->turned);
    if (even)
        k->widen(line, line_w, flora_at(view->data, offset + channels[0] * stride, size), step * stride, pixel_stride,
                 count, pixels);
    else
        for (int64_t q = 0; q < count; q++)
            k->widen(element(g, line, q * line_w), line_w, flora_at(view->data, offset + channels[q] * stride, size), 0,
                     pixel_stride, 1, pixels);
    k->transpose(turned, lanes, line, line_w, lanes, pixels);
    memcpy(tile, turned, (size_t)(pixels * lanes) * k->real_size);
}

/* x_tile (*padded, LANES) of one image, the halo by the padding mode. In mode zeros the halo is zero already. */
static void load_x(const gradient *g, int chunk, int64_t image, const int64_t *channels, int64_t count) {
    const int64_t lanes = g->kernels->lanes, *padded = g->padded;
    char *tile = in_room(g, chunk, g->x_tile);
    for (int64_t d = 0; d < padded[0]; d++)
        for (int64_t h = 0; h < padded[1]; h++) {
            const int64_t from_d = flora_pad_source(g->mode, d - g->before[0], g->in[0]);
            const int64_t from_h = flora_pad_source(g->mode, h - g->before[1], g->in[1]);
            if (from_d < 0 || from_h < 0)
                continue;
            char *line = element(g, tile, (d * padded[1] + h) * padded[2] * lanes);
            load_line(g, chunk, g->x, image * g->x->strides[0] + from_d * g->x_stride[0] + from_h * g->x_stride[1],
                      g->in[2], g->x_stride[2], channels, count, element(g, line, g->before[2] * lanes));
            for (int64_t w = 0; g->mode != FLORA_PAD_ZEROS && w < padded[2]; w++) {
                const int64_t from = flora_pad_source(g->mode, w - g->before[2], g->in[2]) + g->before[2];
                if (from != w)
                    memcpy(element(g, line, w * lanes), element(g, line, from * lanes),
                           (size_t)lanes * g->kernels->real_size);
            }
        }
}

static void load_dy(const gradient *g, int chunk, int64_t image, const int64_t *channels, int64_t count) {
    char *tile = in_room(g, chunk, g->dy_tile);
    for (int64_t d = 0; d < g->out[0]; d++)
        for (int64_t h = 0; h < g->out[1]; h++)
            load_line(g, chunk, g->dy, image * g->dy->strides[0] + d * g->dy_stride[0] + h * g->dy_stride[1], g->out[2],
                      g->dy_stride[2], channels, count,
                      element(g, tile, (d * g->out[1] + h) * g->out[2] * g->kernels->lanes));
}

/* sums (taps, LANES) += the products of the two tiles */
static void add_image(const gradient *g, int chunk, char *sums) {
    const int64_t lanes = g->kernels->lanes;
    const int64_t dy_line = g->out[2] * lanes, x_line = g->padded[2] * lanes;
    flora_tap_sums call = {.pixels = g->out[2],
                           .dy_line = dy_line,
                           .x_line = g->stride[1] * x_line,
                           .x_pixel = g->stride[2] * lanes,
                           .rows = g->rows,
                           .columns = g->kernel[2],
                           .row_at = (const int64_t *)(void *)(g->scratch.base + g->row_at),
                           .tap_step = g->dilation[2] * lanes,
                           .sums = sums};
    for (int64_t d = 0; d < g->out[0]; d++)
        for (int64_t h = 0; h < g->out[1]; h += LINES) {
            call.lines = flora_min(LINES, g->out[1] - h);
            call.dy = element(g, in_room(g, chunk, g->dy_tile), (d * g->out[1] + h) * dy_line);
            call.x =
                element(g, in_room(g, chunk, g->x_tile), (d * g->stride[0] * g->padded[1] + h * g->stride[1]) * x_line);
            g->kernels->tap_sums(&call);
        }
}

static void gradient_chunk(int chunk, void *gradient_) {
    const gradient *g = gradient_;
    const int64_t lanes = g->kernels->lanes, taps = taps_of(g), tasks = g->blocks * g->parts;
    memset(in_room(g, chunk, 0), 0, (size_t)g->room_size); /* the halo, and lanes without a channel */
    for (int64_t task = flora_chunk_begin(tasks, chunk, g->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, g->chunks); task++) {
        const int64_t block = task % g->blocks, part = task / g->blocks;
        const int64_t first = block * lanes, count = flora_min(lanes, g->d_out - first);
        int64_t outputs[MOST_LANES], inputs[MOST_LANES];
        char *sums = reals(g, g->sums, task * g->width * taps * lanes);
        memset(sums, 0, (size_t)(g->width * taps * lanes) * g->kernels->real_size);
        for (int64_t q = 0; q < count; q++)
            outputs[q] = first + q;
        for (int64_t image = g->batch * part / g->parts; image < g->batch * (part + 1) / g->parts; image++) {
            load_dy(g, chunk, image, outputs, count);
            for (int64_t c = 0; c < g->width; c++) {
                for (int64_t q = 0; q < count; q++)
                    inputs[q] = outputs[q] / g->outputs * g->width + c;
                load_x(g, chunk, image, inputs, count);
                add_image(g, chunk, element(g, sums, c * taps * lanes));
            }
        }
    }
}

/* d_weight = the sums of all parts, one output channel after another */
static void write_gradient(const gradient *g) {
    const flora_view *view = g->d_weight;
    const int64_t lanes = g->kernels->lanes, taps = taps_of(g);
    const int64_t part = g->blocks * g->width * taps * lanes, size = (int64_t)g->kernels->real_size;
    const int ndim = view->ndim - 2;
    for (int64_t block = 0; block < g->blocks; block++)
        for (int64_t c = 0; c < g->width; c++)
            for (int64_t tap = 0; tap < taps; tap++) {
                int64_t rest = tap, to = block * lanes * view->strides[0] + c * view->strides[1];
                for (int mode = ndim - 1; mode >= 0; mode--) {
                    to += rest % view->shape[2 + mode] * view->strides[2 + mode];
                    rest /= view->shape[2 + mode];
                }
                g->kernels->sum((char *)view->data + to * size, 0, view->strides[0],
                                reals(g, g->sums, ((block * g->width + c) * taps + tap) * lanes), 0, g->parts, part, 1,
                                flora_min(lanes, g->d_out - block * lanes), 1.0);
            }
}

static flora_status check(gradient *g, const flora_view *d_weight, const flora_view *dy, const flora_view *x,
                          const flora_geometry *geometry, char *error) {
    flora_status status;
    const int ndim = geometry->ndim;
    if ((status = flora_check_geometry(geometry, error)) != FLORA_OK ||
        (status = flora_expect_ndim(d_weight, "d_weight", ndim + 2, error)) != FLORA_OK ||
        (status = flora_expect_ndim(dy, "dy", ndim + 2, error)) != FLORA_OK ||
        (status = flora_expect_ndim(x, "x", ndim + 2, error)) != FLORA_OK)
        return status;
    g->batch = x->shape[0], g->width = d_weight->shape[1], g->d_out = d_weight->shape[0];
    if (g->d_out % geometry->groups != 0)
        return flora_fail(error, FLORA_BAD_SHAPE, "groups=%lld must divide the %lld output channels of d_weight",
                          (long long)geometry->groups, (long long)g->d_out);
    g->outputs = g->d_out / geometry->groups;
    g->mode = geometry->mode;
    int64_t x_shape[FLORA_MAX_NDIM] = {g->batch, geometry->groups * g->width};
    int64_t dy_shape[FLORA_MAX_NDIM] = {g->batch, g->d_out};
    for (int i = 0; i < MODES; i++) {
        g->in[i] = g->padded[i] = g->out[i] = g->kernel[i] = g->stride[i] = g->dilation[i] = 1;
        g->before[i] = g->x_stride[i] = g->dy_stride[i] = 0;
    }
    for (int i = 0; i < ndim; i++) {
        const int to = MODES - ndim + i;
        g->in[to] = x->shape[2 + i], g->kernel[to] = d_weight->shape[2 + i];
        g->before[to] = geometry->padding[i][0];
        g->stride[to] = geometry->stride[i], g->dilation[to] = geometry->dilation[i];
        g->x_stride[to] = x->strides[2 + i], g->dy_stride[to] = dy->strides[2 + i];
        status = flora_check_spatial(geometry, i, g->in[to], g->kernel[to], &g->padded[to], &g->out[to], error);
        if (status != FLORA_OK)
            return status;
        x_shape[2 + i] = g->in[to], dy_shape[2 + i] = g->out[to];
    }
    int64_t padded = 1, taps = g->width;
    for (int i = 0; i < MODES; i++)
        if (__builtin_mul_overflow(padded, g->padded[i], &padded) || __builtin_mul_overflow(taps, g->kernel[i], &taps))
            return flora_fail(error, FLORA_BAD_SHAPE, "a padded extent of %lld makes the input too large",
                              (long long)g->padded[i]);
    const flora_dtype act = x->dtype, real = flora_compute_dtype(act);
    if ((status = flora_expect(x, "x", act, ndim + 2, x_shape, error)) != FLORA_OK ||
        (status = flora_expect(dy, "dy", act, ndim + 2, dy_shape, error)) != FLORA_OK ||
        (status = flora_expect(d_weight, "d_weight", real, ndim + 2, d_weight->shape, error)) != FLORA_OK)
        return status;
    const flora_named outputs[] = {{d_weight, "d_weight"}}, inputs[] = {{dy, "dy"}, {x, "x"}};
    return flora_expect_disjoint(outputs, 1, inputs, 2, error);
}

/* Everything that depends on the extents: how the work is cut and where scratch lies. */
static void plan(gradient *g) {
    const size_t real = g->kernels->real_size;
    const int64_t lanes = g->kernels->lanes;
    g->rows = g->kernel[0] * g->kernel[1];
    g->blocks = (g->d_out + lanes - 1) / lanes;
    g->parts = flora_max(1, flora_min(g->batch, (TASKS + g->blocks - 1) / flora_max(1, g->blocks)));
    const double pixels = (double)g->batch * (double)g->out[0] * (double)g->out[1] * (double)g->out[2];
    g->chunks =
        flora_chunks(g->blocks * g->parts, 2 * pixels * (double)g->d_out * (double)g->width * (double)taps_of(g));
    g->row_at = flora_reserve(&g->scratch, g->rows, 1, 1, sizeof(int64_t));
    g->sums = flora_reserve(&g->scratch, g->parts * g->blocks, g->width * taps_of(g), lanes, real);
    flora_scratch room = {.size = 0};
    const int64_t longest = flora_round_up(flora_max(g->in[2], g->out[2]), lanes);
    const int64_t images = flora_min(g->batch, 1); /* no tiles for an empty batch */
    g->x_tile = flora_reserve(&room, images * g->padded[0] * g->padded[1], g->padded[2], lanes, real);
    g->dy_tile = flora_reserve(&room, images * g->out[0] * g->out[1], g->out[2], lanes, real);
    g->line = flora_reserve(&room, longest, lanes, 1, real);
    g->turned = flora_reserve(&room, longest, lanes, 1, real);
    g->room_size = (int64_t)room.size;
    g->rooms = flora_reserve(&g->scratch, g->chunks, g->room_size, 1, 1);
    g->scratch.overflow |= room.overflow;
}

flora_status flora_conv_weight_gradient(const flora_view *d_weight, const flora_view *dy, const flora_view *x,
                                        const flora_geometry *geometry, char error[FLORA_ERROR_SIZE]) {
    gradient g = {.kernels = flora_isa_kernels(x->dtype), .d_weight = d_weight, .dy = dy, .x = x};
    flora_status status = check(&g, d_weight, dy, x, geometry, error);
    if (status != FLORA_OK || g.d_out == 0 || g.width == 0)
        return status;
    plan(&g);
    status = flora_allocate(&g.scratch, error);
    if (status != FLORA_OK)
        return status;
    int64_t *row_at = (int64_t *)(void *)(g.scratch.base + g.row_at);
    for (int64_t row = 0; row < g.rows; row++)
        row_at[row] = ((row / g.kernel[1]) * g.dilation[0] * g.padded[1] + (row % g.kernel[1]) * g.dilation[1]) *
                      g.padded[2] * g.kernels->lanes;
    flora_parallel(g.chunks, gradient_chunk, &g);
    write_gradient(&g);
    flora_release(&g.scratch);
    return FLORA_OK;
}
