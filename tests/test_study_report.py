"""The study's report: its statistics against known ones, tables against the lines, sentences against figures."""

import re
import statistics
from pathlib import Path

import numpy
import pytest
from scipy import stats
from study_lines import STEPS, WEIGHTS, speeds, study

from flora.study import report
from flora.study.plan import PARTS
from flora.study.records import Store
from flora.study.results import Results
from flora.study.section import STYLES, table, unwrapped
from flora.study.statistics import Estimate, interval, over_groups, spread
from flora.study.wording import TITLES, estimated, listed, number, setting, signed, verdict

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def whole():
    """A study that is complete, in which more parameters help, and scale 16 hurts."""
    return [
        *study(gains=lambda run: {0.02: -0.7, 0.08: 0.5}.get(run.share, 0.0) - 3 * (run.options == {"scale": 16.0}))
    ]


@pytest.fixture(scope="module")
def written(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report.write(whole + speeds(), folder)
    return folder


def text_of(lines):
    return "\n\n".join(unwrapped(section.text) for section in report.page(Results(lines)))


def row(text, heading, name):
    """The cells of a row of the first table after a heading."""
    after = text.split(f"## {heading}\n", 1)[1]
    (line, *_) = [line for line in after.splitlines() if line.startswith(f"| {name} |")]
    return line.split(" | ")[1:]


def finals(lines, **which):
    return {
        line["seed"]: 100 * line["test"]
        for line in lines
        if line["kind"] == "run"
        and line["stage"] == "final"
        and all(line[key] == value for key, value in ({"options": {}} | which).items())
    }


# Statistics ----------------------------------------------------------------------------------------------------------


def test_the_interval_is_student_s():
    values = [1.0, 2.5, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 3, loc=numpy.mean(values), scale=stats.sem(values))
    assert interval(values) == Estimate(2.375, pytest.approx(low), pytest.approx(high))
    assert interval([3.0]) == Estimate(3.0, None, None)
    assert interval([3.0, 3.0]) == Estimate(3.0, 3.0, 3.0)
    assert (spread([3.0]), spread([1.0, 3.0])) == (None, pytest.approx(2**0.5))


def test_the_interval_over_groups_is_welch_s():
    """The mean of two groups is half the difference of the one and the other's negative."""
    first, second = [1.0, 2.0, 4.0], [3.0, 3.5, 9.0, 4.0]
    welch = stats.ttest_ind(first, [-value for value in second], equal_var=False).confidence_interval(0.95)
    found = over_groups([first, second])
    assert (2 * found.low, 2 * found.high) == (pytest.approx(welch.low), pytest.approx(welch.high))
    assert found.mean == pytest.approx((7 / 3 + 19.5 / 4) / 2)
    assert over_groups([first, [1.0]]).low is None
    assert over_groups([first]) == interval(first)


def test_nineteen_intervals_of_twenty_hold_the_truth():
    """Of three tasks with means and spreads of their own and three seeds each."""
    random = numpy.random.default_rng(0)
    means, spreads = numpy.array([-1.0, 0.5, 2.0]), numpy.array([0.5, 1.0, 2.0])
    held = 0
    for _ in range(2000):
        found = over_groups((means[:, None] + spreads[:, None] * random.standard_normal((3, 3))).tolist())
        held += found.low <= means.mean() <= found.high
    assert 0.93 <= held / 2000 <= 0.98


@pytest.mark.parametrize(
    ("estimate", "sentence", "cell"),
    [
        (
            Estimate(1.24, 0.3, 2.1),
            "A is better than B by 1.2 points (95 % interval +0.3 to +2.1)",
            "**+1.2** (+0.3 to +2.1)",
        ),
        (
            Estimate(-1.2, -2.1, -0.3),
            "A is worse than B by 1.2 points (95 % interval −2.1 to −0.3)",
            "**−1.2** (−2.1 to −0.3)",
        ),
        (
            Estimate(0.4, -0.8, 1.6),
            "A and B cannot be told apart (+0.4 points, 95 % interval −0.8 to +1.6)",
            "+0.4 (−0.8 to +1.6)",
        ),
        (Estimate(-0.04, None, None), "A less B is 0.0 points, on too few seeds to say more", "0.0 (no interval)"),
    ],
)
def test_a_sentence_claims_what_its_interval_allows(estimate, sentence, cell):
    assert verdict("A", "B", estimate) == sentence
    assert estimated(estimate) == cell


def test_words():
    assert [signed(x) for x in (0.04, -0.04, -0.06, 12.25)] == ["0.0", "0.0", "−0.1", "+12.2"]
    assert [listed(x) for x in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert [number(x, "seed") for x in (1, 3, 12)] == ["one seed", "three seeds", "12 seeds"]
    assert setting({"scale": 0.25}) == "scale 0.25"
    assert setting({"init": "hosvd", "gain": "matched"}) == "singular vectors of the weight (HOSVD), equal first step"
    assert setting({"unknown": 3}) == "unknown 3"
    assert unwrapped("# a\n\nb\nc\n\n- d\n  e\n- f\n\n| g |\n| h |\n![i](j)") == (
        "# a\n\nb c\n\n- d e\n- f\n\n| g |\n| h |\n![i](j)"
    )
    assert table(["", "a"], [["b", "c"]]) == "|  | a |\n| --- | ---: |\n| b | c |"
    assert STYLES.keys() == TITLES.keys()


# The page ------------------------------------------------------------------------------------------------------------


def test_every_part_has_its_section_and_every_drawing_its_place(written):
    text = (written / "study.md").read_text()
    for part in report.PARTS:
        assert f"\n## {part.title}\n" in text, part.name
    assert {part.name for part in report.PARTS} == {*PARTS} - {"core", "texts"}
    shown = re.findall(r"\]\((study-[\w-]+\.svg)\)", text)
    assert len(shown) == len(set(shown)) >= 8
    assert {path.name for path in written.iterdir()} == {"study.md", *shown}
    for name in shown:
        drawing = (written / name).read_text()
        assert drawing.startswith("<?xml")
        assert ">test accuracy, %</text>" in drawing or name in ("study-differences.svg", "study-rates.svg")
    progress = [line for line in text.splitlines() if re.match(r"\| .* \| \d+ of \d+ \|", line)]
    assert len(progress) == len(PARTS) - 1
    assert all(re.match(r".*\| (\d+) of \1 \|", line) for line in progress)


def test_the_same_lines_give_the_same_files(whole, written, tmp_path):
    report.write(list(reversed(whole + speeds())), tmp_path)
    for path in written.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_tables_hold_the_lines_means_spreads_and_rates(whole, written):
    text = (written / "study.md").read_text()
    for method in ("head", "full", "lora", "locon", "flora"):
        cells = row(text, "Accuracy at equal numbers of parameters", TITLES[method])
        for cell, task in zip(cells, ("digits", "animals", "trec"), strict=True):
            values = [
                *finals(whole, task=task, method=method, share=None if method in ("head", "full") else 0.04).values()
            ]
            assert cell.removesuffix(" |") == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    rates = text.split("| learning rate |", 1)[1]
    assert f"| {TITLES['full']} | 0.0003 | 0.0003 | 0.0003 |" in rates
    assert f"| {TITLES['flora']} | 0.01 | 0.01 | 0.01 |" in rates
    assert f"{0.99 * 0.04 * WEIGHTS:,.0f} (3.96 %; rank 7 to 8, kernel 2)" in text
    assert "of which these deltas use 99.0 %. " in text


def test_differences_are_paired_by_task_and_seed(whole, written):
    text = (written / "study.md").read_text()
    for task in ("digits", "animals", "trec", "resnet-digits", "vit-digits", "polarity"):
        cell, *_ = row(text, "FLoRA beside the others, paired", task)
        ours, theirs = (finals(whole, task=task, method=method, share=0.04) for method in ("flora", "lora"))
        assert cell == estimated(interval([ours[seed] - theirs[seed] for seed in (1, 2, 3)]))
    groups = [
        [
            finals(whole, task=t, method="flora", share=0.04)[s] - finals(whole, task=t, method="lora", share=0.04)[s]
            for s in (1, 2, 3)
        ]
        for t in ("digits", "animals", "trec")
    ]
    assert f"**{verdict('FLoRA', 'LoRA', over_groups(groups))} over three tasks**" in text
    assert "With three seeds a task's interval reaches 4.3 standard errors" in text


def test_settings_are_compared_with_what_they_differ_from(whole, written):
    text = (written / "study.md").read_text()
    *_, change = row(text, "What a wrong scale costs", "FLoRA: scale 16")
    tasks = ("animals", "resnet-digits")
    groups = []
    for task in tasks:
        wrong = finals(whole, task=task, method="flora", share=0.04, options={"scale": 16.0})
        right = finals(whole, task=task, method="flora", share=0.04)
        groups.append([wrong[seed] - right[seed] for seed in (1, 2, 3)])
    assert change.removesuffix(" |") == estimated(over_groups(groups))
    assert "Scale, FLoRA: beside scale 1, scale 16 costs 3." in text
    assert re.search(r"alpha / √r \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \| (\*\*)?[+−0]", text)
    assert "Rank: FLoRA with 2 % of the weights is worse than one with 4 % of the weights by" in text
    assert "Rank: FLoRA with 8 % of the weights is better than one with 4 % of the weights by" in text


def test_the_cost_is_that_alone_on_the_machine_or_else_the_runs_own(whole, written):
    text = (written / "study.md").read_text()
    assert "with nothing else running" in text
    assert row(text, "What a step costs", "full fine-tuning") == ["3.00 |"]
    rough = text_of(whole)
    assert "one thread each: rough" in rough
    assert row(rough, "What a step costs", "full fine-tuning") == ["3.00", "3.00", "3.00 |"]


@pytest.mark.parametrize(
    ("gain", "sentence"),
    [
        (2.0, "FLoRA is better than LoRA by"),
        (-5.0, "FLoRA is worse than LoRA by"),
        (-1.0, "FLoRA and LoRA cannot be told"),
    ],
)
def test_a_win_a_loss_and_a_draw_read_as_such(gain, sentence):
    """FLoRA has a point more by itself; what is added to it varies by a tenth of it from seed to seed."""
    lines = study(["core"], gains=lambda run: (run.method == "flora") * gain * (1 + 0.1 * (run.seed - 2)))
    assert f"**{sentence}" in text_of(lines)
    assert f"- {sentence}" in report.readme_figures(lines)
    assert f"{'below' if gain == 2.0 else 'above'} this interval." in text_of(lines)


def test_a_win_on_a_few_tasks_is_not_taken_for_one_on_all():
    def gains(run):
        return {"digits": 6.0, "animals": -0.5, "trec": -0.5}[run.task] * (run.method == "flora")

    text = text_of(study(["core"], {task: STEPS[task] for task in ("digits", "animals", "trec")}, gains=gains))
    assert "That holds for these tasks; taken as a sample of others (" in text
    assert "; clearly better on digits" in text


def test_what_did_not_run_is_left_out_and_said(whole):
    text = text_of(study(["core", "scale"], {"digits": 96, "animals": 96}, seeds=(1, 2)))
    assert "| The core | 0 of 10 |" in text
    assert "| More networks: attention, full convolutions | 0 of 10 |" in text
    assert " (2 seeds) |" in text
    for part in report.PARTS:
        assert (f"## {part.title}\n" in text) == (part.name == "scale")
    assert "on too few seeds to say more" in text_of(study(["core"], seeds=(3,)))


def test_without_a_final_run_there_is_no_report(tmp_path):
    lines = [line for line in study(["core"]) if line.get("stage") != "final"]
    with pytest.raises(ValueError, match="the lines hold no final run"):
        report.write(lines, tmp_path / "new")
    with pytest.raises(ValueError, match="there are no figures to quote"):
        report.readme_figures(lines)
    assert not (tmp_path / "new").exists()


def test_a_quick_study_is_reported_as_one():
    text = text_of(study(["quick"]))
    assert "This is the quick version" in text
    assert "| A quick version of the core | 5 of 5 |" in text
    assert "on too few seeds to say more" in text
    assert "one task: EfficientNet-Lite0 on handwritten digits" in text


def test_runs_that_diverged_are_marked_and_count_as_nothing():
    lines = study(["core"], diverged=lambda run: (run.method, run.task, run.seed) == ("lora", "digits", 2))
    text = text_of(lines)
    values = [*finals(lines, task="digits", method="lora").values()]
    assert sorted(values)[0] == 0
    assert f"| LoRA | {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}† |" in text
    assert "† ended at a loss that was not finite and counts as 0 %: LoRA on digits (1 of 3)." in text


def test_locon_is_left_out_where_it_is_lora():
    lines = study(["core"])
    lora = {
        (line["task"], line["seed"], line["lr"], line["stage"]): line for line in lines if line.get("method") == "lora"
    }
    for line in lines:
        if line.get("method") == "locon" and line["task"] == "trec":
            twin = lora[line["task"], line["seed"], line["lr"], line["stage"]]
            line["test"], line["validation"] = twin["test"], twin["validation"]
    text = text_of(lines)
    assert "On trec LoCon is LoRA: it differs on convolutions alone." in text
    assert row(text, "FLoRA beside the others, paired", "trec")[1] == "–"
    assert "LoCon (Tucker-2) by 0.4 points" in text or "and LoCon (Tucker-2) cannot" in text
    assert "(digits and animals): " in report.readme_figures(lines)


def test_a_delta_that_has_fitted_less_is_told_from_one_that_generalises_worse():
    lines = study(["core"], gains=lambda run: -3.0 * (run.method == "flora"))
    assert "fitted less" not in text_of(lines)
    for line in lines:
        if line.get("method") == "flora" and line["task"] == "animals":
            line["train_loss"] = 0.2
    assert "its training loss ends at 2.0 times LoRA's on animals (96 steps)." in text_of(lines)
    assert text_of(lines).split("| training loss |", 1)[1].count("| FLoRA | 0.1 | 0.2 | 0.1 |") == 1


def test_a_setting_that_changes_no_run_is_not_taken_for_a_small_difference():
    lines = study(["core", "networks", "batch-norm"])
    plain = {(x["task"], x["method"], x["seed"]): x for x in lines if x.get("stage") == "final" and not x["options"]}
    for line in lines:
        if line.get("options") == {"batch_norm": "moving"} and line["method"] == "flora":
            line["test"] = plain[line["task"], "flora", line["seed"]]["test"]
    text = text_of(lines)
    assert "BatchNorm, FLoRA: statistics move: every run scored as it does with held statistics" in text
    assert "BatchNorm, LoRA: statistics move: every run" not in text


def test_a_task_without_room_is_named():
    lines = study(["core"], gains=lambda run: 9.0 * (run.method == "head" and run.task == "digits"))
    assert "On digits full fine-tuning is less than 5 points above the classifier alone" in text_of(lines)


def test_versions_seeds_and_machine_are_told(written):
    text = (written / "study.md").read_text()
    assert "run with seeds 1, 2 and 3" in text
    end = text.split("## Seeds, versions, machine\n", 1)[1]
    for what in ("2 at once", "A CPU (2 CPUs, 8 GiB", "kernels v4", "commit 0123456789;", "torch 2.13.0", "2026-01-02"):
        assert what in end
    assert "None" not in end


# What the repository holds -------------------------------------------------------------------------------------------


def test_the_readme_quotes_figures_between_marks(whole):
    block = report.readme_figures(whole)
    assert block.startswith(report.BEGIN)
    assert block.endswith(report.END)
    assert sum(line.startswith("- ") for line in block.splitlines()) == 3


def test_the_readme_and_the_page_are_what_the_committed_lines_give():
    committed, readme = ROOT / "docs" / "study.jsonl", (ROOT / "README.md").read_text()
    assert committed.exists() == (ROOT / "docs" / "study.md").exists() == (report.BEGIN in readme)
    if committed.exists():
        records = Store(committed).records()
        assert report.readme_figures(records) in readme
        assert text_of(records) + "\n" == (ROOT / "docs" / "study.md").read_text()
