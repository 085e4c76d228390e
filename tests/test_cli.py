"""The command line: what it prints and writes, and how it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import flora
from flora.cli import main
from flora.finetune.network import pretrained


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # argparse's own
        status = exit_.code
    return status, *capsys.readouterr()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says when it refuses."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, ""), err
    assert "Traceback" not in err
    return err


def trained(model: nn.Module, config: flora.DeltaConfig | dict[str, flora.DeltaConfig], folder: Path) -> nn.Module:
    """The model with an adapter of random values, saved in the folder."""
    flora.adapt(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    flora.save_adapter(model, folder)
    return model.eval()


def llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes, **options))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = flora.TuckerConfig(rank=4, scale=-2.0, target_modules=["q_proj", "up_proj"])
    trained(llama(), config, tmp_path / "adapter")
    return tmp_path / "adapter"


# As a program -------------------------------------------------------------------------------------------------------


def program(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flora", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)


def test_as_a_program() -> None:
    done = program("--version")
    assert (done.returncode, done.stdout) == (0, f"flora {flora.__version__}\n")
    done = program()
    assert done.returncode == 2
    assert "usage: flora" in done.stderr
    done = program("inspect", "/no/such/folder")
    assert done.returncode == 2
    assert done.stderr == "flora inspect: there is no adapter folder /no/such/folder\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "flora", "info"], stdout=write, stderr=subprocess.PIPE, timeout=600, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("command", [[], ["finetune"], ["inspect"], ["merge"], ["info"]])
def test_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    status, out, _ = run(capsys, *command, "--help")
    assert status == 0
    assert "None" not in out


# info ---------------------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info")
    assert status == 0
    rows = {line[:16].strip(): line[16:] for line in out.splitlines()}
    assert rows["flora"] == flora.__version__
    assert rows["torch"] == torch.__version__
    assert rows["isa"] in rows["isa available"].split(", ")
    assert int(rows["threads"]) >= 1
    assert rows["exchange api"] in ("True", "False")
    assert "pool" in rows


# inspect ------------------------------------------------------------------------------------------------------------


def test_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(4, 6, 3, padding=1))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(6, 3))
    trained(model, flora.TuckerConfig(rank=2, scale=-0.5, modules_to_save=["head"]), tmp_path / "adapter")
    status, out, _ = run(capsys, "inspect", tmp_path / "adapter")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].endswith("adapter: tucker, for a Sequential")
    assert lines[1] == "  TuckerConfig(scale=-0.5, modules_to_save=('head',), rank=2)"
    conv, head = (next(line.split() for line in lines if line.startswith(name)) for name in ("conv", "head"))
    layer = model.conv
    delta = layer.deltas["default"]
    count = 2 * 2 * 2 * 2 + 6 * 2 + 4 * 2 + 3 * 2 + 3 * 2
    assert conv[1:5] == ["6×4×3×3", "2×2×2×2", "-0.5", str(count)]
    assert float(conv[5]) == pytest.approx(delta.core.norm().item(), rel=0.01)
    assert float(conv[6]) == pytest.approx(delta.delta_weight(layer.base_layer.weight).norm().item(), rel=0.01)
    assert head[1:] == ["trained", "whole", "21"]
    assert lines[-1].startswith(f"{count + 21} parameters, ")
    assert lines[-1].endswith(f"has {6 * 4 * 9 + 6}")


class Varied(nn.Sequential):
    """Layers for every method."""

    def __init__(self) -> None:
        layers = {"conv": nn.Conv2d(4, 8, 3, groups=2), "flat": nn.Flatten(), "fc": nn.Linear(8, 12)}
        layers |= {"norm": nn.LayerNorm((3, 4), bias=False), "last": nn.Linear(12, 8)}
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


VARIED = {  # the configuration, and the size of a delta on the convolution and on a Linear 8→12
    "tucker": (flora.TuckerConfig(rank=2, scale=-3.0), "2×2×2×2", "2×2"),
    "lora": (flora.LoRAConfig(rank=3, alpha=6), "3×2×3×3", "3×3"),
    "locon": (flora.LoRAConfig(rank=3, tucker=True), "3×3×3×3", "3×3"),
    "lora-xs": (flora.LoRAXSConfig(rank=2), "2×2×2×2", "2×2"),
    "circulant": (flora.CirculantConfig(), "a, b", "a, b"),
    "toeplitz": (flora.ToeplitzConfig(symmetric=False, product=False), "a_row, a_col", "a_row, a_col"),
    "ldr": (flora.LDRConfig(terms=1, scale=0.5), "1 term", "1 term"),
    "kronecker": (flora.KroneckerConfig(rank=2), "A 2×9", "A 2×4"),
    "rescale": (flora.RescaleConfig(), "row, column, shift", "row, column, shift"),
    "bias": (flora.RescaleConfig(rows=False, columns=False), "shift", "shift"),
    "block": (flora.StructuredAdapterConfig(norm_after=True), "circulant", "circulant"),
    "kronecker block": (flora.StructuredAdapterConfig(kind="kronecker", rank=4), "A 4×4", "A 4×4"),
    "ldr block": (flora.StructuredAdapterConfig(kind="ldr"), "2 terms", "2 terms"),
}


@pytest.mark.parametrize(("config", "of_conv", "of_fc"), VARIED.values(), ids=list(VARIED))
def test_inspect_shows_every_method(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: flora.DeltaConfig, of_conv: str, of_fc: str
) -> None:
    model = trained(Varied(), config, tmp_path / "adapter")
    status, out, err = run(capsys, "inspect", tmp_path / "adapter")
    assert status == 0, err
    head, *lines = out.splitlines()[2:]
    rows = {line.split()[0]: line for line in lines}
    end = head.index("size") + len("size")
    for name, size in (("conv", of_conv), ("fc", of_fc)):
        assert rows[name][:end].endswith(f" {size}")
        layer = getattr(model, name)
        delta = layer.deltas["default"]
        count = sum(p.numel() for p in delta.parameters())
        scale, parameters, *norms = rows[name][end:].split()
        assert (float(scale), int(parameters)) == (delta.scale, count)
        if isinstance(config, flora.RescaleConfig | flora.StructuredAdapterConfig):
            assert norms == []
        else:
            assert float(norms[-1]) == pytest.approx(
                delta.delta_weight(layer.base_layer.weight).norm().item(), rel=0.01
            )
            assert (len(norms) == 2) == (getattr(delta, "core", None) is not None)
    assert ("norm" in rows) == isinstance(config, flora.RescaleConfig)
    assert lines[-1].startswith(f"{flora.summary(model).adapter_parameters:,} parameters, ")


def test_inspect_of_a_block_around_other_deltas(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("part", nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)))
    model.add_module("head", nn.Linear(4, 2))
    configs = {"part": flora.StructuredAdapterConfig(), "all": flora.TuckerConfig(rank=2, modules_to_save=["head"])}
    trained(model, configs, tmp_path / "adapter")
    status, out, err = run(capsys, "inspect", tmp_path / "adapter")
    assert status == 0, err
    counts = {line.split()[0]: line.split()[4] for line in out.splitlines() if line.startswith("part")}
    assert counts == {"part": "12", "part.0": str(4 + 12 + 8), "part.1": str(4 + 8 + 12)}


def test_inspect_builds_no_update_of_a_great_size(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    trained(model, {"0": flora.CirculantConfig(), "1": flora.LoRAConfig(rank=2)}, tmp_path / "adapter")
    monkeypatch.setattr("flora.cli._MOST_ENTRIES", 6 * 4 - 1)
    status, out, _ = run(capsys, "inspect", tmp_path / "adapter")
    assert status == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line[:2] in ("0 ", "1 ")}
    assert rows["0"][-1] == "12"  # the parameters: no norm after them
    expected = model[1].deltas["default"].delta_weight(model[1].base_layer.weight).norm().item()
    assert float(rows["1"][-1]) == pytest.approx(expected, rel=0.01)


def test_inspect_names_the_module_whose_tensors_do_not_fit(capsys: pytest.CaptureFixture[str], adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    text = file.read_text()
    assert text.count('"shape": [24, 16],\n   "ranks"') == 2
    file.write_text(text.replace('"shape": [24, 16],\n   "ranks"', '"shape": [23, 16],\n   "ranks"', 1))
    assert "model.layers.0.mlp.up_proj: 'model.layers.0.mlp.up_proj.factors.0' is (24, 4)" in refused(
        capsys, "inspect", adapter
    )


def test_inspect_refuses_what_is_no_adapter(capsys: pytest.CaptureFixture[str], tmp_path: Path, adapter: Path) -> None:
    assert "adapter_config.json" in refused(capsys, "inspect", tmp_path)
    tensors = adapter / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    assert "cut off" in refused(capsys, "inspect", adapter)


# merge --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_merge_into_a_transformers_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, tie: bool) -> None:
    base = llama(tie_word_embeddings=tie)
    base.save_pretrained(tmp_path / "base")
    capsys.readouterr()
    config = flora.TuckerConfig(rank=4, target_modules=["q_proj", "down_proj"])
    model = trained(base, config, tmp_path / "adapter")
    output = tmp_path / "merged.safetensors"
    output.write_text("an older file, to be replaced")
    status, out, err = run(capsys, "merge", tmp_path / "adapter", "--base", tmp_path / "base", "--output", output)
    assert status == 0, err
    assert str(output) in out
    fresh = llama(tie_word_embeddings=tie)
    left_out = fresh.load_state_dict(load_file(output), strict=False)
    assert left_out.unexpected_keys == []
    assert left_out.missing_keys == (["lm_head.weight"] if tie else [])  # as transformers itself writes it
    tokens = torch.arange(12).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(tokens).logits, model(tokens).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged.safetensors"]


def test_merge_says_what_it_unties(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    trained(base, flora.TuckerConfig(rank=4, target_modules=["lm_head"]), tmp_path / "adapter")
    output = tmp_path / "merged.safetensors"
    status, out, err = run(capsys, "merge", tmp_path / "adapter", "--base", tmp_path / "base", "--output", output)
    assert status == 0, err
    assert "lm_head.weight was tied to model.embed_tokens.weight and is no longer" in out
    merged = load_file(output)
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_merge_into_efficientnet_with_the_adapter_s_classifier(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = trained(pretrained(7), flora.TuckerConfig(rank=2, modules_to_save=["_fc"]), tmp_path / "adapter")
    output = tmp_path / "merged.safetensors"
    assert run(capsys, "merge", tmp_path / "adapter", "--base", "efficientnet-lite0", "--output", output)[0] == 0
    merged = load_file(output)
    expected = flora.unload(model, merge=True).state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, msg=name)
    assert merged["_fc.weight"].shape[0] == 7


def test_merge_refuses_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path, adapter: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "llama"}')
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    output = tmp_path / "out.safetensors"

    def said(base: object, target: Path = output) -> str:
        return refused(capsys, "merge", adapter, "--base", base, "--output", target)

    assert "--base 'no-such' is neither efficientnet-lite0 nor a folder" in said("no-such")
    assert "another base" in said("efficientnet-lite0")
    assert "another base" in said(tmp_path / "other")
    assert "architectures=None" in said(tmp_path / "odd")
    assert "does not end in .safetensors" in said(tmp_path / "base", tmp_path / "out.bin")
    assert "there is no folder" in said(tmp_path / "base", tmp_path / "missing" / "out.safetensors")
    assert "one of the base's own files" in said(tmp_path / "base", tmp_path / "base" / "model.safetensors")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_merge_that_cannot_be_written_leaves_the_old_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path / "base")
    output = tmp_path / "out.safetensors"
    output.write_text("old")
    capsys.readouterr()

    def full_disk(tensors: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flora.cli.safetensors.torch.save_file", full_disk)
    assert "No space left" in refused(capsys, "merge", adapter, "--base", tmp_path / "base", "--output", output)
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out.safetensors"]


# finetune -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epochs", "0", "0 is not above 0"),
        ("--rank", "x", "invalid int value: 'x'"),
        ("--lr", "-1", "-1 is not a finite number above 0"),
        ("--scale", "nan", "nan is not a finite number above 0"),
        ("--image-size", "16", "--image-size 16 is below"),
        ("--train-size", "1797", "--train-size 1797 of 1797 images"),
        ("--data", "no/such/folder", "--data 'no/such/folder' is not a folder"),
    ],
)
def test_finetune_refuses_bad_options(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "finetune", option, value)
    assert list(tmp_path.iterdir()) == []


def test_finetune_refuses_bad_folders_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    (data / "a").mkdir(parents=True)
    assert "holds 0 image(s)" in refused(capsys, "finetune", "--data", data, "--output", output)
    for i in range(3):
        Image.new("RGB", (9, 9)).save(data / "a" / f"{i}.png")
    assert "holds 1 class folder(s)" in refused(capsys, "finetune", "--data", data, "--output", output)
    (data / "b").mkdir()
    for i in range(3):
        (data / "b" / f"{i}.png").write_bytes(b"not an image")
    assert "cannot read the image" in refused(capsys, "finetune", "--data", data, "--output", output)
    assert "holds a" in refused(capsys, "finetune", "--output", data)
    assert not output.exists()


def test_a_diverging_run_says_so_and_saves_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--lr", "1e20", "--train-size", "20", "--batch-size", "10", "--image-size", "32", "--rank", "2"]
    status, _, err = run(capsys, "finetune", *options, "--output", output, "--quiet")
    assert status == 2
    assert "head only: the loss is" in err
    assert "lower --lr" in err
    assert not output.exists()
