"""The cost model behind plan="auto": what it must prefer whatever the machine."""

import itertools

import pytest
import torch
from torch import nn

import flora
from flora.plan import choose_plan

FLOAT = 4


def test_a_depthwise_convolution_is_merged():
    for channels, side, kernel in [(96, 56, 7), (768, 7, 7), (32, 112, 3)]:
        shape, ranks = (channels, 1, kernel, kernel), (16, 1, 2, 2)
        assert choose_plan(shape, ranks, channels, 8 * side**2, 8 * side**2, FLOAT, True) == "merged"


def test_a_wide_layer_on_few_rows_is_never_rebuilt():
    for rows in (1, 16, 64):
        for grad in (True, False):
            assert choose_plan((4096, 4096), (16, 16), 1, rows, rows, FLOAT, grad) == "fused"
    assert choose_plan((512, 512, 3, 3), (16, 16, 2, 2), 1, 49, 49, FLOAT, True) == "fused"


def test_a_tiny_weight_on_many_rows_is_not_fused():
    assert choose_plan((16, 16), (8, 8), 1, 10**5, 10**5, FLOAT, True) != "fused"


def test_cost_grows_so_that_a_choice_changes_at_most_once_with_the_rows():
    choices = [choose_plan((768, 768), (16, 16), 1, n, n, FLOAT, False) for n in (2**p for p in range(20))]
    changes = sum(a != b for a, b in itertools.pairwise(choices))
    assert choices[0] == "fused" and changes <= 1


@pytest.mark.parametrize("plan", ["fused", "hybrid", "merged"])
def test_a_plan_that_is_asked_for_is_taken(plan):
    base = nn.Linear(8, 8)
    layer = flora.wrap(base, flora.TuckerConfig(rank=2, plan=plan))
    op = flora.kinds.kind_of(base).op(base)
    delta = layer.deltas["default"]
    assert delta.plan(op, torch.ones(3, 8), base.weight) == plan
    half = {"fused": "fused", "hybrid": "fused", "merged": "merged"}[plan]
    assert delta.plan(op, torch.ones(3, 8).bfloat16(), base.weight.bfloat16()) == half
