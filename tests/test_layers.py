"""AdaptedLayer: every kind of layer, with forwards, hooks and weights of its own; merging, copying, casting."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flora
from flora.layers import is_adaptable, refusal

CONFIG = flora.TuckerConfig(rank=4)


def filled(layer, seed=0):
    """The layer with random numbers in every delta, so that ΔW is not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.deltas.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def wrapped(module, config=CONFIG, seed=0):
    return filled(flora.wrap(module, config), seed)


def with_weight(module, weight, name="weight"):
    """A copy of an unadapted module with another weight."""
    other = copy.deepcopy(module)
    setattr(other, name, nn.Parameter(weight.detach().clone()))
    return other


class PaddedConv(nn.Conv2d):
    """Pads by itself, unevenly, and calls the functional convolution: what EfficientNet's layers do."""

    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class MatmulLinear(nn.Linear):
    """Uses its weight in an operation of its own."""

    def forward(self, x):
        return x @ self.weight.t() + self.bias


class StandardisedConv(nn.Conv2d):
    """Normalises its weight in each forward, as the ResNets of BiT do."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return 3.0 * super().forward(ids)


CASES = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear 1-D input": (lambda: nn.Linear(5, 7), (5,)),
    "linear without bias, 4-D": (lambda: nn.Linear(5, 7, bias=False), (2, 3, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "conv2d same, even kernel": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (2, 4, 7, 7)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 7)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 7, 7)),
    "conv2d replicate": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"), (2, 4, 7, 7)),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 7)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, padding=1), (2, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1)), (2, 4, 4, 5, 3)),
    "own padding": (lambda: PaddedConv(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "own matmul": (lambda: MatmulLinear(5, 7), (3, 5)),
    "standardised weight": (lambda: StandardisedConv(4, 6, 3), (2, 4, 7, 7)),
}


# PyTorch's own, on "same" with an even kernel: its convolution copies x, as ours does.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def test_dropout_touches_the_delta_alone_and_only_in_training():
    for module, shape in [
        (nn.Linear(5, 7), (64, 5)),
        (PaddedConv(4, 6, 3), (2, 4, 7, 7)),
        (MatmulLinear(5, 7), (64, 5)),
    ]:
        layer = wrapped(module, flora.TuckerConfig(rank=3, dropout=0.5))
        x = torch.randn(shape, requires_grad=True)
        layer.eval()
        full = layer(x)
        frozen = layer.base_layer(x)
        layer.train()
        torch.manual_seed(1)
        once = layer(x)
        torch.manual_seed(1)
        assert torch.equal(layer(x), once)
        assert not torch.allclose(layer(x), once)
        mean = torch.stack([layer(x).detach() for _ in range(2000)]).mean(0)
        assert (mean - full).abs().max() < 0.25 * (full - frozen).abs().max()


def test_dropout_gradients_belong_to_the_mask_that_was_drawn():
    layer = wrapped(nn.Linear(5, 7).double(), flora.TuckerConfig(rank=3, dropout=0.4))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def seeded(x, *_):
        torch.manual_seed(3)
        return layer(x)

    parameters = tuple(layer.deltas.parameters())
    assert torch.autograd.gradcheck(seeded, (x, *parameters))
    assert torch.autograd.gradgradcheck(seeded, (x, *parameters))


def test_depthwise_with_dropout_and_bfloat16_base():
    for dtype, dropout in [(torch.float32, 0.3), (torch.bfloat16, 0.0), (torch.bfloat16, 0.3)]:
        base = nn.Conv2d(6, 6, 3, groups=6, padding=1, dtype=dtype)
        layer = wrapped(base, flora.TuckerConfig(rank=3, dropout=dropout))
        x = torch.randn(2, 6, 7, 7, dtype=dtype)
        layer(x).sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.deltas.parameters())
        layer.eval()
        delta = layer.deltas["default"].delta_weight(base.weight)
        expected = F.conv2d(x.float(), base.weight.float() + delta, base.bias.float(), padding=1, groups=6)
        bound = 1e-5 if dtype == torch.float32 else 2e-2 * expected.abs().max()
        assert (layer(x).float() - expected).abs().max() < bound


def test_a_small_delta_on_a_bfloat16_base_is_not_swallowed():
    base = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(base.weight)
    layer = wrapped(base, flora.TuckerConfig(rank=4, plan="merged"))
    with torch.no_grad():
        layer.deltas["default"].core.mul_(1e-4)
    x = torch.eye(64, dtype=torch.bfloat16) * 256
    with torch.no_grad():
        x[:, 0] = -256  # so that the base's own output is 0 but for the diagonal, and the delta shows
    delta = layer.deltas["default"].delta_weight(base.weight)
    exact = x.double() @ (base.weight.double() + delta.double()).T
    assert (layer(x).double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert not torch.equal(layer(x), base(x))


# Layers that are not stock -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "dropout"), [("fused", 0.0), ("fused", 0.3), ("hybrid", 0.0), ("merged", 0.0)])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5)])
def test_an_activation_in_place_after_the_layer(plan, dropout, shape):
    adapted = wrapped(nn.Linear(5, 7), flora.TuckerConfig(rank=4, plan=plan, dropout=dropout)).train()
    x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    outputs, gradients = [], []
    for inplace in (False, True):
        torch.manual_seed(0)
        outputs.append(F.relu(adapted(x), inplace=inplace))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), list(adapted.deltas.parameters())))
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_hooks_on_the_base_run_once_and_see_the_adapted_output():
    layer = wrapped(nn.Linear(5, 7))
    plain = layer(torch.ones(2, 5)).detach()
    seen = []
    layer.base_layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    layer.base_layer.register_forward_hook(lambda m, args, out: seen.append(out) or out - layer.base_layer.bias)
    y = layer(torch.ones(2, 5) / 2)
    assert len(seen) == 1 and torch.equal(seen[0], plain)
    torch.testing.assert_close(y, plain - layer.base_layer.bias)


def test_forward_put_on_the_instance():
    layer = wrapped(nn.Linear(5, 7))
    x = torch.randn(3, 5)
    expected = layer(x).detach()
    old = layer.base_layer.forward
    layer.base_layer.forward = lambda x: old(x) + 1  # as accelerate's hooks do
    torch.testing.assert_close(layer(x), expected + 1)


@pytest.mark.parametrize("hooked", [False, True])
def test_parametrised_weight_norm(hooked):
    base = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7))
    layer = wrapped(base)
    state = copy.deepcopy(base.state_dict())
    if hooked:
        base.register_forward_hook(lambda m, args, out: out * 2)
    x = torch.randn(3, 5)
    y = layer(x)
    expected = F.linear(x, base.weight + layer.deltas["default"].delta_weight(base.weight), base.bias)
    torch.testing.assert_close(y, expected * (2 if hooked else 1))
    y.sum().backward()
    assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items())
    with pytest.raises(RuntimeError, match="parametrised"):
        layer.merge()
    assert layer.unload(merge=False) is base and not base.parametrizations.weight._forward_hooks


def test_a_copy_is_one_of_the_deltas_too_where_the_base_copies_itself():
    """As a parametrised module does, whose method a copy would find by its name."""
    layer, x = wrapped(nn.utils.parametrizations.weight_norm(nn.Linear(5, 7))), torch.randn(3, 5)
    copied = copy.deepcopy(layer)
    assert isinstance(copied, flora.AdaptedLayer) and copied.base_layer is not layer.base_layer
    assert torch.equal(copied(x), layer(x))
    model = nn.Sequential(nn.Linear(5, 5), nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)))
    flora.adapt(model, flora.TuckerConfig(rank=2, modules_to_save=["1"]))
    assert type(copy.deepcopy(model)[1]) is type(model[1])


def test_old_weight_norm_hook():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        base = nn.utils.weight_norm(nn.Linear(5, 7))
    layer = wrapped(base)
    x = torch.randn(3, 5)
    expected = F.linear(x, base.weight + layer.deltas["default"].delta_weight(base.weight), base.bias)
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(RuntimeError, match="set anew in each forward"):
        layer.merge()


def test_parametrised_layer_with_its_own_forward_is_refused():
    base = nn.utils.parametrizations.weight_norm(MatmulLinear(5, 7))
    with pytest.raises(TypeError, match="parametrised weight and a forward of its own"):
        flora.wrap(base, CONFIG)
    assert all(p.requires_grad for p in base.parameters())


def test_a_weight_that_the_forward_never_uses_is_an_error():
    class Ignores(nn.Linear):
        def forward(self, x):
            return x

    with pytest.raises(RuntimeError, match="Ignores: the forward of Ignores never used its weight"):
        flora.wrap(Ignores(5, 5), CONFIG)(torch.ones(2, 5))


def test_quantised_linear():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 6)), {nn.Linear}, dtype=torch.qint8)[0]
    layer = wrapped(base)
    x = torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        expected = base(x) + x @ layer.deltas["default"].delta_weight(torch.empty(6, 8)).T
    y = layer(x.detach())
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.deltas.parameters())
    with pytest.raises(RuntimeError, match="Linear cannot be merged: the weight of Linear is quantised or packed"):
        layer.merge()
    assert layer.plan_of("default") == "opaque"


@pytest.mark.parametrize(
    "module", [PaddedConv(4, 6, 3), StandardisedConv(4, 6, 3, padding=1)], ids=lambda m: type(m).__name__
)
def test_own_forwards_from_eight_threads(module):
    layer = wrapped(copy.deepcopy(module))
    weight = layer.base_layer.weight
    xs = [torch.randn(1, 4, 8, 8) for _ in range(8)]
    expected = [layer(x).detach() for x in xs]
    wrong = []

    def work(i):
        for _ in range(30):
            if not torch.equal(layer(xs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and layer.base_layer.weight is weight


class TwiceUsed(nn.Linear):
    """A stock call and another use of the same weight, a constant, and a tuple on request."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + x @ self.weight.t() + 3.0


class ScaledWeight(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


@pytest.mark.parametrize("make", [MatmulLinear, TwiceUsed, ScaledWeight])
def test_dropout_on_a_weight_that_is_used_freely(make):
    """With a vanishing dropout, training gives what evaluation gives; with ΔW = 0, the base's own output."""
    base = make(5, 5)
    x = torch.randn(3, 5)
    assert torch.equal(flora.wrap(copy.deepcopy(base), flora.TuckerConfig(rank=2, dropout=0.5))(x), base(x))
    layer = wrapped(base, flora.TuckerConfig(rank=2, dropout=1e-9))
    expected = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), expected)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.deltas.parameters())


def test_dropout_on_a_standardised_weight_called_by_keyword():
    base = StandardisedConv(4, 6, 3)
    x = torch.randn(2, 4, 7, 7)
    layer = wrapped(copy.deepcopy(base), flora.TuckerConfig(rank=2, dropout=1e-9))
    expected = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x=x), expected, rtol=1e-4, atol=1e-5)


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.t() @ x


def test_a_weight_used_only_in_an_autograd_function_is_an_error():
    class Foreign(nn.Linear):
        def forward(self, x):
            return OwnFunction.apply(x, self.weight)

    layer = wrapped(Foreign(5, 7))
    with pytest.raises(RuntimeError, match="Foreign: .* only where gradients are off"):
        layer(torch.randn(3, 5))
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.eye(5)), layer.weight.t().clone())


def test_a_norm_of_the_weight_under_no_grad_keeps_the_gradients_of_its_other_uses():
    class Normed(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                norm = self.weight.norm()
            return x @ self.weight.t() / norm

    layer = wrapped(Normed(5, 7))
    layer(torch.randn(3, 5)).sum().backward()
    assert all(p.grad is not None for p in layer.deltas.parameters())


def test_a_hook_on_a_parametrised_layer_may_call_layers_of_the_same_shape():
    base, other = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6)
    layer = wrapped(base)
    x = torch.randn(3, 6)
    expected = other(layer(x))
    base.register_forward_hook(lambda m, args, out: other(out))
    torch.testing.assert_close(layer(x), expected)


def test_bad_input_names_the_module():
    layer = flora.layers.AdaptedLayer(nn.Linear(5, 7), name="encoder.fc")
    layer.add_delta("default", CONFIG)
    layer.set_active(["default"])
    for x in (torch.ones(3, 4), torch.ones(3, 5).double(), "text"):
        with pytest.raises((RuntimeError, TypeError, AttributeError)) as error:
            layer(x)
        assert any(note.startswith("in encoder.fc: input") for note in error.value.__notes__)


def test_packed_layers_without_a_weight_are_served():
    class Packed(nn.Module):  # as GPTQ's and AWQ's: integers under a name of their own
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 5, 7
            self.register_buffer("qweight", torch.randint(-8, 8, (7, 5), dtype=torch.int8))

        def forward(self, x):
            return x @ self.qweight.to(x.dtype).t()

    base = Packed()
    layer = wrapped(base)
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.deltas["default"].delta_weight(torch.empty(7, 5)).t())


# Attention, embeddings, transformers' Conv1D -----------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_multihead_attention_packed_projection_and_output(grad):
    base = nn.MultiheadAttention(8, 2, batch_first=True)
    layer = wrapped(copy.deepcopy(base))
    layer.base_layer.out_proj = wrapped(layer.base_layer.out_proj, seed=1)
    other = with_weight(base, layer.in_proj_weight, "in_proj_weight")
    other.out_proj = with_weight(base.out_proj, layer.out_proj.weight)
    layer.eval(), other.eval()
    q = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(q, q, q)[0], other(q, q, q)[0])
        if grad:
            layer(q, q, q)[0].sum().backward()
            assert all(p.grad is not None for n, p in layer.named_parameters() if "deltas" in n)
    layer.merge()
    with torch.no_grad():
        torch.testing.assert_close(layer(q, q, q)[0], other(q, q, q)[0])


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_transformer_encoder_layer_and_its_fast_path(mode):
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    adapted = copy.deepcopy(base)
    adapted.self_attn = wrapped(adapted.self_attn)
    adapted.self_attn.base_layer.out_proj = wrapped(adapted.self_attn.base_layer.out_proj, seed=1)
    adapted.linear1, adapted.linear2 = wrapped(adapted.linear1, seed=2), wrapped(adapted.linear2, seed=3)
    with torch.no_grad():
        base.self_attn.in_proj_weight.copy_(adapted.self_attn.in_proj_weight)
        base.self_attn.out_proj.weight.copy_(adapted.self_attn.out_proj.weight)
        base.linear1.weight.copy_(adapted.linear1.weight)
        base.linear2.weight.copy_(adapted.linear2.weight)
    x = torch.randn(2, 5, 8)
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with context():
        torch.testing.assert_close(adapted(x), base(x), rtol=1e-4, atol=1e-5)


def test_attention_refusals():
    with pytest.raises(TypeError, match="q_proj_weight"):
        flora.wrap(nn.MultiheadAttention(8, 2, kdim=4), CONFIG)
    with pytest.raises(ValueError, match="dropout=0.1 is not possible on MultiheadAttention"):
        flora.wrap(nn.MultiheadAttention(8, 2), flora.TuckerConfig(rank=2, dropout=0.1))


@pytest.mark.parametrize("cls", [nn.Embedding, ScaledEmbedding])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding(cls, padding_idx):
    base = cls(10, 6, padding_idx=padding_idx)
    layer = wrapped(copy.deepcopy(base))
    ids = torch.tensor([[1, 2, 9], [2, 0, 1]])
    delta = layer.deltas["default"].delta_weight(base.weight).clone()
    if padding_idx is not None:
        delta[padding_idx] = 0
    factor = 3.0 if cls is ScaledEmbedding else 1.0
    torch.testing.assert_close(layer(ids), factor * (base.weight + delta)[ids])
    layer(ids).sum().backward()
    assert all(p.grad is not None for p in layer.deltas.parameters())


def test_embedding_refuses_max_norm():
    with pytest.raises(TypeError, match="max_norm=1.0"):
        flora.wrap(nn.Embedding(10, 6, max_norm=1.0), CONFIG)


def test_embedding_merge_leaves_the_padding_row():
    layer = wrapped(nn.Embedding(10, 6, padding_idx=3))
    ids = torch.arange(10)
    before = layer(ids).detach()
    layer.merge()
    torch.testing.assert_close(layer(ids), before)


def test_transformers_conv1d():
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(7, 5)  # out, in; its weight is (in, out)
    x = torch.randn(2, 3, 5)
    assert torch.equal(flora.wrap(copy.deepcopy(base), CONFIG)(x), base(x))
    for plan in ("fused", "hybrid", "merged"):
        layer = wrapped(copy.deepcopy(base), flora.TuckerConfig(rank=4, plan=plan))
        delta = layer.deltas["default"]
        assert layer.shape == (7, 5) and [tuple(f.shape) for f in delta.factors] == [(7, 4), (5, 4)]
        assert delta.delta_weight(base.weight).shape == (5, 7)
        expected = with_weight(base, base.weight + delta.delta_weight(base.weight))(x)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.weight, base.weight + delta.delta_weight(base.weight))
        layer.base_layer.register_forward_hook(lambda m, args, out: out)
        torch.testing.assert_close(layer(x), expected)
        layer.merge()
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("write", ["data", "clamp_", "out"])
def test_a_forward_that_writes_to_its_weight_is_refused(write):
    class Writes(nn.Linear):
        def forward(self, x):
            if write == "data":
                self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
            elif write == "clamp_":
                with torch.no_grad():
                    self.weight.clamp_(-0.1, 0.1)
            else:
                torch.mul(self.weight.detach(), 2, out=self.weight)
            return super().forward(x)

    base = Writes(5, 7).requires_grad_(False)
    weight = base.weight.clone()
    with pytest.raises(RuntimeError, match="Writes: .* writes to its weight"):
        flora.layers.wrap(base, CONFIG)(torch.ones(2, 5))
    assert torch.equal(base.weight, weight)


def test_a_weight_handed_to_another_module_inside_the_forward():
    class Hands(nn.Linear):
        def forward(self, x):
            other = nn.Linear(5, 7)
            other.weight, other.bias = self.weight, self.bias
            return other(x)

    layer = wrapped(Hands(5, 7))
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_detached_weight_alone_is_an_error():
    class Detached(nn.Linear):
        def forward(self, x):
            return x @ self.weight.data.t()

    with pytest.raises(RuntimeError, match="could not learn"):
        wrapped(Detached(5, 7))(torch.randn(3, 5))


def test_an_attribute_of_the_base_is_set_on_the_base():
    layer = wrapped(nn.Conv2d(4, 6, 3))
    layer.stride = (2, 2)
    assert layer.base_layer.stride == (2, 2) and layer(torch.randn(1, 4, 7, 7)).shape == (1, 6, 3, 3)
    layer.note = "mine"
    assert not hasattr(layer.base_layer, "note")


def test_a_convolution_takes_lists_as_pytorch_does():
    base = nn.Conv2d(4, 6, 3)
    layer, x = wrapped(base, flora.TuckerConfig(rank=4)), torch.randn(1, 4, 9, 9)
    base.stride, base.dilation, base.padding = (2, 1), (1, 2), (1, 0)
    expected = layer(x)
    base.stride, base.dilation, base.padding = [2, 1], [1, 2], [1, 0]
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_meta_while_merged():
    layer = wrapped(nn.Linear(5, 7))
    layer.merge()
    layer.to("meta").unmerge()
    assert layer.base_layer.weight.is_meta


# Attributes, state, several adapters -------------------------------------------------------------------------------


def test_answers_the_attributes_of_its_base():
    base = nn.Conv2d(4, 6, 3, padding=1)
    layer = wrapped(base)
    assert layer.kernel_size == (3, 3) and layer.padding == (1, 1) and layer.bias is base.bias
    assert layer.weight.shape == base.weight.shape and layer.weight.requires_grad
    torch.testing.assert_close(layer.weight, base.weight + layer.deltas["default"].delta_weight(base.weight))
    with pytest.raises(AttributeError, match="neither AdaptedLayer nor its base Conv2d has an attribute 'nothing'"):
        _ = layer.nothing


def test_setting_weight_reaches_the_base_as_tying_does():
    layer, table = wrapped(nn.Linear(6, 10, bias=False)), nn.Embedding(10, 6)
    layer.weight = table.weight
    assert layer.base_layer.weight is table.weight and "weight" not in layer._parameters
    layer.merge()
    assert layer.base_layer.weight is not table.weight  # merging unties
    with pytest.raises(RuntimeError, match="merged"):
        layer.weight = table.weight
    layer.unmerge()
    assert layer.base_layer.weight is table.weight


@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_and_pickle(merged):
    layer = wrapped(PaddedConv(4, 6, 3))
    x = torch.randn(1, 4, 6, 6)
    if merged:
        layer.merge()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        if merged:
            other.unmerge()
            assert torch.equal(other.base_layer.weight, layer._original["weight"])
        assert all(a is not b for a, b in zip(layer.parameters(), other.parameters(), strict=True))


def test_state_dict_round_trip():
    layer, other = wrapped(nn.Conv2d(4, 6, 3)), wrapped(nn.Conv2d(4, 6, 3), seed=5)
    state = layer.state_dict()
    assert set(state) == {
        *("base_layer.weight", "base_layer.bias", "deltas.default.core"),
        *(f"deltas.default.factors.{m}" for m in range(4)),
    }
    other.load_state_dict(state)
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("merged", [False, True])
def test_cast_keeps_the_factors_in_float32(merged):
    layer = wrapped(nn.Linear(5, 7))
    if merged:
        layer.merge()
    core = layer.deltas["default"].core.clone()
    layer.to(torch.bfloat16)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in layer.deltas.parameters())
    assert torch.equal(layer.deltas["default"].core, core)
    if merged:
        layer.unmerge()
        assert layer.base_layer.weight.dtype == torch.bfloat16
    assert layer(torch.randn(3, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(p.dtype == torch.float64 for p in layer.double().deltas.parameters())


def test_a_state_is_the_same_merged_or_not_and_loads_into_either():
    x = torch.randn(1, 4, 6, 6)
    source = wrapped(nn.Conv2d(4, 6, 3))
    expected = source(x).detach()
    plain = copy.deepcopy(source.state_dict())
    source.merge()
    assert all(torch.equal(v, plain[k]) for k, v in source.state_dict().items())
    assert all(torch.equal(v, plain[k[2:]]) for k, v in nn.Sequential(source).state_dict().items())
    for merged in (False, True):
        other = wrapped(nn.Conv2d(4, 6, 3), seed=5)
        if merged:
            other.merge()
        nn.Sequential(other).load_state_dict({f"0.{k}": v for k, v in plain.items()})
        assert other.merged == merged
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
        if merged:
            other.unmerge()
        assert torch.equal(other.base_layer.weight, plain["base_layer.weight"])


def test_reading_metadata_computes_nothing_and_is_no_use_of_the_delta(monkeypatch):
    layer = wrapped(nn.Linear(5, 7))
    calls = []
    effective = flora.AdaptedLayer._effective
    monkeypatch.setattr(flora.AdaptedLayer, "_effective", lambda *a: calls.append(1) or effective(*a))
    weight = layer.weight
    assert isinstance(weight, torch.Tensor) and weight.dtype == torch.float32 and weight.device.type == "cpu"
    assert weight.shape == (7, 5) and weight.size(0) == 7 and weight.requires_grad and weight.is_floating_point()
    assert not calls and not layer.reached
    total = weight.sum() + (weight * 2).sum()
    assert calls == [1] and layer.reached
    total.backward()
    assert all(p.grad is not None for p in layer.deltas.parameters())
    with torch.no_grad():
        assert not layer.weight.requires_grad
        assert torch.equal(torch.stack([layer.weight])[0], layer.weight.clone())
    with pytest.raises(RuntimeError, match="values were not computed"), torch._C.DisableTorchFunctionSubclass():
        weight + 1


def test_device_move_takes_the_factors_along():
    layer = wrapped(nn.Linear(5, 7)).to("meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer(torch.empty(3, 5, device="meta")).shape == (3, 7)


def test_train_and_eval_reach_the_deltas():
    layer = flora.wrap(nn.Linear(5, 7), flora.TuckerConfig(rank=2, dropout=0.5))
    assert layer.eval().deltas["default"].dropout == 0.0 and layer.train().deltas["default"].dropout == 0.5


def test_several_adapters_add_up():
    layer = wrapped(nn.Linear(5, 7))
    layer.add_delta("second", flora.TuckerConfig(rank=2, scale=0.5))
    filled(layer)
    x = torch.randn(3, 5)
    weights = {n: d.delta_weight(layer.base_layer.weight) for n, d in layer.adapters()}
    base = layer.base_layer(x)
    for names in (["default"], ["second"], ["default", "second"], []):
        layer.set_active(names)
        torch.testing.assert_close(layer(x), base + sum((x @ weights[n].T for n in names), torch.zeros(())))
    layer.set_active(["default", "second"])
    expected = layer(x).detach()
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(RuntimeError, match="merged; unmerge first"):
        layer.set_active(["second"])
    with pytest.raises(RuntimeError, match="'second' is merged"):
        layer.delete_delta("second")
    layer.unmerge()
    layer.delete_delta("second")
    assert layer.active == ("default",)


def test_unload():
    base = nn.Linear(5, 7)
    x, weight = torch.randn(3, 5), base.weight
    layer = wrapped(base)
    expected = layer(x)
    layer.merge()
    assert layer.unload(merge=False) is base and base.weight is weight
    layer = wrapped(base)
    assert layer.unload(merge=True) is base and base.weight is not weight
    torch.testing.assert_close(base(x), expected.detach())


def test_only_the_named_parts_learn():
    for parts, learns in [
        (("core",), {"core"}),
        (("core", "out"), {"core", "factors.0"}),
        (("core", "in", "kernel"), {"core", "factors.1", "factors.2", "factors.3"}),
        (("core", "factors"), {"core", "factors.0", "factors.1", "factors.2", "factors.3"}),
    ]:
        layer = wrapped(nn.Conv2d(4, 6, 3), flora.TuckerConfig(rank=2, trainable=parts))
        delta = layer.deltas["default"]
        assert {n for n, p in delta.named_parameters() if p.requires_grad} == learns
        layer(torch.randn(1, 4, 6, 6)).sum().backward()
        assert {n for n, p in delta.named_parameters() if p.grad is not None} == learns


@pytest.mark.parametrize("init", ["reference", "orthogonal", "hosvd"])
def test_initialisations(init):
    base = nn.Conv2d(12, 20, 3)
    delta = flora.wrap(base, flora.TuckerConfig(rank=8, init=init)).deltas["default"]
    assert torch.count_nonzero(delta.core) == 0 and delta.ranks == (8, 8, 2, 2)
    for mode, factor in enumerate(delta.factors):
        if init == "reference":
            continue
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]), rtol=0, atol=1e-5)
        if init == "hosvd":
            unfolding = base.weight.movedim(mode, 0).flatten(1)
            left = torch.linalg.svd(unfolding).U[:, : factor.shape[1]]
            torch.testing.assert_close(factor @ factor.T, left @ left.T, rtol=0, atol=1e-4)
    if init == "reference":
        big = flora.wrap(nn.Linear(2000, 2000), flora.TuckerConfig(rank=16)).deltas["default"]
        for factor in big.factors:  # kaiming_normal, a = √3, fan_in = rank
            assert abs(factor.std().item() - (1 / 32) ** 0.5) < 0.01


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.ConvTranspose2d(4, 6, 3), "ConvTranspose2d cannot be adapted: ConvTranspose2d is not supported"),
        (nn.LSTM(4, 6), "LSTM is not a Linear"),
        (nn.LazyLinear(3), "no weight before its first forward"),
        (nn.BatchNorm2d(3), "BatchNorm2d cannot be adapted: TuckerConfig cannot adapt a BatchNorm2d: its weight has"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_layers_that_are_refused(module, message):
    with pytest.raises(TypeError, match=message):
        flora.wrap(module, CONFIG)
    assert refusal(module, CONFIG) is not None and refusal(nn.Linear(2, 3), CONFIG) is None


def test_what_all_means():
    products, norms = (nn.Linear(2, 3), nn.Conv1d(2, 3, 1), nn.MultiheadAttention(4, 2)), (nn.LayerNorm(3),)
    for config in (CONFIG, flora.CirculantConfig(), flora.StructuredAdapterConfig(), flora.RescaleConfig()):
        assert all(is_adaptable(module, config) for module in products)
        assert not any(is_adaptable(module, config) for module in (nn.Embedding(3, 2), nn.ReLU()))
        assert all(is_adaptable(module, config) == isinstance(config, flora.RescaleConfig) for module in norms)


def test_errors_name_the_module_and_change_nothing():
    layer = flora.layers.AdaptedLayer(nn.Linear(5, 7), name="encoder.fc")
    layer.add_delta("a", CONFIG)
    with pytest.raises(ValueError, match="encoder.fc: there is already an adapter named 'a'"):
        layer.add_delta("a", CONFIG)
    with pytest.raises(KeyError, match="encoder.fc: no adapter named 'b'"):
        layer.set_active(["b"])
    with pytest.raises(RuntimeError, match="encoder.fc cannot be merged: no adapter is active"):
        layer.merge()
    with pytest.raises(RuntimeError, match="encoder.fc is not merged"):
        layer.unmerge()
    layer.set_active(["a"])
    layer.merge()
    with pytest.raises(RuntimeError, match=r"adapters \['a'\] are merged already"):
        layer.merge()
    for name in ("", "a.b", "a/b", "keys", "..", "a b"):
        with pytest.raises(ValueError, match="adapter name"):
            layer.add_delta(name, CONFIG)
    with pytest.raises(ValueError, match="encoder.fc.*9"):
        layer.add_delta("c", flora.TuckerConfig(rank=(9, 2)))
    assert set(layer.deltas) == {"a"}
    with pytest.raises(TypeError, match="adapted already"):
        flora.wrap(layer, CONFIG)


def test_a_failed_wrap_leaves_the_layer_trainable():
    base = nn.Linear(5, 7)
    with pytest.raises(ValueError, match="rank"):
        flora.wrap(base, flora.TuckerConfig(rank=(8, 2)))
    assert all(p.requires_grad for p in base.parameters())


def test_load_tensors_checks_everything_before_it_copies():
    delta = flora.wrap(nn.Linear(5, 7), CONFIG).deltas["default"]
    good = {k: torch.randn_like(v) for k, v in delta.tensors().items()}
    before = copy.deepcopy(delta.tensors())
    nan = good | {"core": torch.full((4, 4), float("nan"))}
    for bad, error in [
        ({k: v for k, v in good.items() if k != "core"}, KeyError),
        (good | {"other": torch.ones(1)}, KeyError),
        (good | {"core": torch.ones(4, 3)}, ValueError),
        (nan, ValueError),
    ]:
        with pytest.raises(error):
            delta.load_tensors(bad)
        assert all(torch.equal(v, before[k]) for k, v in delta.tensors().items())
    delta.load_tensors(good)
    assert torch.equal(delta.core, good["core"])
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        delta.delta_weight(torch.empty(3, 3))


def test_wrong_input_raises_what_the_base_raises():
    for base, x in [
        (nn.Linear(5, 7), torch.ones(3, 4)),
        (nn.Conv2d(4, 6, 3), torch.ones(1, 3, 5, 5)),
        (nn.Conv2d(4, 6, 3), torch.ones(5)),
    ]:
        with pytest.raises(RuntimeError) as theirs:
            base(x)
        with pytest.raises(RuntimeError) as ours:
            flora.wrap(base, CONFIG)(x)
        assert type(ours.value) is type(theirs.value)


def test_patterns_select_nothing_on_a_layer_by_itself():
    config = flora.TuckerConfig(rank=2, rank_pattern={".*": 3}, scale_pattern={".*": 9.0})
    delta = flora.wrap(nn.Linear(5, 7), config).deltas["default"]
    assert delta.ranks == (2, 2) and delta.scale == 1.0
