"""Networks as people have them: small ones of each architecture, drawn at random, through every verb."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import flora
from flora.finetune.network import pretrained
from flora.model import adapted_layers

TOKENS = torch.arange(1, 15).reshape(2, 7)
IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
SOUND = torch.linspace(0, 200, 2 * 600).sin().reshape(2, 600)

TEXT = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION = TEXT | {"image_size": 32, "patch_size": 8}
VISION.pop("vocab_size")


def of_text(kind: type, config: type, **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(config(**TEXT | options))


def vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=5))


def convnext() -> nn.Module:
    config = tf.ConvNextV2Config(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1], num_labels=5, image_size=32)
    model = tf.ConvNextV2ForImageClassification(config)
    for name, parameter in model.named_parameters():
        if "grn" in name:  # both start at zero
            nn.init.normal_(parameter)
    return model


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def t5(feed_forward: str) -> Callable[[], nn.Module]:
    config = {"vocab_size": 23, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return lambda: tf.T5ForConditionalGeneration(tf.T5Config(**config, feed_forward_proj=feed_forward))


def clip() -> nn.Module:
    text = tf.CLIPTextConfig(**TEXT, projection_dim=8, eos_token_id=14, max_position_embeddings=16)
    vision = tf.CLIPVisionConfig(**VISION, projection_dim=8)
    return tf.CLIPModel(tf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))


def mamba() -> nn.Module:
    config = tf.MambaConfig(vocab_size=23, hidden_size=16, state_size=4, num_hidden_layers=2)
    return tf.MambaForCausalLM(config)


def wav2vec2() -> nn.Module:
    config = tf.Wav2Vec2Config(
        **TEXT,
        conv_dim=(8, 8, 8),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    return tf.Wav2Vec2ForCTC(config)


@dataclass(frozen=True)
class Architecture:
    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    unmergeable: tuple[str, ...] = ()
    """Layers that are adapted, and that merging refuses by name."""

    def build(self) -> nn.Module:
        """The same one at every call, frozen."""
        torch.manual_seed(0)
        return self.make().eval().requires_grad_(False)

    def run(self, model: nn.Module) -> list[Tensor]:
        """Every tensor of the output."""
        output = model(**self.inputs)
        return [output] if isinstance(output, Tensor) else [t for t in output.to_tuple() if isinstance(t, Tensor)]

    def adapted(self, **options: Any) -> nn.Module:
        """With deltas that are not zero any more, and a scale that lets them be seen."""
        model = flora.adapt(self.build(), flora.TuckerConfig(rank=3, scale=2.0, **options))
        torch.manual_seed(1)
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                nn.init.normal_(layer.deltas["default"].core, std=0.1)
        return model


CASES = {
    "vit": Architecture(vit, {"pixel_values": IMAGES}),
    "convnextv2": Architecture(convnext, {"pixel_values": IMAGES}),
    "llama": Architecture(of_text(tf.LlamaForCausalLM, tf.LlamaConfig), {"input_ids": TOKENS}),
    "llama-tied": Architecture(
        of_text(tf.LlamaForCausalLM, tf.LlamaConfig, tie_word_embeddings=True), {"input_ids": TOKENS}
    ),
    "gpt2": Architecture(gpt2, {"input_ids": TOKENS}),
    "t5": Architecture(t5("relu"), {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(1)}),
    "t5-gated": Architecture(t5("gated-gelu"), {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(1)}),
    "clip": Architecture(clip, {"input_ids": TOKENS, "pixel_values": IMAGES}),
    "bert": Architecture(of_text(tf.BertForMaskedLM, tf.BertConfig), {"input_ids": TOKENS}),
    "mamba": Architecture(mamba, {"input_ids": TOKENS}),
    "wav2vec2": Architecture(wav2vec2, {"input_values": SOUND}, ("wav2vec2.encoder.pos_conv_embed.conv",)),
    "efficientnet-lite0": Architecture(lambda: pretrained(5, 32), {"inputs": IMAGES}),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request) -> Architecture:
    return request.param


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_the_first_output_is_the_frozen_bases(case, grad):
    base, model = case.build(), flora.adapt(case.build(), flora.TuckerConfig(rank=3))
    with torch.set_grad_enabled(grad):
        assert_same(case.run(model), case.run(base))


def test_a_training_step_reaches_every_part_of_every_delta(case):
    model = case.adapted().train()  # which would warn about a layer that it does not reach
    sum(output.float().square().sum() for output in case.run(model)).backward()
    for name, parameter in model.named_parameters():
        if ".deltas." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_a_saved_adapter_is_the_same_on_a_fresh_base(case, tmp_path):
    model = case.adapted()
    flora.save_adapter(model, tmp_path / "adapter", hashes=True)
    with torch.no_grad():
        assert_same(case.run(flora.load_adapter(case.build(), tmp_path / "adapter")), case.run(model))


@torch.no_grad()
def test_merging_and_back(case):
    base = case.run(case.build())
    model = case.adapted(exclude_modules=case.unmergeable)
    before, state = case.run(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not torch.equal(before[0], base[0])
    flora.merge(model)
    assert_same_state(model.state_dict(), state)
    for merged, unmerged in zip(case.run(model), before, strict=True):
        torch.testing.assert_close(merged, unmerged, rtol=1e-3, atol=1e-4 * float(unmerged.abs().max()))
    with flora.disabled(model):
        assert_same(case.run(model), base)
    flora.unmerge(model)
    assert_same_state(model.state_dict(), state)
    assert_same(case.run(model), before)


@torch.no_grad()
def test_unloading_restores_the_base(case):
    base = case.build()
    model = flora.unload(case.adapted(), merge=False)
    assert_same_state(model.state_dict(), base.state_dict())
    assert_same(case.run(model), case.run(base))
    assert [type(module).__name__ for module in model.modules()] == [type(module).__name__ for module in base.modules()]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.unmergeable])
def test_what_cannot_be_merged_is_named_and_nothing_is(name):
    case = CASES[name]
    model = case.adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(case.unmergeable) <= set(adapted_layers(model))
    with pytest.raises(RuntimeError, match=f"cannot merge {case.unmergeable[0]}: its weight is parametrised"):
        flora.merge(model)
    assert_same_state(model.state_dict(), before)
