"""SURM's adapter: a square structured matrix, an activation and a bias after a module (arXiv 2406.17740)."""

from __future__ import annotations

from torch import Tensor, nn

from flora import functional
from flora.config.adapter import ACTIVATIONS, StructuredAdapterConfig
from flora.deltas.base import OutputDelta, Site, all_zero
from flora.deltas.structured import TOEPLITZ_STD, block_of, periodic, symmetric, terms_of
from flora.forms import KroneckerForm, Parts, ToeplitzForm
from flora.ops import LINEAR


class StructuredAdapterDelta(OutputDelta, config=StructuredAdapterConfig):
    """out = y + s·act(M·dropout(y)) + b on the n channels of y; M = 0 at the start.

    ============  ==================================  =====================================
    kind          M                                   parameters
    ============  ==================================  =====================================
    circulant     C(a ⊙ b)                            ``a`` ~ N(0, 1), ``b`` = 0, both (n,)
    toeplitz      T(a ⊙ b), symmetric                 ``a`` ~ N(0, 0.02²), ``b`` = 0, both (n,)
    kronecker     (B ⊗ A)ᵀ: a row y becomes y·(B ⊗ A)  ``a`` (r, r) ~ N(0, 0.02²), ``b`` (n/r, n/r) = 0
    ldr           Σ_i C(circulant_i)·S(skew_i)        ``circulant`` = 0, ``skew`` ~ N(0, 0.02²), both (terms, n)
    ============  ==================================  =====================================

    ``bias`` (n,) is b. ``norm_before`` and ``norm_after`` are LayerNorms of the block's own: s·norm(act(M·dropout(norm(
    y)))) + b is what is added to y.
    """

    config: StructuredAdapterConfig

    def __init__(self, config: StructuredAdapterConfig, site: Site) -> None:
        super().__init__(config, site)
        n = self.output.width
        if config.kind == "ldr":
            assert config.terms is not None
            self.circulant, self.skew = (site.parameter(config.terms, n) for _ in range(2))
            nn.init.normal_(self.skew, std=TOEPLITZ_STD)
        else:
            r = config.block_size(n, site.name) if config.kind == "kronecker" else 0
            self.a = site.parameter(r, r) if r else site.parameter(n)
            self.b = site.parameter(n // r, n // r) if r else site.parameter(n)
            nn.init.normal_(self.a, std=1.0 if config.kind == "circulant" else TOEPLITZ_STD)
        self.bias = site.parameter(n) if config.bias else None
        self.norm_before = _norm(n, site) if config.norm_before else None
        self.norm_after = _norm(n, site) if config.norm_after else None

    def stuck(self) -> str | None:
        factors = (self.circulant, self.skew) if self.config.kind == "ldr" else (self.a, self.b)
        return "both factors of its matrix are zero" if self.bias is None and all_zero(*factors) else None

    @property
    def size(self) -> str:
        kind = self.config.kind
        if kind == "kronecker":
            return f"{kind}, {block_of(self.a)}"
        return f"{kind}, {terms_of(self.skew)}" if kind == "ldr" else kind

    def matrix(self) -> Parts:
        """M (n, n), as `flora.functional` takes it."""
        kind = self.config.kind
        if kind == "kronecker":
            return Parts(KroneckerForm(1.0, self.shape), (self.a.mT, self.b.mT))
        form = ToeplitzForm(1.0, self.shape)
        if kind == "ldr":
            return Parts(form, (periodic(self.circulant, 1), periodic(self.skew, -1)))
        v = self.a * self.b
        return Parts(form, ((periodic(v, 1) if kind == "circulant" else symmetric(v))[None], None))

    def transformed(self, y: Tensor) -> Tensor:
        matrix = self.matrix()
        dtype = matrix.tensors[0].dtype
        x = y if self.norm_before is None else self.norm_before(y.to(dtype))
        x = functional.update(LINEAR, x, None, self.shape, matrix, dropout=self.dropout)
        z = ACTIVATIONS[self.config.activation](x.to(dtype))
        if self.norm_after is not None:
            z = self.norm_after(z)
        z = self.factor * z
        if self.bias is not None:
            z = z + self.strength * self.bias
        return (y.to(dtype) + z).to(y.dtype)

    def unmergeable(self) -> str | None:
        if self.config.activation != "identity":
            return f"activation={self.config.activation!r} is no linear map"
        if self.norm_before is not None or self.norm_after is not None:
            return "a LayerNorm is no linear map"
        return None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        matrix = self.factor * functional.delta_weight(None, self.matrix())
        weight = weight + (matrix @ weight.flatten(1)).reshape(weight.shape)
        if bias is not None:
            bias = bias + matrix @ bias
        if self.bias is not None:
            bias = self.strength * self.bias + (0 if bias is None else bias)
        return weight, bias

    def extra_repr(self) -> str:
        return f"kind={self.config.kind}, width={self.output.width}, scale={self.scale:g}"


def _norm(n: int, site: Site) -> nn.LayerNorm:
    return nn.LayerNorm(n, dtype=site.dtype, device=site.device)
