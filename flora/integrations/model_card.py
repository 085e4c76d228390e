"""The model card of an adapter folder: a README.md as the Hugging Face Hub shows it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import flora
from flora.config import DeltaConfig
from flora.folders import replace_file
from flora.manifest import CARD_FILE, CONFIG_FILE
from flora.report import LayerRow, summary
from flora.state import check_adapter, state_of
from flora.targets import Configs


def write_model_card(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    *,
    base_model: str | None = None,
    results: Mapping[str, float | str] | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Write README.md into the folder of an adapter: what it is, what it reached, and the code that loads it.

    A folder keeps its card when `flora.save_adapter` replaces the adapter in it; write the card again then.

    Args:
        model: has the adapter.
        directory: the folder that `flora.save_adapter` wrote.
        name: the adapter's name in the model.
        base_model: what ``from_pretrained`` takes to make the base: a name on the Hub or a path. By default what a
            model of transformers remembers of its own making.
        results: values by the name of a measure, in the order of the card.
        tags: further tags for the Hub, beside "flora" and the method.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: no adapter at the directory.
        ValueError: no such adapter in the model.
        RuntimeError: no adapters in the model.
    """
    state = state_of(model)
    check_adapter(state, name)
    folder = Path(directory)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"there is no adapter in {folder}; flora.save_adapter writes one")
    config = state.adapters[name].config
    methods = list(dict.fromkeys(own.method for own in _each(config)))
    base_model = base_model or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    report = summary(model)
    rows = [row for row in report.layers if row.adapter == name]
    parameters = sum(row.parameters for row in rows)
    head: dict[str, Any] = {} if base_model is None else {"base_model": base_model}
    head |= {"library_name": "flora", "tags": list(dict.fromkeys(["flora", *methods, *tags]))}
    base = f"`{report.model}`" + (f" from `{base_model}`" if base_model else "")
    share = 100 * parameters / report.base_parameters
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()),  # JSON is YAML
        "---",
        "",
        f"# {Path(os.path.abspath(folder)).name}",
        "",
        f"An adapter for {base}, made with flora {flora.__version__}: {' and '.join(methods)}, "
        f"{parameters:,} parameters, {share:.3g} % of the model's {report.base_parameters:,}.",
        "",
        "## Use",
        "",
        "```python",
        *_loading(model, folder, base_model, rows),
        "```",
        "",
        "`flora.unload(model)` then leaves a plain network with the update in its weights.",
        "",
    ]
    if results:
        lines += ["## Results", "", "| measure | value |", "| --- | ---: |"]
        lines += [f"| {_cell(measure)} | {_value(value)} |" for measure, value in results.items()]
        lines += [""]
    lines += ["## Configuration", "", "```python", *_configuration(config), "```", ""]
    lines += ["| modules | weight | method | size | scale | parameters |", "| --- | --- | --- | --- | ---: | ---: |"]
    lines += _modules(rows)
    card = folder / CARD_FILE
    replace_file(card, ("\n".join(lines) + "\n").encode())
    return card


def _each(config: Configs) -> Sequence[DeltaConfig]:
    return [config] if isinstance(config, DeltaConfig) else list(config.values())


def _loading(model: nn.Module, folder: Path, base_model: str | None, rows: Sequence[LayerRow]) -> list[str]:
    kind, settings = type(model), getattr(model, "config", None)
    dtype = state_of(model).base_dtype
    arguments = [json.dumps(Path(os.path.abspath(folder)).name), "trainable=False"]
    arguments += [] if dtype is None else [f"base_dtype={dtype}"]
    torch = [] if dtype is None else ["import torch"]
    load = f"flora.load_adapter(model, {', '.join(arguments)})"
    if base_model is None or settings is None or kind.__module__.partition(".")[0] != "transformers":
        return [
            *torch,
            "import flora",
            "",
            "",
            f"def load(model):  # {kind.__qualname__}, the base",
            f"    return {load}",
        ]
    labels = getattr(settings, "num_labels", None)
    new_head = any(row.plan == "trained whole" for row in rows) and labels is not None
    given = json.dumps(base_model) + (f", num_labels={labels}" if new_head else "")
    return [
        *torch,
        f"from transformers import {kind.__name__}",
        "",
        "import flora",
        "",
        f"model = {kind.__name__}.from_pretrained({given})",
        load,
    ]


def _configuration(config: Configs) -> list[str]:
    """The expressions that make it, without what is as by default."""
    if isinstance(config, DeltaConfig):
        return [_expression(config)]
    return ["{", *(f"    {pattern!r}: {_expression(own)}," for pattern, own in config.items()), "}"]


def _expression(config: DeltaConfig) -> str:
    given = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    ]
    return f"flora.{type(config).__name__}({', '.join(given)})"


def _modules(rows: Sequence[LayerRow]) -> list[str]:
    """One line for the modules that differ in nothing but the numbers in their names."""
    groups: dict[tuple[str, ...], list[LayerRow]] = {}
    for row in rows:
        where = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name)
        size, scale = (row.size, f"{row.scale:g}") if row.method else ("trained whole", "")
        shape = "×".join(map(str, row.shape))
        groups.setdefault((where, shape, row.method, size, scale), []).append(row)
    return [
        f"| `{where}`{f' ({len(group)})' if len(group) > 1 else ''} | {shape} | {method} | {_cell(size)} | {scale} "
        f"| {sum(row.parameters for row in group):,} |"
        for (where, shape, method, size, scale), group in groups.items()
    ]


def _value(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _cell(str(value))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
