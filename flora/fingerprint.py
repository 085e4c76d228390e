"""What identifies an adapter's base: names, shapes, dtypes and, if they are asked for, hashes of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flora import base_dtype as half
from flora.distributed import model_class, whole
from flora.kinds import is_foreign
from flora.model import disabled
from flora.state import adapted_layers
from flora.targets import inside, places

_DIFFERENCES = 6  # quoted of two bases


@dataclass(frozen=True)
class Fingerprint:
    """What an adapter's base was: its parameters and the buffers of its state_dict, without ``modules_to_save``."""

    model: str
    """Its class."""
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    hashes: dict[str, str] | None = None
    """SHA-256 of the values, if they were asked for."""


def fingerprint(
    model: nn.Module,
    leave_out: Sequence[str] = (),
    *,
    hashes: bool = False,
    base_dtype: torch.dtype | None = None,
) -> Fingerprint:
    """The fingerprint of a model as it was before any adapter, without the modules of these names.

    With ``base_dtype`` it is that of the model after it was cast, which it is not.
    """
    tensors = dict(base_tensors(model, leave_out))
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    if base_dtype is not None:
        cast = {id(t): to for place in places(model) for _, t, to in half.cast_tensors(place.original, base_dtype)}
        dtypes |= {key: cast[id(tensor)] for key, tensor in tensors.items() if id(tensor) in cast}
    digests = None
    if hashes:
        with disabled(model) if adapted_layers(model) else nullcontext():
            digests = {
                key: _digest(key, half.narrowed(tensor, dtypes[key]) if tensor.dtype != dtypes[key] else tensor)
                for key, tensor in base_tensors(model, leave_out)
            }
    return Fingerprint(
        model_class(model).__name__,
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        {key: _dtype_name(tensors[key], dtype) for key, dtype in dtypes.items()},
        digests,
    )


def _dtype_name(tensor: Tensor, dtype: torch.dtype) -> str:
    """float32, or float32_Int8Tensor for one of a library's own type, whose numbers are others."""
    name = str(dtype).removeprefix("torch.")
    return f"{name}_{type(tensor).__name__}" if is_foreign(tensor) else name


def base_tensors(model: nn.Module, leave_out: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers of the state_dict as in the unadapted model, by all of their names."""
    heads = set(leave_out)
    for place in places(model):
        if inside(place.name, heads):
            continue
        module = place.original
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None:
                yield (f"{place.name}.{key}" if place.name else key), tensor


def every_name(model: nn.Module, first_names: Iterable[str]) -> list[str]:
    """All the names of modules that are given by their first ones."""
    every = {place.name: place.original for place in places(model)}
    meant = {id(every[name]) for name in first_names}
    return [name for name, module in every.items() if id(module) in meant]


def _digest(key: str, tensor: Tensor) -> str:
    if tensor.is_meta:
        raise ValueError(f"{key} is on the meta device and has no values to hash")
    digest = hashlib.sha256()
    for part in _plain_parts(whole(tensor.detach())):
        digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, or those that one of a library's own type consists of."""
    if not is_foreign(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _plain_parts(getattr(tensor, name))


def compare(model: nn.Module, saved: Sequence[str], there: Fingerprint, base_dtype: torch.dtype | None = None) -> str:
    """Raises ValueError if the bases differ in names, shapes or, where the file has them, hashes.

    Args:
        saved: the modules that the adapter's file has whole.
        there: what the file says.
        base_dtype: what the model will be cast to.

    Returns:
        Differences of dtypes, to be reported; "" if there are none.
    """
    known = {place.name for place in places(model)}
    saved = every_name(model, [name for name in saved if name in known])
    here = fingerprint(model, saved, base_dtype=base_dtype)
    differences = [f"{key!r} is missing in this model" for key in there.shapes if key not in here.shapes]
    differences += [f"{key!r} is only in this model" for key in here.shapes if key not in there.shapes]
    differences += [
        f"{key!r} is {shape} in this model, {there.shapes[key]} in the adapter's"
        for key, shape in here.shapes.items()
        if key in there.shapes and shape != there.shapes[key]
    ]
    if differences:
        raise ValueError(f"the adapter is for another base ({there.model}): {_quoted(differences)}")
    # A base is the same one whether it is cast or not; where values are compared, it is in the adapter's dtypes.
    dtypes = {
        dtype: fingerprint(model, saved, base_dtype=dtype).dtypes for dtype in (base_dtype, None, *half.BASE_DTYPES)
    }
    trained = next((dtype for dtype, names in dtypes.items() if names == there.dtypes), base_dtype)
    if there.hashes is not None:
        hashes, digests = there.hashes, fingerprint(model, saved, hashes=True, base_dtype=trained).hashes or {}
        differences = [f"{key!r} has other values" for key, digest in digests.items() if digest != hashes[key]]
    if differences:
        raise ValueError(f"the adapter is for another base ({there.model}): {_quoted(differences)}")
    differences = [
        f"{key!r} is {dtype} in this model, {there.dtypes[key]} in the adapter's"
        for key, dtype in here.dtypes.items()
        if dtype != there.dtypes[key]
    ]
    advice = f"; it was trained with base_dtype={trained}" if differences and trained not in (None, base_dtype) else ""
    return _quoted(differences) + advice


def _quoted(differences: Sequence[str]) -> str:
    rest = len(differences) - _DIFFERENCES
    return "; ".join(differences[:_DIFFERENCES]) + (f"; and {rest} more" if rest > 0 else "")
