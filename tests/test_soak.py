"""One process for long: adapters come, learn, are merged, saved, loaded and go; it computes what plain twins do, and
neither it nor its files grow.
"""

import subprocess
import sys

import high_water
import pytest
import soak
import torch
from torch import nn

import flora
from flora.model import adapted_layers


def life(base: nn.Module, folder: str, seed: int) -> None:
    """Trains an adapter for a few steps, and has the base back as it was."""
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = flora.adapt(base, flora.TuckerConfig(rank=4, dropout=0.1), seed=seed)
    flora.add_adapter(model, flora.CirculantConfig(), "other", seed=seed)
    flora.set_adapter(model, ["default", "other"])
    optimizer = torch.optim.AdamW(flora.parameter_groups(model, lr=1e-2))
    x = torch.randn(1, 8, 12, 12)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        assert flora.clip_grad_norm_(model, 1.0).isfinite()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(x)
        flora.merge(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
        flora.unmerge(model)
    flora.save_adapter(model, folder, ["default"])
    flora.unload(model, merge=False)
    flora.unload(flora.load_adapter(base, folder), merge=False)
    for key, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def live(lives: int, folder: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(2), nn.Linear(100, 512)
    )
    for seed in range(lives):
        life(base, folder, seed)
        if seed == lives // 3:  # by then allocators and caches have what they need
            tensors, megabytes = soak.held()
    now, peak = soak.held()
    assert now == tensors, f"{now - tensors} tensors are left of {lives - lives // 3} lives"
    assert peak - megabytes < 16, f"the process has grown by {peak - megabytes:.0f} MB"


@high_water.needed
@pytest.mark.parametrize("lives", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_adapters_one_after_another(lives, tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(lives), str(tmp_path / "adapter")],
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def running(name: str, seed: int = 0) -> soak.Episode:
    """An episode after some operations, not merged, with an active adapter that learns."""
    episode = soak.Episode(name, seed)
    episode.run(10)
    if episode.merged:
        flora.unmerge(episode.model)
        episode.merged = False
    first = next(iter(episode.twin.adapters), None) or (episode.add() and next(iter(episode.twin.adapters)))
    flora.set_adapter(episode.model, first)
    episode.twin.active, episode.twin.learning = {first: 1.0}, {first}
    episode.check()
    return episode


@pytest.mark.parametrize("name", soak.NETWORKS)
def test_adapters_at_random_beside_a_twin(name, torch_threads):
    """A short form of `make soak`."""
    episode = soak.Episode(name, seed=0)
    episode.run(25)
    assert episode.counts["outputs compared"] == 25


@pytest.mark.parametrize("name", soak.NETWORKS)
def test_what_is_wrong_is_found(name, torch_threads):
    """An output without an adapter, a tensor that is another, a strength, a base, a gradient."""
    episode = running(name)
    layers = [layer for layer in adapted_layers(episode.model).values() if layer.active]
    delta = layers[0].deltas[layers[0].active[0]]
    with pytest.raises(soak.MismatchError, match="scale and strength"):
        delta.strength = 1.01
        episode.check()
    delta.strength = 1.0
    with pytest.raises(soak.MismatchError, match="tensors have changed"), torch.no_grad():
        kept = next(delta.parameters()).clone()
        next(delta.parameters()).view(-1)[0] += 1e-6
        episode.check()
    with torch.no_grad():
        next(delta.parameters()).copy_(kept)
    episode.check()
    with pytest.raises(soak.MismatchError, match=r"^the output is"):
        for layer in layers:
            layer.enabled = False
        episode.check()
    for layer in layers:
        layer.enabled = True
    with pytest.raises(soak.MismatchError, match="of the gradient|the gradient of"):
        episode.twin.learning = set(episode.twin.adapters)
        for parameter in flora.trainable_parameters(episode.model):
            parameter.register_hook(lambda grad: 1.5 * grad)
        episode.train()
    with pytest.raises(soak.MismatchError, match="the base's .* has changed"), torch.no_grad():
        layers[0].base_layer.weight.view(-1)[0] += 0.5
        episode.check()


def test_a_mismatch_says_how_to_see_it_again(monkeypatch, torch_threads):
    monkeypatch.setattr(flora, "unmerge", lambda model: None)
    with pytest.raises(soak.MismatchError) as raised:
        for seed in range(20):
            soak.Episode("convolutions", seed).run()
    told = str(raised.value).splitlines()
    assert f"again: python tests/soak.py --seed {seed} --episodes 1 --network convolutions" in told
    assert told[-1].endswith(": unmerge")


if __name__ == "__main__":
    live(int(sys.argv[1]), sys.argv[2])
