/* The large product of flora._core. See call.h. */
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

PyMethodDef flora_product_methods[] = {FAST(multiply), {NULL, NULL, 0, NULL}};
