"""Files of tensors that nobody vouches for: safetensors, and PyTorch's own, of which nothing is run.

What is read takes no more memory than a few times the file's own size, whatever sizes are written in it.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import safetensors.torch
import torch
from torch import Tensor, nn

MOST_TEXT = 32 << 20
"""Bytes of JSON that are read: 54,000 adapted layers with hashes, as the largest mixtures of experts have. Python's
objects take up to 50 times as much."""
_WIDEST = 16  # bytes of an element, complex128


@dataclass(frozen=True)
class Tensors:
    """The tensors of a file: their shapes at once, their values when they are asked for."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[], Mapping[str, Tensor]]
    """May raise ValueError for a damaged file."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Tensors:
        """Those that have been read."""
        return cls({key: tuple(tensor.shape) for key, tensor in tensors.items()}, lambda: tensors)


def parse_json(path: Path, file: BinaryIO, size: int) -> Any:
    """The next ``size`` bytes of a file as strict JSON. ValueError, naming it: no JSON, a key twice, NaN, too much."""
    if size > MOST_TEXT:
        raise ValueError(f"{path} has {size} bytes of JSON, which no adapter has")
    try:
        return json.loads(file.read(size), parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


# safetensors -------------------------------------------------------------------------------------------------------


def safetensors_shapes(path: Path, file: BinaryIO, size: int) -> dict[str, tuple[int, ...]]:
    """The shapes in the head of a safetensors file of ``size`` bytes; the tensors themselves are not read.

    ValueError, naming the file, for no such head, or one of tensors that could not fill the file.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"{path} is not a safetensors file: it has {size} bytes, its head alone {length}")
    head = parse_json(path, file, length)
    shapes = {}
    for key, entry in head.items() if isinstance(head, dict) else [("the head", head)]:
        if key == "__metadata__":
            continue
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(extent) is int and extent >= 0 for extent in shape):
            raise ValueError(f"{path} is not a safetensors file: {key!r} has no shape")
        shapes[key] = tuple(shape)
    held = size - 8 - length
    if held > _WIDEST * sum(map(math.prod, shapes.values())):
        raise ValueError(f"{path} is not a safetensors file: its tensors cannot take {held} bytes")
    return shapes


def parse_safetensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. ValueError, naming it, for anything else."""
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # safetensors raises its own type, and others from torch
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


# PyTorch's ---------------------------------------------------------------------------------------------------------


def read_torch(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors of a .pt, .pth or .bin file; ValueError, naming it, for anything but plain tensors by name."""
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f"{path} is neither an adapter folder nor a .safetensors, .pt, .pth or .bin file")
    try:
        loaded = torch.load(_stored_again(data), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch all raise their own
        raise ValueError(f"{path} is not a file of tensors that can be read safely: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds {type(loaded).__name__}, not tensors by name")
    for key, item in loaded.items():
        reason = _unfit(item)
        if not isinstance(key, str) or reason is not None:
            raise ValueError(f"{path} holds more than tensors by name: {key!r} is {reason or 'no name'}")
    return {key: tensor.detach() for key, tensor in loaded.items()}


def _stored_again(data: bytes) -> io.BytesIO:
    """An archive as `torch.save` writes it, in an archive of our own; ValueError if it would be larger unpacked.

    Readers differ in where they look for an archive's directory and in which of its sizes they believe, so PyTorch is
    given what was checked. Its reader takes for an archive what begins as one, and for a pickle all else.
    """
    if data[:4] != b"PK\3\4":
        return io.BytesIO(data)
    again = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(again, "w") as stored:
        entries, room = archive.infolist(), len(data)
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename!r} in it is compressed")
            room -= entry.file_size
        if room < 0:
            raise ValueError("its parts are larger than itself")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("a part of it is there twice")
        for entry in entries:  # sliced: PyTorch can be told to write no right checksums
            name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
            start = entry.header_offset + 30 + name + extra
            stored.writestr(entry.filename, memoryview(data)[start : start + entry.file_size])
    again.seek(0)
    return again


def _unfit(item: Any) -> str | None:
    """Why a value of such a file is no tensor of numbers that are all there, or None if it is one."""
    if type(item) not in (Tensor, nn.Parameter):
        return f"a {type(item).__name__}"
    if item.layout is not torch.strided or item.is_nested or item.is_quantized or not item.is_cpu:
        return f"a tensor of layout {item.layout} and {item.dtype} on {item.device}"
    if item.numel() * item.element_size() > item.untyped_storage().nbytes():  # one number in many places, say
        return f"a tensor {tuple(item.shape)} of {item.untyped_storage().nbytes()} bytes"
    return None
