"""What is compared: each method makes a network trainable, with a given number of parameters in its deltas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import flora
from flora.config import DeltaConfig
from flora.state import adapted_layers
from flora.study import peft_methods
from flora.study.networks import Network
from flora.study.plan import SHARE
from flora.targets import select

Options = Mapping[str, Any]
"""What differs from a method's defaults: fields of its configuration, and those of `OWN_OPTIONS`."""

OWN_OPTIONS = {
    "alpha_rule": '"rank" or "sqrt": ΔW times alpha / r or alpha / √r, with the alpha that makes it 1 at `SHARE`',
    "core_lr": "the core's learning rate, as a multiple of the others'",
    "batch_norm": '"moving": its statistics learn, too; otherwise they are held',
    "gain": '"matched": the scale is such that the first step moves ΔW as far as the authors\' start does',
    "draw": '"unit": factors N(0, 1/r) and not the authors\' N(0, 1/(2r))',
}


@dataclass(frozen=True)
class Prepared:
    """A network that is ready to learn. ``deltas`` counts their parameters, ``config`` says what they are."""

    model: nn.Module
    deltas: int
    config: str
    updates: Callable[[], dict[str, Tensor]]
    """s·ΔW by layer, in the weight's own shape, after learning."""


@dataclass(frozen=True)
class Method:
    """A name for tables, and for flora's own a configuration; others say by ``kind`` how they are prepared."""

    name: str
    title: str
    kind: str = "flora"  # "head" | "full" | "flora" | "peft"
    config: Callable[[], DeltaConfig] = flora.TuckerConfig
    sized: bool = True  # whether it has a rank or the like; otherwise it has the parameters that it has
    peft: str = ""

    @property
    def with_budget(self) -> bool:
        """Whether a number of parameters is asked of it."""
        return self.kind in ("flora", "peft")

    def prepare(self, model: nn.Module, network: Network, share: float | None, options: Options) -> Prepared:
        """Makes the model learn as the method does; its deltas get ``share`` of the adapted weights as parameters."""
        if self.kind == "head":
            model.requires_grad_(False).get_submodule(network.head).requires_grad_(True)
            return Prepared(model, 0, "", dict)
        if self.kind == "full":
            return _full(model.requires_grad_(True), network)
        assert share is not None
        budget = round(share * adapted_weights(model, network))
        if self.kind == "peft":
            names = list(targets(model, network))
            made, deltas, said = peft_methods.prepare(model, names, network.head, self.peft, budget)
            return Prepared(made, deltas, said, dict)
        config = self.sized_config(model, network, budget, options)
        flora.adapt(model, config)
        if options.get("draw") == "unit":
            _redraw(model, math.sqrt(2))
        if options.get("gain") == "matched":
            match_gain(model)
        deltas = sum(p.numel() for layer in adapted_layers(model).values() for p in _learning(layer.deltas))
        return Prepared(model, deltas, repr(config), lambda: _updates(model))

    def sized_config(self, model: nn.Module, network: Network, budget: int, options: Options) -> DeltaConfig:
        """The configuration with as many parameters as the budget has, or a few less."""
        fields = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
        base = replace(self.config(), exclude_modules=network.exclude, modules_to_save=[network.head], **fields)
        if "alpha_rule" in options:
            middle = flora.budget(model, base, round(SHARE * adapted_weights(model, network)))
            rank = float(middle.rank)  # type: ignore[attr-defined]
            stable = options["alpha_rule"] == "sqrt"
            base = replace(base, alpha=math.sqrt(rank) if stable else rank, rank_stabilized=stable)  # type: ignore[call-arg]
        return flora.budget(model, base, budget) if self.sized else base


METHODS = {
    method.name: method
    for method in (
        Method("head", "head only", kind="head"),
        Method("full", "full fine-tuning", kind="full"),
        Method("lora", "LoRA", config=flora.LoRAConfig),
        Method("locon", "LoCon (Tucker-2)", config=lambda: flora.LoRAConfig(tucker=True)),
        Method("flora", "FLoRA"),
        Method("flora-fixed", "FLoRA, factors fixed", config=lambda: flora.TuckerConfig(trainable="core")),
        Method("circulant", "circulant", config=flora.CirculantConfig, sized=False),
        Method("toeplitz", "Toeplitz", config=flora.ToeplitzConfig, sized=False),
        Method("ldr", "low displacement rank", config=flora.LDRConfig),
        Method("kronecker", "Kronecker", config=flora.KroneckerConfig),
        Method("rescale", "RLRR", config=flora.RescaleConfig, sized=False),
        Method("peft-lora", "PEFT LoRA", kind="peft", peft="LoraConfig"),
        Method("peft-loha", "PEFT LoHa", kind="peft", peft="LoHaConfig"),
        Method("peft-lokr", "PEFT LoKr", kind="peft", peft="LoKrConfig"),
    )
}


def targets(model: nn.Module, network: Network) -> dict[str, nn.Module]:
    """The layers that every method adapts, by name."""
    config = flora.TuckerConfig(rank=1, exclude_modules=network.exclude, modules_to_save=[network.head])
    return {target.name: target.original for target in select(model, config).layers}


def adapted_weights(model: nn.Module, network: Network) -> int:
    """The entries of all weights that every method adapts: what a budget is a share of."""
    return sum(_weight(layer).numel() for layer in targets(model, network).values())


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _full(model: nn.Module, network: Network) -> Prepared:
    layers = targets(model, network)
    before = {name: _weight(layer).detach().clone() for name, layer in layers.items()}

    def updates() -> dict[str, Tensor]:
        return {name: _weight(layer).detach() - before[name] for name, layer in layers.items()}

    head = sum(p.numel() for p in model.get_submodule(network.head).parameters())
    return Prepared(model, sum(p.numel() for p in model.parameters()) - head, "", updates)


@torch.no_grad()
def _updates(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, layer in adapted_layers(model).items():
        (delta,) = layer.deltas.values()
        if isinstance(delta, flora.WeightDelta):
            found[name] = delta.delta_weight(_weight(layer.base_layer)).detach().contiguous()
    return found


# Starts at equal gain ------------------------------------------------------------------------------------------------


def _tucker_deltas(model: nn.Module) -> list[flora.TuckerDelta]:
    found = [delta for layer in adapted_layers(model).values() for delta in layer.deltas.values()]
    return [delta for delta in found if isinstance(delta, flora.TuckerDelta)]


@torch.no_grad()
def _redraw(model: nn.Module, times: float) -> None:
    for delta in _tucker_deltas(model):
        for factor in delta.factors:
            factor.mul_(times)


@torch.no_grad()
def match_gain(model: nn.Module) -> None:
    """Sets every scale so that a step of the core from 0 changes ΔW by as much as it does from the authors' factors.

    That is by s·Π_m ‖U_m‖_F/√r_m times the core's step, if the factors' columns are about orthogonal. The authors'
    factors, entries N(0, 1/(2r_m)), have ‖U_m‖_F² = dim_m/2.
    """
    for delta in _tucker_deltas(model):
        own = math.prod(float(factor.norm()) for factor in delta.factors)
        theirs = math.prod(math.sqrt(factor.shape[0] / 2) for factor in delta.factors)
        delta.scale *= theirs / own
