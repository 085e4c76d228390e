"""The authors' own inputs, outputs and gradients (tests/golden/) through the public layers.

FLoRA's files keep the authors' order (in, out, k…) in ``core``; flora's is the weight's (out, in, k…).
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import flora

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("flora_*.npz"))
BOUND = {torch.float64: 1e-10, torch.float32: 2e-5}


def load(path, dtype, without=()):
    return {name: torch.tensor(value).to(dtype) for name, value in np.load(path).items() if name not in without}


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


# SURM and RLRR: the configuration, the delta's parameters, the authors' names for them
LINEAR = {
    "surm_circulant_linear": (flora.CirculantConfig(), {"a": "circulant_a", "b": "circulant_b"}),
    "surm_toeplitz_linear": (flora.ToeplitzConfig(), {"a": "toeplitz_a", "b": "toeplitz_b"}),
    "surm_kronecker_linear": (flora.KroneckerConfig(rank=4), {"a": "kronecker_a", "b": "kronecker_b"}),
    "surm_ldr_linear": (
        flora.LDRConfig(),
        {"circulant": ("circulant_0", "circulant_1"), "skew": ("skew_0", "skew_1")},
    ),
    "rlrr_linear": (flora.RescaleConfig(), {"row": "row", "column": "col", "shift": "shift"}),
    "rlrr_linear_odd": (flora.RescaleConfig(), {"row": "row", "column": "col", "shift": "shift"}),
}


def build_linear(name, plan, dtype):
    """One of these layers with the authors' numbers, and what gives their arrays of a parameter's name."""
    arrays = load(GOLDEN / f"{name}.npz", dtype)
    config, names = LINEAR[name]
    scale = float(arrays.get("scale", 1.0))
    base = nn.Linear(*arrays["weight"].shape[::-1], dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(arrays["weight"])
        base.bias.copy_(arrays["bias"])
    layer = flora.wrap(base, replace(config, scale=scale, plan=plan))
    delta = layer.deltas["default"]

    def theirs(own, prefix=""):
        of_terms = isinstance(names[own], tuple)
        return torch.stack([arrays[prefix + n] for n in names[own]]) if of_terms else arrays[prefix + names[own]]

    delta.load_tensors({own: theirs(own).reshape(t.shape) for own, t in delta.named_parameters()})
    return arrays, layer, delta, theirs


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("plan", ["auto", "fused", "hybrid", "merged"])
@pytest.mark.parametrize("name", LINEAR)
def test_golden_of_structured_and_rescaled_linears(name, plan, dtype, isa):
    arrays, layer, delta, theirs = build_linear(name, plan, dtype)
    x = arrays["x"].requires_grad_()
    y = layer(x)
    y.backward(arrays["dy"])

    errors = {"y": relative(y, arrays["y"]), "dx": relative(x.grad, arrays["dx"])}
    for own, parameter in delta.named_parameters():
        errors[own] = relative(parameter.grad, theirs(own, "d_").reshape(parameter.shape))
    assert max(errors.values()) < BOUND[dtype], errors


BLOCKS = {  # the authors' names of a, b and bias
    "circulant": flora.StructuredAdapterConfig(kind="circulant"),
    "toeplitz": flora.StructuredAdapterConfig(kind="toeplitz"),
    "kronecker": flora.StructuredAdapterConfig(kind="kronecker", rank=4),
}


class Same(nn.Module):
    """What the block comes after: its output is its input."""

    hidden_size = 16

    def forward(self, x):
        return x


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_golden_of_structured_adapters(kind, dtype, isa):
    arrays = load(GOLDEN / f"surm_{kind}_adapter.npz", dtype, without=("activation",))
    names = {"a": f"{kind}_A", "b": f"{kind}_B", "bias": f"{kind}_bias"}
    theirs = {own: f"adapter_down__0__{name}" for own, name in names.items()}
    layer = flora.wrap(Same().to(dtype), BLOCKS[kind])
    delta = layer.deltas["default"].to(dtype)
    delta.load_tensors({own: arrays[name] for own, name in theirs.items()})
    x = arrays["x"].requires_grad_()
    y = layer(x)
    y.backward(arrays["dy"])

    errors = {"y": relative(y, arrays["y"]), "dx": relative(x.grad, arrays["dx"])}
    errors |= {own: relative(getattr(delta, own).grad, arrays[f"d_{name}"]) for own, name in theirs.items()}
    assert max(errors.values()) < BOUND[dtype], errors


def test_every_golden_file_is_here():
    assert [p.stem for p in FILES] == [
        *("flora_conv2d_1x1", "flora_conv2d_3x3", "flora_conv2d_general", "flora_conv2d_patch"),
        *("flora_conv3d", "flora_linear", "flora_linear_odd"),
    ]
