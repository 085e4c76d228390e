"""A ViT of transformers learns, through Tucker deltas, to find images with a bright middle."""

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

import flora

torch.manual_seed(0)
# A small one, drawn at random, so that this runs anywhere; ViTForImageClassification.from_pretrained(...) in earnest.
config = ViTConfig(
    image_size=32, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
)
model = flora.adapt(ViTForImageClassification(config), flora.TuckerConfig(rank=8, modules_to_save=["classifier"]))
print(flora.summary(model))

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
for step in range(31):
    labels = torch.randint(2, (16,))
    pixels = torch.randn(16, 3, 32, 32)
    pixels[labels == 1, :, 8:24, 8:24] += 2
    loss = F.cross_entropy(model(pixel_values=pixels).logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    adapted = model(pixel_values=pixels).logits
    merged = flora.unload(model, merge=True)(pixel_values=pixels).logits  # a plain ViT again
print(f"merged: largest difference of a logit {(merged - adapted).abs().max().item():.1e}")
