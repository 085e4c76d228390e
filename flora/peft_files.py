"""Adapters as Hugging Face PEFT's ``save_pretrained`` writes them: what such a folder means, and how to write one.

``adapter_config.json`` has PEFT's ``LoraConfig``. ``adapter_model.safetensors`` (in old folders a pickled
``adapter_model.bin``) has the tensors ``base_model.model.<module>.lora_A.weight`` (r, d_in) and ``lora_B.weight``
(d_out, r), of convolutions (r, d_in, k…) and (d_out, r, 1…), of embeddings ``lora_embedding_A`` (r, num) and
``lora_embedding_B`` (dim, r). Here that is a `LoRADelta`. `flora.integrations.peft` has PEFT write the tensors of a
`TuckerDelta`, ``<module>.flora_delta.core`` and so on. Nothing of the ``peft`` package itself is needed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flora import reference
from flora.config import DeltaConfig, LoRAConfig, TuckerConfig, is_suffix
from flora.config.base import Rank, is_int, is_real
from flora.deltas.tucker import Factored, TuckerDelta
from flora.distributed import whole
from flora.kinds import CONV, EMBEDDING, TRANSPOSED, kind_of
from flora.layers import AdaptedLayer
from flora.parameters import AdaptedModule
from flora.saved import SavedModule
from flora.targets import distinct, inside, near_misses, places

PREFIX = "base_model.model."

_KEY = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(\.weight)?")
_TUCKER_KEY = re.compile(r"(.+)\.flora_delta\.(core|factors\.\d+)")
_MEANT = {"peft_type", "r", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"}
_MEANT_BY_LORA = _MEANT | {"lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "fan_in_fan_out"}
_MEANT_BY_TUCKER = _MEANT | {
    *("kernel_rank", "alpha", "scale", "scale_pattern", "dropout", "init_weights", "trainable", "plan"),
}
_WITHOUT_EFFECT = {  # on an adapter that is there
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config"),
    *("megatron_core", "qalora_group_size", "eva_config"),
}
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Translation:
    """What a PEFT folder means in a model."""

    config: DeltaConfig | dict[str, DeltaConfig]
    """A mapping of patterns where some layers take no dropout."""
    layers: dict[str, tuple[DeltaConfig, str]]
    """Of each layer by name: its own configuration, and the pattern that it matches."""
    saved: list[str]
    """The modules of ``modules_to_save``."""
    tensors: dict[str, Tensor]
    """As an `AdapterFile` has them."""


# Reading -----------------------------------------------------------------------------------------------------------


def translate(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    base: Mapping[str, Tensor],
) -> Translation:
    """Find what a folder means in a model.

    Args:
        config: the parsed ``adapter_config.json``.
        tensors: of the other file, by name.
        modules: of the unadapted model, by name.
        base: its tensors, by name: a file may repeat them (PEFT adds embeddings), but not change them.

    Raises:
        ValueError: a field of the configuration that LoRA or FLoRA on these layers cannot mean, quoted; a key, shape or
            type that does not fit, naming the module.
    """
    fields = _TuckerFields(config) if config.get("peft_type") == "FLORA" else _LoRAFields(config)
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = fields.key.fullmatch(name)
        if match is None or not fields.is_own(match):
            others[name] = tensor
        else:
            parts.setdefault(match[1], {})[match[2]] = tensor
    if not parts:
        raise ValueError(f"there is no tensor <module>.{fields.first}")
    found: dict[str, Tensor] = {}
    ranks: dict[str, Rank] = {}
    scales: dict[str, float] = {}
    for where, of_layer in parts.items():
        fields.check(where, modules)
        if where not in modules:
            raise ValueError(
                f"the model has no module {where!r}{near_misses(where, [name for name in modules if name])}"
            )
        ranks[where], scales[where] = fields.rank_and_scale(where, of_layer)
        for key, tensor in fields.as_delta(where, modules[where], of_layer).items():
            found[f"{where}.{key}"] = tensor
    saved = _saved(fields.modules_to_save, others, modules)
    for name, tensor in others.items():
        plain = name.replace(".base_layer.", ".")
        if inside(name, saved):
            found[name] = tensor
        elif plain not in base or not torch.equal(base[plain].detach().cpu().to(tensor.dtype), tensor.cpu()):
            raise ValueError(f"{name!r} is neither of {fields.name} nor of modules_to_save, and not the model's own")
    return _configured(fields, modules, ranks, scales, saved, found)


def _configured(
    fields: _Fields,
    modules: Mapping[str, nn.Module],
    ranks: Mapping[str, Rank],
    scales: Mapping[str, float],
    saved: list[str],
    tensors: dict[str, Tensor],
) -> Translation:
    """The configuration that gives every layer its rank, scale and dropout."""
    common = replace(fields.common, modules_to_save=saved or None)
    undropped = [name for name in ranks if common.dropout > 0 and not kind_of(modules[name]).droppable]
    groups = [(common.dropout, [name for name in ranks if name not in undropped]), (0.0, undropped)]
    configs: dict[str, DeltaConfig] = {}
    layers: dict[str, tuple[DeltaConfig, str]] = {}
    for dropout, names in groups:
        if not names:
            continue
        own = replace(
            common,
            dropout=dropout,
            rank_pattern={re.escape(n): ranks[n] for n in names if ranks[n] != fields.common_rank(modules[n])},
        )
        other_scales = {name: scales[name] for name in names if own.for_module(name).resolved_scale != scales[name]}
        own = replace(own, scale_pattern={re.escape(name): scale for name, scale in other_scales.items()})
        pattern = "|".join(map(re.escape, names)) if undropped else ""
        configs[pattern] = own if undropped else replace(own, target_modules=tuple(names))
        layers.update({name: (own.for_module(name), pattern) for name in names})
    config = configs if undropped else configs[""]
    return Translation(config, {name: layers[name] for name in ranks}, saved, tensors)


class _Fields:
    """The configuration of one of PEFT's methods, checked."""

    name: ClassVar[str]
    key: ClassVar[re.Pattern[str]]
    """Of a tensor without `PREFIX`: the module and the part."""
    first: ClassVar[str]
    """The part that each adapted layer has."""
    meant: ClassVar[set[str]]
    """The fields that are understood."""

    common: DeltaConfig

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        if config.get("bias", "none") != "none":
            self._fail("bias", "trains biases of the base; only none can be read")
        for name, value in config.items():
            if name not in self.meant | _WITHOUT_EFFECT and value:
                self._fail(name, f"is not plain {self.name}")
        self._ranks = self._patterns("rank_pattern", self._rank)
        saved = config.get("modules_to_save") or []
        if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
            self._fail("modules_to_save", "must name modules")
        self.modules_to_save: list[str] = saved

    def _fail(self, name: str, rule: str, *value: Any) -> NoReturn:
        raise ValueError(f"{name}={value[0] if value else self._config.get(name)!r} {rule}")

    def _rank(self, name: str, value: Any) -> Rank:
        raise NotImplementedError

    def is_own(self, match: re.Match[str]) -> bool:
        """Whether a name that has the form of `key` is that of a tensor of the method."""
        return True

    def check(self, where: str, modules: Mapping[str, nn.Module]) -> None:
        """Raises ValueError for a module on which PEFT's method is no update of the weight."""

    def common_rank(self, module: nn.Module) -> Rank:
        """The rank that `common` gives to a module."""
        raise NotImplementedError

    def rank_and_scale(self, where: str, parts: Mapping[str, Tensor]) -> tuple[Rank, float]:
        """Of one module: the first pattern that ends its name counts, as in PEFT."""
        raise NotImplementedError

    def as_delta(self, where: str, module: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one module's delta, by name."""
        raise NotImplementedError

    def _number(self, name: str, value: Any) -> float:
        if not is_real(value):
            self._fail(name, "must be a number", value)
        return float(value)

    def _patterns(self, name: str, check: Callable[[str, Any], Any]) -> list[tuple[re.Pattern[str], Any]]:
        patterns = self._config.get(name) or {}
        if not isinstance(patterns, Mapping):
            self._fail(name, "must map patterns to values")
        compiled = []
        for pattern, value in patterns.items():
            try:
                compiled.append((re.compile(rf"(.*\.)?({pattern})$"), check(name, value)))
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{name}={pattern!r} is not a regex: {error}") from error
        return compiled


def _of_pattern(patterns: list[tuple[re.Pattern[str], Any]], module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


class _LoRAFields(_Fields):
    """PEFT's ``LoraConfig``."""

    name, key, first, meant = "LoRA", _KEY, "lora_A.weight", _MEANT_BY_LORA
    common: LoRAConfig

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        if config.get("peft_type") != "LORA":
            self._fail("peft_type", "is not the LORA or FLORA that can be read")
        if config.get("init_lora_weights", True) not in _PLAIN_INITS:
            self._fail("init_lora_weights", "changes the base that it is added to; convert it to plain LoRA in PEFT")
        super().__init__(config)
        self._alphas = self._patterns("alpha_pattern", self._number)
        self.common = LoRAConfig(
            rank=self._rank("r", config.get("r", 8)),
            alpha=self._number("lora_alpha", config.get("lora_alpha", 8)),
            rank_stabilized=bool(config.get("use_rslora", False)),
            dropout=self._number("lora_dropout", config.get("lora_dropout", 0.0)),
        )

    def _rank(self, name: str, value: Any) -> int:
        if not is_int(value) or value < 1:
            self._fail(name, "must be a positive int", value)
        return int(value)

    def is_own(self, match: re.Match[str]) -> bool:
        return bool(match[3]) != match[2].startswith("embedding")

    def check(self, where: str, modules: Mapping[str, nn.Module]) -> None:
        _check_attention(where, modules)

    def common_rank(self, module: nn.Module) -> int:
        return self.common.rank

    def rank_and_scale(self, where: str, parts: Mapping[str, Tensor]) -> tuple[int, float]:
        rank = _of_pattern(self._ranks, where, self.common.rank)
        alpha = _of_pattern(self._alphas, where, self.common.alpha)
        return rank, alpha / (rank**0.5 if self.common.rank_stabilized else rank)

    def as_delta(self, where: str, module: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _as_delta(where, module, parts, _of_pattern(self._ranks, where, self.common.rank))


class _TuckerFields(_Fields):
    """`flora.integrations.peft.FloraConfig`."""

    name, key, first, meant = "FLoRA", _TUCKER_KEY, "flora_delta.core", _MEANT_BY_TUCKER
    common: TuckerConfig

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._alphas = self._patterns("alpha_pattern", self._number)
        self._scales = self._patterns("scale_pattern", self._number)
        given = {
            name: config[name] for name in ("kernel_rank", "scale", "dropout", "trainable", "plan") if name in config
        }
        if isinstance(init := config.get("init_weights", True), str):
            given["init"] = init
        self._alpha = config.get("alpha")
        common = TuckerConfig(rank=config.get("r", 16), alpha=self._alpha, **given)
        self.common = common.with_scale(common.resolved_scale)

    def _rank(self, name: str, value: Any) -> Rank:
        return TuckerConfig(rank=value).rank

    def common_rank(self, module: nn.Module) -> Rank:
        rank = self.common.rank
        return self.common.ranks(kind_of(module).shape(module)) if isinstance(rank, int) else rank

    def rank_and_scale(self, where: str, parts: Mapping[str, Tensor]) -> tuple[Rank, float]:
        if "core" not in parts:
            raise ValueError(f"{where}: flora_delta.core is missing")
        rank = _of_pattern(self._ranks, where, self.common.rank)
        scale = _of_pattern(self._scales, where, None)
        alpha = _of_pattern(self._alphas, where, self._alpha) if scale is None else None
        own = TuckerConfig(rank=rank, alpha=alpha, scale=scale)
        scaled = scale is not None or alpha is not None
        return tuple(parts["core"].shape), own.resolved_scale if scaled else self.common.resolved_scale

    def as_delta(self, where: str, module: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(parts)


def _as_delta(where: str, module: nn.Module, parts: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of a `LoRADelta` from those of PEFT, by name."""
    try:
        kind = kind_of(module)
    except TypeError as error:
        raise ValueError(f"{where} cannot be adapted: {error}") from error
    d_out, *rest = kind.shape(module)
    prefix = "embedding_" if kind is EMBEDDING else ""
    wanted = {
        f"{prefix}A": (rank, d_out) if kind is EMBEDDING else (rank, *rest),
        f"{prefix}B": (rest[0], rank) if kind is EMBEDDING else (d_out, rank, *[1] * (len(rest) - 1)),
    }
    if kind is CONV:
        _check_convolution(where, module, "cannot be read")
    for name in (*wanted, *parts):
        given = tuple(parts[name].shape) if name in parts else "missing"
        if given != wanted.get(name):
            raise ValueError(f"{where}: lora_{name} is {given}; rank {rank} needs {wanted.get(name, 'none')}")
    a, b = (parts[name] for name in wanted)
    if kind is EMBEDDING:
        padding_idx: int | None = module.padding_idx  # type: ignore[assignment]
        if padding_idx is not None and a[:, padding_idx].any():
            raise ValueError(f"{where}: lora_embedding_A changes the row of padding_idx={padding_idx}")
        return {"factors.0": a.mT.contiguous(), "factors.1": b.contiguous()}
    if kind is CONV:
        return {"core": a.contiguous(), "factors.0": b.flatten(1).contiguous()}
    return {"factors.0": b.contiguous(), "factors.1": a.mT.contiguous()}


def _check_attention(where: str, modules: Mapping[str, nn.Module]) -> None:
    for name in (where, where.rpartition(".")[0].removesuffix(".base_layer")):
        if isinstance(modules.get(name), nn.MultiheadAttention):
            raise ValueError(f"{where}: PEFT's LoRA of a MultiheadAttention adds the update of out_proj twice")


def _check_convolution(where: str, module: nn.Module, verb: str) -> None:
    """Raises ValueError for a convolution on which PEFT's LoRA is not an update of the weight."""
    conv: _ConvNd = module  # type: ignore[assignment]
    for name, value, plain, why in (
        ("groups", conv.groups, 1, "connects the groups"),
        ("dilation", tuple(conv.dilation), (1,) * len(conv.kernel_size), "leaves it out"),
        ("padding_mode", conv.padding_mode, "zeros", "pads with zeros"),
    ):
        if value != plain:
            raise ValueError(f"{where}: {name}={value!r} of the convolution: PEFT's LoRA {why}, so it {verb}")


def _saved(wanted: Sequence[str], others: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules that ``modules_to_save`` means: those whose name ends so. PEFT adds names that need not be there."""
    found = [name for name in modules if name and any(name.endswith(end) for end in wanted)]
    outer = [name for name in found if not inside(name.rpartition(".")[0], found)]
    for name in outer:
        if not any(inside(key, [name]) for key in others):
            raise ValueError(f"{name}: modules_to_save={list(wanted)} names it, but its tensors are missing")
    return outer


# Writing -----------------------------------------------------------------------------------------------------------


def contents(model: nn.Module, adapter: str, as_lora: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT folder that holds exactly the same update.

    Any delta that is a core and factors is LoRA of rank r_out: B = U_out, and A is the core times all other factors.
    Without ``as_lora`` Tucker deltas are written as they are, for `flora.integrations.peft`.

    Raises:
        ValueError: naming the module, a delta that PEFT's method cannot be, or what PEFT's way of naming modules cannot
            tell apart.
    """
    targets = distinct(places(model))
    deltas: dict[str, Factored] = {}
    saved: dict[str, nn.Module] = {}
    for target in targets:
        if isinstance(target.module, AdaptedModule):
            for parameter in target.module.adapted.values():
                if adapter in parameter.deltas:
                    raise ValueError(f"{parameter.name}: PEFT has no Tucker update of a parameter")
        if isinstance(target.module, AdaptedLayer) and adapter in target.module.deltas:
            deltas[target.name] = _factored(target.name, target.module.deltas[adapter], as_lora)
        elif isinstance(target.module, SavedModule) and adapter in target.module.copies:
            saved[target.name] = target.module.copies[adapter]
        else:
            continue
        if len(target.places) > 1:
            raise ValueError(f"{target.name}: it is {target.places[1].name} as well, and PEFT would adapt one of them")
    modules = {place.name: target.original for target in targets for place in target.places}
    kinds = {where: kind_of(modules[where]) for where in deltas}
    tensors: dict[str, Tensor] = {}
    for where, delta in deltas.items():
        if as_lora:
            _check_attention(where, modules)
            own = _as_peft(where, modules[where], delta)
        else:
            own = {f"flora_delta.{key}": tensor for key, tensor in delta.tensors().items()}
        tensors.update({f"{PREFIX}{where}.{key}": tensor for key, tensor in own.items()})
    for where, module in saved.items():
        tensors.update({f"{PREFIX}{where}.{key}": tensor for key, tensor in module.state_dict().items()})
    dropouts = {delta.config.dropout for where, delta in deltas.items() if kinds[where].droppable}
    if len(dropouts) > 1:
        raise ValueError(f"its layers have the dropouts {sorted(dropouts)}, and an adapter of PEFT's has one")
    dropout = max(dropouts, default=0.0)
    lora = {
        "peft_type": "LORA",
        "init_lora_weights": True,
        "use_rslora": False,
        "lora_dropout": dropout,
        "fan_in_fan_out": all(kind is TRANSPOSED for kind in kinds.values()),
    }
    config = {
        "task_type": None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        **(lora | _numbers(deltas) if as_lora else _tucker(deltas) | {"dropout": dropout}),
        **_names(list(deltas), list(saved), modules),
    }
    return config, tensors


def _factored(where: str, delta: nn.Module, as_lora: bool) -> Factored:
    if not isinstance(delta, Factored if as_lora else TuckerDelta):
        config: DeltaConfig = delta.config  # type: ignore[assignment]
        held = "LoRA" if as_lora else "FLoRA"
        raise ValueError(f"{where}: PEFT's format holds {held}, and no delta of method {config.method!r}")
    return delta


def _tucker(deltas: Mapping[str, Factored]) -> dict[str, Any]:
    """The fields of a ``FloraConfig`` that give every layer its ranks and its scale: the commonest, and exceptions."""
    parts = {delta.config.trainable for delta in deltas.values()}
    if len(parts) > 1:
        raise ValueError(f"its layers have trainable={sorted(parts)}, and an adapter of PEFT's has one")
    (ranks, _) = Counter(delta.ranks for delta in deltas.values()).most_common(1)[0]
    (scale, _) = Counter(delta.scale for delta in deltas.values()).most_common(1)[0]
    return {
        "peft_type": "FLORA",
        "r": list(ranks),
        "scale": scale,
        "trainable": list(*parts),
        "rank_pattern": {f"^{re.escape(n)}": list(d.ranks) for n, d in deltas.items() if d.ranks != ranks},
        "scale_pattern": {f"^{re.escape(n)}": d.scale for n, d in deltas.items() if d.scale != scale},
    }


def _numbers(deltas: Mapping[str, Factored]) -> dict[str, Any]:
    """The fields that give every layer its rank and its scale, alpha / r: the commonest, and exceptions."""
    ranks = {where: delta.ranks[0] for where, delta in deltas.items()}
    alphas = {where: delta.scale * delta.ranks[0] for where, delta in deltas.items()}
    (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": _short(alpha),
        "rank_pattern": {f"^{re.escape(where)}": r for where, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(where)}": _short(a) for where, a in alphas.items() if a != alpha},
    }


def _short(number: float) -> float:
    return int(number) if number == int(number) else number


def _names(adapted: list[str], whole: list[str], names: Iterable[str]) -> dict[str, Any]:
    """The fields that name modules. In PEFT a listed name means every module whose name ends in it."""
    for where in whole:
        others = [name for name in names if name.endswith(where) and name != where]
        if others:
            raise ValueError(f"{where}: in PEFT modules_to_save={where!r} would name {others[0]!r}, too")
    shared = any(name not in adapted and is_suffix(where, name) for where in adapted for name in names)
    return {
        "target_modules": "|".join(map(re.escape, adapted)) if shared else adapted,
        "modules_to_save": whole or None,
    }


@torch.no_grad()
def _as_peft(where: str, module: nn.Module, delta: Factored) -> dict[str, Tensor]:
    """The tensors of one layer, by PEFT's names."""
    core, u_out, u_in, *u_k = (None if t is None else whole(t) for t in delta.parts(None).tensors)
    assert u_out is not None
    b = u_out.detach().clone()
    if core is None:
        assert u_in is not None
        a = u_in.detach().mT
    else:
        rest = [None if u is None else u.double() for u in (u_in, *u_k)]
        a = reference.reconstruct(core.double(), [None, *rest], 1.0).to(core.dtype)
    kind = kind_of(module)
    if kind is CONV:
        _check_convolution(where, module, "cannot be written")
    if kind is not EMBEDDING:
        return {"lora_A.weight": a, "lora_B.weight": b.reshape(*b.shape, *[1] * (a.ndim - 2))}
    padding_idx: int | None = module.padding_idx  # type: ignore[assignment]
    if padding_idx is not None:
        b[padding_idx] = 0  # the padding row is no part of the delta
    return {"lora_embedding_A": b.mT, "lora_embedding_B": a.mT}


def to_json(config: Mapping[str, Any]) -> bytes:
    """As PEFT lays the file out."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
