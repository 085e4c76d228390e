/* The choice of a kernel table. See isa.h. */
#include "isa.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#    include <cpuid.h>

/* clang 14's __builtin_cpu_supports knows neither the level names nor these three, so they are read from cpuid. */
static int has_f16c_movbe_lzcnt(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C) || !(c & bit_MOVBE))
        return 0;
    return __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & bit_LZCNT);
}

static int has_v3(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && has_f16c_movbe_lzcnt();
}

static int has_v4(void) {
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

static int has_bf16(void) {
    return has_v4() && __builtin_cpu_supports("avx512bf16");
}
#endif

static int always(void) {
    return 1;
}

/* Every level that this build knows, lowest first. */
static const struct {
    const char *name;
    const flora_kernels *kernels;
    const flora_dots *dots; /* of bfloat16; NULL: none */
    int (*supported)(void);
} LEVELS[] = {
    {"portable", flora_kernels_portable, NULL, always},
#if defined(__x86_64__)
    {"v3", flora_kernels_v3, NULL, has_v3},
    {"v4", flora_kernels_v4, NULL, has_v4},
    {"v4-bf16", flora_kernels_v4, &flora_dots_bf16, has_bf16},
#endif
};

enum { LEVEL_COUNT = sizeof LEVELS / sizeof *LEVELS };

/* Names of levels of other architectures are no mistake: one FLORA_ISA may serve several machines. */
static const char *const ORDER[] = {"portable", "v3", "v4", "v4-bf16"};

static atomic_int current; /* an index of LEVELS */

static int position(const char *name) {
    for (int i = 0; i < (int)(sizeof ORDER / sizeof *ORDER); i++)
        if (strcmp(ORDER[i], name) == 0)
            return i;
    return -1;
}

int flora_isa_init(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    const char *cap = getenv("FLORA_ISA");
    int limit = LEVEL_COUNT - 1, status = 0;
    if (cap != NULL && *cap != '\0') {
        int asked = position(cap);
        if (asked < 0)
            status = -1;
        else if (asked < limit)
            limit = asked;
    }
    while (!LEVELS[limit].supported())
        limit--;
    atomic_store(&current, limit);
    return status;
}

const char *flora_isa_name(void) {
    return LEVELS[atomic_load(&current)].name;
}

int flora_isa_available(const char *names[], int max) {
    int count = 0;
    for (int i = 0; i < LEVEL_COUNT; i++)
        if (LEVELS[i].supported()) {
            if (count < max)
                names[count] = LEVELS[i].name;
            count++;
        }
    return count;
}

int flora_isa_set(const char *name) {
    for (int i = 0; i < LEVEL_COUNT; i++)
        if (strcmp(LEVELS[i].name, name) == 0 && LEVELS[i].supported()) {
            atomic_store(&current, i);
            return 0;
        }
    return -1;
}

const flora_kernels *flora_isa_kernels(flora_dtype dtype) {
    return &LEVELS[atomic_load(&current)].kernels[dtype];
}

const flora_dots *flora_isa_dots(flora_dtype dtype) {
    return dtype == FLORA_BF16 ? LEVELS[atomic_load(&current)].dots : NULL;
}
