"""Adapters under DistributedDataParallel over gloo: several processes compute what one does on the whole batch."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flora
from flora import folders
from flora.serialization import read_adapter

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    group = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    group = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


# What runs on every rank ---------------------------------------------------------------------------------------------

CHOICES = {
    "one": lambda model: flora.set_adapter(model, "b"),
    "weighted": lambda model: flora.set_adapter(model, {"a": 0.7, "c": -0.3}),
    "one of two": lambda model: flora.set_adapter(model, ["a", "b"], trainable=["b"]),
    "whole module": lambda model: flora.set_adapter(model, "c"),
}


def adapted(choice="weighted", seed=0, **options):
    torch.manual_seed(0)
    head = nn.Linear(6, 5), nn.Linear(5, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), *head)
    torch.manual_seed(seed)
    flora.adapt(model, flora.TuckerConfig(rank=2, exclude_modules=["5"], **options), "a")
    flora.adapt(model, flora.CirculantConfig(exclude_modules=["5"]), "b")
    flora.adapt(model, flora.RescaleConfig(target_modules=["3"], modules_to_save=["5"]), "c")
    CHOICES[choice](model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])


def share():
    """This rank's part of the batch."""
    return (t[dist.get_rank() :: dist.get_world_size()] for t in batch())


def step(model, x, y):
    nn.functional.cross_entropy(model(x), y).backward()


def assert_same(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad, name
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=f"{name}: {{}}".format)


def gradients(choice, **options):
    whole, model = adapted(choice), adapted(choice)
    step(whole, *batch())
    parallel = DistributedDataParallel(model, **options)
    for _ in range(2):  # the second shows that the first one's reduction came to its end
        parallel.zero_grad()
        step(parallel, *share())
    assert_same(model, whole)


def static_graph():
    gradients("weighted", static_graph=True)


def buckets_as_gradients():
    gradients("weighted", gradient_as_bucket_view=True)


def accumulation():
    whole, model = adapted(), adapted()
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        step(whole, *batch())
    with parallel.no_sync():
        step(parallel, *share())
    step(parallel, *share())
    assert_same(model, whole)


def switching():
    """Adapters are switched between steps; both were to learn when the wrapper was made."""
    whole, model = adapted("one"), adapted("one")
    for one in (whole, model):
        flora.set_adapter(one, ["a", "b"], trainable=["a", "b"])
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for name in ("a", "b", "a"):
        for one in (whole, model):
            flora.set_adapter(one, name, trainable=["a", "b"])
            one.zero_grad(set_to_none=False)
        step(whole, *batch())
        step(parallel, *share())
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(
                    torch.zeros_like(p) if p.grad is None else p.grad,
                    torch.zeros_like(q) if q.grad is None else q.grad,
                    rtol=1e-4,
                    atol=1e-6,
                )


def merging_in_between():
    whole, model = adapted("one"), adapted("one")
    parallel = DistributedDataParallel(model)
    with torch.no_grad():
        flora.merge(model)
        torch.testing.assert_close(parallel(batch()[0]), whole(batch()[0]))
        flora.unmerge(model)
    step(whole, *batch())
    step(parallel, *share())
    assert_same(model, whole)


def one_start():
    """The wrapper sends the first rank's parameters to all, whatever the others drew."""
    model = adapted(seed=dist.get_rank())
    DistributedDataParallel(model)
    for (name, p), q in zip(model.named_parameters(), adapted(seed=0).parameters(), strict=True):
        if p.requires_grad:
            assert torch.equal(p, q), name


def dropout_masks():
    """Two ranks draw the same masks from the same seed, and others from others."""
    model = DistributedDataParallel(adapted(dropout=0.5))
    outputs = []
    for seed in (0, dist.get_rank()):
        torch.manual_seed(seed)
        y = model(batch()[0]).detach()
        everybody = [torch.empty_like(y) for _ in range(dist.get_world_size())]
        dist.all_gather(everybody, y)
        outputs.append(everybody)
    same, own = outputs
    assert all(torch.equal(y, same[0]) for y in same)
    assert not any(torch.equal(y, own[0]) for y in own[1:])


def helpers():
    whole, model = adapted(), adapted()
    parallel = DistributedDataParallel(model)
    step(whole, *batch())
    step(parallel, *share())
    found, expected = flora.clip_grad_norm_(parallel, 0.01), flora.clip_grad_norm_(whole, 0.01)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert_same(model, whole)
    of_groups = [(group["name"], len(group["params"])) for group in flora.parameter_groups(parallel)]
    assert of_groups == [(group["name"], len(group["params"])) for group in flora.parameter_groups(whole)]
    assert "norm a" in flora.ProgressLine(parallel)()


def adapters_after_wrapping():
    """The wrapper would not reduce the gradients of parameters that it does not know."""
    base = nn.Sequential(nn.Linear(4, 4))
    wrapped = DistributedDataParallel(base)
    for model in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(RuntimeError, match="is wrapped, a DistributedDataParallel"):
            flora.adapt(model, flora.TuckerConfig(rank=2))
    assert type(base[0]) is nn.Linear and base[0].weight.requires_grad


def saved_by_all_at_once(folder, exchanges):
    """Every rank saves, into one folder and with numbers of its own, many times; with two renames, or one exchange."""
    model, rank = adapted(), dist.get_rank()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(rank + 1)
    exchange = folders._exchange if exchanges else lambda one, other: False
    with mock.patch.object(folders, "_exchange", exchange):
        for _ in range(20):
            flora.save_adapter(model, folder / "adapter", "a")
    dist.barrier()
    values = {float(t.unique()) for t in read_adapter(folder / "adapter").tensors.values()}
    assert len(values) == 1
    flora.load_adapter(model, folder / "adapter", "again")


# The tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_are_those_of_one_process_on_the_whole_batch(two, choice):
    two.run(gradients, choice)


CASES = [
    static_graph,
    buckets_as_gradients,
    accumulation,
    switching,
    merging_in_between,
    one_start,
    dropout_masks,
    helpers,
    adapters_after_wrapping,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_in_two_processes(two, case):
    two.run(case)


@pytest.mark.parametrize(
    "case",
    [accumulation, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case is not accumulation)],
    ids=lambda case: case.__name__,
)
def test_in_four_processes(four, case):
    four.run(case)


@pytest.mark.parametrize("exchanges", [True, False])
def test_processes_that_save_into_one_folder_at_once_leave_one_adapter(four, exchanges, tmp_path):
    four.run(saved_by_all_at_once, tmp_path, exchanges)
    assert [folder.name for folder in tmp_path.iterdir()] == ["adapter"]
