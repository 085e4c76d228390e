"""The picture of an adapter: its figures against the updates themselves, and every method, shape and state."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import flora


def moved(model: nn.Module) -> nn.Module:
    """The model with every delta's parameters moved off their start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, flora.Delta):
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) / 8)
    return model


def drawn(figure: Figure) -> dict[str, object]:
    """A figure's axes by their titles."""
    assert isinstance(figure, Figure)
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def titles(figure: Figure) -> list[str]:
    """Of the pictures of parameters, once they have been drawn, which must not warn."""
    figure.draw_without_rendering()
    return list(drawn(figure))[3:]


def spectrum(figure: Figure) -> dict[str, Tensor]:
    (axes,) = [axes for title, axes in drawn(figure).items() if title.startswith("spectrum")]
    return {line.get_label(): torch.tensor(line.get_ydata()) for line in axes.lines}


def update_of(layer: flora.AdaptedLayer, adapter: str = "default") -> Tensor:
    return layer.deltas[adapter].delta_weight(layer.base_layer.weight).detach().double()


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, (3, 5), groups=8), nn.Conv1d(8, 4, 3), nn.Conv3d(4, 6, 2), nn.Linear(12, 10)
    )


@pytest.fixture
def model():
    return moved(flora.adapt(net(), flora.TuckerConfig(rank=4, kernel_rank=2, scale=0.7)))


def test_shares_and_relative_sizes_are_those_of_the_updates(model):
    axes = drawn(flora.plot_adapter(model))
    norms = torch.stack([update_of(layer).norm() for layer in model])
    bars = torch.tensor([bar.get_width() for bar in axes["by layer"].patches])
    torch.testing.assert_close(bars.double(), 100 * norms**2 / (norms**2).sum(), rtol=1e-5, atol=0)
    assert [label.get_text() for label in axes["by layer"].get_yticklabels()] == ["0", "1", "2", "3", "4"]
    (points,) = axes["beside the frozen weight"].collections
    relative = [100 * norm / layer.base_layer.weight.norm() for norm, layer in zip(norms, model, strict=True)]
    assert points.get_offsets()[:, 0].tolist() == pytest.approx([size.item() for size in relative], rel=1e-5)
    assert points.get_offsets()[:, 1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("layer", range(5))
def test_spectra_are_those_of_the_unfoldings(model, layer):
    update = update_of(model[layer])
    lines = spectrum(flora.plot_adapter(model, layer=str(layer)))
    if update.ndim == 2:
        lines = dict.fromkeys(["out", "in"], lines.pop("out and in"))
    kernel = {1: ["length"], 2: ["height", "width"], 3: ["depth", "height", "width"]}.get(update.ndim - 2, [])
    assert list(lines) == ["out", "in", *kernel]
    for mode, line in enumerate(lines.values()):
        expected = torch.linalg.svdvals(update.movedim(mode, 0).flatten(1)) / update.norm()
        torch.testing.assert_close(line, expected[: len(line)], rtol=1e-4, atol=0)
        assert (expected[len(line) :] < 1e-6).all()
        assert (line**2).sum().item() == pytest.approx(1)


def test_the_parameters_are_the_delta_s(model):
    axes = drawn(flora.plot_adapter(model, layer="0"))
    delta = model[0].deltas["default"]
    factor = axes["factor of mode in (6×4)"]
    assert (factor.get_xlabel(), factor.get_ylabel()) == ("rank", "in")
    torch.testing.assert_close(torch.tensor(factor.images[0].get_array()), delta.factors[1].detach())
    core = axes["core (4×4×2×2)"]
    assert (core.get_xlabel(), core.get_ylabel()) == ("rank of in", "rank of out")
    assert [mark.get_text() for mark in core.texts] == ["[:,:,0,0]", "[:,:,0,1]", "[:,:,1,0]", "[:,:,1,1]"]
    tiles = torch.tensor(core.images[0].get_array().filled(float("nan")))
    torch.testing.assert_close(tiles[1:5, 5:9], delta.core.detach()[:, :, 0, 1])
    torch.testing.assert_close(tiles[6:10, 0:4], delta.core.detach()[:, :, 1, 0])
    assert tiles[0].isnan().all()


def test_the_largest_layer_is_shown_unless_one_is_named(model):
    with torch.no_grad():
        model[2].deltas["default"].core.mul_(100)
    assert "spectrum of s·ΔW on 2" in drawn(flora.plot_adapter(model))
    assert "spectrum of s·ΔW on 1" in drawn(flora.plot_adapter(model, layer="1"))


def test_of_many_layers_the_largest_are_drawn():
    blocks = [nn.Linear(4, 4, bias=False) for _ in range(40)]
    many = nn.ModuleDict({"a_layer_with_a_name_that_is_far_too_long": nn.ModuleList(blocks)})
    many = moved(flora.adapt(many, flora.LoRAConfig(rank=1)))
    with torch.no_grad():
        for i, layer in enumerate(many["a_layer_with_a_name_that_is_far_too_long"]):
            layer.deltas["default"].factors[0].fill_(2.0 if i % 2 else 1e-3)
    axes = drawn(flora.plot_adapter(many))["by layer"]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == len(axes.patches) == 24
    assert {label.rpartition(".")[2] for label in labels} >= {str(i) for i in range(1, 40, 2)}
    assert [int(label.rpartition(".")[2]) for label in labels] == sorted(int(x.rpartition(".")[2]) for x in labels)
    assert all(label.startswith("…") and len(label) <= 34 for label in labels)
    assert axes.texts[0].get_text() == "and 16 smaller: 0.0 % in all"


def test_of_many_slices_the_largest_are_drawn():
    layer = moved(flora.wrap(nn.Conv2d(2, 3, 5), flora.LoRAConfig(rank=2)))
    core = layer.deltas["default"].core
    with torch.no_grad():
        core[:, :, 4, 4] = 0
        core[:, :, 2, 3] = 9
    axes = drawn(flora.plot_adapter(layer))["core (2×2×5×5), the 16 largest of 25 slices"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("in", "rank of out")
    marks = [mark.get_text() for mark in axes.texts]
    assert "[:,:,2,3]" in marks
    assert "[:,:,4,4]" not in marks
    assert len(marks) == 16


METHODS = {
    "lora": (flora.LoRAConfig(rank=2), ["factor of mode out (10×2)", "factor of mode in (12×2)"]),
    "lora-xs": (
        flora.LoRAXSConfig(rank=2),
        ["core (2×2)", "factor of mode out (10×2)", "factor of mode in (12×2)"],
    ),
    "circulant": (flora.CirculantConfig(), ["a (12)", "b (12)"]),
    "toeplitz": (flora.ToeplitzConfig(symmetric=False), ["a_row (11)", "a_col (12)", "b_row (11)", "b_col (12)"]),
    "ldr": (flora.LDRConfig(terms=2), ["circulant (2×12)", "skew (2×12)"]),
    "kronecker": (flora.KroneckerConfig(rank=2), ["a (2×6)", "b (5×2)"]),
    "rescale": (flora.RescaleConfig(), ["row (10)", "column (12)", "shift (10)"]),
    "block": (
        flora.StructuredAdapterConfig(kind="ldr", terms=1, norm_before=True),
        ["circulant (1×10)", "skew (1×10)", "bias (10)", "norm_before.weight (10)", "norm_before.bias (10)"],
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method):
    config, expected = METHODS[method]
    layer = moved(flora.wrap(nn.Linear(12, 10), config))
    figure = flora.plot_adapter(layer)
    assert titles(figure) == expected
    (line,) = spectrum(figure).values()
    if method != "block":
        singular = torch.linalg.svdvals(update_of(layer))
        torch.testing.assert_close(line, (singular / singular.norm())[: len(line)], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("config", [flora.LoRAConfig(rank=2, tucker=True), flora.CirculantConfig()])
@pytest.mark.parametrize("layer", range(5))
def test_every_shape(config, layer):
    single = net()[layer]
    assert len(titles(flora.plot_adapter(moved(flora.wrap(single, config))))) >= 2


def test_blocks_have_no_weight_to_be_compared_with():
    block = flora.StructuredAdapterConfig(kind="toeplitz")
    mixed = moved(flora.adapt(net(), {"4": block, "all": flora.TuckerConfig(rank=2)}))
    axes = drawn(flora.plot_adapter(mixed, layer="4"))
    (points,) = axes["beside the frozen weight"].collections
    assert points.get_offsets()[:, 1].tolist() == [0, 1, 2, 3]
    assert axes["by layer"].patches[4].get_width() > 0


def test_what_has_no_update_or_no_spectrum_says_so():
    def says(layer):
        (axes,) = [axes for title, axes in drawn(flora.plot_adapter(layer)).items() if title.startswith("spectrum")]
        return [text.get_text() for text in axes.texts]

    assert says(flora.wrap(nn.Linear(4, 4), flora.TuckerConfig(rank=2))) == ["s·ΔW = 0"]
    only_bias = flora.RescaleConfig(rows=False, columns=False)
    assert says(moved(flora.wrap(nn.Linear(4, 4), only_bias))) == ["s·ΔW = 0"]
    assert says(moved(flora.wrap(nn.LayerNorm(4), flora.RescaleConfig()))) == ["a vector, which has no spectrum"]


def test_embeddings_and_parameters_of_modules_that_are_no_layers():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.up @ x

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.experts = Experts()

    config = flora.TuckerConfig(rank=2, target_modules=["embed"], target_parameters=["experts.up"])
    mixture = moved(flora.adapt(Mixture(), config))
    assert list(spectrum(flora.plot_adapter(mixture, layer="embed"))) == ["entry and channel"]
    figure = flora.plot_adapter(mixture, layer="experts.up")
    assert list(spectrum(figure)) == ["mode 1", "mode 2", "mode 3"]
    assert [mark.get_text() for mark in drawn(figure)["core (2×2×2)"].texts] == ["[0,:,:]", "[1,:,:]"]


def test_a_method_from_outside_the_package():
    @dataclass(frozen=True, kw_only=True)
    class CubeConfig(flora.DeltaConfig):
        method = "cube-of-a-test"

    class CubeDelta(flora.WeightDelta, config=CubeConfig):
        def __init__(self, config, site):
            super().__init__(config, site)
            self.cube = site.parameter(*site.shape, 3)

        def unscaled_weight(self, weight: Tensor | None) -> Tensor:
            return self.cube.sum(-1)

    layer = moved(flora.wrap(nn.Linear(4, 5), CubeConfig()))
    axes = drawn(flora.plot_adapter(layer))["cube (5×4×3)"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("axis 1", "axis 0")
    assert [mark.get_text() for mark in axes.texts] == ["[:,:,0]", "[:,:,1]", "[:,:,2]"]


def test_a_block_from_outside_the_package_has_no_update_to_draw():
    @dataclass(frozen=True, kw_only=True)
    class GainConfig(flora.DeltaConfig):
        method = "gain-of-a-test"
        of_output = True

    class GainDelta(flora.OutputDelta, config=GainConfig):
        def __init__(self, config, site):
            super().__init__(config, site)
            self.gain = site.parameter(self.output.width)

        def transformed(self, y: Tensor) -> Tensor:
            return y * (1 + self.gain)

    assert titles(flora.plot_adapter(moved(flora.wrap(nn.Linear(4, 5), GainConfig())))) == ["gain (5)"]


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_a_packed_weight_is_not_compared_with():
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 6)), {nn.Linear})
    axes = drawn(flora.plot_adapter(moved(flora.adapt(packed, flora.TuckerConfig(rank=2)))))
    assert not axes["beside the frozen weight"].collections
    assert axes["by layer"].patches[0].get_width() == pytest.approx(100)


@pytest.mark.parametrize("config", [flora.TuckerConfig(rank=2), flora.RescaleConfig()])
def test_merged_weighted_and_disabled_models_are_drawn_as_they_are_otherwise(config):
    def figures(figure):
        axes = drawn(figure)
        points = axes["beside the frozen weight"].collections[0].get_offsets()[:, 0].tolist()
        return points, {name: line.tolist() for name, line in spectrum(figure).items()}

    model = moved(flora.adapt(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)), config))
    before = figures(flora.plot_adapter(model))
    flora.merge(model)
    assert figures(flora.plot_adapter(model)) == before
    with flora.disabled(model):
        assert figures(flora.plot_adapter(model)) == before
    flora.unmerge(model)
    flora.set_adapter(model, {"default": 0.5})
    halved = figures(flora.plot_adapter(model))
    assert halved[0] == pytest.approx([size / 2 for size in before[0]])


def test_the_model_and_the_random_state_stay_as_they_are(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learns = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    flora.plot_adapter(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == learns
    assert not any(layer.reached for layer in model)


def test_one_of_several_adapters_is_named(model):
    flora.add_adapter(model, flora.LoRAConfig(rank=1, target_modules=["4"]), "other")
    assert list(drawn(flora.plot_adapter(model)))[:1] == ["by layer"]
    assert titles(flora.plot_adapter(model, "other")) == ["factor of mode out (10×1)", "factor of mode in (12×1)"]
    flora.set_adapter(model, ["default", "other"])
    with pytest.raises(ValueError, match="several active adapters, 'default', 'other': name the one to plot"):
        flora.plot_adapter(model)
    flora.add_adapter(model, flora.LoRAConfig(rank=1), "third")
    flora.set_adapter(model, "default")
    flora.delete_adapter(model, "default")
    with pytest.raises(ValueError, match="several adapters, 'other', 'third': name"):
        flora.plot_adapter(model)
    with pytest.raises(ValueError, match="there is no adapter 'default'; there are 'other', 'third'"):
        flora.plot_adapter(model, "default")


def test_what_cannot_be_drawn_is_an_error_by_name(model):
    with pytest.raises(RuntimeError, match="Linear has no adapters"):
        flora.plot_adapter(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="adapter 'default' has no layer '9'"):
        flora.plot_adapter(model, layer="9")
    with pytest.raises(ValueError, match="'default' has no layer 'stem.con'; near misses: 'stem.conv'"):
        stem = nn.ModuleDict({"stem": nn.ModuleDict({"conv": nn.Conv2d(2, 2, 3)})})
        flora.plot_adapter(flora.adapt(stem, flora.TuckerConfig(rank=1)), layer="stem.con")
    with torch.no_grad():
        model[3].deltas["default"].core[0, 0] = float("nan")
    with pytest.raises(ValueError, match="3: core of adapter 'default' holds values that are not finite"):
        flora.plot_adapter(model, layer="0")
    with torch.device("meta"):
        empty = flora.adapt(net(), flora.TuckerConfig(rank=2))
    with pytest.raises(ValueError, match=r"0: core of adapter 'default' holds no values \(it is on the meta device\)"):
        flora.plot_adapter(empty)


def test_without_matplotlib_it_says_what_to_install(model, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"plot_adapter needs .*pip install 'flora-adapters\[plots\]'"):
        flora.plot_adapter(model)


def test_importing_flora_does_not_import_matplotlib():
    script = "import sys, flora; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout == "False\n"
