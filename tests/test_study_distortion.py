"""Structural distortion: what its figures mean, that fits are the best there are, equal budgets, resumed lines."""

import json
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flora
from flora.deltas import Site, build
from flora.study import distortion
from flora.study.approximations import (
    COPIES,
    METHODS,
    OfConfig,
    TooFewParametersError,
    layer_of,
    loha,
    optimise,
    parameters_of,
    shared,
    tucker_parameters,
)
from flora.study.decompositions import displaced, held_by_ranks, hooi, multiply, nearest_kronecker
from flora.study.layers import KINDS, chosen, in_depth, kind
from flora.study.records import Store
from flora.study.structure import Reference, cosine, modes, unfolding
from flora.study.synthetic import SYNTHETIC

SHAPES = [(12, 10, 3, 3), (20, 1, 3, 3), (16, 12, 1, 1), (14, 18)]
BY_NAME = {one.name: one for one in SYNTHETIC}


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotations(shape, seed=0):
    return [torch.linalg.qr(normal(n, n, seed=seed + i)).Q for i, n in enumerate(shape)]


def error(target, weight):
    return float((weight - target).norm() / target.norm())


def best_error(method, target, parameters):
    """Of the larger one of the sizes."""
    size = max(METHODS[method].sizes(target, parameters), key=lambda size: size.parameters)
    return error(target, METHODS[method].fit(target, size.setting, 1).weights[0]), size


# The figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_target_is_no_distortion_of_itself(shape):
    target = normal(*shape)
    found = Reference(target).distortion(target)
    assert found.error == 0
    there = [extent > 1 for extent in shape]
    assert [value is not None for value in found.spectra] == there
    assert [value is not None for value in found.subspaces] == there
    assert all(value is None or value < 1e-12 for value in (*found.spectra, *found.subspaces))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bases_and_units_change_no_figure(shape):
    target, approximation = normal(*shape), normal(*shape) + normal(*shape, seed=1)
    before = Reference(target).distortion(approximation)
    turned = rotations(shape, seed=7)
    after = Reference(3 * multiply(target, turned)).distortion(3 * multiply(approximation, turned))
    assert after.error == pytest.approx(before.error, rel=1e-9)
    for own, other in ((before.spectra, after.spectra), (before.subspaces, after.subspaces)):
        assert [x is None for x in own] == [x is None for x in other]
        assert [x for x in other if x is not None] == pytest.approx([x for x in own if x is not None], rel=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 1000), st.floats(0.01, 3))
def test_a_spectrum_is_never_further_off_than_the_whole(shape, seed, noise):
    target = normal(*shape, seed=seed)
    found = Reference(target).distortion(target + noise * normal(*shape, seed=seed + 1))
    assert all(value <= found.error + 1e-9 for value in found.spectra if value is not None)
    assert all(0 <= value <= 1 for value in found.subspaces if value is not None)


def test_a_known_angle_and_known_values():
    """The leading direction turned by 60°, and half as long."""
    target, turned = torch.zeros(2, 4, 4, dtype=torch.float64)
    target[0, 0], target[1, 1] = 3, 1
    turned[0, 0], turned[1, 0], turned[2, 1] = 1.5 * math.cos(math.pi / 3), 1.5 * math.sin(math.pi / 3), 1
    found = Reference(target).distortion(turned)
    assert Reference(target).modes[0].leading == 1
    assert found.subspaces == pytest.approx((0.75, 0))
    assert found.spectra == pytest.approx((1.5 / math.sqrt(10),) * 2)


def test_directions_that_are_missing_count_as_orthogonal():
    target = torch.eye(6, dtype=torch.float64)  # three directions hold half of it
    one = torch.zeros(6, 6, dtype=torch.float64)
    one[5, 5] = 1
    reference = Reference(target)
    assert reference.modes[0].leading == 3
    u, s = reference.modes[0].vectors, reference.modes[0].values
    low = u[:, :1] * s[:1] @ u[:, :1].mT
    assert reference.distortion(low).subspaces == pytest.approx((2 / 3, 2 / 3))
    assert reference.distortion(torch.zeros_like(target)).subspaces == (1, 1)


def test_the_best_scalar_leaves_what_the_cosine_says():
    target, other = normal(5, 4, 3, 3), normal(5, 4, 3, 3, seed=1) + 0.5 * normal(5, 4, 3, 3)
    after = Reference(target).scaled(-7 * other)
    assert after.error == pytest.approx(math.sqrt(1 - cosine(target, other) ** 2), rel=1e-12)
    assert cosine(target, -7 * other) == pytest.approx(-cosine(target, other))
    assert cosine(target, torch.zeros_like(target)) == 0
    assert Reference(target).scaled(torch.zeros_like(target)).error == 1


@pytest.mark.parametrize("target", [torch.zeros(3, 3), torch.full((3, 3), math.nan)], ids=["0", "nan"])
def test_nothing_has_no_structure(target):
    with pytest.raises(ValueError, match="a target of the norm (0.0|nan) has no structure"):
        Reference(target)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9, 1, 1), (1, 5, 3)], ids=str)
def test_both_sides_of_a_matrix_are_its_singular_vectors(shape):
    target = normal(*shape)
    for mode, found in enumerate(modes(target)):
        if found is not None:
            u, s, _ = torch.linalg.svd(unfolding(target, mode), full_matrices=False)
            torch.testing.assert_close(found.values, s)
            torch.testing.assert_close(
                (found.vectors.mT @ u).abs(), torch.eye(len(s), dtype=u.dtype), atol=1e-9, rtol=0
            )


# Decompositions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(4, 3, 2, 2), (1, 1, 1, 1), (12, 10, 3, 3), (5, 6, None, None)], ids=str)
def test_hooi_recovers_a_target_of_its_own_multilinear_rank(ranks):
    core = normal(*(rank or 3 for rank in ranks))
    target = multiply(
        core,
        [
            None if r is None else normal(n, r, seed=i)
            for i, (n, r) in enumerate(zip((12, 10, 3, 3), ranks, strict=True))
        ],
    )
    core, factors = hooi(target, ranks)
    assert error(target, multiply(core, factors)) < 1e-13


def test_hooi_is_no_worse_than_the_hosvd_and_least_squares_cannot_mend_it():
    target = normal(9, 8, 3, 3)
    core, factors = hooi(target, (3, 4, 2, 2))
    held = float(core.square().sum())
    assert held >= float(held_by_ranks(target)[2, 3, 1, 1])
    torch.testing.assert_close(core, multiply(target, [u.mT for u in factors]))
    for mode, factor in enumerate(factors):
        others = multiply(target, [None if m == mode else u.mT for m, u in enumerate(factors)])
        best = torch.linalg.svdvals(unfolding(others, mode))[: factor.shape[1]].square().sum()
        assert held == pytest.approx(float(best), rel=1e-5)


def test_the_nearest_kronecker_product_is_nearest():
    a, b = normal(3, 4), normal(5, 2, seed=1)
    found = nearest_kronecker(torch.kron(b, a), 3, 4)
    torch.testing.assert_close(torch.kron(found[1], found[0]), torch.kron(b, a))


def test_low_rank_is_low_displacement_rank():
    low = normal(11, 2) @ normal(2, 11, seed=1)
    delta = build(flora.LDRConfig(terms=4), Site((11, 11), dtype=torch.float64))
    with torch.no_grad():
        for parameter, value in zip((delta.circulant, delta.skew), displaced(low, 4), strict=True):
            parameter.copy_(value)
    torch.testing.assert_close(delta.alone(None).detach(), low)


# Fits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_has_the_error_of_the_truncated_svd(shape):
    target = normal(*shape)
    found, size = best_error("lora", target, 3 * sum(target.flatten(1).shape))
    values = torch.linalg.svdvals(target.flatten(1))
    assert size.setting.rank == 3
    assert found == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-12)


OWN = {
    "lora": (flora.LoRAConfig(rank=3), (12, 10, 3, 3)),
    "lora, linear": (flora.LoRAConfig(rank=3), (12, 17)),
    "locon": (flora.LoRAConfig(rank=4, tucker=True), (12, 10, 3, 3)),
    "locon, depthwise": (flora.LoRAConfig(rank=4, tucker=True), (12, 1, 3, 3)),
    "flora": (flora.TuckerConfig(rank=4), (12, 10, 3, 3)),
    "flora, tuple": (flora.TuckerConfig(rank=(5, 2, 3, 1)), (12, 10, 3, 3)),
    "circulant": (flora.CirculantConfig(), (12, 10, 3, 3)),
    "circulant, alone": (flora.CirculantConfig(product=False), (12, 17)),
    "kronecker": (flora.KroneckerConfig(block=(4, 15)), (12, 10, 3, 3)),
}


@pytest.mark.parametrize("config, shape", OWN.values(), ids=OWN)
def test_what_a_method_has_made_it_finds_again(config, shape):
    delta = build(config, Site(shape, dtype=torch.float64))
    for i, parameter in enumerate(delta.parameters()):
        parameter.data = normal(*parameter.shape, seed=i)
    target = delta.alone(None).detach()
    fit = OfConfig(config).fit(target, config, seed=1)
    assert error(target, fit.weights[0]) < 1e-12


@pytest.mark.parametrize("config", [config for config, _ in OWN.values()], ids=OWN)
def test_optimisation_finds_nothing_better(config):
    """L-BFGS against the formulas and alternating least squares."""
    shape = (8, 6, 3, 3)
    config = flora.KroneckerConfig(block=(4, 9)) if isinstance(config, flora.KroneckerConfig) else config
    target = normal(*shape, seed=3)
    delta = build(config, Site(shape, dtype=torch.float64))
    torch.manual_seed(0)
    parameters = list(delta.parameters())
    found = optimise(parameters, lambda: delta.alone(None), target, [None] * 2, steps=60)
    assert error(target, OfConfig(config).fit(target, config, seed=1).weights[0]) <= found + 1e-4


def test_fixed_factors_leave_what_is_orthogonal_to_them():
    target, config = normal(8, 6, 3, 3), flora.TuckerConfig(rank=4, trainable="core")
    fit = METHODS["flora-fixed"].fit(target, config, seed=5)
    assert len(fit.weights) == 3
    assert fit.how == "exact"
    for weight in fit.weights:
        rest = target - weight
        assert abs(float((rest * weight).sum())) < 1e-10
        assert torch.linalg.matrix_rank(unfolding(weight, 0)) == 4
    assert error(fit.weights[0], fit.weights[1]) > 0.1
    again = METHODS["flora-fixed"].fit(target, config, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(fit.weights, again.weights, strict=True))


def test_structured_fits_are_no_worse_than_the_simpler_methods_in_them():
    target = BY_NAME["falling"].target((6, 4, 3, 3), 0)
    n = 36
    circulant = best_error("circulant", target, 2 * n)[0]
    ldr, size = best_error("ldr", target, 4 * n)
    lora = error(target, METHODS["lora"].fit(target, flora.LoRAConfig(rank=1), 0).weights[0])
    assert size.setting.terms == 2
    assert ldr <= min(circulant, lora) + 1e-9
    vector = build(flora.ToeplitzConfig(product=False), Site(tuple(target.shape), dtype=torch.float64))
    linear = optimise(list(vector.parameters()), lambda: vector.alone(None), target, [None], steps=50)
    assert best_error("toeplitz", target, 2 * n)[0] <= linear + 1e-6
    product = METHODS["loha"].fit(target, 2, 0)
    assert error(target, product.weights[0]) <= error(
        target, METHODS["lora"].fit(target, flora.LoRAConfig(rank=2), 0).weights[0]
    )


def test_lokr_alternates_to_a_point_that_neither_part_can_mend():
    target = normal(12, 10, 3, 3)
    setting = METHODS["lokr"].sizes(target, 120)[0].setting
    assert setting.rank is not None
    found = error(target, METHODS["lokr"].fit(target, setting, 0).weights[0])
    parts = [normal(12 // setting.rows, 90 // setting.columns), normal(setting.rows, setting.rank)]
    parts = [p.requires_grad_() for p in (*parts, normal(setting.rank, setting.columns))]
    torch.manual_seed(0)
    best = optimise(parts, lambda: torch.kron(parts[0], parts[1] @ parts[2]), target.flatten(1), [None] * 2, steps=100)
    assert found <= best + 2e-2  # two local optima may differ


def test_loha_and_lokr_are_as_peft_has_them():
    peft = pytest.importorskip("peft")
    for layer in (nn.Conv2d(12, 16, 3), nn.Linear(12, 16)):
        target = layer.weight.detach().double()
        wrapped = peft.get_peft_model(nn.Sequential(layer), peft.LoHaConfig(r=2, target_modules=["0"]))
        count = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        assert METHODS["loha"].sizes(target, count)[0].parameters == count
        module = wrapped.base_model.model[0]
        parts = [p["default"] for p in (module.hada_w1_a, module.hada_w1_b, module.hada_w2_a, module.hada_w2_b)]
        nn.init.normal_(parts[2])
        ours = loha(*parts).reshape(layer.weight.shape)
        torch.testing.assert_close(module.get_delta_weight("default"), ours * module.scaling["default"])
        layer = type(layer)(12, 16, *([3] if target.ndim == 4 else []))
        wrapped = peft.get_peft_model(nn.Sequential(layer), peft.LoKrConfig(r=1, target_modules=["0"]))
        count = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        assert METHODS["lokr"].sizes(target, count)[0].parameters == count


# Budgets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 48, 3, 3), (96, 1, 3, 3), (96, 48, 1, 1), (80, 64)], ids=str)
@pytest.mark.parametrize("share", [0.08, 0.16])
def test_budgets_are_equal_or_it_is_known_by_how_much_not(shape, share):
    target = normal(*shape)
    parameters = int(share * target.numel())
    for name, method in METHODS.items():
        try:
            sizes = method.sizes(target, parameters)
        except TooFewParametersError as error:
            assert "fewer than" in str(error)
            continue
        assert sum(size.copies for size in sizes) == COPIES
        mean = sum(size.parameters * size.copies for size in sizes) / COPIES
        assert mean <= parameters, name
        at_its_most = len(sizes) == 1 and name in ("locon", "lora", "flora", "flora-ranks", "flora-fixed", "lokr")
        if name in ("circulant", "toeplitz", "ldr", "kronecker"):  # a size for all layers, if any choice
            continue
        assert mean >= 0.98 * parameters or at_its_most, (name, mean, parameters)
        for size in sizes:
            made = method.fit(normal(*shape), size.setting, 0).weights[0] if name == "lora" else None
            assert made is None or made.shape == target.shape
            if isinstance(method, OfConfig):
                assert size.parameters == parameters_of(size.setting, shape)


def test_the_least_number_of_parameters_is_named():
    with pytest.raises(TooFewParametersError, match="LoRAConfig: parameters=640 are fewer than the 2048"):
        METHODS["lora"].sizes(normal(14, 18), 10)
    for name in ("flora-ranks", "loha", "lokr"):
        with pytest.raises(TooFewParametersError, match="parameters=3 are fewer than the"):
            METHODS[name].sizes(normal(14, 18), 3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_has_the_shape_and_the_parameters_of_its_tucker_decomposition(shape):
    assert tuple(layer_of(shape).weight.shape) == shape
    ranks = tuple(max(1, extent // 2) for extent in shape)
    count = int(tucker_parameters(shape)[tuple(rank - 1 for rank in ranks)])
    assert count == parameters_of(flora.TuckerConfig(rank=ranks), shape)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6, unique=True), st.integers(1, 400))
def test_copies_are_shared_out_within_the_budget(counts, parameters):
    counts = sorted(counts)
    if parameters < counts[0]:
        with pytest.raises(TooFewParametersError):
            shared(counts, parameters)
        return
    found = shared(counts, parameters)
    assert sum(copies for _, copies in found) == COPIES
    mean = sum(counts[i] * copies for i, copies in found) / COPIES
    assert mean <= parameters
    assert mean >= min(counts[-1], parameters) - (max(counts) - min(counts)) / COPIES


def test_ranks_chosen_for_the_target_find_its_own():
    target = BY_NAME["tucker"].target((24, 20, 3, 3), 0)
    (size,) = METHODS["flora-ranks"].sizes(target, 1200)
    assert size.setting.rank == (8, 8, 2, 2)
    assert error(target, METHODS["flora-ranks"].fit(target, size.setting, 0).weights[0]) < 1e-12


# Targets and layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", SYNTHETIC, ids=lambda one: one.name)
def test_synthetic_targets_are_what_they_say(one):
    target = one.target((32, 24, 3, 3), 1)
    assert target.norm() == pytest.approx(1)
    assert torch.equal(target, one.target((32, 24, 3, 3), 1))
    assert not torch.equal(target, one.target((32, 24, 3, 3), 2))
    ranks = tuple(int(torch.linalg.matrix_rank(unfolding(target, m))) for m in range(4))
    known = {"tucker": (8, 8, 2, 2), "tucker-2": (8, 8, 3, 3), "matrix": (4, 24, 3, 3)}
    assert ranks == known.get(one.name, (32, 24, 3, 3))
    if one.name == "kronecker":
        assert (
            error(target, METHODS["kronecker"].fit(target, flora.KroneckerConfig(block=(8, 54)), 0).weights[0]) < 1e-12
        )


def test_kinds_of_layers_and_which_are_chosen():
    shapes = {f"block.{i}.{name}": shape for i in range(12) for name, shape in BLOCK.items()}
    found = chosen(shapes, {"pointwise": 3, "depthwise": 2, "full": 5, "linear": 1}, 2000)
    assert [kind(shapes[name]) for name in found] == ["pointwise"] * 3 + ["depthwise"] * 2 + ["linear"]
    assert [int(name.split(".")[1]) for name in found] == [2, 6, 10, 3, 9, 6]
    assert sorted(["a.10", "a.9", "b", "a.x"], key=in_depth) == ["a.9", "a.10", "a.x", "b"]
    with pytest.raises(ValueError, match=r"a weight of the shape \(3,\) is no matrix"):
        kind((3,))


BLOCK = {"up": (32, 16, 1, 1), "deep": (32, 1, 3, 3), "wide": (64, 64, 3, 3), "line": (10, 12)}


# Lines ---------------------------------------------------------------------------------------------------------------


def a_run(method, seed, folder, updates, **fields):
    record = {"kind": "run", "id": f"{method}-{seed}", "task": "t", "method": method, "seed": seed, "steps": 60}
    record |= {"budget": 99, "options": {}, "parameters": 98, **fields}
    safetensors.torch.save_file(updates, folder / "updates" / f"{record['id']}.safetensors")
    return record


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A store with runs of a network of four small layers; full fine-tuning of two seeds, LoRA, and a run of PEFT's."""
    (tmp_path / "updates").mkdir()
    store = Store(tmp_path / "study.jsonl")
    updates = {f"block.10.{name}": normal(*shape, seed=4).float() for name, shape in BLOCK.items() if name != "wide"}
    zero = {"block.2.dead": torch.zeros(4, 4)}
    noise = {name: normal(*update.shape, seed=9).float() for name, update in updates.items()}
    store.append({"kind": "environment", "id": "here"})
    store.append(a_run("full", 1, tmp_path, updates | zero))
    store.append(a_run("full", 2, tmp_path, noise))
    store.append(a_run("lora", 1, tmp_path, {n: -2 * u for n, u in updates.items() if "deep" not in n} | zero))
    store.append(a_run("peft-lora", 1, tmp_path, {}))
    store.append({"kind": "run", "id": "no file", "task": "t", "method": "flora", "seed": 1, "steps": 60})
    monkeypatch.setattr(
        distortion, "QUICK", distortion.Extent(dict.fromkeys(KINDS, 1), ("tucker",), (12, 10, 3, 3), 1, (0.16,))
    )
    monkeypatch.setattr(distortion, "METHODS", {name: METHODS[name] for name in ("lora", "flora", "circulant")})
    return store


def lines(store, part):
    return [record for record in store.records("distortion") if record["part"] == part]


def test_lines_are_added_once_and_a_lost_one_again(study, tmp_path):
    distortion.run(study, tmp_path, quick=True, quiet=True)
    found = study.records("distortion")
    targets, fits, learned = (lines(study, part) for part in ("target", "fit", "learned"))
    assert [line["layer_kind"] for line in targets] == ["pointwise", "depthwise", "linear", "full"]
    assert [line["target"] for line in targets] == [*(f"t/block.10.{n}" for n in ("up", "deep", "line")), "tucker/0"]
    assert len(fits) == 12
    assert {line["method"] for line in learned} == {"full", "lora"}
    assert all(line["environment"] == "here" for line in found)
    assert len({line["id"] for line in found}) == len(found) == 18
    whole = study.path.read_text()
    distortion.run(study, tmp_path, quick=True, quiet=True)
    assert study.path.read_text() == whole
    study.path.write_text("\n".join(line for line in whole.splitlines() if fits[3]["id"] not in line) + "\n")
    distortion.run(study, tmp_path, quick=True, quiet=True)
    again = next(line for line in study.records("distortion") if line["id"] == fits[3]["id"])
    assert again | {"seconds": 0} == fits[3] | {"seconds": 0}


def test_a_fit_line_says_what_was_found_or_why_nothing(study, tmp_path):
    distortion.run(study, tmp_path, quick=True, quiet=True)
    fits = {(line["target"], line["method"]): line["points"] for line in lines(study, "fit")}
    (point,) = fits["t/block.10.up", "lora"]
    assert point["share"] == 0.16
    assert point["budget"] == 81
    assert point["sizes"] == [["rank 2", 96, 44], ["rank 1", 48, 20]]
    assert point["parameters"] == pytest.approx(81)
    assert point["how"] == "exact"
    target = normal(32, 16, seed=4).float().double()
    values = torch.linalg.svdvals(target)
    rest = [float(values[rank:].square().sum() / values.square().sum()) for rank in (1, 2)]
    assert point["error"] == pytest.approx(math.sqrt((20 * rest[0] + 44 * rest[1]) / 64), rel=1e-3)
    assert point["spectra"] == [point["error"], point["error"], None, None]
    (point,) = fits["t/block.10.deep", "circulant"]
    assert point == {"share": 0.16, "budget": 46, "least": point["least"]}
    assert "fewer than" in point["least"]


def test_a_learned_line_compares_with_the_full_fine_tuning_of_its_seed(study, tmp_path):
    distortion.run(study, tmp_path, quick=True, quiet=True)
    lora, other = sorted(lines(study, "learned"), key=lambda line: line["method"], reverse=True)
    assert (lora["run"], lora["full"]) == ("lora-1", "full-1")
    assert (other["run"], other["full"]) == ("full-2", "full-1")
    assert [layer["layer"] for layer in lora["layers"]] == ["block.10.line", "block.10.up"]
    for layer in lora["layers"]:
        assert (layer["cosine"], layer["norm"]) == (-1, 2)
        assert layer["error"] == pytest.approx(0, abs=1e-6)
    norms = {name: normal(*shape, seed=4).norm() ** 2 for name, shape in BLOCK.items() if name != "wide"}
    served = float((norms["up"] + norms["line"]) / sum(norms.values()))
    assert lora["cosine"] == pytest.approx(-math.sqrt(served), rel=1e-3)  # the depthwise layer has no update
    assert lora["norm"] == pytest.approx(2 * math.sqrt(served), rel=1e-3)
    assert abs(other["cosine"]) < 0.3


def test_without_updates_only_synthetic_targets_are_left(tmp_path, study):
    store = Store(tmp_path / "other.jsonl")
    distortion.run(store, tmp_path / "elsewhere", quick=True, quiet=True)
    assert [line["task"] for line in lines(store, "target")] == [None]
    assert {line["environment"] for line in store.records()} == {None}
    assert json.loads((tmp_path / "other.jsonl").read_text().splitlines()[0])["kind"] == "distortion"


def test_floats_are_kept_to_four_digits():
    assert distortion.rounded({"a": [1.23456, (None, 7)], "b": 12345.6}) == {"a": [1.235, [None, 7]], "b": 12350.0}
