"""A module that is trained whole: the frozen original beside one trainable copy an adapter."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class SavedModule(nn.Module):
    """Stands for a module of ``modules_to_save``: runs the active adapter's copy of it, or the frozen original.

    Attributes that it has not itself are those of the module that it runs.

    Attributes
    ----------
    base_layer
        the frozen original.
    copies
        the trainable copies by adapter.
    active
        the adapter whose copy runs; None runs the original.
    enabled
        False runs the original, whatever is active.
    name
        the module's dotted name, for messages.
    """

    def __init__(self, base_layer: nn.Module, *, name: str = "") -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.copies = nn.ModuleDict()
        self.active: str | None = None
        self.enabled = True
        self.name = name
        self.training = base_layer.training

    @property
    def current(self) -> nn.Module:
        """The module that a call runs."""
        if self.enabled and self.active is not None:
            return self.copies[self.active]
        return self.base_layer

    def add_copy(self, adapter: str, *, trainable: bool = True) -> nn.Module:
        """Add a copy of the original; what is active does not change."""
        if adapter in self.copies:
            raise ValueError(f"{self.name}: already has a copy for the adapter {adapter!r}")
        self.copies[adapter] = copy.deepcopy(self.base_layer)
        self.set_trainable(adapter, trainable)
        return self.copies[adapter]

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """Let the parameters of a copy learn, or not."""
        for parameter in self.copies[adapter].parameters():
            parameter.requires_grad_(trainable and (parameter.is_floating_point() or parameter.is_complex()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "base_layer" not in self._modules:
                raise  # while it is being built, copied or unpickled
            return getattr(self.current, name)
