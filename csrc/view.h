/* Borrowing the memory of Python arrays.
 *
 * A loan is a view of an array's memory with whatever keeps that memory alive. It is made in two steps, as a producer's
 * code may free another array's memory: all arrays of a call are asked for first, and only then looked at, which runs
 * no Python code. Both steps refuse with a Python error what a kernel could not read or write safely; see view.c for
 * the list. Everything here needs the GIL; the view itself may be used without it until `flora_return_loan`.
 */
#ifndef FLORA_VIEW_H
#define FLORA_VIEW_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdatomic.h>

#include "flora.h"

#define FLORA_CACHED_TYPES 8

struct flora_cached_api {
    atomic_flag taken;        /* by the thread that fills it */
    _Atomic(PyObject *) type; /* strong; set last, NULL before */
    const void *api;          /* its DLPack exchange table */
};

/* What the module remembers between calls; one for each module object. Without a GIL calls run at once: what one of
 * them finds is written by one thread alone, and for good, before the atomic pointer to it. */
typedef struct {
    PyObject *array_error; /* the exception ArrayError */
    atomic_flag found;     /* torch, by the thread that writes what follows */
    PyObject *is_neg, *increment_version, *is_grad_enabled;
    const void *torch_api;                 /* torch.Tensor's exchange table, or NULL */
    _Atomic(PyObject *) parameter, tensor; /* torch.nn.Parameter, then torch.Tensor; NULL until torch is imported */
    PyObject *str_requires_grad, *str_resolve_neg, *str_dlpack, *str_exchange_api, *str_torch;
    struct flora_cached_api cached[FLORA_CACHED_TYPES]; /* types of other frameworks */
} flora_boundary;

/* Who borrows: both appear in messages, as "tucker_reconstruct: factors[2] …"; index -1 for an argument by itself. */
typedef struct {
    const char *function, *name;
    int index, output;
    int rows;              /* a view (…, d) is to become one of (rows, d) */
    PyObject *array_error; /* borrowed from the boundary */
} flora_borrower;

typedef struct {
    flora_view view;
    flora_borrower who;
    PyObject *object; /* strong: the array whose memory this is */
    void *managed;    /* an owned DLPack tensor whose deleter is still to be called, or NULL */
    int versioned;    /* which of the two structs `managed` is */
} flora_loan;

int flora_boundary_init(flora_boundary *boundary);
int flora_boundary_traverse(flora_boundary *boundary, visitproc visit, void *arg);
void flora_boundary_clear(flora_boundary *boundary);

/* 1 if torch is imported and its tensors are borrowed through the DLPack exchange API, 0 if not, -1 with an error. */
int flora_boundary_uses_exchange_api(flora_boundary *boundary);

/* 0 with a loan whose view is still to be filled, or -1 with a Python error and nothing held. */
int flora_ask(flora_boundary *boundary, PyObject *object, flora_borrower who, flora_loan *loan);
/* 0 with the view filled, or -1 with a Python error; the loan is to be returned either way. */
int flora_look(flora_boundary *boundary, flora_loan *loan);
void flora_return_loan(flora_loan *loan);

/* 1 if the object is a torch tensor that can be borrowed as an input, with its dtype; 0, never an error, if not. */
int flora_takes(flora_boundary *boundary, PyObject *object, flora_dtype *dtype);

/* Tells autograd that the torch tensors among the outputs have changed. */
int flora_mark_written(flora_boundary *boundary, const flora_loan *loans, int count);

#endif
