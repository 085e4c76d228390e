"""The verbs on whole models, on real small networks; a verb that fails leaves the model as it was."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.utils.checkpoint
import transformers
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from flora.config import LDRConfig, TuckerConfig
from flora.drop_in import Conv2d, Linear
from flora.hooks import hold_eval, warn_unreached
from flora.layers import AdaptedLayer, wrap
from flora.model import (
    adapt,
    adapted_layers,
    add_adapter,
    delete_adapter,
    disabled,
    merge,
    saved_modules,
    set_adapter,
    state_of,
    unload,
    unmerge,
)
from flora.report import summary
from flora.saved import SavedModule
from flora.serialization import load_adapter, save_adapter

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.BatchNorm2d(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return transformers.ViTForImageClassification(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=19, n_embd=16, n_layer=2, n_head=2))


def llama():
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


IMAGES, TOKENS = torch.linspace(-2, 2, 2 * 3 * 8 * 8).sin().reshape(2, 3, 8, 8), torch.arange(14).reshape(2, 7)
INPUTS = {small_cnn: IMAGES, vit: IMAGES, gpt2: TOKENS, llama: TOKENS, encoder: IMAGES.reshape(2, 12, 16)}
MODELS = pytest.mark.parametrize("make", list(INPUTS), ids=lambda make: make.__name__)


def run(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def build(make=small_cnn):
    torch.manual_seed(0)
    return make().eval()


def frozen(model):
    return model.requires_grad_(False)


def stir(model, seed=1):
    """Give every delta and every copy of the model values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model


def snapshot(model):
    """All that a failed verb must leave alone."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules(remove_duplicate=False)},
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "flags": {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "merged": {n: m.merged for n, m in model.named_modules() if isinstance(m, AdaptedLayer)},
        "active": {n: m.active for n, m in model.named_modules() if isinstance(m, AdaptedLayer)},
        "state": copy.deepcopy(model.__dict__.get("_flora_state")),
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    values, old = after.pop("values"), before.pop("values")
    assert after == before
    assert values.keys() == old.keys()
    assert all(torch.equal(values[name], old[name]) for name in old)


# Adapting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "grad"),
    # with grad, PyTorch projects by another kernel in nn.MultiheadAttention, since its packed weight requires grad
    [(make, grad) for make in INPUTS for grad in (True, False) if make is not encoder or not grad],
)
def test_the_first_output_is_the_frozen_bases_bit_for_bit(make, grad):
    x = INPUTS[make]
    with torch.set_grad_enabled(grad):
        expected = run(frozen(build(make)), x)
        model = build(make)
        assert adapt(model, TuckerConfig(rank=4)) is model
        assert torch.equal(run(model, x), expected)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all(".deltas.default." in name for name in learning)


@MODELS
def test_a_round_through_all_verbs(make):
    x = INPUTS[make]
    expected = run(frozen(build(make)), x)
    model = stir(adapt(build(make), TuckerConfig(rank=4)))
    with torch.no_grad():
        adapted = run(model, x)
        assert not torch.allclose(adapted, expected, **CLOSE)
        with disabled(model):
            assert torch.equal(run(model, x), expected)
        assert torch.equal(run(model, x), adapted)
        merge(model)
        torch.testing.assert_close(run(model, x), adapted, **CLOSE)
        with disabled(model):
            assert torch.equal(run(model, x), expected)
        unmerge(model)
        assert torch.equal(run(model, x), adapted)
        plain = unload(copy.deepcopy(model))
        torch.testing.assert_close(run(plain, x), adapted, **CLOSE)
        assert unload(model, merge=False) is model
        assert torch.equal(run(model, x), expected)
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())


@MODELS
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_independent_and_equal(make, clone):
    x = INPUTS[make]
    model = stir(
        adapt(
            build(make),
            TuckerConfig(
                rank=4,
                target_modules=lambda name, module: (
                    isinstance(module, nn.Linear) or type(module).__name__ in ("Conv2d", "Conv1D")
                ),
            ),
        )
    )
    with torch.no_grad():
        expected = run(model, x)
        twin = clone(model)
        assert torch.equal(run(twin, x), expected)
        merge(twin)
        assert torch.equal(run(model, x), expected)
        unload(twin)
        assert torch.equal(run(model, x), expected)
    assert str(summary(clone(model))) == str(summary(model))


def test_embeddings_and_attention_survive_copying():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(19, 16), encoder()).eval()
    stir(adapt(model, TuckerConfig(rank=4, target_modules=["0", "self_attn", "linear1"])))
    with torch.no_grad():
        expected = model(TOKENS)
        assert torch.equal(copy.deepcopy(model)(TOKENS), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(TOKENS), expected)


def test_training_touches_the_adapter_alone():
    model = adapt(build(), TuckerConfig(rank=4, modules_to_save=["8"])).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(IMAGES).square().mean().backward()
        optimiser.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"0.deltas.default.core", "3.deltas.default.core", "8.copies.default.weight"} <= changed
    assert not any("base_layer" in name or name.startswith(("1.", "5.")) for name in changed)


def test_frozen_batch_norm_is_held_and_the_saved_one_trains():
    model = adapt(build(), TuckerConfig(rank=4, target_modules=["0"], modules_to_save=["5"]))
    evaluated = model.eval()(IMAGES)
    held, trained = model[1], model[5].copies["default"]
    model.train()
    model(IMAGES)
    assert not held.training
    assert trained.training
    assert held.num_batches_tracked == 0
    assert trained.num_batches_tracked == 1
    assert model[5].base_layer.num_batches_tracked == 0
    for _ in range(3):
        model(IMAGES)
    with disabled(model):
        assert torch.equal(model(IMAGES), frozen(build())(IMAGES))
    assert not torch.equal(model.eval()(IMAGES), evaluated)  # the saved one has new statistics
    plain = unload(model.train())
    assert plain[1].training
    assert plain[5] is trained
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in plain.modules())


def test_copies_of_held_layers_are_not_held():
    model = adapt(build(), TuckerConfig(rank=2, target_modules=["0"]))
    adapt(model, TuckerConfig(rank=2, target_modules=["0"], modules_to_save=["5"]), "second")
    set_adapter(model, "second")
    model.train()(IMAGES)
    assert model[5].current.training
    assert hold_eval in model[5].base_layer._forward_pre_hooks.values()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = nn.Sequential(nn.Linear(8, 8), self.first)
        self.table = nn.Embedding(8, 8)
        self.out = nn.Linear(8, 8, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.again(self.first(x)) + self.table(torch.arange(4)))


def test_a_module_in_two_places_becomes_one_adapted_layer():
    x = torch.ones(4, 8)
    torch.manual_seed(0)
    model = Tied()
    first, expected = model.first, frozen(copy.deepcopy(model))(x)
    adapt(model, TuckerConfig(rank=2, modules_to_save=["again.0"]))
    assert isinstance(model.first, AdaptedLayer)
    assert model.again[1] is model.first
    assert torch.equal(model(x), expected)
    unload(model, merge=False)
    assert model.first is first
    assert model.again[1] is first
    assert torch.equal(model(x), expected)


def test_a_saved_module_in_two_places_has_one_copy():
    model = adapt(Tied(), TuckerConfig(rank=2, target_modules=["again.0"], modules_to_save=["first"]))
    assert model.again[1] is model.first
    assert list(saved_modules(model)) == ["first"]
    trained = model.first.copies["default"]
    unload(model)
    assert model.first is trained
    assert model.again[1] is trained


def test_merging_unties_a_tied_weight_and_unmerging_ties_it_again():
    x = torch.ones(4, 8)
    model = stir(adapt(Tied(), TuckerConfig(rank=2)))
    table = model.table.weight
    assert model.out.base_layer.weight is table
    value, expected = table.clone(), model(x)
    merge(model)
    assert torch.equal(model.table.weight, value)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    unmerge(model)
    assert model.out.base_layer.weight is model.table.weight
    plain = unload(model)
    assert plain.table.weight is table
    assert plain.out.weight is not table
    torch.testing.assert_close(plain(x), expected, **CLOSE)


def test_requires_grad_is_given_back():
    model = build()
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    config = TuckerConfig(rank=2, modules_to_save=["8"])
    for merged in (True, False):
        unload(adapt(model, config), merge=merged)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_adapting_a_mapping():
    model = stir(adapt(build(), {"0": TuckerConfig(rank=1), "all": TuckerConfig(rank=3, scale=0.5)}))
    layers = adapted_layers(model)
    assert layers["0"].deltas["default"].ranks == (1, 1, 2, 2)
    assert layers["4"].deltas["default"].ranks == (3, 3, 1, 1)
    assert layers["4"].deltas["default"].scale == 0.5
    assert state_of(model).adapters["default"].patterns["0"] == "0"


@pytest.mark.parametrize(
    ("config", "name", "error", "message"),
    [
        (TuckerConfig(rank=(4, 4)), "default", ValueError, r"^0: rank=\(4, 4\) must have one entry a mode"),
        (TuckerConfig(rank_pattern={"8": (6, 2)}), "default", ValueError, r"^8: rank=\(6, 2\) goes above a mode"),
        (TuckerConfig(target_modules=["convv"]), "default", ValueError, "'convv' matches no module"),
        (TuckerConfig(), "a.b", ValueError, r"'a\.b'"),
        (TuckerConfig(), "a/b", ValueError, "'a/b'"),
        (TuckerConfig(), "", ValueError, "''"),
        (TuckerConfig(), "keys", ValueError, "'keys' is taken"),
        (TuckerConfig(), None, ValueError, "None"),
        ({"rank": 4}, "default", TypeError, "config must be a DeltaConfig"),
        (4, "default", TypeError, "config must be a DeltaConfig .* not 4"),
    ],
)
def test_a_failed_adapt_leaves_the_model_as_it_was(config, name, error, message):
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        adapt(model, config, name)
    assert_unchanged(model, before)


def test_a_failure_in_the_middle_of_adapt_is_undone(monkeypatch):
    model = adapt(build(), TuckerConfig(rank=2, target_modules=["0"], modules_to_save=["8"]))
    before = snapshot(model)
    calls = []

    def fails_late(self, adapter, config, **kwargs):
        calls.append(self.name)
        if len(calls) > 2:
            raise MemoryError("no more")
        return add(self, adapter, config, **kwargs)

    add = AdaptedLayer.add_delta
    monkeypatch.setattr(AdaptedLayer, "add_delta", fails_late)
    with pytest.raises(MemoryError, match="no more"):
        adapt(model, TuckerConfig(rank=2, modules_to_save=["8"]), "second")
    assert len(calls) == 3
    assert_unchanged(model, before)


def test_a_failure_while_modules_are_replaced_is_undone():
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.last = nn.Linear(4, 4)

        def __setattr__(self, name, value):
            if name == "last" and isinstance(value, AdaptedLayer):
                raise TypeError("last: cannot be replaced")
            super().__setattr__(name, value)

    model = Stubborn()
    before = snapshot(model)
    with pytest.raises(TypeError, match="last: cannot be replaced"):
        adapt(model, TuckerConfig(rank=2))
    assert_unchanged(model, before)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Conv2d(1, 1, 1), nn.MultiheadAttention(4, 2), nn.ReLU()])
def test_a_single_layer_is_for_wrap(module):
    with pytest.raises(ValueError, match=rf"single {type(module).__name__}; use flora\.wrap"):
        adapt(module, TuckerConfig())


def test_what_is_no_model():
    for verb in (summary, merge, unmerge, unload, lambda m: adapt(m, TuckerConfig())):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not dict"):
            verb({})
    with pytest.raises(ValueError, match="use its add_delta"):
        adapt(wrap(nn.Linear(4, 4), TuckerConfig(rank=2)), TuckerConfig())


def test_a_part_that_was_adapted_by_itself_is_named():
    model = nn.Sequential(build(), nn.Linear(5, 5))
    adapt(model[0], TuckerConfig(rank=2))
    for verb in (merge, summary, lambda m: adapt(m, TuckerConfig(), "outer")):
        with pytest.raises(RuntimeError, match=r"^0 was adapted by itself"):
            verb(model)


VERBS = {
    "add_adapter": lambda model: add_adapter(model, TuckerConfig(), "x"),
    "set_adapter": lambda model: set_adapter(model, "default"),
    "delete_adapter": lambda model: delete_adapter(model, "default"),
    "merge": merge,
    "unmerge": unmerge,
    "unload": unload,
    "disabled": lambda model: disabled(model).__enter__(),
    "summary": summary,
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_verb_on_a_model_without_adapters(verb):
    model = build()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"Sequential has no adapters; flora\.adapt adds one"):
        verb(model)
    assert_unchanged(model, before)


# Several adapters --------------------------------------------------------------------------------------------------


def two_tasks():
    model = stir(adapt(build(), TuckerConfig(rank=2, target_modules=["0", "4"], modules_to_save=["8"])))
    add_adapter(model, TuckerConfig(rank=3, target_modules=["4", "3"], modules_to_save=["8"]), "task_b")
    return model


def learning(model):
    return {
        part
        for name, p in model.named_parameters()
        if p.requires_grad
        for part in ("default", "task_b")
        if part in name
    }


def test_a_second_adapter_waits():
    model = stir(adapt(build(), TuckerConfig(rank=2, target_modules=["0", "4"], modules_to_save=["8"])))
    expected = model(IMAGES)
    add_adapter(model, TuckerConfig(rank=3, target_modules=["4", "3"], modules_to_save=["8"]), "task_b")
    assert torch.equal(model(IMAGES), expected)
    assert learning(model) == {"default"}
    assert state_of(model).active == ("default",)


def test_choosing_and_deleting_adapters():
    model = two_tasks()
    first = model(IMAGES)
    set_adapter(model, "task_b")
    assert learning(model) == {"task_b"}
    assert torch.equal(model(IMAGES), frozen(build())(IMAGES))
    second = stir(model, 2)(IMAGES)
    assert not torch.equal(second, first)
    set_adapter(model, "default")
    assert torch.equal(model(IMAGES), first)
    delete_adapter(model, "default")
    assert state_of(model).active == ()
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model(IMAGES), frozen(build())(IMAGES))
    set_adapter(model, ["task_b"])
    assert torch.equal(model(IMAGES), second)
    delete_adapter(model, "task_b")
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="no adapters"):
        summary(model)


def test_updates_of_active_adapters_add():
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(6, 6)), TuckerConfig(rank=2))
    adapt(model, TuckerConfig(rank=2), "other")
    x = torch.randn(3, 6)
    set_adapter(model, ["default", "other"])
    assert learning(model) == {"default"}
    stir(model)
    both = model(x)
    deltas = model[0].deltas
    weight = model[0].base_layer.weight
    expected = weight + deltas["default"].delta_weight(weight) + deltas["other"].delta_weight(weight)
    torch.testing.assert_close(both, nn.functional.linear(x, expected, model[0].base_layer.bias), **CLOSE)
    merge(model)
    torch.testing.assert_close(model(x), both, **CLOSE)


def test_which_adapters_learn_is_what_the_last_choice_said():
    model = two_tasks()
    set_adapter(model, "task_b", trainable=False)
    assert learning(model) == set()
    set_adapter(model, "task_b", trainable=["default"])
    assert learning(model) == {"default"}
    assert state_of(model).active == ("task_b",)
    set_adapter(model, {"default": 0.5})
    assert learning(model) == {"default"}
    set_adapter(model, "default", trainable="task_b")
    assert learning(model) == {"task_b"}


def test_weights_multiply_updates_until_the_next_choice():
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(6, 6)), TuckerConfig(rank=2, scale=3.0))
    adapt(model, TuckerConfig(rank=2), "other")
    set_adapter(model, ["default", "other"])
    stir(model)
    x = torch.randn(3, 6)
    base = model[0].base_layer(x)
    set_adapter(model, "default")
    first = model(x) - base
    set_adapter(model, "other")
    second = model(x) - base
    set_adapter(model, {"other": -2, "default": 0.25})
    torch.testing.assert_close(model(x), base + 0.25 * first - 2 * second, **CLOSE)
    assert {row.adapter: (row.scale, row.strength) for row in summary(model).layers} == {
        "default": (3.0, 0.25),
        "other": (1.0, -2.0),
    }
    assert "3 × 0.25" in str(summary(model))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    merge(model)
    torch.testing.assert_close(model(x), base + 0.25 * first - 2 * second, **CLOSE)
    unmerge(model)
    set_adapter(model, {"default": 0.0})
    assert torch.equal(model(x), base)
    set_adapter(model, "default")
    torch.testing.assert_close(model(x), base + first, **CLOSE)


@pytest.mark.parametrize(
    ("verb", "error", "message"),
    [
        (
            lambda m: adapt(m, TuckerConfig(), "default"),
            ValueError,
            "already an adapter 'default'; there are 'default', 'task_b'",
        ),
        (lambda m: add_adapter(m, TuckerConfig(), "task_b"), ValueError, "already an adapter 'task_b'"),
        (lambda m: set_adapter(m, "taskb"), ValueError, "no adapter 'taskb'; there are 'default', 'task_b'"),
        (lambda m: set_adapter(m, ["default", "x"]), ValueError, "no adapter 'x'"),
        (lambda m: set_adapter(m, []), ValueError, "must name an adapter"),
        (
            lambda m: set_adapter(m, ["default", "task_b"]),
            ValueError,
            "^8: only one of 'default', 'task_b'",
        ),
        (lambda m: set_adapter(m, None), TypeError, "name=None must be a name or names"),
        (lambda m: set_adapter(m, "default", trainable=3), TypeError, "trainable=3 must be a name or names"),
        (lambda m: set_adapter(m, {}), ValueError, r"name=\{\} must name an adapter"),
        (lambda m: set_adapter(m, {"default": 1.0, "x": 1.0}), ValueError, "no adapter 'x'"),
        (lambda m: set_adapter(m, {"default": True}), ValueError, "the weight True of 'default' must be a finite"),
        (lambda m: set_adapter(m, {"default": "1"}), ValueError, "the weight '1' of 'default'"),
        (lambda m: set_adapter(m, {"task_b": float("nan")}), ValueError, "the weight nan of 'task_b'"),
        (lambda m: set_adapter(m, "default", trainable="x"), ValueError, "no adapter 'x'"),
        (lambda m: delete_adapter(m, "x"), ValueError, "no adapter 'x'"),
        (unmerge, RuntimeError, "no adapter is merged"),
    ],
)
def test_a_failed_choice_leaves_the_model_as_it_was(verb, error, message):
    model = two_tasks()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        verb(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        (lambda m: adapt(m, TuckerConfig(), "third"), "0, 4 are merged; unmerge first"),
        (lambda m: set_adapter(m, "task_b"), "merged; unmerge first"),
        (lambda m: delete_adapter(m, "task_b"), "merged; unmerge first"),
        (merge, "the active adapters are merged already"),
    ],
)
def test_a_merged_model_refuses_and_stays(verb, message):
    model = two_tasks()
    merge(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=message):
        verb(model)
    assert_unchanged(model, before)


# Merging -----------------------------------------------------------------------------------------------------------


def test_merge_is_all_or_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    stir(adapt(model, TuckerConfig(rank=2)))
    x = torch.ones(1, 4)
    expected, before = model(x), snapshot(model)
    for verb in (merge, unload):
        with pytest.raises(RuntimeError, match="^cannot merge 1: its weight is parametrised"):
            verb(model)
        assert_unchanged(model, copy.copy(before))
    assert torch.equal(model(x), expected)
    unload(model, merge=False)


def test_a_failure_in_the_middle_of_merge_is_undone(monkeypatch):
    model = stir(adapt(build(), TuckerConfig(rank=2)))
    before = snapshot(model)
    last = adapted_layers(model)["8"]

    def fails(self, **options):
        if self is last:
            raise MemoryError("no more")
        return original(self, **options)

    original = AdaptedLayer.merge
    monkeypatch.setattr(AdaptedLayer, "merge", fails)
    with pytest.raises(MemoryError):
        merge(model)
    assert_unchanged(model, before)


def test_merging_with_nothing_active():
    model = two_tasks()
    delete_adapter(model, "default")
    with pytest.raises(RuntimeError, match="no adapter is active"):
        merge(model)
    assert torch.equal(unload(model)(IMAGES), frozen(build())(IMAGES))


def test_unloading_a_merged_model():
    model = stir(adapt(build(), TuckerConfig(rank=2, modules_to_save=["8"])))
    expected, head = model(IMAGES), model[8].current
    base = frozen(build())(IMAGES)
    merge(model)
    twin = copy.deepcopy(model)
    assert torch.equal(unload(twin, merge=False)(IMAGES), base)
    merged = model(IMAGES)
    assert torch.equal(unload(model)(IMAGES), merged)
    assert model[8] is head
    torch.testing.assert_close(merged, expected, **CLOSE)


def test_disabled_nests_and_survives_exceptions():
    model = stir(adapt(build(), TuckerConfig(rank=2, modules_to_save=["8"])))
    expected, base = model(IMAGES), frozen(build())(IMAGES)
    with pytest.raises(KeyError, match="stop"), disabled(model):
        with disabled(model):
            assert torch.equal(model(IMAGES), base)
        assert torch.equal(model(IMAGES), base)
        raise KeyError("stop")
    assert torch.equal(model(IMAGES), expected)


# Models built from adapted layers ----------------------------------------------------------------------------------


def test_verbs_work_on_layers_that_were_wrapped_one_by_one():
    torch.manual_seed(0)
    config = TuckerConfig(rank=2)
    model = nn.Sequential(Conv2d(3, 4, 3, delta=config), nn.Flatten(), Linear(4 * 36, 2, delta=TuckerConfig(rank=1)))
    stir(model)
    expected = model(IMAGES)
    assert state_of(model).adapters["default"].config == {"0": config, "2": TuckerConfig(rank=1)}
    merge(model)
    torch.testing.assert_close(model(IMAGES), expected, **CLOSE)
    unmerge(model)
    assert torch.equal(model(IMAGES), expected)
    adapt(model, TuckerConfig(rank=1), "second")
    set_adapter(model, "second")
    assert summary(model).active == ("second",)
    plain = unload(model, merge=False)
    assert [type(module) for module in plain] == [nn.Conv2d, nn.Flatten, nn.Linear]


def test_a_single_wrapped_layer_is_unloaded_to_its_base():
    base = nn.Linear(4, 4)
    layer = stir(wrap(base, TuckerConfig(rank=2)))
    expected = layer(torch.ones(1, 4))
    merge(layer)
    unmerge(layer)
    plain = unload(layer)
    assert plain is base
    torch.testing.assert_close(plain(torch.ones(1, 4)), expected, **CLOSE)


# What a training step reaches --------------------------------------------------------------------------------------


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_a_delta_that_a_training_step_never_reached_is_warned_about_once():
    x = torch.ones(2, 4)
    model = adapt(Partial(), TuckerConfig(rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(x)
        with torch.no_grad():
            model.train()(x)
        with disabled(model):
            model(x)
    with pytest.warns(UserWarning, match="did not reach the deltas of unused: they will not learn"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        adapt(model, TuckerConfig(rank=2, target_modules=["used"]), "second")
        set_adapter(model, "second")
        model(x)
    assert warn_unreached in model._forward_hooks.values()


def test_training_while_merged_is_warned_about_once():
    x = torch.ones(2, 4)
    model = adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), TuckerConfig(rank=2, modules_to_save=["1"]))
    merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(x)
        with torch.no_grad():
            model.train()(x)
        with disabled(model):
            model(x)
    with pytest.warns(UserWarning, match="^the deltas of 0 are merged and do not learn; unmerge first"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        unmerge(model)
        model(x)


def test_an_evaluation_with_gradients_does_not_count_as_a_training_step():
    class EvaluatedOnly(Partial):
        def forward(self, x):
            return self.used(x) if self.training else self.unused(self.used(x))

    x, model = torch.ones(2, 4), adapt(EvaluatedOnly(), TuckerConfig(rank=2))
    model.eval()(x).sum().backward()
    with pytest.warns(UserWarning, match="did not reach the deltas of unused: they will not learn"):
        model.train()(x)


# The rest ----------------------------------------------------------------------------------------------------------


def test_saved_modules_answer_their_attributes():
    model = adapt(build(), TuckerConfig(rank=2, modules_to_save=["8"]))
    head = model[8]
    assert head.out_features == 5
    assert head.weight is head.copies["default"].weight
    with disabled(model):
        assert head.weight is head.base_layer.weight
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = head.nothing_here
    with pytest.raises(ValueError, match="^8: already has a copy for the adapter 'default'"):
        head.add_copy("default")
    with pytest.raises(AttributeError):  # as copying and unpickling ask it
        _ = SavedModule.__new__(SavedModule).anything


def test_half_precision_bases_keep_float32_factors():
    model = adapt(build().to(torch.bfloat16), TuckerConfig(rank=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(IMAGES.to(torch.bfloat16)).dtype == torch.bfloat16


def test_an_unloaded_model_holds_nothing_of_the_adapter():
    model = stir(adapt(build(), TuckerConfig(rank=2)))
    delta = weakref.ref(adapted_layers(model)["0"].deltas["default"])
    unload(model)
    gc.collect()
    assert delta() is None
    assert "_flora_state" not in model.__dict__


def test_dropout_leaves_packed_attention_alone_under_all_and_is_an_error_when_named():
    def make():
        return nn.TransformerEncoderLayer(8, 2, 16)

    model = adapt(make(), TuckerConfig(rank=2, dropout=0.1))
    assert not isinstance(model.self_attn, AdaptedLayer) and isinstance(model.linear1, AdaptedLayer)
    assert "dropout=0.1 is not possible on MultiheadAttention" in str(summary(model))
    with pytest.raises(ValueError, match="self_attn: .*dropout=0.1 is not possible"):
        adapt(make(), TuckerConfig(rank=2, dropout=0.1, target_modules=["self_attn"]))


def test_reentrant_checkpointing_is_no_reason_for_a_warning():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=True)

    model = adapt(Checkpointed(nn.Linear(4, 4), nn.Linear(4, 4)), TuckerConfig(rank=2)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("core"))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_refused(wrapper, tmp_path):
    """A file of it would have names that no other model has."""
    base = nn.Sequential(nn.Linear(4, 4))
    save_adapter(adapt(nn.Sequential(nn.Linear(4, 4)), TuckerConfig(rank=2)), tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="the model is wrapped, a"):
        adapt(wrapper(base), TuckerConfig(rank=2))
    with pytest.raises(RuntimeError, match="the model is wrapped, a"):
        load_adapter(wrapper(base), tmp_path / "adapter")
    assert type(base[0]) is nn.Linear and base[0].weight.requires_grad


def test_verbs_on_a_wrapped_model_say_where_to_call_them():
    model = adapt(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), TuckerConfig(rank=2))
    compiled = torch.compile(model)
    for verb in (merge, unload, lambda m: set_adapter(m, "default")):
        with pytest.raises(RuntimeError, match=r"the model is wrapped, a OptimizedModule: .* its \._orig_mod"):
            verb(compiled)


def test_verbs_in_inference_mode_leave_a_model_that_can_be_trained():
    layers, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(3, 6)
    with torch.inference_mode():
        model = adapt(layers, TuckerConfig(rank=2))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.inference_mode():
        merge(model)
    x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # merged deltas do not learn, as the next call says
        model(x).sum().backward()
    torch.testing.assert_close(x.grad, (model[0].base_layer.weight.mT @ model[1].base_layer.weight.sum(0)).expand(3, 6))


def test_a_delta_that_no_memory_can_hold_is_refused_by_the_module_s_name():
    model = nn.Sequential(nn.Linear(6, 5))
    before = list(model.modules())
    with pytest.raises(RuntimeError, match="^0: LDRConfig cannot make its tensors: "):
        adapt(model, LDRConfig(terms=2**45))
    assert list(model.modules()) == before
