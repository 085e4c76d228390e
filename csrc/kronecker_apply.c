/* The Kronecker update of a Linear, applied without forming it.
 *
 * Types: x, y, dx and dy act, everything else real; all sums real.
 * Source: SURM, arXiv 2406.17740. With A (p, q), B (m, n), a row of x as (n, q) and one of y as (m, p):
 *     H = X · Aᵀ           Y += s · B · H
 * and backward
 *     dH = s · Bᵀ · dY     dX += dH · A     dA = Σ dHᵀ · X     dB = s · Σ dY · Hᵀ
 * The naive versions are flora/reference/kronecker.py's kronecker_forward and kronecker_backward.
 *
 * p is the vector of all products but two: dX has q, and dB n, for which H is turned round. What has p columns is
 * padded to the vector. Work is cut into tiles of rows, small enough for H to stay in the first-level cache: the
 * products with A and the sums over rows run through a whole tile, those with B through one row.
 *
 * Every element of y, dx and h is computed by one task in one order. Gradients of the factors are sums over rows: each
 * chunk of tasks has its own, and they are added in the order of the chunks.
 */
#include "parallel.h"
#include "tucker.h"

#include <math.h>
#include <string.h>

enum {
    TILE_BYTES = 32768, /* of H's tile, at most … */
    MOST_ROWS = 64      /* … and the rows of a tile */
};

#define MOST_NUMBERS (INT64_C(1) << 40) /* of a row of H, which no memory holds */

/* A call. Names ending in _w are row widths padded to the vector. */
typedef struct {
    const flora_kernels *kernels;
    double scale;
    int64_t rows, m, n, p, q;
    int64_t p_w, q_w, n_w;
    const flora_view *x, *y, *h, *a, *b; /* y: dy in backward */
    const flora_view *dx, *d_a, *d_b;
    int64_t tile; /* rows, at most */
    int chunks;
    flora_scratch scratch;
    size_t a_t;                                       /* (q, p_w) */
    size_t a_w;                                       /* (p, q_w) */
    size_t b_s;                                       /* s · B (m, n) */
    size_t taps_y, taps_h;                            /* (tile) int64: where a row of dy and of H turned round is */
    size_t rooms, x_tile, y_tile, h_tile, dh, turned; /* within a room: (tile, n, q), (tile, m, p_w), … */
    size_t sums, d_a_sums, d_b_sums;                  /* within the sums: (q, p_w) and (m, n_w) */
    int64_t room_size, sums_size;
} problem;

static void *at(const problem *p, size_t offset) {
    return p->scratch.base + offset;
}

static void *in_room(const problem *p, int chunk, size_t offset) {
    return p->scratch.base + p->rooms + chunk * p->room_size + offset;
}

static void *in_sums(const problem *p, int chunk, size_t offset) {
    return p->scratch.base + p->sums + chunk * p->sums_size + offset;
}

static void *reals(const problem *p, const void *base, int64_t n) {
    return flora_at(base, n, p->kernels->real_size);
}

static void *row_of(const problem *p, const flora_view *view, int64_t row) {
    return flora_at(view->data, row * view->strides[0], p->kernels->act_size);
}

static void multiply(const problem *p, flora_gemm g) {
    if (g.taps == 0)
        g.taps = 1;
    p->kernels->gemm(&g);
}

/* Checks ----------------------------------------------------------------------------------------------------------- */

static flora_status expect_unit_stride(const flora_view *view, const char *name, char *error) {
    if (view == NULL || view->shape[1] <= 1 || view->strides[1] == 1 || view->shape[0] == 0)
        return FLORA_OK;
    return flora_fail(error, FLORA_BAD_LAYOUT, "%s must have unit stride in its last mode, not %lld", name,
                      (long long)view->strides[1]);
}

/* Checks what forward and backward share, and sets all extents. `y` is y or dy, `leading` x or dx or NULL. */
static flora_status check(problem *p, const char *y_name, char *error) {
    flora_status status;
    const flora_dtype act = p->y->dtype, real = flora_compute_dtype(act);
    const struct {
        const flora_view *view;
        const char *name;
    } matrices[] = {{p->y, y_name}, {p->x, "x"}, {p->dx, "dx"},   {p->h, "h"},
                    {p->a, "a"},    {p->b, "b"}, {p->d_a, "d_a"}, {p->d_b, "d_b"}};
    if (isnan(p->scale))
        return flora_fail(error, FLORA_BAD_VALUE, "scale must be a number, not nan");
    for (size_t i = 0; i < sizeof matrices / sizeof *matrices; i++)
        if ((status = flora_expect_ndim(matrices[i].view, matrices[i].name, 2, error)) != FLORA_OK)
            return status;
    p->kernels = flora_isa_kernels(act);
    p->rows = p->y->shape[0];
    p->p = p->a->shape[0], p->q = p->a->shape[1];
    p->m = p->b->shape[0], p->n = p->b->shape[1];
    int64_t d_out, d_in, d_h;
    if (__builtin_mul_overflow(p->m, p->p, &d_out) || __builtin_mul_overflow(p->n, p->q, &d_in) ||
        __builtin_mul_overflow(p->n, p->p, &d_h) || d_h > MOST_NUMBERS)
        return flora_fail(error, FLORA_BAD_SHAPE, "a of %lld x %lld and b of %lld x %lld have too large a product",
                          (long long)p->p, (long long)p->q, (long long)p->m, (long long)p->n);
    const int64_t y[] = {p->rows, d_out}, x[] = {p->rows, d_in}, h[] = {p->rows, d_h};
    const struct {
        const flora_view *view;
        const char *name;
        flora_dtype dtype;
        const int64_t *shape;
    } expected[] = {{p->y, y_name, act, y},
                    {p->x, "x", act, x},
                    {p->dx, "dx", act, x},
                    {p->h, "h", real, h},
                    {p->a, "a", real, p->a->shape},
                    {p->b, "b", real, p->b->shape},
                    {p->d_a, "d_a", real, p->a->shape},
                    {p->d_b, "d_b", real, p->b->shape}};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        if ((status = flora_expect(expected[i].view, expected[i].name, expected[i].dtype, 2, expected[i].shape,
                                   error)) != FLORA_OK)
            return status;
    p->p_w = flora_round_up(p->p, p->kernels->lanes);
    p->q_w = flora_round_up(p->q, p->kernels->lanes);
    p->n_w = flora_round_up(p->n, p->kernels->lanes);
    return FLORA_OK;
}

/* Plans ------------------------------------------------------------------------------------------------------------ */

/* Cuts the rows into tiles and chunks; `passes`: how many products there are on either side of H. */
static void cut(problem *p, double passes) {
    const double flops = 2 * passes * (double)p->rows * (double)p->n * (double)p->p * ((double)p->q + (double)p->m);
    const int64_t fitting = TILE_BYTES / (flora_max(1, p->n * p->p_w) * (int64_t)p->kernels->real_size);
    const int64_t threads = flora_chunks(p->rows, flops), share = (p->rows + threads - 1) / threads;
    p->tile = flora_max(1, flora_min(flora_min(fitting, MOST_ROWS), share));
    p->chunks = flora_chunks((p->rows + p->tile - 1) / p->tile, flops);
}

static void reserve_rooms(problem *p, const flora_scratch *room) {
    p->room_size = (int64_t)room->size;
    p->rooms = flora_reserve(&p->scratch, p->chunks, p->room_size, 1, 1);
    p->scratch.overflow |= room->overflow;
}

/* Tiles ------------------------------------------------------------------------------------------------------------ */

/* A tile of x as reals (rows, n, q) without gaps: where it is if its type and strides allow, else a copy. */
static const void *load_x(const problem *p, int64_t first, int64_t rows, void *room) {
    const int64_t width = p->n * p->q;
    const void *from = row_of(p, p->x, first);
    if (width == 0 || (p->kernels->act_size == p->kernels->real_size && (p->x->strides[1] == 1 || width == 1) &&
                       (p->x->strides[0] == width || rows == 1)))
        return from;
    p->kernels->widen(room, width, from, p->x->strides[0], p->x->strides[1], rows, width);
    return room;
}

/* A tile of dy as reals, with the stride of a row in *row and of a row of its (m, p) in *width: as b of a product. */
static const void *load_dy(const problem *p, int64_t first, int64_t rows, void *room, int64_t *row, int64_t *width) {
    const int64_t step = p->y->strides[1];
    if (p->kernels->act_size == p->kernels->real_size && step == 1 && p->p == p->p_w) {
        *row = p->y->strides[0], *width = p->p;
        return row_of(p, p->y, first);
    }
    *row = p->m * p->p_w, *width = p->p_w;
    for (int64_t r = 0; r < rows; r++)
        p->kernels->widen(reals(p, room, r * *row), p->p_w, row_of(p, p->y, first + r), p->p * step, step, p->m, p->p);
    return room;
}

/* Whether h lies in memory as its tiles in scratch do. */
static int h_is_dense(const problem *p) {
    return p->h != NULL && p->p == p->p_w && p->h->strides[1] == 1 && p->h->strides[0] == p->n * p->p;
}

/* H (rows, n, p_w) = X · Aᵀ, also written to h if there is one. */
static void *project(const problem *p, int chunk, int64_t first, int64_t rows, const flora_view *h) {
    const int dense = h != NULL && h_is_dense(p);
    void *tile = dense ? reals(p, h->data, first * h->strides[0]) : in_room(p, chunk, p->h_tile);
    multiply(p, (flora_gemm){.m = rows * p->n,
                             .n = p->p_w,
                             .k = p->q,
                             .a = load_x(p, first, rows, in_room(p, chunk, p->x_tile)),
                             .a_m = p->q,
                             .a_k = 1,
                             .b = at(p, p->a_t),
                             .b_k = p->p_w,
                             .c = tile,
                             .c_m = p->p_w});
    for (int64_t r = 0; h != NULL && !dense && r < rows; r++)
        p->kernels->sum(reals(p, h->data, (first + r) * h->strides[0]), p->p * h->strides[1], h->strides[1],
                        reals(p, tile, r * p->n * p->p_w), p->p_w, 1, 0, p->n, p->p, 1.0);
    return tile;
}

/* Forward ---------------------------------------------------------------------------------------------------------- */

static void forward_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    const int64_t tasks = (p->rows + p->tile - 1) / p->tile;
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const int64_t first = task * p->tile, rows = flora_min(p->tile, p->rows - first);
        const void *h = project(p, chunk, first, rows, p->h);
        for (int64_t r = 0; r < rows; r++) {
            void *y = row_of(p, p->y, first + r);
            const flora_gemm g = {.m = p->m,
                                  .n = p->p,
                                  .k = p->n,
                                  .a = at(p, p->b_s),
                                  .a_m = p->n,
                                  .a_k = 1,
                                  .b = reals(p, h, r * p->n * p->p_w),
                                  .b_k = p->p_w,
                                  .taps = 1,
                                  .c_in = y,
                                  .c = y,
                                  .c_m = p->p};
            p->kernels->gemm_act(&g);
        }
    }
}

flora_status flora_kronecker_forward(const flora_view *y, const flora_view *h, const flora_view *x, const flora_view *a,
                                     const flora_view *b, double scale, char error[FLORA_ERROR_SIZE]) {
    problem p = {.scale = scale, .x = x, .y = y, .h = h, .a = a, .b = b};
    const flora_named outputs[] = {{y, "y"}, {h, "h"}}, inputs[] = {{x, "x"}, {a, "a"}, {b, "b"}};
    flora_status status;
    if ((status = check(&p, "y", error)) != FLORA_OK || (status = expect_unit_stride(y, "y", error)) != FLORA_OK ||
        (status = flora_expect_disjoint(outputs, 2, inputs, 3, error)) != FLORA_OK)
        return status;
    if (p.rows == 0 || p.p == 0 || p.n == 0 || (p.m == 0 && h == NULL)) /* nothing is written, for any number of rows */
        return FLORA_OK;
    const size_t real = p.kernels->real_size;
    flora_scratch room = {.size = 0};
    cut(&p, 1);
    p.a_t = flora_reserve(&p.scratch, p.q, p.p_w, 1, real);
    p.b_s = flora_reserve(&p.scratch, p.m, p.n, 1, real);
    p.x_tile = flora_reserve(&room, p.tile, p.n, p.q, real);
    p.h_tile = flora_reserve(&room, p.tile, p.n, p.p_w, real);
    reserve_rooms(&p, &room);
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;
    p.kernels->pack(at(&p, p.a_t), p.p_w, a->data, a->strides[1], a->strides[0], p.q, p.p, 1.0);
    p.kernels->pack(at(&p, p.b_s), p.n, b->data, b->strides[0], b->strides[1], p.m, p.n, scale);
    flora_parallel(p.chunks, forward_chunk, &p);
    flora_release(&p.scratch);
    return FLORA_OK;
}

/* Backward --------------------------------------------------------------------------------------------------------- */

/* H turned round (rows, p, n_w), from h or from x. */
static void turn_h(const problem *p, int chunk, int64_t first, int64_t rows) {
    const void *h =
        p->h == NULL ? project(p, chunk, first, rows, NULL) : reals(p, p->h->data, first * p->h->strides[0]);
    const int64_t row = p->h == NULL ? p->n * p->p_w : p->h->strides[0], step = p->h == NULL ? 1 : p->h->strides[1];
    const int64_t width = p->h == NULL ? p->p_w : p->p * step;
    for (int64_t r = 0; r < rows; r++)
        p->kernels->pack(reals(p, in_room(p, chunk, p->turned), r * p->p * p->n_w), p->n_w, reals(p, h, r * row), step,
                         width, p->p, p->n, 1.0);
}

static void backward_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    const int64_t tasks = (p->rows + p->tile - 1) / p->tile;
    memset(in_sums(p, chunk, 0), 0, (size_t)p->sums_size);
    if (p->p < p->p_w)
        memset(in_room(p, chunk, p->y_tile), 0, (size_t)(p->tile * p->m * p->p_w) * p->kernels->real_size);
    void *dh = in_room(p, chunk, p->dh), *d_a = in_sums(p, chunk, p->d_a_sums), *d_b = in_sums(p, chunk, p->d_b_sums);
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const int64_t first = task * p->tile, rows = flora_min(p->tile, p->rows - first);
        int64_t y_row, y_w;
        const void *dy = load_dy(p, first, rows, in_room(p, chunk, p->y_tile), &y_row, &y_w);
        if (p->d_b != NULL) {
            turn_h(p, chunk, first, rows);
            int64_t *taps_y = in_room(p, chunk, p->taps_y), *taps_h = in_room(p, chunk, p->taps_h);
            for (int64_t r = 0; r < rows; r++)
                taps_y[r] = r * y_row, taps_h[r] = r * p->p * p->n_w;
            multiply(p, (flora_gemm){.m = p->m,
                                     .n = p->n_w,
                                     .k = p->p,
                                     .a = dy,
                                     .a_m = y_w,
                                     .a_k = 1,
                                     .b = in_room(p, chunk, p->turned),
                                     .b_k = p->n_w,
                                     .taps = rows,
                                     .a_taps = taps_y,
                                     .b_taps = taps_h,
                                     .c_in = d_b,
                                     .c = d_b,
                                     .c_m = p->n_w});
        }
        if (p->d_a == NULL && p->dx == NULL)
            continue;
        for (int64_t r = 0; r < rows; r++)
            multiply(p, (flora_gemm){.m = p->n,
                                     .n = p->p_w,
                                     .k = p->m,
                                     .a = at(p, p->b_s),
                                     .a_m = 1,
                                     .a_k = p->n,
                                     .b = reals(p, dy, r * y_row),
                                     .b_k = y_w,
                                     .c = reals(p, dh, r * p->n * p->p_w),
                                     .c_m = p->p_w});
        if (p->d_a != NULL)
            multiply(p, (flora_gemm){.m = p->q,
                                     .n = p->p_w,
                                     .k = rows * p->n,
                                     .a = load_x(p, first, rows, in_room(p, chunk, p->x_tile)),
                                     .a_m = 1,
                                     .a_k = p->q,
                                     .b = dh,
                                     .b_k = p->p_w,
                                     .c_in = d_a,
                                     .c = d_a,
                                     .c_m = p->p_w});
        for (int64_t r = 0; p->dx != NULL && r < rows; r++) {
            void *dx = row_of(p, p->dx, first + r);
            const flora_gemm g = {.m = p->n,
                                  .n = p->q,
                                  .k = p->p,
                                  .a = reals(p, dh, r * p->n * p->p_w),
                                  .a_m = p->p_w,
                                  .a_k = 1,
                                  .b = at(p, p->a_w),
                                  .b_k = p->q_w,
                                  .taps = 1,
                                  .c_in = dx,
                                  .c = dx,
                                  .c_m = p->q};
            p->kernels->gemm_act(&g);
        }
    }
}

flora_status flora_kronecker_backward(const flora_view *dx, const flora_view *d_a, const flora_view *d_b,
                                      const flora_view *dy, const flora_view *x, const flora_view *h,
                                      const flora_view *a, const flora_view *b, double scale,
                                      char error[FLORA_ERROR_SIZE]) {
    problem p = {.scale = scale, .x = x, .y = dy, .h = h, .a = a, .b = b, .dx = dx, .d_a = d_a, .d_b = d_b};
    const flora_named outputs[] = {{dx, "dx"}, {d_a, "d_a"}, {d_b, "d_b"}};
    const flora_named inputs[] = {{dy, "dy"}, {x, "x"}, {h, "h"}, {a, "a"}, {b, "b"}};
    flora_status status;
    if ((status = check(&p, "dy", error)) != FLORA_OK || (status = expect_unit_stride(dx, "dx", error)) != FLORA_OK ||
        (status = flora_expect_disjoint(outputs, 3, inputs, 5, error)) != FLORA_OK)
        return status;
    if (x == NULL && d_a != NULL)
        return flora_fail(error, FLORA_BAD_VALUE, "d_a needs x, which is left out");
    if (x == NULL && h == NULL && d_b != NULL)
        return flora_fail(error, FLORA_BAD_VALUE, "d_b needs h or x, and both are left out");
    if (p.rows == 0 || p.m == 0 || p.n == 0 || p.p == 0 || p.q == 0) { /* sums of nothing */
        flora_clear(d_a);
        flora_clear(d_b);
        return FLORA_OK;
    }
    const size_t real = p.kernels->real_size;
    const int needs_dh = d_a != NULL || dx != NULL, projects = d_b != NULL && h == NULL;
    flora_scratch room = {.size = 0}, sums = {.size = 0};
    cut(&p, 2);
    p.a_t = flora_reserve(&p.scratch, projects ? p.q : 0, p.p_w, 1, real);
    p.a_w = flora_reserve(&p.scratch, dx != NULL ? p.p : 0, p.q_w, 1, real);
    p.b_s = flora_reserve(&p.scratch, p.m, p.n, 1, real);
    p.x_tile = flora_reserve(&room, x != NULL ? p.tile : 0, p.n, p.q, real);
    p.y_tile = flora_reserve(&room, p.tile, p.m, p.p_w, real);
    p.h_tile = flora_reserve(&room, projects ? p.tile : 0, p.n, p.p_w, real);
    p.dh = flora_reserve(&room, needs_dh ? p.tile : 0, p.n, p.p_w, real);
    p.turned = flora_reserve(&room, d_b != NULL ? p.tile : 0, p.p, p.n_w, real);
    p.taps_y = flora_reserve(&room, p.tile, 1, 1, sizeof(int64_t));
    p.taps_h = flora_reserve(&room, p.tile, 1, 1, sizeof(int64_t));
    p.d_a_sums = flora_reserve(&sums, d_a != NULL ? p.q : 0, p.p_w, 1, real);
    p.d_b_sums = flora_reserve(&sums, d_b != NULL ? p.m : 0, p.n_w, 1, real);
    p.sums_size = (int64_t)sums.size;
    p.sums = flora_reserve(&p.scratch, p.chunks, p.sums_size, 1, 1);
    p.scratch.overflow |= sums.overflow;
    reserve_rooms(&p, &room);
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;
    if (projects)
        p.kernels->pack(at(&p, p.a_t), p.p_w, a->data, a->strides[1], a->strides[0], p.q, p.p, 1.0);
    if (dx != NULL)
        p.kernels->pack(at(&p, p.a_w), p.q_w, a->data, a->strides[0], a->strides[1], p.p, p.q, 1.0);
    p.kernels->pack(at(&p, p.b_s), p.n, b->data, b->strides[0], b->strides[1], p.m, p.n, scale);
    flora_parallel(p.chunks, backward_chunk, &p);
    const int64_t part = p.sums_size / (int64_t)real;
    if (d_a != NULL)
        p.kernels->sum(d_a->data, d_a->strides[1], d_a->strides[0], in_sums(&p, 0, p.d_a_sums), p.p_w, p.chunks, part,
                       p.q, p.p, 1.0);
    if (d_b != NULL)
        p.kernels->sum(d_b->data, d_b->strides[0], d_b->strides[1], in_sums(&p, 0, p.d_b_sums), p.n_w, p.chunks, part,
                       p.m, p.n, scale);
    flora_release(&p.scratch);
    return FLORA_OK;
}
