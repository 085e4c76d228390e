"""FLoRA as a method of Hugging Face PEFT: importing this module registers it.

>>> from flora.integrations.peft import FloraConfig
>>> model = peft.get_peft_model(model, FloraConfig(r=16, target_modules=["query", "value"]))

A `FloraLayer` keeps PEFT's books (which adapters are there, active, merged, disabled) and leaves the computing to an
`AdaptedLayer`, kernels and all. The keys of its files are ``base_model.model.<module>.flora_delta.core`` and
``…flora_delta.factors.<mode>``.

PEFT's list of methods is closed: its enumeration and its mixed model get members at import. That depends on PEFT's
inside, hence the check of its version.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any, cast

import peft
import torch
from packaging.version import Version
from torch import Tensor, nn

OLDEST, TOO_NEW = "0.21.2", "0.22"

if not Version(OLDEST) <= Version(peft.__version__) < Version(TOO_NEW):  # before anything of its inside is imported
    raise RuntimeError(
        f"flora.integrations.peft works with peft {OLDEST} to below {TOO_NEW}, and peft {peft.__version__} is installed"
    )

# ruff: noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    PeftType,
    register_peft_method,
)
from peft.utils.other import get_pattern_key

from flora.config import TuckerConfig
from flora.deltas import TuckerDelta, WeightDelta
from flora.functional import compute_dtype, exact
from flora.kinds import kind_of, unfit
from flora.layers import AdaptedLayer

__all__ = ["FloraConfig", "FloraLayer", "FloraModel"]


def _add_type(name: str) -> None:
    """A member of the closed enumeration `PeftType`, as its own definition would have made it."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    vars(member).update(_name_=name, _value_=name, __objclass__=PeftType, _sort_order_=len(PeftType))
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member


_add_type("FLORA")
FLORA = PeftType("FLORA")


@dataclass
class FloraConfig(peft.PeftConfig):
    """FLoRA's delta (arXiv 2405.14739) in PEFT: ΔW = s · G ×₁U_out ×₂U_in ×₃U_k1 …, as `flora.TuckerConfig` has it.

    Args:
        r: an int gives the channel modes min(r, dim); a sequence gives every mode, in weight order (out, in, k…).
        kernel_rank: the kernel modes get min(kernel_rank, k), unless ``r`` is a sequence.
        alpha: s = alpha / r.
        scale: s itself; not together with ``alpha``. Without either s is 1.
        dropout: probability, in [0, 1), that an element of the delta's input is dropped in training. Embedding and
            MultiheadAttention, whose delta has no input of its own, do without.
        init_weights: how the factors start: True or "reference", "orthogonal" or "hosvd", always with a core of 0, so
            that ΔW = 0. False draws the core, too.
        trainable: which parts learn, as in `flora.TuckerConfig`.
        plan: how a layer computes: "auto" | "fused" | "hybrid" | "merged".
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, bias: as in PEFT's
            ``LoraConfig``; ``bias`` is "none", "all" or "flora_only".
        rank_pattern, alpha_pattern, scale_pattern: r, alpha and scale by pattern, a regex that the end of a module's
            name must match from a dot on; the first that matches counts.

    Raises:
        ValueError: a field has a value that it cannot have.
    """

    r: int | list[int] = 16
    kernel_rank: int = 2
    alpha: float | None = None
    scale: float | None = None
    dropout: float = 0.0
    init_weights: bool | str = True
    trainable: list[str] = field(default_factory=lambda: ["core", "factors"])
    plan: str = "auto"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    scale_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = FLORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        for name in ("r", "trainable"):  # as JSON has them
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"FloraConfig: {name}={getattr(self, name)!r} cannot be given together with a pattern, "
                    f"target_modules={self.target_modules!r}"
                )
        if self.bias not in ("none", "all", "flora_only"):
            raise ValueError(f"FloraConfig: bias={self.bias!r} must be none, all or flora_only")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"FloraConfig: layers_pattern={self.layers_pattern!r} needs layers_to_transform")
        self._tucker(self.r, self.alpha, self.scale)
        for rank in self.rank_pattern.values():
            self._tucker(rank, None, None)
        for alpha in self.alpha_pattern.values():
            self._tucker(1, alpha, None)
        for scale in self.scale_pattern.values():
            self._tucker(1, None, scale)

    def for_module(self, name: str) -> TuckerConfig:
        """The configuration of one module's delta, its patterns applied. ValueError if alpha meets ranks by mode."""

        def own(patterns: dict[str, Any] | None, default: Any) -> Any:
            return patterns.get(get_pattern_key(list(patterns), name), default) if patterns else default

        scale = own(self.scale_pattern, None)
        alpha = own(self.alpha_pattern, None) if scale is None else None
        if scale is None and alpha is None:
            scale, alpha = self.scale, self.alpha
        return self._tucker(own(self.rank_pattern, self.r), alpha, scale)

    def _tucker(self, rank: Any, alpha: float | None, scale: float | None) -> TuckerConfig:
        init = "reference" if isinstance(self.init_weights, bool) else self.init_weights
        try:
            return TuckerConfig(
                rank=rank,
                kernel_rank=self.kernel_rank,
                alpha=alpha,
                scale=scale,
                dropout=self.dropout,
                init=init,
                trainable=self.trainable,
                plan=self.plan,
            )
        except ValueError as error:
            raise ValueError(f"FloraConfig: {error}") from None


class FloraLayer(nn.Module, BaseTunerLayer):
    """A frozen layer and its FLoRA adapters, as a layer of PEFT; answers the frozen layer's attributes.

    Parameters
    ----------
    base_layer
        Linear, Conv1d to Conv3d, Embedding, transformers' Conv1D, MultiheadAttention (its packed input projection), or
        another tuner's layer on one of them.
    name
        the module's dotted name, for messages.

    Attributes
    ----------
    flora_delta
        `flora.TuckerDelta` by adapter name.
    weight
        the effective weight W + s·ΔW of the active adapters, since some modules read it instead of calling the layer.

    Raises TypeError, naming the module, for a layer that cannot be adapted.
    """

    adapter_layer_names = ("flora_delta",)

    base_layer: nn.Module
    flora_delta: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, *, name: str = "") -> None:
        super().__init__()
        self.base_layer = base_layer
        layer = AdaptedLayer(self.get_base_layer(), name=name)
        self.flora_delta = layer.deltas
        extents: tuple[int | None, int | None] = _get_in_out_features(layer.base_layer)
        self.in_features, self.out_features = extents
        self.cast_input_dtype_enabled = True
        self.merged_adapters = []
        self._fingerprint = 0  # of the weight as `merge` left it
        self._disable_adapters = False
        self._active_adapter = []
        self.__dict__["_layer"] = layer  # not a child: base and deltas are children already

    # Adapters -------------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: TuckerConfig, *, init_weights: bool | str = True) -> None:
        """Adds an adapter, inactive. TypeError or ValueError, naming the module, where it does not fit."""
        on_meta = nn.Linear(1, 1).weight.is_meta  # where PEFT makes empty adapters, to be filled from a file
        delta = cast(TuckerDelta, self._layer.add_delta(adapter_name, config, shapes_only=on_meta))
        if init_weights is False and not on_meta:
            assert delta.core is not None
            nn.init.kaiming_uniform_(delta.core.flatten(1), a=5**0.5)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if not self.merged:
            self._activate(self.active_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._layer.enabled = enabled

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.flora_delta and not self.merged:
            self._activate([name for name in self._layer.active if name != adapter_name])
        super().delete_adapter(adapter_name)

    def _delta(self, adapter: str) -> WeightDelta:
        return cast(WeightDelta, self.flora_delta[adapter])

    def _activate(self, names: Sequence[str]) -> None:
        self._layer.set_active([name for name in names if name in self.flora_delta])

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """PEFT makes all of an adapter trainable; the parts that its configuration leaves out do not learn."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, delta in self._layer.adapters():
            if (names is None or name in names) and any(p.requires_grad for p in delta.parameters()):
                delta.set_trainable(True)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiplies an adapter's update by ``scale`` beside its own, if the layer has it."""
        if adapter in self.flora_delta:
            self._delta(adapter).strength = scale

    def scale_layer(self, scale: float) -> None:
        """Multiplies the active adapters' updates by ``scale``, on top of what they have."""
        for name in self._layer.active:
            self._delta(name).strength *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Takes ``scale`` back, or everything that `set_scale` and `scale_layer` did."""
        for name in self._layer.active:
            delta = self._delta(name)
            delta.strength = 1.0 if scale is None else delta.strength / scale

    # Forward --------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What the base layer returns, with the active adapters on top.

        ``adapter_names`` names the adapter of each sample instead, or "__base__" for none. ValueError for another
        number of names than samples, or while merged; TypeError for a layer with a forward of its own.
        """
        layer = self._layer
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_forward(adapter_names, *args, **kwargs)
        if self.base_layer is layer.base_layer:
            return layer(*args, **kwargs)
        y = self.base_layer(*args, **kwargs)
        if not self.merged and layer.enabled:
            for name in layer.active:
                y = y + self._update(name, *args, **kwargs).to(y.dtype)
        return y

    def _mixed_forward(self, adapter_names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"{self._name}: Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                f"{self._name}: Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        updates = []
        for name in dict.fromkeys(adapter_names):
            if name in self.flora_delta:
                rows = torch.tensor([i for i, own in enumerate(adapter_names) if own == name], device=x.device)
                updates.append((rows, self._update(name, x[rows], *args, **kwargs)))
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for rows, update in updates:
            y = y.index_add(0, rows, update.to(y.dtype))
        return y

    def _update(self, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """s·ΔW·x alone, beside a base layer that is called for itself."""
        layer, base = self._layer, self._layer.base_layer
        kind, delta = layer._kind, self._delta(adapter)
        if args or kwargs or not (kind.opaque or kind.stock(base)):
            raise TypeError(
                f"{self._name}: a {type(base).__name__} with a forward of its own does not support mixed adapter "
                "batches, nor adapters of other methods beside FLoRA's"
            )
        weight = None if kind.opaque else kind.turned(layer._base_weight())
        if isinstance(base, nn.Embedding):
            assert weight is not None
            return delta.embedding_update(x, weight, base.padding_idx)
        return delta.update(kind.op(base), x, weight, delta.dropout)

    # Merging --------------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts W + Σ s·ΔW into the base, rounded once; the original weight is kept for `unmerge`.

        As with PEFT's own methods, a ``state_dict`` of the whole model then holds the merged weight, and a scale that
        is set counts from the next merge on.

        Raises RuntimeError, naming the module, where that is impossible; with ``safe_merge`` ValueError, with nothing
        changed, for a sum that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.flora_delta]
        if not names:
            return
        before = self.merged_adapters
        try:
            self._merge([*before, *names])
            if safe_merge and not all(torch.isfinite(p).all() for p in self._layer._combined.values()):
                raise ValueError(
                    f"{self._name}: NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be "
                    "broken"
                )
        except BaseException:
            self._merge(before)
            raise

    def unmerge(self) -> None:
        """Puts the original weight back, bit for bit unless another tuner merged into the same weight meanwhile."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._merge([])

    def _merge(self, names: list[str]) -> None:
        """Has exactly these adapters merged."""
        layer = self._layer
        if layer.merged:
            self._keep_what_others_merged()
            layer.unmerge()
        self.merged_adapters = []
        if names:
            self._activate(names)
            layer.merge()
            for name in names:  # in PEFT a scale may be set while merged, and counts from the next merge on
                self._delta(name).merged_in = None
            self.merged_adapters = names
            self._fingerprint = self._hash()
        else:
            self._activate(self.active_adapters)

    def _hash(self) -> int:
        weight = self._layer._combined[self._layer._kind.weight_name]
        assert weight is not None
        return int(torch.hash_tensor(weight.detach()).view(torch.int64).item())

    @torch.no_grad()
    def _keep_what_others_merged(self) -> None:
        """Other tuners on the same layer add to its weight in place: to the merged one here, not to the original."""
        if self._hash() == self._fingerprint:
            return
        layer = self._layer
        name = layer._kind.weight_name
        original, merged = layer._original[name], layer._combined[name]
        assert original is not None and merged is not None
        dtype = compute_dtype(original.dtype)
        with exact(original.device.type):
            alone = layer._effective(original, layer._deltas())
            original.copy_(original.to(dtype) + (merged.to(dtype) - alone.to(dtype)))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s·ΔW of one adapter, of the shape of the layer's own weight."""
        return self._delta(adapter).delta_weight(self._layer._base_weight())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return bool(self._layer._kind.name == "linear")

    # What the frozen layer answers ----------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self._layer.weight
        return weight

    @property
    def _name(self) -> str:
        return str(self._layer._label)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = self.__dict__.get("_layer")
            if layer is None:
                raise
            return getattr(layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        layer = self.__dict__.get("_layer")
        if layer is not None and name not in self._modules:
            base = layer.base_layer
            if name in base._parameters or name in base._modules or name in base._buffers:
                setattr(layer, name, value)
                return
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._layer.merged:  # the original weight, which is no child's
            self._layer._apply(fn, recurse)
            self._fingerprint = self._hash()
        return self


class FloraModel(BaseTuner):
    """A model with `FloraLayer`s in it; `peft.get_peft_model` makes it of a `FloraConfig`."""

    prefix = "flora_"
    tuner_layer_cls = FloraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def _prepare_model(self, peft_config: peft.PeftConfig, model: nn.Module) -> None:
        """Raises what adapting would raise, before any module is replaced."""
        skipped: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if name.startswith(skipped):
                continue
            if isinstance(module, BaseTunerLayer):
                skipped += (f"{name}.",)
            if name and self._check_target_module_exists(peft_config, name):
                _module_config(cast(FloraConfig, peft_config), module, name)

    def _create_and_replace(
        self,
        peft_config: peft.PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(FloraConfig, peft_config)
        own = _module_config(config, target, current_key)
        layer = target if isinstance(target, FloraLayer) else FloraLayer(target, name=_plain(current_key))
        layer.update_layer(adapter_name, own, init_weights=config.init_weights)
        layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, FloraLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # the base layer, as it is; PEFT asks each for a `weight`, which an attention has not
            if isinstance(child, FloraLayer):
                child._layer.enabled = True  # disabled, a merged layer shows its original weight
            setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """A delta is of float32 or float64 as it comes; where PEFT is told not to see to that, it follows the base."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self.modules():
            if isinstance(layer, FloraLayer) and adapter_name in layer.flora_delta and not layer._layer._kind.opaque:
                dtype = layer._layer._base_weight().dtype
                for owner in layer.flora_delta[adapter_name].modules():
                    for name, p in list(owner.named_parameters(recurse=False)):
                        setattr(owner, name, nn.Parameter(p.detach().to(dtype), p.requires_grad))

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """A weighted sum of Tucker decompositions is none of the same ranks. Raises NotImplementedError."""
        raise NotImplementedError(
            "FLoRA has no add_weighted_adapter; activate the adapters together, base_model.set_adapter([...]), with "
            "FloraLayer.set_scale as their weights"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands ``adapter_names`` of a call to the layers."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if (kwargs.get("num_beams") or 1) > 1:
            raise ValueError(f"adapter_names cannot be given together with num_beams={kwargs['num_beams']}")
        layers = [m for m in self.modules() if isinstance(m, FloraLayer | AuxiliaryTrainingWrapper)]
        known = {name for layer in layers if isinstance(layer, FloraLayer) for name in layer.flora_delta}
        unknown = sorted({*names} - known - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        handles = [m.register_forward_pre_hook(partial(_with_names, names), with_kwargs=True) for m in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        module, container, tensor = key.rpartition(f".flora_delta.{adapter_name}.")
        if container:
            return f"{module}.flora_delta.{tensor}"
        return str(super()._remove_adapter_name_from_key(key, adapter_name))


def _with_names(names: Sequence[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, kwargs | {"adapter_names": names}


def _plain(name: str) -> str:
    """A module's name in its own model: a mixed model gives it as a part of itself."""
    return name.removeprefix("base_model.model.")


def _module_config(config: FloraConfig, module: nn.Module, name: str) -> TuckerConfig:
    """One module's own configuration. TypeError or ValueError, naming the module, if its delta cannot be put on it."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    own, name = config.for_module(name), _plain(name)
    reason = unfit(base, own)
    if reason is not None:
        raise TypeError(f"{name} cannot be adapted: {reason}")
    kind = kind_of(base)
    own.ranks(kind.shape(base), name)
    return own if kind.droppable else replace(own, dropout=0.0)


# Registering -------------------------------------------------------------------------------------------------------


def _join_mixed() -> None:
    """PEFT's mixed model asks for the methods that it knows by their classes; here it learns of one more."""
    package: Any = import_module("peft.tuners.mixed")
    mixed: Any = import_module("peft.tuners.mixed.model")
    package.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES = (*mixed.COMPATIBLE_TUNER_TYPES, FLORA)
    mixed.PREFIXES.append(FloraModel.prefix)
    mixed.Layers += (FloraLayer,)
    mixed.Configs |= FloraConfig
    others = mixed.MixedModel._create_and_replace

    def create_and_replace(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        create = FloraModel._create_and_replace if isinstance(config, FloraConfig) else others
        create(self, config, *args, **kwargs)

    mixed.MixedModel._create_and_replace = create_and_replace


register_peft_method(name="flora", config_cls=FloraConfig, model_cls=FloraModel, is_mixed_compatible=True)
_join_mixed()
