"""Deltas: one file a family of parametrisations, and `build`, which picks the one a configuration asks for."""

import torch

from flora.config import DeltaConfig
from flora.deltas.adapter import StructuredAdapterDelta
from flora.deltas.base import Delta, OutputDelta, Site, WeightDelta
from flora.deltas.lora import LoRADelta, LoRAXSDelta
from flora.deltas.rescale import RescaleDelta
from flora.deltas.structured import CirculantDelta, KroneckerDelta, LDRDelta, ToeplitzDelta
from flora.deltas.tucker import TuckerDelta

__all__ = [
    "CirculantDelta",
    "Delta",
    "KroneckerDelta",
    "LDRDelta",
    "LoRADelta",
    "LoRAXSDelta",
    "OutputDelta",
    "RescaleDelta",
    "Site",
    "StructuredAdapterDelta",
    "ToeplitzDelta",
    "TuckerDelta",
    "WeightDelta",
    "build",
]


def build(config: DeltaConfig, site: Site) -> Delta:
    """The delta that ``config`` asks for, on one layer.

    Raises ValueError, naming the module, if the ranks or sizes do not fit its weight; TypeError for a configuration of
    no known method; RuntimeError where PyTorch cannot make its tensors, for want of memory most likely. Its parameters
    can be trained also if they are made in ``torch.inference_mode``.
    """
    for kind in type(config).__mro__:
        if kind in Delta._of_config:
            try:
                with torch.inference_mode(False), torch.no_grad():
                    return Delta._of_config[kind](config, site)
            except RuntimeError as error:
                raise RuntimeError(f"{site.label}: {type(config).__name__} cannot make its tensors: {error}") from error
    raise TypeError(f"{site.label}: no delta is known for a configuration of type {type(config).__name__}")
