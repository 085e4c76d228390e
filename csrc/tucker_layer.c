/* The Tucker update of a Linear or convolution, applied without forming it.
 *
 * Types: activations act, everything else real (float, or double for float64); all sums real.
 * Source: FLoRA, arXiv 2405.14739. For a pixel, with taps of the core's kernel modes:
 *     h = x · U_in              k = Σ_tap h(at tap) · G_tapᵀ        y += s · k · U_outᵀ
 * and backward
 *     dk = s · dy · U_out       dh = Σ_tap dk(at tap) · G_tap        dx += dh · U_inᵀ
 *     dU_out = s · dyᵀ · k      dG_tap = dkᵀ · h(at tap)             dU_in = xᵀ · dh
 * The naive versions are flora/reference/tucker.py's tucker_linear_* and tucker_conv_*.
 *
 * Work is cut into tiles of pixels of one image and one group. Everything that has `rank` columns lives in tiles with
 * channels last, padded to the vector width, in scratch; x, y, dy and dx are read and written where they are, once.
 * A pointwise layer (a Linear, or a 1×1 convolution) does a whole tile, forward or backward, in one go. Otherwise h is
 * a padded image of its own, and backward runs the small transposed convolution dk → dh between the two halves. Without
 * U_in that image is x, padded, of which there are windows only, and dx += dh.
 *
 * Every element of y, dx and h is computed by one task in one order. Gradients of the parameters are sums over pixels:
 * each chunk of tasks has its own, and they are added in the order of the chunks.
 */
#include "tucker_layer.h"
#include "parallel.h"
#include "tucker_plan.h"

#include <string.h>

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

/* Tiles as tasks --------------------------------------------------------------------------------------------------- */

static int64_t tile_count(const flora_plan *p, int64_t pixels, int64_t most) {
    return p->layer->batch * p->layer->groups * ((pixels + most - 1) / most);
}

static int64_t in_tiles(const flora_plan *p) {
    return tile_count(p, p->layer->in_pixels, p->in_tile);
}

static int64_t out_tiles(const flora_plan *p) {
    return tile_count(p, p->layer->out_pixels, p->out_tile);
}

/* The tile of a task: tiles of a group, groups of an image, images. */
static flora_tile tile_of(const flora_plan *p, int64_t task, int64_t pixels, int64_t most) {
    const int64_t tiles = (pixels + most - 1) / most, slice = task / tiles, first = task % tiles * most;
    return (flora_tile){.image = slice / p->layer->groups,
                        .group = slice % p->layer->groups,
                        .first = first,
                        .pixels = flora_min(most, pixels - first)};
}

static flora_tile in_tile_of(const flora_plan *p, int64_t task) {
    return tile_of(p, task, p->layer->in_pixels, p->in_tile);
}

static flora_tile out_tile_of(const flora_plan *p, int64_t task) {
    return tile_of(p, task, p->layer->out_pixels, p->out_tile);
}

typedef struct {
    const flora_plan *plan;
    void (*body)(int chunk, const flora_plan *p);
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
static void in_parallel(const flora_plan *p, void (*body)(int chunk, const flora_plan *p)) {
    loop l = {.plan = p, .body = body};
    flora_parallel(p->chunks, run_chunk, &l);
}

static void project_x(const flora_plan *p, const flora_tile *t, void *room, void *h_tile) {
    flora_sweep(p, &p->layer->x, t, p->layer->c_in, p->layer->r_in, room, h_tile, at(p, p->u_in), p->in_w, NULL, 0,
                NULL);
}

static void pad_chunk(int chunk, const flora_plan *p) {
    const int64_t lines = p->layer->batch * (p->layer->padded_pixels / p->layer->padded[p->layer->ndim - 1]);
    for (int64_t line = flora_chunk_begin(lines, chunk, p->chunks);
         line < flora_chunk_begin(lines, chunk + 1, p->chunks); line++)
        flora_pad_line(p, line);
}

/* h of all images, tile by tile, in zeros */
static void project_chunk(int chunk, const flora_plan *p) {
    const int64_t tasks = in_tiles(p);
    void *h_tile = in_room(p, chunk, p->h_tile), *block = in_room(p, chunk, p->block);
    if (p->layer->geometry.mode == FLORA_PAD_ZEROS)
        pad_chunk(chunk, p);
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const flora_tile t = in_tile_of(p, task);
        project_x(p, &t, block, h_tile);
        flora_store_h(p, &t, h_tile);
    }
}

/* The padded image h from x. */
static void project(flora_plan *p) {
    in_parallel(p, project_chunk);
    if (p->layer->geometry.mode != FLORA_PAD_ZEROS) /* which shows the interior, so that has to be there */
        in_parallel(p, pad_chunk);
}

/* k from h's tile: k = h · Gᵀ, or h itself without a core */
static const void *mix(const flora_plan *p, const flora_tile *t, const void *h_tile, void *k_tile) {
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

static void forward_chunk(int chunk, const flora_plan *p) {
    const flora_layer *layer = p->layer;
    const int64_t tasks = out_tiles(p);
    flora_window window = {.slice = -1};
    void *h_tile = in_room(p, chunk, p->h_tile), *k_tile = in_room(p, chunk, p->k_tile);
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        flora_tile t = out_tile_of(p, task);
        const void *k = k_tile;
        if (layer->pointwise) {
            project_x(p, &t, in_room(p, chunk, p->block), h_tile);
            if (p->h != NULL)
                flora_store_h(p, &t, h_tile);
            k = mix(p, &t, h_tile, k_tile);
        } else {
            if (p->windows)
                flora_move_window(p, chunk, &window, &t);
            flora_convolve(p, chunk, &t, k_tile);
            if (layer->k != NULL)
                flora_store_k(p, &t, k_tile);
        }
        const int64_t u = layer->y.planes ? t.group * layer->c_out * layer->r_out : t.group * layer->r_out * p->y_w;
        flora_expand(p, &layer->y, &t, layer->c_out, k, p->out_w, layer->r_out, reals(p, at(p, p->to_y), u), p->y_w,
                     in_room(p, chunk, p->turned));
    }
}

/* The second half of backward for one tile of input pixels: dU_in and dx from dh. */
static void finish_tile(const flora_plan *p, int chunk, const flora_tile *t, const void *dh_tile) {
    const flora_layer *layer = p->layer;
    if (layer->d_u_in != NULL)
        flora_sweep(p, &layer->x, t, layer->c_in, layer->r_in, in_room(p, chunk, p->block), NULL, NULL, p->in_w,
                    in_sums(p, chunk, p->d_u_in), flora_sums_w(p, &layer->x, layer->c_in, p->in_w), dh_tile);
    if (layer->dx.data != NULL)
        flora_expand(p, &layer->dx, t, layer->c_in, dh_tile, p->in_w, layer->r_in, at(p, p->to_dx), p->dx_w,
                     in_room(p, chunk, p->turned));
}

static void margins_chunk(int chunk, const flora_plan *p) {
    const int64_t slices = p->layer->batch * p->layer->groups;
    for (int64_t slice = flora_chunk_begin(slices, chunk, p->chunks);
         slice < flora_chunk_begin(slices, chunk + 1, p->chunks); slice++)
        flora_clear_margins(p, slice);
}

/* Output pixels: dk, dU_out and dG; for a pointwise layer also dh and all the rest. */
static void backward_chunk(int chunk, const flora_plan *p) {
    const flora_layer *layer = p->layer;
    const int64_t tasks = out_tiles(p);
    const int needs_k = layer->d_u_out != NULL, needs_h = needs_k || layer->d_core != NULL;
    void *h_tile = in_room(p, chunk, p->h_tile), *k_tile = in_room(p, chunk, p->k_tile);
    void *dh_tile = in_room(p, chunk, p->dh_tile), *block = in_room(p, chunk, p->block);
    const int needs_window = p->windows && ((needs_k && layer->k == NULL) || layer->d_core != NULL);
    flora_window window = {.slice = -1};
    memset(in_sums(p, chunk, 0), 0, (size_t)p->sums_size);
    if (p->gathers)
        margins_chunk(chunk, p);
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        flora_tile t = out_tile_of(p, task);
        const void *k = k_tile;
        if (needs_window)
            flora_move_window(p, chunk, &window, &t);
        void *dk = in_room(p, chunk, p->dk_tile);
        if (layer->pointwise && needs_h) {
            if (p->h != NULL)
                flora_load_h(p, &t, h_tile);
            else
                project_x(p, &t, block, h_tile);
            if (needs_k)
                k = mix(p, &t, h_tile, k_tile);
        } else if (needs_k && layer->k != NULL) {
            flora_load_k(p, &t, k_tile);
        } else if (needs_k) {
            flora_convolve(p, chunk, &t, k_tile);
        }
        const int64_t u = t.group * layer->c_out * p->out_w;
        const int64_t sum = flora_turned_sums(p, &layer->dy) ? t.group * layer->c_out : u;
        flora_sweep(p, &layer->dy, &t, layer->c_out, layer->r_out, block, dk, reals(p, at(p, p->u_out), u), p->out_w,
                    needs_k ? reals(p, in_sums(p, chunk, p->d_u_out), sum) : NULL,
                    flora_sums_w(p, &layer->dy, layer->groups * layer->c_out, p->out_w), k);
        if (!layer->pointwise) {
            if (layer->d_core != NULL)
                flora_core_gradient(p, chunk, &t, dk, in_sums(p, chunk, p->d_core));
            if (p->dk_size > 0)
                flora_store_dk(p, &t, dk);
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

static void transposed_chunk(int chunk, const flora_plan *p) {
    const flora_layer *layer = p->layer;
    const int64_t length = layer->padded[layer->ndim - 1], pieces = (length + LINE_TILE - 1) / LINE_TILE;
    const int64_t tasks = layer->batch * layer->groups * (layer->padded_pixels / length) * pieces;
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const int64_t begin = task % pieces * LINE_TILE;
        flora_transposed_line(p, task / pieces, begin, flora_min(begin + LINE_TILE, length),
                              in_room(p, chunk, p->line_taps_dk), in_room(p, chunk, p->line_taps_core));
    }
}

static void round_h_chunk(int chunk, const flora_plan *p) {
    const int64_t slices = p->layer->batch * p->layer->groups;
    for (int64_t slice = flora_chunk_begin(slices, chunk, p->chunks);
         slice < flora_chunk_begin(slices, chunk + 1, p->chunks); slice++)
        flora_round_h(p, chunk, slice);
}

static void fold_chunk(int chunk, const flora_plan *p) {
    const int64_t slices = p->layer->batch * p->layer->groups;
    for (int64_t slice = flora_chunk_begin(slices, chunk, p->chunks);
         slice < flora_chunk_begin(slices, chunk + 1, p->chunks); slice++)
        flora_fold(p, slice);
}

static void finish_chunk(int chunk, const flora_plan *p) {
    const int64_t tasks = in_tiles(p);
    void *dh_tile = in_room(p, chunk, p->dh_tile);
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const flora_tile t = in_tile_of(p, task);
        for (int64_t c = 0; c < p->in_w; c += p->dh_w) {
            const int64_t width = flora_min(p->dh_w, p->in_w - c);
            if (p->gathers)
                flora_convolve_back(p, chunk, &t, c, width, dh_tile);
            else
                flora_load_dh(p, &t, c, width, dh_tile);
            if (p->windows)
                flora_add_dh(p, &t, c, flora_min(width, p->layer->c_in - c), dh_tile, width,
                             in_room(p, chunk, p->turned));
            else
                finish_tile(p, chunk, &t, dh_tile);
        }
    }
}

/* The sums of all chunks, rows [begin, end) of the gradient of a factor that meets `field`. */
static void add_up(const flora_plan *p, const flora_view *view, const flora_field *field, size_t sums, int64_t width,
                   int chunk, double scale) {
    const int64_t begin = flora_chunk_begin(view->shape[0], chunk, p->chunks);
    const int64_t end = flora_chunk_begin(view->shape[0], chunk + 1, p->chunks);
    if (begin >= end)
        return;
    void *to = flora_at(view->data, begin * view->strides[0], p->kernels->real_size);
    const int64_t part = p->sums_size / (int64_t)p->kernels->real_size;
    const int64_t sum_w = flora_sums_w(p, field, view->shape[0], width);
    if (flora_turned_sums(p, field))
        p->kernels->sum(to, view->strides[1], view->strides[0], reals(p, in_sums(p, 0, sums), begin), sum_w, p->chunks,
                        part, view->shape[1], end - begin, scale);
    else
        p->kernels->sum(to, view->strides[0], view->strides[1], reals(p, in_sums(p, 0, sums), begin * width), sum_w,
                        p->chunks, part, end - begin, view->shape[1], scale);
}

static void add_up_chunk(int chunk, const flora_plan *p) {
    const flora_layer *layer = p->layer;
    if (layer->d_u_in != NULL)
        add_up(p, layer->d_u_in, &layer->x, p->d_u_in, p->in_w, chunk, 1.0);
    if (layer->d_u_out != NULL)
        add_up(p, layer->d_u_out, &layer->dy, p->d_u_out, p->out_w, chunk, layer->scale);
    if (layer->d_core == NULL || layer->d_core->data == NULL)
        return;
    if (p->windows) {
        flora_add_up_long_core(p, chunk, flora_chunk_begin(layer->r_out, chunk, p->chunks),
                               flora_chunk_begin(layer->r_out, chunk + 1, p->chunks));
        return;
    }
    for (int64_t tap = flora_chunk_begin(layer->taps, chunk, p->chunks);
         tap < flora_chunk_begin(layer->taps, chunk + 1, p->chunks); tap++)
        p->kernels->sum(flora_at(layer->d_core->data, flora_core_tap(layer, layer->d_core, tap), p->kernels->real_size),
                        layer->d_core->strides[1], layer->d_core->strides[0],
                        reals(p, in_sums(p, 0, p->d_core), tap * layer->r_in * p->out_w), p->out_w, p->chunks,
                        p->sums_size / (int64_t)p->kernels->real_size, layer->r_in, layer->r_out, 1.0);
}

flora_status flora_layer_forward(const flora_layer *layer, char *error) {
    flora_plan p = {.chunks = 1};
    if (layer->batch == 0 || layer->r_in == 0)
        return FLORA_OK;
    if (flora_layer_is_few(layer))
        return flora_few_forward(layer, error);
    const size_t real = layer->kernels->real_size;
    const int projects = layer->u_in != NULL;
    flora_plan_common(&p, layer, layer->y.planes, !layer->pointwise && projects);
    p.chunks = flora_chunks(flora_max(in_tiles(&p), out_tiles(&p)), flora_layer_cost(layer));
    flora_plan_rooms(&p, 0);
    p.u_in = flora_reserve(&p.scratch, projects ? layer->c_in : 0, p.in_w, 1, real);
    p.to_y = flora_reserve(&p.scratch, layer->groups, layer->r_out, p.y_w, real);
    if (p.dots != NULL && !layer->pointwise)
        flora_plan_h_copies(&p, 0);
    flora_status status = flora_allocate(&p.scratch, error);
    if (status != FLORA_OK)
        return status;

    flora_place_taps(&p);
    if (projects)
        flora_pack_factor(&p, p.u_in, layer->u_in, &layer->x, 1, p.in_w, 1.0);
    flora_pack_core(&p);
    flora_pack_expand(&p, p.to_y, layer->u_out, &layer->y, layer->groups, p.y_w, layer->scale);
    if (!layer->pointwise && projects)
        project(&p);
    if (p.h_w > 0)
        in_parallel(&p, round_h_chunk);
    in_parallel(&p, forward_chunk);
    flora_release(&p.scratch);
    return FLORA_OK;
}

flora_status flora_layer_backward(const flora_layer *layer, char *error) {
    if (flora_layer_is_few(layer))
        return flora_few_backward(layer, error);
    flora_plan p = {.chunks = 1};
    const size_t real = layer->kernels->real_size;
    const int needs_h = layer->d_u_out != NULL || layer->d_core != NULL;
    const int needs_dh = layer->d_u_in != NULL || layer->dx.data != NULL;
    const int empty = layer->batch == 0 || layer->r_in == 0 || layer->r_out == 0; /* all gradients are zero */
    const int projects = needs_h && layer->u_in != NULL && layer->h == NULL && !empty;
    flora_scratch sums = {.size = 0};
    flora_plan_common(&p, layer, layer->dx.planes, projects && !layer->pointwise);
    p.chunks = flora_chunks(flora_max(in_tiles(&p), out_tiles(&p)), 2 * flora_layer_cost(layer));
    flora_plan_rooms(&p, needs_dh && !layer->pointwise ? layer->taps : 0);
    p.u_out = flora_reserve(&p.scratch, layer->groups * layer->c_out, p.out_w, 1, real);
    p.core_t = flora_reserve(&p.scratch, flora_taps_or_none(layer), layer->r_out, p.in_w, real);
    if (projects)
        p.u_in = flora_reserve(&p.scratch, layer->c_in, p.in_w, 1, real);
    if (layer->dx.data != NULL && !p.windows)
        p.to_dx = flora_reserve(&p.scratch, layer->r_in, p.dx_w, 1, real);
    if (!layer->pointwise && needs_dh)
        flora_plan_dk(&p);
    if (p.dots != NULL && !layer->pointwise && needs_h && !empty)
        flora_plan_h_copies(&p, layer->d_core != NULL);
    p.d_u_in = flora_reserve(&sums, layer->d_u_in != NULL ? flora_round_up(layer->c_in, p.lanes) : 0, p.in_w, 1, real);
    if (p.windows)
        p.d_core = flora_reserve(&sums, layer->d_core != NULL ? layer->r_out * layer->taps : 0, p.in_w, 1, real);
    else
        p.d_core = flora_reserve(&sums, layer->d_core != NULL ? layer->taps : 0, layer->r_in, p.out_w, real);
    p.d_u_out = flora_reserve(&sums, layer->d_u_out != NULL ? flora_round_up(layer->groups * layer->c_out, p.lanes) : 0,
                              p.out_w, 1, real);
    p.sums_size = (int64_t)sums.size;
    p.sums = flora_reserve(&p.scratch, p.chunks, p.sums_size, 1, 1);
    p.scratch.overflow |= sums.overflow;
    flora_status status = flora_allocate(&p.scratch, error);
    if (status != FLORA_OK)
        return status;

    flora_place_taps(&p);
    flora_pack_factor(&p, p.u_out, layer->u_out, &layer->dy, layer->groups, p.out_w, layer->scale);
    flora_pack_core(&p);
    flora_pack_core_t(&p);
    if (projects)
        flora_pack_factor(&p, p.u_in, layer->u_in, &layer->x, 1, p.in_w, 1.0);
    if (layer->dx.data != NULL && !p.windows)
        flora_pack_expand(&p, p.to_dx, layer->u_in, &layer->dx, 1, p.dx_w, 1.0);
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
