/* parallel_for without an OpenMP runtime of our own. See parallel.h.
 *
 * Two runtimes in one process fight for the cores, so flora links to none. It looks for PyTorch's plain C entry points
 * (torch_parallel_for, since 2.10), then for GNU OpenMP's, and else runs serially. A child of fork runs serially too:
 * it inherits a pool whose threads are gone, and would wait for them forever.
 */
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include "parallel.h"

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#if defined(__linux__)
#    define HAVE_POOL 1
#    include <dlfcn.h>
#    include <pthread.h>
#else
#    define HAVE_POOL 0
#endif

#ifndef SERIAL_FLOPS
#    define SERIAL_FLOPS 1e6 /* below, waking the pool costs more than it gains: some microseconds of one core */
#endif

typedef struct {
    void (*body)(int chunk, void *context);
    void *context;
    int chunks;
    unsigned char done[FLORA_MAX_CHUNKS];
} loop;

static void run(loop *l, int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
        l->body((int)chunk, l->context);
        l->done[chunk] = 1;
    }
}

#if HAVE_POOL

/* Prototypes as in PyTorch's torch/csrc/stable/c/shim.h: 0 is success. */
typedef int32_t torch_parallel_for_t(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void *),
                                     void *context);
typedef int32_t torch_get_num_threads_t(uint32_t *threads);

static _Atomic(torch_parallel_for_t *) torch_for;
static _Atomic(torch_get_num_threads_t *) torch_threads;
static _Atomic(void *) gomp_parallel, gomp_max_threads, gomp_thread, gomp_team;
static atomic_int forked;

static void after_fork(void) {
    atomic_store(&forked, 1);
}

__attribute__((constructor)) static void watch_fork(void) {
    pthread_atfork(NULL, NULL, after_fork);
}

/* PyTorch may be loaded after this module, so a search that found nothing is repeated: about a microsecond. */
static int find_torch(void) {
    if (atomic_load(&torch_for) != NULL)
        return 1;
    void *library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == NULL)
        return 0;
    torch_parallel_for_t *parallel_for = (torch_parallel_for_t *)dlsym(library, "torch_parallel_for");
    torch_get_num_threads_t *num_threads = (torch_get_num_threads_t *)dlsym(library, "torch_get_num_threads");
    dlclose(library); /* RTLD_NOLOAD took a reference; PyTorch itself is never unloaded */
    if (parallel_for == NULL || num_threads == NULL)
        return 0;
    atomic_store(&torch_threads, num_threads);
    atomic_store(&torch_for, parallel_for);
    return 1;
}

static int find_gomp(void) {
    if (atomic_load(&gomp_parallel) != NULL)
        return 1;
    void *max_threads = dlsym(RTLD_DEFAULT, "omp_get_max_threads"), *parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    void *thread = dlsym(RTLD_DEFAULT, "omp_get_thread_num"), *team = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
    if (max_threads == NULL || parallel == NULL || thread == NULL || team == NULL)
        return 0;
    atomic_store(&gomp_max_threads, max_threads);
    atomic_store(&gomp_thread, thread);
    atomic_store(&gomp_team, team);
    atomic_store(&gomp_parallel, parallel);
    return 1;
}

static void torch_body(int64_t begin, int64_t end, void *l) {
    run(l, begin, end);
}

/* Every thread of the team takes each team-th chunk: the team may be smaller than asked for. */
static void gomp_body(void *l_) {
    loop *l = l_;
    int thread = ((int (*)(void))atomic_load(&gomp_thread))(), team = ((int (*)(void))atomic_load(&gomp_team))();
    for (int chunk = thread; chunk < l->chunks; chunk += team)
        run(l, chunk, chunk + 1);
}

typedef enum { SERIAL, TORCH, GOMP } pool;

static pool find_pool(void) {
    if (atomic_load(&forked))
        return SERIAL;
    return find_torch() ? TORCH : find_gomp() ? GOMP : SERIAL;
}

int flora_num_threads(void) {
    uint32_t threads = 1;
    switch (find_pool()) {
    case TORCH:
        if (atomic_load(&torch_threads)(&threads) != 0)
            threads = 1;
        break;
    case GOMP:
        threads = (uint32_t)((int (*)(void))atomic_load(&gomp_max_threads))();
        break;
    case SERIAL:
        break;
    }
    return threads < 1 ? 1 : threads > FLORA_MAX_CHUNKS ? FLORA_MAX_CHUNKS : (int)threads;
}

const char *flora_pool_name(void) {
    static const char *const names[] = {[SERIAL] = "serial", [TORCH] = "torch", [GOMP] = "gomp"};
    return names[find_pool()];
}

static void run_on_pool(loop *l) {
    switch (find_pool()) {
    case TORCH:
        atomic_load (&torch_for)(0, l->chunks, 1, torch_body, l); /* what an error leaves undone is done below */
        break;
    case GOMP:
        ((void (*)(void (*)(void *), void *, unsigned, unsigned))atomic_load(&gomp_parallel))(gomp_body, l,
                                                                                              (unsigned)l->chunks, 0);
        break;
    case SERIAL:
        break;
    }
}

#else

int flora_num_threads(void) {
    return 1;
}

const char *flora_pool_name(void) {
    return "serial";
}

static void run_on_pool(loop *l) {
    (void)l;
}

#endif

int flora_chunks(int64_t tasks, double flops) {
    int threads = flops < SERIAL_FLOPS ? 1 : flora_num_threads();
    return tasks < 1 ? 1 : tasks < threads ? (int)tasks : threads;
}

void flora_parallel(int chunks, void (*body)(int chunk, void *context), void *context) {
    loop l = {.body = body, .context = context, .chunks = chunks};
    if (chunks > 1)
        run_on_pool(&l);
    for (int chunk = 0; chunk < chunks; chunk++)
        if (!l.done[chunk])
            run(&l, chunk, chunk + 1);
}
