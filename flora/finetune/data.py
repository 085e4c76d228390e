"""The demo's images: scikit-learn's digits or a folder of class-named folders, split once, by a seed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, per channel, for values in 0..1
STD = (0.229, 0.224, 0.225)

SMALLEST_CLASS = 3  # an image to train on, one to validate on and one to test on


@dataclass(frozen=True)
class Images:
    """Some images: pixels uint8 (n, 3, size, size), labels int64 (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> Images:
        """The images at ``index`` (int64), in that order."""
        return Images(self.pixels[index], self.labels[index])

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Normalised float32 pixels (b, 3, size, size) and labels (b,)."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        return (self.pixels[index].float() / 255 - mean) / std, self.labels[index]


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, and the name of each label."""

    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]


def require(module: str, *, extra: str = "cli") -> Any:
    """An optional package's module; ModuleNotFoundError says what to install: the project's extra that has it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the fine-tuning demo needs {module!r}: pip install 'flora-adapters[{extra}]'", name=error.name
        ) from error


def digits(size: int) -> tuple[Images, tuple[str, ...]]:
    """scikit-learn's 1,797 handwritten digits, 8×8 and grey, as RGB images of ``size`` pixels."""
    bundle = require("sklearn.datasets").load_digits()
    grey = torch.from_numpy(bundle.images).float().unsqueeze(1) * (255 / 16)
    pixels = F.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    rgb = pixels.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return Images(rgb, torch.from_numpy(bundle.target).long()), tuple(str(name) for name in bundle.target_names)


def folder(path: Path, size: int) -> tuple[Images, tuple[str, ...]]:
    """The images below ``path``'s folders, each named as its class: short side resized to ``size``, middle cut out.

    Raises OSError for a path that is no folder and ValueError for fewer than two classes, a class of fewer than three
    images, and a file that has an image's suffix and cannot be read as one. Hidden and other files are left out.
    """
    image = require("PIL.Image")
    if not path.is_dir():
        raise NotADirectoryError(f"--data {str(path)!r} is not a folder")
    suffixes = set(image.registered_extensions())
    by_class: dict[str, list[Path]] = {}
    for directory in sorted(d for d in path.iterdir() if d.is_dir() and not d.name.startswith(".")):
        files = sorted(f for f in directory.rglob("*") if f.suffix.lower() in suffixes and not f.name.startswith("."))
        if len(files) < SMALLEST_CLASS:
            raise ValueError(
                f"class folder {str(directory)!r} holds {len(files)} image(s), a class needs at least {SMALLEST_CLASS}"
            )
        by_class[directory.name] = files
    if len(by_class) < 2:
        raise ValueError(f"--data {str(path)!r} holds {len(by_class)} class folder(s), at least 2 are needed")
    pixels = [_read(file, size) for files in by_class.values() for file in files]
    labels = [label for label, files in enumerate(by_class.values()) for _ in files]
    return Images(torch.stack(pixels), torch.tensor(labels)), tuple(by_class)


def _read(file: Path, size: int) -> Tensor:
    """One image as uint8 (3, size, size)."""
    image, operations, numpy = require("PIL.Image"), require("PIL.ImageOps"), require("numpy")
    try:
        with image.open(file) as opened:
            if opened.mode[0] in "IF":  # conversion to RGB would clip it to white
                raise ValueError(f"mode {opened.mode!r} has more than 8 bits a channel")
            upright = operations.exif_transpose(opened).convert("RGB")
        fitted = operations.fit(upright, (size, size), method=image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {str(file)!r}: {error}") from error
    return torch.from_numpy(numpy.array(fitted)).permute(2, 0, 1)


def split(images: Images, classes: Sequence[str], train_size: int, seed: int) -> Dataset:
    """``train_size`` images to train on, half of the rest to validate on and half to test on, classes in proportion.

    Raises ValueError if a split would be empty or a class would have no image to train on.
    """
    if not 0 < train_size <= len(images) - 2:
        raise ValueError(
            f"--train-size {train_size} of {len(images)} images: "
            "at least one must be left to train, to validate and to test on"
        )
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(images), dtype=torch.float64)
    for label in range(len(classes)):  # each class spread evenly over 0..1, so that any stretch holds its share
        members = (images.labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        place[shuffled] = (torch.arange(len(members)) + torch.rand(1, generator=generator)).double() / len(members)
    order = place.argsort(stable=True)
    middle = train_size + (len(images) - train_size) // 2
    train, validation, test = (images.subset(part) for part in order.tensor_split([train_size, middle]))
    for label in range(len(classes)):
        if not (train.labels == label).any():
            raise ValueError(f"--train-size {train_size} leaves no image of class {classes[label]!r} to train on")
    return Dataset(train, validation, test, tuple(classes))
