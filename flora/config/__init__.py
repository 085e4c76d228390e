"""Configurations of deltas: frozen dataclasses, validated once, to and from JSON; a file a family.

A field that is wrong raises ValueError with the field and its value. Symbols are those of docs/methods.md.
"""

from flora.config.adapter import StructuredAdapterConfig
from flora.config.base import DeltaConfig, ParameterTargets, Rank, Targets, first_match, is_suffix, matches
from flora.config.lora import LoRAConfig, LoRAXSConfig
from flora.config.rescale import RescaleConfig
from flora.config.structured import CirculantConfig, KroneckerConfig, LDRConfig, ToeplitzConfig
from flora.config.tucker import TuckerConfig

__all__ = [
    "CirculantConfig",
    "DeltaConfig",
    "KroneckerConfig",
    "LDRConfig",
    "LoRAConfig",
    "LoRAXSConfig",
    "ParameterTargets",
    "Rank",
    "RescaleConfig",
    "StructuredAdapterConfig",
    "Targets",
    "ToeplitzConfig",
    "TuckerConfig",
    "first_match",
    "is_suffix",
    "matches",
]
