"""The layers that are measured: rows of ViT-B, of a LLaMA and of ResNet- and ConvNeXt-like networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RANK = 16
KERNEL_RANK = 2


@dataclass(frozen=True)
class Case:
    """A layer, the shape of its input, and whether a 4-D input is channels_last."""

    name: str
    layer: Callable[[], nn.Linear | nn.Conv2d]
    shape: tuple[int, ...]
    channels_last: bool = False

    def make(self) -> tuple[nn.Linear | nn.Conv2d, Tensor]:
        """The layer, frozen, and an input that requires a gradient; the same values each time."""
        torch.manual_seed(0)
        layer, x = self.layer().requires_grad_(False), torch.randn(self.shape)
        if self.channels_last:
            layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        return layer, x.requires_grad_()


_LINEAR = [
    Case("Linear 768→768, 1576 rows", lambda: nn.Linear(768, 768), (1576, 768)),
    Case("Linear 768→3072, 1576 rows", lambda: nn.Linear(768, 3072), (1576, 768)),
    Case("Linear 2048→2048, 512 rows", lambda: nn.Linear(2048, 2048), (512, 2048)),
]
_CONV: list[tuple[str, Callable[[], nn.Conv2d], tuple[int, ...]]] = [
    ("Conv 64→64 3×3, 8×56×56", lambda: nn.Conv2d(64, 64, 3, padding=1), (8, 64, 56, 56)),
    ("Conv 256→256 3×3, 8×14×14", lambda: nn.Conv2d(256, 256, 3, padding=1), (8, 256, 14, 14)),
    ("Conv 96→192 2×2 stride 2, 8×56×56", lambda: nn.Conv2d(96, 192, 2, stride=2), (8, 96, 56, 56)),
    ("depthwise 96 7×7, 8×56×56", lambda: nn.Conv2d(96, 96, 7, padding=3, groups=96), (8, 96, 56, 56)),
]
CASES = [
    *_LINEAR,
    *(Case(name, layer, shape) for name, layer, shape in _CONV),
    *(Case(f"{name}, channels_last", layer, shape, channels_last=True) for name, layer, shape in _CONV),
]
