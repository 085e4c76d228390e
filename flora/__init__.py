"""flora: adapters that keep a weight's own N-D shape, computed through their factors in C.

>>> import flora
>>> model = flora.adapt(model, flora.TuckerConfig(rank=16, modules_to_save=["classifier"]))

`adapt`, `merge`, `unmerge`, `unload`, `disabled`, `summary`, `save_adapter` and `load_adapter` work on whole models;
`wrap`, `Linear` and `Conv1d` to `Conv3d` on single layers. docs/guide.md has the tour, docs/methods.md the formulas.
"""

from flora.config import DeltaConfig, TuckerConfig
from flora.deltas import Delta, TuckerDelta
from flora.layers import AdaptedLayer, Conv1d, Conv2d, Conv3d, Embedding, Linear, wrap

__version__ = "0.1.0"
