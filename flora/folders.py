"""Folders that are replaced as a whole, and read as a whole while others replace them."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

_ASIDE = re.compile(r"\..+\.[0-9a-f]{8}\.flora-new", re.DOTALL)
_TRIES = 1000  # to open a folder that others replace all the time


# Writing -----------------------------------------------------------------------------------------------------------


def replace_folder(
    folder: Path, contents: Mapping[str, bytes], kept: Callable[[Path], Mapping[str, bytes]] = lambda folder: {}
) -> None:
    """Make a folder hold exactly these files. At every moment it is the old one or the new one, whole.

    It is written aside in the same parent and synced to the disk. Then the two are exchanged in one step, where the
    system has one; else the old one is moved aside first, and `recover` puts it back if that is cut off. Processes that
    replace the same folder at once do so one after another, on file systems that know locks; what a process that was
    killed has left aside is removed.

    The folder keeps its mode and its group; its files get what the umask gives.

    ``kept`` is asked, while no other process replaces the folder, what the new one shall hold of it besides; it may
    raise, and nothing is replaced then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = _aside(folder)
    with ExitStack() as claim:
        with _alone(folder.parent):
            _put_back(folder)
            _sweep(folder)
            new.mkdir()
            claim.enter_context(_claimed(new))
            if folder.exists():
                new.chmod(stat.S_IRWXU)  # nobody else reads in it what may be private
        try:
            _write(new, contents)
            with _alone(folder.parent):
                _put_back(folder)
                _write(new, kept(folder))
                if folder.exists():
                    _take_mode(new, folder)
                _sync(new)
                _put_in_place(new, folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)  # after an exchange it holds the old adapter


def replace_file(path: Path, data: bytes) -> None:
    """Make a file hold exactly this. At every moment it is the old one or the new one, whole."""
    new = _aside(path)
    try:
        _write(path.parent, {new.name: data})
        os.replace(new, path)
        _sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """A new name beside a folder or file, for what is to take its place."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.flora-new")


def is_aside(name: str) -> bool:
    """Whether a name is one that this file gives to what is not in its place yet."""
    return _ASIDE.fullmatch(name) is not None


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, data in contents.items():
        with open(folder / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _take_mode(new: Path, folder: Path) -> None:
    """Give a folder the mode and the group of another; a group that this user may not give loses its rights."""
    old = folder.stat()
    mode = stat.S_IMODE(old.st_mode)
    if new.stat().st_gid != old.st_gid:
        try:
            os.chown(new, -1, old.st_gid)
        except PermissionError:
            mode &= ~stat.S_IRWXG
    new.chmod(mode)


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


def _sync(directory: Path) -> None:
    if sys.platform == "win32":  # where no folder can be opened
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# What was cut off --------------------------------------------------------------------------------------------------


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
        _put_back(folder)
        yield


def _put_back(folder: Path) -> None:
    """What `recover` does, where no save of another process can be between its two renames."""
    old = _moved_aside(folder)
    if not folder.exists() and old.is_dir():
        os.rename(old, folder)


def _sweep(folder: Path) -> None:
    """Remove what saves of this folder have left aside and no process that lives is at work on."""
    if folder.exists():
        shutil.rmtree(_moved_aside(folder), ignore_errors=True)
    if sys.platform == "win32":
        return
    for entry in list(os.scandir(folder.parent)):
        if not is_aside(entry.name) or entry.name[1:].rpartition(".flora-new")[0][:-9] != folder.name:
            continue
        with suppress(OSError):  # held by a process, no folder, or no locks here
            handle = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path, ignore_errors=True)
            finally:
                os.close(handle)


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Within it no other process that asks for the same is at work in a folder, if its file system knows locks."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


_claimed = _alone
"""Within it `_sweep` leaves a folder alone."""


# Reading -----------------------------------------------------------------------------------------------------------


@contextmanager
def opened(folder: Path, names: Sequence[str]) -> Iterator[dict[str, BinaryIO]]:
    """Those files of a folder that are there, all of one and the same folder even if it is replaced meanwhile.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: a link, or anything else that is no plain file.
    """
    with ExitStack() as stack:
        for _ in range(_TRIES):
            recover(folder)
            with suppress(FileNotFoundError), ExitStack() as attempt:
                files = _open_there(folder, names, attempt)
                if files is not None:
                    stack.push(attempt.pop_all())
                    break
            if not folder.exists() and not _moved_aside(folder).exists():
                raise FileNotFoundError(errno.ENOENT, "there is no folder", str(folder))
        else:
            raise OSError(errno.EBUSY, "the folder is replaced all the time", str(folder))
        yield files


def _open_there(folder: Path, names: Sequence[str], stack: ExitStack) -> dict[str, BinaryIO] | None:
    """The files; None if one is missing in a folder that is no longer in its place, which is then being removed."""
    if sys.platform == "win32":
        return {name: stack.enter_context(_plain(folder / name)) for name in names if (folder / name).exists()}
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, handle)
    files = {}
    for name in names:
        with suppress(FileNotFoundError):
            files[name] = stack.enter_context(_plain(folder / name, handle))
    if len(files) < len(names) and not os.path.samestat(os.fstat(handle), os.stat(folder)):
        return None
    return files


def _plain(path: Path, folder: int | None = None) -> BinaryIO:
    """A file, opened for reading. ValueError if it is a link, a folder, a pipe or a device."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link; the files of an adapter have to be in its folder")
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path if folder is None else path.name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link since then, a socket
            raise ValueError(f"{path} is no plain file") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is no plain file")
    return os.fdopen(handle, "rb")
