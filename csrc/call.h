/* A call from Python: its arguments parsed, its arrays borrowed and given back, its status made an exception.
 *
 * Everything that may run Python code comes before the first look at an array's memory, which such code could free:
 * __float__, __index__ and a sequence's items are parsed first, then all arrays are asked for, and CALL_RUN looks at
 * them. Functions that return int give -1 with an exception set.
 */
#ifndef FLORA_CALL_H
#define FLORA_CALL_H

#include "view.h"

typedef struct {
    flora_boundary boundary;
} module_state;

#define MAX_LOANS (6 + 2 * FLORA_MAX_ORDER) /* of tucker_conv_backward */

typedef struct {
    const char *function;
    flora_boundary *boundary;
    int count;
    flora_loan loans[MAX_LOANS];
    char error[FLORA_ERROR_SIZE];
} call;

enum { IN = 0, OUT = 1, OPTIONAL = 2, ROWS = 4 }; /* ROWS: (…, d), taken as (rows, d) */

typedef struct {
    const char *name;
    int flags;
} array_spec;

/* Starts the call; TypeError unless `given` is `wanted`. */
int call_begin(call *c, PyObject *module, const char *function, Py_ssize_t given, Py_ssize_t wanted);
/* Gives back what was borrowed. */
void call_end(call *c);

/* Asks for one array, whose view is filled by call_look; None gives NULL where `flags` has OPTIONAL. */
int call_borrow_one(call *c, PyObject *object, const char *name, int index, int flags, const flora_view **view);
int call_borrow_all(call *c, PyObject *const *args, const array_spec *specs, int count, const flora_view **views);
/* Fills the views of all arrays that were asked for. */
int call_look(call *c);
/* A new tuple of the items of a sequence with at most `max` items, so that no other thread can change it meanwhile. */
PyObject *call_sequence(const call *c, PyObject *object, const char *name, Py_ssize_t max);
/* Borrows the arrays in such a tuple, each of which may be None; gives their number. */
int call_borrow_items(call *c, PyObject *items, const char *name, int flags, const flora_view **views);

int parse_int(const call *c, PyObject *object, const char *name, int64_t *value);
/* A sequence of at most `max` ints; gives their number. */
int parse_ints(const call *c, PyObject *object, const char *name, int max, int64_t *values);
int parse_double(const call *c, PyObject *object, const char *name, double *value);
int parse_scale(const call *c, PyObject *object, double *scale);
/* stride, padding, dilation, groups and padding_mode. */
int parse_geometry(const call *c, PyObject *const *args, flora_geometry *geometry);

/* The exception of a status, or None. */
PyObject *call_finish(call *c, flora_status status);

/* Looks at the arrays and runs a kernel without the GIL; `result` is None, or stays NULL with an exception. */
#define CALL_RUN(c, result, kernel, ...)                                                                               \
    do {                                                                                                               \
        flora_status status;                                                                                           \
        if (call_look(&(c)) < 0)                                                                                       \
            break;                                                                                                     \
        Py_BEGIN_ALLOW_THREADS status = kernel(__VA_ARGS__, (c).error);                                                \
        Py_END_ALLOW_THREADS result = call_finish(&(c), status);                                                       \
    } while (0)

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, name##_doc}

/* The functions of each family, ended by an empty entry. */
extern PyMethodDef flora_tucker_methods[], flora_toeplitz_methods[], flora_kronecker_methods[], flora_rescale_methods[],
    flora_product_methods[];

#endif
