/* The functions of flora._core for large products of gradients. See call.h. */
#include "call.h"

PyDoc_STRVAR(multiply_doc,
             "multiply($module, out, a, b, /)\n--\n\n"
             "out (m, n) = a (m, k) @ b (k, n), all float32 or all float64; out has unit stride along n,\n"
             "a and b have any strides. Errors are as in tucker_linear_forward.");

static PyObject *multiply(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"out", OUT}, {"a", IN}, {"b", IN}};
    const flora_view *v[3];
    call c;
    PyObject *result = NULL;
    if (call_begin(&c, module, "multiply", nargs, 3) < 0) {
        return NULL;
    }
    if (call_borrow_all(&c, args, specs, 3, v) == 0) {
        CALL_RUN(c, result, flora_multiply, v[0], v[1], v[2]);
    }
    call_end(&c);
    return result;
}

PyDoc_STRVAR(
    conv_input_gradient_doc,
    "conv_input_gradient($module, dx, dy, weight, padding, /)\n--\n\n"
    "dx (batch, d_in, *in) = the input gradient of y (batch, d_out, *out) = conv2d(x, weight (d_out, d_in, 3, 3)) of\n"
    "stride 1 for dy of y's shape, overwritten; padding is (before, after) of each spatial mode, zeros.\n"
    "\n"
    "All float32 or all float64; dx has unit stride along its channels or its last mode, the others any strides.\n"
    "Errors are as in tucker_conv_forward. By minimal filtering: rounding errors are up to twice those of the\n"
    "definition, numbers above a quarter of the largest may overflow, and an infinity may become NaN.\n"
    "Source: Lavin and Gray, arXiv 1509.09308, section 4.1.");

static PyObject *conv_input_gradient(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec specs[] = {{"dx", OUT}, {"dy", IN}, {"weight", IN}};
    const flora_view *v[3];
    call c;
    int64_t padding[4];
    PyObject *result = NULL;
    if (call_begin(&c, module, "conv_input_gradient", nargs, 4) < 0) {
        return NULL;
    }
    int count = parse_ints(&c, args[3], "padding", 4, padding);
    if (count >= 0 && count != 4) {
        PyErr_Format(PyExc_ValueError, "conv_input_gradient: padding has %d entries, 4 are needed", count);
    } else if (count == 4 && call_borrow_all(&c, args, specs, 3, v) == 0) {
        CALL_RUN(c, result, flora_conv_input_gradient, v[0], v[1], v[2], padding);
    }
    call_end(&c);
    return result;
}

PyMethodDef flora_product_methods[] = {FAST(multiply), FAST(conv_input_gradient), {NULL, NULL, 0, NULL}};
