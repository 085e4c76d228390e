"""Deltas: one file a family of parametrisations, and `build`, which picks the one a configuration asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from flora.config import DeltaConfig, TuckerConfig
from flora.deltas.base import Delta
from flora.deltas.tucker import TuckerDelta

__all__ = ["Delta", "TuckerDelta", "build"]


def build(
    config: DeltaConfig,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    weight: Tensor | None = None,
    name: str = "",
) -> Delta:
    """The delta that ``config`` asks for, on a weight of ``shape`` (out, in, *k).

    Raises ValueError, naming the module ``name``, if the ranks do not fit the shape; TypeError for a configuration of
    no known method.
    """
    if isinstance(config, TuckerConfig):
        return TuckerDelta(config, shape, config.ranks(shape, name), dtype, device, weight, name)
    raise TypeError(f"{name or 'layer'}: no delta is known for a configuration of type {type(config).__name__}")
