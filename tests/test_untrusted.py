"""Adapter folders and files that somebody made to do harm: refused within bounds, before the model is changed."""

import errno
import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_serialization import base, contents, edit, edit_tensors, folder, original, other, put, refused, saved, trained
from torch import nn

import flora
from flora import folders
from flora.config import LDRConfig, LoRAConfig, TuckerConfig
from flora.manifest import CARD_FILE, CONFIG_FILE, TENSORS_FILE
from flora.model import adapt
from flora.serialization import load_adapter, read_adapter, save_adapter
from flora.tensor_files import read_torch

__all__ = ["folder", "original", "saved"]  # fixtures

ROOT = Path(__file__).parents[1]
SCALE = TuckerConfig(scale=1.0)


# Links, pipes and folders in the place of files --------------------------------------------------------------------


def put_link(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE, "adapter_model.bin"])
def test_a_link_is_never_followed(saved, tmp_path, name):
    (tmp_path / "secret").write_text("{}")
    put_link(saved / name, tmp_path / "secret")
    refused(base(), saved, f"{name} is a link")
    put_link(saved / name, "elsewhere")
    refused(base(), saved, f"{name} is a link")


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.mknod(path, stat.S_IFSOCK)])
def test_what_is_no_file_is_refused_and_not_waited_for(saved, name, make):
    (saved / name).unlink()
    make(saved / name)
    refused(base(), saved, f"{name} is no plain file")


def test_a_model_card_that_is_a_link_is_not_copied(saved, tmp_path):
    (tmp_path / "secret").write_text("a private key")
    put_link(saved / CARD_FILE, tmp_path / "secret")
    before = (saved / TENSORS_FILE).read_bytes()
    with pytest.raises(FileExistsError, match=r"README\.md is no plain file"):
        save_adapter(other(), saved)
    assert (saved / CARD_FILE).is_symlink()
    assert (saved / TENSORS_FILE).read_bytes() == before


def test_a_huge_model_card_is_not_read(saved):
    (saved / CARD_FILE).touch()
    os.truncate(saved / CARD_FILE, 1 << 40)
    with pytest.raises(FileExistsError, match=r"README\.md has 1099511627776 bytes"):
        save_adapter(other(), saved)


@pytest.mark.parametrize("name", [TENSORS_FILE, CARD_FILE])
def test_a_folder_in_the_place_of_a_file_is_not_removed(saved, name):
    (saved / name).unlink(missing_ok=True)
    (saved / name).mkdir()
    (saved / name / "mine").write_text("mine")
    before = contents(saved)
    with pytest.raises(FileExistsError, match="is no plain file; only an adapter folder is replaced"):
        save_adapter(other(), saved)
    assert contents(saved) == before


@pytest.mark.parametrize("name", ["..", "../adapter", "a/b", "/etc", "a\0b", ".hidden", "."])
def test_a_name_never_leaves_the_folder(saved, name):
    with pytest.raises(ValueError, match="must be letters, digits"):
        load_adapter(base(), saved.parent, name)
    with pytest.raises(ValueError, match=r"must be letters, digits|no adapter"):
        save_adapter(trained(), saved.parent / "new", [name])


def test_a_file_that_is_replaced_while_it_is_read_is_still_the_old_one(saved):
    with folders.opened(saved, (CONFIG_FILE, TENSORS_FILE)) as files:
        before = contents(saved)
        save_adapter(other(), saved)
        assert contents(saved) != before
        assert {name: file.read() for name, file in files.items()} == before


def test_a_folder_that_goes_away_while_it_is_opened_is_opened_again(saved, monkeypatch):
    model, plain, done = other(), folders._plain, []

    def replaced_in_between(path, handle=None):
        if path.name == TENSORS_FILE and not done:
            done.append(path)
            save_adapter(model, saved)
        return plain(path, handle)

    monkeypatch.setattr(folders, "_plain", replaced_in_between)
    assert list(read_adapter(saved).layers) == ["0"]


def test_a_folder_that_is_always_on_the_way_is_given_up(saved, monkeypatch):
    monkeypatch.setattr(folders, "_open_there", lambda *args: None)
    with pytest.raises(OSError, match="replaced all the time") as caught:
        read_adapter(saved)
    assert caught.value.errno == errno.EBUSY


def test_what_a_killed_save_left_is_cleared_away_and_what_is_being_written_is_not(saved):
    dead, alive = (saved.with_name(f".adapter.{token}.flora-new") for token in ("00000000", "11111111"))
    stranger = saved.with_name(".adapter.model.22222222.flora-new")
    for path in (dead, alive, stranger):
        path.mkdir()
        (path / TENSORS_FILE).write_text("half of")
    with folders._claimed(alive):
        save_adapter(other(), saved)
    assert sorted(os.listdir(saved.parent)) == sorted([saved.name, alive.name, stranger.name])


def test_a_card_that_was_cut_off_is_in_nobodys_way(saved):
    (saved / ".README.md.00000000.flora-new").write_text("half of")
    save_adapter(other(), saved)
    assert sorted(os.listdir(saved)) == [CONFIG_FILE, TENSORS_FILE]


def test_without_locks_and_folders_that_open_as_on_windows(saved, monkeypatch):
    monkeypatch.setattr(folders.sys, "platform", "win32")
    model = other()
    save_adapter(model, saved)
    assert os.listdir(saved.parent) == [saved.name]
    assert list(read_adapter(saved).layers) == ["0"]
    (saved / TENSORS_FILE).unlink()
    refused(base(), saved, f"{TENSORS_FILE} is missing")


# Sizes -------------------------------------------------------------------------------------------------------------


def fresh(config, folder):
    save_adapter(adapt(base(), config), folder)
    return folder


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (LDRConfig(), put(["config", "terms"], 10**13)),
        (LDRConfig(), put(["config", "terms"], 10**300)),
        (LoRAConfig(rank=2), lambda m: [entry.update(ranks=[10**13] * 2) for entry in m["modules"].values()] and None),
    ],
)
def test_a_size_in_the_configuration_takes_no_memory(folder, config, change):
    edit(fresh(config, folder), change)
    refused(base(), folder, r"a parameter \(.*\) is asked for, and the file has \d+ numbers|terms=1000|rank=")


def test_a_shape_in_the_file_takes_no_memory_when_it_is_inspected(folder):
    model = flora.adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), TuckerConfig(rank=2))
    save_adapter(model, folder)
    edit(folder, put(["modules", "0", "shape"], [10**13, 10**13]))
    done = subprocess.run(
        [sys.executable, "-m", "flora", "inspect", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "0: a parameter (10000000000000, 2) is asked for, and the file has 20 numbers" in done.stderr


def test_a_file_is_not_read_before_its_shapes_are_those_of_the_model(saved, monkeypatch):
    edit_tensors(saved, lambda t: t.update({"0.core": torch.zeros(7, 3, 2, 2)}))
    monkeypatch.setattr("flora.manifest.parse_safetensors", lambda *args: pytest.fail("it was read"))
    refused(base(), saved, r"0: '0\.core' is \(7, 3, 2, 2\), the model needs \(3, 3, 2, 2\)")


def with_head(path, head, size=None):
    """A safetensors file with this head and zeros, which take no room on the disk."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    if size is not None:
        os.truncate(path, size)
    return path


@pytest.mark.parametrize(
    ("head", "size", "message"),
    [
        ({}, 1 << 42, "its tensors cannot take 43980465"),
        ({"0.core": {"dtype": "F32", "shape": [3, 3, 2, 2], "data_offsets": [0, 1 << 41]}}, 1 << 41, "cannot take"),
        ({"0.core": {"dtype": "F32", "shape": [1 << 39], "data_offsets": [0, 1 << 41]}}, 1 << 41, r"has 0 numbers"),
        ({"0.core": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, None, "'0.core' has no shape"),
        ({"0.core": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, None, "'0.core' has no shape"),
        ({"0.core": 3}, None, "'0.core' has no shape"),
        ([], None, "'the head' has no shape"),
        (b'{"0.core": 1, "0.core": 1}', None, "a key is there twice"),
        (b"[" * 100_000, None, "is not JSON"),
        (b" " * ((32 << 20) + 1), None, "bytes of JSON, which no adapter has"),
    ],
)
def test_a_head_that_lies_takes_no_memory(saved, head, size, message):
    path = with_head(saved / TENSORS_FILE, head, size)
    edit(saved, lambda m: m["tensors"].update(sha256="0" * 64, bytes=path.stat().st_size))
    refused(base(), saved, message)


def test_a_number_that_is_no_float_is_refused_by_name(saved):
    edit(saved, put(["modules", "0", "scale"], 10**400))
    refused(base(), saved, r"0: scale=1000.* must be a finite number")
    edit(saved, put(["modules", "0", "scale"], 1.0))
    for field in ("scale", "alpha", "dropout"):
        edit(
            saved,
            lambda m, field=field: m["config"].update(scale=None, alpha=None) or m["config"].update({field: 10**400}),
        )
        refused(base(), saved, f"config: TuckerConfig: {field}=1000")
        edit(saved, put(["config", field], 0.0 if field == "dropout" else None))


# PyTorch's own files -----------------------------------------------------------------------------------------------


def torch_file(path, value):
    torch.save(value, path)
    return path


def expanded():
    """A small file with the parts of a huge Tucker delta: one number everywhere."""
    one = torch.zeros(1)
    return {"0.param_G": one.expand(10**9, 5), "0.param_0": one.expand(8, 10**9), "0.param_1": one.expand(5, 5)}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (expanded(), r"'0\.param_G' is a tensor \(1000000000, 5\) of 4 bytes"),
        ({"a": torch.zeros(3).to_sparse()}, "'a' is a tensor of layout torch.sparse_coo"),
        ({"a": torch.empty(3, device="meta")}, "'a' is a tensor of layout .* on meta"),
        ({"a": {"b": torch.zeros(3)}}, "'a' is a dict"),
        ({3: torch.zeros(3)}, "3 is no name"),
        (torch.zeros(3), "holds Tensor, not tensors by name"),
    ],
)
def test_tensors_whose_numbers_are_not_all_there_are_refused(tmp_path, value, message):
    refused_file(torch_file(tmp_path / "file.pt", value), message)


def refused_file(path, message):
    model = base()
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, path, config=SCALE)
    assert str(path) in str(caught.value)
    assert all(type(module).__module__.startswith("torch.") for module in model.modules())


def repacked(path, change):
    """The archive of `torch.save` with its parts as ``change`` has them."""
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, change(name, data))


def test_an_archive_that_is_larger_unpacked_is_not_unpacked(tmp_path):
    path = torch_file(tmp_path / "file.pt", {"0.param_G": torch.zeros(4)})
    repacked(path, lambda name, data: bytes(64 << 20) if name.endswith("data/0") else data)
    assert path.stat().st_size < 1 << 20
    refused_file(path, "'file/data.pkl' in it is compressed")


def test_an_archive_of_overlapping_parts_is_not_unpacked(tmp_path):
    path = torch_file(tmp_path / "file.pt", {"0.param_G": torch.zeros(4)})
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 20 : at + 28] = (2**31).to_bytes(4, "little") * 2  # sizes of the first part in the directory
    path.write_bytes(data)
    refused_file(path, "its parts are larger than itself")


def directory(data):
    """Where an archive's directory begins, and where the end records begin that say so."""
    end = data.rindex(b"PK\5\6")
    size, start = struct.unpack_from("<LL", data, end + 12)
    return start, start + size


def as_stored(entries):
    """The directory of compressed parts, saying that these are stored."""
    changed, at = bytearray(entries), 0
    while at < len(changed):
        packed, _, *lengths = struct.unpack_from("<LLHHH", changed, at + 20)
        struct.pack_into("<H", changed, at + 10, zipfile.ZIP_STORED)
        struct.pack_into("<L", changed, at + 24, packed)
        at += 46 + sum(lengths)
    return bytes(changed)


def test_an_archive_with_a_second_directory_is_not_unpacked(tmp_path):
    path = torch_file(tmp_path / "file.pt", {"0.param_G": torch.zeros(16 << 20)})
    repacked(path, lambda name, data: data)
    data = path.read_bytes()
    start, end = directory(data)
    forged = data[:end] + as_stored(data[start:end]) + data[end:]  # PyTorch looks at ``start``, Python before the end
    assert len(forged) < 1 << 17
    path.write_bytes(forged)
    assert zipfile.ZipFile(path).infolist()[0].compress_type == zipfile.ZIP_STORED
    refused_file(path, "is not a file of tensors that can be read safely")


@pytest.mark.parametrize(
    ("at", "value"), [(8, zipfile.ZIP_DEFLATED), (18, 1 << 31), (22, 1 << 31)], ids=["method", "packed", "unpacked"]
)
def test_the_parts_of_an_archive_are_what_its_directory_says(tmp_path, at, value):
    expected = torch.arange(4.0)
    path = torch_file(tmp_path / "file.pt", {"a": expected})
    data = bytearray(path.read_bytes())
    for entry in zipfile.ZipFile(path).infolist():
        struct.pack_into("<H" if at == 8 else "<L", data, entry.header_offset + at, value)
    assert torch.equal(read_torch(path, bytes(data))["a"], expected)


def test_an_archive_is_refused_that_has_no_directory_or_a_part_twice(tmp_path):
    path = torch_file(tmp_path / "file.pt", {"a": torch.zeros(4)})
    data = path.read_bytes()
    path.write_bytes(data[: directory(data)[0]])
    refused_file(path, "can be read safely: File is not a zip file")
    path.write_bytes(data.replace(b"file/byteorder", b"file/.data/xxx").replace(b"file/.data/xxx", b"file/data.pkl\0"))
    refused_file(path, "a part of it is there twice")


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("name", ["a.pt", "é 日本.bin"])
def test_what_torch_saves_is_read_bit_for_bit(tmp_path, name, checksums):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.zeros(0, 2), "d": torch.randn(2).bfloat16()}
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        path = torch_file(tmp_path / name, tensors)
    finally:
        torch.serialization.set_crc32_options(before)
    found = read_torch(path, path.read_bytes())
    assert list(found) == list(tensors)
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)


class Opens:
    """Pickled, it asks for a call."""

    def __init__(self, call, *args):
        self.asked = call, args

    def __reduce__(self):
        return self.asked


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "old form"])
@pytest.mark.parametrize("call", [(os.system, "touch ran"), (eval, "open('ran', 'w')"), (io.open, "ran", "w")])
def test_nothing_in_a_pickle_is_ever_called(tmp_path, monkeypatch, legacy, call):
    monkeypatch.chdir(tmp_path)
    value = {"0.param_G": Opens(*call)}
    torch.save(value, tmp_path / "file.pt", _use_new_zipfile_serialization=not legacy)
    refused_file(tmp_path / "file.pt", "cannot be read safely|can be read safely")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    torch.save(value, tmp_path / "peft" / "adapter_model.bin")
    refused(base(), tmp_path / "peft", r"adapter_model\.bin is not a file of tensors that can be read safely")
    (tmp_path / "peft" / "adapter_model.bin").write_bytes(pickle.dumps(value))
    refused(base(), tmp_path / "peft", r"adapter_model\.bin is not a file of tensors that can be read safely")
    assert sorted(os.listdir(tmp_path)) == ["file.pt", "peft"]


# Numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_have_to_be_finite_in_the_dtype_that_the_model_has(saved, dtype):
    spoilt = torch.tensor(1e300 if dtype == torch.float64 else torch.nan, dtype=torch.float64).to(dtype)
    edit_tensors(saved, lambda t: t.update({"2.core": spoilt.expand(t["2.core"].shape).clone()}))
    refused(base(), saved, "2: core holds values that are not finite")


def test_other_dtypes_are_converted(saved):
    expected = safetensors.torch.load_file(saved / TENSORS_FILE)["2.core"].to(torch.float8_e4m3fn)
    edit_tensors(saved, lambda t: t.update({"2.core": expected}))
    model = load_adapter(base(), saved)
    assert torch.equal(model[2].deltas["default"].core, expected.float())


def test_a_complex_head_has_to_be_finite(folder):
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    def network():
        return nn.Sequential(nn.Linear(2, 2), Complex())

    save_adapter(adapt(network(), TuckerConfig(rank=1, target_modules=["0"], modules_to_save=["1"])), folder)
    edit_tensors(folder, lambda t: t.update({"1.w": torch.full((2,), complex(0, float("nan")))}))
    refused(network(), folder, "1: w holds values that are not finite")
