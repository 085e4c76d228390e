"""A plain training loop with a progress bar, and what a training step costs."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.finetune.data import Dataset, Images, require

EVALUATION_BATCH = 100


@dataclass(frozen=True)
class Fit:
    """What training gave: the median seconds of a step, and the validation accuracy (0 to 1) after each epoch."""

    seconds_per_step: float
    validation: tuple[float, ...]

    @property
    def best(self) -> float:
        """The accuracy of the epoch whose parameters were kept."""
        return max(self.validation)


def hold_statistics(model: nn.Module) -> None:
    """Puts every BatchNorm in eval mode, so that its running statistics are used and do not move."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def fit(
    model: nn.Module, data: Dataset, *, epochs: int, batch_size: int, lr: float, seed: int, label: str, quiet: bool
) -> Fit:
    """Trains what requires a gradient with AdamW and leaves the parameters of the epoch that validated best.

    Raises FloatingPointError as soon as a loss is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    order = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(data.train) / batch_size)
    seconds: list[float] = []
    validation: list[float] = []
    kept: list[Tensor] = []
    with require("tqdm").tqdm(total=epochs * steps, desc=label, unit="step", disable=quiet) as bar:
        for epoch in range(epochs):
            model.train()
            hold_statistics(model)
            batches = torch.randperm(len(data.train), generator=order).split(batch_size)  # type: ignore[no-untyped-call]
            for index in batches:
                start = time.perf_counter()
                loss = step(model, optimizer, *data.train.batch(index))
                seconds.append(time.perf_counter() - start)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"{label}: the loss is {loss} in epoch {epoch + 1}; lower --lr {lr}")
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", validation=f"{validation[-1]:.1%}" if validation else "-")
            validation.append(accuracy(predict(model, data.validation), data.validation))
            if validation[-1] == max(validation):
                kept = [p.detach().clone() for p in trained]
            bar.set_postfix(loss=f"{loss:.3f}", validation=f"{validation[-1]:.1%}")
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return Fit(statistics.median(seconds), tuple(validation))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> float:
    """One step of the optimizer on x (b, 3, size, size) and labels (b,); returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def predict(model: nn.Module, images: Images) -> Tensor:
    """The logits (n, classes) in eval mode, of images in the model's dtype; leaves the model in eval mode."""
    model.eval()
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        batches = range(0, len(images), EVALUATION_BATCH)
        return torch.cat([model(images.batch(slice(i, i + EVALUATION_BATCH))[0].to(dtype)) for i in batches])


def accuracy(logits: Tensor, images: Images) -> float:
    """The share, 0 to 1, of images whose largest logit is the label's."""
    return (logits.argmax(1) == images.labels).float().mean().item()


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps from the forward of x for the backward, parameters included, each storage once."""
    storages: dict[
        int, torch.UntypedStorage
    ] = {}  # held, so that no address is used twice; a tensor would hold its graph

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):  # there is no backward
        model(x)
    return sum(storage.nbytes() for storage in storages.values())
