"""The study's data: images and sentences with labels, and how they are split."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.finetune.data import Images, digits, require

EXTRA = "study"
LONGEST = 32  # word pieces of a sentence; the rest is cut off
_TEST_SEED = 20240514  # of the images held out for testing: the same ones, whatever a run's seed


class Examples(Protocol):
    """Inputs with labels int64 (n,)."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def subset(self, index: Tensor) -> Self: ...

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Sentences:
    """Word pieces, int64 (n, longest), filled up with ``padding``, and labels (n,)."""

    pieces: Tensor
    labels: Tensor
    padding: int

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> Sentences:
        """The sentences at ``index`` (int64), in that order."""
        return replace(self, pieces=self.pieces[index], labels=self.labels[index])

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Pieces (b, length of the longest among them) and labels (b,)."""
        pieces = self.pieces[index]
        longest = int((pieces != self.padding).sum(1).max())
        return pieces[:, :longest], self.labels[index]


@dataclass(frozen=True)
class Data:
    """What a task learns from: a pool, of which each seed draws its own images to train and validate on, and a test."""

    pool: Any
    test: Any
    classes: tuple[str, ...]

    def drawn(self, train: int, validation: int, seed: int) -> tuple[Any, Any]:
        """``train`` and ``validation`` examples of the pool, disjoint, drawn by the seed.

        Raises ValueError if the pool has too few.
        """
        if train + validation > len(self.pool):
            raise ValueError(f"{train} examples to train on and {validation} to validate on, of {len(self.pool)}")
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
        return self.pool.subset(order[:train]), self.pool.subset(order[train : train + validation])


def held_out(examples: Any, classes: Sequence[str], test: int) -> Data:
    """Holds ``test`` examples out, the same for every run."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(_TEST_SEED))
    return Data(examples.subset(order[test:]), examples.subset(order[:test]), tuple(classes))


def digit_images(size: int) -> Data:
    """scikit-learn's handwritten digits: 1,300 to draw from, 497 to test on."""
    images, classes = digits(size)
    return held_out(images, classes, 497)


def animal_images(size: int) -> Data:
    """The 10,000 silhouettes of animal-mnist, 28×28: 9,000 to draw from, 1,000 to test on.

    Source: the package animal-mnist, whose files are read without importing it, as it would import TensorFlow.
    """
    grey, labels = (_array(name) for name in ("animal_data_version_3.gz", "animal_label_version_3.gz"))
    resized = F.interpolate(grey.unsqueeze(1).float(), size=(size, size), mode="bilinear", align_corners=False)
    images = Images(resized.round().to(torch.uint8).expand(-1, 3, -1, -1), labels.long())
    names = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
    return held_out(images, names, 1000)


def silhouettes() -> Path:
    """The folder of animal-mnist's files. Raises ModuleNotFoundError, with what to install, if it is not there."""
    spec = find_spec("animal_mnist")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the silhouettes need 'animal_mnist': pip install --no-deps animal-mnist", name="animal_mnist"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "Animal_MNIST"


def _array(name: str) -> Tensor:
    return torch.from_numpy(arrays(gzip.decompress((silhouettes() / name).read_bytes())))


def arrays(pickled: bytes) -> Any:
    """A pickled array. Raises pickle.UnpicklingError, and runs nothing, if there is anything else in it."""
    return _Arrays(io.BytesIO(pickled)).load()


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.replace("numpy.core", "numpy._core").startswith("numpy") and name in _ARRAY_PARTS:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} in a file that should hold an array")


_ARRAY_PARTS = ("ndarray", "dtype", "_reconstruct", "_frombuffer")


Lines = tuple[list[str], list[int]]
"""Sentences, and the label of each."""


@dataclass(frozen=True)
class Corpus:
    """A set of labelled sentences; ``test`` None: a part of ``train`` is held out."""

    train: Lines
    test: Lines | None
    classes: tuple[str, ...]

    def data(self, tokenizer: Any) -> Data:
        """As word pieces."""
        if self.test is None:
            return held_out(pieces(tokenizer, self.train), self.classes, min(1000, len(self.train[0]) // 4))
        return Data(pieces(tokenizer, self.train), pieces(tokenizer, self.test), self.classes)


def pieces(tokenizer: Any, lines: Lines) -> Sentences:
    """Word pieces of the sentences, `LONGEST` at most."""
    found = tokenizer(lines[0], padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt")
    return Sentences(found["input_ids"], torch.tensor(lines[1]), tokenizer.pad_token_id)


def trec(folder: Path) -> Corpus:
    """TREC's questions in 6 coarse classes: ``train_5500.label`` and ``TREC_10.label``.

    Source: Li and Roth, "Learning Question Classifiers", 2002.
    """
    files = [_text(folder / name).splitlines() for name in ("train_5500.label", "TREC_10.label")]
    split = [[line.split(" ", 1) for line in lines if line] for lines in files]
    classes = tuple(sorted({kind.partition(":")[0] for kind, _ in split[0]}))
    found = [([s for _, s in lines], [classes.index(k.partition(":")[0]) for k, _ in lines]) for lines in split]
    return Corpus(found[0], found[1], classes)


def polarity(folder: Path) -> Corpus:
    """Sentences of film reviews, negative and positive: ``rt-polarity.neg`` and ``rt-polarity.pos``.

    Source: Pang and Lee, "Seeing stars", 2005.
    """
    by_class = [_text(folder / f"rt-polarity.{kind}").splitlines() for kind in ("neg", "pos")]
    labels = [label for label, lines in enumerate(by_class) for _ in lines]
    return Corpus((by_class[0] + by_class[1], labels), None, ("negative", "positive"))


def corpora(text_data: str | None) -> dict[str, Corpus]:
    """What ``--text-data`` means, by the name of its task.

    A folder with ``trec`` or ``rt-polarity`` in it gives "trec" and "polarity"; anything else is what
    ``datasets.load_dataset`` of Hugging Face takes (``SetFit/sst2``, or a folder of CSV files) and gives "text". Its
    first column of strings is read as the sentences, and ``label`` as the classes.
    """
    if text_data is None:
        return {}
    folder = Path(text_data)
    known = {"trec": ("trec", trec), "polarity": ("rt-polarity", polarity)}
    found = {task: read(folder / name) for task, (name, read) in known.items() if (folder / name).is_dir()}
    return found or {"text": _hugging_face(text_data)}


def _hugging_face(name: str) -> Corpus:
    datasets = require("datasets", extra=EXTRA)
    loaded = datasets.load_dataset(name)
    parts = [loaded[split] for split in ("train", "test") if split in loaded]
    if not parts or "label" not in parts[0].column_names:
        raise ValueError(f"--text-data {name!r} has splits {list(loaded)}: a train split with a label is needed")
    text = next(
        (c for c, kind in parts[0].features.items() if getattr(kind, "dtype", None) in ("string", "large_string")), None
    )
    if text is None:
        raise ValueError(f"--text-data {name!r} has no column of strings among {parts[0].column_names}")
    values = sorted(set(parts[0]["label"]))
    lines = [(list(part[text]), [values.index(label) for label in part["label"]]) for part in parts]
    return Corpus(lines[0], lines[1] if len(lines) > 1 else None, tuple(map(str, values)))


def _text(path: Path) -> str:
    return path.read_text(encoding="latin-1")  # both sets are older than UTF-8's habit
