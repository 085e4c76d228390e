/* Toeplitz updates of a Linear by transforms, LANES rows at a time.
 *
 * Types: x, y, dy and dx act; diagonals and their gradients real; spectra and sums real. The naive versions are
 * toeplitz_forward and toeplitz_backward of flora/reference/toeplitz.py.
 *
 * A Toeplitz matrix multiplies as a convolution, of a length that holds rows + columns - 1 numbers without meeting
 * itself; its transpose as the convolution with the conjugate spectrum. In a product the inner vector is cut off
 * between the two (`truncate`). The gradient of a diagonal is a sum over rows of correlations: spectra are multiplied
 * and summed row by row, and the sums of each thread, added in the order of the threads, are transformed back once in
 * the end.
 */
#include "parallel.h"
#include "spectrum.h"
#include "toeplitz.h"

#include <string.h>

typedef struct {
    const flora_kernels *kernels;
    const flora_spectra *spectra;
    flora_toeplitz update;
    const flora_view *y, *x, *dy, *dx, *d_left, *d_right;
    flora_spectrum spectrum;
    int64_t rows, filters; /* of a product the left ones of all terms, then the right ones; else their sum */
    double scale;
    int chunks;
    flora_scratch scratch;
    size_t one, zeros, spectra_of, folded;
    size_t rooms, x_room, y_room, z_room, sum_room, lines, sums; /* of each chunk */
    int64_t room_size;
} apply;

static void *at(const apply *p, size_t offset, int64_t n) {
    return p->scratch.base + offset + n * (int64_t)p->kernels->real_size;
}

static void *in_room(const apply *p, int chunk, size_t offset, int64_t n) {
    return at(p, p->rooms + (size_t)(chunk * p->room_size) + offset, n);
}

static int64_t points(const apply *p) {
    return p->spectrum.transform.n;
}

/* The numbers that belong to region `region` of data, of a spectrum. */
static void *data_at(const apply *p, void *data, int64_t region) {
    return (char *)data + region * (points(p) / FLORA_REGIONS) * 2 * p->kernels->lanes * (int64_t)p->kernels->real_size;
}

static const void *filter_at(const apply *p, int64_t filter, int64_t region) {
    return at(p, p->spectra_of, (filter * points(p) + region * (points(p) / FLORA_REGIONS)) * 2);
}

static void multiply(const apply *p, void *to, void *from, int64_t filter, int64_t region, int flags) {
    p->spectra->multiply(data_at(p, to, region), data_at(p, from, region), filter_at(p, filter, region),
                         points(p) / FLORA_REGIONS, flags);
}

/* Adds the correlation of a and b to a chunk's sums for this filter. */
static void correlate(const apply *p, int chunk, int64_t filter, void *a, void *b, int64_t region) {
    const int64_t n = points(p), part = n / FLORA_REGIONS;
    p->spectra->correlate(in_room(p, chunk, p->sums, filter * 2 * n + region * part),
                          in_room(p, chunk, p->sums, (filter * 2 + 1) * n + region * part), data_at(p, a, region),
                          data_at(p, b, region), part);
}

static void forward(const apply *p, void *data, int64_t region) {
    p->spectra->forward(&p->spectrum.transform, data, region);
}

static void inverse(const apply *p, void *data, int64_t region) {
    p->spectra->inverse(&p->spectrum.transform, data, region);
}

/* Activations ------------------------------------------------------------------------------------------------------ */

enum { MOST_LANES = 16 };
#define MOST_NUMBERS (INT64_C(1) << 40) /* beyond, a length that suits a transform would be sought for hours */

/* data = the first butterflies of rows [first, first + count) of a view */
static void enter(const apply *p, int chunk, const flora_view *view, int64_t first, int64_t count, void *data) {
    const flora_kernels *k = p->kernels;
    const int64_t d = view->shape[1], row = view->strides[0], width = flora_round_up(d, k->lanes);
    const void *rows[MOST_LANES];
    const char *from = flora_at(view->data, first * row, k->act_size);
    const int direct = k->act_size == k->real_size && view->strides[1] == 1;
    if (!direct)
        k->widen(in_room(p, chunk, p->lines, 0), width, from, row, view->strides[1], count, d);
    for (int64_t q = 0; q < k->lanes; q++)
        rows[q] = q >= count ? at(p, p->zeros, 0)
                  : direct   ? flora_at(from, q * row, k->act_size)
                             : in_room(p, chunk, p->lines, q * width);
    p->spectra->enter(&p->spectrum.transform, data, rows, d);
}

/* rows [first, first + count) of a view += the end of data's inverse transform */
static void leave(const apply *p, int chunk, const flora_view *view, int64_t first, int64_t count, void *data) {
    const flora_kernels *k = p->kernels;
    const int64_t d = view->shape[1], row = view->strides[0], width = flora_round_up(d, k->lanes);
    p->spectra->leave(&p->spectrum.transform, data, in_room(p, chunk, p->lines, 0), width, d);
    for (int64_t q = 0; q < count; q++) {
        void *to = flora_at(view->data, (first + q) * row, k->act_size);
        k->gemm_act(&(flora_gemm){.m = 1,
                                  .n = d,
                                  .k = 1,
                                  .a = at(p, p->one, 0),
                                  .b = in_room(p, chunk, p->lines, q * width),
                                  .taps = 1,
                                  .c_in = to,
                                  .c = to});
    }
}

static void forward_chunk(int chunk, void *apply_) {
    const apply *p = apply_;
    const flora_spectra *s = p->spectra;
    const int64_t lanes = p->kernels->lanes, groups = (p->rows + lanes - 1) / lanes, terms = p->update.terms;
    void *x = in_room(p, chunk, p->x_room, 0), *z = in_room(p, chunk, p->z_room, 0);
    void *sum = in_room(p, chunk, p->sum_room, 0);
    for (int64_t group = flora_chunk_begin(groups, chunk, p->chunks);
         group < flora_chunk_begin(groups, chunk + 1, p->chunks); group++) {
        const int64_t first = group * lanes, count = flora_min(lanes, p->rows - first);
        enter(p, chunk, p->x, first, count, x);
        if (p->update.right == NULL) {
            for (int64_t region = 0; region < FLORA_REGIONS; region++) {
                forward(p, x, region);
                multiply(p, sum, x, 0, region, 0);
                inverse(p, sum, region);
            }
        }
        for (int64_t term = 0; term < terms && p->update.right != NULL; term++) {
            for (int64_t region = 0; region < FLORA_REGIONS; region++) {
                if (term == 0)
                    forward(p, x, region);
                multiply(p, z, x, terms + term, region, 0);
                inverse(p, z, region);
            }
            s->truncate(&p->spectrum.transform, z, p->update.inner);
            for (int64_t region = 0; region < FLORA_REGIONS; region++) {
                forward(p, z, region);
                multiply(p, sum, z, term, region, term ? FLORA_ACCUMULATE : 0);
                if (term == terms - 1)
                    inverse(p, sum, region);
            }
        }
        leave(p, chunk, p->y, first, count, sum);
    }
}

static void backward_chunk(int chunk, void *apply_) {
    const apply *p = apply_;
    const flora_spectra *s = p->spectra;
    const int64_t lanes = p->kernels->lanes, groups = (p->rows + lanes - 1) / lanes, terms = p->update.terms;
    const int product = p->update.right != NULL, beyond = p->d_right != NULL || p->dx != NULL;
    void *x = in_room(p, chunk, p->x_room, 0), *dy = in_room(p, chunk, p->y_room, 0);
    void *z = in_room(p, chunk, p->z_room, 0), *sum = in_room(p, chunk, p->sum_room, 0);
    if (p->d_left != NULL || p->d_right != NULL)
        memset(in_room(p, chunk, p->sums, 0), 0, (size_t)(p->filters * 2 * points(p)) * p->kernels->real_size);
    for (int64_t group = flora_chunk_begin(groups, chunk, p->chunks);
         group < flora_chunk_begin(groups, chunk + 1, p->chunks); group++) {
        const int64_t first = group * lanes, count = flora_min(lanes, p->rows - first);
        if (p->d_left != NULL || p->d_right != NULL)
            enter(p, chunk, p->x, first, count, x);
        enter(p, chunk, p->dy, first, count, dy);
        for (int64_t region = 0; region < FLORA_REGIONS && !product; region++) {
            forward(p, dy, region);
            if (p->d_left != NULL) {
                forward(p, x, region);
                correlate(p, chunk, 0, x, dy, region);
            }
            if (p->dx != NULL) {
                multiply(p, sum, dy, 0, region, FLORA_CONJUGATE);
                inverse(p, sum, region);
            }
        }
        for (int64_t term = 0; term < terms && product; term++) {
            for (int64_t region = 0; region < FLORA_REGIONS; region++) {
                if (term == 0 && (p->d_left != NULL || p->d_right != NULL))
                    forward(p, x, region);
                if (p->d_left != NULL) {
                    multiply(p, z, x, terms + term, region, 0);
                    inverse(p, z, region);
                }
            }
            if (p->d_left != NULL)
                s->truncate(&p->spectrum.transform, z, p->update.inner);
            for (int64_t region = 0; region < FLORA_REGIONS; region++) {
                if (term == 0)
                    forward(p, dy, region);
                if (p->d_left != NULL) {
                    forward(p, z, region);
                    correlate(p, chunk, term, z, dy, region);
                }
                if (beyond) {
                    multiply(p, z, dy, term, region, FLORA_CONJUGATE);
                    inverse(p, z, region);
                }
            }
            if (!beyond)
                continue;
            s->truncate(&p->spectrum.transform, z, p->update.inner);
            for (int64_t region = 0; region < FLORA_REGIONS; region++) {
                forward(p, z, region);
                if (p->d_right != NULL)
                    correlate(p, chunk, terms + term, x, z, region);
                if (p->dx != NULL)
                    multiply(p, sum, z, terms + term, region, FLORA_CONJUGATE | (term ? FLORA_ACCUMULATE : 0));
                if (p->dx != NULL && term == terms - 1)
                    inverse(p, sum, region);
            }
        }
        if (p->dx != NULL)
            leave(p, chunk, p->dx, first, count, sum);
    }
}

/* Diagonals -------------------------------------------------------------------------------------------------------- */

/* Of left if `filter` < terms, else of right; and how many columns such a matrix has. */
static const flora_view *diagonals_of(const apply *p, int64_t filter, const flora_view *left, const flora_view *right,
                                      int64_t *columns) {
    const int is_left = p->update.right == NULL || filter < p->update.terms;
    *columns = is_left && p->update.right != NULL ? p->update.inner : p->update.d_in;
    return is_left ? left : right;
}

/* A filter's factor in spectra: the inverse transforms are n times too large. */
static double factor_of(const apply *p, int64_t filter) {
    const int is_left = p->update.right == NULL || filter < p->update.terms;
    return (is_left ? p->scale : 1.0) / (double)points(p);
}

/* folded (2n) += the diagonals of row `term` of a view: those below the main one and it from the beginning, the others
 * from the end, where a convolution of this kind changes the sign */
static void fold(const apply *p, const flora_view *view, int64_t term, int64_t columns, double scale, void *folded) {
    const flora_kernels *k = p->kernels;
    const int64_t stride = view->strides[1], above = flora_max(0, columns - 1), below = view->shape[1] - above;
    void *line = in_room(p, 0, p->lines, 0);
    const void *from = flora_at(view->data, term * view->strides[0], k->real_size);
    k->pack(line, below, flora_at(from, above * stride, k->real_size), 0, stride, 1, below, scale);
    k->add(folded, 0, line, 0, 1, below);
    k->pack(line, above, from, 0, stride, 1, above, -scale);
    k->add((char *)folded + (2 * points(p) - above) * (int64_t)k->real_size, 0, line, 0, 1, above);
}

/* The spectra of all filters, a vector of them at a time. */
static void transform_filters(const apply *p) {
    const flora_kernels *k = p->kernels;
    const int64_t n = points(p), length = 2 * n;
    void *data = in_room(p, 0, p->x_room, 0);
    for (int64_t filter = 0; filter < p->filters; filter += k->lanes) {
        const int64_t count = flora_min(k->lanes, p->filters - filter);
        const void *lines[MOST_LANES];
        memset(at(p, p->folded, 0), 0, (size_t)(k->lanes * length) * k->real_size);
        for (int64_t q = 0; q < k->lanes; q++) {
            lines[q] = at(p, p->folded, q * length);
            if (q >= count)
                continue;
            int64_t columns;
            const flora_view *view = diagonals_of(p, filter + q, p->update.left, p->update.right, &columns);
            const int64_t first = p->update.right == NULL ? 0 : (filter + q) % p->update.terms;
            const int64_t last = p->update.right == NULL ? p->update.terms : first + 1;
            for (int64_t term = first; term < last; term++)
                fold(p, view, term, columns, factor_of(p, filter + q), at(p, p->folded, q * length));
        }
        p->spectra->enter(&p->spectrum.transform, data, lines, length);
        for (int64_t region = 0; region < FLORA_REGIONS; region++)
            forward(p, data, region);
        for (int64_t q = 0; q < count; q++)
            k->copy(at(p, p->spectra_of, (filter + q) * length), 0, (char *)data + q * (int64_t)k->real_size, 0,
                    k->lanes, 1, length);
    }
}

/* The gradients of all diagonals, from the sums of all chunks. */
static void transform_sums(const apply *p) {
    const flora_kernels *k = p->kernels;
    const int64_t n = points(p), length = 2 * n, real = (int64_t)k->real_size;
    char *data = in_room(p, 0, p->x_room, 0);
    for (int64_t filter = 0; filter < p->filters; filter += k->lanes) {
        const int64_t count = flora_min(k->lanes, p->filters - filter);
        memset(data, 0, (size_t)(length * k->lanes * real));
        for (int64_t q = 0; q < count; q++)
            for (int part = 0; part < 2; part++)
                k->sum(data + (part * k->lanes + q) * real, 0, 2 * k->lanes,
                       in_room(p, 0, p->sums, ((filter + q) * 2 + part) * n), 0, p->chunks, p->room_size / real, 1, n,
                       1.0);
        for (int64_t region = 0; region < FLORA_REGIONS; region++)
            inverse(p, data, region);
        p->spectra->leave(&p->spectrum.transform, data, at(p, p->folded, 0), length, length);
        for (int64_t q = 0; q < count; q++) {
            int64_t columns;
            const flora_view *view = diagonals_of(p, filter + q, p->d_left, p->d_right, &columns);
            if (view == NULL)
                continue;
            const int64_t first = p->update.right == NULL ? 0 : (filter + q) % p->update.terms;
            const int64_t last = p->update.right == NULL ? p->update.terms : first + 1;
            const int64_t above = flora_max(0, columns - 1), below = view->shape[1] - above;
            const double scale = factor_of(p, filter + q);
            for (int64_t term = first; term < last; term++) {
                void *to = flora_at(view->data, term * view->strides[0], k->real_size);
                k->sum(flora_at(to, above * view->strides[1], k->real_size), 0, view->strides[1],
                       at(p, p->folded, q * length), 0, 1, 0, 1, below, scale);
                k->sum(to, 0, view->strides[1], at(p, p->folded, (q + 1) * length - above), 0, 1, 0, 1, above, -scale);
            }
        }
    }
}

/* Calls ------------------------------------------------------------------------------------------------------------ */

static flora_status check_rows(const flora_view *view, const char *name, flora_dtype dtype, int64_t rows, int64_t d,
                               char *error) {
    const int64_t shape[] = {rows, d};
    return flora_expect(view, name, dtype, 2, shape, error);
}

static flora_status expect_unit_stride(const flora_view *view, const char *name, char *error) {
    if (view == NULL || view->strides[1] == 1 || view->shape[1] <= 1)
        return FLORA_OK;
    return flora_fail(error, FLORA_BAD_LAYOUT, "%s must have unit stride in its last dimension, not %lld", name,
                      (long long)view->strides[1]);
}

static flora_status prepare(apply *p, int transforms, int buffers, char *error) {
    const size_t real = p->kernels->real_size;
    const int64_t lanes = p->kernels->lanes, inner = p->update.right == NULL ? 1 : p->update.inner;
    const int64_t widest = flora_max(p->update.d_out, p->update.d_in);
    const int64_t numbers = p->update.right == NULL ? p->update.d_out + p->update.d_in - 1 : inner + widest - 1;
    if (numbers > MOST_NUMBERS)
        return flora_fail(error, FLORA_BAD_SHAPE, "%lld diagonals are more than a transform can have",
                          (long long)numbers);
    p->spectra = p->kernels->spectra;
    p->filters = p->update.right == NULL ? 1 : 2 * p->update.terms;
    flora_spectrum_plan(&p->spectrum, numbers, &p->scratch, real);
    const int64_t n = points(p), groups = (p->rows + lanes - 1) / lanes;
    p->chunks = flora_chunks(groups, (double)groups * transforms * (double)(n * lanes) * 40.0);
    p->one = flora_reserve(&p->scratch, 1, 1, 1, real);
    p->zeros = flora_reserve(&p->scratch, widest, 1, 1, real);
    p->spectra_of = flora_reserve(&p->scratch, p->filters, n, 2, real);
    p->folded = flora_reserve(&p->scratch, lanes, 2 * n, 1, real);
    flora_scratch room = {.size = 0};
    size_t *const places[] = {&p->x_room, &p->y_room, &p->z_room, &p->sum_room};
    for (int i = 0; i < 4; i++)
        *places[i] = i < buffers ? flora_reserve(&room, n, 2 * lanes, 1, real) : *places[i - 1];
    p->lines = flora_reserve(&room, lanes, flora_round_up(flora_max(widest, 2 * n), lanes), 1, real);
    p->sums = flora_reserve(&room, p->d_left != NULL || p->d_right != NULL ? p->filters : 0, n, 2, real);
    p->room_size = (int64_t)room.size;
    p->rooms = flora_reserve(&p->scratch, p->chunks, p->room_size, 1, 1);
    p->scratch.overflow |= room.overflow;
    const flora_status status = flora_allocate(&p->scratch, error);
    if (status != FLORA_OK)
        return status;
    flora_spectrum_fill(&p->spectrum, &p->scratch, real);
    memset(at(p, p->zeros, 0), 0, (size_t)widest * real);
    if (real == sizeof(double))
        *(double *)at(p, p->one, 0) = 1.0;
    else
        *(float *)at(p, p->one, 0) = 1.0f;
    if (p->update.right != NULL || p->dx != NULL || p->y != NULL)
        transform_filters(p);
    return FLORA_OK;
}

flora_status flora_toeplitz_forward(const flora_view *y, const flora_view *x, const flora_view *left,
                                    const flora_view *right, double scale, char error[FLORA_ERROR_SIZE]) {
    apply p = {.kernels = flora_isa_kernels(y->dtype), .y = y, .x = x, .scale = scale};
    flora_status status;
    if ((status = flora_expect_ndim(y, "y", 2, error)) != FLORA_OK ||
        (status = flora_expect_ndim(x, "x", 2, error)) != FLORA_OK)
        return status;
    p.rows = y->shape[0];
    if ((status = check_rows(y, "y", y->dtype, p.rows, y->shape[1], error)) != FLORA_OK ||
        (status = check_rows(x, "x", y->dtype, p.rows, x->shape[1], error)) != FLORA_OK ||
        (status = flora_toeplitz_check(&p.update, y->shape[1], x->shape[1], y->dtype, left, right, scale, error)) !=
            FLORA_OK ||
        (status = expect_unit_stride(y, "y", error)) != FLORA_OK)
        return status;
    const flora_named outputs[] = {{y, "y"}}, inputs[] = {{x, "x"}, {left, "left"}, {right, "right"}};
    if ((status = flora_expect_disjoint(outputs, 1, inputs, 3, error)) != FLORA_OK)
        return status;
    if (p.rows == 0 || p.update.d_out == 0 || p.update.d_in == 0 || p.update.terms == 0)
        return FLORA_OK;
    status = prepare(&p, right == NULL ? 2 : 2 + 2 * (int)flora_min(p.update.terms, 1000),
                     right == NULL || p.update.terms == 1 ? 1 : 4, error);
    if (status != FLORA_OK)
        return status;
    flora_parallel(p.chunks, forward_chunk, &p);
    flora_release(&p.scratch);
    return FLORA_OK;
}

flora_status flora_toeplitz_backward(const flora_view *dx, const flora_view *d_left, const flora_view *d_right,
                                     const flora_view *dy, const flora_view *x, const flora_view *left,
                                     const flora_view *right, double scale, char error[FLORA_ERROR_SIZE]) {
    apply p = {.kernels = flora_isa_kernels(dy->dtype),
               .x = x,
               .dy = dy,
               .dx = dx,
               .d_left = d_left,
               .d_right = d_right,
               .scale = scale};
    flora_status status;
    if ((status = flora_expect_ndim(dx, "dx", 2, error)) != FLORA_OK ||
        (status = flora_expect_ndim(dy, "dy", 2, error)) != FLORA_OK ||
        (status = flora_expect_ndim(x, "x", 2, error)) != FLORA_OK)
        return status;
    if (x == NULL && (d_left != NULL || d_right != NULL))
        return flora_fail(error, FLORA_BAD_VALUE, "x is needed for the gradients of left and right");
    p.rows = dy->shape[0];
    if (dx == NULL && x == NULL)
        return FLORA_OK;
    const int64_t d_out = dy->shape[1], d_in = x != NULL ? x->shape[1] : dx->shape[1];
    if ((status = check_rows(dy, "dy", dy->dtype, p.rows, d_out, error)) != FLORA_OK ||
        (status = check_rows(x, "x", dy->dtype, p.rows, d_in, error)) != FLORA_OK ||
        (status = check_rows(dx, "dx", dy->dtype, p.rows, d_in, error)) != FLORA_OK ||
        (status = flora_toeplitz_check(&p.update, d_out, d_in, dy->dtype, left, right, scale, error)) != FLORA_OK ||
        (status = flora_toeplitz_check_gradients(&p.update, dy->dtype, d_left, d_right, error)) != FLORA_OK ||
        (status = expect_unit_stride(dx, "dx", error)) != FLORA_OK)
        return status;
    const flora_named outputs[] = {{dx, "dx"}, {d_left, "d_left"}, {d_right, "d_right"}};
    const flora_named inputs[] = {{dy, "dy"}, {x, "x"}, {left, "left"}, {right, "right"}};
    if ((status = flora_expect_disjoint(outputs, 3, inputs, 4, error)) != FLORA_OK)
        return status;
    if (p.update.terms == 0 || (dx == NULL && d_left == NULL && d_right == NULL))
        return FLORA_OK;
    if (p.rows == 0 || d_out == 0 || d_in == 0) { /* sums of nothing */
        flora_clear(d_left);
        flora_clear(d_right);
        return FLORA_OK;
    }
    status = prepare(&p, right == NULL ? 3 : 2 + 4 * (int)flora_min(p.update.terms, 1000),
                     right == NULL         ? 2
                     : p.update.terms == 1 ? 3
                                           : 4,
                     error);
    if (status != FLORA_OK)
        return status;
    flora_parallel(p.chunks, backward_chunk, &p);
    if (d_left != NULL || d_right != NULL)
        transform_sums(&p);
    flora_release(&p.scratch);
    return FLORA_OK;
}
