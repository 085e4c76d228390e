"""The report on an adapted model: what it counts, and what it prints."""

import pytest
import torch
from torch import nn

from flora.config import KroneckerConfig, LDRConfig, RescaleConfig, TuckerConfig
from flora.layers import wrap
from flora.model import adapt, merge, set_adapter
from flora.report import summary


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 6, 3, groups=2)
        self.norm = nn.LayerNorm(6)
        self.up = nn.ConvTranspose1d(6, 6, 2)
        self.head = nn.Linear(6, 4)
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embed.weight


@pytest.fixture
def model():
    return adapt(Net(), TuckerConfig(rank=2, scale=0.5, modules_to_save=["head"]))


def test_rows_and_totals(model):
    report = summary(model)
    rows = {row.name: row for row in report.layers}
    assert list(rows) == ["conv", "out", "head"]
    conv = rows["conv"]
    assert (conv.adapter, conv.kind, conv.shape, conv.ranks, conv.scale) == (
        "default",
        "Conv1d",
        (6, 4, 3),
        (2, 2, 2),
        0.5,
    )
    assert conv.parameters == conv.trainable == 2 * 2 * 2 + 6 * 2 + 4 * 2 + 3 * 2
    assert conv.active
    assert not conv.merged
    assert conv.plan == "auto"
    assert (rows["head"].plan, rows["head"].parameters, rows["head"].shape) == ("trained whole", 28, ())
    assert report.base_parameters == sum(p.numel() for p in Net().parameters())
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable_parameters == report.adapter_parameters == sum(row.parameters for row in report.layers)
    assert report.share == report.trainable_parameters / report.base_parameters
    assert (report.model, report.adapters, report.active) == ("Net", ("default",), ("default",))


def test_what_was_left_alone_and_what_is_tied(model):
    report = summary(model)
    assert report.left_alone["embed"] == ("Embedding", "it was not named")
    assert set(report.left_alone) == {"embed", "norm", "up"}
    assert report.tied == {"out.weight": ("embed.weight",)}


def test_the_printed_report(model):
    text = str(summary(model))
    assert repr(summary(model)) == text
    lines = text.splitlines()
    assert lines[0] == "Net: 'default'"
    (conv,) = [line for line in lines if line.startswith("conv")]
    assert conv.split() == ["conv", "default*", "tucker", "Conv1d", "6×4×3", "2×2×2", "auto", "0.5", "34", "34"]
    assert "ConvTranspose1d (up): ConvTranspose1d is not supported" in text
    assert "tied: out.weight with embed.weight; merging unties it" in text
    total, share = summary(model).trainable_parameters, summary(model).share
    assert f"trainable: {total:,} parameters, {100 * share:.3g} % of the model's" in text


def test_sizes_are_told_in_the_method_s_own_terms():
    configs = {"0": LDRConfig(terms=3), "1": KroneckerConfig(rank=4), "2": RescaleConfig(columns=False)}
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4), nn.Linear(4, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    adapt(model, configs | {"all": TuckerConfig(rank=1, modules_to_save=["4"])})
    report = summary(model)
    assert [row.size for row in report.layers] == ["3 terms", "A 4×3", "row, shift", "1×1", ""]
    assert "row, shift" in str(report)


def test_many_layers_left_alone_share_a_line():
    model = adapt(nn.Sequential(nn.Linear(2, 2), *[nn.LayerNorm(2) for _ in range(9)]), TuckerConfig(rank=1))
    (line,) = [line for line in str(summary(model)).splitlines() if line.startswith("left alone")]
    assert line.startswith("left alone: 9 LayerNorm (1, 2, 3, 4, …): TuckerConfig cannot adapt a")


def test_states_show(model):
    adapt(model, TuckerConfig(rank=1, target_modules=["conv", "out"]), "second")
    assert [row.trainable for row in summary(model).layers if row.adapter == "second"] == [0, 0]
    set_adapter(model, "second")
    merge(model)
    report = summary(model)
    assert report.active == ("second",)
    assert {(row.name, row.adapter): (row.active, row.merged) for row in report.layers} == {
        ("conv", "default"): (False, False),
        ("conv", "second"): (True, True),
        ("out", "default"): (False, False),
        ("out", "second"): (True, True),
        ("head", "default"): (False, False),
    }
    assert "second* (merged)" in str(report)


class Packed(nn.Module):
    """A linear layer with two of its 4-bit numbers to a byte."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(6))


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_packed_weights_count_as_what_they_stand_for():
    plain = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 4, bias=False))
    every = adapt(torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}), TuckerConfig(rank=2))
    assert summary(every).base_parameters == 8 * 6 + 6 * 4
    assert "nan" not in str(summary(every))
    some = adapt(nn.Sequential(Packed(), nn.Linear(6, 4)), TuckerConfig(rank=2))
    assert summary(some).base_parameters == (8 * 6 + 6) + (6 * 4 + 4)


def test_html_is_escaped():
    class Odd(nn.Sequential):
        pass

    Odd.__name__ = "<Odd>"
    shown = summary(adapt(Odd(nn.Linear(3, 3)), TuckerConfig(rank=1)))._repr_html_()
    assert "&lt;Odd&gt;" in shown
    assert "<Odd>" not in shown
    assert shown.count("<tr>") == 2


def test_a_single_layer():
    text = str(summary(wrap(nn.Conv2d(3, 4, 3), TuckerConfig(rank=2))))
    assert "(the layer)" in text
    assert "4×3×3×3" in text
