/* Sizes, places and packed factors of a call: what tucker_plan.h's struct holds. */
#include "tucker_plan.h"

#include <string.h>

/* The offset of a tap in a core with modes (r_out, r_in, *kernel); taps count in row-major order. */
int64_t flora_core_tap(const flora_layer *layer, const flora_view *core, int64_t tap) {
    int64_t offset = 0;
    for (int mode = layer->ndim - 1; mode >= 0; mode--) {
        offset += tap % layer->kernel[mode] * core->strides[2 + mode];
        tap /= layer->kernel[mode];
    }
    return offset;
}

/* Whole lines, if any fit in a tile. */
static int64_t whole_lines(int64_t most, int64_t line) {
    return line > 0 && line <= most ? most / line * line : most;
}

/* Packing ---------------------------------------------------------------------------------------------------------- */

/* A factor (groups · channels, ranks padded to width) as `sweep` wants it for `field`. */
void flora_pack_factor(const flora_plan *p, size_t to, const flora_view *u, const flora_field *field, int64_t groups,
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
void flora_pack_expand(const flora_plan *p, size_t to, const flora_view *u, const flora_field *field, int64_t groups,
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
void flora_pack_core(const flora_plan *p) {
    const flora_layer *layer = p->layer;
    const flora_view *core = layer->core;
    if (p->windows) {
        flora_pack_long_core(p);
        return;
    }
    for (int64_t tap = 0; core != NULL && tap < layer->taps; tap++) {
        void *to = reals(p, at(p, p->core), tap * p->core_tap);
        p->kernels->pack(to, p->out_w, flora_at(core->data, flora_core_tap(layer, core, tap), p->kernels->real_size),
                         core->strides[1], core->strides[0], layer->r_in, layer->r_out, 1.0);
        if (p->numbers > 1)
            p->dots->pair_rounded(to, p->out_w, to, p->out_w, layer->r_in, layer->r_out);
    }
}

/* (taps, r_out, in_w), the core of the transposed convolution */
void flora_pack_core_t(const flora_plan *p) {
    const flora_layer *layer = p->layer;
    const flora_view *core = layer->core;
    if (p->windows) {
        flora_pack_long_core_t(p);
        return;
    }
    for (int64_t tap = 0; core != NULL && tap < layer->taps; tap++) {
        void *to = reals(p, at(p, p->core_t), tap * p->core_t_tap);
        p->kernels->pack(to, p->in_w, flora_at(core->data, flora_core_tap(layer, core, tap), p->kernels->real_size),
                         core->strides[0], core->strides[1], layer->r_out, layer->r_in, 1.0);
        if (p->numbers > 1)
            p->dots->pair_rounded(to, p->in_w, to, p->in_w, layer->r_out, layer->r_in);
    }
}

/* Plans ------------------------------------------------------------------------------------------------------------ */

int64_t flora_taps_or_none(const flora_layer *layer) {
    return layer->core != NULL ? layer->taps : 0;
}

/* Multiplications of one pass over all pixels, of the whole layer. */
double flora_layer_cost(const flora_layer *layer) {
    const double in = layer->u_in != NULL ? (double)layer->in_pixels * (double)layer->c_in * (double)layer->r_in : 0;
    const double out = (double)layer->out_pixels * (double)layer->r_out;
    const double slices = (double)layer->batch * (double)layer->groups;
    return 2 * slices * (in + out * ((double)layer->c_out + (double)flora_taps_or_none(layer) * (double)layer->r_in));
}

/* Sizes and strides that forward and backward share. `spare_h`: h is wanted although the caller has none. */
void flora_plan_common(flora_plan *p, const flora_layer *layer, int planes, int spare_h) {
    const size_t real = layer->kernels->real_size;
    p->layer = layer;
    p->kernels = layer->kernels;
    p->windows = layer->u_in == NULL;
    p->dots = p->windows ? NULL : flora_isa_dots(layer->act, flora_layer_cost(layer));
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
    p->core_tap = p->windows ? p->out_w : layer->r_in * p->out_w;
    p->core_w = p->windows ? layer->taps * p->out_w : p->out_w;
    p->core_t_tap = p->windows ? p->in_w : layer->r_out * p->in_w;
    p->core_t_w = p->windows ? layer->taps * p->in_w : p->in_w;
    p->dh_w = p->windows ? flora_min(p->in_w, BLOCK) : p->in_w;

    /* h's own layout, or the caller's */
    int64_t pixel = layer->groups * layer->r_in, stride[FLORA_MAX_SPATIAL];
    p->h_channel = 1;
    for (int mode = layer->ndim - 1; mode >= 0; mode--) {
        p->h_stride[mode] = pixel;
        pixel *= layer->padded[mode];
    }
    p->h_batch = pixel;
    if (p->windows)
        flora_plan_window(p);
    if (layer->k != NULL)
        p->k_out = flora_pixels_of(layer->ndim, layer->out, layer->k->strides + 1);
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
    p->core = flora_reserve(&p->scratch, flora_taps_or_none(layer), layer->r_in, p->out_w, real);
    p->taps_a = flora_reserve(&p->scratch, layer->taps, 1, 1, sizeof(int64_t));
    p->taps_core = flora_reserve(&p->scratch, layer->taps, 1, 1, sizeof(int64_t));
}

/* The copies of h. The gradient of the core sums over pixels, which must be neighbours for it. */
void flora_plan_h_copies(flora_plan *p, int core_gradient) {
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
void flora_plan_dk(flora_plan *p) {
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
void flora_plan_rooms(flora_plan *p, int64_t line_taps) {
    const size_t real = p->kernels->real_size;
    flora_scratch room = {.size = 0};
    const int64_t width = flora_max(p->dh_w, p->out_w);
    p->h_tile = flora_reserve(&room, p->windows ? 0 : p->tile, p->in_w, 1, real);
    p->k_tile = flora_reserve(&room, p->tile, p->out_w, 1, real);
    p->dk_tile = flora_reserve(&room, p->tile, p->out_w, 1, real);
    p->dh_tile = flora_reserve(&room, p->tile, p->dh_w, 1, real);
    p->turned = flora_reserve(&room, p->tile, width, 1, real);
    if (p->dots != NULL)
        p->block = p->turned = flora_reserve(&room, flora_dots_room(p->tile, width), 1, 1, 1);
    else
        p->block = flora_reserve(&room, p->tile, BLOCK, 1, real);
    if (!p->layer->pointwise) {
        p->span = flora_reserve(&room, 2 * p->tile, width, 1, real);
        p->runs_h = flora_reserve(&room, p->tile, 1, 1, sizeof(int64_t));
        p->runs_dk = flora_reserve(&room, p->tile, 1, 1, sizeof(int64_t));
    }
    if (p->windows && p->layer->x.data != NULL) {
        p->window = flora_reserve(&room, p->window_pixels, p->h_stride[p->layer->ndim - 1], 1, real);
        p->line = flora_reserve(&room, p->kernels->act_size == real ? 0 : p->layer->c_in, p->tile, 1, real);
    }
    if (p->windows && p->layer->d_core != NULL) {
        const int64_t taps = flora_round_up(p->layer->taps, p->lanes);
        p->summed_taps = flora_reserve(&room, taps, p->tile, 1, real);
        p->turned_taps = flora_reserve(&room, p->tile, taps, 1, real);
    }
    p->line_taps_dk = flora_reserve(&room, line_taps, 1, 1, sizeof(int64_t));
    p->line_taps_core = flora_reserve(&room, line_taps, 1, 1, sizeof(int64_t));
    p->room_size = (int64_t)room.size;
    p->rooms = flora_reserve(&p->scratch, p->chunks, p->room_size, 1, 1);
    p->scratch.overflow |= room.overflow;
}

/* Where the taps are, once scratch exists. */
void flora_place_taps(flora_plan *p) {
    const flora_layer *layer = p->layer;
    int64_t *taps = at(p, p->taps_a), *core = at(p, p->taps_core);
    for (int64_t tap = 0; tap < layer->taps; tap++) {
        int64_t rest = tap, offset = 0;
        for (int mode = layer->ndim - 1; mode >= 0; mode--) {
            offset += rest % layer->kernel[mode] * layer->geometry.dilation[mode] * p->h_stride[mode];
            rest /= layer->kernel[mode];
        }
        taps[tap] = offset;
        core[tap] = tap * p->core_tap * p->numbers;
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
        core_t[tap] = tap * p->core_t_tap * p->numbers;
    }
    p->h = layer->h != NULL ? layer->h->data : p->owns_h ? at(p, p->h_scratch) : NULL;
}
