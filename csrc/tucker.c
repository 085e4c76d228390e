/* What the operations in tucker_*.c share. See tucker.h. */
#include "tucker.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Checks -------------------------------------------------------------------------------------------------------- */

static const char *const DTYPE_NAMES[] = {"float32", "float64", "bfloat16", "float16"};
static const size_t DTYPE_SIZES[] = {4, 8, 2, 2};

flora_status flora_fail(char *error, flora_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, FLORA_ERROR_SIZE, format, arguments);
    va_end(arguments);
    return status;
}

flora_dtype flora_compute_dtype(flora_dtype dtype) {
    return dtype == FLORA_F64 ? FLORA_F64 : FLORA_F32;
}

/* "(3, 4)" */
static const char *shape_text(char text[128], int ndim, const int64_t *shape) {
    size_t used = (size_t)snprintf(text, 128, "(");
    for (int i = 0; i < ndim && used < 128; i++)
        used += (size_t)snprintf(text + used, 128 - used, i ? ", %lld" : "%lld", (long long)shape[i]);
    if (used < 128)
        snprintf(text + used, 128 - used, ndim == 1 ? ",)" : ")");
    return text;
}

flora_status flora_expect_ndim(const flora_view *view, const char *name, int ndim, char *error) {
    char shape[128];
    if (view == NULL || view->ndim == ndim)
        return FLORA_OK;
    return flora_fail(error, FLORA_BAD_SHAPE, "%s must have %d dimensions, not shape %s", name, ndim,
                      shape_text(shape, view->ndim, view->shape));
}

flora_status flora_expect(const flora_view *view, const char *name, flora_dtype dtype, int ndim, const int64_t *shape,
                          char *error) {
    char given[128], wanted[128];
    if (view == NULL)
        return FLORA_OK;
    if (view->dtype != dtype)
        return flora_fail(error, FLORA_BAD_DTYPE, "%s must be %s, not %s", name, DTYPE_NAMES[dtype],
                          DTYPE_NAMES[view->dtype]);
    int64_t elements = 1;
    int equal = view->ndim == ndim;
    for (int i = 0; equal && i < ndim; i++) {
        equal = view->shape[i] == shape[i];
        elements = elements && shape[i];
    }
    if (!equal)
        return flora_fail(error, FLORA_BAD_SHAPE, "%s must have shape %s, not %s", name,
                          shape_text(wanted, ndim, shape), shape_text(given, view->ndim, view->shape));
    if (elements && view->data == NULL)
        return flora_fail(error, FLORA_BAD_VALUE, "%s of shape %s has no storage", name,
                          shape_text(given, ndim, shape));
    return FLORA_OK;
}

/* The modes of more than one element by rising |stride|, as (extent, |stride|); 0 elements: returns -1. */
static int sorted_modes(const flora_view *view, int64_t extent[FLORA_MAX_NDIM], int64_t stride[FLORA_MAX_NDIM]) {
    int count = 0;
    for (int i = 0; i < view->ndim; i++) {
        if (view->shape[i] == 0)
            return -1;
        if (view->shape[i] == 1)
            continue;
        int64_t s = view->strides[i] < 0 ? -view->strides[i] : view->strides[i];
        int at = count++;
        for (; at > 0 && stride[at - 1] > s; at--) {
            extent[at] = extent[at - 1];
            stride[at] = stride[at - 1];
        }
        extent[at] = view->shape[i];
        stride[at] = s;
    }
    return count;
}

/* Whether two elements may share an address. Exact for the views that slicing, transposing and expanding make. */
static int overlaps_itself(const flora_view *view) {
    int64_t extent[FLORA_MAX_NDIM], stride[FLORA_MAX_NDIM], span = 1; /* elements covered so far */
    int count = sorted_modes(view, extent, stride);
    for (int i = 0; i < count; i++) {
        if (stride[i] < span)
            return 1;
        span += (extent[i] - 1) * stride[i];
    }
    return 0;
}

/* Addresses [begin, end) in bytes of everything that the modes with |stride| < pitch reach; all modes: pitch = 0. */
static void byte_range(const flora_view *view, int64_t pitch, uintptr_t *begin, uintptr_t *end) {
    int64_t low = 0, high = 1;
    for (int i = 0; i < view->ndim; i++) {
        int64_t s = view->strides[i];
        if (pitch != 0 && (s < 0 ? -s : s) >= pitch)
            continue;
        *(s < 0 ? &low : &high) += (view->shape[i] - 1) * s;
    }
    const int64_t size = (int64_t)DTYPE_SIZES[view->dtype];
    *begin = (uintptr_t)view->data + (uintptr_t)(low * size);
    *end = (uintptr_t)view->data + (uintptr_t)(high * size);
}

/* Whether a and b are bands of the same rows (columns of one matrix, say) that do not touch: all strides that reach
 * past a band are multiples of one pitch, and the bands are disjoint modulo that pitch. */
static int disjoint_bands(const flora_view *a, const flora_view *b) {
    if (a->dtype != b->dtype)
        return 0;
    for (int i = 0; i < a->ndim; i++) {
        int64_t pitch = a->strides[i] < 0 ? -a->strides[i] : a->strides[i];
        int multiples = pitch > 1 && a->shape[i] > 1;
        for (int j = 0; multiples && j < a->ndim + b->ndim; j++) {
            const flora_view *view = j < a->ndim ? a : b;
            int mode = j < a->ndim ? j : j - a->ndim;
            int64_t s = view->strides[mode] < 0 ? -view->strides[mode] : view->strides[mode];
            multiples = view->shape[mode] == 1 || s < pitch || s % pitch == 0;
        }
        if (!multiples)
            continue;
        uintptr_t a_begin, a_end, b_begin, b_end, bytes = (uintptr_t)pitch * DTYPE_SIZES[a->dtype];
        byte_range(a, pitch, &a_begin, &a_end);
        byte_range(b, pitch, &b_begin, &b_end);
        uintptr_t ahead = (b_begin % bytes + bytes - a_begin % bytes) % bytes; /* from a's band to the next of b */
        if (a_end - a_begin <= ahead && ahead + (b_end - b_begin) <= bytes)
            return 1;
    }
    return 0;
}

static int overlap(const flora_view *a, const flora_view *b) {
    int64_t extent[FLORA_MAX_NDIM], stride[FLORA_MAX_NDIM];
    uintptr_t a_begin, a_end, b_begin, b_end;
    if (sorted_modes(a, extent, stride) < 0 || sorted_modes(b, extent, stride) < 0)
        return 0;
    byte_range(a, 0, &a_begin, &a_end);
    byte_range(b, 0, &b_begin, &b_end);
    return a_begin < b_end && b_begin < a_end && !disjoint_bands(a, b) && !disjoint_bands(b, a);
}

flora_status flora_expect_disjoint(const flora_named *outputs, int output_count, const flora_named *inputs,
                                   int input_count, char *error) {
    char shape[128], strides[128];
    for (int i = 0; i < output_count; i++) {
        const flora_view *out = outputs[i].view;
        if (out == NULL)
            continue;
        if (overlaps_itself(out))
            return flora_fail(error, FLORA_BAD_LAYOUT,
                              "%s of shape %s and strides %s overlaps itself, so it cannot be written", outputs[i].name,
                              shape_text(shape, out->ndim, out->shape), shape_text(strides, out->ndim, out->strides));
        for (int j = i + 1; j < output_count; j++)
            if (outputs[j].view != NULL && overlap(out, outputs[j].view))
                return flora_fail(error, FLORA_BAD_LAYOUT, "the outputs %s and %s share memory (%s of shape %s)",
                                  outputs[i].name, outputs[j].name, outputs[i].name,
                                  shape_text(shape, out->ndim, out->shape));
        for (int j = 0; j < input_count; j++)
            if (inputs[j].view != NULL && overlap(out, inputs[j].view))
                return flora_fail(error, FLORA_BAD_LAYOUT,
                                  "the output %s and the input %s share memory (%s of shape %s)", outputs[i].name,
                                  inputs[j].name, outputs[i].name, shape_text(shape, out->ndim, out->shape));
    }
    return FLORA_OK;
}

/* Geometry ------------------------------------------------------------------------------------------------------ */

flora_status flora_check_geometry(const flora_geometry *geometry, char *error) {
    if (geometry->ndim < 1 || geometry->ndim > FLORA_MAX_SPATIAL)
        return flora_fail(error, FLORA_BAD_VALUE, "a convolution has 1 to %d spatial modes, not %d", FLORA_MAX_SPATIAL,
                          geometry->ndim);
    if (geometry->groups < 1)
        return flora_fail(error, FLORA_BAD_VALUE, "groups must be at least 1, not %lld", (long long)geometry->groups);
    for (int i = 0; i < geometry->ndim; i++) {
        if (geometry->stride[i] < 1)
            return flora_fail(error, FLORA_BAD_VALUE, "stride must be at least 1, not %lld",
                              (long long)geometry->stride[i]);
        if (geometry->dilation[i] < 1)
            return flora_fail(error, FLORA_BAD_VALUE, "dilation must be at least 1, not %lld",
                              (long long)geometry->dilation[i]);
        if (geometry->padding[i][0] < 0 || geometry->padding[i][1] < 0)
            return flora_fail(error, FLORA_BAD_VALUE, "padding must not be negative, but is (%lld, %lld)",
                              (long long)geometry->padding[i][0], (long long)geometry->padding[i][1]);
        if (geometry->padding[i][0] > INT64_MAX / 4 || geometry->padding[i][1] > INT64_MAX / 4)
            return flora_fail(error, FLORA_BAD_VALUE, "padding (%lld, %lld) is too large",
                              (long long)geometry->padding[i][0], (long long)geometry->padding[i][1]);
    }
    if (geometry->mode < FLORA_PAD_ZEROS || geometry->mode > FLORA_PAD_CIRCULAR)
        return flora_fail(error, FLORA_BAD_VALUE, "there is no padding mode %d", (int)geometry->mode);
    return FLORA_OK;
}

flora_status flora_check_spatial(const flora_geometry *geometry, int mode, int64_t extent, int64_t kernel,
                                 int64_t *padded, int64_t *out, char *error) {
    const int64_t before = geometry->padding[mode][0], after = geometry->padding[mode][1];
    const int64_t most = before > after ? before : after;
    int64_t reach;
    if (kernel < 1)
        return flora_fail(error, FLORA_BAD_SHAPE, "kernel extents must be at least 1, not %lld", (long long)kernel);
    if (most > 0 && ((geometry->mode == FLORA_PAD_REFLECT && most >= extent) ||
                     (geometry->mode == FLORA_PAD_CIRCULAR && most > extent) ||
                     (geometry->mode == FLORA_PAD_REPLICATE && extent == 0)))
        return flora_fail(error, FLORA_BAD_VALUE,
                          "padding (%lld, %lld) is too large for %s padding of an extent of %lld", (long long)before,
                          (long long)after,
                          geometry->mode == FLORA_PAD_REFLECT    ? "reflect"
                          : geometry->mode == FLORA_PAD_CIRCULAR ? "circular"
                                                                 : "replicate",
                          (long long)extent);
    if (__builtin_add_overflow(extent, before, padded) || __builtin_add_overflow(*padded, after, padded))
        return flora_fail(error, FLORA_BAD_VALUE, "padding (%lld, %lld) is too large", (long long)before,
                          (long long)after);
    if (__builtin_mul_overflow(kernel - 1, geometry->dilation[mode], &reach) || reach >= *padded)
        return flora_fail(error, FLORA_BAD_SHAPE,
                          "a kernel of %lld with dilation %lld does not fit in a padded input of %lld",
                          (long long)kernel, (long long)geometry->dilation[mode], (long long)*padded);
    *out = (*padded - reach - 1) / geometry->stride[mode] + 1;
    return FLORA_OK;
}

int64_t flora_pad_source(flora_padding_mode mode, int64_t at, int64_t extent) {
    if (at >= 0 && at < extent)
        return at;
    switch (mode) {
    case FLORA_PAD_REFLECT:
        return at < 0 ? -at : 2 * (extent - 1) - at;
    case FLORA_PAD_REPLICATE:
        return at < 0 ? 0 : extent - 1;
    case FLORA_PAD_CIRCULAR:
        return at < 0 ? at + extent : at - extent;
    case FLORA_PAD_ZEROS:
        break;
    }
    return -1;
}

/* Pixels -------------------------------------------------------------------------------------------------------- */

flora_pixels flora_pixels_of(int ndim, const int64_t *extent, const int64_t *stride) {
    flora_pixels pixels = {.ndim = 0, .count = 1};
    for (int i = 0; i < ndim; i++) {
        int last = pixels.ndim - 1;
        pixels.count *= extent[i];
        if (extent[i] == 1)
            continue;
        if (last >= 0 && pixels.stride[last] == extent[i] * stride[i]) {
            pixels.extent[last] *= extent[i];
            pixels.stride[last] = stride[i];
        } else {
            pixels.extent[pixels.ndim] = extent[i];
            pixels.stride[pixels.ndim++] = stride[i];
        }
    }
    if (pixels.ndim == 0) {
        pixels.extent[0] = pixels.stride[0] = 1;
        pixels.ndim = 1;
    }
    return pixels;
}

int64_t flora_pixel_at(const flora_pixels *pixels, int64_t p, int64_t *run) {
    int last = pixels->ndim - 1;
    int64_t inner = p % pixels->extent[last], offset = inner * pixels->stride[last];
    *run = pixels->extent[last] - inner;
    p /= pixels->extent[last];
    for (int i = last - 1; i >= 0; i--) {
        offset += p % pixels->extent[i] * pixels->stride[i];
        p /= pixels->extent[i];
    }
    return offset;
}

void flora_clear(const flora_view *view) {
    if (view == NULL)
        return;
    const int64_t size = view->dtype == FLORA_F64 ? 8 : 4;
    const flora_pixels elements = flora_pixels_of(view->ndim, view->shape, view->strides);
    for (int64_t i = 0, run; i < elements.count; i += run) {
        char *to = flora_at(view->data, flora_pixel_at(&elements, i, &run), size);
        for (int64_t j = 0; j < run; j++)
            memset(to + j * flora_pixel_stride(&elements) * size, 0, size);
    }
}

/* Scratch ------------------------------------------------------------------------------------------------------- */

enum { ALIGNMENT = 64, SLACK = 64 };

size_t flora_reserve(flora_scratch *scratch, int64_t a, int64_t b, int64_t c, size_t size) {
    size_t bytes, start = scratch->size;
    if (__builtin_mul_overflow((size_t)a, (size_t)b, &bytes) || __builtin_mul_overflow(bytes, (size_t)c, &bytes) ||
        __builtin_mul_overflow(bytes, size, &bytes) || bytes > PTRDIFF_MAX - SLACK - ALIGNMENT ||
        __builtin_add_overflow(start, (bytes + SLACK + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, &scratch->size) ||
        scratch->size > PTRDIFF_MAX - ALIGNMENT)
        scratch->overflow = 1;
    return start;
}

flora_status flora_allocate(flora_scratch *scratch, char *error) {
    scratch->block = scratch->overflow ? NULL : malloc(scratch->size + ALIGNMENT);
    if (scratch->block == NULL)
        return flora_fail(error, FLORA_NO_MEMORY, "no memory for %zu bytes of scratch", scratch->size);
    scratch->base = (char *)(((uintptr_t)scratch->block + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    return FLORA_OK;
}

void flora_release(flora_scratch *scratch) {
    free(scratch->block);
    scratch->block = NULL;
}
