"""SURM's matrices, RLRR's rescaling and LoRA on a Linear: flora beside the same in plain PyTorch, as the authors do."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flora
from flora.bench.case import Case, Layer
from flora.bench.peers import FROZEN, LORA, AbsentError, Peer, peers

CONFIGS: dict[str, Callable[[Layer], flora.DeltaConfig]] = {
    "circulant": lambda layer: flora.CirculantConfig(),
    "Toeplitz": lambda layer: flora.ToeplitzConfig(),
    "LDR": lambda layer: flora.LDRConfig(),
    "Kronecker": lambda layer: flora.KroneckerConfig(rank=_kronecker_rank(layer)),
    "rescale": lambda layer: flora.RescaleConfig(),
}


def _kronecker_rank(layer: Layer) -> int:
    """32, or what of it divides both extents of the weight as a matrix."""
    return math.gcd(32, len(layer.weight), layer.weight[0].numel())


def named(method: str) -> str:
    """The peer that is flora with a method."""
    return f"flora, {method}"


def method_peers(case: Case) -> dict[str, Peer]:
    """The frozen layer first; PEFT's C3A and LoRA are those of `flora.bench.peers`."""
    there = peers(case)
    plain: dict[str, Callable[[Layer], nn.Module]] = {
        "circulant": Circulant,
        "Toeplitz": Toeplitz,
        "Kronecker": Kronecker,
        "rescale": Rescaled,
    }
    found = {name: there[name] for name in (FROZEN, "full fine-tuning", LORA, "PEFT C3A")}
    for method, config in CONFIGS.items():
        if method in plain:
            found[f"{method}, plain PyTorch"] = Peer(_on_linear(plain[method]))
        found[named(method)] = Peer(lambda layer, case, config=config: flora.wrap(layer, config(layer)))  # type: ignore[misc]
    return found


def _on_linear(make: Callable[[Layer], nn.Module]) -> Callable[[Layer, Case], nn.Module]:
    def made(layer: Layer, case: Case) -> nn.Module:
        if not isinstance(layer, nn.Linear) or layer.in_features != layer.out_features:
            raise AbsentError("has square Linear only")
        return make(layer)

    return made


class Beside(nn.Module):
    """A layer and what is computed beside it, with parameters that are drawn."""

    def __init__(self, layer: Layer, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(0.01 * torch.randn(shape, dtype=layer.weight.dtype)))


class Circulant(Beside):
    """C(a ⊙ b)·x by the Fourier transform, beside the layer."""

    a: Tensor
    b: Tensor

    def __init__(self, layer: Layer) -> None:
        n = layer.weight.shape[0]
        super().__init__(layer, a=(n,), b=(n,))

    def forward(self, x: Tensor) -> Tensor:
        update = torch.fft.irfft(torch.fft.rfft(self.a * self.b) * torch.fft.rfft(x), x.shape[-1])
        return self.layer(x) + update  # type: ignore[no-any-return]


class Toeplitz(Beside):
    """T(b)·T(a)·x, each by the transform of a circulant matrix of twice the size that it is a corner of."""

    a: Tensor
    b: Tensor

    def __init__(self, layer: Layer) -> None:
        n = layer.weight.shape[0]
        super().__init__(layer, a=(n,), b=(n,))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self._multiply(self.b, self._multiply(self.a, x))  # type: ignore[no-any-return]

    def _multiply(self, v: Tensor, x: Tensor) -> Tensor:
        n = x.shape[-1]
        circulant = torch.cat([v, v[:1], v[1:].flip(0)])
        y: Tensor = torch.fft.irfft(torch.fft.rfft(circulant) * torch.fft.rfft(x, 2 * n), 2 * n)[..., :n]
        return y


class Kronecker(Beside):
    """ΔW = B ⊗ A is built in every forward, and the layer run a second time with it."""

    a: Tensor
    b: Tensor

    def __init__(self, layer: Layer) -> None:
        d_out, d_in = layer.weight.shape
        r = _kronecker_rank(layer)
        super().__init__(layer, a=(r, d_in // r), b=(d_out // r, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(x, torch.kron(self.b, self.a))  # type: ignore[no-any-return]


class Rescaled(Beside):
    """W' = W + W ⊙ (row·column) is built in every forward, and the layer run with it."""

    row: Tensor
    column: Tensor
    shift: Tensor

    def __init__(self, layer: Layer) -> None:
        d_out, d_in = layer.weight.shape
        super().__init__(layer, row=(d_out, 1), column=(1, d_in), shift=(d_out,))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight * self.column * self.row + self.layer.weight
        return F.linear(x, weight, self.shift if self.layer.bias is None else self.layer.bias + self.shift)
