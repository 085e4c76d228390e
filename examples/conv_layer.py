"""One layer: wrap a convolution, train its delta towards another convolution, merge it, and take it apart again."""

import torch
from torch import nn

import flora

torch.manual_seed(0)
base = nn.Conv2d(16, 32, 3, padding=1)
goal = nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False)
before = base.weight.clone()

layer = flora.wrap(base, flora.TuckerConfig(rank=8, kernel_rank=3))
delta = layer.deltas["default"]
print(f"core {tuple(delta.core.shape)}, factors {[tuple(factor.shape) for factor in delta.factors]}")

optimizer = torch.optim.AdamW((p for p in layer.parameters() if p.requires_grad), lr=1e-2)
for step in range(101):
    x = torch.randn(8, 16, 12, 12)
    loss = (layer(x) - goal(x)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

with torch.no_grad():
    factored = layer(x)
    layer.merge()  # the base now holds W + s·ΔW
    print(f"merged: largest difference {(layer(x) - factored).abs().max().item():.1e}")
    layer.unmerge()  # and now W again, bit for bit
print(f"the base is what it was: {torch.equal(layer.base_layer.weight, before)}")
