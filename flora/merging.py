"""Merging: W + Σ s·ΔW as a parameter of the layer, why that may be impossible, and what it loses by rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flora.deltas import OutputDelta, WeightDelta
from flora.distributed import is_sharded
from flora.functional import compute_dtype, exact
from flora.kinds import EMBEDDING, Kind, describe

Parameters = dict[str, nn.Parameter | None]

MAX_LOSS = 0.1
"""The share of an update that a safe merge may lose."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge lost by rounding W + s·ΔW to the base's dtype.

    Attributes
    ----------
    lost
        by the names of the layers that were merged: ‖round(W + s·ΔW) - (W + s·ΔW)‖ / ‖s·ΔW‖ in the Frobenius norm, bias
        included. 0 for a base in float32 or float64, in which the sum is computed; up to 1 where a small ΔW vanishes in
        a base of bfloat16 or float16.
    """

    lost: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that has lost most, and how much."""
        return max(self.lost.items(), key=lambda item: item[1])

    def __str__(self) -> str:
        merged = f"{len(self.lost)} {'layer' if len(self.lost) == 1 else 'layers'} merged"
        name, lost = self.worst
        if lost == 0.0:
            return f"{merged}, nothing lost by rounding"
        return f"{merged}; rounding lost up to {100 * lost:.2g} % of an update, that of {name or 'the layer'}"

    __repr__ = __str__


def effective(base: nn.Module, kind: Kind, weight: Tensor, deltas: Sequence[WeightDelta]) -> Tensor:
    """W + Σ s·ΔW in W's orientation and dtype, summed above half precision and rounded once."""
    turned = kind.turned(weight)
    if len(deltas) == 1:
        total = deltas[0].effective_weight(turned)
    else:
        total = turned.to(compute_dtype(weight.dtype))
        for delta in deltas:  # each of the frozen weight, on which some depend
            total = total + delta.alone(turned)
        total = total.to(weight.dtype)
    padding_idx = base.padding_idx if kind is EMBEDDING else None
    if padding_idx is not None:  # the padding row is no part of the delta
        row = torch.tensor([padding_idx], device=weight.device) % len(weight)
        total = total.index_copy(0, row, weight[row])
    return kind.turned(total)


def shifted(bias: Tensor | None, deltas: Sequence[WeightDelta], dtype: torch.dtype) -> Tensor | None:
    """The bias with what the deltas add to it, summed above half precision and rounded once to the weight's dtype."""
    total: Tensor | None = None
    for delta in deltas:
        shift = delta.bias_update(bias)
        if shift is not None:
            total = shift if total is None else total + shift
    if total is None:
        return bias
    return (total if bias is None else total + bias.to(total.dtype)).to(dtype)


def unmergeable(
    base: nn.Module, kind: Kind, deltas: Sequence[WeightDelta], blocks: Sequence[OutputDelta]
) -> str | None:
    """Why deltas cannot be merged into a layer, or None if they can."""
    name = kind.weight_name
    for block in blocks:
        reason = block.unmergeable()
        if reason is not None:
            return f"the block after it cannot be taken into a weight: {reason}"
    stock = kind.stock(base) and not base._forward_hooks
    if blocks and not (stock and kind.name in ("linear", "conv")):
        return f"the block after this {describe(base)} could only be taken into a plain Linear or convolution"
    if blocks and getattr(base, "groups", 1) != 1:
        return f"the block after it mixes its {base.groups} groups, which no weight of a {describe(base)} does"
    if kind.opaque:
        return f"the weight of {describe(base)} is quantised or packed"
    if parametrize.is_parametrized(base, name):
        return f"its {name} is parametrised and computed at every access"
    parameter = base._parameters.get(name)
    if parameter is None:
        return f"its {name} is not a parameter but set anew in each forward (weight_norm or another hook)"
    if parameter.is_meta:
        return f"its {name} is on the meta device"
    if is_sharded(parameter):
        return f"its {name} is sharded over processes"
    shifts = any(delta.bias_update(None) is not None for delta in deltas)
    if shifts and not kind.stock(base) and base._parameters.get("bias") is None:
        return "it has no bias, and whether its own forward would add one is not known (bias=False has no shift)"
    return None


def merged(
    base: nn.Module, kind: Kind, deltas: Sequence[WeightDelta], blocks: Sequence[OutputDelta]
) -> tuple[Parameters, float]:
    """The parameters to take the places of a layer's own, and the share of the update that rounding them loses.

    Computed in float32 (float64 for a float64 base) and rounded once to the base's dtype.
    """
    own = base._parameters
    weight, bias = own[kind.weight_name], own.get("bias")
    assert weight is not None
    with torch.inference_mode(False), torch.no_grad(), exact(weight.device.type):
        total = effective(base, kind, weight.to(compute_dtype(weight.dtype)), deltas)
        total_bias = shifted(bias, deltas, total.dtype)
        if blocks:
            total = kind.turned(total)
            total_bias = None if total_bias is None else total_bias.to(total.dtype)
            for block in blocks:
                total, total_bias = block.merged(total, total_bias)
            total = kind.turned(total)
        sums: dict[str, tuple[Tensor | None, Tensor]] = {kind.weight_name: (weight, total)}
        if total_bias is not bias and total_bias is not None:
            sums["bias"] = (bias, total_bias)
        rounded = {name: total.to(weight.dtype if was is None else was.dtype) for name, (was, total) in sums.items()}
        lost = _lost((was, total, rounded[name]) for name, (was, total) in sums.items())
        if rounded[kind.weight_name].data_ptr() == weight.data_ptr():  # where only the bias is updated
            rounded[kind.weight_name] = weight.clone()
        return {name: nn.Parameter(value, requires_grad=False) for name, value in rounded.items()}, lost


def _lost(sums: Iterator[tuple[Tensor | None, Tensor, Tensor]]) -> float:
    """‖rounded - total‖ / ‖total - what was there‖ over all of them."""
    lost = update = 0.0
    for was, total, rounded in sums:
        if rounded.dtype == total.dtype:
            continue
        lost += float(torch.linalg.vector_norm(rounded.to(total.dtype) - total, dtype=torch.float64)) ** 2
        difference = total if was is None else total - was.to(total.dtype)
        update += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
    return (lost / update) ** 0.5 if update else 0.0


def unsafe(combined: Parameters, lost: float, max_loss: float) -> str | None:
    """Why merged parameters should not be used, or None if they can."""
    for name, parameter in combined.items():
        if parameter is None:
            continue
        wide = parameter.float() if parameter.itemsize == 1 else parameter  # PyTorch has no isfinite for float8
        if not torch.isfinite(wide).all():
            return f"its {name} would hold values that are not finite in {parameter.dtype}"
    dtype = next(parameter.dtype for parameter in combined.values() if parameter is not None)
    if not lost <= max_loss:
        return f"rounding to {dtype} would lose {100 * lost:.3g} % of the update, more than max_loss={max_loss}"
    return None
