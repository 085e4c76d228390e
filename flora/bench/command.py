"""``python -m flora bench``: the shapes of its options, and the run."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from flora.bench import case as cases
from flora.bench import machine, tables
from flora.bench.case import Case
from flora.bench.compare import ROUNDS, Result, measure
from flora.bench.methods import method_peers
from flora.bench.peers import peers
from flora.bench.timing import FEWEST

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--linear", metavar="INxOUT", help="a Linear, such as 768x3072")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of its input, 1024")
    parser.add_argument("--conv", metavar="INxOUTxK[xK…]", help="a convolution with 1 to 3 kernel extents: 64x64x3x3")
    parser.add_argument("--input", metavar="BATCHxE[xE…]", help="batch and extents of its input: 8x56x56")
    parser.add_argument("--stride", type=int, metavar="N", help="1")
    parser.add_argument("--padding", type=int, metavar="N", help="what keeps the extents with an odd kernel")
    parser.add_argument("--groups", type=int, metavar="N", help="1")
    parser.add_argument("--channels-last", action="store_true", help="memory format of layer and input")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of layer and input, %(default)s")
    parser.add_argument("--rank", type=int, default=cases.RANK, metavar="R", help="of the channel modes, %(default)s")
    parser.add_argument(
        "--kernel-rank", type=int, default=cases.KERNEL_RANK, metavar="R", help="of the kernel modes, %(default)s"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="PyTorch's own number")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="samples of each peer, %(default)s")
    parser.add_argument("--plans", action="store_true", help="also each of flora's plans by itself")
    parser.add_argument("--methods", action="store_true", help="structured matrices and rescaling instead")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine too; noisy figures are marked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")


def chosen(args: argparse.Namespace) -> list[Case]:
    """The layers that the options ask for: by default a Linear of ViT-B and a convolution of ResNet's first stage.

    Raises ValueError, quoting the option and its value, for shapes that cannot be.
    """
    for name in ("rows", "stride", "groups", "rank", "kernel_rank", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not above 0")
    if args.padding is not None and args.padding < 0:
        raise ValueError(f"--padding {args.padding} is below 0")
    if args.rounds < FEWEST:
        raise ValueError(f"--rounds {args.rounds} are too few for quartiles; {FEWEST} at least")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ValueError(f"--json {str(args.json)!r}: there is no folder {str(args.json.resolve().parent)!r}")
    if args.linear is None and args.rows is not None:
        raise ValueError(f"--rows {args.rows} belongs to --linear, which is not given")
    own = {"input": None, "stride": None, "padding": None, "groups": None, "channels_last": False}
    for name, default in own.items():
        value = getattr(args, name)
        if args.conv is None and value != default:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --conv, which is not given")
    if args.linear is None and args.conv is None:
        dtype, rank = DTYPES[args.dtype], args.rank
        return [
            cases.linear(768, 768, 1576, dtype=dtype, rank=rank),
            cases.conv(64, 64, (3, 3), 8, (56, 56), dtype=dtype, rank=rank, kernel_rank=args.kernel_rank),
        ]
    found = []
    if args.linear is not None:
        d_in, d_out = _extents("--linear", args.linear, 2, 2)
        found.append(cases.linear(d_in, d_out, args.rows or 1024, dtype=DTYPES[args.dtype], rank=args.rank))
    if args.conv is not None:
        found.append(_conv(args))
    return found


def _conv(args: argparse.Namespace) -> Case:
    d_in, d_out, *kernel = _extents("--conv", args.conv, 3, 5)
    if args.input is None:
        raise ValueError(f"--conv {args.conv!r} needs --input, such as {'x'.join(['8', *['56'] * len(kernel)])}")
    batch, *extents = _extents("--input", args.input, 2, 4)
    if len(extents) != len(kernel):
        raise ValueError(f"--input {args.input!r} has {len(extents)} extents, --conv {args.conv!r} has {len(kernel)}")
    groups = args.groups or 1
    if d_in % groups or d_out % groups:
        raise ValueError(f"--groups {groups} does not divide the channels of --conv {args.conv!r}")
    if args.channels_last and len(kernel) == 1:
        raise ValueError(f"--channels-last is for two or three extents; --conv {args.conv!r} has one")
    for extent, k in zip(extents, kernel, strict=True):
        padding = k // 2 * (k % 2) if args.padding is None else args.padding
        if extent + 2 * padding < k:
            raise ValueError(f"--input {args.input!r}: an extent of {extent} is too small for --conv {args.conv!r}")
    return cases.conv(
        d_in,
        d_out,
        kernel,
        batch,
        extents,
        stride=args.stride or 1,
        padding=args.padding,
        groups=groups,
        dtype=DTYPES[args.dtype],
        channels_last=args.channels_last,
        rank=args.rank,
        kernel_rank=args.kernel_rank,
    )


def _extents(option: str, text: str, least: int, most: int) -> list[int]:
    parts = text.lower().split("x")
    if not least <= len(parts) <= most or not all(part.isdecimal() and int(part) > 0 for part in parts):
        count = str(least) if least == most else f"{least} to {most}"
        raise ValueError(f"{option} {text!r} is not {count} numbers above 0 with an x between")
    return [int(part) for part in parts]


def run(layers: list[Case], args: argparse.Namespace) -> int:
    """Measures the layers and prints their tables. Returns 1 if the machine was too busy for some figure, else 0."""
    before = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        about = machine.describe()
        print(", ".join(f"{key} {value}" for key, value in about.items() if isinstance(value, str | int)))
        reason = machine.busy()
        if reason is not None:
            print(f"the machine is busy: {reason}")
            if not args.anyway:
                return 1
        results = []
        for case in layers:
            of = method_peers if args.methods else partial(peers, plans=args.plans)
            results.append(measure(case, rounds=args.rounds, of=of))
            print(f"\n{tables.terminal(results[-1])}", flush=True)
    finally:
        torch.set_num_threads(before)
    if args.json is not None:
        content = {"machine": about, "results": [result.to_dict() for result in results]}
        args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
    return 1 if any_noisy(results) else 0


def any_noisy(results: list[Result]) -> bool:
    """Whether some figure is not to be used; says how many."""
    rows = [row for result in results for row in result.rows if row.timing is not None]
    noisy = sum(row.noisy for row in rows)
    if noisy:
        print(f"\n{noisy} of {len(rows)} figures were too noisy to be used: run again on a quiet machine")
    return noisy > 0
