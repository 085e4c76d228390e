"""FLoRA inside Hugging Face PEFT: the same numbers as in flora, through the same kernels, in all that PEFT does."""

import copy
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

import flora
from flora.forms import tucker
from flora.integrations import peft as integration
from flora.integrations.peft import FloraConfig, FloraLayer

pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
REPOSITORY = Path(__file__).parents[1]


class Net(nn.Module):
    """Every kind of layer that is served."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 10, padding_idx=0)
        self.seq = nn.Conv1d(10, 8, 3, padding=1)
        self.image = nn.Conv2d(8, 6, (2, 3), stride=(1, 2), padding=1, groups=2)
        self.volume = nn.Conv3d(6, 4, (1, 2, 2))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.turned = Conv1D(5, 4)
        self.fc = nn.Linear(5, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, ids):
        x = self.seq(self.embed(ids).mT).relu()
        x = self.image(x.unsqueeze(2).expand(-1, -1, 5, -1)).relu()
        x = self.volume(x.unsqueeze(2)).flatten(2).mT
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.head(self.fc(self.turned(x)).relu())


IDS = torch.randint(20, (6, 10), generator=torch.Generator().manual_seed(0))
ALL = ["embed", "seq", "image", "volume", "attention", "turned", "fc"]


def net():
    torch.manual_seed(0)
    return Net().eval()


def adapted(config=None, name="default", **kwargs):
    config = config or FloraConfig(r=3, target_modules=ALL, init_weights=False)
    model = net()
    torch.manual_seed(1)
    return peft.get_peft_model(model, config, adapter_name=name, **kwargs).eval()


def output(model, **kwargs):
    with torch.no_grad():
        return model(IDS, **kwargs)


def layers(model):
    return {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, FloraLayer)}


@pytest.fixture
def kernel_calls(monkeypatch):
    """The kernels of the Tucker form that are called, by name."""
    called = []

    class Spy:
        def __getattr__(self, name):
            called.append(name)
            return getattr(flora._core, name)

    monkeypatch.setattr(tucker, "_core", Spy())
    return called


def in_flora(model):
    """The same adapter put on by `flora.adapt`."""
    plain = flora.adapt(net(), flora.TuckerConfig(rank=3, target_modules=ALL))
    for name, layer in flora.model.adapted_layers(plain).items():
        layer.deltas["default"].load_tensors(layers(model)[name].flora_delta["default"].tensors())
    return plain


def test_the_numbers_and_gradients_are_those_of_flora(kernel_calls):
    model = adapted()
    plain = in_flora(model)
    y = model(IDS)
    assert {"tucker_linear_forward", "tucker_conv_forward"} <= set(kernel_calls)
    expected = plain(IDS)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, layer in flora.model.adapted_layers(plain).items():
        own = layers(model)[name].flora_delta["default"]
        for key, parameter in layer.deltas["default"].named_parameters():
            assert torch.equal(own.get_parameter(key).grad, parameter.grad), (name, key)
    assert all(p.requires_grad == (".flora_delta." in name) for name, p in model.named_parameters())


def test_an_adapter_starts_as_nothing_and_is_saved_and_loaded(tmp_path):
    assert torch.equal(output(adapted(FloraConfig(target_modules=ALL))), output(net()))
    model = adapted()
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.image.flora_delta.core" in keys
    assert "base_model.model.image.flora_delta.factors.3" in keys
    for kwargs in ({}, {"low_cpu_mem_usage": True}):
        loaded = peft.PeftModel.from_pretrained(net(), tmp_path, **kwargs)
        assert torch.equal(output(loaded), output(model))
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path, adapter_name="other", is_trainable=True)
    assert torch.equal(output(loaded), output(model))
    assert any(p.requires_grad for p in loaded.parameters())


def test_injected_without_a_wrapper():
    model = adapted()
    state = peft.get_peft_model_state_dict(model)
    bare = peft.inject_adapter_in_model(FloraConfig(r=3, target_modules=ALL), net())
    assert not peft.set_peft_model_state_dict(bare, state).unexpected_keys
    assert torch.equal(output(bare.eval()), output(model))


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging(safe_merge):
    model = adapted()
    base = {name: p.detach().clone() for name, p in net().named_parameters()}
    expected = output(model)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(output(model), expected, **CLOSE)
    with model.disable_adapter():
        assert torch.equal(output(model), output(net()))
    torch.testing.assert_close(output(model), expected, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(output(model), expected)
    for name, layer in layers(model).items():
        for key, parameter in layer.base_layer.named_parameters():
            assert torch.equal(parameter, base[f"{name}.{key}"])
    unloaded = copy.deepcopy(model).unload()
    assert torch.equal(output(unloaded), output(net()))
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(m, FloraLayer) for m in merged.modules())
    torch.testing.assert_close(output(merged), expected, **CLOSE)


def test_a_safe_merge_that_is_not_finite_changes_nothing():
    model = adapted()
    layer = model.base_model.model.fc
    weight = layer.base_layer.weight
    with torch.no_grad():
        layer.flora_delta["default"].core[0, 0] = torch.nan
    with pytest.raises(ValueError, match="fc: NaNs detected"):
        layer.merge(safe_merge=True)
    assert layer.base_layer.weight is weight
    assert not layer.merged


def test_merged_one_by_one_is_merged_at_once():
    model = adapted()
    model.add_adapter("other", FloraConfig(r=2, target_modules=["fc", "image"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    both = output(model)
    model.merge_adapter(["default", "other"])
    weight = model.base_model.model.fc.base_layer.weight.clone()
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert torch.equal(model.base_model.model.fc.base_layer.weight, weight)
    torch.testing.assert_close(output(model), both, **CLOSE)
    model.to(torch.float64)
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS).float(), both, **CLOSE)


def test_a_delta_that_changed_while_merged_does_not_reach_the_weight():
    model = adapted()
    layer = model.base_model.model.image
    before = layer.base_layer.weight.clone()
    model.merge_adapter()
    layer.scale_layer(3.0)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_several_adapters():
    model = adapted(name="first")
    first = output(model)
    torch.manual_seed(2)
    model.add_adapter("second", FloraConfig(r=2, target_modules=["fc"], init_weights=False))
    assert torch.equal(output(model), first)
    model.set_adapter("second")
    second = output(model)
    assert not torch.equal(second, first)
    assert all(p.requires_grad == (".second." in name) for name, p in model.named_parameters())
    with model.disable_adapter():
        assert torch.equal(output(model), output(net()))
    assert torch.equal(output(model), second)
    model.set_adapter("first")
    model.delete_adapter("second")
    assert torch.equal(output(model), first)
    assert list(layers(model)["fc"].flora_delta) == ["first"]


def test_weighted_adapters_are_refused():
    with pytest.raises(NotImplementedError, match="set_scale"):
        adapted().add_weighted_adapter(["default"], [1.0], "sum")


def test_each_sample_with_its_own_adapter():
    targets = [name for name in ALL if name != "attention"]
    model = adapted(FloraConfig(r=3, target_modules=targets, init_weights=False))
    model.add_adapter("other", FloraConfig(r=2, target_modules=targets, init_weights=False))
    alone = {"default": output(model), "__base__": output(net())}
    model.set_adapter("other")
    alone["other"] = output(model)
    names = ["other", "__base__", "default", "default", "other", "__base__"]
    mixed = output(model, adapter_names=names)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone[name][i], **CLOSE)
    with pytest.raises(ValueError, match="embed: Length of `adapter_names`"):
        output(model, adapter_names=names[:5])
    with pytest.raises(ValueError, match="non-existing adapter.*nobody"):
        output(model, adapter_names=["nobody"] * 6)
    with pytest.raises(ValueError, match="num_beams=3"):
        output(model, adapter_names=names, num_beams=3)
    with pytest.raises(TypeError, match="attention: a MultiheadAttention with a forward of its own"):
        output(adapted(), adapter_names=["default"] * 6)


def test_modules_to_save_and_a_bias_that_learns(tmp_path):
    config = FloraConfig(r=2, target_modules=["fc"], modules_to_save=["head"], bias="flora_only", init_weights=False)
    model = adapted(config)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"base_model.model.head.modules_to_save.default.weight", "base_model.model.fc.base_layer.bias"} <= learning
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(IDS).square().sum().backward()
        optimiser.step()
    model.save_pretrained(tmp_path)
    assert torch.equal(output(peft.PeftModel.from_pretrained(net(), tmp_path)), output(model))


def test_parts_that_do_not_learn():
    model = adapted(FloraConfig(r=2, target_modules=["image"], trainable=["core", "kernel"]))

    def learning():
        delta = model.base_model.model.image.flora_delta["default"]
        return {name for name, p in delta.named_parameters() if p.requires_grad}

    assert learning() == {"core", "factors.2", "factors.3"}
    with model.disable_adapter():
        assert not learning()
    assert learning() == {"core", "factors.2", "factors.3"}
    model.set_requires_grad("default", False)
    assert not learning()
    model.set_requires_grad("default", True)
    assert learning() == {"core", "factors.2", "factors.3"}


def test_a_configuration_goes_through_json(tmp_path):
    config = FloraConfig(
        r=(4, 2),
        scale=0.5,
        target_modules=["fc", "turned"],
        rank_pattern={"turned": [2, 3]},
        scale_pattern={"turned": 2.0},
        init_weights="orthogonal",
        task_type="SEQ_CLS",
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FLORA"
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, FloraConfig)
    assert loaded == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert loaded.for_module("block.turned") == flora.TuckerConfig(rank=(2, 3), scale=2.0, init="orthogonal")
    model = adapted(loaded)
    assert {name: layer.flora_delta["default"].ranks for name, layer in layers(model).items()} == {
        "fc": (4, 2),
        "turned": (2, 3),
    }


def test_alpha_is_divided_by_each_rank():
    config = FloraConfig(r=8, alpha=4, rank_pattern={"fc": 2}, alpha_pattern={"turned": 16}, target_modules=["fc"])
    assert config.for_module("other").resolved_scale == 0.5
    assert config.for_module("a.fc").resolved_scale == 2.0
    assert config.for_module("a.turned").resolved_scale == 2.0


def test_dropout_is_left_out_where_the_delta_has_no_input():
    model = adapted(FloraConfig(r=2, dropout=0.5, target_modules=["embed", "attention", "fc"]))
    assert [layer.flora_delta["default"].config.dropout for layer in layers(model).values()] == [0.0, 0.0, 0.5]


def test_scaling():
    model = adapted(FloraConfig(r=2, target_modules=["head"], init_weights=False))
    layer = model.base_model.model.head
    base, full = output(net()), output(model)
    layer.scale_layer(0.5)
    torch.testing.assert_close(output(model), base + 0.5 * (full - base), **CLOSE)
    layer.unscale_layer(0.5)
    torch.testing.assert_close(output(model), full, **CLOSE)
    layer.set_scale("default", 2.0)
    torch.testing.assert_close(output(model), base + 2 * (full - base), **CLOSE)
    layer.unscale_layer()
    torch.testing.assert_close(output(model), full, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deltas_follow_a_half_base_only_when_asked(dtype):
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = net().to(dtype)
        model = peft.get_peft_model(model, FloraConfig(target_modules=ALL), autocast_adapter_dtype=autocast)
        assert {p.dtype for name, p in model.named_parameters() if "flora_delta" in name} == {expected}
        model(IDS).float().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("flora_first", [True, False])
def test_beside_a_lora_on_the_same_layer(flora_first):
    configs = [
        FloraConfig(r=2, target_modules=["fc", "image", "embed"], init_weights=False),
        peft.LoraConfig(r=2, target_modules=["fc", "seq", "embed"], init_lora_weights=False),
    ]
    first, second = configs if flora_first else reversed(configs)
    model = adapted(first, mixed=True)
    model.add_adapter("other", second)
    model.set_adapter(["default", "other"])
    both = output(model.eval())
    model.base_model.merge_adapter()
    torch.testing.assert_close(output(model), both, **CLOSE)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(output(model), both, **CLOSE)
    for _, module in model.named_modules():
        if isinstance(module, FloraLayer):
            fresh = net().get_submodule(module._name).weight
            torch.testing.assert_close(module.get_base_layer().weight, fresh, rtol=0, atol=1e-6)
    torch.testing.assert_close(output(model.merge_and_unload()), both, **CLOSE)


def test_layers_that_others_read_the_weight_of():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    base = block(x)
    targets = ["self_attn", "linear1", "linear2", "out_proj"]
    model = peft.get_peft_model(nn.Sequential(block), FloraConfig(r=2, target_modules=targets, init_weights=False))
    slow = model.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow, **CLOSE)
        model.merge_adapter()
        torch.testing.assert_close(model(x), slow, **CLOSE)
    assert not torch.allclose(slow, base)
    assert {type(m).__name__ for m in (block.self_attn, block.self_attn.out_proj)} == {"FloraLayer"}


def test_a_model_of_transformers(tmp_path):
    config = BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=30, num_labels=3
    )
    base = BertForSequenceClassification(config).eval()
    fresh = copy.deepcopy(base)
    flora_config = FloraConfig(r=2, task_type="SEQ_CLS", layers_to_transform=[1], layers_pattern="layer")
    model = peft.get_peft_model(base, flora_config)
    names = {name.rpartition("base_model.model.")[2] for name in layers(model)}
    assert names == {f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "value")}
    model.train()
    model(input_ids=IDS, labels=IDS[:, 0] % 3).loss.backward()
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    every = peft.get_peft_model(copy.deepcopy(fresh), FloraConfig(r=2, target_modules="all-linear"))
    assert any("intermediate.dense" in name for name in layers(every))


def test_adapters_of_transformers_itself(tmp_path):
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=30, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    fresh = copy.deepcopy(model)
    model.add_adapter(FloraConfig(r=2, target_modules=["query", "dense"], init_weights=False))
    expected = model.eval()(IDS).logits
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, fresh(IDS).logits)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    fresh.load_adapter(tmp_path)
    assert torch.equal(fresh.eval()(IDS).logits, expected)


def test_flora_loads_what_peft_saved(tmp_path):
    config = FloraConfig(
        r=4,
        alpha=2,
        dropout=0.1,
        rank_pattern={"fc": [2, 3], "seq": 2},
        scale_pattern={"fc": 3.0},
        alpha_pattern={"seq": 5},
        target_modules=ALL,
        modules_to_save=["head"],
        init_weights=False,
        trainable=["core"],
    )
    model = adapted(config)
    model.save_pretrained(tmp_path)
    loaded = flora.load_adapter(net(), tmp_path)
    torch.testing.assert_close(output(loaded.eval()), output(model), rtol=1e-6, atol=1e-6)
    deltas = {name: layer.deltas["default"] for name, layer in flora.model.adapted_layers(loaded).items()}
    for name, layer in layers(model).items():
        own = layer.flora_delta["default"]
        assert (deltas[name].ranks, deltas[name].scale) == (own.ranks, own.scale)
        assert deltas[name].config.dropout == own.config.dropout
        assert [p.requires_grad for p in deltas[name].parameters()] == [True] + [False] * len(own.factors)
    flora.save_adapter(loaded, tmp_path / "again")
    torch.testing.assert_close(output(flora.load_adapter(net(), tmp_path / "again")), output(loaded), rtol=0, atol=0)


def test_peft_loads_what_flora_saved(tmp_path):
    config = flora.TuckerConfig(
        rank=3,
        rank_pattern={"fc": (2, 4)},
        scale_pattern={"seq": 0.25},
        target_modules=ALL,
        modules_to_save=["head"],
        trainable=("core", "kernel"),
    )
    model = flora.adapt(net(), config)
    for layer in flora.model.adapted_layers(model).values():
        nn.init.normal_(layer.deltas["default"].core)
    flora.save_adapter(model, tmp_path, format="peft-flora")
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert torch.equal(output(loaded.eval()), output(model))
    assert isinstance(loaded.peft_config["default"], FloraConfig)
    again = flora.load_adapter(net(), tmp_path)
    assert torch.equal(output(again), output(model))
    for name, layer in flora.model.adapted_layers(model).items():
        flags = [p.requires_grad for p in layer.deltas["default"].parameters()]
        assert flags == [p.requires_grad for p in layers(loaded)[name].flora_delta["default"].parameters()]
        assert flags == [
            p.requires_grad for p in flora.model.adapted_layers(again)[name].deltas["default"].parameters()
        ]


def test_only_tucker_deltas_are_written_as_flora_for_peft(tmp_path):
    model = flora.adapt(net(), flora.LoRAConfig(target_modules=["fc"]))
    with pytest.raises(ValueError, match="fc: PEFT's format holds FLoRA, and no delta of method 'lora'"):
        flora.save_adapter(model, tmp_path / "folder", format="peft-flora")
    mixed = {
        "fc": flora.TuckerConfig(rank=2, trainable="core"),
        "seq": flora.TuckerConfig(rank=2),
    }
    with pytest.raises(ValueError, match="its layers have trainable="):
        flora.save_adapter(flora.adapt(net(), mixed), tmp_path / "folder", format="peft-flora")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "bias='all' trains biases"),
        ({"r": 0}, "rank=0"),
        ({"rank_pattern": {"fc": 0}}, "rank=0"),
        ({"novelty": 3}, "novelty=3 is not plain FLoRA"),
        ({"peft_type": "LOKR"}, "peft_type='LOKR' is not the LORA or FLORA"),
    ],
)
def test_flora_refuses_what_it_does_not_know(tmp_path, change, message):
    adapted(FloraConfig(r=2, target_modules=["fc"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        flora.load_adapter(net(), tmp_path)


def test_merged_while_disabled():
    model = adapted()
    expected = output(model)
    model.base_model.disable_adapter_layers()
    torch.testing.assert_close(output(model.merge_and_unload()), expected, **CLOSE)


def test_converted_to_lora():
    model = adapted(FloraConfig(r=2, target_modules=["fc", "turned"], init_weights=False))
    config, state = peft.convert_to_lora(model, rank=2)
    lora = peft.get_peft_model(net(), config).eval()
    peft.set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(output(lora), output(model), **CLOSE)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": 0}, "FloraConfig.*rank=0"),
        ({"r": [2, 0]}, r"FloraConfig.*rank=\[2, 0\]"),
        ({"alpha": 2, "scale": 1}, "FloraConfig.*alpha=2"),
        ({"dropout": 1.0}, "FloraConfig.*dropout=1.0"),
        ({"init_weights": "pissa"}, "FloraConfig.*init='pissa'"),
        ({"trainable": ["factors"]}, "FloraConfig.*trainable"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"rank_pattern": {"fc": -1}}, "FloraConfig.*rank=-1"),
        ({"target_modules": "fc", "layers_to_transform": 0}, "layers_to_transform=0"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers'"),
    ],
)
def test_a_wrong_field_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FloraConfig(**kwargs)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"target_modules": ["fc", "norm"]}, TypeError, "norm cannot be adapted"),
        ({"target_modules": ["fc", "image"], "r": [2, 2]}, ValueError, r"image: rank=\(2, 2\) must have one entry"),
        ({"target_modules": ["fc", "head"], "r": [4, 4]}, ValueError, r"head: rank=\(4, 4\) goes above a mode"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_replaced(config, error, message):
    model = net()
    model.norm = nn.LayerNorm(3)
    with pytest.raises(error, match=message):
        peft.get_peft_model(model, FloraConfig(**config))
    assert not layers(model)


def test_another_version_of_peft_is_refused(monkeypatch):
    for version in ("0.19.0", "0.22.0"):
        monkeypatch.setattr(peft, "__version__", version)
        with pytest.raises(RuntimeError, match=f"peft {version} is installed"):
            importlib.reload(integration)


def test_peft_is_imported_only_when_asked_for():
    code = "import flora, flora.integrations, sys; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.slow
def test_the_tests_of_peft_itself():
    subprocess.run([sys.executable, "tests/peft_suite"], check=True, cwd=REPOSITORY)
