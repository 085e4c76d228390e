"""flora.functional: gradients of the real C path, agreement with the twin, dispatch, precision, memory."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import high_water
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flora
from flora import _core, functional, ops
from flora.forms import Tucker
from flora.ops import ADDMM, LINEAR, ConvOp, dropout_factor

PLANS = ("fused", "hybrid", "merged")


def random_tucker(shape, ranks, dtype=torch.float64, scale=0.7, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return Tucker(rand(*ranks), tuple(rand(d, r) for d, r in zip(shape, ranks, strict=True)), scale)


def compute(op, plan, scale):
    """The layer as a function of tensors alone, for gradcheck."""
    return lambda x, w, b, core, *factors: functional.adapted(op, x, w, b, Tucker(core, factors, scale), plan=plan)


GRADCHECK = {
    "linear": (LINEAR, (3, 2, 5), (6, 5), (3, 2)),
    "linear, full rank": (LINEAR, (4, 3), (5, 3), (5, 3)),
    "conv1d, circular": (ConvOp((2,), (1, 2), (1,), 1, "circular"), (2, 3, 7), (4, 3, 3), (2, 2, 2)),
    "conv2d": (ConvOp((1, 2), (1, 1, 0, 2), (1, 1), 1), (2, 3, 4, 5), (4, 3, 2, 3), (2, 3, 1, 2)),
    "conv2d, reflect": (ConvOp((1, 1), (1, 1, 2, 2), (2, 1), 1, "reflect"), (1, 2, 5, 4), (3, 2, 2, 3), (2, 1, 2, 2)),
    "conv2d, replicate": (
        ConvOp((1, 1), (1, 1, 1, 1), (1, 1), 1, "replicate"),
        (1, 2, 3, 4),
        (3, 2, 3, 3),
        (2, 2, 2, 2),
    ),
    "conv2d, groups": (ConvOp((1, 1), (0, 0, 0, 0), (1, 1), 2), (2, 4, 3, 4), (6, 2, 2, 2), (3, 2, 2, 1)),
    "conv2d, depthwise": (ConvOp((1, 1), (1, 1, 1, 1), (1, 1), 3), (2, 3, 4, 4), (6, 1, 3, 3), (2, 1, 2, 2)),
    "conv3d": (ConvOp((1, 1, 2), (0, 1, 1, 0, 0, 0), (1, 2, 1), 1), (1, 2, 3, 4, 3), (3, 2, 2, 2, 2), (2, 2, 1, 2, 2)),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", GRADCHECK)
def test_gradcheck_on_the_c_path(case, plan, isa):
    op, x_shape, w_shape, ranks = GRADCHECK[case]
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(w_shape, dtype=torch.float64, requires_grad=True)
    b = torch.randn(w_shape[0], dtype=torch.float64, requires_grad=True)
    tucker = random_tucker(w_shape, ranks)
    assert gradcheck(compute(op, plan, tucker.scale), (x, w, b, tucker.core, *tucker.factors))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", ["linear", "conv1d, circular", "conv2d, groups"])
def test_double_backward(case, plan):
    op, x_shape, w_shape, ranks = GRADCHECK[case]
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(w_shape, dtype=torch.float64, requires_grad=True)
    tucker = random_tucker(w_shape, ranks)
    run = compute(op, plan, tucker.scale)
    assert gradgradcheck(lambda x, w, *p: run(x, w, None, *p), (x, w, tucker.core, *tucker.factors))


@pytest.mark.parametrize("shape", [(6,), (6, 5), (4, 3, 2), (4, 3, 2, 3), (3, 2, 2, 2, 3)])
def test_gradcheck_of_the_effective_weight(shape, isa):
    tucker = random_tucker(shape, tuple(min(2, n) for n in shape))
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(w, core, *factors):
        return functional.effective_weight(w, Tucker(core, factors, 0.5))

    assert gradcheck(run, (weight, tucker.core, *tucker.factors))
    assert gradgradcheck(run, (weight, tucker.core, *tucker.factors))


@pytest.mark.parametrize("case", ["linear", "conv2d", "conv2d, groups"])
def test_gradcheck_of_the_update_alone(case):
    op, x_shape, w_shape, ranks = GRADCHECK[case]
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    tucker = random_tucker(w_shape, ranks)

    def run(x, core, *factors):
        return functional.update(op, x, None, w_shape, Tucker(core, factors, 0.5))

    assert gradcheck(run, (x, tucker.core, *tucker.factors))
    assert gradgradcheck(run, (x, tucker.core, *tucker.factors))


def spatial(draw, modes):
    return tuple(draw(st.integers(1, 6)) for _ in range(modes))


@st.composite
def problems(draw):
    """A layer, an input, and how that input lies in memory."""
    modes = draw(st.integers(0, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3])) if modes else 1
    width, per_group = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(modes))
    shape = (per_group * groups, width, *kernel)
    ranks = tuple(draw(st.integers(1, n)) for n in shape)
    if modes:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        dilation = tuple(draw(st.integers(1, 2)) for _ in kernel)
        padding = tuple(p for _ in kernel for p in [draw(st.integers(0, 2))] * 2)
        extent = tuple(d * (k - 1) + 1 + draw(st.integers(2, 5)) for d, k in zip(dilation, kernel, strict=True))
        op = ConvOp(tuple(draw(st.integers(1, 3)) for _ in kernel), padding, dilation, groups, mode)
        x_shape = (draw(st.integers(0 if mode == "zeros" else 1, 3)), width * groups, *extent)
    else:
        op, x_shape = LINEAR, (*(draw(st.integers(0, 5)) for _ in range(draw(st.integers(0, 2)))), width)
    memory = draw(st.sampled_from(["contiguous", "channels_last", "sliced", "expanded", "overlapping"]))
    return op, x_shape, shape, ranks, memory


def laid_out(shape, memory, dtype):
    if memory == "channels_last" and len(shape) > 2:
        order = (0, *range(2, len(shape)), 1)
        return torch.randn([shape[i] for i in order]).to(dtype).movedim(-1, 1)
    if memory == "sliced":
        return torch.randn([2 * n + 1 for n in shape]).to(dtype)[tuple(slice(1, 2 * n + 1, 2) for n in shape)]
    if memory == "expanded":
        return torch.randn([1, *shape[1:]]).to(dtype).expand(shape) if shape[0] else torch.randn(shape).to(dtype)
    if memory == "overlapping":
        strides = [1] * len(shape)
        return torch.randn(sum(shape) + 1).to(dtype).as_strided(shape, strides)
    return torch.randn(shape).to(dtype)


@given(problems(), st.sampled_from(PLANS), st.sampled_from([torch.float64, torch.float32]))
def test_every_plan_agrees_with_the_twin(isa, threads, problem, plan, dtype):
    op, x_shape, shape, ranks, memory = problem
    torch.manual_seed(0)
    x = laid_out(x_shape, memory, dtype).requires_grad_()
    w, b = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape[0]).to(dtype)
    tucker = random_tucker(shape, ranks, dtype)
    inputs = (x, w, tucker.core, *tucker.factors)

    def twin(t):
        doubled = [v.detach().double().requires_grad_() for v in t]
        small = Tucker(doubled[2], tuple(doubled[3:]), tucker.scale)
        y = op.base(doubled[0], doubled[1], b.double()) + small.form.twin(op, doubled[0], None, small.tensors)
        return y, torch.autograd.grad(y, doubled, dy.double())

    y = functional.adapted(op, x, w, b, tucker, plan=plan)
    dy = torch.randn_like(y)
    expected, expected_grads = twin(inputs)
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    for ours, theirs in zip((y, *torch.autograd.grad(y, inputs, dy)), (expected, *expected_grads), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        assert (ours.double() - theirs).abs().max().item() <= bound * max(largest, 1.0) if theirs.numel() else True
    with torch.no_grad():
        again = functional.adapted(op, x, w, b, tucker, plan=plan)
    assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["linear", "conv2d", "conv2d channels_last"])
def test_half_precision_is_as_accurate_as_pytorch_of_that_dtype(case, dtype, isa):
    """Error against float64 at most twice that of PyTorch's own layer of the effective weight in that dtype."""
    torch.manual_seed(0)
    shape, ranks = ((96, 64), (8, 8)) if case == "linear" else ((48, 32, 3, 3), (8, 8, 2, 2))
    x = torch.randn(40, 64) if case == "linear" else torch.randn(2, 32, 9, 9)
    op = LINEAR if case == "linear" else ConvOp((1, 1), (1, 1, 1, 1), (1, 1), 1)
    x = x.to(dtype)
    if case.endswith("channels_last"):
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    w, b = (0.1 * torch.randn(shape)).to(dtype), torch.randn(shape[0]).to(dtype)
    tucker = random_tucker(shape, ranks, torch.float32, scale=0.02)
    inputs = (x, tucker.core, *tucker.factors)
    y = functional.adapted(op, x, w, b, tucker, plan="fused")
    dy = torch.randn_like(y)
    ours = (y, *torch.autograd.grad(y, inputs, dy))

    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact_tucker = Tucker(exact_inputs[1], tuple(exact_inputs[2:]), tucker.scale)
    exact = op.base(exact_inputs[0], w.double(), b.double()) + exact_tucker.form.twin(
        op, exact_inputs[0], None, exact_tucker.tensors
    )
    exact = (exact, *torch.autograd.grad(exact, exact_inputs, dy.double()))

    theirs_inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    half = Tucker(theirs_inputs[1], tuple(theirs_inputs[2:]), tucker.scale)
    theirs = op.base(theirs_inputs[0], w, b) + half.form.twin(op, theirs_inputs[0], None, half.tensors)
    theirs = (theirs, *torch.autograd.grad(theirs, theirs_inputs, dy))
    for a, t, e in zip(ours, theirs, exact, strict=True):
        assert (a.double() - e).abs().max() <= 2 * (t.double() - e).abs().max()


# Dispatch ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def layer():
    layer = flora.wrap(nn.Linear(5, 7), flora.TuckerConfig(rank=3))
    nn.init.normal_(layer.deltas["default"].core)
    return layer


class CountC(TorchFunctionMode):
    """Counts operations that the twin would run: matmul on the factors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_the_plain_case_goes_to_c(layer):
    with CountC() as count:
        layer(torch.randn(3, 5))
    assert "matmul" not in count.names and "__matmul__" not in count.names


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.jit.trace, and jvp's own decompositions
@pytest.mark.parametrize("where", ["dispatch mode", "vmap", "jvp", "compile", "trace", "subclass", "functional_call"])
def test_watched_calls_agree_with_the_direct_path(layer, where):
    x = torch.randn(4, 5)
    expected = layer(x)
    if where == "dispatch mode":

        class Quiet(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        with Quiet():
            actual = layer(x)
    elif where == "vmap":
        actual = torch.func.vmap(layer)(x)
    elif where == "jvp":
        actual, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), layer.weight))
    elif where == "compile":
        actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    elif where == "trace":
        actual = torch.jit.trace(layer, (x,), check_trace=False)(x)
    elif where == "subclass":

        class Sub(torch.Tensor):
            pass

        actual = layer(x.as_subclass(Sub)).as_subclass(torch.Tensor)
    else:
        actual = torch.func.functional_call(layer, dict(layer.named_parameters()), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("module", [nn.Linear(8, 6), nn.Conv2d(8, 6, 3)], ids=["linear", "conv"])
def test_autocast_casts_the_layer_and_not_the_factors(module):
    layer = flora.wrap(module, flora.TuckerConfig(rank=3))
    nn.init.normal_(layer.deltas["default"].core)
    x = torch.randn(2, 8, 5, 5) if isinstance(module, nn.Conv2d) else torch.randn(4, 8)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - full).abs().max() < 0.05 * full.abs().max()
    y.sum().backward()
    assert layer.deltas["default"].core.grad.dtype == torch.float32


def test_lazy_negation_is_seen():
    layer = flora.wrap(nn.Linear(5, 7), flora.TuckerConfig(rank=3))
    nn.init.normal_(layer.deltas["default"].core)
    negative = torch.randn(4, 5, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(layer(negative), layer(negative.clone().resolve_neg()))


def test_a_gradient_that_is_an_expanded_scalar():
    for module, x in [(nn.Linear(5, 7), torch.randn(3, 5)), (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5))]:
        layer = flora.wrap(module, flora.TuckerConfig(rank=3))
        nn.init.normal_(layer.deltas["default"].core)
        x.requires_grad_()
        layer(x).sum().backward()
        dx, x.grad = x.grad, None
        (layer(x) * 1.0).backward(torch.ones_like(layer(x)))
        torch.testing.assert_close(x.grad, dx)


def test_the_base_learns_too_when_it_is_asked_to(layer):
    layer.base_layer.requires_grad_(True)
    x = torch.randn(3, 5)
    layer(x).square().sum().backward()
    y = layer(x)
    torch.testing.assert_close(layer.base_layer.weight.grad, 2 * y.T @ x)
    torch.testing.assert_close(layer.base_layer.bias.grad, 2 * y.sum(0))


def test_an_output_that_autograd_kept_is_not_written():
    layer = flora.wrap(nn.Linear(5, 5), flora.TuckerConfig(rank=3))
    nn.init.normal_(layer.deltas["default"].core)
    x = torch.randn(3, 5, requires_grad=True)
    s = torch.sigmoid(x)
    kept = s.clone()
    y = layer(s)
    (y.sum() + s.sum()).backward()
    assert torch.equal(s, kept)
    with torch.no_grad():
        weight = layer.weight
        expected = (torch.ones(3, 5) @ weight + 1) * kept * (1 - kept)
    torch.testing.assert_close(x.grad, expected)


# Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["linear", "conv"])
def test_the_fused_plan_allocates_nothing_of_the_weights_size(case):
    """PyTorch's allocator is watched; scratch inside the kernels is covered by the test below."""
    if case == "linear":
        module, x = nn.Linear(512, 768), torch.randn(16, 512, requires_grad=True)
    else:
        module, x = nn.Conv2d(128, 160, 3), torch.randn(1, 128, 6, 6, requires_grad=True)
    layer = flora.wrap(module, flora.TuckerConfig(rank=8, plan="fused"))
    nn.init.normal_(layer.deltas["default"].core)
    base_x = x.detach().clone().requires_grad_()

    def largest(run):
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        sizes = [abs(e.self_cpu_memory_usage) for e in profile.events()]
        assert sizes, "the profiler saw no allocation at all"
        return max(sizes)

    size = module.weight.numel() * 4
    fused = largest(lambda: layer(x).sum().backward())
    frozen = largest(lambda: module(base_x).sum().backward())
    merged = flora.wrap(module, flora.TuckerConfig(rank=8, plan="merged"))
    assert largest(lambda: merged(x).sum().backward()) >= size
    assert fused < size or fused <= frozen, (fused, frozen, size)


@high_water.needed
def test_the_fused_plan_needs_no_memory_of_the_weights_size():
    """A 64 MiB weight in a process of its own: its high-water mark stays far below one more weight."""
    script = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
import high_water, torch, flora
from torch import nn
layer = flora.wrap(nn.Linear(4096, 4096), flora.TuckerConfig(rank=8, plan="fused"))
nn.init.normal_(layer.deltas["default"].core)
x = torch.randn(8, 4096, requires_grad=True)
layer.base_layer(x).sum().backward()
before = high_water.megabytes()
for _ in range(3):
    layer(x).sum().backward()
print(high_water.megabytes() - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True)
    assert float(out.stdout) < 24, "MiB above the frozen layer's peak; the weight has 64"


def saved(run):
    """Bytes that autograd keeps for the backward of run(), each storage once, parameters left out."""
    storages = {}

    def pack(t):
        if not isinstance(t, nn.Parameter) and not (t.is_leaf and t.requires_grad):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(storages.values())


@pytest.mark.parametrize("case", ["linear", "conv"])
def test_what_is_kept_for_backward(case):
    if case == "linear":
        module, x, h = nn.Linear(256, 256), torch.randn(100, 256), 100 * 4
    else:
        module, x, h = nn.Conv2d(32, 48, 3, padding=1), torch.randn(2, 32, 10, 10), 2 * 12 * 12 * 4
    learned = x.clone().requires_grad_()
    x_bytes, h_bytes = 4 * x.numel(), 4 * h
    for trainable, dropout, kept in [
        (("core", "factors"), 0.0, x_bytes + h_bytes),
        (("core", "factors"), 0.3, x_bytes + h_bytes),
        (("core", "out"), 0.0, h_bytes),
        (("core", "out"), 0.3, h_bytes),
    ]:
        config = flora.TuckerConfig(
            rank=4, plan="fused" if not dropout else "auto", dropout=dropout, trainable=trainable
        )
        layer = flora.wrap(module, config)
        assert saved(lambda: layer(learned * 1.0)) == kept, (trainable, dropout)  # noqa: B023


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", ["linear", "conv2d", "conv2d, reflect", "conv2d, groups"])
def test_gradients_without_x(case, dropout):
    """With the input's factor and the weight frozen, x is not kept, and every gradient is what it is with x."""
    op, x_shape, w_shape, ranks = GRADCHECK[case]
    tucker = random_tucker(w_shape, ranks)
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(w_shape, dtype=torch.float64)
    grads = []
    for learns in (True, False):
        tucker.factors[1].requires_grad_(learns)
        torch.manual_seed(0)
        y = functional.adapted(op, x, w, None, tucker, plan="fused", dropout=dropout)
        inputs = (x, tucker.core, tucker.factors[0], *tucker.factors[2:])
        grads.append(torch.autograd.grad(y.square().sum(), inputs))
    for with_x, without in zip(*grads, strict=True):
        torch.testing.assert_close(without, with_x)
    with pytest.raises(RuntimeError, match="needs the layer's input"):
        y = functional.adapted(op, x, w, None, tucker, plan="fused")
        torch.autograd.grad(y.sum(), x, create_graph=True)


# Autograd's other doors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_create_graph_where_the_input_depends_on_the_layers_own_parameters(plan):
    layer = flora.wrap(nn.Linear(6, 6, dtype=torch.float64), flora.TuckerConfig(rank=3, plan=plan))
    nn.init.normal_(layer.deltas["default"].core)
    parameters = tuple(layer.deltas.parameters())
    x = torch.randn(4, 6, dtype=torch.float64)
    y = layer(layer(x)).square().sum()
    once = torch.autograd.grad(y, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, parameters, create_graph=True), once)

    def penalty(compute):
        grads = torch.autograd.grad(compute(compute(x)).square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)

    def plain(x):
        weight = layer.base_layer.weight + layer.deltas["default"].delta_weight(layer.base_layer.weight)
        return F.linear(x, weight, layer.bias)

    torch.testing.assert_close(penalty(layer), penalty(plain))


@pytest.mark.parametrize("plan", ["fused", "merged"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_dropout_draws_the_same_mask_again(reentrant, plan):
    dropout = 0.5 if plan == "fused" else 0.0
    layer = flora.wrap(nn.Linear(8, 8), flora.TuckerConfig(rank=3, plan=plan, dropout=dropout))
    nn.init.normal_(layer.deltas["default"].core)
    x = torch.randn(4, 8, requires_grad=True)
    grads = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        layer.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.deltas.parameters()])
    torch.testing.assert_close(*grads)


def test_only_the_bias_learns():
    for module, x in [(nn.Linear(5, 7), torch.randn(3, 5)), (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5))]:
        for plan in PLANS:
            layer = flora.wrap(module, flora.TuckerConfig(rank=3, plan=plan))
            layer.deltas.requires_grad_(False)
            module.bias.requires_grad_(True)
            module.bias.grad = None
            y = layer(x)
            y.sum().backward()
            torch.testing.assert_close(module.bias.grad, torch.full_like(module.bias, y[:, 0].numel()))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("module", [nn.Linear(8, 6), nn.Conv2d(8, 6, 3)], ids=["linear", "conv"])
def test_backward_under_autocast_and_batched_gradients(module, plan):
    layer = flora.wrap(module, flora.TuckerConfig(rank=3, plan=plan))
    nn.init.normal_(layer.deltas["default"].core)
    x = (torch.randn(2, 8, 5, 5) if isinstance(module, nn.Conv2d) else torch.randn(4, 8)).requires_grad_()
    parameters = (x, *layer.deltas.parameters())
    y = layer(x)
    dy = torch.randn(3, *y.shape)
    expected = [torch.autograd.grad(y, parameters, d, retain_graph=True) for d in dy]
    with torch.autocast("cpu", torch.bfloat16):
        again = torch.autograd.grad(y, parameters, dy[0], retain_graph=True)
    torch.testing.assert_close(again, expected[0])
    batched = torch.autograd.grad(y, parameters, dy, is_grads_batched=True)
    for i, grads in enumerate(expected):
        torch.testing.assert_close([b[i] for b in batched], list(grads), rtol=1e-4, atol=1e-4)


def test_nested_and_sparse_inputs_go_where_the_stock_layer_goes(layer):
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x.to_sparse()), layer(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's: nested tensors are a prototype
        nested = torch.nested.nested_tensor([x, x[:2]])
    for ours, rows in zip(layer(nested).unbind(), (x, x[:2]), strict=True):
        torch.testing.assert_close(ours, layer(rows))


def test_dropout_under_another_default_device():
    layer = flora.wrap(nn.Linear(5, 7), flora.TuckerConfig(rank=3, dropout=0.5))
    x = torch.randn(3, 5)
    with torch.device("meta"):
        y = layer(x)
        assert y.device.type == "cpu"
        y.sum().backward()


def test_autocast_does_not_narrow_the_delta_of_a_depthwise_layer_or_a_table():
    conv = flora.wrap(nn.Conv2d(6, 6, 3, groups=6, bias=False), flora.TuckerConfig(rank=3, plan="merged"))
    table = flora.wrap(nn.Embedding(9, 6), flora.TuckerConfig(rank=3))
    x = torch.randn(2, 6, 5, 5).bfloat16().float()  # what autocast does to it is no rounding
    for layer, source, bound in ((conv, x, 2**-8), (table, torch.arange(9), 1e-6)):
        nn.init.normal_(layer.deltas["default"].core)
        nn.init.zeros_(layer.base_layer.weight)
        exact = layer(source)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = layer(source)
        assert ((narrow - exact).abs() <= bound * exact.abs() + 1e-6).all()  # one rounding of the result at most


@pytest.mark.parametrize("case", ["linear", "conv2d, depthwise"])
@pytest.mark.parametrize("plan", ["fused", "merged"])
def test_gradcheck_with_dropout(case, plan):
    """With a fixed seed dropout is a fixed factor on the delta's input, in the first derivative and in the second."""
    op, x_shape, w_shape, ranks = GRADCHECK[case]
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(w_shape, dtype=torch.float64, requires_grad=True)
    tucker = random_tucker(w_shape, ranks)

    def run(x, w, core, *factors):
        torch.manual_seed(0)
        return functional.adapted(op, x, w, None, Tucker(core, factors, tucker.scale), plan=plan, dropout=0.4)

    inputs = (x, w, tucker.core, *tucker.factors)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)
    with_graph = run(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), with_graph.detach())


@pytest.mark.parametrize("trainable", [("core", "factors"), ("core", "out")])
@pytest.mark.parametrize("case", ["fused", "separate", "overlapping"])
def test_dropout_whatever_layout_a_saved_tensor_hook_returns(case, trainable):
    """The mask is drawn by the layout of x; offloading to the CPU, for one, gives x back contiguous."""
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    if case == "overlapping":
        x = x[:1, :, :1].expand(2, 6, 5, 4)
    groups, plan = (6, "auto") if case == "separate" else (1, "fused")
    config = flora.TuckerConfig(rank=3, plan=plan, dropout=0.5, trainable=trainable)
    layer = flora.wrap(nn.Conv2d(6, 12, 3, padding=1, groups=groups), config)
    with torch.no_grad():
        for part in layer.deltas.parameters():
            part.normal_()
    inputs = [x.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]

    def gradients():
        torch.manual_seed(0)
        return torch.autograd.grad(layer(x).square().sum(), inputs)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().contiguous().clone(), lambda t: t):
        found = gradients()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_dropout_keeps_the_expected_share_and_scale():
    x = torch.ones(200_000)
    factor = dropout_factor(x, 0.3, 7)
    assert set(factor.tolist()) == {0.0, factor.max().item()} and factor.max() == torch.tensor(1 / 0.7)
    assert abs((factor == 0).double().mean() - 0.3) < 5 * (0.21 / 200_000) ** 0.5
    assert not torch.equal(factor, dropout_factor(x, 0.3, 8))


SAME = (1, 1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", ["neither", "x", "weight", "part of x", "part of weight"])
@pytest.mark.parametrize(
    ("padding", "mode"), [(SAME, "zeros"), ((0, 2, 1, 1), "zeros"), (SAME, "reflect"), (SAME, "circular")]
)
def test_own_input_gradients_of_convolutions(monkeypatch, dtype, last, padding, mode):
    """By minimal filtering they are PyTorch's but for rounding, in PyTorch's memory format, beside the other two."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 20, 9, 10, dtype=dtype), torch.randn(19, 20, 3, 3, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if last.endswith("x") else x
    weight = weight.to(memory_format=torch.channels_last) if last.endswith("weight") else weight
    parts = [t[:, :17] if last.startswith("part") else t[:, :17].clone(memory_format=format_of(t)) for t in (x, weight)]
    x, weight = parts
    op = ConvOp((1, 1), padding, (1, 1), 1, mode)
    dy = torch.randn_like(op.base(x, weight, None))
    monkeypatch.setattr(ops, "OWN_CONVOLUTIONS", False)
    theirs = op.base_backward(dy, x, weight, (True, True, True))
    calls = calls_of(monkeypatch, "conv_input_gradient")
    monkeypatch.setattr(ops, "OWN_CONVOLUTIONS", True)
    ours = op.base_backward(dy, x, weight, (True, True, True))
    assert len(calls) == 1
    for own, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, their, rtol=0, atol=float(their.abs().max()) * 5 * torch.finfo(dtype).eps)
        assert own.stride() == their.stride()
    (alone,) = (g for g in op.base_backward(dy, x, weight, (True, False, False)) if g is not None)
    assert torch.equal(alone, ours[0])
    dx, dw, _ = op.base_backward(dy, x, weight, (False, True, False))
    assert dx is None and torch.equal(dw, theirs[1]) and len(calls) == 2


def format_of(t):
    return torch.contiguous_format if t.is_contiguous() else torch.channels_last


def calls_of(monkeypatch, function):
    """The arguments of each call of a C function that `flora.ops` makes from now on."""
    calls, kernel = [], getattr(_core, function)
    own = SimpleNamespace(**{name: getattr(_core, name) for name in dir(_core)})
    setattr(own, function, lambda *arguments: (calls.append(arguments), kernel(*arguments)))
    monkeypatch.setattr(ops, "_core", own)
    return calls


@pytest.mark.parametrize(
    ("change", "shape", "kernel"),
    [
        ({}, (2, 16, 9, 9), (16, 16, 5, 5)),
        ({}, (2, 16, 9, 9), (16, 16, 1, 1)),
        ({"stride": (2, 1)}, (2, 16, 9, 9), (16, 16, 3, 3)),
        ({"dilation": (1, 2)}, (2, 16, 9, 9), (16, 16, 3, 3)),
        ({"groups": 2}, (2, 32, 9, 9), (32, 16, 3, 3)),
        ({}, (2, 16, 9, 9), (15, 16, 3, 3)),
        ({}, (2, 15, 9, 9), (16, 15, 3, 3)),
        ({}, (1, 16, 7, 9), (16, 16, 3, 3)),
        ({"dtype": torch.bfloat16}, (2, 16, 9, 9), (16, 16, 3, 3)),
        ({"fp32_precision": "bf16"}, (2, 16, 9, 9), (16, 16, 3, 3)),
    ],
    ids=str,
)
def test_other_input_gradients_are_pytorchs(monkeypatch, change, shape, kernel):
    monkeypatch.setattr(ops, "OWN_CONVOLUTIONS", True)
    calls = calls_of(monkeypatch, "conv_input_gradient")
    geometry = [change.get("stride", (1, 1)), SAME, change.get("dilation", (1, 1)), change.get("groups", 1)]
    dtype = change.get("dtype", torch.float32)
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(kernel).to(dtype)
    op = ConvOp(*geometry)
    y = op.base(x, weight, None)
    dy = torch.randn_like(y)
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = change.get("fp32_precision", before)
    try:
        (expected,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(op.base_backward(dy, x.detach(), weight, (True, False, False))[0], expected)
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
    assert not calls


def test_an_adapted_convolution_starts_as_the_frozen_one_and_its_gradient_close_to_it(monkeypatch):
    monkeypatch.setattr(ops, "OWN_CONVOLUTIONS", True)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(32, 48, 3, padding=1).requires_grad_(False)
    x = torch.randn(4, 32, 11, 13, requires_grad=True)
    expected = layer(x)
    dy = torch.randn_like(expected)
    (d_expected,) = torch.autograd.grad(expected, x, dy)
    calls = calls_of(monkeypatch, "conv_input_gradient")
    y = flora.wrap(layer, flora.TuckerConfig(rank=4, plan="fused"))(x)
    assert torch.equal(y, expected)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert len(calls) == 1
    torch.testing.assert_close(dx, d_expected, rtol=0, atol=1e-6 * float(d_expected.abs().max()))


OWN_GRADIENTS = {
    "product": (lambda device: torch.nn.Linear(256, 192, device=device), (64, 256)),
    "minimal filtering": (lambda device: torch.nn.Conv2d(32, 48, 3, padding=1, device=device), (2, 32, 12, 12)),
    "taps": (lambda device: torch.nn.Conv2d(16, 16, 3, groups=16, device=device), (2, 16, 9, 9)),
}


@pytest.mark.parametrize("gradient", OWN_GRADIENTS)
def test_a_trace_holds_the_gradients_that_c_would_compute(monkeypatch, gradient):
    """A dispatch mode sees PyTorch's operations alone: what C has written would be missing from what it records."""
    monkeypatch.setattr(ops, "OWN_CONVOLUTIONS", True)
    monkeypatch.setattr(ops, "OWN_PRODUCTS", True)
    make, shape = OWN_GRADIENTS[gradient]
    torch.manual_seed(0)
    layer = flora.wrap(make("cpu"), flora.TuckerConfig(rank=4))
    layer.base_layer.weight.requires_grad_()
    torch.nn.init.normal_(layer.deltas["default"].core)

    def gradients(x):
        return torch.autograd.grad(layer(x).square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])

    traced = make_fx(gradients)(torch.randn(shape, requires_grad=True))
    x = torch.randn(shape, requires_grad=True)
    for found, expected in zip(traced(x), gradients(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("gradient", OWN_GRADIENTS)
def test_gradients_on_another_device_are_pytorchs(monkeypatch, gradient):
    monkeypatch.setattr(ops, "OWN_CONVOLUTIONS", True)
    monkeypatch.setattr(ops, "OWN_PRODUCTS", True)
    make, shape = OWN_GRADIENTS[gradient]
    layer = flora.wrap(make("meta"), flora.TuckerConfig(rank=4))
    x = torch.empty(shape, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.is_meta and x.grad.shape == x.shape


@pytest.mark.parametrize("value", ["torch", ""])
def test_own_gradients_can_be_switched_off(value):
    code = "from flora import ops; print(ops.OWN_CONVOLUTIONS or ops.OWN_PRODUCTS, ops.info()['isa'][0] == 'v')"
    environment = os.environ | {"FLORA_PRODUCTS": value}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    own, capable = run.stdout.split()
    assert own == ("False" if value == "torch" else capable)


@pytest.mark.parametrize("op", [LINEAR, ADDMM], ids=["linear", "addmm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_own_products_of_gradients(monkeypatch, op, dtype):
    """Where flora multiplies itself, gradients are those of PyTorch's products, and large ones alone are."""
    sizes = calls_of(monkeypatch, "multiply")
    monkeypatch.setattr(ops, "OWN_PRODUCTS", True)
    torch.manual_seed(0)
    weight = torch.randn(70, 130, dtype=dtype)
    for batch, expected in ((4, 0), (60, 2)):
        x = torch.randn(batch, 5, 130, dtype=dtype)
        dy = torch.randn(batch, 70, 5, dtype=dtype).mT
        dx, dw, db = op.base_backward(dy, x, weight, (True, True, True))
        torch.testing.assert_close(dx, dy @ weight)
        torch.testing.assert_close(dw, torch.einsum("bri,brj->ij", dy, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(db, dy.sum((0, 1)))
        assert len(sizes) == expected
    torch.set_float32_matmul_precision("medium")  # PyTorch may round there, and is faster than any float32
    try:
        op.base_backward(dy, x, weight, (True, False, False))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(sizes) == expected
