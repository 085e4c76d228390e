/* The passes of tucker_layer.c over tiles of bfloat16 activations, for CPUs that multiply bfloat16. See tucker_dots.c.
 */
#ifndef FLORA_TUCKER_DOTS_H
#define FLORA_TUCKER_DOTS_H

#include "kernels/dots.h"
#include "tucker_layer.h"

enum { FLORA_DOT_BLOCK = 128 }; /* channels taken at a time, so that a block of a tile stays in the first-level cache */

/* `pixels` pixels of a field from `first` on, of one image; channels count from `channel`. */
typedef struct {
    const flora_kernels *kernels;
    const flora_dots *dots;
    const flora_field *field;
    int64_t image, channel, first, pixels;
    int64_t tile, width; /* the most pixels, and the padded rank of anything */
    void *room;          /* flora_dots_room(tile, width) bytes */
} flora_dot_tile;

/* The bytes of scratch that a tile needs. */
int64_t flora_dots_room(int64_t tile, int64_t width);

/* Whether the channels of an input follow each other in memory; otherwise its pixels are taken to. A sum over pixels
 * (channels, rank) is then kept transposed. */
int flora_dots_by_rows(const flora_field *field);

/* Packs a factor (channels, rank) for the products of `flora_dots_sweep` with `field`, in channels · width floats. */
void flora_dots_pack_sweep(const flora_kernels *kernels, const flora_dots *dots, const flora_field *field, void *to,
                           int64_t width, const flora_view *u, int64_t first_channel, int64_t channels, double scale);

/* Packs a factor (channels, rank) for `flora_dots_expand` into `field`: in rank · width floats if its channels are the
 * vector (width: the padded number of channels), in channels · rank floats if its pixels are. */
void flora_dots_pack_expand(const flora_kernels *kernels, const flora_dots *dots, const flora_field *field, void *to,
                            int64_t width, const flora_view *u, int64_t first_channel, int64_t channels, double scale);

/* One pass over a tile (pixels, channels) of an input:
 *     product (pixels, width) = tile · matrix (channels, rank)      if product is not NULL
 *     sums (channels, rank) += tileᵀ · with (pixels, rank)          if sums is not NULL
 * Rows of product and with have `width` floats; those of sums, or of its transpose, sums_m. */
void flora_dots_sweep(const flora_dot_tile *t, int64_t channels, int64_t rank, float *product, const void *matrix,
                      int64_t width, float *sums, int64_t sums_m, const float *with);

/* y (pixels, channels) += k (pixels, rank) · Uᵀ, y a tile of an output; rows of k have `width` floats. */
void flora_dots_expand(const flora_dot_tile *t, int64_t channels, int64_t rank, const float *k, int64_t width,
                       const void *u, int64_t u_w);

#endif
