"""Adapted models under torch.compile, torch.export, torch.func, checkpointing and what else looks into a forward."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import flora
from flora import _core

METHODS = {
    "tucker": flora.TuckerConfig(rank=3),
    "lora": flora.LoRAConfig(rank=3),
    "circulant": flora.CirculantConfig(),
    "toeplitz": flora.ToeplitzConfig(),
    "kronecker": flora.KroneckerConfig(rank=2, exclude_modules=["2"]),
    "ldr": flora.LDRConfig(),
    "rescale": flora.RescaleConfig(),
    "block": flora.StructuredAdapterConfig(target_modules=["0", "5"]),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # PyTorch's own, of inductor, jvp
    pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning"),  # and of export
]

SHORT = ("tucker", "block")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(config, **kwargs):
    """A convolution, a depthwise one and two linear layers; every delta away from zero."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Flatten(2),
        nn.LayerNorm(36),
        nn.Linear(36, 24),
        nn.GELU(),
        nn.Linear(24, 6),
    )
    return randomised(flora.adapt(net, config, **kwargs))


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def step(model, run, x, seed=None):
    """Outputs and the gradients of input and parameters."""
    if seed is not None:
        torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    y = run(x)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    for t in inputs:
        t.grad = None
    y.float().square().mean().backward()
    return y.detach(), *(t.grad for t in inputs)


def assert_same(found, expected, bound=1e-4):
    """Of each by its own largest number, but for the rounding of a gradient that is zero: that of a shift which a
    normalisation takes away again is the output's rounding and nothing else."""
    rounding = torch.finfo(torch.float32).eps * float(expected[0].abs().max())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        scale = float(theirs.abs().max().clamp(min=1e-4))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * scale + rounding)


def calls(monkeypatch):
    """Counts the calls of C's own layer functions from now on."""
    made = []

    def counted(name, function):
        return lambda *args: (made.append(name), function(*args))[1]

    for name in dir(_core):
        if name.endswith(("_forward", "_backward", "_reconstruct")):
            monkeypatch.setattr(_core, name, counted(name, getattr(_core, name)))
    return made


# torch.compile ------------------------------------------------------------------------------------------------------


def cases(*long):
    return [pytest.param(case, marks=[] if case in SHORT else pytest.mark.slow) for case in long]


@pytest.mark.parametrize("method", cases(*METHODS))
def test_a_compiled_step_is_the_eager_one_in_c(method, monkeypatch):
    model, x = network(METHODS[method]), torch.randn(2, 4, 6, 6)
    expected = step(model, model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    made = calls(monkeypatch)
    assert_same(step(model, compiled, x), expected)
    forward, backward = (any(name.endswith(end) for name in made) for end in ("_forward", "_backward"))
    assert made and (forward or method == "rescale") and backward
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m == "tucker" else pytest.mark.slow) for m in METHODS])
def test_inductor(method):
    model, x = network(METHODS[method]), torch.randn(2, 4, 6, 6)
    expected = step(model, model, x)
    compiled = torch.compile(model, fullgraph=True)
    assert_same(step(model, compiled, x), expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dynamic_shapes_are_compiled_once(backend):
    model = network(METHODS["tucker"])
    graphs = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    made = set()
    for batch in (2, 3, 7):
        x = torch.randn(batch, 4, 6, 6)
        assert_same(step(model, compiled, x), step(model, model, x))
        made.add(graphs.frame_count)
    assert len(made) == 1


@pytest.mark.slow
def test_channels_last_under_inductor():
    model = network(METHODS["tucker"]).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    expected = step(model, model, x)
    assert_same(step(model, torch.compile(model, fullgraph=True), x), expected)


def test_a_change_of_scale_or_adapter_is_seen():
    model, x = network(METHODS["tucker"]), torch.randn(2, 4, 6, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    for layer in model.modules():
        if isinstance(layer, flora.WeightDelta):
            layer.scale = 3.0
    torch.testing.assert_close(compiled(x), model(x))
    randomised(flora.add_adapter(model, METHODS["circulant"], name="other"))
    flora.set_adapter(model, {"default": 0.5, "other": -1.0})
    assert_same(step(model, compiled, x), step(model, model, x))
    with flora.disabled(model):
        torch.testing.assert_close(compiled(x), model(x))


def test_merging_and_unmerging_is_seen():
    model, x = network(METHODS["tucker"]), torch.randn(2, 4, 6, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    flora.merge(model)
    torch.testing.assert_close(compiled(x), expected)
    with flora.disabled(model):
        torch.testing.assert_close(compiled(x), model(x))
    flora.unmerge(model)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("plan", ["fused", "hybrid", "merged"])
@pytest.mark.parametrize("size", [(36,), (2, 3, 36), (0, 36), (2, 0, 36)], ids=str)
def test_every_shape_of_rows_and_none(plan, size):
    torch.manual_seed(0)
    layer = randomised(flora.wrap(nn.Linear(36, 24), flora.TuckerConfig(rank=3, plan=plan)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(size, requires_grad=True)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found, expected = (torch.autograd.grad(run(x).square().sum(), inputs) for run in (compiled, layer))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout_in", ["fused", "separate"])
def test_dropout_has_the_mask_of_the_eager_layer(dropout_in):
    """The seed is drawn from PyTorch's generator by both."""
    groups = 4 if dropout_in == "separate" else 1
    layer = nn.Conv2d(4, 8, 3, groups=groups)
    layer = randomised(flora.wrap(layer, flora.TuckerConfig(rank=2, dropout=0.5)))
    x = torch.randn(2, 4, 6, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(step(layer, compiled, x, seed=3), step(layer, layer, x, seed=3))
    assert not torch.equal(compiled(x), compiled(x))


def test_dropout_under_inductor_has_one_mask_for_forward_and_backward():
    """Of y = ΔW·dropout(x) with ΔW = 1 the mask is y itself, and what dx shows."""
    layer = nn.Linear(32, 32, bias=False)
    nn.init.zeros_(layer.weight)
    layer = flora.wrap(layer, flora.TuckerConfig(rank=32, dropout=0.5))
    with torch.no_grad():
        for parameter in layer.deltas["default"].parameters():
            parameter.copy_(torch.eye(32))
    x = torch.ones(4, 32, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    y = compiled(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, y.detach())
    assert set(y.detach().unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(compiled(x), y)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activation_checkpointing(use_reentrant, compiled, dropout):
    model, x = network(flora.TuckerConfig(rank=3, dropout=dropout)), torch.randn(2, 4, 6, 6)

    def run(x):
        return checkpoint(model, x, use_reentrant=use_reentrant)

    expected = step(model, model, x, seed=1)
    if compiled and use_reentrant:  # PyTorch's compiler takes one kind alone
        return
    found = step(model, torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run, x, seed=1)
    assert_same(found, expected)


@pytest.mark.parametrize("method", ["tucker", pytest.param("circulant", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(method, compiled):
    model, x = network(METHODS[method]), torch.randn(2, 4, 6, 6)
    exact = step(model, model, x)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    run = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    found = step(model, run, x)
    assert found[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in found[1:])
    assert_same(tuple(t.float() for t in found), exact, 0.1)


def test_a_bfloat16_base_compiled():
    model, x = network(METHODS["tucker"], base_dtype=torch.bfloat16), torch.randn(2, 4, 6, 6)
    expected = step(model, model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(step(model, compiled, x), expected, 0.02)


def test_a_foreign_forward_compiled():
    class Same(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    model = randomised(flora.adapt(nn.Sequential(Same(4, 8, 3), nn.ReLU()), METHODS["tucker"]))
    x = torch.randn(2, 4, 6, 6)
    expected = step(model, model, x)
    assert_same(step(model, torch.compile(model, backend="aot_eager"), x), expected)


@pytest.mark.parametrize("which", ["vit", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_transformers_model_compiled(which):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if which == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
        inputs = {"input_ids": torch.randint(64, (2, 9)), "use_cache": False}
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **sizes))
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    randomised(flora.adapt(model, flora.TuckerConfig(rank=3)))
    learning = [p for p in model.parameters() if p.requires_grad]

    def gradients(run):
        y = run(**inputs).logits
        return y.detach(), *torch.autograd.grad(y.square().mean(), learning)

    expected = gradients(model)
    assert_same(gradients(torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


# torch.export -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", cases(*METHODS))
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_program(method, strict):
    model, x = network(METHODS[method]).eval(), torch.randn(3, 4, 6, 6)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,), strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("flora.") for name in names), names
    again = torch.randn(5, 4, 6, 6)
    torch.testing.assert_close(program.module()(again), model(again))
    lowered = program.run_decompositions()
    torch.testing.assert_close(lowered.module()(again), model(again))


def test_an_exported_program_learns(tmp_path):
    model, x = network(METHODS["tucker"]), torch.randn(3, 4, 6, 6)
    module = torch.export.export(model, (x,)).module()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(model(x).square().mean(), list(learning.values()))
    own = dict(module.named_parameters())
    found = torch.autograd.grad(module(x).square().mean(), [own[n] for n in learning])
    assert_same(found, expected)


# torch.func ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", cases(*METHODS))
def test_torch_func(method):
    model, x = network(METHODS[method]), torch.randn(3, 4, 6, 6)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    torch.testing.assert_close(torch.func.vmap(model)(x[:, None]).squeeze(1), model(x))
    one = torch.func.grad(loss)(parameters, x)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert_same(tuple(one.values()), torch.autograd.grad(model(x).square().mean(), learning), 1e-3)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    assert_same(tuple(g.mean(0) for g in each.values()), tuple(one.values()), 1e-3)

    tangent = torch.randn_like(x)
    value, slope = torch.func.jvp(model, (x,), (tangent,))
    torch.testing.assert_close(value, model(x))
    _, vjp = torch.func.vjp(model, x)
    dy = torch.randn_like(value)
    torch.testing.assert_close((dy * slope).sum(), (vjp(dy)[0] * tangent).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_torch_func_compiled(transform):
    model, x = network(METHODS["tucker"]), torch.randn(3, 4, 6, 6)
    if transform == "jvp":
        model[4] = nn.Identity()  # PyTorch itself has no compiled jvp of a LayerNorm

    def run(x):
        if transform == "vmap":
            return torch.func.vmap(lambda x: model(x))(x[:, None]).squeeze(1)
        if transform == "grad":
            return torch.func.grad(lambda x: model(x).square().mean())(x)
        return torch.func.jvp(lambda x: model(x), (x,), (torch.ones_like(x),))[1]

    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x))


# Other ways of running ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", cases(*METHODS))
def test_double_backward(method):
    model = network(METHODS[method]).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(model, (x,), fast_mode=True)


def test_double_backward_compiled_is_pytorchs_own_error():
    model = torch.compile(network(METHODS["tucker"]), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


def test_deterministic_algorithms():
    model, x = network(METHODS["tucker"]), torch.randn(2, 4, 6, 6)
    expected = step(model, model, x)
    torch.use_deterministic_algorithms(True)
    try:
        first, again = step(model, model, x), step(model, model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert_same(first, expected)


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode(method):
    model, x = network(METHODS[method]), torch.randn(2, 4, 6, 6)
    expected = model(x).detach()
    with torch.inference_mode():
        inside = model(x.clone())
        other = network(METHODS[method])  # whose parameters are inference tensors
        torch.testing.assert_close(inside, expected)
        torch.testing.assert_close(other(x), expected)


def test_copies_of_a_compiled_model():
    model, x = network(METHODS["tucker"]), torch.randn(2, 4, 6, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    torch.testing.assert_close(copy.deepcopy(compiled)(x), expected)


# Models without values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_adapting_a_model_on_the_meta_device(method, tmp_path):
    trained, x = network(METHODS[method]), torch.randn(2, 4, 6, 6)
    base = flora.unload(network(METHODS[method]), merge=False).state_dict()
    expected = trained(x)
    flora.save_adapter(trained, tmp_path / "adapter")
    with torch.device("meta"):
        empty = network(METHODS[method])
    assert all(p.is_meta for p in empty.parameters())
    assert empty(x.to("meta")).shape == (2, 8, 6)
    empty.to_empty(device="cpu").load_state_dict(trained.state_dict())
    torch.testing.assert_close(empty(x), expected)

    with torch.device("meta"):
        plain = flora.unload(network(METHODS[method]), merge=False)
    plain.to_empty(device="cpu").load_state_dict(base)
    loaded = flora.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(loaded.train(trained.training)(x), expected)


@pytest.mark.parametrize(
    "config", [flora.TuckerConfig(rank=2, init="hosvd"), flora.LoRAXSConfig(rank=2)], ids=["hosvd", "lora-xs"]
)
def test_a_start_that_needs_the_weights_values_is_refused_on_meta(config):
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises((ValueError, RuntimeError), match="^0: .*values"):
        flora.adapt(net, config)
    assert type(net[0]) is nn.Linear


def test_a_model_that_transformers_has_not_loaded_yet():
    """As under ``init_empty_weights`` and ``low_cpu_mem_usage``: assigned parameters take the empty ones' place."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    torch.manual_seed(0)
    full = randomised(flora.adapt(transformers.ViTForImageClassification(config), flora.TuckerConfig(rank=3)))
    with torch.device("meta"):
        empty = flora.adapt(transformers.ViTForImageClassification(config), flora.TuckerConfig(rank=3))
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(empty.eval()(x).logits, full.eval()(x).logits)
