"""What is measured on each layer: each entry of `PEERS` takes a frozen layer and returns the module to time.

All have the ranks of `cases`. A peer raises `RefusedError` for a layer that it does not serve.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flora
from benchmarks.cases import KERNEL_RANK, RANK
from flora import reference

Layer = nn.Linear | nn.Conv2d

BASELINE = "frozen"


class RefusedError(Exception):
    """The peer does not serve this layer."""


def _lora(layer: Layer) -> nn.Module:
    config = peft.LoraConfig(r=RANK, target_modules=["0"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    except ValueError as error:
        raise RefusedError(str(error)) from error


class _Plain(nn.Module):
    """A Tucker delta beside a layer, with parameters as flora draws them (a core that is not 0)."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        config = flora.TuckerConfig(rank=RANK, kernel_rank=KERNEL_RANK)
        ranks = config.ranks(layer.weight.shape)
        self.core = nn.Parameter(torch.randn(ranks) * 1e-3)
        self.factors = nn.ParameterList(
            torch.randn(dim, rank) for dim, rank in zip(layer.weight.shape, ranks, strict=True)
        )


class _Materialised(_Plain):
    """ΔW is rebuilt in every forward and added to the weight: what most Tucker adapters do."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        weight = layer.weight + reference.reconstruct(self.core, list(self.factors), 1.0)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


class _Factored(_Plain):
    """flora's algebra in plain PyTorch operations: ΔW is never built."""

    def forward(self, x: Tensor) -> Tensor:
        layer, (u_out, u_in, *kernel) = self.layer, self.factors
        if isinstance(layer, nn.Linear):
            return layer(x) + reference.linear_update(x, u_in, self.core, u_out, 1.0)
        core = reference.reconstruct(self.core, [None, None, *kernel], 1.0)
        padding = [p for p in layer.padding for _ in range(2)]
        return layer(x) + reference.conv_update(
            x, u_in, core, u_out, 1.0, layer.stride, padding, layer.dilation, layer.groups, layer.padding_mode
        )


def _flora(plan: str) -> Callable[[Layer], nn.Module]:
    def wrap(layer: Layer) -> nn.Module:
        return flora.wrap(layer, flora.TuckerConfig(rank=RANK, kernel_rank=KERNEL_RANK, plan=plan))

    return wrap


PEERS: dict[str, Callable[[Layer], nn.Module]] = {
    BASELINE: lambda layer: layer,
    "full fine-tuning": lambda layer: layer.requires_grad_(True),
    "PEFT LoRA": _lora,
    "ΔW rebuilt": _Materialised,
    "factored, plain PyTorch": _Factored,
    "flora, fused": _flora("fused"),
    "flora, merged": _flora("merged"),
    "flora, auto": _flora("auto"),
}
