"""Saving an adapter against all that can cut it off: ``make crash-saves``; test_crash_saves.py runs a short form.

In each part the folder must hold, at every look, one adapter whole: that of the last save that returned, or of one that
was under way. Prints how many cases of each part ran, and ends with an error at the first that does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flora
from flora import folders, serialization
from flora.manifest import TENSORS_FILE, read_adapter

WIDTH = 96
SYSTEM_CALLS = {"open", "mkdir", "write", "flush", "fsync", "rename", "scandir", "rmdir", "unlink", "fdopen", "lstat"}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def save(model: nn.Module, folder: Path, value: int) -> None:
    """Save an adapter of which every number is ``value``."""
    with torch.no_grad():
        for parameter in flora.trainable_parameters(model):
            parameter.fill_(value)
    flora.save_adapter(model, folder)


def found(folder: Path) -> int:
    """The value of the adapter that a folder holds whole: file and tensors agree, and a model takes it."""
    values = {float(value) for tensor in read_adapter(folder).tensors.values() for value in tensor.unique()}
    assert len(values) == 1, f"two adapters are mixed: {values}"
    flora.load_adapter(base(), folder)
    return int(values.pop())


@contextlib.contextmanager
def moved_aside(wanted: bool) -> Iterator[None]:
    """As on a system that cannot exchange two folders."""
    exchange = folders._exchange
    if wanted:
        folders._exchange = lambda one, other: False
    try:
        yield
    finally:
        folders._exchange = exchange


def forked(action: Callable[[], Any]) -> int:
    """A child that runs an action and ends; its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:
            print(f"in a child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    """How a child ended: its exit status, or less the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def alone(folder: Path) -> bool:
    return os.listdir(folder.parent) == [folder.name]


# The parts ---------------------------------------------------------------------------------------------------------


def kills(model: nn.Module, folder: Path, count: int, seed: int) -> None:
    """A process that saves one adapter after another is killed at a random moment; the next one saves on."""
    draw, shared, before = random.Random(seed), mmap.mmap(-1, 16), 1
    save(model, folder, before)
    started = time.perf_counter()
    for _ in range(5):
        save(model, folder, before)
    once = (time.perf_counter() - started) / 5
    between = 0
    for case in range(count):
        shared[:] = struct.pack("qq", before, before)

        def saves(first: int = before + 1, aside: bool = bool(case % 2)) -> None:
            with moved_aside(aside):
                for value in range(first, first + 1000):
                    shared[:8] = struct.pack("q", value)
                    save(model, folder, value)
                    shared[8:] = struct.pack("q", value)

        child = forked(saves)
        time.sleep(draw.uniform(0.0, 4 * once))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        begun, returned = struct.unpack("qq", shared[:])
        before = found(folder)
        assert returned <= before <= begun, f"{before} is there, {returned} had been saved and {begun} was under way"
        between += begun > returned
    assert between or count < 100, "no kill fell inside a save"
    save(model, folder, before)
    assert alone(folder), f"{os.listdir(folder.parent)} is left"
    print(f"kill -9 at random moments: {count} saving processes, {between} of them inside a save")


def steps(model: nn.Module, folder: Path, every: int, aside: bool) -> None:
    """A save is killed before each call that it makes into C, and another gets ENOSPC from each system call."""
    replace = serialization.replace_folder

    def cut(number: int, act: Callable[[], None], names: set[str] | None) -> int:
        seen = 0

        def profile(frame: Any, event: str, called: Any) -> None:
            nonlocal seen
            if event == "c_call" and (names is None or called.__name__ in names):
                seen += 1
                if seen == number:
                    act()

        def watched(*args: Any) -> None:
            sys.setprofile(profile)
            try:
                replace(*args)
            finally:
                sys.setprofile(None)

        serialization.replace_folder = watched
        try:
            save(model, folder, 2)
        finally:
            serialization.replace_folder = replace
        return seen

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    killed = failed = 0
    with moved_aside(aside):
        save(model, folder, 1)
        calls, system_calls = cut(0, kill, None), cut(0, kill, SYSTEM_CALLS)
        for number in range(1, calls + 1, every):
            save(model, folder, 1)
            assert ended(forked(lambda number=number: cut(number, kill, None))) == -signal.SIGKILL
            assert found(folder) in (1, 2)
            killed += 1
        for number in range(1, system_calls + 1, every):
            save(model, folder, 1)
            try:
                cut(number, full, SYSTEM_CALLS)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                assert found(folder) == 2  # the old one could not be cleared away
            assert found(folder) in (1, 2)
            failed += 1
        save(model, folder, 3)
        assert found(folder) == 3 and alone(folder), f"{os.listdir(folder.parent)} is left"
    print(f"kill -9 at a step, {'moved aside' if aside else 'exchanged'}: {killed} of {calls} steps")
    print(f"ENOSPC from a call, {'moved aside' if aside else 'exchanged'}: {failed} of {system_calls} calls")


def short_files(model: nn.Module, folder: Path, count: int) -> None:
    """A process that may write files up to a size only (RLIMIT_FSIZE) saves."""
    save(model, folder, 1)
    largest = (folder / TENSORS_FILE).stat().st_size

    def saves(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save(model, folder, 2)
        except OSError as error:
            assert error.errno == errno.EFBIG
            return
        raise AssertionError("the file cannot have been written")

    for case in range(count):
        assert ended(forked(lambda case=case: saves(largest * case // count))) == 0
        assert found(folder) == 1 and alone(folder)
    print(f"files that are cut off by a limit: {count} saves")


def full_disk(model: nn.Module, mount: Path, kib: int) -> None:
    """The disk, a tmpfs of its own, is full but for some pages."""
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(mount)], capture_output=True, check=False
    )
    if done.returncode != 0:
        print("a full disk: not tried, this user may not mount a tmpfs")
        return
    try:
        folder, filler = mount / "in" / "adapter", mount / "filler"
        refused = taken = 0
        for free in range(0, kib // 2, 4):
            filler.unlink(missing_ok=True)
            save(model, folder, 1)
            space = os.statvfs(mount)
            with contextlib.suppress(OSError):
                filler.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - (free << 10))))
            try:
                save(model, folder, 2)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                assert found(folder) == 1
                refused += 1
            else:
                assert found(folder) == 2
                taken += 1
            assert alone(folder), f"{os.listdir(folder.parent)} is left"
        assert refused and taken, f"{refused} saves failed and {taken} did not"
        print(f"a full disk: {refused} saves that did not fit, {taken} that did")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def together(model: nn.Module, folder: Path, processes: int, saves: int) -> None:
    """Processes save to one folder at once, each its own adapter, while this one reads; half of them move aside."""
    save(model, folder, 100)

    def own(number: int) -> None:
        with moved_aside(number % 2 == 1):
            for _ in range(saves):
                save(model, folder, 100 + number)

    children = [forked(lambda number=number: own(number)) for number in range(1, processes + 1)]
    reads, seen = 0, set()
    while children:
        seen.add(found(folder))
        reads += 1
        for child in list(children):
            over, status = os.waitpid(child, os.WNOHANG)
            if over:
                assert status == 0, f"a saving process ended with {os.waitstatus_to_exitcode(status)}"
                children.remove(child)
    assert seen <= {100 + number for number in range(processes + 1)}, seen
    save(model, folder, 1)
    assert alone(folder), f"{os.listdir(folder.parent)} is left"
    print(f"{processes} processes at once: {processes * saves} saves, {reads} reads, {len(seen)} adapters seen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument(
        "--every", type=int, default=1, help="of the steps of a save every so many-th; 0: none, as with all of these"
    )
    parser.add_argument("--limits", type=int, default=100)
    parser.add_argument("--disk", type=int, default=1024, help="KiB of the tmpfs")
    parser.add_argument("--saves", type=int, default=300, help="of each of four processes at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = flora.adapt(base(), flora.TuckerConfig(rank=WIDTH, init="orthogonal"))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if args.kills:
            kills(model, root / "kills" / "adapter", args.kills, args.seed)
        for aside in (False, True) if args.every else ():
            steps(model, root / f"steps {aside}" / "adapter", args.every, aside)
        if args.limits:
            short_files(model, root / "limits" / "adapter", args.limits)
        if args.disk:
            full_disk(model, root / "disk", args.disk)
        if args.saves:
            together(model, root / "together" / "adapter", 4, args.saves)


if __name__ == "__main__":
    main()
