"""Hooks on an adapted model: the base's running statistics and dtype are held, the first training step is watched."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from flora import base_dtype as half
from flora.layers import AdaptedLayer
from flora.state import State, adapted_layers, listed, own_state
from flora.targets import Place, places


def hold_eval(module: nn.Module, args: Any) -> None:
    """A forward pre-hook: a frozen norm layer normalises with, and keeps, its running statistics, whatever its mode."""
    if module.training:
        module.training = False


def _watched(model: nn.Module) -> State | None:
    """The state, where this forward is the training step that is to show that it reaches every delta."""
    state: State | None = model.__dict__.get("_flora_state")
    if torch.compiler.is_compiling() or state is None or not state.watching:
        return None
    if not model.training or not torch.is_grad_enabled() or state.watched not in (None, threading.get_ident()):
        return None
    return state if all(layer.enabled for layer in adapted_layers(model).values()) else None


def watch(model: nn.Module) -> None:
    """Let the next training step show that it reaches every delta."""
    state = own_state(model)
    if state is not None:
        state.watching, state.watched = True, None


def forget_reached(model: nn.Module, args: Any) -> None:
    """A forward pre-hook: what ran before the first training step, an evaluation say, does not count."""
    state = _watched(model)
    if state is not None:
        state.watched = threading.get_ident()
        for layer in adapted_layers(model).values():
            layer.reached = False


def warn_unreached(model: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: after the first training step, warn about deltas that it did not reach."""
    state = _watched(model)
    if state is None or state.watched is None:
        return
    state.watching, state.watched = False, None
    learning = {name: layer for name, layer in adapted_layers(model).items() if _learns(layer)}
    merged = [name for name, layer in learning.items() if layer.merged]
    missed = [name for name, layer in learning.items() if not layer.reached]
    if merged:
        warnings.warn(
            f"the deltas of {listed(merged)} are merged and do not learn; unmerge first",
            stacklevel=2,
        )
    elif missed:
        warnings.warn(
            f"the forward did not reach the deltas of {listed(missed)}: they will not learn; exclude_modules can "
            "leave such layers out",
            stacklevel=2,
        )


def _learns(layer: AdaptedLayer) -> bool:
    return any(p.requires_grad for name in layer.active for p in layer.deltas[name].parameters())


def hold_base(model: nn.Module) -> None:
    """Hold the base's running statistics and its dtype, and watch whether a training step reaches the deltas."""
    state = own_state(model)
    if state is not None and state.base_dtype is not None:
        modules = [(place.original, _called(place)) for place in places(model)]
        half.hold(model, modules, state.base_dtype)
    for place in places(model):
        module = place.original
        if isinstance(module, _NormBase) and hold_eval not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hold_eval)
    if warn_unreached not in model._forward_hooks.values():
        model.register_forward_pre_hook(forget_reached)
        model.register_forward_hook(warn_unreached)


def _called(place: Place) -> nn.Module:
    """The module that is called for the one of the unadapted model: a layer's own hooks would cost it its fast path."""
    return place.module if isinstance(place.module, AdaptedLayer) else place.original


def release(root: nn.Module) -> None:
    """Take the hooks of `hold_base` off every module under a root; what was held follows the root's mode again."""
    ours = (hold_eval, forget_reached, warn_unreached)
    for module in root.modules():
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [k for k, hook in hooks.items() if hook in ours or isinstance(hook, half.HOOKS)]:
                with_kwargs.pop(key, None)
                if hooks.pop(key) is hold_eval:
                    module.training = root.training
