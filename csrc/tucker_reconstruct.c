/* The weight from its Tucker parts, and the adjoint: order 1 to 5.
 *
 * Types: out, weight and d_weight act; core, factors and all in between real; sums real, out rounded once.
 * Source: FLoRA, arXiv 2405.14739; with ×_m the product along mode m,
 *     out = weight + s · core ×_0 U_0 ×_1 U_1 …
 * The naive versions are flora/reference/tucker.py's tucker_reconstruct and tucker_reconstruct_backward.
 *
 * Modes are renumbered by the strides of out (or d_weight), largest first, so that a channels_last or transposed weight
 * is handled where it is: a Tucker decomposition does not care which mode is called which. Then
 *     M_m = core ×_{n > m} U_n    (r_0 … r_m, d_m+1 …), built from the last mode on in scratch, and
 *     out (d_0, columns) = weight + s · U_0 · M_0 (r_0, columns)
 * is one product. Backward contracts from the first mode on, with T_-1 = d_weight and T_m = T_m-1 ×_m U_mᵀ:
 *     dU_m = s · Σ T_m-1 · M_m over all modes but m;    d_core = s · T_last
 * Only the first step sees d_weight, at most twice; what follows is smaller by d_0 / r_0.
 */
#include "parallel.h"
#include "tucker.h"

#include <math.h>
#include <string.h>

enum {
    ROWS = 64,
    COLUMNS = 128
}; /* a block of d_weight in the first-level cache; a task writes so many rows of out … */
enum { OUT_COLUMNS = 1024 }; /* … and so many columns */

/* The problem with its modes renumbered. Row widths ending in _w are padded to the vector. */
typedef struct {
    const flora_kernels *kernels;
    double scale;
    int order, chunks;
    int mode[FLORA_MAX_ORDER]; /* the caller's number of each mode */
    int64_t dim[FLORA_MAX_ORDER], rank[FLORA_MAX_ORDER];
    const flora_view *core, *factors[FLORA_MAX_ORDER]; /* a factor that is NULL is the identity */
    int64_t columns, rank_w;                           /* the product of all dims but the first; rank[0] */

    char *data;         /* out, or d_weight */
    const char *weight; /* laid out as out; NULL: zero */
    int64_t row;        /* stride of mode 0 */
    flora_pixels rest;  /* the other modes */

    flora_scratch scratch;
    size_t parts[FLORA_MAX_ORDER]; /* M_m */
    size_t packed;                 /* one factor at a time, any way round */
    size_t u_0;                    /* forward: U_0 · s (d_0, r_0); backward: U_0 (d_0, rank_w) */

    int needs_rows, needs_columns; /* backward: whether dU_0 is wanted, and whether anything that follows T_0 is */
    size_t turned;                 /* M_0ᵀ (columns, rank_w) */
    size_t d_u;                    /* the dU in progress (d, r_w) */
    size_t t_0;                    /* T_0ᵀ (columns, rank_w) */
    size_t wide;                   /* T_0 (r_0, columns_w) */
    size_t rooms;                  /* a block (ROWS, COLUMNS) a chunk */
} problem;

static void *at(const problem *p, size_t offset) {
    return p->scratch.base + offset;
}

static void *reals(const problem *p, const void *base, int64_t n) {
    return (char *)base + n * (int64_t)p->kernels->real_size;
}

static int64_t padded(const problem *p, int64_t n) {
    return flora_round_up(n, p->kernels->lanes);
}

/* The product of v[begin … end). */
static int64_t product(const int64_t *v, int begin, int end) {
    int64_t n = 1;
    for (int i = begin; i < end; i++)
        n *= v[i];
    return n;
}

static void multiply(const problem *p, flora_gemm g) {
    g.taps = 1;
    if (g.k == 0)
        g.a = g.b, g.a_m = 0; /* a view without elements may have no storage */
    p->kernels->gemm(&g);
}

/* Checks ----------------------------------------------------------------------------------------------------------- */

/* Checks everything that forward and backward share, and renumbers the modes by the strides of `weight`. */
static flora_status check(problem *p, const flora_view *weight, const char *name, const flora_view *core,
                          const flora_view *const factors[], int order, double scale, char *error) {
    static const char *const factor_names[] = {"factors[0]", "factors[1]", "factors[2]", "factors[3]", "factors[4]"};
    const flora_dtype real = flora_compute_dtype(weight->dtype);
    flora_status status;
    if (order < 1 || order > FLORA_MAX_ORDER)
        return flora_fail(error, FLORA_BAD_VALUE, "the order must be 1 to %d, not %d", FLORA_MAX_ORDER, order);
    if (isnan(scale))
        return flora_fail(error, FLORA_BAD_VALUE, "scale must be a number, not nan");
    if ((status = flora_expect_ndim(weight, name, order, error)) != FLORA_OK ||
        (status = flora_expect_ndim(core, "core", order, error)) != FLORA_OK ||
        (status = flora_expect(weight, name, weight->dtype, order, weight->shape, error)) != FLORA_OK ||
        (status = flora_expect(core, "core", real, order, core->shape, error)) != FLORA_OK)
        return status;
    *p = (problem){.kernels = flora_isa_kernels(weight->dtype),
                   .scale = scale,
                   .order = order,
                   .chunks = 1,
                   .core = core,
                   .data = weight->data};
    for (int m = 0; m < order; m++) {
        const int64_t shape[] = {weight->shape[m], core->shape[m]};
        if ((status = flora_expect(factors[m], factor_names[m], real, 2, shape, error)) != FLORA_OK)
            return status;
        if (factors[m] == NULL && shape[0] != shape[1])
            return flora_fail(error, FLORA_BAD_SHAPE,
                              "without factors[%d] the core's extent of %lld must be the weight's, %lld", m,
                              (long long)shape[1], (long long)shape[0]);
    }

    /* sort by falling stride; a mode of one element has none to speak of and goes last */
    int64_t stride[FLORA_MAX_ORDER];
    for (int m = 0; m < order; m++) {
        const int64_t own = weight->strides[m] < 0 ? -weight->strides[m] : weight->strides[m];
        const int64_t s = weight->shape[m] > 1 ? own : -1;
        int i = m;
        for (; i > 0 && stride[i - 1] < s; i--) {
            stride[i] = stride[i - 1];
            p->mode[i] = p->mode[i - 1];
        }
        stride[i] = s;
        p->mode[i] = m;
    }
    int64_t strides[FLORA_MAX_ORDER];
    for (int i = 0; i < order; i++) {
        p->dim[i] = weight->shape[p->mode[i]];
        p->rank[i] = core->shape[p->mode[i]];
        p->factors[i] = factors[p->mode[i]];
        strides[i] = weight->strides[p->mode[i]];
    }
    p->row = strides[0];
    p->rest = flora_pixels_of(order - 1, p->dim + 1, strides + 1);
    p->columns = p->rest.count;
    p->rank_w = padded(p, p->rank[0]);
    return FLORA_OK;
}

static int same_layout(const flora_view *a, const flora_view *b) {
    for (int m = 0; m < a->ndim; m++)
        if (a->shape[m] > 1 && a->strides[m] != b->strides[m])
            return 0;
    return 1;
}

/* Steps in scratch ------------------------------------------------------------------------------------------------- */

/* The core, contiguous and with its modes in our order, from or to a view (`to`: scaled by s). */
static void move_core(const problem *p, const flora_view *view, void *core, int to) {
    int64_t stride[FLORA_MAX_ORDER];
    for (int m = 0; m < p->order; m++)
        stride[m] = view->strides[p->mode[m]];
    const flora_pixels elements = flora_pixels_of(p->order, p->rank, stride);
    const int64_t step = flora_pixel_stride(&elements);
    for (int64_t i = 0, run; i < elements.count; i += run) {
        void *outside = flora_at(view->data, flora_pixel_at(&elements, i, &run), p->kernels->real_size);
        void *inside = reals(p, core, i);
        if (to)
            p->kernels->sum(outside, 0, step, inside, run, 1, 0, 1, run, p->scale);
        else
            p->kernels->pack(inside, run, outside, 0, step, 1, run, 1.0);
    }
}

/* to (P, d, Q) = from (P, r, Q) ×_1 U (d, r) */
static void mode_product(const problem *p, void *to, const void *from, int64_t P, int64_t Q, const flora_view *u) {
    const int64_t d = u->shape[0], r = u->shape[1];
    if (Q == 1) {
        p->kernels->pack(at(p, p->packed), padded(p, d), u->data, u->strides[1], u->strides[0], r, d, 1.0);
        multiply(p, (flora_gemm){.m = P,
                                 .n = d,
                                 .k = r,
                                 .a = from,
                                 .a_m = r,
                                 .a_k = 1,
                                 .b = at(p, p->packed),
                                 .b_k = padded(p, d),
                                 .c = to,
                                 .c_m = d});
        return;
    }
    for (int64_t i = 0; i < P; i++)
        multiply(p, (flora_gemm){.m = d,
                                 .n = Q,
                                 .k = r,
                                 .a = u->data,
                                 .a_m = u->strides[0],
                                 .a_k = u->strides[1],
                                 .b = reals(p, from, i * r * Q),
                                 .b_k = Q,
                                 .c = reals(p, to, i * d * Q),
                                 .c_m = Q});
}

/* to (P, r, Q) = from (P, d, Q) ×_1 U (d, r)ᵀ */
static void mode_product_t(const problem *p, void *to, const void *from, int64_t P, int64_t Q, const flora_view *u) {
    const int64_t d = u->shape[0], r = u->shape[1];
    if (Q == 1) {
        p->kernels->pack(at(p, p->packed), padded(p, r), u->data, u->strides[0], u->strides[1], d, r, 1.0);
        multiply(p, (flora_gemm){.m = P,
                                 .n = r,
                                 .k = d,
                                 .a = from,
                                 .a_m = d,
                                 .a_k = 1,
                                 .b = at(p, p->packed),
                                 .b_k = padded(p, r),
                                 .c = to,
                                 .c_m = r});
        return;
    }
    for (int64_t i = 0; i < P; i++)
        multiply(p, (flora_gemm){.m = r,
                                 .n = Q,
                                 .k = d,
                                 .a = u->data,
                                 .a_m = u->strides[1],
                                 .a_k = u->strides[0],
                                 .b = reals(p, from, i * d * Q),
                                 .b_k = Q,
                                 .c = reals(p, to, i * r * Q),
                                 .c_m = Q});
}

/* dU (d, r_w) = Σ T (P, d, Q) · M (P, r, Q) over P and Q */
static void factor_gradient(const problem *p, const void *t, const void *m, int64_t P, int64_t d, int64_t r,
                            int64_t Q) {
    const int64_t r_w = padded(p, r);
    void *d_u = at(p, p->d_u);
    if (Q == 1) {
        multiply(p, (flora_gemm){
                        .m = d, .n = r, .k = P, .a = t, .a_m = 1, .a_k = d, .b = m, .b_k = r, .c = d_u, .c_m = r_w});
        return;
    }
    for (int64_t i = 0; i < P; i++) {
        p->kernels->pack(at(p, p->packed), r_w, reals(p, m, i * r * Q), 1, Q, Q, r, 1.0);
        multiply(p, (flora_gemm){.m = d,
                                 .n = r_w,
                                 .k = Q,
                                 .a = reals(p, t, i * d * Q),
                                 .a_m = Q,
                                 .a_k = 1,
                                 .b = at(p, p->packed),
                                 .b_k = r_w,
                                 .c_in = i ? d_u : NULL,
                                 .c = d_u,
                                 .c_m = r_w});
    }
}

/* Reserves M_m for m >= `lowest`, and room to pack any factor with its mode's neighbours. */
static void reserve_parts(problem *p, int lowest) {
    const size_t real = p->kernels->real_size;
    int64_t most = 0;
    for (int m = p->order - 1; m >= lowest; m--)
        if (m == p->order - 1 || p->factors[m + 1] != NULL) /* else M_m is M_m+1 */
            p->parts[m] = flora_reserve(&p->scratch, padded(p, p->rank[0]) * product(p->rank, 1, m + 1),
                                        product(p->dim, m + 1, p->order), 1, real);
    for (int m = 1; m < p->order; m++) {
        if (p->factors[m] == NULL)
            continue;
        const int64_t rank_w = padded(p, p->rank[m]), dim_w = padded(p, p->dim[m]);
        most = flora_max(most, flora_max(dim_w * rank_w, product(p->dim, m + 1, p->order) * rank_w));
    }
    p->packed = flora_reserve(&p->scratch, most, 1, 1, real);
}

/* M_m for m >= lowest. */
static void build_parts(problem *p, int lowest) {
    move_core(p, p->core, at(p, p->parts[p->order - 1]), 0);
    for (int m = p->order - 1; m > lowest; m--) {
        if (p->factors[m] == NULL)
            p->parts[m - 1] = p->parts[m];
        else
            mode_product(p, at(p, p->parts[m - 1]), at(p, p->parts[m]), product(p->rank, 0, m),
                         product(p->dim, m + 1, p->order), p->factors[m]);
    }
}

/* Forward ---------------------------------------------------------------------------------------------------------- */

/* out = weight + U_0 · M_0, a block of rows and columns at a time. */
static void write_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    const int64_t across = (p->columns + OUT_COLUMNS - 1) / OUT_COLUMNS, down = (p->dim[0] + ROWS - 1) / ROWS;
    for (int64_t task = flora_chunk_begin(across * down, chunk, p->chunks);
         task < flora_chunk_begin(across * down, chunk + 1, p->chunks); task++) {
        const int64_t row = task / across * ROWS, rows = flora_min(ROWS, p->dim[0] - row);
        const int64_t end = flora_min((task % across + 1) * OUT_COLUMNS, p->columns);
        for (int64_t column = task % across * OUT_COLUMNS, run; column < end; column += run) {
            const int64_t offset = row * p->row + flora_pixel_at(&p->rest, column, &run);
            run = flora_min(run, end - column);
            flora_gemm g = {.n = run, .taps = 1, .c_m = p->row};
            g.c = flora_at(p->data, offset, p->kernels->act_size);
            g.c_in = flora_at(p->weight, offset, p->kernels->act_size);
            if (p->factors[0] != NULL) {
                g.m = rows, g.k = p->rank[0];
                g.a = reals(p, at(p, p->u_0), row * p->rank[0]), g.a_m = p->rank[0], g.a_k = 1;
                g.b = reals(p, at(p, p->parts[0]), column), g.b_k = p->columns;
                p->kernels->gemm_act(&g);
                continue;
            }
            for (int64_t i = 0; i < rows; i++) { /* the identity: s times a row of M_0 */
                g.m = g.k = 1;
                g.a = at(p, p->u_0);
                g.b = reals(p, at(p, p->parts[0]), (row + i) * p->columns + column);
                p->kernels->gemm_act(&g);
                g.c = flora_at(g.c, p->row, p->kernels->act_size);
                g.c_in = flora_at(g.c_in, p->row, p->kernels->act_size);
            }
        }
    }
}

/* out = weight, element by element, where their layouts differ. */
static void copy_weight(const problem *p, const flora_view *out, const flora_view *weight) {
    const size_t size = p->kernels->act_size;
    int64_t index[FLORA_MAX_ORDER] = {0}, count = product(out->shape, 0, out->ndim);
    char *to = out->data;
    const char *from = weight->data;
    for (; count > 0; count--) {
        memcpy(to, from, size);
        for (int m = p->order - 1; m >= 0; m--) { /* our order: out is written along its memory */
            const int mode = p->mode[m];
            const int carry = ++index[m] == p->dim[m];
            const int64_t steps = carry ? 1 - p->dim[m] : 1;
            if (carry)
                index[m] = 0;
            to += steps * out->strides[mode] * (int64_t)size;
            from += steps * weight->strides[mode] * (int64_t)size;
            if (!carry)
                break;
        }
    }
}

flora_status flora_tucker_reconstruct(const flora_view *out, const flora_view *weight, const flora_view *core,
                                      const flora_view *const factors[], int order, double scale,
                                      char error[FLORA_ERROR_SIZE]) {
    problem p;
    flora_status status;
    if ((status = check(&p, out, "out", core, factors, order, scale, error)) != FLORA_OK ||
        (status = flora_expect(weight, "weight", out->dtype, order, out->shape, error)) != FLORA_OK)
        return status;
    if (p.columns > 1 && flora_pixel_stride(&p.rest) != 1)
        return flora_fail(error, FLORA_BAD_LAYOUT, "out must have unit stride in one of its modes, not %lld at least",
                          (long long)flora_pixel_stride(&p.rest));
    const int in_place = weight != NULL && weight->data == out->data && same_layout(out, weight);
    const flora_named outputs[] = {{out, "out"}};
    flora_named inputs[FLORA_MAX_ORDER + 2] = {{in_place ? NULL : weight, "weight"}, {core, "core"}};
    for (int m = 0; m < order; m++)
        inputs[2 + m] = (flora_named){factors[m], "a factor"};
    if ((status = flora_expect_disjoint(outputs, 1, inputs, 2 + order, error)) != FLORA_OK)
        return status;
    if (p.dim[0] == 0 || p.columns == 0)
        return FLORA_OK;

    reserve_parts(&p, 0);
    p.u_0 = p.factors[0] != NULL ? flora_reserve(&p.scratch, p.dim[0], p.rank[0], 1, p.kernels->real_size)
                                 : flora_reserve(&p.scratch, 1, 1, 1, p.kernels->real_size);
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;
    if (weight != NULL && !same_layout(out, weight)) {
        copy_weight(&p, out, weight);
        weight = out;
    }
    p.weight = weight != NULL ? weight->data : NULL;
    build_parts(&p, 0);
    const flora_view *u = p.factors[0];
    if (u != NULL)
        p.kernels->pack(at(&p, p.u_0), p.rank[0], u->data, u->strides[0], u->strides[1], p.dim[0], p.rank[0], scale);
    else if (p.kernels->real_size == sizeof(double))
        *(double *)at(&p, p.u_0) = scale;
    else
        *(float *)at(&p, p.u_0) = (float)scale;
    p.chunks = flora_chunks((p.dim[0] + ROWS - 1) / ROWS * ((p.columns + OUT_COLUMNS - 1) / OUT_COLUMNS),
                            2.0 * (double)p.dim[0] * (double)p.columns * (double)p.rank[0]);
    flora_parallel(p.chunks, write_chunk, &p);
    flora_release(&p.scratch);
    return FLORA_OK;
}

/* Backward --------------------------------------------------------------------------------------------------------- */

/* A block of d_weight as reals: where it is if its type and strides allow, else a copy. */
static const void *block_of(const problem *p, int64_t row, int64_t rows, int64_t column, int64_t columns, void *room,
                            int64_t *a_row, int64_t *a_column) {
    const size_t size = p->kernels->act_size;
    int64_t run, offset = row * p->row + flora_pixel_at(&p->rest, column, &run);
    if (size == p->kernels->real_size && run >= columns) {
        *a_row = p->row;
        *a_column = flora_pixel_stride(&p->rest);
        return flora_at(p->data, offset, size);
    }
    for (int64_t done = 0; done < columns; done += run) {
        offset = row * p->row + flora_pixel_at(&p->rest, column + done, &run);
        run = flora_min(run, columns - done);
        p->kernels->widen(reals(p, room, done), COLUMNS, flora_at(p->data, offset, size), p->row,
                          flora_pixel_stride(&p->rest), rows, run);
    }
    *a_row = COLUMNS;
    *a_column = 1;
    return room;
}

/* dU_0 (d_0, rank_w) = d_weight · M_0ᵀ, rows of it a task; T_0ᵀ (columns, rank_w) = d_weightᵀ · U_0, columns a task. */
static void contract_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    void *room = reals(p, at(p, p->rooms), (int64_t)chunk * ROWS * COLUMNS);
    const int64_t down = p->needs_rows ? (p->dim[0] + ROWS - 1) / ROWS : 0;
    const int64_t across = p->needs_columns ? (p->columns + COLUMNS - 1) / COLUMNS : 0;
    int64_t a_row, a_column;
    for (int64_t task = flora_chunk_begin(down, chunk, p->chunks); task < flora_chunk_begin(down, chunk + 1, p->chunks);
         task++) {
        const int64_t row = task * ROWS, rows = flora_min(ROWS, p->dim[0] - row);
        void *d_u = reals(p, at(p, p->d_u), row * p->rank_w);
        for (int64_t column = 0; column < p->columns; column += COLUMNS) {
            const int64_t columns = flora_min(COLUMNS, p->columns - column);
            const void *a = block_of(p, row, rows, column, columns, room, &a_row, &a_column);
            multiply(p, (flora_gemm){.m = rows,
                                     .n = p->rank_w,
                                     .k = columns,
                                     .a = a,
                                     .a_m = a_row,
                                     .a_k = a_column,
                                     .b = reals(p, at(p, p->turned), column * p->rank_w),
                                     .b_k = p->rank_w,
                                     .c_in = column ? d_u : NULL,
                                     .c = d_u,
                                     .c_m = p->rank_w});
        }
    }
    for (int64_t task = flora_chunk_begin(across, chunk, p->chunks);
         task < flora_chunk_begin(across, chunk + 1, p->chunks); task++) {
        const int64_t column = task * COLUMNS, columns = flora_min(COLUMNS, p->columns - column);
        void *t_0 = reals(p, at(p, p->t_0), column * p->rank_w);
        for (int64_t row = 0; row < p->dim[0]; row += ROWS) {
            const int64_t rows = flora_min(ROWS, p->dim[0] - row);
            const void *a = block_of(p, row, rows, column, columns, room, &a_row, &a_column);
            multiply(p, (flora_gemm){.m = columns,
                                     .n = p->rank_w,
                                     .k = rows,
                                     .a = a,
                                     .a_m = a_column,
                                     .a_k = a_row,
                                     .b = reals(p, at(p, p->u_0), row * p->rank_w),
                                     .b_k = p->rank_w,
                                     .c_in = row ? t_0 : NULL,
                                     .c = t_0,
                                     .c_m = p->rank_w});
        }
    }
}

/* d_view (d, r) = s · what d_u holds */
static void store_gradient(const problem *p, const flora_view *d_view) {
    p->kernels->sum(d_view->data, d_view->strides[0], d_view->strides[1], at(p, p->d_u), padded(p, d_view->shape[1]), 1,
                    0, d_view->shape[0], d_view->shape[1], p->scale);
}

/* T_0 (r_0, columns), contiguous: from T_0ᵀ, or d_weight itself where U_0 is the identity. */
static void place_t_0(const problem *p, void *t) {
    const int64_t columns_w = padded(p, p->columns);
    if (p->factors[0] != NULL) {
        p->kernels->transpose(at(p, p->wide), columns_w, at(p, p->t_0), p->rank_w, p->columns, p->rank[0]);
        p->kernels->copy(t, p->columns, at(p, p->wide), columns_w, 1, p->rank[0], p->columns);
        return;
    }
    for (int64_t column = 0, run; column < p->columns; column += run) {
        const int64_t offset = flora_pixel_at(&p->rest, column, &run);
        p->kernels->widen(reals(p, t, column), p->columns, flora_at(p->data, offset, p->kernels->act_size), p->row,
                          flora_pixel_stride(&p->rest), p->dim[0], run);
    }
}

flora_status flora_tucker_reconstruct_backward(const flora_view *d_core, const flora_view *const d_factors[],
                                               const flora_view *d_weight, const flora_view *core,
                                               const flora_view *const factors[], int order, double scale,
                                               char error[FLORA_ERROR_SIZE]) {
    problem p;
    flora_status status = check(&p, d_weight, "d_weight", core, factors, order, scale, error);
    if (status != FLORA_OK)
        return status;
    const size_t real = p.kernels->real_size;
    const flora_dtype dtype = flora_compute_dtype(d_weight->dtype);
    flora_named outputs[FLORA_MAX_ORDER + 1] = {{d_core, "d_core"}};
    flora_named inputs[FLORA_MAX_ORDER + 2] = {{d_weight, "d_weight"}, {core, "core"}};
    if ((status = flora_expect(d_core, "d_core", dtype, order, core->shape, error)) != FLORA_OK)
        return status;
    for (int m = 0; m < order; m++) {
        outputs[1 + m] = (flora_named){d_factors[m], "a factor's gradient"};
        inputs[2 + m] = (flora_named){factors[m], "a factor"};
        if (d_factors[m] != NULL && factors[m] == NULL)
            return flora_fail(error, FLORA_BAD_VALUE, "factors[%d] is left out, so it has no gradient", m);
        if (factors[m] != NULL && (status = flora_expect(d_factors[m], "a factor's gradient", dtype, 2,
                                                         factors[m]->shape, error)) != FLORA_OK)
            return status;
    }
    if ((status = flora_expect_disjoint(outputs, 1 + order, inputs, 2 + order, error)) != FLORA_OK)
        return status;
    int empty = 0;
    for (int m = 0; m < order; m++)
        empty |= p.dim[m] == 0 || p.rank[m] == 0;
    if (empty) { /* all gradients are sums of nothing, and other extents may be any */
        for (int i = 0; i < 1 + order; i++)
            flora_clear(outputs[i].view);
        return FLORA_OK;
    }

    /* reserve: the largest T after T_0 is T_0 itself or grows with a rank above its dim */
    int64_t t_size = 1, widest = 0;
    for (int m = 0; m < order; m++)
        t_size = flora_max(t_size, product(p.rank, 0, m + 1) * product(p.dim, m + 1, order));
    for (int m = 0; m < order; m++)
        if (p.factors[m] != NULL)
            widest = flora_max(widest, p.dim[m] * padded(&p, p.rank[m]));
    p.needs_rows = d_factors[p.mode[0]] != NULL;
    p.needs_columns = d_core != NULL;
    for (int i = 1; i < order; i++)
        p.needs_columns |= d_factors[p.mode[i]] != NULL;
    const int contracts = p.needs_columns && p.factors[0] != NULL;
    p.chunks =
        flora_chunks(flora_max((p.dim[0] + ROWS - 1) / ROWS, (p.columns + COLUMNS - 1) / COLUMNS),
                     2.0 * (p.needs_rows + contracts) * (double)p.dim[0] * (double)p.columns * (double)p.rank[0]);
    reserve_parts(&p, 0);
    const int64_t columns_w = padded(&p, p.columns);
    p.u_0 = flora_reserve(&p.scratch, contracts ? p.dim[0] : 0, p.rank_w, 1, real);
    p.turned = flora_reserve(&p.scratch, p.needs_rows ? columns_w : 0, p.rank_w, 1, real);
    p.t_0 = flora_reserve(&p.scratch, contracts ? columns_w : 0, p.rank_w, 1, real);
    p.wide = flora_reserve(&p.scratch, contracts ? columns_w : 0, p.rank_w, 1, real);
    p.d_u = flora_reserve(&p.scratch, widest, 1, 1, real);
    p.rooms = flora_reserve(&p.scratch, p.chunks, ROWS, COLUMNS, real);
    const size_t t_places[] = {flora_reserve(&p.scratch, p.needs_columns ? t_size : 0, 1, 1, real),
                               flora_reserve(&p.scratch, p.needs_columns ? t_size : 0, 1, 1, real)};
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;

    /* the first mode */
    build_parts(&p, 0);
    if (p.needs_rows)
        p.kernels->transpose(at(&p, p.turned), p.rank_w, at(&p, p.parts[0]), p.columns, p.rank[0], p.columns);
    if (contracts)
        p.kernels->pack(at(&p, p.u_0), p.rank_w, p.factors[0]->data, p.factors[0]->strides[0], p.factors[0]->strides[1],
                        p.dim[0], p.rank[0], 1.0);
    p.needs_columns = contracts;
    flora_parallel(p.chunks, contract_chunk, &p);
    if (d_factors[p.mode[0]] != NULL)
        store_gradient(&p, d_factors[p.mode[0]]);

    /* the others, in scratch */
    int place = 0, remaining = d_core != NULL;
    for (int i = 1; i < order; i++)
        remaining += d_factors[p.mode[i]] != NULL;
    if (remaining)
        place_t_0(&p, at(&p, t_places[0]));
    for (int m = 1; m < order && remaining; m++) {
        const int64_t P = product(p.rank, 0, m), Q = product(p.dim, m + 1, order);
        const flora_view *d_factor = d_factors[p.mode[m]];
        if (d_factor != NULL) {
            factor_gradient(&p, at(&p, t_places[place]), at(&p, p.parts[m]), P, p.dim[m], p.rank[m], Q);
            store_gradient(&p, d_factor);
            remaining--;
        }
        if (p.factors[m] != NULL && remaining) {
            mode_product_t(&p, at(&p, t_places[!place]), at(&p, t_places[place]), P, Q, p.factors[m]);
            place = !place;
        }
    }
    if (d_core != NULL)
        move_core(&p, d_core, at(&p, t_places[place]), 1);
    flora_release(&p.scratch);
    return FLORA_OK;
}
