"""The process that runs the cases: one line for each, its number, kind and outcome."""

from __future__ import annotations

import os
import resource
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

MEMORY = 12 << 30
"""Bytes that the process may take, so that what asks for more gets MemoryError."""


def serve(what: str, seed: int, first: int, cases: int) -> None:
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # whose shadow is larger than any limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    run = run_calls if what == "calls" else run_files
    for number, kind, outcome in run(seed, range(first, first + cases)):
        os.write(1, f"{number}\t{kind}\t{outcome}\n".encode())


def run_calls(seed: int, numbers: range) -> Iterator[tuple[int, str, str]]:
    import torch
    from attacks import ATTACKS, NotApplicableError
    from cases import FUNCTIONS, BrokenPromiseError, Case, draw_template

    from flora import _core

    each = 40  # cases of one template, which costs more to draw than they
    templates: dict[int, object] = {}
    levels, names = _core.info()["isa_available"], sorted(set(ATTACKS) - {"nothing"})
    for number in numbers:
        drawn = number // each
        if drawn not in templates:
            templates = {drawn: draw_template(FUNCTIONS[drawn % len(FUNCTIONS)], f"{seed}/{drawn}")}
            torch.set_num_threads(2 if drawn % 16 == 0 else 1)
        random = Random(f"{seed}:{number}")
        _core.set_isa(random.choice(levels))
        wanted = random.choices((0, 1, 2), (15, 75, 10))[0]
        while True:
            case = Case(templates[drawn], random)
            kinds = random.choices(names, k=wanted) or ["nothing"]
            try:
                for kind in kinds:
                    ATTACKS[kind](case)
                break
            except NotApplicableError:
                continue
            except Exception:
                if wanted < 2:  # else the first has left nothing that the second could spoil
                    raise
        if wanted == 2:  # one may have undone the other
            case.hopeless, case.free = False, True
        kind = kinds[0] if wanted < 2 else "two at once"
        try:
            yield number, kind, case.run()
        except BrokenPromiseError as failure:
            yield number, kind, f"FAILED\t{case.template.function} {kinds} {case.note}: {failure}"
        except BaseException as error:
            traceback.print_exc()
            yield number, kind, f"FAILED\t{case.template.function} {kinds} {case.note}: {error!r}"


def run_files(seed: int, numbers: range) -> Iterator[tuple[int, str, str]]:
    from files import Files

    files = Files()
    for number in numbers:
        yield number, *files.run(Random(f"{seed}:{number}"))
