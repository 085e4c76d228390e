"""FLoRA's delta: ΔW = s · G ×₁ U_out ×₂ U_in ×₃ U_k1 …, in the weight's own shape (arXiv 2405.14739, section 3).

`Factored` is what every delta has that is a core and factors; those of the low-rank family are in lora.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flora.config import TuckerConfig
from flora.deltas.base import Site, WeightDelta
from flora.forms import Parts, Tucker, TuckerForm

MODES = ("out", "in", "kernel")


class Factored(WeightDelta):
    """A core and factors. A subclass draws them, gives them to `_hold` and may say in `set_trainable` which learn.

    Attributes
    ----------
    core
        (r_out, r_in, r_k…), or None for the identity.
    factors
        one for each mode, (shape[m], r_m), in weight order. Those that are missing at the end are identities.
    """

    core: nn.Parameter | None
    factors: nn.ParameterList

    def _hold(self, core: nn.Parameter | None, factors: Sequence[nn.Parameter]) -> None:
        self.register_parameter("core", core)
        self.factors = nn.ParameterList(factors)
        self._identities = (None,) * (len(self.shape) - len(factors))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every mode, in weight order."""
        if self.core is None:
            return tuple(factor.shape[1] for factor in self.factors)
        return tuple(self.core.shape)

    @property
    def size(self) -> str:
        return "×".join(map(str, self.ranks))

    @property
    def tucker(self) -> Tucker:
        """The tensors as `flora.functional` takes them."""
        core, *factors = self._tensors()
        return Tucker(core, tuple(factors), self.factor)

    def parts(self, weight: Tensor | None) -> Parts:
        tensors = self._tensors()
        return Parts(TuckerForm(self.factor, projects=len(tensors) < 3 or tensors[2] is not None), tensors)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        core = self._parameters.get("core")  # as every call needs it, without nn.Module's slow __getattr__
        factors = self._modules["factors"]._parameters.values()  # type: ignore[union-attr]
        return (self.core if core is None else core, *factors, *self._identities)

    def stuck(self) -> str | None:
        """A part's gradient is a product of all the others, so one part may be zero, and only if that part learns."""
        parts = {"the core": self.core} | {f"factor {m}": f for m, f in enumerate(self.factors)}
        there = {name: part for name, part in parts.items() if part is not None}
        zero = [name for name, part in there.items() if not part.is_meta and torch.count_nonzero(part) == 0]
        if len(zero) > 1:
            return f"{' and '.join(zero)} are zero"
        if zero and not there[zero[0]].requires_grad:
            return f"{zero[0]} is zero and does not learn"
        return None

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, ranks={self.ranks}, scale={self.scale:g}"


class TuckerDelta(Factored, config=TuckerConfig):
    """A Tucker decomposition with trainable core and factors.

    ``core`` has shape ``ranks``, ``factors[m]`` is (shape[m], ranks[m]). The core starts at zero, so ΔW = 0.

    - "reference": every factor ~ N(0, 1/(2·rank)), kaiming_normal with a = √3, as the authors draw it;
    - "orthogonal": orthonormal columns;
    - "hosvd": the leading left singular vectors of the weight's unfolding along each mode.

    Parameters
    ----------
    config
        ranks, scale, initialisation, and which parts learn.
    site
        the layer; its weight (d_out, d_in/groups, *k) is needed by ``init="hosvd"`` only.
    """

    config: TuckerConfig

    def __init__(self, config: TuckerConfig, site: Site) -> None:
        super().__init__(config, site)
        ranks = config.ranks(site.shape, site.name)
        self._hold(site.parameter(*ranks), [site.parameter(dim, r) for dim, r in zip(site.shape, ranks, strict=True)])
        if config.init == "hosvd" and not site.shapes_only:
            with torch.no_grad():
                for factor, (vectors, _) in zip(self.factors, hosvd(site, ranks, 'init="hosvd"'), strict=True):
                    factor.copy_(vectors)
        elif not site.shapes_only:
            for factor in self.factors:
                if config.init == "orthogonal":
                    nn.init.orthogonal_(factor)
                else:
                    nn.init.kaiming_normal_(factor, a=math.sqrt(3))
        self.set_trainable(True)

    def set_trainable(self, trainable: bool) -> None:
        parts = self.config.trainable
        assert self.core is not None
        self.core.requires_grad_(trainable and "core" in parts)
        for mode, factor in enumerate(self.factors):
            factor.requires_grad_(trainable and ("factors" in parts or MODES[min(mode, 2)] in parts))


@torch.no_grad()
def hosvd(site: Site, ranks: Sequence[int], why: str) -> list[tuple[Tensor, Tensor]]:
    """The leading left singular vectors (dim, rank) of W's unfolding along each mode, and their values, in float64.

    Raises ValueError, naming the module and ``why`` W is needed, if the layer does not have it as plain numbers.
    """
    weight = site.weight
    if weight is None or weight.is_meta or not weight.is_floating_point():
        raise ValueError(f"{site.label}: {why} needs the values of a floating-point weight")
    exact = weight.detach().to(torch.float64)
    if exact.ndim != 2:
        return [leading_vectors(exact.movedim(mode, 0).flatten(1), rank) for mode, rank in enumerate(ranks)]
    # Both sides of a matrix from one decomposition, that of its smaller side
    small = int(exact.shape[1] < exact.shape[0])
    matrix = exact.mT if small else exact
    vectors, values = leading_vectors(matrix, min(max(ranks), len(matrix)))
    k = ranks[small]
    sides = [(vectors[:, :k], values[:k]), _other_side(matrix, vectors, values, ranks[1 - small])]
    return sides[::-1] if small else sides


def leading_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors (rows, rank) of a matrix and their values, largest first; rank ≤ rows.

    By the eigenvectors of the smaller of its Gram matrices, so that values below 1e-8 of the largest are noise. Vectors
    beyond the number of columns are some that complete an orthonormal basis, with values of 0.
    """
    rows, columns = matrix.shape
    if rows > columns:
        return _other_side(matrix.mT, *leading_vectors(matrix.mT, min(rank, columns)), rank)
    squares, vectors = torch.linalg.eigh(matrix @ matrix.mT)  # ascending
    return vectors.flip(-1)[:, :rank], squares.flip(-1)[:rank].clamp(min=0).sqrt()


def _other_side(matrix: Tensor, left: Tensor, values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors (columns, rank) and their values from the left ones."""
    missing = max(0, rank - len(values))
    # Neither zero columns nor small values, which a division by them would blow up, keep Q from being orthonormal
    product = nn.functional.pad(matrix.mT @ left[:, :rank], (0, missing))
    return torch.linalg.qr(product).Q, nn.functional.pad(values[:rank], (0, missing))
