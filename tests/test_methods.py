"""Every method through the same properties: what holds for one delta holds for all of them."""

import copy
import math
import pickle
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import TOLERANCE
from hypothesis import given
from hypothesis import strategies as st
from test_layers import CASES as LAYERS
from test_layers import filled
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import flora
from flora.config import DeltaConfig
from flora.deltas import Site, build

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@dataclass(frozen=True, kw_only=True)
class DiagonalConfig(DeltaConfig):
    """A method from outside the package: ΔW is diagonal."""

    method: ClassVar[str] = "test-diagonal"


class DiagonalDelta(flora.WeightDelta, config=DiagonalConfig):
    def __init__(self, config, site):
        super().__init__(config, site)
        self.values = site.parameter(min(site.shape[0], math.prod(site.shape[1:])))

    def unscaled_weight(self, weight):
        eye = torch.eye(self.shape[0], math.prod(self.shape[1:]), dtype=self.values.dtype)
        return (eye * nn.functional.pad(self.values, (0, eye.shape[1] - len(self.values)))).reshape(self.shape)


METHODS = {
    "tucker": flora.TuckerConfig(rank=3),
    "lora": flora.LoRAConfig(rank=1),
    "locon": flora.LoRAConfig(rank=1, tucker=True),
    "lora-xs": flora.LoRAXSConfig(rank=2),
    "circulant": flora.CirculantConfig(),
    "circulant, one vector": flora.CirculantConfig(product=False),
    "toeplitz": flora.ToeplitzConfig(),
    "toeplitz, one matrix": flora.ToeplitzConfig(product=False),
    "toeplitz, general": flora.ToeplitzConfig(symmetric=False),
    "toeplitz, general, one matrix": flora.ToeplitzConfig(symmetric=False, product=False),
    "ldr": flora.LDRConfig(),
    "ldr, one term": flora.LDRConfig(terms=1),
    "kronecker": flora.KroneckerConfig(rank=1),
    "rescale": flora.RescaleConfig(bias=False),
    "rescale, rows": flora.RescaleConfig(columns=False, bias=False),
    "rescale, columns": flora.RescaleConfig(rows=False, bias=False),
    "from outside": DiagonalConfig(),
}
WEIGHTS = {"matrix": (6, 9), "tall": (10, 4), "kernel": (6, 4, 3), "image kernel": (4, 2, 3, 2), "one row": (1, 5)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the transforms are too small to share
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=METHODS)
def config(request):
    return METHODS[request.param]


def draw(delta, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return delta


def built(config, shape, dtype=torch.float64):
    torch.manual_seed(1)
    weight = torch.randn(shape, dtype=dtype)
    return draw(build(config, Site(shape, dtype, weight=weight, name="here"))), weight


# ΔW ----------------------------------------------------------------------------------------------------------------


def dense(delta, weight):
    """ΔW by other means: scipy and numpy, from the delta's parameters."""
    p = {name: value.detach().numpy() for name, value in delta.named_parameters()}
    rows, columns = len(weight), weight[0].numel()
    n, config = max(rows, columns), delta.config

    def toeplitz(matrix):
        if config.symmetric:
            return scipy.linalg.toeplitz(p[matrix])
        return scipy.linalg.toeplitz(p[f"{matrix}_col"], np.concatenate([p[f"{matrix}_col"][:1], p[f"{matrix}_row"]]))

    match config:
        case flora.CirculantConfig():
            full = scipy.linalg.circulant(p["a"] * p["b"] if config.product else p["a"])
        case flora.ToeplitzConfig():
            full = toeplitz("b") @ toeplitz("a") if config.product else toeplitz("a")
        case flora.LDRConfig():
            full = 0
            for c, s in zip(p["circulant"], p["skew"], strict=True):
                full = full + scipy.linalg.circulant(c) @ scipy.linalg.toeplitz(s, np.append(s[:1], -s[:0:-1]))
        case flora.KroneckerConfig():
            full = np.kron(p["b"], p["a"])
        case flora.RescaleConfig():
            full = weight.reshape(rows, columns).numpy().copy()
            if config.rows:
                full *= p["row"][:, None]
            if config.columns:
                full *= np.repeat(p["column"], columns // len(p["column"]))[None]
        case DiagonalConfig():
            full = np.zeros((n, n))
            np.fill_diagonal(full[:rows, :columns], p["values"])
        case flora.TuckerConfig() | flora.LoRAConfig() | flora.LoRAXSConfig():
            full = p["core"] if "core" in p else np.eye(p["factors.0"].shape[1])
            for mode in range(weight.ndim):
                if f"factors.{mode}" in p:
                    full = np.moveaxis(np.tensordot(full, p[f"factors.{mode}"], (mode, 1)), -1, mode)
            full = full.reshape(rows, columns)
    assert full.shape[0] >= rows
    return delta.scale * full[:rows, :columns].reshape(weight.shape)


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
def test_delta_weight_is_the_dense_construction(config, shape, isa):
    delta, weight = built(replace(config, scale=0.7), shape)
    np.testing.assert_allclose(delta.delta_weight(weight).detach(), dense(delta, weight), atol=1e-12)
    effective = delta.effective_weight(weight).detach()
    np.testing.assert_allclose(effective, weight.numpy() + dense(delta, weight), atol=1e-12)


@given(st.data())
def test_delta_weight_of_any_shape(data):
    name = data.draw(st.sampled_from(sorted(METHODS)))
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=4)))
    delta, weight = built(METHODS[name], shape)
    np.testing.assert_allclose(delta.delta_weight(weight).detach(), dense(delta, weight), atol=1e-11)


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)
def test_gradcheck_of_the_effective_weight(config, shape):
    delta, weight = built(config, shape)

    def run(weight, *parameters):
        names = [name for name, _ in delta.named_parameters()]
        return torch.func.functional_call(
            Effective(delta), {f"delta.{n}": p for n, p in zip(names, parameters, strict=True)}, weight
        )

    inputs = weight.requires_grad_(), *(p.detach().requires_grad_() for p in delta.parameters())
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


class Effective(nn.Module):
    def __init__(self, delta):
        super().__init__()
        self.delta = delta

    def forward(self, weight):
        return self.delta.effective_weight(weight)


# On layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYERS)
def test_first_output_is_the_base_bit_for_bit(config, case):
    make, shape = LAYERS[case]
    base = make().requires_grad_(False)
    x = torch.randn(shape)
    expected = base(x)
    for plan in ("auto", "fused", "hybrid", "merged"):
        layer = flora.wrap(copy.deepcopy(base), replace(config, plan=plan))
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer.weight, base.weight)


@pytest.mark.parametrize("plan", ["auto", "fused", "hybrid", "merged"])
@pytest.mark.parametrize("case", LAYERS)
def test_output_and_gradients_are_those_of_the_effective_weight(config, case, plan):
    make, shape = LAYERS[case]
    torch.manual_seed(0)
    base = make()
    layer = filled(flora.wrap(copy.deepcopy(base), replace(config, plan=plan, scale=0.5)))
    delta = layer.deltas["default"]
    x = torch.randn(shape, requires_grad=True)
    weight = (layer.base_layer.weight + delta.delta_weight(base.weight)).detach().requires_grad_()
    expected = torch.func.functional_call(base, {"weight": weight}, x)
    dy = torch.randn_like(expected)
    dx, dw = torch.autograd.grad(expected, (x, weight), dy)

    learning = [p for p in delta.parameters() if p.requires_grad]
    y = layer(x)
    grads = torch.autograd.grad(y, (x, *learning), dy)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[0], dx, rtol=1e-4, atol=1e-4)
    of_weight = torch.autograd.grad(delta.delta_weight(base.weight), learning, dw)
    torch.testing.assert_close(list(grads[1:]), list(of_weight), rtol=1e-4, atol=2e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", ["auto", "fused", "hybrid", "merged"])
@pytest.mark.parametrize("case", ["linear", "conv2d", "conv2d depthwise", "conv3d"])
def test_gradcheck_on_layers(config, case, plan):
    make, shape = LAYERS[case]
    layer = filled(flora.wrap(make().double(), replace(config, plan=plan)))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())  # the base's too

    def run(x, *values):  # which gradcheck changes in place
        return layer(x)

    assert gradcheck(run, (x, *(p.requires_grad_() for p in parameters.values())), fast_mode=True)


@pytest.mark.parametrize("case", LAYERS)
def test_merge_equals_unmerged_and_unmerge_gives_the_base_back(config, case):
    make, shape = LAYERS[case]
    layer = filled(flora.wrap(make(), config))
    x = torch.randn(shape)
    original = layer.base_layer.weight
    before, bits = layer(x), original.clone()
    frozen = layer.base_layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    layer.enabled = False
    assert torch.equal(layer(x), frozen)
    layer.enabled = True
    layer.unmerge()
    assert layer.base_layer.weight is original
    assert torch.equal(original, bits)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("case", ["linear", "conv2d", "conv2d groups"])
def test_dropout_is_on_the_deltas_input_alone(config, case):
    make, shape = LAYERS[case]
    torch.manual_seed(3)
    layer = filled(flora.wrap(make().double(), replace(config, dropout=0.5)))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    layer.eval()
    (of_base,) = torch.autograd.grad(layer.base_layer(x), x, dy)
    (of_both,) = torch.autograd.grad(layer(x), x, dy)
    seen = (of_both - of_base).abs() > 1e-9  # by the delta
    mask = torch.where(seen, (dx - of_base) / (of_both - of_base), 0)
    torch.testing.assert_close(mask * (mask - 2), torch.zeros_like(mask), rtol=0, atol=1e-6)
    assert 0 < (mask[seen] > 1).double().mean() < 1
    dropped = x * mask.round()
    torch.testing.assert_close(y, layer.base_layer(x) + layer(dropped) - layer.base_layer(dropped))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["linear", "conv2d", "conv2d depthwise"])
def test_half_precision_keeps_float32_parameters(config, case, dtype):
    make, shape = LAYERS[case]
    torch.manual_seed(0)
    layer = filled(flora.wrap(make(), replace(config, scale=0.1)).to(dtype))
    delta = layer.deltas["default"]
    assert {p.dtype for p in delta.parameters()} == {torch.float32}
    exact = copy.deepcopy(layer).float()
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    expected = exact(x.detach().float().requires_grad_())
    torch.testing.assert_close(y.float(), expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())
    grads = torch.autograd.grad(y.sum(), (x, *(p for p in delta.parameters() if p.requires_grad)))
    assert all(torch.isfinite(g).all() for g in grads)
    assert TOLERANCE[dtype] < 2**-6


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_copies_compute_the_same(config, copied):
    layer = filled(flora.wrap(nn.Linear(5, 7), config))
    x = torch.randn(3, 5)
    assert torch.equal(copied(layer)(x), layer(x))


@pytest.mark.parametrize("plan", ["auto", "fused", "hybrid", "merged"])
def test_nothing_of_the_weights_size_is_kept_for_backward(config, plan):
    """But x and the weight itself; a method from outside keeps the one tensor that it makes."""
    layer = filled(flora.wrap(nn.Linear(48, 64), replace(config, plan=plan)))
    x = torch.randn(16, 48, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer(x).sum().backward()
    kept.pop(layer.base_layer.weight.data_ptr(), None)
    large = [t for t in kept.values() if t.numel() >= 48 * 64]
    assert len(large) == isinstance(config, DiagonalConfig) * len(large)


# In models ---------------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 8), nn.ReLU(), nn.Linear(8, 2))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_training_saving_loading_and_unloading(config, tmp_path):
    model = flora.adapt(network(), config)
    start = model(IMAGES)
    assert torch.equal(start, network().requires_grad_(False)(IMAGES))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IMAGES), torch.tensor([0, 1])).backward()
        optimizer.step()
    trained = model(IMAGES)
    assert not torch.equal(trained, start)
    assert all(row.method == config.method for row in flora.summary(model).layers)
    flora.save_adapter(model, tmp_path / "adapter")
    loaded = flora.load_adapter(network(), tmp_path / "adapter")
    assert torch.equal(loaded(IMAGES), trained)
    with flora.disabled(loaded):
        assert torch.equal(loaded(IMAGES), start)
    torch.testing.assert_close(flora.unload(loaded)(IMAGES), trained, rtol=1e-4, atol=1e-5)
    assert torch.equal(flora.unload(model, merge=False)(IMAGES), start)


def test_json_gives_the_configuration_back(config):
    assert DeltaConfig.from_dict(config.to_dict()) == config


# Several at once ---------------------------------------------------------------------------------------------------


def stirred(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".deltas." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("other", METHODS.values(), ids=METHODS)
def test_updates_of_two_methods_add_with_their_weights(config, other):
    model = nn.Sequential(nn.Linear(6, 6), nn.Conv1d(4, 4, 3, padding=1))
    flora.adapt(model, config, "a")
    flora.adapt(model, other, "b")
    flora.set_adapter(model, {"a": 0.7, "b": -0.3})
    stirred(model)
    x = torch.randn(2, 4, 6)
    y = model(x)
    h = x
    for layer in model:
        weight = layer.base_layer.weight
        deltas = {}
        for name, factor in (("a", 0.7), ("b", -0.3)):
            delta = copy.deepcopy(layer.deltas[name])
            assert delta.strength == factor
            delta.strength = 1.0
            deltas[name] = factor * delta.delta_weight(weight)
        effective = copy.deepcopy(layer.base_layer)
        effective.weight = nn.Parameter(weight + deltas["a"] + deltas["b"])
        h = effective(h)
    torch.testing.assert_close(y, h, rtol=1e-4, atol=1e-5)
    flora.merge(model)
    torch.testing.assert_close(model(x), h, rtol=1e-4, atol=1e-5)
    flora.unmerge(model)
    flora.set_adapter(model, "a")
    assert {delta.strength for layer in model for _, delta in layer.adapters()} == {1.0}


def test_methods_by_pattern(tmp_path):
    configs = {"0": flora.RescaleConfig(), "3": flora.CirculantConfig(), "5": flora.TuckerConfig(rank=2)}
    model = stirred(flora.adapt(network(), configs))
    assert [row.method for row in flora.summary(model).layers] == ["rescale", "circulant", "tucker"]
    flora.save_adapter(model, tmp_path / "mixed")
    assert torch.equal(flora.load_adapter(network(), tmp_path / "mixed")(IMAGES), model(IMAGES))


@pytest.mark.parametrize("trained", ["x", "no x"])
@pytest.mark.parametrize("case", LAYERS)
def test_a_delta_alone_learns_on_every_layer(config, case, trained):
    """With nothing else that needs a gradient, and with dropout: what is not asked for is not computed."""
    make, shape = LAYERS[case]
    for dropout in (0.0, 0.2):
        layer = filled(flora.wrap(make(), replace(config, dropout=dropout)))
        layer(torch.randn(shape, requires_grad=trained == "x")).sum().backward()
        assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["circulant", "toeplitz", "toeplitz, general", "ldr", "kronecker", "from outside"])
def test_rows_of_an_embedding_are_those_of_its_delta(name):
    config = METHODS[name] if name != "kronecker" else flora.KroneckerConfig(rank=3)
    layer = filled(flora.wrap(nn.Embedding(12, 6, padding_idx=2), config))
    delta = layer.deltas["default"]
    table = layer.base_layer.weight + delta.delta_weight(layer.base_layer.weight)
    table = table.index_copy(0, torch.tensor([2]), layer.base_layer.weight[2:3])
    ids = torch.tensor([[0, 2, 11], [5, 5, 1]])
    torch.testing.assert_close(layer(ids), table[ids], rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(layer(ids).square().sum(), tuple(delta.parameters()))
    expected = torch.autograd.grad(table[ids].square().sum(), tuple(delta.parameters()))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


def test_merging_under_autocast_keeps_the_precision(config):
    layer = filled(flora.wrap(nn.Linear(6, 6), config))
    delta = layer.deltas["default"]
    expected = layer.base_layer.weight + delta.delta_weight(layer.base_layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert delta.delta_weight(layer.base_layer.weight).dtype == torch.float32
        layer.merge()
    torch.testing.assert_close(layer.base_layer.weight, expected, rtol=1e-6, atol=1e-6)


def test_a_batch_of_nothing(config):
    layer = filled(flora.wrap(nn.Linear(6, 6), config))
    x = torch.zeros(0, 6, requires_grad=True)
    keeps_input = not isinstance(config, flora.LoRAXSConfig)  # whose input factor does not learn
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=keeps_input)
    assert dx.shape == (0, 6)
    y = torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))
    assert y.shape == (0, 6)


@pytest.mark.parametrize("name", ["lora", "circulant", "toeplitz", "ldr", "kronecker", "rescale"])
def test_a_file_of_zeros_could_never_learn(name, tmp_path):
    config = replace(METHODS[name], target_modules=["3"])
    model = flora.adapt(network(), config)
    with torch.no_grad():
        for parameter in model[3].deltas.parameters():
            parameter.zero_()
    flora.save_adapter(model, tmp_path / "zeros")
    with pytest.raises(ValueError, match="3: the delta could never learn, as .* zero"):
        flora.load_adapter(network(), tmp_path / "zeros")
    flora.load_adapter(network(), tmp_path / "zeros", trainable=False)


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flora.CirculantConfig(product=1), "CirculantConfig: product=1 must be True or False"),
        (lambda: flora.ToeplitzConfig(symmetric="no"), "ToeplitzConfig: symmetric='no' must be True or False"),
        (lambda: flora.LDRConfig(terms=0), "LDRConfig: terms=0 must be a positive int"),
        (lambda: flora.KroneckerConfig(rank=0), "KroneckerConfig: rank=0 must be a positive int"),
        (lambda: flora.KroneckerConfig(rank=2, block=(2, 2)), r"block=\(2, 2\) cannot be given together with rank=2"),
        (lambda: flora.KroneckerConfig(block=(2, 0)), r"block=\(2, 0\) must be two positive ints"),
        (lambda: flora.KroneckerConfig(block=3), "block=3 must be two positive ints"),
        (lambda: flora.KroneckerConfig(block=(2, 2), alpha=4), r"alpha=4.0 needs a rank, and there is block=\(2, 2\)"),
        (lambda: flora.KroneckerConfig(rank=(2, 2)), r"rank=\(2, 2\) must be a positive int"),
        (lambda: flora.RescaleConfig(rows=False, columns=False, bias=False), "nothing could learn"),
        (lambda: flora.RescaleConfig(init="zeros"), "init='zeros' must be one of identity, reference"),
    ],
)
def test_wrong_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            flora.KroneckerConfig(rank=16),
            "3: rank=16 does not divide both extents of the 8×216 matrix; 1, 2, 4, 8 would",
        ),
        (flora.KroneckerConfig(block=(3, 4)), r"3: block=\(3, 4\): 3 does not divide the 8 rows .*; 1, 2, 4, 8 would"),
        (
            flora.KroneckerConfig(block=(4, 5)),
            r"block=\(4, 5\): 5 does not divide the 216 columns .*; 1, 2, 3, 4, 6, 8",
        ),
    ],
)
def test_blocks_that_do_not_fit_name_the_module_and_the_divisors(config, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        flora.adapt(model, replace(config, target_modules=["3"]))
    assert type(model[3]) is nn.Linear
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_method_that_is_taken_is_an_error():
    with pytest.raises(TypeError, match="Another: method='circulant' is that of CirculantConfig"):
        type("Another", (DeltaConfig,), {"method": "circulant"})
    assert type(DeltaConfig.from_dict(flora.CirculantConfig().to_dict())) is flora.CirculantConfig


def test_a_block_takes_the_place_of_the_rank():
    assert replace(flora.KroneckerConfig(), block=(2, 2)).block == (2, 2)
    assert flora.KroneckerConfig(alpha=8).resolved_scale == 0.5


def test_a_configuration_without_a_delta_is_an_error():
    @dataclass(frozen=True, kw_only=True)
    class Unknown(DeltaConfig):
        method: ClassVar[str] = "test-unknown"

    try:
        with pytest.raises(TypeError, match="no delta is known for a configuration of type Unknown"):
            flora.wrap(nn.Linear(2, 2), Unknown())
    finally:
        DeltaConfig._methods.pop("test-unknown")


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_a_complex_weight_is_refused_by_name(config):
    """A real delta on it would lose the imaginary part of its output, as on a quantised weight it does not."""
    layer = nn.Linear(8, 8, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"its weight is not a tensor of floating-point numbers: torch\.complex64"):
        flora.wrap(layer, config)
