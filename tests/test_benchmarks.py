"""The benchmarks compare like with like, say what they leave out, and mark what is too noisy. Nothing here is timed."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flora.bench import peers as all_peers
from flora.bench.case import Case, conv, linear
from flora.bench.peers import FROZEN, AbsentError, build, peers

TUCKER = ("LyCORIS Tucker LoCon", "LyCORIS Tucker LoCon, bypass", "tltorch tucker_conv", "ΔW rebuilt")
TUCKER += ("W + ΔW rebuilt", "factored, plain PyTorch", "flora", "flora, fused", "flora, hybrid", "flora, merged")
SMALL = [
    linear(24, 20, 10),
    conv(18, 20, (3, 3), 2, (9, 8), stride=2),
    conv(20, 20, (3, 3), 2, (6, 6), groups=20, channels_last=True),
    conv(6, 8, (3,), 2, (9,), groups=2),
    conv(4, 6, (2, 3, 3), 1, (4, 5, 6)),
]


def step(module: nn.Module, case: Case) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    x = case.make()[1]
    y = module(x)
    y.backward(torch.ones_like(y))
    return y.detach(), x.grad


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_tucker_peer_is_the_same_function(case: Case) -> None:
    found = {}
    for name in TUCKER:
        try:
            found[name] = step(build(peers(case, plans=True)[name], case), case)
        except AbsentError as absent:
            left_out = absent
            assert name in TUCKER[:3], left_out
    assert len(found) >= 8
    expected = found["ΔW rebuilt"]
    assert not torch.allclose(expected[0], step(build(peers(case)[FROZEN], case), case)[0], atol=1e-3)
    for name, values in found.items():
        for value, other in zip(values, expected, strict=True):
            torch.testing.assert_close(
                value, other, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
