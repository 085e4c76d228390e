"""FLoRA's delta: ΔW = s · G ×₁ U_out ×₂ U_in ×₃ U_k1 …, in the weight's own shape (arXiv 2405.14739, section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flora.config import TuckerConfig
from flora.deltas.base import Site, WeightDelta
from flora.forms import Parts, Tucker, TuckerForm

MODES = ("out", "in", "kernel")


class TuckerDelta(WeightDelta, config=TuckerConfig):
    """A Tucker decomposition with trainable core and factors.

    Parameters
    ----------
    config
        ranks, scale, initialisation, and which parts learn.
    site
        the layer; its weight (d_out, d_in/groups, *k) is needed by ``init="hosvd"`` only.

    ``core`` has shape ``ranks``, ``factors[m]`` is (shape[m], ranks[m]). The core starts at zero, so ΔW = 0.

    - "reference": every factor ~ N(0, 1/(2·rank)), kaiming_normal with a = √3, as the authors draw it;
    - "orthogonal": orthonormal columns;
    - "hosvd": the leading left singular vectors of the weight's unfolding along each mode.
    """

    config: TuckerConfig

    def __init__(self, config: TuckerConfig, site: Site) -> None:
        super().__init__(config, site)
        ranks = config.ranks(site.shape, site.name)
        self.core = site.parameter(*ranks)
        sizes = zip(site.shape, ranks, strict=True)
        self.factors = nn.ParameterList(site.parameter(dim, rank) for dim, rank in sizes)
        if config.init == "hosvd" and not site.shapes_only:
            self._init_hosvd(site)
        elif not site.shapes_only:
            for factor in self.factors:
                if config.init == "orthogonal":
                    nn.init.orthogonal_(factor)
                else:
                    nn.init.kaiming_normal_(factor, a=math.sqrt(3))
        self.set_trainable(True)

    @torch.no_grad()
    def _init_hosvd(self, site: Site) -> None:
        weight = site.weight
        if weight is None or weight.is_meta or not weight.is_floating_point():
            raise ValueError(f'{site.label}: init="hosvd" needs the values of a floating-point weight')
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
        core, *factors = self._tensors()
        return Tucker(core, tuple(factors), self.factor)

    def parts(self, weight: Tensor | None) -> Parts:
        return Parts(TuckerForm(self.scale * self.strength), self._tensors())

    def _tensors(self) -> tuple[Tensor, ...]:
        core = self._parameters.get("core")  # as every call needs it, without nn.Module's slow __getattr__
        factors = self._modules["factors"]._parameters.values()  # type: ignore[union-attr]
        return (self.core if core is None else core, *factors)

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
