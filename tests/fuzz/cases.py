"""One call of a C function: its arguments in guarded memory, what an attack made of them, and what may come of it.

A call either gives what the plain twin gives for what the arguments *mean*, or raises; then nothing was written. Bytes
that belong to no output never change.
"""

from __future__ import annotations

import copy
import functools
from random import Random
from typing import Any

import numpy as np
import test_kernels as kernels
import torch
from arrays import STANDINGS, Arrangement
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flora import _core

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("plain", "plain", "permuted", "gaps", "negative", "expanded")
FUNCTIONS = tuple(sorted(kernels.BUILDERS))
ROWS = ("x", "y", "h", "dx", "dy")
HUGE = 1e18  # products of two of them are too large for float32
REFUSALS = (TypeError, ValueError, BufferError, MemoryError)


class BrokenPromiseError(Exception):
    """The promise is broken."""


class Template:
    """A valid call, drawn by the builder of the kernels' tests, and what the twin makes of it."""

    def __init__(self, case: Any) -> None:
        self.case, self.function = case, case.function
        self.expected = functools.cache(case.expect)
        self.names = kernels.NAMES[case.function]
        self.arrays: dict[str, Tensor] = {}
        self.others: dict[str, Any] = {}
        for name in self.names:
            value = case.arguments.get(name)
            if isinstance(value, list):
                self.others[name] = len(value)
                self.arrays |= {f"{name}/{i}": item for i, item in enumerate(value) if item is not None}
            elif isinstance(value, Tensor):
                self.arrays[name] = value
            else:
                self.others[name] = value


def draw_template(function: str, seed: str) -> Template:
    """The call that this seed stands for."""
    random, found = Random(seed), []

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def draw(data: Any) -> None:
        case = kernels.Case(function, random.choice(DTYPES), data.draw)
        case.random = torch.Generator().manual_seed(random.getrandbits(32))
        kernels.BUILDERS[function](case)
        if sum(t.numel() for t in case.arguments.values() if isinstance(t, Tensor)) <= 20_000:
            found.append(Template(case))

    while not found:
        draw.hypothesis.fuzz_one_input(random.randbytes(4096))
    return found[-1]


class Case:
    """The arguments of one call, to be spoilt by an attack."""

    def __init__(self, template: Template, random: Random) -> None:
        self.template, self.random = template, random
        self.outputs = set(template.case.outputs)
        self.others = dict(template.others)
        tight = random.random() < 0.3
        self.slots = {}
        arguments = template.case.arguments
        in_place = arguments.get("out") is not None and arguments.get("weight") is arguments["out"]
        for name, values in template.arrays.items():
            if name == "weight" and in_place:
                self.slots[name] = self.slots["out"]
                continue
            layouts = LAYOUTS if name not in self.outputs else LAYOUTS[:-1]
            layout = random.choice(layouts) if random.random() < 0.5 else "plain"
            self.slots[name] = Arrangement(values, layout, random, tight)
        self.standing = {name: random.choice(STANDINGS) for name in self.slots}
        self.objects: dict[str, Any] = {}  # what stands for an array, where that is settled already
        self.replaced: set[str] = set()  # those of them whose memory is not the slot's
        self.extra: list[Any] = []  # positional arguments too many
        self.dropped = 0  # and too few
        self.watched: list[tuple[Any, bytes]] = []
        self.valid = False  # nothing is wrong with the call, but a layout that no body writes
        self.changed = False  # the call means something else than its template
        self.hopeless = False  # the call has no meaning and is to be refused
        self.own_errors: tuple[type[BaseException], ...] = ()  # raised by the arguments themselves
        self.beyond_twin = False  # what PyTorch has no operation for may be taken
        self.note = ""  # on what the attack has done
        self.free = False  # whatever the result is, it is not compared

    def of_role(self, *, output: bool) -> list[str]:
        return [name for name in self.slots if (name in self.outputs) == output]

    def stand(self, name: str, array: Any) -> None:
        """``array`` is given, whose memory is the slot's."""
        self.objects[name] = array

    def replace(self, name: str, array: Any) -> None:
        """``array`` is given, which has memory of its own, or none."""
        self.objects[name] = array
        self.replaced.add(name)

    def watch(self, array: Any) -> Any:
        """An array outside the slots, which is not to be written."""
        self.watched.append((array, snapshot(array)))
        return array

    def arguments(self) -> list[Any]:
        objects = {
            name: self.objects[name] if name in self.objects else slot.stand_in(self.standing[name], self.random)
            for name, slot in self.slots.items()
        }
        arguments = []
        for name in self.template.names:
            if isinstance(self.template.others.get(name), int) and name in ("factors", "d_factors"):
                count = self.others[name]
                entries = [objects.get(f"{name}/{i}") for i in range(count)] if isinstance(count, int) else count
                arguments.append(tuple(entries) if self.random.random() < 0.3 and isinstance(count, int) else entries)
            else:
                arguments.append(objects[name] if name in objects else self.others.get(name))
        return (arguments + self.extra)[: len(arguments) + len(self.extra) - self.dropped]

    def expect(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the twin gives for what the arguments mean."""
        if not self.changed:
            return self.template.expected()
        case = copy.copy(self.template.case)
        arguments: dict[str, Any] = {}
        for name in self.template.names:
            if name in ("factors", "d_factors"):
                arguments[name] = [self.meaning(f"{name}/{i}") for i in range(self.others[name])]
            else:
                value = self.meaning(name)
                arguments[name] = self.others.get(name) if value is None else value
        if "scale" in arguments:
            arguments["scale"] = float(arguments["scale"])
        case.arguments = arguments
        case.outputs = dict.fromkeys(self.outputs)
        return case.expect()

    def meaning(self, name: str) -> Tensor | None:
        if name not in self.slots:
            return None
        value = self.slots[name].values()
        if name in ROWS and not self.template.function.startswith(("tucker_conv", "conv_")) and value.ndim != 2:
            return value.reshape(value.shape[:-1].numel(), value.shape[-1]) if value.ndim else value
        return value

    def clash(self) -> bool:
        """Whether an output shares a byte with itself or with another argument, but for out and weight."""
        taken = {id(slot.memory): np.zeros(slot.memory.size, np.int64) for slot in self.slots.values()}
        on_slots = {name: slot for name, slot in self.slots.items() if name not in self.replaced}
        for name in self.outputs & on_slots.keys():
            np.add.at(taken[id(self.slots[name].memory)], self.slots[name].places(), 1)
        if any((times > 1).any() for times in taken.values()):
            return True
        out = self.slots.get("out")
        return any(
            taken[id(slot.memory)][slot.places()].any()
            for name, slot in on_slots.items()
            if name not in self.outputs and not (name == "weight" and out is not None and slot.same_as(out))
        )

    def run(self) -> str:
        """Calls; gives the outcome, "right" or the exception's name. Raises BrokenPromiseError."""
        expected = None
        if self.changed and not (self.hopeless or self.free):
            try:
                expected = self.expect()
            except Exception:
                expected = None  # the twin takes no such arguments, so they are to be refused
        arguments = self.arguments()
        memories = {id(slot.memory): slot.memory for slot in self.slots.values()}
        before = {key: memory.copy() for key, memory in memories.items()}
        error: BaseException | None = None
        try:
            result = getattr(_core, self.template.function)(*arguments)
        except (*REFUSALS, *self.own_errors) as raised:
            error = raised
        if error is not None:
            if not isinstance(error, MemoryError):
                for key, memory in memories.items():
                    if not np.array_equal(memory, before[key]):
                        raise BrokenPromiseError(f"written before {error!r}") from error
                self.check_watched(f"before {error!r}")
                if self.valid and not self.may_refuse(error):
                    raise BrokenPromiseError(f"a valid call was refused: {error!r}") from error
            return type(error).__name__
        if result is not None:
            raise BrokenPromiseError(f"gave {result!r}")
        if self.hopeless and self.outputs:
            raise BrokenPromiseError("was taken, and could not be")
        if self.free or not self.outputs:
            return "taken"
        if not self.changed:
            expected = self.template.expected()
        if expected is None and self.beyond_twin:
            return "taken"
        if expected is None:
            raise BrokenPromiseError("was taken, but not by the twin")
        if self.changed and self.clash():
            raise BrokenPromiseError("wrote what shares memory")
        self.check_around(memories, before)
        self.check_values(*expected)
        self.check_watched("beside the outputs")
        return "right"

    def may_refuse(self, error: BaseException) -> bool:
        """Whether it is of a layout of an output that no body writes."""
        spread = any(self.slots[name].spread() for name in self.outputs)
        return isinstance(error, ValueError) and "must have unit stride" in str(error) and spread

    def check_around(self, memories: dict[int, Any], before: dict[int, Any]) -> None:
        for key, memory in memories.items():
            differs = memory != before[key]
            for name in self.outputs & self.slots.keys() - self.replaced:
                if id(self.slots[name].memory) == key:
                    differs[self.slots[name].places()] = False
            if differs.any():
                raise BrokenPromiseError(f"wrote {int(differs.sum())} bytes beside its outputs")

    def check_watched(self, when: str) -> None:
        for array, bits in self.watched:
            if snapshot(array) != bits:
                raise BrokenPromiseError(f"changed an array {when}")

    def check_values(self, exact: dict[str, Tensor], magnitude: dict[str, Tensor]) -> None:
        huge = any((slot.values().double().abs() > HUGE).any() for slot in self.slots.values())
        for name in self.outputs & self.slots.keys():
            found = self.slots[name].values() if name not in self.replaced else self.written(name)
            if found is None:
                continue
            wanted, size = exact[name].reshape(found.shape), magnitude[name].reshape(found.shape)
            finite = wanted.isfinite() & size.isfinite() & (size < torch.finfo(found.dtype).max)
            if huge:  # what comes between may be too large where the sum is not, and in float64
                finite &= found.isfinite()
            tolerance = self.template.case.tolerance(found.dtype)
            error = (found.double() - wanted).abs()
            wrong = finite & ~(error <= tolerance * size + torch.finfo(found.dtype).smallest_normal)
            if wrong.any():
                raise BrokenPromiseError(f"{name} is wrong in {int(wrong.sum())} of {wrong.numel()} elements")

    def written(self, name: str) -> Tensor | None:
        array = self.objects[name]
        return array.detach() if type(array) in (Tensor, torch.nn.Parameter) else None


def snapshot(array: Any) -> bytes:
    if isinstance(array, np.ndarray):
        return array.tobytes()
    elements = torch.empty(array.numel(), dtype=array.dtype).copy_(array.detach().reshape(-1))
    return bytes(elements.view(torch.uint8).numpy().tobytes())
