"""The demo: its images and splits, its training loop, the methods that it compares, and the whole of it in small."""

import copy
import dataclasses
import gc
import json
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import flora
from flora.finetune import Settings, prepare
from flora.finetune.data import Dataset, Images, digits, folder, require, split
from flora.finetune.demo import Job, Result, check_output, compared, table
from flora.finetune.methods import FLORA, FULL, HEAD_ONLY, LORA, Ranks
from flora.finetune.network import HEAD, pretrained
from flora.finetune.training import accuracy, fit, predict, saved_bytes

RANKS = Ranks(rank=4, kernel_rank=2, scale=1.0)


def images(counts: list[int], size: int = 4) -> Images:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size)
    return Images(pixels.contiguous(), labels)


def picture_folder(path: Path, counts: dict[str, int]) -> Path:
    for shade, (name, count) in enumerate(counts.items()):
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 30), (60 * shade + 20, 10 * i, 90)).save(path / name / f"{i}.png")
    return path


# Data ---------------------------------------------------------------------------------------------------------------


def test_digits_are_rgb_of_the_size_that_was_asked_for() -> None:
    found, classes = digits(32)
    assert found.pixels.shape == (1797, 3, 32, 32)
    assert found.pixels.dtype == torch.uint8
    assert (int(found.pixels.min()), int(found.pixels.max())) == (0, 255)
    assert classes == tuple("0123456789")


def test_batches_are_normalised_as_imagenet() -> None:
    x, labels = Images(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), torch.tensor([4])).batch(slice(1))
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(x[0, :, 0, 0], expected)
    assert labels.tolist() == [4]


def test_splits_are_disjoint_complete_in_proportion_and_seeded() -> None:
    whole = images([100, 50, 30])
    data = split(whole, ("a", "b", "c"), 90, seed=3)
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [90, 45, 45]
    assert sorted(int(p) for part in parts for p in part.pixels[:, 0, 0, 0]) == list(range(180))
    for part, expected in zip(parts, ([50, 25, 15], [25, 12.5, 7.5], [25, 12.5, 7.5]), strict=True):
        assert torch.allclose(part.labels.bincount().double(), torch.tensor(expected).double(), atol=2)
    again, other = split(whole, ("a", "b", "c"), 90, seed=3), split(whole, ("a", "b", "c"), 90, seed=4)
    assert torch.equal(again.test.pixels, data.test.pixels)
    assert not torch.equal(other.test.pixels, data.test.pixels)


@pytest.mark.parametrize("size", [0, 179, 500])
def test_a_split_that_leaves_a_part_empty_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match=f"--train-size {size} of 180"):
        split(images([100, 50, 30]), ("a", "b", "c"), size, seed=0)


def test_a_split_without_an_image_of_a_class_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--train-size 2 leaves no image of class '\w' to train on"):
        split(images([5, 5, 5]), ("a", "b", "c"), 2, seed=0)


def test_folder_takes_images_by_class_and_leaves_the_rest(tmp_path: Path) -> None:
    picture_folder(tmp_path, {"cat": 3, "ant": 4})
    (tmp_path / "notes.txt").write_text("not a class")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "list.csv").write_text("not an image")
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"not an image")
    (tmp_path / "cat" / "more").mkdir()
    Image.new("L", (8, 64), 200).save(tmp_path / "cat" / "more" / "grey.JPG", format="JPEG")
    found, classes = folder(tmp_path, 16)
    assert classes == ("ant", "cat")
    assert found.labels.tolist() == [0] * 4 + [1] * 4
    assert found.pixels.shape == (8, 3, 16, 16)
    assert (found.pixels[-1].float() - 200).abs().max() <= 2  # "more/grey.JPG" comes last


def test_folder_turns_images_upright(tmp_path: Path) -> None:
    picture_folder(tmp_path, {"a": 3, "b": 3})
    lying = Image.new("RGB", (20, 20), "black")
    lying.paste("white", (0, 0, 10, 20))
    exif = lying.getexif()
    exif[0x0112] = 6  # orientation: to be turned by 90° clockwise
    lying.save(tmp_path / "a" / "9.png", exif=exif)
    found, _ = folder(tmp_path, 20)
    upright = found.pixels[3].float().mean(0)
    assert upright[:10].mean() > 250
    assert upright[10:].mean() < 5


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match=re.escape(f"--data {str(tmp_path / 'missing')!r}")):
        folder(tmp_path / "missing", 32)


@pytest.mark.parametrize("names", [[], ["only"]])
def test_fewer_than_two_classes(tmp_path: Path, names: list[str]) -> None:
    picture_folder(tmp_path, dict.fromkeys(names, 3))
    with pytest.raises(ValueError, match=rf"holds {len(names)} class folder"):
        folder(tmp_path, 32)


@pytest.mark.parametrize("count", [0, 2])
def test_a_class_of_too_few_images(tmp_path: Path, count: int) -> None:
    picture_folder(tmp_path, {"full": 3, "poor": count})
    with pytest.raises(ValueError, match=rf"poor' holds {count} image"):
        folder(tmp_path, 32)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "cannot identify"), (b"no image", "cannot identify"), (None, "truncated")],
    ids=["empty", "foreign", "truncated"],
)
def test_an_unreadable_image(tmp_path: Path, content: bytes | None, reason: str) -> None:
    picture_folder(tmp_path, {"a": 3, "b": 3})
    bad = tmp_path / "b" / "bad.jpg"
    if content is None:
        Image.effect_noise((64, 64), 50).save(bad)
        content = bad.read_bytes()[:600]
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read the image '.*bad\.jpg': .*{reason}"):
        folder(tmp_path, 32)


def test_an_image_of_16_bits_is_refused_rather_than_clipped(tmp_path: Path) -> None:
    picture_folder(tmp_path, {"a": 3, "b": 3})
    Image.new("I;16", (8, 8), 40000).save(tmp_path / "a" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png.*more than 8 bits"):
        folder(tmp_path, 32)


def test_a_missing_package_says_what_to_install() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"needs 'no_such_package': pip install 'flora-adapters\[cli\]'"):
        require("no_such_package")


def test_comparing_without_peft_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"needs 'peft': pip install 'flora-adapters\[peft\]'"):
        prepare(Settings(output=tmp_path, compare=True))


# Training -----------------------------------------------------------------------------------------------------------


def separable(size: int = 4) -> Dataset:
    """Dark and bright images."""
    labels = torch.arange(60) % 2
    noise = torch.randint(0, 60, (60, 3, size, size), generator=torch.Generator().manual_seed(0))
    whole = Images((labels.view(-1, 1, 1, 1) * 150 + noise).to(torch.uint8), labels)
    return split(whole, ("dark", "bright"), 40, seed=0)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def train(model: nn.Module, data: Dataset, lr: float, epochs: int = 3):
    return fit(model, data, epochs=epochs, batch_size=8, lr=lr, seed=0, label="test", quiet=True)


def test_fit_learns_and_leaves_batchnorm_statistics_alone() -> None:
    model, data = small_network(), separable()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result = train(model, data, lr=1e-2)
    assert accuracy(predict(model, data.test), data.test) == 1.0
    assert result.best == 1.0
    assert len(result.validation) == 3
    assert result.seconds_per_step > 0
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, statistics[name]), name


def test_fit_keeps_the_epoch_that_validated_best(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, seen = small_network(), separable(), []
    scores = iter([0.5, 0.9, 0.7])

    def score(logits: torch.Tensor, split: Images) -> float:
        seen.append(model[3].weight.detach().clone())
        return next(scores)

    monkeypatch.setattr("flora.finetune.training.accuracy", score)
    assert train(model, data, lr=1e-2).best == 0.9
    assert torch.equal(model[3].weight, seen[1])
    assert not torch.equal(model[3].weight, seen[2])


def test_fit_changes_only_what_requires_a_gradient() -> None:
    model = small_network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    train(model, separable(), lr=1e-2, epochs=1)
    assert torch.equal(model[0].weight, before)


def test_fit_stops_at_a_loss_that_is_not_finite() -> None:
    model = small_network()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"test: the loss is nan in epoch 1; lower --lr 0\.01"):
        train(model, separable(), lr=1e-2)


def test_saved_bytes_counts_each_storage_once() -> None:
    x = torch.randn(10, 3, requires_grad=True)
    assert saved_bytes(nn.Identity(), x) == 0

    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x  # saves x twice

    assert saved_bytes(Square(), x) == 10 * 3 * 4
    layer = nn.Linear(3, 5)
    assert saved_bytes(layer, x) == (10 * 3 + 5 * 3) * 4  # x for the weight, the weight for x
    assert saved_bytes(layer.requires_grad_(False), x) == 5 * 3 * 4


def test_saved_bytes_keeps_nothing_itself() -> None:
    outputs = []
    layer = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    layer[0].register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    assert saved_bytes(layer, torch.randn(10, 3)) == (10 * 3 + 10 * 5) * 4
    gc.collect()
    assert outputs[0]() is None


# Methods ------------------------------------------------------------------------------------------------------------


def learns(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_head_only_and_full() -> None:
    model, _ = HEAD_ONLY.prepare(pretrained(5, 32), RANKS)
    assert learns(model) == {"_fc.weight", "_fc.bias"}
    model, _ = FULL.prepare(model, RANKS)
    assert learns(model) == {name for name, _ in model.named_parameters()}


def test_flora_adapts_every_convolution_and_starts_as_the_base() -> None:
    base = pretrained(5, 32).eval()
    convolutions = {name for name, m in base.named_modules() if isinstance(m, nn.Conv2d)}
    x = torch.randn(2, 3, 32, 32)
    base.requires_grad_(False)
    expected = base(x)
    model, _ = FLORA.prepare(base, RANKS)
    adapted = {name for name, m in model.named_modules() if isinstance(m, flora.AdaptedLayer)}
    assert adapted == convolutions
    assert len(adapted) == 49
    assert torch.equal(model.eval()(x), expected)
    assert any("_depthwise_conv.deltas" in name for name in learns(model))
    assert not any("base_layer" in name for name in learns(model))


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::DeprecationWarning")
def test_lora_serves_what_peft_accepts_and_names_what_it_refuses() -> None:
    base = pretrained(5, 32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = base(x)
        model, notes = LORA.prepare(base, RANKS)
        torch.testing.assert_close(model.eval()(x), expected)  # stock convolutions are the same function
    assert "on 33 of 49 convolutions" in notes[0]
    assert "refuses 16, 16 of them depthwise" in notes[1]
    assert "_blocks.0._depthwise_conv, _blocks.1._depthwise_conv" in notes[1]
    assert all("lora_" in name or HEAD in name for name in learns(model))


def test_a_network_of_its_own_classes_differs_in_the_classifier_alone() -> None:
    torch.manual_seed(0)
    whole, new = pretrained().state_dict(), pretrained(5, 64).state_dict()
    assert new[HEAD + ".weight"].shape[0] == 5
    assert whole[HEAD + ".weight"].shape[0] == 1000
    assert whole.keys() == new.keys()
    assert all(torch.equal(new[name], whole[name]) for name in new if not name.startswith(HEAD))


@pytest.fixture(scope="module")
def short_run() -> tuple[dict[str, nn.Module], Dataset]:
    """The network after five epochs of 200 small digits, by method, and the images."""
    data = split(*digits(32), 200, seed=0)
    few = torch.arange(300)
    data = dataclasses.replace(data, validation=data.validation.subset(few[:50]), test=data.test.subset(few))
    models = {}
    for method in (HEAD_ONLY, FLORA):
        torch.manual_seed(0)
        model, _ = method.prepare(pretrained(10, 32), Ranks(rank=8, kernel_rank=2, scale=1.0))
        fit(model, data, epochs=5, batch_size=20, lr=method.lr, seed=0, label=method.name, quiet=True)
        models[method.name] = model
    return models, data


def test_flora_is_worth_more_than_the_head_alone(short_run: tuple[dict[str, nn.Module], Dataset]) -> None:
    models, data = short_run
    reached = {name: accuracy(predict(model, data.test), data.test) for name, model in models.items()}
    assert reached[HEAD_ONLY.name] > 0.5  # both have learned; at chance it is 0.1
    assert reached[FLORA.name] > reached[HEAD_ONLY.name] + 0.08  # some seeds and instruction sets gave 0.14 to 0.23


def test_training_flora_changes_nothing_of_the_base(short_run: tuple[dict[str, nn.Module], Dataset]) -> None:
    trained = copy.deepcopy(short_run[0][FLORA.name])
    before, after = pretrained(10, 32).state_dict(), flora.unload(trained, merge=False).state_dict()
    assert any("running_mean" in name for name in after)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in after if not name.startswith(HEAD))


# The whole ----------------------------------------------------------------------------------------------------------


def small_job(tmp_path: Path, **options: object) -> Job:
    settings = Settings(output=tmp_path / "out", epochs=1, rank=2, image_size=32, train_size=20, batch_size=10)
    job = prepare(dataclasses.replace(settings, **options))
    few = torch.arange(30)
    return dataclasses.replace(
        job,
        data=dataclasses.replace(job.data, validation=job.data.validation.subset(few), test=job.data.test.subset(few)),
    )


def test_the_demo_saves_loads_and_merges_with_the_same_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_job(tmp_path).run()
    out = capsys.readouterr().out
    assert "20 images to train on, 30 to validate, 30 to test, 10 classes, seed 0" in out
    assert re.search(r"^head only +\d+\.\d% .* 12,810 ", out, flags=re.MULTILINE)
    assert re.search(r"^FLoRA +\d+\.\d% ", out, flags=re.MULTILINE)
    proof = re.findall(r"trained and (\w+): (\d+) of 30 predictions equal, largest logit difference (\S+)", out)
    assert [(name, count) for name, count, _ in proof] == [("loaded", "30"), ("merged", "30")]
    assert float(proof[0][2]) == 0.0
    assert float(proof[1][2]) < 1e-3
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_demo_on_a_base_in_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_job(tmp_path, base_dtype="bfloat16").run()
    out = capsys.readouterr().out
    assert "trained and loaded: 30 of 30 predictions equal, largest logit difference 0.0e+00" in out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    dtypes = {key: tensor["dtype"] for key, tensor in config["base"]["tensors"].items()}
    assert dtypes["_conv_stem.weight"] == "bfloat16" and dtypes["_bn0.weight"] == "float32"


def test_the_demo_on_a_folder_of_images_quietly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = picture_folder(tmp_path / "data", {"blue": 6, "green": 6, "red": 6})
    settings = Settings(data=data, output=tmp_path / "out", epochs=1, rank=2, image_size=32, batch_size=6, quiet=True)
    prepare(settings).run()
    printed = capsys.readouterr()
    assert printed.out.startswith("method")
    assert "trained and merged: 3 of 3" in printed.out
    assert printed.err == ""


def test_the_same_seed_gives_the_same_adapter(tmp_path: Path) -> None:
    for name in ("a", "b"):
        small_job(tmp_path, output=tmp_path / name, quiet=True).run()
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


def test_an_image_below_the_stride_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--image-size 31"):
        prepare(Settings(output=tmp_path / "out", image_size=31))


def test_output_must_be_new_or_an_adapter(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "nested")
    check_output(tmp_path)
    model = flora.adapt(small_network(), flora.TuckerConfig(rank=2))
    flora.save_adapter(model, tmp_path / "adapter")
    check_output(tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="holds adapter"):
        check_output(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        check_output(file)
    with pytest.raises(PermissionError, match="cannot be made"):
        check_output(file / "below")
    assert not (tmp_path / "new").exists()


def test_table_lines_up() -> None:
    lines = table([Result("head only", 0.885, 0.9, 12810, 0.0712, 3 << 20), Result("FLoRA", 1.0, 1, 7, 1.5, 400 << 20)])
    assert len({len(line) for line in lines.splitlines()}) == 1
    assert re.search(r"head only +88\.5% +90\.0% +12,810 +0\.071 +3\.0 MiB", lines)


def test_compared_counts_equal_predictions() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert compared("x", a, a) == "trained and x: 2 of 2 predictions equal, largest logit difference 0.0e+00"
    assert "1 of 2 predictions equal, largest logit difference 2.0e+00" in compared(
        "x", a, a + torch.tensor([2.0, 0.0])
    )
