/* The rescaling functions of flora._core. See call.h. */
#include "call.h"

PyDoc_STRVAR(
    rescale_reconstruct_doc,
    "rescale_reconstruct($module, out, weight, row, column, scale, /)\n--\n\n"
    "out = weight (d_out, width, *k) * (1 + scale * row (d_out) * column (width)), in one pass.\n"
    "\n"
    "row runs along the first mode of the weight, column along the second; None is ones. The weight has 2 to 5 modes\n"
    "and any strides, and so has out; out and weight may be the same array. Otherwise types and errors are as in\n"
    "tucker_linear_forward. Source: RLRR, arXiv 2403.19067.");

static PyObject *rescale_reconstruct(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"out", OUT}, {"weight", IN}, {"row", IN | OPTIONAL}, {"column", IN | OPTIONAL}};
    const flora_view *v[4];
    call c;
    double scale;
    PyObject *result = NULL;
    if (call_begin(&c, module, "rescale_reconstruct", nargs, 5) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[4], &scale) == 0 && call_borrow_all(&c, args, specs, 4, v) == 0) {
        CALL_RUN(c, result, flora_rescale_reconstruct, v[0], v[1], v[2], v[3], scale);
    }
    call_end(&c);
    return result;
}

PyDoc_STRVAR(
    rescale_backward_doc,
    "rescale_backward($module, d_row, d_column, d_weight, weight, row, column, scale, /)\n--\n\n"
    "The adjoint of rescale_reconstruct, from the gradient d_weight (d_out, width, *k) of its out, in one pass:\n"
    "\n"
    "    d_row (d_out) = scale * sum of d_weight * weight * column over all modes but the first\n"
    "    d_column (width) = scale * sum of d_weight * weight * row over all modes but the second\n"
    "\n"
    "None leaves an output out. d_weight is of weight's type, or float32 where that is bfloat16 or float16.\n"
    "Otherwise types and errors are as in rescale_reconstruct. Source: RLRR, arXiv 2403.19067.");

static PyObject *rescale_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"d_row", OUT | OPTIONAL}, {"d_column", OUT | OPTIONAL},
                                       {"d_weight", IN},          {"weight", IN},
                                       {"row", IN | OPTIONAL},    {"column", IN | OPTIONAL}};
    const flora_view *v[6];
    call c;
    double scale;
    PyObject *result = NULL;
    if (call_begin(&c, module, "rescale_backward", nargs, 7) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[6], &scale) == 0 && call_borrow_all(&c, args, specs, 6, v) == 0) {
        CALL_RUN(c, result, flora_rescale_backward, v[0], v[1], v[2], v[3], v[4], v[5], scale);
    }
    call_end(&c);
    return result;
}

PyDoc_STRVAR(rescale_linear_backward_doc,
             "rescale_linear_backward($module, d_row, d_column, dy, x, weight, row, column, scale, /)\n--\n\n"
             "As rescale_backward, with d_weight = dy (rows, d_out).T @ x (rows, d_in), which is never formed.\n"
             "\n"
             "Rows, types and errors as in tucker_linear_forward. Source: RLRR, arXiv 2403.19067.");

static PyObject *rescale_linear_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {
        {"d_row", OUT | OPTIONAL}, {"d_column", OUT | OPTIONAL}, {"dy", IN | ROWS}, {"x", IN | ROWS}, {"weight", IN},
        {"row", IN | OPTIONAL},    {"column", IN | OPTIONAL}};
    const flora_view *v[7];
    call c;
    double scale;
    PyObject *result = NULL;
    if (call_begin(&c, module, "rescale_linear_backward", nargs, 8) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[7], &scale) == 0 && call_borrow_all(&c, args, specs, 7, v) == 0) {
        CALL_RUN(c, result, flora_rescale_linear_backward, v[0], v[1], v[2], v[3], v[4], v[5], v[6], scale);
    }
    call_end(&c);
    return result;
}

PyMethodDef flora_rescale_methods[] = {
    FAST(rescale_reconstruct), FAST(rescale_backward), FAST(rescale_linear_backward), {NULL, NULL, 0, NULL}};
