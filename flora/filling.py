"""Tensors of a file into the deltas and copies of modules that they are for, after all of them were checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flora.deltas import Delta
from flora.tensor_files import Tensors


class Filler:
    """Copies the tensors of a file where they belong.

    Args:
        tensors: of the file, by the names of module and tensor.
        scales: of the deltas, by the names of modules.
    """

    def __init__(self, tensors: Tensors, scales: Mapping[str, float]) -> None:
        self._tensors, self._scales = tensors, scales
        self._elements: Counter[str] = Counter()
        for key, shape in tensors.shapes.items():
            while key := key.rpartition(".")[0]:
                self._elements[key] += math.prod(shape)

    def elements(self, where: str) -> int:
        """How many numbers the file has for a module: no parameter of its delta can have more."""
        return self._elements[where]

    def __call__(self, deltas: Mapping[str, Delta], copies: Mapping[str, nn.Module]) -> None:
        """Check names, shapes and kinds, then read, then check that the numbers are finite, then copy.

        Raises ValueError, naming the module, before anything is copied.
        """
        expected = {
            f"{where}.{key}": (where, own) for where, delta in deltas.items() for key, own in delta.tensors().items()
        }
        for where, module in copies.items():
            expected.update({f"{where}.{key}": (where, own) for key, own in module.state_dict().items()})
        shapes = self._tensors.shapes
        unknown = sorted(shapes.keys() - expected.keys())
        if unknown:
            raise ValueError(f"the tensor {unknown[0]!r} belongs to nothing in the model")
        for key, (where, own) in expected.items():
            if key not in shapes:
                raise ValueError(f"{where}: the tensor {key!r} is missing")
            if shapes[key] != own.shape:
                raise ValueError(f"{where}: {key!r} is {shapes[key]}, the model needs {tuple(own.shape)}")
        given = self._tensors.read()
        values = {key: _as(where, key, given[key], own) for key, (where, own) in expected.items()}
        for where, part in (*deltas.items(), *copies.items()):
            check_finite(where, {key: values[f"{where}.{key}"] for key, _ in part.named_parameters()})
        for where, delta in deltas.items():
            delta.load_tensors({key: values[f"{where}.{key}"] for key in delta.tensors()})
            delta.scale = self._scales[where]
        for where, module in copies.items():
            module.load_state_dict({key: values[f"{where}.{key}"] for key in module.state_dict()})


def _as(where: str, key: str, given: Tensor, own: Tensor) -> Tensor:
    """A tensor of a file in the dtype of the one that it is for, as which it has to be finite."""
    if given.is_floating_point() != own.is_floating_point() or given.is_complex() != own.is_complex():
        raise ValueError(f"{where}: {key!r} is of {given.dtype}, the model needs {own.dtype}")
    return given.to(own.dtype)


def check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming module and tensor, for numbers that are not finite."""
    for key, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {key} holds values that are not finite")
