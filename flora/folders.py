"""Folders that are replaced as a whole."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def replace_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Make a folder hold exactly these files. At every moment it is the old one or the new one, whole.

    It is written aside in the same parent and synced to the disk. Then the two are exchanged in one step, where the
    system has one; else the old one is moved aside first, and `recover` puts it back if that is cut off. Processes that
    replace the same folder at once do so one after another, on file systems that know locks.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.flora-new")
    try:
        new.mkdir()
        for name, data in contents.items():
            with open(new / name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(new)
        with _alone(folder.parent):
            _put_in_place(new, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # after an exchange it holds the old adapter


def replace_file(path: Path, data: bytes) -> None:
    """Make a file hold exactly this. At every moment it is the old one or the new one, whole."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.flora-new")
    try:
        new.write_bytes(data)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _put_in_place(new: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        old = _moved_aside(folder)
        shutil.rmtree(old, ignore_errors=True)  # of a save that was cut off after its last rename
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            os.rename(old, folder)
            raise
        _sync(folder.parent)
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _moved_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.flora-old")


def recover(folder: Path) -> None:
    """Put an adapter back that a save had moved aside when it was cut off."""
    if not folder.exists() and _moved_aside(folder).is_dir():
        with settled(folder):
            pass


@contextmanager
def settled(folder: Path) -> Iterator[None]:
    """Within it the folder is whole, as after `recover`, and no other process replaces it."""
    if not folder.parent.is_dir():
        yield
        return
    with _alone(folder.parent):
        old = _moved_aside(folder)
        if not folder.exists() and old.is_dir():  # and no save of another process is between its two renames
            os.rename(old, folder)
        yield


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Within it no other process that asks for the same is at work in a folder, if its file system knows locks."""
    handle = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def inner_file(folder: Path, name: str) -> Path:
    """A file of a folder. ValueError if it is missing, no plain file, or a link to another place."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if Path(os.path.realpath(path)).parent != Path(os.path.realpath(folder)):
        raise ValueError(f"{path} is a link out of its folder")
    return path
