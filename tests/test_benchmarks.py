"""The benchmarks compare like with like, say what they leave out, and mark what is too noisy. Nothing here is timed."""

import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import benchmarks.__main__ as program
from benchmarks import cases, curves, models, plans, plots, report, small
from benchmarks.models import Model
from benchmarks.plans import Entry
from flora import plan
from flora.bench import compare, machine, tables, timing
from flora.bench.case import Case, conv, linear
from flora.bench.compare import Result, Row
from flora.bench.memory import keep_heap, peak_bytes
from flora.bench.methods import method_peers, named
from flora.bench.peers import FLORA, FROZEN, LORA, AbsentError, Peer, build, peers
from flora.bench.timing import Timing, interleaved
from flora.cli import main as flora

TUCKER = ("LyCORIS Tucker LoCon", "LyCORIS Tucker LoCon, bypass", "tltorch tucker_conv", "ΔW rebuilt")
TUCKER += ("W + ΔW rebuilt", "factored, plain PyTorch", "flora", "flora, fused", "flora, hybrid", "flora, merged")
LINEAR = linear(24, 20, 10, bounds={FLORA: 1.5})
CONV = conv(18, 20, (3, 3), 2, (9, 8), stride=2)
DEPTHWISE = conv(20, 20, (3, 3), 2, (6, 6), groups=20, channels_last=True)
SMALL = [LINEAR, CONV, DEPTHWISE, conv(6, 8, (3,), 2, (9,), groups=2), conv(4, 6, (2, 3, 3), 1, (4, 5, 6))]
GOOD, NOISY = Timing(0.9e-3, 1e-3, 1.25, 0.001, 15), Timing(0.9e-3, 1e-3, 1.25, 0.3, 15)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """However busy the machine is that runs the tests; on one thread, as small products would wait for the others."""
    monkeypatch.setattr(machine.Others, "share", lambda self: 0.0)
    monkeypatch.setattr(machine, "UNSTEADY", math.inf)
    monkeypatch.setattr(machine, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(machine, "MATRIX", 64)
    monkeypatch.setattr(timing, "SHORTEST", 0.0)
    monkeypatch.setattr(timing, "TOLERANCE", math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Peers --------------------------------------------------------------------------------------------------------------


def step(module: nn.Module, case: Case) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    x = case.make()[1]
    y = module(x)
    y.backward(torch.ones_like(y))
    return y.detach(), x.grad


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_tucker_peer_is_the_same_function(case: Case) -> None:
    found = {}
    for name in TUCKER:
        try:
            found[name] = step(build(peers(case, plans=True)[name], case), case)
        except AbsentError:
            assert name in TUCKER[:3]
    assert len(found) >= 8
    expected = found["ΔW rebuilt"]
    assert not torch.allclose(expected[0], step(build(peers(case)[FROZEN], case), case)[0], atol=1e-3)
    for name, values in found.items():
        for value, other in zip(values, expected, strict=True):
            torch.testing.assert_close(
                value, other, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("case", [*SMALL[:3], linear(8, 8, 4, dtype=torch.bfloat16)], ids=lambda case: case.name)
def test_peers_train_what_they_should(case: Case) -> None:
    for name, peer in peers(case).items():
        try:
            module = build(peer, case)
        except AbsentError as absent:
            assert "Linear" in str(absent) or "groups" in str(absent) or "grouped" in str(absent), name
            continue
        trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
        assert bool(trained) == (name != FROZEN), name
        assert any(key.endswith("bias") for key in trained) == (name == "full fine-tuning"), name
        assert all(p.any() and p.grad is None for p in trained.values()), name
        narrow = {p.dtype for p in trained.values()} == {torch.bfloat16}
        if name in (LORA, FLORA, f"{LORA}, bfloat16 adapter"):
            assert narrow == ("bfloat16 adapter" in name), name


@pytest.mark.parametrize("method", ["circulant", "Toeplitz", "Kronecker", "rescale"])
def test_methods_in_plain_pytorch_are_the_same_function(method: str) -> None:
    case = linear(24, 24, 10)
    found = method_peers(case)
    plain, ours = build(found[f"{method}, plain PyTorch"], case), build(found[named(method)], case)
    delta = ours.deltas["default"]
    with torch.no_grad():
        for key, parameter in delta.named_parameters():
            parameter.copy_(getattr(plain, key).view_as(parameter))
    expected = step(plain, case)
    assert not torch.allclose(expected[0], step(build(found[FROZEN], case), case)[0], atol=1e-4)
    for value, other in zip(step(ours, case), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
    for key, parameter in delta.named_parameters():
        torch.testing.assert_close(
            parameter.grad, getattr(plain, key).grad.view_as(parameter), rtol=1e-4, atol=1e-4, msg=key
        )


def test_methods_on_what_is_not_square() -> None:
    result = compare.measure(CONV, rounds=5, attempts=1, of=method_peers)
    assert result.limit is None
    assert {row.peer: row.absent for row in result.rows}["circulant, plain PyTorch"] == "has square Linear only"
    assert {named("circulant"), named("LDR"), named("Kronecker"), named("rescale")} <= {
        row.peer for row in result.rows if row.timing
    }


def test_what_another_refuses_is_said_and_what_flora_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AbsentError, match="refuses: Targeting a Conv2d with groups=20"):
        build(peers(DEPTHWISE)[LORA], DEPTHWISE)
    with pytest.raises(AbsentError, match="switched off for a grouped"):
        build(peers(DEPTHWISE)["LyCORIS Tucker LoCon, bypass"], DEPTHWISE)

    def broken(layer: nn.Module, case: Case) -> nn.Module:
        raise ValueError("no such rank")

    with pytest.raises(ValueError, match="no such rank"):
        build(Peer(broken), LINEAR)
    with pytest.raises(AbsentError, match="refuses: no such rank"):
        build(Peer(broken, "torch"), LINEAR)


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = compare.measure(LINEAR, rounds=5, attempts=1)
    absent = {row.peer: row.absent for row in result.rows if row.absent}
    assert absent.pop("PEFT LoKr") == "peft is not installed"
    assert absent.pop("tltorch tucker_conv") == "tltorch is not installed"
    assert {name.split()[0] for name in absent} == {"PEFT", "LyCORIS"}
    assert "LyCORIS Tucker LoCon: lycoris is not installed" in tables.terminal(result)
    assert {FROZEN, FLORA, "ΔW rebuilt"} <= {row.peer for row in result.rows if row.timing}


# Timing -------------------------------------------------------------------------------------------------------------


def drifting(monkeypatch: pytest.MonkeyPatch, costs: dict[str, float]) -> dict[str, Callable[[], None]]:
    """Steps on a clock whose machine slows down by 1 % with every step."""
    clock = {"now": 0.0, "speed": 1.0}

    def run(seconds: float) -> None:
        clock["now"] += seconds * clock["speed"]
        clock["speed"] *= 1.01

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])
    return {name: lambda cost=cost: run(cost) for name, cost in costs.items()}


def test_drift_cancels_in_paired_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = drifting(monkeypatch, {"base": 1.0, "same": 1.0, "half more": 1.5, "slow": 4.0})
    monkeypatch.setattr(timing, "LONGEST", 1e9)
    timings = interleaved(steps, "base", rounds=15, attempts=1)
    assert [*timings] == [*steps]
    assert timings["base"].ratio == 1.0
    for name, ratio in {"same": 1.0, "half more": 1.5, "slow": 4.0}.items():
        assert timings[name].ratio == pytest.approx(ratio, rel=0.01)
        assert timings[name].least < timings[name].quartile
    assert timings["base"].over == 0.0
    ratio_of_over = timings["slow"].over / timings["half more"].over
    assert ratio_of_over == pytest.approx(3.0 / 0.5, rel=0.2)  # of fewer rounds, and so not of the same speed
    assert timings["half more"].samples == 15
    assert timings["slow"].samples == 5


def test_long_steps_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = drifting(monkeypatch, {"base": 100.0, "other": 100.0})
    assert interleaved(steps, "base", rounds=15, attempts=1)["other"].samples == timing.FEWEST
    with pytest.raises(ValueError, match="rounds=3 are too few"):
        interleaved(steps, "base", rounds=3)


def shares(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """What others take of the CPUs, attempt by attempt; then nothing."""
    coming = chain(values, repeat(0.0))
    monkeypatch.setattr(machine.Others, "share", lambda self: next(coming))


def test_noisy_figures_are_measured_again_and_disturbed_rounds_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"base": lambda: None, "other": lambda: None}
    shares(monkeypatch, 0.5)
    timings = interleaved(steps, "base", rounds=5)
    assert (timings["other"].samples, timings["other"].disturbed) == (5, 0.0)
    shares(monkeypatch, 0.5, 0.4, 0.3)
    assert interleaved(steps, "base", rounds=5)["other"].why_noisy == "others had 30% of the CPUs"
    monkeypatch.setattr(timing, "TOLERANCE", -1.0)
    monkeypatch.setattr(timing, "OF_OVERHEAD", 0.0)
    shares(monkeypatch, 0.0, 0.5)
    again = interleaved(steps, "base", rounds=5)["other"]
    assert (again.samples, again.noisy) == (10, True)  # of three attempts the second is thrown away


def test_what_is_noisy_depends_on_the_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small, large = Timing(1.0, 1.0, 1.02, 0.03, 15), Timing(1.0, 1.0, 3.0, 0.03, 15)
    assert small.noisy
    assert not large.noisy
    assert dataclasses.replace(large, disturbed=0.5).noisy


def test_noisy_rows_are_left_out_of_comparisons(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.undo()
    good, noisy = Row(FLORA, GOOD, 2**20, bound=1.3), Row(FLORA, NOISY, 2**20, bound=1.3)
    assert (good.ratio, good.met) == (1.25, True)
    assert (noisy.ratio, noisy.met) == (None, None)
    assert dataclasses.replace(good, bound=1.2).met is False
    assert dataclasses.replace(good, saved_bound=2**19).met is False
    clean, spoiled = Result("a", (good,), 1.1), Result("b", (noisy,), 1.1)
    assert "1.30 ✓" in tables.terminal(clean)
    assert "too noisy to be used: flora (1.25 ± 0.30)" in tables.terminal(spoiled)
    assert tables.ratios([clean, spoiled], [FLORA]).splitlines()[2:] == [
        "| a | 1.25 | 1.10 | 1.30 ✓ |",
        "| b | noisy | 1.10 | 1.30 |",
    ]
    assert Result.from_dict(json.loads(json.dumps(spoiled.to_dict()))) == spoiled
    assert not program.any_noisy([clean])
    assert program.any_noisy([clean, spoiled])
    assert "1 of 2 figures were too noisy" in capsys.readouterr().out


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.busy() is None
    shares(monkeypatch, 0.5)
    assert machine.busy() is None  # it looks again
    shares(monkeypatch, 0.5, 0.5, 0.5)
    assert machine.busy() == "others have 50% of its CPUs"
    monkeypatch.setattr(machine, "UNSTEADY", -1.0)
    assert "equal matrix products" in machine.busy()


# Cases, limits, bounds, memory ----------------------------------------------------------------------------------------


def test_cases_make_the_same_values_in_their_layout() -> None:
    (layer, x), (other, y) = DEPTHWISE.make(), DEPTHWISE.make()
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, y)
    assert torch.equal(layer.weight, other.weight)
    assert not layer.weight.requires_grad
    assert DEPTHWISE.name == "depthwise 20 3×3, 2×6×6, channels_last"
    assert CONV.name == "Conv 18→20 3×3 stride 2, 2×9×8"
    assert SMALL[3].name == "Conv 6→8 3 in 2 groups, 2×9"
    assert linear(2, 3, 4, dtype=torch.bfloat16).name == "Linear 2→3, 4 rows, bfloat16"


def test_the_limit_counts_the_adapters_own_operations() -> None:
    rows, d, r = 4096, 512, 16
    factored = 3 * 2 * (2 * rows * d * r) + 4 * 2 * rows * r * r
    built = 2 * 2 * r * (d * d + r * d) + 2 * 2 * (2 * rows * d * r) + 3 * 2 * rows * r * r
    assert linear(d, d, rows).limit(2.0, 1e9) == pytest.approx(1 + min(factored, built) / 1e9 / 2.0)
    assert DEPTHWISE.limit(1.0, math.inf) == pytest.approx(
        1.5
    )  # one more pass over the weight, at the layer's own speed


def test_the_project_measures_every_layer_with_a_bound() -> None:
    found = [*cases.LAYERS, *cases.CHANNELS_LAST, *cases.BFLOAT16]
    assert [len(part) for part in (cases.LAYERS, cases.CHANNELS_LAST, cases.BFLOAT16)] == [10, 5, 4]
    assert len({case.name for case in found}) == len(found)
    assert all(case.bounds[FLORA] > 1.0 for case in found)
    assert all(case.channels_last for case in cases.CHANNELS_LAST)
    assert all(case.dtype == torch.bfloat16 for case in cases.BFLOAT16)
    assert program.LAYERS.keys() | {"small", "models", "curves"} == report.PARTS.keys()


def test_bfloat16_bounds_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    result = Result("a", (Row(LORA, dataclasses.replace(GOOD, ratio=1.5)), Row(FLORA, GOOD, bound=1.12)))

    def bound(amx: bool, native: bool, dtype: torch.dtype = torch.bfloat16) -> float | None:
        monkeypatch.setattr(compare, "has_amx", lambda: amx)
        monkeypatch.setattr(compare, "multiplies_bfloat16", lambda: native)
        return compare._bounded(result, dtype)[1].bound

    assert bound(False, True) == 1.12
    assert bound(True, True) == pytest.approx(1.3)  # 0.6 of LoRA's overhead
    assert bound(False, False) is None
    assert bound(False, False, torch.float32) == 1.12


def test_amx_counts_where_its_tiles_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_flags", lambda: {"amx_bf16"})
    for available in (["portable", "v4-bf16"], ["portable", "v4-bf16", "v4-amx"]):
        monkeypatch.setattr(machine.functional, "info", lambda names=available: {"isa_available": names})
        assert machine.has_amx() == machine.multiplies_bfloat16() == ("v4-amx" in available)


def test_c3a_has_about_as_many_parameters_as_lora() -> None:
    case = linear(96, 64, 2, rank=4)
    lora, c3a = (
        sum(p.numel() for p in build(peers(case)[name], case).parameters() if p.requires_grad)
        for name in (LORA, "PEFT C3A")
    )
    assert (lora, c3a) == (4 * (96 + 64), 96 * 64 // 8)


def test_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(call.bounded, call.grad) for call in small.CALLS] == [(i < 2, i % 2 == 1) for i in range(4)]
    assert small.CALLS[0].name == "Linear 768→768, 1 row, no grad"
    measured = []

    def timed(steps: dict, baseline: str, rounds: int, attempts: int) -> dict[str, Timing]:
        for step in steps.values():
            y = step()
            measured.append(y is not None and not y.requires_grad)
        over = {FROZEN: 0.0, LORA: 9e-6, FLORA: 12e-6}
        return {name: Timing(1e-5, 1e-5, 1.0 + over[name] / 1e-5, 0.0, 9, 0.0, over[name]) for name in steps}

    monkeypatch.setattr(small, "interleaved", timed)
    still, both, free = (
        small.measure(small.Call(LINEAR, grad, bounded), rounds=5, attempts=1)
        for grad, bounded in ((False, True), (True, True), (True, False))
    )
    assert measured == [True] * 3 + [False] * 6  # without gradients no graph is made
    assert (still.row(FLORA).over_bound, still.row(FLORA).met) == (small.MOST, True)
    assert (both.row(FLORA).over_bound, both.row(FLORA).met) == (9e-6, False)
    assert (free.row(FLORA).over_bound, free.row(FLORA).met) == (None, None)
    assert tables.microseconds([still, both, free], small.SHOWN).splitlines()[2:] == [
        f"| {LINEAR.name}, no grad | 10.0 | 10.0 | 10.0 | 9.0 | 12.0 | 15.0 ✓ |",
        f"| {LINEAR.name}, forward and backward | 10.0 | 10.0 | 10.0 | 9.0 | 12.0 | 9.0 ✗ |",
        f"| {LINEAR.name}, forward and backward | 10.0 | 10.0 | 10.0 | 9.0 | 12.0 |  |",
    ]
    spoiled = dataclasses.replace(still.row(FLORA), timing=dataclasses.replace(GOOD, disturbed=0.5))
    assert (spoiled.over, spoiled.met) == (None, None)
    assert Result.from_dict(json.loads(json.dumps(both.to_dict()))) == both


def test_small_calls_without_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = small.measure(small.Call(LINEAR, True, True), rounds=5, attempts=1).rows
    assert [row.absent for row in rows] == [None, "peft is not installed", None]
    assert (rows[2].over_bound, rows[2].met) == (None, None)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system resets no high-water mark")
def test_peak_bytes_counts_what_is_allocated_at_once() -> None:
    def allocate() -> None:
        first = torch.ones(2**22)  # 16 MiB each
        second = torch.ones(2**22)
        del first, second
        torch.ones(2**22)

    try:
        peak = peak_bytes(allocate, lambda: None)
    finally:
        keep_heap()
    assert peak is not None
    assert 24 * 2**20 < peak < 48 * 2**20


# The program ----------------------------------------------------------------------------------------------------------

TINY = [
    Model(
        "vit",
        lambda: models.vit(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=32
        ),
        "pixel_values",
        (1, 3, 32, 32),
        {FLORA: 1.1},
    ),
    Model(
        "convnext",
        lambda: models.convnext(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]),
        "pixel_values",
        (1, 3, 32, 32),
        {FLORA: 1.1},
    ),
    Model(
        "llama",
        lambda: models.llama(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
        ),
        "inputs_embeds",
        (1, 6, 16),
        {FLORA: 1.1},
        {"labels": torch.arange(6)[None]},
    ),
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The program with little to do, in a folder of its own."""
    monkeypatch.setattr(program, "LAYERS", {"layers": [LINEAR, CONV], "channels_last": [DEPTHWISE], "bfloat16": []})
    monkeypatch.setattr(models, "MODELS", TINY[:1])
    lines = [curves.Curve("Linear over threads", "threads", {1: LINEAR}, by_threads=True)]
    monkeypatch.setattr(curves, "curves", lambda quick: lines)
    monkeypatch.setattr(small, "CALLS", [small.Call(LINEAR, False, True)])
    monkeypatch.setattr(program, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    yield tmp_path


def test_a_run_gives_tables_json_drawings_and_the_docs_page(few: Path, capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    file = few / "run.json"
    assert program.main(["--quick", "--json", str(file)]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    for name in (LINEAR.name, CONV.name, DEPTHWISE.name, f"{LINEAR.name}, no grad", "vit", "Linear over threads"):
        assert name in out
    assert "tltorch tucker_conv: has no groups" in out
    content = json.loads(file.read_text())
    rows = {row["peer"]: row for row in content["results"]["layers"][0]["rows"]}
    assert rows[FROZEN]["ratio"] == 1.0
    assert rows[FLORA]["bound"] == 1.5
    assert rows[FLORA]["met"] == (rows[FLORA]["ratio"] <= 1.5)
    assert content["machine"]["torch"] == torch.__version__
    drawn = sorted(path.name for path in (few / "run").iterdir())
    assert drawn == ["bench-channels-last.svg", "bench-layers.svg", "bench-linear-over-threads.svg", "bench-models.svg"]

    (few / "README.md").write_text(f"before {report._BEGIN}old{report._END} after")
    assert program.main(["--read", str(file), "--docs", "--json", str(few / "again.json")]) == 0
    readme = (few / "README.md").read_text()
    assert f"| {LINEAR.name} | " in readme and "old" not in readme and readme.endswith(" after")
    assert json.loads((few / "again.json").read_text()) == content
    page = (few / "docs" / "benchmarks.md").read_text()
    assert "## One layer, float32\n" in page
    assert f"| {LINEAR.name} | 1.00 |" in page
    assert "## Small calls, float32\n" in page
    assert f"\n| {LINEAR.name}, no grad | " in page
    assert "- tltorch tucker_conv, on " + DEPTHWISE.name + ": has no groups" in page
    assert f"torch {torch.__version__}" in page
    assert all((few / "docs" / name).exists() and name in page for name in drawn)
    first = (few / "run" / "bench-layers.svg").read_text()
    assert (few / "docs" / "bench-layers.svg").read_text() == first  # the same run draws the same file


def test_the_readme_takes_a_table_between_its_marks() -> None:
    run = report.Run(results={"layers": [Result("a layer", (Row(FLORA, absent="none"),))]})
    readme = (report.ROOT / "README.md").read_text()
    once = report.into_readme(readme, run)
    assert "| a layer |" in once
    assert report.into_readme(once, run) == once
    before, after = readme.split(report._BEGIN)[0], readme.split(report._END)[1]
    assert once.startswith(before) and once.endswith(after)


def test_runs_of_one_machine_are_put_together(few: Path) -> None:
    parts = [few / "a.json", few / "b.json"]
    first = report.Run(results={"layers": [Result("x", ()), Result("y", ())]})
    later = report.Run(results={"layers": [Result("y", (Row(FLORA),))], "models": [Result("z", ())]})
    for path, run in zip(parts, (first, later), strict=True):
        run.write(path)
    whole = report.Run.read(parts)
    assert [result.name for result in whole.all()] == ["x", "y", "z"]
    assert whole.results["layers"][1].rows == (Row(FLORA),)
    report.Run(machine={"cpu": "another"}).write(parts[1])
    with pytest.raises(ValueError, match=r"b\.json is of another machine or setting: cpu"):
        report.Run.read(parts)
    parts[1].write_text("[]")
    with pytest.raises(ValueError, match=r"b\.json is no result of this program"):
        report.Run.read(parts)


def test_the_program_refuses(few: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for arguments in (["--only", "nothing"], ["--read", str(few / "none.json")], ["--part", "nothing"]):
        with pytest.raises(SystemExit) as exit_:
            program.main(arguments)
        assert exit_.value.code == 2
        assert "no" in capsys.readouterr().err
    shares(monkeypatch, 0.6, 0.6, 0.6)
    assert program.main([]) == 1
    assert capsys.readouterr().out.endswith("the machine is busy: others have 60% of its CPUs\n")
    assert not (few / "results").exists()


def test_a_noisy_run_ends_with_1(few: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(timing, "TOLERANCE", -1.0)
    monkeypatch.setattr(timing, "OF_OVERHEAD", 0.0)
    assert program.main(["--quick", "--part", "layers", "--only", LINEAR.name]) == 1
    assert "figures were too noisy to be used" in capsys.readouterr().out
    assert len([*(few / "results").glob("*.json")]) == 1


@pytest.mark.parametrize("model", TINY, ids=lambda model: model.name)
def test_whole_models(model: Model) -> None:
    result = models.measure(model, rounds=5, attempts=1)
    rows = {row.peer: row for row in result.rows}
    assert [*rows] == [*models.makers(model)]
    for name, row in rows.items():
        assert row.timing is not None or (name == models.NARROW_BASE and row.absent), name
    assert rows[FLORA].saved_bound == rows[models.LORA].saved
    assert rows[models.CORE_AND_OUT].saved_bound == int(1.03 * rows[FROZEN].saved)
    adapted = models.makers(model)[FLORA]()
    learns = {name.rpartition(".deltas")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert learns == {name for name, module in model.frozen().named_modules() if models.served(name, module)}


def test_curves_are_along_one_quantity() -> None:
    found = curves.curves()
    assert {curve.quantity for curve in found} == {"rows", "batch", "rank", "channels", "threads"}
    for kind in ("Linear", "Conv"):
        of_kind = [curve for curve in found if curve.name.startswith(kind)]
        assert {"rank", "channels", "threads"} <= {curve.quantity for curve in of_kind}
    assert all(len(curve.points) == 2 for curve in curves.curves(quick=True) if curve.quantity != "threads")
    assert plots.SHOWN == (FROZEN, LORA, FLORA)


# python -m flora bench ------------------------------------------------------------------------------------------------


def test_flora_bench(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shapes = [
        "--linear",
        "12x8",
        "--rows",
        "5",
        "--conv",
        "4x6x3x3",
        "--input",
        "2x5x5",
        "--channels-last",
        "--groups",
        "2",
    ]
    others = ["--rank", "4", "--threads", "1", "--rounds", "5", "--plans", "--json", str(tmp_path / "out.json")]
    torch.set_num_threads(2)
    assert flora(["bench", *shapes, *others]) == 0
    assert torch.get_num_threads() == 2
    out = capsys.readouterr().out
    assert "Linear 12→8, 5 rows, arithmetic limit" in out
    assert "Conv 4→6 3×3 in 2 groups, 2×5×5, channels_last" in out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["machine"]["threads"] == 1
    assert "flora, hybrid" in {row["peer"] for row in content["results"][0]["rows"]}


def test_flora_bench_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    shares(monkeypatch, *[0.6] * 3)
    assert flora(["bench"]) == 1
    assert capsys.readouterr().out.endswith("the machine is busy: others have 60% of its CPUs\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--linear", "768"], "--linear '768' is not 2 numbers above 0 with an x between"),
        (["--linear", "0x4"], "--linear '0x4'"),
        (["--linear", "8x8", "--rows", "0"], "--rows 0 is not above 0"),
        (["--rows", "8"], "--rows 8 belongs to --linear"),
        (["--stride", "2"], "--stride belongs to --conv"),
        (["--conv", "8x8"], "--conv '8x8' is not 3 to 5 numbers"),
        (["--conv", "8x8x3"], "--conv '8x8x3' needs --input, such as 8x56"),
        (["--conv", "8x8x3", "--input", "2x5x5"], "--input '2x5x5' has 2 extents, --conv '8x8x3' has 1"),
        (["--conv", "8x8x3", "--input", "2x5", "--groups", "3"], "--groups 3 does not divide"),
        (["--conv", "8x8x3", "--input", "2x5", "--channels-last"], "--channels-last is for two or three"),
        (["--conv", "8x8x4", "--input", "2x3"], "--input '2x3': an extent of 3 is too small"),
        (["--conv", "8x8x3", "--input", "2x5", "--padding", "-1"], "--padding -1 is below 0"),
        (["--rounds", "2"], "--rounds 2 are too few"),
        (["--threads", "0"], "--threads 0 is not above 0"),
        (["--json", "/no/such/folder/x.json"], "there is no folder '/no/such/folder'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_flora_bench_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    try:
        status = flora(["bench", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


# The cost model -------------------------------------------------------------------------------------------------------


def test_the_grid_has_all_kinds_of_layers() -> None:
    grid = plans.grid()
    assert len(grid) >= 100
    grouped = [case for case, _ in grid if getattr(case.layer(), "groups", 1) > 1]
    assert len(grouped) >= 15
    assert sum(case.channels_last for case, _ in grid) >= 15
    assert sum(case.dtype == torch.bfloat16 for case, _ in grid) >= 4
    assert {len(case.shape) for case, _ in grid} == {2, 3, 4, 5}
    assert {case.rank for case, _ in grid} == {4, 8, 16, 32, 64}
    assert sum(grad for _, grad in grid) * 2 == len(grid)


def entry(case: Case = LINEAR, grad: bool = True) -> Entry:
    return plans.measure(case, grad, rounds=5, attempts=1)


def test_an_entry_holds_what_the_model_says_and_what_was_measured(tmp_path: Path) -> None:
    one = entry()
    assert one.picked == plan.choose_plan(*one.call) == min(one.predicted, key=one.predicted.__getitem__)
    assert {*one.seconds} == {*plans.PLANS}
    assert one.loss >= 1.0
    narrow = entry(linear(8, 8, 4, dtype=torch.bfloat16), False)
    assert narrow.becomes == {"fused": "fused", "hybrid": "fused", "merged": "merged"}
    assert {*narrow.seconds} == {"fused", "merged"}
    file = tmp_path / "plans.json"
    file.write_text(json.dumps({"entries": [dataclasses.asdict(one), dataclasses.asdict(narrow)]}))
    assert plans.read(file) == [one, narrow]
    file.write_text('{"entries": [1]}')
    with pytest.raises(ValueError, match="is no result of this program"):
        plans.read(file)


def made(seconds: tuple[float, float, float], error: float = 0.0) -> Entry:
    """An entry on which fused is picked, by a little."""
    call = ((768, 768), (16, 16), 1, 680, 680, 4, True)
    predicted = plan.plan_costs(*call)
    picked = min(predicted, key=predicted.__getitem__)
    assert picked == "fused"
    names = dict(zip(plans.PLANS, plans.PLANS, strict=True))
    return Entry("made", True, call, names, picked, predicted, dict(zip(plans.PLANS, seconds, strict=True)), error)


def test_the_summary_counts_and_lists() -> None:
    fine, miss, unclear = made((1.0, 0.95, 2.0)), made((1.5, 1.0, 2.0)), made((1.11, 1.0, 2.0), error=0.05)
    assert (fine.good, miss.good) == (True, False)
    assert unclear.noisy
    text = plans.summary([fine, miss, unclear])
    assert "1 of 2 picks are the fastest plan or within 10% (50%; goal 95%)" in text
    assert "too noisy to tell: made, trained" in text
    assert text.splitlines()[-1].split()[:4] == ["made,", "trained", "fused", "1.50"]


def test_the_fit_finds_constants_under_which_a_miss_is_none() -> None:
    miss = made((1.5, 1.0, 2.0))
    constants = plans.fit([miss])
    costs = plan.plan_costs(*miss.call, constants)
    assert min(costs, key=costs.__getitem__) == "hybrid"
    assert plans.fit([made((1.0, 2.0, 3.0))]) == plan.SPEEDS


def test_the_plans_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(plans, "grid", lambda: [(LINEAR, True), (DEPTHWISE, False)])
    monkeypatch.setattr(plans, "WITHIN", math.inf)
    file = tmp_path / "new" / "plans.json"
    assert plans.main(["--quick", "--json", str(file)]) == 1
    assert f"{LINEAR.name}, rank 16, trained: picks " in capsys.readouterr().out
    assert plans.main(["--read", str(file)]) == 1
    assert "2 judged picks are too few, 100 at least" in capsys.readouterr().out
    assert plans.main(["--read", str(file), "--only", "DEPTHWISE"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 picks" in out
    assert "partial: only a part of the grid was judged" in out
    monkeypatch.setattr(plans, "JUDGED", 2)
    assert plans.main(["--read", str(file), str(file), "--fit"]) == 0
    assert "2 of 2 picks" in capsys.readouterr().out  # no layer counts twice
    assert plans.main(["--read", str(file), "--fit"]) == 0
    assert "fitted: Speeds(skinny=" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plans.main(["--only", "nothing"])
    with pytest.raises(SystemExit):
        plans.main(["--read", str(file), "--only", "nothing"])
    monkeypatch.setattr(plans, "GOAL", 1.1)
    for only in ([], ["--only", "depthwise"]):
        assert plans.main(["--read", str(file), *only]) == 1
