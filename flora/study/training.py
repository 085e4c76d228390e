"""One run of the study: the same data order, schedule and evaluation for every method."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import flora
from flora.finetune.training import hold_statistics, step
from flora.hooks import hold_eval
from flora.state import adapted_layers
from flora.study.data import Examples
from flora.study.networks import schedule

EVALUATION_BATCH = 100
LAST = 10  # steps whose mean loss is reported


@dataclass(frozen=True)
class Learned:
    """What training gave: the mean loss of the last steps, None if it was not finite, and the median step's seconds."""

    train_loss: float | None
    seconds_per_step: float


def learn(
    model: nn.Module, data: Examples, *, steps: int, batch_size: int, lr: float, seed: int, options: Mapping[str, Any]
) -> Learned:
    """Trains what requires a gradient: AdamW without decay, warm-up and cosine, batches without replacement by epoch.

    BatchNorm's statistics are held, as a delta learns around them, unless ``options`` say otherwise. It ends at a loss
    that is not finite.
    """
    optimizer = torch.optim.AdamW(_groups(model, lr, options), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: schedule(done, steps))
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout
    model.train()
    if options.get("batch_norm") == "moving":
        _let_statistics_move(model)
    else:
        hold_statistics(model)
    losses: list[float] = []
    seconds: list[float] = []
    left: list[Tensor] = []
    for _ in range(steps):
        if not left:
            shuffled = torch.randperm(len(data), generator=order)
            left = list(shuffled[: len(data) // batch_size * batch_size].split(batch_size))  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        losses.append(step(model, optimizer, *data.batch(left.pop())))
        rate.step()
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(losses[-1]):
            return Learned(None, statistics.median(seconds))
    return Learned(statistics.mean(losses[-LAST:]), statistics.median(seconds))


def _groups(model: nn.Module, lr: float, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "core_lr" in options and adapted_layers(model):
        return flora.parameter_groups(model, lr=lr, core_lr=lr * options["core_lr"])
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]


def _let_statistics_move(model: nn.Module) -> None:
    """Takes off what `flora.adapt` holds the statistics of frozen normalisation by."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is hold_eval]:
            del module._forward_pre_hooks[key]


@torch.no_grad()
def score(model: nn.Module, examples: Examples) -> float:
    """The share, 0 to 1, of examples whose largest logit is the label's."""
    model.eval()
    right = 0
    for start in range(0, len(examples), EVALUATION_BATCH):
        inputs, labels = examples.batch(slice(start, start + EVALUATION_BATCH))
        right += int((model(inputs).argmax(1) == labels).sum())
    return right / len(examples)
