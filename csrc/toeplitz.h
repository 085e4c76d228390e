/* What the Toeplitz functions share: the extents of an update and their checks. */
#ifndef FLORA_TOEPLITZ_H
#define FLORA_TOEPLITZ_H

#include "tucker.h"

/* ΔW (d_out, d_in) = Σ L_q · R_q over terms, L_q (d_out, inner), R_q (inner, d_in); right NULL: Σ L_q, and no inner. */
typedef struct {
    const flora_view *left, *right;
    int64_t d_out, d_in, inner, terms;
} flora_toeplitz;

/* Checks left and right, of the compute type of `act`, and scale. */
flora_status flora_toeplitz_check(flora_toeplitz *toeplitz, int64_t d_out, int64_t d_in, flora_dtype act,
                                  const flora_view *left, const flora_view *right, double scale, char *error);

/* Checks gradients against their parameters. */
flora_status flora_toeplitz_check_gradients(const flora_toeplitz *toeplitz, flora_dtype act, const flora_view *d_left,
                                            const flora_view *d_right, char *error);

#endif
