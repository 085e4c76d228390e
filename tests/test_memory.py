"""What autograd keeps for backward: the layer's input and its projection, nothing twice, no copy, no mask.

Bytes are those that `torch.autograd.graph.saved_tensors_hooks` sees, each storage once, parameters and buffers aside.
"""

import peft
import pytest
import torch
import transformers
from torch import nn

import flora
from flora.layers import AdaptedLayer


class Kept:
    """The storages that the backward of ``run()`` holds, by address, without those of ``owned`` tensors."""

    def __init__(self, run, owned):
        owned = {t.untyped_storage().data_ptr() for t in owned}
        self.storages = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in owned and storage.nbytes():
                self.storages[storage.data_ptr()] = storage
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.output = run()

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


# Whole models ------------------------------------------------------------------------------------------------------


def vit():
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=64, patch_size=8
    )
    model = transformers.ViTModel(config, add_pooling_layer=False)
    return model, {"pixel_values": torch.randn(4, 3, 64, 64)}


def convnext():
    config = transformers.ConvNextV2Config(depths=[1, 1, 2, 1], hidden_sizes=[32, 48, 64, 96], image_size=64)
    return transformers.ConvNextV2Model(config), {"pixel_values": torch.randn(4, 3, 64, 64)}


def llama():
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2, vocab_size=100
    )
    return transformers.LlamaModel(config), {"inputs_embeds": torch.randn(2, 128, 64)}


MODELS = {"vit": vit, "convnext": convnext, "llama": llama}
RANK = 4


def targets(model):
    """Every Linear and every convolution without groups."""
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]


def kept_by(family, change=None, learn_input=True):
    """What a training forward of a small model keeps, after ``change(model)``; its inputs ask for gradients."""
    torch.manual_seed(0)
    model, inputs = MODELS[family]()
    model.train().requires_grad_(False)
    if change is not None:
        change(model)
    inputs = {name: t.requires_grad_() for name, t in inputs.items()} if learn_input else inputs
    return Kept(lambda: model(**inputs).last_hidden_state, [*model.parameters(), *model.buffers()]).bytes


def adapt(**options):
    options = {"rank": RANK} | options
    return lambda model: flora.adapt(model, flora.TuckerConfig(target_modules=targets(model), **options))


@pytest.mark.parametrize("family", MODELS)
def test_core_and_output_factors_alone_keep_h_and_nothing_else(family):
    """What comes on top of the frozen model is (rows, rank) beside activations of (rows, channels)."""
    projected = []

    def change(model):
        def note(module, args):
            x, rank = args[0], module.deltas["default"].ranks[1]
            channels = x.shape[1] if x.ndim == 4 else x.shape[-1]
            projected.append(4 * x.numel() // channels * rank)

        adapt(trainable=("core", "out"))(model)
        for module in model.modules():
            if isinstance(module, AdaptedLayer):
                module.register_forward_pre_hook(note)

    kept = kept_by(family, change)
    assert projected and kept <= kept_by(family) + sum(projected)


@pytest.mark.parametrize(("family", "bound"), [("vit", 0.98), ("convnext", 0.93), ("llama", 1.02)])
def test_core_and_output_factors_alone_keep_what_the_frozen_model_keeps(family, bound):
    """Less than 3 % more; less than the frozen model where that keeps an input which its frozen layer does not need.

    The rank is to these narrow layers what 16 is to a network's of usual width.
    """
    frozen = kept_by(family)
    assert kept_by(family, adapt(trainable=("core", "out"), rank=2)) <= bound * frozen
    assert kept_by(family, adapt(rank=2)) > 1.3 * frozen  # with the inputs that their factors need


@pytest.mark.parametrize("family", MODELS)
def test_no_more_is_kept_than_by_lora(family):
    """PEFT's LoRA and flora on the same layers, every Linear and no convolution, with and without dropout."""

    def lora(model, dropout):
        linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, target_modules=linear, lora_dropout=dropout), model)

    def linears(dropout):
        def change(model):
            names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
            flora.adapt(model, flora.TuckerConfig(rank=RANK, target_modules=names, dropout=dropout))

        return change

    for dropout in (0.0, 0.1):
        theirs = kept_by(family, lambda model: lora(model, dropout))  # noqa: B023
        assert kept_by(family, linears(dropout)) <= theirs, dropout


@pytest.mark.parametrize("family", MODELS)
def test_dropout_keeps_nothing(family):
    assert kept_by(family, adapt(dropout=0.1, plan="fused")) == kept_by(family, adapt(plan="fused"))


# One layer ---------------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (nn.Linear(24, 40), (3, 10, 24), 30),
    "conv": (nn.Conv2d(24, 40, 3, padding=1), (2, 24, 6, 6), 2 * 8 * 8),
    "depthwise": (nn.Conv2d(24, 48, 3, padding=1, groups=24), (2, 24, 6, 6), 2 * 8 * 8 * 24),
}


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("plan", "dropout"), [("fused", 0.0), ("hybrid", 0.0), ("merged", 0.0), ("fused", 0.4), ("auto", 0.4)]
)
@pytest.mark.parametrize("case", LAYERS)
def test_x_is_kept_in_the_storage_it_came_in(case, plan, dropout, memory):
    """A copy of x, its dropped values or their mask would be kept beside it."""
    module, shape, pixels = LAYERS[case]
    if memory == "channels_last":
        x = torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    else:
        x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2] if memory == "sliced" else torch.randn(shape)
    layer = flora.wrap(module, flora.TuckerConfig(rank=4, plan=plan, dropout=dropout))
    kept = Kept(lambda: layer(x), layer.parameters())
    assert kept.storages.pop(x.untyped_storage().data_ptr())
    assert kept.bytes in (0, 4 * pixels * layer.deltas["default"].ranks[1])
