"""What is measured on a layer: each peer takes a frozen layer and returns the module that is timed.

All have the case's rank. Those that are Tucker deltas hold the same one, so that they are the same function (LyCORIS
keeps the core's kernel modes expanded). What another peer starts at zero is drawn, as after some training.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flora
from flora import reference
from flora.bench.case import Case, Layer

FROZEN = "frozen"
FLORA = "flora"
LORA = "PEFT LoRA"

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class AbsentError(Exception):
    """The peer is not installed, or does not serve the layer; the message says which, and why."""


@dataclass(frozen=True)
class Peer:
    """``make`` puts an adapter on a frozen layer; ``package`` is what it imports for that."""

    make: Callable[[Layer, Case], nn.Module]
    package: str | None = None


def peers(case: Case, *, plans: bool = False) -> dict[str, Peer]:
    """The peers of a case by name, the frozen layer first; with ``plans`` also flora's plans, each by itself."""
    narrow = {f"{LORA}, bfloat16 adapter": _peft("LoraConfig", autocast_adapter_dtype=False)}
    fixed = {f"{FLORA}, {plan}": _flora(plan) for plan in ("fused", "hybrid", "merged")}
    return {
        FROZEN: Peer(lambda layer, case: layer),
        "full fine-tuning": Peer(lambda layer, case: layer.requires_grad_(True)),
        LORA: _peft("LoraConfig"),
        **(narrow if case.dtype == torch.bfloat16 else {}),
        "PEFT LoHa": _peft("LoHaConfig"),
        "PEFT LoKr": _peft("LoKrConfig"),
        "PEFT C3A": Peer(_c3a, "peft"),
        "LyCORIS Tucker LoCon": _lycoris(bypass=False),
        "LyCORIS Tucker LoCon, bypass": _lycoris(bypass=True),
        "tltorch tucker_conv": Peer(_tltorch, "tltorch"),
        "ΔW rebuilt": Peer(lambda layer, case: Rebuilt(layer, *tucker(layer, case))),
        "W + ΔW rebuilt": Peer(lambda layer, case: Summed(layer, *tucker(layer, case))),
        "factored, plain PyTorch": Peer(lambda layer, case: Factored(layer, *tucker(layer, case))),
        FLORA: _flora("auto"),
        **(fixed if plans else {}),
    }


def build(peer: Peer, case: Case) -> nn.Module:
    """The peer on the case's layer, proved by one step. Raises `AbsentError` if it is another's and does not work."""
    if peer.package is not None and importlib.util.find_spec(peer.package) is None:
        raise AbsentError(f"{peer.package} is not installed")
    layer, x = case.make()
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(1)
        warnings.simplefilter("ignore")
        try:
            module = peer.make(layer, case)
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.requires_grad and not parameter.any():
                        parameter.normal_(std=1e-3)
            module(x).sum().backward()
        except Exception as error:
            if peer.package is None or isinstance(error, AbsentError):
                raise
            raise AbsentError(f"refuses: {' '.join(str(error).split())}") from error
    for parameter in module.parameters():
        parameter.grad = None
    return module


# Tucker deltas -------------------------------------------------------------------------------------------------------


def tucker(layer: Layer, case: Case) -> tuple[Tensor, list[Tensor]]:
    """The core and the factors, in weight order and in float32, that every Tucker peer of a case holds."""
    shape = layer.weight.shape
    ranks = case.config().ranks(shape)
    drawn = torch.Generator().manual_seed(2)
    core = torch.randn(ranks, generator=drawn) * 0.1 / math.sqrt(math.prod(ranks))
    return core, [torch.randn(dim, rank, generator=drawn) for dim, rank in zip(shape, ranks, strict=True)]


class Plain(nn.Module):
    """A Tucker delta beside a layer, in plain PyTorch operations and the layer's dtype."""

    def __init__(self, layer: Layer, core: Tensor, factors: list[Tensor]) -> None:
        super().__init__()
        dtype = layer.weight.dtype
        self.layer = layer
        self.core = nn.Parameter(core.to(dtype))
        self.factors = nn.ParameterList(factor.to(dtype) for factor in factors)

    @property
    def weight(self) -> Tensor:
        """The frozen layer's, since networks look at its dtype."""
        return self.layer.weight


class Rebuilt(Plain):
    """ΔW is rebuilt in every forward and the layer run a second time with it: what FLoRA's authors do."""

    def forward(self, x: Tensor) -> Tensor:
        delta = reference.reconstruct(self.core, list(self.factors), 1.0)
        return self.layer(x) + self._run(x, delta, None)  # type: ignore[no-any-return]

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        conv: Callable[..., Tensor] = _CONV[weight.ndim - 2]
        return conv(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


class Summed(Rebuilt):
    """ΔW is rebuilt in every forward and added to the weight, with which the layer runs once."""

    def forward(self, x: Tensor) -> Tensor:
        delta = reference.reconstruct(self.core, list(self.factors), 1.0)
        return self._run(x, self.layer.weight + delta, self.layer.bias)


class Factored(Plain):
    """flora's algebra in plain PyTorch operations: ΔW is never built."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        u_out, u_in, *kernel = self.factors
        if isinstance(layer, nn.Linear):
            return layer(x) + reference.linear_update(x, u_in, self.core, u_out, 1.0)  # type: ignore[no-any-return]
        conv: Callable[..., Tensor] = _CONV[len(kernel)]
        groups, ones = layer.groups, (1,) * len(kernel)
        core = reference.reconstruct(self.core, [None, None, *kernel], 1.0)
        h = conv(x, u_in.mT.repeat(groups, 1).unflatten(1, (-1, *ones)), groups=groups)
        repeated = core.repeat(groups, *(1,) * (core.ndim - 1))
        k = conv(h, repeated, None, layer.stride, layer.padding, layer.dilation, groups)
        return layer(x) + conv(k, u_out.unflatten(1, (-1, *ones)), groups=groups)  # type: ignore[no-any-return]


def _flora(plan: str) -> Peer:
    def make(layer: Layer, case: Case) -> nn.Module:
        wrapped = flora.wrap(layer, case.config(plan))
        core, factors = tucker(layer, case)
        tensors = {"core": core, **{f"factors.{i}": factor for i, factor in enumerate(factors)}}
        wrapped.deltas["default"].load_tensors(tensors)  # type: ignore[operator]
        return wrapped

    return Peer(make)


# Others --------------------------------------------------------------------------------------------------------------


def _peft(config: str, **options: Any) -> Peer:
    def make(layer: Layer, case: Case) -> nn.Module:
        peft = importlib.import_module("peft")
        configured = getattr(peft, config)(r=case.rank, target_modules=["0"])
        module: nn.Module = peft.get_peft_model(nn.Sequential(layer), configured, **options).base_model.model[0]
        return module

    return Peer(make, "peft")


def _c3a(layer: Layer, case: Case) -> nn.Module:
    """With blocks of the size that comes closest to as many parameters as LoRA has."""
    if not isinstance(layer, nn.Linear):
        raise AbsentError("has Linear only")
    d_out, d_in = layer.weight.shape
    wanted = d_out * d_in / (case.rank * (d_out + d_in))
    common = math.gcd(d_out, d_in)
    size = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(math.log(n / wanted)))
    peft = importlib.import_module("peft")
    configured = peft.C3AConfig(block_size=size, target_modules=["0"])
    module: nn.Module = peft.get_peft_model(nn.Sequential(layer), configured).base_model.model[0]
    return module


def _lycoris(bypass: bool) -> Peer:
    def make(layer: Layer, case: Case) -> nn.Module:
        locon = importlib.import_module("lycoris.modules.locon").LoConModule
        options = {"lora_dim": case.rank, "alpha": case.rank, "use_tucker": True, "bypass_mode": bypass}
        adapter = locon("delta", layer, **options)
        if bypass and not adapter.bypass_mode:
            raise AbsentError("refuses: bypass_mode is switched off for a grouped convolution")
        core, (u_out, u_in, *kernel) = tucker(layer, case)
        values = {"lora_up": u_out, "lora_down": u_in.mT}
        if kernel:
            values["lora_mid"] = reference.reconstruct(core, [None, None, *kernel], 1.0)
        else:
            values["lora_up"] = u_out @ core
        with torch.no_grad():
            for name, value in values.items():  # it has the same rank in both modes, even where a mode is smaller
                weight = getattr(adapter, name).weight.zero_()
                weight[tuple(map(slice, value.shape))] = value.reshape(*value.shape, *(1,) * (weight.ndim - value.ndim))
        return _Lycoris(layer, adapter)

    return Peer(make, "lycoris")


class _Lycoris(nn.Module):
    """LyCORIS takes the layer's forward over; here it keeps its own, and the adapter calls that."""

    def __init__(self, layer: Layer, adapter: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x)  # type: ignore[no-any-return]


class _Tltorch(nn.Module):
    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, tensor: nn.Module, tucker_conv: Any) -> None:
        super().__init__()
        self.layer = layer
        self.tensor = tensor
        self._conv = tucker_conv

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        delta = self._conv(x, self.tensor, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
        return layer(x) + delta  # type: ignore[no-any-return]


def _tltorch(layer: Layer, case: Case) -> nn.Module:
    if isinstance(layer, nn.Linear):
        raise AbsentError("has no Linear")
    if layer.groups != 1:
        raise AbsentError("has no groups")
    tltorch = importlib.import_module("tltorch")
    core, factors = tucker(layer, case)
    dtype = layer.weight.dtype
    tensor = tltorch.TuckerTensor(
        nn.Parameter(core.to(dtype)),
        nn.ParameterList(factor.to(dtype) for factor in factors),
        shape=tuple(layer.weight.shape),
        rank=tuple(core.shape),
    )
    return _Tltorch(layer, tensor, importlib.import_module("tltorch.functional.convolution").tucker_conv)
