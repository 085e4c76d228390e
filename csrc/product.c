/* The product of two large matrices, for CPUs on which PyTorch's own leaves half of the vector unit idle (isa.h).
 *
 * Types: real in, real out, sums real. It serves dx = dy · W and dW = dyᵀ · x of a Linear.
 * The naive version is flora/reference/product.py's multiply.
 *
 * A task is a block of rows by a group of panels, two vectors wide. Its k is cut into blocks of DEPTH: a's part is
 * copied to scratch, where its lines keep out of each other's sets of the cache, b's one panel at a time, so that a
 * panel and what the register block needs of a stay in the first-level cache and a's part in the second. Every element
 * is summed in the order of k, whatever the threads. */
#include "parallel.h"
#include "tucker.h"

#include <string.h>

enum {
    BLOCK_ROWS = 256, /* of a and out … */
    DEPTH = 256,      /* … by so many of k: 256 KiB of float32 */
    APART = 64        /* bytes between the lines of a's copy */
};

typedef struct {
    const flora_kernels *kernels;
    const flora_view *out, *a, *b;
    int64_t rows, columns, depth, panel;
    int a_down; /* a has unit stride along its rows' index: its copy has lines of one k each */
    int64_t a_line, panels, groups, blocks;
    int chunks;
    flora_scratch scratch;
    size_t a_part, b_part; /* within a room */
    int64_t room_size;
} problem;

static void *element(const problem *p, const flora_view *view, int64_t row, int64_t column) {
    return flora_at(view->data, row * view->strides[0] + column * view->strides[1], p->kernels->real_size);
}

/* out's rows from `row` on, panels from `first` to `last` - 1 */
static void multiply_block(const problem *p, char *room, int64_t row, int64_t rows, int64_t first, int64_t last) {
    const int64_t *a = p->a->strides, *b = p->b->strides;
    void *a_part = room + p->a_part, *b_part = room + p->b_part;
    for (int64_t k = 0; k < p->depth; k += DEPTH) {
        const int64_t depth = flora_min(DEPTH, p->depth - k);
        if (p->a_down)
            p->kernels->copy(a_part, p->a_line, element(p, p->a, row, k), a[1], a[0], depth, rows);
        else
            p->kernels->copy(a_part, p->a_line, element(p, p->a, row, k), a[0], a[1], rows, depth);
        for (int64_t panel = first; panel < last; panel++) {
            const int64_t column = panel * p->panel, columns = flora_min(p->panel, p->columns - column);
            void *to = element(p, p->out, row, column);
            p->kernels->pack(b_part, p->panel, element(p, p->b, k, column), b[0], b[1], depth, columns, 1.0);
            const flora_gemm g = {.m = rows,
                                  .n = columns,
                                  .k = depth,
                                  .a = a_part,
                                  .a_m = p->a_down ? 1 : p->a_line,
                                  .a_k = p->a_down ? p->a_line : 1,
                                  .b = b_part,
                                  .b_k = p->panel,
                                  .taps = 1,
                                  .c_in = k ? to : NULL,
                                  .c = to,
                                  .c_m = p->out->strides[0]};
            p->kernels->gemm(&g);
        }
    }
}

/* Tasks are numbered by groups of panels first, so that two threads get the same number of rows. */
static void multiply_chunk(int chunk, void *problem_) {
    const problem *p = problem_;
    char *room = p->scratch.base + chunk * p->room_size;
    const int64_t tasks = p->groups * p->blocks, end = flora_chunk_begin(tasks, chunk + 1, p->chunks);
    for (int64_t task = flora_chunk_begin(tasks, chunk, p->chunks); task < end; task++) {
        const int group = (int)(task / p->blocks);
        const int64_t row = task % p->blocks * BLOCK_ROWS;
        multiply_block(p, room, row, flora_min(BLOCK_ROWS, p->rows - row),
                       flora_chunk_begin(p->panels, group, (int)p->groups),
                       flora_chunk_begin(p->panels, group + 1, (int)p->groups));
    }
}

flora_status flora_multiply(const flora_view *out, const flora_view *a, const flora_view *b,
                            char error[FLORA_ERROR_SIZE]) {
    const flora_dtype real = flora_compute_dtype(out->dtype);
    flora_status status;
    if ((status = flora_expect_ndim(a, "a", 2, error)) != FLORA_OK ||
        (status = flora_expect_ndim(b, "b", 2, error)) != FLORA_OK)
        return status;
    const int64_t b_shape[] = {a->shape[1], b->shape[1]}, out_shape[] = {a->shape[0], b->shape[1]};
    if ((status = flora_expect(a, "a", real, 2, a->shape, error)) != FLORA_OK ||
        (status = flora_expect(b, "b", real, 2, b_shape, error)) != FLORA_OK ||
        (status = flora_expect(out, "out", real, 2, out_shape, error)) != FLORA_OK)
        return status;
    if (out->strides[1] != 1 && out->shape[1] > 1)
        return flora_fail(error, FLORA_BAD_LAYOUT, "out must have unit stride along its columns, not %lld",
                          (long long)out->strides[1]);
    const flora_named outputs[] = {{out, "out"}}, inputs[] = {{a, "a"}, {b, "b"}};
    if ((status = flora_expect_disjoint(outputs, 1, inputs, 2, error)) != FLORA_OK)
        return status;

    problem p = {.kernels = flora_isa_kernels(real),
                 .out = out,
                 .a = a,
                 .b = b,
                 .rows = a->shape[0],
                 .columns = b->shape[1],
                 .depth = a->shape[1],
                 .a_down = a->strides[0] == 1 && a->strides[1] != 1};
    const size_t size = p.kernels->real_size;
    const int64_t apart = APART / (int64_t)size;
    if (p.rows == 0 || p.columns == 0)
        return FLORA_OK;
    if (p.depth == 0) {
        for (int64_t row = 0; row < p.rows; row++)
            memset(element(&p, out, row, 0), 0, (size_t)p.columns * size);
        return FLORA_OK;
    }
    p.panel = 2 * p.kernels->lanes;
    p.panels = (p.columns + p.panel - 1) / p.panel;
    p.blocks = (p.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    p.groups = flora_min(p.panels, flora_num_threads());
    p.a_line = (p.a_down ? flora_min(BLOCK_ROWS, p.rows) : flora_min(DEPTH, p.depth)) + apart;
    p.chunks = flora_chunks(p.groups * p.blocks, 2.0 * (double)p.rows * (double)p.columns * (double)p.depth);
    p.a_part = flora_reserve(&p.scratch, p.a_down ? DEPTH : BLOCK_ROWS, p.a_line, 1, size);
    p.b_part = flora_reserve(&p.scratch, DEPTH, p.panel, 1, size);
    p.room_size = (int64_t)p.scratch.size;
    p.scratch = (flora_scratch){.overflow = p.scratch.overflow};
    flora_reserve(&p.scratch, p.chunks, p.room_size, 1, 1);
    if ((status = flora_allocate(&p.scratch, error)) != FLORA_OK)
        return status;
    flora_parallel(p.chunks, multiply_chunk, &p);
    flora_release(&p.scratch);
    return FLORA_OK;
}
