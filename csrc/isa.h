/* Which kernel table is used: the best one that the CPU has, capped by the environment variable FLORA_ISA. */
#ifndef FLORA_ISA_H
#define FLORA_ISA_H

#include "flora.h"
#include "kernels/dots.h"
#include "kernels/kernels.h"

/* Probes the CPU and reads FLORA_ISA. Returns 0, or -1 if FLORA_ISA is no name of a level (it is then ignored). */
int flora_isa_init(void);

/* The level in use: "portable", "v3" (x86-64-v3), "v4" (x86-64-v4), "v4-bf16" (v4, and bfloat16 by AVX512-BF16),
 * "v4-amx" (v4-bf16, and bfloat16 by AMX-BF16 where there is enough of it) or "neon" (aarch64). For tests, and only if
 * asked for by name, there is "soft-tiles": portable, with the logic of v4-amx in plain C. */
const char *flora_isa_name(void);

/* Writes the names of the levels that this CPU runs, lowest first, to names[0 … max), and returns how many there are.
 * The cap does not count here. */
int flora_isa_available(const char *names[], int max);

/* Uses another level from the next call on (for tests). Returns 0, or -1 if the CPU lacks it or there is none. */
int flora_isa_set(const char *name);

/* Whether MKL, which most builds of PyTorch multiply by, is known to use half of this CPU's vector width at most, and
 * the level in use all of it: MKL keeps to 256 bits on CPUs of AMD, which compute on 512 from Zen 5 on. */
int flora_isa_outruns_mkl(void);

/* The table of the level in use for one activation type. */
const flora_kernels *flora_isa_kernels(flora_dtype dtype);

/* The table of the same level for another type: a call asks for the level once, as another thread may change it. */
static inline const flora_kernels *flora_kernels_for(flora_dtype wanted, const flora_kernels *kernels,
                                                     flora_dtype dtype) {
    return kernels + ((int)wanted - (int)dtype);
}

/* Its products of numbers of that type for a call of about so many multiplications, or NULL if it has none. */
const flora_dots *flora_isa_dots(flora_dtype dtype, double multiplications);

#endif
