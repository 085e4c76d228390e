/* flora._core: the functions of structured updates made of Toeplitz matrices. */
#include "call.h"

#define TOEPLITZ                                                                                                       \
    "A Toeplitz matrix (rows, columns) is given by its diagonals t (rows + columns - 1), from the upper right "        \
    "corner\n"                                                                                                         \
    "to the lower left one: T[i, j] = t[i - j + columns - 1]. DW (d_out, d_in) = scale * sum_q L_q @ R_q with\n"       \
    "left (terms, d_out + inner - 1) and right (terms, inner + d_in - 1), or, with right None, scale * sum_q L_q\n"    \
    "with left (terms, d_out + d_in - 1). left, right and their gradients are float64 for float64 activations and\n"   \
    "weights, else float32, and all sums are taken in that type.\n"

#define ERRORS "Types, arrays and errors otherwise as in tucker_linear_forward. Source: SURM, arXiv 2406.17740."

PyDoc_STRVAR(
    toeplitz_reconstruct_doc,
    "toeplitz_reconstruct($module, out, weight, left, right, scale, /)\n--\n\n"
    "out (d_out, d_in) = weight (d_out, d_in) + DW; weight None is zero. out may be weight.\n"
    "\n" TOEPLITZ "\n"
    "O(d_out * d_in * terms): out follows from its neighbour on the diagonal. out must have unit stride in one\n"
    "of its dimensions.\n" ERRORS);

static PyObject *toeplitz_reconstruct(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"out", OUT}, {"weight", IN | OPTIONAL}, {"left", IN}, {"right", IN | OPTIONAL}};
    const flora_view *v[4];
    call c;
    double scale;
    PyObject *result = NULL;
    if (call_begin(&c, module, "toeplitz_reconstruct", nargs, 5) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[4], &scale) == 0 && call_borrow_all(&c, args, specs, 4, v) == 0) {
        CALL_RUN(c, result, flora_toeplitz_reconstruct, v[0], v[1], v[2], v[3], scale);
    }
    call_end(&c);
    return result;
}

PyDoc_STRVAR(toeplitz_reconstruct_backward_doc,
             "toeplitz_reconstruct_backward($module, d_left, d_right, d_weight, left, right, scale, /)\n--\n\n"
             "The adjoint of toeplitz_reconstruct: the gradients of left and right from that of the weight,\n"
             "d_weight (d_out, d_in). Outputs are overwritten; None leaves one out.\n"
             "\n" TOEPLITZ ERRORS);

static PyObject *toeplitz_reconstruct_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"d_left", OUT | OPTIONAL},
                                       {"d_right", OUT | OPTIONAL},
                                       {"d_weight", IN},
                                       {"left", IN},
                                       {"right", IN | OPTIONAL}};
    const flora_view *v[5];
    call c;
    double scale;
    PyObject *result = NULL;
    if (call_begin(&c, module, "toeplitz_reconstruct_backward", nargs, 6) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[5], &scale) == 0 && call_borrow_all(&c, args, specs, 5, v) == 0) {
        CALL_RUN(c, result, flora_toeplitz_reconstruct_backward, v[0], v[1], v[2], v[3], v[4], scale);
    }
    call_end(&c);
    return result;
}

PyDoc_STRVAR(
    toeplitz_forward_doc,
    "toeplitz_forward($module, y, x, left, right, scale, /)\n--\n\n"
    "y (rows, d_out) += x (rows, d_in) @ DW.T, in place, by Fourier transforms of as many rows as a vector\n"
    "holds; y must have unit stride along d_out. Errors are relative to the largest element of a row. The rows\n"
    "of y and x may be counted by any number of leading dimensions that a view could flatten.\n"
    "\n" TOEPLITZ ERRORS);

static PyObject *toeplitz_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"y", OUT | ROWS}, {"x", IN | ROWS}, {"left", IN}, {"right", IN | OPTIONAL}};
    const flora_view *v[4];
    call c;
    double scale;
    PyObject *result = NULL;
    if (call_begin(&c, module, "toeplitz_forward", nargs, 5) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[4], &scale) == 0 && call_borrow_all(&c, args, specs, 4, v) == 0) {
        CALL_RUN(c, result, flora_toeplitz_forward, v[0], v[1], v[2], v[3], scale);
    }
    call_end(&c);
    return result;
}

PyDoc_STRVAR(
    toeplitz_backward_doc,
    "toeplitz_backward($module, dx, d_left, d_right, dy, x, left, right, scale, /)\n--\n\n"
    "The gradients of toeplitz_forward: dx (rows, d_in) += dy (rows, d_out) @ DW in place, d_left and d_right\n"
    "overwritten; None leaves an output out. x (rows, d_in) may be None if neither d_left nor d_right is\n"
    "wanted. The sums over rows are taken of spectra, and transformed back once.\n"
    "\n" TOEPLITZ ERRORS);

static PyObject *toeplitz_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"dx", OUT | OPTIONAL | ROWS}, {"d_left", OUT | OPTIONAL},
                                       {"d_right", OUT | OPTIONAL},   {"dy", IN | ROWS},
                                       {"x", IN | OPTIONAL | ROWS},   {"left", IN},
                                       {"right", IN | OPTIONAL}};
    const flora_view *v[7];
    call c;
    double scale;
    PyObject *result = NULL;
    if (call_begin(&c, module, "toeplitz_backward", nargs, 8) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[7], &scale) == 0 && call_borrow_all(&c, args, specs, 7, v) == 0) {
        CALL_RUN(c, result, flora_toeplitz_backward, v[0], v[1], v[2], v[3], v[4], v[5], v[6], scale);
    }
    call_end(&c);
    return result;
}

PyMethodDef flora_toeplitz_methods[] = {FAST(toeplitz_reconstruct),
                                        FAST(toeplitz_reconstruct_backward),
                                        FAST(toeplitz_forward),
                                        FAST(toeplitz_backward),
                                        {NULL, NULL, 0, NULL}};
