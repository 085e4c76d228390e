/* A transform's length, its stages and their factors. See spectrum.h. */
#include "spectrum.h"

#include <math.h>
#include <string.h>

enum { FINE = 64 };

/* n without its factors 2, 3 and 5 */
static int64_t rough_part(int64_t n) {
    static const int primes[] = {2, 3, 5};
    for (int i = 0; i < 3; i++)
        while (n % primes[i] == 0)
            n /= primes[i];
    return n;
}

void flora_spectrum_plan(flora_spectrum *spectrum, int64_t numbers, flora_scratch *scratch, size_t real_size) {
    static const int radices[] = {5, 3, 2, 4, 8};
    flora_transform *t = &spectrum->transform;
    int64_t rest = flora_max(1, (numbers / 2 + numbers % 2 + FLORA_REGIONS - 1) / FLORA_REGIONS);
    while (rough_part(rest) != 1)
        rest++;
    *t = (flora_transform){.n = FLORA_REGIONS * rest};
    int twos = 0;
    for (int64_t n = rest; n % 2 == 0; n /= 2)
        twos++;
    /* eights last; a 2 only where neither eights nor a four and eights make it up */
    const int fours = twos % 3 == 2 ? 1 : twos % 3 == 1 && twos >= 4 ? 2 : 0;
    const int of_radix[] = {0, 0, twos == 1, fours, (twos - 2 * fours) / 3};
    for (int i = 0; i < 5; i++)
        for (int64_t left = of_radix[i]; i < 2 ? rest % radices[i] == 0 : left > 0; left--, rest /= radices[i])
            t->radix[t->stages++] = radices[i];
    spectrum->roots = flora_reserve(scratch, FINE + 4 * t->n / FINE + 1, 2, 1, sizeof(double));
    spectrum->numbers = flora_reserve(scratch, t->n, 1, 1, sizeof(int64_t));
    spectrum->twiddles = flora_reserve(scratch, t->n, 2, 1, real_size);
}

/* roots (…, 2) = exp(2πi · step · k / order) */
static void roots_of_unity(double *roots, int64_t count, int64_t step, int64_t order) {
    for (int64_t k = 0; k < count; k++) {
        const double angle = 6.283185307179586476925 * (double)(step * k) / (double)order;
        roots[2 * k] = cos(angle);
        roots[2 * k + 1] = sin(angle);
    }
}

/* A block is modulo u^M - exp(2πi · (1/4 + number) / blocks). All factors are roots of unity of order 4n, each the
 * product of one that is near 1 and one of few. */
void flora_spectrum_fill(flora_spectrum *spectrum, const flora_scratch *scratch, size_t real_size) {
    flora_transform *t = &spectrum->transform;
    const int64_t order = 4 * t->n;
    double *fine = (double *)(void *)(scratch->base + spectrum->roots), *coarse = fine + 2 * FINE;
    int64_t *numbers = (int64_t *)(void *)(scratch->base + spectrum->numbers);
    char *to = scratch->base + spectrum->twiddles;
    roots_of_unity(fine, FINE, 1, order);
    roots_of_unity(coarse, order / FINE + 1, FINE, order);
    for (int64_t k = 0; k < FLORA_REGIONS; k++)
        numbers[k] = k;
    int64_t blocks = FLORA_REGIONS;
    for (int s = 0; s < t->stages; s++) {
        const int r = t->radix[s];
        t->twiddles[s] = to;
        for (int64_t b = 0; b < blocks; b++)
            for (int m = 1; m < r; m++) {
                const int64_t k = m * (1 + 4 * numbers[b]) * (t->n / (blocks * r));
                const double *p = coarse + k / FINE * 2, *q = fine + k % FINE * 2;
                const double root[] = {p[0] * q[0] - p[1] * q[1], p[0] * q[1] + p[1] * q[0]};
                const float rounded[] = {(float)root[0], (float)root[1]};
                memcpy(to, real_size == sizeof(double) ? (const void *)root : (const void *)rounded, 2 * real_size);
                to += 2 * real_size;
            }
        for (int64_t b = blocks - 1; b >= 0; b--) {
            const int64_t number = numbers[b];
            for (int c = 0; c < r; c++)
                numbers[b * r + c] = number + blocks * c;
        }
        blocks *= r;
    }
}
