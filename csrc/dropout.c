/* Dropout by a counter: whether an element is dropped is a function of the seed and its number alone, so a mask need
 * not be kept, any thread can draw any part of it, and the result does not depend on how many there are.
 *
 * The generator is SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014),
 * whose i-th number is a hash of seed + i · γ; each gives two elements 32 bits. The naive version is
 * flora/reference/dropout.py's drop.
 */
#include "parallel.h"
#include "tucker.h"

#include <math.h>

static const size_t SIZES[] = {[FLORA_F32] = 4, [FLORA_F64] = 8, [FLORA_BF16] = 2, [FLORA_F16] = 2};

typedef struct {
    const flora_view *out;
    uint64_t seed, threshold; /* an element is dropped if its 32 bits are below the threshold */
    int chunks;
} task;

static uint64_t draw(uint64_t seed, uint64_t number) {
    uint64_t z = seed + (number + 1) * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

/* Elements [2 · begin, end) as bits of one width */
#define DROP(type)                                                                                                     \
    do {                                                                                                               \
        type *out = t->out->data;                                                                                      \
        for (int64_t pair = begin; pair < end; pair++) {                                                               \
            const uint64_t bits = draw(t->seed, (uint64_t)pair);                                                       \
            out[2 * pair] &= (type) - (type)((bits & UINT32_MAX) >= t->threshold);                                     \
            if (2 * pair + 1 < count)                                                                                  \
                out[2 * pair + 1] &= (type) - (type)(bits >> 32 >= t->threshold);                                      \
        }                                                                                                              \
    } while (0)

static void drop_chunk(int chunk, void *task_) {
    const task *t = task_;
    const int64_t count = t->out->shape[0], pairs = (count + 1) / 2;
    const int64_t begin = flora_chunk_begin(pairs, chunk, t->chunks),
                  end = flora_chunk_begin(pairs, chunk + 1, t->chunks);
    switch (SIZES[t->out->dtype]) {
    case 2:
        DROP(uint16_t);
        break;
    case 4:
        DROP(uint32_t);
        break;
    default:
        DROP(uint64_t);
    }
}

flora_status flora_drop(const flora_view *out, double probability, uint64_t seed, char error[FLORA_ERROR_SIZE]) {
    flora_status status = flora_expect_ndim(out, "out", 1, error);
    if (status != FLORA_OK)
        return status;
    if (!(probability >= 0 && probability <= 1))
        return flora_fail(error, FLORA_BAD_VALUE, "probability must be from 0 to 1, not %g", probability);
    if (out->shape[0] > 1 && out->strides[0] != 1)
        return flora_fail(error, FLORA_BAD_LAYOUT, "out must have unit stride, not %lld", (long long)out->strides[0]);
    task t = {.out = out, .seed = seed, .threshold = (uint64_t)ceil(probability * 4294967296.0)};
    t.chunks = flora_chunks((out->shape[0] + 1) / 2, 8.0 * (double)out->shape[0]);
    if (out->shape[0] > 0)
        flora_parallel(t.chunks, drop_chunk, &t);
    return FLORA_OK;
}
