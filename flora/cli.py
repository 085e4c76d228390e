"""The command line: ``python -m flora {finetune,inspect,merge,info}``.

It exits with 0 when all went well and with 2, after one sentence on stderr, for anything that its user can mend.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flora


class UserError(Exception):
    """Something that the user can mend; shown without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status; argparse itself exits with 2 for a wrong option."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, FloatingPointError) as error:
        print(f"flora {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"flora {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog="flora", description="Tucker adapters for pretrained PyTorch networks.")
    top.add_argument("--version", action="version", version=f"flora {flora.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    tune = commands.add_parser(
        "finetune",
        help="fine-tune a pretrained EfficientNet-Lite0 on images, and compare",
        description="Fine-tunes an EfficientNet-Lite0 with ImageNet weights on scikit-learn's digits, or on your own "
        "images: its head only, and with FLoRA. Saves the adapter, loads it back, merges it, and shows that all three "
        "predict the same.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tune.add_argument("--data", type=Path, metavar="FOLDER", help="folder of image folders, each named as its class")
    tune.add_argument("--output", type=Path, default=Path("runs/finetune"), metavar="DIR", help="adapter folder")
    tune.add_argument("--epochs", type=_positive_int, default=3)
    tune.add_argument("--batch-size", type=_positive_int, default=50)
    tune.add_argument("--lr", type=_positive_float, help="one learning rate for all methods instead of each one's own")
    tune.add_argument("--rank", type=_positive_int, default=8, help="rank of the channel modes")
    tune.add_argument("--kernel-rank", type=_positive_int, default=2, help="rank of the kernel modes")
    tune.add_argument("--scale", type=_positive_float, default=1.0, help="factor of the update")
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument("--train-size", type=_positive_int, help="images to train on: 1000 digits, 70%% of a folder")
    tune.add_argument("--image-size", type=_positive_int, default=64, metavar="PIXELS")
    tune.add_argument("--compare", action="store_true", help="also PEFT's LoRA and full fine-tuning")
    tune.add_argument("--quiet", action="store_true", help="no progress, only the results")
    tune.set_defaults(run=_finetune)

    show = commands.add_parser("inspect", help="what an adapter folder holds", description="Needs no base model.")
    show.add_argument("adapter", type=Path, metavar="DIR")
    show.set_defaults(run=_inspect)

    merge = commands.add_parser("merge", help="write a base model's weights with an adapter merged into them")
    merge.add_argument("adapter", type=Path, metavar="DIR")
    merge.add_argument(
        "--base", required=True, help="efficientnet-lite0, or the local folder of a transformers model (save_pretrained)"
    )
    merge.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors")
    merge.set_defaults(run=_merge)

    info = commands.add_parser("info", help="version, kernel level, threads, torch")
    info.set_defaults(run=_info)
    return top


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


# argparse names the type in its message: "invalid int value: 'x'"
_positive_int.__name__, _positive_float.__name__ = "int", "float"


@contextmanager
def _user_errors() -> Iterator[None]:
    """Around what reads the user's input: its errors are the user's. Anything outside keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(str(message)) from error


def _finetune(args: argparse.Namespace) -> None:
    from flora import finetune  # only this command needs it

    options = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
    with _user_errors():
        job = finetune.prepare(finetune.Settings(**options))
    job.run()


def _info(args: argparse.Namespace) -> None:
    from flora import functional

    rows: dict[str, Any] = {"flora": flora.__version__, "torch": torch.__version__}
    rows |= {"python": sys.version.split()[0], "torch threads": torch.get_num_threads(), **functional.info()}
    for name, value in rows.items():
        shown = ", ".join(map(str, value)) if isinstance(value, tuple | list) else value
        print(f"{name.replace('_', ' '):<20}{shown}")
