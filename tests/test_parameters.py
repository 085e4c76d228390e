"""Deltas on weights that are no modules: experts in one tensor, and other parameters of modules that are no layers."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from test_architectures import TEXT, TOKENS, assert_same, assert_same_state
from torch import nn

import flora
from flora.model import adapted_layers

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
BLOCK = flora.StructuredAdapterConfig(kind="circulant", target_modules=["body"], target_parameters=["up"])
X = torch.linspace(-2, 2, 3 * 6).sin().reshape(3, 6)


class Experts(nn.Module):
    """Three experts of two layers, each a slice of a tensor, mixed by a router; `scale` is used by nobody."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 8))
        self.router = nn.Parameter(torch.randn(3, 6))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        shares = F.linear(x, self.router).softmax(-1)
        hidden = torch.einsum("bi,eoi->ebo", x, self.up).relu()
        return torch.einsum("ebo,eio,be->bi", hidden, self.down, shares)


class Upsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3, 3))
        self.kernel = nn.Parameter(torch.randn(5, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(F.conv_transpose2d(x.reshape(-1, 2, 3, 1), self.weight), self.kernel, padding=1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.experts = Experts()
        self.own = nn.Parameter(torch.ones(6, 6))
        self.end = Upsample()

    def forward(self, x):
        return self.end(self.body(x) + self.experts(x) @ self.own)


def build():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def only(*names, **options):
    return flora.TuckerConfig(**{"rank": 2, "scale": 2.0, "target_modules": (), "target_parameters": names} | options)


def filled(model, seed=0):
    """With random numbers in every delta."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.deltas.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def by_hand(model):
    """The unadapted network in float64, with W + s·ΔW computed from the core and factors in every adapted place."""
    plain, values = build().double(), {}
    for name, layer in adapted_layers(model).items():
        delta = layer.deltas["default"]
        total = delta.core
        for factor in delta.factors:
            total = torch.tensordot(total, factor, ([0], [1]))  # the mode goes last, so that all come round
        key = f"{name}.weight" if name == "body" else name
        values[key] = plain.get_parameter(key) + delta.scale * total
    return lambda x: torch.func.functional_call(plain, values, (x,))


def loss(y):
    return y.square().mean()


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


def test_outputs_and_gradients_are_those_of_the_weight_with_its_update():
    names = ("experts.up", "experts.down", "experts.router", "end.weight", "end.kernel")
    model = filled(flora.adapt(build().double(), only(*names, target_modules="all")))
    assert list(adapted_layers(model)) == ["body", *names]
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == sum(1 + len(layer.shape) for layer in adapted_layers(model).values())
    x = X.double().requires_grad_()
    found, expected = model(x), by_hand(model)(x)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss(y), [x, *parameters]) for y in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_first_output_is_the_frozen_bases_and_training_learns():
    base, model = build(), flora.adapt(build(), only("experts.up", "experts.down"))
    assert torch.equal(model(X), base(X))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(loss(model(X)))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert_same_state(flora.unload(model, merge=False).state_dict(), base.state_dict())


@torch.no_grad()
def test_merging_disabling_saving_and_unloading(tmp_path):
    base = build()
    model = filled(flora.adapt(build(), only("experts.up", "end.weight", "end.kernel", target_modules=["body"])))
    before, state = model(X), {key: value.clone() for key, value in model.state_dict().items()}
    flora.save_adapter(model, tmp_path / "adapter", hashes=True)
    assert torch.equal(flora.load_adapter(build(), tmp_path / "adapter")(X), before)

    flora.merge(model)
    assert [layer.merged for layer in adapted_layers(model).values()] == [True] * 4
    assert_close(model(X), before)
    assert_same_state(model.state_dict(), state)
    with flora.disabled(model):
        assert torch.equal(model(X), base(X))
    flora.save_adapter(model, tmp_path / "merged", hashes=True)
    assert torch.equal(flora.load_adapter(build(), tmp_path / "merged")(X), before)
    model.load_state_dict({key: value * 2 for key, value in state.items()})
    assert not torch.allclose(model(X), before)
    model.load_state_dict(state)
    assert_close(model(X), before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(other(X), before)
        assert torch.equal(flora.unload(other, merge=False)(X), base(X))

    flora.unmerge(model)
    assert torch.equal(model(X), before)
    with flora.disabled(model):
        assert torch.equal(model(X), base(X))
    merged = flora.unload(copy.deepcopy(model))
    assert_close(merged(X), before)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert list(merged.state_dict()) == list(base.state_dict())
    assert_same_state(flora.unload(model, merge=False).state_dict(), base.state_dict())


@torch.no_grad()
def test_several_adapters_with_weights_and_one_deleted():
    base, model = build(), flora.adapt(build(), only("experts.up"))
    up = model.experts
    flora.add_adapter(model, only("experts.up", "experts.down"), name="other")
    assert model.experts is up
    filled(model)
    outputs = {}
    for name in ("default", "other", ("default", "other")):
        flora.set_adapter(model, name)
        outputs[name] = model(X)
        flora.merge(model)
        assert_close(model(X), outputs[name])
        flora.unmerge(model)
    assert len({tuple(output.flatten().tolist()) for output in outputs.values()}) == 3
    flora.set_adapter(model, {"default": 0.5, "other": -1.0})
    deltas = {name: layer.deltas for name, layer in adapted_layers(model).items()}
    weights = {
        "experts.up": base.experts.up + sum(delta.alone(None) for delta in deltas["experts.up"].values()),
        "experts.down": base.experts.down + deltas["experts.down"]["other"].alone(None),
    }
    torch.testing.assert_close(model(X), torch.func.functional_call(base, weights, (X,)))

    flora.delete_adapter(model, "other")
    assert list(adapted_layers(model)) == ["experts.up"]
    flora.set_adapter(model, "default")
    assert torch.equal(model(X), outputs["default"])
    assert isinstance(flora.unload(model, merge=False).experts, Experts)


def test_a_failure_changes_nothing():
    model = filled(flora.adapt(build(), only("experts.up")))
    before, keys = model(X), list(model.state_dict())
    with pytest.raises(ValueError, match=re.escape("experts.down: rank=(2, 2) must have one entry a mode")):
        flora.add_adapter(model, only("experts.up", "experts.down", rank_pattern={"down": (2, 2)}), name="other")
    assert torch.equal(model(X), before)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["up", "down"], ["experts.up", "experts.down"]),
        (["experts.router"], ["experts.router"]),
        (r"experts\.(up|router)", ["experts.up", "experts.router"]),
        ("all", ["experts.up", "experts.down", "end.weight", "end.kernel"]),
        (lambda name, parameter: parameter.ndim == 4, ["end.weight", "end.kernel"]),
    ],
)
def test_selecting(targets, names, tmp_path):
    model = flora.adapt(build(), flora.TuckerConfig(rank=2, target_modules=(), target_parameters=targets))
    assert list(adapted_layers(model)) == names
    flora.save_adapter(model, tmp_path / "adapter")
    assert list(adapted_layers(flora.load_adapter(build(), tmp_path / "adapter"))) == names


def test_patterns_ranks_and_the_report():
    config = flora.TuckerConfig(
        rank=4,
        target_modules=["body"],
        target_parameters="all",
        exclude_modules=["end"],
        rank_pattern={"experts.down": (3, 1, 2)},
        scale_pattern={r".*\.up": 0.5},
    )
    model = flora.adapt(build(), config)
    report = flora.summary(model)
    assert [(row.name, row.kind, row.shape, row.ranks, row.scale, row.plan) for row in report.layers] == [
        ("body", "Linear", (6, 6), (4, 4), 1.0, "auto"),
        ("experts.up", "Experts", (3, 8, 6), (3, 4, 4), 0.5, "own forward"),
        ("experts.down", "Experts", (3, 6, 8), (3, 1, 2), 1.0, "own forward"),
    ]
    assert "experts" not in report.left_alone
    assert "target_parameters can name its weight, kernel" in report.left_alone["end"][1]


def test_a_mapping_of_patterns(tmp_path):
    config = {
        "experts.up": flora.TuckerConfig(rank=2),
        "router": flora.LoRAConfig(rank=2),
        "all": flora.LoRAConfig(rank=1),
    }
    model = filled(flora.adapt(build(), config))
    methods = {name: layer.deltas["default"].config.method for name, layer in adapted_layers(model).items()}
    assert methods == {"experts.up": "tucker", "experts.router": "lora", "body": "lora"}
    flora.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(flora.load_adapter(build(), tmp_path / "adapter")(X), model(X))
    with pytest.raises(ValueError, match="pattern='body': target_parameters=.* must be left to the pattern"):
        flora.adapt(build(), {"body": flora.TuckerConfig(target_parameters="all")})
    with pytest.raises(ValueError, match="pattern='experts.dwn' matches no module; near misses: 'experts.down'"):
        flora.adapt(build(), {"experts.dwn": flora.TuckerConfig()})


@pytest.mark.parametrize("parameters", [60, 200, 10**6])
def test_budget(parameters):
    config = flora.budget(build(), only("experts.up", "experts.down"), parameters=parameters)
    total = flora.summary(flora.adapt(build(), config)).trainable_parameters
    assert total <= parameters
    more = flora.summary(flora.adapt(build(), only("experts.up", "experts.down", rank=8))).trainable_parameters
    assert total == more if parameters == 10**6 else parameters - total < 60


def test_every_method_of_matrices_on_a_parameter_of_two_modes():
    for config in (
        flora.LoRAConfig(rank=2, target_modules=(), target_parameters=["router"]),
        flora.LoRAXSConfig(rank=2, target_modules=(), target_parameters=["router", "up"]),
        flora.KroneckerConfig(rank=3, target_modules=(), target_parameters=["router"]),
        flora.RescaleConfig(bias=False, target_modules=(), target_parameters=["router"]),
    ):
        model = filled(flora.adapt(build(), config))
        before = model(X)
        assert not torch.allclose(before, build()(X))
        flora.merge(model)
        assert_close(model(X), before)


def test_a_module_in_two_places_and_a_parameter_in_two_modules(tmp_path):
    def shared():
        torch.manual_seed(0)
        first, other = Experts(), Experts()
        other.router = first.router
        return nn.Sequential(first, nn.ReLU(), first, other).requires_grad_(False)

    model = filled(flora.adapt(shared(), only("0.up", "0.router")))
    assert model[0] is model[2]
    assert flora.summary(model).tied == {"0.router": ("3.router",)}
    before = model(X)
    flora.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(flora.load_adapter(shared(), tmp_path / "adapter")(X), before)
    flora.merge(model)
    assert_close(model(X), before)
    assert model[3].router is not model[0].base_layer.router
    flora.unmerge(model)
    assert model[3].router is model[0].base_layer.router
    plain = flora.unload(model, merge=False)
    assert plain[0] is plain[2]
    assert torch.equal(plain(X), shared()(X))


class Loop(Experts):
    """Its experts one by one."""

    def forward(self, x):
        return sum(self.down[i] @ (self.up[torch.tensor(i)] @ x.T).relu() + self.down[-1, 0, 0] for i in range(3)).T


def test_experts_that_are_picked_one_by_one():
    torch.manual_seed(0)
    model = filled(flora.adapt(nn.Sequential(Loop()), only("up", "down")))
    loop, deltas = model[0].base_layer, {key: p.deltas["default"] for key, p in model[0].adapted.items()}
    found, expected = model(X), Loop.forward(model[0].base_layer, X)
    assert not torch.allclose(found, expected)
    weights = {key: getattr(loop, key) + delta.alone(None) for key, delta in deltas.items()}
    expected = torch.func.functional_call(loop, weights, (X,))
    torch.testing.assert_close(found, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss(y), parameters) for y in (found, expected)]
    torch.testing.assert_close(*gradients)
    with pytest.raises(IndexError):
        flora.adapt(nn.Sequential(TooFar()), only("up"))(X)


class TooFar(Experts):
    def forward(self, x):
        return self.up[3]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # at which Dynamo looks
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_and_exported(fullgraph):
    torch._dynamo.reset()
    model = filled(flora.adapt(build(), only("experts.up", "experts.down", "end.weight")))
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = model(X)
    found = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)(X)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss(y), parameters) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    if fullgraph:
        assert_close(torch.export.export(model, (X,)).module()(X), expected)


def test_the_attribute_is_the_effective_weight():
    model = filled(flora.adapt(build(), only("experts.up")))
    experts = model.experts
    expected = experts.base_layer.up + adapted_layers(model)["experts.up"].deltas["default"].alone(None)
    torch.testing.assert_close(experts.up.clone(), expected)
    assert experts.up.shape == (3, 8, 6)
    assert experts.down is experts.base_layer.down
    experts.scale = nn.Parameter(torch.zeros(6))
    assert not experts.base_layer.scale.any()
    flora.merge(model)
    with pytest.raises(RuntimeError, match="experts.up: it cannot be set while an adapter is merged"):
        experts.up = nn.Parameter(torch.zeros(3, 8, 6))
    with pytest.raises(AttributeError, match="'Experts' object has no attribute 'left'"):
        _ = experts.left


@torch.no_grad()
def test_casting_while_merged():
    model = filled(flora.adapt(build(), only("experts.up")))
    before = model(X)
    flora.merge(model)
    model.to(torch.float64)
    flora.unmerge(model)
    assert_close(model(X.double()).float(), before)
    half = filled(flora.adapt(build(), only("experts.up"), base_dtype=torch.bfloat16))
    assert half.experts.base_layer.up.dtype == torch.bfloat16
    assert half.experts.adapted_up.deltas["default"].core.dtype == torch.float32
    torch.testing.assert_close(half(X).float(), before, rtol=0.1, atol=0.1 * float(before.abs().max()))


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 6))
        self.second = nn.Parameter(torch.randn(6, 6))

    def forward(self, x, both=False):
        x = x @ self.first
        return x @ self.second if both else x


class Frozen(Sometimes):
    def forward(self, x):
        with torch.no_grad():
            weight = self.first * 2
        return x @ weight


def test_a_parameter_that_is_not_always_used():
    model = flora.adapt(nn.Sequential(Sometimes()), only("first", "second"))
    with pytest.warns(UserWarning, match="did not reach the deltas of 0.second: they will not learn"):
        model(X)
    model[0](X, both=True).sum().backward()
    assert adapted_layers(model)["0.second"].deltas["default"].core.grad.any()


def test_a_parameter_that_is_used_without_gradients_alone():
    model = flora.adapt(nn.Sequential(Frozen()), only("first"))
    with pytest.raises(RuntimeError, match="0.first: the forward of Frozen used it only where gradients are off"):
        model(X)
    with torch.no_grad():
        assert torch.equal(model(X), model[0].base_layer(X))


def attention():
    return nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2, kdim=4, vdim=4, batch_first=True)})


def test_the_separate_projections_of_an_attention():
    model = filled(flora.adapt(attention(), only("q_proj_weight", "k_proj_weight", "v_proj_weight")))
    x, memory = torch.randn(2, 3, 6), torch.randn(2, 5, 4)
    y = model["attention"](x, memory, memory)[0]
    y.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    flora.merge(model)
    torch.testing.assert_close(model["attention"](x, memory, memory)[0], y)


def test_a_transposed_convolution():
    model = filled(
        flora.adapt(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1)), only("0.weight"))
    )
    x = torch.randn(2, 4, 5, 5)
    y = model(x)
    base, delta = model[0].base_layer, adapted_layers(model)["0.weight"].deltas["default"]
    expected = F.conv_transpose2d(x, base.weight + delta.alone(None), base.bias, stride=2, output_padding=1)
    torch.testing.assert_close(y, expected)
    assert_close(flora.unload(model)(x), y)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (only("experts.upp"), "matches no parameter; near misses: 'experts.up'"),
        (only("experts"), "target_parameters=('experts',): 'experts' matches no parameter"),
        (only(target_parameters="up"), "a string is a regex that must match the whole name; the list ['up'] means"),
        (only(target_parameters=lambda name, parameter: False), "matches no parameter"),
        (only("scale"), "experts.scale: target_parameters=('scale',) names it, but it has the shape (6,)"),
        (only("body.weight"), "body.weight: target_parameters=('body.weight',) names it, but it is the weight of a Li"),
        (only("body.bias"), "it is the bias of a Linear, a layer; target_modules names those"),
        (only("own"), "own: target_parameters=('own',) names it, but it is the model's own"),
        (only("up", dropout=0.1), "experts.up: target_parameters=('up',) names it, but dropout=0.1 is not possible"),
        (only("up", rank=(2, 2)), "experts.up: rank=(2, 2) must have one entry a mode of the weight (3, 8, 6)"),
        (only("up", rank_pattern={"dwn": 2}), "rank_pattern='dwn' matches no adapted module; there are 'up'"),
        (flora.LoRAConfig(target_parameters=["up"]), "of matrices and it has the shape (3, 8, 6) (TuckerConfig takes"),
        (flora.RescaleConfig(target_parameters=["router"]), "RescaleConfig cannot adapt it: it has no bias"),
        (BLOCK, "experts.up: target_parameters=('up',) names it, but StructuredAdapterConfig acts on the output"),
        (only("up", modules_to_save=["experts"]), "target_parameters=('up',) leaves nothing to adapt"),
        (only("up", exclude_modules=["experts"]), "target_parameters=('up',) leaves nothing to adapt"),
    ],
)
def test_refusals(config, message):
    model = build()
    with pytest.raises(ValueError, match=re.escape(message)):
        flora.adapt(model, config)
    assert_same_state(model.state_dict(), build().state_dict())
    assert isinstance(model.experts, Experts)


@pytest.mark.parametrize(
    ("module", "key", "reason"),
    [
        (nn.LSTM(6, 6), "0.weight_ih_l0", "a LSTM keeps its weights in a list of its own"),
        (nn.ParameterList([torch.zeros(2, 2)]), "0.0", "its ParameterList is never called"),
        (nn.Embedding(4, 6, max_norm=1.0), "0.weight", "it is the weight of an Embedding"),
        (nn.LazyLinear(4), "0.weight", "a LazyLinear has no weight before its first forward"),
    ],
)
def test_modules_whose_parameters_are_refused(module, key, reason):
    with pytest.raises(ValueError, match=f"^{key}: .*{reason}"):
        flora.adapt(nn.Sequential(module), only(key))


def test_a_module_and_its_parameters_are_not_adapted_both():
    block = flora.StructuredAdapterConfig(kind="circulant", target_modules=["experts"])
    model = flora.adapt(build(), only("experts.up"))
    with pytest.raises(ValueError, match="experts: .* names it, but .*another adapter adapts its parameters"):
        flora.add_adapter(model, block, name="block")


def test_the_configuration():
    config = flora.TuckerConfig(target_modules=[], target_parameters=["a", "b"])
    assert flora.DeltaConfig.from_dict(config.to_dict()) == config
    assert config.target_modules == ()
    assert flora.TuckerConfig(target_parameters=[]).target_parameters is None
    with pytest.raises(ValueError, match=re.escape("TuckerConfig: target_modules=[] must name modules")):
        flora.TuckerConfig(target_modules=[])
    with pytest.raises(ValueError, match="target_parameters=7 must be .*a function of .name, parameter."):
        flora.TuckerConfig(target_parameters=7)
    with pytest.raises(ValueError, match=re.escape("target_parameters='(' is not a regex")):
        flora.TuckerConfig(target_parameters="(")


def test_pefts_files_have_no_place_for_it(tmp_path):
    model = flora.adapt(build(), only("experts.up", target_modules=["body"]))
    with pytest.raises(ValueError, match="experts.up: PEFT has no Tucker update of a parameter"):
        flora.save_adapter(model, tmp_path / "adapter", format="peft")


def test_a_file_of_another_shape(tmp_path):
    flora.save_adapter(flora.adapt(build(), only("experts.up")), tmp_path / "adapter")
    other = build()
    del other.experts.up
    with pytest.raises(ValueError, match="'experts.up' is missing in this model"):
        flora.load_adapter(other, tmp_path / "adapter")


# transformers' mixtures of experts ---------------------------------------------------------------------------------


def mixtral(implementation):
    torch.manual_seed(0)
    config = tf.MixtralConfig(**TEXT | {"num_key_value_heads": 1}, num_local_experts=4)
    config._experts_implementation = implementation
    return tf.MixtralForCausalLM(config).requires_grad_(False).eval()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_mixtrals_experts_in_every_implementation(implementation, tmp_path):
    def run(model):
        with torch.no_grad():
            return list(model(TOKENS).to_tuple()[:1])

    def adapted():
        return filled(flora.adapt(mixtral(implementation), only(*EXPERTS)))

    base, model = mixtral(implementation), adapted()
    reference = adapted()
    flora.merge(reference)
    assert_same(run(flora.adapt(mixtral(implementation), only(*EXPERTS))), run(base))
    torch.testing.assert_close(run(model), run(reference), rtol=1e-4, atol=1e-5)
    gradients = {}
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = adapted().train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable(checkpointing)
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients[str(checkpointing)] = [p.grad for p in model.parameters() if p.requires_grad]
    plain, *others = gradients.values()
    assert len(plain) == 2 * 2 * 4
    assert all(gradient.any() for gradient in plain)
    for other in others:
        torch.testing.assert_close(other, plain)
    flora.save_adapter(model.eval(), tmp_path / "adapter", hashes=True)
    assert_same(run(flora.load_adapter(mixtral(implementation), tmp_path / "adapter")), run(model))


def test_the_implementations_agree():
    outputs = [filled(flora.adapt(mixtral(kind), only(*EXPERTS)))(TOKENS).logits for kind in ("eager", "grouped_mm")]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
