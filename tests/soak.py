"""A soak: adapters come, learn, are mixed, merged, saved, loaded and go, at random, on three networks beside twins.

The twin is the frozen network in float64, called with W + Σ s·ΔW of dense matrices, which are computed here from the
adapters' tensors. After every operation the model's state must be the one expected, tensors and base bit for bit, and
its output the twin's. So must a training step's gradients; the twin then takes the new numbers over, so that rounding
does not add up.

How far the model may be away is measured: a few times as far as the same network with the same dense weights is in
plain PyTorch and in the model's own dtype.

    python tests/soak.py --minutes 20        # episodes one after another, on each network in turn
    python tests/soak.py --seed 7 --episodes 1 --network vit      # one of them again, as a mismatch prints it
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import math
import pickle
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import high_water
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import flora
from flora.model import adapted_layers

OPERATIONS = 40  # of an episode
WARM = 20  # seeds by which allocators and the caches of PyTorch's libraries have what they need
GROWTH = 24  # megabytes that the process may grow by after as many again
MOST_ADAPTERS = 4
TIMES = 10  # as far away as plain PyTorch, and so many unit roundoffs of the norm: a transform rounds more than sums do


class MismatchError(AssertionError):
    """The model is not what the twin says."""


# Networks -----------------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Ordinary, depthwise, grouped and 1×1 convolutions, with strides, paddings and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4)
        self.point = nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = nn.functional.gelu(self.grouped(x + self.depthwise(x)))
        return self.head(self.point(x).relu().mean((2, 3)))


class Logits(nn.Module):
    """A model of transformers' that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def vision() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=5, **sizes)
    return Logits(transformers.ViTForImageClassification(config))


def decoder() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=23, num_key_value_heads=2, use_cache=False, **sizes)
    return Logits(transformers.LlamaForCausalLM(config))


FACTORED = (
    flora.TuckerConfig(rank=3, scale=0.7),
    flora.TuckerConfig(rank=4, kernel_rank=2, alpha=2.0, plan="merged"),
    flora.LoRAConfig(rank=3),
    flora.LoRAXSConfig(rank=3),
)
MATRICES = (flora.CirculantConfig(scale=0.3), flora.ToeplitzConfig(scale=0.3))
MIXED = {"up_proj": flora.KroneckerConfig(rank=2), "down_proj": flora.RescaleConfig(bias=False), "all": FACTORED[0]}


@dataclass(frozen=True)
class Network:
    build: object
    configs: tuple[object, ...]
    image: int | None
    """Its extent, or None for a text."""
    base_dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.base_dtype or torch.float32

    def base(self) -> nn.Module:
        """The same at every call."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = self.build().eval()
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):  # not so small that a missing bias could hide
                    nn.init.normal_(module.weight, std=0.7 / math.sqrt(module.weight[0].numel()))
                    if module.bias is not None:
                        nn.init.normal_(module.bias, std=0.3)
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
        return model

    def inputs(self, batch: int) -> Tensor:
        if self.image is None:
            return torch.randint(23, (batch, random.Random(batch).randint(2, 9)))
        return torch.randn(batch, 3, self.image, self.image)


NETWORKS = {
    "convolutions": Network(
        Convolutions,
        (
            *FACTORED,
            *MATRICES,
            flora.KroneckerConfig(rank=2, target_modules=["point", "head"]),
            flora.RescaleConfig(target_modules=["stem", "grouped", "head"], init="reference", scale=0.2),
        ),
        image=10,
    ),
    "vit": Network(
        vision,
        (
            *FACTORED,
            *MATRICES,
            flora.LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"]),
            flora.KroneckerConfig(rank=4, target_modules=["q_proj", "k_proj", "o_proj"]),
            flora.RescaleConfig(target_modules=["classifier", "projection"]),
        ),
        image=8,
    ),
    "decoder": Network(
        decoder,
        (
            *FACTORED,
            *MATRICES,
            {
                "up_proj": flora.KroneckerConfig(rank=2),
                "down_proj": flora.RescaleConfig(bias=False),
                "all": FACTORED[0],
            },
        ),
        image=None,
        base_dtype=torch.bfloat16,
    ),
}


# The twin -----------------------------------------------------------------------------------------------------------


def dense(method: str, t: dict[str, Tensor], weight: Tensor) -> Tensor:
    """ΔW without its scale, by the definitions of docs/methods.md."""
    d_out, *rest = weight.shape
    d_in = math.prod(rest)
    if method in ("tucker", "lora", "lora-xs"):
        factors = [t[f"factors.{m}"] for m in range(sum(key.startswith("factors") for key in t))]
        if t.get("core") is None:
            return factors[0] @ factors[1].T
        delta = t["core"]
        for mode, factor in enumerate(factors):
            delta = torch.tensordot(factor, delta, ([1], [mode])).movedim(0, mode)
        return delta
    if method == "kronecker":
        return torch.kron(t["b"], t["a"]).reshape(weight.shape)
    if method == "rescale":
        return weight * (t["row"][:, None] * t["column"]).reshape(d_out, rest[0], *[1] * len(rest[1:]))
    n = max(d_out, d_in)
    difference = torch.arange(n)[:, None] - torch.arange(n)
    if method == "circulant":
        matrix = (t["a"] * t["b"])[difference % n]
    elif method == "toeplitz":
        matrix = t["b"][difference.abs()] @ t["a"][difference.abs()]
    return matrix[:d_out, :d_in].reshape(weight.shape)


Key = tuple[str, str, str]  # adapter, layer, tensor


@dataclass
class Expected:
    """What an adapter is: of each layer its method, scale and tensors."""

    methods: dict[str, str]
    scales: dict[str, float]
    tensors: dict[tuple[str, str], Tensor]
    learning: frozenset[tuple[str, str]]
    """Those of the tensors that its configuration lets learn."""


class Twin:
    def __init__(self, network: Network) -> None:
        self.state = network.base().state_dict()
        if network.base_dtype is not None:
            reference = flora.adapt(network.base(), FACTORED[0], base_dtype=network.base_dtype)
            self.state = {key: tensor.clone() for key, tensor in frozen_state(reference).items()}
        self.exact = network.base()
        self.exact.load_state_dict(self.state)
        self.rough = copy.deepcopy(self.exact)
        computed = {name: b.clone() for name, b in self.exact.named_buffers() if name not in self.state}
        for model, dtype in ((self.exact, torch.float64), (self.rough, network.dtype)):
            model.to(dtype)
            for name, buffer in computed.items():  # rotary frequencies stay what they are
                owner, _, key = name.rpartition(".")
                model.get_submodule(owner)._buffers[key] = buffer.clone()
        self.adapters: dict[str, Expected] = {}
        self.active: dict[str, float] = {}
        self.learning: set[str] = set()

    def call(
        self, model: nn.Module, x: Tensor, tensors: dict[tuple[str, str, str], Tensor], adapters: object
    ) -> Tensor:
        """The plain network with the dense weights, computed in float64 and rounded to the network's dtype."""
        own, changed = dict(self.exact.named_parameters()), {}
        for name, strength in adapters.items():
            expected = self.adapters[name]
            for layer, method in expected.methods.items():
                weight, bias = own[f"{layer}.weight"].detach(), own.get(f"{layer}.bias")
                t = {key: tensors[name, layer, key] for at, key in expected.tensors if at == layer}
                delta = strength * expected.scales[layer] * dense(method, t, weight)
                changed[f"{layer}.weight"] = changed.get(f"{layer}.weight", weight) + delta
                if "shift" in t:
                    changed[f"{layer}.bias"] = changed.get(f"{layer}.bias", bias.detach()) + strength * t["shift"]
        dtype = next(model.parameters()).dtype
        x = x.to(dtype) if x.is_floating_point() else x
        return functional_call(model, {key: value.to(dtype) for key, value in changed.items()}, (x,))

    def leaves(self) -> dict[Key, Tensor]:
        """Every tensor in float64; those that learn ask for gradients."""
        return {
            (name, layer, key): tensor.double().requires_grad_(
                name in self.learning and name in self.active and (layer, key) in adapter.learning
            )
            for name, adapter in self.adapters.items()
            for (layer, key), tensor in adapter.tensors.items()
        }


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {key.replace(".base_layer", ""): value for key, value in state.items() if ".deltas." not in key}


def close(what: str, found: Tensor, exact: Tensor, rough: Tensor, dtype: torch.dtype, scale: float = 0.0) -> None:
    """Raises MismatchError unless ``found`` is about as near to ``exact`` as ``rough`` is."""
    found, rough = found.double(), rough.double()
    size = max(float(exact.norm()), scale)
    bound = TIMES * (float((rough - exact).norm()) + torch.finfo(dtype).eps / 2 * size)
    error = float((found - exact).norm())
    if not error <= bound:
        raise MismatchError(
            f"{what} is {error:.3g} away, {bound:.3g} is allowed; its norm is {float(exact.norm()):.3g}"
        )


# Episodes -----------------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One model from its first adapter on. Everything that it does follows from the network's name and the seed."""

    name: str
    seed: int
    log: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    merged: bool = False
    made: int = 0

    def __post_init__(self) -> None:
        self.network = NETWORKS[self.name]
        self.random = random.Random(f"{self.name} {self.seed}")
        self.twin = twin_of(self.name)
        self.twin.adapters, self.twin.active, self.twin.learning = {}, {}, set()
        self.model = self.network.base()

    def run(self, operations: int = OPERATIONS, until: float = math.inf) -> None:
        """Raises MismatchError, with how to run it again, whatever went wrong.

        ``until``: on the monotonic clock.
        """
        torch.manual_seed(self.seed)
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.folder = Path(folder)
                while self.counts["outputs compared"] < operations and time.monotonic() < until:
                    self.step()
        except Exception as error:
            again = f"python tests/soak.py --seed {self.seed} --episodes 1 --network {self.name}"
            raise MismatchError("\n".join([str(error), f"again: {again}", "operations:", *self.log])) from error

    def step(self) -> None:
        operation = self.random.choices(list(CHOICES), list(CHOICES.values()))[0]
        if not self.twin.adapters:
            operation = "add"
        self.counts[operation] += bool(getattr(self, operation)())
        self.check()

    def say(self, text: str) -> bool:
        self.log.append(f"{len(self.log)}: {text}")
        return True

    def some(self) -> list[str]:
        names = list(self.twin.adapters)
        return self.random.sample(names, self.random.randint(1, len(names)))

    # What must hold --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """The state, and the output on a batch of its own."""
        self.check_state(self.model)
        with torch.inference_mode() if self.random.random() < 0.3 else torch.no_grad():
            self.check_output("the output", self.model, self.twin.active)
        self.counts["outputs compared"] += 1

    def check_state(self, model: nn.Module) -> None:
        twin = self.twin
        for key, tensor in frozen_state(model).items():
            if not torch.equal(tensor, twin.state[key]):
                raise MismatchError(f"the base's {key} has changed")
        layers = adapted_layers(model)
        found = {
            (name, layer, key): tensor
            for layer, module in layers.items()
            for name, delta in module.adapters()
            for key, tensor in delta.tensors().items()
        }
        wanted = {(name, *at): tensor for name, own in twin.adapters.items() for at, tensor in own.tensors.items()}
        if found.keys() != wanted.keys():
            raise MismatchError(f"tensors are missing or left over: {sorted(found.keys() ^ wanted.keys())}")
        changed = [key for key in found if not torch.equal(found[key], wanted[key])]
        if changed:
            raise MismatchError(f"tensors have changed: {changed}")
        for layer, module in layers.items():
            active = [name for name in twin.active if layer in twin.adapters[name].methods]
            if list(module.active) != active or module.merged != (self.merged and bool(active)):
                raise MismatchError(f"{layer}: {module.active} are active, merged={module.merged}; expected {active}")
            for name, delta in module.adapters():
                pair = delta.scale, delta.strength
                if pair != (twin.adapters[name].scales[layer], twin.active.get(name, 1.0)):
                    raise MismatchError(f"{layer}, {name}: scale and strength {pair}")

    def check_output(self, what: str, model: nn.Module, adapters: dict[str, float]) -> None:
        x = self.network.inputs(self.random.randint(1, 4))
        tensors = {key: tensor.detach() for key, tensor in self.twin.leaves().items()}
        exact, rough = (self.twin.call(m, x, tensors, adapters) for m in (self.twin.exact, self.twin.rough))
        given = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
        close(what, model.eval()(given), exact, rough, self.network.dtype)

    # Operations: each says what it does, or does nothing and returns False -------------------------------------------

    def add(self) -> bool:
        if self.merged or len(self.twin.adapters) == MOST_ADAPTERS:
            return False
        config, name = self.random.choice(self.network.configs), f"a{self.made}"
        drawn, seed = self.random.random() < 0.8, self.random.randrange(1000)
        self.made += 1
        first = not self.twin.adapters
        self.say(f"add {name}: {config}, seed {seed}{', at random' if drawn else ''}")
        if first:
            flora.adapt(self.model, config, name, base_dtype=self.network.base_dtype, seed=seed)
            self.twin.active, self.twin.learning = {name: 1.0}, {name}
        else:
            flora.add_adapter(self.model, config, name, seed=seed)
        if drawn:
            with torch.no_grad():
                for layer in adapted_layers(self.model).values():
                    if name in layer.deltas:
                        for parameter in layer.deltas[name].parameters():
                            parameter.normal_(std=0.3)
        self.twin.adapters[name] = self.recorded(name)
        return True

    def recorded(self, name: str) -> Expected:
        layers = {at: layer.deltas[name] for at, layer in adapted_layers(self.model).items() if name in layer.deltas}
        probe = copy.deepcopy(nn.ModuleList(layers.values()))
        for delta in probe:
            delta.set_trainable(True)
        return Expected(
            {at: delta.config.method for at, delta in layers.items()},
            {at: delta.scale for at, delta in layers.items()},
            {(at, key): tensor.clone() for at, delta in layers.items() for key, tensor in delta.tensors().items()},
            frozenset(
                (at, key)
                for at, delta in zip(layers, probe, strict=True)
                for key, parameter in delta.named_parameters()
                if parameter.requires_grad
            ),
        )

    def delete(self) -> bool:
        kept = 1 if self.network.base_dtype is not None else 0  # unloaded, that base would be another
        if self.merged or len(self.twin.adapters) <= kept:
            return False
        name = self.random.choice(list(self.twin.adapters))
        self.say(f"delete {name}")
        flora.delete_adapter(self.model, name)
        del self.twin.adapters[name]
        self.twin.active.pop(name, None)
        self.twin.learning.discard(name)
        return True

    def activate(self) -> bool:
        if self.merged:
            return False
        names = self.some()
        mixed = self.random.random() < 0.5
        weights = {name: self.random.choice((0.5, -1.0, 2.0, 0.0)) if mixed else 1.0 for name in names}
        trainable = self.random.choice((True, True, False, self.some()))
        self.say(f"activate {weights}, trainable={trainable}")
        flora.set_adapter(self.model, weights if mixed else names, trainable=trainable)
        self.twin.active = weights
        self.twin.learning = set(names if trainable is True else trainable or ())
        return True

    def rescale(self) -> bool:
        if self.merged:
            return False
        name, factor = self.random.choice(list(self.twin.adapters)), self.random.choice((0.25, 0.5, 1.0, -0.5))
        self.say(f"every scale of {name}: {factor}")
        for layer in adapted_layers(self.model).values():
            if name in layer.deltas:
                layer.deltas[name].scale = factor
        self.twin.adapters[name].scales = dict.fromkeys(self.twin.adapters[name].scales, factor)
        return True

    def train(self) -> bool:
        twin, leaves = self.twin, self.twin.leaves()
        learn = [key for key, leaf in leaves.items() if leaf.requires_grad]
        if self.merged or not learn:
            return False
        x = self.network.inputs(self.random.randint(1, 5))
        x.requires_grad_(x.is_floating_point())
        again = self.random.choice((None, None, None, False, True))
        if again and not x.requires_grad:
            again = False  # the reentrant kind goes by its inputs
        self.say(f"train on {len(x)}{'' if again is None else f', checkpointed, use_reentrant={again}'}")
        model = self.model.train()
        model.zero_grad(set_to_none=True)
        found = model(x) if again is None else checkpoint(model, x, use_reentrant=again)
        target = torch.randn(found.shape)
        (found.float() - target).square().mean().backward()

        def plain(network: nn.Module, real: torch.dtype) -> list[Tensor]:
            y = twin.call(network, x, leaves, twin.active)
            inputs = [leaves[key] for key in learn] + [x] * x.requires_grad
            loss = (y.to(real) - target).square().mean()
            return [y.detach(), *torch.autograd.grad(loss, inputs, materialize_grads=True)]

        exact, rough = plain(twin.exact, torch.float64), plain(twin.rough, torch.float32)
        layers, dtype = adapted_layers(model), self.network.dtype
        parameters = {
            (name, at, key): parameter
            for at, layer in layers.items()
            for name, delta in layer.adapters()
            for key, parameter in delta.named_parameters()
        }
        close("the output", found.detach(), exact[0], rough[0], dtype)
        whole = math.sqrt(sum(float(grad.double().square().sum()) for grad in exact[1 : 1 + len(learn)]))
        grads = [parameters[key].grad for key in learn] + [x.grad] * x.requires_grad
        for key, grad, one, other in zip([*learn, "x"], grads, exact[1:], rough[1:], strict=False):
            grad = torch.zeros_like(one) if grad is None else grad
            close(f"the gradient of {key}", grad, one.double(), other, dtype, 0.0 if key == "x" else whole)
        learned = {id(parameters[key]) for key in learn}
        left = [key for key, one in model.named_parameters() if one.grad is not None and id(one) not in learned]
        if left:
            raise MismatchError(f"gradients of what does not learn: {left}")
        with torch.no_grad():
            for name, at, key in learn:
                parameter = parameters[name, at, key]
                if parameter.grad is not None:
                    parameter.mul_(0.97).sub_(0.3 / (whole + 1e-6) * parameter.grad)
                twin.adapters[name].tensors[at, key] = parameter.detach().clone()
        self.counts["gradients compared"] += len(learn)
        return True

    def merge(self) -> bool:
        if self.merged or not self.twin.active:
            return False
        self.say("merge")
        flora.merge(self.model)
        self.merged = True
        return True

    def unmerge(self) -> bool:
        if not self.merged:
            return False
        self.say("unmerge")
        flora.unmerge(self.model)
        self.merged = False
        return True

    def disable(self) -> bool:
        self.say("disabled")
        with torch.no_grad(), flora.disabled(self.model):
            self.check_output("the output without adapters", self.model, {})
        return True

    def save(self) -> bool:
        """Each adapter by itself, into a model that has just been made."""
        name = self.random.choice(list(self.twin.adapters))
        hashes = self.random.random() < 0.5
        self.say(f"save {name}, hashes={hashes}, and load it")
        flora.save_adapter(self.model, self.folder / "one", name, hashes=hashes)
        other = self.network.base()
        flora.load_adapter(other, self.folder / "one", name, base_dtype=self.network.base_dtype)
        with torch.no_grad():
            self.check_output("the output of what was loaded", other, {name: 1.0})
        return True

    def move(self) -> bool:
        """All adapters by files into a new model, with which it goes on."""
        if self.merged or not self.twin.active:
            return False
        self.say("save all, load them into a new model and go on with that")
        names = list(self.twin.adapters)
        flora.save_adapter(self.model, self.folder / "all", names)
        other = self.network.base()
        for name in names:
            flora.load_adapter(other, self.folder / "all" / name, name, base_dtype=self.network.base_dtype)
        flora.set_adapter(other, self.twin.active, trainable=sorted(self.twin.learning) or False)
        self.model = other
        for path in (self.folder / "all").iterdir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        return True

    def copy(self) -> bool:
        how = self.random.choice(("deepcopy", "pickle"))
        self.say(f"go on with a copy, by {how}")
        self.model = copy.deepcopy(self.model) if how == "deepcopy" else pickle.loads(pickle.dumps(self.model))
        return True

    def reload(self) -> bool:
        self.say("state_dict, other numbers, load_state_dict")
        state = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        with torch.no_grad():
            for layer in adapted_layers(self.model).values():
                for parameter in layer.deltas.parameters():
                    parameter.add_(1.0)
        self.model.load_state_dict(state)
        return True

    def unload(self) -> bool:
        """Of a copy."""
        merge = self.random.random() < 0.5
        self.say(f"unload a copy, merge={merge}")
        plain = flora.unload(copy.deepcopy(self.model), merge=merge)
        if any("deltas" in key for key in plain.state_dict()):
            raise MismatchError("unload has left deltas")
        with torch.no_grad():
            self.check_output("the output of what was unloaded", plain, self.twin.active if merge else {})
        return True

    def threads(self) -> bool:
        number = self.random.choice((1, 2, 3))
        self.say(f"{number} threads")
        torch.set_num_threads(number)
        return True

    def refused(self) -> bool:
        """What is refused changes nothing."""
        name = next(iter(self.twin.adapters))
        calls = {
            "delete what is not there": lambda: flora.delete_adapter(self.model, "none"),
            "a name twice": lambda: flora.add_adapter(self.model, FACTORED[0], name),
            "a weight of nan": lambda: flora.set_adapter(self.model, {name: math.nan}),
            "a rank too large": lambda: flora.add_adapter(self.model, flora.TuckerConfig(rank=(99, 99)), "large"),
            "load what is not there": lambda: flora.load_adapter(self.model, self.folder / "none", "new"),
        }
        if self.merged:
            calls |= {
                "merge twice": lambda: flora.merge(self.model),
                "delete while merged": lambda: flora.delete_adapter(self.model, name),
                "activate while merged": lambda: flora.set_adapter(self.model, name),
                "add while merged": lambda: flora.add_adapter(self.model, FACTORED[0], "new"),
            }
        else:
            calls["unmerge"] = lambda: flora.unmerge(self.model)
        what = self.random.choice(list(calls))
        self.say(f"refused: {what}")
        try:
            calls[what]()
        except (ValueError, TypeError, RuntimeError, OSError):
            return True
        raise MismatchError(f"it was not refused: {what}")


CHOICES = {
    "train": 10,
    "add": 4,
    "activate": 4,
    "merge": 4,
    "unmerge": 5,
    "delete": 2,
    "rescale": 2,
    "save": 2,
    "move": 1,
    "copy": 2,
    "reload": 2,
    "unload": 2,
    "disable": 2,
    "threads": 1,
    "refused": 2,
}


def held() -> tuple[int, float | None]:
    """Tensors that Python knows, and the most megabytes that the process has had."""
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects()), high_water.megabytes()


@functools.cache
def twin_of(name: str) -> Twin:
    return Twin(NETWORKS[name])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="adapters at random on three networks, beside plain twins")
    parser.add_argument("--minutes", type=float, default=20, help="how long, unless --episodes says how many")
    parser.add_argument("--episodes", type=int, help=f"how many, of {OPERATIONS} operations each, on every network")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode; the next ones count on")
    parser.add_argument("--network", choices=NETWORKS, help="one of them alone")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    counts, seed, history = Counter(), options.seed, []
    while seed < options.seed + options.episodes if options.episodes is not None else time.monotonic() < end:
        for name in [options.network] if options.network else NETWORKS:
            episode = Episode(name, seed)
            try:
                episode.run(until=end if options.episodes is None else math.inf)
            except MismatchError as error:
                print(error)
                return 1
            counts += episode.counts
            episode.twin.adapters = {}
            del episode
        history.append(held())
        seed += 1
    operations = {name: counts[name] for name in CHOICES}
    print(f"seeds {options.seed} to {seed - 1}: {sum(operations.values())} operations, all as the twins'")
    print(", ".join(f"{name} {count}" for name, count in operations.items()))
    print(", ".join(f"{count} {name}" for name, count in counts.items() if name not in operations))
    return left_over(history)


def left_over(history: list[tuple[int, float | None]]) -> int:
    """The exit status, by what was `held` after each seed."""
    tensors = [number for number, _ in history]
    if tensors and max(tensors) > tensors[0]:
        print(f"{max(tensors) - tensors[0]} tensors are left of episodes that are over")
        return 1
    if len(history) < 2 * WARM or history[-1][1] is None:
        print(f"no tensor is left; growth is not judged before {2 * WARM} seeds, nor where the system does not tell it")
        return 0
    grown = history[-1][1] - history[WARM - 1][1]
    print(f"no tensor is left; the process has grown by {grown:.1f} MB since the {WARM}th seed, {GROWTH} are allowed")
    return int(grown >= GROWTH)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
