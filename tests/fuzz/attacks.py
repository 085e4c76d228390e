"""What can be wrong with the arguments of a call. Each attack spoils one and says what the call then means."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from typing import Any

import dlpack
import numpy as np
import torch
from arrays import DLPACK, EXCHANGE, FILL, Arrangement, Wrapped
from cases import Case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flora import _core

WILD = (-1, 0, 1, 2, 3, 7, 100, 2**16, 2**31 - 1, 2**31, 2**53, 2**62, 2**63 - 1, -(2**63), 2**63, 2**64, -(2**70))
ODD = (None, "1", b"1", 1.5, float("nan"), 1j, [], {}, object(), torch.ones(()), np.int64(1), True, 10**400)
ATTACKS: dict[str, Callable[[Case], None]] = {}


class NotApplicableError(Exception):
    """The call has no argument that this could spoil."""


def attack(name: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        ATTACKS[name] = function
        return function

    return register


def pick(case: Case, names: Any = None) -> str:
    names = sorted(case.slots if names is None else names)
    if not names:
        raise NotApplicableError
    name: str = case.random.choice(names)
    return name


@attack("nothing")
def nothing(case: Case) -> None:
    case.valid = True


# Objects that mean no array of numbers in memory ---------------------------------------------------------------------


class Own(torch.Tensor):
    """A subclass."""


def fake(values: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(values)


def quantised(values: Tensor) -> Tensor:
    return torch.quantize_per_tensor(values.float().nan_to_num(), 0.1, 0, torch.quint8)


def freed(values: Tensor) -> Tensor:
    values.untyped_storage().resize_(0)
    return values


def misaligned(values: Tensor) -> Tensor:
    memory = torch.zeros(values.nbytes + 1, dtype=torch.uint8)
    if not values.numel():
        raise NotApplicableError
    return torch.frombuffer(memory.numpy().data, dtype=values.dtype, offset=1).view(values.shape)


def cast(values: Tensor, random: Any) -> Tensor:
    others = (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2, torch.uint16, torch.int8)
    return torch.zeros(values.shape, dtype=random.choice(others))


STRANGE: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "compressed rows": lambda t: t.to_sparse_csr() if t.ndim == 2 else t.to_sparse(),
    "oneDNN's layout": lambda t: t.float().to_mkldnn(),
    "quantised": quantised,
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "a fake tensor": fake,
    "a subclass": lambda t: t.as_subclass(Own),
    "a functional tensor": torch._to_functional_tensor,
    "a tensor of zeros without memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "an uninitialised parameter": lambda t: torch.nn.UninitializedParameter(),
    "conjugated": lambda t: torch.complex(t.double(), t.double()).conj(),
    "freed storage": freed,
    "misaligned": misaligned,
    "more dimensions than there can be": lambda t: t.reshape(*t.shape, *[1] * (9 - t.ndim)),
    "masked": lambda t: np.ma.masked_invalid(t.float().numpy()),
    "a record array": lambda t: t.float().numpy().view(np.recarray),
    "a matrix": lambda t: t.float().numpy().reshape(1, -1).view(np.matrix),
    "byte-swapped": lambda t: t.float().numpy().astype(">f4"),
    "a scalar": lambda t: np.float32(1),
    "a list": lambda t: t.tolist() if t.ndim else [1.0],
    "text": lambda t: "an array",
    "a type": lambda t: Tensor,
}


def strange(make: Callable[[Tensor], Any]) -> Callable[[Case], None]:
    def spoil(case: Case) -> None:
        name = pick(case)
        values = case.slots[name].values()
        empty = values.numel() == 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case.replace(name, make(values))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise NotApplicableError from error
        case.hopeless, case.free = not empty, empty

    return spoil


ATTACKS |= {name: strange(make) for name, make in STRANGE.items()}


@attack("a dtype that no kernel has")
def other_dtype(case: Case) -> None:
    name = pick(case)
    array = cast(case.slots[name].values(), case.random)
    case.replace(name, case.watch(array))
    case.hopeless = True


@attack("a dtype that does not fit")
def wrong_dtype(case: Case) -> None:
    name = pick(case)
    slot = case.slots[name]
    dtype = case.random.choice(tuple(DLPACK))
    values = slot.values().to(dtype)
    case.slots[name] = Arrangement(values, "plain", case.random)
    case.changed = True
    case.free = dtype != slot.dtype  # d_weight may be of either type


def wrapper(enter: Callable[[Callable[[Tensor], Tensor], Tensor], Any]) -> Callable[[Case], None]:
    """The call is made where a transform of torch.func has wrapped a tensor."""

    def spoil(case: Case) -> None:
        name = pick(case)
        held: list[Tensor] = []

        def look(tensor: Tensor) -> Tensor:
            held.append(tensor)
            return tensor.sum()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            enter(look, case.slots[name].values().double())
        case.replace(name, held[0])  # after its level is gone
        case.hopeless, case.free = False, True

    return spoil


ATTACKS["a wrapper of torch.func"] = wrapper(lambda f, t: torch.func.grad(f)(t))


# Tensors that mean something -----------------------------------------------------------------------------------------


@attack("an output that requires grad")
def tracked(case: Case) -> None:
    name = pick(case, case.of_role(output=True))
    case.replace(name, case.watch(case.slots[name].values().requires_grad_()))
    case.hopeless = True


@attack("an input that requires grad")
def learning(case: Case) -> None:
    name = pick(case, case.of_role(output=False))
    case.replace(name, torch.nn.Parameter(case.slots[name].values()))


@attack("lazily negated")
def negated(case: Case) -> None:
    name = pick(case)
    values = case.slots[name].values()
    if values.dtype not in (torch.float32, torch.float64):
        raise NotApplicableError
    tensor = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert tensor.is_neg()
    if name == "weight" and "out" in case.slots and case.slots["out"] is case.slots[name]:
        case.slots[name] = Arrangement(values, "plain", case.random)
    case.replace(name, tensor)
    case.hopeless = name in case.outputs


@attack("inference tensors")
def inference(case: Case) -> None:
    name = pick(case)
    with torch.inference_mode():
        case.replace(name, case.slots[name].values().clone())


@attack("copy on write")
def lazy_copy(case: Case) -> None:
    name = pick(case)
    source = case.watch(case.slots[name].values().clone())
    case.replace(name, torch._lazy_clone(source))


# NumPy ---------------------------------------------------------------------------------------------------------------


@attack("a read-only array")
def read_only(case: Case) -> None:
    name = pick(case)
    slot = case.slots[name]
    if slot.dtype == torch.bfloat16 or (name == "weight" and slot is case.slots.get("out")):
        raise NotApplicableError
    array = slot.raw()
    array.flags.writeable = False
    case.stand(name, array if case.random.random() < 0.5 else Wrapped(array))
    case.hopeless = name in case.outputs
    case.watch(array)


@attack("a field of records")
def field(case: Case) -> None:
    name = pick(case)
    slot = case.slots[name]
    values = slot.values()
    if slot.dtype != torch.float32 or values.numel() < 2:
        raise NotApplicableError
    records = np.zeros(values.shape, [("a", "i1"), ("b", "f4")])
    records["b"] = values.numpy()
    case.replace(name, records["b"])
    case.watch(records.view(np.uint8) if records.ndim else records)
    case.hopeless = True


@attack("a misaligned array")
def shifted(case: Case) -> None:
    name = pick(case)
    slot = case.slots[name]
    if 0 in slot.shape or slot.size == 1:
        raise NotApplicableError
    slot.memory = np.concatenate([slot.memory, np.full(16, FILL, np.uint8)])
    slot.offset += case.random.randint(1, slot.size - 1)
    case.standing[name] = case.random.choice(("array", "versioned", "plain"))
    case.hopeless = (slot.memory.ctypes.data + slot.offset) % slot.size != 0
    case.changed = True


# DLPack --------------------------------------------------------------------------------------------------------------


def forged(case: Case, **fields: Any) -> tuple[str, Any]:
    """A producer with these fields for one of the arguments."""
    name = pick(case)
    base = case.random.choice((dlpack.Producer, EXCHANGE))
    producer = case.slots[name].producer(base, **fields)
    case.stand(name, producer)
    return name, producer


@attack("a capsule consumed twice")
def consumed(case: Case) -> None:
    name = pick(case)
    producer = case.slots[name].producer(plain=case.random.random() < 0.5)
    used = producer.__dlpack__() if producer.plain else producer.__dlpack__(max_version=(1, 0))
    again = type("Again", (), {"__dlpack__": lambda self, **keywords: used})()
    again.keeps = producer
    with suppress(ValueError, TypeError):
        _core.drop(again, 0.0, 0)  # which drops nothing
    case.replace(name, again)
    case.hopeless = True


@attack("one capsule for two arguments")
def shared_capsule(case: Case) -> None:
    names = sorted(case.slots)
    if len(names) < 2:
        raise NotApplicableError
    first, second = case.random.sample(names, 2)
    producer = case.slots[first].producer()
    one = producer.__dlpack__(max_version=(1, 0))
    again = type("Again", (), {"__dlpack__": lambda self, **keywords: one})
    case.objects[first], case.objects[second] = again(), again()
    case.objects[first].keeps = producer
    case.hopeless = True


@attack("a capsule's name")
def misnamed(case: Case) -> None:
    _, producer = forged(case)
    if isinstance(producer, EXCHANGE):
        raise NotApplicableError
    producer.name = case.random.choice((b"dltensor_", b"", b"used_dltensor", b"pointer", b"\xff", b"dltensor_versione"))
    case.hopeless = True


@attack("a capsule's version")
def version(case: Case) -> None:
    major = case.random.choice((0, 2, 3, 2**32 - 1))
    forged(case, version=(major, case.random.choice((0, 1, 2**32 - 1))))
    case.hopeless = True


@attack("a capsule's minor version")
def minor(case: Case) -> None:
    forged(case, version=(1, case.random.choice((0, 7, 2**32 - 1))))


@attack("a capsule's flags")
def flags(case: Case) -> None:
    value = case.random.choice((1, 2, 3, 4, 2**32, 2**64 - 1))
    name, _ = forged(case, flags=value)
    case.hopeless = name in case.outputs and value & 3 != 0


@attack("a capsule without deleter")
def no_deleter(case: Case) -> None:
    forged(case, deleter=False)


@attack("a capsule without memory")
def no_memory(case: Case) -> None:
    name, _ = forged(case, data=None)
    case.hopeless = 0 not in case.slots[name].shape
    case.free = not case.hopeless


@attack("a capsule without shape")
def no_shape(case: Case) -> None:
    name, producer = forged(case)
    producer.managed.dl_tensor.shape = None
    case.hopeless = len(case.slots[name].shape) > 0
    case.free = not case.hopeless


@attack("a capsule's number of dimensions")
def dimensions(case: Case) -> None:
    ndim = case.random.choice((-(2**31), -1, 9, 64, 2**31 - 1))
    forged(case, ndim=ndim)
    case.hopeless = True


@attack("a capsule's element type")
def element(case: Case) -> None:
    random = case.random
    fields = {"code": random.choice((0, 1, 2, 3, 4, 5, 6, 7, 10, 17, 200, 255))}
    fields |= {
        "bits": random.choice((0, 1, 4, 8, 16, 32, 64, 128, 255)),
        "lanes": random.choice((0, 1, 1, 2, 4, 65535)),
    }
    name = pick(case)
    if (fields["code"], fields["bits"]) in ((2, 32), (2, 64), (4, 16), (2, 16)) and fields["lanes"] == 1:
        raise NotApplicableError
    case.stand(name, case.slots[name].producer(**fields))
    case.hopeless = True


@attack("a capsule's device")
def device(case: Case) -> None:
    kind = case.random.choice((0, 2, 3, 7, 8, 10, 13, 14, 99, -1, 2**31 - 1))
    forged(case, device_type=kind, device_id=case.random.choice((0, 1, -1)))
    case.hopeless = True


@attack("a capsule's byte offset")
def byte_offset(case: Case) -> None:
    name = pick(case)
    slot = case.slots[name]
    offset = case.random.choice((1, 2, 4, 8, 2**63, 2**64 - 8, 2**64 - 1))
    if offset > 8:
        case.stand(name, slot.producer(byte_offset=offset))
        case.hopeless, case.free = 0 not in slot.shape, 0 in slot.shape
        return
    slot.memory = np.concatenate([slot.memory, np.full(16, FILL, np.uint8)])
    slot.offset += offset
    case.stand(name, slot.producer(data=slot.address() - offset, byte_offset=offset))
    case.changed = True
    case.hopeless = slot.address() % slot.size != 0 and 0 not in slot.shape
    case.free = 0 in slot.shape


@attack("a capsule's extents")
def extents(case: Case) -> None:
    name = pick(case)
    slot = case.slots[name]
    if not slot.shape:
        raise NotApplicableError
    shape, strides, mode = list(slot.shape), list(slot.strides), case.random.randrange(len(slot.shape))
    extent = case.random.choice((0, 0, 1, slot.shape[mode] + 1, 2**20, 2**40, 2**62, 2**63 - 1, -1, -(2**63)))
    if extent >= 2**20 and name == "left" and mode == 0 and not {"right", "d_left"} & case.slots.keys():
        raise NotApplicableError  # so many terms of a sum, which nothing says are too many, take their time
    if extent < 0:
        case.stand(name, slot.producer(shape=[*shape[:mode], extent, *shape[mode + 1 :]]))
        case.hopeless = True
        return
    if extent > shape[mode]:
        strides[mode] = 0  # so that the claim stays inside the memory
    shape[mode] = extent
    case.stand(name, slot.producer(shape=shape, strides=strides))
    slot.shape, slot.strides = tuple(shape), tuple(strides)
    case.changed = True
    if extent >= 2**20:  # the others are not of that size, unless an empty one makes it fit, or none has that mode
        unread = name == "u_in" and not {"x", "dx", "d_u_in"} & case.slots.keys()
        case.free = unread or any(0 in other.shape for other in case.slots.values())
        case.hopeless = not case.free


@attack("a capsule's strides")
def strides(case: Case) -> None:
    name = pick(case)
    slot = case.slots[name]
    if not slot.shape:
        raise NotApplicableError
    steps, mode = list(slot.strides), case.random.randrange(len(slot.shape))
    stride = case.random.choice((0, 1, -1, 2, -2, 3, 5, 2**40, 2**60, -(2**60), 2**62, 2**63 - 1, -(2**63)))
    steps[mode] = stride
    case.stand(name, slot.producer(strides=steps))
    slot.strides = tuple(steps)
    if slot.shape[mode] <= 1 or 0 in slot.shape:
        slot.strides = tuple(0 if n <= 1 or 0 in slot.shape else s for n, s in zip(slot.shape, steps, strict=True))
        return
    case.changed = True
    try:
        slot.raw()
    except ValueError as error:
        if (slot.shape[mode] - 1) * abs(stride) * slot.size < 2**63:
            raise NotApplicableError from error  # a claim that nobody can check
        case.hopeless = True


@attack("a capsule without strides")
def no_strides(case: Case) -> None:
    name = pick(case)
    case.slots[name] = slot = Arrangement(case.slots[name].values(), "plain", case.random)
    case.stand(name, slot.producer(strides=None))


class OddError(Exception):
    """Of a producer."""


class SpeechlessError(Exception):
    """Cannot even say what it is."""

    def __str__(self) -> str:
        raise OddError


RAISED = (RuntimeError, TypeError, BufferError, AttributeError, OddError, KeyboardInterrupt, SystemExit, MemoryError)
RAISED += (SpeechlessError, GeneratorExit, StopIteration, RecursionError, UnicodeDecodeError)


@attack("a producer that raises")
def raises(case: Case) -> None:
    name = pick(case)
    error = case.random.choice(RAISED)

    def produce(self: Any, **keywords: Any) -> Any:
        raise error("no\nnever") if error is not UnicodeDecodeError else error("utf-8", b"\xff", 0, 1, "no")

    where = case.random.choice(("__dlpack__", "property"))
    case.replace(name, type("Raising", (), {"__dlpack__": produce if where == "__dlpack__" else property(produce)})())
    case.hopeless = True
    case.own_errors = (KeyboardInterrupt, SystemExit, GeneratorExit, OddError)


@attack("a producer that gives something else")
def lies(case: Case) -> None:
    name = pick(case)
    result = case.random.choice((None, 1, "dltensor", (), Tensor, torch.ones(2), NotImplemented))
    value = case.random.choice((result, lambda self=None, **keywords: result))
    case.replace(name, type("Lying", (), {"__dlpack__": value})())
    case.hopeless = True


@attack("a producer that knows no keywords")
def old(case: Case) -> None:
    name = pick(case)
    producer = case.slots[name].producer(plain=True)
    case.stand(name, type("Old", (), {"__dlpack__": lambda self: producer.__dlpack__()})())


@attack("an exchange table that fails")
def exchange_fails(case: Case) -> None:
    name = pick(case)
    case.stand(name, case.slots[name].producer(BROKEN))
    case.hopeless = True


@attack("an exchange table of another version")
def exchange_version(case: Case) -> None:
    name = pick(case)
    case.stand(name, case.slots[name].producer(NEWER))


@attack("torch's exchange table on a stranger")
def stranger(case: Case) -> None:
    name = pick(case)
    case.replace(name, STRANGER())
    case.hopeless = True


BROKEN = dlpack.framework(dlpack.Producer, result=-1)
NEWER = dlpack.framework(dlpack.Producer, major=2)
STRANGER = type("Stranger", (), {"__dlpack_c_exchange_api__": Tensor.__dlpack_c_exchange_api__})


# Memory --------------------------------------------------------------------------------------------------------------


@attack("shared memory")
def shared(case: Case) -> None:
    if len(case.slots) < 2:
        raise NotApplicableError
    first, second = case.random.sample(sorted(case.slots), 2)
    if case.slots[first] is case.slots[second]:
        raise NotApplicableError
    values = case.slots[second].values()
    slot = Arrangement(values, case.random.choice(("plain", "gaps", "permuted")), case.random, tight=True)
    host = case.slots[first]
    spare = max(0, host.memory.size - slot.memory.size)
    host.memory = np.concatenate([host.memory, np.full(slot.memory.size, 0x3F, np.uint8)])
    slot.offset += case.random.randrange(0, spare + slot.memory.size + 1, 1 if spare < 8 else slot.size)
    slot.offset -= slot.offset % slot.size
    slot.memory = host.memory
    if host.memory.ctypes.data % 8:
        raise NotApplicableError
    if "out" in case.slots and "weight" in case.slots and case.slots["out"] is case.slots["weight"]:
        raise NotApplicableError
    case.slots[second] = slot
    try:
        slot.raw()
    except ValueError as error:
        raise NotApplicableError from error
    case.changed = True
    for name in (first, second):
        case.standing[name] = case.random.choice(("tensor", "versioned"))


@attack("an output that overlaps itself")
def overlapping(case: Case) -> None:
    name = pick(case, case.of_role(output=True))
    slot = case.slots[name]
    if not slot.shape:
        raise NotApplicableError
    slot.strides = tuple(case.random.choice((0, 1, 1, 2, 3, stride)) for stride in slot.strides)
    try:
        slot.raw()
    except ValueError as error:
        raise NotApplicableError from error
    case.changed = True


@attack("memory taken away while the call waits")
def meddled(case: Case) -> None:
    """Another argument's ``__dlpack__`` changes the victim, perhaps in another thread that it waits for."""
    if len(case.slots) < 2:
        raise NotApplicableError
    victim, asked = case.random.sample(sorted(case.slots), 2)
    if case.slots[victim] is case.slots[asked]:
        raise NotApplicableError
    slot = case.slots[victim]
    values = slot.values().clone()
    how = case.random.choice(("freed", "replaced", "grown", "resized", "dropped"))
    held: list[Any] = [values.numpy() if how == "resized" and slot.dtype != torch.bfloat16 else values]
    if how == "resized" and slot.dtype == torch.bfloat16:
        raise NotApplicableError
    if how == "resized":
        held = [np.array(held[0], order="C")]
    fresh = values.clone()

    def meddle() -> None:
        if how == "freed":
            held[0].untyped_storage().resize_(0)
        elif how == "replaced":
            held[0].data = fresh
        elif how == "grown":
            held[0].resize_([n + 1 for n in values.shape])
        elif how == "resized":
            held[0].resize((0,), refcheck=False)
        held.clear()
        gc.collect(0)

    inner = case.slots[asked].producer()
    apart = case.random.random() < 0.3

    class Meddling:
        def __dlpack__(self, **keywords: Any) -> Any:
            if held and apart:
                thread = threading.Thread(target=meddle)
                thread.start()
                thread.join()
            elif held:
                meddle()
            return inner.__dlpack__(**keywords)

    case.note = f"{victim} {how} by {asked}"
    case.replace(victim, held[0])
    case.stand(asked, Meddling())
    if how in ("replaced", "dropped"):
        return
    case.hopeless = values.numel() > 0 and how != "grown"  # which may fit as well
    case.free = not case.hopeless


# Numbers and sequences -----------------------------------------------------------------------------------------------


class Number:
    """Runs code when it is asked for its value."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run

    def __float__(self) -> float:
        return float(self.run())

    def __index__(self) -> int:
        value = self.run()
        return value if isinstance(value, int) else 1


def with_other(case: Case, *names: str) -> str:
    present = [name for name in names if case.others.get(name) is not None]
    return pick(case, present)


@attack("a scale that is one")
def scale_like(case: Case) -> None:
    name = with_other(case, "scale")
    value = case.others[name]
    kinds = (np.float64(value), np.float32(value), torch.tensor(value), Fraction(value), Number(lambda: value))
    case.others[name] = case.random.choice(kinds)


@attack("a scale that is none")
def scale_odd(case: Case) -> None:
    name = with_other(case, "scale", "probability")

    def raises() -> Any:
        raise OddError

    odd = (None, "1", b"1", 1j, [], (1.0,), object(), 10**400, -(10**400), float("nan"), torch.ones(2), Number(raises))
    case.others[name] = case.random.choice(odd)
    case.hopeless, case.own_errors = True, (OddError, RuntimeError)


@attack("a seed that is none")
def seed_odd(case: Case) -> None:
    name = with_other(case, "seed")
    case.others[name] = case.random.choice((None, "1", 1.5, 2**63, -(2**63) - 1, 2**64, [], object()))
    case.hopeless = True


@attack("a geometry of other numbers")
def geometry(case: Case) -> None:
    name = with_other(case, "stride", "padding", "dilation", "groups")
    if name == "groups":
        case.others[name] = case.random.choice(WILD)
    else:
        values = list(case.template.others[name])
        if not values:
            raise NotApplicableError
        for _ in range(case.random.randint(1, 2)):
            values[case.random.randrange(len(values))] = case.random.choice(WILD)
        case.others[name] = case.random.choice((tuple, list))(values)
    case.changed = True


@attack("a geometry of other things")
def geometry_odd(case: Case) -> None:
    name = with_other(case, "stride", "padding", "dilation", "groups", "padding_mode")
    value = case.random.choice((*ODD[:9], 10**400))
    if name not in ("groups", "padding_mode") and (isinstance(value, bytes) or case.random.random() < 0.7):
        values = list(case.template.others[name])
        values[case.random.randrange(len(values))] = value
        value = values
    case.others[name], case.hopeless = value, True
    if name == "padding_mode":
        case.others[name] = case.random.choice((None, 1, "", "ZEROS", "constant", "zeros\0", "\ud800", b"zeros"))


@attack("a geometry of another length")
def geometry_length(case: Case) -> None:
    name = with_other(case, "stride", "padding", "dilation")
    values = list(case.template.others[name])
    case.others[name] = case.random.choice(([], values[1:], [*values, 1], [1] * 7, [1] * 1000))
    case.hopeless = True


class Lying:
    """A sequence of another length than it says, which may do something at each step."""

    def __init__(self, items: list[Any], length: Any, run: Callable[[], None] = lambda: None) -> None:
        self.items, self.length, self.run = items, length, run

    def __len__(self) -> int:
        self.run()
        length: int = self.length
        return length

    def __getitem__(self, index: int) -> Any:
        self.run()
        return self.items[index % len(self.items)] if self.items and self.length == 1 else self.items[index]


@attack("a sequence that lies")
def lying(case: Case) -> None:
    name = with_other(case, "stride", "padding", "dilation")
    items = list(case.template.others[name])
    length = case.random.choice((-1, 0, len(items) - 1, len(items) + 1, 2**31, 2**63 - 1, 2**64, "x", None))

    def raises() -> None:
        raise OddError

    run = case.random.choice((lambda: None, raises))
    case.others[name] = Lying(items, length, run)
    case.hopeless, case.own_errors = True, (OddError, OverflowError)


@attack("numbers that free memory")
def freeing_number(case: Case) -> None:
    other = with_other(case, "scale", "groups", "seed", "probability")
    name = pick(case)
    values = case.slots[name].values().clone()
    number = case.others[other]

    def run() -> Any:
        values.untyped_storage().resize_(0)
        return number

    case.others[other] = Number(run)
    case.replace(name, values)
    case.hopeless, case.free = values.numel() > 0, values.numel() == 0


# Arguments -----------------------------------------------------------------------------------------------------------


@attack("an argument that is None")
def missing(case: Case) -> None:
    name = pick(case)
    if case.slots[name] is case.slots.get("out") and name == "weight":
        raise NotApplicableError
    del case.slots[name]
    case.outputs.discard(name)
    case.changed = True


@attack("too many or too few arguments")
def count(case: Case) -> None:
    if case.random.random() < 0.5:
        case.dropped = case.random.randint(1, len(case.template.names))
    else:
        case.extra = [None] * case.random.randint(1, 20)
    case.hopeless = True


@attack("arguments exchanged")
def exchanged(case: Case) -> None:
    if len(case.slots) < 2:
        raise NotApplicableError
    first, second = case.random.sample(sorted(case.slots), 2)
    if (first in case.outputs) != (second in case.outputs):
        raise NotApplicableError
    case.slots[first], case.slots[second] = case.slots[second], case.slots[first]
    case.changed = True


@attack("another shape")
def reshaped(case: Case) -> None:
    name = pick(case)
    slot = case.slots[name]
    shape = list(slot.shape)
    change = case.random.choice(("more", "less", "mode", "no mode", "turned"))
    if change == "mode":
        shape.insert(case.random.randint(0, len(shape)), case.random.choice((1, 1, 0, 2)))
    elif change == "turned":
        shape.reverse()
    elif shape:
        mode = case.random.randrange(len(shape))
        if change == "no mode":
            del shape[mode]
        else:
            shape[mode] = max(0, shape[mode] + (case.random.randint(1, 9) if change == "more" else -1))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(case.random.getrandbits(30))).to(slot.dtype)
    if case.slots.get("out") is slot and case.slots.get("weight") is slot:
        raise NotApplicableError
    case.slots[name] = Arrangement(values, "plain", case.random)
    case.changed = True


@attack("factors of another number")
def factors(case: Case) -> None:
    name = with_other(case, "factors", "d_factors")
    number = case.others[name]
    case.others[name] = case.random.choice(
        (number + 1, number - 1, 0, 9, None, 1.0, "factors", {}, object(), Lying([None], 2**40), Lying([], 3))
    )
    case.hopeless = not (name == "factors" and case.template.function.startswith("tucker_reconstruct"))
    case.free = not case.hopeless


@attack("an extent of another size everywhere")
def resized(case: Case) -> None:
    """All extents of one value become another; where that is huge, in memory that it does not need."""
    extents = sorted({n for slot in case.slots.values() for n in slot.shape})
    if not extents or case.slots.get("weight") is case.slots.get("out", 0):
        raise NotApplicableError
    old = case.random.choice(extents)
    new = case.random.choice((0, 0, 0, 1, old + 1, 2**22, 2**31, 2**40, 2**50 + 12345, 2**61, 2**62, 2**63 - 1))
    emptied = case.random.choice([n for n in extents if n != old] or [old]) if new >= 2**22 else None
    generator = torch.Generator().manual_seed(case.random.getrandbits(30))
    for name, slot in case.slots.items():
        shape = [new if n == old else 0 if n == emptied else n for n in slot.shape]
        if new < 2**22 or new not in shape:
            case.slots[name] = Arrangement(torch.randn(shape, generator=generator).to(slot.dtype), "plain", case.random)
        elif 0 in shape:
            case.stand(name, slot.producer(shape=shape, strides=None))
        elif new >= 2**61:
            case.stand(name, slot.producer(shape=shape, strides=[0] * len(shape)))
        else:
            raise NotApplicableError  # so many elements may take their time
    case.changed, case.free, case.beyond_twin = True, new >= 2**22, new == 0
