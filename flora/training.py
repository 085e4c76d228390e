"""What a training loop of one's own asks for: parameter groups, clipping, and a line on how it goes.

Every function takes the model as the loop has it: bare, compiled, in DistributedDataParallel or sharded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from flora.deltas import Delta, LoRADelta
from flora.deltas.tucker import Factored
from flora.distributed import is_sharded, settle, whole
from flora.layers import AdaptedLayer
from flora.norms import is_norm
from flora.report import base_size
from flora.saved import SavedModule

ROLES = ("core", "lora_b", "factors", "others", "modules_to_save", "base")
"""What `parameter_groups` names its groups by."""

_Named = tuple[str, nn.Parameter]


@overload
def trainable_parameters(
    model: nn.Module, name: str | Sequence[str] | None = None, *, named: Literal[False] = False
) -> list[nn.Parameter]: ...


@overload
def trainable_parameters(
    model: nn.Module, name: str | Sequence[str] | None = None, *, named: Literal[True]
) -> list[_Named]: ...


def trainable_parameters(
    model: nn.Module, name: str | Sequence[str] | None = None, *, named: bool = False
) -> list[nn.Parameter] | list[_Named]:
    """The parameters that learn, each once, in the order of ``model.named_parameters()``.

    Args:
        name: an adapter, or several: what they train alone, modules of ``modules_to_save`` included. None: everything
            in the model that requires gradients.
        named: pairs of a name and a parameter, which optimizers take as well.

    Raises:
        ValueError: no such adapter.
    """
    settle(model)
    found = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    if name is not None:
        wanted = _of_adapters(model, name)
        found = [(key, p) for key, p in found if id(p) in wanted]
    return found if named else [p for _, p in found]


def parameter_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    core_lr: float | None = None,
    lora_b_lr: float | None = None,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Groups of the parameters that learn, for any optimizer of PyTorch's or of its kind.

    >>> optimizer = torch.optim.AdamW(flora.parameter_groups(model, lr=1e-3, core_lr=4e-3, weight_decay=0.01))

    A group's ``"name"`` is what its parameters are, and "…, no decay" for those of them that weight decay is no use to:
    biases, weights of normalisation, and everything of fewer than two dimensions.

    =================  =====================================================================
    "core"             cores of Tucker and LoRA-XS
    "lora_b"           LoRA's B, which starts at 0: ``factors.0``
    "factors"          the other factors of Tucker and LoRA, whose A it is on a convolution, too
    "others"           parameters of all other methods
    "modules_to_save"  the modules that are trained whole
    "base"             what else of the model learns
    =================  =====================================================================

    Args:
        lr: the learning rate of all groups; None leaves it to the optimizer.
        core_lr: that of the cores.
        lora_b_lr: that of LoRA's B. LoRA+ takes 16 times A's (arXiv 2402.12354, section 4).
        weight_decay: that of all groups with decay; None leaves it to the optimizer.

    Raises:
        ValueError: a number below 0 or not finite, one for parameters that are not there, or a model in which nothing
            learns.
    """
    rates = {"core": core_lr, "lora_b": lora_b_lr}
    for what, value in (("lr", lr), ("core_lr", core_lr), ("lora_b_lr", lora_b_lr), ("weight_decay", weight_decay)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf):
            raise ValueError(f"{what}={value!r} must be a finite number of 0 or more")
    learning = trainable_parameters(model, named=True)
    if not learning:
        raise ValueError(f"nothing in {type(model).__name__} learns")
    roles, plain = _roles(model), _without_decay(model)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for key, parameter in learning:
        decays = parameter.ndim > 1 and id(parameter) not in plain and key.rpartition(".")[2] != "bias"
        groups.setdefault((roles.get(id(parameter), "base"), decays), []).append(parameter)
    for role, rate in rates.items():
        if rate is not None and not any(role == own for own, _ in groups):
            raise ValueError(f"{role}_lr={rate!r}: no parameter of {type(model).__name__} that learns is a {role!r}")
    result = []
    for role, decays in sorted(groups, key=lambda group: (ROLES.index(group[0]), not group[1])):
        group: dict[str, Any] = {"name": role if decays else f"{role}, no decay", "params": groups[role, decays]}
        rate = lr if rates.get(role) is None else rates[role]
        decay = weight_decay if decays else 0.0
        group |= {key: value for key, value in (("lr", rate), ("weight_decay", decay)) if value is not None}
        result.append(group)
    return result


def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    name: str | Sequence[str] | None = None,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` over the adapters alone, ``modules_to_save`` included.

    Where the model is sharded, every process has to call it: the norm is that of the whole gradient.

    Args:
        max_norm: the gradients are scaled in place, all by one number, so that their norm is at most this.
        name: an adapter, or several, whose gradients are meant; None: all.

    Returns:
        The norm before, (), the same in every process that holds the same gradients.

    Raises:
        ValueError: no such adapter.
        RuntimeError: no adapters in the model; with ``error_if_nonfinite`` a norm that is not finite.
    """
    settle(model)
    wanted = _of_adapters(model, name)
    parameters = [p for p in model.parameters() if id(p) in wanted and p.grad is not None]
    total = _norm([p.grad for p in parameters if p.grad is not None], norm_type, error_if_nonfinite)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total


class ProgressLine:
    """One line on how training goes, for a progress bar, a log or a callback; it prints nothing and runs no loop.

    >>> line = flora.ProgressLine(model)
    >>> for step, (x, y) in enumerate(bar := tqdm(loader)):
    ...     # forward, backward, optimizer.step()
    ...     if step % 10 == 0:
    ...         bar.set_postfix_str(line(loss, examples=10 * len(x), lr=scheduler.get_last_lr()[0]))

    "loss 0.4312, 512 examples/s, 0.42 % learns, norm 3.207, lr 0.001": the norm is that of an active adapter's learning
    parameters, by name where there are several; one that stands still, or grows without end, tells more than a loss.
    Examples a second are counted from call to call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base = base_size(model)
        self._last = time.perf_counter()

    def __call__(self, loss: float | Tensor | None = None, *, examples: int | None = None, **values: float) -> str:
        """The line.

        Args:
            loss: of the last step, say; reading it waits for the device that computes it.
            examples: how many went through the model since the last call.
            values: whatever else should be in the line, by name.

        Where the model is sharded, every process has to call it.
        """
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        loss = loss.detach() if isinstance(loss, Tensor) else loss
        parts = [] if loss is None else [f"loss {float(loss):.4g}"]
        if examples is not None and passed > 0:
            parts.append(f"{examples / passed:.4g} examples/s")
        share = sum(p.numel() for p in trainable_parameters(self.model)) / self.base
        parts.append(f"{100 * share:.3g} % learns")
        norms = adapter_norms(self.model)
        parts += [f"norm {one} {norm:.4g}" if len(norms) > 1 else f"norm {norm:.4g}" for one, norm in norms.items()]
        return ", ".join([*parts, *(f"{key} {value:.4g}" for key, value in values.items())])


def adapter_norms(model: nn.Module) -> dict[str, float]:
    """The norm of what each adapter in use learns, by its name; collective where the model is sharded."""
    settle(model)
    learning: dict[str, dict[int, Tensor]] = {}
    for adapter, module, active in _parts(model):
        if active:
            own = {id(p): p.detach() for p in module.parameters() if p.requires_grad}
            learning.setdefault(adapter, {}).update(own)
    return {adapter: float(_norm(list(own.values()))) for adapter, own in learning.items() if own}


def _norm(tensors: Sequence[Tensor], norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
    """The norm of tensors as of one vector, plain ones and DTensors together."""
    kinds = [[t for t in tensors if is_sharded(t)], [t for t in tensors if not is_sharded(t)]]
    norms = [whole(torch.nn.utils.get_total_norm(kind, norm_type)) for kind in kinds if kind]
    return torch.nn.utils.get_total_norm(norms, norm_type, error_if_nonfinite)


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """(adapter, its delta or its copy of a module, whether it is active), all through the model."""
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            yield from ((adapter, delta, adapter in module.active) for adapter, delta in module.adapters())
        elif isinstance(module, SavedModule):
            yield from ((adapter, copy, adapter == module.active) for adapter, copy in module.copies.items())


def _of_adapters(model: nn.Module, name: str | Sequence[str] | None) -> set[int]:
    """The identities of the parameters of these adapters, or of all."""
    parts = list(_parts(model))
    there = list(dict.fromkeys(adapter for adapter, _, _ in parts))
    if not there:
        raise RuntimeError(f"{type(model).__name__} has no adapters; flora.adapt adds one")
    names = there if name is None else [name] if isinstance(name, str) else list(name)
    for one in names:
        if one not in there:
            raise ValueError(f"there is no adapter {one!r}; there are {', '.join(map(repr, there))}")
    return {id(p) for adapter, module, _ in parts if adapter in names for p in module.parameters()}


def _roles(model: nn.Module) -> dict[int, str]:
    """What the parameters of the adapters are, by their identities: one of `ROLES`."""
    roles: dict[int, str] = {}
    for _, module, _ in _parts(model):
        if not isinstance(module, Delta):
            roles |= {id(p): "modules_to_save" for p in module.parameters()}
            continue
        roles |= {id(p): "others" for p in module.parameters()}
        if isinstance(module, Factored):
            low_rank = isinstance(module, LoRADelta)
            roles |= {id(p): "factors" for p in module.factors}
            if module.core is not None:
                roles[id(module.core)] = "factors" if low_rank else "core"
            if low_rank:
                roles[id(module.factors[0])] = "lora_b"
    return roles


def _without_decay(model: nn.Module) -> set[int]:
    """The identities of what normalisation layers hold."""
    return {id(p) for module in model.modules() if is_norm(module) for p in module.parameters(recurse=False)}
