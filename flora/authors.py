"""Adapter files of FLoRA's authors (arXiv 2405.14739).

They hold ``<module>.param_G``, the core (r_in, r_out, r_k…), and the factors ``param_0`` = U_in (d_in, r_in),
``param_1`` = U_out (d_out, r_out) and ``param_2…`` = U_k (k, r_k), each (dim, rank). Here the order is the weight's,
(out, in, k…). A rank above its mode, which their code allows, is folded into the core: G ×_m U_m, with the identity as
the factor. The files hold no scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from flora.config import TuckerConfig, is_suffix
from flora.kinds import delta_shape, unfit
from flora.reference import mode_product
from flora.targets import inside, near_misses


@dataclass(frozen=True)
class Translation:
    """What a file means in a model."""

    configs: dict[str, TuckerConfig] = field(default_factory=dict)
    """By the name of the layer; the ranks are the file's."""
    saved: list[str] = field(default_factory=list)
    """The modules of ``modules_to_save``."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """As an `AdapterFile` has them."""


def translate(
    tensors: Mapping[str, Tensor], config: TuckerConfig, modules: Mapping[str, nn.Module], base: Mapping[str, Tensor]
) -> Translation:
    """Find what a file means in a model.

    Args:
        config: everything but the ranks; its scale must be given for every layer.
        modules: of the unadapted model, by name.
        base: its tensors, by name: a file may repeat them, but not change them.

    Raises:
        ValueError: a key, shape or type that does not fit, naming the module.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.param_(G|\d+)", key)
        if match is None:
            others[key] = tensor
        else:
            parts.setdefault(match[1], {})[match[2]] = tensor
    if not parts:
        raise ValueError("it has no key <module>.param_G")
    prefix = _prefix(list(parts), modules)
    others = {key.removeprefix(prefix): tensor for key, tensor in others.items()}
    found = Translation(saved=_saved(others, config, modules))
    for key, of_layer in parts.items():
        where = key.removeprefix(prefix)
        reason = unfit(modules[where], config)
        if reason is not None:
            raise ValueError(f"{where} cannot be adapted: {reason}")
        core, factors = _in_weight_order(where, of_layer, delta_shape(modules[where], config))
        own = config.for_module(where)
        if own.scale is None:
            raise ValueError(f"{where}: the file holds no scale, and scale_pattern={config.scale_pattern} gives none")
        found.configs[where] = replace(own, rank=tuple(core.shape))
        found.tensors[f"{where}.core"] = core
        found.tensors.update({f"{where}.factors.{mode}": factor for mode, factor in enumerate(factors)})
    for key, tensor in others.items():
        if inside(key, found.saved):
            found.tensors[key] = tensor
        elif key not in base or not torch.equal(base[key].detach().cpu().to(tensor.dtype), tensor):
            raise ValueError(f"{key!r} is of no adapter and not the model's own; modules_to_save can name its module")
    return found


def _prefix(keys: Sequence[str], modules: Mapping[str, nn.Module]) -> str:
    """What stands before the names of a file, such as "base_model.model."; the shortest that leaves known modules."""
    components = keys[0].split(".")
    for count in range(len(components)):
        prefix = "".join(f"{part}." for part in components[:count])
        if all(key.startswith(prefix) and key.removeprefix(prefix) in modules for key in keys):
            return prefix
    missing = next((key for key in keys if key not in modules), keys[0])
    raise ValueError(f"the model has no module {missing!r}{near_misses(missing, [name for name in modules if name])}")


def _saved(others: Mapping[str, Tensor], config: TuckerConfig, modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules of ``modules_to_save`` that the file has tensors of."""
    saved: list[str] = []
    for suffix in config.modules_to_save or ():
        held = [name for name in modules if is_suffix(suffix, name) and any(inside(key, [name]) for key in others)]
        if not held:
            raise ValueError(f"modules_to_save: {suffix!r} is not in the file")
        saved += [name for name in held if name not in saved]
    return saved


def _in_weight_order(where: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Core and factors in weight order from the authors' (in, out, k…), ranks above their modes folded."""
    wanted = {"G", *(str(mode) for mode in range(len(shape)))}
    if set(parts) != wanted:
        missing, unknown = sorted(wanted - set(parts)), sorted(set(parts) - wanted)
        raise ValueError(f"{where}: param_{missing} are missing, param_{unknown} are too many for a weight {shape}")
    core = parts["G"]
    if core.ndim != len(shape) or not all(tensor.is_floating_point() for tensor in parts.values()):
        raise ValueError(f"{where}: param_G is {tuple(core.shape)} of {core.dtype}, the weight is {shape}")
    core = core.transpose(0, 1)
    factors = [parts[str(mode)] for mode in (1, 0, *range(2, len(shape)))]
    for mode, factor in enumerate(factors):
        if tuple(factor.shape) != (shape[mode], core.shape[mode]) or 0 in factor.shape:
            raise ValueError(
                f"{where}: a factor is {tuple(factor.shape)}; mode {mode} of the weight {shape} and of the core "
                f"{tuple(core.shape)} needs {(shape[mode], core.shape[mode])}"
            )
        if factor.shape[1] > factor.shape[0]:
            core = mode_product(core.double(), factor.double(), mode)
            factors[mode] = torch.eye(shape[mode], dtype=factor.dtype)
    return core.contiguous(), [factor.contiguous() for factor in factors]
