/* The Kronecker functions of flora._core. See call.h. */
#include "call.h"

PyDoc_STRVAR(
    kronecker_forward_doc,
    "kronecker_forward($module, y, h, x, a, b, scale, /)\n--\n\n"
    "y (rows, m p) += scale * x (rows, n q) @ kron(b (m, n), a (p, q)).T, in place, without forming the product.\n"
    "\n"
    "h (rows, n p), if not None, receives x as (rows, n, q) times a.T for the backward pass. y has unit stride along\n"
    "its last mode. Rows, types and errors as in tucker_linear_forward.\n"
    "\n"
    "Source: SURM, arXiv 2406.17740, the Kronecker update of a matrix.");

static PyObject *kronecker_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {
        {"y", OUT | ROWS}, {"h", OUT | OPTIONAL | ROWS}, {"x", IN | ROWS}, {"a", IN}, {"b", IN}};
    const flora_view *v[5];
    call c;
    double scale;
    PyObject *result = NULL;
    if (call_begin(&c, module, "kronecker_forward", nargs, 6) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[5], &scale) == 0 && call_borrow_all(&c, args, specs, 5, v) == 0) {
        CALL_RUN(c, result, flora_kronecker_forward, v[0], v[1], v[2], v[3], v[4], scale);
    }
    call_end(&c);
    return result;
}

PyDoc_STRVAR(
    kronecker_backward_doc,
    "kronecker_backward($module, dx, d_a, d_b, dy, x, h, a, b, scale, /)\n--\n\n"
    "The gradients of kronecker_forward. With a row of dy as (m, p), of x as (n, q), of h as (n, p) and\n"
    "dh (n, p) = scale * b.T @ dy:\n"
    "\n"
    "    dx (n, q) += dh @ a    d_a (p, q) = sum of dh.T @ x    d_b (m, n) = scale * sum of dy @ h.T, over the rows\n"
    "\n"
    "dx is updated in place, the others are overwritten; None leaves an output out. h None: it is computed from x.\n"
    "x may be None if neither d_a nor a missing h needs it. dx has unit stride along its last mode. Rows, types and\n"
    "errors as in tucker_linear_forward. Source: SURM, arXiv 2406.17740.");

static PyObject *kronecker_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"dx", OUT | OPTIONAL | ROWS},
                                       {"d_a", OUT | OPTIONAL},
                                       {"d_b", OUT | OPTIONAL},
                                       {"dy", IN | ROWS},
                                       {"x", IN | OPTIONAL | ROWS},
                                       {"h", IN | OPTIONAL | ROWS},
                                       {"a", IN},
                                       {"b", IN}};
    const flora_view *v[8];
    call c;
    double scale;
    PyObject *result = NULL;
    if (call_begin(&c, module, "kronecker_backward", nargs, 9) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[8], &scale) == 0 && call_borrow_all(&c, args, specs, 8, v) == 0) {
        CALL_RUN(c, result, flora_kronecker_backward, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], scale);
    }
    call_end(&c);
    return result;
}

PyDoc_STRVAR(
    kronecker_reconstruct_doc,
    "kronecker_reconstruct($module, out, weight, a, b, scale, /)\n--\n\n"
    "out (m p, n q) = weight (m p, n q) + scale * kron(b (m, n), a (p, q)), in one pass.\n"
    "\n"
    "weight None is zero. The sum is rounded to out's dtype once. out has unit stride in one of its modes; out and\n"
    "weight may be the same array; otherwise types and errors are as in tucker_linear_forward.\n"
    "Source: SURM, arXiv 2406.17740.");

static PyObject *kronecker_reconstruct(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"out", OUT}, {"weight", IN | OPTIONAL}, {"a", IN}, {"b", IN}};
    const flora_view *v[4];
    call c;
    double scale;
    PyObject *result = NULL;
    if (call_begin(&c, module, "kronecker_reconstruct", nargs, 5) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[4], &scale) == 0 && call_borrow_all(&c, args, specs, 4, v) == 0) {
        CALL_RUN(c, result, flora_kronecker_reconstruct, v[0], v[1], v[2], v[3], scale);
    }
    call_end(&c);
    return result;
}

PyDoc_STRVAR(
    kronecker_reconstruct_backward_doc,
    "kronecker_reconstruct_backward($module, d_a, d_b, d_weight, a, b, scale, /)\n--\n\n"
    "The adjoint of kronecker_reconstruct. With d_weight (m p, n q) as (m, p, n, q):\n"
    "\n"
    "    d_a (p, q) = scale * sum of b * d_weight over m and n    d_b (m, n) = scale * sum of a * d_weight over p, q\n"
    "\n"
    "None leaves an output out. Types and errors as in tucker_linear_forward. Source: SURM, arXiv 2406.17740.");

static PyObject *kronecker_reconstruct_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {
        {"d_a", OUT | OPTIONAL}, {"d_b", OUT | OPTIONAL}, {"d_weight", IN}, {"a", IN}, {"b", IN}};
    const flora_view *v[5];
    call c;
    double scale;
    PyObject *result = NULL;
    if (call_begin(&c, module, "kronecker_reconstruct_backward", nargs, 6) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[5], &scale) == 0 && call_borrow_all(&c, args, specs, 5, v) == 0) {
        CALL_RUN(c, result, flora_kronecker_reconstruct_backward, v[0], v[1], v[2], v[3], v[4], scale);
    }
    call_end(&c);
    return result;
}

PyMethodDef flora_kronecker_methods[] = {FAST(kronecker_forward),
                                         FAST(kronecker_backward),
                                         FAST(kronecker_reconstruct),
                                         FAST(kronecker_reconstruct_backward),
                                         {NULL, NULL, 0, NULL}};
