/* Borrowing memory from Python arrays: the only user of DLPack's ABI and of NumPy's C API.
 *
 * In this order: torch tensors through the DLPack C exchange API (no capsule, no allocation), NumPy arrays through
 * NumPy's C API, other arrays through an exchange API of theirs, a versioned capsule, a plain capsule.
 *
 * None of these ways checks much, so everything that a kernel must be able to trust is checked here: plain tensors and
 * arrays only (a subclass may mean anything: FakeTensor, DTensor, a masked array), memory of this process that is
 * still there, float32, float64, bfloat16 or float16, whole elements at aligned addresses, at most FLORA_MAX_NDIM
 * dimensions, byte extents that fit. Outputs moreover must be writable, must not be a producer's copy, and must not
 * require grad while grad mode is on (autograd would not see the write). What shares memory with what is the
 * kernels' to check.
 * Lazily negated torch tensors are resolved by a copy as inputs and refused as outputs.
 *
 * What can run Python code (a producer's methods, a TorchFunctionMode) is done in `flora_ask`; no address is read, but
 * from a producer that owes us the memory behind it, before `flora_look`.
 */
#include "view.h"

#include <stdio.h>
#include <string.h>

#define NPY_NO_DEPRECATED_API NPY_1_23_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

#include "dlpack_abi.h"

/* Messages ------------------------------------------------------------------------------------------------------- */

static void label(const flora_borrower *who, char text[64]) {
    if (who->index < 0) {
        snprintf(text, 64, "%s", who->name);
    } else {
        snprintf(text, 64, "%s[%d]", who->name, who->index);
    }
}

/* Sets "function: name message" and returns -1. */
static int refuse(PyObject *exception, const flora_borrower *who, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    PyObject *message = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    if (message != NULL) {
        char text[64];
        label(who, text);
        PyErr_Format(exception, "%s: %s %U", who->function, text, message);
        Py_DECREF(message);
    }
    return -1;
}

/* As `refuse`, where `format` has one %U for the name of the object's type. */
static int refuse_type(const flora_borrower *who, PyObject *object, const char *format) {
    PyObject *name = PyType_GetQualName(Py_TYPE(object));
    if (name != NULL) {
        refuse(PyExc_TypeError, who, format, name);
        Py_DECREF(name);
    }
    return -1;
}

/* A producer has raised: ArrayError that names the argument and quotes the first line (torch adds a C++ trace), with
 * the producer's error as its cause. `kind` (a str or NULL) says more about the array. Errors that are not about it
 * (KeyboardInterrupt, MemoryError) pass. */
static int refuse_raised(const flora_borrower *who, PyObject *kind) {
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) {
        return -1;
    }
    PyObject *type, *cause, *error, *traceback;
    PyErr_Fetch(&type, &cause, &traceback);
    PyErr_NormalizeException(&type, &cause, &traceback);
    if (traceback != NULL) {
        PyException_SetTraceback(cause, traceback);
    }
    Py_DECREF(type);
    Py_XDECREF(traceback);

    PyObject *text = PyObject_Str(cause), *line = NULL;
    if (text != NULL) {
        Py_ssize_t end = PyUnicode_FindChar(text, '\n', 0, PyUnicode_GetLength(text), 1);
        line = PyUnicode_Substring(text, 0, end < 0 ? PyUnicode_GetLength(text) : end);
    }
    if (line != NULL) {
        refuse(who->array_error, who, "cannot be borrowed%V: %U", kind, "", line);
    }
    Py_XDECREF(line);
    Py_XDECREF(text);

    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    PyException_SetCause(error, cause); /* steals it */
    PyErr_Restore(type, error, traceback);
    return -1;
}

static const char *device_name(int32_t code) {
    switch (code) {
    case 2:
        return "cuda";
    case 3:
        return "cuda_host";
    case 7:
        return "vulkan";
    case 8:
        return "metal";
    case 10:
        return "rocm";
    case 14:
        return "oneapi";
    default:
        return "DLPack device type";
    }
}

static int refuse_dtype(const flora_borrower *who, DLDataType dtype) {
    static const char wanted[] = "not float32, float64, bfloat16 or float16";
    static const char *const families[] = {[kDLInt] = "int",       [kDLUInt] = "uint",       [kDLFloat] = "float",
                                           [kDLBfloat] = "bfloat", [kDLComplex] = "complex", [kDLBool] = "bool"};
    const char *family = dtype.code < sizeof families / sizeof *families ? families[dtype.code] : NULL;
    if (dtype.lanes != 1) {
        return refuse(PyExc_TypeError, who, "has elements of %d lanes, %s", (int)dtype.lanes, wanted);
    }
    if (family == NULL) { /* the many types of 8 bits and below */
        return refuse(PyExc_TypeError, who, "has %d-bit elements of DLPack's type %d, %s", (int)dtype.bits,
                      (int)dtype.code, wanted);
    }
    return refuse(PyExc_TypeError, who, "has dtype %s%d, %s", family, (int)dtype.bits, wanted);
}

/* The view ----------------------------------------------------------------------------------------- */

static const int64_t item_sizes[] = {[FLORA_F32] = 4, [FLORA_F64] = 8, [FLORA_BF16] = 2, [FLORA_F16] = 2};

/* The stride of an extent of 1 may be anything, but is added up with the others: beyond this number of elements it is
 * replaced, so that no sum of them overflows. */
#define FAR_AWAY (PTRDIFF_MAX / 8 / FLORA_MAX_NDIM)

/* Fills loan->view and the extents. strides (elements) NULL: contiguous. */
static int fill_view(flora_loan *loan, void *data, uint64_t byte_offset, flora_dtype dtype, int ndim,
                     const int64_t *shape, const int64_t *strides) {
    const flora_borrower *who = &loan->who;
    flora_view *view = &loan->view;
    const int64_t size = item_sizes[dtype];
    int64_t count = 1, low = 0, high = 0; /* elements; offsets of the first and the last one */

    if (ndim < 0 || ndim > FLORA_MAX_NDIM) {
        return refuse(PyExc_ValueError, who, "has %d dimensions, at most %d are taken", ndim, FLORA_MAX_NDIM);
    }
    if (ndim > 0 && shape == NULL) {
        return refuse(who->array_error, who, "has %d dimensions but no shape", ndim);
    }
    view->dtype = dtype;
    view->ndim = ndim;
    int empty = 0;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0) {
            return refuse(PyExc_ValueError, who, "has the negative extent %lld in dimension %d", (long long)shape[i],
                          i);
        }
        empty |= shape[i] == 0;
        view->shape[i] = shape[i];
    }
    for (int i = ndim - 1; i >= 0; i--) {
        int64_t stride = strides != NULL ? strides[i] : count, span;
        if (empty) {
            view->strides[i] = count;
            if (shape[i] > 0 && __builtin_mul_overflow(count, shape[i], &count)) {
                return refuse(PyExc_ValueError, who, "has extents whose size in bytes overflows");
            }
            continue;
        }
        if (shape[i] == 1 && (stride > FAR_AWAY || stride < -FAR_AWAY)) {
            stride = count;
        }
        view->strides[i] = stride;
        if (__builtin_mul_overflow(count, shape[i], &count) || __builtin_mul_overflow(shape[i] - 1, stride, &span) ||
            __builtin_add_overflow(stride < 0 ? low : high, span, stride < 0 ? &low : &high)) {
            return refuse(PyExc_ValueError, who, "has extents whose size in bytes overflows");
        }
    }
    view->data = data;
    if (count > PTRDIFF_MAX / size) { /* also of an empty array, whose other extents are multiplied as well */
        return refuse(PyExc_ValueError, who, "has extents whose size in bytes overflows");
    }
    if (empty) {
        return 0;
    }

    /* No address within PTRDIFF_MAX of the ends of the address space is a real array's. */
    int64_t bytes;
    if (__builtin_sub_overflow(high, low, &bytes) || __builtin_add_overflow(bytes, INT64_C(1), &bytes) ||
        bytes > PTRDIFF_MAX / size || byte_offset > (uint64_t)PTRDIFF_MAX) {
        return refuse(PyExc_ValueError, who, "has extents whose size in bytes overflows");
    }
    if (data == NULL) {
        return refuse(PyExc_ValueError, who,
                      "has %lld elements but no memory: its storage was freed, or it stands for another tensor",
                      (long long)count);
    }
    uintptr_t address = (uintptr_t)data + (uintptr_t)byte_offset;
    uintptr_t first = address - (uintptr_t)-low * (uintptr_t)size, last = address + (uintptr_t)high * (uintptr_t)size;
    if (address < (uintptr_t)data || first > address || last < address) {
        return refuse(PyExc_ValueError, who, "has extents whose size in bytes overflows");
    }
    if (address % (uintptr_t)size != 0) {
        return refuse(PyExc_ValueError, who, "is misaligned: its address is no multiple of %d bytes", (int)size);
    }
    view->data = (void *)address;
    return 0;
}

/* 0 if the kernels have this type, else -1 without an error. */
static int dtype_of(DLDataType dtype, flora_dtype *ours) {
    if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 32) {
        *ours = FLORA_F32;
    } else if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 64) {
        *ours = FLORA_F64;
    } else if (dtype.lanes == 1 && dtype.code == kDLBfloat && dtype.bits == 16) {
        *ours = FLORA_BF16;
    } else if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 16) {
        *ours = FLORA_F16;
    } else {
        return -1;
    }
    return 0;
}

static int fill_from_dlpack(flora_loan *loan, const DLTensor *tensor) {
    flora_dtype dtype;
    if (tensor->device.device_type != kDLCPU) {
        return refuse(
            loan->who.array_error, &loan->who, "is on device %s:%d (DLPack's device type %d), not in CPU memory",
            device_name(tensor->device.device_type), (int)tensor->device.device_id, (int)tensor->device.device_type);
    }
    if (dtype_of(tensor->dtype, &dtype) < 0) {
        return refuse_dtype(&loan->who, tensor->dtype);
    }
    return fill_view(loan, tensor->data, tensor->byte_offset, dtype, tensor->ndim, tensor->shape, tensor->strides);
}

/* NumPy ------------------------------------------------------------------------------------------------------------ */

static int look_numpy(flora_loan *loan, PyArrayObject *array) {
    const flora_borrower *who = &loan->who;
    flora_dtype dtype;
    switch (PyArray_TYPE(array)) {
    case NPY_FLOAT:
        dtype = FLORA_F32;
        break;
    case NPY_DOUBLE:
        dtype = FLORA_F64;
        break;
    case NPY_HALF:
        dtype = FLORA_F16;
        break;
    default:
        return refuse(PyExc_TypeError, who, "has dtype %S, not float32, float64 or float16", PyArray_DESCR(array));
    }
    if (PyArray_ISBYTESWAPPED(array)) {
        return refuse(PyExc_TypeError, who, "has the byte-swapped dtype %S", PyArray_DESCR(array));
    }
    if (who->output && !PyArray_ISWRITEABLE(array)) {
        return refuse(PyExc_ValueError, who, "is a read-only array and cannot be written");
    }
    int ndim = PyArray_NDIM(array);
    int64_t shape[FLORA_MAX_NDIM], strides[FLORA_MAX_NDIM];
    for (int i = 0; i < ndim && i < FLORA_MAX_NDIM; i++) {
        shape[i] = PyArray_DIM(array, i);
        strides[i] = PyArray_STRIDE(array, i) / item_sizes[dtype];
        if (PyArray_STRIDE(array, i) % item_sizes[dtype] != 0 && shape[i] > 1) {
            return refuse(PyExc_ValueError, who, "has a stride of %lld bytes, no multiple of its %d-byte elements",
                          (long long)PyArray_STRIDE(array, i), (int)item_sizes[dtype]);
        }
    }
    return fill_view(loan, PyArray_DATA(array), 0, dtype, ndim, shape, strides);
}

/* DLPack ----------------------------------------------------------------------------------------------------------- */

static void delete_managed(flora_loan *loan) {
    void *managed = loan->managed;
    if (managed == NULL) {
        return;
    }
    loan->managed = NULL;
    PyObject *type, *value, *traceback; /* the deleter may run Python code */
    PyErr_Fetch(&type, &value, &traceback);
    if (loan->versioned) {
        DLManagedTensorVersioned *tensor = managed;
        if (tensor->deleter != NULL) {
            tensor->deleter(tensor);
        }
    } else {
        DLManagedTensor *tensor = managed;
        if (tensor->deleter != NULL) {
            tensor->deleter(tensor);
        }
    }
    PyErr_Restore(type, value, traceback);
}

static int fill_from_managed(flora_loan *loan) {
    if (!loan->versioned) {
        return fill_from_dlpack(loan, &((DLManagedTensor *)loan->managed)->dl_tensor);
    }
    const DLManagedTensorVersioned *tensor = loan->managed;
    if (tensor->version.major != DLPACK_MAJOR) {
        return refuse(loan->who.array_error, &loan->who, "comes in DLPack version %u.%u, only %d.x is known",
                      (unsigned)tensor->version.major, (unsigned)tensor->version.minor, DLPACK_MAJOR);
    }
    if (loan->who.output && (tensor->flags & DLPACK_FLAG_READ_ONLY) != 0) {
        return refuse(PyExc_ValueError, &loan->who, "is a read-only array and cannot be written");
    }
    if (loan->who.output && (tensor->flags & DLPACK_FLAG_IS_COPIED) != 0) {
        return refuse(PyExc_ValueError, &loan->who, "was exported as a copy, so that a write would be lost");
    }
    return fill_from_dlpack(loan, &tensor->dl_tensor);
}

/* Takes over the tensor in a capsule: from here on its deleter is ours to call. */
static int open_capsule(flora_loan *loan, PyObject *capsule) {
    if (!PyCapsule_CheckExact(capsule)) {
        PyObject *name = PyType_GetQualName(Py_TYPE(capsule));
        if (name != NULL) {
            refuse(loan->who.array_error, &loan->who, "cannot be borrowed: its __dlpack__ returned %U, no capsule",
                   name);
            Py_DECREF(name);
        }
        return -1;
    }
    const char *name = PyCapsule_GetName(capsule), *used;
    if (name != NULL && strcmp(name, DLPACK_VERSIONED) == 0) {
        used = DLPACK_VERSIONED_USED;
    } else if (name != NULL && strcmp(name, DLPACK_PLAIN) == 0) {
        used = DLPACK_PLAIN_USED;
    } else if (name != NULL && (strcmp(name, DLPACK_VERSIONED_USED) == 0 || strcmp(name, DLPACK_PLAIN_USED) == 0)) {
        return refuse(loan->who.array_error, &loan->who, "cannot be borrowed: its DLPack capsule was consumed already");
    } else {
        return refuse(loan->who.array_error, &loan->who,
                      "cannot be borrowed: its __dlpack__ returned a capsule named %s", name != NULL ? name : "NULL");
    }
    void *managed = PyCapsule_GetPointer(capsule, name);
    if (managed == NULL || PyCapsule_SetName(capsule, used) < 0) {
        return -1;
    }
    loan->managed = managed;
    loan->versioned = strcmp(used, DLPACK_VERSIONED_USED) == 0;
    return 0;
}

static int ask_capsule(flora_boundary *boundary, flora_loan *loan, PyObject *object) {
    PyObject *method = PyObject_GetAttr(object, boundary->str_dlpack), *capsule = NULL;
    if (method == NULL) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
            PyErr_Clear();
            return refuse_type(&loan->who, object,
                               "is %U, not a torch tensor, NumPy array or other array with __dlpack__");
        }
        return refuse_raised(&loan->who, NULL);
    }
    PyObject *none = PyTuple_New(0), *keywords = Py_BuildValue("{s:(ii)}", "max_version", DLPACK_MAJOR, 0);
    if (none != NULL && keywords != NULL) {
        capsule = PyObject_Call(method, none, keywords);
        if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) { /* a producer from before version 1.0 */
            PyErr_Clear();
            capsule = PyObject_Call(method, none, NULL);
        }
    }
    Py_XDECREF(keywords);
    Py_XDECREF(none);
    Py_DECREF(method);
    if (capsule == NULL) {
        return refuse_raised(&loan->who, NULL);
    }
    int result = open_capsule(loan, capsule);
    Py_DECREF(capsule);
    return result;
}

/* The exchange table of a type, or NULL without an error if it has none of our version. */
static const DLPackExchangeAPI *exchange_api(flora_boundary *boundary, PyObject *type) {
    PyObject *capsule = PyObject_GetAttr(type, boundary->str_exchange_api);
    const DLPackExchangeAPI *api = NULL;
    if (capsule != NULL && PyCapsule_IsValid(capsule, DLPACK_EXCHANGE_API)) {
        api = PyCapsule_GetPointer(capsule, DLPACK_EXCHANGE_API);
        while (api != NULL && api->header.version.major != DLPACK_MAJOR) {
            api = (const DLPackExchangeAPI *)api->header.prev_api;
        }
    }
    PyErr_Clear(); /* a type that cannot be asked has none */
    Py_XDECREF(capsule);
    return api;
}

static int ask_exchange(flora_loan *loan, const DLPackExchangeAPI *api, PyObject *object) {
    DLManagedTensorVersioned *managed = NULL;
    if (api->managed_tensor_from_py_object_no_sync(object, &managed) != 0 || managed == NULL) {
        if (!PyErr_Occurred()) {
            return refuse(loan->who.array_error, &loan->who, "cannot be borrowed: its exchange API gave no tensor");
        }
        return refuse_raised(&loan->who, NULL);
    }
    loan->managed = managed;
    loan->versioned = 1;
    return 0;
}

/* torch ------------------------------------------------------------------------------------------------------------ */

/* Looks torch's types up once it is imported. Without torch, or while it is still being imported, changes nothing. */
static int find_torch(flora_boundary *boundary) {
    if (boundary->tensor != NULL) {
        return 0;
    }
    PyObject *torch = PyImport_GetModule(boundary->str_torch);
    if (torch == NULL) {
        return PyErr_Occurred() ? -1 : 0;
    }
    PyObject *tensor = PyObject_GetAttrString(torch, "Tensor");
    PyObject *nn = tensor != NULL ? PyObject_GetAttrString(torch, "nn") : NULL;
    PyObject *parameter = nn != NULL ? PyObject_GetAttrString(nn, "Parameter") : NULL;
    PyObject *autograd = parameter != NULL ? PyObject_GetAttrString(torch, "autograd") : NULL;
    PyObject *graph = autograd != NULL ? PyObject_GetAttrString(autograd, "graph") : NULL;
    PyObject *is_neg = graph != NULL ? PyObject_GetAttrString(tensor, "is_neg") : NULL;
    PyObject *increment = is_neg != NULL ? PyObject_GetAttrString(graph, "increment_version") : NULL;
    PyObject *enabled = increment != NULL ? PyObject_GetAttrString(torch, "is_grad_enabled") : NULL;
    Py_DECREF(torch);
    Py_XDECREF(nn);
    Py_XDECREF(autograd);
    Py_XDECREF(graph);
    const int complete = enabled != NULL && PyType_Check(tensor);
    const DLPackExchangeAPI *api = complete ? exchange_api(boundary, tensor) : NULL;
    if (complete && !atomic_flag_test_and_set(&boundary->found)) {
        boundary->torch_api = api;
        boundary->is_neg = is_neg;
        boundary->increment_version = increment;
        boundary->is_grad_enabled = enabled;
        boundary->parameter = parameter;
        boundary->tensor = tensor;
        return 0;
    }
    PyErr_Clear();
    Py_XDECREF(tensor);
    Py_XDECREF(parameter);
    Py_XDECREF(is_neg);
    Py_XDECREF(increment);
    Py_XDECREF(enabled);
    while (complete && boundary->tensor == NULL) {
        /* another thread is writing the lines above, which it can do at the same time only without a GIL */
    }
    return 0;
}

/* PyObject_IsTrue of a new reference, which it releases. */
static int truth(PyObject *value) {
    int result = value != NULL ? PyObject_IsTrue(value) : -1;
    Py_XDECREF(value);
    return result;
}

/* torch has no pointer to give: the tensor is meta, sparse, quantised, nested, opaque or a wrapper. */
static int refuse_torch(const flora_borrower *who, PyObject *tensor) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *device = PyObject_GetAttrString(tensor, "device");
    PyObject *layout = device != NULL ? PyObject_GetAttrString(tensor, "layout") : NULL;
    PyObject *dtype = layout != NULL ? PyObject_GetAttrString(tensor, "dtype") : NULL;
    PyObject *kind = dtype != NULL ? PyUnicode_FromFormat(" (%S, %S, device %S)", dtype, layout, device) : NULL;
    Py_XDECREF(device);
    Py_XDECREF(layout);
    Py_XDECREF(dtype);
    PyErr_Clear();
    PyErr_Restore(type, value, traceback);
    refuse_raised(who, kind);
    Py_XDECREF(kind);
    return -1;
}

static int has_view_api(const flora_boundary *boundary) {
    const DLPackExchangeAPI *api = boundary->torch_api;
    return api != NULL && api->dltensor_from_py_object_no_sync != NULL;
}

static int ask_torch(flora_boundary *boundary, flora_loan *loan) {
    const flora_borrower *who = &loan->who;
    int negated = truth(PyObject_CallFunctionObjArgs(boundary->is_neg, loan->object, NULL));
    if (negated < 0) {
        return refuse_raised(who, NULL);
    }
    if (negated && who->output) {
        return refuse(PyExc_ValueError, who, "is a lazily negated view and cannot be written");
    }
    if (negated) {
        PyObject *resolved = PyObject_CallMethodObjArgs(loan->object, boundary->str_resolve_neg, NULL);
        if (resolved == NULL) {
            return refuse_raised(who, NULL);
        }
        Py_DECREF(loan->object);
        loan->object = resolved;
    }
    if (who->output) {
        int tracked = truth(PyObject_GetAttr(loan->object, boundary->str_requires_grad));
        if (tracked > 0) {
            tracked = truth(PyObject_CallNoArgs(boundary->is_grad_enabled));
        }
        if (tracked < 0) {
            return -1;
        }
        if (tracked) {
            return refuse(PyExc_ValueError, who,
                          "requires grad, and autograd would not see the write: use torch.no_grad() or detach it");
        }
    }
    if (has_view_api(boundary)) {
        return 0;
    }
    /* A torch whose exchange API has another major version; __dlpack__ refuses tensors that require grad. */
    PyObject *detached = PyObject_CallMethod(loan->object, "detach", NULL);
    if (detached == NULL) {
        return refuse_raised(who, NULL);
    }
    int result = ask_capsule(boundary, loan, detached);
    Py_DECREF(detached);
    return result;
}

static int look_torch(flora_boundary *boundary, flora_loan *loan) {
    const DLPackExchangeAPI *api = boundary->torch_api;
    DLTensor tensor;
    if (api->dltensor_from_py_object_no_sync(loan->object, &tensor) != 0) {
        return refuse_torch(&loan->who, loan->object);
    }
    return fill_from_dlpack(loan, &tensor);
}

/* The interface ---------------------------------------------------------------------------------------------------- */

static int ask_other(flora_boundary *boundary, flora_loan *loan, PyObject *object) {
    PyObject *type = (PyObject *)Py_TYPE(object);
    for (int i = 0; i < FLORA_CACHED_TYPES && boundary->cached[i].type != NULL; i++) {
        if (boundary->cached[i].type == type) {
            return ask_exchange(loan, boundary->cached[i].api, object);
        }
    }
    if (find_torch(boundary) < 0) {
        return -1;
    }
    if (boundary->tensor != NULL) {
        if (type == boundary->tensor || type == boundary->parameter) {
            return ask_torch(boundary, loan);
        }
        if (PyType_IsSubtype(Py_TYPE(object), (PyTypeObject *)boundary->tensor)) {
            return refuse_type(&loan->who, object, "is a %U; of torch only plain Tensor and Parameter are taken");
        }
    }
    if (PyArray_Check(object)) {
        return refuse_type(&loan->who, object, "is a %U; of NumPy only plain ndarray is taken (see numpy.asarray)");
    }
    const DLPackExchangeAPI *api = exchange_api(boundary, type);
    if (api == NULL) {
        return ask_capsule(boundary, loan, object);
    }
    for (int i = 0; i < FLORA_CACHED_TYPES; i++) {
        if (!atomic_flag_test_and_set(&boundary->cached[i].taken)) {
            Py_INCREF(type);
            boundary->cached[i].api = api;
            boundary->cached[i].type = type;
            break;
        }
    }
    return ask_exchange(loan, api, object);
}

int flora_ask(flora_boundary *boundary, PyObject *object, flora_borrower who, flora_loan *loan) {
    PyObject *type = (PyObject *)Py_TYPE(object);
    int result = 0;
    Py_INCREF(object);
    loan->object = object;
    loan->who = who;
    loan->managed = NULL;
    if (type == boundary->tensor || type == boundary->parameter) {
        result = ask_torch(boundary, loan);
    } else if (!PyArray_CheckExact(object)) {
        result = ask_other(boundary, loan, object);
    }
    if (result < 0) {
        flora_return_loan(loan);
    }
    return result;
}

/* Makes a view (…, d) one of (rows, d), if its leading modes have a common stride. */
static int take_rows(flora_loan *loan) {
    flora_view *view = &loan->view;
    const int last = view->ndim - 1;
    int64_t rows = 1, stride = 0;
    for (int i = 0; i < last; i++) {
        const int64_t extent = view->shape[i];
        if (rows > 1 && extent > 1 && stride != extent * view->strides[i]) {
            return refuse(PyExc_ValueError, &loan->who, "has leading dimensions that are no rows of one stride");
        }
        stride = extent > 1 ? view->strides[i] : stride;
        rows *= extent;
    }
    if (last >= 0) {
        view->shape[1] = view->shape[last];
        view->strides[1] = view->strides[last];
        view->shape[0] = rows;
        view->strides[0] = stride;
        view->ndim = 2;
    }
    return 0;
}

int flora_look(flora_boundary *boundary, flora_loan *loan) {
    int result;
    if (loan->managed != NULL) {
        result = fill_from_managed(loan);
    } else if (PyArray_CheckExact(loan->object)) {
        result = look_numpy(loan, (PyArrayObject *)loan->object);
    } else {
        result = look_torch(boundary, loan);
    }
    return result == 0 && loan->who.rows ? take_rows(loan) : result;
}

void flora_return_loan(flora_loan *loan) {
    delete_managed(loan);
    Py_CLEAR(loan->object);
}

int flora_takes(flora_boundary *boundary, PyObject *object, flora_dtype *dtype) {
    PyObject *type = (PyObject *)Py_TYPE(object);
    DLTensor tensor;
    if (boundary->tensor == NULL && find_torch(boundary) < 0) {
        PyErr_Clear();
    }
    if (type != boundary->tensor && type != boundary->parameter) {
        return 0;
    }
    if (!has_view_api(boundary)) {
        const flora_borrower who = {"takes", "tensor", -1, 0, 0, boundary->array_error};
        flora_loan loan;
        int taken = flora_ask(boundary, object, who, &loan) == 0;
        if (taken) {
            taken = flora_look(boundary, &loan) == 0;
            *dtype = loan.view.dtype;
            flora_return_loan(&loan);
        }
        PyErr_Clear();
        return taken;
    }
    const DLPackExchangeAPI *api = boundary->torch_api;
    if (api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
        PyErr_Clear();
        return 0;
    }
    return tensor.device.device_type == kDLCPU && dtype_of(tensor.dtype, dtype) == 0;
}

int flora_mark_written(flora_boundary *boundary, const flora_loan *loans, int count) {
    int tensors = 0;
    for (int i = 0; i < count; i++) {
        PyObject *type = (PyObject *)Py_TYPE(loans[i].object);
        tensors += loans[i].who.output && (type == boundary->tensor || type == boundary->parameter);
    }
    if (tensors == 0) {
        return 0;
    }
    PyObject *written = PyTuple_New(tensors);
    if (written == NULL) {
        return -1;
    }
    for (int i = 0, at = 0; i < count; i++) {
        PyObject *object = loans[i].object, *type = (PyObject *)Py_TYPE(object);
        if (loans[i].who.output && (type == boundary->tensor || type == boundary->parameter)) {
            Py_INCREF(object);
            PyTuple_SetItem(written, at++, object);
        }
    }
    PyObject *result = PyObject_CallFunctionObjArgs(boundary->increment_version, written, NULL), *again = NULL;
    if (result == NULL) { /* it is Python code, in which a signal may be answered: before it has marked anything */
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        again = PyObject_CallFunctionObjArgs(boundary->increment_version, written, NULL);
        PyErr_Restore(type, value, traceback);
    }
    Py_DECREF(written);
    Py_XDECREF(again);
    Py_XDECREF(result);
    return result != NULL ? 0 : -1;
}

int flora_boundary_uses_exchange_api(flora_boundary *boundary) {
    if (find_torch(boundary) < 0) {
        return -1;
    }
    return has_view_api(boundary);
}

int flora_boundary_init(flora_boundary *boundary) {
    memset(boundary, 0, sizeof *boundary);
    import_array1(-1);
    PyObject *bases = PyTuple_Pack(2, PyExc_BufferError, PyExc_ValueError);
    if (bases == NULL) {
        return -1;
    }
    boundary->array_error = PyErr_NewExceptionWithDoc(
        "flora._core.ArrayError",
        "An array cannot be borrowed: it is on another device, or its producer does not keep to DLPack.\n"
        "A BufferError, as the array API standard wants it, and a ValueError.",
        bases, NULL);
    Py_DECREF(bases);
    if (boundary->array_error == NULL) {
        return -1;
    }
    const struct {
        PyObject **at;
        const char *text;
    } names[] = {{&boundary->str_requires_grad, "requires_grad"},
                 {&boundary->str_resolve_neg, "resolve_neg"},
                 {&boundary->str_dlpack, "__dlpack__"},
                 {&boundary->str_exchange_api, "__dlpack_c_exchange_api__"},
                 {&boundary->str_torch, "torch"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if ((*names[i].at = PyUnicode_InternFromString(names[i].text)) == NULL) {
            return -1;
        }
    }
    return 0;
}

int flora_boundary_traverse(flora_boundary *boundary, visitproc visit, void *arg) {
    Py_VISIT(boundary->array_error);
    Py_VISIT(boundary->tensor);
    Py_VISIT(boundary->parameter);
    Py_VISIT(boundary->is_neg);
    Py_VISIT(boundary->increment_version);
    Py_VISIT(boundary->is_grad_enabled);
    for (int i = 0; i < FLORA_CACHED_TYPES; i++) {
        Py_VISIT(boundary->cached[i].type);
    }
    return 0;
}

void flora_boundary_clear(flora_boundary *boundary) {
    Py_CLEAR(boundary->array_error);
    Py_CLEAR(boundary->tensor);
    Py_CLEAR(boundary->parameter);
    Py_CLEAR(boundary->is_neg);
    Py_CLEAR(boundary->increment_version);
    Py_CLEAR(boundary->is_grad_enabled);
    Py_CLEAR(boundary->str_requires_grad);
    Py_CLEAR(boundary->str_resolve_neg);
    Py_CLEAR(boundary->str_dlpack);
    Py_CLEAR(boundary->str_exchange_api);
    Py_CLEAR(boundary->str_torch);
    atomic_flag_clear(&boundary->found);
    for (int i = 0; i < FLORA_CACHED_TYPES; i++) {
        Py_CLEAR(boundary->cached[i].type);
        atomic_flag_clear(&boundary->cached[i].taken);
    }
}
