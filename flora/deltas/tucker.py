"""FLoRA's delta: ΔW = s · G ×₁ U_out ×₂ U_in ×₃ U_k1 …, in the weight's own shape (arXiv 2405.14739, section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flora import functional
from flora.config import TuckerConfig
from flora.deltas.base import Delta
from flora.ops import Op, Tucker

MODES = ("out", "in", "kernel")


class TuckerDelta(Delta):
    """A Tucker decomposition with trainable core and factors.

    Parameters
    ----------
    config
        ranks, scale, initialisation, and which parts learn.
    shape
        the weight's shape (d_out, d_in/groups, *k).
    ranks
        one rank a mode, in the same order.
    weight
        the frozen weight, (d_out, d_in/groups, *k): needed by ``init="hosvd"`` only.
    name
        the module's name, for messages.

    ``core`` has shape ``ranks``, ``factors[m]`` is (shape[m], ranks[m]). The core starts at zero, so ΔW = 0.

    - "reference": every factor ~ N(0, 1/(2·rank)), kaiming_normal with a = √3, as the authors draw it;
    - "orthogonal": orthonormal columns;
    - "hosvd": the leading left singular vectors of the weight's unfolding along each mode.
    """

    config: TuckerConfig

    def __init__(
        self,
        config: TuckerConfig,
        shape: tuple[int, ...],
        ranks: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        weight: Tensor | None = None,
        name: str = "",
    ) -> None:
        super().__init__(config, shape)
        self.core = nn.Parameter(torch.zeros(ranks, dtype=dtype, device=device))
        sizes = zip(shape, ranks, strict=True)
        self.factors = nn.ParameterList(torch.empty(dim, rank, dtype=dtype, device=device) for dim, rank in sizes)
        if config.init == "hosvd":
            self._init_hosvd(weight, name)
        else:
            for factor in self.factors:
                if config.init == "orthogonal":
                    nn.init.orthogonal_(factor)
                else:
                    nn.init.kaiming_normal_(factor, a=math.sqrt(3))
        self.set_trainable(True)

    @torch.no_grad()
    def _init_hosvd(self, weight: Tensor | None, name: str) -> None:
        if weight is None or weight.is_meta or not weight.is_floating_point():
            raise ValueError(f'{name or "layer"}: init="hosvd" needs the values of a floating-point weight')
        for mode, factor in enumerate(self.factors):
            unfolding = weight.detach().to(torch.float64).movedim(mode, 0).flatten(1)
            vectors = torch.linalg.eigh(unfolding @ unfolding.mT).eigenvectors  # ascending eigenvalues
            factor.copy_(vectors.flip(-1)[:, : factor.shape[1]])

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every mode, in weight order."""
        return tuple(self.core.shape)

    @property
    def tucker(self) -> Tucker:
        """The tensors as `flora.functional` takes them."""
        core = self._parameters.get("core")  # as every call needs it, without nn.Module's slow __getattr__
        factors = tuple(self._modules["factors"]._parameters.values())  # type: ignore[union-attr]
        return Tucker(self.core if core is None else core, factors, self.scale)

    def adapted(self, op: Op, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        return functional.adapted(op, x, weight, bias, self.tucker, plan=self.config.plan, dropout=dropout)

    def update(self, op: Op, x: Tensor, dropout: float) -> Tensor:
        return functional.update(op, x, self.tucker, dropout=dropout)

    def embedding_update(self, ids: Tensor, padding_idx: int | None) -> Tensor:
        return functional.embedding_update(ids, self.tucker, padding_idx)

    def effective_weight(self, weight: Tensor | None) -> Tensor:
        return functional.effective_weight(weight, self.tucker)

    def plan(self, op: Op, x: Tensor, weight: Tensor) -> str:
        return functional.resolve_plan(
            op, x, weight, self.tucker, self.config.plan, self.dropout, self.core.requires_grad
        )

    def stuck(self) -> str | None:
        """A part's gradient is a product of all the others, so one part may be zero, and only if that part learns."""
        parts = {"the core": self.core} | {f"factor {m}": f for m, f in enumerate(self.factors)}
        zero = [name for name, part in parts.items() if not part.is_meta and torch.count_nonzero(part) == 0]
        if len(zero) > 1:
            return f"{' and '.join(zero)} are zero"
        if zero and not parts[zero[0]].requires_grad:
            return f"{zero[0]} is zero and not among the trainable parts, {self.config.trainable}"
        return None

    def set_trainable(self, trainable: bool) -> None:
        parts = self.config.trainable
        self.core.requires_grad_(trainable and "core" in parts)
        for mode, factor in enumerate(self.factors):
            factor.requires_grad_(trainable and ("factors" in parts or MODES[min(mode, 2)] in parts))

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, ranks={self.ranks}, scale={self.scale:g}"
