/* The choice of a kernel table. See isa.h. */
#define _GNU_SOURCE /* syscall */
#include "isa.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#    include <cpuid.h>
#    if defined(__linux__)
#        include <sys/syscall.h>
#        include <unistd.h>
#    endif

/* Parts of XCR0: the registers that the operating system saves. */
enum { SAVES_256 = 0x6, SAVES_512 = 0xe6 };

/* All is read from cpuid: clang 14's __builtin_cpu_supports does not know every one of these features, and on Windows
 * it needs a library of the compiler's. */
static int saves(unsigned registers) {
    unsigned a, b, c, d, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    __asm__("xgetbv" : "=a"(a), "=d"(high) : "c"(0));
    return (a & registers) == registers;
}

static int has_v3(void) {
    const unsigned first = bit_FMA | bit_MOVBE | bit_AVX | bit_F16C, seventh = bit_BMI | bit_AVX2 | bit_BMI2;
    unsigned a, b, c, d;
    if (!saves(SAVES_256) || !__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first)
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & seventh) != seventh)
        return 0;
    return __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & bit_LZCNT);
}

static int has_v4(void) {
    const unsigned all = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
    unsigned a, b, c, d;
    return has_v3() && saves(SAVES_512) && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & all) == all;
}

static int has_bf16(void) {
    unsigned a, b, c, d;
    return has_v4() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
}

/* The matrix registers that kernels/tile.h counts on: some virtual machines advertise AMX without any. */
static int has_tiles(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 24)) || !(d & (1u << 22))) /* AMX-TILE, AMX-BF16 */
        return 0;
    if (!__get_cpuid_count(0x1d, 0, &a, &b, &c, &d) || a < 1) /* palettes */
        return 0;
    if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) /* palette 1: bytes of a tile, of a row; tiles, rows */
        return 0;
    if (a >> 16 < 1024 || (b & 0xffff) < 64 || b >> 16 < 8 || (c & 0xffff) < 16)
        return 0;
    return __get_cpuid_count(0x1e, 0, &a, &b, &c, &d) && (b & 0xff) >= 16 && (b >> 8 & 0xffff) >= 64;
}

/* Linux keeps the state of matrix registers for a process only after it has asked. */
static int may_use_tiles(void) {
#    if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#    else
    return 0;
#    endif
}

/* AMD's family 0x1a is Zen 5; Zen 4 takes two steps for a vector of 512 bits. */
static int has_full_width(void) {
    unsigned a, b, c, d, family;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || c != signature_AMD_ecx || d != signature_AMD_edx)
        return 0;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return 0;
    family = a >> 8 & 0xf;
    return has_v4() && (family == 0xf ? family + (a >> 20 & 0xff) : family) >= 0x1a;
}

static int has_amx(void) {
    static atomic_int known; /* 0: not yet; 1: no; 2: yes */
    if (atomic_load(&known) == 0)
        atomic_store(&known, has_bf16() && has_tiles() && may_use_tiles() ? 2 : 1);
    return atomic_load(&known) == 2;
}
#endif

static int always(void) {
    return 1;
}

/* Every level that this build knows, lowest first. */
static const struct {
    const char *name;
    const flora_kernels *kernels;
    const flora_dots *dots, *small; /* of bfloat16, and for small calls; NULL: none */
    int (*supported)(void);
    int by_name; /* never chosen because another one is not supported */
} LEVELS[] = {
    {"portable", flora_kernels_portable, NULL, NULL, always, 0},
    {"soft-tiles", flora_kernels_portable, &flora_dots_soft_tiles, &flora_dots_soft_tiles, always, 1},
#if defined(__x86_64__)
    {"v3", flora_kernels_v3, NULL, NULL, has_v3, 0},
    {"v4", flora_kernels_v4, NULL, NULL, has_v4, 0},
    {"v4-bf16", flora_kernels_v4, &flora_dots_bf16, &flora_dots_bf16, has_bf16, 0},
    {"v4-amx", flora_kernels_v4, &flora_dots_amx, &flora_dots_bf16, has_amx, 0},
#elif defined(__aarch64__)
    {"neon", flora_kernels_neon, NULL, NULL, always, 0},
#endif
};

enum { LEVEL_COUNT = sizeof LEVELS / sizeof *LEVELS };

/* Names of levels of other architectures are no mistake: one FLORA_ISA may serve several machines. */
static const char *const ORDER[] = {"portable", "soft-tiles", "v3", "v4", "v4-bf16", "v4-amx", "neon"};

static atomic_int current; /* an index of LEVELS */

/* Below, matrix registers are not worth the time that it takes to configure them (some 100 cycles a product). */
#define SMALL 1e6

static int position(const char *name) {
    for (int i = 0; i < (int)(sizeof ORDER / sizeof *ORDER); i++)
        if (strcmp(ORDER[i], name) == 0)
            return i;
    return -1;
}

int flora_isa_init(void) {
    const char *cap = getenv("FLORA_ISA");
    int limit = LEVEL_COUNT - 1, asked = -1, status = 0;
    if (cap != NULL && *cap != '\0') {
        asked = position(cap);
        if (asked < 0)
            status = -1;
        else if (asked < limit)
            limit = asked;
    }
    while (!LEVELS[limit].supported() || (LEVELS[limit].by_name && limit != asked))
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

int flora_isa_outruns_mkl(void) {
#if defined(__x86_64__)
    return has_full_width() && LEVELS[atomic_load(&current)].kernels == flora_kernels_v4;
#else
    return 0;
#endif
}

const flora_kernels *flora_isa_kernels(flora_dtype dtype) {
    return &LEVELS[atomic_load(&current)].kernels[dtype];
}

const flora_dots *flora_isa_dots(flora_dtype dtype, double multiplications) {
    const int level = atomic_load(&current);
    if (dtype != FLORA_BF16)
        return NULL;
    return multiplications < SMALL ? LEVELS[level].small : LEVELS[level].dots;
}
