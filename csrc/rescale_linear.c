/* The gradients of the row and column vectors that rescale a Linear's weight, without its weight gradient as an array.
 *
 * Types: x, dy and weight act, the vectors and their gradients real; all sums real.
 * Source: RLRR, arXiv 2403.19067, y = x · (W ⊙ (1 + s · row · column))ᵀ. With dW' = dyᵀ · x (d_out, d_in),
 *     d_row = s · Σ dW' ⊙ W · column over d_in        d_column = s · Σ dW' ⊙ W · row over d_out
 * The naive version is flora/reference/rescale.py's rescale_linear_backward.
 *
 * dW' is computed tile by tile and each tile summed up with its part of W while it is in the second-level cache. A tile
 * is built from blocks of DEPTH rows: dy's and x's parts are copied (widened) to scratch, x's as panels of two vectors,
 * so that a panel and what dy's strip needs of its block stay in the first-level cache. Each chunk of tiles has its own
 * sums, and they are added in the order of the chunks.
 */
#include "parallel.h"
#include "tucker.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    TILE_OUT = 128, /* of dW' … */
    TILE_IN = 256,  /* … 128 KiB */
    DEPTH = 256,    /* rows of x and dy */
    APART = 64      /* bytes between the rows of dy's block that keep them out of each other's sets of the cache */
};

/* A call. If W's rows have no unit stride, but its columns have, everything is exchanged: the sides are W's own. */
typedef struct {
    const flora_kernels *kernels, *of_reals;
    int64_t rows, d_out, d_in, panel, y_w;
    flora_view x, y, weight; /* y: dy */
    int chunks;
    flora_scratch scratch;
    size_t row, column;                           /* padded to the vector */
    size_t rooms, x_block, y_block, tile, w_tile; /* within a room */
    size_t sums, column_sums;                     /* within the sums: (d_out) and (d_in) */
    int64_t room_size, sums_size, sums_out;
} problem;

static void *at(const problem *p, size_t offset) {
    return p->scratch.base + offset;
}

static void *in_room(const problem *p, int chunk, size_t offset) {
    return p->scratch.base + p->rooms + chunk * p->room_size + offset;
}

static void *reals(const problem *p, const void *base, int64_t n) {
    return flora_at(base, n, p->kernels->real_size);
}

/* A block of x or dy, `columns` columns of it, as reals with rows of `width`. */
static void load(const problem *p, void *to, int64_t width, const flora_view *from, int64_t row, int64_t rows,
                 int64_t column, int64_t columns) {
    p->kernels->widen(to, width,
                      flora_at(from->data, row * from->strides[0] + column * from->strides[1], p->kernels->act_size),
                      from->strides[0], from->strides[1], rows, columns);
}

/* tile (out, TILE_IN) = dyᵀ · x from row `o` and column `i` on */
static void multiply_tile(const problem *p, int chunk, int64_t o, int64_t out, int64_t i, int64_t in) {
    void *y_block = in_room(p, chunk, p->y_block), *x_block = in_room(p, chunk, p->x_block);
    for (int64_t row = 0; row < p->rows; row += DEPTH) {
        const int64_t rows = flora_min(DEPTH, p->rows - row);
        load(p, y_block, p->y_w, &p->y, row, rows, o, out);
        for (int64_t done = 0; done < in; done += p->panel) {
            const int64_t columns = flora_min(p->panel, in - done);
            void *tile = reals(p, in_room(p, chunk, p->tile), done);
            load(p, x_block, p->panel, &p->x, row, rows, i + done, columns);
            const flora_gemm g = {.m = out,
                                  .n = columns,
                                  .k = rows,
                                  .a = y_block,
                                  .a_m = 1,
                                  .a_k = p->y_w,
                                  .b = x_block,
                                  .b_k = p->panel,
                                  .taps = 1,
                                  .c_in = row ? tile : NULL,
                                  .c = tile,
                                  .c_m = TILE_IN};
            p->kernels->gemm(&g);
        }
    }
}

static void sum_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    const int64_t across = (p->d_in + TILE_IN - 1) / TILE_IN, tiles = (p->d_out + TILE_OUT - 1) / TILE_OUT * across;
    char *sums = p->scratch.base + p->sums + chunk * p->sums_size;
    const int direct = p->kernels->act_size == p->kernels->real_size && p->weight.strides[1] == 1;
    memset(sums, 0, (size_t)p->sums_size);
    for (int64_t task = flora_chunk_begin(tiles, chunk, p->chunks);
         task < flora_chunk_begin(tiles, chunk + 1, p->chunks); task++) {
        const int64_t o = task / across * TILE_OUT, out = flora_min(TILE_OUT, p->d_out - o);
        const int64_t i = task % across * TILE_IN, in = flora_min(TILE_IN, p->d_in - i);
        multiply_tile(p, chunk, o, out, i, in);
        if (!direct)
            load(p, in_room(p, chunk, p->w_tile), TILE_IN, &p->weight, o, out, i, in);
        const flora_rescale_sums g = {.lines = out,
                                      .n = in,
                                      .d_weight = in_room(p, chunk, p->tile),
                                      .d_weight_line = TILE_IN,
                                      .weight = direct ? reals(p, p->weight.data, o * p->weight.strides[0] + i)
                                                       : in_room(p, chunk, p->w_tile),
                                      .weight_line = direct ? p->weight.strides[0] : TILE_IN,
                                      .along = reals(p, at(p, p->column), i),
                                      .across = reals(p, at(p, p->row), o),
                                      .along_sums = reals(p, sums + p->column_sums, i),
                                      .across_sums = reals(p, sums, o)};
        p->of_reals->rescale_sums(&g);
    }
}

static flora_view transposed(const flora_view *view) {
    flora_view turned = *view;
    turned.shape[0] = view->shape[1], turned.shape[1] = view->shape[0];
    turned.strides[0] = view->strides[1], turned.strides[1] = view->strides[0];
    return turned;
}

/* A vector in scratch, ones if there is none; zeros up to the next multiple of the vector width, which are multiplied.
 */
static void place(const problem *p, size_t to, const flora_view *vector, int64_t n) {
    const int64_t width = flora_round_up(n, p->kernels->lanes);
    if (vector != NULL) {
        p->kernels->pack(at(p, to), width, vector->data, 0, vector->strides[0], 1, n, 1.0);
        return;
    }
    memset(at(p, to), 0, (size_t)width * p->kernels->real_size);
    for (int64_t i = 0; i < n; i++)
        if (p->kernels->real_size == sizeof(double))
            ((double *)at(p, to))[i] = 1;
        else
            ((float *)at(p, to))[i] = 1;
}

flora_status flora_rescale_linear_backward(const flora_view *d_row, const flora_view *d_column, const flora_view *dy,
                                           const flora_view *x, const flora_view *weight, const flora_view *row,
                                           const flora_view *column, double scale, char error[FLORA_ERROR_SIZE]) {
    const flora_dtype act = weight->dtype, real = flora_compute_dtype(act);
    flora_status status;
    if (isnan(scale))
        return flora_fail(error, FLORA_BAD_VALUE, "scale must be a number, not nan");
    if ((status = flora_expect_ndim(weight, "weight", 2, error)) != FLORA_OK ||
        (status = flora_expect_ndim(dy, "dy", 2, error)) != FLORA_OK)
        return status;
    const int64_t x_shape[] = {dy->shape[0], weight->shape[1]}, y_shape[] = {dy->shape[0], weight->shape[0]};
    const struct {
        const flora_view *view;
        const char *name;
        flora_dtype dtype;
        int ndim;
        const int64_t *shape;
    } expected[] = {{weight, "weight", act, 2, weight->shape},
                    {dy, "dy", act, 2, y_shape},
                    {x, "x", act, 2, x_shape},
                    {row, "row", real, 1, weight->shape},
                    {column, "column", real, 1, weight->shape + 1},
                    {d_row, "d_row", real, 1, weight->shape},
                    {d_column, "d_column", real, 1, weight->shape + 1}};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        if ((status = flora_expect(expected[i].view, expected[i].name, expected[i].dtype, expected[i].ndim,
                                   expected[i].shape, error)) != FLORA_OK)
            return status;
    if ((d_row != NULL && row == NULL) || (d_column != NULL && column == NULL))
        return flora_fail(error, FLORA_BAD_VALUE, "%s is given, but %s is not", row == NULL ? "d_row" : "d_column",
                          row == NULL ? "row" : "column");
    const flora_named outputs[] = {{d_row, "d_row"}, {d_column, "d_column"}};
    const flora_named inputs[] = {{dy, "dy"}, {x, "x"}, {weight, "weight"}, {row, "row"}, {column, "column"}};
    if ((status = flora_expect_disjoint(outputs, 2, inputs, 5, error)) != FLORA_OK)
        return status;

    const int turns = weight->strides[1] != 1 && weight->strides[0] == 1;
    problem p = {.kernels = flora_isa_kernels(act),
                 .rows = dy->shape[0],
                 .d_out = weight->shape[turns],
                 .d_in = weight->shape[!turns],
                 .x = turns ? *dy : *x,
                 .y = turns ? *x : *dy,
                 .weight = turns ? transposed(weight) : *weight};
    p.of_reals = flora_kernels_for(real, p.kernels, act);
    const size_t size = p.kernels->real_size;
    const int64_t tiles = (p.d_out + TILE_OUT - 1) / TILE_OUT * ((p.d_in + TILE_IN - 1) / TILE_IN);
    const int64_t depth = flora_min(DEPTH, p.rows);
    flora_scratch room = {.size = 0}, sums = {.size = 0};
    p.panel = 2 * p.kernels->lanes;
    p.y_w = TILE_OUT + APART / (int64_t)size;
    p.chunks = flora_chunks(tiles, 2.0 * (double)p.rows * (double)p.d_out * (double)p.d_in);
    p.row = flora_reserve(&p.scratch, p.d_out, 1, 1, size);
    p.column = flora_reserve(&p.scratch, p.d_in, 1, 1, size);
    p.x_block = flora_reserve(&room, depth, p.panel, 1, size);
    p.y_block = flora_reserve(&room, depth, p.y_w, 1, size);
    p.tile = flora_reserve(&room, TILE_OUT, TILE_IN, 1, size);
    p.w_tile = flora_reserve(&room, TILE_OUT, TILE_IN, 1, size);
    flora_reserve(&sums, p.d_out, 1, 1, size);
    p.column_sums = flora_reserve(&sums, p.d_in, 1, 1, size);
    p.room_size = (int64_t)room.size, p.sums_size = (int64_t)sums.size;
    p.rooms = flora_reserve(&p.scratch, p.chunks, p.room_size, 1, 1);
    p.sums = flora_reserve(&p.scratch, p.chunks, p.sums_size, 1, 1);
    p.scratch.overflow |= room.overflow | sums.overflow;
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;
    place(&p, p.row, turns ? column : row, p.d_out);
    place(&p, p.column, turns ? row : column, p.d_in);
    if (p.rows > 0)
        flora_parallel(p.chunks, sum_chunk, &p);
    else
        memset(at(&p, p.sums), 0, (size_t)(p.chunks * p.sums_size));
    const flora_view *d[] = {turns ? d_column : d_row, turns ? d_row : d_column};
    const size_t places[] = {0, p.column_sums};
    for (int side = 0; side < 2; side++)
        if (d[side] != NULL)
            p.kernels->sum(d[side]->data, 0, d[side]->strides[0], (char *)at(&p, p.sums) + places[side], 0, p.chunks,
                           p.sums_size / (int64_t)size, 1, d[side]->shape[0], scale);
    flora_release(&p.scratch);
    return FLORA_OK;
}
