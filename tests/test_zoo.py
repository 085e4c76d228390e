"""Small random networks of many architectures of transformers', each through the life of an adapter.

A few run always, all of them in `make zoo`. `test_architectures` has every verb by itself, on fewer networks.
"""

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as tf
from test_architectures import IMAGES, SOUND, TEXT, TOKENS, VISION, assert_same, assert_same_state
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

import flora
from flora.model import adapted_layers

STEPS = 3
LABELS = torch.tensor([1, 3])
MAPS = torch.arange(2 * 32 * 32).reshape(2, 32, 32) % 4
SPECTRA = torch.linspace(-1, 1, 2 * 16 * 24).sin().reshape(2, 16, 24)
GQA = {"num_key_value_heads": 1}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1, "norm_topk_prob": True}


def loss_of(output: Any) -> Tensor:
    """The loss that the model computes of its labels, or of one without, that its masks are not empty."""
    loss = output["loss"] if "loss" in output else output.pred_masks.sigmoid().mean()
    return loss.mean()


@dataclass(frozen=True)
class Network:
    kind: str
    """The name of its class."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of its configuration."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Labels included."""

    def build(self) -> nn.Module:
        """The same one at every call, frozen and in evaluation mode, and none whose activations vanish or are constant:
        weights that start at zero are drawn, and running statistics are those of the inputs.
        """
        torch.manual_seed(0)
        kind = getattr(tf, self.kind)
        model = kind(kind.config_class(**self.options)).requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            self.call(model.train())
        return model.eval()

    def call(self, model: nn.Module) -> Any:
        return model(**self.inputs)

    @torch.no_grad()
    def run(self, model: nn.Module) -> list[Tensor]:
        """Every floating tensor of the output."""
        torch.manual_seed(0)
        found: list[Tensor] = []

        def walk(value: Any) -> None:
            if isinstance(value, Tensor) and value.is_floating_point():
                found.append(value)
            elif isinstance(value, dict):
                for item in value.values():
                    walk(item)
            elif isinstance(value, list | tuple):
                for item in value:
                    walk(item)

        walk(self.call(model))
        return found


def text(kind: str, labels: Tensor = TOKENS, **options: Any) -> Network:
    return Network(kind, TEXT | {"pad_token_id": 0} | options, {"input_ids": TOKENS, "labels": labels})


def image(kind: str, labels: Tensor = LABELS, **options: Any) -> Network:
    return Network(kind, {"image_size": 32, "num_labels": 5} | options, {"pixel_values": IMAGES, "labels": labels})


def patches(kind: str, **options: Any) -> Network:
    return image(kind, **VISION | options)


def speech(kind: str, **options: Any) -> Network:
    convolutions = {"conv_dim": (8, 8, 8), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    masks = {"apply_spec_augment": False, "ctc_zero_infinity": True}
    inputs = {"input_values": SOUND, "labels": TOKENS[:, :4]}
    return Network(kind, TEXT | convolutions | positions | masks | options, inputs)


SEQ2SEQ = {
    "vocab_size": 23,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": 23,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 20], "num_labels": 5}
WINDOWS = {"patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
TOWER = TEXT | {"max_position_embeddings": 16}
PAIRS = {"input_ids": TOKENS, "pixel_values": IMAGES, "return_loss": True}

NETWORKS = {
    "bert": text("BertForMaskedLM"),
    "albert": text("AlbertForMaskedLM", embedding_size=8),
    "roberta": text("RobertaForSequenceClassification", LABELS, num_labels=5),
    "deberta-v2": text(
        "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"], max_position_embeddings=16
    ),
    "electra": text("ElectraForMaskedLM", embedding_size=8),
    "distilbert": Network(
        "DistilBertForMaskedLM",
        {"vocab_size": 23, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        {"input_ids": TOKENS, "labels": TOKENS},
    ),
    "mpnet": text("MPNetForMaskedLM"),
    "modernbert": text("ModernBertForMaskedLM"),
    "esm": text("EsmForMaskedLM", mask_token_id=22),
    "xlnet": Network(
        "XLNetLMHeadModel",
        {"vocab_size": 23, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
        {"input_ids": TOKENS, "labels": TOKENS},
    ),
    "llama": text("LlamaForCausalLM"),
    "gpt2": text("GPT2LMHeadModel", n_layer=2, n_head=2, n_embd=16, n_positions=16),
    "mistral": text("MistralForCausalLM", **GQA),
    "mixtral": text("MixtralForCausalLM", **GQA, num_local_experts=4),
    "qwen2": text("Qwen2ForCausalLM", **GQA),
    "qwen2-moe": text("Qwen2MoeForCausalLM", **GQA, **EXPERTS, num_experts=4, shared_expert_intermediate_size=12),
    "qwen3": text("Qwen3ForCausalLM", **GQA, head_dim=8),
    "qwen3-moe": text("Qwen3MoeForCausalLM", **GQA, **EXPERTS, num_experts=4, head_dim=8),
    "gpt-oss": text("GptOssForCausalLM", **GQA, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": text("Gemma2ForCausalLM", **GQA, head_dim=8),
    "gemma3": text("Gemma3ForCausalLM", **GQA, head_dim=8),
    "olmo2": text("Olmo2ForCausalLM", **GQA),
    "phi": text("PhiForCausalLM"),
    "phi3": text("Phi3ForCausalLM"),
    "falcon": text("FalconForCausalLM", alibi=False, new_decoder_architecture=False),
    "opt": text("OPTForCausalLM", ffn_dim=24, word_embed_proj_dim=8, max_position_embeddings=16),
    "bloom": text("BloomForCausalLM", n_layer=2, n_head=2),
    "gpt-neox": text("GPTNeoXForCausalLM"),
    "gptj": Network(
        "GPTJForCausalLM",
        {"vocab_size": 23, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "rotary_dim": 4},
        {"input_ids": TOKENS, "labels": TOKENS},
    ),
    "mamba": text("MambaForCausalLM", state_size=4),
    "mamba2": text("Mamba2ForCausalLM", num_heads=4, head_dim=8, state_size=4, n_groups=1, chunk_size=4),
    "falcon-mamba": text("FalconMambaForCausalLM", state_size=4),
    "rwkv": text("RwkvForCausalLM", attention_hidden_size=16, context_length=16),
    "bart": Network("BartForConditionalGeneration", SEQ2SEQ, {"input_ids": TOKENS, "labels": TOKENS}),
    "marian": Network("MarianMTModel", SEQ2SEQ, {"input_ids": TOKENS, "labels": TOKENS}),
    "switch-transformers": Network(
        "SwitchTransformersForConditionalGeneration",
        {
            "vocab_size": 23,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "num_experts": 3,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "decoder_start_token_id": 0,
        },
        {"input_ids": TOKENS, "labels": TOKENS},
    ),
    "whisper": Network(
        "WhisperForConditionalGeneration",
        SEQ2SEQ | {"num_mel_bins": 16, "max_source_positions": 12, "max_target_positions": 16},
        {"input_features": SPECTRA, "labels": TOKENS},
    ),
    "wav2vec2": speech("Wav2Vec2ForCTC"),
    "hubert": speech("HubertForCTC"),
    "wavlm": speech("WavLMForCTC", num_buckets=8, max_bucket_distance=16),
    "audio-spectrogram": Network(
        "ASTForAudioClassification",
        VISION | {"num_mel_bins": 16, "max_length": 24, "num_labels": 5},
        {"input_values": SPECTRA.mT, "labels": LABELS},
    ),
    "vit": patches("ViTForImageClassification"),
    "deit": patches("DeiTForImageClassification"),
    "beit": patches("BeitForImageClassification", use_relative_position_bias=True),
    "dinov2": patches("Dinov2ForImageClassification"),
    "swin": image(
        "SwinForImageClassification", patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
    ),
    "swinv2": image(
        "Swinv2ForImageClassification", patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
    ),
    "convnext": image("ConvNextForImageClassification", **STAGES),
    "convnextv2": image("ConvNextV2ForImageClassification", **STAGES),
    "resnet": image("ResNetForImageClassification", **STAGES, embedding_size=8),
    "regnet": image("RegNetForImageClassification", **STAGES, embedding_size=8, groups_width=4),
    "mobilenet-v2": image("MobileNetV2ForImageClassification", depth_multiplier=0.35),
    "efficientnet": image(
        "EfficientNetForImageClassification",
        width_coefficient=0.25,
        depth_coefficient=0.25,
        hidden_dim=320,
        batch_norm_eps=1e-8,  # the usual one is far above the variances of weights as small as these
    ),
    "poolformer": image("PoolFormerForImageClassification", **STAGES),
    "pvt": image(
        "PvtForImageClassification",
        **STAGES | {"hidden_sizes": [8, 16, 16, 32]},
        num_attention_heads=[1, 2, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
    ),
    "mobilevit": image(
        "MobileViTForImageClassification",
        hidden_sizes=[8, 12, 16],
        neck_hidden_sizes=[4, 4, 8, 8, 12, 12, 16],
        num_attention_heads=2,
    ),
    "segformer": Network(  # of an image that leaves more than one patch to the last stage
        "SegformerForSemanticSegmentation",
        STAGES | {"num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 16},
        {"pixel_values": IMAGES.repeat(1, 1, 2, 2), "labels": MAPS.repeat(1, 2, 2)},
    ),
    "dpt": Network(
        "DPTForSemanticSegmentation",
        VISION
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "num_labels": 4,
            "neck_hidden_sizes": [4, 8, 8, 8],
            "fusion_hidden_size": 8,
        },
        {"pixel_values": IMAGES, "labels": MAPS},
    ),
    "vit-mae": Network(
        "ViTMAEForPreTraining",
        VISION
        | {
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 24,
        },
        {"pixel_values": IMAGES, "noise": torch.linspace(0, 9, 2 * 16).sin().reshape(2, 16)},
    ),
    "clip": Network(
        "CLIPModel", {"text_config": TOWER | {"eos_token_id": 14}, "vision_config": VISION, "projection_dim": 8}, PAIRS
    ),
    "siglip": Network("SiglipModel", {"text_config": TOWER, "vision_config": VISION}, PAIRS),
    "clipseg": Network(
        "CLIPSegForImageSegmentation",
        {
            "text_config": TOWER | {"eos_token_id": 14},
            "vision_config": VISION,
            "projection_dim": 16,
            "reduce_dim": 8,
            "extract_layers": [0, 1],
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 8,
        },
        {"input_ids": TOKENS, "pixel_values": IMAGES, "labels": (MAPS % 2).float()},
    ),
    "sam": Network(
        "SamModel",
        {
            "vision_config": VISION
            | {"output_channels": 16, "num_pos_feats": 8, "global_attn_indexes": [1], "window_size": 2, "mlp_dim": 24},
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "attention_downsample_rate": 2,
                "iou_head_hidden_dim": 16,
            },
        },
        {"pixel_values": IMAGES, "input_points": torch.tensor([[[[4.0, 9.0]]], [[[20.0, 7.0]]]])},
    ),
    "patchtst": Network(
        "PatchTSTForPrediction",
        {
            "num_input_channels": 2,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 16,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "prediction_length": 4,
            "num_hidden_layers": 2,
        },
        {
            "past_values": torch.linspace(0, 20, 2 * 16 * 2).sin().reshape(2, 16, 2),
            "future_values": torch.linspace(0, 5, 2 * 4 * 2).cos().reshape(2, 4, 2),
        },
    ),
}

ALWAYS = ("deberta-v2", "mixtral", "gemma2", "whisper", "swin", "mobilenet-v2", "segformer")


@pytest.fixture(params=[pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in NETWORKS])
def network(request) -> Network:
    return NETWORKS[request.param]


def adapt(model: nn.Module) -> nn.Module:
    """Every layer, and every mixture of experts that is kept in one tensor."""
    experts = any(parameter.ndim == 3 and "experts" in name for name, parameter in model.named_parameters())
    target = r".*experts\.(gate_up|down)_proj" if experts else None
    return flora.adapt(model, flora.TuckerConfig(rank=3, scale=2.0, target_parameters=target))


def train(network: Network, model: nn.Module) -> dict[str, int]:
    """Three steps of Adam; of each parameter that learnt how many of them gave it a gradient that is not zero."""
    counts: dict[str, int] = {}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.002)
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase):  # as an adapted network holds them
            module.eval()
    for step in range(STEPS):
        torch.manual_seed(step)  # of dropout, and of layers that are left out by chance
        optimizer.zero_grad()
        loss_of(network.call(model)).backward()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
                name = name.replace(".base_layer.", ".").replace(".adapted_", ".")
                counts[name] = counts.get(name, 0) + bool(parameter.grad.any())
        optimizer.step()
    model.eval()
    return counts


def trained_deltas(network: Network, model: nn.Module) -> None:
    """Trains the model, and checks that every delta learns whose weight the base itself uses, and no other."""
    used = train(network, network.build().requires_grad_(True))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        counts = train(network, model)
    idle = []
    for name, layer in adapted_layers(model).items():
        deltas = {key: counts.pop(key) for key in list(counts) if key.startswith(f"{name}.deltas.")}
        weights = name, f"{name}.weight", f"{name}.in_proj_weight", f"{name}.parametrizations.weight.original1"
        if any(used.get(weight) for weight in weights):
            assert len(deltas) == 1 + len(layer.shape), name  # its core and all of its factors
            assert all(deltas.values()), (name, deltas)
        else:
            assert not any(deltas.values()), (name, deltas)
            idle.append(name)
    assert len(idle) < len(adapted_layers(model))
    assert not counts, counts  # nothing else learns
    for warning in told:
        unreached = re.search(r"did not reach the deltas of (.*): they", str(warning.message))
        assert unreached is not None, warning.message
        assert set(unreached[1].removesuffix(", …").split(", ")) <= set(idle)


def test_life_of_an_adapter(network, tmp_path):
    base, model = network.build(), adapt(network.build())
    plain = network.run(base)
    assert_same(network.run(model), plain)
    trained_deltas(network, model)

    trained = network.run(model)
    assert not all(torch.equal(a, b) for a, b in zip(trained, plain, strict=True))
    flora.save_adapter(model, tmp_path / "adapter", hashes=True)
    assert_same(network.run(flora.load_adapter(network.build(), tmp_path / "adapter").eval()), trained)

    computed = [name for name, layer in adapted_layers(model).items() if parametrize.is_parametrized(layer.base_layer)]
    if computed:
        with pytest.raises(RuntimeError, match=re.escape(f"cannot merge {computed[0]}: its weight is parametrised")):
            flora.merge(model)
    else:
        flora.merge(model)
        for merged, unmerged in zip(network.run(model), trained, strict=True):
            torch.testing.assert_close(merged, unmerged, rtol=1e-3, atol=1e-4 * float(unmerged.abs().max()))
        flora.unmerge(model)
    assert_same(network.run(model), trained)

    again = flora.unload(model, merge=False)
    assert_same_state(again.state_dict(), base.state_dict())
    assert_same(network.run(again), plain)
    assert [type(m).__name__ for m in again.modules()] == [type(m).__name__ for m in base.modules()]
