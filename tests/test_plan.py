"""The cost model behind plan="auto": what it must prefer whatever the machine."""

import itertools

import pytest
import torch
from torch import nn

import flora
from flora.plan import DROPPING, NO_HYBRID, choose_plan, plan_costs

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


@pytest.mark.parametrize(
    ("dtype", "dropout", "width", "rank", "cheapest", "expected"),
    [
        (torch.bfloat16, 0.0, 128, 32, "hybrid", "merged"),
        (torch.float32, 0.1, 512, 64, "hybrid", "fused"),
        (torch.float32, 0.1, 64, 8, "merged", "fused"),
    ],
)
def test_auto_takes_the_cheapest_of_the_possible_plans(dtype, dropout, width, rank, cheapest, expected):
    """The next one after an impossible plan is not always fused, nor is separate as cheap as merged."""
    base = nn.Linear(width, width, dtype=dtype)
    delta = flora.wrap(base, flora.TuckerConfig(rank=rank, dropout=dropout)).deltas["default"]
    op, x = flora.kinds.kind_of(base).op(base), torch.empty(1000, width, dtype=dtype)
    call = delta.tucker.form.plan_call(op, x, base.weight, delta.tucker.tensors, True)
    costs = plan_costs(*call)
    assert choose_plan(*call) == cheapest
    assert delta.plan(op, x, base.weight) == expected
    assert expected == min(DROPPING if dropout else NO_HYBRID, key=costs.__getitem__)


def test_a_depthwise_convolution_with_dropout_is_separate():
    base = nn.Conv2d(96, 96, 7, padding=3, groups=96)
    delta = flora.wrap(base, flora.TuckerConfig(rank=16, dropout=0.1)).deltas["default"]
    assert delta.plan(flora.kinds.kind_of(base).op(base), torch.empty(2, 96, 28, 28), base.weight) == "separate"


def test_hybrid_gives_way_to_the_plan_that_keeps_no_x():
    """Where the input's factor is frozen, also if merged, which keeps x as well, would be cheaper than fused."""
    base = nn.Linear(128, 128)
    delta = flora.wrap(base, flora.TuckerConfig(rank=8, trainable=("core", "out"))).deltas["default"]
    op, x = flora.kinds.kind_of(base).op(base), torch.empty(1000, 128)
    costs = plan_costs(*delta.tucker.form.plan_call(op, x, base.weight, delta.tucker.tensors, True))
    assert costs["hybrid"] < costs["merged"] < costs["fused"]
    assert delta.plan(op, x, base.weight) == "fused"


def picked(config, base, rows, dtype=torch.float32):
    """What "auto" takes for so many rows (or images of 8 × 8) in training."""
    delta = flora.wrap(base.to(dtype), config).deltas["default"]
    shape = (rows, base.weight.shape[1]) if base.weight.ndim == 2 else (rows, base.weight.shape[1], 8, 8)
    op = flora.kinds.kind_of(base).op(base)
    return delta.plan(op, torch.empty(shape, dtype=dtype), base.weight)


@pytest.mark.parametrize(
    "config",
    [flora.CirculantConfig(), flora.ToeplitzConfig(), flora.LDRConfig(), flora.KroneckerConfig(rank=8)],
    ids=lambda config: config.method,
)
def test_structured_matrices_are_applied_to_few_rows_and_built_for_many(config):
    base = nn.Linear(256, 256)
    assert picked(config, base, 1) == "fused"
    assert picked(config, base, 100_000) == "hybrid"
    assert picked(config, nn.Conv2d(16, 16, 3), 4) == "merged"
    assert picked(config, nn.Linear(256, 256), 1, torch.bfloat16) == "fused"


def test_a_rescaled_weights_gradient_is_formed_only_where_it_has_to_be():
    assert picked(flora.RescaleConfig(), nn.Linear(64, 32), 100) == "hybrid"
    assert picked(flora.RescaleConfig(), nn.Conv2d(4, 4, 3), 2) == "merged"
    assert picked(flora.RescaleConfig(), nn.Linear(64, 32), 100, torch.bfloat16) == "merged"
