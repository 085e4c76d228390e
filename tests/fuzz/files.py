"""Adapter files with something wrong in them, read into a model that a refusal must leave as it was."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import struct
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch
from torch import nn

import flora
from flora.config import CirculantConfig, LoRAConfig, TuckerConfig
from flora.serialization import CONFIG_FILE, TENSORS_FILE

REFUSALS = (ValueError, OSError)
X = torch.linspace(-2, 2, 2 * 3 * 5 * 5).sin().reshape(2, 3, 5, 5)
NUMBERS = (0, -1, 1, 2, 3, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 5e-324)
REGEXES = ("a{99999999999999999999}", "(" * 3000 + ")" * 3000, "(?P<a>", "[")
WORDS = (
    "",
    "0",
    "default",
    "tucker",
    "F32",
    "F64",
    "BF16",
    "U8",
    "..",
    "/etc/passwd",
    "\ud800",
    "\0",
    "a" * 10_000,
    *REGEXES,
)
ODD = (None, True, False, [], {}, [[]], [None], {"": {}}, [0], [2**63, 2**63], [-1], *NUMBERS, *WORDS)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 6), nn.Linear(6, 4)).eval()


def sources(folder: Path) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Name, the file or folder to load, and the contents of every kind of adapter that can be read."""
    mixed = {"0": TuckerConfig(rank=2), "3": CirculantConfig()}
    configs = {
        "flora": (TuckerConfig(rank=3, scale=2.0, modules_to_save=["4"]), "flora"),
        "mixed": (mixed, "flora"),
        "PEFT": (LoRAConfig(rank=2, target_modules=["3", "4"]), "peft"),
    }
    for name, (config, format) in configs.items():
        model = flora.adapt(base(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1)
        flora.save_adapter(model, folder / name, hashes=format == "flora", format=format)
        yield name, "", {file.name: file.read_bytes() for file in (folder / name).iterdir()}
    torch.manual_seed(1)
    parts = {"param_G": (2, 3, 2, 2), "param_0": (3, 2), "param_1": (8, 3), "param_2": (3, 2), "param_3": (3, 2)}
    tensors = {f"0.{key}": torch.randn(shape) for key, shape in parts.items()}
    yield "authors' safetensors", "a.safetensors", {"a.safetensors": safetensors.torch.save(tensors)}
    torch.save(tensors, folder / "a.pt")
    yield "authors' pickle", "a.pt", {"a.pt": (folder / "a.pt").read_bytes()}


# Mutations -----------------------------------------------------------------------------------------------------------


def flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(changed))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
    return bytes(changed)


def cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def extend(data: bytes, random: Random) -> bytes:
    return data + random.choice((b"\0", b" ", b"}", random.randbytes(40), data))


def splice(data: bytes, random: Random) -> bytes:
    first, second, length = (random.randrange(len(data)) for _ in range(3))
    return data[:first] + data[second : second + length % 64] + data[first:]


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of parsed JSON."""
    found = []
    keys: Any = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        found += nodes(value[key])
    return found


def rearrange(tree: Any, random: Random) -> Any:
    """Parsed JSON with one or two of its values, keys or entries changed."""
    tree = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 1, 2))):
        places = nodes(tree)
        if not places:
            return random.choice(ODD)
        container, key = random.choice(places)
        way = random.randrange(6)
        if way <= 2:
            container[key] = random.choice(ODD)
        elif way == 3:
            del container[key]
        elif way == 4:
            other, where = random.choice(places)
            container[key] = copy.deepcopy(other[where] if where in other or isinstance(other, list) else None)
        elif isinstance(container, dict):
            container[random.choice((*WORDS, f"{key}.x"))] = container.pop(key)
        else:
            container.append(random.choice(ODD))
    return tree


def json_bytes(tree: Any, random: Random) -> bytes:
    return json.dumps(tree, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")


def change_json(data: bytes, random: Random) -> bytes:
    return json_bytes(rearrange(json.loads(data), random), random)


def nest(data: bytes, random: Random) -> bytes:
    depth = random.choice((10, 1000, 100_000))
    opening, closing = random.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return opening * depth + (b"0" + closing * depth if random.random() < 0.5 else b"")


def constants(data: bytes, random: Random) -> bytes:
    numbers = [i for i, byte in enumerate(data) if 48 <= byte <= 57 and data[i - 1] in b" [:"]
    at = random.choice(numbers)
    word = random.choice((b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"0x1", b"01", b"1_0"))
    return data[:at] + word + data[at + 1 :]


def repeat_key(data: bytes, random: Random) -> bytes:
    at = data.index(b"{") + 1
    return data[:at] + b'"format_version": 1, "peft_type": "LORA",' * random.choice((1, 2)) + data[at:]


def change_header(data: bytes, random: Random) -> bytes:
    """Of a safetensors file, its length set right again."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json_bytes(rearrange(json.loads(data[8 : 8 + length]), random), random)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def change_length(data: bytes, random: Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    wrong = random.choice((0, 1, length - 1, length + 1, len(data), 100_000_001, 2**32, 2**63, 2**64 - 1, 2**64 - 8))
    return struct.pack("<Q", wrong) + data[8:]


def odd_values(data: bytes, random: Random) -> bytes:
    tensors = safetensors.torch.load(data)
    key = random.choice(sorted(tensors))
    tensor = tensors[key]
    way = random.randrange(5)
    if way == 0 and tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[random.randrange(tensor.numel())] = random.choice((float("nan"), float("inf"), -float("inf")))
    elif way == 1:
        tensors[key] = tensor.to(random.choice((torch.int64, torch.float64, torch.bool, torch.complex64, torch.half)))
    elif way == 2:
        tensors[key] = tensor[..., :0]
    elif way == 3:
        tensors[key] = tensor[None]
    else:
        tensors[random.choice((*WORDS[:4], "0.weight", f"{key}.x"))] = tensors.pop(key)
    return safetensors.torch.save(tensors)


def second_directory(data: bytes, random: Random) -> bytes:
    """Of an archive: two directories, one of them spoilt; the end tells of the first, and the second lies before it.

    Or the spoilt one alone.
    """
    end = data.rindex(b"PK\5\6")
    size, start = struct.unpack_from("<LL", data, end + 12)
    entries = data[start : start + size]
    spoilt = bytearray(entries)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.choice([m.start() for m in re.finditer(b"PK\1\2", entries)])
        offset, form, values = random.choice(FIELDS)
        struct.pack_into(form, spoilt, at + offset, random.choice(values))
    one, other = random.choice(((entries, bytes(spoilt)), (bytes(spoilt), entries), (bytes(spoilt), b"")))
    between = random.choice((end, start + size))  # before the last record, or all of them
    return data[:start] + one + data[start + size : between] + other + data[between:]


FIELDS = (  # of an entry: how it is packed, its sizes, the lengths of its name and what follows, where it lies
    (10, "<H", (0, 8, 12, 99)),
    (20, "<L", (0, 1, 1 << 20, 2**31, 2**32 - 1)),
    (24, "<L", (0, 1, 1 << 20, 2**31, 2**32 - 1)),
    (28, "<H", (0, 1, 65535)),
    (30, "<H", (0, 8, 65535)),
    (42, "<L", (0, 1, 64, 2**31, 2**32 - 1)),
)
BYTES = {"bytes changed": flip, "cut": cut, "more at the end": extend, "spliced": splice}
OF_JSON = {"values": change_json, "nested": nest, "constants": constants, "keys twice": repeat_key, **BYTES}
OF_ARCHIVE = {"second directory": second_directory, **BYTES}
OF_TENSORS = {"header": change_header, "length": change_length, "values": odd_values, **BYTES}


class Files:
    """A model and the adapters that belong to it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())  # in one of the parent's, with which it goes
        (self.folder / "good").mkdir()
        self.sources = list(sources(self.folder / "good"))
        self.model = base()
        self.state = state(self.model)

    def run(self, random: Random) -> tuple[str, str]:
        source, entry, contents = random.choice(self.sources)
        spoilt = random.choice(sorted(contents))
        name = "JSON" if spoilt == CONFIG_FILE else "pickle" if spoilt.endswith(".pt") else "safetensors"
        ways = OF_JSON if name == "JSON" else OF_ARCHIVE if name == "pickle" else OF_TENSORS
        way = random.choice(sorted(ways))
        kind = f"{source}, {name}: {way}"
        changed = contents | {spoilt: ways[way](contents[spoilt], random)}
        if CONFIG_FILE in changed and spoilt == TENSORS_FILE and random.random() < 0.8:
            changed[CONFIG_FILE] = with_digest(changed[CONFIG_FILE], changed[TENSORS_FILE])
        folder = self.folder / "spoilt"
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        for file_name, data in changed.items():
            (folder / file_name).write_bytes(data)
        try:
            return kind, self.load(folder / entry, entry)
        except Exception as error:
            self.model = base()
            return kind, f"FAILED\t{error!r}"[:400].replace("\n", " ")

    def load(self, path: Path, entry: str) -> str:
        config = TuckerConfig(scale=1.0) if entry else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                flora.load_adapter(self.model, path, config=config)
            except REFUSALS as error:
                str(error)
                if not same(self.state, state(self.model)):
                    raise RuntimeError(f"the model has changed, and then {error!r}") from error
                return type(error).__name__
        with torch.no_grad():
            self.model(X)
        delta = [p for p in self.model.parameters() if p.requires_grad]
        if not delta or not all(p.isfinite().all() for p in delta):
            raise RuntimeError("an adapter without numbers was taken")
        flora.unload(self.model, merge=False)
        if not same(self.state, state(self.model)):
            raise RuntimeError("the base is not what it was")
        return "right"


def with_digest(manifest: bytes, data: bytes) -> bytes:
    tree = json.loads(manifest)
    if "tensors" in tree:
        tree["tensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return json.dumps(tree).encode()


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return tensors | {"modules": [(name, type(module)) for name, module in model.named_modules()]}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )
