"""Which modules a configuration means, and what is said where it means none."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from flora.config import TuckerConfig
from flora.model import adapt, adapted_layers, saved_modules
from flora.targets import near_misses, places, select, select_named


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.stem = nn.Conv1d(8, 8, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.up = nn.ConvTranspose1d(8, 8, 2)
        self.act = nn.ReLU()
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))


ALL = ["stem", *(f"blocks.{i}.{n}_proj" for i in (0, 1) for n in "qkv"), "head.0", "head.1"]


def chosen(config, model=None):
    return [target.name for target in select(model or Net(), config).layers]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, ALL),
        ({"target_modules": ["q_proj", "stem"]}, ["blocks.0.q_proj", "blocks.1.q_proj", "stem"]),
        ({"target_modules": ["0.q_proj"]}, ["blocks.0.q_proj"]),
        ({"target_modules": ["embed"]}, ["embed"]),
        ({"target_modules": r"blocks\.1\.[qk]_proj"}, ["blocks.1.q_proj", "blocks.1.k_proj"]),
        ({"target_modules": r"blocks.*_proj"}, ALL[1:7]),
        ({"target_modules": lambda name, module: isinstance(module, nn.Linear) and "head" in name}, ALL[7:]),
        ({"target_modules": lambda name, module: "head" in name}, ALL[7:]),
        ({"exclude_modules": ["q_proj", "head"]}, [n for n in ALL if "q_" not in n and "head" not in n]),
        ({"exclude_modules": r".*\d\.\w+"}, ["stem", "head.0", "head.1"]),
        ({"exclude_modules": lambda name, module: isinstance(module, nn.ModuleList)}, ["stem", "head.0", "head.1"]),
        ({"modules_to_save": ["head"]}, ALL[:7]),
        ({"target_modules": ["q_proj", "1"], "modules_to_save": ["head"], "exclude_modules": ["blocks.1"]}, [ALL[1]]),
    ],
)
def test_selections(fields, names):
    assert sorted(chosen(TuckerConfig(**fields))) == sorted(names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_prj"]}, "'q_prj' matches no module; near misses: 'q_proj'"),
        ({"target_modules": ["q_proj", "stm"]}, "'stm' matches no module; near misses: 'stem'"),
        (
            {"target_modules": "q_proj"},
            r"target_modules='q_proj' matches no module: a string is a regex .* the whole name; the list \['q_proj'\]",
        ),
        ({"target_modules": "0"}, r"'0' matches no module: a string is a regex .* whole name; the list \['0'\] means"),
        ({"target_modules": "stm"}, "'stm' matches no module: a string is a regex .* whole name; near misses: 'stem'"),
        ({"target_modules": ["zzzzzz"]}, "there are 'embed', 'stem'"),
        ({"target_modules": lambda name, module: False}, "target_modules=.*lambda.* matches no module; there are"),
        ({"target_modules": ["up"]}, r"^up: target_modules=\('up',\) names it, but ConvTranspose1d is not supported"),
        ({"target_modules": ["act"]}, r"^act: .* names it, but ReLU is not"),
        ({"target_modules": ["norm"]}, r"^blocks\.0\.norm: .* names it, but TuckerConfig cannot adapt a LayerN"),
        (
            {"target_modules": ["blocks"]},
            r"^blocks: .*, but a ModuleList is no layer, it holds 6; the regex r'blocks\\\.\(\.\*",
        ),
        (
            {"target_modules": ["head"]},
            r"^head: .*, but a Sequential is no layer, it holds 2; the regex r'head\\\.\.\*'",
        ),
        (
            {"target_modules": "head"},
            r"^head: target_modules='head' .* a Sequential is no layer, it holds 2; the regex",
        ),
        ({"target_modules": r"blocks\..*"}, r"^blocks\.0\.norm: target_modules=.* names it"),
        ({"target_modules": lambda name, module: name == "up"}, r"^up: target_modules=.* names it"),
        ({"target_modules": "act"}, "^act: target_modules='act' names it, but ReLU is not"),
        ({"exclude_modules": ["kproj"]}, r"exclude_modules=.*: 'kproj' matches no module; near misses: 'k_proj'"),
        ({"exclude_modules": "all"}, "target_modules='all' leaves nothing to adapt: .*it is excluded"),
        ({"modules_to_save": ["haed"]}, "modules_to_save: 'haed' matches no module; near misses: 'head"),
        ({"modules_to_save": ["act"]}, "^act: modules_to_save names it, but this ReLU has no parameters"),
        ({"modules_to_save": ["blocks"]}, "^blocks: modules_to_save names it, but a ModuleList is never called"),
        ({"target_modules": ["1"], "modules_to_save": ["1"]}, r"names it, but|leaves nothing to adapt"),
        ({"rank_pattern": {"kproj": 3}}, "rank_pattern='kproj' matches no adapted module; near misses: 'k_proj'"),
        ({"scale_pattern": {"embed": 3}}, "scale_pattern='embed' matches no adapted module"),
    ],
)
def test_what_cannot_be_meant_is_said(fields, message):
    with pytest.raises(ValueError, match=message):
        chosen(TuckerConfig(**fields))


@pytest.mark.parametrize(
    ("name", "layers"), [("head", ALL[7:]), ("blocks", ALL[1:7]), ("blocks.1", ALL[4:7]), ("mixed", None)]
)
def test_what_to_name_instead_of_a_container(name, layers):
    model = Net()
    model.mixed = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.LayerNorm(8)))
    with pytest.raises(ValueError, match=f"^{name}: ") as error:
        chosen(TuckerConfig(target_modules=[name]), model)
    if layers is None:  # no simple regex means the layer alone
        assert "it holds 1; name them, as 'mixed.0.0'" in str(error.value)
    else:
        regex = str(error.value).partition("the regex r'")[2].removesuffix("' means them")
        assert chosen(TuckerConfig(target_modules=regex), model) == layers


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="target_modules='all' matches no module"):
        chosen(TuckerConfig(), nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))


def test_what_is_left_alone_has_a_reason():
    left = select(Net(), TuckerConfig(exclude_modules=["stem"], modules_to_save=["head"])).left_alone
    assert left["stem"] == ("Conv1d", "it is excluded")
    assert left["embed"] == ("Embedding", "it was not named")
    assert left["up"][0] == "ConvTranspose1d"
    assert "not supported" in left["up"][1]
    assert left["blocks.0.norm"][0] == "LayerNorm"
    assert set(left) == {"stem", "embed", "up", "blocks.0.norm", "blocks.1.norm"}


def test_the_outermost_of_nested_modules_to_save_counts():
    saved = select(Net(), TuckerConfig(modules_to_save=["head.1", "head", "blocks.0.norm"])).saved
    assert sorted(target.name for target in saved) == ["blocks.0.norm", "head"]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), self.first)


@pytest.mark.parametrize("target", ["all", ["first"], ["inner.1"]])
def test_a_module_in_two_places_is_one_target(target):
    layers = {t.name: t for t in select(Shared(), TuckerConfig(target_modules=target)).layers}
    assert [place.name for place in layers["first"].places] == ["first", "inner.1"]


def test_a_name_of_a_shared_module_excludes_it():
    assert chosen(TuckerConfig(exclude_modules=["inner.1"]), Shared()) == ["inner.0"]


def test_attention_and_its_output_projection_are_two_targets():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    names = chosen(TuckerConfig(), layer)
    assert sorted(names) == ["linear1", "linear2", "self_attn", "self_attn.out_proj"]
    adapt(layer, TuckerConfig(rank=2))
    assert sorted(adapted_layers(layer)) == sorted(names)
    second = select(layer, TuckerConfig())
    assert sorted(target.name for target in second.layers) == sorted(names)


def test_parametrised_layers_are_one_module():
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    names = [place.name for place in places(model)]
    assert "0.parametrizations.weight" in names
    assert chosen(TuckerConfig(target_modules=r"\d.*"), model) == ["0", "1"]


def test_what_another_adapter_trains_whole_is_closed():
    model = adapt(Net(), TuckerConfig(rank=2, modules_to_save=["head"], target_modules=["stem", "q_proj"]))
    selection = select(model, TuckerConfig())
    assert sorted(target.name for target in selection.layers) == sorted(ALL[:7])
    assert selection.left_alone["head.0"] == ("Linear", "another adapter trains it whole")
    for fields, message in [
        ({"target_modules": ["head.0"]}, r"^head\.0: .* another adapter trains it whole"),
        ({"modules_to_save": ["head.1"]}, r"^head\.1: modules_to_save names it, but another adapter already holds it"),
        ({"modules_to_save": ["stem"]}, r"^stem: modules_to_save names it, but another adapter already holds it"),
        ({"modules_to_save": ["blocks.0"]}, r"^blocks\.0: .* another adapter already holds it or a part of it"),
    ]:
        with pytest.raises(ValueError, match=message):
            select(model, TuckerConfig(**fields))
    adapt(model, TuckerConfig(rank=2, modules_to_save=["head"], target_modules=["k_proj"]), "second")
    assert list(saved_modules(model)["head"].copies) == ["default", "second"]


def test_a_mapping_gives_each_layer_the_first_config_that_matches():
    small, large = TuckerConfig(rank=1), TuckerConfig(rank=4, exclude_modules=["stem"])
    selection = select(Net(), {"q_proj": small, r"blocks\.0\..*_proj": large, "all": TuckerConfig(rank=2)})
    found = {target.name: (target.pattern, target.config.rank) for target in selection.layers}
    assert found == {
        "blocks.0.q_proj": ("q_proj", 1),
        "blocks.1.q_proj": ("q_proj", 1),
        "blocks.0.k_proj": (r"blocks\.0\..*_proj", 4),
        "blocks.0.v_proj": (r"blocks\.0\..*_proj", 4),
        "blocks.1.k_proj": ("all", 2),
        "blocks.1.v_proj": ("all", 2),
        "stem": ("all", 2),
        "head.0": ("all", 2),
        "head.1": ("all", 2),
    }


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ValueError, "empty mapping"),
        ({"": TuckerConfig()}, ValueError, "pattern='' must be"),
        ({"(": TuckerConfig()}, ValueError, r"'\(' is not a regex"),
        ({"q_proj": TuckerConfig(target_modules=["x"])}, ValueError, r"pattern='q_proj': target_modules=\('x',\)"),
        ({"q_prj": TuckerConfig()}, ValueError, "pattern='q_prj' matches no module; near misses: 'q_proj'"),
        ({"all": TuckerConfig(), "q_proj": TuckerConfig()}, ValueError, "pattern='q_proj' leaves nothing to adapt"),
        ({"norm": TuckerConfig()}, ValueError, r"^blocks\.0\.norm: pattern='norm' names it"),
        ({"q_proj": 4}, TypeError, "config must be a DeltaConfig or a mapping"),
        (None, TypeError, "not None"),
        (TuckerConfig, TypeError, "config must be"),
    ],
)
def test_mappings_that_mean_nothing(config, error, message):
    with pytest.raises(error, match=message):
        select(Net(), config)


def test_select_named_takes_exactly_these():
    own = TuckerConfig(rank=2)
    selection = select_named(Net(), {"stem": (own, ""), "embed": (own, "p")}, ["head"])
    assert [(t.name, t.config, t.pattern) for t in selection.layers] == [("stem", own, ""), ("embed", own, "p")]
    assert [target.name for target in selection.saved] == ["head"]
    assert selection.left_alone["blocks.0.q_proj"] == ("Linear", "it was not named")
    for layers, saved, message in [
        (["stm"], [], "no module 'stm'; near misses: 'stem'"),
        (["up"], [], "^up: .*not supported"),
        ([], ["act"], "^act: .*no parameters"),
        (["head.0"], ["head"], r"^head\.0: the file adapts it and trains it whole"),
    ]:
        with pytest.raises(ValueError, match=message):
            select_named(Net(), dict.fromkeys(layers, (own, "")), saved)


def test_selecting_changes_nothing():
    model = Net()
    before = {name: (id(module), module.training) for name, module in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    select(model, TuckerConfig(modules_to_save=["head"]))
    assert {name: (id(module), module.training) for name, module in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_near_misses_of_nothing():
    assert near_misses("x", []) == ""
