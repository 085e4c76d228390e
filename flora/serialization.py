"""Adapter folders, flora's own and those of Hugging Face PEFT, and the files of FLoRA's authors.

A folder holds ``adapter_model.safetensors`` and ``adapter_config.json``; docs/format.md has every field. It is written
as a whole, and nothing that is wrong with it reaches a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from flora import authors, peft_files
from flora import base_dtype as half
from flora.config import DeltaConfig, TuckerConfig
from flora.deltas import Delta
from flora.distributed import check_not_flattened, mesh_of, on_first_rank, settle, whole
from flora.filling import Filler, check_finite
from flora.fingerprint import base_tensors, compare, every_name, fingerprint
from flora.folders import is_aside, opened, replace_folder, settled
from flora.layers import check_adapter_name
from flora.manifest import (
    CARD_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    OLD_TENSORS_FILE,
    TENSORS_FILE,
    AdapterFile,
    OpenFolder,
    check_version,
    is_peft,
    method_of,
    open_folder,
    parse,
    read_adapter,
)
from flora.model import check_model, install
from flora.state import Adapter, adapted_layers, check_adapter, saved_modules, state_of
from flora.targets import Configs, places, select_named
from flora.tensor_files import MOST_TEXT, Tensors, parse_safetensors, read_torch

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "TENSORS_FILE",
    "check_replaceable",
    "fingerprint",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]

FORMATS = ("flora", "peft", "peft-flora")
_LARGEST_CARD = 64 << 20  # bytes

_Model = TypeVar("_Model", bound=nn.Module)


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
            adapter, README.md, is kept, and so are the folder's mode and group; files get what the umask gives.
        name: the adapter to write at ``directory`` itself, or a list of them, each written to ``directory/<name>``.
        hashes: also write a hash of every tensor of the base, so that loading checks the values, not only the shapes.
        format: "flora", or "peft" for a LoRA adapter that Hugging Face PEFT loads with the same outputs. Any delta that
            is a core and factors can be written so (`LoRAConfig`, `LoRAXSConfig`, `TuckerConfig`), but comes back as
            LoRA. "peft-flora" writes Tucker deltas as they are, for PEFT with `flora.integrations.peft`. PEFT's files
            say nothing of the base.

    Raises:
        ValueError: no such adapter, values that are not finite, an adapter that the format cannot hold or that has so
            many layers that it could not be read, or the folder is the current directory, which cannot be replaced.
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

    def kept(folder: Path) -> dict[str, bytes]:
        check_replaceable(folder, format)
        return _card(folder)

    def write() -> None:
        _check_folders(folders.values(), format)
        for one, folder in folders.items():
            replace_folder(folder, contents[one], kept)

    if mesh is None:
        write()
    else:
        on_first_rank(mesh, write)


def _check_folders(folders: Iterable[Path], format: str) -> None:
    """Raises FileExistsError unless all may be replaced."""
    for folder in folders:
        with settled(folder):
            check_replaceable(folder, format)


def _card(folder: Path) -> dict[str, bytes]:
    """The model card beside an adapter, which stays when that is replaced."""
    if not folder.is_dir():
        return {}
    with opened(folder, (CARD_FILE,)) as files:
        return {name: file.read() for name, file in files.items()}


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
        check_finite(where, own)
        tensors.update({f"{where}.{key}": tensor for key, tensor in own.items()})
    for where, module in copies.items():
        own = _gathered(module.state_dict())
        check_finite(where, {key: own[key] for key, _ in module.named_parameters()})
        tensors.update({f"{where}.{key}": tensor for key, tensor in own.items()})
    data = _safetensors(tensors)
    base = fingerprint(model, every_name(model, copies), hashes=hashes)
    listed = {key: {"shape": list(shape), "dtype": base.dtypes[key]} for key, shape in base.shapes.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "method": method_of(adapter.config),
        "config": _config_to_json(adapter.config),
        "modules": modules,
        "modules_to_save": list(copies),
        "base": {"class": base.model, "tensors": listed, "hashes": base.hashes},
        "tensors": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)},
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    config = _short_lists(text).encode()
    longest = max(len(config), int.from_bytes(data[:8], "little"))
    if longest > MOST_TEXT:
        raise ValueError(f"{name}: {len(layers)} layers take {longest} bytes of JSON, {MOST_TEXT} can be read again")
    return {TENSORS_FILE: data, CONFIG_FILE: config}


def _peft_contents(model: nn.Module, name: str, format: str) -> dict[str, bytes]:
    config, tensors = peft_files.contents(model, name, as_lora=format == "peft")
    tensors = _gathered(tensors)
    check_finite("the adapter", tensors)
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

    It may if the folder does not exist, is empty or holds an adapter of the same format. ValueError if it is the
    current directory.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; an adapter needs a folder")
    if folder.samefile("."):  # which would be left behind, removed
        raise ValueError(f"{folder} is the current directory, which cannot be replaced: leave it, or save elsewhere")
    with os.scandir(folder) as entries:
        there = {entry.name: entry for entry in entries if not is_aside(entry.name)}
    foreign = sorted(there.keys() - {CONFIG_FILE, TENSORS_FILE, CARD_FILE})
    if foreign:
        raise FileExistsError(f"{folder} holds {', '.join(foreign[:5])}; only an adapter folder is replaced")
    for name, entry in there.items():
        if not entry.is_file(follow_symlinks=False):
            raise FileExistsError(f"{folder / name} is no plain file; only an adapter folder is replaced")
        if name == CARD_FILE and entry.stat().st_size > _LARGEST_CARD:
            raise FileExistsError(f"{folder / name} has {entry.stat().st_size} bytes, which no model card has")
    if there:
        try:
            with opened(folder, (CONFIG_FILE,)) as files:
                config = OpenFolder(folder, files).config()
            if format == "flora":
                check_version(folder / CONFIG_FILE, config)
            elif not is_peft(config):
                raise ValueError(f"{folder / CONFIG_FILE} has no peft_type: it is not an adapter of PEFT's")
        except ValueError as error:
            raise FileExistsError(f"only an adapter folder is replaced: {error}") from error


def _config_to_json(config: Configs) -> dict[str, Any]:
    if isinstance(config, DeltaConfig):
        return config.to_dict()
    return {pattern: own.to_dict() for pattern, own in config.items()}


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
        with open_folder(location, name) as folder:
            config_of_file = folder.config()
            if is_peft(config_of_file):
                _load_peft(model, folder, config_of_file, name, trainable, base_dtype)
            else:
                _load_folder(model, *parse(folder), name, trainable, base_dtype)
    if not trainable:
        model.eval()
    return model


def _load_folder(
    model: nn.Module, file: AdapterFile, tensors: Tensors, name: str, trainable: bool, base_dtype: torch.dtype | None
) -> None:
    where = file.path / CONFIG_FILE
    try:
        layers = {key: (file.config_of(key), entry.pattern) for key, entry in file.layers.items()}
        differing = compare(model, file.saved, file.base, base_dtype)
        selection = select_named(model, layers, file.saved)
        for target in selection.layers:
            assert target.config is not None
            shape, entry = target.shape(target.config), file.layers[target.name]
            if shape != entry.shape:
                raise ValueError(f"{target.name}: its weight is {shape}, the adapter is for {entry.shape}")
        fill = Filler(tensors, {key: entry.scale for key, entry in file.layers.items()})
        install(model, name, file.config, selection, trainable=trainable, fill=fill, base_dtype=base_dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if differing:
        warnings.warn(f"{where}: the adapter was trained on a base of other dtypes: {differing}", stacklevel=3)


def _load_peft(
    model: nn.Module, folder: OpenFolder, config: Any, name: str, trainable: bool, base_dtype: torch.dtype | None
) -> None:
    if TENSORS_FILE in folder.files or OLD_TENSORS_FILE not in folder.files:
        tensors = parse_safetensors(folder.path / TENSORS_FILE, folder.data(TENSORS_FILE))
    else:
        tensors = read_torch(folder.path / OLD_TENSORS_FILE, folder.data(OLD_TENSORS_FILE))
    try:
        modules = {place.name: place.original for place in places(model)}
        found = peft_files.translate(config, tensors, modules, dict(base_tensors(model)))
        selection = select_named(model, found.layers, found.saved)
        scales = {where: own.resolved_scale for where, (own, _) in found.layers.items()}
        fill = Filler(Tensors.of(found.tensors), scales)
        install(model, name, found.config, selection, trainable=trainable, fill=fill, base_dtype=base_dtype)
    except ValueError as error:
        raise ValueError(f"{folder.path / CONFIG_FILE}: {error}") from error


def _load_authors(
    model: nn.Module,
    path: Path,
    name: str,
    trainable: bool,
    config: TuckerConfig | None,
    base_dtype: torch.dtype | None,
) -> None:
    read = parse_safetensors if path.suffix == ".safetensors" else read_torch
    tensors = read(path, path.read_bytes())
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
        fill = Filler(Tensors.of(found.tensors), scales)
        install(model, name, kept, selection, trainable=trainable, fill=fill, base_dtype=base_dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
