"""Configurations: every field is checked once, errors quote it, and JSON gives the same configuration back."""

import dataclasses
import json
import pickle

import pytest
from torch import nn

from flora.config import DeltaConfig, TuckerConfig, first_match, is_suffix, matches

BAD = [
    ({"rank": 0}, "rank=0 must be a positive int or a tuple of them"),
    ({"rank": -3}, "rank=-3"),
    ({"rank": 2.0}, r"rank=2\.0"),
    ({"rank": True}, "rank=True"),
    ({"rank": "8"}, "rank='8'"),
    ({"rank": ()}, r"rank=\(\)"),
    ({"rank": (4, 0)}, r"rank=\(4, 0\)"),
    ({"kernel_rank": 0}, "kernel_rank=0 must be a positive int"),
    ({"kernel_rank": (2, 2)}, r"kernel_rank=\(2, 2\)"),
    ({"scale": 0}, "scale=0 must be a finite number and not 0"),
    ({"scale": float("nan")}, "scale=nan"),
    ({"scale": float("inf")}, "scale=inf"),
    ({"scale": "1"}, "scale='1'"),
    ({"alpha": 0.0}, r"alpha=0\.0"),
    ({"alpha": 16, "scale": 2}, r"alpha=16\.0 cannot be given together with scale=2\.0"),
    ({"alpha": 16, "rank": (4, 4)}, r"rank=\(4, 4\) is a tuple, for which alpha=16\.0"),
    ({"alpha": 16, "rank_pattern": {"fc": (4, 4)}}, r"rank_pattern\['fc'\]=\(4, 4\) is a tuple"),
    ({"dropout": 1}, r"dropout=1 must be a number in \[0, 1\)"),
    ({"dropout": -0.1}, r"dropout=-0\.1"),
    ({"dropout": float("nan")}, "dropout=nan"),
    ({"dropout": None}, "dropout=None"),
    ({"plan": "fast"}, "plan='fast' must be one of auto, fused, hybrid, merged"),
    ({"plan": "merged", "dropout": 0.1}, r"plan='merged' cannot drop .* dropout=0\.1"),
    ({"plan": "hybrid", "dropout": 0.1}, "plan='hybrid'"),
    ({"init": "zeros"}, "init='zeros' must be one of reference, orthogonal, hosvd"),
    ({"trainable": ("core", "bias")}, "trainable=.*must be some of core, factors, out, in, kernel"),
    ({"trainable": ()}, r"trainable=\(\)"),
    ({"trainable": 3}, "trainable=3"),
    ({"trainable": ("factors",)}, r'trainable=\(\'factors\',\) lacks "core"'),
    ({"trainable": "in"}, 'lacks "core"'),
    ({"target_modules": "("}, r"target_modules='\(' is not a regex"),
    ({"target_modules": ""}, "target_modules=''"),
    ({"target_modules": []}, r"target_modules=\[\] must name modules"),
    ({"target_modules": [1]}, r"target_modules=\[1\]"),
    ({"target_modules": 5}, "target_modules=5 must be"),
    ({"target_modules": nn.Linear(1, 1)}, "target_modules=Linear"),
    ({"exclude_modules": "["}, r"exclude_modules='\[' is not a regex"),
    ({"exclude_modules": "a{99999999999999999999}"}, r"exclude_modules='a\{9+\}' is not a regex"),
    ({"modules_to_save": [""]}, r"modules_to_save=\[''\]"),
    ({"modules_to_save": 3}, "modules_to_save=3"),
    ({"rank_pattern": {"fc": 0}}, r"rank_pattern\['fc'\]=0"),
    ({"rank_pattern": {"fc": None}}, r"rank_pattern\['fc'\]=None"),
    ({"rank_pattern": {"*": 1}}, r"rank_pattern='\*' is not a regex"),
    ({"rank_pattern": [("fc", 1)]}, "rank_pattern=.* must map patterns to values"),
    ({"scale_pattern": {"fc": 0.0}}, r"scale_pattern\['fc'\]=0\.0"),
    ({"scale_pattern": {"": 1.0}}, "scale_pattern=.* not empty"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[", ".join(f"{k}={v}" for k, v in f.items()) for f, _ in BAD])
def test_a_wrong_field_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=f"^TuckerConfig: .*{message}"):
        TuckerConfig(**fields)


def test_fields_are_keywords_and_the_base_class_is_no_config():
    with pytest.raises(TypeError):
        TuckerConfig(8)
    with pytest.raises(TypeError, match="rnak"):
        TuckerConfig(rnak=8)
    with pytest.raises(TypeError, match="DeltaConfig is a base class"):
        DeltaConfig()


def test_a_config_cannot_change_and_keeps_its_own_copies():
    names, ranks = ["q", "k"], {"q": [4, 4]}
    config = TuckerConfig(target_modules=names, rank_pattern=ranks, rank=[2, 2], trainable=["factors", "core"])
    names.append("v")
    ranks["v"] = 3
    assert config.target_modules == ("q", "k")
    assert config.rank_pattern == {"q": (4, 4)}
    assert config.rank == (2, 2)
    assert config.trainable == ("core", "factors")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3
    same = TuckerConfig(target_modules=("q", "k"), rank_pattern={"q": (4, 4)}, rank=(2, 2))
    assert config == same
    assert hash(config) == hash(same)
    assert pickle.loads(pickle.dumps(config)) == config


def test_empty_selections_mean_none():
    config = TuckerConfig(exclude_modules=[], modules_to_save=(), rank_pattern={}, scale_pattern={})
    assert config == TuckerConfig()
    assert TuckerConfig(modules_to_save="head").modules_to_save == ("head",)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (TuckerConfig(), 1.0),
        (TuckerConfig(scale=4), 4.0),
        (TuckerConfig(alpha=32, rank=16), 2.0),
        (TuckerConfig(alpha=32, rank=16, rank_pattern={"fc": 8}).for_module("fc"), 4.0),
        (TuckerConfig(alpha=32, rank=16, scale_pattern={"fc": 3}).for_module("a.fc"), 3.0),
    ],
)
def test_resolved_scale(config, scale):
    assert config.resolved_scale == scale


def test_for_module_takes_the_first_pattern_and_leaves_nothing_that_selects():
    config = TuckerConfig(
        rank=4,
        rank_pattern={r"layers\.0\..*": 1, "fc": 2},
        scale_pattern={"fc": 0.5},
        target_modules=lambda name, module: True,
        exclude_modules=["x"],
        modules_to_save=["head"],
    )
    assert config.for_module("layers.0.fc") == TuckerConfig(rank=1, scale=0.5)
    assert config.for_module("layers.1.fc") == TuckerConfig(rank=2, scale=0.5)
    assert config.for_module("layers.1.fc2") == TuckerConfig(rank=4)


@pytest.mark.parametrize(
    ("rank", "shape", "ranks"),
    [
        (4, (10, 3), (4, 3)),
        (4, (10, 3, 3, 1), (4, 3, 2, 1)),
        (16, (8, 1, 5), (8, 1, 2)),
        ((5, 2), (5, 3), (5, 2)),
        ((5, 2, 1, 3, 1), (5, 3, 3, 3, 3), (5, 2, 1, 3, 1)),
    ],
)
def test_ranks(rank, shape, ranks):
    assert TuckerConfig(rank=rank).ranks(shape) == ranks


@pytest.mark.parametrize(
    ("rank", "shape", "message"),
    [
        ((4, 4), (8, 8, 3, 3), r"^fc: rank=\(4, 4\) must have one entry a mode of the weight \(8, 8, 3, 3\)"),
        ((4, 9), (8, 8), r"^fc: rank=\(4, 9\) goes above a mode of the weight \(8, 8\)"),
        (4, (0, 8), r"^fc: the weight's shape \(0, 8\) has an empty mode"),
    ],
)
def test_ranks_that_do_not_fit_name_the_module(rank, shape, message):
    with pytest.raises(ValueError, match=message):
        TuckerConfig(rank=rank).ranks(shape, "fc")


@pytest.mark.parametrize(
    "config",
    [
        TuckerConfig(),
        TuckerConfig(rank=(1, 2, 1, 2), scale=0.1, init="hosvd", trainable=("core", "out"), plan="fused", dropout=0.25),
        TuckerConfig(rank_pattern={"a": 1, "b": (1, 2)}, scale_pattern={"c": 2}, target_modules=["x"]),
        TuckerConfig(alpha=8, target_modules=r".*\.fc", exclude_modules=["y"], modules_to_save=["head"]),
    ],
)
def test_json_gives_the_same_config_back(config):
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert DeltaConfig.from_dict(json.loads(text)) == config
    assert TuckerConfig.from_dict(json.loads(text)) == config
    assert json.loads(text)["method"] == "tucker"


def test_a_function_cannot_be_written():
    with pytest.raises(ValueError, match=r"target_modules=<function .* cannot be written"):
        TuckerConfig(target_modules=lambda name, module: True).to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "method=None must be one of .*tucker"),
        ({"method": "lora2"}, "method='lora2' must be one of"),
        ({"method": ["tucker"]}, "method="),
        ({"method": "tucker", "ranks": 3, "r": 1}, "TuckerConfig has no field 'ranks', 'r'"),
        ({"method": "tucker", "rank": 0}, "rank=0"),
    ],
)
def test_from_dict_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        DeltaConfig.from_dict(values)


def test_from_dict_wants_a_mapping():
    with pytest.raises(TypeError, match=r"mapping of fields, not \[\]"):
        DeltaConfig.from_dict([])


def test_a_delta_without_rank_takes_no_rank_pattern():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Rankless(DeltaConfig):
        def __post_init__(self):
            object.__setattr__(self, "method", "rankless")
            super().__post_init__()

    with pytest.raises(ValueError, match="Rankless: rank_pattern=.*without rank"):
        Rankless(rank_pattern={"fc": 3})
    assert Rankless(alpha=3.0).resolved_scale == 3.0


def test_patterns():
    assert matches("fc", "layers.0.fc")
    assert matches("0.fc", "layers.0.fc")
    assert matches(r"layers\.\d+\.fc", "layers.0.fc")
    assert not matches("c", "layers.0.fc")
    assert not matches(r"\d+", "layers.0.fc")
    assert is_suffix("fc", "fc")
    assert not is_suffix(".*", "fc")
    assert first_match(["a", "fc", ".*"], "x.fc") == "fc"
    assert first_match(["a"], "x.fc") is None
