"""Blocks after modules, out = y + s·act(M·dropout(y)) + b: after any, beside deltas of its weight, in every verb."""

import copy
import pickle
from collections import OrderedDict, namedtuple
from dataclasses import replace

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import transformers as tf
from test_architectures import CASES as MODELS
from test_architectures import TOKENS, assert_same, assert_same_state
from test_layers import filled
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import flora
from flora.model import adapted_layers

Config = flora.StructuredAdapterConfig
KINDS = {
    "circulant": Config(),
    "toeplitz": Config(kind="toeplitz"),
    "kronecker": Config(kind="kronecker", rank=2),
    "ldr": Config(kind="ldr", terms=3),
}
ACTIVATIONS = {
    "identity": lambda x: x, "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh
}  # fmt: skip


@pytest.fixture(params=KINDS)
def config(request):
    return KINDS[request.param]


def wrapped(module, config, seed=0):
    return filled(flora.wrap(module, config), seed)


def matrix(delta):
    """M by scipy and numpy, from the block's parameters."""
    p = {name: t.detach().double().numpy() for name, t in delta.named_parameters()}
    if delta.config.kind == "kronecker":
        full = torch.kron(torch.tensor(p["b"]), torch.tensor(p["a"])).T.numpy()
    elif delta.config.kind == "ldr":
        full = 0
        for c, s in zip(p["circulant"], p["skew"], strict=True):
            full = full + scipy.linalg.circulant(c) @ scipy.linalg.toeplitz(s, [*s[:1], *-s[:0:-1]])
    else:
        make = scipy.linalg.circulant if delta.config.kind == "circulant" else scipy.linalg.toeplitz
        full = make(p["a"] * p["b"])
    return torch.tensor(full)


def with_block(delta, y, axis=-1):
    """out by its formula, in float64."""
    config, y = delta.config, y.detach().double().movedim(axis, -1)
    norms = {name: getattr(delta, name) for name in ("norm_before", "norm_after")}

    def normed(name, x):
        if norms[name] is None:
            return x
        return F.layer_norm(x, x.shape[-1:], norms[name].weight.double(), norms[name].bias.double())

    z = ACTIVATIONS[config.activation](normed("norm_before", y) @ matrix(delta).T)
    out = y + delta.scale * normed("norm_after", z)
    return (out if delta.bias is None else out + delta.bias.double()).movedim(-1, axis)


# The block ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", [(), ("norm_before",), ("norm_after",), ("norm_before", "norm_after")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_output_is_the_formulas(config, activation, norms):
    config = replace(config, activation=activation, scale=0.7, bias=len(norms) != 1, **dict.fromkeys(norms, True))
    layer, x = wrapped(nn.Linear(5, 6), config), torch.randn(4, 3, 5)
    expected = with_block(layer.deltas["default"], layer.base_layer(x))
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_starts_as_nothing_bit_for_bit(config, activation, norms, dtype):
    base = nn.Linear(5, 6, dtype=dtype).requires_grad_(False)
    config = replace(config, activation=activation, norm_before=norms, norm_after=norms, dropout=0.3)
    layer, x = flora.wrap(copy.deepcopy(base), config), torch.randn(7, 5).to(dtype)
    assert torch.equal(layer(x), base(x)) and layer(x).dtype == dtype
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), base(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_matrix_learns_from_the_first_step(config, activation):
    layer = flora.wrap(nn.Linear(5, 6), replace(config, activation=activation))
    layer(torch.randn(7, 5)).square().sum().backward()
    delta = layer.deltas["default"]
    zero = delta.circulant if config.kind == "ldr" else delta.b  # the others wait for it
    assert zero.grad.any() and delta.bias.grad.any()


@pytest.mark.parametrize("norms", [False, True])
def test_gradcheck(config, norms):
    config = replace(config, activation="tanh", norm_before=norms, norm_after=norms, scale=0.6)
    layer = wrapped(nn.Linear(3, 4).double(), config)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    inputs = [torch.randn(2, 3, dtype=torch.float64), *(p.detach() for p in layer.parameters())]
    inputs = [t.clone().requires_grad_() for t in inputs]
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


def test_initial_values():
    torch.manual_seed(0)
    stds = {"circulant": 1.0, "toeplitz": 0.02, "kronecker": 0.02}
    for kind, std in stds.items():
        delta = flora.wrap(nn.Linear(2, 4096), Config(kind=kind, rank=64 if kind == "kronecker" else None)).deltas
        assert abs(delta["default"].a.std().item() / std - 1) < 0.1 and not delta["default"].b.any()
    ldr = flora.wrap(nn.Linear(2, 4096), Config(kind="ldr")).deltas["default"]
    assert ldr.circulant.shape == (2, 4096) and not ldr.circulant.any() and abs(ldr.skew.std().item() - 0.02) < 1e-3


def test_strength_scales_all_that_is_added(config):
    layer, x = wrapped(nn.Linear(5, 6), replace(config, scale=0.7)), torch.randn(4, 5)
    y, full = layer.base_layer(x), layer(x)
    layer.deltas["default"].strength = 0.25
    torch.testing.assert_close(layer(x) - y, 0.25 * (full - y))


def test_dropout_acts_on_the_blocks_input_alone(config):
    config = replace(config, activation="identity", bias=False, dropout=0.5)
    layer, x = wrapped(nn.Linear(5, 6), config), torch.randn(4, 5)
    y, m = layer.base_layer(x).detach(), matrix(layer.deltas["default"]).float()
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.equal(layer(x), first)
    dropped = torch.linalg.lstsq(m, (first - y).T).solution.T  # what M was given, in the range of Mᵀ
    kept = (dropped / y - 2).abs() < 1e-2
    if torch.linalg.matrix_rank(m) == 6:
        assert (kept | (dropped.abs() < 1e-3)).all() and kept.any() and not kept.all()
    torch.testing.assert_close(layer.eval()(x), with_block(layer.deltas["default"], y).float(), rtol=1e-4, atol=1e-5)


# After which modules -----------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Whatever has a width and a forward."""

    def __init__(self, forward, **attributes):
        super().__init__()
        self.run, self.weight = forward, nn.Parameter(torch.ones(1))
        self.__dict__.update(attributes)

    def forward(self, x):
        return self.run(x)


class Permuted(nn.Module):
    """A block of ConvNeXt: images, with their channels last in between."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Linear(6, 6)

    def forward(self, x):
        return self.pointwise(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Patches(nn.Module):
    """The patches of a ViT: a convolution whose pixels become tokens."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Conv2d(3, 6, 2, stride=2)

    def forward(self, x):
        return self.projection(x).flatten(2).mT


class Convolutions(nn.Sequential):
    """Says how wide its output is, as torchvision's do."""

    out_channels = 6


Pair = namedtuple("Pair", "first second")
IDS = torch.tensor([[1, 2, 9], [2, 0, 1]])
MODULES = {  # what it is after, its input, the axis of the channels
    "linear": (lambda: nn.Linear(5, 6), torch.randn(2, 3, 5), -1),
    "linear, one row": (lambda: nn.Linear(5, 6), torch.randn(5), -1),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 6), 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), torch.randn(2, 4, 13, 13), 1),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), torch.randn(4, 8, 8), 0),
    "conv2d channels last": (
        lambda: nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last),
        torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last),
        1,
    ),
    "conv3d, groups": (lambda: nn.Conv3d(4, 6, 2, groups=2), torch.randn(2, 4, 4, 3, 3), 1),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2), torch.randn(2, 4, 5, 5), 1),
    "layer norm": (lambda: nn.LayerNorm(6), torch.randn(2, 3, 6), -1),
    "group norm": (lambda: nn.GroupNorm(2, 6), torch.randn(2, 6, 6), 1),
    "batch norm": (lambda: nn.BatchNorm2d(6).eval(), torch.randn(2, 6, 6, 6), 1),
    "rms norm": (lambda: nn.RMSNorm(6), torch.randn(2, 6, 6), -1),
    "llama's norm": (lambda: tf.models.llama.modeling_llama.LlamaRMSNorm(6), torch.randn(2, 3, 6), -1),
    "embedding": (lambda: nn.Embedding(10, 6), IDS, -1),
    "bag": (lambda: nn.EmbeddingBag(10, 6), IDS, -1),
    "Conv1D": (lambda: tf.pytorch_utils.Conv1D(6, 5), torch.randn(2, 3, 5), -1),
    "recurrent": (lambda: nn.LSTM(5, 3, bidirectional=True, batch_first=True), torch.randn(2, 4, 5), -1),
    "sequential": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU()), torch.randn(3, 5), -1),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 6, 2), nn.ReLU()), torch.randn(2, 3, 7, 7), 1),
    "convolutions that say their width": (
        lambda: Convolutions(nn.Conv2d(3, 6, 2), nn.BatchNorm2d(6).eval()),
        torch.randn(2, 3, 7, 7),
        1,
    ),
    "permuted": (Permuted, torch.randn(2, 6, 5, 7), 1),
    "patches": (Patches, torch.randn(2, 3, 8, 8), -1),
    "as many patches as channels": (Patches, torch.randn(2, 3, 4, 6), -1),
    "images, channels last": (lambda: Wide(lambda x: x, hidden_size=6), torch.randn(2, 5, 4, 6), -1),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0),
        torch.randn(2, 5, 6),
        -1,
    ),
    "tuple": (lambda: Wide(lambda x: (x, "rest"), hidden_size=6), torch.randn(2, 6), -1),
    "list": (lambda: Wide(lambda x: [x, "rest"], hidden_size=6), torch.randn(2, 6), -1),
    "named tuple": (lambda: Wide(lambda x: Pair(x, "rest"), embed_dim=6), torch.randn(2, 6), -1),
    "dictionary": (lambda: Wide(lambda x: OrderedDict(x=x, y="rest"), out_features=6), torch.randn(2, 6), -1),
    "transformers' output": (
        lambda: Wide(lambda x: tf.modeling_outputs.BaseModelOutput(last_hidden_state=x), hidden_size=6),
        torch.randn(2, 3, 6),
        -1,
    ),
}


def first(output):
    if isinstance(output, torch.Tensor):
        return output
    return next(iter(output.values())) if hasattr(output, "values") else output[0]


@pytest.mark.parametrize("case", MODULES)
def test_after_any_module(config, case):
    make, x, axis = MODULES[case]
    torch.manual_seed(0)
    layer = wrapped(make(), config)
    delta, y = layer.deltas["default"], layer.base_layer(x)
    assert delta.shape == (6, 6) and delta.output.width == 6
    out = layer(x)
    torch.testing.assert_close(first(out), with_block(delta, first(y), axis).float(), rtol=1e-4, atol=1e-5)
    assert type(out) is type(y) and first(out).stride() == first(y).stride()
    if type(y) in (tuple, list, Pair):
        assert str(out[1]) == str(y[1])
    if isinstance(y, tf.utils.ModelOutput):
        assert out.last_hidden_state is out[0]
    first(out).sum().backward()
    assert all(p.grad is not None for p in delta.parameters())
    assert all(p.grad is None for p in layer.base_layer.parameters())


def test_attention_as_a_whole():
    base = nn.MultiheadAttention(8, 2, batch_first=True)
    layer, x = wrapped(base, Config()), torch.randn(2, 5, 8)
    (y, weights), (out, same) = base(x, x, x), layer(x, x, x)
    assert torch.equal(weights, same)
    torch.testing.assert_close(out, with_block(layer.deltas["default"], y).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            nn.ReLU(),
            "ReLU cannot be adapted: how wide the output of this ReLU is could not be found: it has none of out_",
        ),
        (nn.ModuleList([nn.Linear(2, 2)]), "ModuleList is never called; name the modules in it"),
        (nn.LazyLinear(3), "a LazyLinear has no weight before its first forward"),
        (nn.LayerNorm((2, 3)), "how wide the output of this LayerNorm is could not be found"),
        (nn.MultiheadAttention(4, 2).out_proj, "the attention that holds it reads its weight and never calls it"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_modules_that_are_refused(module, message):
    with pytest.raises(TypeError, match=message):
        flora.wrap(module, Config())


@pytest.mark.parametrize(
    ("module", "x", "error", "message"),
    [
        (
            Wide(lambda x: x, hidden_size=5),
            torch.randn(2, 6),
            ValueError,
            r"\(2, 6\) has not the 5 channels on axis -1",
        ),
        (Wide(lambda x: x, hidden_size=6), torch.randn(1, 6, 3, 6), ValueError, "has 6 channels on two axes"),
        (Wide(lambda x: x, hidden_size=6), torch.tensor(1.0), ValueError, r"\(\) has not the 6"),
        (Wide(lambda x: x.long(), hidden_size=6), torch.ones(2, 6), ValueError, "is of torch.int64, which no block"),
        (Wide(lambda x: "text", hidden_size=6), torch.ones(2, 6), TypeError, "Wide: a block acts on a tensor"),
        (Wide(lambda x: (), hidden_size=6), torch.ones(2, 6), TypeError, "Wide: a block acts on a tensor"),
        (Wide(lambda x: {"x": 1}, hidden_size=6), torch.ones(2, 6), TypeError, "Wide: a block acts on a tensor"),
    ],
)
def test_outputs_that_are_refused(module, x, error, message):
    layer = flora.wrap(module, Config())
    with pytest.raises(error, match=message) as caught:
        layer(x)
    assert "Wide" in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dense"}, "kind='dense' must be one of circulant, toeplitz, kronecker, ldr"),
        ({"activation": "sigmoid"}, r"activation='sigmoid' must be one of identity, .*: only where act\(0\) = 0"),
        ({"rank": 4}, "rank=4 has no meaning for kind='circulant'"),
        ({"kind": "kronecker", "terms": 4}, "terms=4 has no meaning for kind='kronecker'"),
        ({"kind": "kronecker", "rank": 0}, "rank=0 must be a positive int"),
        ({"kind": "ldr", "terms": 0}, "terms=0 must be a positive int"),
        ({"rank_pattern": {"fc": 2}}, "rank_pattern=.* has no meaning for kind='circulant'"),
        ({"bias": 1}, "bias=1 must be True or False"),
        ({"norm_after": None}, "norm_after=None must be True or False"),
        ({"plan": "merged"}, "plan='merged' has no meaning for a block"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=f"StructuredAdapterConfig: {message}"):
        Config(**fields)


def test_the_divisors_that_would_do_are_named():
    with pytest.raises(
        ValueError, match=r"^0: rank=5 does not divide the width 12 of the output; 1, 2, 3, 4, 6, 12 wo"
    ):
        flora.adapt(nn.Sequential(nn.Linear(3, 12)), Config(kind="kronecker", rank=5))


def test_json_and_patterns():
    config = Config(kind="kronecker", rank=2, rank_pattern={"a": 3}, norm_after=True, activation="relu")
    assert flora.DeltaConfig.from_dict(config.to_dict()) == config
    assert config.for_module("a").rank == 3 and Config(kind="kronecker").rank == 16 and Config(kind="ldr").terms == 2


# Several on one layer, and merging ---------------------------------------------------------------------------------


def both(module, config):
    layer = flora.layers.AdaptedLayer(module)
    layer.add_delta("block", config)
    layer.add_delta("weight", flora.TuckerConfig(rank=2))
    return filled(layer)


def test_blocks_come_after_the_deltas_of_the_weight_in_the_order_of_the_adapters(config):
    layer, x = both(nn.Linear(5, 6), config), torch.randn(3, 5)
    layer.add_delta("other", Config(kind="toeplitz", activation="tanh"))
    filled(layer)
    layer.set_active(["weight"])
    y = layer(x)
    for order in (["block", "weight", "other"], ["other", "block", "weight"]):
        layer.set_active(order)
        expected = y
        for name in order:
            if name != "weight":
                expected = with_block(layer.deltas[name], expected)
        torch.testing.assert_close(layer(x), expected.float(), rtol=1e-4, atol=1e-5)


def conv1d_of_transformers():
    return tf.pytorch_utils.Conv1D(6, 5)


MERGEABLE = {
    "linear": (lambda: nn.Linear(5, 6), torch.randn(3, 5)),
    "linear without bias": (lambda: nn.Linear(5, 6, bias=False), torch.randn(3, 5)),
    "linear, double": (lambda: nn.Linear(5, 6).double(), torch.randn(3, 5).double()),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), torch.randn(2, 4, 5, 5)),
    "conv3d without bias": (lambda: nn.Conv3d(2, 6, 2, stride=2, bias=False), torch.randn(2, 2, 5, 5, 4)),
    "Conv1D": (conv1d_of_transformers, torch.randn(3, 5)),
}


@pytest.mark.parametrize("names", [["block"], ["weight", "block"], ["block", "weight", "other"]])
@pytest.mark.parametrize("case", MERGEABLE)
@torch.no_grad()
def test_a_linear_block_after_a_product_merges(config, case, names):
    make, x = MERGEABLE[case]
    base = make()
    layer = both(base, replace(config, activation="identity", scale=0.5))
    layer.add_delta("other", Config(kind="ldr", activation="identity", bias=False))
    layer.set_active(names)
    before, state = layer(x), {k: t.clone() for k, t in layer.state_dict().items()}
    weight, bias = base._parameters["weight"], base._parameters.get("bias")
    layer.merge()
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    assert_same_state(layer.state_dict(), state)
    layer.enabled = False
    assert base._parameters["weight"] is weight and base._parameters.get("bias") is bias
    layer.enabled = True
    layer.unmerge()
    assert base._parameters["weight"] is weight and base._parameters.get("bias") is bias
    assert torch.equal(layer(x), before)
    plain = layer.unload(merge=True)
    torch.testing.assert_close(plain(x), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_merging_half_precision_rounds_once(config):
    base = nn.Linear(5, 6).bfloat16()
    layer = both(base, replace(config, activation="identity", scale=0.01))
    layer.set_active(["weight", "block"])
    m, delta = matrix(layer.deltas["block"]), layer.deltas["weight"].delta_weight(base.weight).double()
    exact = (torch.eye(6) + 0.01 * m) @ (base.weight.double() + delta)
    bias = (torch.eye(6) + 0.01 * m) @ base.bias.double() + layer.deltas["block"].bias.double()
    layer.merge()
    torch.testing.assert_close(base.weight, exact.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(base.bias, bias.bfloat16(), rtol=0, atol=0)


def hooked():
    base = nn.Linear(5, 6)
    base.register_forward_hook(lambda module, args, y: 2 * y)
    return base


@pytest.mark.parametrize(
    ("module", "fields", "message"),
    [
        (nn.Linear(5, 6), {"activation": "gelu"}, "Linear cannot be merged: .* activation='gelu' is no linear map"),
        (nn.Linear(5, 6), {"norm_before": True}, "a LayerNorm is no linear map"),
        (nn.Linear(5, 6), {"norm_after": True}, "a LayerNorm is no linear map"),
        (nn.LayerNorm(6), {}, "the block after this LayerNorm could only be taken into a plain Linear or conv"),
        (nn.Embedding(9, 6), {}, "the block after this Embedding could only"),
        (nn.Sequential(nn.Linear(5, 6)), {}, "the block after this Sequential could only"),
        (nn.ConvTranspose2d(5, 6, 2), {}, "the block after this ConvTranspose2d could only"),
        (hooked(), {}, "the block after this Linear could only"),
        (nn.Conv2d(4, 6, 3, groups=2), {}, "the block after it mixes its 2 groups"),
    ],
)
def test_what_cannot_be_merged(module, fields, message):
    layer = wrapped(module, Config(**{"activation": "identity", **fields}))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        layer.merge()
    assert not layer.merged
    assert_same_state(layer.state_dict(), before)


# Whole models ------------------------------------------------------------------------------------------------------

LAYERS = r"model\.layers\.\d"
LLAMA = MODELS["llama"]


def drawn(model, seed=1, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.deltas.parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def trained(layers=LAYERS, **fields):
    return drawn(flora.adapt(LLAMA.build(), Config(target_modules=layers, **fields)))


@pytest.mark.parametrize("name", ["vit", "convnextv2", "llama", "gpt2", "t5", "bert", "mamba", "efficientnet-lite0"])
@pytest.mark.parametrize("grad", [False, True])
def test_all_means_products_and_the_first_output_is_the_bases(name, grad, config):
    case = MODELS[name]
    if config.kind == "kronecker":
        config = replace(config, rank=1)
    model = flora.adapt(case.build(), config)
    assert adapted_layers(model).keys() == adapted_layers(flora.adapt(case.build(), flora.TuckerConfig(rank=1))).keys()
    with torch.set_grad_enabled(grad):
        assert_same(case.run(model), case.run(case.build()))


@pytest.mark.parametrize("targets", [LAYERS, ["self_attn"], ["mlp"], ["norm"], ["embed_tokens"], ["model"]], ids=str)
def test_after_the_parts_of_a_llama(targets, config, tmp_path):
    base = LLAMA.run(LLAMA.build())
    model = flora.adapt(LLAMA.build(), replace(config, target_modules=targets, dropout=0.1))
    assert_same(LLAMA.run(model), base)
    drawn(model).train()
    model(**LLAMA.inputs, labels=TOKENS).loss.backward()
    assert all((p.grad is not None) == (".deltas." in name) for name, p in model.named_parameters())
    model.eval()
    with torch.no_grad():
        out = LLAMA.run(model)
        assert not torch.equal(out[0], base[0])
        with flora.disabled(model):
            assert_same(LLAMA.run(model), base)
        flora.save_adapter(model, tmp_path / "adapter", hashes=True)
        again = flora.load_adapter(LLAMA.build(), tmp_path / "adapter")
        assert_same(LLAMA.run(again), out)
        assert_same_state(again.state_dict(), model.state_dict())
        assert_same(LLAMA.run(copy.deepcopy(model)), out)
        assert_same(LLAMA.run(pickle.loads(pickle.dumps(model))), out)
        plain = flora.unload(model, merge=False)
    assert_same_state(plain.state_dict(), LLAMA.build().state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in LLAMA.build().modules()]


@torch.no_grad()
def test_beside_an_adapter_of_the_weights():
    model = trained()
    block = LLAMA.run(model)
    flora.add_adapter(model, flora.TuckerConfig(rank=2, target_modules=["q_proj", "down_proj"]), "weights")
    for layer in adapted_layers(model).values():
        if "weights" in layer.deltas:
            nn.init.normal_(layer.deltas["weights"].core)
    assert_same(LLAMA.run(model), block)
    flora.set_adapter(model, "weights")
    weights = LLAMA.run(model)
    flora.set_adapter(model, ["default", "weights"])
    together = LLAMA.run(model)
    assert not torch.equal(together[0], block[0]) and not torch.equal(together[0], weights[0])
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("q_proj.deltas.weights" in n for n in learning) and any("layers.0.deltas.default" in n for n in learning)
    with pytest.raises(RuntimeError, match=r"cannot merge model\.layers\.0: the block after it .* activation='gelu'"):
        flora.merge(model)
    with pytest.raises(RuntimeError, match=r"cannot merge model\.layers\.0: the block after it"):
        flora.unload(model, merge=True)
    assert_same(LLAMA.run(model), together)
    plain = flora.unload(copy.deepcopy(model), merge=False)
    assert_same_state(plain.state_dict(), LLAMA.build().state_dict())
    flora.set_adapter(model, {"default": 0.0, "weights": 1.0})
    assert_same(LLAMA.run(model), weights)
    flora.set_adapter(model, "weights")
    flora.merge(model)  # no block is active
    flora.unmerge(model)
    flora.delete_adapter(model, "default")
    assert_same(LLAMA.run(model), weights)
    assert type(model.model.layers[0]) is type(LLAMA.build().model.layers[0])


def test_an_inner_layer_that_was_adapted_first_keeps_learning():
    model = flora.adapt(LLAMA.build(), flora.TuckerConfig(rank=2, target_modules=["q_proj"]))
    flora.add_adapter(model, Config(target_modules=LAYERS), "blocks")
    assert all(p.requires_grad == ("q_proj.deltas" in name) for name, p in model.named_parameters())
    inner = nn.Sequential(flora.wrap(nn.Linear(5, 6), flora.TuckerConfig(rank=2)), nn.ReLU())
    outer = flora.wrap(inner, Config())
    assert {name for name, p in outer.named_parameters() if not p.requires_grad} == {
        "base_layer.0.base_layer.weight", "base_layer.0.base_layer.bias"
    }  # fmt: skip


def test_a_mapping_of_patterns_and_what_is_reported():
    config = {LAYERS: Config(kind="kronecker", rank=4), "q_proj": flora.TuckerConfig(rank=2)}
    report = flora.summary(flora.adapt(LLAMA.build(), config))
    rows = {row.name: row for row in report.layers}
    block, product = rows["model.layers.0"], rows["model.layers.0.self_attn.q_proj"]
    assert (block.kind, block.shape, block.plan, block.ranks) == ("LlamaDecoderLayer", (16, 16), "block", ())
    assert block.parameters == block.trainable == 16 + 16 + 16 and product.plan == "auto"
    assert report.left_alone["model.norm"] == ("LlamaRMSNorm", "it was not named")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["act_fn"], r"^model\.layers\.0\.mlp\.act_fn: .* names it, but how wide the output of this SiLU"),
        (["layers"], r"^model\.layers: .* but a ModuleList is no layer, it holds 14"),
    ],
)
def test_what_was_named_and_cannot_be_is_an_error(targets, message):
    model = LLAMA.build()
    with pytest.raises(ValueError, match=message):
        flora.adapt(model, Config(target_modules=targets))
    assert [type(m) for m in model.modules()] == [type(m) for m in LLAMA.build().modules()]


def test_an_attentions_own_output_projection_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    model = flora.adapt(Net(), Config())
    assert list(adapted_layers(model)) == ["attention", "head"]
    assert "never calls it" in flora.summary(model).left_alone["attention.out_proj"][1]
    with pytest.raises(ValueError, match=r"^attention\.out_proj: .* reads its weight and never calls it"):
        flora.adapt(Net(), Config(target_modules=["out_proj"]))


@pytest.mark.parametrize("name", ["linear1", "linear2", "norm1", "self_attn"])
def test_fast_paths_do_not_go_around_a_block(name):
    torch.manual_seed(0)
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    model, x = flora.adapt(copy.deepcopy(base), Config(target_modules=[name])), torch.randn(2, 5, 8)
    drawn(model)
    with torch.no_grad():
        fast = model(x)
        with flora.disabled(model):
            assert torch.equal(model(x), base(x))
    torch.testing.assert_close(fast, model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fast, base(x), atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("targets", [["layers.0"], ["layers.0", "layers.1"], ["layers.0.linear1"]], ids=str)
def test_an_encoder_that_leaves_padding_out(targets):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    drawn(flora.adapt(encoder, Config(target_modules=targets)))
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        found = encoder(x, src_key_padding_mask=padding)
    encoder.use_nested_tensor = False
    expected = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def test_a_block_that_is_never_reached_is_warned_about():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.linear(x, self.read.weight, self.read.bias))

    x, plain = torch.randn(3, 4), Reads()
    model = flora.adapt(copy.deepcopy(plain), Config())
    drawn(model)
    assert torch.equal(model.read.weight + 0, plain.read.weight) and model.read.weight.dtype == torch.float32
    with pytest.warns(UserWarning, match="did not reach the deltas of read"):
        model.train()(x)


def test_a_module_that_is_trained_whole_inside_one_with_a_block():
    model = trained(["model"], modules_to_save=["model.norm"])
    model.train()(**LLAMA.inputs, labels=TOKENS).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {
        "model.base_layer.norm.copies.default.weight",
        *(f"model.deltas.default.{n}" for n in ("a", "b", "bias")),
    }
    with pytest.raises(ValueError, match="another adapter already holds it or a part of it"):
        flora.add_adapter(model, flora.TuckerConfig(modules_to_save=["model"]), "other")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # jvp's own decompositions
@pytest.mark.parametrize("where", ["compile", "vmap", "jvp", "functional_call"])
def test_where_others_follow_the_operations(config, where):
    layer, x = wrapped(nn.Linear(5, 6), replace(config, norm_before=True)), torch.randn(3, 5)
    expected, parameters = layer(x), dict(layer.named_parameters())
    if where == "compile":
        found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        found.sum().backward()
        assert all(p.grad is not None for p in layer.deltas.parameters())
    elif where == "vmap":
        found = torch.func.vmap(layer)(x)
    elif where == "jvp":
        found, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        _, wanted = torch.autograd.functional.jvp(layer, x, torch.ones_like(x))
        torch.testing.assert_close(tangent, wanted)
    else:
        found = torch.func.functional_call(layer, {name: p.detach() for name, p in parameters.items()}, x)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_module_in_two_places_gets_one_block():
    shared = nn.Linear(6, 6)
    model, x = nn.Sequential(shared, nn.ReLU(), shared), torch.randn(3, 6)
    drawn(flora.adapt(model, Config()))
    assert model[0] is model[2]
    delta = model[0].deltas["default"]
    expected = with_block(delta, shared(with_block(delta, shared(x)).float().relu()))
    torch.testing.assert_close(model(x), expected.float(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_base_in_half_precision(config, tmp_path):
    model = flora.adapt(LLAMA.build(), replace(config, target_modules=LAYERS), base_dtype=torch.bfloat16)
    with flora.disabled(model):
        base = LLAMA.run(model)
    assert_same(LLAMA.run(model), base)
    out = LLAMA.run(drawn(model))
    assert out[0].dtype == torch.bfloat16 and not torch.equal(out[0], base[0])
    assert {p.dtype for layer in adapted_layers(model).values() for p in layer.deltas.parameters()} == {torch.float32}
    flora.save_adapter(model, tmp_path / "adapter")
    again = flora.load_adapter(LLAMA.build(), tmp_path / "adapter", base_dtype=torch.bfloat16)
    assert_same(LLAMA.run(again), out)


def test_parameters_stay_in_float32_and_the_output_is_rounded_once(config):
    layer = wrapped(nn.Linear(5, 6), replace(config, norm_before=True, norm_after=True)).bfloat16()
    assert all(p.dtype == torch.float32 for p in layer.deltas.parameters())
    x = torch.randn(64, 5).bfloat16()
    expected = with_block(layer.deltas["default"], layer.base_layer(x))
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-7, atol=1e-2)


def test_autocast(config):
    layer, x = wrapped(nn.Linear(5, 6), config), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.deltas.parameters())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing():
    def gradients(checkpointing):
        model = trained().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**LLAMA.inputs, labels=TOKENS, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert plain and all(torch.equal(grad, again[name]) for name, grad in plain.items())


def test_a_file_for_another_width_is_refused(tmp_path):
    narrow = flora.adapt(nn.Sequential(nn.Sequential(nn.Linear(3, 4))), Config(target_modules=["0"]))
    flora.save_adapter(narrow, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"'0\.0\.weight' is \(6, 3\)"):
        flora.load_adapter(nn.Sequential(nn.Sequential(nn.Linear(3, 6))), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "size"), [(Config(kind="ldr"), {"terms": 3}), (Config(kind="kronecker"), {"rank": 4})]
)
def test_a_budget_chooses_the_size(config, size):
    config = replace(config, target_modules=LAYERS, bias=False)
    parameters = 2 * (2 * 3 * 16 + 5 if "terms" in size else 4 * 4 + 4 * 4)
    found = flora.budget(LLAMA.build(), config, parameters)
    assert found == replace(config, **size)


def test_a_sequence_as_long_as_it_is_wide_is_not_guessed():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 1)

        def forward(self, x):
            return self.conv(x.mT).mT

    model = flora.adapt(nn.Sequential(Turned()), Config(target_modules=["0"]))
    assert model(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    with pytest.raises(ValueError, match=r"the output \(2, 8, 8\) has 8 channels on two axes"):
        model(torch.randn(2, 8, 8))
