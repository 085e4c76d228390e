/* Calls of the C functions as tests/native/record.py writes them, and how one is made. */
#ifndef CALLS_H
#define CALLS_H

#include "flora.h"

enum { MAX_ARGUMENTS = 16, MAX_ARRAYS = 24, MAX_ITEMS = FLORA_MAX_ORDER, MAX_INTEGERS = 2 * FLORA_MAX_SPATIAL };

typedef struct {
    flora_view view;      /* of `bytes` bytes of memory, from its first to its last element */
    const void *recorded; /* what these were */
    int64_t bytes, phase; /* phase: the address modulo 64 */
    int output;
    double tolerance, native_tolerance, least; /* least: an error that is always allowed */
    const double *exact, *magnitude;           /* in the order of the indices */
} array;

typedef struct {
    enum { NONE, NUMBER, INTEGERS, ARRAY, ARRAYS } kind;
    double number;
    int64_t count, integers[MAX_INTEGERS];
    int arrays[MAX_ITEMS]; /* -1: NULL */
} argument;

typedef struct {
    char function[56];
    int argument_count, array_count;
    argument arguments[MAX_ARGUMENTS];
    array arrays[MAX_ARRAYS];
} call;

/* Reads a file's calls and keeps its memory; exits with a sentence if that cannot be done. */
call *calls_read(const char *path, int *count);

/* Makes the call with these views in the place of the call's arrays. */
flora_status call_make(const call *c, const flora_view *views, char error[FLORA_ERROR_SIZE]);

#endif
