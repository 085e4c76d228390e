#include "call.h"

#include <string.h>

int call_begin(call *c, PyObject *module, const char *function, Py_ssize_t given, Py_ssize_t wanted) {
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

void call_end(call *c) {
    while (c->count > 0) {
        flora_return_loan(&c->loans[--c->count]);
    }
}

int call_borrow_one(call *c, PyObject *object, const char *name, int index, int flags, const flora_view **view) {
    *view = NULL;
    if (object == Py_None && (flags & OPTIONAL) != 0) {
        return 0;
    }
    if (c->count == MAX_LOANS) {
        PyErr_Format(PyExc_RuntimeError, "%s: more than %d arrays", c->function, MAX_LOANS);
        return -1;
    }
    flora_borrower who = {c->function, name, index, (flags & OUT) != 0, (flags & ROWS) != 0, c->boundary->array_error};
    if (flora_ask(c->boundary, object, who, &c->loans[c->count]) < 0) {
        return -1;
    }
    *view = &c->loans[c->count++].view;
    return 0;
}

int call_look(call *c) {
    for (int i = 0; i < c->count; i++) {
        if (flora_look(c->boundary, &c->loans[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

int call_borrow_all(call *c, PyObject *const *args, const array_spec *specs, int count, const flora_view **views) {
    for (int i = 0; i < count; i++) {
        if (call_borrow_one(c, args[i], specs[i].name, -1, specs[i].flags, &views[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

PyObject *call_sequence(const call *c, PyObject *object, const char *name, Py_ssize_t max) {
    Py_ssize_t length = PySequence_Check(object) ? PySequence_Size(object) : -1;
    if (length < 0) {
        if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError)) {
            return NULL;
        }
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: %s is %R, not a sequence", c->function, name, object);
        return NULL;
    }
    if (length > max) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %zd entries, at most %zd are taken", c->function, name, length, max);
        return NULL;
    }
    PyObject *items = PyTuple_New(length); /* not PySequence_Tuple, which goes on as long as a lying sequence does */
    for (Py_ssize_t i = 0; items != NULL && i < length; i++) {
        PyObject *item = PySequence_GetItem(object, i);
        if (item == NULL && PyErr_ExceptionMatches(PyExc_IndexError)) {
            PyErr_Format(PyExc_ValueError, "%s: %s has %zd entries, not the %zd that its length says", c->function,
                         name, i, length);
        }
        if (item == NULL || PyTuple_SetItem(items, i, item) < 0) {
            Py_CLEAR(items);
        }
    }
    return items;
}

int call_borrow_items(call *c, PyObject *items, const char *name, int flags, const flora_view **views) {
    const int count = (int)PyTuple_Size(items);
    for (int i = 0; i < count; i++) {
        if (call_borrow_one(c, PyTuple_GetItem(items, i), name, i, flags | OPTIONAL, &views[i]) < 0) {
            return -1;
        }
    }
    return count;
}

int parse_int(const call *c, PyObject *object, const char *name, int64_t *value) {
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

int parse_ints(const call *c, PyObject *object, const char *name, int max, int64_t *values) {
    PyObject *items = call_sequence(c, object, name, max);
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

int parse_double(const call *c, PyObject *object, const char *name, double *value) {
    *value = PyFloat_AsDouble(object);
    if (*value == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%s: %s %R is too large", c->function, name, object);
        } else if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_TypeError, "%s: %s must be a float, not %R", c->function, name, object);
        }
        return -1;
    }
    return 0;
}

int parse_scale(const call *c, PyObject *object, double *scale) {
    return parse_double(c, object, "scale", scale);
}

int parse_geometry(const call *c, PyObject *const *args, flora_geometry *geometry) {
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

PyObject *call_finish(call *c, flora_status status) {
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
