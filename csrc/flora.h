/* The kernel interface: views, status codes and one prototype an operation.
 *
 * Nothing here knows Python. Every operation checks its shapes first and, when it returns anything but FLORA_OK,
 * has written nothing to its outputs and one sentence, with the offending values, to `error`. Only FLORA_NO_MEMORY may
 * come late and leave outputs half written.
 *
 * Types: activations (x, y, dy, dx, weight) share one dtype A of float32, float64, bfloat16 and float16.
 * Factors, core, h and every parameter gradient are of the compute type C: double for float64, else float.
 * Sums are always in C. Strides count elements.
 */
#ifndef FLORA_H
#define FLORA_H

#include <stddef.h>
#include <stdint.h>

#define FLORA_MAX_NDIM 8    /* a view's dimensions */
#define FLORA_MAX_SPATIAL 3 /* Conv1d to Conv3d */
#define FLORA_MAX_ORDER 5   /* modes of a weight: out, in and three kernel modes */
#define FLORA_ERROR_SIZE 320

typedef enum { FLORA_F32, FLORA_F64, FLORA_BF16, FLORA_F16 } flora_dtype;

typedef enum {
    FLORA_OK,
    FLORA_BAD_SHAPE,  /* ValueError */
    FLORA_BAD_DTYPE,  /* TypeError */
    FLORA_BAD_LAYOUT, /* ValueError: strides that no body takes, or an output that overlaps itself or an input */
    FLORA_BAD_VALUE,  /* ValueError: scale, stride, padding, groups, … */
    FLORA_NO_MEMORY   /* MemoryError */
} flora_status;

typedef enum { FLORA_PAD_ZEROS, FLORA_PAD_REFLECT, FLORA_PAD_REPLICATE, FLORA_PAD_CIRCULAR } flora_padding_mode;

/* A borrowed N-D array. `data` already includes the byte offset; it may be NULL only if an extent is 0. */
typedef struct {
    void *data;
    flora_dtype dtype;
    int ndim;
    int64_t shape[FLORA_MAX_NDIM];
    int64_t strides[FLORA_MAX_NDIM]; /* elements */
} flora_view;

/* Geometry of a convolution with `ndim` spatial modes. */
typedef struct {
    int ndim;
    int64_t stride[FLORA_MAX_SPATIAL];
    int64_t padding[FLORA_MAX_SPATIAL][2]; /* before, after */
    int64_t dilation[FLORA_MAX_SPATIAL];
    int64_t groups;
    flora_padding_mode mode;
} flora_geometry;

/* Below, NULL stands for an argument that is left out, and [r] for the rank of a mode. */

/* y (rows, d_out) += scale · (x (rows, d_in) · u_in (d_in, r_in) · coreᵀ (r_out, r_in)ᵀ) · u_out (d_out, r_out)ᵀ
 * h (rows, r_in) = x · u_in, written if not NULL.  core NULL: the identity (r_in = r_out).
 * FLoRA (arXiv 2405.14739), the Tucker update of a matrix, applied without forming it. */
flora_status flora_tucker_linear_forward(const flora_view *y, const flora_view *h, const flora_view *x,
                                         const flora_view *u_in, const flora_view *core, const flora_view *u_out,
                                         double scale, char error[FLORA_ERROR_SIZE]);

/* With dk = scale · dy · u_out and dh = dk · core:
 *   dx (rows, d_in) += dh · u_inᵀ        d_u_out (d_out, r_out) = scale · dyᵀ · (h · coreᵀ)
 *   d_core (r_out, r_in) = dkᵀ · h       d_u_in (d_in, r_in) = xᵀ · dh
 * Any output may be NULL. h NULL: it is computed from x. x NULL: only if neither d_u_in nor a missing h needs it. */
flora_status flora_tucker_linear_backward(const flora_view *dx, const flora_view *d_u_in, const flora_view *d_core,
                                          const flora_view *d_u_out, const flora_view *dy, const flora_view *x,
                                          const flora_view *h, const flora_view *u_in, const flora_view *core,
                                          const flora_view *u_out, double scale, char error[FLORA_ERROR_SIZE]);

/* y (batch, d_out, *out) += scale · conv(x (batch, d_in, *in), core ×_0 factors[0] ×_1 factors[1] ×_2 …)
 * core (r_out, r_in, *r_k), factors of all its modes: u_out (d_out, r_out), u_in (d_in/groups, r_in), then (k, r_k),
 * where NULL is the identity. u_in, the core and the kernel factors are shared by all groups, the rows of u_out belong
 * to their group. h, written if not NULL, is what backward needs beside x: the projected and padded input (batch,
 * *(in + padding), groups·r_in), or, for u_in NULL, what u_out is applied to, (batch, *out, groups·r_out); channels
 * last, so that every layout of x gives the same h. */
flora_status flora_tucker_conv_forward(const flora_view *y, const flora_view *h, const flora_view *x,
                                       const flora_view *core, const flora_view *const factors[], double scale,
                                       const flora_geometry *geometry, char error[FLORA_ERROR_SIZE]);

/* dx (batch, d_in, *in) += …; d_core and the d_factors are written. NULL as in the linear case; with u_in NULL every
 * gradient but that of u_out needs x, and one of x and dx must be given. */
flora_status flora_tucker_conv_backward(const flora_view *dx, const flora_view *d_core,
                                        const flora_view *const d_factors[], const flora_view *dy, const flora_view *x,
                                        const flora_view *h, const flora_view *core, const flora_view *const factors[],
                                        double scale, const flora_geometry *geometry, char error[FLORA_ERROR_SIZE]);

/* d_weight (d_out, d_in/groups, *k) = the weight gradient of y (batch, d_out, *out) = conv(x (batch, d_in, *in),
 * weight) for dy, in C; meant for groups of few channels. */
flora_status flora_conv_weight_gradient(const flora_view *d_weight, const flora_view *dy, const flora_view *x,
                                        const flora_geometry *geometry, char error[FLORA_ERROR_SIZE]);

/* out (d_0, …) = weight (d_0, …) + scale · core (r_0, …) ×_0 factors[0] (d_0, r_0) ×_1 …, order 1 to 5.
 * weight NULL: zero. factors[m] NULL: the identity (r_m = d_m). out and weight may be the same view. */
flora_status flora_tucker_reconstruct(const flora_view *out, const flora_view *weight, const flora_view *core,
                                      const flora_view *const factors[], int order, double scale,
                                      char error[FLORA_ERROR_SIZE]);

/* The adjoint: d_core = scale · d_weight ×_m factors[m]ᵀ, and d_factors[m] = scale · the unfolding of d_weight along m
 * times that of (core ×_{n≠m} factors[n]), transposed. Any output may be NULL. */
flora_status flora_tucker_reconstruct_backward(const flora_view *d_core, const flora_view *const d_factors[],
                                               const flora_view *d_weight, const flora_view *core,
                                               const flora_view *const factors[], int order, double scale,
                                               char error[FLORA_ERROR_SIZE]);

/* ΔW = scale · B ⊗ A (m·p, n·q), with a (p, q) and b (m, n): SURM (arXiv 2406.17740), the Kronecker update.
 * y (rows, m·p) += x (rows, n·q) · ΔWᵀ, applied without forming it.
 * h (rows, n·p), written if not NULL: x as (rows, n, q) times aᵀ. */
flora_status flora_kronecker_forward(const flora_view *y, const flora_view *h, const flora_view *x, const flora_view *a,
                                     const flora_view *b, double scale, char error[FLORA_ERROR_SIZE]);

/* With x, y and h as (rows, n, q), (rows, m, p) and (rows, n, p), and dh = scale · bᵀ · dy for each row:
 *   dx += dh · a        d_a (p, q) = sum over rows of dhᵀ · x        d_b (m, n) = scale · sum over rows of dy · hᵀ
 * Any output may be NULL. h NULL: it is computed from x. x NULL: only if neither d_a nor a missing h needs it. */
flora_status flora_kronecker_backward(const flora_view *dx, const flora_view *d_a, const flora_view *d_b,
                                      const flora_view *dy, const flora_view *x, const flora_view *h,
                                      const flora_view *a, const flora_view *b, double scale,
                                      char error[FLORA_ERROR_SIZE]);

/* out (m·p, n·q) = weight (m·p, n·q) + scale · b ⊗ a; weight NULL: zero. out has unit stride in one of its modes; out
 * and weight may be the same view. */
flora_status flora_kronecker_reconstruct(const flora_view *out, const flora_view *weight, const flora_view *a,
                                         const flora_view *b, double scale, char error[FLORA_ERROR_SIZE]);

/* The adjoint, for d_weight as (m, p, n, q):
 *   d_a (p, q) = scale · sum over m and n of b · d_weight        d_b (m, n) = scale · sum over p and q of a · d_weight
 * Either output may be NULL. */
flora_status flora_kronecker_reconstruct_backward(const flora_view *d_a, const flora_view *d_b,
                                                  const flora_view *d_weight, const flora_view *a, const flora_view *b,
                                                  double scale, char error[FLORA_ERROR_SIZE]);

/* out (d_out, width, *k) = weight · (1 + scale · row (d_out) · column (width)), the column along the second mode; a
 * vector that is NULL is ones. Any strides; out and weight may be the same view.
 * RLRR (arXiv 2403.19067), W + W ⊙ (row · column). */
flora_status flora_rescale_reconstruct(const flora_view *out, const flora_view *weight, const flora_view *row,
                                       const flora_view *column, double scale, char error[FLORA_ERROR_SIZE]);

/* The adjoint: d_row = scale · sum of d_weight ⊙ weight · column over all modes but the first, and d_column = scale ·
 * sum of d_weight ⊙ weight · row over all but the second. Either may be NULL. d_weight is of weight's type or of C. */
flora_status flora_rescale_backward(const flora_view *d_row, const flora_view *d_column, const flora_view *d_weight,
                                    const flora_view *weight, const flora_view *row, const flora_view *column,
                                    double scale, char error[FLORA_ERROR_SIZE]);
/* A Toeplitz matrix (rows, columns) is given by its diagonals t (rows + columns - 1): T[i, j] = t[i - j + columns - 1].
 * ΔW (d_out, d_in) = scale · Σ_q L_q · R_q, L_q (d_out, inner) and R_q (inner, d_in) given by left (terms, d_out +
 * inner
 * - 1) and right (terms, inner + d_in - 1). right NULL: ΔW = scale · Σ_q L_q, left (terms, d_out + d_in - 1).
 * Circulant, symmetric and skew-circulant matrices, and sums of products of them (SURM, arXiv 2406.17740), are cases.
 */

/* out (d_out, d_in) = weight (d_out, d_in) + ΔW. weight NULL: zero. out has unit stride in one of its modes, and may be
 * weight. */
flora_status flora_toeplitz_reconstruct(const flora_view *out, const flora_view *weight, const flora_view *left,
                                        const flora_view *right, double scale, char error[FLORA_ERROR_SIZE]);

/* The adjoint: d_left and d_right, each of which may be NULL, from d_weight (d_out, d_in). */
flora_status flora_toeplitz_reconstruct_backward(const flora_view *d_left, const flora_view *d_right,
                                                 const flora_view *d_weight, const flora_view *left,
                                                 const flora_view *right, double scale, char error[FLORA_ERROR_SIZE]);

/* y (rows, d_out) += x (rows, d_in) · ΔWᵀ, by transforms. y has unit stride along d_out. */
flora_status flora_toeplitz_forward(const flora_view *y, const flora_view *x, const flora_view *left,
                                    const flora_view *right, double scale, char error[FLORA_ERROR_SIZE]);

/* dx (rows, d_in) += dy (rows, d_out) · ΔW, with unit stride along d_in; d_left and d_right are written. Any output may
 * be NULL. x (rows, d_in) is needed for d_left and d_right. */
flora_status flora_toeplitz_backward(const flora_view *dx, const flora_view *d_left, const flora_view *d_right,
                                     const flora_view *dy, const flora_view *x, const flora_view *left,
                                     const flora_view *right, double scale, char error[FLORA_ERROR_SIZE]);

/* The same from dy (rows, d_out) and x (rows, d_in) of a Linear, y = x · outᵀ, whose d_weight is dyᵀ · x; it is never
 * an array. */
flora_status flora_rescale_linear_backward(const flora_view *d_row, const flora_view *d_column, const flora_view *dy,
                                           const flora_view *x, const flora_view *weight, const flora_view *row,
                                           const flora_view *column, double scale, char error[FLORA_ERROR_SIZE]);

/* out (m, n) = a (m, k) · b (k, n), all of one compute type; out has unit stride along n. */
flora_status flora_multiply(const flora_view *out, const flora_view *a, const flora_view *b,
                            char error[FLORA_ERROR_SIZE]);

/* dx (batch, d_in, *in) = the input gradient of a convolution with weight (d_out, d_in, 3, 3) and stride 1, for dy
 * (batch, d_out, *out), all of one compute type; padding is (before, after) of each mode. dx has unit stride along d_in
 * or the last mode. */
flora_status flora_conv_input_gradient(const flora_view *dx, const flora_view *dy, const flora_view *weight,
                                       const int64_t padding[4], char error[FLORA_ERROR_SIZE]);

/* out (n), unit stride: sets every element to zero with this probability; which ones depends on the seed alone. */
flora_status flora_drop(const flora_view *out, double probability, uint64_t seed, char error[FLORA_ERROR_SIZE]);

#endif
