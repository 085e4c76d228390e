"""What every delta has: a parametrisation of ΔW for one weight, and nothing that knows a layer or a kernel."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flora.config import DeltaConfig
from flora.ops import Op


class Delta(nn.Module):
    """A trainable update ΔW of one frozen weight of shape (d_out, d_in/groups, *k).

    A subclass holds its parameters and says how they act: on activations (`adapted`, `update`), on the weight
    (`effective_weight`), and as a tensor (`delta_weight`). Its parameters are float32 (float64 on a float64 base) and
    stay so when the model is cast: half-precision masters would lose small steps.

    Attributes
    ----------
    config
        the configuration it was built from, patterns already applied.
    scale
        the factor s on ΔW. May be changed at any time while the layer is not merged.
    shape
        the weight's shape in the order (out, in, *k).
    """

    def __init__(self, config: DeltaConfig, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.scale = config.resolved_scale
        self.shape = shape

    @abstractmethod
    def adapted(self, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        """op(x, W, b) with the delta of dropped x on top, in the plan of the configuration."""

    @abstractmethod
    def update(self, op: Op, x: Tensor, dropout: float) -> Tensor:
        """s·ΔW·x of dropped x alone, in x's dtype."""

    @abstractmethod
    def embedding_update(self, ids: Tensor, padding_idx: int | None) -> Tensor:
        """The rows s·ΔW[ids], those of ``padding_idx`` zero."""

    @abstractmethod
    def effective_weight(self, weight: Tensor | None) -> Tensor:
        """W + s·ΔW in W's dtype, or s·ΔW in the delta's own for None; shapes (out, in, *k); differentiable."""

    @abstractmethod
    def plan(self, op: Op, x: Tensor, weight: Tensor) -> str:
        """The plan that a call with this x would take."""

    @abstractmethod
    def set_trainable(self, trainable: bool) -> None:
        """Let the parts that the configuration names learn, or none."""

    def stuck(self) -> str | None:
        """Why no parameter of this delta can ever get a gradient other than zero, or None if one can."""
        return None

    @property
    def dropout(self) -> float:
        """The probability that applies now: the configuration's in training, 0 in evaluation."""
        return self.config.dropout if self.training else 0.0

    def delta_weight(self, weight: Tensor) -> Tensor:
        """s·ΔW with the shape of ``weight``, which may be (out, in, *k) or, for transformers' Conv1D, (in, out).

        Returned in the delta's own dtype, differentiable. Raises ValueError if the shape is neither.
        """
        delta = self.effective_weight(None)
        if weight.shape == delta.shape:
            return delta
        if weight.ndim == 2 and weight.mT.shape == delta.shape:
            return delta.mT
        raise ValueError(f"delta_weight: the weight has shape {tuple(weight.shape)}, the delta {tuple(self.shape)}")

    def tensors(self) -> dict[str, Tensor]:
        """Everything that an adapter file must hold, trained or not, by name."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies `tensors` in. Names, shapes and finiteness are checked first: KeyError or ValueError, no change."""
        own = dict(self.named_parameters())
        if own.keys() != tensors.keys():
            missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
            raise KeyError(f"delta tensors do not fit: missing {missing}, unknown {extra}")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the delta needs {tuple(own[name].shape)}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds values that are not finite")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(_keep_precision(fn), recurse)  # type: ignore[no-untyped-call]


def _keep_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` as `nn.Module.to` passes it, made to move tensors but never to narrow them below float32."""

    def moved(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return fn(t)
        probe = fn(t.new_empty(0))
        if probe.dtype == t.dtype:
            return fn(t)
        dtype = torch.float64 if probe.dtype == torch.float64 else torch.float32
        return t.to(device=probe.device, dtype=dtype)

    return moved
