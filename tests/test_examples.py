"""The examples and every Python block of the README, the guide and design.md run as they stand, offline."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", blocks("README.md"))
def test_readme(code: str, tmp_path: Path) -> None:
    run("-c", code, cwd=tmp_path)


def test_readme_has_its_three_models() -> None:
    code = blocks("README.md")
    for model in ("ViTForImageClassification", "ConvNextV2ForImageClassification", "LlamaForCausalLM"):
        assert any(model in block and len(block.splitlines()) <= 12 for block in code), model


def test_guide(tmp_path: Path) -> None:
    run("-c", "\n".join(blocks("docs/guide.md")), cwd=tmp_path)  # its blocks continue each other


def test_a_method_from_outside_is_adapted_saved_and_reported(tmp_path: Path) -> None:
    (code,) = blocks("docs/design.md")
    out = run("-c", code, cwd=tmp_path)
    assert "block_diagonal" in out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_conv_layer(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples/conv_layer.py"), cwd=tmp_path)
    first, last = (float(loss) for loss in re.findall(r"step (?:0|100): loss ([\d.]+)", out))
    assert last < 0.9 * first
    assert float(re.findall(r"merged: largest difference (\S+)", out)[0]) < 1e-5
    assert "the base is what it was: True" in out


def test_vit(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples/vit.py"), cwd=tmp_path)
    assert float(re.findall(r"step 30: loss ([\d.]+)", out)[0]) < 0.3
    assert float(re.findall(r"difference of a logit (\S+)", out)[0]) < 1e-4


def test_convnext(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples/convnext.py"), cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"^loss ([\d.]+)", out, flags=re.MULTILINE)]
    assert losses[-1] < losses[0]
    assert "bit for bit: True" in out


def test_llama(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples/llama.py"), cwd=tmp_path)
    own = {name: dict(re.findall(r"(\w+) ([\d.]+)", rest)) for name, rest in re.findall(r"adapter (\w+): (.*)", out)}
    assert float(own["up"]["up"]) < float(own["up"]["down"])
    assert float(own["down"]["down"]) < float(own["down"]["up"])
    assert float(re.findall(r"no adapter: up ([\d.]+)", out)[0]) > float(own["up"]["up"])
