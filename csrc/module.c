/* flora._core: the Python method table of the kernels.
 *
 * A function borrows its arrays, runs one kernel of flora.h without the GIL, gives the arrays back and turns the status
 * into an exception. Arguments are those of the twin of the same name in flora/reference.py, all positional.
 */
#include "isa.h"
#include "parallel.h"
#include "view.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    flora_boundary boundary;
} module_state;

/* A call: what it has borrowed so far ------------------------------------------------------------------------------ */

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

/* -1 with TypeError unless `given` is `wanted`. Starts the call. */
static int begin(call *c, PyObject *module, const char *function, Py_ssize_t given, Py_ssize_t wanted) {
    c->function = function;
    c->boundary = &((module_state *)PyModule_GetState(module))->boundary;
    c->count = 0;
    c->error[0] = '\0';
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%s() takes exactly %zd positional arguments (%zd given)", function, wanted,
                     given);
        return -1;
    }
    return 0;
}

static void end(call *c) {
    while (c->count > 0) {
        flora_return_loan(&c->loans[--c->count]);
    }
}

/* Borrows one array; None gives NULL where `flags` has OPTIONAL. */
static int borrow_one(call *c, PyObject *object, const char *name, int index, int flags, const flora_view **view) {
    *view = NULL;
    if (object == Py_None && (flags & OPTIONAL) != 0) {
        return 0;
    }
    if (c->count == MAX_LOANS) {
        PyErr_Format(PyExc_RuntimeError, "%s: more than %d arrays", c->function, MAX_LOANS);
        return -1;
    }
    flora_borrower who = {c->function, name, index, (flags & OUT) != 0, c->boundary->array_error};
    if (flora_borrow(c->boundary, object, who, &c->loans[c->count]) < 0) {
        return -1;
    }
    flora_loan *loan = &c->loans[c->count++];
    *view = &loan->view;
    return (flags & ROWS) != 0 ? flora_rows(loan) : 0;
}

static int borrow_all(call *c, PyObject *const *args, const array_spec *specs, int count, const flora_view **views) {
    for (int i = 0; i < count; i++) {
        if (borrow_one(c, args[i], specs[i].name, -1, specs[i].flags, &views[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

/* A new tuple of the items of a sequence with at most `max` items, so that no other thread can change it meanwhile. */
static PyObject *sequence(const call *c, PyObject *object, const char *name, Py_ssize_t max) {
    Py_ssize_t length = PySequence_Check(object) ? PySequence_Size(object) : -1;
    if (length < 0) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: %s is %R, not a sequence", c->function, name, object);
        return NULL;
    }
    if (length > max) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %zd entries, at most %zd are taken", c->function, name, length, max);
        return NULL;
    }
    PyObject *items = PySequence_Tuple(object);
    if (items != NULL && PyTuple_Size(items) > max) { /* its length lied */
        PyErr_Format(PyExc_ValueError, "%s: %s has %zd entries, at most %zd are taken", c->function, name,
                     PyTuple_Size(items), max);
        Py_CLEAR(items);
    }
    return items;
}

/* Borrows the arrays in a tuple of `sequence`, each of which may be None; gives their number, or -1. */
static int borrow_items(call *c, PyObject *items, const char *name, int flags, const flora_view **views) {
    const int count = (int)PyTuple_Size(items);
    for (int i = 0; i < count; i++) {
        if (borrow_one(c, PyTuple_GetItem(items, i), name, i, flags | OPTIONAL, &views[i]) < 0) {
            return -1;
        }
    }
    return count;
}

static int parse_int(const call *c, PyObject *object, const char *name, int64_t *value) {
    long long parsed = PyLong_AsLongLong(object);
    if (parsed == -1 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%s: %s %R is too large", c->function, name, object);
        } else if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_TypeError, "%s: %s must be an int, not %R", c->function, name, object);
        }
        return -1;
    }
    *value = parsed;
    return 0;
}

/* A sequence of at most `max` ints; gives their number, or -1. */
static int parse_ints(const call *c, PyObject *object, const char *name, int max, int64_t *values) {
    PyObject *items = sequence(c, object, name, max);
    if (items == NULL) {
        return -1;
    }
    int count = (int)PyTuple_Size(items);
    for (int i = 0; i < count; i++) {
        if (parse_int(c, PyTuple_GetItem(items, i), name, &values[i]) < 0) {
            count = -1;
        }
    }
    Py_DECREF(items);
    return count;
}

/* Everything that may run Python code (__float__, __index__, a sequence's items) is parsed before the first array is
 * borrowed: such code could free an array's memory. */
static int parse_double(const call *c, PyObject *object, const char *name, double *value) {
    *value = PyFloat_AsDouble(object);
    if (*value == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_TypeError, "%s: %s must be a float, not %R", c->function, name, object);
        }
        return -1;
    }
    return 0;
}

static int parse_scale(const call *c, PyObject *object, double *scale) {
    return parse_double(c, object, "scale", scale);
}

/* stride, padding, dilation, groups and padding_mode. */
static int parse_geometry(const call *c, PyObject *const *args, flora_geometry *geometry) {
    static const char *const modes[] = {[FLORA_PAD_ZEROS] = "zeros",
                                        [FLORA_PAD_REFLECT] = "reflect",
                                        [FLORA_PAD_REPLICATE] = "replicate",
                                        [FLORA_PAD_CIRCULAR] = "circular"};
    int64_t padding[2 * FLORA_MAX_SPATIAL];
    memset(geometry, 0, sizeof *geometry);
    int strides = parse_ints(c, args[0], "stride", FLORA_MAX_SPATIAL, geometry->stride);
    int paddings = strides < 0 ? -1 : parse_ints(c, args[1], "padding", 2 * FLORA_MAX_SPATIAL, padding);
    int dilations = paddings < 0 ? -1 : parse_ints(c, args[2], "dilation", FLORA_MAX_SPATIAL, geometry->dilation);
    if (dilations < 0 || parse_int(c, args[3], "groups", &geometry->groups) < 0) {
        return -1;
    }
    if (paddings != 2 * strides || dilations != strides) {
        PyErr_Format(PyExc_ValueError,
                     "%s: stride, padding and dilation have %d, %d and %d entries, n, 2n and n are needed", c->function,
                     strides, paddings, dilations);
        return -1;
    }
    geometry->ndim = strides;
    for (int i = 0; i < strides; i++) {
        geometry->padding[i][0] = padding[2 * i];
        geometry->padding[i][1] = padding[2 * i + 1];
    }
    if (!PyUnicode_Check(args[4])) {
        PyErr_Format(PyExc_TypeError, "%s: padding_mode must be a str, not %R", c->function, args[4]);
        return -1;
    }
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        if (PyUnicode_CompareWithASCIIString(args[4], modes[i]) == 0) {
            geometry->mode = (flora_padding_mode)i;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "%s: padding_mode %R is none of zeros, reflect, replicate, circular", c->function,
                 args[4]);
    return -1;
}

/* The exception of a status, or None. */
static PyObject *finish(call *c, flora_status status) {
    PyObject *exception = NULL;
    switch (status) {
    case FLORA_OK:
        /* A signal that came during a long kernel is answered now, not some bytecodes later. */
        if (flora_mark_written(c->boundary, c->loans, c->count) < 0 || PyErr_CheckSignals() < 0) {
            return NULL;
        }
        Py_RETURN_NONE;
    case FLORA_BAD_DTYPE:
        exception = PyExc_TypeError;
        break;
    case FLORA_NO_MEMORY: /* which may come late */
        if (flora_mark_written(c->boundary, c->loans, c->count) < 0) {
            PyErr_Clear();
        }
        exception = PyExc_MemoryError;
        break;
    case FLORA_BAD_SHAPE:
    case FLORA_BAD_LAYOUT:
    case FLORA_BAD_VALUE:
        exception = PyExc_ValueError;
        break;
    }
    PyErr_Format(exception, "%s: %s", c->function, c->error);
    return NULL;
}

#define RUN(c, result, kernel, ...)                                                                                    \
    do {                                                                                                               \
        flora_status status;                                                                                           \
        Py_BEGIN_ALLOW_THREADS status = kernel(__VA_ARGS__, (c).error);                                                \
        Py_END_ALLOW_THREADS result = finish(&(c), status);                                                            \
    } while (0)

/* The operations --------------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(
    tucker_linear_forward_doc,
    "tucker_linear_forward($module, y, h, x, u_in, core, u_out, scale, /)\n--\n\n"
    "y (rows, d_out) += scale * x (rows, d_in) @ u_in (d_in, r_in) @ core (r_out, r_in).T @ u_out (d_out, r_out).T\n"
    "\n"
    "In place, in one pass over x and y. h (rows, r_in), if not None, receives x @ u_in for the backward pass.\n"
    "The rows of y, h and x may be counted by any number of leading dimensions that a view could flatten.\n"
    "core None is the identity. x and y share a dtype (float32, float64, bfloat16, float16); h, u_in, core and\n"
    "u_out are float64 with float64 activations, else float32, and all sums are taken in that type.\n"
    "\n"
    "Arrays are torch tensors, NumPy arrays or anything with __dlpack__, in CPU memory. No gradient is recorded;\n"
    "the version counter of a written torch tensor is incremented.\n"
    "\n"
    "Raises ValueError (shape, strides, scale, an output that is read-only, requires grad or shares memory with\n"
    "another argument), TypeError (dtype or type), ArrayError (device, or an array that cannot be borrowed);\n"
    "nothing has been written then.\n"
    "\n"
    "Source: FLoRA, arXiv 2405.14739, the Tucker update of a matrix, applied without forming it.");

static PyObject *tucker_linear_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"y", OUT | ROWS}, {"h", OUT | OPTIONAL | ROWS}, {"x", IN | ROWS},
                                       {"u_in", IN},      {"core", IN | OPTIONAL},      {"u_out", IN}};
    const flora_view *v[6];
    call c;
    double scale;
    PyObject *result = NULL;
    if (begin(&c, module, "tucker_linear_forward", nargs, 7) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[6], &scale) == 0 && borrow_all(&c, args, specs, 6, v) == 0) {
        RUN(c, result, flora_tucker_linear_forward, v[0], v[1], v[2], v[3], v[4], v[5], scale);
    }
    end(&c);
    return result;
}

PyDoc_STRVAR(
    tucker_linear_backward_doc,
    "tucker_linear_backward($module, dx, d_u_in, d_core, d_u_out, dy, x, h, u_in, core, u_out, scale, /)\n--\n\n"
    "The gradients of tucker_linear_forward. With dk = scale * dy @ u_out and dh = dk @ core:\n"
    "\n"
    "    dx (rows, d_in) += dh @ u_in.T       d_u_out (d_out, r_out) = scale * dy.T @ (h @ core.T)\n"
    "    d_core (r_out, r_in) = dk.T @ h      d_u_in (d_in, r_in) = x.T @ dh\n"
    "\n"
    "dx is updated in place, the others are overwritten; None leaves an output out. dy is (rows, d_out), rows\n"
    "as in tucker_linear_forward. h None: it is computed from x. x may be None if neither d_u_in nor a missing h\n"
    "needs it. Types and errors as in tucker_linear_forward. Source: FLoRA, arXiv 2405.14739.");

static PyObject *tucker_linear_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"dx", OUT | OPTIONAL | ROWS},
                                       {"d_u_in", OUT | OPTIONAL},
                                       {"d_core", OUT | OPTIONAL},
                                       {"d_u_out", OUT | OPTIONAL},
                                       {"dy", IN | ROWS},
                                       {"x", IN | OPTIONAL | ROWS},
                                       {"h", IN | OPTIONAL | ROWS},
                                       {"u_in", IN},
                                       {"core", IN | OPTIONAL},
                                       {"u_out", IN}};
    const flora_view *v[10];
    call c;
    double scale;
    PyObject *result = NULL;
    if (begin(&c, module, "tucker_linear_backward", nargs, 11) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[10], &scale) == 0 && borrow_all(&c, args, specs, 10, v) == 0) {
        RUN(c, result, flora_tucker_linear_backward, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], scale);
    }
    end(&c);
    return result;
}

PyDoc_STRVAR(
    tucker_conv_forward_doc,
    "tucker_conv_forward($module, y, h, x, core, factors, scale, stride, padding, dilation, groups,\n"
    "                    padding_mode, /)\n--\n\n"
    "y (batch, d_out, *out) += scale * conv(x (batch, d_in, *in), core x_0 factors[0] x_1 factors[1] ...), in place,\n"
    "n = 1 to 3 spatial modes, for any strides of x and y (contiguous and channels_last run natively).\n"
    "\n"
    "core is (r_out, r_in, *r_k); factors are u_out (d_out, r_out), u_in (d_in / groups, r_in) and (k, r_k) of each\n"
    "kernel mode, None for the identity. All but the rows of u_out are shared by the groups. h (batch, *padded, \n"
    "groups * r_in), if not None, receives the projected and padded input. stride and dilation are n ints, padding\n"
    "2n: before and after each spatial mode; padding_mode is zeros, reflect, replicate or circular.\n"
    "\n"
    "Types and errors as in tucker_linear_forward, and ValueError for a geometry without an output.\n"
    "Source: FLoRA, arXiv 2405.14739, the Tucker update of a convolution's kernel, applied without forming it.");

/* Borrows the factors of a convolution's modes: 0, or -1. */
static int borrow_factors(call *c, PyObject *items, const char *name, int flags, int order, const flora_view **views) {
    if (PyTuple_Size(items) != order) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %zd entries, the weight %d modes", c->function, name,
                     PyTuple_Size(items), order);
        return -1;
    }
    if (borrow_items(c, items, name, flags, views) < 0) {
        return -1;
    }
    for (int m = 0; m < 2 && flags == IN; m++) {
        if (views[m] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s: %s[%d] must be an array, not None", c->function, name, m);
            return -1;
        }
    }
    return 0;
}

static PyObject *tucker_conv_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"y", OUT}, {"h", OUT | OPTIONAL}, {"x", IN}, {"core", IN}};
    const flora_view *v[4], *factors[FLORA_MAX_ORDER];
    call c;
    double scale;
    flora_geometry geometry;
    PyObject *result = NULL;
    if (begin(&c, module, "tucker_conv_forward", nargs, 11) < 0) {
        return NULL;
    }
    PyObject *items = sequence(&c, args[4], "factors", FLORA_MAX_ORDER);
    if (items != NULL && parse_scale(&c, args[5], &scale) == 0 && parse_geometry(&c, args + 6, &geometry) == 0 &&
        borrow_all(&c, args, specs, 4, v) == 0 &&
        borrow_factors(&c, items, "factors", IN, 2 + geometry.ndim, factors) == 0) {
        RUN(c, result, flora_tucker_conv_forward, v[0], v[1], v[2], v[3], factors, scale, &geometry);
    }
    Py_XDECREF(items);
    end(&c);
    return result;
}

PyDoc_STRVAR(
    tucker_conv_backward_doc,
    "tucker_conv_backward($module, dx, d_core, d_factors, dy, x, h, core, factors, scale, stride, padding, dilation,\n"
    "                     groups, padding_mode, /)\n--\n\n"
    "The gradients of tucker_conv_forward: dx (batch, d_in, *in) is updated in place, d_core and the entries of\n"
    "d_factors, of the shapes of core and factors, are overwritten; None leaves an output out.\n"
    "\n"
    "dy is (batch, d_out, *out). h None: it is computed from x. x may be None if neither d_factors[1] nor a missing h\n"
    "needs it. Types and errors as in tucker_conv_forward. Source: FLoRA, arXiv 2405.14739.");

static PyObject *tucker_conv_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec outputs[] = {{"dx", OUT | OPTIONAL}, {"d_core", OUT | OPTIONAL}};
    static const array_spec inputs[] = {{"dy", IN}, {"x", IN | OPTIONAL}, {"h", IN | OPTIONAL}, {"core", IN}};
    const flora_view *d[2], *v[4], *d_factors[FLORA_MAX_ORDER], *factors[FLORA_MAX_ORDER];
    call c;
    double scale;
    flora_geometry geometry;
    PyObject *result = NULL;
    if (begin(&c, module, "tucker_conv_backward", nargs, 14) < 0) {
        return NULL;
    }
    PyObject *d_items = sequence(&c, args[2], "d_factors", FLORA_MAX_ORDER);
    PyObject *items = d_items == NULL ? NULL : sequence(&c, args[7], "factors", FLORA_MAX_ORDER);
    if (items != NULL && parse_scale(&c, args[8], &scale) == 0 && parse_geometry(&c, args + 9, &geometry) == 0 &&
        borrow_all(&c, args, outputs, 2, d) == 0 &&
        borrow_factors(&c, d_items, "d_factors", OUT, 2 + geometry.ndim, d_factors) == 0 &&
        borrow_all(&c, args + 3, inputs, 4, v) == 0 &&
        borrow_factors(&c, items, "factors", IN, 2 + geometry.ndim, factors) == 0) {
        RUN(c, result, flora_tucker_conv_backward, d[0], d[1], d_factors, v[0], v[1], v[2], v[3], factors, scale,
            &geometry);
    }
    Py_XDECREF(items);
    Py_XDECREF(d_items);
    end(&c);
    return result;
}

PyDoc_STRVAR(
    conv_weight_gradient_doc,
    "conv_weight_gradient($module, d_weight, dy, x, stride, padding, dilation, groups, padding_mode, /)\n--\n\n"
    "d_weight (d_out, d_in / groups, *k) = the weight gradient of y (batch, d_out, *out) = conv(x (batch, d_in, *in),\n"
    "weight) for dy of y's shape, overwritten; for groups of few channels, depthwise above all.\n"
    "\n"
    "x and dy have any strides; the geometry is given as in tucker_conv_forward. x and dy are of one type, d_weight "
    "is\n"
    "float32, or float64 for float64. Errors as in tucker_conv_forward. Source: the definition of a convolution.");

static PyObject *conv_weight_gradient(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"d_weight", OUT}, {"dy", IN}, {"x", IN}};
    const flora_view *v[3];
    call c;
    flora_geometry geometry;
    PyObject *result = NULL;
    if (begin(&c, module, "conv_weight_gradient", nargs, 8) < 0) {
        return NULL;
    }
    if (parse_geometry(&c, args + 3, &geometry) == 0 && borrow_all(&c, args, specs, 3, v) == 0) {
        RUN(c, result, flora_conv_weight_gradient, v[0], v[1], v[2], &geometry);
    }
    end(&c);
    return result;
}

PyDoc_STRVAR(
    tucker_reconstruct_doc,
    "tucker_reconstruct($module, out, weight, core, factors, scale, /)\n--\n\n"
    "out (d_0, ...) = weight (d_0, ...) + scale * core (r_0, ...) x_0 factors[0] (d_0, r_0) x_1 ..., order 1 to 5.\n"
    "\n"
    "weight None is zero; a factor that is None is the identity (r_m = d_m). The sum is rounded to out's dtype once.\n"
    "out and weight may be the same array; otherwise types and errors are as in tucker_linear_forward.\n"
    "Source: FLoRA, arXiv 2405.14739, the Tucker decomposition of the update.");

static PyObject *tucker_reconstruct(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"out", OUT}, {"weight", IN | OPTIONAL}, {"core", IN}};
    const flora_view *v[3], *factors[FLORA_MAX_ORDER];
    call c;
    double scale;
    int order;
    PyObject *result = NULL;
    if (begin(&c, module, "tucker_reconstruct", nargs, 5) < 0) {
        return NULL;
    }
    PyObject *items = sequence(&c, args[3], "factors", FLORA_MAX_ORDER);
    if (items != NULL && parse_scale(&c, args[4], &scale) == 0 && borrow_all(&c, args, specs, 3, v) == 0 &&
        (order = borrow_items(&c, items, "factors", IN, factors)) >= 0) {
        RUN(c, result, flora_tucker_reconstruct, v[0], v[1], v[2], factors, order, scale);
    }
    Py_XDECREF(items);
    end(&c);
    return result;
}

PyDoc_STRVAR(
    tucker_reconstruct_backward_doc,
    "tucker_reconstruct_backward($module, d_core, d_factors, d_weight, core, factors, scale, /)\n--\n\n"
    "The adjoint of tucker_reconstruct: d_weight (d_0, ...) projected on the core and on every factor,\n"
    "\n"
    "    d_core (r_0, ...) = scale * d_weight x_m factors[m].T over all m\n"
    "    d_factors[m] (d_m, r_m) = scale * d_weight_(m) @ (core x_n factors[n] over n != m)_(m).T\n"
    "\n"
    "where _(m) is the unfolding along mode m. d_core or an entry of d_factors that is None is left out; d_factors\n"
    "is as long as factors. Types and errors as in tucker_linear_forward. Source: FLoRA, arXiv 2405.14739.");

static PyObject *tucker_reconstruct_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"d_weight", IN}, {"core", IN}};
    const flora_view *v[2], *d_core, *d_factors[FLORA_MAX_ORDER], *factors[FLORA_MAX_ORDER];
    call c;
    double scale;
    int order, outputs;
    PyObject *result = NULL;
    if (begin(&c, module, "tucker_reconstruct_backward", nargs, 6) < 0) {
        return NULL;
    }
    PyObject *d_items = sequence(&c, args[1], "d_factors", FLORA_MAX_ORDER);
    PyObject *items = d_items == NULL ? NULL : sequence(&c, args[4], "factors", FLORA_MAX_ORDER);
    if (items != NULL && parse_scale(&c, args[5], &scale) == 0 &&
        borrow_one(&c, args[0], "d_core", -1, OUT | OPTIONAL, &d_core) == 0 &&
        (outputs = borrow_items(&c, d_items, "d_factors", OUT, d_factors)) >= 0 &&
        borrow_all(&c, args + 2, specs, 2, v) == 0 && (order = borrow_items(&c, items, "factors", IN, factors)) >= 0) {
        if (outputs != order) {
            PyErr_Format(PyExc_ValueError, "%s: d_factors has %d entries, factors %d", c.function, outputs, order);
        } else {
            RUN(c, result, flora_tucker_reconstruct_backward, d_core, d_factors, v[0], v[1], factors, order, scale);
        }
    }
    Py_XDECREF(items);
    Py_XDECREF(d_items);
    end(&c);
    return result;
}

PyDoc_STRVAR(takes_doc,
             "takes($module, x, weight, bias, core, factors, /)\n--\n\n"
             "Whether the kernels can work on these: plain torch tensors in CPU memory, of dtypes that go together.\n"
             "\n"
             "x is float32, float64, bfloat16 or float16, weight is of the same dtype; core and factors (a tuple) are\n"
             "float64 if x is, else float32. weight and bias may be None. Shapes are not looked at.");

static PyObject *takes(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    call c;
    flora_dtype act, dtype;
    if (begin(&c, module, "takes", nargs, 5) < 0) {
        return NULL;
    }
    if (!PyTuple_Check(args[4])) {
        PyErr_Format(PyExc_TypeError, "takes: factors is %R, not a tuple", args[4]);
        return NULL;
    }
    int fits = flora_takes(c.boundary, args[0], &act) &&
               (args[1] == Py_None || (flora_takes(c.boundary, args[1], &dtype) && dtype == act)) &&
               (args[2] == Py_None || flora_takes(c.boundary, args[2], &dtype));
    const flora_dtype real = fits && act == FLORA_F64 ? FLORA_F64 : FLORA_F32;
    fits = fits && flora_takes(c.boundary, args[3], &dtype) && dtype == real;
    for (Py_ssize_t i = 0; fits && i < PyTuple_Size(args[4]); i++) {
        fits = flora_takes(c.boundary, PyTuple_GetItem(args[4], i), &dtype) && dtype == real;
    }
    return PyBool_FromLong(fits);
}

PyDoc_STRVAR(drop_doc,
             "drop($module, out, probability, seed, /)\n--\n\n"
             "Sets every element of out (n) to zero with this probability, in place; out has unit stride.\n"
             "\n"
             "Whether an element is dropped depends on the seed (an int) and its index alone: the same call drops the\n"
             "same ones again. Types\n"
             "and errors as in tucker_linear_forward. Source: SplitMix64 of Steele, Lea and Flood, OOPSLA 2014.");

static PyObject *drop(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const flora_view *out;
    call c;
    double probability;
    int64_t seed;
    PyObject *result = NULL;
    if (begin(&c, module, "drop", nargs, 3) < 0) {
        return NULL;
    }
    if (parse_double(&c, args[1], "probability", &probability) == 0 && parse_int(&c, args[2], "seed", &seed) == 0 &&
        borrow_one(&c, args[0], "out", -1, OUT, &out) == 0) {
        RUN(c, result, flora_drop, out, probability, (uint64_t)seed);
    }
    end(&c);
    return result;
}

/* About the library ------------------------------------------------------------------------------------------------ */

#define MAX_ISA_NAMES 16

static PyObject *isa_names(void) {
    const char *names[MAX_ISA_NAMES];
    int count = flora_isa_available(names, MAX_ISA_NAMES);
    if (count > MAX_ISA_NAMES) {
        count = MAX_ISA_NAMES;
    }
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL || PyList_Append(list, name) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    return list;
}

PyDoc_STRVAR(
    info_doc,
    "info($module, /)\n--\n\n"
    "How the kernels run here: isa (str, the instruction set in use), isa_available (list of str, those that\n"
    "this CPU and build have), threads (int), pool (str, whose threads they are), exchange_api (bool, whether\n"
    "torch tensors are borrowed through the DLPack C exchange API; False until torch is imported).");

static PyObject *info(PyObject *module, PyObject *unused) {
    (void)unused;
    int exchange = flora_boundary_uses_exchange_api(&((module_state *)PyModule_GetState(module))->boundary);
    PyObject *names = exchange < 0 ? NULL : isa_names();
    if (names == NULL) {
        return NULL;
    }
    return Py_BuildValue("{s:s,s:N,s:i,s:s,s:O}", "isa", flora_isa_name(), "isa_available", names, "threads",
                         flora_num_threads(), "pool", flora_pool_name(), "exchange_api", exchange ? Py_True : Py_False);
}

PyDoc_STRVAR(set_isa_doc,
             "set_isa($module, name, /)\n--\n\n"
             "Uses the kernels of one of info()[\"isa_available\"] in the whole process from now on; for tests.\n"
             "The environment variable FLORA_ISA does the same at import. Raises ValueError for any other name.");

static PyObject *set_isa(PyObject *module, PyObject *name) {
    (void)module;
    PyObject *bytes = PyUnicode_Check(name) ? PyUnicode_AsUTF8String(name) : NULL;
    char *text = NULL;
    if (bytes == NULL && !PyErr_Occurred()) {
        PyErr_Format(PyExc_TypeError, "set_isa: name must be a str, not %R", name);
    }
    if (bytes == NULL || (text = PyBytes_AsString(bytes)) == NULL) {
        Py_XDECREF(bytes);
        return NULL;
    }
    int status = flora_isa_set(text);
    Py_DECREF(bytes);
    if (status != 0) {
        PyObject *names = isa_names();
        if (names != NULL) {
            PyErr_Format(PyExc_ValueError, "set_isa: %R is none of %R", name, names);
            Py_DECREF(names);
        }
        return NULL;
    }
    Py_RETURN_NONE;
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, name##_doc}

static PyMethodDef methods[] = {FAST(tucker_linear_forward),
                                FAST(tucker_linear_backward),
                                FAST(tucker_conv_forward),
                                FAST(tucker_conv_backward),
                                FAST(conv_weight_gradient),
                                FAST(tucker_reconstruct),
                                FAST(tucker_reconstruct_backward),
                                FAST(drop),
                                FAST(takes),
                                {"info", info, METH_NOARGS, info_doc},
                                {"set_isa", set_isa, METH_O, set_isa_doc},
                                {NULL, NULL, 0, NULL}};

/* The module ------------------------------------------------------------------------------------------------------- */

static int module_exec(PyObject *module) {
    if (flora_isa_init() < 0 && PyErr_WarnFormat(PyExc_RuntimeWarning, 1,
                                                 "the environment variable FLORA_ISA is %s, which names no instruction "
                                                 "set; it is ignored",
                                                 getenv("FLORA_ISA")) < 0)
        return -1;
    flora_boundary *boundary = &((module_state *)PyModule_GetState(module))->boundary;
    if (flora_boundary_init(boundary) < 0)
        return -1;
    return PyModule_AddObjectRef(module, "ArrayError", boundary->array_error);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    module_state *state = PyModule_GetState(module);
    return state != NULL ? flora_boundary_traverse(&state->boundary, visit, arg) : 0;
}

static int module_clear(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    if (state != NULL) {
        flora_boundary_clear(&state->boundary);
    }
    return 0;
}

static void module_free(void *module) {
    module_clear(module);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)module_exec}, {0, NULL}};

PyDoc_STRVAR(module_doc,
             "flora's kernels in C, on torch tensors, NumPy arrays and anything else with __dlpack__.\n"
             "\n"
             "Every function writes into arrays that the caller has allocated and returns None; flora.reference has\n"
             "its twin in plain PyTorch.");

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,          .m_name = "flora._core", .m_doc = module_doc,
                                        .m_size = sizeof(module_state), .m_methods = methods,    .m_slots = slots,
                                        .m_traverse = module_traverse,  .m_clear = module_clear, .m_free = module_free};

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&definition);
}
