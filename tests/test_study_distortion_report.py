"""The section on structural distortion: its sentences and drawings follow from the lines."""

import io
import math
import re

import pytest

from flora.study.distortion_report import Lines, headline, section

pytest.importorskip("matplotlib")

SHAPES = {"full": [64, 48, 3, 3], "depthwise": [96, 1, 3, 3], "pointwise": [96, 48, 1, 1], "linear": [96, 96]}


def target(name, kind, task, values=(0.9, 0.3)):
    shape = SHAPES[kind]
    modes = [None if extent == 1 else list(values) for extent in shape]
    about = {"target": name, "task": task, "layer": name.split("/")[1], "layer_kind": kind, "shape": shape}
    about |= {"parameters": math.prod(shape), "values": modes}
    about["leading"] = [None if extent == 1 else extent // 3 for extent in shape]
    return {"kind": "distortion", "id": name, "part": "target", **about}


def point(share, kind, error, filled=1.0, setting="rank 8×8×3×2"):
    modes = [None if extent == 1 else error / 2 for extent in SHAPES[kind]]
    budget = int(share * math.prod(SHAPES[kind]))
    found = {"share": share, "budget": budget, "parameters": filled * budget, "sizes": [[setting, budget, 64]]}
    found |= {"how": "exact", "error": error, "spectra": modes, "subspaces": modes}
    return found | ({"values": [None if m is None else [0.8, 0.2] for m in modes]} if share == 0.04 else {})


def fit(name, kind, method, errors, **fields):
    points = [{"share": 0.005, "budget": 3, "least": "too few"}]
    points += [point(share, kind, error, **fields) for share, error in errors.items()]
    line = {"kind": "distortion", "id": f"{name} {method}", "part": "fit", "target": name, "method": method}
    return line | {"points": points}


def study(flora, lora=0.5, kind="full", count=4, wobble=0.02, **others):
    """Updates of one kind and a synthetic target, with the methods' errors at 4 %, and the double of them at 2 %."""
    found = []
    for i in range(count):
        name = f"animals/block.{i}"
        found.append(target(name, kind, "animals"))
        errors = {"lora": lora, "locon": 0.45, "flora": flora * (1 + wobble * (-1) ** i), "flora-ranks": 0.4, **others}
        for method, error in errors.items():
            found.append(fit(name, kind, method, {0.02: min(1, 2 * error), 0.04: error}))
        found.append(fit(name, kind, "circulant", {0.04: 0.99}, filled=0.25))
    found.append(target("tucker/0", "full", None))
    found += [fit("tucker/0", "full", m, {0.04: e}) for m, e in (("lora", 0.5), ("locon", 0.0), ("flora", 0.0))]
    return found


def learned(method, cosine, task="animals", seed=1, layers=4, kind="full", **fields):
    modes = [None if extent == 1 else 0.3 for extent in SHAPES[kind]]
    shared = {"layer_kind": kind, "norm": 1.5, "error": math.sqrt(1 - cosine**2), "spectra": modes, "subspaces": modes}
    each = [shared | {"layer": f"block.{i}", "cosine": cosine + 0.01 * i} for i in range(layers)]
    line = {"kind": "distortion", "id": f"{task} {method} {seed}", "part": "learned", "task": task, "method": method}
    return line | {"seed": seed, "options": {}, "cosine": cosine, "norm": 1.5, "layers": each, **fields}


@pytest.mark.parametrize(
    "flora, verdict, paper",
    [
        (
            0.25,
            r"the error of FLoRA is 50.0 % below the error of LoRA \(95 % interval −5\d\.\d to −4\d\.\d %\)",
            "that is more of a gain than",
        ),
        (0.315, r"the error of FLoRA is 37.0 % below the error of LoRA", "the interval holds the paper's figure"),
        (0.45, r"the error of FLoRA is 10.0 % below the error of LoRA", "that is less of a gain than"),
        (
            0.5,
            r"the error of FLoRA cannot be told from the error of LoRA \(.0.0 %, 95 % interval −\d.\d to \+\d.\d %\)",
            "no gain is seen",
        ),
        (0.6, r"the error of FLoRA is 20.0 % above the error of LoRA \(95 % interval \+", "it is a loss and no gain"),
    ],
)
def test_the_figures_choose_the_sentences(flora, verdict, paper):
    records = study(flora)
    text = section(records).text
    assert re.search(f"On full kernels, {verdict}", text), text
    assert paper in text
    assert re.search(
        f"four updates of full kernels with 4 % of their entries as parameters: {verdict}", headline(records)
    )


def test_one_update_has_no_interval():
    assert (
        "is −10.0 % beside the error of LoRA, on too few updates to say more"
        in section(study(0.45, count=1, wobble=0)).text
    )


def test_the_table_has_means_and_says_what_is_missing():
    text = section(study(0.45)).text
    lines = text.splitlines()
    assert lines.index("| mean error | full kernels, 4 % |") + 2 == lines.index("| LoRA | 0.500 |")
    assert "| circulant | 0.990 (25 %) |" in lines
    assert "| full kernels | 21 of 64 | 16 of 48 | 1 of 3 |" in lines
    assert "| full kernels: FLoRA | 0.225 | 0.225 | 0.225 | 0.225 | 0.225 | 0.225 |" in lines
    assert (
        "With other ranks of the modes, the error of FLoRA of chosen ranks is 20.0 % below the error of LoRA (" in text
    )
    assert "0 of the 4 approximations of full kernels keep the kernel's modes whole" in text
    assert "Of LoRA, LoCon and FLoRA the closest: LoCon (Tucker-2) and FLoRA on *tucker*." in text


def test_a_method_that_lacks_an_update_has_no_mean():
    text = section([record for record in study(0.45) if record["id"] != "animals/block.2 flora-ranks"]).text
    assert "| FLoRA of chosen ranks | – |" in text


def test_the_budget_is_one_that_most_updates_have():
    records = [record for record in study(0.45) if record["id"] != "animals/block.1 lora"]
    records.append(fit("animals/block.1", "full", "lora", {0.02: 0.9}))
    (group,) = Lines(records).real.values()
    assert (group.share, len(group.targets)) == (0.02, 4)


@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_is_drawn(kind):
    found = section(study(0.45, kind=kind, loha=0.7))
    assert set(found.figures) == {"distortion", "distortion-synthetic"} | ({"spectra"} if kind == "full" else set())
    for name, figure in found.figures.items():
        assert f"](study-{name}.svg)" in found.text
        figure.savefig(io.BytesIO(), format="svg")
    lines = {line.get_label(): line for line in found.figures["distortion"].axes[0].get_lines()}
    assert {"LoRA", "FLoRA", "LoHa", "circulant"} <= lines.keys()
    assert list(lines["FLoRA"].get_xdata()) == pytest.approx([0.02, 0.04], rel=0.05)
    assert list(lines["FLoRA"].get_ydata()) == pytest.approx([0.9, 0.45])


@pytest.mark.parametrize(
    "cosine, said",
    [(0.5, "is above LoRA's (+0.200"), (0.1, "is below LoRA's (−0.200"), (0.3, "cannot be told from LoRA's")],
)
def test_learned_updates_are_compared_layer_by_layer(cosine, said):
    first = learned("flora", cosine)
    for i, layer in enumerate(first["layers"]):
        layer["cosine"] += 0.02 * (-1) ** i
    text = section([first, learned("lora", 0.3), learned("full", 0.6, seed=2)]).text
    assert f"FLoRA's cosine {said}" in text
    assert "Full fine-tuning beside itself with another seed has a cosine of 0.60 on animals" in text
    assert "| animals: full fine-tuning, seed 2 | 0.60 | 1.50 |" in text


def test_what_was_learned_is_held_against_what_could_have_been():
    text = section([*study(0.45), learned("flora", 0.1), learned("lora", 0.1)]).text
    assert "| full kernels: FLoRA | 0.995 | 0.450 | 4 |" in text
    assert "In each row the learned update is closer to being unrelated" in text
    text = section([*study(0.45), learned("flora", 0.8), learned("lora", 0.1)]).text
    assert "In 1 of 2 rows the learned update is closer to being unrelated" in text


def test_runs_with_options_are_left_out():
    assert "###" not in section([learned("flora", 0.5, options={"scale": 4.0})]).text


def test_nothing_is_said_without_lines():
    assert section([]) is None
    assert section([{"kind": "run", "id": "1"}]) is None
    assert headline([]) is None
    assert headline(study(0.4, kind="linear")) is None
