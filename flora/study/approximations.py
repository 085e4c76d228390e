"""The best ΔW that each parametrisation has for a known target, at a number of parameters.

flora's own methods are fitted as the deltas that they are in training: every approximation is what `flora.deltas` makes
of some parameters. Where the best ones are known by a formula they are set, and found by L-BFGS, in float64, where not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flora
from flora.config import DeltaConfig
from flora.config.structured import divisors
from flora.deltas import (
    CirculantDelta,
    Delta,
    KroneckerDelta,
    LDRDelta,
    LoRADelta,
    Site,
    ToeplitzDelta,
    TuckerDelta,
    WeightDelta,
    build,
)
from flora.study.decompositions import (
    along,
    displaced,
    held_by_ranks,
    hooi,
    in_blocks,
    multiply,
    nearest_circulant,
    nearest_kronecker,
    nearest_toeplitz,
)

COPIES = 64
"""A budget is that of a network of so many layers like the one at hand, over which `flora.budget` spreads the next
rank, as it does over the layers of any network. So it is met within 1/64, however coarse the ranks of one layer are."""

DRAWS = 3  # of factors that stay as they were drawn
SWEEPS = 50  # of alternating least squares

_LOHA_STEPS = 200  # of L-BFGS
_NEARLY = 0.1  # the spread of numbers by which a start is kept off a saddle point

EXACT, ALTERNATING, OPTIMISED = "exact", "alternating", "optimised"
"""How parameters were found: by a formula for the best ones; by one for each part, the others held, in turn, until
nothing changes; by L-BFGS from several starts. Only the first cannot be a local optimum."""


class TooFewParametersError(ValueError):
    """Raised for a budget below the least number of parameters that a method has."""


@dataclass(frozen=True)
class Size:
    """What some of the copies have: a setting of the method, its parameters a layer, and how many have it."""

    setting: Any
    parameters: int
    copies: int


@dataclass(frozen=True)
class Fit:
    """Approximations by one setting: one, or several draws of what does not learn. ``how``: see `EXACT`."""

    weights: tuple[Tensor, ...]
    how: str


class Approximation(ABC):
    """A parametrisation of the update of one weight."""

    @abstractmethod
    def sizes(self, target: Tensor, parameters: int) -> list[Size]:
        """What `COPIES` layers of the target's shape get for ``parameters`` each: one size, or two.

        Raises TooFewParametersError if the method needs more.
        """

    @abstractmethod
    def fit(self, target: Tensor, setting: Any, seed: int) -> Fit:
        """The best approximation of a target, float64, that a setting has."""

    @abstractmethod
    def label(self, setting: Any) -> str:
        """The setting, for a reader."""


# flora's own ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfConfig(Approximation):
    """A method of flora's, its size chosen by `flora.budget`."""

    config: DeltaConfig

    def sizes(self, target: Tensor, parameters: int) -> list[Size]:
        by_layer = self.config.ordered and hasattr(self.config, "rank")  # else all layers have one size
        copies = COPIES if by_layer else 1
        layers = nn.ModuleList([layer_of(target.shape) for _ in range(copies)])
        try:
            found = flora.budget(layers, self.config, parameters * copies)
        except ValueError as error:
            raise TooFewParametersError(str(error)) from error
        counted = Counter(found.for_module(str(copy)) for copy in range(copies))
        return [Size(own, parameters_of(own, target.shape), n * COPIES // copies) for own, n in counted.items()]

    def fit(self, target: Tensor, setting: DeltaConfig, seed: int) -> Fit:
        site = Site(tuple(target.shape), dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            deltas = [build(setting, site) for _ in range(DRAWS if _keeps_what_is_drawn(setting) else 1)]
            hows = [_set_best(delta, target) for delta in deltas]
        return Fit(tuple(_weight(delta) for delta in deltas), hows[0])

    def label(self, setting: DeltaConfig) -> str:
        for name in ("rank", "terms", "block"):
            if (value := getattr(setting, name, None)) is not None:
                return f"{name} {'×'.join(map(str, value)) if isinstance(value, tuple) else value}"
        return ""


class BestRanks(OfConfig):
    """A Tucker decomposition with, for each mode, the rank that serves the target best, by what the HOSVD that is
    truncated to it holds of the target."""

    def sizes(self, target: Tensor, parameters: int) -> list[Size]:
        settings, counts = _best_ranks(target)
        return [
            Size(replace(self.config, rank=settings[i]), counts[i], copies)  # type: ignore[call-arg]
            for i, copies in shared(counts, parameters)
        ]


@lru_cache(maxsize=1)  # one target is asked about at every budget
def _best_ranks(target: Tensor) -> tuple[list[tuple[int, ...]], list[int]]:
    """The multilinear ranks, and their numbers of parameters, between which layers are shared out."""
    counts, held = (found.flatten() for found in (tucker_parameters(target.shape), held_by_ranks(target)))
    hull = _rising_hull(counts, held)
    places = [torch.unravel_index(torch.tensor(place), target.shape) for place in hull]
    return [tuple(int(index) + 1 for index in place) for place in places], [int(counts[place]) for place in hull]


def tucker_parameters(shape: Sequence[int]) -> Tensor:
    """How many parameters a Tucker decomposition has: entry [r_0 - 1, r_1 - 1, …], of the weight's shape."""
    counts = torch.ones((), dtype=torch.long)
    for extent in shape:
        counts = counts[..., None] * torch.arange(1, extent + 1)
    for mode, extent in enumerate(shape):
        counts = counts + along(extent * torch.arange(1, extent + 1), mode, len(shape))
    return counts


def _rising_hull(counts: Tensor, held: Tensor) -> list[int]:
    """The places, by rising counts, between which layers can be shared out so that nothing holds more on average."""
    order = torch.stack([counts, -held]).numpy()
    places = torch.from_numpy(np.lexsort(order[::-1]))
    best = held[places].cummax(0).values
    rising = torch.cat([torch.tensor([True]), held[places][1:] > best[:-1]])
    hull: list[int] = []
    for place in places[rising].tolist():
        while len(hull) > 1 and _below(counts, held, hull[-2], hull[-1], place):
            hull.pop()
        hull.append(place)
    return hull


def _below(counts: Tensor, held: Tensor, first: int, middle: int, last: int) -> bool:
    """Whether the middle one of three points lies on or below the line through the others."""
    rise = (held[last] - held[first]) * (counts[middle] - counts[first])
    return bool((held[middle] - held[first]) * (counts[last] - counts[first]) <= rise)


def shared(counts: Sequence[int], parameters: int) -> list[tuple[int, int]]:
    """Pairs of an index into ``counts``, which rise, and how many of `COPIES` layers have so many parameters: the most
    that fit all, and the next ones for as many layers as it can be afforded for."""
    fitting = [i for i, count in enumerate(counts) if count <= parameters]
    if not fitting:
        raise TooFewParametersError(f"parameters={parameters} are fewer than the {counts[0]} that it has at least")
    low = fitting[-1]
    if low + 1 == len(counts):
        return [(low, COPIES)]
    raised = COPIES * (parameters - counts[low]) // (counts[low + 1] - counts[low])
    return [pair for pair in ((low, COPIES - raised), (low + 1, raised)) if pair[1]]


def layer_of(shape: Sequence[int]) -> nn.Module:
    """A layer without values whose weight has the shape (d_out, d_in/groups, k…); depthwise if d_in/groups is 1."""
    d_out, d_in, *kernel = shape
    with torch.device("meta"):
        if not kernel:
            return nn.Linear(d_in, d_out, bias=False)
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
        groups = d_out if d_in == 1 else 1
        return convolution(d_in * groups, d_out, tuple(kernel), groups=groups, bias=False)  # type: ignore[arg-type]


def parameters_of(config: DeltaConfig, shape: Sequence[int]) -> int:
    """How many learn, of one layer's delta."""
    delta = build(config, Site(tuple(shape), device="meta", shapes_only=True))
    return sum(p.numel() for p in delta.parameters() if p.requires_grad)


def _keeps_what_is_drawn(config: DeltaConfig) -> bool:
    return isinstance(config, flora.TuckerConfig) and "factors" not in config.trainable


def _weight(delta: Delta) -> Tensor:
    assert isinstance(delta, WeightDelta)
    return delta.alone(None).detach()


def _set_best(delta: Delta, target: Tensor) -> str:
    """Gives a delta the parameters with which it is closest to the target; returns how they were found."""
    assert isinstance(delta, WeightDelta)
    for kind, solve in _SOLVERS.items():
        if isinstance(delta, kind):
            with torch.no_grad():
                how: str = solve(delta, target)
            return how
    starts, steps = _STARTS[type(delta)]
    optimise(list(delta.parameters()), lambda: delta.alone(None), target, starts(delta, target.flatten(1)), steps)
    return OPTIMISED


def _solve_tucker(delta: TuckerDelta, target: Tensor) -> str:
    if _keeps_what_is_drawn(delta.config):
        assert delta.core is not None
        delta.core.copy_(multiply(target, [torch.linalg.pinv(u) for u in delta.factors]))
        return EXACT
    return _set_tucker(delta, target, delta.ranks)


def _solve_lora(delta: LoRADelta, target: Tensor) -> str:
    if delta.core is not None and len(delta.factors) == 2:
        return _set_tucker(delta, target, (*delta.ranks[:2], *[None] * (target.ndim - 2)))
    u, s, vh = (part[..., : delta.config.rank] for part in _svd(target.flatten(1)))
    fitted(delta.factors[0], u * s)
    if delta.core is None:
        fitted(delta.factors[1], vh)
    else:
        fitted(delta.core, vh.mT.reshape(-1, *target.shape[1:]))
    return EXACT


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values and V, whose columns belong to them."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.mT


def _set_tucker(delta: TuckerDelta | LoRADelta, target: Tensor, ranks: Sequence[int | None]) -> str:
    cut = [None if rank is None else min(rank, dim) for rank, dim in zip(ranks, target.shape, strict=True)]
    core, factors = hooi(target, cut)
    assert delta.core is not None
    fitted(delta.core, core)
    for own, factor in zip(delta.factors, factors, strict=False):
        assert factor is not None
        fitted(own, factor)
    return ALTERNATING


def fitted(parameter: Tensor, values: Tensor) -> None:
    """Copies values into the first places along every mode; the others become 0."""
    parameter.zero_()
    parameter[tuple(slice(extent) for extent in values.shape)] = values


def _solve_kronecker(delta: KroneckerDelta, target: Tensor) -> str:
    a, b = nearest_kronecker(target.flatten(1), *delta.a.shape)
    delta.a.copy_(a)
    delta.b.copy_(b)
    return EXACT


def _solve_circulant(delta: CirculantDelta, target: Tensor) -> str:
    vector = nearest_circulant(target.flatten(1))
    if delta.config.product:
        delta.a.fill_(1)
        delta.b.copy_(vector)
    else:
        delta.a.copy_(vector)
    return EXACT


def _toeplitz_starts(delta: ToeplitzDelta, matrix: Tensor) -> list[list[Tensor]]:
    """The nearest Toeplitz matrix, times one that is nearly the identity."""
    vector = nearest_toeplitz(matrix)
    identity = torch.randn_like(vector).mul_(_NEARLY / len(vector))
    identity[0] = 1
    return [[vector, identity]]


def _ldr_starts(delta: LDRDelta, matrix: Tensor) -> list[list[Tensor]]:
    """The nearest circulant matrix, times one that is nearly the identity, and little else; and the nearest matrix of
    half as high a rank as there are terms."""
    circulant, skew = (torch.randn_like(p).mul_(_NEARLY / delta.n) for p in (delta.circulant, delta.skew))
    circulant[0], skew[:, 0] = nearest_circulant(matrix), 1
    terms = len(circulant)
    u, s, v = (part[..., : terms // 2] for part in _svd(matrix))
    low = torch.nn.functional.pad(u * s @ v.mT, (0, delta.n - delta.d_in, 0, delta.n - delta.d_out))
    start = displaced(low, terms)
    return [[circulant, skew], [part + one * part.std() for part, one in zip(start, (circulant, skew), strict=True)]]


_STARTS: dict[type[WeightDelta], tuple[Callable[[Any, Tensor], list[list[Tensor]]], int]] = {
    ToeplitzDelta: (_toeplitz_starts, 500),
    LDRDelta: (_ldr_starts, 150),
}
"""For the methods whose best parameters no formula gives: where L-BFGS starts, and how many steps it takes."""

_SOLVERS: dict[type[WeightDelta], Callable[[Any, Tensor], str]] = {
    TuckerDelta: _solve_tucker,
    LoRADelta: _solve_lora,
    KroneckerDelta: _solve_kronecker,
    CirculantDelta: _solve_circulant,
}


# Others' -------------------------------------------------------------------------------------------------------------


class LoHa(Approximation):
    """ΔW = (A₁·B₁) ⊙ (A₂·B₂) of the matrix (d_out, d_in/groups·k…), a setting being the rank of both products.

    Source: FedPara, arXiv 2108.06098, as LyCORIS (arXiv 2309.14859) and PEFT have it.
    """

    def sizes(self, target: Tensor, parameters: int) -> list[Size]:
        rows, columns = target.flatten(1).shape
        counts = [2 * rank * (rows + columns) for rank in range(1, min(rows, columns) + 1)]
        return [Size(i + 1, counts[i], copies) for i, copies in shared(counts, parameters)]

    def fit(self, target: Tensor, setting: int, seed: int) -> Fit:
        matrix = target.flatten(1)
        rows, columns = matrix.shape
        shapes = [(rows, setting), (setting, columns)] * 2
        parts = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        u, s, v = _svd(matrix)
        draw = torch.Generator().manual_seed(seed)
        ones = [torch.randn(shape, dtype=torch.float64, generator=draw).mul_(_NEARLY) for shape in shapes[2:]]
        ones[0][:, 0] = ones[1][0] = 1  # times the truncated SVD: no worse than LoRA of this rank
        start = [u[:, :setting] * s[:setting], v[:, :setting].mT, *ones]
        optimise(parts, lambda: loha(*parts), matrix, [start], _LOHA_STEPS)
        return Fit((loha(*parts).detach().view_as(target),), OPTIMISED)

    def label(self, setting: int) -> str:
        return f"rank {setting}"


def loha(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """(a·b) ⊙ (c·d)"""
    return (a @ b) * (c @ d)


@dataclass(frozen=True)
class KroneckerOfRank:
    """A (rows, columns) of B ⊗ A is of a rank; of full rank with None. B (d_out/rows, d_in/columns)."""

    rows: int
    columns: int
    rank: int | None


class LoKr(Approximation):
    """ΔW = B ⊗ A with a small B and a large A of low rank, A (k, n·taps), B (d_out/k, d_in/groups/n).

    The extents of B are the divisors of the weight's that are nearest to their square roots, as PEFT and LyCORIS
    (arXiv 2309.14859) choose them; where that has too few parameters for the budget, at most 16, 8, 4 or 2.
    """

    def sizes(self, target: Tensor, parameters: int) -> list[Size]:
        for most in (math.inf, 16, 8, 4, 2):
            settings = self._settings(tuple(target.shape), most)
            counts = [self._count(setting, tuple(target.shape)) for setting in settings]
            if counts[-1] >= parameters:
                break
        return [Size(settings[i], counts[i], copies) for i, copies in shared(counts, parameters)]

    @staticmethod
    def _settings(shape: tuple[int, ...], most: float) -> list[KroneckerOfRank]:
        small = [max(d for d in divisors(extent) if d <= min(most, math.sqrt(extent))) for extent in shape[:2]]
        rows, columns = shape[0] // small[0], math.prod(shape[1:]) // small[1]
        ranks = range(1, rows * columns // (rows + columns) + 1)  # beyond, a product has more numbers than A
        return [KroneckerOfRank(rows, columns, rank) for rank in (*ranks, None)]

    @staticmethod
    def _count(setting: KroneckerOfRank, shape: tuple[int, ...]) -> int:
        rows, columns = setting.rows, setting.columns
        of_a = rows * columns if setting.rank is None else setting.rank * (rows + columns)
        return of_a + math.prod(shape) // (rows * columns)

    def fit(self, target: Tensor, setting: KroneckerOfRank, seed: int) -> Fit:
        matrix = target.flatten(1)
        a, b = nearest_kronecker(matrix, setting.rows, setting.columns)
        if setting.rank is not None:
            blocks, held = in_blocks(matrix, setting.rows, setting.columns), 0.0
            for _ in range(SWEEPS):
                b = b / b.norm()
                u, s, v = (part[..., : setting.rank] for part in _svd((b.flatten() @ blocks).view_as(a)))
                a = u * s @ v.mT
                b = (blocks @ a.flatten() / s.square().sum()).view_as(b)
                before, held = held, float(s.square().sum())
                if held - before <= 1e-10 * held:
                    break
        return Fit((torch.kron(b, a).view_as(target),), ALTERNATING if setting.rank else EXACT)

    def label(self, setting: KroneckerOfRank) -> str:
        return f"A {setting.rows}×{setting.columns}" + (f" of rank {setting.rank}" if setting.rank else "")


# By optimisation -----------------------------------------------------------------------------------------------------


def optimise(
    parameters: Sequence[Tensor],
    weight: Callable[[], Tensor],
    target: Tensor,
    starts: Sequence[Sequence[Tensor] | None],
    steps: int,
) -> float:
    """Sets the parameters to the best of several runs of L-BFGS that make the weight the target; returns its error.

    A start that is None is drawn from N(0, 1). Of any start the first parameter, in which the weight must be linear, is
    multiplied by the number that brings the weight closest to the target.
    """
    best, kept = math.inf, [parameter.detach().clone() for parameter in parameters]
    for start in starts:
        with torch.no_grad():
            for place, parameter in enumerate(parameters):
                parameter.copy_(torch.randn_like(parameter) if start is None else start[place])
            made = weight()
            parameters[0].mul_((made * target).sum() / made.square().sum())
        error = _descend(parameters, weight, target, steps)
        if error < best:
            best, kept = error, [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return best


def _descend(parameters: Sequence[Tensor], weight: Callable[[], Tensor], target: Tensor, steps: int) -> float:
    """One run of L-BFGS from where the parameters are; returns the relative error at its end."""
    optimizer: Any = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-8,
        tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )
    norm = target.norm()

    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = ((weight() - target) / norm).square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)
    return float((weight().detach() - target).norm() / norm)


METHODS: dict[str, Approximation] = {
    "lora": OfConfig(flora.LoRAConfig()),
    "locon": OfConfig(flora.LoRAConfig(tucker=True)),
    "flora": OfConfig(flora.TuckerConfig()),
    "flora-ranks": BestRanks(flora.TuckerConfig()),
    "flora-fixed": OfConfig(flora.TuckerConfig(trainable="core")),
    "circulant": OfConfig(flora.CirculantConfig()),
    "toeplitz": OfConfig(flora.ToeplitzConfig()),
    "ldr": OfConfig(flora.LDRConfig()),
    "kronecker": OfConfig(flora.KroneckerConfig()),
    "loha": LoHa(),
    "lokr": LoKr(),
}
"""By the study's names; "flora-ranks" is "flora" with a rank a mode that was chosen for the target."""
