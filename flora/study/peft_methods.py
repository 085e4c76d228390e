"""PEFT's own adapters, as they come, as a check on flora's baselines."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from flora.finetune.data import require
from flora.finetune.methods import by_acceptance, stock_convolutions
from flora.study.data import EXTRA

MOST_RANK = 256


def prepare(model: nn.Module, names: Sequence[str], head: str, kind: str, budget: int) -> tuple[nn.Module, int, str]:
    """The model with PEFT's adapter on those of the named layers that PEFT accepts, alpha being the rank.

    The rank is the one with which the adapter comes closest to ``budget`` parameters without exceeding it.

    Returns:
        the network, the adapter's parameters, and what it is.

    Raises:
        ValueError: PEFT accepts none of the layers, or rank 1 is too much.
    """
    peft = require("peft", extra=EXTRA)
    stock_convolutions(model)

    def config(rank: int, layers: list[str]) -> Any:
        alpha = "lora_alpha" if kind == "LoraConfig" else "alpha"
        return getattr(peft, kind)(r=rank, target_modules=layers, modules_to_save=[head], **{alpha: rank})

    own = [name for name, _ in model.named_modules() if name in names or name.removesuffix(".1") in names]
    own = [name for name in own if isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d)]
    accepted, _ = by_acceptance(model, own, lambda layers: getattr(peft, kind)(r=1, target_modules=layers))
    if not accepted:
        raise ValueError(f"PEFT's {kind} accepts none of the {len(own)} layers")
    classifier = sum(p.numel() for p in model.get_submodule(head).parameters())

    def adapted(base: nn.Module, rank: int) -> tuple[nn.Module, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: nn.Module = peft.get_peft_model(base, config(rank, accepted))
        return made, sum(p.numel() for p in made.parameters() if p.requires_grad) - classifier

    counts: dict[int, int] = {}
    low, high = 1, MOST_RANK
    while low <= high:  # more rank, more parameters, but for LoKr's where a factor becomes a full matrix
        rank = (low + high) // 2
        counts[rank] = adapted(copy.deepcopy(model), rank)[1]
        low, high = (rank + 1, high) if counts[rank] <= budget else (low, rank - 1)
    fitting = {rank: number for rank, number in counts.items() if number <= budget}
    if not fitting:
        raise ValueError(f"PEFT's {kind} has {min(counts.values())} parameters at least; {budget} were asked for")
    best = max(fitting, key=lambda rank: (fitting[rank], -rank))
    made, number = adapted(model, best)
    return made, number, f"{kind}(r={best}, alpha={best}) on {len(accepted)} of {len(names)} layers"
