/* The parts of DLPack's ABI that flora reads, declared from the specification (version 1.3).
 *
 * https://dmlc.github.io/dlpack/latest/c_api.html and .../python_spec.html. Structs and enumerators bear the
 * specification's names where it fixes them; only their layout matters. Included by view.c alone.
 */
#ifndef FLORA_DLPACK_ABI_H
#define FLORA_DLPACK_ABI_H

#include <stdint.h>

#define DLPACK_MAJOR 1

/* PyCapsule names: a producer hands out the first, a consumer renames it to the second. */
#define DLPACK_VERSIONED "dltensor_versioned"
#define DLPACK_VERSIONED_USED "used_dltensor_versioned"
#define DLPACK_PLAIN "dltensor"
#define DLPACK_PLAIN_USED "used_dltensor"
#define DLPACK_EXCHANGE_API "dlpack_exchange_api" /* of type(obj).__dlpack_c_exchange_api__ */

enum { kDLCPU = 1 }; /* DLDeviceType */

enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLComplex = 5, kDLBool = 6 }; /* DLDataTypeCode */

#define DLPACK_FLAG_READ_ONLY (UINT64_C(1) << 0)
#define DLPACK_FLAG_IS_COPIED (UINT64_C(1) << 1)

typedef struct {
    uint32_t major, minor;
} DLPackVersion;

typedef struct {
    int32_t device_type, device_id;
} DLDevice;

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} DLDataType;

typedef struct {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides; /* elements; NULL, before version 1.2, for a contiguous tensor */
    uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self); /* may be NULL */
} DLManagedTensor;

/* Of another major version only what stands before `flags` may be read. */
typedef struct DLManagedTensorVersioned {
    DLPackVersion version;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned *self); /* may be NULL */
    uint64_t flags;
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

typedef struct DLPackExchangeAPIHeader {
    DLPackVersion version;
    struct DLPackExchangeAPIHeader *prev_api; /* an older table, or NULL */
} DLPackExchangeAPIHeader;

/* A producer's table of functions; it outlives every user. Those that return int give 0, or -1 with a Python error. */
typedef struct {
    DLPackExchangeAPIHeader header;
    int (*managed_tensor_allocator)(DLTensor *prototype, DLManagedTensorVersioned **out, void *error_context,
                                    void (*set_error)(void *error_context, const char *kind, const char *message));
    int (*managed_tensor_from_py_object_no_sync)(void *object, DLManagedTensorVersioned **out);
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *tensor, void **out_object);
    int (*dltensor_from_py_object_no_sync)(void *object, DLTensor *out); /* borrowed, not owned; may be NULL */
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out_stream);
} DLPackExchangeAPI;

#endif
