"""DLPack by hand: producers that may lie about anything, through capsules and through the C exchange API."""

import collections
import ctypes


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DELETER = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)  # does not take the GIL: a call without it would crash


class Plain(ctypes.Structure):
    _fields_ = (("dl_tensor", DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", DELETER))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", DLTensor),
    )


FROM_OBJECT = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.c_void_p))
VIEW_OBJECT = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))


class ExchangeAPI(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("from_object", FROM_OBJECT),
        ("to_object", ctypes.c_void_p),
        ("view_object", VIEW_OBJECT),
        ("stream", ctypes.c_void_p),
    )


_NEW = ctypes.pythonapi.PyCapsule_New
_NEW.restype, _NEW.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def capsule(pointer, name):
    """``name`` is to be kept by the caller: a capsule has no reference to it."""
    return _NEW(pointer, name, None)


class Producer:
    """An array whose capsule says what it is told to; counts the calls of its deleter.

    ``fields`` are those of a DLTensor; shape and strides (None: no strides) are given as tuples.
    """

    def __init__(self, shape, strides, *, plain=False, name=None, version=(1, 1), flags=0, deleter=True, **fields):
        extents = ctypes.c_int64 * max(9, len(shape))
        self.shape, self.strides = extents(*shape), None if strides is None else extents(*strides)
        self.deleted, self.plain = 0, plain
        self.managed = Plain() if plain else Versioned()
        self.managed.deleter = DELETER(self.delete) if deleter else DELETER()
        if not plain:
            self.managed.major, self.managed.minor = version
            self.managed.flags = flags
        values = {"device_type": 1, "ndim": len(shape), "code": 2, "bits": 32, "lanes": 1, "shape": self.shape}
        for field, value in (values | {"strides": self.strides} | fields).items():
            setattr(self.managed.dl_tensor, field, value)
        self.name = name or (b"dltensor" if plain else b"dltensor_versioned")

    def delete(self, _):
        self.deleted += 1

    def __dlpack__(self, **keywords):
        if self.plain and keywords:
            raise TypeError("an old producer takes no max_version")
        assert self.plain or keywords == {"max_version": (1, 0)}
        self.capsule = capsule(ctypes.addressof(self.managed), self.name)
        return self.capsule


def framework(base, major=1, previous=None, result=0):
    """A class like ``base`` (a Producer) with an exchange API of its own, and the last that were asked for."""
    calls = collections.deque(maxlen=16)

    def from_object(instance, out):
        calls.append(instance)
        if result == 0:
            out[0] = ctypes.addressof(instance.managed)
        return result

    api = ExchangeAPI(major, 3, previous and ctypes.addressof(previous), from_object=FROM_OBJECT(from_object))
    cls = type("Array", (base,), {"__dlpack_c_exchange_api__": capsule(ctypes.addressof(api), b"dlpack_exchange_api")})
    cls.api, cls.calls = api, calls
    return cls
