/* A Linear's Tucker update on few rows: a decoder's single token, or the last batch of an epoch.
 *
 * Types and algebra as in tucker_layer.c. What costs most there, for so few rows, is to pack the factors; here they are
 * used where they lie, by kernels/few.inc.h. One thread: it would take longer to wake another. */
#include "tucker_layer.h"

enum { MOST_ROWS = 4 };

/* A call: its rows as reals, and what they become. */
typedef struct {
    const flora_layer *layer;
    const flora_kernels *kernels;
    flora_scratch scratch;
    int64_t rows, in_w, out_w, rank_in_w, rank_out_w;
    size_t x, y, h, k, dk, dh, sum; /* (rows, …) each; x is also dx's, y dy's width */
} problem;

static int in_place(const flora_view *view) {
    return view == NULL || view->strides[1] == 1 || view->shape[1] <= 1;
}

int flora_layer_is_few(const flora_layer *layer) {
    const flora_view *const matrices[] = {layer->u_in,   layer->core,   layer->u_out,
                                          layer->d_u_in, layer->d_core, layer->d_u_out};
    if (layer->ndim != 0 || layer->in_pixels > MOST_ROWS || layer->in_pixels < 1 || layer->r_in < 1 || layer->r_out < 1)
        return 0;
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++)
        if (!in_place(matrices[i]))
            return 0;
    return 1;
}

static void *at(const problem *p, size_t offset) {
    return p->scratch.base + offset;
}

static flora_status prepare(problem *p, const flora_layer *layer, char *error) {
    const size_t real = layer->kernels->real_size;
    const int64_t lanes = layer->kernels->lanes;
    *p = (problem){.layer = layer,
                   .kernels = layer->kernels,
                   .rows = layer->in_pixels,
                   .in_w = flora_round_up(layer->c_in, lanes),
                   .out_w = flora_round_up(layer->c_out, lanes),
                   .rank_in_w = flora_round_up(layer->r_in, lanes),
                   .rank_out_w = flora_round_up(layer->r_out, lanes)};
    p->x = flora_reserve(&p->scratch, p->rows, p->in_w, 1, real);
    p->y = flora_reserve(&p->scratch, p->rows, p->out_w, 1, real);
    p->h = flora_reserve(&p->scratch, p->rows, p->rank_in_w, 1, real);
    p->k = flora_reserve(&p->scratch, p->rows, p->rank_out_w, 1, real);
    p->dk = flora_reserve(&p->scratch, p->rows, p->rank_out_w, 1, real);
    p->dh = flora_reserve(&p->scratch, p->rows, p->rank_in_w, 1, real);
    p->sum = flora_reserve(&p->scratch, p->rows, flora_max(p->in_w, p->out_w), 1, real);
    return flora_allocate(&p->scratch, error);
}

static char *row_of(const problem *p, const flora_field *field, int64_t row) {
    int64_t run;
    return flora_at(field->data, flora_pixel_at(&field->pixels, row, &run), p->kernels->act_size);
}

static void load(const problem *p, size_t to, int64_t width, const flora_field *field, int64_t channels) {
    for (int64_t i = 0; i < p->rows; i++)
        p->kernels->widen(flora_at(at(p, to), i * width, p->kernels->real_size), width, row_of(p, field, i),
                          field->channel, field->channel, 1, channels);
}

/* The field's rows += from (rows, width) */
static void add(const problem *p, const flora_field *field, size_t from, int64_t width, int64_t channels) {
    for (int64_t i = 0; i < p->rows; i++) {
        const char *row = flora_at(at(p, from), i * width, p->kernels->real_size);
        char *to = row_of(p, field, i);
        if (field->channel == 1)
            p->kernels->add_act(to, width, row, width, 1, channels);
        else
            p->kernels->add_act(to, field->channel, row, 1, channels, 1);
    }
}

static flora_few product(const problem *p, size_t wide, int64_t wide_m, size_t narrow, int64_t narrow_m,
                         const flora_view *factor, double scale) {
    return (flora_few){.rows = p->rows,
                       .n = factor->shape[0],
                       .rank = factor->shape[1],
                       .wide = at(p, wide),
                       .narrow = at(p, narrow),
                       .factor = factor->data,
                       .wide_m = wide_m,
                       .narrow_m = narrow_m,
                       .factor_n = factor->strides[0],
                       .scale = scale};
}

/* k = h · Gᵀ, or h itself without a core; where it is. */
static size_t mix(const problem *p) {
    if (p->layer->core == NULL)
        return p->h;
    const flora_few k = product(p, p->k, p->rank_out_w, p->h, p->rank_in_w, p->layer->core, 1.0);
    p->kernels->few_expand(&k);
    return p->k;
}

static void project_x(const problem *p) {
    const flora_few h = product(p, p->x, p->in_w, p->h, p->rank_in_w, p->layer->u_in, 1.0);
    p->kernels->few_project(&h);
}

flora_status flora_few_forward(const flora_layer *layer, char *error) {
    problem p;
    flora_status status = prepare(&p, layer, error);
    if (status != FLORA_OK)
        return status;
    load(&p, p.x, p.in_w, &layer->x, layer->c_in);
    project_x(&p);
    if (layer->h != NULL)
        p.kernels->copy(layer->h->data, layer->h->strides[0], at(&p, p.h), p.rank_in_w, 1, p.rows, layer->r_in);
    const flora_few y = product(&p, p.sum, p.out_w, mix(&p), p.rank_out_w, layer->u_out, layer->scale);
    p.kernels->few_expand(&y);
    add(&p, &layer->y, p.sum, p.out_w, layer->c_out);
    flora_release(&p.scratch);
    return FLORA_OK;
}

flora_status flora_few_backward(const flora_layer *layer, char *error) {
    problem p;
    flora_status status = prepare(&p, layer, error);
    if (status != FLORA_OK)
        return status;
    const flora_view *h = layer->h;
    const int needs_h = layer->d_u_out != NULL || layer->d_core != NULL;
    size_t dh = p.dk;
    load(&p, p.y, p.out_w, &layer->dy, layer->c_out);
    if (layer->x.data != NULL)
        load(&p, p.x, p.in_w, &layer->x, layer->c_in);
    if (needs_h && h != NULL)
        p.kernels->pack(at(&p, p.h), p.rank_in_w, h->data, h->strides[0], h->strides[1], p.rows, layer->r_in, 1.0);
    else if (needs_h)
        project_x(&p);
    const flora_few dk = product(&p, p.y, p.out_w, p.dk, p.rank_out_w, layer->u_out, layer->scale);
    p.kernels->few_project(&dk);
    if (layer->d_u_out != NULL) {
        const flora_few g = product(&p, p.y, p.out_w, mix(&p), p.rank_out_w, layer->d_u_out, layer->scale);
        p.kernels->few_outer(&g);
    }
    if (layer->d_core != NULL) {
        const flora_few g = product(&p, p.dk, p.rank_out_w, p.h, p.rank_in_w, layer->d_core, 1.0);
        p.kernels->few_outer(&g);
    }
    if (layer->core != NULL) {
        const flora_few g = product(&p, p.dk, p.rank_out_w, p.dh, p.rank_in_w, layer->core, 1.0);
        p.kernels->few_project(&g);
        dh = p.dh;
    }
    if (layer->d_u_in != NULL) {
        const flora_few g = product(&p, p.x, p.in_w, dh, p.rank_in_w, layer->d_u_in, 1.0);
        p.kernels->few_outer(&g);
    }
    if (layer->dx.data != NULL) {
        const flora_few g = product(&p, p.sum, p.in_w, dh, p.rank_in_w, layer->u_in, 1.0);
        p.kernels->few_expand(&g);
        add(&p, &layer->dx, p.sum, p.in_w, layer->c_in);
    }
    flora_release(&p.scratch);
    return FLORA_OK;
}
