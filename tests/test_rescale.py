"""RLRR's rescaling on every layer that it takes: products and normalisations, merged, saved, in foreign forwards."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from test_architectures import CASES as MODELS
from test_architectures import TOKENS, assert_same, assert_same_state
from test_layers import CASES as PRODUCTS
from test_layers import MatmulLinear, PaddedConv, filled
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.t5.modeling_t5 import T5LayerNorm

import flora
from flora.model import adapted_layers

Config = flora.RescaleConfig
CONFIG = Config(scale=0.5)

# PyTorch's own, on "same" with an even kernel.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def wrapped(module, config=CONFIG, seed=0):
    return filled(flora.wrap(module, config), seed)


def with_bias(base, delta):
    """W' and bias' by the formula, for products."""
    w = base.weight.detach()
    gain = torch.ones(()) * delta.scale
    if delta.row is not None:
        gain = gain * delta.row.reshape(-1, *[1] * (w.ndim - 1))
    if delta.column is not None:
        gain = gain * delta.column.reshape(-1, *[1] * (w.ndim - 2))
    weight = w + w * gain if delta.row is not None or delta.column is not None else w
    bias = base.bias
    if delta.shift is not None:
        bias = delta.shift + (0 if bias is None else bias)
    return {"weight": weight, "bias": bias}


# Products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["auto", "merged"])
@pytest.mark.parametrize("parts", ["rows", "columns", "bias", "rows columns", "rows columns bias"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_products(case, parts, plan):
    make, shape = PRODUCTS[case]
    torch.manual_seed(0)
    base = make()
    config = Config(scale=0.5, plan=plan, **{part: part in parts for part in ("rows", "columns", "bias")})
    first = flora.wrap(copy.deepcopy(base), config)
    x = torch.randn(shape)
    assert torch.equal(first(x), base(x))
    layer = wrapped(copy.deepcopy(base), config)
    delta = layer.deltas["default"]
    tensors = {name: t for name, t in with_bias(base, delta).items() if t is not None}
    if "bias" in tensors and base.bias is None:
        base.bias = nn.Parameter(torch.zeros_like(tensors["bias"]))
    expected = torch.func.functional_call(base, tensors, x)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, tuple(delta.parameters()), dy)
    wanted = torch.autograd.grad(expected, tuple(delta.parameters()), dy)
    torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-4)


class OutsideBias(nn.Linear):
    """Adds its bias after the product."""

    def forward(self, x):
        return F.linear(x, self.weight) + self.bias


class ConvertedBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias.to(x.dtype).clone())


class BiasFirst(nn.Linear):
    def forward(self, x):
        return torch.baddbmm(self.bias.expand(*x.shape[:-1], -1), x, self.weight.mT.expand(len(x), -1, -1))


@pytest.mark.parametrize("cls", [OutsideBias, ConvertedBias, BiasFirst, MatmulLinear])
def test_the_shift_is_added_once_whatever_a_forward_does_with_its_bias(cls):
    base, x = cls(5, 7), torch.randn(2, 3, 5)
    layer = wrapped(copy.deepcopy(base))
    tensors = with_bias(base, layer.deltas["default"])
    torch.testing.assert_close(layer(x), F.linear(x, tensors["weight"], tensors["bias"]))
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before)


class NoBias(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)

    def forward(self, x):
        return x @ self.weight.mT


class Unused(nn.Linear):
    def forward(self, x):
        return x @ self.weight.mT


@pytest.mark.parametrize("cls", [NoBias, Unused])
def test_a_shift_that_a_forward_would_lose_is_an_error(cls):
    layer = wrapped(cls(5, 7))
    with pytest.raises(RuntimeError, match=rf"^{cls.__name__}: the forward of {cls.__name__} never used its bias"):
        layer(torch.randn(3, 5))
    without = wrapped(cls(5, 7), replace(CONFIG, bias=False))
    without(torch.randn(3, 5)).sum().backward()
    assert all(p.grad is not None for p in without.deltas.parameters())


def test_a_product_of_its_own_without_bias_gets_the_shift_but_is_not_merged():
    base, x = PaddedConv(4, 6, 3, bias=False), torch.randn(2, 4, 7, 7)
    layer = wrapped(copy.deepcopy(base))
    tensors = with_bias(base, layer.deltas["default"])
    torch.testing.assert_close(layer(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), **tensors), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="PaddedConv cannot be merged: it has no bias, and whether its own forward"):
        layer.merge()
    wrapped(base, replace(CONFIG, bias=False)).merge()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda bias: nn.Linear(5, 6, bias=bias),
        lambda bias: nn.Linear(5, 6, bias=bias, dtype=torch.float64),
        lambda bias: nn.Linear(5, 6, bias=bias, dtype=torch.bfloat16),
        lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias),
        lambda bias: nn.Conv2d(4, 6, 3, bias=bias).to(memory_format=torch.channels_last),
        lambda bias: tf.pytorch_utils.Conv1D(6, 5),
    ],
)
@torch.no_grad()
def test_products_merge_and_unmerge_bit_for_bit(make, bias):
    base = make(bias)
    layer = wrapped(base)
    x = torch.randn((2, 4, 5, 5) if base.weight.ndim == 4 else (3, 5)).to(base.weight.dtype)
    before, own = layer(x), dict(base._parameters)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    effective = {name: getattr(layer, name) + 0 for name in ("weight", "bias") if getattr(layer, name) is not None}
    layer.merge()
    assert all(torch.equal(base._parameters[name], t) for name, t in effective.items())
    assert (base.bias is None) == ("bias" not in effective and layer.deltas["default"].shift is None)
    tolerance = 3e-2 if x.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance)
    assert_same_state(layer.state_dict(), state)
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance)
    layer.unmerge()
    assert base._parameters.keys() == own.keys() and all(base._parameters[k] is v for k, v in own.items())
    assert torch.equal(layer(x), before)


# Normalisations ----------------------------------------------------------------------------------------------------


class ChannelsFirst(nn.LayerNorm):
    """The LayerNorm of ConvNeXt: a forward of its own."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Nemotron(NemotronLayerNorm1P):
    """Keeps its weight less 1, as Gemma's."""


IMAGES, ROWS = torch.randn(3, 6, 4, 5), torch.randn(3, 5, 6)
NORMS = {  # the layer, its input, the axis of the weight
    "LayerNorm": (lambda: nn.LayerNorm(6), ROWS, -1),
    "LayerNorm without bias": (lambda: nn.LayerNorm(6, bias=False), ROWS, -1),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), IMAGES, 1),
    "RMSNorm": (lambda: nn.RMSNorm(6), ROWS, -1),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(5).eval(), ROWS, 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6).eval(), IMAGES, 1),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True), IMAGES, 1),
    "channels first": (lambda: ChannelsFirst(6), IMAGES, 1),
    "LlamaRMSNorm": (lambda: LlamaRMSNorm(6), ROWS, -1),
    "T5LayerNorm": (lambda: T5LayerNorm(6), ROWS, -1),
    "GemmaRMSNorm": (lambda: GemmaRMSNorm(6), ROWS, -1),
    "NemotronLayerNorm1P": (lambda: Nemotron(6), ROWS, -1),
}


def norm(case):
    """With weights, biases and statistics that are not 0 and 1."""
    make, x, axis = NORMS[case]
    torch.manual_seed(0)
    base = make()
    with torch.no_grad():
        for p in base.parameters():
            p.add_(torch.randn_like(p))
        for buffer in base.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    return base, x, axis


def rescaled(delta, y, axis):
    row = 0 if delta.row is None else delta.scale * delta.row
    shift = 0 if delta.shift is None else delta.shift
    return (y.movedim(axis, -1) * (1 + row) + shift).movedim(-1, axis)


BIASED = ["LayerNorm", "LayerNorm without bias", "GroupNorm", "BatchNorm1d", "BatchNorm2d", "InstanceNorm2d"]


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        *((case, fields) for case in NORMS for fields in ({}, {"bias": False}, {"columns": False})),
        *((case, {"rows": False}) for case in (*BIASED, "channels first", "NemotronLayerNorm1P")),
    ],
    ids=str,
)
def test_a_norms_output_is_scaled_and_shifted(case, fields):
    base, x, axis = norm(case)
    config = replace(CONFIG, **fields)
    assert torch.equal(flora.wrap(copy.deepcopy(base), config)(x), base(x))
    layer = wrapped(copy.deepcopy(base), config)
    delta = layer.deltas["default"]
    assert delta.column is None and (delta.shift is not None) == (config.bias and "bias" in base._parameters)
    x = x.clone().requires_grad_()
    expected = rescaled(delta, base.requires_grad_(False)(x), axis)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dy, inputs = torch.randn_like(y), (x, *delta.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", NORMS)
@torch.no_grad()
def test_norms_merge_and_unmerge_bit_for_bit(case, dtype):
    base, x, _ = norm(case)
    base, x = base.to(dtype), x.to(dtype)
    layer = wrapped(base)
    before, own = layer(x), dict(base._parameters)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.merge()
    assert torch.equal(layer(x), before)  # the unmerged layer runs with the same weight and bias
    assert_same_state(layer.state_dict(), state)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), before)
    layer.enabled = False
    assert all(base._parameters[name] is p for name, p in own.items())
    layer.enabled = True
    layer.unmerge()
    assert base._parameters.keys() == own.keys() and all(base._parameters[k] is v for k, v in own.items())
    assert torch.equal(layer(x), before)
    plain = layer.unload(merge=True)
    assert plain is base and torch.equal(plain(x), before)


@pytest.mark.parametrize("case", [*BIASED, "RMSNorm", "channels first", "NemotronLayerNorm1P"])  # others: in float32
def test_gradcheck_of_norms(case):
    base, x, _ = norm(case)
    layer = wrapped(base.double())
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    inputs = [t.detach().double().requires_grad_() for t in (x[:2], *layer.parameters())]
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


def test_the_authors_start():
    torch.manual_seed(0)
    delta = flora.wrap(nn.LayerNorm(4096), Config(init="reference")).deltas["default"]
    for parameter in (delta.row, delta.shift):
        assert abs(parameter.std().item() - 0.02) < 1e-3 and abs(parameter.mean().item()) < 2e-3
    product = flora.wrap(nn.Linear(64, 4096), Config(init="reference")).deltas["default"]
    assert product.row.any() and product.column.any() and not product.shift.any()


def test_a_normalised_shape_of_several_modes():
    base, x = nn.LayerNorm((4, 5)), torch.randn(2, 3, 4, 5)
    layer = wrapped(copy.deepcopy(base))
    delta = layer.deltas["default"]
    assert delta.row.shape == delta.shift.shape == (4, 5)
    torch.testing.assert_close(layer(x), base(x) * (1 + 0.5 * delta.row) + delta.shift)


@torch.no_grad()
def test_several_on_one_norm_add():
    base, x, axis = norm("GroupNorm")
    layer = flora.layers.AdaptedLayer(copy.deepcopy(base))
    for name, config in (("a", CONFIG), ("b", Config(bias=False)), ("c", Config(rows=False))):
        layer.add_delta(name, config)
    filled(layer).set_active(["a", "b", "c"])
    a, b, c = layer.deltas.values()
    b.strength = 0.25
    y = base(x).movedim(axis, -1)
    expected = y * (1 + 0.5 * a.row + 0.25 * b.row) + a.shift + c.shift
    torch.testing.assert_close(layer(x), expected.movedim(-1, axis))
    merged = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), merged)


def test_a_norm_and_a_block_after_it():
    base, x, _ = norm("LayerNorm")
    layer = flora.layers.AdaptedLayer(base)
    layer.add_delta("scale", CONFIG)
    layer.add_delta("block", flora.StructuredAdapterConfig(activation="tanh"))
    filled(layer)
    layer.set_active(["scale"])
    y = layer(x)
    layer.set_active(["block", "scale"])
    torch.testing.assert_close(layer(x), layer.deltas["block"].transformed(y))
    with pytest.raises(RuntimeError, match="the block after it cannot be taken into a weight"):
        layer.merge()


@pytest.mark.parametrize(
    ("module", "fields", "error", "message"),
    [
        (nn.LayerNorm(6), {"dropout": 0.1}, ValueError, "dropout=0.1 is not possible on LayerNorm"),
        (nn.LayerNorm(6, elementwise_affine=False), {}, TypeError, "this LayerNorm has no weight"),
        (nn.RMSNorm(6), {"rows": False}, TypeError, "cannot adapt an? RMSNorm: with rows=False and bias=True nothing"),
        (nn.LayerNorm(6), {"rows": False, "bias": False}, TypeError, "with rows=False and bias=False nothing"),
        (nn.Embedding(9, 6), {}, TypeError, "RescaleConfig cannot adapt an Embedding: its rows are looked up"),
        (nn.MultiheadAttention(4, 2), {}, TypeError, "cannot adapt a MultiheadAttention: its packed projections"),
        (nn.ReLU(), {}, TypeError, "ReLU is not a Linear, .* or normalisation"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_layers_that_are_refused(module, fields, error, message):
    with pytest.raises(error, match=message):
        flora.wrap(module, Config(**fields))


class SquareNorm(nn.Module):
    """Uses its weight in another way than to multiply by it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * (3 + self.weight) ** 2


def test_a_norm_that_does_something_else_with_its_weight_is_refused():
    with pytest.raises(TypeError, match="what the forward of SquareNorm does with its weight is not known"):
        flora.wrap(SquareNorm(), CONFIG)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_layer_is_refused_by_name_and_left_alone_under_all():
    quantised = torch.ao.nn.quantized.dynamic.Linear(8, 8)
    with pytest.raises(
        TypeError, match="RescaleConfig cannot adapt a Linear: its weight must be there as plain numbers"
    ):
        flora.wrap(quantised, CONFIG)
    model = nn.Sequential(quantised, nn.Linear(8, 8))
    with pytest.raises(
        ValueError, match=r"^0: target_modules=\('0',\) names it, but RescaleConfig cannot adapt a Linear"
    ):
        flora.adapt(model, Config(target_modules=["0"]))
    assert type(model[0]) is type(quantised)
    flora.adapt(model, Config())
    assert list(adapted_layers(model)) == ["1"]


def test_finding_a_norms_weight_changes_and_draws_nothing():
    norm = nn.Sequential(type("OwnBatchNorm", (nn.BatchNorm1d,), {"forward": lambda self, x: F.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, self.training)})(6))  # fmt: skip
    before, generator = copy.deepcopy(norm.state_dict()), torch.get_rng_state()
    assert flora.kinds.refusal(norm[0], CONFIG) is None and flora.kinds.refusal(GemmaRMSNorm(6), CONFIG) is None
    assert_same_state(norm.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_norm_on_the_meta_device():
    with torch.device("meta"):
        layer = flora.wrap(GemmaRMSNorm(6), CONFIG)
    assert layer.deltas["default"].row.is_meta and layer.deltas["default"].norm_offset == 1


# Models ------------------------------------------------------------------------------------------------------------


def drawn(model, std=0.3):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.deltas.parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("name", "norms"),
    [("llama", 5), ("bert", 6), ("vit", 5), ("t5", 12), ("gpt2", 5), ("convnextv2", 10), ("efficientnet-lite0", 49)],
)
def test_all_means_norms_too_in_every_verb(name, norms, tmp_path):
    case = MODELS[name]
    model = flora.adapt(case.build(), Config(bias=name != "efficientnet-lite0"))
    kinds = [layer._kind.name for layer in adapted_layers(model).values()]
    assert kinds.count("norm") == norms and kinds.count("linear") + kinds.count("conv") == len(kinds) - norms
    base = case.run(case.build())
    assert_same(case.run(model), base)
    drawn(model, 0.05).train()
    sum(output.float().square().sum() for output in case.run(model)).backward()
    for where, p in model.named_parameters():
        assert (p.grad is not None) == (".deltas." in where), where
    model.eval()
    with torch.no_grad():
        out = case.run(model)
        flora.save_adapter(model, tmp_path / "adapter")
        again = flora.load_adapter(case.build(), tmp_path / "adapter")
        assert_same(case.run(again), out)
        flora.merge(model)
        for merged, unmerged in zip(case.run(model), out, strict=True):
            torch.testing.assert_close(merged, unmerged, rtol=1e-3, atol=1e-4 * float(unmerged.abs().max()))
        with flora.disabled(model):
            assert_same(case.run(model), base)
        flora.unmerge(model)
        assert_same(case.run(model), out)
        plain = flora.unload(model, merge=False)
    assert_same_state(plain.state_dict(), case.build().state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert", "convnextv2"])
@torch.no_grad()
def test_a_base_in_half_precision(name, dtype):
    case = MODELS[name]
    model = flora.adapt(
        case.build(), Config(target_modules=r".*norm.*|.*LayerNorm", exclude_modules=[]), base_dtype=dtype
    )
    with flora.disabled(model):
        base = case.run(model)
    assert_same(case.run(model), base)
    drawn(model)
    layers = adapted_layers(model).values()
    assert all(layer.base_layer.weight.dtype == torch.float32 for layer in layers)
    given = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, y: given.append(y.dtype))
    out = case.run(model)
    assert set(given) == {dtype} and out[0].dtype == dtype and not torch.equal(out[0], base[0])
    flora.merge(model)
    assert_same(case.run(model), out)
    plain = flora.unload(model)
    assert all(p.dtype == dtype for p in plain.parameters())


@pytest.mark.parametrize("name", ["bert", "convnextv2", "efficientnet-lite0", "llama", "t5"])
def test_training_on_a_base_in_half_precision(name):
    case = MODELS[name]
    model = drawn(flora.adapt(case.build(), Config(), base_dtype=torch.bfloat16), 0.05).train()
    sum(output.float().square().mean() for output in case.run(model)).backward()
    for where, p in model.named_parameters():
        assert (p.grad is not None) == (".deltas." in where), where
        assert p.grad is None or p.grad.isfinite().all()


def test_norms_on_a_model_that_came_in_half_precision():
    case = MODELS["llama"]
    model = drawn(flora.adapt(case.build().bfloat16(), Config()), 0.1)
    assert {p.dtype for layer in adapted_layers(model).values() for p in layer.deltas.parameters()} == {torch.float32}
    model.train()(**case.inputs, labels=TOKENS).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for layer in adapted_layers(model).values()
               for p in layer.deltas.parameters())  # fmt: skip


def test_batch_norm_is_held_and_keeps_its_statistics():
    base = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    model, x = flora.adapt(copy.deepcopy(base), Config()), torch.randn(4, 3, 5, 5)
    before = {name: b.clone() for name, b in model.named_buffers()}
    model.train()(x).sum().backward()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert torch.equal(model(x), base.eval()(x)) and model[1].deltas["default"].row.grad is not None


@torch.no_grad()
def test_gemma_in_a_model():
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "head_dim": 8}
    model = tf.GemmaForCausalLM(tf.GemmaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()
    base = model(TOKENS).logits
    flora.adapt(model, Config(target_modules=["norm"]))
    assert torch.equal(model(TOKENS).logits, base)
    model.model.norm.deltas["default"].row.fill_(0.5)
    torch.testing.assert_close(model(TOKENS).logits, 1.5 * base)
    flora.merge(model)
    torch.testing.assert_close(model(TOKENS).logits, 1.5 * base)


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
def test_the_fast_path_of_an_encoder_layer_sees_the_rescaled_norms(mode):
    torch.manual_seed(0)
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    model, x = drawn(flora.adapt(copy.deepcopy(base), Config())), torch.randn(2, 5, 8)
    report = flora.summary(model).left_alone
    assert "its packed projections" in report["0.self_attn"][1] and "0.norm1" in adapted_layers(model)
    merged = copy.deepcopy(model)
    flora.merge(merged)
    plain = flora.unload(merged)
    with torch.set_grad_enabled(mode == "grad"):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_other_methods_refuse_norms_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    for config in (flora.TuckerConfig(), flora.CirculantConfig(), flora.KroneckerConfig(rank=1)):
        name = type(config).__name__
        with pytest.raises(
            ValueError, match=rf"^1: target_modules=\('1',\) names it, but {name} cannot adapt a LayerNorm"
        ):
            flora.adapt(model, replace(config, target_modules=["1"]))
        left = flora.summary(flora.adapt(copy.deepcopy(model), config)).left_alone
        assert left == {"1": ("LayerNorm", f"{name} cannot adapt a LayerNorm: its weight has no rows and columns "
                                           "(RescaleConfig takes it)")}  # fmt: skip


def test_a_mapping_of_patterns_says_of_the_rest_what_no_configuration_takes():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2), nn.ConvTranspose1d(2, 2, 1))
    mixed = flora.adapt(copy.deepcopy(model), {"0": flora.TuckerConfig(rank=1), "2": Config()})
    left = flora.summary(mixed).left_alone
    assert left["1"] == ("LayerNorm", "it was not named") and "is not supported" in left["3"][1]


def test_packed_attention_and_a_delta_of_the_bias():
    class ShiftConfig(flora.TuckerConfig):
        method = "test-shift"

    class ShiftDelta(flora.deltas.TuckerDelta, config=ShiftConfig):
        def bias_update(self, bias):
            return self.core.new_zeros(self.shape[0])

    for module in (nn.MultiheadAttention(4, 2), nn.Embedding(9, 4)):
        name = type(module).__name__
        with pytest.raises(TypeError, match=f"{name} cannot be adapted: the bias of {name} cannot be updated"):
            flora.wrap(module, ShiftConfig())
    flora.wrap(nn.Linear(3, 4), ShiftConfig())


@pytest.mark.parametrize(
    "config",
    [flora.CirculantConfig(), flora.ToeplitzConfig(), flora.KroneckerConfig(rank=2), flora.LDRConfig()],
    ids=lambda config: config.method,
)
def test_structured_matrices_on_an_embedding_that_is_named(config):
    model, ids = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 2)), torch.tensor([[1, 9], [3, 3]])
    assert list(adapted_layers(flora.adapt(copy.deepcopy(model), config))) == ["1"]
    named = drawn(flora.adapt(copy.deepcopy(model), replace(config, target_modules=["0"])))
    delta = named[0].deltas["default"].delta_weight(model[0].weight)
    torch.testing.assert_close(named[0](ids), (model[0].weight + delta)[ids])


def test_a_budget_counts_norms():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.RMSNorm(4))
    assert flora.budget(model, Config, 4 + 3 + 4 + 4 + 4 + 4) == Config()
    with pytest.raises(ValueError, match="parameters=22 are fewer than the 23 that it has at least on 3 layers"):
        flora.budget(model, Config, 22)


def test_a_merged_weight_is_never_the_frozen_one_itself():
    layer = flora.wrap(nn.Linear(4, 3), flora.RescaleConfig(rows=False, columns=False))
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    layer.base_layer.weight.data.add_(1.0)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
