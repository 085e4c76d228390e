"""A layer with its input, as it is measured, and the least that an adapter on it can cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

import flora

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

RANK = 16
KERNEL_RANK = 2

_CONV: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FORMAT = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """A layer, the shape and layout of its input, the ranks of what is put on it, and what that may cost.

    ``bounds`` holds, for some peers, the greatest ratio to the frozen layer that they should have.
    """

    name: str
    layer: Callable[[], Layer]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    rank: int = RANK
    kernel_rank: int = KERNEL_RANK
    bounds: Mapping[str, float] = field(default_factory=dict)

    def make(self) -> tuple[Layer, Tensor]:
        """The layer, frozen, and an input that requires a gradient; the same values each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer, x = self.layer().requires_grad_(False).to(self.dtype), torch.randn(self.shape, dtype=self.dtype)
        if self.channels_last:
            layer = layer.to(memory_format=_FORMAT[x.ndim])  # type: ignore[call-overload]
            x = x.to(memory_format=_FORMAT[x.ndim])
        return layer, x.requires_grad_()

    def config(self, plan: str = "auto") -> flora.TuckerConfig:
        """flora's configuration with the case's ranks."""
        return flora.TuckerConfig(rank=self.rank, kernel_rank=self.kernel_rank, plan=plan)

    def limit(self, frozen_seconds: float, gemm_speed: float) -> float:
        """The ratio to the frozen layer at which nothing but the adapter's arithmetic is left, by the cheapest plan.

        Products run at ``gemm_speed`` (operations a second, measured on the same machine); what is a grouped
        convolution, which no matrix product does, runs at the speed of the frozen layer itself.
        """
        layer, x = self.make()
        with torch.no_grad():
            y = layer(x)
        weight = layer.weight
        d_out, width, *kernel = weight.shape
        groups = getattr(layer, "groups", 1)
        ranks = self.config().ranks(weight.shape)
        r_out, r_in, taps = ranks[0], ranks[1], prod(kernel)
        pixels_out = y.numel() // d_out
        whole = 2 * pixels_out * weight.numel()
        project, expand = 2 * x.numel() * r_in, 2 * y.numel() * r_out
        convolve = 2 * pixels_out * groups * r_in * r_out * taps
        build = 2 * r_out * (weight.numel() + r_in * width * taps)
        plans = {  # (products, convolutions); forward, gradients of all factors, and that of the input
            "fused": (3 * (project + expand), 4 * convolve),
            "hybrid": (2 * build + 2 * (project + expand), 3 * convolve),
            "merged": (4 * build, whole),
        }
        own_speed = gemm_speed if groups == 1 else 2 * whole / frozen_seconds
        least: float = min(p / gemm_speed + c / own_speed for p, c in plans.values())
        return 1 + least / frozen_seconds


def linear(
    d_in: int,
    d_out: int,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    rank: int = RANK,
    bounds: Mapping[str, float] | None = None,
) -> Case:
    """A Linear on (rows, d_in)."""
    name = f"Linear {d_in}→{d_out}, {rows} {'row' if rows == 1 else 'rows'}{_suffix(dtype, False)}"
    return Case(name, lambda: nn.Linear(d_in, d_out), (rows, d_in), dtype, rank=rank, bounds=bounds or {})


def conv(
    d_in: int,
    d_out: int,
    kernel: Sequence[int],
    batch: int,
    extents: Sequence[int],
    *,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    rank: int = RANK,
    kernel_rank: int = KERNEL_RANK,
    bounds: Mapping[str, float] | None = None,
) -> Case:
    """A convolution on (batch, d_in, *extents); ``padding=None`` pads odd kernels to keep the extents."""
    pads = tuple(k // 2 * (k % 2) for k in kernel) if padding is None else (padding,) * len(kernel)
    kind = f"depthwise {d_in}" if groups == d_in == d_out else f"Conv {d_in}→{d_out}"
    by = "×".join(map(str, kernel))
    name = f"{kind} {by}{f' stride {stride}' if stride > 1 else ''}"
    name += f"{f' in {groups} groups' if groups > 1 and kind.startswith('Conv') else ''}, "
    name += "×".join(map(str, (batch, *extents))) + _suffix(dtype, channels_last)

    def layer() -> Layer:
        return _CONV[len(kernel)](
            d_in,
            d_out,
            tuple(kernel),  # type: ignore[arg-type]
            stride=stride,
            padding=pads,  # type: ignore[arg-type]
            groups=groups,
        )

    shape = (batch, d_in, *extents)
    return Case(name, layer, shape, dtype, channels_last, rank, kernel_rank, bounds or {})


def _suffix(dtype: torch.dtype, channels_last: bool) -> str:
    layout = ", channels_last" if channels_last else ""
    return layout if dtype == torch.float32 else f"{layout}, {str(dtype).removeprefix('torch.')}"
