/* How a call on a layer is laid out: its tiles, its scratch and the places in it, and the steps that work on them.
 *
 * What a step computes is said where it is defined: tucker_tile.c has the steps on one tile, tucker_images.c those on
 * the images of h, dk and dh, tucker_window.c what stands for h without an input factor, tucker_plan.c sizes, places
 * and packs. tucker_layer.c puts them in order. */
#ifndef FLORA_TUCKER_PLAN_H
#define FLORA_TUCKER_PLAN_H

#include "tucker_dots.h"
#include "tucker_layer.h"

enum {
    ROW_TILE = 64,    /* pixels of a tile: enough for a parameter gradient to be loaded and stored rarely … */
    PLANE_TILE = 128, /* … and, where pixels are the vector, for lines long enough to prefetch */
    BLOCK = 128,      /* channels taken at a time, so that a block of a tile stays in the first-level cache */
    LINE_TILE = 256,  /* pixels of dh's lines in a task of the transposed convolution */
    MOST_GAP = 16     /* pixels between two lines that are computed in vain, at most */
};

/* Layer, scratch and the places in it. Names ending in _w are row widths (ranks padded to the vector). */
typedef struct {
    const flora_layer *layer;
    const flora_kernels *kernels;
    const flora_dots *dots; /* NULL: activations are widened for products of reals */
    flora_scratch scratch;
    int64_t tile, in_tile, out_tile; /* pixels: the most of any tile, and of one of input or output pixels */
    int64_t lanes, in_w, out_w, y_w, dx_w;

    /* packed factors */
    size_t u_in;                                    /* (c_in, in_w) */
    size_t u_out;                                   /* (groups · c_out, out_w) · scale */
    size_t core;                                    /* (taps, r_in, out_w), or with windows (r_in, taps, out_w) */
    size_t core_t;                                  /* (taps, r_out, in_w), or with windows (r_out, taps, in_w) */
    int64_t core_tap, core_w, core_t_tap, core_t_w; /* reals from tap to tap, and from row to row, of these */
    size_t to_y;                                    /* U_out · scale as `expand` wants it for y */
    size_t to_dx;                                   /* U_in as `expand` wants it for dx */
    size_t taps_a;                                  /* (taps) int64: where a tap's pixel is in h */
    size_t taps_core;                               /* (taps) int64: where a tap is in `core` */

    /* images */
    char *h;                                                 /* (batch, *padded, groups · r_in), or NULL */
    int64_t h_batch, h_stride[FLORA_MAX_SPATIAL], h_channel; /* its strides … */
    int64_t h_interior;                                      /* … and the first pixel that is not padding */
    flora_pixels h_in, h_out; /* its pixels as the input numbers them, and (for tap 0) the output */
    int owns_h;               /* h is scratch, since the caller has none */
    size_t h_scratch;
    int windows;                        /* without input factor: h is the padded x, of which each chunk has a window */
    int64_t window_rows, window_pixels; /* output positions of mode 0 that one serves, and its pixels */
    flora_pixels k_out;                 /* the pixels of the caller's k, as the output numbers them */
    size_t dk;                          /* (batch, groups, *(out + margins), out_w) */
    int64_t dk_size, dk_margin[FLORA_MAX_SPATIAL][2], dk_interior;
    flora_pixels dk_out, dk_in;  /* its pixels as the output numbers them, and as the input does (for offset 0) */
    int gathers;                 /* dh's tiles are gathered from dk's image, whose margins are zero */
    size_t taps_dk, taps_core_t; /* (taps) int64: where dh's taps are in dk's image, and in `core_t` */
    size_t dh;                   /* (batch, groups, *padded, in_w), unless gathered */
    int64_t dh_interior;
    flora_pixels dh_in;

    /* with dots, dk's image has numbers of bfloat16, and h is read from copies of such */
    int64_t number;          /* the bytes of a number of dk's image */
    int64_t numbers;         /* how many numbers of a packed core are in the place of a real */
    size_t h_rows, h_planes; /* (batch, groups, *padded, h_w) and (batch, groups, r_in, *padded) */
    int64_t h_w;
    int by_planes; /* h_planes is there and serves the gradient of the core */
    flora_pixels h_all, rows_out, planes_out;
    size_t taps_rows, taps_planes;

    /* per chunk */
    int chunks;
    size_t rooms, sums;
    int64_t room_size, sums_size;                                 /* bytes */
    size_t h_tile, k_tile, dk_tile, dh_tile, turned, block, span; /* within a room */
    size_t line_taps_dk, line_taps_core, runs_h, runs_dk, window, line, summed_taps, turned_taps;
    int64_t dh_w; /* the row width of dh's tile: in_w, or of the input channels that are taken at a time */
    /* within the sums: (c_in, in_w), (taps, r_in, out_w), or of windows (r_out, taps, in_w), and (groups · c_out,
     * out_w), or as turned_sums says */
    size_t d_u_in, d_core, d_u_out;
} flora_plan;

/* The tile: `pixels` pixels from `first` on, of one image and group. */
typedef struct {
    int64_t image, group, first, pixels;
    int64_t window; /* how many reals of its image are before its window */
} flora_tile;

/* What a chunk's window has: padded x for output positions [begin, end) of mode 0. A slice of -1: nothing. */
typedef struct {
    int64_t slice, begin, end;
} flora_window;

static inline void *at(const flora_plan *p, size_t offset) {
    return p->scratch.base + offset;
}

static inline void *in_room(const flora_plan *p, int chunk, size_t offset) {
    return p->scratch.base + p->rooms + chunk * p->room_size + offset;
}

static inline void *in_sums(const flora_plan *p, int chunk, size_t offset) {
    return p->scratch.base + p->sums + chunk * p->sums_size + offset;
}

/* `n` reals from `base` on */
static inline void *reals(const flora_plan *p, const void *base, int64_t n) {
    return (char *)base + n * (int64_t)p->kernels->real_size;
}

static inline char *field_at(const flora_plan *p, const flora_field *field, int64_t image, int64_t channel,
                             int64_t offset) {
    return flora_at(field->data, image * field->batch + channel * field->channel + offset, p->kernels->act_size);
}

static inline void multiply(const flora_plan *p, flora_gemm g) {
    if (g.taps == 0)
        g.taps = 1;
    p->kernels->gemm(&g);
}

/* tucker_tile.c */
void flora_sweep(const flora_plan *p, const flora_field *field, const flora_tile *t, int64_t channels, int64_t rank,
                 void *room, void *product, const void *matrix, int64_t width, void *sums, int64_t sum_w,
                 const void *with);
void flora_expand(const flora_plan *p, const flora_field *field, const flora_tile *t, int64_t channels, const void *k,
                  int64_t k_w, int64_t rank, const void *u, int64_t u_w, void *room);
void flora_load_h(const flora_plan *p, const flora_tile *t, void *h_tile);
void flora_store_h(const flora_plan *p, const flora_tile *t, const void *h_tile);
void flora_load_k(const flora_plan *p, const flora_tile *t, void *k_tile);
void flora_store_k(const flora_plan *p, const flora_tile *t, const void *k_tile);
void flora_add_dh(const flora_plan *p, const flora_tile *t, int64_t channel, int64_t channels, void *dh_tile,
                  int64_t width, void *room);
int flora_turned_sums(const flora_plan *p, const flora_field *field);
int64_t flora_sums_w(const flora_plan *p, const flora_field *field, int64_t channels, int64_t width);

/* tucker_images.c */
void flora_round_h(const flora_plan *p, int chunk, int64_t slice);
void flora_convolve(const flora_plan *p, int chunk, const flora_tile *t, void *k_tile);
void flora_convolve_back(const flora_plan *p, int chunk, const flora_tile *t, int64_t channel, int64_t width,
                         void *dh_tile);
void flora_core_gradient(const flora_plan *p, int chunk, const flora_tile *t, const void *dk, void *sums);
void flora_store_dk(const flora_plan *p, const flora_tile *t, const void *dk_tile);
void flora_pad_line(const flora_plan *p, int64_t line);
void flora_fold(const flora_plan *p, int64_t slice);
void flora_transposed_line(const flora_plan *p, int64_t line, int64_t begin, int64_t end, int64_t *taps_dk,
                           int64_t *taps_core);
void flora_load_dh(const flora_plan *p, const flora_tile *t, int64_t channel, int64_t width, void *dh_tile);
void flora_clear_margins(const flora_plan *p, int64_t slice);

/* tucker_window.c */
void flora_plan_window(flora_plan *p);
void flora_move_window(const flora_plan *p, int chunk, flora_window *w, flora_tile *t);
void flora_pack_long_core(const flora_plan *p);
void flora_pack_long_core_t(const flora_plan *p);
void flora_add_up_long_core(const flora_plan *p, int chunk, int64_t begin, int64_t end);

/* tucker_plan.c */
void flora_plan_common(flora_plan *p, const flora_layer *layer, int planes, int spare_h);
void flora_plan_h_copies(flora_plan *p, int core_gradient);
void flora_plan_dk(flora_plan *p);
void flora_plan_rooms(flora_plan *p, int64_t line_taps);
void flora_place_taps(flora_plan *p);
void flora_pack_factor(const flora_plan *p, size_t to, const flora_view *u, const flora_field *field, int64_t groups,
                       int64_t width, double scale);
void flora_pack_expand(const flora_plan *p, size_t to, const flora_view *u, const flora_field *field, int64_t groups,
                       int64_t width, double scale);
void flora_pack_core(const flora_plan *p);
void flora_pack_core_t(const flora_plan *p);
int64_t flora_taps_or_none(const flora_layer *layer);
double flora_layer_cost(const flora_layer *layer);
int64_t flora_core_tap(const flora_layer *layer, const flora_view *core, int64_t tap);

#endif
