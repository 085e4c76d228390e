"""One process for long: adapters come, learn, are merged, saved, loaded and go, and it does not grow, nor its files."""

import gc
import resource
import subprocess
import sys

import pytest
import torch
from torch import nn

import flora


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


def held() -> tuple[int, float]:
    """Tensors that Python knows, and the most megabytes that the process has had."""
    gc.collect()
    tensors = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
    return tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def soak(lives: int, folder: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(2), nn.Linear(100, 512)
    )
    for seed in range(lives):
        life(base, folder, seed)
        if seed == lives // 3:  # by then allocators and caches have what they need
            tensors, megabytes = held()
    now, peak = held()
    assert now == tensors, f"{now - tensors} tensors are left of {lives - lives // 3} lives"
    assert peak - megabytes < 16, f"the process has grown by {peak - megabytes:.0f} MB"


@pytest.mark.parametrize("lives", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_adapters_one_after_another(lives, tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(lives), str(tmp_path / "adapter")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


if __name__ == "__main__":
    soak(int(sys.argv[1]), sys.argv[2])
