"""LoRA, LoCon and LoRA-XS: parameters, starts, the same numbers as PEFT's and LyCORIS's, gradients of the C path."""

import math
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from transformers.pytorch_utils import Conv1D

import flora
from flora import functional
from flora.deltas import Site, build
from flora.forms import Tucker
from flora.kinds import kind_of
from flora.ops import LINEAR, ConvOp

LORA = flora.LoRAConfig(rank=4, alpha=8)
LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=1), (2, 4, 7, 8)),
    "conv2d, 1×1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 3)),
    "conv2d, 1×1, stride": (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 5, 3)),
    "conv2d, groups": (
        lambda: nn.Conv2d(6, 9, 3, padding=2, dilation=2, groups=3, padding_mode="reflect"),
        (2, 6, 6, 7),
    ),
    "conv2d, depthwise": (lambda: nn.Conv2d(5, 10, 3, groups=5), (2, 5, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2, padding="same"), (1, 3, 4, 3, 5)),
    "conv1d of transformers": (lambda: Conv1D(7, 5), (2, 3, 5)),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def fill(delta, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return delta


def lora_of_peft(layer, rank, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(r=rank, target_modules=["0"], **options))
    return model.base_model.model[0]


# Parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "config", "core", "factors"),
    [
        (nn.Linear(5, 7), LORA, None, [(7, 4), (5, 4)]),
        (Conv1D(7, 5), LORA, None, [(7, 4), (5, 4)]),
        (nn.Embedding(7, 5), LORA, None, [(7, 4), (5, 4)]),
        (nn.Linear(3, 2), LORA, None, [(2, 4), (3, 4)]),  # the rank is never cut
        (nn.Conv2d(6, 8, 3, groups=2), LORA, (4, 3, 3, 3), [(8, 4)]),
        (nn.Conv3d(6, 8, (1, 2, 3)), LORA, (4, 6, 1, 2, 3), [(8, 4)]),
        (nn.Conv2d(6, 8, 3, groups=2), flora.LoRAConfig(rank=4, tucker=True), (4, 4, 3, 3), [(8, 4), (3, 4)]),
        (nn.Linear(5, 7), flora.LoRAConfig(rank=4, tucker=True), None, [(7, 4), (5, 4)]),
        (nn.Linear(5, 7), flora.LoRAXSConfig(rank=4), (4, 4), [(7, 4), (5, 4)]),
        (nn.Linear(3, 20), flora.LoRAXSConfig(rank=8), (3, 3), [(20, 3), (3, 3)]),  # a 20×3 matrix has 3 of them
        (nn.Conv2d(6, 8, 3), flora.LoRAXSConfig(rank=4), (4, 4, 2, 2), [(8, 4), (6, 4), (3, 2), (3, 2)]),
        (nn.Conv2d(16, 16, 2, groups=16), flora.LoRAXSConfig(rank=8), (4, 1, 2, 2), [(16, 4), (1, 1), (2, 2), (2, 2)]),
        (nn.Conv1d(6, 8, 3), flora.LoRAXSConfig(rank=(4, 3, 1)), (4, 3, 1), [(8, 4), (6, 3), (3, 1)]),
    ],
    ids=str,
)
def test_shapes(layer, config, core, factors):
    delta = flora.wrap(layer, config).deltas["default"]
    assert (None if delta.core is None else tuple(delta.core.shape)) == core
    assert [tuple(factor.shape) for factor in delta.factors] == factors
    learning = [name for name, p in delta.named_parameters() if p.requires_grad]
    expected = ["core"] if isinstance(config, flora.LoRAXSConfig) else [name for name, _ in delta.named_parameters()]
    assert learning == expected


@pytest.mark.parametrize("config", [LORA, flora.LoRAConfig(rank=4, tucker=True), flora.LoRAXSConfig(rank=2)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_the_first_output_is_the_base_bit_for_bit_and_something_learns(name, config):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    base, x = make(), torch.randn(shape)
    layer = flora.wrap(base, config)
    y = layer(x)
    assert torch.equal(y, base(x))
    y.square().sum().backward()
    learning = [p for p in layer.parameters() if p.requires_grad]
    assert any(p.grad.any() for p in learning)
    assert layer.deltas["default"].stuck() is None


def test_starts_as_in_peft():
    """As far as a draw can be compared: what is zero, and the bounds or spread of what is not."""
    torch.manual_seed(0)
    for layer in (nn.Linear(400, 30), nn.Conv2d(40, 30, 3)):
        ours = flora.wrap(layer, flora.LoRAConfig(rank=64)).deltas["default"]
        theirs = lora_of_peft(layer, 64)
        a = ours.factors[1].mT if ours.core is None else ours.core
        their_a = theirs.lora_A["default"].weight
        bound = 1 / math.sqrt(a[0].numel())
        assert a.shape == their_a.shape
        for drawn in (a, their_a):
            assert 0.98 * bound < drawn.abs().max() <= bound
            assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert not ours.factors[0].any() and not theirs.lora_B["default"].weight.any()
    embedding = nn.Embedding(30, 400)
    ours, theirs = flora.wrap(embedding, flora.LoRAConfig(rank=64)).deltas["default"], lora_of_peft(embedding, 64)
    assert not ours.factors[0].any() and not theirs.lora_embedding_A["default"].any()
    for drawn in (ours.factors[1], theirs.lora_embedding_B["default"]):
        assert drawn.std().item() == pytest.approx(1, rel=0.03)
    mid = flora.wrap(nn.Conv2d(40, 30, 3), flora.LoRAConfig(rank=64, tucker=True)).deltas["default"]
    assert not mid.factors[0].any()
    assert mid.core.std().item() == pytest.approx(1 / math.sqrt(3 * 64 * 9), rel=0.03)
    assert mid.factors[1].std().item() == pytest.approx(1 / math.sqrt(3 * 40), rel=0.05)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 4, 3), (5, 4, 3, 2)])
@pytest.mark.parametrize("scaled", [True, False])
def test_lora_xs_factors_are_the_singular_vectors(shape, scaled):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    config = flora.LoRAXSConfig(rank=3, singular_values=scaled)
    delta = build(config, Site(shape, torch.float64, weight=weight))
    for mode, factor in enumerate(delta.factors):
        u, s, _ = torch.linalg.svd(weight.movedim(mode, 0).flatten(1), full_matrices=False)
        r = factor.shape[1]
        expected = u[:, :r] * s[:r] if scaled and mode == 1 else u[:, :r]
        signs = (factor * expected).sum(0).sign()
        torch.testing.assert_close(factor.detach(), expected * signs, rtol=1e-10, atol=1e-10)


def test_lora_xs_reaches_the_best_approximation_of_its_own_weight():
    """With the core Σ⁻¹Uᵀ(-W)V·… the update can cancel the leading part of W: Eckart and Young's error is left."""
    torch.manual_seed(0)
    weight = torch.randn(12, 8, dtype=torch.float64)
    delta = build(flora.LoRAXSConfig(rank=3), Site((12, 8), torch.float64, weight=weight))
    u, v = delta.factors
    with torch.no_grad():
        delta.core.copy_(torch.linalg.pinv(u) @ -weight @ torch.linalg.pinv(v).mT)
    left = torch.linalg.matrix_norm(weight + delta.delta_weight(weight))
    assert left.item() == pytest.approx(torch.linalg.svdvals(weight)[3:].norm().item(), rel=1e-10)


def test_a_weight_of_low_rank_has_orthonormal_factors_all_the_same():
    weight = torch.outer(torch.arange(1.0, 11), torch.arange(1.0, 5))
    for shape in ((10, 4), (4, 10)):
        delta = build(flora.TuckerConfig(rank=8, init="hosvd"), Site(shape, weight=weight.reshape(shape)))
        for factor in delta.factors:
            torch.testing.assert_close(factor.mT @ factor, torch.eye(factor.shape[1]), atol=1e-5, rtol=0)


def test_lora_xs_needs_the_weight():
    with pytest.raises(ValueError, match=r"here: LoRA-XS needs the values of a floating-point weight"):
        build(flora.LoRAXSConfig(), Site((4, 4), name="here"))


def test_lora_needs_two_modes():
    with pytest.raises(ValueError, match=r"here: LoRA needs a weight of two modes or more, not \(4,\)"):
        build(LORA, Site((4,), name="here"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0 must be a positive int"),
        ({"rank": (4, 4)}, r"rank=\(4, 4\) must be a positive int"),
        ({"rank_pattern": {"x": (4, 4)}}, r"rank_pattern\['x'\]=\(4, 4\) must be a positive int"),
        ({"tucker": 1}, "tucker=1 must be True or False"),
        ({"rank_stabilized": True}, "rank_stabilized=True needs alpha"),
        ({"rank_stabilized": True, "scale": 2.0}, "rank_stabilized=True needs alpha"),
    ],
)
def test_lora_configurations_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=f"LoRAConfig: {message}"):
        flora.LoRAConfig(**fields)


def test_the_other_configuration_that_cannot_be():
    with pytest.raises(ValueError, match="LoRAXSConfig: singular_values='yes' must be True or False"):
        flora.LoRAXSConfig(singular_values="yes")


def test_scales():
    config = flora.LoRAConfig(rank=4, alpha=8, rank_stabilized=True, rank_pattern={"a": 16}, scale_pattern={"b": 3.0})
    assert config.for_module("x").resolved_scale == 4.0
    assert config.for_module("a").resolved_scale == 2.0
    assert config.for_module("b").resolved_scale == 3.0
    assert flora.LoRAConfig(rank=4, alpha=8).resolved_scale == 2.0
    assert flora.LoRAConfig.from_dict(config.to_dict()) == config


# The same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["auto", "fused", "hybrid", "merged"])
@pytest.mark.parametrize("name", [name for name in LAYERS if "groups" not in name and "depthwise" not in name])
def test_outputs_and_gradients_are_those_of_peft(name, plan):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    base, x = make().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    theirs = lora_of_peft(base, 4, lora_alpha=8).double()
    ours = flora.wrap(base, flora.LoRAConfig(rank=4, alpha=8, plan=plan))
    delta = fill(ours.deltas["default"])
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(delta.factors[1].mT if delta.core is None else delta.core)
        b.copy_(delta.factors[0].reshape(b.shape))
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    dy = torch.randn_like(y)
    of_a = delta.factors[1] if delta.core is None else delta.core
    found = torch.autograd.grad(y, (x, of_a, delta.factors[0]), dy)
    dx, d_a, d_b = torch.autograd.grad(expected, (x, a, b), dy)
    for one, other in zip(found, (dx, d_a.mT if delta.core is None else d_a, d_b.flatten(1)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    weight = base.weight.detach()
    their_delta = theirs.get_delta_weight("default")
    torch.testing.assert_close(delta.delta_weight(weight), their_delta, rtol=1e-11, atol=1e-11)


def test_an_embedding_is_that_of_peft():
    base, ids = nn.Embedding(9, 5, padding_idx=2), torch.tensor([[0, 3], [8, 3]])
    theirs = lora_of_peft(base, 4, lora_alpha=8)
    ours = flora.wrap(base, LORA)
    delta = fill(ours.deltas["default"])
    with torch.no_grad():
        theirs.lora_embedding_A["default"].copy_(delta.factors[0].mT)
        theirs.lora_embedding_B["default"].copy_(delta.factors[1])
    torch.testing.assert_close(ours(ids), theirs(ids))


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv2d, 1×1"])
def test_locon_is_that_of_lycoris(name):
    locon = pytest.importorskip("lycoris.modules.locon").LoConModule
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    base, x = make(), torch.randn(shape)
    theirs = locon("m", base, lora_dim=4, alpha=8, use_tucker=True)
    ours = flora.wrap(base, flora.LoRAConfig(rank=4, alpha=8, tucker=True))
    delta = fill(ours.deltas["default"])
    with torch.no_grad():
        up, down = theirs.lora_up.weight, theirs.lora_down.weight
        if theirs.tucker:
            theirs.lora_mid.weight.copy_(delta.core)
            values = delta.factors[0], delta.factors[1].mT
        else:  # a kernel of one tap is a matrix to them
            values = (
                delta.factors[0],
                delta.factors[1].mT if delta.core is None else delta.core[:, :, 0, 0] @ delta.factors[1].mT,
            )
        for weight, value in zip((up, down), values, strict=True):
            weight.copy_(value.reshape(weight.shape))
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


# The C path --------------------------------------------------------------------------------------------------------


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


CONVS = {
    "conv1d, circular": (ConvOp((2,), (1, 2), (1,), 1, "circular"), (2, 3, 7), (4, 3, 3)),
    "conv2d": (ConvOp((1, 2), (1, 1, 0, 2), (1, 1), 1), (2, 3, 4, 5), (4, 3, 2, 3)),
    "conv2d, reflect": (ConvOp((1, 1), (1, 1, 2, 2), (2, 1), 1, "reflect"), (1, 2, 5, 4), (3, 2, 2, 3)),
    "conv2d, replicate": (ConvOp((1, 1), (1, 1, 1, 1), (1, 1), 1, "replicate"), (1, 2, 3, 4), (3, 2, 3, 3)),
    "conv2d, groups": (ConvOp((1, 1), (1, 0, 0, 0), (1, 1), 2), (2, 4, 3, 4), (6, 2, 2, 2)),
    "conv2d, depthwise": (ConvOp((1, 1), (1, 1, 1, 1), (1, 1), 3), (2, 3, 4, 4), (6, 1, 3, 3)),
    "conv2d, 1×1": (ConvOp((1, 1), (0, 0, 0, 0), (1, 1), 2), (2, 4, 2, 3), (6, 2, 1, 1)),
    "conv3d": (ConvOp((1, 1, 2), (0, 1, 1, 0, 0, 0), (1, 2, 1), 1), (1, 2, 3, 4, 3), (3, 2, 2, 2, 2)),
}


@pytest.mark.parametrize("plan", ["fused", "hybrid"])
@pytest.mark.parametrize("case", CONVS)
def test_gradcheck_of_a_convolution_without_input_factor(case, plan, isa):
    op, x_shape, shape = CONVS[case]
    torch.manual_seed(0)
    x, w, core, u_out = draw(*x_shape), draw(*shape), draw(3, *shape[1:]), draw(shape[0], 3)

    def run(x, w, core, u_out):
        tucker = Tucker(core, (u_out, *[None] * (len(shape) - 1)), 0.7)
        return functional.adapted(op, x, w, None, tucker, plan=plan)

    assert gradcheck(run, (x, w, core, u_out))
    assert gradgradcheck(run, (x, w, core, u_out))


@pytest.mark.parametrize("case", ["conv2d", "conv2d, groups"])
def test_gradcheck_of_the_update_alone(case):
    op, x_shape, shape = CONVS[case]
    torch.manual_seed(0)
    x, core, u_out = draw(*x_shape), draw(3, *shape[1:]), draw(shape[0], 3)

    def run(x, core, u_out):
        return functional.update(op, x, None, shape, Tucker(core, (u_out, *[None] * (len(shape) - 1)), 0.7))

    assert gradcheck(run, (x, core, u_out))


@pytest.mark.parametrize("plan", ["fused", "hybrid", "merged"])
def test_gradcheck_of_a_matrix_without_core(plan, isa):
    torch.manual_seed(0)
    x, w, u_out, u_in = draw(4, 5), draw(6, 5), draw(6, 3), draw(5, 3)

    def run(x, w, u_out, u_in):
        return functional.adapted(LINEAR, x, w, None, Tucker(None, (u_out, u_in), 0.7), plan=plan)

    assert gradcheck(run, (x, w, u_out, u_in))
    assert gradgradcheck(run, (x, w, u_out, u_in))


@pytest.mark.parametrize("frozen", ["core", "u_out", "x", "core and x"])
@pytest.mark.parametrize("plan", ["fused", "hybrid"])
def test_parts_that_do_not_learn(frozen, plan):
    op, x_shape, shape = CONVS["conv2d"]
    torch.manual_seed(0)
    tensors = {"x": draw(*x_shape), "core": draw(3, *shape[1:]), "u_out": draw(shape[0], 3)}
    weight = draw(*shape).detach()
    for name in frozen.split(" and "):
        tensors[name].requires_grad_(False)
    learning = [t for t in tensors.values() if t.requires_grad]

    def gradients(plan):
        tucker = Tucker(tensors["core"], (tensors["u_out"], None, None, None), 0.7)
        y = functional.adapted(op, tensors["x"], weight, None, tucker, plan=plan)
        return y, *torch.autograd.grad(y, learning, torch.ones_like(y))

    for ours, theirs in zip(gradients(plan), gradients("merged"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_half_precision_is_rounded_once(dtype, memory_format, isa):
    """x, dy and the base in half precision; the delta and all its sums in float32."""
    torch.manual_seed(0)
    base = nn.Conv2d(32, 48, 3, padding=1, bias=False).to(dtype)
    layer = flora.wrap(base, flora.LoRAConfig(rank=8, plan="fused", scale=0.05))
    delta = fill(layer.deltas["default"])
    x = torch.randn(2, 32, 9, 11).to(dtype).to(memory_format=memory_format).requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (delta.core, delta.factors[0]), dy)
    exact = [t.detach().double().requires_grad_() for t in (delta.core, delta.factors[0])]
    weight = base.weight.detach().double() + 0.05 * torch.einsum("or,ri...->oi...", exact[1], exact[0])
    expected = nn.functional.conv2d(x.detach().double(), weight, padding=1)
    ulp = torch.finfo(dtype).eps
    assert (y.double() - expected).abs().max() <= 2 * ulp * expected.abs().max()  # the base's rounding, and ours
    for ours, theirs in zip(found, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_memory_that_is_kept_is_x_and_r_channels():
    """The fused plan keeps x, the parameters and the core's output; nothing of the size of the padded input."""
    layer = flora.wrap(nn.Conv2d(64, 64, 3, padding=1), flora.LoRAConfig(rank=4, plan="fused"))
    x = torch.randn(2, 64, 20, 20)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    delta = layer.deltas["default"]
    allowed = [x, layer.base_layer.weight, layer.base_layer.bias, *delta.parameters()]
    assert sum(kept.values()) <= sum(t.nbytes for t in allowed) + 4 * 2 * 4 * 20 * 20


def test_every_plan_is_possible_and_dropout_reaches_the_delta_alone():
    torch.manual_seed(0)
    base, x = nn.Conv2d(8, 8, 3), torch.randn(2, 8, 6, 6)
    layer = flora.wrap(base, flora.LoRAConfig(rank=2, dropout=0.5))
    delta = fill(layer.deltas["default"])
    op = kind_of(base).op(base)
    assert delta.tucker.form.runs(op, delta.tucker.tensors) == ("fused", "hybrid", "merged")
    torch.manual_seed(1)
    outputs = torch.stack([layer(x).detach() for _ in range(400)])
    expected = layer.eval()(x).detach()
    assert not torch.equal(outputs[0], outputs[1])
    error = outputs.std(0) / math.sqrt(400)
    assert ((outputs.mean(0) - expected).abs() <= 5 * error + 1e-5).all()


def test_quantised_layers():
    model = nn.Sequential(nn.Linear(6, 4))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    layer = flora.wrap(packed[0], LORA)
    x = torch.randn(3, 6)  # no gradient of its own, which a quantised product has not
    assert torch.equal(layer(x), packed[0](x))
    delta = fill(layer.deltas["default"])
    u_out, u_in = delta.factors
    torch.testing.assert_close(layer(x) - packed[0](x), 2 * x @ u_in @ u_out.mT, rtol=1e-4, atol=1e-5)
    layer(x).sum().backward()
    assert all(p.grad.any() for p in delta.parameters())
