/* See calls.h. */
#include "calls.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Reading --------------------------------------------------------------------------------------------------------- */

static const char MAGIC[8] = {'f', 'l', 'o', 'r', 'a', 'c', 'a', 'l'};

typedef struct {
    const char *at, *end;
    const char *path;
} reader;

static const void *take(reader *r, int64_t bytes) {
    const char *at = r->at;
    const int64_t padded = (bytes + 7) / 8 * 8;
    if (bytes < 0 || padded > r->end - r->at) {
        fprintf(stderr, "%s ends in the middle of a call\n", r->path);
        exit(2);
    }
    r->at += padded;
    return at;
}

static int64_t take_integer(reader *r) {
    int64_t value;
    memcpy(&value, take(r, sizeof value), sizeof value);
    return value;
}

static int take_bounded(reader *r, int64_t most) {
    const int64_t value = take_integer(r);
    if (value < 0 || value > most) {
        fprintf(stderr, "%s: %lld where at most %lld can be\n", r->path, (long long)value, (long long)most);
        exit(2);
    }
    return (int)value;
}

static double take_number(reader *r) {
    double value;
    memcpy(&value, take(r, sizeof value), sizeof value);
    return value;
}

static void take_array(reader *r, array *a) {
    int64_t count = 1;
    a->view.dtype = (flora_dtype)take_bounded(r, FLORA_F16);
    a->view.ndim = take_bounded(r, FLORA_MAX_NDIM);
    for (int i = 0; i < FLORA_MAX_NDIM; i++)
        a->view.shape[i] = take_integer(r);
    for (int i = 0; i < FLORA_MAX_NDIM; i++)
        a->view.strides[i] = take_integer(r);
    for (int i = 0; i < a->view.ndim; i++)
        count *= a->view.shape[i];
    a->phase = take_integer(r);
    a->bytes = take_integer(r);
    a->output = take_bounded(r, 1);
    a->recorded = take(r, a->bytes);
    if (a->output) {
        a->tolerance = take_number(r);
        a->native_tolerance = take_number(r);
        a->least = take_number(r);
        a->exact = take(r, count * (int64_t)sizeof(double));
        a->magnitude = take(r, count * (int64_t)sizeof(double));
    }
}

/* An array's record follows where it is met first. */
static int take_place(reader *r, call *c) {
    const int at = take_bounded(r, MAX_ARRAYS - 1);
    if (at == c->array_count)
        take_array(r, &c->arrays[c->array_count++]);
    return at;
}

static void take_argument(reader *r, call *c, argument *a) {
    a->kind = take_bounded(r, ARRAYS);
    switch (a->kind) {
    case NONE:
        break;
    case NUMBER:
        a->number = take_number(r);
        break;
    case INTEGERS:
        a->count = take_bounded(r, MAX_INTEGERS);
        for (int i = 0; i < a->count; i++)
            a->integers[i] = take_integer(r);
        break;
    case ARRAY:
        a->arrays[0] = take_place(r, c);
        break;
    case ARRAYS:
        a->count = take_bounded(r, MAX_ITEMS);
        for (int i = 0; i < a->count; i++)
            a->arrays[i] = take_bounded(r, ARRAYS) == NONE ? -1 : take_place(r, c);
        break;
    }
}

call *calls_read(const char *path, int *count) {
    FILE *file = fopen(path, "rb");
    long size;
    char *memory;
    if (file == NULL || fseek(file, 0, SEEK_END) != 0 || (size = ftell(file)) < 0 || fseek(file, 0, SEEK_SET) != 0 ||
        (memory = malloc((size_t)size + 1)) == NULL || fread(memory, 1, (size_t)size, file) != (size_t)size) {
        fprintf(stderr, "%s cannot be read\n", path);
        exit(2);
    }
    fclose(file);
    reader r = {memory, memory + size, path};
    if (memcmp(take(&r, sizeof MAGIC), MAGIC, sizeof MAGIC) != 0) {
        fprintf(stderr, "%s is no file of calls\n", path);
        exit(2);
    }
    call *calls = NULL;
    for (*count = 0; r.at < r.end; ++*count) {
        if ((*count & (*count - 1)) == 0) /* room for twice as many */
            calls = realloc(calls, (size_t)(*count ? 2 * *count : 1) * sizeof *calls);
        if (calls == NULL)
            abort();
        call *c = &calls[*count];
        memset(c, 0, sizeof *c);
        memcpy(c->function, take(&r, sizeof c->function), sizeof c->function);
        c->function[sizeof c->function - 1] = '\0';
        c->argument_count = take_bounded(&r, MAX_ARGUMENTS);
        for (int i = 0; i < c->argument_count; i++)
            take_argument(&r, c, &c->arguments[i]);
    }
    return calls;
}

/* Making ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    const call *call;
    const flora_view *views;
    const flora_view *lists[MAX_ARGUMENTS][MAX_ITEMS];
    flora_geometry geometry;
} given;

static const flora_view *one(const given *g, int place) {
    const argument *a = &g->call->arguments[place];
    return a->kind == ARRAY ? &g->views[a->arrays[0]] : NULL;
}

/* NULL, as what is left out; else as many as the longest list needs. */
static const flora_view *const *list(given *g, int place) {
    const argument *a = &g->call->arguments[place];
    for (int i = 0; i < MAX_ITEMS; i++)
        g->lists[place][i] = a->kind == ARRAYS && i < a->count && a->arrays[i] >= 0 ? &g->views[a->arrays[i]] : NULL;
    return g->lists[place];
}

static int length(const given *g, int place) {
    return (int)g->call->arguments[place].count;
}

static double number(const given *g, int place) {
    return g->call->arguments[place].number;
}

static int64_t integer(const given *g, int place) {
    return g->call->arguments[place].integers[0];
}

static const int64_t *integers(const given *g, int place) {
    return g->call->arguments[place].integers;
}

/* stride, padding, dilation, groups and padding mode from `place` on */
static const flora_geometry *geometry(given *g, int place) {
    const argument *a = &g->call->arguments[place];
    g->geometry = (flora_geometry){.ndim = (int)a[0].count, .groups = integer(g, place + 3)};
    g->geometry.mode = (flora_padding_mode)integer(g, place + 4);
    for (int i = 0; i < g->geometry.ndim && i < FLORA_MAX_SPATIAL; i++) {
        g->geometry.stride[i] = a[0].integers[i];
        g->geometry.padding[i][0] = a[1].integers[2 * i];
        g->geometry.padding[i][1] = a[1].integers[2 * i + 1];
        g->geometry.dilation[i] = a[2].integers[i];
    }
    return &g->geometry;
}

#define ONE(i) one(g, i)
#define LIST(i) list(g, i)
#define NUMBER_AT(i) number(g, i)
#define FUNCTION(name, ...)                                                                                            \
    static flora_status make_##name(given *g, char *error) {                                                           \
        return flora_##name(__VA_ARGS__, error);                                                                       \
    }

FUNCTION(tucker_linear_forward, ONE(0), ONE(1), ONE(2), ONE(3), ONE(4), ONE(5), NUMBER_AT(6))
FUNCTION(tucker_linear_backward, ONE(0), ONE(1), ONE(2), ONE(3), ONE(4), ONE(5), ONE(6), ONE(7), ONE(8), ONE(9),
         NUMBER_AT(10))
FUNCTION(tucker_conv_forward, ONE(0), ONE(1), ONE(2), ONE(3), LIST(4), NUMBER_AT(5), geometry(g, 6))
FUNCTION(tucker_conv_backward, ONE(0), ONE(1), LIST(2), ONE(3), ONE(4), ONE(5), ONE(6), LIST(7), NUMBER_AT(8),
         geometry(g, 9))
FUNCTION(conv_weight_gradient, ONE(0), ONE(1), ONE(2), geometry(g, 3))
FUNCTION(conv_input_gradient, ONE(0), ONE(1), ONE(2), integers(g, 3))
FUNCTION(tucker_reconstruct, ONE(0), ONE(1), ONE(2), LIST(3), length(g, 3), NUMBER_AT(4))
FUNCTION(tucker_reconstruct_backward, ONE(0), LIST(1), ONE(2), ONE(3), LIST(4), length(g, 4), NUMBER_AT(5))
FUNCTION(kronecker_forward, ONE(0), ONE(1), ONE(2), ONE(3), ONE(4), NUMBER_AT(5))
FUNCTION(kronecker_backward, ONE(0), ONE(1), ONE(2), ONE(3), ONE(4), ONE(5), ONE(6), ONE(7), NUMBER_AT(8))
FUNCTION(kronecker_reconstruct, ONE(0), ONE(1), ONE(2), ONE(3), NUMBER_AT(4))
FUNCTION(kronecker_reconstruct_backward, ONE(0), ONE(1), ONE(2), ONE(3), ONE(4), NUMBER_AT(5))
FUNCTION(rescale_reconstruct, ONE(0), ONE(1), ONE(2), ONE(3), NUMBER_AT(4))
FUNCTION(rescale_backward, ONE(0), ONE(1), ONE(2), ONE(3), ONE(4), ONE(5), NUMBER_AT(6))
FUNCTION(rescale_linear_backward, ONE(0), ONE(1), ONE(2), ONE(3), ONE(4), ONE(5), ONE(6), NUMBER_AT(7))
FUNCTION(toeplitz_reconstruct, ONE(0), ONE(1), ONE(2), ONE(3), NUMBER_AT(4))
FUNCTION(toeplitz_reconstruct_backward, ONE(0), ONE(1), ONE(2), ONE(3), ONE(4), NUMBER_AT(5))
FUNCTION(toeplitz_forward, ONE(0), ONE(1), ONE(2), ONE(3), NUMBER_AT(4))
FUNCTION(toeplitz_backward, ONE(0), ONE(1), ONE(2), ONE(3), ONE(4), ONE(5), ONE(6), NUMBER_AT(7))
FUNCTION(multiply, ONE(0), ONE(1), ONE(2))
FUNCTION(drop, ONE(0), NUMBER_AT(1), (uint64_t)integer(g, 2))

#define ENTRY(name) {#name, make_##name}

static const struct {
    const char *name;
    flora_status (*make)(given *g, char *error);
} FUNCTIONS[] = {ENTRY(tucker_linear_forward),
                 ENTRY(tucker_linear_backward),
                 ENTRY(tucker_conv_forward),
                 ENTRY(tucker_conv_backward),
                 ENTRY(conv_weight_gradient),
                 ENTRY(conv_input_gradient),
                 ENTRY(tucker_reconstruct),
                 ENTRY(tucker_reconstruct_backward),
                 ENTRY(kronecker_forward),
                 ENTRY(kronecker_backward),
                 ENTRY(kronecker_reconstruct),
                 ENTRY(kronecker_reconstruct_backward),
                 ENTRY(rescale_reconstruct),
                 ENTRY(rescale_backward),
                 ENTRY(rescale_linear_backward),
                 ENTRY(toeplitz_reconstruct),
                 ENTRY(toeplitz_reconstruct_backward),
                 ENTRY(toeplitz_forward),
                 ENTRY(toeplitz_backward),
                 ENTRY(multiply),
                 ENTRY(drop)};

flora_status call_make(const call *c, const flora_view *views, char error[FLORA_ERROR_SIZE]) {
    given g = {.call = c, .views = views};
    for (size_t i = 0; i < sizeof FUNCTIONS / sizeof *FUNCTIONS; i++)
        if (strcmp(c->function, FUNCTIONS[i].name) == 0)
            return FUNCTIONS[i].make(&g, error);
    fprintf(stderr, "there is no function %s\n", c->function);
    exit(2);
}
