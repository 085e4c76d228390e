/* The input gradient of a 3 × 3 convolution of stride 1, by Winograd's minimal filtering F(2 × 2, 3 × 3).
 *
 * Types: real in, real out, sums real.
 *     dx[image, c, i, j] = Σ_o Σ_s Σ_t dy[image, o, i + before - s, j + before - t] · W[o, c, s, t]
 * The naive version is flora/reference/conv.py's conv_input_gradient.
 *
 * A tile of 2 × 2 pixels of dx sees 4 × 4 pixels of dy. These and the 3 × 3 taps are transformed, channel by channel,
 * to 16 parts (kernels/winograd.inc.h); each part is a product of matrices, (tiles, d_out) · (d_out, d_in), and 16 sums
 * give 2 × 2 pixels: 16 multiplications for 36.
 *
 * Tiles are counted along stretches of a line and taken in blocks, input channels in panels of two vectors. Of the
 * two sets of parts, dy's by the block and the weight's by the panel, the smaller is formed first and the larger piece
 * by piece, where it is used and still in the second-level cache. What is formed first is limited, too: of more blocks
 * or panels than SHARED_BYTES hold, so many at a time. Every sum runs in the order of o, in pieces of DEPTH, whatever
 * the blocks and the threads. */
#include "parallel.h"
#include "tucker.h"

#include <string.h>

enum {
    PARTS = 16,
    TAPS = 9,
    STRETCH = 32,            /* tiles of a line at most */
    SHARED_BYTES = 32 << 20, /* of the parts that are formed first */
    BLOCK_BYTES = 1 << 20,   /* of dy's parts of a block that is formed where it is used, or else … */
    FEW_TILES = 16,          /* … so many tiles: fewer do not fill the registers of the product */
    SOME_TILES = 64,         /* of such a block at most: more change nothing for the product */
    MANY_TILES = 256,        /* of a block that is formed first: the weight's parts are read again for each */
    DEPTH = 128,             /* terms of a sum that is rounded by itself: 512 in a row have twice the error */
    STRIP = 32,              /* output channels in a task that transforms the weight */
    LINE = 64                /* bytes between the rows of dy's parts, to keep them out of each other's sets */
};

typedef struct {
    const flora_kernels *kernels;
    const flora_view *dx, *dy, *weight;
    int64_t before[2]; /* padding */
    int channels_last; /* whether dx is written a pixel at a time, or a channel */
    int64_t d_in, d_out;
    int64_t lines, columns;   /* of tiles in an image */
    int64_t stretches, total; /* in a line, in all */
    int64_t width;            /* pixels of a stretch of dy, up to a whole vector */
    int64_t panel, panels;    /* input channels of a panel; how many panels */
    int64_t row;              /* of dy's parts: d_out, up to a whole vector, and LINE */
    int64_t blocks, tiles;    /* how many blocks; tiles of a block at most */
    int dy_first;             /* dy's parts are formed first, not the weight's */
    int64_t begin, end;       /* of which blocks or panels they are there now */
    int chunks;
    flora_scratch scratch;
    size_t shared; /* dy's parts (blocks, PARTS, tiles, row), or the weight's (panels, PARTS, d_out, panel) */
    size_t rooms;  /* of each thread: */
    size_t own;    /* the other parts, of one block or panel */
    size_t taps, sums, pixels, turned;
    int64_t room_size;
} gradient;

static char *at(const gradient *g, const void *base, int64_t n) {
    return (char *)base + n * (int64_t)g->kernels->real_size;
}

static char *in_room(const gradient *g, int chunk, size_t offset) {
    return g->scratch.base + g->rooms + chunk * g->room_size + offset;
}

/* The weight's parts --------------------------------------------------------------------------------------------- */

/* to (3, 3, lanes) = the taps from output channel o to `channels` input channels from c on, then zeros */
static void load_taps(const gradient *g, char *to, int64_t o, int64_t c, int64_t channels) {
    const int64_t *w = g->weight->strides, lanes = g->kernels->lanes;
    const int one_row = w[2] == 3 * w[3];
    const char *from = at(g, g->weight->data, o * w[0] + c * w[1]);
    if (one_row && w[3] == 1 && channels == lanes) {
        g->kernels->winograd_taps(to, from, w[1]);
        return;
    }
    for (int s = 0; s < (one_row ? 1 : 3); s++)
        g->kernels->pack(at(g, to, 3 * s * lanes), lanes, at(g, from, s * w[2]), w[3], w[1], one_row ? TAPS : 3,
                         channels, 1.0);
}

/* parts (PARTS, d_out, panel) of one panel, for output channels from `begin` to `end` - 1 */
static void transform_weight(const gradient *g, int chunk, char *parts, int64_t panel, int64_t begin, int64_t end) {
    const int64_t lanes = g->kernels->lanes, first = panel * g->panel;
    char *taps = in_room(g, chunk, g->taps);
    for (int64_t o = begin; o < end; o++)
        for (int64_t c = first; c < flora_min(first + g->panel, g->d_in); c += lanes) {
            const int64_t channels = flora_min(lanes, g->d_in - c);
            load_taps(g, taps, o, c, channels);
            g->kernels->winograd_filter(at(g, parts, o * g->panel + c - first), g->d_out * g->panel, taps);
        }
}

/* dy's parts ----------------------------------------------------------------------------------------------------- */

/* `count` tiles of a line of tiles of one image, from column `first` on. */
typedef struct {
    int64_t image, line, first, count;
} stretch;

static stretch stretch_of(const gradient *g, int64_t n) {
    const int64_t line = n / g->stretches, s = n % g->stretches, first = g->columns * s / g->stretches;
    return (stretch){line / g->lines, line % g->lines, first, g->columns * (s + 1) / g->stretches - first};
}

/* Where a block's stretches begin. */
static int64_t block_begin(const gradient *g, int64_t block) {
    return flora_chunk_begin(g->total, block, g->blocks);
}

/* to (4, width, lanes) = what the stretch sees of dy in `channels` channels from o on; zeros beyond dy's edges */
static void load_pixels(const gradient *g, char *to, const stretch *s, int64_t o, int64_t channels) {
    const int64_t *d = g->dy->strides, lanes = g->kernels->lanes, count = 2 * s->count + 2;
    const int64_t left = 2 * s->first + g->before[1] - 2; /* the first column, perhaps outside */
    const int64_t begin = flora_min(flora_max(0, -left), count);
    const int64_t end = flora_max(begin, flora_min(count, g->dy->shape[3] - left));
    const size_t pixel = (size_t)lanes * g->kernels->real_size;
    for (int64_t i = 0; i < 4; i++) {
        const int64_t line = 2 * s->line + g->before[0] - 2 + i;
        char *row = at(g, to, i * g->width * lanes);
        if (line < 0 || line >= g->dy->shape[2] || begin == end) {
            memset(row, 0, (size_t)count * pixel);
            continue;
        }
        memset(row, 0, (size_t)begin * pixel);
        memset(row + (size_t)end * pixel, 0, (size_t)(count - end) * pixel);
        g->kernels->pack(row + (size_t)begin * pixel, lanes,
                         at(g, g->dy->data, s->image * d[0] + o * d[1] + line * d[2] + (left + begin) * d[3]), d[3],
                         d[1], end - begin, channels, 1.0);
    }
}

/* parts (PARTS, tiles, row) of one block, for output channels from `begin` to `end` - 1 */
static void transform_block(const gradient *g, int chunk, char *parts, int64_t block, int64_t begin, int64_t end) {
    const int64_t lanes = g->kernels->lanes;
    char *pixels = in_room(g, chunk, g->pixels);
    for (int64_t o = begin; o < end; o += lanes) {
        int64_t tile = 0;
        for (int64_t n = block_begin(g, block); n < block_begin(g, block + 1); n++) {
            const stretch s = stretch_of(g, n);
            load_pixels(g, pixels, &s, o, flora_min(lanes, g->d_out - o));
            g->kernels->winograd_input(at(g, parts, tile * g->row + o), g->tiles * g->row, g->row, pixels,
                                       g->width * lanes, s.count);
            tile += s.count;
        }
    }
}

/* dx ------------------------------------------------------------------------------------------------------------- */

/* dx's pixels in the stretch = pixels (2, width, lanes), for `channels` channels from c on */
static void store_pixels(const gradient *g, int chunk, const char *pixels, const stretch *s, int64_t c,
                         int64_t channels) {
    const int64_t *d = g->dx->strides, lanes = g->kernels->lanes, column = 2 * s->first;
    const int64_t count = flora_min(2 * s->count, g->dx->shape[3] - column);
    char *turned = in_room(g, chunk, g->turned);
    for (int64_t i = 0; i < 2 && 2 * s->line + i < g->dx->shape[2]; i++) {
        char *to = at(g, g->dx->data, s->image * d[0] + c * d[1] + (2 * s->line + i) * d[2] + column * d[3]);
        const char *row = at(g, pixels, i * g->width * lanes);
        if (g->channels_last) {
            g->kernels->copy(to, d[3], row, lanes, 1, count, channels);
            continue;
        }
        g->kernels->transpose(turned, g->width, row, lanes, count, lanes);
        g->kernels->copy(to, d[1], turned, g->width, 1, channels, count);
    }
}

/* dx of one block and one panel, from the parts of both */
static void multiply(const gradient *g, int chunk, int64_t block, const char *of_dy, int64_t panel,
                     const char *of_weight) {
    const int64_t lanes = g->kernels->lanes, c = panel * g->panel, part = g->tiles * g->panel;
    const int64_t width = flora_round_up(flora_min(g->panel, g->d_in - c), lanes);
    char *sums = in_room(g, chunk, g->sums), *pixels = in_room(g, chunk, g->pixels);
    int64_t tiles = 0;
    for (int64_t n = block_begin(g, block); n < block_begin(g, block + 1); n++)
        tiles += stretch_of(g, n).count;
    for (int64_t p = 0; p < PARTS; p++) {
        char *sum = at(g, sums, p * part);
        int64_t o = 0;
        do { /* also without any output channel, as the sums are written then, too */
            const flora_gemm product = {.m = tiles,
                                        .n = width,
                                        .k = flora_min(DEPTH, g->d_out - o),
                                        .a = at(g, of_dy, p * g->tiles * g->row + o),
                                        .a_m = g->row,
                                        .a_k = 1,
                                        .b = at(g, of_weight, (p * g->d_out + o) * g->panel),
                                        .b_k = g->panel,
                                        .taps = 1,
                                        .c_in = o > 0 ? sum : NULL,
                                        .c = sum,
                                        .c_m = g->panel};
            g->kernels->gemm(&product);
            o += DEPTH;
        } while (o < g->d_out);
    }
    for (int64_t v = 0; v < width; v += lanes) {
        int64_t tile = 0;
        for (int64_t n = block_begin(g, block); n < block_begin(g, block + 1); n++) {
            const stretch s = stretch_of(g, n);
            g->kernels->winograd_output(pixels, g->width * lanes, at(g, sums, tile * g->panel + v), part, g->panel,
                                        s.count);
            store_pixels(g, chunk, pixels, &s, c + v, flora_min(lanes, g->d_in - c - v));
            tile += s.count;
        }
    }
}

/* The weight's parts first -------------------------------------------------------------------------------------- */

static char *panel_parts(const gradient *g, int64_t panel) {
    return at(g, g->scratch.base + g->shared, (panel - g->begin) * PARTS * g->d_out * g->panel);
}

static void share_panels(int chunk, void *gradient_) {
    const gradient *g = gradient_;
    const int64_t panels = g->end - g->begin, tasks = (g->d_out + STRIP - 1) / STRIP * panels;
    for (int64_t task = flora_chunk_begin(tasks, chunk, g->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, g->chunks); task++) {
        const int64_t panel = g->begin + task % panels, o = task / panels * STRIP;
        transform_weight(g, chunk, panel_parts(g, panel), panel, o, flora_min(o + STRIP, g->d_out));
    }
}

static void take_blocks(int chunk, void *gradient_) {
    const gradient *g = gradient_;
    char *parts = in_room(g, chunk, g->own);
    for (int64_t block = flora_chunk_begin(g->blocks, chunk, g->chunks);
         block < flora_chunk_begin(g->blocks, chunk + 1, g->chunks); block++) {
        transform_block(g, chunk, parts, block, 0, g->d_out);
        for (int64_t panel = g->begin; panel < g->end; panel++)
            multiply(g, chunk, block, parts, panel, panel_parts(g, panel));
    }
}

/* dy's parts first ---------------------------------------------------------------------------------------------- */

static char *block_parts(const gradient *g, int64_t block) {
    return at(g, g->scratch.base + g->shared, (block - g->begin) * PARTS * g->tiles * g->row);
}

static void share_blocks(int chunk, void *gradient_) {
    const gradient *g = gradient_;
    const int64_t lanes = g->kernels->lanes, vectors = (g->d_out + lanes - 1) / lanes;
    const int64_t tasks = (g->end - g->begin) * vectors;
    for (int64_t task = flora_chunk_begin(tasks, chunk, g->chunks);
         task < flora_chunk_begin(tasks, chunk + 1, g->chunks); task++) {
        const int64_t block = g->begin + task / vectors, o = task % vectors * lanes;
        transform_block(g, chunk, block_parts(g, block), block, o, flora_min(o + lanes, g->d_out));
    }
}

static void take_panels(int chunk, void *gradient_) {
    const gradient *g = gradient_;
    char *parts = in_room(g, chunk, g->own);
    for (int64_t panel = flora_chunk_begin(g->panels, chunk, g->chunks);
         panel < flora_chunk_begin(g->panels, chunk + 1, g->chunks); panel++) {
        transform_weight(g, chunk, parts, panel, 0, g->d_out);
        for (int64_t block = g->begin; block < g->end; block++)
            multiply(g, chunk, block, block_parts(g, block), panel, parts);
    }
}

/* The call ------------------------------------------------------------------------------------------------------- */

static flora_status check(gradient *g, const flora_view *dx, const flora_view *dy, const flora_view *weight,
                          const int64_t padding[4], char *error) {
    const flora_geometry geometry = {.ndim = 2,
                                     .stride = {1, 1},
                                     .padding = {{padding[0], padding[1]}, {padding[2], padding[3]}},
                                     .dilation = {1, 1},
                                     .groups = 1};
    const flora_dtype real = flora_compute_dtype(dx->dtype);
    flora_status status;
    if ((status = flora_check_geometry(&geometry, error)) != FLORA_OK ||
        (status = flora_expect_ndim(weight, "weight", 4, error)) != FLORA_OK ||
        (status = flora_expect_ndim(dx, "dx", 4, error)) != FLORA_OK)
        return status;
    const int64_t weight_shape[] = {weight->shape[0], weight->shape[1], 3, 3};
    const int64_t dx_shape[] = {dx->shape[0], weight->shape[1], dx->shape[2], dx->shape[3]};
    int64_t dy_shape[] = {dx->shape[0], weight->shape[0], 0, 0}, padded;
    for (int i = 0; i < 2; i++) {
        g->before[i] = padding[2 * i];
        status = flora_check_spatial(&geometry, i, dx->shape[2 + i], 3, &padded, &dy_shape[2 + i], error);
        if (status != FLORA_OK)
            return status;
    }
    if ((status = flora_expect(weight, "weight", real, 4, weight_shape, error)) != FLORA_OK ||
        (status = flora_expect(dx, "dx", real, 4, dx_shape, error)) != FLORA_OK ||
        (status = flora_expect(dy, "dy", real, 4, dy_shape, error)) != FLORA_OK)
        return status;
    const int rows = dx->strides[3] == 1 || dx->shape[3] == 1;
    g->channels_last = dx->strides[1] == 1 || (!rows && dx->shape[1] == 1);
    if (!rows && !g->channels_last)
        return flora_fail(error, FLORA_BAD_LAYOUT,
                          "dx must have unit stride along its channels or its columns, not %lld and %lld",
                          (long long)dx->strides[1], (long long)dx->strides[3]);
    const flora_named outputs[] = {{dx, "dx"}}, inputs[] = {{dy, "dy"}, {weight, "weight"}};
    return flora_expect_disjoint(outputs, 1, inputs, 2, error);
}

/* Everything that depends on the extents: how the work is cut and where scratch lies. Returns how many blocks or panels
 * are formed first at a time. */
static int64_t plan(gradient *g) {
    const size_t real = g->kernels->real_size;
    const int64_t lanes = g->kernels->lanes;
    g->d_out = g->weight->shape[0], g->d_in = g->weight->shape[1];
    g->lines = (g->dx->shape[2] + 1) / 2, g->columns = (g->dx->shape[3] + 1) / 2;
    g->stretches = (g->columns + STRETCH - 1) / STRETCH;
    g->total = g->dx->shape[0] * g->lines * g->stretches;
    g->panel = 2 * lanes;
    g->panels = (g->d_in + g->panel - 1) / g->panel;
    g->row = flora_round_up(g->d_out, lanes) + LINE / (int64_t)real;
    const int64_t longest = (g->columns + g->stretches - 1) / g->stretches; /* tiles of a stretch */
    g->width = flora_round_up(2 * longest + 2, lanes);
    const double tiles = (double)g->total * (double)longest;
    g->chunks = flora_chunks(g->total, 2.0 * PARTS * tiles * (double)g->d_out * (double)g->d_in);
    g->dy_first = (double)g->d_in > tiles && g->panels >= g->chunks; /* with fewer panels some threads had none */
    const double tile_bytes = (double)PARTS * (double)g->row * (double)real;
    const double fit = BLOCK_BYTES / tile_bytes;
    const int64_t at_most =
        g->dy_first ? MANY_TILES : flora_max(FEW_TILES, (int64_t)(fit < SOME_TILES ? fit : SOME_TILES));
    const int64_t in_block = flora_max(1, at_most / longest); /* stretches */
    g->blocks = (g->total + in_block - 1) / in_block;
    if (!g->dy_first) /* as many for each thread */
        g->blocks = flora_min(flora_round_up(g->blocks, g->chunks), g->total);
    g->tiles = (g->total + g->blocks - 1) / g->blocks * longest;
    const double block_bytes = tile_bytes * (double)g->tiles;
    const double panel_bytes = (double)PARTS * (double)g->d_out * (double)g->panel * (double)real;
    const double fits = SHARED_BYTES / (1 + (g->dy_first ? block_bytes : panel_bytes));
    const int64_t at_once = flora_min(flora_max(1, (int64_t)fits), g->dy_first ? g->blocks : g->panels);
    flora_scratch room = {.size = 0};
    if (g->dy_first) {
        g->shared = flora_reserve(&g->scratch, at_once * PARTS, g->tiles, g->row, real);
        g->own = flora_reserve(&room, PARTS, g->d_out, g->panel, real);
    } else {
        g->shared = flora_reserve(&g->scratch, at_once * PARTS, g->d_out, g->panel, real);
        g->own = flora_reserve(&room, PARTS, g->tiles, g->row, real);
    }
    g->taps = flora_reserve(&room, TAPS, lanes, 1, real);
    g->sums = flora_reserve(&room, PARTS, g->tiles, g->panel, real);
    g->pixels = flora_reserve(&room, 4, g->width, lanes, real);
    g->turned = flora_reserve(&room, lanes, g->width, 1, real);
    g->room_size = (int64_t)room.size;
    g->rooms = flora_reserve(&g->scratch, g->chunks, g->room_size, 1, 1);
    g->scratch.overflow |= room.overflow;
    return at_once;
}

flora_status flora_conv_input_gradient(const flora_view *dx, const flora_view *dy, const flora_view *weight,
                                       const int64_t padding[4], char error[FLORA_ERROR_SIZE]) {
    gradient g = {.kernels = flora_isa_kernels(flora_compute_dtype(dx->dtype)), .dx = dx, .dy = dy, .weight = weight};
    flora_status status = check(&g, dx, dy, weight, padding, error);
    if (status != FLORA_OK || dx->shape[0] == 0 || dx->shape[1] == 0 || dx->shape[2] == 0 || dx->shape[3] == 0)
        return status;
    const int64_t at_once = plan(&g);
    status = flora_allocate(&g.scratch, error);
    if (status != FLORA_OK)
        return status;
    const int64_t pieces = g.dy_first ? g.blocks : g.panels;
    for (g.begin = 0; g.begin < pieces; g.begin = g.end) {
        g.end = flora_min(g.begin + at_once, pieces);
        flora_parallel(g.chunks, g.dy_first ? share_blocks : share_panels, &g);
        flora_parallel(g.chunks, g.dy_first ? take_panels : take_blocks, &g);
    }
    flora_release(&g.scratch);
    return FLORA_OK;
}
