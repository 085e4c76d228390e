"""A module that is trained whole: the frozen original beside one trainable copy an adapter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from flora.base_dtype import given, to_dtype, widened
from flora.layers import is_protocol


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
    base_dtype
        the dtype that the frozen model is kept in: copies are in float32 all the same and cast their inputs. None
        if they are as the original.
    is_head
        whether a copy's output stays in float32, as the model's last; any other comes in the dtype that was given.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        name: str = "",
        base_dtype: torch.dtype | None = None,
        is_head: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.copies = nn.ModuleDict()
        self.active: str | None = None
        self.enabled = True
        self.name = name
        self.base_dtype, self.is_head = base_dtype, is_head
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
        if self.base_dtype is not None:
            self.copies[adapter].float()
        self.set_trainable(adapter, trainable)
        return self.copies[adapter]

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """Let the parameters of a copy learn, or not."""
        for parameter in self.copies[adapter].parameters():
            parameter.requires_grad_(trainable and (parameter.is_floating_point() or parameter.is_complex()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.current
        if self.base_dtype is None or module is self.base_layer:
            return module(*args, **kwargs)
        y = module(*widened(args), **widened(kwargs))
        return y if self.is_head else to_dtype(y, given((args, kwargs), self.base_dtype))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if is_protocol(name) or "_modules" not in self.__dict__ or "base_layer" not in self._modules:
                raise  # while it is being built, copied or unpickled
            return getattr(self.current, name)
