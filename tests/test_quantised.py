"""A base whose linear layers torchao has quantised to int8: it trains, saves and loads, and is never merged."""

import copy
import warnings

import pytest
import torch
from test_architectures import CASES, assert_same
from torch import nn

import flora
from flora.model import adapted_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torchao's import
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

LLAMA = CASES["llama"]
QUERY = "model.layers.0.self_attn.q_proj"
METHODS = {
    "tucker": flora.TuckerConfig(rank=3, scale=2.0),
    "dropout": flora.TuckerConfig(rank=3, scale=2.0, dropout=0.3),
    "lora": flora.LoRAConfig(rank=3),
    "kronecker": flora.KroneckerConfig(rank=1),
}


def quantised(dtype=torch.float32) -> nn.Module:
    """LLaMA with every linear layer in int8, the same at every call."""
    model = LLAMA.build().to(dtype)
    quantize_(model, Int8WeightOnlyConfig(version=2))
    return model


def train(model: nn.Module) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**LLAMA.inputs, labels=LLAMA.inputs["input_ids"]).loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_saves_and_loads(method, dtype, tmp_path):
    base, model = quantised(dtype), flora.adapt(quantised(dtype), METHODS[method])
    with torch.no_grad():
        plain = LLAMA.run(base)
        assert_same(LLAMA.run(model), plain)
        train_again = torch.enable_grad()(train)
        train_again(model)
        trained = LLAMA.run(model)
        assert not torch.equal(trained[0], plain[0])
        for parameter in (p for layer in adapted_layers(model).values() for p in layer.deltas.parameters()):
            assert parameter.dtype == torch.float32
            assert parameter.grad.any()
        flora.save_adapter(model, tmp_path / "adapter", hashes=True)
        assert_same(LLAMA.run(flora.load_adapter(quantised(dtype), tmp_path / "adapter").eval()), trained)
        assert_same(LLAMA.run(copy.deepcopy(model)), trained)
        assert_same(LLAMA.run(flora.unload(model, merge=False)), plain)


def test_merging_is_refused_by_name():
    model = flora.adapt(quantised(), flora.TuckerConfig(rank=3))
    before = LLAMA.run(model)
    for verb in (flora.merge, flora.unload):
        with pytest.raises(
            RuntimeError, match=r"cannot merge model\.layers\.0\.self_attn\.q_proj: the weight of Linear is"
        ):
            verb(model)
    assert_same(LLAMA.run(model), before)


def test_autocast_and_a_cast_base():
    expected = LLAMA.run(flora.adapt(quantised(), METHODS["tucker"]))[0]
    with torch.autocast("cpu", torch.bfloat16):
        model = flora.adapt(quantised(), METHODS["tucker"]).train()
        model(**LLAMA.inputs, labels=LLAMA.inputs["input_ids"]).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        found = LLAMA.run(model.eval())[0]
    cast = LLAMA.run(flora.adapt(quantised(), METHODS["tucker"], base_dtype=torch.bfloat16))[0]
    for output in (found, cast):
        torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (flora.TuckerConfig(rank=2, init="hosvd"), 'init="hosvd" needs its weight as plain numbers'),
        (flora.LoRAXSConfig(rank=2), "its fixed factors are those of a weight that is there as plain numbers"),
        (flora.RescaleConfig(), "its weight must be there as plain numbers"),
    ],
)
def test_what_needs_the_numbers_leaves_quantised_layers_alone(config, reason):
    def part() -> nn.Module:
        model = LLAMA.build()
        quantize_(model, Int8WeightOnlyConfig(version=2), filter_fn=lambda module, name: name.endswith("q_proj"))
        return model

    model = flora.adapt(part(), config)
    name = "model.layers.0.self_attn.q_proj"
    assert flora.summary(model).left_alone[name] == (
        "Linear",
        f"{type(config).__name__} cannot adapt a Linear: {reason}",
    )
    assert "model.layers.0.self_attn.k_proj" in adapted_layers(model)
    base = part()
    with pytest.raises(ValueError, match=f"^{QUERY}: target_modules=.* names it, but .*{reason}"):
        flora.adapt(base, type(config).from_dict(config.to_dict() | {"target_modules": ["layers.0.self_attn.q_proj"]}))
    assert not any(isinstance(module, flora.AdaptedLayer) for module in base.modules())


def test_a_quantised_module_cannot_be_trained_whole():
    with pytest.raises(ValueError, match="lm_head: modules_to_save names it, but this Linear is quantised"):
        flora.adapt(quantised(), flora.TuckerConfig(rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_a_base_that_is_not_quantised_is_told_apart(tmp_path):
    flora.save_adapter(flora.adapt(quantised(), METHODS["tucker"]), tmp_path / "adapter")
    with pytest.warns(UserWarning, match=f"'{QUERY}.weight' is float32 in this model, float32_Int8Tensor in"):
        flora.load_adapter(LLAMA.build(), tmp_path / "adapter")
    flora.save_adapter(flora.adapt(quantised(), METHODS["tucker"]), tmp_path / "adapter", hashes=True)
    other = LLAMA.build()
    with torch.no_grad():
        other.lm_head.weight += 0.1
    quantize_(other, Int8WeightOnlyConfig(version=2))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' has other values"):
        flora.load_adapter(other, tmp_path / "adapter")
