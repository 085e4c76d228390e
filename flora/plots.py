"""`plot_adapter`: what an adapter has learned, as a picture. matplotlib is needed only when it is called."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flora.deltas import Delta, OutputDelta, WeightDelta
from flora.deltas.adapter import StructuredAdapterDelta
from flora.deltas.tucker import Factored
from flora.distributed import check_whole
from flora.functional import delta_weight
from flora.kinds import EMBEDDING
from flora.layers import AdaptedLayer
from flora.parameters import AdaptedParameter
from flora.state import adapted_layers, check_adapter, state_of
from flora.targets import near_misses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart."""

_MARKERS = "os^Dv"
_FEWEST_PLACES = 6
_MOST_LAYERS = 24
_MOST_SLICES = 16
_MOST_POINTS = 40
"""Of a line that is drawn with a marker at each."""
_MOST_PIXELS = 160
_MOST_TICKS = 8
_LONGEST_NAME = 34
_NOISE = 1e-7
"""Singular values below this share of the largest are rounding, of float32 parameters and of Gram matrices."""


def plot_adapter(model: nn.Module, adapter: str | None = None, layer: str | None = None) -> Figure:
    """A picture of an adapter: where it changes the model, and what it consists of on one layer.

    - The share that each layer has in Σ‖s·ΔW‖² (Frobenius), and how far it moves the layer's own weight,
      ‖s·ΔW‖/‖W‖; of many layers the largest, in the model's order, and the rest together.
    - On one layer the singular values of s·ΔW along each mode, relative to ‖s·ΔW‖, so that their squares sum to 1.
      Steep curves say that a lower rank would have done, flat ones that a higher one might help.
    - All parameters of that layer's delta: vectors as lines, matrices as pictures, a core as its slices.

    Of a block after a module s·ΔW is its matrix s·M. The model and its random state stay as they are.

    Args:
        model: adapted by `flora.adapt`, or a layer by `flora.wrap`; merged or not.
        adapter: its name; by default the active one, or the only one.
        layer: the name of an adapted layer or parameter, as in `flora.summary`; by default that of the largest share.

    Returns:
        A `matplotlib.figure.Figure`, which belongs to no window: ``figure.savefig("adapter.png")``, or a notebook.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        RuntimeError: no adapters in the model; the model is sharded.
        ValueError: no such adapter or layer; several adapters are active and none is named; parameters without values
            (meta) or that are not finite, by the layer's name.

    >>> flora.plot_adapter(model, layer="stages.0.conv").savefig("adapter.png")
    """
    figure_type = _figure_type()
    layers = _chosen(model, adapter)
    name = next(iter(layers.values()))[1]
    if layer is not None and layer not in layers:
        raise ValueError(f"adapter {name!r} has no layer {layer!r}{near_misses(layer, layers)}")
    with torch.no_grad():
        sizes = {each: _norms(*found, each) for each, found in layers.items()}
        shown = layer if layer is not None else max(sizes, key=lambda each: sizes[each][0])
        adapted, _, delta = layers[shown]
        panels = [_Panel.of(key, tensor, delta, adapted) for key, tensor in delta.tensors().items()]
        spectra = _spectra(adapted, delta)
    columns = max(3, len(panels)) if len(panels) <= 5 else 4
    rows = math.ceil(len(panels) / columns)
    top = 1.4 + 0.19 * min(max(len(sizes), 12), _MOST_LAYERS + 1)
    figure = figure_type(figsize=(12, top + 2.6 * rows), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[top, 2.6 * rows], squeeze=False)[:, 0]
    _draw_top(above, sizes, shown, spectra)
    for place, panel in zip(below.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        panel.draw(below, place)
    for place in below.axes[len(panels) : columns * rows]:
        place.set_axis_off()
    size = f" ({delta.size})" if delta.size else ""
    below.suptitle(f"{shown or 'the layer'}: {_times(delta.shape)}, {delta.config.method}{size}", fontsize="medium")
    figure.suptitle(f"adapter {name!r}")
    return figure


def _figure_type() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"flora.plot_adapter needs {error.name!r}: pip install 'flora-adapters[plots]'", name=error.name
        ) from error
    return Figure


# What is shown ------------------------------------------------------------------------------------------------------


def _chosen(model: nn.Module, adapter: str | None) -> dict[str, tuple[AdaptedLayer, str, Delta]]:
    """The layers that an adapter has a delta on, with its name and the delta; at least one."""
    state = state_of(model)
    check_whole(model, "plot")
    if adapter is None:
        usual = state.active or tuple(state.adapters)
        if len(usual) != 1:
            kind = "active adapters" if state.active else "adapters"
            raise ValueError(f"there are several {kind}, {', '.join(map(repr, usual))}: name the one to plot")
        (adapter,) = usual
    check_adapter(state, adapter)
    return {
        name: (layer, adapter, delta)
        for name, layer in adapted_layers(model).items()
        for key, delta in layer.adapters()
        if key == adapter
    }


def _frozen(layer: AdaptedLayer) -> Tensor | None:
    """The frozen weight (out, in/groups, *k), merged or not; None if the layer does not have it as plain numbers."""
    name = layer._kind.weight_name
    if not name or layer._kind.opaque:
        return None
    weight = layer._original.get(name)
    return layer._kind.turned(layer._base_weight() if weight is None else weight)


def _update(layer: AdaptedLayer, delta: Delta) -> Tensor | None:
    """A float64 tensor with the norm of s·ΔW, and with the singular values of its unfoldings; None if there is no ΔW.

    A Tucker delta's is no larger than its core, as a factor acts on them by the R of its QR decomposition alone.
    """
    if isinstance(delta, Factored):
        rests = [torch.linalg.qr(_exact(factor)).R for factor in delta.factors]
        if delta.core is None:
            matrix: Tensor = rests[0] @ (delta.factor * rests[1].mT)
            return matrix
        core = delta.factor * _exact(delta.core)
        for mode, rest in enumerate(rests):
            core = torch.tensordot(rest, core, ([1], [mode])).movedim(0, mode)
        return core
    if isinstance(delta, WeightDelta):
        return _exact(delta.alone(_frozen(layer) if delta.of_weight else None))
    if isinstance(delta, StructuredAdapterDelta):
        return delta.factor * _exact(delta_weight(None, delta.matrix()))
    return None


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _norms(layer: AdaptedLayer, adapter: str, delta: Delta, name: str) -> tuple[float, float | None]:
    """‖s·ΔW‖ and ‖s·ΔW‖/‖W‖, which is None where there is no W to compare with."""
    for key, tensor in delta.tensors().items():
        if tensor.is_meta or not torch.isfinite(tensor).all():
            values = "no values (it is on the meta device)" if tensor.is_meta else "values that are not finite"
            raise ValueError(f"{name or 'the layer'}: {key} of adapter {adapter!r} holds {values}")
    update = _update(layer, delta)
    norm = 0.0 if update is None else update.norm().item()
    weight = _frozen(layer)
    if weight is None or weight.is_meta or isinstance(delta, OutputDelta):
        return norm, None
    base = torch.linalg.vector_norm(weight.detach(), dtype=torch.float64).item()
    return norm, norm / base if base > 0 else None


def _spectra(layer: AdaptedLayer, delta: Delta) -> dict[str, Tensor]:
    """The singular values of each unfolding of s·ΔW over its norm, by the name of the mode, down to rounding."""
    update = _update(layer, delta)
    if update is None or update.ndim < 2 or not update.any():
        return {}
    names = _mode_names(layer, update.ndim)
    if update.ndim == 2:  # the unfoldings are the matrix and its transpose
        return {" and ".join(names): _singular_values(update)}
    return {name: _singular_values(update.movedim(mode, 0).flatten(1)) for mode, name in enumerate(names)}


def _singular_values(matrix: Tensor) -> Tensor:
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt() / matrix.norm()
    return values[values > _NOISE * values[0]]


def _mode_names(layer: AdaptedLayer, modes: int) -> tuple[str, ...]:
    if isinstance(layer, AdaptedParameter):
        return tuple(f"mode {mode + 1}" for mode in range(modes))
    if layer._kind is EMBEDDING:
        return ("entry", "channel")
    kernel = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
    return ("out", "in", *kernel.get(modes - 2, ()))[:modes]


# How it is drawn ----------------------------------------------------------------------------------------------------


def _draw_top(
    figure: SubFigure, sizes: dict[str, tuple[float, float | None]], shown: str, spectra: dict[str, Tensor]
) -> None:
    """Shares and relative sizes by layer, and the spectra of one."""
    shares, moved, values = figure.subplots(1, 3, width_ratios=[1.2, 0.8, 1.4])
    moved.sharey(shares)
    total = sum(norm**2 for norm, _ in sizes.values())
    largest = sorted(sizes, key=lambda name: (name == shown, sizes[name][0]), reverse=True)[:_MOST_LAYERS]
    bars = [name for name in sizes if name in set(largest)]
    widths = [100 * sizes[name][0] ** 2 / total if total else 0.0 for name in bars]
    labels = [_shortened(name) for name in bars]
    colours = [COLOURS[1] if name == shown else COLOURS[0] for name in bars]
    shares.barh(range(len(bars)), widths, color=colours)
    if len(bars) < len(sizes):
        rest = f"and {len(sizes) - len(bars)} smaller: {max(0.0, 100 - sum(widths)) if total else 0.0:.1f} % in all"
        shares.text(0, len(bars), rest, fontsize="small", va="center")
    shares.set_yticks(range(len(bars)), labels, fontsize="small")
    shares.set_ylim(max(_FEWEST_PLACES, len(bars) + (len(bars) < len(sizes))) - 0.4, -0.6)
    shares.set_xlim(0, max([*widths, 1.0]) * 1.08)
    shares.set_xlabel("share of Σ‖s·ΔW‖², %")
    shares.set_title("by layer", fontsize="small")
    points = [(place, sizes[name][1], colours[place]) for place, name in enumerate(bars)]
    drawn = [(place, 100 * size, colour) for place, size, colour in points if size]
    moved.set_xlabel("‖s·ΔW‖/‖W‖, %")
    moved.tick_params(labelleft=False)
    moved.set_title("beside the frozen weight", fontsize="small")
    if drawn:
        moved.scatter([size for _, size, _ in drawn], [p for p, _, _ in drawn], c=[c for _, _, c in drawn], s=18)
        moved.set_xlim(0, 1.12 * max(size for _, size, _ in drawn))
    moved.grid(axis="y", color="#dddddd", lw=0.6)
    moved.set_axisbelow(True)
    values.set_title(f"spectrum of s·ΔW on {_shortened(shown) or 'the layer'}", fontsize="small")
    values.set_xlabel("number of the singular value")
    values.set_ylabel("singular value / ‖s·ΔW‖")
    for (name, line), colour, marker in zip(spectra.items(), COLOURS, itertools.cycle(_MARKERS), strict=False):
        marked = marker if len(line) <= _MOST_POINTS else ""
        values.plot(range(1, len(line) + 1), line.numpy(), marker=marked, ms=4, lw=1.2, color=colour, label=name)
    if spectra:
        least = min(line[-1].item() for line in spectra.values())
        values.set_yscale("log")
        values.set_ylim(min(0.1, least / 1.5), 1.2)
        values.legend(title="mode", frameon=False, fontsize="small", title_fontsize="small")
        values.locator_params(axis="x", integer=True)
        values.grid(color="#dddddd", lw=0.6)
    else:
        zero = "s·ΔW = 0" if not sizes[shown][0] else "a vector, which has no spectrum"
        values.text(0.5, 0.5, zero, transform=values.transAxes, ha="center", va="center", color="#666666")


class _Panel:
    """One tensor of a delta with what is written around it; matrices are (rows, columns), more modes are slices."""

    def __init__(self, title: str, tensor: Tensor, axes: tuple[str, str], slices: Sequence[str] = ("",)) -> None:
        self.title = title
        self.tensor = tensor
        self.axes = axes
        self.slices = slices

    @classmethod
    def of(cls, key: str, tensor: Tensor, delta: Delta, layer: AdaptedLayer) -> _Panel:
        tensor = tensor.detach().to("cpu", torch.float32)
        title = f"{key} ({_times(tensor.shape)})"
        if tensor.ndim <= 2 and not isinstance(delta, Factored):
            return cls(title, tensor, ("row", "column"))
        names = _mode_names(layer, len(delta.shape))
        if key.startswith("factors."):
            mode = names[int(key.removeprefix("factors."))]
            return cls(f"factor of mode {mode} ({_times(tensor.shape)})", tensor, (mode, "rank"))
        if isinstance(delta, Factored):
            axes = [f"rank of {name}" if mode < len(delta.factors) else name for mode, name in enumerate(names)]
        else:
            axes = [f"axis {axis}" for axis in range(tensor.ndim)]
        if tensor.ndim == 2:
            return cls(title, tensor, (axes[0], axes[1]))
        leading = isinstance(layer, AdaptedParameter)  # whose matrices are its last two modes
        if not leading:
            tensor, axes = tensor.movedim((0, 1), (-2, -1)), [*axes[2:], *axes[:2]]
        places = list(itertools.product(*map(range, tensor.shape[:-2])))
        flat = tensor.flatten(0, -3)
        kept = sorted(flat.flatten(1).norm(dim=1).argsort(descending=True)[:_MOST_SLICES].tolist())
        if len(kept) < len(flat):
            title += f", the {len(kept)} largest of {len(flat)} slices"
        spare = (":", ":")
        marks = [",".join((*map(str, places[i]), *spare) if leading else (*spare, *map(str, places[i]))) for i in kept]
        return cls(title, flat[kept], (axes[-2], axes[-1]), [f"[{mark}]" for mark in marks])

    def draw(self, figure: SubFigure, axes: Axes) -> None:
        axes.set_title(self.title, fontsize="small")
        axes.tick_params(labelsize="x-small")
        if self.tensor.ndim < 2:
            values = self.tensor.reshape(-1)
            axes.axhline(0, color="#bbbbbb", lw=0.8)
            axes.plot(values.numpy(), lw=0.8, marker="o" if len(values) <= _MOST_POINTS else "", ms=3, color=COLOURS[0])
            axes.set_xlabel("index", fontsize="small")
            axes.set_ylabel("value", fontsize="small")
            return
        axes.set_xlabel(self.axes[1], fontsize="small")
        axes.set_ylabel(self.axes[0], fontsize="small")
        largest = self.tensor.abs().max().item() or 1.0
        style: dict[str, Any] = {"cmap": "PuOr", "vmin": -largest, "vmax": largest, "aspect": "auto"}
        if self.tensor.ndim == 2:
            style["interpolation"] = "nearest" if max(self.tensor.shape) <= _MOST_PIXELS else "auto"
            picture = axes.imshow(self.tensor.numpy(), **style)
            for axis, extent in zip((axes.yaxis, axes.xaxis), self.tensor.shape, strict=True):
                if extent <= _MOST_TICKS:
                    axis.set_ticks(range(extent))
        else:
            picture = axes.imshow(self._tiles(axes).numpy(), interpolation="nearest", **style)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
        bar = figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.02)
        bar.ax.tick_params(labelsize="x-small")

    def _tiles(self, axes: Axes) -> Tensor:
        """The slices side by side in one matrix, with gaps of NaN; their marks are written above them."""
        count, height, width = self.tensor.shape
        across = math.ceil(math.sqrt(count))
        down = math.ceil(count / across)
        over, between = max(1, round(0.3 * height)), max(1, round(0.08 * width))
        tiles = torch.full((down * (height + over), across * (width + between) - between), math.nan)
        for i, (matrix, mark) in enumerate(zip(self.tensor, self.slices, strict=True)):
            y, x = i // across * (height + over) + over, i % across * (width + between)
            tiles[y : y + height, x : x + width] = matrix
            axes.text(x + (width - 1) / 2, y - 0.6, mark, ha="center", va="bottom", fontsize=6)
        return tiles


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]


def _times(extents: Iterable[int]) -> str:
    return "×".join(map(str, extents))
