/* W plus a Toeplitz update, assembled, and the adjoint.
 *
 * Types: out, weight and d_weight act; diagonals, their gradients and sums real; out is rounded once. The naive
 * versions are toeplitz_reconstruct and toeplitz_reconstruct_backward of flora/reference/toeplitz.py.
 *
 * A product of Toeplitz matrices is none, but each of its diagonals changes from one element to the next by two
 * products of numbers (`slide`): the displacement of a product of two has rank 2. The matrix is cut into blocks whose
 * first rows are computed directly, all in one product; then every block slides on its own. The adjoint goes the other
 * way: the diagonals of d_weight are summed from a block's last row to its first (`slide_back`).
 *
 * With l the diagonals of L and r those of R in reverse, element (i, j) is Σ_m l[i + m] · r[j + m]: transposed, the two
 * change places. So `rows` and `columns` are the modes of out by their strides, and `lines` and `across` their
 * diagonals.
 */
#include "toeplitz.h"
#include "parallel.h"

#include <math.h>
#include <string.h>

enum {
    BLOCK = 256,  /* rows, about: rounding errors add up over so many steps */
    PANEL = 1024, /* columns, at most */
    PIECE = 256,  /* columns of first rows that a task computes */
    PARTS = 8     /* rows of the products that first rows need backward */
};

/* Checks ----------------------------------------------------------------------------------------------------------- */

flora_status flora_toeplitz_check(flora_toeplitz *toeplitz, int64_t d_out, int64_t d_in, flora_dtype act,
                                  const flora_view *left, const flora_view *right, double scale, char *error) {
    const flora_dtype real = flora_compute_dtype(act);
    flora_status status;
    if (isnan(scale))
        return flora_fail(error, FLORA_BAD_VALUE, "scale must be a number, not nan");
    if ((status = flora_expect_ndim(left, "left", 2, error)) != FLORA_OK ||
        (status = flora_expect_ndim(right, "right", 2, error)) != FLORA_OK)
        return status;
    *toeplitz = (flora_toeplitz){
        .left = left, .right = right, .d_out = d_out, .d_in = d_in, .inner = d_in, .terms = left->shape[0]};
    if (right != NULL && left->shape[1] < d_out)
        return flora_fail(error, FLORA_BAD_SHAPE,
                          "left has %lld diagonals, and a matrix of %lld rows has as many at least",
                          (long long)left->shape[1], (long long)d_out);
    if (right != NULL)
        toeplitz->inner = left->shape[1] - d_out + 1;
    const int64_t left_shape[] = {toeplitz->terms, flora_max(0, d_out + toeplitz->inner - 1)};
    const int64_t right_shape[] = {toeplitz->terms, toeplitz->inner + d_in - 1};
    if ((status = flora_expect(left, "left", real, 2, left_shape, error)) != FLORA_OK)
        return status;
    return flora_expect(right, "right", real, 2, right_shape, error);
}

flora_status flora_toeplitz_check_gradients(const flora_toeplitz *toeplitz, flora_dtype act, const flora_view *d_left,
                                            const flora_view *d_right, char *error) {
    const flora_dtype real = flora_compute_dtype(act);
    if (d_right != NULL && toeplitz->right == NULL)
        return flora_fail(error, FLORA_BAD_VALUE, "right is left out, so it has no gradient");
    const flora_status status = flora_expect(d_left, "d_left", real, 2, toeplitz->left->shape, error);
    if (status != FLORA_OK || d_right == NULL)
        return status;
    return flora_expect(d_right, "d_right", real, 2, toeplitz->right->shape, error);
}

/* The problem ------------------------------------------------------------------------------------------------------ */

/* One sequence of diagonals in scratch, (terms, width) after `before` zeros each; `reversed` says how it is read from
 * the view. */
typedef struct {
    const flora_view *view;
    int reversed;
    int64_t length, before, width;
    size_t numbers, gradients; /* gradients: (chunks, terms, width) */
} sequence;

typedef struct {
    const flora_kernels *kernels;
    double scale;
    int64_t rows, columns, inner, terms; /* terms: 0 for a single matrix, whose diagonals are summed first */
    int transposed;                      /* rows are the columns of out */
    sequence lines, across;              /* without terms: across alone, the diagonals of the whole matrix */
    int64_t blocks, block, panels, panel;
    int64_t lead, reach; /* diagonals of a block and panel, and how many of them begin at its left edge */
    int chunks;
    char *out;
    const char *weight;
    int64_t out_row, weight_row, weight_column;
    flora_scratch scratch;
    size_t diagonals; /* forward: (panels, blocks, reach) */

    int64_t part, sums_row;       /* backward */
    size_t rooms;                 /* of each chunk: */
    size_t d_row, reversed, sums; /* a row of d_weight; the diagonals, and in reverse, between `part` zeros; sums */
    int64_t room_size;
} problem;

static void *at(const problem *p, size_t offset, int64_t n) {
    return p->scratch.base + offset + n * (int64_t)p->kernels->real_size;
}

static void *in_room(const problem *p, int chunk, size_t offset, int64_t n) {
    return at(p, p->rooms + (size_t)(chunk * p->room_size) + offset, n);
}

static void *term_of(const problem *p, const sequence *s, size_t offset, int64_t term, int64_t n) {
    return at(p, offset, term * s->width + s->before + n);
}

/* Blocks and panels: by the extents alone, so that results do not depend on the number of threads. */
static void cut(problem *p) {
    p->blocks = p->rows <= 64 ? 1 : 2 * ((p->rows + 2 * BLOCK - 1) / (2 * BLOCK));
    p->block = (p->rows + p->blocks - 1) / p->blocks;
    p->blocks = (p->rows + p->block - 1) / flora_max(1, p->block);
    p->panels = flora_max(1, (p->columns + PANEL - 1) / PANEL);
    p->panel = (p->columns + p->panels - 1) / p->panels;
    p->panels = (p->columns + p->panel - 1) / flora_max(1, p->panel);
    p->lead = flora_round_up(p->block, p->kernels->lanes) + p->kernels->lanes;
    p->reach = p->lead + flora_round_up(p->panel, p->kernels->lanes) + p->kernels->lanes;
}

/* Fills in everything but out: `view` is out or d_weight. */
static void plan(problem *p, const flora_toeplitz *t, const flora_view *view) {
    const int single = t->right == NULL || t->terms == 0;
    p->transposed = view->strides[1] != 1 && view->shape[1] > 1 && (view->strides[0] == 1 || view->shape[0] <= 1);
    p->rows = p->transposed ? t->d_in : t->d_out;
    p->columns = p->transposed ? t->d_out : t->d_in;
    p->terms = single ? 0 : t->terms;
    p->inner = t->inner;
    cut(p);
    const sequence left = {.view = t->left, .reversed = 0, .length = t->left->shape[1]};
    const sequence right = {.view = t->right, .reversed = 1, .length = single ? 0 : t->right->shape[1]};
    p->lines = p->transposed ? right : left;
    p->across = p->transposed ? left : right;
    if (single) {
        p->across = left;
        p->across.reversed = !p->transposed;
        p->across.length = p->rows + p->columns - 1;
        p->lines.length = 0;
    }
    sequence *const sequences[] = {&p->lines, &p->across};
    for (int i = 0; i < 2; i++) {
        sequence *s = sequences[i];
        s->before = single ? 0 : i ? p->lead + p->kernels->lanes : p->kernels->lanes;
        s->width = flora_round_up(s->before + s->length, p->kernels->lanes) + 2 * p->kernels->lanes;
        s->width += i && !single ? p->reach : 0;
        s->numbers = flora_reserve(&p->scratch, flora_max(1, t->terms), s->width, 1, p->kernels->real_size);
    }
}

static void load(const problem *p, const sequence *s, double scale, int64_t terms) {
    const flora_kernels *k = p->kernels;
    memset(at(p, s->numbers, 0), 0, (size_t)(flora_max(1, terms) * s->width) * k->real_size);
    for (int64_t t = 0; t < terms; t++) {
        const int64_t stride = s->view->strides[1], first = s->reversed ? (s->length - 1) * stride : 0;
        k->pack(term_of(p, s, s->numbers, t, 0), s->length,
                flora_at(s->view->data, t * s->view->strides[0] + first, k->real_size), 0,
                s->reversed ? -stride : stride, 1, s->length, scale);
    }
}

/* The row before a block's first, a panel of it from the column before on; for a single matrix the first row itself,
 * which is among its diagonals. */
static void *before_first(const problem *p, int64_t block, int64_t panel) {
    if (p->terms == 0)
        return term_of(p, &p->across, p->across.numbers, 0, p->rows - 1 - block * p->block + panel * p->panel);
    return at(p, p->diagonals, (panel * p->blocks + block) * p->reach + p->lead);
}

/* Forward ---------------------------------------------------------------------------------------------------------- */

/* diagonals (panel, blocks, piece) = Σ over terms and m of lines[row before + m] · across[column before + m] */
static void first_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    const int64_t pieces = (p->reach + PIECE - 1) / PIECE, tasks = p->panels * pieces;
    int64_t a_taps[16], b_taps[16];
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const int64_t panel = task / pieces, piece = task % pieces * PIECE;
        void *to = at(p, p->diagonals, panel * p->blocks * p->reach + piece);
        for (int64_t term = 0; term < p->terms; term += 16) {
            const int64_t taps = flora_min(16, p->terms - term);
            for (int64_t t = 0; t < taps; t++)
                a_taps[t] = t * p->lines.width, b_taps[t] = t * p->across.width;
            p->kernels->gemm(&(flora_gemm){
                .m = p->blocks,
                .n = flora_min(PIECE, p->reach - piece),
                .k = p->inner,
                .a = term_of(p, &p->lines, p->lines.numbers, term, -1),
                .a_m = p->block,
                .a_k = 1,
                .b = term_of(p, &p->across, p->across.numbers, term, panel * p->panel + piece - p->lead - 1),
                .b_k = 1,
                .taps = taps,
                .a_taps = a_taps,
                .b_taps = b_taps,
                .c_in = term ? to : NULL,
                .c = to,
                .c_m = p->reach});
        }
    }
}

static void slide_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    const int64_t tasks = p->blocks * p->panels, size = (int64_t)p->kernels->act_size;
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const int64_t block = task / p->panels, panel = task % p->panels;
        const int64_t row = block * p->block, column = panel * p->panel;
        flora_slide slide = {.rows = flora_min(p->block, p->rows - row),
                             .columns = flora_min(p->panel, p->columns - column),
                             .terms = p->terms,
                             .inner = p->inner,
                             .left = term_of(p, &p->lines, p->lines.numbers, 0, row),
                             .right = term_of(p, &p->across, p->across.numbers, 0, column),
                             .left_term = p->lines.width,
                             .right_term = p->across.width,
                             .diagonals = before_first(p, block, panel),
                             .out = p->out + (row * p->out_row + column) * size,
                             .out_row = p->out_row,
                             .weight_row = p->weight_row};
        if (p->weight != NULL) {
            slide.weight = p->weight + (row * p->weight_row + column) * size;
        } else {
            slide.weight = slide.out, slide.weight_row = slide.out_row;
            for (int64_t i = 0; i < slide.rows; i++)
                memset((char *)slide.out + i * slide.out_row * size, 0, (size_t)(slide.columns * size));
        }
        p->kernels->slide(&slide);
    }
}

/* out = weight, element by element, where weight has no unit stride along out's. */
static void copy_weight(const problem *p) {
    const int64_t size = (int64_t)p->kernels->act_size;
    for (int64_t i = 0; i < p->rows; i++)
        for (int64_t j = 0; j < p->columns; j++)
            memcpy(p->out + (i * p->out_row + j) * size, p->weight + (i * p->weight_row + j * p->weight_column) * size,
                   (size_t)size);
}

static int same_layout(const flora_view *a, const flora_view *b) {
    return (a->shape[0] <= 1 || a->strides[0] == b->strides[0]) && (a->shape[1] <= 1 || a->strides[1] == b->strides[1]);
}

flora_status flora_toeplitz_reconstruct(const flora_view *out, const flora_view *weight, const flora_view *left,
                                        const flora_view *right, double scale, char error[FLORA_ERROR_SIZE]) {
    problem p = {.kernels = flora_isa_kernels(out->dtype), .scale = scale};
    flora_toeplitz update;
    flora_status status;
    if ((status = flora_expect_ndim(out, "out", 2, error)) != FLORA_OK ||
        (status = flora_expect(out, "out", out->dtype, 2, out->shape, error)) != FLORA_OK ||
        (status = flora_expect(weight, "weight", out->dtype, 2, out->shape, error)) != FLORA_OK ||
        (status = flora_toeplitz_check(&update, out->shape[0], out->shape[1], out->dtype, left, right, scale, error)) !=
            FLORA_OK)
        return status;
    const int in_place = weight != NULL && weight->data == out->data && same_layout(out, weight);
    const flora_named outputs[] = {{out, "out"}};
    const flora_named inputs[] = {{in_place ? NULL : weight, "weight"}, {left, "left"}, {right, "right"}};
    if ((status = flora_expect_disjoint(outputs, 1, inputs, 3, error)) != FLORA_OK)
        return status;
    if (update.d_out == 0 || update.d_in == 0)
        return FLORA_OK;
    plan(&p, &update, out);
    const int row = p.transposed, column = !row;
    if (p.columns > 1 && out->strides[column] != 1)
        return flora_fail(error, FLORA_BAD_LAYOUT, "out must have unit stride in one of its modes, not %lld and %lld",
                          (long long)out->strides[0], (long long)out->strides[1]);
    p.out = out->data, p.out_row = out->strides[row];
    if (weight != NULL) {
        p.weight = weight->data;
        p.weight_row = weight->strides[row], p.weight_column = p.columns > 1 ? weight->strides[column] : 1;
    }
    p.diagonals = flora_reserve(&p.scratch, p.terms ? p.panels * p.blocks : 0, p.reach, 1, p.kernels->real_size);
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;
    if (p.weight != NULL && p.weight_column != 1) {
        copy_weight(&p);
        p.weight = p.out, p.weight_row = p.out_row;
    }
    load(&p, &p.across, p.terms ? 1.0 : scale, update.terms);
    if (p.terms == 0)
        for (int64_t t = 1; t < update.terms; t++)
            p.kernels->add(term_of(&p, &p.across, p.across.numbers, 0, 0), 0,
                           term_of(&p, &p.across, p.across.numbers, t, 0), 0, 1, p.across.length);
    else
        load(&p, &p.lines, scale, update.terms);
    const double size = (double)p.rows * (double)p.columns;
    if (p.terms > 0) {
        p.chunks = flora_chunks(p.panels * ((p.reach + PIECE - 1) / PIECE),
                                2.0 * (double)(p.panels * p.blocks * p.terms) * (double)p.inner * (double)p.reach);
        flora_parallel(p.chunks, first_chunk, &p);
    }
    p.chunks = flora_chunks(p.blocks * p.panels, size * (4.0 * (double)p.terms + 8.0));
    flora_parallel(p.chunks, slide_chunk, &p);
    flora_release(&p.scratch);
    return FLORA_OK;
}

/* Backward --------------------------------------------------------------------------------------------------------- */

/* Where a chunk sums the gradients of number n of a sequence. */
static void *gradient_of(const problem *p, const sequence *s, int chunk, int64_t term, int64_t n) {
    return term_of(p, s, s->gradients, chunk * flora_max(1, p->terms) + term, n);
}

/* The gradients of what the row before a block's first was computed from, u being that of the row:
 *     d_line[m] += Σ_x u[x] · across[x + m] and d_across[x + m] += u[x] · line[m], m < inner, x < reach.
 * Written as products with PARTS rows, which share what they load: of d_line, and of line. */
static void first_row_back(const problem *p, int chunk, int64_t row, int64_t column, const void *u) {
    const flora_kernels *k = p->kernels;
    const int64_t part = p->part, width = p->reach + part - 1, real = (int64_t)k->real_size;
    void *reversed = in_room(p, chunk, p->reversed, part), *sums = in_room(p, chunk, p->sums, 0);
    k->copy(reversed, 0, (const char *)u + (p->reach - 1) * real, 0, -1, 1, p->reach);
    for (int64_t term = 0; term < p->terms; term++) {
        char *d_line = gradient_of(p, &p->lines, chunk, term, row);
        char *d_across = gradient_of(p, &p->across, chunk, term, column);
        const void *line = term_of(p, &p->lines, p->lines.numbers, term, row);
        flora_gemm g = {.m = PARTS, .n = part, .k = width, .taps = 1, .c = sums, .c_m = p->sums_row};
        g.a = term_of(p, &p->across, p->across.numbers, term, column), g.a_m = part, g.a_k = 1;
        g.b = (char *)reversed + (p->reach - 1) * real, g.b_k = -1;
        k->gemm(&g);
        for (int64_t m = 0; m < p->inner; m += part)
            k->add(d_line + m * real, 0, (char *)sums + m / part * p->sums_row * real, 0, 1,
                   flora_min(part, p->inner - m));

        g.n = width, g.k = part;
        g.a = line;
        g.b = u;
        g.m = p->inner / part;
        k->gemm(&g);
        for (int64_t m = 0; m < g.m; m++)
            k->add(d_across + m * part * real, 0, (char *)sums + m * p->sums_row * real, 0, 1, width);
        if (g.m * part == p->inner)
            continue;
        g.k = p->inner - g.m * part;
        g.a = (const char *)line + g.m * part * real;
        g.c = d_across + g.m * part * real;
        g.c_in = g.c;
        g.m = 1;
        k->gemm(&g);
    }
}

static void slide_back_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    const flora_kernels *k = p->kernels;
    const int64_t tasks = p->blocks * p->panels, terms = flora_max(1, p->terms);
    const sequence *const sequences[] = {&p->lines, &p->across};
    for (int i = 0; i < 2; i++)
        memset(at(p, sequences[i]->gradients, chunk * terms * sequences[i]->width), 0,
               (size_t)(terms * sequences[i]->width) * k->real_size);
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, p->chunks); task++) {
        const int64_t first = task / p->panels * p->block, column = task % p->panels * p->panel;
        const int64_t columns = flora_min(p->panel, p->columns - column);
        void *room = in_room(p, chunk, p->d_row, 0);
        char *u = in_room(p, chunk, p->diagonals, p->part);
        flora_slide_back step = {.rows = flora_min(p->block, p->rows - first),
                                 .columns = columns,
                                 .terms = p->terms,
                                 .inner = p->inner,
                                 .left_term = p->lines.width,
                                 .right_term = p->across.width};
        if (p->terms > 0) {
            memset(in_room(p, chunk, 0, 0), 0, (size_t)p->room_size);
            step.diagonals = u + p->lead * (int64_t)k->real_size;
            step.left = term_of(p, &p->lines, p->lines.numbers, 0, first);
            step.right = term_of(p, &p->across, p->across.numbers, 0, column);
            step.d_left = gradient_of(p, &p->lines, chunk, 0, first);
            step.d_right = gradient_of(p, &p->across, chunk, 0, column);
        } else {
            step.diagonals = gradient_of(p, &p->across, chunk, 0, p->rows - 1 - first + column);
        }
        for (step.row = step.rows - 1; step.row >= 0; step.row--) {
            step.d_row =
                p->weight + ((first + step.row) * p->weight_row + column * p->weight_column) * (int64_t)k->act_size;
            if (k->act_size != k->real_size || p->weight_column != 1) {
                k->widen(room, 0, step.d_row, 0, p->weight_column, 1, columns);
                step.d_row = room;
            }
            p->kernels->spectra->slide_back(&step);
        }
        if (p->terms > 0)
            first_row_back(p, chunk, first - 1, column - p->lead - 1, u);
    }
}

/* d_view = scale · the sums of all chunks */
static void store_gradients(const problem *p, const sequence *s, const flora_view *d_view, double scale) {
    if (d_view == NULL)
        return;
    const int64_t stride = d_view->strides[1], first = s->reversed ? (s->length - 1) * stride : 0;
    for (int64_t t = 0; t < d_view->shape[0]; t++)
        p->kernels->sum(flora_at(d_view->data, t * d_view->strides[0] + first, p->kernels->real_size), 0,
                        s->reversed ? -stride : stride, gradient_of(p, s, 0, p->terms ? t : 0, 0), 0, p->chunks,
                        flora_max(1, p->terms) * s->width, 1, d_view->shape[1], scale);
}

flora_status flora_toeplitz_reconstruct_backward(const flora_view *d_left, const flora_view *d_right,
                                                 const flora_view *d_weight, const flora_view *left,
                                                 const flora_view *right, double scale, char error[FLORA_ERROR_SIZE]) {
    problem p = {.kernels = flora_isa_kernels(d_weight->dtype), .scale = scale};
    flora_toeplitz update;
    flora_status status;
    if ((status = flora_expect_ndim(d_weight, "d_weight", 2, error)) != FLORA_OK ||
        (status = flora_expect(d_weight, "d_weight", d_weight->dtype, 2, d_weight->shape, error)) != FLORA_OK ||
        (status = flora_toeplitz_check(&update, d_weight->shape[0], d_weight->shape[1], d_weight->dtype, left, right,
                                       scale, error)) != FLORA_OK ||
        (status = flora_toeplitz_check_gradients(&update, d_weight->dtype, d_left, d_right, error)) != FLORA_OK)
        return status;
    const flora_named outputs[] = {{d_left, "d_left"}, {d_right, "d_right"}};
    const flora_named inputs[] = {{d_weight, "d_weight"}, {left, "left"}, {right, "right"}};
    if ((status = flora_expect_disjoint(outputs, 2, inputs, 3, error)) != FLORA_OK)
        return status;
    if (update.terms == 0 || (d_left == NULL && d_right == NULL))
        return FLORA_OK;
    if (update.d_out == 0 || update.d_in == 0) { /* sums of nothing */
        flora_clear(d_left);
        flora_clear(d_right);
        return FLORA_OK;
    }
    plan(&p, &update, d_weight);
    p.weight = d_weight->data;
    p.weight_row = d_weight->strides[p.transposed];
    p.weight_column = p.columns > 1 ? d_weight->strides[!p.transposed] : 1;
    const size_t real = p.kernels->real_size;
    const int64_t tasks = p.columns ? p.blocks * p.panels : 0;
    p.chunks = flora_chunks(tasks, (double)p.rows * (double)p.columns * (8.0 * (double)p.terms + 4.0));
    flora_scratch room = {.size = 0};
    p.part = (p.inner + PARTS - 1) / PARTS;
    p.sums_row = flora_round_up(p.reach + p.part, p.kernels->lanes);
    p.d_row = flora_reserve(&room, p.panel, 1, 1, real);
    p.diagonals = flora_reserve(&room, p.terms ? p.reach + 2 * p.part : 0, 1, 1, real);
    p.reversed = flora_reserve(&room, p.terms ? p.reach + 2 * p.part : 0, 1, 1, real);
    p.sums = flora_reserve(&room, p.terms ? PARTS : 0, p.sums_row, 1, real);
    p.room_size = (int64_t)room.size;
    p.rooms = flora_reserve(&p.scratch, p.chunks, p.room_size, 1, 1);
    p.scratch.overflow |= room.overflow;
    sequence *const sequences[] = {&p.lines, &p.across};
    for (int i = 0; i < 2; i++)
        sequences[i]->gradients = flora_reserve(&p.scratch, p.chunks, flora_max(1, p.terms), sequences[i]->width, real);
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;
    if (p.terms > 0) {
        load(&p, &p.lines, scale, p.terms);
        load(&p, &p.across, 1.0, p.terms);
    }
    flora_parallel(p.chunks, slide_back_chunk, &p);
    const int lines_right = p.transposed && p.terms;
    if (p.terms > 0)
        store_gradients(&p, &p.lines, lines_right ? d_right : d_left, scale);
    store_gradients(&p, &p.across, p.terms == 0 || lines_right ? d_left : d_right, p.terms ? 1.0 : scale);
    flora_release(&p.scratch);
    return FLORA_OK;
}
