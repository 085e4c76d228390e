/* The operations on layers: forward and backward of a Linear and of a convolution.
 *
 * Their arguments are checked here, a Linear as a convolution without spatial modes whose rows are pixels; the work is
 * in tucker_layer.c. Shapes and equations are in flora.h.
 */
#include "tucker_layer.h"

#include <math.h>

/* What the caller gave. In forward y is written, in backward it is absent and dx, dy and d_* may be present. */
typedef struct {
    const flora_view *y, *h, *x, *core;
    const flora_view
        *factors[FLORA_MAX_ORDER]; /* of out, in and the kernel modes; a convolution's but out may be NULL */
    const flora_view *dx, *dy, *d_core, *d_factors[FLORA_MAX_ORDER];
    double scale;
    const flora_geometry *geometry; /* NULL: a Linear */
} arguments;

enum { OF_OUT, OF_IN, OF_KERNEL };

static const char *const FACTOR_NAMES[] = {"factors[0]", "factors[1]", "factors[2]", "factors[3]", "factors[4]"};
static const char *const D_FACTOR_NAMES[] = {"d_factors[0]", "d_factors[1]", "d_factors[2]", "d_factors[3]",
                                             "d_factors[4]"};

static const char *factor_name(const arguments *a, int mode) {
    return a->geometry != NULL ? FACTOR_NAMES[mode] : mode == OF_IN ? "u_in" : "u_out";
}

static const char *d_factor_name(const arguments *a, int mode) {
    return a->geometry != NULL ? D_FACTOR_NAMES[mode] : mode == OF_IN ? "d_u_in" : "d_u_out";
}

/* Fills `layer` from the arguments, or says what is wrong with them. */
static flora_status check(const arguments *a, flora_layer *layer, char *error) {
    const flora_view *leading = a->y != NULL ? a->x : a->dy; /* gives the batch and the activation type */
    const flora_view *to = a->y != NULL ? a->y : a->dy;
    const flora_dtype act = leading->dtype, real = flora_compute_dtype(act);
    const flora_view *u_out = a->factors[OF_OUT], *u_in = a->factors[OF_IN];
    const int direct = u_in == NULL; /* without input factor: the core reads x itself */
    const int ndim = a->geometry != NULL ? a->geometry->ndim : 0, order = 2 + ndim;
    flora_status status;

    if (a->geometry != NULL && (status = flora_check_geometry(a->geometry, error)) != FLORA_OK)
        return status;
    if (isnan(a->scale))
        return flora_fail(error, FLORA_BAD_VALUE, "scale must be a number, not nan");
    const struct {
        flora_named named;
        int ndim;
    } read[] = {{{a->x, "x"}, order}, {{a->y, "y"}, order},       {{a->dy, "dy"}, order},
                {{a->h, "h"}, order}, {{a->core, "core"}, order}, {{a->dx, "dx"}, order}};
    for (size_t i = 0; i < sizeof read / sizeof *read; i++)
        if ((status = flora_expect_ndim(read[i].named.view, read[i].named.name, read[i].ndim, error)) != FLORA_OK)
            return status;
    for (int m = 0; m < order; m++) {
        if ((status = flora_expect_ndim(a->factors[m], factor_name(a, m), 2, error)) != FLORA_OK)
            return status;
        if (a->d_factors[m] != NULL && a->factors[m] == NULL)
            return flora_fail(error, FLORA_BAD_VALUE, "%s is given, but %s is not", d_factor_name(a, m),
                              factor_name(a, m));
    }

    *layer = (flora_layer){.kernels = flora_isa_kernels(act),
                           .act = act,
                           .scale = a->scale,
                           .ndim = ndim,
                           .batch = 1,
                           .groups = 1,
                           .taps = 1,
                           .pointwise = 1,
                           .c_in = direct ? a->core->shape[1] : u_in->shape[0],
                           .r_in = direct ? a->core->shape[1] : u_in->shape[1],
                           .r_out = u_out->shape[1],
                           .h = direct ? NULL : a->h,
                           .k = direct ? a->h : NULL,
                           .u_in = u_in,
                           .core = a->core,
                           .u_out = u_out,
                           .d_u_in = a->d_factors[OF_IN],
                           .d_core = a->d_core,
                           .d_u_out = a->d_factors[OF_OUT]};
    if (ndim > 0) {
        layer->geometry = *a->geometry;
        layer->groups = a->geometry->groups;
        layer->batch = leading->shape[0];
    }
    if (to->shape[1] % layer->groups != 0)
        return flora_fail(error, FLORA_BAD_VALUE, "%lld output channels cannot be divided in %lld groups",
                          (long long)to->shape[1], (long long)layer->groups);
    layer->c_out = to->shape[1] / layer->groups;
    int64_t product;
    if ((layer->groups > 1 && (layer->c_in == 0 || layer->c_out == 0 || layer->r_in == 0)) ||
        __builtin_mul_overflow(layer->groups, layer->c_in, &product) ||
        __builtin_mul_overflow(layer->groups, layer->r_out, &product) ||
        __builtin_mul_overflow(layer->groups, layer->r_in, &product))
        return flora_fail(
            error, FLORA_BAD_VALUE, "groups=%lld do not fit %lld input and %lld output channels a group with rank %lld",
            (long long)layer->groups, (long long)layer->c_in, (long long)layer->c_out, (long long)layer->r_in);
    if (layer->core == NULL && layer->r_in != layer->r_out)
        return flora_fail(error, FLORA_BAD_SHAPE,
                          "without a core the ranks of u_in and u_out must agree, not %lld and %lld",
                          (long long)layer->r_in, (long long)layer->r_out);

    /* shapes that follow from those */
    int64_t x[FLORA_MAX_NDIM] = {leading->shape[0], layer->groups * layer->c_in};
    int64_t y[FLORA_MAX_NDIM] = {leading->shape[0], layer->groups * layer->c_out};
    int64_t h[FLORA_MAX_NDIM] = {leading->shape[0]}, core[FLORA_MAX_NDIM] = {layer->r_out, layer->r_in};
    const flora_view *input = a->x != NULL ? a->x : a->dx;
    if (input == NULL && (direct || a->h == NULL))
        return flora_fail(error, FLORA_BAD_VALUE, "one of x%s must be given", direct ? " and dx" : ", dx and h");
    layer->in_pixels = layer->padded_pixels = layer->out_pixels = ndim > 0 ? 1 : leading->shape[0];
    for (int i = 0; i < ndim; i++) {
        const flora_geometry *geometry = &layer->geometry;
        const int64_t padding = geometry->padding[i][0] + geometry->padding[i][1];
        core[2 + i] = a->core->shape[2 + i];
        layer->kernel[i] = a->factors[OF_KERNEL + i] != NULL ? a->factors[OF_KERNEL + i]->shape[0] : core[2 + i];
        layer->in[i] = x[2 + i] = input != NULL ? input->shape[2 + i] : a->h->shape[1 + i] - padding;
        if (layer->in[i] < 0)
            return flora_fail(error, FLORA_BAD_SHAPE, "h has an extent of %lld, less than its padding of %lld",
                              (long long)a->h->shape[1 + i], (long long)padding);
        if ((status = flora_check_spatial(geometry, i, layer->in[i], layer->kernel[i], &layer->padded[i],
                                          &layer->out[i], error)) != FLORA_OK)
            return status;
        h[1 + i] = direct ? layer->out[i] : layer->padded[i];
        y[2 + i] = layer->out[i];
        if (__builtin_mul_overflow(layer->taps, layer->kernel[i], &layer->taps) ||
            __builtin_mul_overflow(layer->in_pixels, layer->in[i], &layer->in_pixels) ||
            __builtin_mul_overflow(layer->padded_pixels, layer->padded[i], &layer->padded_pixels) ||
            __builtin_mul_overflow(layer->out_pixels, layer->out[i], &layer->out_pixels))
            return flora_fail(error, FLORA_BAD_SHAPE, "a padded extent of %lld makes the input too large",
                              (long long)layer->padded[i]);
        layer->pointwise = layer->pointwise && layer->kernel[i] == 1 && geometry->stride[i] == 1 && padding == 0;
        layer->geometry.stride[i] = flora_min(geometry->stride[i], layer->padded[i]); /* one output pixel either way */
    }
    /* offsets in the images of h, dk and dh, whose margins make no extent more than three times the padded one */
    if ((double)layer->padded_pixels * ((double)product + (double)layer->r_out + 64) * 27 > 0x1p60)
        return flora_fail(error, FLORA_BAD_SHAPE, "ranks of %lld and %lld make a padded input of %lld pixels too large",
                          (long long)layer->r_in, (long long)layer->r_out, (long long)layer->padded_pixels);
    h[1 + ndim] = layer->groups * (direct ? layer->r_out : layer->r_in);

    const struct {
        flora_named named;
        flora_dtype dtype;
        int ndim;
        const int64_t *shape;
    } expected[] = {
        {{a->x, "x"}, act, order, x},           {{a->y, "y"}, act, order, y},
        {{a->dy, "dy"}, act, order, y},         {{a->dx, "dx"}, act, order, x},
        {{a->core, "core"}, real, order, core}, {{a->d_core, "d_core"}, real, order, core},
        {{a->h, "h"}, real, order, h},
    };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        if ((status = flora_expect(expected[i].named.view, expected[i].named.name, expected[i].dtype, expected[i].ndim,
                                   expected[i].shape, error)) != FLORA_OK)
            return status;
    int needs_h = 0, needs_x = direct && a->d_core != NULL; /* in backward */
    for (int m = 0; m < order; m++) {
        const int64_t dim = m == OF_OUT  ? layer->groups * layer->c_out
                            : m == OF_IN ? layer->c_in
                                         : layer->kernel[m - 2];
        const int64_t shape[2] = {dim, m == OF_OUT ? layer->r_out : m == OF_IN ? layer->r_in : core[m]};
        if ((status = flora_expect(a->factors[m], factor_name(a, m), real, 2, shape, error)) != FLORA_OK ||
            (status = flora_expect(a->d_factors[m], d_factor_name(a, m), real, 2, shape, error)) != FLORA_OK)
            return status;
        needs_h = needs_h || (m != OF_IN && a->d_factors[m] != NULL);
        needs_x = needs_x || (m != OF_OUT && a->d_factors[m] != NULL && (direct || m == OF_IN));
    }

    if (a->x == NULL && (needs_x || (a->h == NULL && (needs_h || a->d_core != NULL))))
        return flora_fail(error, FLORA_BAD_VALUE, "x may be left out only if %s is, and h is given",
                          direct ? "every gradient but that of factors[0]" : d_factor_name(a, OF_IN));
    if (a->x != NULL)
        layer->x = flora_field_of(a->x, ndim == 0);
    if (a->dy != NULL)
        layer->dy = flora_field_of(a->dy, ndim == 0);
    if (a->y != NULL) {
        layer->y = flora_field_of(a->y, ndim == 0);
        if ((status = flora_expect_writable(&layer->y, a->y, "y", error)) != FLORA_OK)
            return status;
        if (a->h != NULL && h[1 + ndim] > 1 && a->h->strides[1 + ndim] != 1)
            return flora_fail(error, FLORA_BAD_LAYOUT, "h must have unit stride in its last mode, not %lld",
                              (long long)a->h->strides[1 + ndim]);
    }
    if (a->dx != NULL) {
        layer->dx = flora_field_of(a->dx, ndim == 0);
        if ((status = flora_expect_writable(&layer->dx, a->dx, "dx", error)) != FLORA_OK)
            return status;
    }
    flora_named inputs[4 + FLORA_MAX_ORDER] = {
        {a->x, "x"}, {a->dy, "dy"}, {a->core, "core"}, {a->y == NULL ? a->h : NULL, "h"}};
    flora_named outputs[4 + FLORA_MAX_ORDER] = {
        {a->y, "y"}, {a->y != NULL ? a->h : NULL, "h"}, {a->dx, "dx"}, {a->d_core, "d_core"}};
    for (int m = 0; m < order; m++) {
        inputs[4 + m] = (flora_named){a->factors[m], factor_name(a, m)};
        outputs[4 + m] = (flora_named){a->d_factors[m], d_factor_name(a, m)};
    }
    return flora_expect_disjoint(outputs, a->y != NULL ? 2 : 4 + order, inputs, 4 + order, error);
}

/* The kernel modes --------------------------------------------------------------------------------------------------*/

/* The core of a convolution with its kernel modes expanded, (r_out, r_in, *k), and its gradient, both contiguous. */
typedef struct {
    flora_scratch scratch;
    flora_view core, d_core;
    flora_view u_in[2]; /* the core and its gradient as an input factor's, for a 1×1 convolution that has none */
    const flora_view *factors[FLORA_MAX_ORDER], *d_factors[FLORA_MAX_ORDER]; /* of the kernel modes alone */
    int order, needed, d_needed;
} expansion;

/* Expands the core if it has kernel factors, and puts it in the layer. */
static flora_status expand(const arguments *a, flora_layer *layer, expansion *e, char *error) {
    *e = (expansion){.order = 2 + layer->ndim};
    for (int m = OF_KERNEL; m < e->order; m++) {
        e->factors[m] = a->factors[m];
        e->d_factors[m] = a->d_factors[m];
        e->needed = e->needed || a->factors[m] != NULL;
        e->d_needed = e->d_needed || a->d_factors[m] != NULL;
    }
    if (!e->needed)
        return FLORA_OK;
    e->d_needed = e->d_needed || a->d_core != NULL;
    e->core = (flora_view){.dtype = a->core->dtype, .ndim = e->order};
    int64_t elements = 1;
    for (int m = e->order - 1; m >= 0; m--) {
        e->core.shape[m] = m < OF_KERNEL ? a->core->shape[m] : layer->kernel[m - 2];
        e->core.strides[m] = elements;
        if (__builtin_mul_overflow(elements, e->core.shape[m], &elements))
            return flora_fail(error, FLORA_NO_MEMORY, "no memory for the expanded core");
    }
    const size_t real = layer->kernels->real_size;
    const size_t core = flora_reserve(&e->scratch, elements, 1, 1, real);
    const size_t d_core = flora_reserve(&e->scratch, e->d_needed ? elements : 0, 1, 1, real);
    flora_status status = flora_allocate(&e->scratch, error);
    if (status != FLORA_OK)
        return status;
    e->d_core = e->core;
    e->core.data = e->scratch.base + core;
    e->d_core.data = e->scratch.base + d_core;
    layer->core = &e->core;
    layer->d_core = e->d_needed ? &e->d_core : NULL;
    return flora_tucker_reconstruct(&e->core, NULL, a->core, e->factors, e->order, 1.0, error);
}

/* A 1×1 convolution without input factor is one whose core is its input factor, transposed. */
static void absorb(flora_layer *layer, expansion *e) {
    if (layer->u_in != NULL || !layer->pointwise)
        return;
    const flora_view *from[] = {layer->core, layer->d_core};
    for (int i = 0; i < 2; i++)
        if (from[i] != NULL)
            e->u_in[i] = (flora_view){.data = from[i]->data,
                                      .dtype = from[i]->dtype,
                                      .ndim = 2,
                                      .shape = {layer->c_in, layer->r_out},
                                      .strides = {from[i]->strides[1], from[i]->strides[0]}};
    layer->u_in = &e->u_in[0];
    layer->d_u_in = layer->d_core != NULL ? &e->u_in[1] : NULL;
    layer->core = layer->d_core = NULL;
    layer->r_in = layer->r_out;
    layer->h = layer->k;
    layer->k = NULL;
}

/* The operations ----------------------------------------------------------------------------------------------------*/

/* Whether an array is left out or has no elements: any number of rows then, too many to go through. */
static int is_empty(const flora_view *view) {
    for (int m = 0; view != NULL && m < view->ndim; m++)
        if (view->shape[m] == 0)
            return 1;
    return view == NULL;
}

static flora_status forward(const arguments *a, char *error) {
    flora_layer layer;
    expansion e;
    flora_status status = check(a, &layer, error);
    if (status != FLORA_OK || (is_empty(a->y) && is_empty(a->h)))
        return status;
    status = expand(a, &layer, &e, error);
    absorb(&layer, &e);
    if (status == FLORA_OK)
        status = flora_layer_forward(&layer, error);
    flora_release(&e.scratch);
    return status;
}

static flora_status backward(const arguments *a, char *error) {
    flora_layer layer;
    expansion e;
    flora_status status = check(a, &layer, error);
    if (status != FLORA_OK)
        return status;
    if (is_empty(a->dy)) { /* sums of nothing */
        flora_clear(a->d_core);
        for (int m = 0; m < 2 + layer.ndim; m++)
            flora_clear(a->d_factors[m]);
        return FLORA_OK;
    }
    status = expand(a, &layer, &e, error);
    absorb(&layer, &e);
    if (status == FLORA_OK)
        status = flora_layer_backward(&layer, error);
    if (status == FLORA_OK && e.d_needed)
        status = flora_tucker_reconstruct_backward(a->d_core, e.d_factors, &e.d_core, a->core, e.factors, e.order, 1.0,
                                                   error);
    flora_release(&e.scratch);
    return status;
}

flora_status flora_tucker_linear_forward(const flora_view *y, const flora_view *h, const flora_view *x,
                                         const flora_view *u_in, const flora_view *core, const flora_view *u_out,
                                         double scale, char error[FLORA_ERROR_SIZE]) {
    return forward(&(arguments){.y = y, .h = h, .x = x, .core = core, .factors = {u_out, u_in}, .scale = scale}, error);
}

flora_status flora_tucker_linear_backward(const flora_view *dx, const flora_view *d_u_in, const flora_view *d_core,
                                          const flora_view *d_u_out, const flora_view *dy, const flora_view *x,
                                          const flora_view *h, const flora_view *u_in, const flora_view *core,
                                          const flora_view *u_out, double scale, char error[FLORA_ERROR_SIZE]) {
    return backward(&(arguments){.dx = dx,
                                 .dy = dy,
                                 .d_core = d_core,
                                 .d_factors = {d_u_out, d_u_in},
                                 .x = x,
                                 .h = h,
                                 .core = core,
                                 .factors = {u_out, u_in},
                                 .scale = scale},
                    error);
}

flora_status flora_tucker_conv_forward(const flora_view *y, const flora_view *h, const flora_view *x,
                                       const flora_view *core, const flora_view *const factors[], double scale,
                                       const flora_geometry *geometry, char error[FLORA_ERROR_SIZE]) {
    arguments a = {.y = y, .h = h, .x = x, .core = core, .scale = scale, .geometry = geometry};
    for (int m = 0; m < 2 + geometry->ndim; m++)
        a.factors[m] = factors[m];
    return forward(&a, error);
}

flora_status flora_tucker_conv_backward(const flora_view *dx, const flora_view *d_core,
                                        const flora_view *const d_factors[], const flora_view *dy, const flora_view *x,
                                        const flora_view *h, const flora_view *core, const flora_view *const factors[],
                                        double scale, const flora_geometry *geometry, char error[FLORA_ERROR_SIZE]) {
    arguments a = {
        .dx = dx, .dy = dy, .d_core = d_core, .x = x, .h = h, .core = core, .scale = scale, .geometry = geometry};
    for (int m = 0; m < 2 + geometry->ndim; m++) {
        a.factors[m] = factors[m];
        a.d_factors[m] = d_factors[m];
    }
    return backward(&a, error);
}
