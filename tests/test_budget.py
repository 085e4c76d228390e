"""Sizes for a number of parameters: never above it, and nothing that a method allows comes closer."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import flora
from flora.budgets import closest_subset


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 24), nn.ReLU(), nn.Linear(24, 12))


def learning(config):
    model = flora.adapt(network(), config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("parameters", [700, 1234, 2500])
@pytest.mark.parametrize(
    "config",
    [flora.TuckerConfig, flora.TuckerConfig(kernel_rank=1, trainable="core"), flora.LDRConfig, flora.KroneckerConfig],
    ids=["tucker", "core alone", "ldr", "kronecker"],
)
def test_a_uniform_budget_is_the_largest_size_that_fits(config, parameters):
    base = config() if isinstance(config, type) else config
    sizes = base.sizes([(8, 3, 3, 3), (24, 288), (12, 24)])
    counts = [learning(replace(base, **size)) for size in sizes[:100]]
    least = min(counts)
    if least > parameters:
        with pytest.raises(ValueError, match=rf"parameters={parameters} are fewer than the {least} that it has"):
            flora.budget(network(), config, parameters, uniform=True)
        return
    found = flora.budget(network(), config, parameters, uniform=True)
    assert learning(found) == max(count for count in counts if count <= parameters)


@pytest.mark.parametrize("parameters", [900, 1500, 3000, 7001])
def test_ranks_that_differ_come_closer(parameters):
    uniform = flora.budget(network(), flora.TuckerConfig, parameters, uniform=True)
    found = flora.budget(network(), flora.TuckerConfig, parameters)
    names = ["0", "2", "4"]
    every = [
        learning(replace(uniform, rank_pattern={f"^{name}$": uniform.rank + 1 for name in raised} or None))
        for n in range(3)
        for raised in itertools.combinations(names, n)
    ]
    assert learning(found) == max(count for count in every if count <= parameters)
    assert learning(uniform) <= learning(found) <= parameters


def test_what_has_no_choice_comes_back_if_it_fits():
    model = network()
    assert flora.budget(model, flora.CirculantConfig, 10_000) == flora.CirculantConfig()
    with pytest.raises(ValueError, match="CirculantConfig: parameters=10 are fewer than the 678 .* on 3 layers"):
        flora.budget(model, flora.CirculantConfig, 10)
    assert learning(flora.CirculantConfig()) == 678
    assert type(model[0]) is nn.Conv2d


def test_other_fields_stay():
    config = flora.budget(network(), flora.TuckerConfig(scale=2.0), 600, target_modules=["4"], modules_to_save=["2"])
    assert config.scale == 2.0
    assert config.target_modules == ("4",)
    assert learning(config) - (8 * 36 * 24 + 24) <= 600


def test_a_decomposition_is_not_done_for_counting():
    with torch.device("meta"):
        model = network()
    assert flora.budget(model, flora.TuckerConfig(init="hosvd"), 2000).rank > 1


@pytest.mark.parametrize("parameters", [0, -1, 1.5, True, "9"])
def test_a_budget_is_a_positive_int(parameters):
    with pytest.raises(ValueError, match=f"parameters={parameters!r} must be a positive int"):
        flora.budget(network(), flora.TuckerConfig, parameters)


@given(st.lists(st.integers(1, 40), max_size=7), st.integers(0, 150))
def test_the_closest_subset_is_the_closest(steps, most):
    found = closest_subset(steps, most)
    assert len(set(found)) == len(found)
    best = max(sum(s) for n in range(len(steps) + 1) for s in itertools.combinations(steps, n) if sum(s) <= most)
    assert sum(steps[i] for i in found) == best


def test_blocks_are_chosen_only_where_no_rank_is_meant():
    with pytest.raises(ValueError, match="alpha=8.0 needs a rank, and blocks are chosen here"):
        flora.budget(network(), flora.KroneckerConfig(alpha=8), 1000)
    block = flora.budget(network(), flora.KroneckerConfig, 100_000, target_modules=["2", "4"]).block
    assert block[0] * block[1] > 1


def test_a_mapping_has_no_single_size():
    with pytest.raises(TypeError, match="config=.*must be a configuration or its class"):
        flora.budget(network(), {"2": flora.TuckerConfig()}, 1000)


def test_many_large_steps_are_taken_from_the_largest(monkeypatch):
    monkeypatch.setattr("flora.budgets._MOST_STEPS", 0)
    assert closest_subset([3, 8, 5], 10) == [1]
    assert closest_subset([3, 8, 5], 12) == [0, 1]
