/* The operations on layers: forward and backward of a Linear and of a convolution.
 *
 * Their arguments are checked here, a Linear as a convolution without spatial modes whose rows are pixels; the work is
 * in tucker_layer.c. Shapes and equations are in flora.h.
 */
#include "tucker_layer.h"

#include <math.h>

/* What the caller gave. In forward y is written, in backward it is absent and dx, dy and d_* may be present. */
typedef struct {
    const flora_view *y, *h, *x, *u_in, *core, *u_out;
    const flora_view *dx, *d_u_in, *d_core, *d_u_out, *dy;
    double scale;
    const flora_geometry *geometry; /* NULL: a Linear */
} arguments;

/* Fills `layer` from the arguments, or says what is wrong with them. */
static flora_status check(const arguments *a, flora_layer *layer, char *error) {
    const flora_view *leading = a->y != NULL ? a->x : a->dy; /* gives the batch and the activation type */
    const flora_view *to = a->y != NULL ? a->y : a->dy;
    const flora_dtype act = leading->dtype, real = flora_compute_dtype(act);
    const int ndim = a->geometry != NULL ? a->geometry->ndim : 0;
    flora_status status;

    if (a->geometry != NULL && (status = flora_check_geometry(a->geometry, error)) != FLORA_OK)
        return status;
    if (isnan(a->scale))
        return flora_fail(error, FLORA_BAD_VALUE, "scale must be a number, not nan");
    const struct {
        flora_named named;
        int ndim;
    } read[] = {{{a->x, "x"}, 2 + ndim},       {{a->y, "y"}, 2 + ndim},  {{a->dy, "dy"}, 2 + ndim},
                {{a->h, "h"}, 2 + ndim},       {{a->u_in, "u_in"}, 2},   {{a->u_out, "u_out"}, 2},
                {{a->core, "core"}, 2 + ndim}, {{a->dx, "dx"}, 2 + ndim}};
    for (size_t i = 0; i < sizeof read / sizeof *read; i++)
        if ((status = flora_expect_ndim(read[i].named.view, read[i].named.name, read[i].ndim, error)) != FLORA_OK)
            return status;

    *layer = (flora_layer){.kernels = flora_isa_kernels(act),
                           .scale = a->scale,
                           .ndim = ndim,
                           .batch = 1,
                           .groups = 1,
                           .taps = 1,
                           .pointwise = 1,
                           .c_in = a->u_in->shape[0],
                           .r_in = a->u_in->shape[1],
                           .r_out = a->u_out->shape[1],
                           .h = a->h,
                           .u_in = a->u_in,
                           .core = a->core,
                           .u_out = a->u_out,
                           .d_u_in = a->d_u_in,
                           .d_core = a->d_core,
                           .d_u_out = a->d_u_out};
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
    if (input == NULL && a->h == NULL)
        return flora_fail(error, FLORA_BAD_VALUE, "one of x, dx and h must be given");
    layer->in_pixels = layer->padded_pixels = layer->out_pixels = ndim > 0 ? 1 : leading->shape[0];
    for (int i = 0; i < ndim; i++) {
        const flora_geometry *geometry = &layer->geometry;
        const int64_t padding = geometry->padding[i][0] + geometry->padding[i][1];
        layer->kernel[i] = core[2 + i] = a->core->shape[2 + i];
        layer->in[i] = x[2 + i] = input != NULL ? input->shape[2 + i] : a->h->shape[1 + i] - padding;
        if (layer->in[i] < 0)
            return flora_fail(error, FLORA_BAD_SHAPE, "h has an extent of %lld, less than its padding of %lld",
                              (long long)a->h->shape[1 + i], (long long)padding);
        if ((status = flora_check_spatial(geometry, i, layer->in[i], layer->kernel[i], &layer->padded[i],
                                          &layer->out[i], error)) != FLORA_OK)
            return status;
        h[1 + i] = layer->padded[i];
        y[2 + i] = layer->out[i];
        if (__builtin_mul_overflow(layer->taps, layer->kernel[i], &layer->taps) ||
            __builtin_mul_overflow(layer->in_pixels, layer->in[i], &layer->in_pixels) ||
            __builtin_mul_overflow(layer->padded_pixels, layer->padded[i], &layer->padded_pixels) ||
            __builtin_mul_overflow(layer->out_pixels, layer->out[i], &layer->out_pixels))
            return flora_fail(error, FLORA_BAD_SHAPE, "a padded extent of %lld makes the input too large",
                              (long long)layer->padded[i]);
        layer->pointwise = layer->pointwise && layer->kernel[i] == 1 && geometry->stride[i] == 1 && padding == 0;
    }
    h[1 + ndim] = layer->groups * layer->r_in;

    const struct {
        flora_named named;
        flora_dtype dtype;
        int ndim;
        const int64_t *shape;
    } expected[] = {
        {{a->x, "x"}, act, 2 + ndim, x},
        {{a->y, "y"}, act, 2 + ndim, y},
        {{a->dy, "dy"}, act, 2 + ndim, y},
        {{a->dx, "dx"}, act, 2 + ndim, x},
        {{a->u_in, "u_in"}, real, 2, a->u_in->shape},
        {{a->core, "core"}, real, 2 + ndim, core},
        {{a->u_out, "u_out"}, real, 2, (int64_t[]){layer->groups * layer->c_out, layer->r_out}},
        {{a->h, "h"}, real, 2 + ndim, h},
        {{a->d_u_in, "d_u_in"}, real, 2, a->u_in->shape},
        {{a->d_core, "d_core"}, real, 2 + ndim, core},
        {{a->d_u_out, "d_u_out"}, real, 2, a->u_out->shape},
    };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        if ((status = flora_expect(expected[i].named.view, expected[i].named.name, expected[i].dtype, expected[i].ndim,
                                   expected[i].shape, error)) != FLORA_OK)
            return status;

    if (a->x == NULL && (a->d_u_in != NULL || (a->h == NULL && (a->d_u_out != NULL || a->d_core != NULL))))
        return flora_fail(error, FLORA_BAD_VALUE, "x may be left out only if d_u_in is, and h is given");
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
    const flora_named factors[] = {{a->x, "x"},       {a->dy, "dy"},       {a->u_in, "u_in"},
                                   {a->core, "core"}, {a->u_out, "u_out"}, {a->y == NULL ? a->h : NULL, "h"}};
    const flora_named outputs[] = {{a->y, "y"},           {a->y != NULL ? a->h : NULL, "h"},
                                   {a->dx, "dx"},         {a->d_u_in, "d_u_in"},
                                   {a->d_core, "d_core"}, {a->d_u_out, "d_u_out"}};
    return flora_expect_disjoint(outputs, 6, factors, 6, error);
}

static flora_status forward(const arguments *a, char *error) {
    flora_layer layer;
    flora_status status = check(a, &layer, error);
    return status != FLORA_OK ? status : flora_layer_forward(&layer, error);
}

static flora_status backward(const arguments *a, char *error) {
    flora_layer layer;
    flora_status status = check(a, &layer, error);
    return status != FLORA_OK ? status : flora_layer_backward(&layer, error);
}

flora_status flora_tucker_linear_forward(const flora_view *y, const flora_view *h, const flora_view *x,
                                         const flora_view *u_in, const flora_view *core, const flora_view *u_out,
                                         double scale, char error[FLORA_ERROR_SIZE]) {
    return forward(&(arguments){.y = y, .h = h, .x = x, .u_in = u_in, .core = core, .u_out = u_out, .scale = scale},
                   error);
}

flora_status flora_tucker_linear_backward(const flora_view *dx, const flora_view *d_u_in, const flora_view *d_core,
                                          const flora_view *d_u_out, const flora_view *dy, const flora_view *x,
                                          const flora_view *h, const flora_view *u_in, const flora_view *core,
                                          const flora_view *u_out, double scale, char error[FLORA_ERROR_SIZE]) {
    return backward(&(arguments){.dx = dx,
                                 .d_u_in = d_u_in,
                                 .d_core = d_core,
                                 .d_u_out = d_u_out,
                                 .dy = dy,
                                 .x = x,
                                 .h = h,
                                 .u_in = u_in,
                                 .core = core,
                                 .u_out = u_out,
                                 .scale = scale},
                    error);
}

flora_status flora_tucker_conv_forward(const flora_view *y, const flora_view *h, const flora_view *x,
                                       const flora_view *u_in, const flora_view *core, const flora_view *u_out,
                                       double scale, const flora_geometry *geometry, char error[FLORA_ERROR_SIZE]) {
    return forward(
        &(arguments){
            .y = y, .h = h, .x = x, .u_in = u_in, .core = core, .u_out = u_out, .scale = scale, .geometry = geometry},
        error);
}

flora_status flora_tucker_conv_backward(const flora_view *dx, const flora_view *d_u_in, const flora_view *d_core,
                                        const flora_view *d_u_out, const flora_view *dy, const flora_view *x,
                                        const flora_view *h, const flora_view *u_in, const flora_view *core,
                                        const flora_view *u_out, double scale, const flora_geometry *geometry,
                                        char error[FLORA_ERROR_SIZE]) {
    return backward(&(arguments){.dx = dx,
                                 .d_u_in = d_u_in,
                                 .d_core = d_core,
                                 .d_u_out = d_u_out,
                                 .dy = dy,
                                 .x = x,
                                 .h = h,
                                 .u_in = u_in,
                                 .core = core,
                                 .u_out = u_out,
                                 .scale = scale,
                                 .geometry = geometry},
                    error);
}
