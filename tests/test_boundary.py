"""What `flora._core` refuses to borrow and what it resolves, how it says so, and that nothing is written then.

Most tests write s·core into an output of order 1 (`tucker_reconstruct` with one identity factor): the smallest call.
"""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import dlpack
import high_water
import numpy as np
import pytest
import torch
from dlpack import capsule
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flora import _core

GUARD = 7.25
CORE = torch.arange(1.0, 5.0)
POINTER = b"pointer"  # a capsule keeps no reference to its name
HERE = Path(__file__).parent


def write(out, weight=None, core=CORE):
    _core.tucker_reconstruct(out, weight, core, [None], 2.0)


def read(weight):
    out = torch.full((4,), GUARD)
    write(out, weight)
    return out


def refused(error, match, out=None, weight=None, core=CORE):
    """Both as an output and as an input; a buffer of guard values beside it stays as it is."""
    spare = np.full(4, GUARD, np.float32)  # not a tensor, which torch.func would wrap
    if out is not None:
        with pytest.raises(error, match=f"^tucker_reconstruct: out {match}"):
            write(out, weight, core)
    if weight is not None:
        with pytest.raises(error, match=f"^tucker_reconstruct: weight {match}"):
            write(spare, weight, core)
        assert (spare == GUARD).all()


# torch ---------------------------------------------------------------------------------------------------------------


def test_plain_tensor_and_parameter():
    out = torch.full((6,), GUARD)
    write(out[1:5])
    assert out.tolist() == [GUARD, 2, 4, 6, 8, GUARD]
    weight = nn.Parameter(torch.ones(4))
    assert read(weight).tolist() == [3, 5, 7, 9]
    assert read(nn.Buffer(torch.ones(4))).tolist() == [3, 5, 7, 9]


def test_out_and_weight_may_be_the_same():
    out = torch.ones(4)
    write(out, out)
    assert out.tolist() == [3, 5, 7, 9]


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p * 1], ids=["leaf", "result"])
def test_output_that_requires_grad(make):
    out = make(nn.Parameter(torch.full((4,), GUARD)))
    refused(ValueError, "requires grad.*no_grad", out)
    assert (out == GUARD).all()
    with torch.no_grad():
        write(out)
    assert out.tolist() == [2, 4, 6, 8]


def test_a_write_raises_the_version_so_that_autograd_sees_it():
    x = torch.ones(4, requires_grad=True)
    y = x.sigmoid()  # kept for backward
    with torch.no_grad():
        write(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_refused_call_does_not_raise_the_version():
    out = torch.full((4,), GUARD)
    version = out._version
    with pytest.raises(ValueError, match="out"):
        write(out, core=torch.ones(5))
    assert out._version == version


def test_lazily_negated():
    negated = torch.complex(torch.zeros(4), torch.full((4,), GUARD)).conj().imag
    assert negated.is_neg()
    refused(ValueError, "is a lazily negated view", out=negated)
    assert (negated == -GUARD).all()
    assert read(negated).tolist() == [2 - GUARD, 4 - GUARD, 6 - GUARD, 8 - GUARD]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: torch.zeros(4, dtype=torch.complex64), TypeError, "has dtype complex64"),
        (lambda: torch.zeros(4, dtype=torch.complex64).conj(), TypeError, "has dtype complex64"),
        (lambda: torch.zeros(4, dtype=torch.int64), TypeError, "has dtype int64"),
        (lambda: torch.zeros(4, dtype=torch.bool), TypeError, "has dtype bool8"),
        (lambda: torch.zeros(4, dtype=torch.float8_e4m3fn), TypeError, "has 8-bit elements of DLPack's type 10"),
        (
            lambda: torch.zeros(4, device="meta"),
            _core.ArrayError,
            r"cannot be borrowed \(torch.float32.*device meta\)",
        ),
        (lambda: torch.eye(4).to_sparse(), _core.ArrayError, r"cannot be borrowed \(.*torch.sparse_coo"),
        (lambda: torch.ones(4).to_mkldnn(), _core.ArrayError, r"cannot be borrowed \(.*torch._mkldnn"),
        (lambda: torch.zeros([1] * 9), ValueError, "has 9 dimensions, at most 8"),
        (lambda: torch._efficientzerotensor(4), ValueError, "has 4 elements but no memory"),
        (lambda: torch._to_functional_tensor(torch.zeros(4)), ValueError, "has 4 elements but no memory"),
        (lambda: torch.frombuffer(bytearray(17), dtype=torch.float32, offset=1), ValueError, "is misaligned"),
        (nn.UninitializedParameter, TypeError, "is a UninitializedParameter; of torch only plain Tensor"),
    ],
)
def test_other_kinds_of_tensor(make, error, match):
    refused(error, match, out=make(), weight=make())


@pytest.mark.filterwarnings("ignore:.*(quantized|Quantize|nested).*")  # torch's own warnings on making these
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
            _core.ArrayError,
            r"cannot be borrowed \(torch.quint8",
        ),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), _core.ArrayError, "cannot be borrowed"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            TypeError,
            "is a NestedTensor",
        ),
    ],
)
def test_quantised_and_nested(make, error, match):
    refused(error, match, out=make(), weight=make())


def test_fake_tensor():
    with FakeTensorMode():
        fake = torch.zeros(4)
    refused(TypeError, "is a FakeTensor; of torch only plain Tensor and Parameter", out=fake, weight=fake)


def test_subclass():
    class Own(torch.Tensor):
        pass

    tensor = torch.zeros(4).as_subclass(Own)
    refused(TypeError, "is a .*Own; of torch", out=tensor, weight=tensor)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp's own use
def test_wrappers_of_torch_func():
    """They are of type torch.Tensor and say nothing, but have no memory."""
    seen = []

    def look(x):
        with torch.no_grad():
            refused((ValueError, _core.ArrayError), "", out=None, weight=x)
        seen.append(type(x))
        return x.sum()

    torch.func.grad(look)(torch.zeros(4))
    torch.func.vmap(look)(torch.zeros(2, 4))
    torch.func.jvp(look, (torch.zeros(4),), (torch.ones(4),))
    torch.func.functionalize(look)(torch.zeros(4))
    assert seen == [torch.Tensor] * 4


def test_freed_storage():
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(0)
    refused(ValueError, "has 4 elements but no memory: its storage was freed", out=tensor, weight=tensor)


def test_copy_on_write():
    source = torch.full((4,), GUARD)
    lazy = torch._lazy_clone(source)
    write(lazy)
    assert (source == GUARD).all()
    assert lazy.tolist() == [2, 4, 6, 8]


def test_inference_tensors():
    with torch.inference_mode():
        out = torch.zeros(4)
        write(out)
    write(out, out)
    assert out.tolist() == [4, 8, 12, 16]


def test_expanded_inputs_but_no_such_outputs():
    out = torch.full((1,), GUARD).expand(4)
    with pytest.raises(ValueError, match=r"out .*overlaps itself"):
        write(out)
    assert (out == GUARD).all()
    assert read(torch.ones(1).expand(4)).tolist() == [3, 5, 7, 9]


def test_shared_memory():
    buffer = torch.full((8,), GUARD)
    with pytest.raises(ValueError, match=r"out.* weight share memory"):
        write(buffer[:4], buffer[1:5])
    with pytest.raises(ValueError, match=r"out.* core share memory"):
        write(buffer[:4], None, buffer[3:7])
    assert (buffer == GUARD).all()
    y, u, c = torch.full((4, 4), GUARD), torch.ones(4, 2), torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"y.* x share memory"):
        _core.tucker_linear_forward(y, None, y, u, c, u, 1.0)
    with pytest.raises(ValueError, match=r"d_u_out.* d_u_in share memory"):
        _core.tucker_linear_backward(None, y[:, :2], None, y[:, :2], y * 1, y * 1, None, u, c, u, 1.0)
    assert (y == GUARD).all()


# NumPy ---------------------------------------------------------------------------------------------------------------


def test_numpy_arrays():
    out = np.full(12, GUARD, np.float32)
    write(out[2:10:2], np.float32([1, 1, 1, 1])[::-1], core=CORE.numpy())
    assert out.tolist() == [GUARD, GUARD, 3, GUARD, 5, GUARD, 7, GUARD, 9, GUARD, GUARD, GUARD]


def test_read_only_array():
    array = np.full(4, GUARD, np.float32)
    array.flags.writeable = False
    refused(ValueError, "is a read-only array", out=array)
    assert (array == GUARD).all()
    assert read(array).tolist() == [2 + GUARD, 4 + GUARD, 6 + GUARD, 8 + GUARD]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: np.zeros(4, ">f4"), TypeError, "has the byte-swapped dtype >f4"),
        (lambda: np.zeros(4, np.int32), TypeError, "has dtype int32, not float32, float64 or float16"),
        (lambda: np.zeros(4, np.longdouble), TypeError, "has dtype "),
        (lambda: np.zeros(4, object), TypeError, "has dtype object"),
        (lambda: np.ma.zeros(4, np.float32), TypeError, "is a MaskedArray; of NumPy only plain ndarray"),
        (lambda: np.zeros((4,), np.float32).view(np.recarray), TypeError, "is a recarray; of NumPy only plain ndarray"),
        (lambda: np.zeros(4, [("a", "i1"), ("b", "f4")])["b"], ValueError, "has a stride of 5 bytes"),
        (lambda: np.frombuffer(bytearray(17), np.uint8)[1:].view(np.float32), ValueError, "is misaligned"),
        (lambda: np.zeros([1] * 9, np.float32), ValueError, "has 9 dimensions, at most 8"),
    ],
)
def test_other_kinds_of_array(make, error, match):
    array = make()
    refused(error, match, out=array, weight=array)


@pytest.mark.parametrize("value", [1.0, "x", [1.0, 2.0, 3.0, 4.0], np.float32(1), object()], ids=repr)
def test_no_array(value):
    refused(TypeError, "is .*, not a torch tensor, NumPy array or other array with __dlpack__", value, value)


def test_none_where_an_array_is_needed():
    with pytest.raises(TypeError, match=r"^tucker_reconstruct: out is NoneType"):
        write(None)


# DLPack by hand ------------------------------------------------------------------------------------------------------


class Producer(dlpack.Producer):
    """An array of four floats whose capsule may lie about anything."""

    def __init__(self, *, shape=(4,), strides=(1,), **fields):
        self.memory = (ctypes.c_float * 8)(*[GUARD] * 8)
        super().__init__(shape, strides, **({"data": ctypes.addressof(self.memory)} | fields))

    def refused(self, error, match, deleted=1):
        refused(error, match, out=self)
        assert self.deleted == deleted
        assert list(self.memory) == [GUARD] * 8


@pytest.mark.parametrize("plain", [True, False])
def test_capsules(plain):
    out, weight = Producer(plain=plain, byte_offset=4), Producer(plain=plain, strides=(2,))
    write(out, weight)
    assert list(out.memory) == [GUARD, 2 + GUARD, 4 + GUARD, 6 + GUARD, 8 + GUARD, GUARD, GUARD, GUARD]
    assert (out.deleted, weight.deleted) == (1, 1)
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    assert name(out.capsule) == b"used_" + out.name


def test_capsule_without_strides_is_contiguous():
    out = Producer(shape=(2, 2), strides=None)
    _core.tucker_reconstruct(out, None, CORE.view(2, 2), [None, None], 2.0)
    assert list(out.memory) == [2, 4, 6, 8, GUARD, GUARD, GUARD, GUARD]


def test_capsule_without_deleter():
    out = Producer(deleter=False)
    write(out)
    assert list(out.memory)[:4] == [2, 4, 6, 8]


def test_capsule_without_elements_needs_no_memory():
    out = Producer(data=None, shape=(0,))
    write(out, core=torch.ones(0))
    assert out.deleted == 1


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"data": None}, ValueError, "has 4 elements but no memory"),
        ({"device_type": 2, "device_id": 3}, _core.ArrayError, r"is on device cuda:3 \(DLPack's device type 2\)"),
        ({"device_type": 12}, _core.ArrayError, r"is on device .* \(DLPack's device type 12\)"),
        ({"lanes": 4}, TypeError, "has elements of 4 lanes"),
        ({"lanes": 0}, TypeError, "has elements of 0 lanes"),
        ({"code": 0}, TypeError, "has dtype int32"),
        ({"code": 5, "bits": 64}, TypeError, "has dtype complex64"),
        ({"code": 2, "bits": 128}, TypeError, "has dtype float128"),
        ({"code": 200, "bits": 3}, TypeError, "has 3-bit elements of DLPack's type 200"),
        ({"ndim": 9}, ValueError, "has 9 dimensions, at most 8"),
        ({"ndim": -1}, ValueError, "has -1 dimensions"),
        ({"shape": (-4,)}, ValueError, "has the negative extent -4 in dimension 0"),
        ({"ndim": 2, "shape": (2**40, 2**40), "strides": (0, 0)}, ValueError, "has extents whose size .* overflows"),
        ({"shape": (2**62,)}, ValueError, "has extents whose size in bytes overflows"),
        ({"shape": (2,), "strides": (2**62,)}, ValueError, "has extents whose size in bytes overflows"),
        ({"shape": (2,), "strides": (-(2**63),)}, ValueError, "has extents whose size in bytes overflows"),
        ({"shape": (3,), "strides": (-(2**62),)}, ValueError, "has extents whose size in bytes overflows"),
        ({"shape": (2**40,), "strides": (2**22,)}, ValueError, "has extents whose size in bytes overflows"),
        ({"byte_offset": 2**63}, ValueError, "has extents whose size in bytes overflows"),
        ({"data": 2**64 - 16, "shape": (2**20,)}, ValueError, "has extents whose size in bytes overflows"),
        ({"byte_offset": 2}, ValueError, "is misaligned"),
        ({"version": (2, 0)}, _core.ArrayError, r"comes in DLPack version 2.0, only 1.x is known"),
        ({"version": (0, 8)}, _core.ArrayError, r"comes in DLPack version 0.8"),
        ({"flags": 1}, ValueError, "is a read-only array"),
        ({"flags": 2}, ValueError, "was exported as a copy"),
    ],
)
def test_capsules_that_are_refused(fields, error, match):
    Producer(**fields).refused(error, match)


def test_capsule_without_shape():
    producer = Producer()
    producer.managed.dl_tensor.shape = None
    producer.refused(_core.ArrayError, "has 1 dimensions but no shape")


def test_read_only_capsules_are_inputs():
    weight = Producer(flags=3)
    assert read(weight).tolist() == [2 + GUARD, 4 + GUARD, 6 + GUARD, 8 + GUARD]
    assert weight.deleted == 1


@pytest.mark.parametrize("name", [b"dltensor", b"dltensor_versioned"])
def test_a_capsule_is_consumed_once(name):
    out = Producer(plain=name == b"dltensor")
    write(out)
    used = out.capsule
    out.__class__ = type("Again", (Producer,), {"__dlpack__": lambda self, **keywords: used})
    with pytest.raises(_core.ArrayError, match="out cannot be borrowed: its DLPack capsule was consumed already"):
        write(out)
    assert out.deleted == 1


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (None, "its __dlpack__ returned NoneType, no capsule"),
        ("dltensor", "its __dlpack__ returned str, no capsule"),
        (capsule(1, POINTER), "its __dlpack__ returned a capsule named pointer"),
        (capsule(1, None), "its __dlpack__ returned a capsule named NULL"),
    ],
)
def test_rubbish_instead_of_a_capsule(result, match):
    class Rubbish:
        def __dlpack__(self, **keywords):
            return result

    refused(_core.ArrayError, f"cannot be borrowed: {match}", out=Rubbish(), weight=Rubbish())


@pytest.mark.parametrize("error", [RuntimeError, TypeError, BufferError, AttributeError, ZeroDivisionError])
def test_a_producer_that_raises(error):
    class Raising:
        def __dlpack__(self, **keywords):
            raise error("no memory on this planet\nsecond line")

    with pytest.raises(
        _core.ArrayError, match=r"^tucker_reconstruct: out cannot be borrowed: no memory on this planet$"
    ) as info:
        write(Raising())
    assert type(info.value.__cause__) is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_errors_that_are_not_about_the_array(error):
    class Raising:
        def __dlpack__(self, **keywords):
            raise error

    with pytest.raises(error):
        write(Raising())


def test_everything_borrowed_is_given_back_on_failure():
    out, weight = Producer(), Producer(plain=True)
    for core, error in ((1.0, TypeError), (torch.ones(5), ValueError), (torch.ones(4).bfloat16(), TypeError)):
        with pytest.raises(error):
            write(out, weight, core)
    assert (out.deleted, weight.deleted) == (3, 3)
    assert list(out.memory) == [GUARD] * 8
    with pytest.raises(TypeError):
        _core.tucker_reconstruct(out, weight, CORE, [None], "scale")
    with pytest.raises(ValueError, match="factors"):
        _core.tucker_reconstruct(out, weight, CORE, [None] * 6, 1.0)
    assert (out.deleted, weight.deleted) == (3, 3)  # these two were refused before anything was borrowed
    with pytest.raises(TypeError):
        _core.tucker_reconstruct(out, weight, CORE, [1.0], 1.0)
    assert (out.deleted, weight.deleted) == (4, 4)


def test_a_deleter_may_raise_without_harm():
    class Loud(Producer):
        def delete(self, _):
            super().delete(_)
            with pytest.raises(ZeroDivisionError):
                _ = 1 / 0

    loud = Loud()
    with pytest.raises(TypeError, match="core is float"):
        write(loud, core=1.0)
    assert loud.deleted == 1


def test_a_list_that_changes_during_the_call():
    factors = []

    class Clearing(Producer):
        def __dlpack__(self, **keywords):
            factors.clear()
            return super().__dlpack__(**keywords)

    factors += [Clearing(shape=(4, 1), strides=(1, 1), ndim=2), torch.full((3, 1), 2.0)]
    out = torch.full((4, 3), GUARD)
    _core.tucker_reconstruct(out, None, torch.ones(1, 1), factors, 1.0)
    assert (out == 2 * GUARD).all()


# The exchange API of another framework -------------------------------------------------------------------------------


def framework(**arguments):
    return dlpack.framework(Producer, **arguments)


def test_exchange_api_of_another_framework():
    cls = framework()
    for _ in range(3):
        out, weight = cls(), cls(flags=1)
        write(out, weight)
        assert list(out.memory)[:4] == [2 + GUARD, 4 + GUARD, 6 + GUARD, 8 + GUARD]
        assert (out.deleted, weight.deleted) == (1, 1)
    assert len(cls.calls) == 6
    cls(flags=1).refused(ValueError, "is a read-only array")
    cls(lanes=2).refused(TypeError, "has elements of 2 lanes")


def test_exchange_api_for_more_types_than_are_remembered():
    for _ in range(12):
        cls = framework()
        for _ in range(2):
            out = cls()
            write(out)
            assert out.deleted == 1
        assert len(cls.calls) == 2


def test_exchange_api_of_an_older_or_newer_version():
    old = framework()
    new = framework(major=2, previous=old.api)
    out = new()
    write(out)
    assert (len(old.calls), len(new.calls), out.deleted) == (1, 0, 1)
    lonely = framework(major=2)
    out = lonely()  # through its __dlpack__
    write(out)
    assert (len(lonely.calls), out.deleted) == (0, 1)


def test_exchange_api_that_fails_without_an_error():
    out = framework(result=-1)()
    refused(_core.ArrayError, "cannot be borrowed: its exchange API gave no tensor", out=out)
    assert out.deleted == 0


# The module ----------------------------------------------------------------------------------------------------------


def python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, timeout=600)
    assert result.returncode == 0, result.stderr
    return result


ALONE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("flora._core", {_core.__file__!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
import numpy as np
out = np.zeros(4, np.float32)
core.tucker_reconstruct(out, None, np.ones(4, np.float32), [None], 2.0)
assert out.tolist() == [2, 2, 2, 2]
"""


def test_the_extension_alone_needs_no_torch():
    python(ALONE + "assert 'torch' not in sys.modules and core.info()['exchange_api'] is False\n")


def test_torch_may_come_later():
    python(
        ALONE + "import torch\n"
        "out = torch.zeros(4)\n"
        "core.tucker_reconstruct(out, None, torch.ones(4, requires_grad=True), [None], 2.0)\n"
        "assert out.tolist() == [2, 2, 2, 2] and out._version == 1 and core.info()['exchange_api'] is True\n"
    )


def test_a_torch_without_the_exchange_api():
    python(
        ALONE + "import torch\n"
        "del torch.Tensor.__dlpack_c_exchange_api__\n"
        "out = torch.zeros(4)\n"
        "core.tucker_reconstruct(out, None, torch.ones(4, requires_grad=True), [None], 2.0)\n"
        "assert out.tolist() == [2, 2, 2, 2] and out._version == 1 and core.info()['exchange_api'] is False\n"
        "assert core.takes(out, None, None, (out, out)) and not core.takes(out.long(), None, None, (out,))\n"
    )


def test_two_modules_in_one_process():
    python(ALONE + "first = core\n" + ALONE + "assert core is not first\n")


def test_info(isa):
    info = _core.info()
    assert set(info) == {"isa", "isa_available", "threads", "pool", "exchange_api", "outruns_mkl"}
    assert isa.startswith("v4") or info["outruns_mkl"] is False
    assert info["isa"] == isa
    assert info["isa_available"][0] == "portable"
    assert info["threads"] == torch.get_num_threads()
    assert info["pool"] == "torch"
    assert info["exchange_api"] is True


def test_set_isa():
    before = _core.info()["isa"]
    with pytest.raises(ValueError, match=r"^set_isa: 'v9' is none of \['portable'"):
        _core.set_isa("v9")
    with pytest.raises(TypeError, match=r"^set_isa: name must be a str, not 3"):
        _core.set_isa(3)
    assert _core.info()["isa"] == before


def test_isa_from_the_environment():
    code = "import flora; print(flora._core.info()['isa'])"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]

    def run(value):
        env = os.environ | {"FLORA_ISA": value}
        return subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, env=env, timeout=600)

    assert run("portable").stdout == "portable\n"
    assert "FLORA_ISA is v9, which names no instruction set" in run("v9").stderr


@pytest.mark.parametrize("function", [n for n in dir(_core) if n[0] in "ct"])
def test_number_of_arguments(function):
    with pytest.raises(TypeError, match=rf"^{function}\(\) takes exactly \d+ positional arguments \(2 given\)"):
        getattr(_core, function)(None, None)
    with pytest.raises(TypeError, match="keyword"):
        getattr(_core, function)(x=1.0)


def test_calls_from_several_threads():
    x, u_in, core, u_out = (torch.randn(*shape) for shape in ((257, 65), (65, 9), (7, 9), (33, 7)))
    expected = torch.zeros(257, 33)
    _core.tucker_linear_forward(expected, None, x, u_in, core, u_out, 1.0)
    wrong = []

    def work():
        for _ in range(50):
            y = torch.zeros(257, 33)
            _core.tucker_linear_forward(y, None, x, u_in, core, u_out, 1.0)
            if not torch.equal(y, expected):
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("script", sorted((HERE / "leaks").glob("*.py")), ids=lambda path: path.stem)
def test_nothing_leaks(script):
    if script.stem == "memory" and high_water.megabytes() is None:
        pytest.skip(high_water.UNKNOWN)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_padding_whose_product_overflows_is_refused():
    one = torch.ones(1, 1, 1, 1, 1)
    padding = (0, 4095, 2**20, 2**52 - 2**20 - 1, 0, 0)
    with pytest.raises(ValueError, match="makes the input too large"):
        _core.conv_weight_gradient(one.clone(), one, one, (2**60,) * 3, padding, (1, 1, 1), 1, "zeros")


def test_groups_that_overflow_are_refused():
    y = x = torch.empty(1, 0, 3, 3)
    with pytest.raises(ValueError, match="groups=4611686018427387904 do not fit"):
        _core.tucker_conv_forward(
            y, None, x, torch.ones(2, 2, 1, 1), (torch.ones(0, 2), torch.ones(4, 2), None, None), 1.0, (1, 1),
            (0,) * 4, (1, 1), 2**62, "zeros",
        )  # fmt: skip


def test_arguments_that_run_code_are_read_before_any_array_is_borrowed():
    x = torch.ones(1, 2, 64, 64)

    class Frees:
        def __index__(self):
            x.untyped_storage().resize_(0)
            return 1

    with pytest.raises(ValueError, match="x has 8192 elements but no memory"):
        _core.tucker_conv_forward(
            torch.ones(1, 2, 64, 64), None, x, torch.ones(2, 2, 1, 1), (torch.ones(2, 2), torch.ones(2, 2), None, None),
            1.0, (1, 1), (0,) * 4, (1, 1), Frees(), "zeros",
        )  # fmt: skip


class Freeing:
    """An input that takes another argument's memory away when it is asked for its own."""

    def __init__(self, other):
        self.other = other

    def __dlpack__(self, **keywords):
        if isinstance(self.other, np.ndarray):
            self.other.resize(0, refcheck=False)
        else:
            self.other.untyped_storage().resize_(0)
        return torch.zeros(4).__dlpack__(**keywords)


@pytest.mark.parametrize(
    ("make", "match"),
    [(lambda: torch.ones(4), "has 4 elements but no memory"), (lambda: np.ones(4, np.float32), "the weight's, 0$")],
    ids=["torch", "numpy"],
)
def test_a_producer_that_frees_an_array_asked_for_before_it(make, match):
    out = make()
    with pytest.raises(ValueError, match=match):
        write(out, Freeing(out))
    spare, weight = np.full(4, GUARD, np.float32), make()
    with pytest.raises(ValueError, match="weight (has 4 elements but no memory|must have shape)"):
        write(spare, weight, Freeing(weight))
    assert (spare == GUARD).all()


def test_sequences_that_lie_about_their_length():
    class Lying:
        def __init__(self, length, entries):
            self.length, self.entries, self.asked = length, entries, 0

        def __len__(self):
            return self.length

        def __getitem__(self, index):
            self.asked += 1
            if index >= self.entries:
                raise IndexError(index)

    endless = Lying(1, 10**6)
    _core.tucker_reconstruct(torch.zeros(4), None, CORE, endless, 2.0)
    assert endless.asked == 1
    with pytest.raises(ValueError, match="factors has 1 entries, not the 3 that its length says"):
        _core.tucker_reconstruct(torch.zeros(4), None, CORE, Lying(3, 1), 2.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_a_sequence_whose_length_raises(error):
    class Raising(list):
        def __len__(self):
            raise error

    with pytest.raises(error):
        _core.tucker_reconstruct(torch.zeros(4), None, CORE, Raising([None]), 2.0)


def test_strides_that_no_element_follows():
    wild = {"ndim": 2, "shape": (1, 4), "strides": (-(2**63), 1)}
    out, weight = Producer(**wild), Producer(**wild)
    _core.tucker_reconstruct(out, weight, CORE[None], [None, None], 2.0)
    assert list(out.memory)[:4] == [2 + GUARD, 4 + GUARD, 6 + GUARD, 8 + GUARD]
    empty = Producer(ndim=3, shape=(2**30, 0, 2**29), strides=(2**62, -(2**63), 2**62))
    with pytest.raises(ValueError, match="out must have 1 dimensions"):
        _core.tucker_reconstruct(empty, None, CORE, [None], 2.0)
    assert (out.deleted, weight.deleted, empty.deleted) == (1, 1, 1)


def test_an_empty_weight_is_rescaled_at_once():
    weight, column = torch.empty(2**40, 0), torch.full((3,), GUARD)
    _core.rescale_reconstruct(weight, weight, None, None, 1.0)
    _core.rescale_backward(None, column[:0], weight, weight, None, torch.empty(0), 1.0)
    _core.rescale_backward(None, column, torch.empty(0, 3), torch.empty(0, 3), None, torch.ones(3), 1.0)
    assert not column.any()


def test_a_layer_without_outputs():
    """Its factor has no memory at all (NULL), which the sanitizers do not let pass as an argument of memcpy."""
    dx, d_core, u_in = torch.ones(3, 8), torch.full((2, 2), GUARD), torch.ones(8, 2)
    empty = Producer(shape=(0, 2), strides=(2, 1), data=None)
    _core.tucker_linear_backward(
        dx, None, d_core, None, torch.empty(3, 0), torch.ones(3, 8), None, u_in, torch.ones(2, 2), empty, 1.0
    )
    assert (dx == 1).all()
    assert (d_core == 0).all()


def test_gradients_of_an_empty_weight_are_zero_at_once():
    d_core, d_in = torch.full((3, 2), GUARD), torch.full((2**50, 0), GUARD)
    weight, core, wide, nothing = torch.empty(2**50, 0, 3, 2), torch.ones(0, 0, 3, 2), torch.empty(2**50, 0), [None] * 3
    _core.tucker_reconstruct_backward(core.clone(), [d_in, *nothing], weight, core, [wide, *nothing], 2.0)
    u_out, d_out = torch.ones(0, 3), torch.empty(0, 3)
    _core.tucker_reconstruct_backward(d_core, [d_out, None], torch.empty(0, 2), torch.ones(3, 2), [u_out, None], 2.0)
    assert (d_core == 0).all()
    d_out, core, no_rank = torch.full((4, 2), GUARD), torch.empty(2, 0), torch.empty(2, 0)
    _core.tucker_reconstruct_backward(
        None, [d_out, torch.empty(2, 0)], torch.ones(4, 2), core, [torch.ones(4, 2), no_rank], 2.0
    )
    assert (d_out == 0).all()


def test_a_kronecker_product_without_elements_is_done_at_once():
    a, b, weight = torch.ones(3, 2), torch.empty(2**50, 0), torch.empty(3 * 2**50, 0)
    d_a = torch.full((3, 2), GUARD)
    _core.kronecker_reconstruct(weight, None, a, b, 1.0)
    _core.kronecker_reconstruct_backward(d_a, torch.empty(2**50, 0), weight, a, b, 1.0)
    assert (d_a == 0).all()
    _core.kronecker_reconstruct_backward(torch.empty(0, 0), None, torch.empty(0, 0), torch.empty(0, 0), b, 1.0)


def test_extents_of_an_empty_array_that_overflow_are_refused():
    for array in (torch.empty(2**40, 0, 2**40), Producer(shape=(2**62, 0, 2), strides=None)):
        with pytest.raises(ValueError, match="weight has extents whose size in bytes overflows"):
            write(torch.zeros(4), array)


def test_huge_extents_that_need_no_memory():
    y, one = torch.zeros(1, 2**20), torch.ones(1, 1)
    with pytest.raises(ValueError, match="a of 1048576 x 0 and b of 1 x 4398046511104 have too large a product"):
        _core.kronecker_forward(y, None, torch.ones(1, 0), torch.ones(2**20, 0), one.expand(1, 2**42), 1.0)
    y, many = torch.zeros(1, 1), one.expand(1, 2**50 + 12345)
    with pytest.raises(ValueError, match="1125899906854969 diagonals are more than a transform can have"):
        _core.toeplitz_forward(y, many, many, None, 1.0)
    x = torch.empty(0, 2**12, 1)
    with pytest.raises(ValueError, match="groups=4096 do not fit"):
        factors = [one.expand(1, 2**52), None, None]
        _core.tucker_conv_forward(x, None, x, torch.ones(1, 1, 1), factors, 1.0, [1], [0, 0], [1], 2**12, "zeros")
    assert not y.any()


def test_an_empty_batch_of_huge_planes_needs_no_memory():
    x = torch.empty(0, 1, 2**20, 2**20)
    gradient = torch.full((1, 1, 3, 3), 7.0)
    _core.conv_weight_gradient(gradient, x, x, (1, 1), (1, 1, 1, 1), (1, 1), 1, "zeros")
    assert torch.count_nonzero(gradient) == 0


# Rows and what the kernels take -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3), (0, 2), (2, 3, 1, 1, 2, 1, 1)])
def test_leading_dimensions_count_rows(shape):
    x, u_in, core, u_out = torch.randn(*shape, 5), torch.randn(5, 2), torch.randn(3, 2), torch.randn(4, 3)
    y, h = torch.randn(*shape, 4), torch.empty(*shape, 2)
    expected = y + 0.5 * x @ u_in @ core.T @ u_out.T
    _core.tucker_linear_forward(y, h, x, u_in, core, u_out, 0.5)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(h, x @ u_in)


def test_leading_dimensions_without_a_common_stride_are_refused():
    u = torch.ones(4, 2)
    y = torch.zeros(6, 4)
    for x in (torch.ones(2, 6, 4)[:, :3], torch.ones(3, 2, 4).transpose(0, 1)):
        with pytest.raises(ValueError, match="tucker_linear_forward: x has leading dimensions that are no rows"):
            _core.tucker_linear_forward(y, None, x, u, None, u, 1.0)
    with pytest.raises(ValueError, match="x has extents whose size in bytes overflows"):
        huge = Producer(ndim=3, shape=(2**40, 2**40, 0), strides=(0, 0, 1))
        _core.tucker_linear_forward(y, None, huge, u, None, u, 1.0)
    assert not y.any()


def test_what_the_kernels_take():
    class Subclass(torch.Tensor):
        pass

    x, half, double = torch.ones(2), torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64)
    for taken in [
        (x, x, x, (x, x, nn.Parameter(x))),
        (half, half, half, (x, None, x)),
        (double, double, None, (double,)),
        (x.expand(3, 2), None, None, (x, x[:0])),
        (x, x, None, ()),
    ]:
        assert _core.takes(*taken) is True
    for refused in (half, double, x.long(), x.to("meta"), x.to_sparse(), x.as_subclass(Subclass), x.numpy(), 1.0):
        assert _core.takes(x, x, x, (refused, x)) is False
        assert _core.takes(x, x, x, (x, x, refused)) is False
        assert _core.takes(x, refused, None, (x,)) is False
    assert _core.takes(x, None, x.to("meta"), (x,)) is False
    assert _core.takes(None, x, None, (x,)) is False
    with pytest.raises(TypeError, match="takes: parameters is .*, not a tuple"):
        _core.takes(x, x, x, [x])
    with pytest.raises(TypeError, match="takes exactly 4 positional"):
        _core.takes(x)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.ones(2, 2), 0.5, 1), ValueError, "out must have 1 dimensions"),
        ((torch.ones(4)[::2], 0.5, 1), ValueError, "out must have unit stride, not 2"),
        ((torch.ones(4), 1.5, 1), ValueError, "probability must be from 0 to 1, not 1.5"),
        ((torch.ones(4), float("nan"), 1), ValueError, "probability must be from 0 to 1, not nan"),
        ((torch.ones(4), "half", 1), TypeError, "probability must be a float, not 'half'"),
        ((torch.ones(4), 10**400, 1), ValueError, "probability 1000+ is too large"),
        ((torch.ones(4), 0.5, 2**64), ValueError, "seed 18446744073709551616 is too large"),
    ],
)
def test_drop_refuses(arguments, error, match):
    with pytest.raises(error, match=f"^drop: {match}"):
        _core.drop(*arguments)
    assert arguments[0].all()


def conv_backward(shape, batch=1, stride=(1, 1, 1), **changed):
    """tucker_conv_backward of a Conv3d with everything that it can be given."""
    core, x = torch.ones(2, 2, 2, 2, 2), torch.ones(batch, 3, *shape)
    factors = [torch.ones(4, 2), torch.ones(3, 2), *(torch.ones(2, 2) for _ in range(3))]
    out = [(extent - 2) // s + 1 for extent, s in zip(shape, stride, strict=True)]
    arguments = {"dx": x * 0, "d_core": core * 0, "d_factors": [f * 0 for f in factors]}
    arguments |= {"dy": torch.ones(batch, 4, *out), "x": x, "h": torch.ones(batch, *shape, 2), "core": core}
    arguments |= {"factors": factors} | changed
    _core.tucker_conv_backward(*arguments.values(), 1.0, stride, (0,) * 6, (1, 1, 1), 1, "zeros")
    return arguments


def test_the_most_arrays_that_a_call_can_have():
    found = conv_backward((3, 3, 3))
    assert all(torch.count_nonzero(d) == d.numel() for d in (found["dx"], found["d_core"], *found["d_factors"]))
    wrong = [*found["factors"][:4], torch.ones(3, 2)]
    with pytest.raises(ValueError, match=r"d_factors\[4\] must have shape \(3, 2\), not \(2, 2\)"):
        conv_backward((3, 3, 3), factors=wrong, dy=torch.ones(1, 4, 2, 2, 1))


def test_a_stride_beyond_the_input_is_one_output():
    assert torch.equal(
        conv_backward((3, 3, 3), stride=(2**62, 9, 1))["dx"], conv_backward((3, 3, 3), stride=(9, 9, 1))["dx"]
    )


def test_images_that_no_offset_can_reach_are_refused():
    x = torch.empty(0, 1, 2**28, 2**28)
    u = torch.ones(1, 16)
    with pytest.raises(
        ValueError, match="ranks of 16 and 16 make a padded input of 72057594037927936 pixels too large"
    ):
        _core.tucker_conv_backward(
            None, None, [u * 0, None, None, None], x, x, None, torch.ones(16, 16, 1, 1), [u, u, None, None], 1.0,
            (1, 1), (0,) * 4, (1, 1), 1, "zeros",
        )  # fmt: skip
