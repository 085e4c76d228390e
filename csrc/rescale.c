/* A weight rescaled by the product of a row and a column vector, and the gradients of the two.
 *
 * Types: out and weight act, the vectors and their gradients real; d_weight of either; sums real, out rounded once.
 * Source: RLRR, arXiv 2403.19067, W' = W + W ⊙ (row · column):
 *     out = W · (1 + s · row · column)
 *     d_row = s · Σ dW' ⊙ W · column over all modes but the first       d_column = s · Σ dW' ⊙ W · row over all but the
 * second The naive versions are flora/reference/rescale.py's rescale_reconstruct and rescale_backward.
 *
 * One pass over the weight each, and memory is what it takes. The weight has two sides: its first mode, which `row`
 * runs along, and all others in the order of their strides, along which `column` is laid out once a call. The side with
 * the smallest stride is the vector (`inner`), so contiguous, channels_last and transposed weights have long lines of
 * unit stride; any other layout is gathered. A sum along a line is a task's own; a sum over lines is one of each chunk,
 * and they are added in the order of the chunks.
 */
#include "parallel.h"
#include "tucker.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LINES = 16 }; /* taken at a time: a gathered line of the cache is used as a whole */

/* One side: where its elements are in two arrays of the same shape, and the vector along it (scratch). */
typedef struct {
    int64_t count;
    flora_pixels first, second;
    size_t values, sums; /* sums: of the side's gradient, within a chunk's sums if it is the inner one */
} side;

typedef struct {
    const flora_kernels *kernels;
    flora_dtype first_dtype, second_dtype;
    const char *first, *second; /* out and weight; d_weight and weight */
    double scale;
    int64_t width, step; /* of the second mode: its extent, and how far apart its elements are among the others' */
    side sides[2], *outer, *inner;
    int chunks;
    flora_scratch scratch;
    size_t rooms, first_block, second_block; /* within a room: (LINES, inner) */
    size_t sums, folded;
    int64_t room_size, sums_size, inner_w;
} problem;

enum { OF_ROW, OF_COLUMN };

static void *at(const problem *p, size_t offset) {
    return p->scratch.base + offset;
}

static void *reals(const problem *p, const void *base, int64_t n) {
    return flora_at(base, n, p->kernels->real_size);
}

static double get(const problem *p, const void *base, int64_t n) {
    return p->kernels->real_size == sizeof(double) ? ((const double *)base)[n] : (double)((const float *)base)[n];
}

static void set(const problem *p, void *base, int64_t n, double value) {
    if (p->kernels->real_size == sizeof(double))
        ((double *)base)[n] = value;
    else
        ((float *)base)[n] = (float)value;
}

/* Checks ----------------------------------------------------------------------------------------------------------- */

/* Checks what both functions share and lays out the two sides; `first` is out or d_weight. */
static flora_status check(problem *p, const flora_view *first, const char *name, const flora_view *weight,
                          const flora_view *row, const flora_view *column, double scale, char *error) {
    const int order = weight->ndim;
    const flora_dtype real = flora_compute_dtype(weight->dtype);
    flora_status status;
    if (isnan(scale))
        return flora_fail(error, FLORA_BAD_VALUE, "scale must be a number, not nan");
    if (order < 2 || order > FLORA_MAX_ORDER)
        return flora_fail(error, FLORA_BAD_SHAPE, "weight must have 2 to %d dimensions, not %d", FLORA_MAX_ORDER,
                          order);
    if ((status = flora_expect(weight, "weight", weight->dtype, order, weight->shape, error)) != FLORA_OK ||
        (status = flora_expect(first, name, first->dtype, order, weight->shape, error)) != FLORA_OK ||
        (status = flora_expect(row, "row", real, 1, weight->shape, error)) != FLORA_OK ||
        (status = flora_expect(column, "column", real, 1, weight->shape + 1, error)) != FLORA_OK)
        return status;
    *p = (problem){.kernels = flora_isa_kernels(weight->dtype),
                   .first_dtype = first->dtype,
                   .second_dtype = weight->dtype,
                   .first = first->data,
                   .second = weight->data,
                   .scale = scale,
                   .width = weight->shape[1],
                   .step = 1};

    /* all modes but the first by falling stride; one of a single element has none to speak of and goes last */
    int mode[FLORA_MAX_ORDER];
    int64_t stride[FLORA_MAX_ORDER], shape[FLORA_MAX_ORDER], of_first[FLORA_MAX_ORDER], of_second[FLORA_MAX_ORDER];
    for (int m = 1; m < order; m++) {
        const int64_t own = first->strides[m] < 0 ? -first->strides[m] : first->strides[m];
        const int64_t s = first->shape[m] > 1 ? own : -1;
        int i = m - 1;
        for (; i > 0 && stride[i - 1] < s; i--) {
            stride[i] = stride[i - 1];
            mode[i] = mode[i - 1];
        }
        stride[i] = s;
        mode[i] = m;
    }
    int behind = 0; /* whether modes follow the second one */
    for (int i = 0; i < order - 1; i++) {
        shape[i] = first->shape[mode[i]];
        of_first[i] = first->strides[mode[i]];
        of_second[i] = weight->strides[mode[i]];
        if (behind)
            p->step *= shape[i];
        behind |= mode[i] == 1;
    }
    side *rows = &p->sides[OF_ROW], *columns = &p->sides[OF_COLUMN];
    rows->first = flora_pixels_of(1, first->shape, first->strides);
    rows->second = flora_pixels_of(1, weight->shape, weight->strides);
    columns->first = flora_pixels_of(order - 1, shape, of_first);
    columns->second = flora_pixels_of(order - 1, shape, of_second);
    rows->count = rows->first.count, columns->count = columns->first.count;
    const int64_t down = flora_pixel_stride(&rows->first), across = flora_pixel_stride(&columns->first);
    const int by_rows = columns->count <= 1 || (rows->count > 1 && llabs(down) < llabs(across));
    p->inner = by_rows ? rows : columns;
    p->outer = by_rows ? columns : rows;
    p->inner_w = flora_round_up(p->inner->count, p->kernels->lanes);
    return FLORA_OK;
}

/* Whether the weight has no elements; its other extent may be any then. */
static int is_empty(const problem *p) {
    return p->inner->count == 0 || p->outer->count == 0;
}

/* Scratch ---------------------------------------------------------------------------------------------------------- */

static void reserve_values(problem *p) {
    for (int i = 0; i < 2; i++)
        p->sides[i].values = flora_reserve(&p->scratch, flora_round_up(p->sides[i].count, p->kernels->lanes), 1, 1,
                                           p->kernels->real_size);
}

/* The vectors along the two sides, ones where there is none; zeros up to the vector width. */
static void lay_out(const problem *p, const flora_view *row, const flora_view *column) {
    const flora_view *views[] = {[OF_ROW] = row, [OF_COLUMN] = column};
    for (int i = 0; i < 2; i++) {
        const side *s = &p->sides[i];
        const flora_view *view = views[i];
        void *values = at(p, s->values);
        for (int64_t j = 0; j < s->count; j++) {
            const int64_t from = i == OF_ROW ? j : j / p->step % p->width;
            set(p, values, j, view == NULL ? 1.0 : get(p, view->data, from * view->strides[0]));
        }
        for (int64_t j = s->count; j < flora_round_up(s->count, p->kernels->lanes); j++)
            set(p, values, j, 0);
    }
}

/* Forward ---------------------------------------------------------------------------------------------------------- */

static void write_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    const side *outer = p->outer, *inner = p->inner;
    const int64_t to_step = flora_pixel_stride(&inner->first), from_step = flora_pixel_stride(&inner->second);
    const size_t size = p->kernels->act_size;
    int64_t run, other;
    for (int64_t line = flora_chunk_begin(outer->count, chunk, p->chunks);
         line < flora_chunk_begin(outer->count, chunk + 1, p->chunks); line++) {
        const int64_t to = flora_pixel_at(&outer->first, line, &run);
        const int64_t from = flora_pixel_at(&outer->second, line, &other);
        const double factor = p->scale * get(p, at(p, outer->values), line);
        for (int64_t done = 0; done < inner->count; done += run) {
            const int64_t to_at = to + flora_pixel_at(&inner->first, done, &run);
            const int64_t from_at = from + flora_pixel_at(&inner->second, done, &other);
            run = flora_min(run, other);
            p->kernels->rescale(flora_at(p->first, to_at, size), to_step, flora_at(p->second, from_at, size), from_step,
                                reals(p, at(p, inner->values), done), factor, run);
        }
    }
}

static int same_place(const flora_view *a, const flora_view *b) {
    int same = a->data == b->data;
    for (int m = 0; m < a->ndim; m++)
        same &= a->shape[m] <= 1 || a->strides[m] == b->strides[m];
    return same;
}

flora_status flora_rescale_reconstruct(const flora_view *out, const flora_view *weight, const flora_view *row,
                                       const flora_view *column, double scale, char error[FLORA_ERROR_SIZE]) {
    problem p;
    flora_status status;
    if ((status = flora_expect(out, "out", weight->dtype, weight->ndim, weight->shape, error)) != FLORA_OK ||
        (status = check(&p, out, "out", weight, row, column, scale, error)) != FLORA_OK)
        return status;
    const flora_named outputs[] = {{out, "out"}};
    const flora_named inputs[] = {
        {same_place(out, weight) ? NULL : weight, "weight"}, {row, "row"}, {column, "column"}};
    if ((status = flora_expect_disjoint(outputs, 1, inputs, 3, error)) != FLORA_OK || is_empty(&p))
        return status;
    reserve_values(&p);
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;
    lay_out(&p, row, column);
    p.chunks = flora_chunks(p.outer->count, 2.0 * (double)p.outer->count * (double)p.inner->count);
    flora_parallel(p.chunks, write_chunk, &p);
    flora_release(&p.scratch);
    return FLORA_OK;
}

/* Backward --------------------------------------------------------------------------------------------------------- */

/* `lines` lines of an array from `line` on, as reals (lines, inner_w): `outer` and `inner` are where its elements are.
 */
static void gather(const problem *p, void *room, const char *base, flora_dtype dtype, const flora_pixels *outer,
                   const flora_pixels *inner, int64_t line, int64_t lines) {
    const flora_kernels *kernels = flora_kernels_for(dtype, p->kernels, p->second_dtype);
    int64_t run, across;
    for (int64_t i = 0; i < lines; i += across) {
        const int64_t from = flora_pixel_at(outer, line + i, &across);
        across = flora_min(across, lines - i);
        for (int64_t done = 0; done < inner->count; done += run) {
            const int64_t offset = from + flora_pixel_at(inner, done, &run);
            kernels->widen(reals(p, room, i * p->inner_w + done), p->inner_w, flora_at(base, offset, kernels->act_size),
                           flora_pixel_stride(outer), flora_pixel_stride(inner), across, run);
        }
    }
}

static int has_lines(const flora_pixels *inner) {
    return inner->count <= 1 || (inner->ndim == 1 && inner->stride[0] == 1);
}

static void sum_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    const side *outer = p->outer, *inner = p->inner;
    const size_t real = p->kernels->real_size;
    const int direct = p->first_dtype == p->second_dtype && has_lines(&inner->first) && has_lines(&inner->second);
    const flora_kernels *kernels =
        direct ? p->kernels : flora_kernels_for(flora_compute_dtype(p->second_dtype), p->kernels, p->second_dtype);
    const size_t size = kernels->act_size;
    char *room = p->scratch.base + p->rooms + chunk * p->room_size;
    void *along_sums = p->scratch.base + p->sums + chunk * p->sums_size;
    const int64_t end = flora_chunk_begin(outer->count, chunk + 1, p->chunks);
    int64_t run, other;
    memset(along_sums, 0, (size_t)p->sums_size);
    for (int64_t line = flora_chunk_begin(outer->count, chunk, p->chunks); line < end; line += run) {
        flora_rescale_sums g = {.n = inner->count,
                                .along = at(p, inner->values),
                                .across = reals(p, at(p, outer->values), line),
                                .along_sums = along_sums,
                                .across_sums = reals(p, at(p, outer->sums), line)};
        if (direct) {
            g.d_weight = flora_at(p->first, flora_pixel_at(&outer->first, line, &run), size);
            g.weight = flora_at(p->second, flora_pixel_at(&outer->second, line, &other), size);
            g.d_weight_line = flora_pixel_stride(&outer->first), g.weight_line = flora_pixel_stride(&outer->second);
            run = flora_min(flora_min(run, other), flora_min(LINES, end - line));
        } else {
            run = flora_min(LINES, end - line);
            gather(p, room + p->first_block, p->first, p->first_dtype, &outer->first, &inner->first, line, run);
            gather(p, room + p->second_block, p->second, p->second_dtype, &outer->second, &inner->second, line, run);
            g.d_weight = room + p->first_block, g.weight = room + p->second_block;
            g.d_weight_line = g.weight_line = p->inner_w;
        }
        g.lines = run;
        memset(g.across_sums, 0, (size_t)run * real);
        kernels->rescale_sums(&g);
    }
}

/* view (n) = s · the sums of a side, those of equal channels taken together */
static void store(const problem *p, const flora_view *view, const side *s) {
    const int of_column = s == &p->sides[OF_COLUMN];
    const int64_t n = of_column ? p->width : s->count;
    const int64_t part = p->sums_size / (int64_t)p->kernels->real_size;
    const void *from = at(p, s == p->inner ? p->sums : s->sums);
    void *to = at(p, p->folded);
    p->kernels->sum(to, 0, 1, from, 0, s == p->inner ? p->chunks : 1, part, 1, s->count, p->scale);
    if (s->count != n) {
        void *sums = at(p, p->folded + (size_t)s->count * p->kernels->real_size);
        memset(sums, 0, (size_t)n * p->kernels->real_size);
        for (int64_t j = 0; j < s->count; j++)
            set(p, sums, j / p->step % n, get(p, sums, j / p->step % n) + get(p, to, j));
        to = sums;
    }
    for (int64_t j = 0; j < n; j++)
        set(p, view->data, j * view->strides[0], get(p, to, j));
}

flora_status flora_rescale_backward(const flora_view *d_row, const flora_view *d_column, const flora_view *d_weight,
                                    const flora_view *weight, const flora_view *row, const flora_view *column,
                                    double scale, char error[FLORA_ERROR_SIZE]) {
    problem p;
    const flora_dtype real = flora_compute_dtype(weight->dtype);
    flora_status status;
    if (d_weight->dtype != real &&
        (status = flora_expect(d_weight, "d_weight", weight->dtype, weight->ndim, weight->shape, error)) != FLORA_OK)
        return status;
    if ((status = check(&p, d_weight, "d_weight", weight, row, column, scale, error)) != FLORA_OK ||
        (status = flora_expect(d_row, "d_row", real, 1, weight->shape, error)) != FLORA_OK ||
        (status = flora_expect(d_column, "d_column", real, 1, weight->shape + 1, error)) != FLORA_OK)
        return status;
    if ((d_row != NULL && row == NULL) || (d_column != NULL && column == NULL))
        return flora_fail(error, FLORA_BAD_VALUE, "%s is given, but %s is not", row == NULL ? "d_row" : "d_column",
                          row == NULL ? "row" : "column");
    const flora_named outputs[] = {{d_row, "d_row"}, {d_column, "d_column"}};
    const flora_named inputs[] = {{d_weight, "d_weight"}, {weight, "weight"}, {row, "row"}, {column, "column"}};
    if ((status = flora_expect_disjoint(outputs, 2, inputs, 4, error)) != FLORA_OK)
        return status;
    if (is_empty(&p)) {
        flora_clear(d_row);
        flora_clear(d_column);
        return FLORA_OK;
    }
    const size_t size = p.kernels->real_size;
    const int64_t outer_w = flora_round_up(p.outer->count, p.kernels->lanes);
    flora_scratch room = {.size = 0};
    p.chunks =
        flora_chunks((p.outer->count + LINES - 1) / LINES, 5.0 * (double)p.outer->count * (double)p.inner->count);
    reserve_values(&p);
    p.folded = flora_reserve(&p.scratch, flora_max(outer_w, p.inner_w) + p.width, 1, 1, size);
    p.outer->sums = flora_reserve(&p.scratch, outer_w, 1, 1, size);
    p.sums_size = p.inner_w * (int64_t)size;
    p.sums = flora_reserve(&p.scratch, p.chunks, p.inner_w, 1, size);
    p.first_block = flora_reserve(&room, LINES, p.inner_w, 1, size);
    p.second_block = flora_reserve(&room, LINES, p.inner_w, 1, size);
    p.room_size = (int64_t)room.size;
    p.rooms = flora_reserve(&p.scratch, p.chunks, p.room_size, 1, 1);
    p.scratch.overflow |= room.overflow;
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;
    lay_out(&p, row, column);
    flora_parallel(p.chunks, sum_chunk, &p);
    if (d_row != NULL)
        store(&p, d_row, &p.sides[OF_ROW]);
    if (d_column != NULL)
        store(&p, d_column, &p.sides[OF_COLUMN]);
    flora_release(&p.scratch);
    return FLORA_OK;
}
