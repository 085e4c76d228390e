/* Transforms of LANES rows at a time, for one compute type: enter, forward, inverse, leave, truncate; products and
 * correlations of spectra. See spectra.h.
 *
 * A block of M points is a polynomial modulo u^M - ζ. With z_0 … z_r-1 the r-th roots of ζ, u^M - ζ is the product of
 * u^(M/r) - z_k, and the remainders are
 *     out_k[j] = Σ_m a[j + m · M/r] · z_k^m = Σ_m (a[j + m · M/r] · z_0^m) · exp(2πi · k · m / r):
 * r - 1 multiplications by numbers that are the same for a whole block, and a transform of length r in registers. The
 * first block is modulo u^n - i, which makes its factors the same for every n: exp(2πi · m / 32).
 */

/* A complex number of LANES rows. */
typedef struct {
    vec re, im;
} PRIVATE(point);
#define point PRIVATE(point)

FLORA_INLINE point PRIVATE(point_load)(const real *p) {
    return (point){REAL(load)(p), REAL(load)(p + LANES)};
}

FLORA_INLINE void PRIVATE(point_store)(real *p, point a) {
    REAL(store)(p, a.re);
    REAL(store)(p + LANES, a.im);
}

FLORA_INLINE point PRIVATE(plus)(point a, point b) {
    return (point){a.re + b.re, a.im + b.im};
}

FLORA_INLINE point PRIVATE(minus)(point a, point b) {
    return (point){a.re - b.re, a.im - b.im};
}

/* a · (re + i·im), or · (re - i·im) */
FLORA_INLINE point PRIVATE(times)(point a, real re, real im, const int conjugate) {
    if (conjugate)
        return (point){re * a.re + im * a.im, re * a.im - im * a.re};
    return (point){re * a.re - im * a.im, re * a.im + im * a.re};
}

/* a · i, or · -i */
FLORA_INLINE point PRIVATE(turned)(point a, const int inverse) {
    return inverse ? (point){a.im, -a.re} : (point){-a.im, a.re};
}

/* a[k] = Σ_m a[m] · exp(±2πi · k · m / r), - for the inverse; r is a constant after inlining */
FLORA_INLINE void PRIVATE(dft)(const int r, const int inverse, point *a) {
    if (r == 2) {
        const point b = PRIVATE(minus)(a[0], a[1]);
        a[0] = PRIVATE(plus)(a[0], a[1]);
        a[1] = b;
    } else if (r == 3) {
        const real half_root_3 = (real)0.86602540378443864676;
        const point sum = PRIVATE(plus)(a[1], a[2]);
        point difference = PRIVATE(turned)(PRIVATE(minus)(a[1], a[2]), inverse);
        difference.re *= half_root_3, difference.im *= half_root_3;
        const point middle = {a[0].re - (real)0.5 * sum.re, a[0].im - (real)0.5 * sum.im};
        a[0] = PRIVATE(plus)(a[0], sum);
        a[1] = PRIVATE(plus)(middle, difference);
        a[2] = PRIVATE(minus)(middle, difference);
    } else if (r == 4) {
        const point even = PRIVATE(plus)(a[0], a[2]), odd = PRIVATE(plus)(a[1], a[3]);
        const point left = PRIVATE(minus)(a[0], a[2]);
        const point right = PRIVATE(turned)(PRIVATE(minus)(a[1], a[3]), inverse);
        a[0] = PRIVATE(plus)(even, odd);
        a[1] = PRIVATE(plus)(left, right);
        a[2] = PRIVATE(minus)(even, odd);
        a[3] = PRIVATE(minus)(left, right);
    } else if (r == 5) {
        const real c1 = (real)0.30901699437494742410, c2 = (real)-0.80901699437494742410;
        const real s1 = (real)0.95105651629515357212, s2 = (real)0.58778525229247312917;
        const point p = PRIVATE(plus)(a[1], a[4]), q = PRIVATE(plus)(a[2], a[3]);
        const point u = PRIVATE(turned)(PRIVATE(minus)(a[1], a[4]), inverse);
        const point v = PRIVATE(turned)(PRIVATE(minus)(a[2], a[3]), inverse);
        const point near = {a[0].re + c1 * p.re + c2 * q.re, a[0].im + c1 * p.im + c2 * q.im};
        const point far = {a[0].re + c2 * p.re + c1 * q.re, a[0].im + c2 * p.im + c1 * q.im};
        const point of_near = {s1 * u.re + s2 * v.re, s1 * u.im + s2 * v.im};
        const point of_far = {s2 * u.re - s1 * v.re, s2 * u.im - s1 * v.im};
        a[0] = PRIVATE(plus)(a[0], PRIVATE(plus)(p, q));
        a[1] = PRIVATE(plus)(near, of_near);
        a[2] = PRIVATE(plus)(far, of_far);
        a[3] = PRIVATE(minus)(far, of_far);
        a[4] = PRIVATE(minus)(near, of_near);
    } else {
        const real half_root_2 = (real)0.70710678118654752440;
        point even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
        PRIVATE(dft)(4, inverse, even);
        PRIVATE(dft)(4, inverse, odd);
        const point diagonal = PRIVATE(plus)(odd[1], PRIVATE(turned)(odd[1], inverse));
        const point other = PRIVATE(minus)(PRIVATE(turned)(odd[3], inverse), odd[3]);
        odd[1] = (point){half_root_2 * diagonal.re, half_root_2 * diagonal.im};
        odd[2] = PRIVATE(turned)(odd[2], inverse);
        odd[3] = (point){half_root_2 * other.re, half_root_2 * other.im};
        FLORA_UNROLL
        for (int k = 0; k < 4; k++) {
            a[k] = PRIVATE(plus)(even[k], odd[k]);
            a[k + 4] = PRIVATE(minus)(even[k], odd[k]);
        }
    }
}

/* One stage of `blocks` neighbouring blocks of r · step points. */
FLORA_INLINE void PRIVATE(stage)(const int r, const int inverse, real *data, int64_t step, int64_t blocks,
                                 const real *twiddles) {
    for (; blocks > 0; blocks--, data += r * step * 2 * LANES, twiddles += 2 * (r - 1))
        for (int64_t j = 0; j < step; j++) {
            point a[8];
            FLORA_UNROLL
            for (int m = 0; m < r; m++)
                a[m] = PRIVATE(point_load)(data + (j + m * step) * 2 * LANES);
            FLORA_UNROLL
            for (int m = 1; m < r && !inverse; m++)
                a[m] = PRIVATE(times)(a[m], twiddles[2 * m - 2], twiddles[2 * m - 1], 0);
            PRIVATE(dft)(r, inverse, a);
            FLORA_UNROLL
            for (int m = 1; m < r && inverse; m++)
                a[m] = PRIVATE(times)(a[m], twiddles[2 * m - 2], twiddles[2 * m - 1], 1);
            FLORA_UNROLL
            for (int m = 0; m < r; m++)
                PRIVATE(point_store)(data + (j + m * step) * 2 * LANES, a[m]);
        }
}

FLORA_INLINE void PRIVATE(any_stage)(int r, const int inverse, real *data, int64_t step, int64_t blocks,
                                     const real *twiddles) {
    switch (r) {
    case 2:
        PRIVATE(stage)(2, inverse, data, step, blocks, twiddles);
        break;
    case 3:
        PRIVATE(stage)(3, inverse, data, step, blocks, twiddles);
        break;
    case 4:
        PRIVATE(stage)(4, inverse, data, step, blocks, twiddles);
        break;
    case 5:
        PRIVATE(stage)(5, inverse, data, step, blocks, twiddles);
        break;
    default:
        PRIVATE(stage)(8, inverse, data, step, blocks, twiddles);
        break;
    }
}

/* The stages from s on of block `block` of n points: one after the other if the block fits the first-level cache, else
 * this one and then block by block. */
static void PRIVATE(descend)(const flora_transform *t, const int inverse, int s, real *data, int64_t n, int64_t block) {
    if (s == t->stages)
        return;
    if (n * 2 * FLORA_VECTOR_BYTES <= 32768) {
        int64_t blocks = 1;
        if (!inverse)
            for (; s < t->stages; blocks *= t->radix[s++])
                PRIVATE(any_stage)(t->radix[s], 0, data, n / blocks / t->radix[s], blocks,
                                   (const real *)t->twiddles[s] + block * blocks * (t->radix[s] - 1) * 2);
        else {
            for (int q = s; q < t->stages; q++)
                blocks *= t->radix[q];
            for (int q = t->stages - 1; q >= s; q--) {
                blocks /= t->radix[q];
                PRIVATE(any_stage)(t->radix[q], 1, data, n / blocks / t->radix[q], blocks,
                                   (const real *)t->twiddles[q] + block * blocks * (t->radix[q] - 1) * 2);
            }
        }
        return;
    }
    const int r = t->radix[s];
    const real *twiddles = (const real *)t->twiddles[s] + block * (r - 1) * 2;
    if (!inverse)
        PRIVATE(any_stage)(r, 0, data, n / r, 1, twiddles);
    for (int k = 0; k < r; k++)
        PRIVATE(descend)(t, inverse, s + 1, data + k * (n / r) * 2 * LANES, n / r, block * r + k);
    if (inverse)
        PRIVATE(any_stage)(r, 1, data, n / r, 1, twiddles);
}

static void NAME(spectra_forward)(const flora_transform *t, void *data, int64_t region) {
    const int64_t n = t->n / FLORA_REGIONS;
    PRIVATE(descend)(t, 0, 0, (real *)data + region * n * 2 * LANES, n, region);
}

static void NAME(spectra_inverse)(const flora_transform *t, void *data, int64_t region) {
    const int64_t n = t->n / FLORA_REGIONS;
    PRIVATE(descend)(t, 1, 0, (real *)data + region * n * 2 * LANES, n, region);
}

/* exp(2πi · m / 32) */
#define ROOT_RE(m)                                                                                                     \
    ((real)((const double[]){1.0, 0.98078528040323044913, 0.92387953251128675613, 0.83146961230254523708,              \
                             0.70710678118654752440, 0.55557023301960222474, 0.38268343236508977173,                   \
                             0.19509032201612826785}[m]))
#define ROOT_IM(m)                                                                                                     \
    ((real)((const double[]){0.0, 0.19509032201612826785, 0.38268343236508977173, 0.55557023301960222474,              \
                             0.70710678118654752440, 0.83146961230254523708, 0.92387953251128675613,                   \
                             0.98078528040323044913}[m]))

/* square = the transpose of the numbers from `at` on of LANES rows; zero from `count` on */
FLORA_INLINE void PRIVATE(gather)(vec square[LANES], const void *const *rows, int64_t at, int64_t count) {
    const int64_t width = count - at;
    if (width <= 0) {
        FLORA_UNROLL
        for (int q = 0; q < LANES; q++)
            square[q] = (vec){0};
        return;
    }
    if (width >= LANES) {
        FLORA_UNROLL
        for (int q = 0; q < LANES; q++)
            square[q] = REAL(load)((const real *)rows[q] + at);
    } else {
        for (int q = 0; q < LANES; q++)
            square[q] = REAL(load_part)((const real *)rows[q] + at, width);
    }
    PRIVATE(transpose_square)(square);
}

/* `halves` is 1 if no row reaches number n, so that all imaginary parts are zero. */
FLORA_INLINE void PRIVATE(enter_strips)(const int halves, const flora_transform *t, real *data, const void *const *rows,
                                        int64_t count) {
    const int64_t step = t->n / FLORA_REGIONS;
    vec squares[2][FLORA_REGIONS][LANES];
    for (int64_t j = 0; j < step; j += LANES) {
        const int64_t width = step - j < LANES ? step - j : LANES;
        for (int half = 0; half < halves; half++)
            for (int m = 0; m < FLORA_REGIONS; m++)
                PRIVATE(gather)(squares[half][m], rows, half * t->n + m * step + j, count);
        for (int64_t q = 0; q < width; q++) {
            point a[FLORA_REGIONS];
            FLORA_UNROLL
            for (int m = 0; m < FLORA_REGIONS; m++) {
                const vec re = squares[0][m][q];
                if (halves == 1)
                    a[m] = (point){ROOT_RE(m) * re, ROOT_IM(m) * re};
                else
                    a[m] = PRIVATE(times)((point){re, squares[1][m][q]}, ROOT_RE(m), ROOT_IM(m), 0);
            }
            PRIVATE(dft)(FLORA_REGIONS, 0, a);
            FLORA_UNROLL
            for (int m = 0; m < FLORA_REGIONS; m++)
                PRIVATE(point_store)(data + (j + q + m * step) * 2 * LANES, a[m]);
        }
    }
}

static void NAME(spectra_enter)(const flora_transform *t, void *data, const void *const *rows, int64_t count) {
    if (count <= t->n)
        PRIVATE(enter_strips)(1, t, data, rows, count);
    else
        PRIVATE(enter_strips)(2, t, data, rows, count);
}

/* The last butterflies of the inverse, in registers. */
FLORA_INLINE void PRIVATE(last)(const int halves, point *a, const real *data, int64_t step) {
    FLORA_UNROLL
    for (int m = 0; m < FLORA_REGIONS; m++)
        a[m] = PRIVATE(point_load)(data + m * step * 2 * LANES);
    PRIVATE(dft)(FLORA_REGIONS, 1, a);
    FLORA_UNROLL
    for (int m = 0; m < FLORA_REGIONS; m++) {
        a[m] = PRIVATE(times)(a[m], ROOT_RE(m), ROOT_IM(m), 1);
        if (halves == 1)
            a[m].im = (vec){0};
    }
}

FLORA_INLINE void PRIVATE(leave_strips)(const int halves, const flora_transform *t, const real *data, real *to,
                                        int64_t to_row, int64_t count) {
    const int64_t step = t->n / FLORA_REGIONS;
    vec squares[2][FLORA_REGIONS][LANES];
    for (int64_t j = 0; j < step; j += LANES) {
        const int64_t width = step - j < LANES ? step - j : LANES;
        for (int64_t q = 0; q < width; q++) {
            point a[FLORA_REGIONS];
            PRIVATE(last)(halves, a, data + (j + q) * 2 * LANES, step);
            FLORA_UNROLL
            for (int m = 0; m < FLORA_REGIONS; m++) {
                squares[0][m][q] = a[m].re;
                if (halves == 2)
                    squares[1][m][q] = a[m].im;
            }
        }
        for (int half = 0; half < halves; half++)
            for (int m = 0; m < FLORA_REGIONS; m++) {
                const int64_t at = half * t->n + m * step + j, left = count - at < width ? count - at : width;
                if (left <= 0)
                    break;
                PRIVATE(transpose_square)(squares[half][m]);
                if (left == LANES) {
                    FLORA_UNROLL
                    for (int q = 0; q < LANES; q++)
                        REAL(store)(to + q * to_row + at, squares[half][m][q]);
                } else {
                    for (int q = 0; q < LANES; q++)
                        REAL(store_part)(to + q * to_row + at, squares[half][m][q], left);
                }
            }
    }
}

static void NAME(spectra_leave)(const flora_transform *t, const void *data, void *to, int64_t to_row, int64_t count) {
    if (count <= t->n)
        PRIVATE(leave_strips)(1, t, data, to, to_row, count);
    else
        PRIVATE(leave_strips)(2, t, data, to, to_row, count);
}

FLORA_INLINE void PRIVATE(truncate_points)(const int halves, const flora_transform *t, real *data, int64_t count) {
    const int64_t step = t->n / FLORA_REGIONS;
    for (int64_t j = 0; j < step; j++, data += 2 * LANES) {
        point a[FLORA_REGIONS];
        PRIVATE(last)(halves, a, data, step);
        FLORA_UNROLL
        for (int m = 0; m < FLORA_REGIONS; m++) {
            if (j + m * step >= count)
                a[m].re = (vec){0};
            if (halves == 2 && t->n + j + m * step >= count)
                a[m].im = (vec){0};
            a[m] = PRIVATE(times)(a[m], ROOT_RE(m), ROOT_IM(m), 0);
        }
        PRIVATE(dft)(FLORA_REGIONS, 0, a);
        FLORA_UNROLL
        for (int m = 0; m < FLORA_REGIONS; m++)
            PRIVATE(point_store)(data + m * step * 2 * LANES, a[m]);
    }
}

static void NAME(spectra_truncate)(const flora_transform *t, void *data, int64_t count) {
    if (count <= t->n)
        PRIVATE(truncate_points)(1, t, data, count);
    else
        PRIVATE(truncate_points)(2, t, data, count);
}

FLORA_INLINE void PRIVATE(multiply_points)(const int flags, real *to, const real *from, const real *by,
                                           int64_t points) {
    for (; points > 0; points--, to += 2 * LANES, from += 2 * LANES, by += 2) {
        const point product = PRIVATE(times)(PRIVATE(point_load)(from), by[0], by[1], flags & FLORA_CONJUGATE);
        PRIVATE(point_store)
        (to, flags & FLORA_ACCUMULATE ? PRIVATE(plus)(PRIVATE(point_load)(to), product) : product);
    }
}

static void NAME(spectra_multiply)(void *to, const void *from, const void *by, int64_t points, int flags) {
    switch (flags) {
    case 0:
        PRIVATE(multiply_points)(0, to, from, by, points);
        break;
    case FLORA_CONJUGATE:
        PRIVATE(multiply_points)(FLORA_CONJUGATE, to, from, by, points);
        break;
    case FLORA_ACCUMULATE:
        PRIVATE(multiply_points)(FLORA_ACCUMULATE, to, from, by, points);
        break;
    default:
        PRIVATE(multiply_points)(FLORA_CONJUGATE | FLORA_ACCUMULATE, to, from, by, points);
        break;
    }
}

/* (Σ a[0], Σ a[1], …): the perfect shuffle of transpose_square, adding what it would put side by side */
FLORA_INLINE vec PRIVATE(sum_lanes)(vec a[LANES]) {
    FLORA_UNROLL
    for (int half = LANES / 2; half > 0; half /= 2) {
        FLORA_UNROLL
        for (int q = 0; q < half; q++)
            a[q] = REAL(interleave_low)(a[q], a[q + half]) + REAL(interleave_high)(a[q], a[q + half]);
    }
    return a[0];
}

static void NAME(spectra_correlate)(void *re_, void *im_, const void *a_, const void *b_, int64_t points) {
    real *re = re_, *im = im_;
    const real *a = a_, *b = b_;
    for (int64_t k = 0; k < points; k += LANES) {
        const int64_t width = points - k < LANES ? points - k : LANES;
        vec re_sum[LANES], im_sum[LANES];
        for (int q = 0; q < LANES; q++) {
            if (q >= width) {
                re_sum[q] = im_sum[q] = (vec){0};
                continue;
            }
            const point x = PRIVATE(point_load)(a + (k + q) * 2 * LANES);
            const point y = PRIVATE(point_load)(b + (k + q) * 2 * LANES);
            re_sum[q] = x.re * y.re + x.im * y.im;
            im_sum[q] = x.re * y.im - x.im * y.re;
        }
        const vec re_total = PRIVATE(sum_lanes)(re_sum), im_total = PRIVATE(sum_lanes)(im_sum);
        if (width == LANES) {
            REAL(store)(re + k, REAL(load)(re + k) + re_total);
            REAL(store)(im + k, REAL(load)(im + k) + im_total);
        } else {
            REAL(store_part)(re + k, REAL(load_part)(re + k, width) + re_total, width);
            REAL(store_part)(im + k, REAL(load_part)(im + k, width) + im_total, width);
        }
    }
}

/* diagonals += d_row; d_left and d_right += what follows for the step from the row before */
static void NAME(slide_back)(const flora_slide_back *s) {
    real *u = (real *)s->diagonals - s->row;
    const real *d_row = s->d_row;
    for (int64_t j = 0; j < s->columns; j++)
        u[j] += d_row[j];
    const int64_t ahead = s->rows - 1 - s->row;
    for (int64_t term = 0; term < s->terms; term++) {
        const real *out_l = (const real *)s->left + term * s->left_term + s->row - 1, *in_l = out_l + s->inner;
        const real *out_r = (const real *)s->right + term * s->right_term - 1, *in_r = out_r + s->inner;
        real *d_l = (real *)s->d_left + term * s->left_term + s->row - 1;
        real *d_out = (real *)s->d_right + term * s->right_term - 1, *d_in = d_out + s->inner;
        const real goes = *out_l, comes = *in_l;
        vec went = {0}, came = {0};
        int64_t j = -(ahead + LANES - 1) / LANES * LANES; /* further to the left all is zero */
        for (; j + LANES <= s->columns; j += LANES) {
            const vec v = REAL(load)(u + j);
            came += v * REAL(load)(in_r + j);
            went += v * REAL(load)(out_r + j);
            REAL(store)(d_in + j, REAL(load)(d_in + j) + comes * v);
            REAL(store)(d_out + j, REAL(load)(d_out + j) - goes * v);
        }
        real came_sum = 0, went_sum = 0;
        for (int q = 0; q < LANES; q++)
            came_sum += came[q], went_sum += went[q];
        for (; j < s->columns; j++) {
            came_sum += u[j] * in_r[j];
            went_sum += u[j] * out_r[j];
            d_in[j] += comes * u[j];
            d_out[j] -= goes * u[j];
        }
        d_l[s->inner] += came_sum;
        d_l[0] -= went_sum;
    }
}

static const flora_spectra NAME(spectra) = {.enter = NAME(spectra_enter),
                                            .forward = NAME(spectra_forward),
                                            .inverse = NAME(spectra_inverse),
                                            .leave = NAME(spectra_leave),
                                            .truncate = NAME(spectra_truncate),
                                            .multiply = NAME(spectra_multiply),
                                            .correlate = NAME(spectra_correlate),
                                            .slide_back = NAME(slide_back)};

#undef ROOT_RE
#undef ROOT_IM
#undef point
