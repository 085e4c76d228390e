"""AdaptedLayer: a frozen base layer with named deltas on it. Everything that is the same for every delta and layer.

A `Delta` knows a parametrisation, a `Kind` knows a layer, `flora.functional` knows how to compute; this file puts them
together: forward, effective weight, merge and unmerge, enabling, state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from flora import deltas as _deltas
from flora import merging
from flora.config import DeltaConfig
from flora.deltas import Delta, OutputDelta, Site, WeightDelta
from flora.effective import effective_weight
from flora.functional import compute_dtype
from flora.intercept import Intercept, Watch, held, let_go
from flora.kinds import (
    ATTENTION,
    EMBEDDING,
    MODULE,
    NORM,
    TRANSPOSED,
    Kind,
    delta_shape,
    describe,
    is_adaptable,
    kind_or_module,
    refusal,
    undroppable,
    unfit,
)
from flora.norms import norm_op, offset
from flora.ops import LINEAR, ConvOp, Op
from flora.outputs import output_of

_Parameters = merging.Parameters

__all__ = ["AdaptedLayer", "alone", "check_adapter_name", "is_adaptable", "refusal", "wrap"]


class AdaptedLayer(nn.Module):
    """A frozen layer and its deltas; takes the layer's place in a model and answers its attributes.

    Raises TypeError, naming the module, for a lazy one that has no weight yet. Whether a delta fits, `add_delta` says.

    Parameters
    ----------
    base_layer
        Linear, Conv1d to Conv3d, Embedding, MultiheadAttention (its packed input projection), transformers' Conv1D, a
        subclass of one of them, a quantised linear layer or a normalisation; for a block after it, any module. Its own
        parameters are frozen.
    name
        the module's dotted name in its model, for messages.

    Attributes
    ----------
    base_layer
        the layer itself.
    deltas
        `torch.nn.ModuleDict` of `Delta` by adapter name.
    active
        names of the adapters in use. The updates of the weight add; blocks are applied to the output one after another,
        in this order, each to what those before it returned.
    enabled
        False: the forward is exactly the frozen base's, also while merged.
    merged
        whether the base holds W + s·ΔW. The original parameter is kept aside and put back by `unmerge`, bit for bit.
    weight
        the *effective* weight W + s·ΔW in the base's dtype and orientation, differentiable (``in_proj_weight`` on an
        attention), since some modules read it instead of calling the layer. `base_layer.weight` is the frozen one.
    """

    base_layer: nn.Module
    deltas: nn.ModuleDict
    name: str
    reached: bool
    """Whether a forward in training, or with gradients, has used the deltas."""

    def __init__(self, base_layer: nn.Module, *, name: str = "") -> None:
        super().__init__()
        try:
            kind = self._kind_of(base_layer)
        except TypeError as error:
            raise TypeError(f"{name or describe(base_layer)} cannot be adapted: {error}") from None
        self.name = name
        self._kind = kind
        self._active: tuple[str, ...] = ()
        self._of_weight: tuple[str, ...] = ()  # the active ones by what they act on
        self._of_output: tuple[str, ...] = ()
        self._enabled = True
        self._merged = False  # a flag, as torch.compile does not notice that a dict is no longer empty
        self._original: _Parameters = {}  # the frozen weight and bias while merged; a plain dict, to stay unregistered
        self._combined: _Parameters = {}  # the merged ones
        self.reached = False
        self.shape = kind.shape(base_layer)
        self._hold(base_layer)
        self.deltas = nn.ModuleDict()
        self.training = base_layer.training
        self._merge_again = False  # set while a state is loaded into a merged layer
        self.register_load_state_dict_post_hook(_merge_again)  # type: ignore[no-untyped-call]

    # What is otherwise where the weight is a parameter of a module that is no layer ----------------------------------

    def _kind_of(self, base_layer: nn.Module) -> Kind:
        return kind_or_module(base_layer)

    def _hold(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        for parameter in base_layer.parameters(recurse=self._kind not in (ATTENTION, MODULE)):
            parameter.requires_grad_(False)

    def _unfit(self, config: DeltaConfig) -> str | None:
        return unfit(self.base_layer, config)

    def _undroppable(self, config: DeltaConfig) -> str | None:
        return undroppable(self.base_layer, config)

    def _site(self, config: DeltaConfig, shapes_only: bool) -> Site:
        return site_of(self.base_layer, config, self._label, shapes_only)

    # Deltas ---------------------------------------------------------------------------------------------------------

    def add_delta(
        self,
        adapter: str,
        config: DeltaConfig,
        *,
        trainable: bool = True,
        shapes_only: bool = False,
        most: int | None = None,
    ) -> Delta:
        """Builds the delta of ``config`` under the name ``adapter``; it is not active before `set_active`.

        With ``shapes_only`` nothing is drawn or decomposed, for values that are loaded afterwards; ``most`` is the
        number of them, and a parameter of more is a ValueError.

        Raises TypeError, naming the module, if such a delta cannot be put on it; ValueError for a name that is taken or
        unfit, ranks that do not fit, or dropout on a layer whose delta has no input of its own (packed attention,
        Embedding, normalisation).
        """
        check_adapter_name(adapter)
        if adapter in self.deltas:
            raise ValueError(f"{self._label}: there is already an adapter named {adapter!r}")
        reason = self._unfit(config)
        if reason is not None:
            raise TypeError(f"{self._label} cannot be adapted: {reason}")
        reason = self._undroppable(config)
        if reason is not None:
            raise ValueError(f"{self._label}: {reason}")
        delta = _deltas.build(config, replace(self._site(config, shapes_only), most=most))
        if isinstance(delta, WeightDelta) and not self._kind.shiftable and delta.bias_update(None) is not None:
            raise TypeError(
                f"{self._label} cannot be adapted: the bias of {describe(self.base_layer)} cannot be updated"
            )
        delta.set_trainable(trainable)
        delta.train(self.training)
        self.deltas[adapter] = delta
        return delta

    def delete_delta(self, adapter: str) -> None:
        """Removes an adapter. Raises KeyError for an unknown one, RuntimeError for one that is merged."""
        self._known(adapter)
        if self.merged and adapter in self._active:
            raise RuntimeError(f"{self._label}: adapter {adapter!r} is merged; unmerge first")
        self._activate(tuple(n for n in self._active if n != adapter))
        del self.deltas[adapter]

    @property
    def active(self) -> tuple[str, ...]:
        return self._active

    def set_active(self, names: Sequence[str]) -> None:
        """Puts these adapters in use, in this order. KeyError for an unknown one, RuntimeError while merged."""
        names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        for adapter in names:
            self._known(adapter)
        if self.merged and names != self._active:
            raise RuntimeError(f"{self._label}: adapters {list(self._active)} are merged; unmerge first")
        self._activate(names)

    def _activate(self, names: tuple[str, ...]) -> None:
        self._active = names
        self._of_output = tuple(n for n in names if isinstance(self.deltas[n], OutputDelta))
        self._of_weight = tuple(n for n in names if n not in self._of_output)

    def _known(self, adapter: str) -> None:
        if adapter not in self.deltas:
            raise KeyError(f"{self._label}: no adapter named {adapter!r}; there are {sorted(self.deltas)}")

    def _in_use(self) -> bool:
        """Whether active deltas have to be computed with: not while they are merged or switched off."""
        return bool(self._active) and self._enabled and not self._merged

    def _deltas(self) -> list[WeightDelta]:
        """The active ones of the weight."""
        deltas: dict[str, Any] = self._modules["deltas"]._modules  # type: ignore[union-attr]
        return [deltas[n] for n in self._of_weight]

    def _blocks(self) -> list[OutputDelta]:
        """The active ones of the output."""
        return [self.deltas[n] for n in self._of_output]  # type: ignore[misc]

    def __iter__(self) -> Iterator[Any]:
        """A container that its parent goes through itself is never called, so nothing can be put on it."""
        raise TypeError(
            f"{self._label}: the modules in this {describe(self.base_layer)} are called one by one and it never is; "
            "name them instead of it"
        )

    @property
    def _label(self) -> str:
        return self.name or describe(self.base_layer)

    # Forward --------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer returns for these arguments, with the active deltas on top; shapes are the base's."""
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        if not self._in_use():
            return base(*args, **kwargs)
        if self.training or torch.is_grad_enabled():  # reentrant checkpointing trains with gradients off at first
            self._reach()
        if not self._of_output:
            return self._weight_forward(base, args, kwargs)
        y = self._weight_forward(base, args, kwargs) if self._of_weight else base(*args, **kwargs)
        for block in self._blocks():
            y = self._with_block(y, block)
        return y

    def _reach(self) -> None:
        self.__dict__["reached"] = True

    _reach._dynamo_marked_constant = True  # type: ignore[attr-defined]  # done while tracing: no effect of the graph's

    def _weight_forward(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The base with the active deltas of its weight and bias."""
        deltas, kind = self._deltas(), self._kind
        if kind.opaque:
            return self._opaque_forward(deltas, *args, **kwargs)
        if len(args) == 1 and not kwargs and kind.stock(base) and not _has_hooks(base):
            weight: Tensor = _held(base, "weight")
            if kind is EMBEDDING:
                return self._embed(args[0], weight, base.padding_idx, deltas)  # type: ignore[arg-type]
            bias = merging.shifted(_held(base, "bias"), deltas, weight.dtype)
            if kind is NORM:
                return norm_op(base).base(args[0], self._effective(weight, deltas), bias)
            return self._call(kind.op(base), args[0], kind.turned(weight), bias, deltas)
        return self._foreign_forward(deltas, args, kwargs)

    def _with_block(self, output: Any, block: OutputDelta) -> Any:
        """A module's output with the block on it, or on its first element: of a tuple, list or transformers' output."""
        try:
            if isinstance(output, Tensor):
                return block.applied(output)
            if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
                items = [block.applied(output[0]), *output[1:]]
                return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
            if isinstance(output, MutableMapping) and output:
                first, y = next(iter(output.items()))
                if isinstance(y, Tensor):
                    output = copy.copy(output)  # of its own class
                    output[first] = block.applied(y)
                    return output
        except Exception as error:
            error.add_note(f"in the block after {self._label}")
            raise
        raise TypeError(f"{self._label}: a block acts on a tensor, or on the first of several, not on {type(output)}")

    def _call(
        self, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Sequence[WeightDelta], drop: bool = True
    ) -> Tensor:
        """The stock operation with every delta on top: the first in the base's own node, the others added to it.

        ``bias`` has the deltas' shift already.
        """
        try:
            conv = isinstance(op, ConvOp)
            unbatched = conv and x.ndim == weight.ndim - 1
            if unbatched:
                x = x.unsqueeze(0)
            if x.ndim == 0 or (conv and x.ndim != weight.ndim):
                return op.base(x, weight, bias)  # which raises PyTorch's own error
            y = deltas[0].adapted(op, x, weight, bias, deltas[0].dropout if drop else 0.0)
            for delta in deltas[1:]:
                y = y + delta.update(op, x, weight, delta.dropout if drop else 0.0).to(y.dtype)
            return y.squeeze(0) if unbatched else y
        except Exception as error:
            plain = isinstance(x, Tensor) and not x.is_nested
            given = f"{tuple(x.shape)} of {x.dtype} on {x.device}" if plain else repr(x)
            error.add_note(f"in {self._label}: input {given}, weight {tuple(weight.shape)} of {weight.dtype}")
            raise

    def _embed(self, ids: Tensor, weight: Tensor, padding_idx: int | None, deltas: Sequence[WeightDelta]) -> Tensor:
        base: nn.Embedding = self.base_layer  # type: ignore[assignment]
        y = F.embedding(ids, weight, padding_idx, None, 2.0, base.scale_grad_by_freq, base.sparse)
        if padding_idx is not None and padding_idx < 0:
            padding_idx += weight.shape[0]
        for delta in deltas:
            rows = delta.embedding_update(ids, weight, padding_idx)
            y = (y.to(rows.dtype) + rows).to(y.dtype)
        return y

    def _opaque_forward(self, deltas: Sequence[WeightDelta], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = self.base_layer(x, *args, **kwargs)
        for delta in deltas:
            y = y + delta.update(LINEAR, x, None, delta.dropout).to(y.dtype)
        return y

    def _foreign_forward(self, deltas: Sequence[WeightDelta], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The base's own forward (hooks included) with the deltas put in by `Intercept`."""
        base, grad = self.base_layer, torch.is_grad_enabled()
        y, watch = self._watched(deltas, args, kwargs)
        problem = None
        if not watch.used:
            problem = f"never used its {self._kind.weight_name}, so the delta would have no effect"
        elif grad and not watch.learns and any(p.requires_grad for d in deltas for p in d.parameters()):
            problem = (
                f"used its {self._kind.weight_name} only where gradients are off (in an autograd.Function of its own, "
                "perhaps), so the delta could not learn"
            )
        elif not watch.shifted and any(delta.bias_update(watch.bias) is not None for delta in deltas):
            problem = "never used its bias, so the delta's update of it would have no effect (bias=False has none)"
        if problem is not None:
            raise RuntimeError(
                f"{self._label}: the forward of {describe(base)} {problem}; leave this module out (exclude_modules)"
            )
        if watch.replaced and any(delta.dropout > 0 for delta in deltas):
            return self._dropped_forward(deltas, args, kwargs)
        return y

    def _watched(
        self, deltas: Sequence[WeightDelta], args: tuple[Any, ...], kwargs: dict[str, Any], drop: bool = True
    ) -> tuple[Any, Watch]:
        """The base's output with the deltas in it, and what became of its weight on the way."""
        base, name = self.base_layer, self._kind.weight_name

        def stock(op: Op, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._call(op, x, weight, bias, deltas, drop)

        def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
            return self._embed(ids, weight, padding_idx, deltas)

        def effective(weight: Tensor) -> Tensor:
            return self._effective(weight, deltas)

        # A parametrised weight is computed at every access; within this context it is one tensor.
        with held(base, name) as computed:

            def is_weight(tensor: Tensor) -> bool:
                return any(tensor is one for one in (computed(), base._parameters.get(name), base.__dict__.get(name)))

            def shift(bias: Tensor | None) -> Tensor | None:
                weight = computed()
                return merging.shifted(bias, deltas, (self._base_weight() if weight is None else weight).dtype)

            own = base._parameters.get("bias", base.__dict__.get("bias"))
            bias = own if isinstance(own, Tensor) else None
            watch = Watch(self._label, is_weight, effective, stock, self._kind.turned, embedding, bias, shift)
            with Intercept(watch):
                y = base(*args, **kwargs)
        return y, watch

    def _dropped_forward(self, deltas: Sequence[WeightDelta], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """f(x; W) + Σ f(x̃; W + s·ΔW) - f(x̃; W) on dropped x̃: dropout for a forward f that uses its weight freely.

        The delta sees x̃ and the base x, whatever f does besides, and with ΔW = 0 it is the base's output exactly.
        """
        base = self.base_layer
        y: Tensor = base(*args, **kwargs)
        for delta in deltas:
            dropped, rest = _dropped(args, kwargs, delta.dropout)
            y = y + (self._watched([delta], dropped, rest, drop=False)[0] - base(*dropped, **rest))
        return y

    # The effective weight -------------------------------------------------------------------------------------------

    def _base_weight(self) -> Tensor:
        weight: Tensor = getattr(self.base_layer, self._kind.weight_name)
        return weight

    def _effective(self, weight: Tensor, deltas: Sequence[WeightDelta]) -> Tensor:
        """W + Σ s·ΔW in W's orientation and dtype, summed above half precision and rounded once."""
        return merging.effective(self.base_layer, self._kind, weight, deltas)

    def _read_weight(self, deltas: Sequence[WeightDelta], overridable: bool) -> Tensor:
        """The effective weight as an attribute, computed when its values are first used.

        ``overridable`` keeps PyTorch's own modules from their fast paths, which read weights and call no layer.
        """
        weight = self._base_weight()

        def compute() -> Tensor:
            if not deltas:
                return weight
            if torch.is_grad_enabled():
                self._reach()
            return self._effective(weight, deltas)

        if torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter):
            return compute()
        learns = weight.requires_grad or any(p.requires_grad for delta in deltas for p in delta.parameters())
        return effective_weight(weight, learns and torch.is_grad_enabled(), compute, overridable)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # the base and the deltas, which every call asks for
            return modules[name]
        if is_protocol(name):
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = modules.get("base_layer")
            if base is None:
                raise
        if (name == self._kind.weight_name and not self._kind.opaque) or name == "bias":
            used = self._in_use()
            deltas = self._deltas() if used else []
            if used and name != "bias":
                return self._read_weight(deltas, overridable=bool(self._of_output))
            if deltas and "bias" in base._parameters:
                return merging.shifted(getattr(base, name), deltas, self._base_weight().dtype)
        try:
            return getattr(base, name)
        except AttributeError:
            raise AttributeError(
                f"neither AdaptedLayer nor its base {describe(base)} has an attribute {name!r}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        kind = self.__dict__.get("_kind")
        if kind is not None and name in (kind.weight_name, "bias"):
            if self._merged:
                raise RuntimeError(f"{self._label}: {name} cannot be set while an adapter is merged; unmerge first")
            setattr(self.base_layer, name, value)
        elif kind is not None and self._is_of_base(name):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def _is_of_base(self, name: str) -> bool:
        """Whether an attribute is the base's and none of this class's own, as ``stride`` of a convolution."""
        base = self._modules.get("base_layer")
        own = name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        return base is not None and not own and hasattr(base, name)

    # Merging --------------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        return self._merged

    def check_mergeable(self) -> str | None:
        """Why the active deltas cannot be merged into the base, or None if they can."""
        return merging.unmergeable(self.base_layer, self._kind, self._deltas(), self._blocks())

    def merge(self, *, safe: bool = False, max_loss: float = merging.MAX_LOSS) -> float:
        """Puts W + Σ s·ΔW of the active adapters into the base, as a new parameter, and likewise the bias.

        Computed in float32 (float64 for a float64 base) and rounded once to the base's dtype. A parameter that is
        shared with another module stays as it was there. While merged, scales cannot be set; a change of the deltas'
        own values reaches the weight when they are merged again.

        Args:
            safe: refuse what is not finite in the base's dtype, or loses more by rounding to it than ``max_loss``.

        Returns:
            The share of the update that the rounding has lost, as in `flora.model.merge`.

        Raises:
            RuntimeError: naming the module, where that is impossible or refused, when already merged, or with no active
                adapter. Nothing is changed.
        """
        reason = self.check_mergeable()
        if reason is None and self.merged:
            reason = f"adapters {list(self._active)} are merged already"
        if reason is None and not self._active:
            reason = "no adapter is active"
        if reason is not None:
            raise RuntimeError(f"{self._label} cannot be merged: {reason}")
        deltas = [*self._deltas(), *self._blocks()]
        combined, lost = merging.merged(self.base_layer, self._kind, self._deltas(), self._blocks())
        reason = merging.unsafe(combined, lost, max_loss) if safe else None
        if reason is not None:
            raise RuntimeError(f"{self._label} cannot be merged safely: {reason}")
        self._original = {name: self.base_layer._parameters.get(name) for name in combined}
        self._combined, self._merged = combined, True
        for delta in deltas:
            delta.merged_in = self._label
        self._install()
        return lost

    def unmerge(self) -> None:
        """Puts the original parameters back: the very same ones. RuntimeError, naming the module, if not merged."""
        if not self.merged:
            raise RuntimeError(f"{self._label} is not merged")
        self.base_layer._parameters.update(self._original)
        self._forget_merged()

    def _forget_merged(self) -> None:
        self._merged, self._original, self._combined = False, {}, {}
        for _, delta in self.adapters():
            delta.merged_in = None

    def _install(self) -> None:
        """The parameters that the base should hold now, while merged."""
        self.base_layer._parameters.update(self._combined if self._enabled else self._original)

    @property
    def enabled(self) -> bool:
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)
        if self.merged:
            self._install()

    def unload(self, merge: bool) -> nn.Module:
        """The module to put back in this one's place: with the active deltas merged in, or exactly the original."""
        if merge and self._active and not self.merged:
            self.merge()
        if merge and self.merged:
            self._enabled = True
            self._install()
            self._forget_merged()
        elif self.merged:
            self.unmerge()
        let_go(self.base_layer, self._kind.weight_name)
        return self.base_layer

    # State ----------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module.state_dict`; the base's weight is the frozen one, merged or not."""
        state = super().state_dict(*args, **kwargs)
        for name, parameter in self._original.items():
            key = f"{kwargs.get('prefix', '')}base_layer.{name}"
            if parameter is None:
                state.pop(key, None)
            else:
                state[key] = parameter if kwargs.get("keep_vars") else parameter.detach()
        return state

    def put_aside(self) -> None:
        """Unmerge while a state is loaded, which holds the frozen weight and the deltas, and merge again after it."""
        self._merge_again = self._merge_again or self.merged
        if self.merged:
            self.unmerge()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.put_aside()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.merged:
            self._original, self._combined = (
                {name: None if p is None else self._moved(name, p, fn) for name, p in held.items()}
                for held in (self._original, self._combined)
            )
            self._install()
        return self

    def _moved(self, name: str, parameter: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
        """A parameter of a merged layer after `_apply`: the same object, if PyTorch lets it have the new storage."""
        if parameter is self.base_layer._parameters.get(name):
            return parameter  # moved with the base
        moved = fn(parameter.data)
        if not torch._has_compatible_shallow_copy_type(parameter, moved):
            return nn.Parameter(moved, parameter.requires_grad)
        parameter.data = moved
        return parameter

    def plan_of(self, adapter: str) -> str:
        """How the layer computes with this adapter: its plan, "own forward", "opaque", "lookup" or "block"."""
        self._known(adapter)
        base, kind = self.base_layer, self._kind
        delta = self.deltas[adapter]
        if isinstance(delta, OutputDelta):
            return "block"
        if kind.opaque:
            return "opaque"
        if kind is EMBEDDING:
            return "lookup"
        if not kind.stock(base) or _has_hooks(base):
            return "own forward"
        if kind is NORM:
            return "merged"
        assert isinstance(delta, WeightDelta)
        plan: str = delta.config.plan
        return plan

    def extra_repr(self) -> str:
        return f"active={list(self._active)}, merged={self.merged}"

    def adapters(self) -> Iterator[tuple[str, Delta]]:
        """(name, delta) of every adapter on this layer."""
        yield from self.deltas.items()  # type: ignore[misc]


def _dropped(args: tuple[Any, ...], kwargs: dict[str, Any], dropout: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with dropout on its input: the first floating-point tensor among them."""

    def is_input(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point()

    for i, value in enumerate(args):
        if is_input(value):
            return (*args[:i], F.dropout(value, dropout), *args[i + 1 :]), kwargs
    for key, value in kwargs.items():
        if is_input(value):
            return args, kwargs | {key: F.dropout(value, dropout)}
    return args, kwargs


def site_of(module: nn.Module, config: DeltaConfig, name: str, shapes_only: bool = False) -> Site:
    """What a delta of ``config`` has to know of the unadapted module, which it fits."""
    kind, shape = kind_or_module(module), delta_shape(module, config)
    held = [*module.parameters(), *module.buffers()]
    device = held[0].device if held else torch.device("cpu")
    dtype = compute_dtype(next((t.dtype for t in held if t.is_floating_point()), torch.float32))
    if config.of_output:
        return Site(shape, dtype, device, name=name, output=output_of(module), shapes_only=shapes_only)
    if kind.opaque:
        return Site(shape, torch.float32, device, name=name, shapes_only=shapes_only)
    weight: Tensor = getattr(module, kind.weight_name)
    return Site(
        shape,
        compute_dtype(weight.dtype),
        weight.device,
        kind.turned(weight),
        name,
        transposed=kind is TRANSPOSED,
        has_bias="bias" in module._parameters,
        norm_offset=offset(module) if kind is NORM else None,
        looked_up=kind is EMBEDDING,
        shapes_only=shapes_only,
    )


def _merge_again(layer: nn.Module, incompatible_keys: Any) -> None:
    if isinstance(layer, AdaptedLayer) and layer._merge_again:
        layer._merge_again = False
        layer.merge()


def _held(module: nn.Module, name: str) -> Any:
    """An attribute that is a parameter as a rule, found without nn.Module's slow __getattr__; None if there is none."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name, None)


def is_protocol(name: str) -> bool:
    """Whether Python asks for an attribute, not a program: ``__deepcopy__`` of a base would copy the base alone."""
    return name.startswith("__") and name.endswith("__")


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def check_adapter_name(name: str) -> None:
    """Raises ValueError for a name that can be neither a module's key nor a folder's name."""
    if not isinstance(name, str) or not name or not name.replace("-", "_").replace("_", "a").isalnum():
        raise ValueError(f"adapter name {name!r} must be letters, digits, '-' and '_'")
    if hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter name {name!r} is taken by a method of torch.nn.ModuleDict")


def alone(config: DeltaConfig) -> DeltaConfig:
    """A configuration for one layer by itself, which has no name that a pattern could match."""
    return replace(config, rank_pattern=None, scale_pattern=None).for_module("")


def wrap(module: nn.Module, config: DeltaConfig, name: str = "default") -> AdaptedLayer:
    """One layer with one delta on it, drop-in; the layer is frozen, but for deltas that are in it already.

    Raises TypeError for a layer that cannot be adapted, ValueError for ranks that do not fit its weight.

    >>> layer = flora.wrap(nn.Conv2d(64, 128, 3, padding=1), flora.TuckerConfig(rank=8))
    """
    if isinstance(module, AdaptedLayer):
        raise TypeError(f"{module.name or describe(module.base_layer)} is adapted already; use add_delta")
    inner = {id(p) for m in module.modules() if isinstance(m, Delta) for p in m.parameters()}
    state = [(p, p.requires_grad) for p in module.parameters()]
    layer = AdaptedLayer(module)
    try:
        layer.add_delta(name, alone(config))
    except BaseException:
        for parameter, flag in state:
            parameter.requires_grad_(flag)
        raise
    for parameter in module.parameters():
        if id(parameter) not in inner:
            parameter.requires_grad_(False)
    layer.set_active([name])
    return layer
