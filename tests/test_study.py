"""The study: what it compares is equal but for the method, its lines are kept, and its report says what they say."""

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_examples import ENVIRONMENT, ROOT
from torch import nn

import flora
from flora.state import adapted_layers
from flora.study import data, methods, runs, training
from flora.study.data import Corpus, Data, Sentences, corpora, held_out
from flora.study.methods import METHODS, adapted_weights, match_gain
from flora.study.networks import EFFICIENTNET, Network, schedule
from flora.study.plan import PARTS, SHARE, SHARES, Comparison, Run, comparisons
from flora.study.records import Store, digest
from flora.study.runs import Place, carry_out, count, pending
from flora.study.tasks import Task, tasks

SIZED = [name for name, method in METHODS.items() if method.with_budget and method.sized]
LIMIT = 600  # seconds that a process may take
STEPS = dict.fromkeys(("digits", "animals", "trec", "polarity", "llama-trec", "resnet-digits", "vit-digits"), 96)


class Small(nn.Module):
    """A convolutional network that learns in moments; every kind of layer that the study adapts is in it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 5, padding=2, groups=24)
        self.pointwise = nn.Conv2d(24, 40, 1)
        self.full = nn.Conv2d(40, 32, 3, padding=1)
        self.hidden = nn.Linear(32, 48)
        self.head = nn.Linear(48, classes)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.full(self.pointwise(self.depthwise(x)).relu()).relu().mean((2, 3))
        return self.head(self.hidden(x).relu())


NETWORK = Network(lambda classes, cache: Small(classes), "head")


def toy_data():
    """Two classes that differ in brightness."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(120) % 2
    pixels = torch.randint(0, 120, (120, 3, 16, 16), generator=generator) + 90 * labels[:, None, None, None]
    return held_out(data.Images(pixels.to(torch.uint8), labels), ("dark", "bright"), 40)


TOY = Task("toy", "a toy", NETWORK, toy_data, train=48, validation=24, steps=12, batch_size=8)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(runs, "known_tasks", lambda text_data: {"toy": TOY})
    monkeypatch.setattr(runs, "_data", lambda text_data, task: toy_data())


def toy_run(method, **changes):
    share = SHARE if METHODS[method].with_budget else None
    return Run(
        **{"task": "toy", "method": method, "share": share, "seed": 1, "lr": 1e-3, "steps": 12, "stage": "search"}
        | changes
    )


# Equal budgets -------------------------------------------------------------------------------------------------------


SHORT = {
    ("flora-fixed", 0.3): 0.025,
    ("ldr", 0.3): 0.126,
    ("ldr", 0.5): 0.083,
    ("kronecker", 0.3): 0.162,
    ("kronecker", 0.5): 0.497,
    ("peft-lora", 0.3): 0.103,
    ("peft-loha", 0.3): 0.167,
    ("peft-lokr", 0.3): 0.766,
    ("peft-lokr", 0.5): 0.860,
}
"""By how much of the budget a method falls short of it where it cannot come within 2 %: its sizes lie further apart."""


@pytest.mark.parametrize("method", SIZED)
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_budgets_are_equal_within_two_percent(method, share):
    """Or it is known by how much they cannot be, on a network where a rank of a layer is a large part of the whole."""
    model = Small(2)
    budget = round(share * adapted_weights(model, NETWORK))
    prepared = METHODS[method].prepare(model, NETWORK, share, {})
    learning = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    assert learning == prepared.deltas + sum(p.numel() for p in Small(2).head.parameters())
    short = 1 - prepared.deltas / budget
    assert short == pytest.approx(SHORT[method, share], abs=0.005) if (method, share) in SHORT else 0 <= short <= 0.02


@pytest.mark.parametrize("method", ["lora", "locon", "flora", "flora-fixed"])
@pytest.mark.parametrize("share", SHARES)
def test_budgets_of_the_reported_network_are_equal(method, share):
    model = EFFICIENTNET.build(10, None)
    budget = round(share * adapted_weights(model, EFFICIENTNET))
    config = METHODS[method].sized_config(model, EFFICIENTNET, budget, {})
    deltas = [delta for layer in adapted_layers(flora.adapt(model, config)).values() for delta in layer.deltas.values()]
    learning = sum(p.numel() for delta in deltas for p in delta.parameters() if p.requires_grad)
    assert 0.98 * budget <= learning <= budget


def test_methods_adapt_the_same_layers():
    wanted = set(methods.targets(Small(2), NETWORK))
    assert wanted == {"stem", "depthwise", "pointwise", "full", "hidden"}
    for name, method in METHODS.items():
        if method.kind == "flora":
            model = method.prepare(Small(2), NETWORK, 0.5, {}).model
            assert set(adapted_layers(model)) - {"norm"} == wanted, name  # RLRR rescales normalisations, too


# The same for all ----------------------------------------------------------------------------------------------------


def test_every_method_sees_the_same_batches_classifier_and_schedule(toy, monkeypatch, tmp_path):
    seen = {}

    def spy(model, optimizer, x, labels):
        seen[method].append((x.sum().item(), labels.tolist(), optimizer.param_groups[0]["lr"]))
        return real(model, optimizer, x, labels)

    real = training.step
    monkeypatch.setattr(training, "step", spy)
    heads = {}
    for method in ("head", "full", "lora", "flora", "circulant", "peft-lora"):
        seen[method] = []
        run = toy_run(method, share=0.5 if METHODS[method].with_budget else None)
        model = runs.prepared(Place(None, tmp_path), run)[0].model
        heads[method] = next(
            p for name, p in model.named_parameters() if "head" in name and p.ndim == 2 and p.requires_grad
        )
        carry_out(Place(None, tmp_path), run)
    assert all(batches == seen["head"] and len(batches) == 12 for batches in seen.values())
    assert all(torch.equal(head, heads["head"]) for head in heads.values())


def test_a_run_repeats_bit_for_bit(toy, tmp_path):
    first, second = (carry_out(Place(None, tmp_path), toy_run("flora", share=0.5)) for _ in range(2))
    assert first["train_loss"] == second["train_loss"]
    assert first["id"] == second["id"]


def test_the_test_split_is_used_by_final_runs_only(toy, tmp_path):
    place = Place(None, tmp_path)
    assert carry_out(place, toy_run("head"))["test"] is None
    final = carry_out(place, toy_run("head", stage="final"))
    assert 0 <= final["test"] <= 1


def test_splits_are_disjoint_and_the_test_split_is_the_same_for_every_seed():
    whole = Data(
        *(data.Images(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), torch.arange(n) + k) for n, k in ((90, 0), (10, 90))),
        ("a",),
    )
    drawn = [whole.drawn(60, 20, seed) for seed in (1, 2)]
    for train, validation in drawn:
        assert len({*train.labels.tolist()} | {*validation.labels.tolist()}) == 80
    assert drawn[0][0].labels.tolist() != drawn[1][0].labels.tolist()
    with pytest.raises(ValueError, match="60 examples to train on and 40 to validate on, of 90"):
        whole.drawn(60, 40, 1)
    once, again = (held_out(whole.pool, ("a",), 30) for _ in range(2))
    assert torch.equal(once.test.labels, again.test.labels)
    assert not {*once.test.labels.tolist()} & {*once.pool.labels.tolist()}


def test_the_schedule_rises_and_falls():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == rates[10] == 1
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 1e-3


# The plan ------------------------------------------------------------------------------------------------------------


def test_no_run_is_short_and_searches_share_one_grid():
    wanted = list(comparisons(("quick", *PARTS), STEPS))
    assert all(run.steps >= 60 for c in wanted for run in c.search())
    core = list(comparisons(["core"], STEPS))
    assert {c.method for c in core} == {"head", "full", "lora", "locon", "flora"}
    assert {c.task for c in core} == {"digits", "animals", "trec"}
    assert {c.lrs for c in core} == {core[0].lrs}
    assert len(core[0].lrs) >= 3
    assert all(len(c.seeds) >= 3 and 0 not in c.seeds for c in core)  # the seed of the search is not reported


def test_final_runs_wait_for_the_search_and_take_the_best_rate():
    comparison = Comparison("core", "toy", "flora", SHARE, 60)
    runs_of = comparison.search()
    assert comparison.final({run.id: {"validation": 0.5} for run in runs_of[:-1]}) is None
    done = {run.id: {"validation": 0.9 if run.lr == 3e-3 else 0.5} for run in runs_of}
    assert [(run.seed, run.lr, run.stage) for run in comparison.final(done)] == [(s, 3e-3, "final") for s in (1, 2, 3)]
    tied = comparison.final({run.id: {"validation": 0.5} for run in runs_of})
    assert {run.lr for run in tied} == {min(comparison.lrs)}


def test_parts_share_the_runs_that_they_have_in_common():
    alone = sum(count(list(comparisons([part], STEPS))) for part in PARTS)
    assert count(list(comparisons(PARTS, STEPS))) < alone
    scaled, core = (
        next(c for c in comparisons([part], STEPS) if (c.method, c.task) == ("flora", "animals"))
        for part in ("scale", "core")
    )
    assert scaled.search() == core.search()


def test_without_texts_there_are_no_text_tasks():
    assert set(tasks({})) == {"digits", "animals", "resnet-digits", "vit-digits"}
    wanted = {c.task for c in comparisons(PARTS, dict.fromkeys(tasks({}), 96))}
    assert wanted == {"digits", "animals", "resnet-digits", "vit-digits"}


# The store -----------------------------------------------------------------------------------------------------------


def test_the_last_line_of_an_id_counts_and_an_unfinished_line_is_passed_over(tmp_path):
    store = Store(tmp_path / "deep" / "study.jsonl")
    assert store.records() == []
    store.append({"kind": "run", "id": "a", "value": 1})
    store.append({"kind": "speed", "id": "b"})
    store.append({"kind": "run", "id": "a", "value": 2})
    with store.path.open("a") as file:
        file.write('{"kind": "run", "id": "c", "val')
    assert store.records("run") == [{"kind": "run", "id": "a", "value": 2}]
    assert store.has("b")
    assert not store.has("c")
    store.append({"kind": "run", "id": "d"})
    assert [json.loads(line)["id"] for line in store.path.read_text().splitlines()] == ["a", "b", "a", "d"]


def test_a_line_that_is_no_record_is_an_error(tmp_path):
    path = tmp_path / "study.jsonl"
    for line in ("nonsense", "[1]", '{"kind": "run"}', '{"id": "x"}'):
        path.write_text(f'{{"kind": "run", "id": "a"}}\n{line}\n')
        with pytest.raises(ValueError, match="line 2, is no record"):
            Store(path).records()
    with pytest.raises(ValueError, match="JSON"):
        Store(tmp_path / "other").append({"kind": "run", "id": "a", "loss": float("nan")})
    assert not (tmp_path / "other").exists()


def test_ids_depend_on_what_is_run_alone():
    assert toy_run("head").id == toy_run("head", keep_updates=True).id
    changed = [
        toy_run("head", **{key: value}).id
        for key, value in (("seed", 2), ("lr", 1.0), ("steps", 3), ("options", {"a": 1}))
    ]
    assert len({toy_run("head").id, *changed}) == 5
    assert digest(a=1, b=2) == digest(b=2, a=1) != digest(a=1, b=3)


def test_peft_computes_what_the_network_does_before_it_learns():
    x = torch.rand(2, 3, 16, 16)
    model = Small(2).eval()
    before = model(x)
    made = METHODS["peft-lora"].prepare(model, NETWORK, 0.5, {}).model
    torch.testing.assert_close(made.eval()(x), before)


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_learns_the_toy(toy, tmp_path, method):
    """And its update is kept, in the weights' own shapes."""
    share = 0.5 if METHODS[method].with_budget else None
    run = toy_run(method, share=share, steps=40, lr=1e-3 if method == "ldr" else 5e-3, stage="final", keep_updates=True)
    record = carry_out(Place(None, tmp_path), run)
    first = carry_out(Place(None, tmp_path), toy_run(method, share=share, steps=1, lr=1e-9))
    assert record["train_loss"] < first["train_loss"]
    assert record["budget"] == (None if share is None else round(share * record["adapted_weights"]))
    assert json.loads(json.dumps(record)) == record
    kept = safetensors_of(tmp_path, run)
    if METHODS[method].kind in ("flora", "full"):
        assert {name: tuple(t.shape) for name, t in kept.items() if name != "norm"} == {
            name: tuple(layer.weight.shape) for name, layer in methods.targets(Small(2), NETWORK).items()
        }
        assert all(t.abs().max() > 0 for name, t in kept.items() if name != "norm")


def safetensors_of(folder, run):
    from safetensors.torch import load_file

    return load_file(folder / "updates" / f"{run.id}.safetensors")


def test_a_run_that_diverges_is_recorded_as_such(toy, tmp_path):
    record = carry_out(Place(None, tmp_path), toy_run("full", lr=1e30, stage="final", keep_updates=True))
    assert record["diverged"]
    assert record["train_loss"] is None
    assert record["test"] == record["validation"] == 0.0
    assert not (tmp_path / "updates").exists()


def test_options_reach_the_run(toy, monkeypatch, tmp_path):
    place = Place(None, tmp_path)
    rates = []
    real = training.step
    monkeypatch.setattr(
        training, "step", lambda m, o, x, y: rates.append([g["lr"] for g in o.param_groups]) or real(m, o, x, y)
    )
    carry_out(place, toy_run("flora", share=0.5, options={"core_lr": 8.0}))
    assert max(rates[3]) == pytest.approx(8 * min(rates[3]))
    for moving in (False, True):
        model = runs.prepared(place, toy_run("flora", share=0.5))[0].model
        before = model.norm.running_mean.clone()
        options = {"batch_norm": "moving"} if moving else {}
        training.learn(model, toy_data().pool, steps=2, batch_size=8, lr=1e-3, seed=0, options=options)
        assert torch.equal(before, model.norm.running_mean) is not moving


def test_alpha_rules_agree_at_the_middle_budget():
    """And part elsewhere as alpha / r and alpha / √r do."""
    scales = {}
    for rule, share in itertools.product(("rank", "sqrt"), (SHARES[1], SHARES[2])):
        model = EFFICIENTNET.build(10, None)
        budget = round(share * adapted_weights(model, EFFICIENTNET))
        config = METHODS["lora"].sized_config(model, EFFICIENTNET, budget, {"alpha_rule": rule})
        scales[rule, share] = config.resolved_scale, config.rank
    assert scales["rank", SHARE][0] == scales["sqrt", SHARE][0] == 1
    middle, high = scales["rank", SHARE][1], scales["rank", SHARES[2]][1]
    assert scales["rank", SHARES[2]][0] == pytest.approx(middle / high)
    assert scales["sqrt", SHARES[2]][0] == pytest.approx((middle / high) ** 0.5)


@pytest.mark.parametrize("init", ["reference", "orthogonal", "hosvd"])
def test_starts_have_the_gain_of_the_authors(init):
    """How far a step of ±1 of every core entry moves ΔW, over many draws of the sign."""
    torch.manual_seed(0)
    moved = {}
    for name in ("reference", init):
        layer = nn.Sequential(nn.Conv2d(32, 48, 3))
        flora.adapt(layer, flora.TuckerConfig(rank=8, kernel_rank=2, init=name))
        match_gain(layer)
        delta = layer[0].deltas["default"]
        signs = torch.randn(200, *delta.core.shape).sign()
        with torch.no_grad():
            moved[name] = sum(_moved(delta, core) for core in signs) / len(signs)
    assert moved[init] == pytest.approx(moved["reference"], rel=0.1)


def _moved(delta, core):
    delta.core.copy_(core)
    return delta.delta_weight(torch.empty(delta.shape)).norm().item()


def test_what_is_there_is_not_run_again(toy, tmp_path):
    wanted = [Comparison("core", "toy", "flora", 0.5, 12, lrs=(1e-3, 1e-2), seeds=(1, 2), keep_updates=True)]
    done = {}
    place = Place(None, tmp_path)
    order = []
    while left := pending(wanted, done, tmp_path):
        record = carry_out(place, left[0])
        done[record["id"]] = record
        order.append(record["stage"])
    assert order == ["search", "search", "final", "final"]
    assert count(wanted) == 4
    next((tmp_path / "updates").iterdir()).unlink()  # an update that another part of the study needs
    assert [run.keep_updates for run in pending(wanted, done, tmp_path)] == [True]


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "trec").mkdir(parents=True)
    (folder / "rt-polarity").mkdir()
    (folder / "trec" / "train_5500.label").write_text("HUM:ind Who ?\nLOC:city Where ?\nHUM:gr Who else ?\n")
    (folder / "trec" / "TREC_10.label").write_text("LOC:other Where then ?\n")
    (folder / "rt-polarity" / "rt-polarity.neg").write_bytes("clich\xe9d\nbad\n".encode("latin-1"))
    (folder / "rt-polarity" / "rt-polarity.pos").write_text("good\n")
    return folder


def test_texts_are_read(texts):
    found = corpora(str(texts))
    assert found["trec"] == Corpus(
        (["Who ?", "Where ?", "Who else ?"], [0, 1, 0]), (["Where then ?"], [1]), ("HUM", "LOC")
    )
    assert found["polarity"].train == (["clichéd", "bad", "good"], [0, 0, 1])
    assert set(tasks(found)) >= {"trec", "polarity", "llama-trec"}
    assert corpora(None) == {}


def test_other_texts_come_from_hugging_face_datasets(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text("id,sentence,label\n1,fine,1\n2,dull,0\n3,great,1\n")
    (folder / "test.csv").write_text("id,sentence,label\n4,poor,0\n")
    assert corpora(str(folder)) == {"text": Corpus((["fine", "dull", "great"], [1, 0, 1]), (["poor"], [0]), ("0", "1"))}
    (folder / "train.csv").write_text("id,value\n1,2\n")
    (folder / "test.csv").unlink()
    with pytest.raises(ValueError, match="a train split with a label is needed"):
        corpora(str(folder))


def test_sentences_are_cut_to_the_longest_of_a_batch():
    sentences = Sentences(torch.tensor([[5, 6, 0, 0], [5, 6, 7, 0], [5, 6, 7, 8]]), torch.tensor([0, 1, 2]), 0)
    assert sentences.batch(slice(0, 2))[0].shape == (2, 3)
    assert sentences.subset(torch.tensor([2, 0])).labels.tolist() == [2, 0]


def test_a_file_of_arrays_cannot_run_code():
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    with pytest.raises(pickle.UnpicklingError, match="should hold an array"):
        data.arrays(pickle.dumps(Evil()))
    assert data.arrays(pickle.dumps(torch.arange(3).numpy())).tolist() == [0, 1, 2]


def test_the_silhouettes():
    animals = data.animal_images(32)
    assert animals.pool.pixels.shape == (9000, 3, 32, 32)
    assert len(animals.test) == 1000
    assert {*animals.pool.labels.tolist()} == set(range(10))


# The command ---------------------------------------------------------------------------------------------------------


def study(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "flora", "study", *map(str, arguments)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT, check=False, **options,
    )  # fmt: skip


def test_wrong_options_are_one_sentence(tmp_path):
    for arguments, said in (
        (("--report", tmp_path, "--output", tmp_path), "holds no study.jsonl"),
        (("--jobs", "0"), "--jobs 0 is not above 0"),
        (("--task", "digits", "trec"), "--task 'trec' is none of digits, animals, resnet-digits, vit-digits"),
    ):
        done = study(*arguments)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_a_run_that_fails_is_named(tmp_path):
    """This one on a task that there is not."""
    wanted = [Comparison("core", "toy", "head", None, 60, lrs=(1e-3,), seeds=(1,))]
    with pytest.raises(RuntimeError, match="head on toy, seed 0: 'toy'"):
        list(runs.carried_out(Place(None, tmp_path), wanted, {}, 1))


def test_a_killed_study_leaves_no_process_and_goes_on_where_it_was(tmp_path):
    """The runs that were under way are done again, and those alone."""
    script = tmp_path / "toy_study.py"
    script.write_text(KILLED)
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    store = Store(tmp_path / "study.jsonl")
    wait_for(lambda: len(store.records()) == 2 or first.poll() is not None)
    first.send_signal(signal.SIGKILL)
    first.wait(LIMIT)
    wait_for(lambda: not lives(first.pid))
    before = store.records()
    assert len(before) == 2
    (tmp_path / "go").touch()
    done = subprocess.run(command, env=environment, timeout=LIMIT, check=False)
    assert done.returncode == 0
    assert len(store.path.read_text().splitlines()) == len(store.records()) == 6
    assert store.records()[:2] == before


KILLED = """
import sys, time
from pathlib import Path
import test_study
from flora.study import runs
from flora.study.plan import Comparison
from flora.study.records import Store
from flora.study.runs import Place, carried_out

if __name__ == "__main__":
    store = Store(Path(sys.argv[1]) / "study.jsonl")
    wanted = [Comparison("core", "toy", name, None, 12, lrs=(1e-3, 1e-2), seeds=(1,)) for name in ("head", "full")]
    done = {record["id"]: record for record in store.records()}
    for record in carried_out(Place(None, Path(sys.argv[1])), wanted, done, 2):
        store.append(record)
        if len(store.records()) == 2 and not (Path(sys.argv[1]) / "go").exists():
            time.sleep(test_study.LIMIT)  # to be killed
else:  # in a process of the pool, which imports this file as its main module
    runs.known_tasks = lambda text_data: {"toy": test_study.TOY}
    runs._data = lambda text_data, task: test_study.toy_data()
"""


def wait_for(condition):
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.05)


def lives(group):
    """Whether any process of a group does; one that has ended does not, even if nobody has waited for it."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it is gone since it was listed
            state, _, its_group = path.read_bytes().rpartition(b")")[2].split()[:3]
            if int(its_group) == group and state not in (b"Z", b"X"):
                return True
    return False
