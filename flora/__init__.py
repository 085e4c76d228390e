"""flora: adapters that keep a weight's own N-D shape, computed through their factors in C.

>>> import flora
>>> model = flora.adapt(model, flora.TuckerConfig(rank=16, modules_to_save=["classifier"]))

`adapt`, `merge`, `unmerge`, `unload`, `disabled`, `summary`, `save_adapter` and `load_adapter` work on whole models;
`wrap`, `Linear` and `Conv1d` to `Conv3d` on single layers. docs/guide.md has the tour, docs/methods.md the formulas.
"""

from flora.budgets import budget
from flora.config import (
    CirculantConfig,
    DeltaConfig,
    KroneckerConfig,
    LDRConfig,
    LoRAConfig,
    LoRAXSConfig,
    RescaleConfig,
    StructuredAdapterConfig,
    ToeplitzConfig,
    TuckerConfig,
)
from flora.deltas import Delta, OutputDelta, TuckerDelta, WeightDelta
from flora.drop_in import Conv1d, Conv2d, Conv3d, Embedding, Linear
from flora.layers import AdaptedLayer, wrap
from flora.model import adapt, add_adapter, delete_adapter, disabled, merge, set_adapter, unload, unmerge
from flora.plots import plot_adapter
from flora.report import summary
from flora.serialization import load_adapter, save_adapter
from flora.training import ProgressLine, clip_grad_norm_, parameter_groups, trainable_parameters

__version__ = "0.1.0"

__all__ = [
    "AdaptedLayer",
    "CirculantConfig",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Delta",
    "DeltaConfig",
    "Embedding",
    "KroneckerConfig",
    "LDRConfig",
    "Linear",
    "LoRAConfig",
    "LoRAXSConfig",
    "OutputDelta",
    "ProgressLine",
    "RescaleConfig",
    "StructuredAdapterConfig",
    "ToeplitzConfig",
    "TuckerConfig",
    "TuckerDelta",
    "WeightDelta",
    "adapt",
    "add_adapter",
    "budget",
    "clip_grad_norm_",
    "delete_adapter",
    "disabled",
    "load_adapter",
    "merge",
    "parameter_groups",
    "plot_adapter",
    "save_adapter",
    "set_adapter",
    "summary",
    "trainable_parameters",
    "unload",
    "unmerge",
    "wrap",
]
