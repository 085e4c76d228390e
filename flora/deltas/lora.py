"""The low-rank family as cases of a Tucker delta: LoRA, LoCon and LoRA-XS, and what they are on convolutions."""

from __future__ import annotations

import math

import torch
from torch import nn

from flora.config import LoRAConfig, LoRAXSConfig
from flora.deltas.base import Site
from flora.deltas.tucker import Factored, hosvd


class LoRADelta(Factored, config=LoRAConfig):
    """ΔW = s·B·A (arXiv 2106.09685); on a convolution B is 1×1 and A has the kernel, as in PEFT.

    ======================== ================== ==================== ==================
    layer                    ``core``           ``factors[0]``       ``factors[1]``
    ======================== ================== ==================== ==================
    Linear, Conv1D           None               B (d_out, r)         Aᵀ (d_in, r)
    convolution              A (r, d_in/g, k…)  B (d_out, r)         –
    convolution, ``tucker``  (r, r, k…)         (d_out, r)           (d_in/g, r)
    Embedding                None               (num, r)             (dim, r)
    ======================== ================== ==================== ==================

    ``factors[0]`` starts at 0, so that ΔW = 0: PEFT's lora_B and lora_embedding_A, LyCORIS's lora_up. Everything else
    is drawn as there, kaiming_uniform with a = √5 of the matrix or kernel that it is: U(-b, b), b = fan_in^(-1/2). An
    Embedding's second factor, PEFT's lora_embedding_B, is drawn ~ N(0, 1).
    """

    config: LoRAConfig

    def __init__(self, config: LoRAConfig, site: Site) -> None:
        super().__init__(config, site)
        if len(site.shape) < 2:
            raise ValueError(f"{site.label}: LoRA needs a weight of two modes or more, not {tuple(site.shape)}")
        d_out, d_in, *kernel = site.shape
        r = config.rank
        core = site.parameter(r, r if config.tucker else d_in, *kernel) if kernel else None
        factors = [site.parameter(d_out, r)]
        if core is None or config.tucker:
            factors.append(site.parameter(d_in, r))
        self._hold(core, factors)
        if not site.shapes_only:
            self._draw(site.looked_up)

    @torch.no_grad()
    def _draw(self, looked_up: bool) -> None:
        if self.core is not None:
            nn.init.kaiming_uniform_(self.core, a=math.sqrt(5))
        for u_in in list(self.factors)[1:]:
            a = torch.empty(u_in.shape[::-1], dtype=u_in.dtype, device=u_in.device)
            u_in.copy_((a.normal_() if looked_up else nn.init.kaiming_uniform_(a, a=math.sqrt(5))).mT)


class LoRAXSDelta(Factored, config=LoRAXSConfig):
    """ΔW = s · G ×₁ U_out ×₂ U_in ×₃ U_k1 … with fixed singular vectors of W; only G learns (arXiv 2405.17604).

    ``core`` has the ranks, ``factors[m]`` (shape[m], ranks[m]) the leading left singular vectors of W's unfolding along
    mode m, without gradients. With ``singular_values`` those of the input are multiplied by theirs: of W = U·Σ·Vᵀ the
    factors are U and V·Σ.

    Needs the values of the weight: ValueError, naming the module, for a quantised or packed layer.
    """

    config: LoRAXSConfig

    def __init__(self, config: LoRAXSConfig, site: Site) -> None:
        super().__init__(config, site)
        ranks = config.ranks(site.shape, site.name)
        self._hold(site.parameter(*ranks), [site.parameter(dim, r) for dim, r in zip(site.shape, ranks, strict=True)])
        with torch.no_grad():
            decomposed = [] if site.shapes_only else hosvd(site, ranks, "LoRA-XS")
            for mode, (vectors, values) in enumerate(decomposed):
                self.factors[mode].copy_(vectors * values if mode == 1 and config.singular_values else vectors)
        self.set_trainable(True)

    def set_trainable(self, trainable: bool) -> None:
        assert self.core is not None
        self.core.requires_grad_(trainable)
        self.factors.requires_grad_(False)
