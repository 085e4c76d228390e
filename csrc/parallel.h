/* Loops over independent chunks of work, on PyTorch's own thread pool where it is loaded. */
#ifndef FLORA_PARALLEL_H
#define FLORA_PARALLEL_H

#include <stdint.h>

#define FLORA_MAX_CHUNKS 256

/* Threads that a loop may use now (torch.get_num_threads() with PyTorch's pool), at least 1. */
int flora_num_threads(void);

/* Where loops run: "torch" (libtorch's pool), "gomp" (an OpenMP runtime of the process) or "serial". */
const char *flora_pool_name(void);

/* The number of chunks to cut `tasks` into: at most one a thread, and one if `flops`, the whole work, is small.
 * Depends on nothing else, so that a sum over chunks is repeatable at a fixed number of threads. */
int flora_chunks(int64_t tasks, double flops);

/* Calls body(chunk, context) once for each chunk < chunks <= FLORA_MAX_CHUNKS, on several threads, and waits. */
void flora_parallel(int chunks, void (*body)(int chunk, void *context), void *context);

/* First task of a chunk; the last one ends where the next begins. */
static inline int64_t flora_chunk_begin(int64_t tasks, int64_t chunk, int64_t chunks) {
    return tasks / chunks * chunk + tasks % chunks * chunk / chunks;
}

#endif
