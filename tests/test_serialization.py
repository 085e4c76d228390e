"""Adapter folders and the authors' files: equal bit for bit, replaced as a whole, refused whenever they are wrong."""

import contextlib
import copy
import ctypes
import errno
import hashlib
import json
import os
import pickle
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from flora import folders
from flora.config import CirculantConfig, TuckerConfig
from flora.drop_in import Conv2d
from flora.layers import AdaptedLayer, wrap
from flora.model import adapt, adapted_layers, merge, saved_modules, set_adapter, state_of, unload
from flora.report import summary
from flora.serialization import CONFIG_FILE, TENSORS_FILE, fingerprint, load_adapter, read_adapter, save_adapter

GOLDEN = Path(__file__).parent / "golden"
X = torch.linspace(-2, 2, 2 * 3 * 8 * 8).sin().reshape(2, 3, 8, 8)


def base(seed=0, classes=5, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, width, 3, groups=width),
        nn.BatchNorm2d(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    ).eval()


def trained(model=None, config=None, name="default"):
    model = adapt(model or base(), config or TuckerConfig(rank=3, scale=2.0, modules_to_save=["3", "6"]), name).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        optimiser.zero_grad()
        model(X).square().mean().backward()
        optimiser.step()
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "adapter"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of `trained()` and its output."""
    model, folder = trained(), tmp_path_factory.mktemp("original") / "adapter"
    save_adapter(model, folder)
    return folder, model(X).detach()


@pytest.fixture
def saved(original, folder):
    """A copy of that folder, to spoil."""
    return Path(shutil.copytree(original[0], folder))


@pytest.fixture
def expected(original):
    """The output of the model that was saved."""
    return original[1]


def snapshot(model):
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    training = {name: module.training for name, module in model.named_modules()}
    return (
        modules,
        flags,
        hooks,
        training,
        copy.deepcopy(model.__dict__.get("_flora_state")),
        pickle.dumps(model.state_dict()),
    )


def edit(folder, change):
    """Rewrite the JSON file as ``change`` has it."""
    file = folder / CONFIG_FILE
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(change(manifest) or manifest))


def edit_tensors(folder, change):
    """Rewrite the tensors; the JSON file agrees."""
    file = folder / TENSORS_FILE
    tensors = safetensors.torch.load_file(file)
    data = safetensors.torch.save(change(tensors) or tensors)
    file.write_bytes(data)
    edit(folder, lambda m: m["tensors"].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)))


# There and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_adapter_gives_the_same_outputs_bit_for_bit(saved, expected, trainable):
    model = base().train()
    assert load_adapter(model, saved, trainable=trainable) is model
    assert model.training == trainable
    assert any(p.requires_grad for p in model.parameters()) == trainable
    assert torch.equal(model.eval()(X), expected)
    assert {row.name for row in summary(model).layers} == {"0", "2", "3", "6"}
    assert torch.equal(model[3].current.running_mean, trained()[3].current.running_mean)


def test_every_core_and_factor_is_saved_trained_or_not(folder):
    model = trained(config=TuckerConfig(rank=3, trainable=("core",), init="orthogonal"))
    save_adapter(model, folder)
    tensors = safetensors.torch.load_file(folder / TENSORS_FILE)
    for name, layer in adapted_layers(model).items():
        delta = layer.deltas["default"]
        assert torch.equal(tensors[f"{name}.core"], delta.core)
        for mode, factor in enumerate(delta.factors):
            assert torch.equal(tensors[f"{name}.factors.{mode}"], factor)


def test_a_saved_again_adapter_is_the_same_file(saved, tmp_path):
    model = load_adapter(base(), saved)
    save_adapter(model, tmp_path / "again")
    for name in (CONFIG_FILE, TENSORS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_a_loaded_adapter_learns_on(saved):
    model = load_adapter(base(), saved).train()
    before = model[0].deltas["default"].core.clone()
    model(X).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert not torch.equal(model[0].deltas["default"].core, before)
    assert model[0].base_layer.weight.grad is None


def test_saving_while_merged_saves_the_deltas(saved, expected, tmp_path):
    model = trained()
    merge(model)
    save_adapter(model, tmp_path / "merged", hashes=True)
    assert (tmp_path / "merged" / TENSORS_FILE).read_bytes() == (saved / TENSORS_FILE).read_bytes()
    assert all(layer.merged for layer in adapted_layers(model).values())
    assert torch.equal(load_adapter(base(), tmp_path / "merged")(X), expected)


def test_scales_and_ranks_of_the_moment_are_kept(folder):
    config = TuckerConfig(rank=2, scale=4, rank_pattern={"0": (3, 2, 1, 3)}, scale_pattern={"2": 0.25})
    model = trained(config=config)
    model[6].deltas["default"].scale = 0.0
    expected = model(X)
    save_adapter(model, folder)
    loaded = load_adapter(base(), folder)
    assert torch.equal(loaded(X), expected)
    assert loaded[0].deltas["default"].ranks == (3, 2, 1, 3)
    assert [loaded[i].deltas["default"].scale for i in (0, 2, 6)] == [4.0, 0.25, 0.0]
    assert state_of(loaded).adapters["default"].config == state_of(model).adapters["default"].config


def test_alpha_over_rank_is_kept(folder):
    model = trained(config=TuckerConfig(rank=2, alpha=3, rank_pattern={"6": 1}))
    save_adapter(model, folder)
    loaded = load_adapter(base(), folder)
    assert [loaded[i].deltas["default"].scale for i in (0, 6)] == [1.5, 3.0]
    assert torch.equal(loaded(X), model(X))


def test_what_a_function_selected_is_saved_by_name(folder):
    config = TuckerConfig(
        rank=2, target_modules=lambda name, m: name == "6", exclude_modules=lambda name, m: name == "0"
    )
    save_adapter(trained(config=config), folder)
    written = read_adapter(folder).config
    assert (written.target_modules, written.exclude_modules) == (("6",), None)
    assert list(adapted_layers(load_adapter(base(), folder))) == ["6"]


def test_a_mapping_is_one_adapter(folder):
    model = trained(config={"0": TuckerConfig(rank=1), "all": TuckerConfig(rank=3, scale=0.5, modules_to_save=["3"])})
    save_adapter(model, folder)
    file = read_adapter(folder)
    assert file.method == "mixed"
    assert {name: (entry.pattern, entry.scale) for name, entry in file.layers.items()} == {
        "0": ("0", 1.0),
        "2": ("all", 0.5),
        "6": ("all", 0.5),
    }
    assert torch.equal(load_adapter(base(), folder)(X), model(X))


def test_layers_wrapped_one_by_one_are_saved_and_loaded(folder):
    torch.manual_seed(0)
    model = nn.Sequential(
        Conv2d(3, 4, 3, delta=TuckerConfig(rank=2)), nn.ReLU(), wrap(nn.Conv2d(4, 2, 1), TuckerConfig(rank=1))
    )
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.deltas["default"].core.fill_(0.5)
    save_adapter(model, folder)
    plain = unload(copy.deepcopy(model), merge=False)
    assert torch.equal(load_adapter(plain, folder)(X), model(X))


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_networks_of_transformers(folder, kind):
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
        )
        network, x, head = transformers.ViTForImageClassification(config), X, ["classifier"]
    else:
        config = transformers.GPT2Config(vocab_size=19, n_embd=16, n_layer=2, n_head=2)
        network, x, head = transformers.GPT2LMHeadModel(config), torch.arange(14).reshape(2, 7), None
    network.eval()
    fresh = copy.deepcopy(network)
    model = adapt(network, TuckerConfig(rank=3, modules_to_save=head))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.2)
        save_adapter(model, folder, hashes=True)
        loaded = load_adapter(fresh, folder, trainable=False)
        assert torch.equal(loaded(x).logits, model(x).logits)
        assert not torch.equal(loaded(x).logits, unload(copy.deepcopy(model), merge=False)(x).logits)


def test_a_head_of_another_size_is_left_out_of_the_fingerprint_but_must_fit(folder):
    save_adapter(trained(), folder)
    file = read_adapter(folder)
    assert not any(key.startswith(("3.", "6.")) for key in file.base.shapes)
    with pytest.raises(ValueError, match=r"6: '6\.weight' is \(5, 8\), the model needs \(7, 8\)"):
        load_adapter(base(classes=7), folder)


def test_buffers_that_a_state_dict_leaves_out_are_not_the_bases(folder):
    save_adapter(trained(), folder)
    model = base()
    model[5].register_buffer("cache", torch.zeros(3), persistent=False)
    load_adapter(model, folder)


def test_one_file_of_the_folder_may_be_named(saved, expected):
    for name in (TENSORS_FILE, CONFIG_FILE):
        assert torch.equal(load_adapter(base(), saved / name)(X), expected)


# Several adapters --------------------------------------------------------------------------------------------------


@pytest.fixture
def two():
    model = trained(config=TuckerConfig(rank=2, target_modules=["0"]))
    adapt(model, TuckerConfig(rank=3, target_modules=["6"]), "second")
    set_adapter(model, "second")
    with torch.no_grad():
        model[6].deltas["second"].core.fill_(0.3)
    return model


def test_a_list_of_names_writes_a_folder_each(two, folder):
    save_adapter(two, folder, ["default", "second"])
    assert sorted(os.listdir(folder)) == ["default", "second"]
    assert list(adapted_layers(load_adapter(base(), folder))) == ["0"]
    loaded = load_adapter(base(), folder, "second")
    assert list(adapted_layers(loaded)) == ["6"]
    assert torch.equal(loaded(X), two(X))
    untouched = (folder / "default" / TENSORS_FILE).stat().st_ino
    save_adapter(two, folder, ["second"])
    assert (folder / "default" / TENSORS_FILE).stat().st_ino == untouched
    with pytest.raises(ValueError, match=r"holds neither adapter_config\.json nor third/adapter_config\.json"):
        load_adapter(base(), folder, "third")


def test_one_name_writes_the_folder_itself_and_loads_under_any(two, folder):
    save_adapter(two, folder, "second")
    loaded = load_adapter(base(), folder, "whatever")
    assert summary(loaded).adapters == ("whatever",)
    assert torch.equal(loaded(X), two(X))


def test_loading_beside_another_adapter_waits_for_set_adapter(saved, expected):
    model = trained(config=TuckerConfig(rank=2, target_modules=["0"]))
    before = model(X)
    load_adapter(model, saved, "third")
    assert torch.equal(model(X), before)
    assert state_of(model).active == ("default",)
    set_adapter(model, "third")
    assert torch.equal(model(X), expected)


def test_what_one_adapter_adapts_another_cannot_train_whole(two, saved):
    before = snapshot(two)
    with pytest.raises(ValueError, match="^.*: 6: it is in the file, but another adapter already holds it"):
        load_adapter(two, saved, "third")
    assert snapshot(two) == before


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m, f: save_adapter(m, f, "scond"), ValueError, "no adapter 'scond'; there are 'default', 'second'"),
        (lambda m, f: save_adapter(m, f, ["second", "x"]), ValueError, "no adapter 'x'"),
        (lambda m, f: save_adapter(m, f, []), ValueError, "must name an adapter"),
        (lambda m, f: save_adapter(base(), f), RuntimeError, "Sequential has no adapters"),
        (lambda m, f: save_adapter(wrap(nn.Linear(2, 2), TuckerConfig(rank=1)), f), ValueError, "a single layer"),
    ],
)
def test_what_cannot_be_saved(two, folder, act, error, message):
    with pytest.raises(error, match=message):
        act(two, folder)
    assert not folder.exists()


def test_values_that_are_not_finite_are_not_saved(folder):
    model = trained()
    model[2].deltas["default"].core.data[0] = float("nan")
    with pytest.raises(ValueError, match="^2: core holds values that are not finite"):
        save_adapter(model, folder)
    assert not folder.exists()


# Replacing a folder ------------------------------------------------------------------------------------------------


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def other():
    return trained(config=TuckerConfig(rank=1, target_modules=["0"]))


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "moved aside"])
def test_saving_replaces_the_whole_folder(saved, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    model = other()
    save_adapter(model, saved)
    assert sorted(os.listdir(saved)) == [CONFIG_FILE, TENSORS_FILE]
    assert os.listdir(saved.parent) == [saved.name]
    assert torch.equal(load_adapter(base(), saved)(X), model(X))


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "moved aside"])
@pytest.mark.parametrize("mode", [0o700, 0o2770, 0o777])
def test_a_folder_keeps_its_mode(saved, monkeypatch, exchange, mode):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    write, seen = folders._write, []
    monkeypatch.setattr(folders, "_write", lambda new, data: seen.append(new.stat().st_mode) or write(new, data))
    saved.chmod(mode)
    before = os.umask(0o027)
    try:
        save_adapter(other(), saved)
        save_adapter(other(), saved.parent / "first")
    finally:
        os.umask(before)
    assert stat.S_IMODE(saved.stat().st_mode) == mode
    assert [stat.S_IMODE(found) for found in seen] == [0o700, 0o700, 0o750, 0o750]
    assert stat.S_IMODE((saved.parent / "first").stat().st_mode) == 0o750
    assert {stat.S_IMODE((saved / name).stat().st_mode) for name in (CONFIG_FILE, TENSORS_FILE)} == {0o640}


@pytest.mark.parametrize(("allowed", "group", "mode"), [(True, 7, 0o2771), (False, 8, 0o2701)])
def test_a_folder_keeps_its_group_or_the_group_loses_its_rights(monkeypatch, allowed, group, mode):
    class Folder:
        def __init__(self, group, mode):
            self.group, self.mode = group, mode

        def stat(self):
            return SimpleNamespace(st_gid=self.group, st_mode=self.mode | stat.S_IFDIR)

        def chmod(self, mode):
            self.mode = mode

    def chown(path, user, group):
        assert user == -1
        if not allowed:
            raise PermissionError
        path.group = group

    monkeypatch.setattr(folders.os, "chown", chown)
    new = Folder(8, 0o700)
    folders._take_mode(new, Folder(7, 0o2771))
    assert (new.group, new.mode) == (group, mode)


@pytest.mark.parametrize("there", ["saved", "empty"])
def test_the_current_directory_is_not_replaced(saved, monkeypatch, there):
    folder = saved if there == "saved" else saved.parent / "empty"
    folder.mkdir(exist_ok=True)
    before = contents(saved.parent)
    monkeypatch.chdir(folder)
    for path, names in ((".", "default"), (folder, "default"), (folder.parent, ["default", folder.name])):
        model = other()
        adapt(model, TuckerConfig(rank=1, target_modules=["0"]), folder.name)
        with pytest.raises(ValueError, match=f"{folder.name} is the current directory, which cannot be replaced"):
            save_adapter(model, path, names)
    assert contents(saved.parent) == before


def test_a_configuration_that_could_not_be_read_is_not_saved(folder, monkeypatch):
    save_adapter(trained(), folder)
    size = (folder / CONFIG_FILE).stat().st_size
    monkeypatch.setattr("flora.serialization.MOST_TEXT", size)
    save_adapter(trained(), folder)
    monkeypatch.setattr("flora.serialization.MOST_TEXT", size - 1)
    with pytest.raises(ValueError, match=rf"default: \d layers take {size} bytes of JSON, {size - 1} can be read"):
        save_adapter(trained(), folder / "more")
    assert not (folder / "more").exists()


def test_this_system_exchanges_in_one_step(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    (one / "a").write_text("a")
    assert folders._exchange(one, two) is (os.uname().sysname == "Linux")
    assert (two / "a").exists() == (os.uname().sysname == "Linux")
    if os.uname().sysname == "Linux":
        with pytest.raises(FileNotFoundError):
            folders._exchange(one, tmp_path / "three")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, None])
def test_a_system_that_cannot_exchange(tmp_path, monkeypatch, code):
    class Library:
        if code is not None:

            def renameat2(self, *args):
                ctypes.set_errno(code)
                return -1

    monkeypatch.setattr(folders.ctypes, "CDLL", lambda *args, **kwargs: Library())
    assert folders._exchange(tmp_path / "one", tmp_path / "two") is False
    monkeypatch.undo()
    monkeypatch.setattr(folders.sys, "platform", "other")
    assert folders._exchange(tmp_path / "one", tmp_path / "two") is False


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs, no clean-up either."""


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "moved aside"])
@pytest.mark.parametrize("when", range(9))
def test_a_save_that_is_cut_off_leaves_the_old_or_the_new_adapter_whole(saved, expected, monkeypatch, exchange, when):
    model = other()
    new = model(X)
    steps = 0

    def step(function):
        def run(*args, **kwargs):
            nonlocal steps
            if steps == when:
                raise Killed
            steps += 1
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(folders.os, "fsync", step(os.fsync))
    monkeypatch.setattr(folders.os, "rename", step(os.rename))
    monkeypatch.setattr(folders, "_exchange", step(folders._exchange if exchange else lambda one, other: False))
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)
    with contextlib.suppress(Killed):
        save_adapter(model, saved)
    monkeypatch.undo()
    found = load_adapter(base(), saved)(X)
    assert torch.equal(found, expected) or torch.equal(found, new)
    save_adapter(model, saved)
    assert torch.equal(load_adapter(base(), saved)(X), new)


def test_an_adapter_that_was_moved_aside_is_recovered(saved, expected):
    os.rename(saved, folders._moved_aside(saved))
    assert torch.equal(load_adapter(base(), saved)(X), expected)
    os.rename(saved, folders._moved_aside(saved))
    save_adapter(other(), saved)
    assert os.listdir(saved.parent) == [saved.name]


def test_a_failed_write_leaves_no_trace(saved, monkeypatch):
    before = contents(saved)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(other(), saved)
    assert contents(saved) == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_failed_rename_puts_the_old_adapter_back(saved, monkeypatch):
    before, renames = contents(saved), []

    def rename(one, other):
        renames.append(other)
        if len(renames) == 2:
            raise OSError("the disk is gone")
        original(one, other)

    original = os.rename
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    monkeypatch.setattr(folders.os, "rename", rename)
    with pytest.raises(OSError, match="the disk is gone"):
        save_adapter(other(), saved)
    assert contents(saved) == before


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda f: (f / "notes.txt").write_text("mine"), r"holds notes\.txt; only an adapter folder is replaced"),
        (lambda f: (f / CONFIG_FILE).write_text('{"peft_type": "LORA"}'), "has no format_version"),
        (lambda f: (f / TENSORS_FILE).write_text("x"), r"adapter_config\.json is missing"),
        (lambda f: (f / "sub").mkdir(), "holds sub"),
    ],
)
def test_only_an_adapter_folder_is_ever_replaced(folder, fill, message):
    folder.mkdir()
    fill(folder)
    before = contents(folder)
    with pytest.raises(FileExistsError, match=message):
        save_adapter(trained(), folder)
    assert contents(folder) == before


def test_files_and_adapters_in_the_way(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file is a file"):
        save_adapter(trained(), tmp_path / "file")
    with pytest.raises(FileExistsError, match="is an adapter folder itself, so default cannot be written into it"):
        save_adapter(trained(), saved, ["default"])
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_a_link_and_new_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    save_adapter(trained(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    save_adapter(trained(), tmp_path / "a" / "b" / "c")
    for path in (tmp_path / "empty", tmp_path / "link", tmp_path / "a" / "b" / "c"):
        assert sorted(os.listdir(path)) == [CONFIG_FILE, TENSORS_FILE]
        load_adapter(base(), path)


def test_permissions_follow_the_umask(folder):
    before = os.umask(0o027)
    try:
        save_adapter(trained(), folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in os.listdir(folder)} == {0o640}


# Bad files ---------------------------------------------------------------------------------------------------------


def put(path, value):
    """A change of the JSON file: the value at a path of keys."""

    def change(manifest):
        at = manifest
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


BAD_JSON = {
    "version": (put(["format_version"], 2), "format_version=2 is not the 1"),
    "fractional version": (put(["format_version"], 1.0), r"format_version=1\.0"),
    "boolean version": (put(["format_version"], True), "format_version=True"),
    "no version": (lambda m: m.__delitem__("format_version"), "has no format_version"),
    "another library's": (lambda m: {"peft_type": "IA3"}, "peft_type='IA3' is not the LORA"),
    "a list": (lambda m: [m], "has no format_version"),
    "unknown key": (put(["extra"], 1), r"the file lacks \[\] and has the unknown \['extra'\]"),
    "missing key": (lambda m: m.__delitem__("base"), r"the file lacks \['base'\]"),
    "method": (put(["method"], "lora"), "method='lora' is not that of the config, 'tucker'"),
    "unknown method": (put(["config", "method"], "magic"), "config: DeltaConfig: method='magic' must be one of"),
    "unknown field": (put(["config", "r"], 3), "config: TuckerConfig has no field 'r'"),
    "bad field": (put(["config", "rank"], 0), "config: TuckerConfig: rank=0"),
    "config list": (put(["config"], []), r"config: a config must be a mapping"),
    "mixed": (put(["method"], "mixed"), "config: "),
    "modules": (put(["modules"], []), r"modules=\[\] must be an object"),
    "no modules": (put(["modules"], {}), "names no module"),
    "entry": (put(["modules", "0"], 3), r"modules\['0'\]=3 must be an object"),
    "entry key": (put(["modules", "0", "x"], 3), r"modules\['0'\] lacks \[\] and has the unknown \['x'\]"),
    "shape": (put(["modules", "0", "shape"], [8, -1]), r"0: shape=\[8, -1\]"),
    "other shape": (
        put(["modules", "0", "shape"], [8, 3, 3, 4]),
        r"0: its weight is \(8, 3, 3, 3\), the adapter is for \(8, 3, 3, 4\)",
    ),
    "ranks": (put(["modules", "0", "ranks"], "3"), "0: ranks='3'"),
    "no ranks": (put(["modules", "0", "ranks"], []), r"rank=\(\) must be a positive int"),
    "ranks of none": (
        lambda m: m.update(method="circulant", config=CirculantConfig().to_dict()),
        r"CirculantConfig has no ranks, and ranks=\(",
    ),
    "rank above": (put(["modules", "0", "ranks"], [9, 3, 2, 2]), r"0: rank=\(9, 3, 2, 2\) goes above"),
    "other ranks": (
        put(["modules", "0", "ranks"], [2, 3, 2, 2]),
        r"0: '0\.core' is \(3, 3, 2, 2\), the model needs \(2, 3, 2, 2\)",
    ),
    "huge ranks": (put(["modules", "0", "ranks"], [10**12, 3, 2, 2]), "0: rank="),
    "scale": (put(["modules", "0", "scale"], "1"), "0: scale='1' must be a finite number"),
    "pattern": (put(["modules", "0", "pattern"], "x"), "0: pattern='x' is not one of the config's"),
    "missing module": (
        lambda m: m["modules"].update({"9": m["modules"].pop("0")}),
        r"belongs to no module|no module '9'",
    ),
    "saved": (put(["modules_to_save"], [3]), r"modules_to_save=\[3\]"),
    "saved twice": (put(["modules_to_save"], ["3", "6", "0"]), r"another base|0: the file adapts it"),
    "base": (put(["base", "tensors", "0.weight"], [3]), r"base: 0\.weight=\[3\]"),
    "base dtype": (put(["base", "tensors", "0.weight", "dtype"], 3), r"base: 0\.weight: dtype=3"),
    "base shape": (
        put(["base", "tensors", "0.weight", "shape"], [1]),
        r"'0\.weight' is \(8, 3, 3, 3\) in this model, \(1,\) in the",
    ),
    "base name": (
        lambda m: m["base"]["tensors"].update({"z": {"shape": [], "dtype": "int64"}}),
        "'z' is missing in this model",
    ),
    "base less": (lambda m: m["base"]["tensors"].__delitem__("0.bias"), r"'0\.bias' is only in this model"),
    "hashes": (put(["base", "hashes"], {}), "base: hashes lacks"),
    "sha256": (put(["tensors", "sha256"], "0" * 63), "tensors: sha256="),
    "other sha256": (put(["tensors", "sha256"], "0" * 64), "their SHA-256 differ"),
    "bytes": (put(["tensors", "bytes"], 1.5), r"tensors: bytes=\[1\.5\]"),
}


def refused(model, folder, message, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        load_adapter(model, folder)
    assert snapshot(model) == before
    return str(caught.value)


@pytest.mark.parametrize(("change", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_a_wrong_json_file_is_refused_by_name(saved, change, message):
    edit(saved, change)
    said = refused(base(), saved, message)
    assert str(saved) in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ('{"format_version": 1, "format_version": 1}', "a key is there twice"),
        ('{"format_version": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "is not JSON"),
        ("null", "has no format_version"),
    ],
)
def test_what_is_no_json_is_refused_by_name(saved, text, message):
    (saved / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert CONFIG_FILE in refused(base(), saved, message)


def test_a_huge_json_file_is_not_read(saved):
    os.truncate(saved / CONFIG_FILE, 65 << 20)
    refused(base(), saved, r"adapter_config\.json has 68157440 bytes")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_tensors_file_is_refused_by_name(saved, size):
    file = saved / TENSORS_FILE
    data = file.read_bytes()[:size]
    file.write_bytes(data)
    refused(base(), saved, rf"adapter_model\.safetensors has {len(data)} bytes, not the \d+")
    edit(saved, lambda m: m["tensors"].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)))
    refused(base(), saved, r"adapter_model\.safetensors is not a safetensors file")


def test_a_changed_tensors_file_is_refused_by_name(saved):
    file = saved / TENSORS_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(base(), saved, "their SHA-256 differ")


BAD_TENSORS = {
    "missing": (lambda t: t.__delitem__("2.core"), r"2: the tensor '2\.core' is missing"),
    "missing of a head": (lambda t: t.__delitem__("6.bias"), r"6: the tensor '6\.bias' is missing"),
    "unknown": (lambda t: t.update({"2.cores": t["2.core"].clone()}), r"'2\.cores' belongs to nothing in the model"),
    "of no module": (lambda t: t.update({"x": t["2.core"].clone()}), r"'x' belongs to no module"),
    "shape": (
        lambda t: t.update({"2.core": t["2.core"][1:].clone()}),
        r"2: '2\.core' is \(2, 1, 2, 2\), the model needs",
    ),
    "integers": (lambda t: t.update({"2.core": t["2.core"].int()}), r"2: '2\.core' is of torch\.int32"),
    "nan": (lambda t: t["2.core"].view(-1)[0].fill_(torch.nan) and None, "2: core holds values that are not finite"),
    "inf in a head": (lambda t: t["6.bias"][0].fill_(torch.inf) and None, "6: bias holds values that are not finite"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_wrong_tensors_are_refused_by_name(saved, change, message):
    edit_tensors(saved, change)
    assert str(saved) in refused(base(), saved, message)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            base(width=6),
            r"another base \(Sequential\): .*'0\.weight' is \(6, 3, 3, 3\) in this model, \(8, 3, 3, 3\) in",
        ),
        (nn.Sequential(nn.Linear(3, 3)), r"another base .*'1\.weight' is missing in this model.*; and \d more"),
        (nn.Sequential(*base(), nn.Linear(5, 5)), r"another base .*'7\.weight' is only in this model"),
    ],
)
def test_an_adapter_of_another_base_is_refused_by_name(saved, model, message):
    refused(model, saved, message)


def test_hashes_tell_bases_of_other_values(folder):
    model = trained()
    save_adapter(model, folder)
    load_adapter(base(seed=1), folder)  # the shapes fit
    save_adapter(model, folder, hashes=True)
    load_adapter(base(), folder)
    refused(base(seed=1), folder, r"another base .*'0\.weight' has other values")


def test_a_base_of_another_dtype_is_reported(saved):
    model = base().to(torch.bfloat16)
    with pytest.warns(
        UserWarning, match=r"'0\.weight' is bfloat16 in this model, float32 in the adapter's.* more"
    ) as caught:
        load_adapter(model, saved)
    assert caught[0].filename == __file__
    assert torch.equal(model[0].deltas["default"].core, trained()[0].deltas["default"].core)


def test_hashes_of_tensors_without_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    assert fingerprint(model).shapes == {"0.weight": (2, 2), "0.bias": (2,)}
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        fingerprint(model, hashes=True)


def test_a_name_that_is_taken(saved):
    model = load_adapter(base(), saved)
    refused(model, saved, "already an adapter 'default'; there are 'default'")


def test_a_merged_model_refuses_to_load(saved):
    model = trained(config=TuckerConfig(rank=2, target_modules=["0"]))
    merge(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="0 is merged; unmerge first"):
        load_adapter(model, saved, "second")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [(nn.Linear(2, 2), ValueError, "single Linear"), ({}, TypeError, "not dict"), (None, TypeError, "not NoneType")],
)
def test_what_is_no_model(saved, model, error, message):
    with pytest.raises(error, match=message):
        load_adapter(model, saved)


def test_paths_that_hold_no_adapter(saved, tmp_path):
    refused(base(), tmp_path / "nowhere", "there is no adapter folder .*nowhere", FileNotFoundError)
    refused(base(), tmp_path, "holds neither adapter_config")
    (saved / TENSORS_FILE).unlink()
    refused(base(), saved, r"adapter_model\.safetensors is missing")
    with pytest.raises(ValueError, match=r"'a\.b'"):
        load_adapter(base(), saved, "a.b")
    with pytest.raises(ValueError, match=r"config=TuckerConfig\(.*is for a file of FLoRA's authors"):
        load_adapter(base(), saved, config=TuckerConfig(scale=1))


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
def test_links_out_of_the_folder_are_refused(saved, tmp_path, name):
    os.rename(saved / name, tmp_path / "elsewhere")
    (saved / name).symlink_to(tmp_path / "elsewhere")
    refused(base(), saved, f"{name} is a link")


def zero(*keys):
    return lambda tensors: tensors.update({key: torch.zeros_like(tensors[key]) for key in keys})


@pytest.mark.parametrize(
    ("trainable", "keys", "message"),
    [
        (("core", "factors"), ["2.core", "2.factors.1"], "^.*: 2: the delta could never learn, .*core.* zero"),
        (("core", "factors"), ["6.factors.0", "6.factors.1"], "^.*: 6: the delta could never learn, .* zero"),
        (("core", "out"), ["0.factors.1"], "^.*: 0: the delta could never learn, .* zero"),
    ],
)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_a_delta_that_can_never_learn_is_refused_unless_it_need_not(folder, trainable, keys, message, beside):
    save_adapter(trained(config=TuckerConfig(rank=3, trainable=trainable)), folder)
    edit_tensors(folder, zero(*keys))
    model = trained(config=TuckerConfig(rank=2), name="first") if beside else base()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert snapshot(model) == before
    load_adapter(model, folder, trainable=False)
    layer = adapted_layers(model)[keys[0].partition(".")[0]]
    assert not layer.deltas["default"].delta_weight(layer.base_layer.weight).any()


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_a_delta_that_has_not_begun_to_learn_is_taken(folder, beside):
    save_adapter(adapt(base(), TuckerConfig(rank=3, trainable=("core", "in"))), folder)
    model = load_adapter(trained(config=TuckerConfig(rank=2), name="first") if beside else base(), folder)
    set_adapter(model, "default")
    assert all(layer.deltas["default"].core.requires_grad for layer in adapted_layers(model).values())


# The authors' files ------------------------------------------------------------------------------------------------


class Authors(nn.Module):
    """A network with a golden layer in it."""

    def __init__(self, layer):
        super().__init__()
        self.stages = nn.ModuleList([layer])
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.stages[0](x)


def golden(name):
    data = {key: torch.from_numpy(np.array(value)) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    weight = data["weight"]
    if weight.ndim == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        geometry = {key: tuple(data[key].tolist()) for key in ("stride", "padding", "dilation")}
        kind = {4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
        layer = kind(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), **geometry)
    layer.double()
    layer.load_state_dict({"weight": weight, "bias": data.get("bias", weight.new_zeros(len(weight)))})
    factors = [data["u_in"], data["u_out"], *(data[f"u_k{mode}"] for mode in range(weight.ndim - 2))]
    tensors = {"stages.0.param_G": data["core"]} | {f"stages.0.param_{i}": u for i, u in enumerate(factors)}
    return Authors(layer), {key: tensor.contiguous() for key, tensor in tensors.items()}, data


def relative(a, b):
    return float((a.detach() - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("flora_*.npz")))
@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [("", ".safetensors"), ("base_model.model.", ".pt"), ("module.", ".pth"), ("base_model.", ".bin")],
)
def test_a_file_of_the_authors_gives_their_outputs(tmp_path, name, prefix, suffix):
    model, tensors, data = golden(name)
    tensors = {prefix + key: tensor for key, tensor in tensors.items()}
    path = tmp_path / f"file{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    load_adapter(model, path, config=TuckerConfig(scale=float(data["scale"])))
    assert relative(model(data["x"]), data["y"]) < 1e-10
    layer = model.stages[0]
    assert relative(layer.deltas["default"].delta_weight(layer.base_layer.weight), data["delta_weight"]) < 1e-10
    save_adapter(model, tmp_path / "again")
    again = load_adapter(golden(name)[0], tmp_path / "again")
    assert torch.equal(again(data["x"]), model(data["x"]))


@pytest.fixture
def authors(tmp_path):
    """A model and a function that writes a changed file for it."""

    def write(change=lambda tensors: None, name="file.safetensors"):
        model, tensors, _ = golden("flora_linear")
        tensors = change(tensors) or tensors
        path = tmp_path / name
        if name.endswith(".safetensors"):
            safetensors.torch.save_file(tensors, path)
        else:
            torch.save(tensors, path)
        return model, path

    return write


def test_a_rank_above_its_mode_is_folded(tmp_path):
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 2)
    core, u_in, u_out, u_h, u_w = (torch.randn(s) for s in ((16, 4, 2, 3), (3, 16), (8, 4), (2, 2), (2, 3)))
    names = ["G", "0", "1", "2", "3"]
    parts = {f"stages.0.param_{n}": t for n, t in zip(names, (core, u_in, u_out, u_h, u_w), strict=True)}
    torch.save(parts, tmp_path / "file.pt")
    model = load_adapter(Authors(stem), tmp_path / "file.pt", config=TuckerConfig(scale=4.0))
    layer = model.stages[0]
    delta = layer.deltas["default"]
    assert delta.ranks == (4, 3, 2, 2)
    assert torch.equal(delta.factors[1], torch.eye(3))
    assert torch.equal(delta.factors[0], u_out)
    expected = 4.0 * torch.einsum("iohw,ai,bo,ch,dw->bacd", *(t.double() for t in (core, u_in, u_out, u_h, u_w)))
    assert relative(delta.delta_weight(layer.base_layer.weight).double(), expected) < 1e-5


def test_a_head_in_the_file_is_loaded_if_it_is_named_and_refused_if_not(authors):
    head = {"head.weight": torch.ones(2, 2), "head.bias": torch.zeros(2)}
    model, path = authors(lambda t: t | head)
    load_adapter(model, path, config=TuckerConfig(scale=1, modules_to_save=["head"]))
    assert torch.equal(saved_modules(model)["head"].current.weight, torch.ones(2, 2))
    model, path = authors(lambda t: t | head)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"file\.safetensors: 'head\.\w+' is of no adapter and not the model's own"):
        load_adapter(model, path, config=TuckerConfig(scale=1))
    assert snapshot(model) == before


def test_the_frozen_weights_may_be_in_the_file(authors):
    own = golden("flora_linear")[0].stages[0].state_dict()
    model, path = authors(lambda t: t | {f"stages.0.{key}": tensor for key, tensor in own.items()})
    load_adapter(model, path, config=TuckerConfig(scale=1))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: None, None, r"holds no scale: give config=TuckerConfig\(scale=…\), not None"),
        (lambda t: None, TuckerConfig(), r"holds no scale: give config=TuckerConfig\(scale=…\), not scale=None$"),
        (lambda t: None, TuckerConfig(alpha=3), "holds no scale"),
        (lambda t: None, {"scale": 3}, "holds no scale: .* not {'scale': 3}"),
        (
            lambda t: None,
            TuckerConfig(scale_pattern={"x": 1}),
            r"stages\.0: the file holds no scale, and scale_pattern",
        ),
        (lambda t: {"x": t["stages.0.param_G"]}, TuckerConfig(scale=1), "it has no key <module>.param_G"),
        (
            lambda t: {k.replace("stages", "stage"): v for k, v in t.items()},
            TuckerConfig(scale=1),
            "no module 'stage.0'; near",
        ),
        (
            lambda t: {k.replace("stages.0", "stages"): v for k, v in t.items()},
            TuckerConfig(scale=1),
            "stages cannot be adapted",
        ),
        (
            lambda t: t.__delitem__("stages.0.param_1"),
            TuckerConfig(scale=1),
            r"stages\.0: param_\['1'\] are missing",
        ),
        (lambda t: t | {"stages.0.param_2": torch.ones(1, 1)}, TuckerConfig(scale=1), r"param_\['2'\] are too many"),
        (lambda t: t | {"stages.0.param_G": torch.ones(4)}, TuckerConfig(scale=1), r"stages\.0: param_G is \(4,\)"),
        (lambda t: t | {"stages.0.param_G": torch.ones(4, 6).int()}, TuckerConfig(scale=1), r"of torch\.int32"),
        (
            lambda t: t | {"stages.0.param_0": torch.ones(3, 4)},
            TuckerConfig(scale=1),
            r"stages\.0: a factor is \(3, 4\); mode 1",
        ),
        (lambda t: t | {"stages.0.param_0": torch.full((24, 4), torch.nan)}, TuckerConfig(scale=1), "not finite"),
        (
            zero("stages.0.param_G", "stages.0.param_0"),
            TuckerConfig(scale=1),
            r"stages\.0: the delta could never learn",
        ),
        (lambda t: None, TuckerConfig(scale=1, modules_to_save=["head"]), "modules_to_save: 'head' is not in the file"),
    ],
)
def test_a_wrong_file_of_the_authors_is_refused_by_name(authors, change, config, message):
    model, path = authors(change)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, path, config=config)
    assert str(path) in str(caught.value)
    assert snapshot(model) == before


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("file.pt", lambda path: path.write_bytes(b"")),
        ("file.pt", lambda path: path.write_bytes(b"PK\x03\x04 and no more")),
        ("file.pt", lambda path: path.write_bytes(pickle.dumps(Evil()))),
        ("file.pt", lambda path: torch.save({"a": Evil()}, path)),
        ("file.pt", lambda path: torch.save([torch.ones(1)], path)),
        ("file.pt", lambda path: torch.save({"a": 1}, path)),
        ("file.bin", lambda path: path.write_bytes(os.urandom(100))),
        ("file.safetensors", lambda path: path.write_bytes(b"")),
        ("file.safetensors", lambda path: path.write_bytes(b"\xff" * 100)),
        ("file.safetensors", lambda path: path.write_bytes(b"\x02" + bytes(7) + b"{}" + b"more")),
        ("file.npz", lambda path: path.write_bytes(b"x")),
    ],
)
def test_foreign_files_are_refused_by_name_and_never_run(tmp_path, monkeypatch, name, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    model = base()
    before = snapshot(model)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_adapter(model, tmp_path / name, config=TuckerConfig(scale=1))
    assert snapshot(model) == before
    assert not (tmp_path / "evil").exists()


def test_an_authors_adapter_is_frozen_if_asked_for(authors):
    model, path = authors()
    load_adapter(model, path, trainable=False, config=TuckerConfig(scale=1))
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert isinstance(model.stages[0], AdaptedLayer)
