"""Arrays inside guarded memory of their own, and every kind of object that can stand for one."""

from __future__ import annotations

import collections
from random import Random
from typing import Any

import dlpack
import numpy as np
import torch
from torch import Tensor

LENDERS: collections.deque[Any] = collections.deque(maxlen=100)
"""The last producers: one lives as long as what it has lent, which a call may hold when it has let go of the object."""
FILL = 0x3F  # guard bytes that are a small number in every dtype, wherever it starts
RAW = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16, torch.float16: np.float16}
DLPACK = {torch.float32: (2, 32), torch.float64: (2, 64), torch.bfloat16: (4, 16), torch.float16: (2, 16)}

STANDINGS = ("tensor", "tensor", "parameter", "array", "versioned", "plain", "exchange", "wrapped")


class Arrangement:
    """Values in memory: where, in which order, with guard bytes around them and in the gaps."""

    def __init__(self, values: Tensor, layout: str, random: Random, tight: bool = False) -> None:
        self.dtype, self.shape, self.size = values.dtype, tuple(values.shape), values.dtype.itemsize
        order = list(range(values.ndim))
        steps, signs = [1] * values.ndim, [1] * values.ndim
        if layout == "permuted":
            random.shuffle(order)
        elif layout == "gaps":
            steps = [random.choice((1, 1, 2, 3)) for _ in order]
        elif layout == "negative":
            signs = [random.choice((1, -1)) for _ in order]
        self.strides, count, first = [0] * values.ndim, 1, 0
        for mode in reversed(order):
            self.strides[mode] = signs[mode] * steps[mode] * count
            if layout == "expanded" and values.stride(mode) == 0:
                self.strides[mode] = 0
                continue
            if signs[mode] < 0:
                first += (max(1, self.shape[mode]) - 1) * count
            count *= max(1, self.shape[mode]) * steps[mode]
        before = 0 if tight else 8 * random.randint(1, 8)
        self.offset = before + first * self.size
        self.memory = np.full(before + count * self.size + (0 if tight else 64), FILL, np.uint8)
        self.raw()[...] = to_numpy(values)

    def raw(self) -> np.ndarray[Any, Any]:
        """The elements, of an integer type for bfloat16. Raises ValueError if they are not all in the memory."""
        steps = [stride * self.size for stride in self.strides]
        ends = [(n - 1) * step for n, step in zip(self.shape, steps, strict=True) if 0 not in self.shape]
        low, high = (sum(end for end in ends if (end < 0) == below) for below in (True, False))
        if self.offset + low < 0 or self.offset + high + self.size > self.memory.size + self.size * (0 in self.shape):
            raise ValueError("outside the memory")  # NumPy's own check can overflow
        return np.ndarray(self.shape, RAW[self.dtype], self.memory, self.offset, steps)

    def values(self) -> Tensor:
        """A contiguous copy of the elements."""
        copy = torch.from_numpy(np.array(self.raw(), order="C", copy=True))
        return copy.view(torch.bfloat16) if self.dtype == torch.bfloat16 else copy

    def places(self) -> np.ndarray[Any, Any]:
        """The indices into the memory of all bytes of all elements."""
        if 0 in self.shape:
            return np.zeros(0, np.int64)
        firsts = np.full((), self.offset, np.int64)
        for extent, stride in zip(self.shape, self.strides, strict=True):
            firsts = np.add.outer(firsts, np.arange(extent) * stride * self.size)
        return np.add.outer(firsts, np.arange(self.size)).ravel()

    def spread(self) -> bool:
        """Whether the elements are not one after another."""
        return self.strides != list(torch.empty(self.shape, device="meta").stride())

    def same_as(self, other: Arrangement) -> bool:
        """Whether it is the same view of the same memory."""
        mine, its = ((a.address(), a.dtype, a.shape, a.strides) for a in (self, other))
        return mine == its

    def address(self) -> int:
        return self.memory.ctypes.data + self.offset

    def tensor(self) -> Tensor:
        """Raises ValueError where torch has no such view."""
        if self.offset % self.size or any(stride < 0 for stride in self.strides) or not self.memory.size:
            raise ValueError("torch has no such view")
        whole = torch.from_numpy(self.memory[: self.memory.size // self.size * self.size]).view(self.dtype)
        return whole.as_strided(self.shape, self.strides, self.offset // self.size)

    def array(self) -> np.ndarray[Any, Any]:
        if self.dtype == torch.bfloat16:
            raise ValueError("NumPy has no bfloat16")
        return self.raw()

    def producer(self, base: type = dlpack.Producer, **fields: Any) -> Any:
        code, bits = DLPACK[self.dtype]
        fields = {"data": self.address(), "code": code, "bits": bits} | fields
        shape, strides = fields.pop("shape", self.shape), fields.pop("strides", self.strides)
        producer = base(tuple(shape), None if strides is None else tuple(strides), **fields)
        producer.memory = self.memory
        LENDERS.append(producer)
        return producer

    def stand_in(self, standing: str, random: Random) -> Any:
        """An object for the array; a capsule where the wanted kind has no such view."""
        try:
            if standing == "tensor":
                return self.tensor()
            if standing == "parameter":
                return torch.nn.Parameter(self.tensor(), requires_grad=False)
            if standing == "array":
                return self.array()
            if standing == "wrapped":
                return Wrapped(self.array() if random.random() < 0.5 else self.tensor())
        except (ValueError, RuntimeError):  # of NumPy and torch
            pass
        if standing == "exchange":
            return self.producer(EXCHANGE)
        split = random.choice((0, 0, 8, 64))  # the address in two parts
        return self.producer(plain=standing == "plain", data=self.address() - split, byte_offset=split)


class Wrapped:
    """An array of a framework that gives another one's capsule."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **keywords: Any) -> Any:
        return self.array.__dlpack__(**keywords)


EXCHANGE = dlpack.framework(dlpack.Producer)


def to_numpy(values: Tensor) -> np.ndarray[Any, Any]:
    values = values.detach()
    return (values.contiguous().view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
