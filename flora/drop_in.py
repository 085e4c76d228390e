"""Layers that are adapted from the start: PyTorch's own constructors, with ``delta=`` for a configuration.

Each takes the arguments of the `torch.nn` class of its name, shapes of inputs and outputs are that class's, and raises
what `flora.wrap` raises: ValueError for ranks that do not fit the weight.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from flora.config import DeltaConfig
from flora.layers import AdaptedLayer, alone


class _Built(AdaptedLayer):
    """An AdaptedLayer that makes its own base."""

    def __init__(self, base_layer: nn.Module, delta: DeltaConfig) -> None:
        super().__init__(base_layer)
        self.add_delta("default", alone(delta))
        self.set_active(["default"])


class Linear(_Built):
    """`torch.nn.Linear` with a delta: x (..., in_features) to (..., out_features). ``delta`` is a configuration."""

    def __init__(self, in_features: int, out_features: int, *args: Any, delta: DeltaConfig, **kwargs: Any) -> None:
        super().__init__(nn.Linear(in_features, out_features, *args, **kwargs), delta)


class Conv1d(_Built):
    """`torch.nn.Conv1d` with a delta: x (batch, in_channels, length). ``delta`` is a configuration."""

    def __init__(self, in_channels: int, out_channels: int, *args: Any, delta: DeltaConfig, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d(in_channels, out_channels, *args, **kwargs), delta)


class Conv2d(_Built):
    """`torch.nn.Conv2d` with a delta: x (batch, in_channels, height, width). ``delta`` is a configuration."""

    def __init__(self, in_channels: int, out_channels: int, *args: Any, delta: DeltaConfig, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, *args, **kwargs), delta)


class Conv3d(_Built):
    """`torch.nn.Conv3d` with a delta: x (batch, in_channels, depth, height, width). ``delta`` is a configuration."""

    def __init__(self, in_channels: int, out_channels: int, *args: Any, delta: DeltaConfig, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d(in_channels, out_channels, *args, **kwargs), delta)


class Embedding(_Built):
    """`torch.nn.Embedding` with a delta: ids (...) to (..., embedding_dim). ``delta`` is a configuration."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, delta: DeltaConfig, **kwargs: Any) -> None:
        super().__init__(nn.Embedding(num_embeddings, embedding_dim, *args, **kwargs), delta)
