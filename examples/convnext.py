"""A ConvNeXtV2 of transformers: depthwise 7×7, patch and pointwise layers all get deltas of their own shape."""

import tempfile

import torch
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

import flora


def network() -> ConvNextV2ForImageClassification:
    """The same random network each time; ConvNextV2ForImageClassification.from_pretrained(...) in earnest."""
    torch.manual_seed(0)
    return ConvNextV2ForImageClassification(ConvNextV2Config(depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 48, 64]))


config = flora.TuckerConfig(
    rank=8,
    kernel_rank=2,
    rank_pattern={r".*dwconv": (16, 1, 3, 3)},  # (out, in / groups, height, width), exact
    exclude_modules=["classifier"],
)
model = flora.adapt(network(), config)
print(flora.summary(model))

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
pixels, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 0, 1])
for _ in range(3):
    loss = model(pixel_values=pixels, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")

model.eval()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    flora.save_adapter(model, folder + "/adapter")
    again = flora.load_adapter(network(), folder + "/adapter").eval()
    same = torch.equal(again(pixel_values=pixels).logits, model(pixel_values=pixels).logits)
    print(f"loaded into a fresh network: the same outputs, bit for bit: {same}")
