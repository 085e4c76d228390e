"""Whole training steps, forward and backward: ViT-B/16, ConvNeXtV2-T and a LLaMA-like decoder, with random weights.

Every Linear and every convolution with one group is adapted, at rank 16 and kernel rank 2. The gradient of the input
(of the embeddings for the decoder) is formed throughout, so that the frozen step goes back through all layers too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import flora
from flora.bench.case import KERNEL_RANK, RANK, Case
from flora.bench.compare import Result, compare
from flora.bench.machine import multiplies_bfloat16
from flora.bench.peers import FLORA, FROZEN, AbsentError, Factored, Layer, Rebuilt, tucker

LORA = "PEFT LoRA, Linear only"
CORE_AND_OUT = f"{FLORA}, core and out learn"
NARROW_BASE = f"{FLORA}, bfloat16 base"


class Whole(nn.Module):
    """A network's first output as a function of the one tensor that its gradient goes back to."""

    def __init__(self, model: nn.Module, argument: str, others: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.argument = argument
        self.others = others

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{self.argument: x}, **self.others)[0]


@dataclass(frozen=True)
class Model:
    """A network, its input, and what flora's step may cost against the frozen one's."""

    name: str
    network: Callable[[], nn.Module]
    argument: str
    shape: tuple[int, ...]
    bounds: Mapping[str, float]
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def frozen(self) -> Whole:
        """The network with all parameters frozen; the same values each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Whole(self.network().requires_grad_(False).train(), self.argument, self.others)

    def input(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(3)).requires_grad_()


def vit(**sizes: int) -> nn.Module:
    """ViT-B/16 unless ``sizes`` say otherwise."""
    return transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)


def convnext(**sizes: Any) -> nn.Module:
    """ConvNeXtV2-T unless ``sizes`` say otherwise."""
    return transformers.ConvNextV2Model(transformers.ConvNextV2Config(**sizes))


def llama(**sizes: int) -> nn.Module:
    """A decoder of 6 layers of 1024 with its output layer and its loss, unless ``sizes`` say otherwise."""
    decoder = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16}
    config = transformers.LlamaConfig(**{**decoder, "vocab_size": 8000, "use_cache": False, **sizes})
    return transformers.LlamaForCausalLM(config)


_TOKENS = {"labels": torch.arange(512)[None]}
MODELS = [
    Model("ViT-B/16, batch 4", vit, "pixel_values", (4, 3, 224, 224), {FLORA: 1.12}),
    Model("ConvNeXtV2-T, batch 4", convnext, "pixel_values", (4, 3, 224, 224), {FLORA: 1.15}),
    Model("LLaMA-like, 512 tokens", llama, "inputs_embeds", (1, 512, 1024), {FLORA: 1.06}, _TOKENS),
]


def served(name: str, module: nn.Module) -> bool:
    """Whether a module is among those that are adapted."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def makers(model: Model) -> dict[str, Callable[[], nn.Module]]:
    """What is compared on a network, by name. It is made once and copied, as its first values take seconds to draw."""
    made = cache(model.frozen)

    def frozen() -> Whole:
        return copy.deepcopy(made())

    return {
        FROZEN: made,
        LORA: lambda: _lora(frozen()),
        "ΔW rebuilt": lambda: _each(frozen(), Rebuilt),
        "factored, plain PyTorch": lambda: _each(frozen(), Factored),
        FLORA: lambda: _flora(frozen()),
        CORE_AND_OUT: lambda: _flora(frozen(), trainable=("core", "out")),
        NARROW_BASE: lambda: _flora(frozen(), base=torch.bfloat16),
    }


def measure(model: Model, *, rounds: int, attempts: int) -> Result:
    """All of `makers` on one network. The step on a bfloat16 base is held against the frozen step in float32."""
    bounds = dict(model.bounds)
    if multiplies_bfloat16():
        bounds[NARROW_BASE] = 0.65
    saved = {FLORA: (LORA, 1.0), CORE_AND_OUT: (FROZEN, 1.03)}
    return compare(
        model.name, makers(model), model.input(), rounds=rounds, attempts=attempts, bounds=bounds, saved_bounds=saved
    )


def _lora(network: Whole) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise AbsentError("peft is not installed") from None
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, target_modules=names), network)
    return _drawn(network)


def _each(network: Whole, adapter: Callable[[Layer, Tensor, list[Tensor]], nn.Module]) -> nn.Module:
    for name, module in [*network.named_modules()]:
        if served(name, module):
            parent, _, own = name.rpartition(".")
            case = Case(name, lambda: module, ())  # noqa: B023
            setattr(network.get_submodule(parent), own, adapter(module, *tucker(module, case)))
    return network


def _flora(network: Whole, base: torch.dtype | None = None, **options: Any) -> nn.Module:
    config = flora.TuckerConfig(rank=RANK, kernel_rank=KERNEL_RANK, target_modules=served, **options)
    flora.adapt(network, config, **({} if base is None else {"base_dtype": base}))
    return _drawn(network)


def _drawn(network: nn.Module) -> nn.Module:
    """What learns and starts at zero is drawn, as after some training."""
    drawn = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=1e-3, generator=drawn)
    return network
