/* A transform's length, its stages and their factors. What is transformed, and how, is in kernels/spectra.h. */
#ifndef FLORA_SPECTRUM_H
#define FLORA_SPECTRUM_H

#include "tucker.h"

typedef struct {
    flora_transform transform;
    size_t roots, numbers, twiddles;
} flora_spectrum;

/* Chooses the least length for convolutions of at least so many numbers, and reserves room for the factors. */
void flora_spectrum_plan(flora_spectrum *spectrum, int64_t numbers, flora_scratch *scratch, size_t real_size);

/* Computes the factors once the scratch is allocated. */
void flora_spectrum_fill(flora_spectrum *spectrum, const flora_scratch *scratch, size_t real_size);

#endif
