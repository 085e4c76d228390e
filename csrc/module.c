/* flora._core: the Python module of the kernels. The functions of each family are in module_<family>.c.
 *
 * A function borrows its arrays, runs one kernel of flora.h without the GIL, gives the arrays back and turns the status
 * into an exception. Arguments are those of the twin of the same name in flora/reference/, all positional.
 */
#include "call.h"
#include "isa.h"
#include "parallel.h"

#include <stdlib.h>

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
    "torch tensors are borrowed through the DLPack C exchange API; False until torch is imported), outruns_mkl\n"
    "(bool, whether multiply is known to be faster than Intel's MKL on this CPU).");

static PyObject *info(PyObject *module, PyObject *unused) {
    (void)unused;
    int exchange = flora_boundary_uses_exchange_api(&((module_state *)PyModule_GetState(module))->boundary);
    PyObject *names = exchange < 0 ? NULL : isa_names();
    if (names == NULL) {
        return NULL;
    }
    return Py_BuildValue("{s:s,s:N,s:i,s:s,s:O,s:O}", "isa", flora_isa_name(), "isa_available", names, "threads",
                         flora_num_threads(), "pool", flora_pool_name(), "exchange_api", exchange ? Py_True : Py_False,
                         "outruns_mkl", flora_isa_outruns_mkl() ? Py_True : Py_False);
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

static PyMethodDef methods[] = {
    {"info", info, METH_NOARGS, info_doc}, {"set_isa", set_isa, METH_O, set_isa_doc}, {NULL, NULL, 0, NULL}};

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
    PyMethodDef *const families[] = {flora_tucker_methods, flora_toeplitz_methods, flora_kronecker_methods,
                                     flora_rescale_methods, flora_product_methods};
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        if (PyModule_AddFunctions(module, families[i]) < 0)
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

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)module_exec},
#ifdef Py_GIL_DISABLED
                                   {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
                                   {0, NULL}};

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
