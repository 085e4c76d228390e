"""The examples, the notebooks and the Python blocks of the README, the guide and design.md run as they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

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


# Notebooks ---------------------------------------------------------------------------------------------------------


def printed(notebook: nbformat.NotebookNode) -> str:
    """What its cells print."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "examples" / name, as_version=4)


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a notebook prints when it is run again, in a kernel of this Python."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = read(name)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, startup_timeout=600, kernel_name="python3", resources=resources).execute()
    return printed(notebook)


def percentages(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def test_notebook_convnext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, head, deltas, merged, unloaded = percentages(executed("convnext.ipynb", tmp_path, monkeypatch))
    assert base > 90 and unloaded == base
    assert deltas > head + 5 and merged == pytest.approx(deltas, abs=0.5)


def test_notebook_sentence_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = executed("sentence_encoder.ipynb", tmp_path, monkeypatch)
    (line,) = re.findall(r"as it came: .*, adapted: .*", out)
    before, after = percentages(line)
    assert after > before + 2
    assert 'library_name: "flora"' in out


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_keeps_small_outputs_of_a_whole_run(path: Path) -> None:
    """They are what a reader on GitHub sees; no path of the machine that made them is among them."""
    notebook = read(path.name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert path.stat().st_size < 200_000
    assert not re.search(r"/(work|tmp|home|root)/", str(notebook))
