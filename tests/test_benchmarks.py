"""The benchmark compares like with like: the peers that should give the same function do."""

import pytest
import torch
from torch import nn

from benchmarks.__main__ import measure
from benchmarks.cases import CASES, Case
from benchmarks.peers import BASELINE, PEERS, RefusedError
from benchmarks.report import Row, line
from benchmarks.timing import Sample, interleaved

SMALL = [
    Case("linear", lambda: nn.Linear(24, 20), (10, 24)),
    Case("conv", lambda: nn.Conv2d(18, 20, 3, stride=2, padding=1), (2, 18, 9, 8)),
    Case("depthwise", lambda: nn.Conv2d(20, 20, 3, padding=1, groups=20), (2, 20, 6, 6), channels_last=True),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_tucker_peer_is_the_same_function(case: Case) -> None:
    outputs = {}
    for name in ("ΔW rebuilt", "factored, plain PyTorch", "flora, fused", "flora, merged", "flora, auto"):
        layer, x = case.make()
        module = PEERS[name](layer)
        delta = module.deltas["default"] if name.startswith("flora") else module
        torch.manual_seed(1)
        with torch.no_grad():
            delta.core.normal_()
            for factor in delta.factors:
                factor.normal_()
        outputs[name] = module(x)
    expected = outputs.pop("ΔW rebuilt")
    for name, output in outputs.items():
        torch.testing.assert_close(
            output, expected, rtol=1e-4, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_peers_train_what_they_should(case: Case) -> None:
    for name, peer in PEERS.items():
        try:
            module = peer(case.make()[0])
        except RefusedError as refusal:
            assert (name, case.name) == ("PEFT LoRA", "depthwise"), refusal
            continue
        trained = {key.rpartition(".")[2] for key, p in module.named_parameters() if p.requires_grad}
        assert bool(trained) == (name != BASELINE), name
        assert ("bias" in trained) == (name == "full fine-tuning"), name


def test_cases_make_the_same_values_in_their_layout() -> None:
    case = next(case for case in CASES if case.channels_last)
    (layer, x), (other, y) = case.make(), case.make()
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, y)
    assert torch.equal(layer.weight, other.weight)
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_measurement_holds_every_peer_and_its_refusals() -> None:
    rows = measure(SMALL[2], rounds=4)
    assert [row.peer for row in rows] == list(PEERS)
    assert rows[0].ratio == 1.0
    refused = rows[list(PEERS).index("PEFT LoRA")]
    assert refused.sample is None
    assert "refuses: Targeting a Conv2d with groups=20" in line(refused)


def test_samples_that_scatter_are_marked() -> None:
    module = nn.Linear(4, 4)
    samples = interleaved({"a": module, "b": nn.Identity()}, torch.randn(2, 4, requires_grad=True), rounds=5)
    assert samples["a"].least <= samples["a"].quartile
    noisy = Sample(1.0, 1.1, 0.3)
    assert noisy.noisy
    assert "spread 30%: not to be used" in line(Row("case", "peer", noisy, 1.0, 0, noisy.noisy))
    assert "not to be used" not in line(Row("case", "peer", Sample(1.0, 1.1, 0.02), 1.0, 0))
