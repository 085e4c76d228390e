/* The weight from its Kronecker factors, and the adjoint.
 *
 * Types: out, weight and d_weight act; A and B and their gradients real; sums real, out rounded once.
 * Source: SURM, arXiv 2406.17740. With A (p, q), B (m, n) and the weight as (m, p, n, q):
 *     out = weight + s · B ⊗ A            row (o, t) of it: weight + s · B_o (n) · A_t (q), a product of depth 1
 *     dB = s · Σ dW ⊙ A over p and q      dA = s · Σ B ⊙ dW over m and n
 * The naive versions are flora/reference/kronecker.py's kronecker_reconstruct and kronecker_reconstruct_backward.
 *
 * One pass over the weight each, and the memory is what it takes. (B ⊗ A)ᵀ is Bᵀ ⊗ Aᵀ, so a transposed weight is
 * handled where it is. Every element of out and of a chunk's sums is computed in one order; sums over chunks are added
 * in theirs.
 */
#include "parallel.h"
#include "tucker.h"

#include <math.h>
#include <string.h>

enum { ROWS = 16 }; /* of d_weight in a task, with one row of B */

/* A call, with rows and columns exchanged if that gives the weight's rows unit stride. */
typedef struct {
    const flora_kernels *kernels;
    int64_t m, n, p, q, q_w, n_w;
    flora_view out, weight, a, b;  /* out: d_weight in backward */
    int turns, has_weight, chunks; /* turns: they are exchanged */
    flora_scratch scratch;
    size_t a_w, b_s;                    /* A (p, q_w), and B (m, n), in forward times s */
    size_t rooms, block, lanes, turned; /* within a room: (ROWS, n, q), (n, LANES) and its transpose */
    size_t sums, d_a_sums, d_b_sums;    /* within the sums: (p, q_w) and (m, n_w) */
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

static flora_view transposed(const flora_view *view) {
    flora_view turned = *view;
    turned.shape[0] = view->shape[1], turned.shape[1] = view->shape[0];
    turned.strides[0] = view->strides[1], turned.strides[1] = view->strides[0];
    return turned;
}

/* Checks what forward and backward share; `out` is d_weight in backward. Sets the extents. */
static flora_status check(problem *p, const flora_view *out, const char *name, const flora_view *a, const flora_view *b,
                          double scale, char *error) {
    const flora_dtype real = flora_compute_dtype(out->dtype);
    flora_status status;
    if (isnan(scale))
        return flora_fail(error, FLORA_BAD_VALUE, "scale must be a number, not nan");
    if ((status = flora_expect_ndim(out, name, 2, error)) != FLORA_OK ||
        (status = flora_expect_ndim(a, "a", 2, error)) != FLORA_OK ||
        (status = flora_expect_ndim(b, "b", 2, error)) != FLORA_OK ||
        (status = flora_expect(a, "a", real, 2, a->shape, error)) != FLORA_OK ||
        (status = flora_expect(b, "b", real, 2, b->shape, error)) != FLORA_OK)
        return status;
    int64_t shape[2];
    if (__builtin_mul_overflow(b->shape[0], a->shape[0], &shape[0]) ||
        __builtin_mul_overflow(b->shape[1], a->shape[1], &shape[1]))
        return flora_fail(error, FLORA_BAD_SHAPE, "a of %lld x %lld and b of %lld x %lld have too large a product",
                          (long long)a->shape[0], (long long)a->shape[1], (long long)b->shape[0],
                          (long long)b->shape[1]);
    if ((status = flora_expect(out, name, out->dtype, 2, shape, error)) != FLORA_OK)
        return status;
    p->turns = out->strides[1] != 1 && shape[1] > 1 && (out->strides[0] == 1 || shape[0] <= 1);
    p->kernels = flora_isa_kernels(out->dtype);
    p->out = p->turns ? transposed(out) : *out;
    p->a = p->turns ? transposed(a) : *a;
    p->b = p->turns ? transposed(b) : *b;
    p->p = p->a.shape[0], p->q = p->a.shape[1];
    p->m = p->b.shape[0], p->n = p->b.shape[1];
    p->q_w = flora_round_up(p->q, p->kernels->lanes);
    p->n_w = flora_round_up(p->n, p->kernels->lanes);
    return FLORA_OK;
}

/* Whether the weight has no elements; the factors' other extents may be any then. */
static int is_empty(const problem *p) {
    return p->m == 0 || p->p == 0 || p->n == 0 || p->q == 0;
}

static void pack_factors(const problem *p, double scale) {
    p->kernels->pack(at(p, p->a_w), p->q_w, p->a.data, p->a.strides[0], p->a.strides[1], p->p, p->q, 1.0);
    p->kernels->pack(at(p, p->b_s), p->n, p->b.data, p->b.strides[0], p->b.strides[1], p->m, p->n, scale);
}

/* Forward ---------------------------------------------------------------------------------------------------------- */

/* to (n), unit stride = from (n) */
static void copy_row(void *to_, const void *from_, int64_t step, int64_t n, size_t size) {
    char *to = to_;
    const char *from = from_;
    for (; n > 0; n--, to += size, from += step * (int64_t)size)
        memcpy(to, from, size);
}

static void write_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    const int64_t rows = p->m * p->p;
    for (int64_t row = flora_chunk_begin(rows, chunk, p->chunks); row < flora_chunk_begin(rows, chunk + 1, p->chunks);
         row++) {
        flora_gemm g = {.m = p->n, .n = p->q, .k = 1, .taps = 1, .a_m = 1, .c_m = p->q};
        g.a = reals(p, at(p, p->b_s), row / p->p * p->n);
        g.b = reals(p, at(p, p->a_w), row % p->p * p->q_w);
        g.c = flora_at(p->out.data, row * p->out.strides[0], p->kernels->act_size);
        if (p->has_weight) {
            g.c_in = flora_at(p->weight.data, row * p->weight.strides[0], p->kernels->act_size);
            if (p->weight.strides[1] != 1) {
                copy_row(g.c, g.c_in, p->weight.strides[1], p->n * p->q, p->kernels->act_size);
                g.c_in = g.c;
            }
        }
        p->kernels->gemm_act(&g);
    }
}

flora_status flora_kronecker_reconstruct(const flora_view *out, const flora_view *weight, const flora_view *a,
                                         const flora_view *b, double scale, char error[FLORA_ERROR_SIZE]) {
    problem p = {.has_weight = weight != NULL};
    flora_status status;
    if ((status = check(&p, out, "out", a, b, scale, error)) != FLORA_OK ||
        (status = flora_expect(weight, "weight", out->dtype, 2, out->shape, error)) != FLORA_OK)
        return status;
    if (p.n * p.q > 1 && p.out.strides[1] != 1)
        return flora_fail(error, FLORA_BAD_LAYOUT, "out must have unit stride in one of its modes, not %lld and %lld",
                          (long long)out->strides[0], (long long)out->strides[1]);
    if (weight != NULL)
        p.weight = p.turns ? transposed(weight) : *weight;
    const int in_place = weight != NULL && weight->data == out->data && weight->strides[0] == out->strides[0] &&
                         weight->strides[1] == out->strides[1];
    const flora_named outputs[] = {{out, "out"}};
    const flora_named inputs[] = {{in_place ? NULL : weight, "weight"}, {a, "a"}, {b, "b"}};
    if ((status = flora_expect_disjoint(outputs, 1, inputs, 3, error)) != FLORA_OK || is_empty(&p))
        return status;
    p.a_w = flora_reserve(&p.scratch, p.p, p.q_w, 1, p.kernels->real_size);
    p.b_s = flora_reserve(&p.scratch, p.m, p.n, 1, p.kernels->real_size);
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;
    pack_factors(&p, scale);
    p.chunks = flora_chunks(p.m * p.p, 2.0 * (double)(p.m * p.p) * (double)(p.n * p.q));
    flora_parallel(p.chunks, write_chunk, &p);
    flora_release(&p.scratch);
    return FLORA_OK;
}

/* Backward --------------------------------------------------------------------------------------------------------- */

/* The vectors of sums of dB's row `o`, added up. */
static void finish_row(const problem *p, int chunk, int64_t o) {
    const int64_t lanes = p->kernels->lanes;
    void *turned = in_room(p, chunk, p->turned);
    p->kernels->transpose(turned, p->n_w, in_room(p, chunk, p->lanes), lanes, p->n, lanes);
    p->kernels->sum(reals(p, in_sums(p, chunk, p->d_b_sums), o * p->n_w), 0, 1, turned, 0, lanes, p->n_w, 1, p->n, 1.0);
}

static void sum_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    const int64_t blocks = (p->p + ROWS - 1) / ROWS, begin = flora_chunk_begin(p->m * blocks, chunk, p->chunks);
    const int64_t end = flora_chunk_begin(p->m * blocks, chunk + 1, p->chunks), columns = p->n * p->q;
    const int direct = p->kernels->act_size == p->kernels->real_size && (p->out.strides[1] == 1 || columns <= 1);
    void *lanes = in_room(p, chunk, p->lanes), *room = in_room(p, chunk, p->block);
    memset(in_sums(p, chunk, 0), 0, (size_t)p->sums_size);
    for (int64_t task = begin; task < end; task++) {
        const int64_t o = task / blocks, t = task % blocks * ROWS, rows = flora_min(ROWS, p->p - t);
        const void *d = flora_at(p->out.data, (o * p->p + t) * p->out.strides[0], p->kernels->act_size);
        if (!direct)
            p->kernels->widen(room, columns, d, p->out.strides[0], p->out.strides[1], rows, columns);
        if (task == begin || t == 0)
            memset(lanes, 0, (size_t)(p->n * p->kernels->lanes) * p->kernels->real_size);
        const flora_kronecker_sums g = {.rows = rows,
                                        .n = p->n,
                                        .q = p->q,
                                        .d = direct ? d : room,
                                        .d_row = direct ? p->out.strides[0] : columns,
                                        .a = reals(p, at(p, p->a_w), t * p->q_w),
                                        .a_row = p->q_w,
                                        .b = reals(p, at(p, p->b_s), o * p->n),
                                        .d_a = reals(p, in_sums(p, chunk, p->d_a_sums), t * p->q_w),
                                        .d_b = lanes};
        p->kernels->kronecker_sums(&g);
        if (task == end - 1 || t + rows == p->p)
            finish_row(p, chunk, o);
    }
}

/* view = s · the sums of all chunks */
static void add_up(const problem *p, const flora_view *view, size_t sums, int64_t width, double scale) {
    const flora_view d = p->turns ? transposed(view) : *view;
    p->kernels->sum(d.data, d.strides[0], d.strides[1], in_sums(p, 0, sums), width, p->chunks,
                    p->sums_size / (int64_t)p->kernels->real_size, d.shape[0], d.shape[1], scale);
}

flora_status flora_kronecker_reconstruct_backward(const flora_view *d_a, const flora_view *d_b,
                                                  const flora_view *d_weight, const flora_view *a, const flora_view *b,
                                                  double scale, char error[FLORA_ERROR_SIZE]) {
    problem p = {.chunks = 1};
    const flora_dtype real_type = flora_compute_dtype(d_weight->dtype);
    flora_status status;
    if ((status = check(&p, d_weight, "d_weight", a, b, scale, error)) != FLORA_OK ||
        (status = flora_expect(d_a, "d_a", real_type, 2, a->shape, error)) != FLORA_OK ||
        (status = flora_expect(d_b, "d_b", real_type, 2, b->shape, error)) != FLORA_OK)
        return status;
    const flora_named outputs[] = {{d_a, "d_a"}, {d_b, "d_b"}};
    const flora_named inputs[] = {{d_weight, "d_weight"}, {a, "a"}, {b, "b"}};
    if ((status = flora_expect_disjoint(outputs, 2, inputs, 3, error)) != FLORA_OK)
        return status;
    if (is_empty(&p)) {
        flora_clear(d_a);
        flora_clear(d_b);
        return FLORA_OK;
    }
    const size_t real = p.kernels->real_size;
    const int64_t lanes = p.kernels->lanes;
    p.chunks = flora_chunks(p.m * ((p.p + ROWS - 1) / ROWS), 4.0 * (double)(p.m * p.p) * (double)(p.n * p.q));
    flora_scratch room = {.size = 0}, sums = {.size = 0};
    p.a_w = flora_reserve(&p.scratch, p.p, p.q_w, 1, real);
    p.b_s = flora_reserve(&p.scratch, p.m, p.n, 1, real);
    p.block = flora_reserve(&room, flora_min(ROWS, p.p), p.n, p.q, real);
    p.lanes = flora_reserve(&room, p.n_w, lanes, 1, real);
    p.turned = flora_reserve(&room, p.n_w, lanes, 1, real);
    p.d_a_sums = flora_reserve(&sums, p.p, p.q_w, 1, real);
    p.d_b_sums = flora_reserve(&sums, p.m, p.n_w, 1, real);
    p.room_size = (int64_t)room.size, p.sums_size = (int64_t)sums.size;
    p.rooms = flora_reserve(&p.scratch, p.chunks, p.room_size, 1, 1);
    p.sums = flora_reserve(&p.scratch, p.chunks, p.sums_size, 1, 1);
    p.scratch.overflow |= room.overflow | sums.overflow;
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;
    pack_factors(&p, 1.0);
    flora_parallel(p.chunks, sum_chunk, &p);
    if (d_a != NULL)
        add_up(&p, d_a, p.d_a_sums, p.q_w, scale);
    if (d_b != NULL)
        add_up(&p, d_b, p.d_b_sums, p.n_w, scale);
    flora_release(&p.scratch);
    return FLORA_OK;
}
