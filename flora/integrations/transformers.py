"""Hugging Face Trainer: checkpoints that hold adapters and not the base, resumed and best ones restored exactly.

A plain ``Trainer`` trains an adapted model as it trains any. Its checkpoints hold the whole model, though, under the
names that transformers gives weights on disk, and come back only where those are the names in memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from flora.deltas import Delta
from flora.filling import Filler
from flora.integrations.model_card import write_model_card
from flora.manifest import CONFIG_FILE, read_adapter
from flora.serialization import save_adapter
from flora.state import adapted_layers, check_unmerged, saved_modules, state_of
from flora.tensor_files import Tensors

__all__ = ["AdapterCheckpoints", "AdapterTrainer", "restore_adapter", "write_model_card"]

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class AdapterCheckpoints(_Base):
    """A mixin to stand before a ``Trainer`` class: ``class MyTrainer(AdapterCheckpoints, SFTTrainer)``.

    Every checkpoint, and what ``save_model`` writes, holds a folder for each adapter of the model, which
    ``flora.load_adapter(model, "checkpoint-500")`` reads, with a model card that has the evaluation's results, beside
    the trainer's own state and tokenizer. ``resume_from_checkpoint`` and ``load_best_model_at_end`` put the values back
    into the adapters that the model has; the base is that of the running script.

    Where the trainer shards the model (FSDP, DeepSpeed), its checkpoints are its own.
    """

    def _whole(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._whole():
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        names = tuple(state_of(model).adapters)
        save_adapter(model, folder, names)
        for name in names:
            write_model_card(model, folder / name, name, results=self._results())
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _results(self) -> dict[str, float]:
        """The evaluation of the model as it is: of the best step once that is loaded, of the present one otherwise."""
        best = self.state.best_global_step if self.args.load_best_model_at_end and not self.is_in_train else None
        step = best or self.state.global_step
        found = [log for log in self.state.log_history if log["step"] == step and any(map(_is_result, log))]
        return {key: value for key, value in found[-1].items() if _is_result(key)} if found else {}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._restore(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not self._restore(best):
            super()._load_best_model()

    def _restore(self, checkpoint: str) -> bool:
        """Whether the checkpoint holds the adapters, which then have its values."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        names = tuple(state_of(model).adapters)
        if self._whole() or not any((Path(checkpoint) / name / CONFIG_FILE).is_file() for name in names):
            return False
        for name in names:
            restore_adapter(model, Path(checkpoint) / name, name)
        return True


def _is_result(key: str) -> bool:
    return key.startswith("eval_") and not key.endswith(("_runtime", "_per_second", "_preparation_time"))


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """``transformers.Trainer`` for an adapted model; see `AdapterCheckpoints`."""


def restore_adapter(model: nn.Module, directory: str | os.PathLike[str], name: str = "default") -> None:
    """Copy the values of a saved adapter into one that the model has: the same parameters, so an optimizer holds them.

    Args:
        model: has an adapter of that name, on the same modules and of the same ranks.
        directory: the folder that `flora.save_adapter` wrote.
        name: the adapter's name in the model.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a damaged file, or an adapter of other modules or shapes; the message names the file and the module.
            Nothing is changed.
        RuntimeError: some of the model is merged.
    """
    check_unmerged(model)
    file = read_adapter(directory)
    deltas = {
        where: cast(Delta, layer.deltas[name]) for where, layer in adapted_layers(model).items() if name in layer.deltas
    }
    copies = {where: module.copies[name] for where, module in saved_modules(model).items() if name in module.copies}
    differing = (file.layers.keys() ^ deltas.keys()) | (set(file.saved) ^ copies.keys())
    if differing:
        some = ", ".join(sorted(differing)[:6])
        raise ValueError(f"{file.path / CONFIG_FILE}: the adapter {name!r} is on other modules: {some}")
    fill = Filler(Tensors.of(file.tensors), {where: entry.scale for where, entry in file.layers.items()})
    try:
        fill(deltas, copies)
    except ValueError as error:
        raise ValueError(f"{file.path / CONFIG_FILE}: {error}") from error
