"""The authors' own inputs, outputs and gradients (tests/golden/flora_*.npz) through the public layers.

The files keep the authors' order (in, out, k…) in ``core``; flora's is the weight's (out, in, k…).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import flora

FILES = sorted((Path(__file__).parent / "golden").glob("flora_*.npz"))
BOUND = {torch.float64: 1e-10, torch.float32: 2e-5}


def load(path, dtype):
    return {name: torch.tensor(value).to(dtype) for name, value in np.load(path).items()}


def build(arrays, plan, dtype):
    """The authors' layer as an AdaptedLayer, with their numbers."""
    weight, core = arrays["weight"], arrays["core"].transpose(0, 1)
    bias = "bias" in arrays
    if weight.ndim == 2:
        base = nn.Linear(weight.shape[1], weight.shape[0], bias, dtype=dtype)
    else:
        geometry = {k: tuple(int(v) for v in arrays[k]) for k in ("stride", "padding", "dilation")}
        channels = arrays["x"].shape[1]
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.ndim - 3]
        groups = channels // weight.shape[1]
        base = cls(channels, len(weight), weight.shape[2:], bias=bias, groups=groups, dtype=dtype, **geometry)
    with torch.no_grad():
        base.weight.copy_(weight)
        if bias:
            base.bias.copy_(arrays["bias"])
    config = flora.TuckerConfig(rank=tuple(core.shape), scale=float(arrays["scale"]), plan=plan)
    layer = flora.wrap(base, config)
    factors = [arrays["u_out"], arrays["u_in"], *(arrays[f"u_k{i}"] for i in range(weight.ndim - 2))]
    delta = layer.deltas["default"]
    delta.load_tensors({"core": core} | {f"factors.{m}": f for m, f in enumerate(factors)})
    return layer, delta


def relative(ours, theirs):
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("plan", ["fused", "hybrid", "merged"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path, plan, layout, dtype, isa):
    arrays = load(path, dtype)
    layer, delta = build(arrays, plan, dtype)
    x = arrays["x"]
    if layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if x.ndim not in formats:
            x = x.mT.contiguous().mT  # rows that are not contiguous
        else:
            x = x.to(memory_format=formats[x.ndim])
            layer.base_layer.to(memory_format=formats[x.ndim])
    x.requires_grad_()
    y = layer(x)
    y.backward(arrays["dy"])

    grads = {"d_core": delta.core.grad.transpose(0, 1)}
    names = ["d_u_out", "d_u_in"] + [f"d_u_k{i}" for i in range(arrays["weight"].ndim - 2)]
    grads |= {name: factor.grad for name, factor in zip(names, delta.factors, strict=True)}
    results = {"y": y, "dx": x.grad, "delta_weight": delta.delta_weight(arrays["weight"]), **grads}
    errors = {name: relative(value, arrays[name]) for name, value in results.items()}
    assert max(errors.values()) < BOUND[dtype], errors


def test_every_golden_file_is_here():
    assert [p.stem for p in FILES] == [
        *("flora_conv2d_1x1", "flora_conv2d_3x3", "flora_conv2d_general", "flora_conv2d_patch"),
        *("flora_conv3d", "flora_linear", "flora_linear_odd"),
    ]
