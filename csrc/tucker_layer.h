/* A layer with a Tucker update, Linear or convolution, after its arguments have been checked. See tucker_layer.c. */
#ifndef FLORA_TUCKER_LAYER_H
#define FLORA_TUCKER_LAYER_H

#include "tucker.h"

/* Activations (batch, groups · channels, *pixels) in any layout. data NULL: left out, or no elements. */
typedef struct {
    char *data;
    int64_t batch, channel; /* strides */
    flora_pixels pixels;
    int planes; /* of an output: pixels have unit stride, not channels */
} flora_field;

/* Everything of one call. Channels, ranks and extents are those of flora.h's prototypes; a Linear has no spatial modes,
 * one image and its rows as pixels. */
typedef struct {
    const flora_kernels *kernels;
    flora_dtype act;
    double scale;
    int64_t batch, groups, c_in, c_out, r_in, r_out; /* c_in and c_out: channels of one group */

    /* kernel modes; extents of the input, of the padded input and of the output */
    int ndim;
    flora_geometry geometry;
    int64_t taps, kernel[FLORA_MAX_SPATIAL];
    int64_t in[FLORA_MAX_SPATIAL], padded[FLORA_MAX_SPATIAL], out[FLORA_MAX_SPATIAL];
    int64_t in_pixels, padded_pixels, out_pixels;
    int pointwise; /* every output pixel depends on the input pixel at the same place alone */

    flora_field x, y; /* in backward: x, dx, dy */
    flora_field dx, dy;
    const flora_view *h;                   /* (pixels, groups · r_in) or (batch, *padded, groups · r_in), or NULL */
    const flora_view *k;                   /* without input factor (batch, *out, groups · r_out), or NULL */
    const flora_view *u_in, *core, *u_out; /* u_in NULL: the identity, r_in = c_in, and never pointwise */
    const flora_view *d_u_in, *d_core, *d_u_out;
} flora_layer;

/* The field of a view whose modes are (batch, channels, *spatial), or (rows, channels) if `rows`. */
flora_field flora_field_of(const flora_view *view, int rows);

/* Sets `planes` of an output, or fails if neither channels nor pixels have unit stride. */
flora_status flora_expect_writable(flora_field *field, const flora_view *view, const char *name, char *error);

/* Whether it is a Linear on so few rows, with factors of unit stride, that they are used where they lie. */
int flora_layer_is_few(const flora_layer *layer);

/* The same calls for such a layer: tucker_few.c. */
flora_status flora_few_forward(const flora_layer *layer, char *error);
flora_status flora_few_backward(const flora_layer *layer, char *error);

flora_status flora_layer_forward(const flora_layer *layer, char *error);

flora_status flora_layer_backward(const flora_layer *layer, char *error);

#endif
