"""Train an adapter in several processes, with DistributedDataParallel or sharded by fully_shard, and resume.

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --shard --resume

On several machines add --nnodes, --rdzv-backend c10d and --rdzv-endpoint, as PyTorch describes.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import flora

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--shard", action="store_true", help="fully_shard instead of DistributedDataParallel")
arguments.add_argument("--resume", action="store_true", help="go on from the folder adapter")
options = arguments.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # tried on the CPU alone
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if device.type == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())
torch.manual_seed(0)  # the base is the same everywhere

layers = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(2)]
model = nn.Sequential(nn.Conv2d(3, 16, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).to(device)
images = torch.randn(256, 3, 10, 10)
data = TensorDataset(images, images.mean((2, 3)).argmax(1))  # the brightest channel

if options.resume:
    flora.load_adapter(model, "adapter")
else:
    flora.adapt(model, flora.TuckerConfig(rank=8, modules_to_save=["5"]), seed=0)
torch.manual_seed(rank)  # dropout masks of its own for every process

if options.shard:
    for layer in model[1:3]:
        fully_shard(layer)
    wrapped = fully_shard(model)
else:
    wrapped = DistributedDataParallel(model)

# After the model is sharded: the optimizer is to hold the shards.
optimizer = torch.optim.AdamW(flora.parameter_groups(model, lr=1e-2, weight_decay=0.01))
sampler = DistributedSampler(data, seed=0)
loader = DataLoader(data, batch_size=64 // world, sampler=sampler)
line = flora.ProgressLine(model)
for epoch in range(4):
    sampler.set_epoch(epoch)
    for x, y in loader:
        loss = nn.functional.cross_entropy(wrapped(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        flora.clip_grad_norm_(model, 1.0)
        optimizer.step()
    text = line(loss, examples=len(data), epoch=epoch)  # by every process, as a sharded norm is gathered
    if rank == 0:
        print(text)

if options.shard or rank == 0:  # of a sharded model all take part, and the first one writes
    flora.save_adapter(model, "adapter")
dist.destroy_process_group()
