"""Adapters under FSDP2's fully_shard over gloo: frozen and trained parameters mixed, files, checkpoints, refusals."""

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import flora
from flora import functional, serialization
from flora.training import adapter_norms

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    group = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


# What runs on every rank ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu().mean((2, 3))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


TUCKER = flora.TuckerConfig(rank=3, modules_to_save=["head"])
METHODS = [
    TUCKER,
    flora.LoRAConfig(rank=2),
    {"blocks.0.0": flora.KroneckerConfig(rank=2), "blocks.0.2": flora.RescaleConfig(), "all": flora.LDRConfig()},
]


def adapted(config=TUCKER, **options):
    torch.manual_seed(0)
    return moved(flora.adapt(Net(), config, **options))


def moved(model):
    """Away from the start, where a core's gradient is the only one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def sharded(model, **options):
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 5, 5, generator=generator), torch.arange(8) % 4


def share():
    """This rank's part of the batch."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return (t[rank::world] for t in batch())


def step(model, x, y):
    nn.functional.cross_entropy(model(x).float(), y).backward()


def adam(model):
    return torch.optim.AdamW(flora.parameter_groups(model, lr=0.01, core_lr=0.02, weight_decay=0.1))


def train(model, optimizer, data, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        step(model, *data())
        optimizer.step()


def assert_same(model, other, of=lambda p: p.grad, rtol=1e-4, atol=1e-6):
    """The sharded model's gradients, or what ``of`` takes of a parameter, are the other's."""
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert isinstance(p, DTensor), name
        assert p.requires_grad == q.requires_grad, name
        assert (of(p) is None) == (of(q) is None), name
        if of(q) is not None:
            torch.testing.assert_close(of(p).full_tensor(), of(q), rtol=rtol, atol=atol, msg=f"{name}: {{}}".format)


def parameters_of(p):
    return p.detach()


@contextmanager
def kernels_alone():
    """Within it an error comes of whatever is not computed by the kernels."""
    calls = []

    def strictly(name, wanted):
        decide = getattr(functional, name)

        def decided(*args):
            calls.append(name)
            assert decide(*args) == wanted, f"the kernels do not serve: {name}"
            return wanted

        return decided

    decisions = {"takes": True, "_watched": False, "_by_twin": False}
    with mock.patch.multiple(functional, **{name: strictly(name, wanted) for name, wanted in decisions.items()}):
        yield
    assert set(calls) == set(decisions)


def gradients(config):
    whole = adapted(config)
    step(whole, *batch())
    model = sharded(adapted(config))
    with kernels_alone():
        for _ in range(2):  # the second shows that the first one's reduction came to its end
            model.zero_grad()
            step(model, *share())
    assert_same(model, whole)


def units_that_are_single_layers():
    whole = adapted()
    step(whole, *batch())
    model = adapted()
    fully_shard(model.blocks[0][0])  # an adapted layer
    fully_shard(model.blocks[0][2].base_layer)  # runs its own forward, for its hooks
    fully_shard(model.stem.base_layer)
    fully_shard(model.head)  # trained whole
    sharded(model)
    assert "FSDP" not in str(flora.summary(model))
    with kernels_alone():
        for _ in range(2):
            model.zero_grad()
            step(model, *share())
    assert_same(model, whole)


def a_delta_of_its_own():
    model = adapted()
    fully_shard(model.blocks[0][0].deltas["default"])  # nobody calls it, so nothing gathers it
    sharded(model)
    with pytest.raises(RuntimeError, match="DTensor") as caught:
        model(batch()[0])
    assert "blocks.0.0" in caught.value.__notes__[0]


def accumulation():
    whole = adapted()
    step(whole, *batch())
    step(whole, *batch())
    model = sharded(adapted())
    model.set_requires_gradient_sync(False)
    step(model, *share())
    model.set_requires_gradient_sync(True)
    step(model, *share())
    assert_same(model, whole)


def half_precision():
    whole = adapted(base_dtype=torch.bfloat16)
    step(whole, *batch())
    model = sharded(adapted(base_dtype=torch.bfloat16))
    with kernels_alone():
        step(model, *share())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert_same(model, whole, rtol=1e-2, atol=1e-3)

    whole, model = adapted(), adapted()
    for one in (whole, model):
        one.norm = nn.Identity()  # PyTorch's own takes no weights below its float32 statistics
    narrow = {name: p.bfloat16() for name, p in whole.named_parameters()}
    x, y = batch()
    world = dist.get_world_size()
    for rank in range(world):
        out = torch.func.functional_call(whole, narrow, x[rank::world].bfloat16())
        (nn.functional.cross_entropy(out.float(), y[rank::world]) / world).backward(retain_graph=True)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded(model, mp_policy=policy)
    step(model, *share())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        if q.grad is not None:
            assert (p.grad.full_tensor() - q.grad).norm() < 0.05 * q.grad.norm()


def choosing():
    """set_adapter between steps, also where the last forward left parameters gathered."""
    whole, model = adapted(), adapted()
    for one in (whole, model):
        flora.add_adapter(one, flora.CirculantConfig(), "other", seed=5)
    sharded(model)
    for names, learning in (("default", True), ("other", True), (["default", "other"], ["other"]), ("default", True)):
        with torch.no_grad():
            model(batch()[0])
        for one, data in ((whole, batch), (model, share)):
            flora.set_adapter(one, names, trainable=learning)
            one.zero_grad()
            step(one, *data())
        assert_same(model, whole)
        with flora.disabled(model), flora.disabled(whole), torch.no_grad():
            torch.testing.assert_close(model(batch()[0]), whole(batch()[0]))


def helpers():
    whole, model = adapted(), sharded(adapted())
    step(whole, *batch())
    step(model, *share())
    with torch.no_grad():
        model(batch()[0])  # leaves the root's parameters gathered
    assert all(isinstance(p, DTensor) for p in flora.trainable_parameters(model))
    assert adapter_norms(model) == pytest.approx(adapter_norms(whole), rel=1e-5)
    expected, found = flora.clip_grad_norm_(whole, 0.01), flora.clip_grad_norm_(model, 0.01)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert_same(model, whole)


def files(folder, config, options):
    whole = adapted(config)
    if dist.get_rank() == 0:
        flora.save_adapter(whole, folder / "whole", **options)
    model = sharded(adapted(config))
    with torch.no_grad():
        model(batch()[0])  # leaves the root's parameters gathered
    with mock.patch.object(serialization, "replace_folder", wraps=serialization.replace_folder) as written:
        flora.save_adapter(model, folder / "sharded", **options)
    assert (folder / "sharded/adapter_config.json").is_file()
    return written.call_count


def failed_write(folder):
    model = sharded(adapted())
    (folder / "notes.txt").write_text("of somebody else")
    with pytest.raises(FileExistsError if dist.get_rank() == 0 else RuntimeError, match=r"holds notes|writes for all"):
        flora.save_adapter(model, folder)
    flora.save_adapter(model, folder / "adapter")


def resumed_from_a_file(folder):
    """A sharded run and an unsharded one go on from each other's file and stay the same."""
    whole, model = adapted(), sharded(adapted())
    train(whole, torch.optim.SGD(flora.trainable_parameters(whole), lr=0.1), batch)
    train(model, torch.optim.SGD(flora.trainable_parameters(model), lr=0.1), share)
    assert_same(model, whole, parameters_of)
    flora.save_adapter(model, folder / "adapter")
    torch.manual_seed(0)
    base = Net()
    again = sharded(flora.load_adapter(base, folder / "adapter"))
    for one, data in ((whole, batch), (again, share)):
        train(one, torch.optim.SGD(flora.trainable_parameters(one), lr=0.1), data)
    assert_same(again, whole, parameters_of)


def refusals(folder):
    model = sharded(adapted())
    x = batch()[0]
    with torch.no_grad():
        before = model(x)  # leaves the root's parameters gathered
    flora.save_adapter(model, folder / "adapter")
    verbs = {
        "merge": lambda: flora.merge(model),
        "unmerge": lambda: flora.unmerge(model),
        "unload": lambda: flora.unload(model, merge=False),
        "delete an adapter of": lambda: flora.delete_adapter(model, "default"),
        "put an adapter on": lambda: flora.add_adapter(model, flora.LoRAConfig(), "other"),
        "put an adapter on a": lambda: flora.load_adapter(model, folder / "adapter", "other"),
    }
    for verb, call in verbs.items():
        with torch.no_grad():
            model(x)
        with pytest.raises(RuntimeError, match=f"cannot {verb}.* sharded model: .* is a DTensor"):
            call()
    with pytest.raises(RuntimeError, match="stem cannot be merged: its weight is sharded"):
        model.stem.merge()
    with torch.no_grad():
        assert torch.equal(model(x), before)

    merged = adapted()
    flora.merge(merged)
    sharded(merged)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), before)
    switch_off = flora.disabled(merged)
    with pytest.raises(RuntimeError, match="cannot switch off the merged adapters of a sharded model"), switch_off:
        pass
    with pytest.raises(RuntimeError, match="cannot unmerge a sharded model"):
        flora.unmerge(merged)


def the_older_wrapper(folder):
    model = adapted()
    FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    for call in (lambda: flora.save_adapter(model, folder), lambda: flora.merge(model)):
        with pytest.raises(RuntimeError, match="is flattened by FullyShardedDataParallel; fully_shard"):
            call()
    assert not any(folder.iterdir())


def recomputed(forward, reentrant):
    return lambda *args, **kwargs: checkpoint(partial(forward, **kwargs), *args, use_reentrant=reentrant)


def of_transformers(reentrant):
    """Tied embeddings, blocks after modules, normalisation; units that are checkpointed layers."""
    from transformers import LlamaConfig, LlamaForCausalLM  # slow, and for this one alone

    shape = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    config = {
        "embed_tokens": flora.TuckerConfig(rank=2),
        "lm_head": flora.LoRAConfig(rank=2),
        "layers.0.mlp": flora.StructuredAdapterConfig(),
        "layers.1.mlp": flora.StructuredAdapterConfig(norm_before=True),
        r".*layernorm": flora.RescaleConfig(),
        "all": flora.TuckerConfig(rank=4),
    }
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(moved(flora.adapt(LlamaForCausalLM(shape), config)))
    whole, model = models
    model.train()
    for layer in model.model.layers:
        layer.forward = recomputed(layer.forward, reentrant)
        fully_shard(layer)
    fully_shard(model)
    if reentrant:
        model.enable_input_require_grads()
    tokens = torch.arange(64).reshape(8, 8) % 32
    rank, world = dist.get_rank(), dist.get_world_size()
    for one, part in ((whole, tokens), (model, tokens[rank::world])):
        one(input_ids=part, labels=part).loss.backward()
    assert_same(model, whole)


def one_start():
    """Every rank draws with its own seed: with ``seed`` they draw the same all the same."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(rank)
    flora.adapt(model, TUCKER, seed=3)
    drawn = torch.rand(3)
    torch.manual_seed(rank)
    assert torch.equal(drawn, torch.rand(3))
    full = {name: p.detach().clone() for name, p in model.named_parameters()}
    sharded(model)
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), full[name]), name


def from_the_meta_device(folder):
    """A base that no process holds whole: values come to the shards from rank 0's state."""
    with torch.device("meta"):
        model = flora.adapt(Net(), TUCKER)
    sharded(model)
    model.to_empty(device="cpu")
    values = adapted().state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    whole = adapted()
    step(whole, *batch())
    step(model, *share())
    assert_same(model, whole)


def checkpointed(folder):
    """Trains, and writes a checkpoint of what learns and of the optimizer in the middle; the parameters at the end."""
    model = sharded(adapted())
    optimizer = adam(model)
    train(model, optimizer, share)
    options = StateDictOptions(ignore_frozen_params=True)
    state, optimizer_state = get_state_dict(model, optimizer, options=options)
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad} | BUFFERS
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    train(model, optimizer, share)
    flora.save_adapter(model, folder / "adapter")


BUFFERS = {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def resumed(folder):
    """Goes on from the checkpoint, in however many processes, and ends where the run that wrote it did."""
    torch.manual_seed(0)
    model = flora.adapt(Net(), TUCKER)
    if dist.is_initialized():
        sharded(model)
    optimizer = adam(model)
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    state, optimizer_state = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state, options=options)
    train(model, optimizer, share)
    flora.save_adapter(model, folder / "again")


# The tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", METHODS, ids=["tucker", "lora", "mixed"])
def test_gradients_are_those_of_one_process_on_the_whole_batch_by_the_kernels(ranks, config):
    ranks.run(gradients, config)


@pytest.mark.parametrize(
    "case",
    [units_that_are_single_layers, a_delta_of_its_own, accumulation, half_precision, choosing, helpers, one_start],
    ids=lambda case: case.__name__,
)
def test_sharded(ranks, case):
    ranks.run(case)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_network_of_transformers_with_activation_checkpointing(ranks, reentrant):
    ranks.run(of_transformers, reentrant)


@pytest.mark.parametrize(
    ("config", "options"),
    [(TUCKER, {"hashes": True}), (METHODS[2], {}), (flora.LoRAConfig(rank=2), {"format": "peft"})],
    ids=["tucker", "mixed", "peft"],
)
def test_the_file_is_that_of_an_unsharded_model_and_written_once(ranks, config, options, tmp_path):
    assert ranks.run(files, tmp_path, config, options) == [1] + [0] * (ranks.world - 1)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    "case",
    [failed_write, resumed_from_a_file, refusals, the_older_wrapper, from_the_meta_device],
    ids=lambda case: case.__name__,
)
def test_sharded_with_files(ranks, case, tmp_path):
    ranks.run(case, tmp_path)


def assert_same_files(one: Path, other: Path) -> None:
    tensors, others = (serialization.read_adapter(folder).tensors for folder in (one, other))
    for key, tensor in tensors.items():
        torch.testing.assert_close(others[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{key}: {{}}".format)


def test_a_checkpoint_goes_on_in_as_many_processes_and_in_one(ranks, tmp_path):
    ranks.run(checkpointed, tmp_path)
    ranks.run(resumed, tmp_path)
    assert_same_files(tmp_path / "adapter", tmp_path / "again")
    with pytest.warns(UserWarning, match="in a single process"):
        resumed(tmp_path)
    assert_same_files(tmp_path / "adapter", tmp_path / "again")


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_more_processes(tmp_path):
    for world, case in ((2, checkpointed), (4, resumed)):
        group = Ranks(world, tmp_path)
        try:
            group.run(case, tmp_path)
        finally:
            group.close()
    assert_same_files(tmp_path / "adapter", tmp_path / "again")
