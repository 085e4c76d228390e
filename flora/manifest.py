"""What the files of an adapter folder say, checked as far as it can be without a model (docs/format.md)."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from torch import Tensor

from flora.config import DeltaConfig
from flora.fingerprint import Fingerprint
from flora.folders import opened
from flora.targets import Configs, by_pattern, inside
from flora.tensor_files import Tensors, parse_json, parse_safetensors, safetensors_shapes

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
OLD_TENSORS_FILE = "adapter_model.bin"
"""Of PEFT's folders."""
CARD_FILE = "README.md"


@dataclass(frozen=True)
class LayerEntry:
    """What a file says of one adapted layer."""

    shape: tuple[int, ...]
    """Of its weight, (out, in / groups, k…), or of its block's matrix."""
    ranks: tuple[int, ...]
    """Of every mode; empty for a delta that has none."""
    scale: float
    pattern: str = ""
    """The pattern of the mapping that it matched; "" if one configuration serves all."""


@dataclass(frozen=True)
class AdapterFile:
    """The contents of an adapter folder."""

    path: Path
    config: Configs
    layers: dict[str, LayerEntry]
    saved: tuple[str, ...]
    """The modules that were trained whole."""
    base: Fingerprint
    tensors: dict[str, Tensor]
    """By name: the module's, a dot, and the tensor's in its delta or in the module that was trained whole."""

    @property
    def method(self) -> str:
        """The config's method, or "mixed" for a mapping of patterns."""
        return method_of(self.config)

    def config_of(self, name: str) -> DeltaConfig:
        """The configuration of one layer's delta: that of its pattern, with the layer's own ranks."""
        entry = self.layers[name]
        own = self.config if isinstance(self.config, DeltaConfig) else self.config[entry.pattern]
        return own.for_module(name).with_ranks(entry.ranks)


# Reading a folder --------------------------------------------------------------------------------------------------


def read_adapter(directory: str | os.PathLike[str], name: str = "default") -> AdapterFile:
    """Read an adapter folder and check all that can be checked without a model.

    Args:
        directory: the folder, one of its two files, or a folder that holds it as ``directory/<name>``.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an adapter of this format, or damaged; the message names the file.
    """
    with open_folder(Path(directory), name) as folder:
        file, tensors = parse(folder)
        return replace(file, tensors=dict(tensors.read()))


@dataclass(frozen=True)
class OpenFolder:
    """The files of a folder, which stay the same ones whatever becomes of it meanwhile."""

    path: Path
    files: Mapping[str, BinaryIO]

    def size(self, name: str) -> int:
        """In bytes; ValueError if the folder has no such file."""
        if name not in self.files:
            raise ValueError(f"{self.path / name} is missing")
        return os.fstat(self.files[name].fileno()).st_size

    def data(self, name: str) -> bytes:
        """The contents of a file; ValueError if the folder has no such file."""
        size = self.size(name)
        self.files[name].seek(0)
        return self.files[name].read(size)

    def config(self) -> Any:
        """What is in the JSON file; ValueError, naming it, if it is none."""
        size = self.size(CONFIG_FILE)
        self.files[CONFIG_FILE].seek(0)
        return parse_json(self.path / CONFIG_FILE, self.files[CONFIG_FILE], size)


@contextmanager
def open_folder(path: Path, name: str) -> Iterator[OpenFolder]:
    """The adapter folder, flora's own or PEFT's, that a path and an adapter's name mean: the path or a folder in it."""
    if path.name in (CONFIG_FILE, TENSORS_FILE) and path.is_file():
        path = path.parent
    with ExitStack() as stack:
        for folder in (path, path / name):
            try:
                real = Path(os.path.realpath(folder))
                files = stack.enter_context(opened(real, (CONFIG_FILE, TENSORS_FILE, OLD_TENSORS_FILE)))
            except (FileNotFoundError, NotADirectoryError):
                continue
            if CONFIG_FILE in files:
                yield OpenFolder(folder, files)
                return
        if not path.is_dir():
            raise FileNotFoundError(f"there is no adapter folder {path}")
        raise ValueError(f"{path} holds neither {CONFIG_FILE} nor {name}/{CONFIG_FILE}")


def is_peft(config: Any) -> bool:
    """Whether a parsed JSON file is PEFT's."""
    return isinstance(config, dict) and "peft_type" in config and "format_version" not in config


def check_version(file: Path, manifest: Any) -> None:
    """Raises ValueError, naming the file, for the JSON of anything but an adapter of flora's in this format."""
    if is_peft(manifest):
        raise ValueError(f"{file} has no format_version: it is an adapter of PEFT's, not one of flora's")
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise ValueError(f"{file} has no format_version: it is not an adapter of flora's")
    version = manifest["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{file}: format_version={version!r} is not the {FORMAT_VERSION} that this version reads")


def parse(folder: OpenFolder) -> tuple[AdapterFile, Tensors]:
    """What an open folder says: without its tensors, and these, of which only the shapes have been read."""
    file, path = folder.path / CONFIG_FILE, folder.path / TENSORS_FILE
    manifest = folder.config()
    check_version(file, manifest)
    adapter, digest, size = _parse_manifest(folder.path, manifest)
    if folder.size(TENSORS_FILE) != size:
        raise ValueError(
            f"{path} has {folder.size(TENSORS_FILE)} bytes, not the {size} of {CONFIG_FILE}: it was cut off or replaced"
        )
    shapes = safetensors_shapes(path, folder.files[TENSORS_FILE], size)
    known = {*adapter.layers, *adapter.saved}
    for key in shapes:
        if not inside(key.rpartition(".")[0], known):
            raise ValueError(f"{path}: {key!r} belongs to no module of {CONFIG_FILE}")

    def read() -> dict[str, Tensor]:
        data = folder.data(TENSORS_FILE)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{path} is not the file that {CONFIG_FILE} describes: their SHA-256 differ")
        return parse_safetensors(path, data)

    return adapter, Tensors(shapes, read)


class _Reader:
    """Takes typed values out of a parsed JSON file; every error names the file and the place in it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def fail(self, message: str) -> NoReturn:
        raise ValueError(f"{self.file}: {message}")

    def table(self, value: Any, where: str, keys: Sequence[str] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"{where}={value!r} must be an object")
        if keys is not None and set(value) != set(keys):
            missing, unknown = sorted(set(keys) - set(value)), sorted(set(value) - set(keys))
            self.fail(f"{where} lacks {missing} and has the unknown {unknown}")
        return value

    def text(self, value: Any, where: str, pattern: str = r"[\s\S]*") -> str:
        if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
            self.fail(f"{where}={value!r} is not what belongs there")
        return value

    def extents(self, value: Any, where: str, least: int) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(item) is int and item >= least for item in value):
            self.fail(f"{where}={value!r} must be a list of whole numbers")
        return tuple(value)

    def number(self, value: Any, where: str) -> float:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            self.fail(f"{where}={value!r} must be a finite number")
        return float(value)


def _parse_manifest(folder: Path, manifest: dict[str, Any]) -> tuple[AdapterFile, str, int]:
    """The adapter without its tensors, their file's SHA-256 and its bytes."""
    file = folder / CONFIG_FILE
    read = _Reader(file)
    sections = ("format_version", "method", "config", "modules", "modules_to_save", "base", "tensors")
    read.table(manifest, "the file", sections)
    try:
        config: Configs
        if manifest["method"] == "mixed":
            of_pattern = read.table(manifest["config"], "config")
            config = by_pattern({pattern: DeltaConfig.from_dict(own) for pattern, own in of_pattern.items()})
        else:
            config = DeltaConfig.from_dict(manifest["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: config: {error}") from error
    if manifest["method"] != method_of(config):
        read.fail(f"method={manifest['method']!r} is not that of the config, {method_of(config)!r}")
    layers = {}
    for name, value in read.table(manifest["modules"], "modules").items():
        entry = read.table(value, f"modules[{name!r}]", ("shape", "ranks", "scale", "pattern"))
        pattern = read.text(entry["pattern"], f"{name}: pattern")
        if (pattern not in config) if isinstance(config, Mapping) else pattern:
            read.fail(f"{name}: pattern={pattern!r} is not one of the config's")
        layers[name] = LayerEntry(
            read.extents(entry["shape"], f"{name}: shape", 1),
            read.extents(entry["ranks"], f"{name}: ranks", 1),
            read.number(entry["scale"], f"{name}: scale"),
            pattern,
        )
    if not layers:
        read.fail("modules={} names no module")
    saved = manifest["modules_to_save"]
    if not isinstance(saved, list) or not all(isinstance(item, str) and item for item in saved) or "" in layers:
        read.fail(f"modules_to_save={saved!r} and modules must name modules")
    base = read.table(manifest["base"], "base", ("class", "tensors", "hashes"))
    shapes, dtypes = {}, {}
    for key, value in read.table(base["tensors"], "base: tensors").items():
        entry = read.table(value, f"base: {key}", ("shape", "dtype"))
        shapes[key] = read.extents(entry["shape"], f"base: {key}: shape", 0)
        dtypes[key] = read.text(entry["dtype"], f"base: {key}: dtype", r"\w+")
    hashes = base["hashes"]
    if hashes is not None:
        for key, value in read.table(hashes, "base: hashes", list(shapes)).items():
            read.text(value, f"base: hashes: {key}", "[0-9a-f]{64}")
    tensors = read.table(manifest["tensors"], "tensors", ("sha256", "bytes"))
    digest = read.text(tensors["sha256"], "tensors: sha256", "[0-9a-f]{64}")
    (size,) = read.extents([tensors["bytes"]], "tensors: bytes", 0)
    fingerprinted = Fingerprint(read.text(base["class"], "base: class"), shapes, dtypes, hashes)
    return AdapterFile(folder, config, layers, tuple(dict.fromkeys(saved)), fingerprinted, {}), digest, size


def method_of(config: Configs) -> str:
    """The config's method, or "mixed" for a mapping of patterns."""
    return config.method if isinstance(config, DeltaConfig) else "mixed"
