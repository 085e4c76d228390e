"""The command line: ``python -m flora {finetune,inspect,merge,bench,study,info}``.

It exits with 0 when all went well and with 2, after one sentence on stderr, for anything that its user can mend;
``bench`` with 1 when the machine was too busy.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import flora
from flora import functional, reference
from flora.bench import command
from flora.config import DeltaConfig
from flora.deltas import Delta, Site, WeightDelta, build
from flora.deltas.tucker import Factored
from flora.filling import Filler
from flora.manifest import AdapterFile, read_adapter
from flora.outputs import Output
from flora.study import command as study_command
from flora.tables import aligned
from flora.tensor_files import Tensors

EFFICIENTNET = "efficientnet-lite0"  # the one base that has a name of its own; any other is a folder


_MOST_ENTRIES = 1 << 24  # of a ΔW that has to be built for its norm


class UserError(Exception):
    """Something that the user can mend; shown without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status; argparse itself exits with 2 for a wrong option."""
    args = parser().parse_args(argv)
    try:
        status: int = args.run(args) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError, FloatingPointError) as error:
        print(f"flora {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"flora {args.command}: interrupted", file=sys.stderr)
        return 130
    return status


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="flora", description="Small trainable deltas for pretrained PyTorch networks: FLoRA and others."
    )
    top.add_argument("--version", action="version", version=f"flora {flora.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    tune = commands.add_parser(
        "finetune",
        help="fine-tune a pretrained EfficientNet-Lite0 on images, and compare",
        description="Fine-tunes an EfficientNet-Lite0 with ImageNet weights on scikit-learn's digits, or on your own "
        "images: its head only, and with FLoRA. Saves the adapter, loads it back, merges it, and shows that all three "
        "predict the same.",
    )
    tune.add_argument("--data", type=Path, metavar="FOLDER", help="folder of image folders, each named as its class")
    tune.add_argument(
        "--output", type=Path, default=Path("runs/finetune"), metavar="DIR", help="adapter folder, %(default)s"
    )
    tune.add_argument("--epochs", type=_positive_int, default=3, metavar="N", help="%(default)s")
    tune.add_argument("--batch-size", type=_positive_int, default=50, metavar="N", help="%(default)s")
    tune.add_argument(
        "--lr", type=_positive_float, metavar="X", help="one learning rate for all methods instead of each one's own"
    )
    tune.add_argument(
        "--rank", type=_positive_int, default=8, metavar="R", help="rank of the channel modes, %(default)s"
    )
    tune.add_argument(
        "--kernel-rank", type=_positive_int, default=2, metavar="R", help="rank of the kernel modes, %(default)s"
    )
    tune.add_argument(
        "--scale", type=_positive_float, default=1.0, metavar="S", help="factor of the update, %(default)s"
    )
    tune.add_argument("--seed", type=int, default=0, metavar="N", help="%(default)s")
    tune.add_argument(
        "--train-size", type=_positive_int, metavar="N", help="images to train on: 1000 digits, 70%% of a folder"
    )
    tune.add_argument(
        "--base-dtype", choices=("bfloat16", "float16"), help="keep FLoRA's frozen network in half precision"
    )
    tune.add_argument("--image-size", type=_positive_int, default=64, metavar="PIXELS", help="%(default)s")
    tune.add_argument("--compare", action="store_true", help="also PEFT's LoRA and full fine-tuning")
    tune.add_argument("--quiet", action="store_true", help="no progress, only the results")
    tune.set_defaults(run=_finetune)

    show = commands.add_parser("inspect", help="what an adapter folder holds", description="Needs no base model.")
    show.add_argument("adapter", type=Path, metavar="DIR")
    show.set_defaults(run=_inspect)

    merge = commands.add_parser("merge", help="write a base model's weights with an adapter merged into them")
    merge.add_argument("adapter", type=Path, metavar="DIR")
    merge.add_argument(
        "--base",
        required=True,
        help="efficientnet-lite0, or the local folder of a transformers model (save_pretrained)",
    )
    merge.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors")
    merge.set_defaults(run=_merge)

    bench = commands.add_parser(
        "bench",
        help="time one layer with flora's adapter and its peers on this machine",
        description="Times forward and backward of a layer, frozen, fully trained, and with the adapters of every peer "
        "that is installed (PEFT, LyCORIS, tltorch), in turns. Exits with 1 if the machine was too busy.",
    )
    command.add_options(bench)
    bench.set_defaults(run=_bench)

    study = commands.add_parser(
        "study",
        help="compare methods on real tasks at equal budgets, and report",
        description="Runs flora's study: methods at equal numbers of parameters on real pretrained networks and data, "
        "learning rates chosen on a validation split, several seeds. Each finished run is a line of a file and is not "
        "repeated.",
    )
    study_command.add_options(study)
    study.set_defaults(run=_study)

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


def _inspect(args: argparse.Namespace) -> None:
    with _user_errors():
        file = read_adapter(args.adapter)
    rows, tensors = [], _by_module(file)
    for name, entry in file.layers.items():
        with _user_errors():
            delta = _delta(file, name, tensors[name])
        shape = "×".join(map(str, entry.shape))
        core = getattr(delta, "core", None)
        norms = ("" if core is None else f"{core.norm().item():.3g}", _update_norm(delta))
        rows.append((name, shape, delta.size, f"{entry.scale:g}", f"{_count(tensors[name]):,}", *norms))
    rows += [(name, "trained whole", "", "", f"{_count(tensors[name]):,}", "", "") for name in file.saved]
    print(f"{file.path}: {file.method}, for a {file.base.model}")
    for pattern, config in [("", file.config)] if isinstance(file.config, DeltaConfig) else file.config.items():
        print(f"  {pattern}: {_changed(config)}" if pattern else f"  {_changed(config)}")
    print(aligned(("module", "weight", "size", "scale", "parameters", "‖core‖", "‖s·ΔW‖"), rows))
    counted = _count(file.tensors)
    base = sum(math.prod(shape) for shape in file.base.shapes.values())
    size = sum(tensor.nbytes for tensor in file.tensors.values())
    print(f"{counted:,} parameters, {size / 2**20:.1f} MiB; the base, without what was trained whole, has {base:,}")


def _by_module(file: AdapterFile) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module, by their names in it. What lies inside a module with a block is its own module."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in sorted((*file.layers, *file.saved), key=len)[::-1]}
    for key, tensor in file.tensors.items():
        where = next(name for name in found if key.startswith(f"{name}."))
        found[where][key.removeprefix(f"{where}.")] = tensor
    return found


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _delta(file: AdapterFile, name: str, tensors: Mapping[str, Tensor]) -> Delta:
    """A module's delta, in float64, without the module. Raises ValueError, naming it, if its tensors do not fit."""
    entry = file.layers[name]
    fill = Filler(Tensors.of({f"{name}.{key}": tensor for key, tensor in tensors.items()}), {name: entry.scale})
    vectors = [tensors[key].shape for key in ("row", "shift") if key in tensors]  # RescaleDelta's
    site = Site(
        entry.shape,
        dtype=torch.float64,
        name=name,
        has_bias="shift" in tensors,
        norm_offset=0.0 if entry.shape in vectors else None,
        output=Output(entry.shape[0]),
        shapes_only=True,
        most=fill.elements(name),
    )
    delta = build(file.config_of(name), site).requires_grad_(False)
    fill({name: delta}, {})
    return delta


def _changed(config: DeltaConfig) -> str:
    """A configuration's own values, without the defaults."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    default = type(config)()
    shown = ", ".join(f"{name}={value!r}" for name, value in fields.items() if value != getattr(default, name))
    return f"{type(config).__name__}({shown})"


def _update_norm(delta: Delta) -> str:
    """The Frobenius norm of s·ΔW; "" where that takes the base's weight or very much memory.

    Of core and factors nothing is built: ‖ΔW‖² = ⟨G, G ×_m U_mᵀU_m⟩.
    """
    if isinstance(delta, Factored):
        first = next(iter(delta.factors))
        core = torch.eye(first.shape[1], dtype=first.dtype) if delta.core is None else delta.core
        image: Tensor = core
        for mode, factor in enumerate(delta.factors):
            image = reference.mode_product(image, factor.mT @ factor, mode)
        return f"{abs(delta.scale) * (core * image).sum().clamp(min=0).sqrt().item():.3g}"
    if not isinstance(delta, WeightDelta) or delta.of_weight or math.prod(delta.shape) > _MOST_ENTRIES:
        return ""
    return f"{delta.alone(None).norm().item():.3g}"


def _merge(args: argparse.Namespace) -> None:
    with _user_errors():
        target = _writable(args.output, args.base)
        model = _base(args.base, read_adapter(args.adapter))
        tied = _tied(model)
        flora.load_adapter(model, args.adapter, trainable=False)
        report = flora.merge(model)
        flora.unload(model, merge=True)
    still = _tied(model)
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name not in still}
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        safetensors.torch.save_file(tensors, aside, metadata={"format": "pt"})
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    print(f"{args.adapter} merged into {args.base}: {target} ({target.stat().st_size / 2**20:.1f} MiB)")
    print(report)
    for name in tied.keys() - still.keys():
        print(f"{name} was tied to {tied[name]} and is no longer: load it with tie_word_embeddings=False or the like")


def _tied(model: nn.Module) -> dict[str, str]:
    """The name that a tensor was registered under first, for every further name; such a file leaves those out."""
    first: dict[tuple[object, ...], str] = {}
    again: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(where, name) != name:
            again[name] = first[where]
    return again


def _writable(path: Path, base: str) -> Path:
    """``--output``, if it may be written."""
    target = Path(os.path.realpath(path))
    if target.suffix != ".safetensors":
        raise ValueError(f"--output {str(path)!r} does not end in .safetensors")
    if not target.parent.is_dir():
        raise NotADirectoryError(f"--output {str(path)!r}: there is no folder {str(target.parent)!r}")
    if target.exists() and (not target.is_file() or target.parent == Path(os.path.realpath(base))):
        raise FileExistsError(f"--output {str(path)!r} is a folder or one of the base's own files")
    return target


def _base(name: str, adapter: AdapterFile) -> nn.Module:
    """The network that ``--base`` means, with as many classes as the adapter's classifier."""
    if name == EFFICIENTNET:
        from flora.finetune import network

        head = adapter.tensors.get(f"{network.HEAD}.weight") if network.HEAD in adapter.saved else None
        return network.pretrained(None if head is None else len(head))
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--base {name!r} is neither {EFFICIENTNET} nor a folder with a config.json")
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = next(iter(config.architectures or ()), None)
    kind = getattr(transformers, architecture or "", None)
    if kind is None:
        raise ValueError(f"--base {name!r}: its config.json names architectures={config.architectures!r}, unknown here")
    model: nn.Module = kind.from_pretrained(folder, local_files_only=True, dtype="auto")
    return model


def _bench(args: argparse.Namespace) -> int:
    with _user_errors():
        layers = command.chosen(args)
    return command.run(layers, args)


def _study(args: argparse.Namespace) -> None:
    with _user_errors():
        study_command.check(args)
    study_command.run(args)


def _info(args: argparse.Namespace) -> None:
    rows: dict[str, Any] = {"flora": flora.__version__, "torch": torch.__version__}
    rows |= {"python": sys.version.split()[0], "torch threads": torch.get_num_threads(), **functional.info()}
    for name, value in rows.items():
        shown = ", ".join(map(str, value)) if isinstance(value, tuple | list) else value
        print(f"{name.replace('_', ' '):<16}{shown}")
