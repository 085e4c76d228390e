"""The ways to fine-tune that the demo compares: each makes a pretrained network trainable in its own way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

import flora
from flora.finetune.data import require
from flora.finetune.network import HEAD


@dataclass(frozen=True)
class Ranks:
    """The size of the deltas: ``rank`` for channels, ``kernel_rank`` for kernel modes, ``scale`` times the update.

    ``base_dtype`` is the dtype that FLoRA keeps the frozen network in.
    """

    rank: int
    kernel_rank: int
    scale: float
    base_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Method:
    """A name for the table, a learning rate, and what is done to the network.

    ``prepare`` returns the network to train and notes for the reader.
    """

    name: str
    lr: float
    prepare: Callable[[nn.Module, Ranks], tuple[nn.Module, tuple[str, ...]]]


def head_only(model: nn.Module, ranks: Ranks) -> tuple[nn.Module, tuple[str, ...]]:
    """Only the new classifier learns."""
    model.requires_grad_(False).get_submodule(HEAD).requires_grad_(True)
    return model, ()


def full(model: nn.Module, ranks: Ranks) -> tuple[nn.Module, tuple[str, ...]]:
    """Everything learns; only the BatchNorm statistics are held, as for the others."""
    return model.requires_grad_(True), ()


def flora_tucker(model: nn.Module, ranks: Ranks) -> tuple[nn.Module, tuple[str, ...]]:
    """Every convolution gets a Tucker delta, depthwise and self-padding ones included, and the classifier learns."""
    config = flora.TuckerConfig(
        rank=ranks.rank, kernel_rank=ranks.kernel_rank, scale=ranks.scale, modules_to_save=[HEAD]
    )
    return flora.adapt(model, config, base_dtype=ranks.base_dtype), ()


def peft_lora(model: nn.Module, ranks: Ranks) -> tuple[nn.Module, tuple[str, ...]]:
    """PEFT's LoRA on every convolution that it accepts, once the network's own class is out of its way."""
    peft = require("peft", extra="peft")
    layers = stock_convolutions(model)
    accepted, refused = by_acceptance(model, layers, lambda names: peft.LoraConfig(r=ranks.rank, target_modules=names))
    if not accepted:
        raise ValueError(f"PEFT's LoRA of rank {ranks.rank} accepts none of the {len(refused)} convolutions")
    config = peft.LoraConfig(
        r=ranks.rank, lora_alpha=ranks.rank * ranks.scale, target_modules=accepted, modules_to_save=[HEAD]
    )
    notes = [f"LoRA is PEFT {peft.__version__}'s, on {len(accepted)} of {len(layers)} convolutions."]
    if refused:
        depthwise = sum(cast(nn.Conv2d, model.get_submodule(name)).groups > 1 for name in refused)
        names = ", ".join(name.removesuffix(".1") for name in refused)  # of a stock convolution behind its padding
        notes.append(f"It refuses {len(refused)}, {depthwise} of them depthwise: {names}.")
    return peft.get_peft_model(model, config), tuple(notes)


def stock_convolutions(model: nn.Module) -> list[str]:
    """Makes every convolution a stock one and returns their names.

    PEFT builds its adapter as another instance of the layer's class, which fails for self-padding convolutions; so they
    become a padding and a stock convolution, which is the same function.
    """
    own = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and type(m) is not nn.Conv2d}
    for name, layer in own.items():
        model.set_submodule(name, _stock(layer))
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def by_acceptance(
    model: nn.Module, names: Iterable[str], config: Callable[[list[str]], Any]
) -> tuple[list[str], list[str]]:
    """The names of the layers that PEFT adapts with the configuration, and of those that it refuses."""
    peft = require("peft", extra="peft")
    accepted, refused = [], []
    for name in names:
        trial = nn.Sequential()
        trial.add_module("layer", copy.deepcopy(model.get_submodule(name)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it cannot merge what it is about to refuse
                peft.get_peft_model(trial, config(["layer"]))
            accepted.append(name)
        except ValueError:
            refused.append(name)
    return accepted, refused


def _stock(layer: nn.Conv2d) -> nn.Module:
    """The same function as a stock convolution on the same parameters, behind a padding where the layer has one."""
    stock = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        tuple(layer.stride),  # type: ignore[arg-type]
        groups=layer.groups,
        bias=layer.bias is not None,
    )
    stock.weight, stock.bias = layer.weight, layer.bias
    padding = getattr(layer, "static_padding", None)
    return nn.Sequential(padding, stock) if isinstance(padding, nn.ZeroPad2d) else stock


# Each learning rate is the best on the digits' validation images, at seed 0, of 1, 3 and 10 times a power of ten.
HEAD_ONLY = Method("head only", 1e-2, head_only)
FLORA = Method("FLoRA", 3e-3, flora_tucker)
LORA = Method("LoRA", 3e-3, peft_lora)
FULL = Method("full fine-tuning", 3e-4, full)
