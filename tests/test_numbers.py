"""Numbers at the edges travel as in PyTorch, and merging leaves nothing behind and says what it loses."""

import copy
import math
import random

import pytest
import torch
from test_layers import CASES, MatmulLinear, PaddedConv
from test_methods import METHODS
from torch import nn

import flora
from flora import _core, functional, passes
from flora.merging import MAX_LOSS, MergeReport

PLANS = ("fused", "hybrid", "merged")
LAYERS = ("linear", "linear without bias, 4-D", "conv1d", "conv2d", "conv2d groups", "conv2d depthwise")
BOUND = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


# What is not finite, too large, too small --------------------------------------------------------------------------


def edges(dtype):
    """Values that few computations like."""
    info = torch.finfo(dtype)
    return [math.nan, math.inf, -math.inf, info.max, -info.max, info.max**0.5, info.tiny, info.tiny / 4, -0.0]


def is_finite(t):
    return t.isfinite().detach()


def by_transforms(method):
    """Whether rows go through a Fourier transform, which spreads over a row what is not finite in it."""
    return method.startswith(("circulant", "toeplitz", "ldr"))


def plainly(method, plan, op, x, weight, bias, delta):
    """What a plan computes, in plain PyTorch."""
    parts = delta.parts(weight)
    if plan == "fused" and not by_transforms(method):
        return passes.plain(op, x, weight, bias, parts.form, parts.tensors, None)
    update = parts.form.delta(weight, parts.tensors)
    if plan == "fused":
        return passes.add_to(op.base(x, weight, bias), op.base(x.to(update.dtype), update, None))
    return op.base(x, (weight.to(update.dtype) + update).to(weight.dtype), bias)


def put(draw, tensors, value):
    """A value in one place of one of the tensors."""
    flat = draw.choice(tensors).detach().view(-1)
    flat[draw.randrange(len(flat))] = value


def check_edges(method, case, dtype, draw, scale=None):
    """One layer, in all of its plans, with a value from the edge in its input, in its weight or in its delta.

    Where nothing overflows on the way, the same places are finite as in PyTorch; by transforms none that is not finite
    there. What is finite in both is the same.
    """
    make, shape = CASES[case]
    torch.manual_seed(draw.randrange(2**31))
    layer = flora.wrap(make().to(dtype), METHODS[method])
    base, delta = layer.base_layer, layer.deltas["default"]
    parameters = list(delta.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn_like(parameter))
    x, weight = torch.randn(shape).to(dtype), base.weight.detach().clone()
    if scale is None:
        value = draw.choice(edges(dtype))
        put(draw, draw.choice([[x], [weight], parameters]), value)
    else:
        value = delta.scale = scale
    overflows = math.isfinite(value) and abs(value) > 1e30
    bias, op = base.bias, layer._kind.op(base)
    for wanted in PLANS:
        plan = functional.resolve_plan(op, x, weight, delta.parts(weight), wanted, 0.0, True)
        found = functional.adapted(op, x.clone().requires_grad_(), weight, bias, delta.parts(weight), plan=plan)
        expected = plainly(method, plan, op, x, weight, bias, delta)
        where = f"{method} on {case}, {plan}, {dtype}, {value}, {_core.info()['isa']}"
        ours, theirs = is_finite(found), is_finite(expected)
        if not overflows:
            wrong = ours & ~theirs if by_transforms(method) else ours ^ theirs
            assert not wrong.any(), f"{where}: {int(wrong.sum())} other places are finite"
        both = ours & theirs
        if both.any():
            largest = max(expected.detach()[both].abs().max().item(), torch.finfo(dtype).tiny)
            worst = (found.double() - expected.double()).detach()[both].abs().max().item()
            assert worst <= BOUND[dtype] * largest, f"{where}: {worst:.3g} of {largest:.3g}"


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "from outside"])
def test_what_is_not_finite_or_at_the_edge_travels_as_in_pytorch(method, isa, rounds):
    draw = random.Random(f"{method} {isa}")
    for _ in range(rounds):
        for case in LAYERS if rounds > 1 else draw.sample(LAYERS, 2):
            for dtype in (torch.float32, torch.bfloat16, torch.float64)[: 3 if rounds > 1 else 1]:
                check_edges(method, case, dtype, draw)


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "from outside"])
def test_huge_and_tiny_scales_are_those_of_plain_pytorch(method, rounds):
    draw = random.Random(method)
    for _ in range(rounds):
        for case in LAYERS[:: 1 if rounds > 1 else 3]:
            for scale in (1e-45, 1e-30, -1e30, 3e38, 1e300)[:: 1 if rounds > 1 else 2]:
                check_edges(method, case, torch.float32, draw, scale)


# Merging -----------------------------------------------------------------------------------------------------------


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        PaddedConv(8, 6, 2),
        nn.GroupNorm(2, 6),
        MatmulLinear(7, 5),
        nn.Flatten(2),
        nn.Linear(35, 4),
    ).to(dtype)


def adapted(config, dtype=torch.float32, size=0.3):
    model = flora.adapt(network(dtype), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in flora.trainable_parameters(model):
            parameter.copy_(size * torch.randn_like(parameter))
    return model


def bits(model):
    return {key: tensor.detach().clone().view(torch.uint8) for key, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


X = torch.linspace(-2, 2, 3 * 11 * 11).sin().reshape(1, 3, 11, 11)
CONFIGS = [flora.TuckerConfig(rank=2), flora.RescaleConfig(), flora.CirculantConfig()]


@pytest.mark.parametrize("times", [25, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_merging_again_and_again_leaves_the_base_bit_for_bit(config, dtype, times):
    model = adapted(config, dtype)
    before, parameters = bits(model), {key: id(p) for key, p in model.named_parameters()}
    flora.merge(model)
    merged = [p.detach().clone() for _, p in sorted(model.named_parameters())]
    for _ in range(times - 1):
        flora.unmerge(model)
        flora.merge(model)
    assert all(torch.equal(p, was) for (_, p), was in zip(sorted(model.named_parameters()), merged, strict=True))
    with flora.disabled(model):
        pass
    flora.unmerge(model)
    assert same(bits(model), before)
    assert {key: id(p) for key, p in model.named_parameters()} == parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_summed_in_float32_rounded_once_and_says_what_that_lost(method, dtype):
    """W and s·ΔW in float64 are the measure: another rounding on the way would show in some of 2,400 weights."""
    torch.manual_seed(0)
    layer = flora.wrap(nn.Linear(60, 40).to(dtype), METHODS[method])
    delta, weight = layer.deltas["default"], layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(0.02 * torch.randn_like(parameter))
    wide = weight.double() + delta.alone(weight).detach().double()
    lost = layer.merge()
    found = layer.base_layer.weight.detach()
    assert found.dtype == dtype
    exact = wide.float().to(dtype)
    assert (found != exact).double().mean() < 2e-3  # sums of float32 in another order may fall to the other side
    update = wide - weight.double()
    assert lost == pytest.approx(float((found.double() - wide).norm() / update.norm()), rel=2e-2)


def test_what_merging_loses_grows_as_the_update_shrinks_and_is_nothing_in_float32():
    reports = [flora.merge(adapted(flora.TuckerConfig(rank=2), torch.bfloat16, size)) for size in (1.0, 0.3, 0.05)]
    assert [report.lost.keys() for report in reports] == [{"0", "1", "2", "4", "6"}] * 3
    worst = [report.worst[1] for report in reports]
    assert 0 < worst[0] < worst[1] < worst[2] <= 1.0
    assert "5 layers merged; rounding lost up to" in str(reports[0])
    assert repr(flora.merge(adapted(flora.TuckerConfig(rank=2)))) == "5 layers merged, nothing lost by rounding"
    nothing = flora.merge(flora.adapt(network(torch.bfloat16), flora.TuckerConfig(rank=2)))
    assert set(nothing.lost.values()) == {0.0}


@pytest.mark.parametrize("size", [0.05, 1e20])
def test_a_safe_merge_is_refused_above_its_bound_and_changes_nothing(size):
    model = adapted(flora.TuckerConfig(rank=2), torch.bfloat16, size)
    before, y = bits(model), model(X.bfloat16())
    reason = "rounding to torch.bfloat16 would lose .* more than max_loss=0.1" if size < 1 else "not finite in torch.bf"
    with pytest.raises(RuntimeError, match=rf"^\d cannot be merged safely: .*{reason}"):
        flora.merge(model, safe=True)
    assert not any(module.merged for module in model.modules() if isinstance(module, flora.AdaptedLayer))
    assert same(bits(model), before)
    assert torch.equal(model(X.bfloat16()), y) or not y.isfinite().all()


def test_a_safe_merge_is_made_below_its_bound():
    model = adapted(flora.TuckerConfig(rank=2), torch.bfloat16, 1.0)
    lost = flora.merge(model).worst[1]
    flora.unmerge(model)
    assert lost < MAX_LOSS
    flora.merge(model, safe=True, max_loss=lost * 1.001)
    flora.unmerge(model)
    with pytest.raises(RuntimeError, match="cannot be merged safely"):
        flora.merge(model, safe=True, max_loss=lost * 0.999)
    assert isinstance(flora.merge(adapted(flora.TuckerConfig(rank=2)), safe=True), MergeReport)


@pytest.mark.parametrize("max_loss", [0, -1.0, math.nan, True, "0.1", None])
def test_a_bound_that_is_none(max_loss):
    with pytest.raises(ValueError, match="max_loss=.* must be a number above 0"):
        flora.merge(adapted(flora.TuckerConfig(rank=2)), safe=True, max_loss=max_loss)


@pytest.mark.parametrize("name", ["scale", "strength"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_scale_cannot_be_set_while_it_is_merged(name, copied):
    model = adapted(flora.TuckerConfig(rank=2))
    flora.merge(model)
    model = copy.deepcopy(model) if copied else model
    y, delta = model(X), model[6].deltas["default"]
    with pytest.raises(RuntimeError, match=f"^6: {name}=2.0 cannot be set while it is merged; unmerge first"):
        setattr(delta, name, 2.0)
    assert torch.equal(model(X), y)
    flora.unmerge(model)
    setattr(delta, name, 2.0)
    flora.merge(model)
    assert not torch.equal(model(X), y)


def test_a_scale_can_be_set_again_once_the_model_is_unloaded_or_the_merge_was_refused():
    model = adapted(flora.TuckerConfig(rank=2))
    delta = model[0].deltas["default"]
    flora.merge(model)
    flora.unload(model)
    delta.scale = 3.0
    model = adapted(flora.TuckerConfig(rank=2), torch.bfloat16, 0.01)
    with pytest.raises(RuntimeError, match="safely"):
        flora.merge(model, safe=True)
    model[0].deltas["default"].scale = 3.0


def test_values_that_change_while_merged_count_from_the_next_merge():
    model = adapted(flora.TuckerConfig(rank=2))
    flora.merge(model)
    y = model(X)
    with torch.no_grad():
        model[6].deltas["default"].core.mul_(2.0)
    assert torch.equal(model(X), y)
    flora.unmerge(model)
    other = model(X)
    assert not torch.allclose(other, y)
    flora.merge(model)
    torch.testing.assert_close(model(X), other, rtol=1e-4, atol=1e-4)


def test_a_merged_adapter_is_neither_merged_again_nor_deleted_and_is_saved_as_it_is(tmp_path):
    model = adapted(flora.TuckerConfig(rank=2))
    flora.save_adapter(model, tmp_path / "before")
    flora.merge(model)
    y = model(X)
    for verb, message in [
        (flora.merge, "merged already"),
        (lambda m: flora.delete_adapter(m, "default"), "merged; unmerge first"),
        (lambda m: m[0].delete_delta("default"), "adapter 'default' is merged; unmerge first"),
        (lambda m: m[0].merge(), "are merged already"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            verb(model)
        assert torch.equal(model(X), y)
    flora.save_adapter(model, tmp_path / "merged")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_safe_merge_into_float8(dtype):
    """PyTorch cannot tell there which numbers are finite."""
    model = adapted(flora.TuckerConfig(rank=2))
    layer = next(module for module in model.modules() if isinstance(module, flora.AdaptedLayer))
    layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.detach().to(dtype), requires_grad=False)
    assert layer.merge(safe=True, max_loss=10.0) > 0
    assert layer.base_layer.weight.dtype == dtype
    layer.unmerge()
    with torch.no_grad():
        layer.deltas["default"].core.fill_(1e30)
    with pytest.raises(RuntimeError, match=rf"would hold values that are not finite in {dtype}|would lose"):
        layer.merge(safe=True, max_loss=0.5)
