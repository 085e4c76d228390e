/* The Python entries of the Tucker kernels: csrc/tucker.h and flora.h have what they do. */
#include "call.h"

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
    if (call_begin(&c, module, "tucker_linear_forward", nargs, 7) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[6], &scale) == 0 && call_borrow_all(&c, args, specs, 6, v) == 0) {
        CALL_RUN(c, result, flora_tucker_linear_forward, v[0], v[1], v[2], v[3], v[4], v[5], scale);
    }
    call_end(&c);
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
    if (call_begin(&c, module, "tucker_linear_backward", nargs, 11) < 0) {
        return NULL;
    }
    if (parse_scale(&c, args[10], &scale) == 0 && call_borrow_all(&c, args, specs, 10, v) == 0) {
        CALL_RUN(c, result, flora_tucker_linear_backward, v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9],
                 scale);
    }
    call_end(&c);
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
    "kernel mode; of all but the first, None is the identity. All but the rows of u_out are shared by the groups.\n"
    "h (batch, *padded, groups * r_in), if not None, receives the projected and padded input; where u_in is None,\n"
    "h (batch, *out, groups * r_out) receives what u_out is applied to. stride and dilation are n ints, padding 2n:\n"
    "before and after each spatial mode; padding_mode is zeros, reflect, replicate or circular.\n"
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
    if (call_borrow_items(c, items, name, flags, views) < 0) {
        return -1;
    }
    if (flags == IN && views[0] == NULL) {
        PyErr_Format(PyExc_TypeError, "%s: %s[0] must be an array, not None", c->function, name);
        return -1;
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
    if (call_begin(&c, module, "tucker_conv_forward", nargs, 11) < 0) {
        return NULL;
    }
    PyObject *items = call_sequence(&c, args[4], "factors", FLORA_MAX_ORDER);
    if (items != NULL && parse_scale(&c, args[5], &scale) == 0 && parse_geometry(&c, args + 6, &geometry) == 0 &&
        call_borrow_all(&c, args, specs, 4, v) == 0 &&
        borrow_factors(&c, items, "factors", IN, 2 + geometry.ndim, factors) == 0) {
        CALL_RUN(c, result, flora_tucker_conv_forward, v[0], v[1], v[2], v[3], factors, scale, &geometry);
    }
    Py_XDECREF(items);
    call_end(&c);
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
    "needs it; where factors[1] is None, if no gradient but d_factors[0] and dx is asked for. Types and errors as in "
    "tucker_conv_forward. Source: FLoRA, arXiv 2405.14739.");

static PyObject *tucker_conv_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    static const array_spec outputs[] = {{"dx", OUT | OPTIONAL}, {"d_core", OUT | OPTIONAL}};
    static const array_spec inputs[] = {{"dy", IN}, {"x", IN | OPTIONAL}, {"h", IN | OPTIONAL}, {"core", IN}};
    const flora_view *d[2], *v[4], *d_factors[FLORA_MAX_ORDER], *factors[FLORA_MAX_ORDER];
    call c;
    double scale;
    flora_geometry geometry;
    PyObject *result = NULL;
    if (call_begin(&c, module, "tucker_conv_backward", nargs, 14) < 0) {
        return NULL;
    }
    PyObject *d_items = call_sequence(&c, args[2], "d_factors", FLORA_MAX_ORDER);
    PyObject *items = d_items == NULL ? NULL : call_sequence(&c, args[7], "factors", FLORA_MAX_ORDER);
    if (items != NULL && parse_scale(&c, args[8], &scale) == 0 && parse_geometry(&c, args + 9, &geometry) == 0 &&
        call_borrow_all(&c, args, outputs, 2, d) == 0 &&
        borrow_factors(&c, d_items, "d_factors", OUT, 2 + geometry.ndim, d_factors) == 0 &&
        call_borrow_all(&c, args + 3, inputs, 4, v) == 0 &&
        borrow_factors(&c, items, "factors", IN, 2 + geometry.ndim, factors) == 0) {
        CALL_RUN(c, result, flora_tucker_conv_backward, d[0], d[1], d_factors, v[0], v[1], v[2], v[3], factors, scale,
                 &geometry);
    }
    Py_XDECREF(items);
    Py_XDECREF(d_items);
    call_end(&c);
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
    if (call_begin(&c, module, "conv_weight_gradient", nargs, 8) < 0) {
        return NULL;
    }
    if (parse_geometry(&c, args + 3, &geometry) == 0 && call_borrow_all(&c, args, specs, 3, v) == 0) {
        CALL_RUN(c, result, flora_conv_weight_gradient, v[0], v[1], v[2], &geometry);
    }
    call_end(&c);
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
    if (call_begin(&c, module, "tucker_reconstruct", nargs, 5) < 0) {
        return NULL;
    }
    PyObject *items = call_sequence(&c, args[3], "factors", FLORA_MAX_ORDER);
    if (items != NULL && parse_scale(&c, args[4], &scale) == 0 && call_borrow_all(&c, args, specs, 3, v) == 0 &&
        (order = call_borrow_items(&c, items, "factors", IN, factors)) >= 0) {
        CALL_RUN(c, result, flora_tucker_reconstruct, v[0], v[1], v[2], factors, order, scale);
    }
    Py_XDECREF(items);
    call_end(&c);
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
    if (call_begin(&c, module, "tucker_reconstruct_backward", nargs, 6) < 0) {
        return NULL;
    }
    PyObject *d_items = call_sequence(&c, args[1], "d_factors", FLORA_MAX_ORDER);
    PyObject *items = d_items == NULL ? NULL : call_sequence(&c, args[4], "factors", FLORA_MAX_ORDER);
    if (items != NULL && parse_scale(&c, args[5], &scale) == 0 &&
        call_borrow_one(&c, args[0], "d_core", -1, OUT | OPTIONAL, &d_core) == 0 &&
        (outputs = call_borrow_items(&c, d_items, "d_factors", OUT, d_factors)) >= 0 &&
        call_borrow_all(&c, args + 2, specs, 2, v) == 0 &&
        (order = call_borrow_items(&c, items, "factors", IN, factors)) >= 0) {
        if (outputs != order) {
            PyErr_Format(PyExc_ValueError, "%s: d_factors has %d entries, factors %d", c.function, outputs, order);
        } else {
            CALL_RUN(c, result, flora_tucker_reconstruct_backward, d_core, d_factors, v[0], v[1], factors, order,
                     scale);
        }
    }
    Py_XDECREF(items);
    Py_XDECREF(d_items);
    call_end(&c);
    return result;
}

PyDoc_STRVAR(
    takes_doc,
    "takes($module, x, weight, bias, parameters, /)\n--\n\n"
    "Whether the kernels can work on these: plain torch tensors in CPU memory, of dtypes that go together.\n"
    "\n"
    "x is float32, float64, bfloat16 or float16, weight is of the same dtype; parameters (a tuple) are float64\n"
    "if x is, else float32. weight, bias and entries of parameters may be None. Shapes are not looked at.");

static PyObject *takes(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    call c;
    flora_dtype act, dtype;
    if (call_begin(&c, module, "takes", nargs, 4) < 0) {
        return NULL;
    }
    if (!PyTuple_Check(args[3])) {
        PyErr_Format(PyExc_TypeError, "takes: parameters is %R, not a tuple", args[3]);
        return NULL;
    }
    int fits = flora_takes(c.boundary, args[0], &act) &&
               (args[1] == Py_None || (flora_takes(c.boundary, args[1], &dtype) && dtype == act)) &&
               (args[2] == Py_None || flora_takes(c.boundary, args[2], &dtype));
    const flora_dtype real = fits && act == FLORA_F64 ? FLORA_F64 : FLORA_F32;
    for (Py_ssize_t i = 0; fits && i < PyTuple_Size(args[3]); i++) {
        PyObject *parameter = PyTuple_GetItem(args[3], i);
        fits = parameter == Py_None || (flora_takes(c.boundary, parameter, &dtype) && dtype == real);
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
    if (call_begin(&c, module, "drop", nargs, 3) < 0) {
        return NULL;
    }
    if (parse_double(&c, args[1], "probability", &probability) == 0 && parse_int(&c, args[2], "seed", &seed) == 0 &&
        call_borrow_one(&c, args[0], "out", -1, OUT, &out) == 0) {
        CALL_RUN(c, result, flora_drop, out, probability, (uint64_t)seed);
    }
    call_end(&c);
    return result;
}

PyMethodDef flora_tucker_methods[] = {FAST(tucker_linear_forward),
                                      FAST(tucker_linear_backward),
                                      FAST(tucker_conv_forward),
                                      FAST(tucker_conv_backward),
                                      FAST(conv_weight_gradient),
                                      FAST(tucker_reconstruct),
                                      FAST(tucker_reconstruct_backward),
                                      FAST(drop),
                                      FAST(takes),
                                      {NULL, NULL, 0, NULL}};
