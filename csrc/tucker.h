/* What the operations share: checks with their sentences, scratch, and pixels in any layout. */
#ifndef FLORA_TUCKER_H
#define FLORA_TUCKER_H

#include "flora.h"
#include "isa.h"

/* Checks -------------------------------------------------------------------------------------------------------- */

/* Writes a sentence to `error` and returns `status`. */
__attribute__((format(printf, 3, 4))) flora_status flora_fail(char *error, flora_status status, const char *format,
                                                              ...);

/* The view `name` has this dtype, these extents, and storage if it has elements. A NULL view passes. */
flora_status flora_expect(const flora_view *view, const char *name, flora_dtype dtype, int ndim, const int64_t *shape,
                          char *error);

/* The view has `ndim` dimensions; every function needs this before it reads extents. */
flora_status flora_expect_ndim(const flora_view *view, const char *name, int ndim, char *error);

typedef struct {
    const flora_view *view;
    const char *name;
} flora_named;

/* No output, NULL ones aside, overlaps itself, another output or an input. */
flora_status flora_expect_disjoint(const flora_named *outputs, int output_count, const flora_named *inputs,
                                   int input_count, char *error);

flora_dtype flora_compute_dtype(flora_dtype dtype);

/* The padding, stride, dilation and groups of a convolution make sense by themselves. */
flora_status flora_check_geometry(const flora_geometry *geometry, char *error);

/* One spatial mode fits together; its padded input's extent and its output's. */
flora_status flora_check_spatial(const flora_geometry *geometry, int mode, int64_t extent, int64_t kernel,
                                 int64_t *padded, int64_t *out, char *error);

/* The input position that a position of the padded input shows, counted from the first that is not padding; -1: zero.
 */
int64_t flora_pad_source(flora_padding_mode mode, int64_t at, int64_t extent);

/* Pixels -------------------------------------------------------------------------------------------------------- */

/* Positions numbered in row-major order over up to FLORA_MAX_NDIM modes, whose strides are merged where they can be.
 * The rows of a Linear are pixels with one mode. */
typedef struct {
    int ndim; /* at least 1 after flora_pixels_of */
    int64_t count;
    int64_t extent[FLORA_MAX_NDIM], stride[FLORA_MAX_NDIM];
} flora_pixels;

flora_pixels flora_pixels_of(int ndim, const int64_t *extent, const int64_t *stride);

/* The offset of pixel p, and in *run how many pixels from p on follow each other at stride[ndim - 1]. */
int64_t flora_pixel_at(const flora_pixels *pixels, int64_t p, int64_t *run);

static inline int64_t flora_pixel_stride(const flora_pixels *pixels) {
    return pixels->stride[pixels->ndim - 1];
}

/* A view of real numbers = 0; it may be NULL. What the gradients of parameters are where there is nothing to sum up. */
void flora_clear(const flora_view *view);

/* Scratch ------------------------------------------------------------------------------------------------------- */

/* One allocation a call. Parts are reserved first; each starts at a multiple of 64 bytes and has 64 bytes to spare, so
 * that a vector may be read at the end of its last row. */
typedef struct {
    size_t size;
    int overflow;
    void *block;
    char *base;
} flora_scratch;

/* Reserves a · b · c elements of `size` bytes and returns their offset from `base`. */
size_t flora_reserve(flora_scratch *scratch, int64_t a, int64_t b, int64_t c, size_t size);

flora_status flora_allocate(flora_scratch *scratch, char *error);

void flora_release(flora_scratch *scratch);

/* Arithmetic ---------------------------------------------------------------------------------------------------- */

static inline int64_t flora_min(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t flora_max(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static inline int64_t flora_round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/* base + n elements; a view without elements may have no storage, and then no address is formed */
static inline void *flora_at(const void *base, int64_t n, size_t size) {
    return base == NULL ? NULL : (char *)base + n * (int64_t)size;
}

#endif
