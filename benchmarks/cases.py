"""The layers that are measured: rows of ViT-B, of a LLaMA, and of ResNet- and ConvNeXt-like networks.

The numbers beside them are the ratios to the frozen layer that flora should reach, and nowhere else.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from flora.bench.case import Case, conv, linear
from flora.bench.methods import named
from flora.bench.peers import FLORA

_LINEAR = {
    (768, 768, 1576): 1.12,  # ViT-B, batch 8
    (768, 3072, 1576): 1.07,
    (3072, 768, 1576): 1.07,
    (2048, 2048, 512): 1.04,  # a LLaMA's
    (4096, 4096, 512): 1.02,
}
_CONV: list[tuple[dict[str, Any], float, float]] = [  # contiguous, channels_last
    ({"d_in": 64, "d_out": 64, "kernel": (3, 3), "extents": (56, 56)}, 1.30, 1.40),  # ResNet's stages
    ({"d_in": 256, "d_out": 256, "kernel": (3, 3), "extents": (14, 14)}, 1.08, 1.12),
    ({"d_in": 512, "d_out": 512, "kernel": (3, 3), "extents": (7, 7)}, 1.05, 1.10),
    ({"d_in": 96, "d_out": 192, "kernel": (2, 2), "extents": (56, 56), "stride": 2}, 1.30, 1.40),  # ConvNeXt's
    ({"d_in": 96, "d_out": 96, "kernel": (7, 7), "extents": (56, 56), "groups": 96}, 2.0, 2.0),
]
_conv = partial(conv, batch=8)

LAYERS = [
    *(linear(*shape, bounds={FLORA: bound}) for shape, bound in _LINEAR.items()),
    *(_conv(**shape, bounds={FLORA: bound}) for shape, bound, _ in _CONV),
]
CHANNELS_LAST = [_conv(**shape, channels_last=True, bounds={FLORA: bound}) for shape, _, bound in _CONV]
BFLOAT16: list[Case] = [
    linear(768, 3072, 1576, dtype=torch.bfloat16, bounds={FLORA: 1.12}),
    linear(2048, 2048, 512, dtype=torch.bfloat16, bounds={FLORA: 1.06}),
    _conv(**_CONV[0][0], dtype=torch.bfloat16, bounds={FLORA: 1.40}),
    _conv(**_CONV[1][0], dtype=torch.bfloat16, bounds={FLORA: 1.12}),
]
METHODS = [
    linear(
        768,
        768,
        1576,
        bounds={named("circulant"): 1.15, named("Toeplitz"): 1.7, named("Kronecker"): 1.20, named("rescale"): 1.53},
    ),
    linear(
        2048,
        2048,
        512,
        bounds={named("circulant"): 1.08, named("Toeplitz"): 1.3, named("Kronecker"): 1.10, named("rescale"): 1.53},
    ),
]
