/* See pool.h. Threads are made and joined for every loop, so that a tool that watches them sees who waits for whom. */
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

enum { MAX_THREADS = 16 };

static atomic_int allowed = 1, is_careless;

typedef struct {
    void (*body)(int thread, int team, void *context);
    void *context;
    int thread, team;
} member;

static void *work(void *member_) {
    const member *m = member_;
    m->body(m->thread, m->team, m->context);
    return NULL;
}

static void run(int team, void (*body)(int thread, int team, void *context), void *context) {
    member members[MAX_THREADS];
    pthread_t threads[MAX_THREADS];
    for (int t = 0; t < team; t++) {
        members[t] = (member){body, context, t, team};
        if (t > 0 && pthread_create(&threads[t], NULL, work, &members[t]) != 0)
            abort();
    }
    work(&members[0]);
    for (int t = 1; t < team; t++)
        pthread_join(threads[t], NULL);
}

static int team_of(int wanted) {
    const int most = atomic_load(&allowed);
    return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

void pool_use(int threads, int careless) {
    atomic_store(&allowed, threads < MAX_THREADS ? threads : MAX_THREADS);
    atomic_store(&is_careless, careless);
}

#ifdef POOL_OF_TORCH

typedef void torch_body(int64_t begin, int64_t end, void *context);

typedef struct {
    torch_body *body;
    void *context;
    int64_t begin, end;
} range;

static void ranges(int thread, int team, void *range_) {
    const range *r = range_;
    const int64_t count = r->end - r->begin;
    for (int64_t i = r->begin + count * thread / team; i < r->begin + count * (thread + 1) / team; i++)
        if (!atomic_load(&is_careless) || i % 3 != 1)
            r->body(i, i + 1, r->context);
}

int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, torch_body *body, void *context);
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, torch_body *body, void *context) {
    range r = {body, context, begin, end};
    (void)grain;
    run(team_of((int)(end - begin)), ranges, &r);
    return atomic_load(&is_careless);
}

int32_t torch_get_num_threads(uint32_t *threads);
int32_t torch_get_num_threads(uint32_t *threads) {
    *threads = (uint32_t)atomic_load(&allowed);
    return 0;
}

#else

static _Thread_local int current_thread, current_team = 1;

typedef struct {
    void (*body)(void *);
    void *context;
} region;

static void enter(int thread, int team, void *region_) {
    const region *r = region_;
    current_thread = thread;
    current_team = team;
    r->body(r->context);
    current_thread = 0;
    current_team = 1;
}

void GOMP_parallel(void (*body)(void *), void *context, unsigned threads, unsigned flags);
void GOMP_parallel(void (*body)(void *), void *context, unsigned threads, unsigned flags) {
    region r = {body, context};
    (void)flags;
    run(team_of((int)threads), enter, &r);
}

int omp_get_max_threads(void);
int omp_get_max_threads(void) {
    return atomic_load(&allowed);
}

int omp_get_thread_num(void);
int omp_get_thread_num(void) {
    return current_thread;
}

int omp_get_num_threads(void);
int omp_get_num_threads(void) {
    return current_team;
}

#endif
