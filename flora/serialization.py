"""Adapter folders, flora's own and those of Hugging Face PEFT, and the files of FLoRA's authors.

A folder holds ``adapter_model.safetensors`` and ``adapter_config.json``; docs/format.md has every field. It is written
as a whole, and nothing that is wrong with it reaches a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from flora import authors, peft_files
from flora import base_dtype as half
from flora.config import DeltaConfig, TuckerConfig
from flora.deltas import Delta
from flora.distributed import check_not_flattened, mesh_of, model_class, on_first_rank, settle, whole
from flora.folders import inner_file, recover, replace_folder, settled
from flora.kinds import is_foreign
from flora.layers import check_adapter_name
from flora.model import Adapter, adapted_layers, check_adapter, check_model, disabled, install, saved_modules, state_of
from flora.targets import Configs, by_pattern, inside, places, select_named

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
FORMATS = ("flora", "peft", "peft-flora")

_CONFIG_BYTES = 64 << 20  # far above what the largest models need
_DIFFERENCES = 6  # quoted of two bases

_Model = TypeVar("_Model", bound=nn.Module)


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
class Fingerprint:
    """What an adapter's base was: its parameters and the buffers of its state_dict, without ``modules_to_save``."""

    model: str
    """Its class."""
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    hashes: dict[str, str] | None = None
    """SHA-256 of the values, if they were asked for."""


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
        return _method(self.config)

    def config_of(self, name: str) -> DeltaConfig:
        """The configuration of one layer's delta: that of its pattern, with the layer's own ranks."""
        entry = self.layers[name]
        own = self.config if isinstance(self.config, DeltaConfig) else self.config[entry.pattern]
        return own.for_module(name).with_ranks(entry.ranks)


# Saving ------------------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str | Sequence[str] = "default",
    *,
    hashes: bool = False,
    format: str = "flora",
) -> None:
    """Write an adapter to a folder, which is replaced as a whole: at every moment it is the old one or the new one.

    Of a sharded model (`torch.distributed.fsdp.fully_shard`) every process has to call this: the tensors are gathered,
    the first process of the mesh writes, all return when it has. Otherwise each process that calls it writes, one after
    another: under DistributedDataParallel one of them is enough.

    Args:
        model: may be merged: the adapter is written all the same.
        directory: does not exist, is empty or holds an adapter; nothing else is ever replaced. A model card beside the
            adapter, README.md, is kept.
        name: the adapter to write at ``directory`` itself, or a list of them, each written to ``directory/<name>``.
        hashes: also write a hash of every tensor of the base, so that loading checks the values, not only the shapes.
        format: "flora", or "peft" for a LoRA adapter that Hugging Face PEFT loads with the same outputs. Any delta that
            is a core and factors can be written so (`LoRAConfig`, `LoRAXSConfig`, `TuckerConfig`), but comes back as
            LoRA. "peft-flora" writes Tucker deltas as they are, for PEFT with `flora.integrations.peft`. PEFT's files
            say nothing of the base.

    Raises:
        ValueError: no such adapter, values that are not finite, or an adapter that the format cannot hold.
        RuntimeError: no adapters in the model, or it is in FullyShardedDataParallel, the older way of sharding.
        OSError: something else is there, or it cannot be written; where another process writes, RuntimeError.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMATS)}")
    if format != "flora" and hashes:
        raise ValueError("hashes=True: PEFT's format has no place for them")
    state = state_of(model)
    names = (name,) if isinstance(name, str) else tuple(dict.fromkeys(name))
    if not names:
        raise ValueError("name=() must name an adapter")
    for one in names:
        check_adapter(state, one)
        check_adapter_name(one)
    if "" in adapted_layers(model):
        raise ValueError("the model is a single layer; save its state_dict()")
    path = Path(os.path.realpath(directory))
    folders = {one: path if isinstance(name, str) else path / one for one in names}
    if not isinstance(name, str) and (path / CONFIG_FILE).exists():
        raise FileExistsError(f"{path} is an adapter folder itself, so {', '.join(names)} cannot be written into it")
    settle(model)
    check_not_flattened(model)
    mesh = mesh_of(model.parameters())
    if mesh is None:
        _check_folders(folders.values(), format)
    contents = {
        one: _contents(model, one, state.adapters[one], hashes)
        if format == "flora"
        else _peft_contents(model, one, format)
        for one in names
    }

    def write() -> None:
        cards = _check_folders(folders.values(), format)
        for one, folder in folders.items():
            replace_folder(folder, contents[one] | cards[folder])

    if mesh is None:
        write()
    else:
        on_first_rank(mesh, write)


def _check_folders(folders: Iterable[Path], format: str) -> dict[Path, dict[str, bytes]]:
    """Raises FileExistsError unless all may be replaced; what stays of each, which is its model card."""
    kept = {}
    for folder in folders:
        with settled(folder):
            check_replaceable(folder, format)
            card = folder / CARD_FILE
            kept[folder] = {CARD_FILE: card.read_bytes()} if card.is_file() else {}
    return kept


def _contents(model: nn.Module, name: str, adapter: Adapter, hashes: bool) -> dict[str, bytes]:
    layers = {where: layer for where, layer in adapted_layers(model).items() if name in layer.deltas}
    copies = {where: module.copies[name] for where, module in saved_modules(model).items() if name in module.copies}
    modules: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for where, layer in layers.items():
        delta = cast(Delta, layer.deltas[name])
        modules[where] = {
            "shape": list(delta.shape),
            "ranks": list(getattr(delta, "ranks", ())),
            "scale": float(delta.scale),
            "pattern": adapter.patterns.get(where, ""),
        }
        own = _gathered(delta.tensors())
        _check_finite(where, own)
        tensors.update({f"{where}.{key}": tensor for key, tensor in own.items()})
    for where, module in copies.items():
        own = _gathered(module.state_dict())
        _check_finite(where, {key: own[key] for key, _ in module.named_parameters()})
        tensors.update({f"{where}.{key}": tensor for key, tensor in own.items()})
    data = _safetensors(tensors)
    base = fingerprint(model, _every_name(model, copies), hashes=hashes)
    listed = {key: {"shape": list(shape), "dtype": base.dtypes[key]} for key, shape in base.shapes.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "method": _method(adapter.config),
        "config": _config_to_json(adapter.config),
        "modules": modules,
        "modules_to_save": list(copies),
        "base": {"class": base.model, "tensors": listed, "hashes": base.hashes},
        "tensors": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)},
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return {TENSORS_FILE: data, CONFIG_FILE: _short_lists(text).encode()}


def _peft_contents(model: nn.Module, name: str, format: str) -> dict[str, bytes]:
    config, tensors = peft_files.contents(model, name, as_lora=format == "peft")
    tensors = _gathered(tensors)
    _check_finite("the adapter", tensors)
    return {TENSORS_FILE: _safetensors(tensors), CONFIG_FILE: peft_files.to_json(config)}


def _gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: whole(tensor) for key, tensor in tensors.items()}


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    return safetensors.torch.save(copies, metadata={"format": "pt"})


def _short_lists(text: str) -> str:
    """Indented JSON with every list of plain values on one line; no string in it can hold a line break."""
    return re.sub(r"\[\n *([^\[\]{}]*)\n *\]", lambda match: "[" + re.sub(r"\n *", " ", match[1]) + "]", text)


def check_replaceable(folder: Path, format: str = "flora") -> None:
    """Raises FileExistsError, with what is there, unless `save_adapter` may write to the folder.

    It may if the folder does not exist, is empty or holds an adapter of the same format.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; an adapter needs a folder")
    there = sorted(os.listdir(folder))
    foreign = [entry for entry in there if entry not in (CONFIG_FILE, TENSORS_FILE, CARD_FILE)]
    if foreign:
        raise FileExistsError(f"{folder} holds {', '.join(foreign[:5])}; only an adapter folder is replaced")
    if there:
        try:
            if format == "flora":
                _read_manifest(folder)
            elif not _is_peft(_read_json(folder)[1]):
                raise ValueError(f"{folder / CONFIG_FILE} has no peft_type: it is not an adapter of PEFT's")
        except (OSError, ValueError) as error:
            raise FileExistsError(f"only an adapter folder is replaced: {error}") from error


def fingerprint(
    model: nn.Module,
    leave_out: Sequence[str] = (),
    *,
    hashes: bool = False,
    base_dtype: torch.dtype | None = None,
) -> Fingerprint:
    """The fingerprint of a model as it was before any adapter, without the modules of these names.

    With ``base_dtype`` it is that of the model after it was cast, which it is not.
    """
    tensors = dict(base_tensors(model, leave_out))
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    if base_dtype is not None:
        cast = {id(t): to for place in places(model) for _, t, to in half.cast_tensors(place.original, base_dtype)}
        dtypes |= {key: cast[id(tensor)] for key, tensor in tensors.items() if id(tensor) in cast}
    digests = None
    if hashes:
        with disabled(model) if adapted_layers(model) else nullcontext():
            digests = {
                key: _digest(key, half.narrowed(tensor, dtypes[key]) if tensor.dtype != dtypes[key] else tensor)
                for key, tensor in base_tensors(model, leave_out)
            }
    return Fingerprint(
        model_class(model).__name__,
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        {key: _dtype_name(tensors[key], dtype) for key, dtype in dtypes.items()},
        digests,
    )


def _dtype_name(tensor: Tensor, dtype: torch.dtype) -> str:
    """float32, or float32_Int8Tensor for one of a library's own type, whose numbers are others."""
    name = str(dtype).removeprefix("torch.")
    return f"{name}_{type(tensor).__name__}" if is_foreign(tensor) else name


def base_tensors(model: nn.Module, leave_out: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers of the state_dict as in the unadapted model, by all of their names."""
    heads = set(leave_out)
    for place in places(model):
        if inside(place.name, heads):
            continue
        module = place.original
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None:
                yield (f"{place.name}.{key}" if place.name else key), tensor


def _every_name(model: nn.Module, first_names: Mapping[str, nn.Module]) -> list[str]:
    """All the names of modules that are given by their first ones."""
    every = {place.name: place.original for place in places(model)}
    meant = {id(every[name]) for name in first_names}
    return [name for name, module in every.items() if id(module) in meant]


def _digest(key: str, tensor: Tensor) -> str:
    if tensor.is_meta:
        raise ValueError(f"{key} is on the meta device and has no values to hash")
    digest = hashlib.sha256()
    for part in _plain_parts(whole(tensor.detach())):
        digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, or those that one of a library's own type consists of."""
    if not is_foreign(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _plain_parts(getattr(tensor, name))


def _check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {key} holds values that are not finite")


def _method(config: Configs) -> str:
    return config.method if isinstance(config, DeltaConfig) else "mixed"


def _config_to_json(config: Configs) -> dict[str, Any]:
    if isinstance(config, DeltaConfig):
        return config.to_dict()
    return {pattern: own.to_dict() for pattern, own in config.items()}


# Reading a folder --------------------------------------------------------------------------------------------------


def read_adapter(directory: str | os.PathLike[str], name: str = "default") -> AdapterFile:
    """Read an adapter folder and check all that can be checked without a model.

    Args:
        directory: the folder, one of its two files, or a folder that holds it as ``directory/<name>``.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an adapter of this format, or damaged; the message names the file.
    """
    folder = _find_folder(Path(directory), name)
    file, manifest = _read_manifest(folder)
    config, layers, saved, base, digest, size = _parse_manifest(file, manifest)
    path = inner_file(folder, TENSORS_FILE)
    if path.stat().st_size != size:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, not the {size} of {CONFIG_FILE}: it was cut off or replaced"
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path} is not the file that {CONFIG_FILE} describes: their SHA-256 differ")
    tensors = parse_safetensors(path, data)
    for key in tensors:
        if not any(key.startswith(f"{where}.") for where in (*layers, *saved)):
            raise ValueError(f"{path}: {key!r} belongs to no module of {CONFIG_FILE}")
    return AdapterFile(folder, config, layers, saved, base, tensors)


def _find_folder(path: Path, name: str) -> Path:
    if path.name in (CONFIG_FILE, TENSORS_FILE) and path.is_file():
        path = path.parent
    inner = path / name
    recover(Path(os.path.realpath(path)))
    recover(Path(os.path.realpath(inner)))
    if not path.is_dir():
        raise FileNotFoundError(f"there is no adapter folder {path}")
    for folder in (path, inner):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise ValueError(f"{path} holds neither {CONFIG_FILE} nor {name}/{CONFIG_FILE}")


def _read_json(folder: Path) -> tuple[Path, Any]:
    file = inner_file(folder, CONFIG_FILE)
    if file.stat().st_size > _CONFIG_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, which no {CONFIG_FILE} has")
    try:
        return file, json.loads(file.read_bytes(), parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _is_peft(manifest: Any) -> bool:
    return isinstance(manifest, dict) and "peft_type" in manifest and "format_version" not in manifest


def _read_manifest(folder: Path) -> tuple[Path, dict[str, Any]]:
    file, manifest = _read_json(folder)
    if _is_peft(manifest):
        raise ValueError(f"{file} has no format_version: it is an adapter of PEFT's, not one of flora's")
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise ValueError(f"{file} has no format_version: it is not an adapter of flora's")
    version = manifest["format_version"]
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(f"{file}: format_version={version!r} is not the {FORMAT_VERSION} that this version reads")
    return file, manifest


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


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
        if type(value) not in (int, float) or not math.isfinite(value):
            self.fail(f"{where}={value!r} must be a finite number")
        return float(value)


def _parse_manifest(
    file: Path, manifest: dict[str, Any]
) -> tuple[Configs, dict[str, LayerEntry], tuple[str, ...], Fingerprint, str, int]:
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
    if manifest["method"] != _method(config):
        read.fail(f"method={manifest['method']!r} is not that of the config, {_method(config)!r}")
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
    return config, layers, tuple(dict.fromkeys(saved)), fingerprinted, digest, size


def parse_safetensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # safetensors raises its own type, and others from torch
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


# Loading -----------------------------------------------------------------------------------------------------------


def load_adapter(
    model: _Model,
    path: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = True,
    config: TuckerConfig | None = None,
    *,
    base_dtype: torch.dtype | None = None,
) -> _Model:
    """Put a saved adapter on a model, in place; outputs are then those of the model it was saved from, bit for bit.

    On a model that has adapters already it is added, as by `flora.adapt`, and waits for `flora.set_adapter`.

    Args:
        path: a folder of `save_adapter`, or of PEFT's ``save_pretrained`` for LoRA, which becomes a `LoRAConfig`;
            ``path/<name>`` if ``path`` itself holds no adapter; or a file of FLoRA's authors (.safetensors, .pt, .pth
            or .bin) with keys ``<module>.param_G``, ``<module>.param_0``, …
        name: the adapter's name in this model.
        trainable: False freezes everything and sets the model to evaluation mode.
        config: only for a file of the authors, and needed there, since it holds no scale: `TuckerConfig(scale=…)`.
            The ranks are the file's.
        base_dtype: as of `flora.adapt`; what the adapter was trained with has to be given again, since a file does not
            change a base by itself.

    Returns:
        The model itself.

    Raises:
        FileNotFoundError: no such path.
        ValueError: a damaged or foreign file, an adapter of another base, a module that is not there, or a delta that
            is to learn and never could: the message names the file and the module. The model is as it was.
        RuntimeError: the model is merged, sharded or wrapped (DistributedDataParallel, ``torch.compile``).

    Warns:
        UserWarning: the base's tensors have other dtypes than those that the adapter was trained on.
    """
    check_model(model)
    check_adapter_name(name)
    if base_dtype is not None:
        half.check_base_dtype(base_dtype)
    location = Path(path)
    own_file = location.name in (CONFIG_FILE, TENSORS_FILE) and (location.parent / CONFIG_FILE).is_file()
    if location.is_file() and not own_file:
        _load_authors(model, location, name, trainable, config, base_dtype)
    elif config is not None:
        raise ValueError(f"config={config!r} is for a file of FLoRA's authors; {location} has its own")
    else:
        folder = _find_folder(location, name)
        file, manifest = _read_json(folder)
        if _is_peft(manifest):
            _load_peft(model, file, manifest, name, trainable, base_dtype)
        else:
            _load_folder(model, read_adapter(folder), name, trainable, base_dtype)
    if not trainable:
        model.eval()
    return model


def _load_folder(
    model: nn.Module, file: AdapterFile, name: str, trainable: bool, base_dtype: torch.dtype | None
) -> None:
    where = file.path / CONFIG_FILE
    try:
        layers = {key: (file.config_of(key), entry.pattern) for key, entry in file.layers.items()}
        differing = _compare_bases(model, file, base_dtype)
        selection = select_named(model, layers, file.saved)
        for target in selection.layers:
            assert target.config is not None
            shape, entry = target.shape(target.config), file.layers[target.name]
            if shape != entry.shape:
                raise ValueError(f"{target.name}: its weight is {shape}, the adapter is for {entry.shape}")
        fill = filler(file.tensors, {key: entry.scale for key, entry in file.layers.items()})
        install(model, name, file.config, selection, trainable=trainable, fill=fill, base_dtype=base_dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if differing:
        warnings.warn(f"{where}: the adapter was trained on a base of other dtypes: {differing}", stacklevel=3)


def filler(
    tensors: Mapping[str, Tensor], scales: Mapping[str, float]
) -> Callable[[Mapping[str, Delta], Mapping[str, nn.Module]], None]:
    """The function that copies tensors into deltas and copies of modules, after all of them were checked."""

    def fill(deltas: Mapping[str, Delta], copies: Mapping[str, nn.Module]) -> None:
        expected = {
            f"{where}.{key}": (where, own) for where, delta in deltas.items() for key, own in delta.tensors().items()
        }
        for where, module in copies.items():
            expected.update({f"{where}.{key}": (where, own) for key, own in module.state_dict().items()})
        unknown = sorted(tensors.keys() - expected.keys())
        if unknown:
            raise ValueError(f"the tensor {unknown[0]!r} belongs to nothing in the model")
        for key, (where, own) in expected.items():
            if key not in tensors:
                raise ValueError(f"{where}: the tensor {key!r} is missing")
            given = tensors[key]
            if given.shape != own.shape:
                raise ValueError(f"{where}: {key!r} is {tuple(given.shape)}, the model needs {tuple(own.shape)}")
            if given.is_floating_point() != own.is_floating_point() or given.is_complex() != own.is_complex():
                raise ValueError(f"{where}: {key!r} is of {given.dtype}, the model needs {own.dtype}")
        for where, part in (*deltas.items(), *copies.items()):
            _check_finite(where, {key: tensors[f"{where}.{key}"] for key, _ in part.named_parameters()})
        for where, delta in deltas.items():
            delta.load_tensors({key: tensors[f"{where}.{key}"] for key in delta.tensors()})
            delta.scale = scales[where]
        for where, module in copies.items():
            module.load_state_dict({key: tensors[f"{where}.{key}"] for key in module.state_dict()})

    return fill


def _compare_bases(model: nn.Module, file: AdapterFile, base_dtype: torch.dtype | None) -> str:
    """Raises ValueError if the bases differ in names, shapes or, where the file has them, hashes.

    Returns:
        Differences of dtypes, to be reported; "" if there are none.
    """
    there, known = file.base, {place.name for place in places(model)}
    saved = _every_name(model, {name: model for name in file.saved if name in known})
    here = fingerprint(model, saved, base_dtype=base_dtype)
    differences = [f"{key!r} is missing in this model" for key in there.shapes if key not in here.shapes]
    differences += [f"{key!r} is only in this model" for key in here.shapes if key not in there.shapes]
    differences += [
        f"{key!r} is {shape} in this model, {there.shapes[key]} in the adapter's"
        for key, shape in here.shapes.items()
        if key in there.shapes and shape != there.shapes[key]
    ]
    if differences:
        raise ValueError(f"the adapter is for another base ({there.model}): {_quoted(differences)}")
    # A base is the same one whether it is cast or not; where values are compared, it is in the adapter's dtypes.
    dtypes = {
        dtype: fingerprint(model, saved, base_dtype=dtype).dtypes for dtype in (base_dtype, None, *half.BASE_DTYPES)
    }
    trained = next((dtype for dtype, names in dtypes.items() if names == there.dtypes), base_dtype)
    if there.hashes is not None:
        hashes, digests = there.hashes, fingerprint(model, saved, hashes=True, base_dtype=trained).hashes or {}
        differences = [f"{key!r} has other values" for key, digest in digests.items() if digest != hashes[key]]
    if differences:
        raise ValueError(f"the adapter is for another base ({there.model}): {_quoted(differences)}")
    differences = [
        f"{key!r} is {dtype} in this model, {there.dtypes[key]} in the adapter's"
        for key, dtype in here.dtypes.items()
        if dtype != there.dtypes[key]
    ]
    advice = f"; it was trained with base_dtype={trained}" if differences and trained not in (None, base_dtype) else ""
    return _quoted(differences) + advice


def _quoted(differences: Sequence[str]) -> str:
    rest = len(differences) - _DIFFERENCES
    return "; ".join(differences[:_DIFFERENCES]) + (f"; and {rest} more" if rest > 0 else "")


def _load_peft(
    model: nn.Module, file: Path, manifest: Any, name: str, trainable: bool, base_dtype: torch.dtype | None
) -> None:
    if (file.parent / TENSORS_FILE).exists():
        path = inner_file(file.parent, TENSORS_FILE)
        tensors = parse_safetensors(path, path.read_bytes())
    else:
        path = inner_file(file.parent, peft_files.OLD_TENSORS_FILE)
        tensors = authors.read_torch(path)
    try:
        modules = {place.name: place.original for place in places(model)}
        found = peft_files.translate(manifest, tensors, modules, dict(base_tensors(model)))
        selection = select_named(model, found.layers, found.saved)
        fill = filler(found.tensors, {where: own.resolved_scale for where, (own, _) in found.layers.items()})
        install(model, name, found.config, selection, trainable=trainable, fill=fill, base_dtype=base_dtype)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _load_authors(
    model: nn.Module,
    path: Path,
    name: str,
    trainable: bool,
    config: TuckerConfig | None,
    base_dtype: torch.dtype | None,
) -> None:
    tensors = parse_safetensors(path, path.read_bytes()) if path.suffix == ".safetensors" else authors.read_torch(path)
    if not isinstance(config, TuckerConfig) or (config.scale is None and not config.scale_pattern):
        given = f"scale={config.scale}" if isinstance(config, TuckerConfig) else repr(config)
        raise ValueError(f"{path} holds no scale: give config=TuckerConfig(scale=…), not {given}")
    try:
        found = authors.translate(
            tensors, config, {p.name: p.original for p in places(model)}, dict(base_tensors(model))
        )
        layers = {where: (own, "") for where, own in found.configs.items()}
        selection = select_named(model, layers, found.saved)
        scales = {where: own.resolved_scale for where, own in found.configs.items()}
        kept = replace(config, target_modules=tuple(layers), exclude_modules=None)
        fill = filler(found.tensors, scales)
        install(model, name, kept, selection, trainable=trainable, fill=fill, base_dtype=base_dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
