/* Makes recorded calls of the C functions at every level and compares what they give: no Python, so that it runs under
 * any tool and emulator.
 *
 *     replay [OPTION...] FILE...
 *         --level NAME       this level alone
 *         --threads N        loops on so many threads as well as on one
 *         --callers N        so many threads make all calls at once, on the same inputs
 *         --torch LIBRARY    loops run on this library's threads, first reliably, then with work left undone
 *         --faults           and calls that must fail: no memory, an array with an element less in a mode
 *
 * Every array is an allocation of its own, from its first to its last element, so that AddressSanitizer and valgrind
 * see an access beside it; bytes between an output's elements must stay as they were. Prints what was done; the exit
 * status is 1 if anything was wrong.
 */
#include "calls.h"
#include "isa.h"
#include "parallel.h"
#include "pool.h"
#include "tucker.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef REPLAY_THREADS
#    include <dlfcn.h>
#    include <pthread.h>
#    include <sys/wait.h>
#    include <unistd.h>
#else
void pool_use(int threads, int careless) {
    (void)threads;
    (void)careless;
}
#endif

#if defined(__has_include) && !defined(_WIN32)
#    if __has_include(<valgrind/memcheck.h>)
#        include <valgrind/memcheck.h>
#    endif
#endif
#ifndef VALGRIND_MAKE_MEM_UNDEFINED
#    define VALGRIND_MAKE_MEM_UNDEFINED(address, size) ((void)(address))
#endif

enum { MAX_CALLERS = 16, MAX_PHASE = 64, MAX_FAILURES = 20 };

static atomic_int switching; /* levels change all the time */
static atomic_llong made, compared, refused, starved, wrong;

static void complain(const call *c, const char *what, const char *detail) {
    if (atomic_fetch_add(&wrong, 1) < MAX_FAILURES)
        printf("%s (%s, %s): %s %s\n", c->function, flora_isa_name(), flora_pool_name(), what, detail);
}

/* Memory that runs out ----------------------------------------------------------------------------------------------
 */

static _Thread_local int until_failure = -1; /* allocations of the kernels' that still succeed; -1: all */

#ifdef REPLAY_FAULTS
/* The linker has every call of malloc come here. */
void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_malloc(size_t size) {
    if (until_failure == 0)
        return NULL;
    if (until_failure > 0)
        until_failure--;
    return __real_malloc(size);
}
#endif

/* Rooms that fill the address space but for their alignment: their sum must not wrap around to a small one. */
static void check_scratch_sizes(void) {
    char error[FLORA_ERROR_SIZE];
    flora_scratch scratch = {0};
    for (int i = 0; i < 2; i++)
        flora_reserve(&scratch, PTRDIFF_MAX / 64 - 2, 64, 1, 1);
    for (int i = 0; i < 3; i++)
        flora_reserve(&scratch, 0, 1, 1, 1);
    if (flora_allocate(&scratch, error) == FLORA_OK) {
        printf("scratch of %zu bytes was allocated\n", scratch.size);
        atomic_fetch_add(&wrong, 1);
        flora_release(&scratch);
    }
}

/* Elements ----------------------------------------------------------------------------------------------------------
 */

static const int SIZES[] = {[FLORA_F32] = 4, [FLORA_F64] = 8, [FLORA_BF16] = 2, [FLORA_F16] = 2};

static double element(const void *at, flora_dtype dtype) {
    uint16_t half = 0;
    uint32_t bits;
    float single;
    double number;
    switch (dtype) {
    case FLORA_F64:
        memcpy(&number, at, sizeof number);
        return number;
    case FLORA_F32:
        memcpy(&single, at, sizeof single);
        return single;
    case FLORA_BF16:
        memcpy(&half, at, sizeof half);
        bits = (uint32_t)half << 16;
        memcpy(&single, &bits, sizeof single);
        return single;
    case FLORA_F16:
        break;
    }
    memcpy(&half, at, sizeof half);
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    number = exponent == 31 ? (fraction ? NAN : INFINITY)
             : exponent     ? ldexp(1024 + fraction, exponent - 25)
                            : ldexp(fraction, -24);
    return half & 0x8000 ? -number : number;
}

/* The elements of a view one after the other, last mode first; 0 when there are none left. */
typedef struct {
    int64_t index[FLORA_MAX_NDIM], offset, number;
} walk;

static int walk_begin(walk *w, const flora_view *view) {
    *w = (walk){{0}, 0, 0};
    for (int i = 0; i < view->ndim; i++)
        if (view->shape[i] == 0)
            return 0;
    return 1;
}

static int walk_on(walk *w, const flora_view *view) {
    w->number++;
    for (int i = view->ndim - 1; i >= 0; i--) {
        w->offset += view->strides[i];
        if (++w->index[i] < view->shape[i])
            return 1;
        w->offset -= view->strides[i] * view->shape[i];
        w->index[i] = 0;
    }
    return 0;
}

/* Arrays ------------------------------------------------------------------------------------------------------------
 */

typedef struct {
    void *block;
    char *inside; /* a byte each: whether it belongs to an element */
} room;

/* Memory of its own for one array, with what was recorded. */
static room settle(const array *a, flora_view *view) {
    room r = {NULL, NULL};
    *view = a->view;
    view->data = NULL;
    if (a->bytes == 0)
        return r;
    const size_t phase = (size_t)a->phase % sizeof(double[2]); /* malloc aligns no further */
    if ((r.block = malloc(phase + (size_t)a->bytes)) == NULL || (r.inside = calloc((size_t)a->bytes, 1)) == NULL)
        abort();
    view->data = (char *)r.block + phase;
    memcpy(view->data, a->recorded, (size_t)a->bytes);
    walk w;
    const int size = SIZES[view->dtype];
    for (int more = walk_begin(&w, view); more; more = walk_on(&w, view))
        memset(r.inside + w.offset * size, 1, (size_t)size);
    return r;
}

static void leave(room *r) {
    free(r->block);
    free(r->inside);
    *r = (room){NULL, NULL};
}

/* An output that holds nothing but NaN is written without being read. */
static void forget(const array *a, const flora_view *view) {
    walk w;
    int more = walk_begin(&w, view);
    if (!more || !isnan(element(view->data, view->dtype)))
        return;
    for (; more; more = walk_on(&w, view))
        VALGRIND_MAKE_MEM_UNDEFINED((char *)view->data + w.offset * SIZES[a->view.dtype], SIZES[a->view.dtype]);
}

static int untouched(const array *a, const flora_view *view, const room *r, int outside_only) {
    const char *now = view->data, *before = a->recorded;
    for (int64_t i = 0; i < a->bytes; i++)
        if (now[i] != before[i] && !(outside_only && r->inside[i]))
            return 0;
    return 1;
}

static int contiguous(const flora_view *view) {
    int64_t step = 1;
    for (int i = view->ndim - 1; i >= 0; i--) {
        if (view->shape[i] > 1 && view->strides[i] != step)
            return 0;
        step *= view->shape[i];
    }
    return 1;
}

static int is_native(void) {
    const char *name = flora_isa_name();
    return strcmp(name, "soft-tiles") == 0 || strcmp(name, "v4-bf16") == 0 || strcmp(name, "v4-amx") == 0;
}

static void compare(const call *c, const array *a, const flora_view *view) {
    const double tolerance = switching || is_native() ? a->native_tolerance : a->tolerance;
    walk w;
    for (int more = walk_begin(&w, view); more; more = walk_on(&w, view)) {
        const double found = element((const char *)view->data + w.offset * SIZES[view->dtype], view->dtype);
        const double exact = a->exact[w.number], allowed = tolerance * a->magnitude[w.number] + a->least;
        if (!(fabs(found - exact) <= allowed)) {
            char detail[160];
            snprintf(detail, sizeof detail, "element %lld is %.17g, not %.17g; %.3g is allowed", (long long)w.number,
                     found, exact, allowed);
            complain(c, "a wrong number:", detail);
            return;
        }
        atomic_fetch_add(&compared, 1);
    }
}

/* Calls -------------------------------------------------------------------------------------------------------------
 */

/* The arrays of one call on one thread: inputs may be shared, outputs are its own. */
typedef struct {
    const call *call;
    flora_view views[MAX_ARRAYS];
    room rooms[MAX_ARRAYS];
    int borrowed; /* inputs belong to another */
} stage;

static void enter(stage *s, const call *c, const stage *inputs) {
    s->call = c;
    s->borrowed = inputs != NULL;
    for (int i = 0; i < c->array_count; i++) {
        if (inputs == NULL || c->arrays[i].output)
            s->rooms[i] = settle(&c->arrays[i], &s->views[i]);
        else
            s->views[i] = inputs->views[i];
    }
}

static void quit(stage *s) {
    for (int i = 0; i < s->call->array_count; i++)
        if (!s->borrowed || s->call->arrays[i].output)
            leave(&s->rooms[i]);
}

static void restore(stage *s) {
    for (int i = 0; i < s->call->array_count; i++)
        if (s->call->arrays[i].output && s->views[i].data != NULL)
            memcpy(s->views[i].data, s->call->arrays[i].recorded, (size_t)s->call->arrays[i].bytes);
}

static void check_outputs(stage *s, int written) {
    for (int i = 0; i < s->call->array_count; i++) {
        const array *a = &s->call->arrays[i];
        if (!a->output)
            continue;
        if (!untouched(a, &s->views[i], &s->rooms[i], written))
            complain(s->call, written ? "written beside an output" : "written although it failed", "");
        if (written)
            compare(s->call, a, &s->views[i]);
    }
}

/* A refused layout is no mistake if there is one that could be refused. */
static int refusable(const stage *s) {
    for (int i = 0; i < s->call->array_count; i++)
        if (s->call->arrays[i].output && !contiguous(&s->views[i]))
            return 1;
    return 0;
}

static void make(const call *c, const stage *inputs) {
    char error[FLORA_ERROR_SIZE] = "";
    stage s;
    enter(&s, c, inputs);
    for (int i = 0; i < c->array_count; i++)
        if (c->arrays[i].output)
            forget(&c->arrays[i], &s.views[i]);
    const flora_status status = call_make(c, s.views, error);
    atomic_fetch_add(&made, 1);
    if (status == FLORA_OK)
        check_outputs(&s, 1);
    else if (status != FLORA_BAD_LAYOUT || !refusable(&s))
        complain(c, "refused:", error);
    quit(&s);
}

/* The call with one element less in one mode of one array: refused without a trace, or it makes sense all the same. */
static void make_shrunk(const call *c) {
    stage s;
    enter(&s, c, NULL);
    for (int i = 0; i < c->array_count; i++)
        for (int mode = 0; mode < s.views[i].ndim; mode++) {
            char error[FLORA_ERROR_SIZE] = "";
            if (s.views[i].shape[mode] == 0)
                continue;
            s.views[i].shape[mode]--;
            if (call_make(c, s.views, error) == FLORA_OK) {
                restore(&s);
            } else {
                atomic_fetch_add(&refused, 1);
                check_outputs(&s, 0);
                if (error[0] == '\0' || memchr(error, '\0', sizeof error) == NULL)
                    complain(c, "refused without a sentence", "");
            }
            s.views[i].shape[mode]++;
        }
    quit(&s);
}

/* The call with memory for its first 0, 1, 2, … allocations. */
static void make_starved(const call *c) {
    stage s;
    enter(&s, c, NULL);
    for (int allocations = 0; allocations < 8; allocations++) {
        char error[FLORA_ERROR_SIZE] = "";
        until_failure = allocations;
        const flora_status status = call_make(c, s.views, error);
        until_failure = -1;
        if (status != FLORA_NO_MEMORY)
            break;
        atomic_fetch_add(&starved, 1);
        if (error[0] == '\0')
            complain(c, "refused without a sentence", "");
        for (int i = 0; i < c->array_count; i++)
            if (c->arrays[i].output && !untouched(&c->arrays[i], &s.views[i], &s.rooms[i], 1))
                complain(c, "written beside an output", "");
        restore(&s);
    }
    quit(&s);
}

/* Runs --------------------------------------------------------------------------------------------------------------
 */

static const call *calls; /* of one file */
static int count;
static const char *levels[16], *only_level;
static int level_count;
static int threads = 1, callers, faults;

static void make_all(void) {
    for (int i = 0; i < count; i++)
        make(&calls[i], NULL);
}

#ifdef REPLAY_THREADS

typedef struct {
    const stage *inputs;
    int first;
} caller;

static void *call_on(void *caller_) {
    const caller *own = caller_;
    for (int i = 0; i < count; i++) {
        const int at = (own->first + i) % count;
        make(&calls[at], &own->inputs[at]);
    }
    return NULL;
}

static void *switch_levels(void *unused) {
    for (int i = 0; atomic_load(&switching); i++)
        flora_isa_set(levels[i % level_count]);
    return unused;
}

/* All callers share the inputs and start at different calls. */
static void make_at_once(void) {
    stage *inputs = calloc((size_t)count, sizeof *inputs);
    caller own[MAX_CALLERS];
    pthread_t thread[MAX_CALLERS];
    if (inputs == NULL)
        abort();
    for (int i = 0; i < count; i++)
        enter(&inputs[i], &calls[i], NULL);
    for (int t = 0; t < callers; t++) {
        own[t] = (caller){inputs, (int)((int64_t)count * t / callers)};
        if (pthread_create(&thread[t], NULL, call_on, &own[t]) != 0)
            abort();
    }
    for (int t = 0; t < callers; t++)
        pthread_join(thread[t], NULL);
    for (int i = 0; i < count; i++)
        quit(&inputs[i]);
    free(inputs);
}

static void make_while_levels_change(void) {
    const char *level = flora_isa_name();
    pthread_t thread;
    atomic_store(&switching, 1);
    if (pthread_create(&thread, NULL, switch_levels, NULL) != 0)
        abort();
    make_at_once();
    atomic_store(&switching, 0);
    pthread_join(thread, NULL);
    flora_isa_set(level);
}

/* A child of fork has no pool, and the same results. */
static void make_in_child(void) {
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        if (strcmp(flora_pool_name(), "serial") != 0 || flora_num_threads() != 1)
            complain(&calls[0], "a child of fork has a pool", "");
        make_all();
        fflush(stdout);
        _exit(atomic_load(&wrong) != 0);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        complain(&calls[0], "a child of fork failed", "");
}

static void (*torch_use)(int threads, int careless);

static void use_torch(const char *library) {
    void *torch = dlopen(library, RTLD_NOW);
    torch_use = torch != NULL ? (void (*)(int, int))dlsym(torch, "pool_use") : NULL;
    if (torch_use == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        exit(2);
    }
}

#endif

static void run_level(void) {
    make_all();
    if (faults)
        for (int i = 0; i < count; i++) {
            make_shrunk(&calls[i]);
            make_starved(&calls[i]);
        }
#ifdef REPLAY_THREADS
    for (int careless = 0; threads > 1 && careless < (torch_use != NULL ? 2 : 1); careless++) {
        (torch_use != NULL ? torch_use : pool_use)(threads, careless);
        make_all();
        if (callers > 0)
            make_at_once();
        if (callers > 0 && only_level == NULL)
            make_while_levels_change();
    }
    (torch_use != NULL ? torch_use : pool_use)(1, 0);
#endif
}

int main(int argc, char **argv) {
    int files = 0;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--faults") == 0) {
            faults = 1;
        } else if (strncmp(argv[i], "--", 2) == 0 && value != NULL) {
            if (strcmp(argv[i], "--level") == 0)
                only_level = value;
            else if (strcmp(argv[i], "--threads") == 0)
                threads = atoi(value);
            else if (strcmp(argv[i], "--callers") == 0)
                callers = atoi(value) < MAX_CALLERS ? atoi(value) : MAX_CALLERS;
#ifdef REPLAY_THREADS
            else if (strcmp(argv[i], "--torch") == 0)
                use_torch(value);
#endif
            else
                files = -argc;
            i++;
        } else {
            argv[++files] = argv[i];
        }
    }
    if (files < 1) {
        fprintf(stderr,
                "usage: replay [--level NAME] [--threads N] [--callers N] [--torch LIBRARY] [--faults] FILE...\n");
        return 2;
    }
    flora_isa_init();
    level_count = flora_isa_available(levels, 16);
    check_scratch_sizes();
    for (int file = 1; file <= files; file++) {
        calls = calls_read(argv[file], &count);
        for (int i = 0; i < level_count; i++) {
            if (only_level != NULL && strcmp(only_level, levels[i]) != 0)
                continue;
            flora_isa_set(levels[i]);
            run_level();
            printf("%s, %s: %d calls\n", argv[file], levels[i], count);
        }
#ifdef REPLAY_THREADS
        if (threads > 1)
            make_in_child();
#endif
    }
    printf("%lld calls, %lld numbers compared, %lld refused, %lld without memory: %lld wrong\n",
           (long long)atomic_load(&made), (long long)atomic_load(&compared), (long long)atomic_load(&refused),
           (long long)atomic_load(&starved), (long long)atomic_load(&wrong));
    return made == 0 || atomic_load(&wrong) != 0;
}
