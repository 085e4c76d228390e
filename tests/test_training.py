"""Parameter groups, clipping, the line on how training goes, and starts drawn from a seed."""

import re

import pytest
import torch
from torch import nn

import flora
from flora.training import adapter_norms


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.LayerNorm((6, 5, 5))
        self.body = nn.Linear(6, 8)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.body(x))


CONFIG = {
    "conv": flora.TuckerConfig(rank=3, modules_to_save=["head"]),
    "body": flora.LoRAConfig(rank=2),
}


def adapted(config=None, **options):
    torch.manual_seed(0)
    return flora.adapt(Net(), CONFIG if config is None else config, **options)


def step(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 5, generator=generator)
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()


def names_of(model, parameters):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


# Parameters that learn -----------------------------------------------------------------------------------------------


def test_trainable_parameters_are_all_that_learn_or_those_of_an_adapter():
    model = adapted()
    flora.add_adapter(model, flora.CirculantConfig(target_modules=["body"]), "other")
    flora.set_adapter(model, ["default", "other"])
    model.norm.weight.requires_grad_(True)
    learning = flora.trainable_parameters(model)
    assert names_of(model, learning) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(p.numel() for p in learning) == flora.summary(model).trainable_parameters
    assert names_of(model, flora.trainable_parameters(model, "other")) == [
        "body.deltas.other.a",
        "body.deltas.other.b",
    ]
    of_both = flora.trainable_parameters(model, ["default", "other"], named=True)
    assert {name for name, _ in of_both} == {name for name, p in model.named_parameters() if p.requires_grad} - {
        "norm.weight"
    }
    torch.optim.SGD(of_both, lr=0.1)
    with pytest.raises(ValueError, match="no adapter 'third'; there are 'default', 'other'"):
        flora.trainable_parameters(model, "third")


def test_groups_have_every_parameter_that_learns_once_and_by_what_it_is():
    model = adapted()
    model.norm.weight.requires_grad_(True)  # three-dimensional, and no decay all the same
    model.body.base_layer.weight.requires_grad_(True)
    groups = flora.parameter_groups(model, lr=1e-3, core_lr=4e-3, lora_b_lr=16e-3, weight_decay=0.1)
    assert {group["name"]: names_of(model, group["params"]) for group in groups} == {
        "core": ["conv.deltas.default.core"],
        "lora_b": ["body.deltas.default.factors.0"],
        "factors": [f"conv.deltas.default.factors.{i}" for i in range(4)] + ["body.deltas.default.factors.1"],
        "modules_to_save": ["head.copies.default.1.weight"],
        "modules_to_save, no decay": [f"head.copies.default.{n}" for n in ("0.weight", "0.bias", "1.bias")],
        "base": ["body.base_layer.weight"],
        "base, no decay": ["norm.weight"],
    }
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "core": (4e-3, 0.1),
        "lora_b": (16e-3, 0.1),
        "factors": (1e-3, 0.1),
        "modules_to_save": (1e-3, 0.1),
        "modules_to_save, no decay": (1e-3, 0.0),
        "base": (1e-3, 0.1),
        "base, no decay": (1e-3, 0.0),
    }


def test_lora_on_a_convolution_has_its_a_among_the_factors():
    groups = flora.parameter_groups(adapted({"conv": flora.LoRAConfig(rank=2), "body": flora.CirculantConfig()}))
    assert [group["name"] for group in groups] == ["lora_b", "factors", "others, no decay"]
    assert groups[1]["params"][0].shape == (2, 3, 3, 3)
    assert all("lr" not in group for group in groups)
    assert [group.get("weight_decay") for group in groups] == [None, None, 0.0]


def test_what_does_not_learn_is_in_no_group():
    model = adapted(flora.TuckerConfig(rank=2, trainable=("core",)))
    assert [group["name"] for group in flora.parameter_groups(model)] == ["core"]
    flora.add_adapter(model, flora.LoRAConfig(), "other")  # rests until it is chosen
    assert [group["name"] for group in flora.parameter_groups(model)] == ["core"]


def test_groups_follow_their_own_rates_and_a_schedule():
    model = adapted()
    groups = flora.parameter_groups(model, lr=0.0, core_lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step(model)
    optimizer.step()
    schedule.step()
    assert [name for name, p in model.named_parameters() if not torch.equal(p, before[name])] == [
        "conv.deltas.default.core"
    ]
    assert schedule.get_last_lr() == [0.05] + [0.0] * (len(groups) - 1)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.SGD])
def test_optimizers_take_the_groups_and_their_state_comes_back(optimizer):
    model = adapted()
    own = optimizer(flora.parameter_groups(model, lr=0.01, weight_decay=0.1))
    step(model)
    own.step()
    again = optimizer(flora.parameter_groups(model, lr=1.0))
    again.load_state_dict(own.state_dict())
    assert [g["name"] for g in again.param_groups] == [g["name"] for g in own.param_groups]
    assert [g["weight_decay"] for g in again.param_groups] == [g["weight_decay"] for g in own.param_groups]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "lr=-1 must be a finite number of 0 or more"),
        ({"core_lr": float("nan")}, "core_lr=nan"),
        ({"lr": True}, "lr=True"),
        ({"weight_decay": "0.1"}, "weight_decay='0.1'"),
        ({"lora_b_lr": 0.1}, "lora_b_lr=0.1: no parameter of Net that learns is a 'lora_b'"),
    ],
)
def test_numbers_that_cannot_be_are_errors(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        flora.parameter_groups(adapted(flora.TuckerConfig(rank=2)), **options)


def test_a_model_in_which_nothing_learns_has_no_groups():
    model = adapted()
    flora.set_adapter(model, "default", trainable=False)
    with pytest.raises(ValueError, match="nothing in Net learns"):
        flora.parameter_groups(model)


# Clipping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_is_of_the_adapters_alone(norm_type):
    model = adapted()
    model.norm.weight.requires_grad_(True)
    step(model)
    of_base = model.norm.weight.grad.clone()
    of_adapters = [p.grad.clone() for p in flora.trainable_parameters(model, "default")]
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in of_adapters]), norm_type)
    total = flora.clip_grad_norm_(model, float(expected) / 10, norm_type)
    torch.testing.assert_close(total, expected)
    assert torch.equal(model.norm.weight.grad, of_base)
    for p, before in zip(flora.trainable_parameters(model, "default"), of_adapters, strict=True):
        torch.testing.assert_close(p.grad, before / 10, rtol=1e-4, atol=1e-9)


def test_clipping_one_of_several_adapters():
    model = adapted()
    flora.add_adapter(model, flora.CirculantConfig(target_modules=["body"]), "other")
    flora.set_adapter(model, ["default", "other"])
    step(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    flora.clip_grad_norm_(model, 1e-3, name="other")
    changed = {n for n, p in model.named_parameters() if p.grad is not None and not torch.equal(p.grad, before[n])}
    assert changed and all(".other." in name for name in changed)


def test_clipping_tells_of_gradients_that_are_not_finite_and_of_no_adapters():
    model = adapted()
    step(model)
    flora.trainable_parameters(model)[0].grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        flora.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="Net has no adapters"):
        flora.clip_grad_norm_(Net(), 1.0)


def test_without_gradients_the_norm_is_zero():
    assert flora.clip_grad_norm_(adapted(), 1.0) == 0


# The line ------------------------------------------------------------------------------------------------------------


def test_a_line_tells_loss_speed_share_norms_and_what_else_is_given():
    model = adapted()
    line = flora.ProgressLine(model)
    norm = torch.cat([p.detach().flatten() for p in flora.trainable_parameters(model)]).norm()
    share = 100 * flora.summary(model).share
    text = line(torch.tensor(0.25, requires_grad=True), examples=64, lr=0.001)
    pattern = rf"loss 0\.25, \S+ examples/s, {share:.3g} % learns, norm {norm:.4g}, lr 0\.001"
    assert re.fullmatch(pattern, text), text
    assert "\n" not in text


def test_a_line_names_the_adapters_in_use_and_follows_them():
    model = adapted()
    flora.add_adapter(model, flora.CirculantConfig(target_modules=["body"]), "other")
    line = flora.ProgressLine(model)
    assert adapter_norms(model).keys() == {"default"}
    flora.set_adapter(model, ["default", "other"])
    norms = adapter_norms(model)
    assert line() == (
        f"{100 * flora.summary(model).share:.3g} % learns, norm default {norms['default']:.4g}, "
        f"norm other {norms['other']:.4g}"
    )
    flora.set_adapter(model, "default", trainable=False)
    assert line() == "0 % learns"


def test_speed_is_counted_from_call_to_call(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    line = flora.ProgressLine(adapted())
    for seconds, examples, speed in ((2.0, 10, "5"), (0.5, 100, "200")):
        now[0] += seconds
        assert line(examples=examples).startswith(f"{speed} examples/s, ")


# Starts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["reference", "orthogonal"])
def test_a_seed_draws_what_manual_seed_would_and_leaves_the_generator(init):
    config = flora.TuckerConfig(rank=3, init=init)
    base = Net().state_dict()

    def start(seed=None):
        model = Net()
        model.load_state_dict(base)
        torch.manual_seed(7)
        flora.adapt(model, config, seed=seed)
        return flora.trainable_parameters(model), torch.rand(3)

    own, after = start(7)[0], start(7)[1]
    assert all(torch.equal(p, q) for p, q in zip(own, start()[0], strict=True))
    assert torch.equal(after, torch.manual_seed(7) and torch.rand(3))
    assert not all(torch.equal(p, q) for p, q in zip(own, start(8)[0], strict=True))


def test_a_further_adapter_has_a_seed_of_its_own():
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = adapted()
        torch.manual_seed(seed)
        flora.add_adapter(model, flora.LoRAConfig(rank=2), "other", seed=5)
        models.append(model)
    flora.set_adapter(models[0], "other")
    flora.set_adapter(models[1], "other")
    one, other = (flora.trainable_parameters(model) for model in models)
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "0"])
def test_a_seed_that_is_none_is_an_error(seed):
    model = Net()
    with pytest.raises(ValueError, match=re.escape(f"seed={seed!r} must be an integer from 0 to")):
        flora.adapt(model, CONFIG, seed=seed)
    assert not any(isinstance(module, flora.AdaptedLayer) for module in model.modules())
