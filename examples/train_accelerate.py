"""Train an adapter with Hugging Face accelerate, which starts the processes and places the model.

    accelerate launch --multi_gpu --num_processes 2 examples/train_accelerate.py

--multi_gpu starts several processes on machines without a GPU, too, which --cpu does not.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

import flora

accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
set_seed(0)  # the base is the same everywhere
# A small one, drawn at random, so that this runs anywhere; ViTForImageClassification.from_pretrained(...) in earnest.
shape = ViTConfig(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_labels=2,
)
model = ViTForImageClassification(shape)
labels = torch.arange(128) % 2
images = torch.randn(128, 3, 16, 16) + 0.5 * labels[:, None, None, None]

flora.adapt(model, flora.TuckerConfig(rank=8, modules_to_save=["classifier"], dropout=0.1), seed=0)
set_seed(0, device_specific=True)  # dropout masks of its own for every process

optimizer = torch.optim.AdamW(flora.parameter_groups(model, lr=5e-3, core_lr=1e-2))
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=64)
loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
wrapped, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

line = flora.ProgressLine(wrapped)
accelerator.print(f"{accelerator.num_processes} processes")
for epoch in range(4):
    for x, y in loader:
        with accelerator.accumulate(wrapped):
            loss = wrapped(pixel_values=x, labels=y).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                flora.clip_grad_norm_(wrapped, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.print(line(accelerator.reduce(loss.detach(), "mean"), examples=len(images), epoch=epoch))

accelerator.wait_for_everyone()
if accelerator.is_main_process:
    flora.save_adapter(accelerator.unwrap_model(wrapped), "adapter")
accelerator.end_training()
