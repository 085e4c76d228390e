"""A base kept in bfloat16 or float16: what is cast, what stays, what comes out, and what every verb makes of it."""

import copy
import pickle
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from test_architectures import CASES as SHARED
from test_architectures import TOKENS, Architecture, assert_same, assert_same_state
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import flora
from flora import base_dtype as half
from flora.layers import AdaptedLayer
from flora.model import adapted_layers, base_parameters

BF16 = torch.bfloat16


class Cnn(nn.Module):
    """Strided, depthwise and pointwise convolutions with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        for norm in (self.norm, self.norm2):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)

    def forward(self, pixel_values):
        x = self.norm(self.stem(pixel_values)).relu()
        return self.head(self.norm2(self.mix(x)).relu().mean((2, 3)))


def swin():
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    return tf.SwinForImageClassification(tf.SwinConfig(**sizes, num_labels=5))


def whisper():
    config = tf.WhisperConfig(
        vocab_size=23, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=4, max_source_positions=8,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config)


IMAGES = SHARED["vit"].inputs["pixel_values"]
CASES = SHARED | {
    "cnn": Architecture(Cnn, {"pixel_values": IMAGES}),
    "swin": Architecture(swin, {"pixel_values": IMAGES}),
    "whisper": Architecture(whisper, {"input_features": IMAGES.reshape(2, -1)[:, :64].reshape(2, 4, 16),
                                      "decoder_input_ids": TOKENS}),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def adapted(case, dtype=BF16, **options):
    """On a base in ``dtype``, with deltas that are not zero any more."""
    model = flora.adapt(case.build(), flora.TuckerConfig(rank=3, scale=2.0, **options), base_dtype=dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            nn.init.normal_(layer.deltas["default"].core, std=0.1)
    return model


def in_dtype(inputs, dtype):
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in inputs.items()}


def close(found, expected, tolerance):
    """Within the tolerance, relative to the largest magnitude."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=tolerance * float(b.abs().max()))


# Architectures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", half.BASE_DTYPES, ids=["bfloat16", "float16"])
@torch.no_grad()
def test_the_first_output_is_the_cast_bases_and_near_the_float32_bases(case, dtype):
    model = flora.adapt(case.build(), flora.TuckerConfig(rank=3), base_dtype=dtype)
    found = case.run(model)
    with flora.disabled(model):
        assert_same(found, case.run(model))
    close(found, case.run(case.build()), 0.3 if case is CASES["efficientnet-lite0"] else 0.05)
    if "mamba" not in str(type(model)).lower():  # its residual is in float32 by its own configuration
        assert all(output.dtype == dtype for output in found if output.is_floating_point())


def test_weights_are_cast_and_deltas_and_normalisation_are_not(case):
    model, shapes = adapted(case), set()
    for name, parameter in model.named_parameters():
        norm = (parameter.squeeze().ndim <= 1 and "norm" in name.lower()) or ".grn." in name or "_bn" in name
        if ".deltas." in name or norm:
            assert parameter.dtype == torch.float32, name
        elif parameter.ndim > 1 and parameter.squeeze().ndim > 1:
            assert parameter.dtype == BF16, name
            shapes.add(parameter.ndim)
    assert shapes
    assert all(b.dtype != BF16 for name, b in model.named_buffers() if "running" in name or "inv_freq" in name)


class Products(TorchDispatchMode):
    """Notes the dtypes of every product with a weight."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution):
            self.seen += [a.dtype for a in args if isinstance(a, torch.Tensor)]
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_nothing_promotes_what_a_product_is_given(case):
    model = adapted(case)
    promoted = []

    def look(module, args, kwargs):
        promoted.extend(t.dtype for t in args if t.is_floating_point() and t.dtype != BF16)

    for layer in adapted_layers(model).values():
        layer.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    case.run(model)
    assert not promoted
    with flora.disabled(model), Products() as products:
        case.run(model)
    assert products.seen and set(products.seen) == {BF16}


def test_a_training_step_reaches_every_part_of_every_delta(case):
    model = adapted(case).train()
    sum(output.float().square().sum() for output in case.run(model)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".deltas." in name), name
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.parametrize("hashes", [False, True])
@torch.no_grad()
def test_a_saved_adapter_is_the_same_on_a_fresh_base(case, hashes, tmp_path):
    model = adapted(case)
    flora.save_adapter(model, tmp_path / "adapter", hashes=hashes)
    again = flora.load_adapter(case.build(), tmp_path / "adapter", base_dtype=BF16)
    assert_same(case.run(again), case.run(model))
    assert_same_state(again.state_dict(), model.state_dict())


@torch.no_grad()
def test_merging_and_back(case):
    model = adapted(case, exclude_modules=case.unmergeable)
    before, state = case.run(model), {name: t.clone() for name, t in model.state_dict().items()}
    with flora.disabled(model):
        base = case.run(model)
    flora.merge(model)
    close(case.run(model), before, 0.3 if case is CASES["efficientnet-lite0"] else 0.1)
    with flora.disabled(model):
        assert_same(case.run(model), base)
    flora.unmerge(model)
    assert_same_state(model.state_dict(), state)
    assert_same(case.run(model), before)


@torch.no_grad()
def test_unloading_leaves_a_plain_network_in_half_precision(case):
    model = adapted(case, exclude_modules=case.unmergeable)
    before = case.run(model)
    expected = {}
    for name, layer in adapted_layers(model).items():
        key = layer._kind.weight_name
        delta = layer.deltas["default"].delta_weight(layer.base_layer._parameters[key])
        expected[f"{name}.{key}"] = (layer.base_layer._parameters[key].float() + delta).to(BF16)
    plain = flora.unload(model)
    for name, weight in expected.items():
        found = plain.get_parameter(name)
        torch.testing.assert_close(found, weight, rtol=2**-7, atol=1e-6)  # where the sums' order decides a rounding
        assert (found == weight).float().mean() > 0.99, name
    assert all(p.dtype == BF16 for p in plain.parameters())
    assert not any(isinstance(h, half.HOOKS) for m in plain.modules() for h in m._forward_pre_hooks.values())
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in plain.modules())
    again = Architecture(case.make, in_dtype(case.inputs, BF16)).run(plain)
    close(again, before, 0.3 if case is CASES["efficientnet-lite0"] else 0.1)


@torch.no_grad()
def test_unloading_without_merging_restores_the_cast_base(case):
    plain = flora.unload(adapted(case), merge=False)
    base = case.build()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name).to(BF16)), name
    assert [type(module).__name__ for module in plain.modules()] == [type(module).__name__ for module in base.modules()]


# Failing -----------------------------------------------------------------------------------------------------------


def everything(model):
    """Whatever a failed call must leave as it was."""
    tensors = {name: (t, t.data_ptr(), t.dtype) for name, t in (*model.named_parameters(), *model.named_buffers())}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [type(m) for m in model.modules()], hooks, tensors


def assert_untouched(model, before):
    types, hooks, tensors = everything(model)
    assert (types, hooks) == before[:2]
    for name, (tensor, address, dtype) in before[2].items():
        assert tensors[name][0] is tensor and tensors[name][1:] == (address, dtype), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int8, "bfloat16", 16], ids=str)
def test_a_dtype_that_no_base_can_be_kept_in_is_refused(dtype, tmp_path):
    model = Cnn()
    before = everything(model)
    with pytest.raises(ValueError, match=f"base_dtype={dtype!r}"):
        flora.adapt(model, flora.TuckerConfig(), base_dtype=dtype)
    with pytest.raises(ValueError, match=f"base_dtype={dtype!r}"):
        flora.load_adapter(model, tmp_path, base_dtype=dtype)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"head": (2, 2), "stem": (1, 9, 1, 1)}},  # fails in the middle, after the base was cast
        {"target_modules": ["haed"]},
        {"modules_to_save": ["nothing"]},
    ],
)
def test_a_failed_call_leaves_the_base_as_it_was(config):
    model = Cnn()
    model(IMAGES).sum().backward()
    before, grads = everything(model), [p.grad for p in model.parameters()]
    with pytest.raises(ValueError):
        flora.adapt(model, flora.TuckerConfig(rank=2, **config), base_dtype=BF16)
    assert_untouched(model, before)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_a_file_that_does_not_fit_leaves_the_base_as_it_was(tmp_path):
    model = flora.adapt(Cnn(), flora.TuckerConfig(rank=2), base_dtype=BF16)
    flora.save_adapter(model, tmp_path / "a")
    with torch.no_grad():  # one that could never learn: found out only when it is filled in
        for layer in adapted_layers(model).values():
            layer.deltas["default"].factors[0].zero_()
    flora.save_adapter(model, tmp_path / "b")
    base = Cnn()
    before = everything(base)
    with pytest.raises(ValueError, match="could never learn"):
        flora.load_adapter(base, tmp_path / "b", base_dtype=BF16)
    assert_untouched(base, before)
    flora.load_adapter(base, tmp_path / "a", base_dtype=BF16)


def test_a_single_layer_is_refused_as_ever():
    layer = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="single Linear"):
        flora.adapt(layer, flora.TuckerConfig(), base_dtype=BF16)
    assert layer.weight.dtype == torch.float32


# Memory ------------------------------------------------------------------------------------------------------------


def test_the_base_takes_half_the_memory_and_nothing_keeps_the_original():
    model = SHARED["llama"].build()
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    refs = {name: StorageWeakRef(p.untyped_storage()) for name, p in model.named_parameters()}
    flora.adapt(model, flora.TuckerConfig(rank=2), base_dtype=BF16)
    now = dict(base_parameters(model))
    for name, size in sizes.items():
        if "norm" in name:
            assert now[name].nbytes == size and not refs[name].expired()
        else:
            assert now[name].nbytes == size // 2 and refs[name].expired(), name


def test_parameters_are_the_same_objects_and_ties_hold():
    model = SHARED["llama-tied"].build()
    embedding = model.get_input_embeddings().weight
    flora.adapt(model, flora.TuckerConfig(rank=2), base_dtype=BF16)
    assert model.get_input_embeddings().weight is embedding and embedding.dtype == BF16
    assert model.lm_head.base_layer.weight is embedding

    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    other.weight = nn.Parameter(one.weight.data)  # tied by their storage alone
    flora.adapt(nn.Sequential(one, other), flora.TuckerConfig(rank=2), base_dtype=BF16)
    assert one.weight.data_ptr() == other.weight.data_ptr()


# Activations -------------------------------------------------------------------------------------------------------


class Echo(nn.Module):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return self.layer(torch.ones(2, 3))  # of float32, inside the model


Pair = namedtuple("Pair", "first second")


def test_floating_inputs_are_cast_wherever_they_are():
    model = flora.adapt(Echo(), flora.TuckerConfig(rank=2), base_dtype=BF16)
    x, ids, mask = torch.randn(3), torch.arange(3), torch.tensor([True, False])
    output = tf.modeling_outputs.BaseModelOutput(last_hidden_state=x)
    frozen = {"x": x}
    assert model([x, (x, ids)], Pair(x, None), output, key=frozen, ids=ids, mask=mask, n=2).dtype == BF16
    (first, (second, third)), pair, given = model.args
    assert first.dtype == second.dtype == pair.first.dtype == given.last_hidden_state.dtype == BF16
    assert third is ids and type(pair) is Pair and type(given) is type(output) and given[0].dtype == BF16
    assert model.kwargs["key"]["x"].dtype == BF16 and model.kwargs["ids"] is ids and model.kwargs["mask"] is mask
    assert frozen["x"] is x and output.last_hidden_state is x  # the caller's own are left alone
    same = [x.to(BF16), {"ids": ids}]
    model(same)
    assert model.args[0] is same


def test_a_mask_of_the_least_float32_stays_finite():
    model = flora.adapt(Echo(), flora.TuckerConfig(rank=2), base_dtype=torch.float16)
    mask = torch.tensor([0, torch.finfo(torch.float32).min, -torch.inf, torch.inf, torch.nan, 7e4])
    model(mask)
    expected = torch.tensor([0, torch.finfo(torch.float16).min, -torch.inf, torch.inf, torch.nan, 65504.0])
    assert torch.equal(model.args[0].float().nan_to_num(nan=1), expected.nan_to_num(nan=1))


def test_the_inputs_gradient_comes_in_its_own_dtype():
    model = flora.adapt(Cnn(), flora.TuckerConfig(rank=2), base_dtype=BF16)
    x = IMAGES.clone().requires_grad_()
    model(x).float().square().sum().backward()
    reference = IMAGES.clone().requires_grad_()
    torch.manual_seed(0)
    assert x.grad.dtype == torch.float32 and x.grad.any()
    with flora.disabled(model):
        model(reference).float().square().sum().backward()
    close([x.grad], [reference.grad], 0.02)


class Grn(nn.Module):
    """Global response normalisation under a name of its own."""

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(1, 1, 1, channels))
        self.shift = nn.Parameter(torch.randn(1, 1, 1, channels))

    def forward(self, x):
        size = x.norm(dim=(1, 2), keepdim=True)
        return self.gain * (x * size / size.mean(-1, keepdim=True)) + self.shift + x


class FrozenNorm(nn.Module):
    """A BatchNorm of buffers alone."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.rand(channels))

    def forward(self, x):
        return (x - self.mean) / self.var.sqrt() * self.weight + self.bias


class Positions(nn.Module):
    """A position table beside a dropout, added to its input or looked up by integers."""

    def __init__(self, channels):
        super().__init__()
        self.dropout = nn.Dropout(0.0)
        self.register_buffer("table", torch.randn(16, channels))

    def forward(self, x):
        return self.dropout(x + self.table[: x.shape[-2]] if x.is_floating_point() else self.table[x])


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(8),
        nn.LayerNorm((6, 8)),
        nn.RMSNorm(8),
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        Grn(8),
        FrozenNorm(8),
        Positions(8),
    ],
    ids=lambda layer: type(layer).__name__,
)
@torch.no_grad()
def test_a_layer_left_in_float32_returns_the_dtype_that_it_was_given(layer):
    model = nn.Sequential(layer, nn.Linear(8, 3))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.randn(2, 4, 6, 8, requires_grad=False)
    expected = copy.deepcopy(layer).eval()(x)
    flora.adapt(model, flora.TuckerConfig(rank=2), base_dtype=BF16)
    model.eval()
    assert_same_state(layer.state_dict(), before)
    assert layer(x).dtype == torch.float32 and torch.equal(layer(x), expected)
    assert layer(x.to(BF16)).dtype == BF16
    close([layer(x.to(BF16))], [expected], 0.03)
    assert model(x).dtype == BF16


def test_what_looks_up_in_float32_by_integers_returns_the_bases_dtype():
    layer = Positions(8)
    model = flora.adapt(nn.Sequential(layer, nn.Linear(8, 3)), flora.TuckerConfig(rank=2), base_dtype=BF16)
    assert model(torch.arange(4)).dtype == layer(torch.arange(4)).dtype == BF16


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(8, 1), nn.Conv1d(4, 4, 1), nn.PReLU(), nn.Embedding(3, 1), nn.ConvTranspose1d(1, 1, 3)],
    ids=lambda layer: type(layer).__name__,
)
def test_products_are_cast_however_narrow_they_are(layer):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    flora.adapt(model, flora.TuckerConfig(rank=1, target_modules=["0"]), base_dtype=BF16)
    assert all(p.dtype == BF16 for p in layer.parameters())


def test_computed_vectors_stay_and_other_buffers_of_cast_modules_do_not():
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.register_buffer("frequencies", torch.rand(8), persistent=False)
            self.register_buffer("table", torch.rand(8, 2), persistent=False)
            self.register_buffer("mean", torch.rand(8))
            self.register_buffer("ids", torch.arange(8))

    module = Rotary()
    flora.adapt(nn.Sequential(module, nn.Linear(8, 3)), flora.TuckerConfig(rank=1), base_dtype=BF16)
    assert [module.frequencies.dtype, module.table.dtype, module.mean.dtype] == [torch.float32, BF16, BF16]
    assert module.ids.dtype == torch.int64


def test_attention_an_encoder_and_a_recurrent_layer_run_with_and_without_gradients():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
            self.recurrent = nn.LSTM(8, 8, batch_first=True)
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.recurrent(self.encoder(x))[0])

    x, model = torch.randn(2, 5, 8), Net()
    expected = copy.deepcopy(model).eval()(x)
    flora.adapt(model, flora.TuckerConfig(rank=2), base_dtype=BF16)
    model(x).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        close([model.eval()(x)], [expected], 0.05)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_layer_computes_in_float32():
    quantised = torch.ao.nn.quantized.dynamic.Linear(8, 8)
    model = nn.Sequential(quantised, nn.Linear(8, 3))
    flora.adapt(model, flora.TuckerConfig(rank=2), base_dtype=BF16)
    given = []
    model[1].register_forward_pre_hook(lambda module, args: given.append(args[0].dtype), prepend=True)
    model(torch.randn(4, 8)).float().sum().backward()
    assert given == [BF16]
    assert isinstance(model[0], AdaptedLayer) and all(p.grad is not None for p in model[0].deltas.parameters())


# Training ----------------------------------------------------------------------------------------------------------


def test_modules_to_save_stay_in_float32_and_a_heads_output_too():
    case = SHARED["vit"]
    base = case.build()
    config = flora.TuckerConfig(rank=2, modules_to_save=["classifier", "vit.layers.1.layernorm_before"])
    model = flora.adapt(case.build(), config, base_dtype=BF16)
    head, norm = model.classifier.copies["default"], model.vit.layers[1].layernorm_before.copies["default"]
    assert torch.equal(head.weight, base.classifier.weight)  # made before the base was cast
    assert model.classifier.base_layer.weight.dtype == BF16
    given = []
    norm.register_forward_hook(lambda module, args, y: given.append((args[0].dtype, y.dtype)))
    model.classifier.register_forward_pre_hook(lambda module, args: given.append(args[0].dtype))
    model.train()
    output = model(**case.inputs, labels=torch.tensor([1, 2]))
    assert given == [(torch.float32, torch.float32), BF16]
    assert output.logits.dtype == output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for m in (head, norm) for p in m.parameters())
    with flora.disabled(model):
        assert model(**case.inputs).logits.dtype == BF16
    with torch.no_grad():
        head.weight.fill_(1 + 2**-12)
    plain = flora.unload(model)
    assert plain.classifier is head and torch.equal(head.weight, torch.ones_like(head.weight).to(BF16))
    assert plain.vit.layers[1].layernorm_before.weight.dtype == BF16


def test_a_table_that_is_trained_whole_returns_the_bases_dtype():
    case = SHARED["bert"]
    config = flora.TuckerConfig(rank=2, modules_to_save=["word_embeddings", "encoder.layer.1"])
    model = flora.adapt(case.build(), config, base_dtype=BF16).train()
    sum(t.float().square().sum() for t in case.run(model)).backward()
    copies = [model.bert.embeddings.word_embeddings.copies["default"], model.bert.encoder.layer[1].copies["default"]]
    assert all(p.dtype == torch.float32 and p.grad is not None for m in copies for p in m.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for copied in copies for m in copied.modules())
    assert case.run(model)[0].dtype == BF16


@pytest.mark.parametrize("name", ["vit", "convnextv2", "bert", "t5", "llama", "gpt2"])
def test_the_loss_with_labels_goes_down(name):
    case = CASES[name]
    labels = {"labels": torch.tensor([1, 3]) if "pixel_values" in case.inputs else TOKENS}
    model = flora.adapt(case.build(), flora.TuckerConfig(rank=4, scale=4.0), base_dtype=BF16).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**case.inputs, **labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    case = SHARED["llama"]

    def gradients(checkpointing):
        model = adapted(case).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**case.inputs, labels=TOKENS, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert plain and all(torch.equal(grad, again[name]) for name, grad in plain.items())


def test_dropout_on_a_depthwise_layer():
    model = flora.adapt(Cnn(), flora.TuckerConfig(rank=2, dropout=0.5), base_dtype=BF16).train()
    model(IMAGES).float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# Verbs -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_copies_pickles_and_states():
    case = CASES["convnextv2"]
    model = adapted(case)
    expected = case.run(model)
    assert_same(case.run(copy.deepcopy(model)), expected)
    assert_same(case.run(pickle.loads(pickle.dumps(model))), expected)
    other = flora.adapt(case.build(), flora.TuckerConfig(rank=3, scale=2.0), base_dtype=BF16)
    other.load_state_dict(model.state_dict())
    assert_same(case.run(other), expected)
    flora.merge(model)
    flora.merge(other)
    assert_same_state(other.state_dict(), model.state_dict())


@torch.no_grad()
def test_further_adapters_share_the_base():
    case = SHARED["vit"]
    model = adapted(case)
    first = case.run(model)
    config = flora.TuckerConfig(
        rank=2, target_modules=["q_proj", "classifier"], modules_to_save=["vit.layers.1.layernorm_before"]
    )
    flora.add_adapter(model, config, "other")
    assert model.vit.layers[1].layernorm_before.copies["other"].weight.dtype == torch.float32
    flora.adapt(model, flora.TuckerConfig(rank=2), "third", base_dtype=BF16)
    before = everything(model)
    with pytest.raises(ValueError, match=r"base_dtype=torch.float16: the base is kept in torch.bfloat16 for 'default'"):
        flora.adapt(model, config, "fourth", base_dtype=torch.float16)
    assert_untouched(model, before)
    assert_same(case.run(model), first)
    flora.set_adapter(model, ["default", "other"])
    assert case.run(model)[0].dtype == BF16
    flora.set_adapter(model, "default")
    flora.delete_adapter(model, "other")
    flora.delete_adapter(model, "third")
    assert_same(case.run(model), first)
    flora.delete_adapter(model, "default")
    assert all(p.dtype == BF16 for p in model.parameters())


def test_a_base_that_is_in_use_as_it_came_is_not_cast():
    model = flora.adapt(Cnn(), flora.TuckerConfig(rank=2))
    before = everything(model)
    with pytest.raises(ValueError, match=r"base_dtype=torch.bfloat16: the base is kept in the dtypes that it came in"):
        flora.add_adapter(model, flora.TuckerConfig(rank=2), "other", base_dtype=BF16)
    assert_untouched(model, before)


@torch.no_grad()
def test_deleting_one_of_two_leaves_the_input_cast_where_it_was():
    class Promoting(Cnn):
        def forward(self, pixel_values):
            x = self.norm(self.stem(pixel_values)).relu() * torch.ones(1)  # one element, of float32
            return self.head(self.norm2(self.mix(x * torch.ones(8, 1, 1))).relu().mean((2, 3)))

    model = flora.adapt(Promoting(), flora.TuckerConfig(rank=2, target_modules=["stem"]), base_dtype=BF16)
    flora.add_adapter(model, flora.TuckerConfig(rank=2, target_modules=["mix"]), "other")
    flora.set_adapter(model, "other")
    assert model(IMAGES).dtype == BF16
    flora.delete_adapter(model, "other")
    assert type(model.mix) is nn.Conv2d and model(IMAGES).dtype == BF16


@torch.no_grad()
def test_a_base_that_is_in_half_precision_already(tmp_path):
    case = SHARED["llama"]
    base = case.build().to(BF16)
    model = flora.adapt(case.build().to(BF16), flora.TuckerConfig(rank=2, modules_to_save=["lm_head"]), base_dtype=BF16)
    assert model.lm_head.copies["default"].weight.dtype == torch.float32
    with flora.disabled(model):
        assert_same(case.run(model), case.run(base))


def test_a_double_precision_base_gets_float32_deltas():
    model = flora.adapt(Cnn().double(), flora.TuckerConfig(rank=2), base_dtype=BF16)
    assert model(IMAGES.double()).dtype == BF16
    assert {p.dtype for layer in adapted_layers(model).values() for p in layer.deltas.parameters()} == {torch.float32}


@pytest.mark.parametrize("hashes", [False, True])
@torch.no_grad()
def test_an_adapter_goes_onto_a_base_in_other_dtypes_with_a_warning(hashes, tmp_path):
    case = CASES["cnn"]
    model = adapted(case)
    flora.save_adapter(model, tmp_path / "half", hashes=hashes)
    flora.save_adapter(case.adapted(), tmp_path / "full", hashes=hashes)
    with pytest.warns(UserWarning, match=r"base of other dtypes: .*it was trained with base_dtype=torch.bfloat16"):
        wide = flora.load_adapter(case.build(), tmp_path / "half")
    assert wide.stem.base_layer.weight.dtype == torch.float32
    close(case.run(wide), case.run(model), 0.05)
    with pytest.warns(UserWarning, match="base of other dtypes") as caught:
        narrow = flora.load_adapter(case.build(), tmp_path / "full", base_dtype=BF16)
    assert "trained with" not in str(caught[0].message)
    assert_same(case.run(narrow), case.run(model))
    if hashes:
        other = case.build()
        other.head.weight.add_(1)
        before = everything(other)
        with pytest.raises(ValueError, match=r"'head\.weight' has other values"):
            flora.load_adapter(other, tmp_path / "half", base_dtype=BF16)
        assert_untouched(other, before)


def test_hosvd_and_files_of_the_authors_take_a_base_dtype(tmp_path):
    flora.adapt(Cnn(), flora.TuckerConfig(rank=2, init="hosvd"), base_dtype=BF16)
    path = tmp_path / "authors.pt"
    torch.save(
        {"head.param_G": torch.ones(2, 2), "head.param_0": torch.ones(8, 2), "head.param_1": torch.ones(5, 2)}, path
    )
    model = flora.load_adapter(Cnn(), path, config=flora.TuckerConfig(scale=1.0), base_dtype=BF16)
    assert model.head.base_layer.weight.dtype == BF16
    assert F.softmax(model(IMAGES), -1).isfinite().all()
