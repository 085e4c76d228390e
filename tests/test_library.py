"""torch.ops.flora: every operator by PyTorch's own checks, beside the direct path, and on devices without kernels."""

from itertools import product

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import flora
from flora import functional, library
from flora.forms import FORMS, DenseForm, Parts
from flora.ops import LINEAR, ConvOp

pytestmark = [  # PyTorch's own warnings
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning"),
]

LAYERS = {
    "linear": (LINEAR, (4, 3, 12), (8, 12)),
    "conv1d": (ConvOp((2,), (1, 1), (1,), 1), (2, 4, 9), (8, 4, 3)),
    "conv2d": (ConvOp((1, 1), (1, 1, 0, 2), (1, 1), 1), (2, 4, 5, 6), (8, 4, 3, 3)),
    "depthwise": (ConvOp((1, 1), (1, 1, 1, 1), (1, 1), 4, "reflect"), (2, 4, 5, 6), (8, 1, 3, 3)),
    "conv3d": (ConvOp((1, 1, 1), (0, 0, 1, 1, 0, 0), (1, 1, 1), 2), (1, 4, 3, 4, 3), (6, 2, 2, 3, 2)),
}


def parts_of(form, shape, dtype=torch.float32):
    """A delta of this form, and its parameters, which learn."""
    wide = functional.compute_dtype(dtype)

    def rand(*size):
        return (0.3 * torch.randn(size, dtype=wide)).requires_grad_()

    d_out, d_in = shape[0], torch.Size(shape[1:]).numel()
    if form == "tucker":
        ranks = [min(2, n) for n in shape]
        tensors = (rand(*ranks), *(rand(n, r) for n, r in zip(shape, ranks, strict=True)))
    elif form == "kronecker":
        tensors = (rand(2, 1), rand(d_out // 2, d_in))
    elif form == "toeplitz":
        tensors = (rand(2, d_out + max(d_out, d_in) - 1), rand(2, d_in + max(d_out, d_in) - 1))
    elif form == "rescale":
        tensors = (rand(d_out), rand(shape[1]))
    else:
        tensors = (rand(*shape),)
    return Parts(FORMS[form].of(0.7, shape, tensors), tensors)


def inputs_of(layer, dtype=torch.float32, layout="contiguous"):
    op, x_shape, shape = LAYERS[layer]
    torch.manual_seed(0)
    x, weight = torch.randn(x_shape).to(dtype), torch.randn(shape).to(dtype)
    if layout == "channels_last":
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return op, x.requires_grad_(), weight, torch.randn(shape[0]).to(dtype)


def detached(delta):
    return [t.detach() for t in delta[0]], *delta[1:]


def short(*names):
    """Every form on every layer: a few of them always, all of them in the long run."""
    few = {("tucker", "linear"), ("tucker", "conv2d"), ("rescale", "depthwise"), ("toeplitz", "linear")}
    pairs = product(FORMS, names or LAYERS)
    return [pytest.param(*p, marks=[] if p in few else pytest.mark.slow, id="-".join(p)) for p in pairs]


# PyTorch's checks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form, layer", short())
def test_opcheck_of_a_layer(form, layer):
    op, x, weight, bias = inputs_of(layer)
    parts = parts_of(form, weight.shape)
    delta, operation = library._encoded(*parts), library._operation(op)
    ops = torch.ops.flora
    opcheck(ops.adapted.default, (x, weight, bias, *delta, *operation))
    opcheck(ops.update.default, (x, weight, weight.shape, *delta, *operation))
    seed = torch.tensor(7)
    for plan in (*parts.form.runs(op, parts.tensors), "separate"):
        dropout, drawn = (0.5, seed) if plan in ("separate", "fused") else (0.0, None)
        if plan == "separate" and "merged" not in parts.form.runs(op, parts.tensors):
            continue
        rest = (weight.shape, *delta, *operation, plan, dropout, drawn)
        opcheck(ops.adapted_forward.default, (x, weight, bias, *rest, True))
        y, h = ops.adapted_forward(x, weight, bias, *rest, True)
        needs = [True] * (3 + len(delta[0]))
        kept = h.detach() if h.numel() else None
        given = (torch.ones_like(y), x.detach(), weight, kept, weight.shape, *detached(delta), *rest[-8:])
        opcheck(ops.adapted_backward.default, (*given, list(x.shape), list(x.stride()), needs))
    if "fused" in parts.form.runs(op, parts.tensors):
        opcheck(
            ops.adapted_forward.default, (x, None, None, weight.shape, *delta, *operation, "update", 0.5, seed, True)
        )


@pytest.mark.parametrize("form, layer", short())
def test_opcheck_of_the_weight_alone(form, layer):
    _, _, weight, _ = inputs_of(layer)
    delta = library._encoded(*parts_of(form, weight.shape))
    ops = torch.ops.flora
    opcheck(ops.effective_weight.default, (weight, *delta))
    opcheck(ops.delta_weight.default, (weight, list(weight.shape), *delta))
    for alone in (False, True):
        given = (torch.ones_like(weight), weight, list(weight.shape), *detached(delta))
        opcheck(ops.weight_backward.default, (*given, alone, [True] * (1 + len(delta[0]))))


# Agreement with the direct path -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("form, layer", short("linear", "conv2d", "depthwise"))
def test_an_operator_is_the_direct_path(form, layer, layout, dtype):
    if layout == "channels_last" and layer == "linear":
        layout = "contiguous"
    op, x, weight, bias = inputs_of(layer, dtype, layout)
    parts = parts_of(form, weight.shape, dtype)
    inputs = [x, weight.requires_grad_(), bias.requires_grad_(), *parts.tensors]
    for plan, dropout in product(("auto", "fused", "hybrid", "merged"), (0.0, 0.4)):
        found = []
        for call in (functional.adapted, by_operator):
            torch.manual_seed(1)
            y = call(op, x, weight, bias, parts, plan=plan, dropout=dropout)
            found.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), inputs)))
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    pair = functional.update, by_operator_update
    ours, theirs = (call(op, x, weight, weight.shape, parts).detach() for call in pair)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))


def by_operator(op, x, weight, bias, parts, plan, dropout):
    return library.adapted(op, x, weight, bias, *parts, plan, dropout)


def by_operator_update(op, x, weight, shape, parts):
    return library.update(op, x, weight, shape, *parts, 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_the_second_derivative_of_an_operator(form):
    _, x, weight, bias = inputs_of("linear", torch.float64)
    parts = parts_of(form, weight.shape, torch.float64)
    encoded = library._encoded(*parts)

    def run(x, weight, *parameters):
        return torch.ops.flora.adapted(x, weight, bias, list(parameters), *encoded[1:])

    def of_weight(weight, *parameters):
        return torch.ops.flora.effective_weight(weight, list(parameters), *encoded[1:])

    weight.requires_grad_()
    assert torch.autograd.gradcheck(run, (x, weight, *parts.tensors), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, weight, *parts.tensors), fast_mode=True)
    assert torch.autograd.gradgradcheck(of_weight, (weight, *parts.tensors), fast_mode=True)


def test_an_input_that_was_not_kept_has_no_second_derivative():
    op, x, weight, bias = inputs_of("linear")
    parts = parts_of("tucker", weight.shape)
    parts.tensors[2].requires_grad_(False)
    y = library.adapted(op, x, weight, bias, *parts, "fused", 0.0)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="needs the layer's input, which is not kept"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "vmap of grad", "grad of vmap"])
def test_operators_under_torch_func(form, transform):
    op, x, weight, bias = inputs_of("linear")
    x = x.detach()
    parts = parts_of(form, weight.shape)
    encoded = library._encoded(*parts)

    def plain(x):
        return (op.base(x, weight, bias) + parts.form.twin(op, x, weight, parts.tensors)).square()

    def operator(x):
        return torch.ops.flora.adapted(x, weight, bias, *encoded).square()

    def apply(run):
        if transform == "vmap":
            return torch.func.vmap(run)(x)
        if transform == "grad":
            return torch.func.grad(lambda x: run(x).sum())(x)
        if transform == "jvp":
            return torch.func.jvp(run, (x,), (torch.ones_like(x),))[1]
        if transform == "grad of vmap":
            return torch.func.grad(lambda x: torch.func.vmap(run)(x).sum())(x)
        return torch.func.vmap(torch.func.grad(lambda x: run(x).sum()))(x)

    torch.testing.assert_close(apply(operator), apply(plain), rtol=1e-4, atol=1e-4)


def test_autocast_casts_what_a_stock_call_casts():
    op, x, weight, bias = inputs_of("linear")
    parts = parts_of("tucker", weight.shape)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.ops.flora.adapted(x, weight, bias, *library._encoded(*parts))
        expected = functional.adapted(op, x, weight, bias, parts)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in parts.tensors)


def test_fake_tensors_go_to_the_operators():
    layer = flora.wrap(nn.Linear(6, 8), flora.TuckerConfig(rank=2))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(torch.randn(3, 6)))
    assert y.shape == (3, 8) and "adapted_forward" in type(y.grad_fn).__name__


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_an_operators_output_may_be_written_to(layer):
    op, x, weight, bias = inputs_of(layer)
    parts = parts_of("tucker", weight.shape)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = library.adapted(op, x, weight, bias, *parts, "auto", 0.0)
        expected = y.detach().relu()
        torch.testing.assert_close(torch.relu_(y), expected)
    y = torch.relu_(library.adapted(op, x, weight, bias, *parts, "auto", 0.0))
    (dx,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(functional.adapted(op, x, weight, bias, parts).relu().sum(), x)
    torch.testing.assert_close(dx, expected)


def test_an_unknown_form_is_named():
    _, x, weight, bias = inputs_of("linear")
    with pytest.raises(ValueError, match="no form 'dream'; there are"):
        torch.ops.flora.adapted(x, weight, bias, [weight], [True], "dream", 1.0)
    with pytest.raises(ValueError, match=r"a tucker delta of a weight of 2 modes has 3 parameters, and given=\[True"):
        torch.ops.flora.adapted(
            torch.ones(1, 2), torch.ones(2, 2), None, [torch.ones(2, 2)] * 2, [True] * 2, "tucker", 1.0
        )
    with pytest.raises(ValueError, match="a kronecker delta of a weight of 2 modes has 2 parameters"):
        torch.ops.flora.adapted(torch.ones(1, 2), torch.ones(2, 2), None, [torch.ones(2, 2)], [True], "kronecker", 1.0)
    with pytest.raises(ValueError, match="there are 2 parameters, there are 1"):
        torch.ops.flora.adapted(x, weight, bias, [weight], [True, True], "dense", 1.0)


def test_a_form_from_outside_is_traced_in_plain_pytorch():
    class Doubled(DenseForm):
        def delta(self, weight, tensors):
            return 2 * super().delta(weight, tensors)

    _, x, weight, bias = inputs_of("linear")
    parts = Parts(Doubled(1.0), (torch.randn(8, 12),))
    run = torch.compile(
        lambda x: functional.adapted(LINEAR, x, weight, bias, parts), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(run(x), LINEAR.base(x, weight + 2 * parts.tensors[0], bias), rtol=1e-4, atol=1e-4)


def test_the_operators_of_a_lowered_program_batch():
    """A program that was exported and lowered holds ``adapted_forward`` itself."""
    layer = flora.wrap(nn.Linear(6, 8), flora.TuckerConfig(rank=2))
    nn.init.normal_(layer.deltas["default"].core)
    x = torch.randn(4, 3, 6)
    program = torch.export.export(layer, (x[0],)).run_decompositions().module()
    torch.testing.assert_close(torch.func.vmap(program)(x), layer(x))


# Other devices ------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch):
    """As on a device that has no kernels."""
    monkeypatch.setattr(functional, "takes", lambda *args: False)


def kept_for_backward(run):
    """Outputs of ``run`` and the shapes and dtypes of what it leaves for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run()
    return y, kept


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("form, layer", short())
def test_another_device_computes_the_same(form, layer, dropout, monkeypatch):
    op, x, weight, bias = inputs_of(layer)
    parts = parts_of(form, weight.shape)
    inputs = [x, weight.requires_grad_(), bias.requires_grad_(), *parts.tensors]

    def gradients():
        torch.manual_seed(2)
        y = functional.adapted(op, x, weight, bias, parts, dropout=dropout)
        return y.detach(), *torch.autograd.grad(y.square().sum(), inputs)

    expected = gradients()
    monkeypatch.setattr(functional, "takes", lambda *args: False)
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    torch.manual_seed(2)
    with torch.no_grad():  # as reentrant checkpointing runs it first
        again = functional.adapted(op, x, weight, bias, parts, dropout=dropout)
    torch.testing.assert_close(again, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["linear", "conv2d"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_another_device_keeps_x_and_nothing_of_its_size(case, dropout, elsewhere):
    op, x, weight, bias = inputs_of(case)
    parts = parts_of("tucker", weight.shape)
    _, kept = kept_for_backward(lambda: functional.adapted(op, x, weight, bias, parts, dropout=dropout))
    large = [t for t in kept if t.numel() >= x.numel() // 2 and t.data_ptr() != weight.data_ptr()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    parts.tensors[2].requires_grad_(False)  # then x is not needed, and not kept
    _, kept = kept_for_backward(lambda: functional.adapted(op, x.detach(), weight, bias, parts))
    assert x.data_ptr() not in [t.data_ptr() for t in kept]


@pytest.mark.parametrize("case", ["linear", "conv2d"])
def test_second_derivatives_on_another_device(case, elsewhere):
    op, x, weight, bias = inputs_of(case, torch.float64)
    parts = parts_of("tucker", weight.shape, torch.float64)

    def run(x, *tensors):
        return functional.adapted(op, x, weight, bias, Parts(parts.form, tensors))

    assert torch.autograd.gradcheck(run, (x, *parts.tensors), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *parts.tensors), fast_mode=True)


class Sizes(TorchDispatchMode):
    """Records every tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {id(a) for a in args}
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and id(t) not in given and not func.is_view:
                self.made.append(t)
        return out


META = {
    "tucker": flora.TuckerConfig(rank=4),
    "lora": flora.LoRAConfig(rank=4),
    "circulant": flora.CirculantConfig(),
    "kronecker": flora.KroneckerConfig(rank=4),
    "ldr": flora.LDRConfig(),
    "rescale": flora.RescaleConfig(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", META)
def test_on_meta_tensors_no_update_of_the_weight_is_made(method, dtype):
    """Shapes and dtypes of a forward and a backward; nothing that is made has ΔW's size."""
    with torch.device("meta"):
        base = nn.Linear(256, 512).to(dtype)
        layer = flora.wrap(base, META[method])
        x = torch.randn(2, 3, 256, dtype=dtype, requires_grad=True)
    with Sizes() as sizes:
        y = layer(x)
    assert y.shape == (2, 3, 512) and y.dtype == dtype
    learning = [p for p in layer.parameters() if p.requires_grad]
    sizes_of = [sizes.made]
    y, kept = kept_for_backward(lambda: layer(x))
    with Sizes() as sizes:
        grads = torch.autograd.grad(y.sum(), (x, *learning))
    sizes_of.append(sizes.made)
    assert [g.shape for g in grads] == [t.shape for t in (x, *learning)]
    assert [g.dtype for g in grads] == [t.dtype for t in (x, *learning)]
    for made in sizes_of:
        assert made and all(t.numel() < base.weight.numel() for t in made)
    assert all(t.dtype == dtype for t in kept if t.numel() == x.numel()), "x is kept in a dtype that it does not have"
    if dtype == torch.bfloat16 and method in ("tucker", "lora", "kronecker"):
        with Sizes() as sizes:
            layer(x)
        assert not [t for t in sizes.made if t.dtype == torch.float32 and t.shape[0] in (2, 6)]


@pytest.mark.parametrize("method", ["tucker", "lora"])
def test_another_device_keeps_channels_last(method, elsewhere):
    layer = flora.wrap(nn.Conv2d(64, 96, 3, padding=1), META[method])
    x = torch.randn(2, 64, 9, 9, requires_grad=True).to(memory_format=torch.channels_last)
    layer = layer.to(memory_format=torch.channels_last)
    with Sizes() as sizes:
        y = layer(x)
    assert y.shape == (2, 96, 9, 9) and y.is_contiguous(memory_format=torch.channels_last)
    assert all(t.numel() < layer.base_layer.weight.numel() for t in sizes.made)
    images = [t for t in sizes.made if t.ndim == 4 and t.shape[0] == 2]
    assert images and all(t.is_contiguous(memory_format=torch.channels_last) for t in images)


def test_operators_on_meta_tensors():
    op, x, weight, bias = inputs_of("conv2d")
    parts = parts_of("tucker", weight.shape)
    args = [t.detach().to("meta").requires_grad_() for t in (x, weight, bias, *parts.tensors)]
    y = torch.ops.flora.adapted(*args[:3], args[3:], [True] * 5, "tucker", 0.7, *library._operation(op))
    assert y.is_meta and y.shape == op.base(x, weight, bias).shape
    grads = torch.autograd.grad(y.sum(), args)
    assert [g.shape for g in grads] == [a.shape for a in args]
