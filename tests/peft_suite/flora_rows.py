"""A pytest plugin that runs PEFT's tests with FLoRA in the place of the methods that they are parametrised over.

PEFT's parametrisations are lists of its methods: those that are recognised are replaced by FLoRA's rows, and every test
in which no FLoRA is left is deselected.
"""

import importlib.util
import sys
import types

import peft
import pytest

from flora.integrations.peft import FloraConfig

CUSTOM_MODELS = [
    ("MLP regex", "MLP", {"target_modules": "lin0"}),
    ("MLP first", "MLP", {"target_modules": ["lin0"]}),
    ("MLP last", "MLP", {"target_modules": ["lin1"]}),
    ("MLP both", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP alpha", "MLP", {"target_modules": ["lin0"], "r": 4, "alpha": 8, "dropout": 0.1}),
    ("MLP ranks by mode", "MLP", {"target_modules": ["lin0"], "r": [3, 5], "init_weights": "orthogonal"}),
    ("MLP patterns", "MLP", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}, "scale": 0.5}),
    ("Embedding + Conv1D conv", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Embedding + Conv1D emb", "EmbConv1D", {"target_modules": ["emb"], "scale": 8.0}),  # so that three steps show
    ("Embedding + Conv1D both", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv1d bigger", "Conv1dBigger", {"target_modules": ["conv1d"]}),
    ("Conv1d groups", "Conv1dGroups", {"target_modules": ["conv1d"]}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d + Linear", "Conv2d", {"target_modules": ["conv2d", "lin0"], "kernel_rank": 3}),
    ("Conv2d hosvd", "Conv2d", {"target_modules": ["conv2d"], "r": 2, "init_weights": "hosvd"}),
    ("Conv2d 1x1", "Conv2d1x1", {"target_modules": ["conv2d"]}),
    ("Conv2d groups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv2d groups 2", "Conv2dGroups2", {"target_modules": ["conv2d"], "scale": 0.1}),  # so that none overflows
    ("Conv3d", "Conv3d", {"target_modules": ["conv3d"]}),
    ("Conv3d + Linear", "Conv3d", {"target_modules": ["conv3d", "lin0"], "scale": 0.1}),
    ("MHA", "MHA", {"target_modules": ["mha"]}),
    ("MHA + Linear", "MHA", {"target_modules": ["mha", "lin0"]}),
]
ACTIVE_TOGETHER = [
    ("FLoRA same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("FLoRA different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("FLoRA overlapping", {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"], "r": 2}),
]
NEEDS_HUB = "reads a configuration from the Hugging Face Hub, and the suite runs without it"
EXPLAINED = {
    "test_mixed_adapter_batches_mha_raises": "it is refused, but not by the name of lora.MultiheadAttention",
    "TestPeftConfig::test_from_pretrained[": NEEDS_HUB,
    "TestPeftConfig::test_from_pretrained_cache_dir": NEEDS_HUB,
    "TestPeftConfig::test_save_pretrained_with_runtime_config": NEEDS_HUB,
}
"""The tests that fail, by a part of their names, and why. One that passes all the same is a failure, too."""
FIELDS = {"init_lora_weights": "init_weights", "lora_alpha": "alpha", "lora_dropout": "dropout"}
SHARED = ("r", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias")


def is_flora(value):
    return value is FloraConfig or isinstance(value, FloraConfig)


def from_lora(config):
    """The FloraConfig that asks for what a LoraConfig does; None for one that asks for more than plain LoRA."""
    plain = peft.LoraConfig().to_dict()
    given = {key: value for key, value in config.to_dict().items() if value != plain[key]}
    if not given.keys() <= {*FIELDS, *SHARED, "rank_pattern", "alpha_pattern", "peft_version"}:
        return None
    return FloraConfig(**{FIELDS.get(key, key): value for key, value in given.items()})


def rows_for(names, values):
    """FLoRA's rows of a parametrisation of PEFT's, or None if it is not one by method."""
    values = list(values)
    if names == "test_name, model_id, config_cls, config_kwargs":
        return [(name, model, FloraConfig, kwargs) for name, model, kwargs in CUSTOM_MODELS]
    if names == "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2":
        random = {"init_weights": False}
        return [(name, "flora", FloraConfig, first | random, other | random) for name, first, other in ACTIVE_TOGETHER]
    if names == "config_class, mandatory_kwargs":
        return [(FloraConfig, {})]
    if names == "config_cls":
        return [FloraConfig] if peft.LoraConfig in values else None
    if names == "config_cls, config_kwargs":
        return [(FloraConfig, row[1]) for row in values if row[0] is peft.LoraConfig and row[1].keys() <= {*SHARED}]
    converted = []
    for row in values:
        items = row if isinstance(row, tuple) else (row,)
        if not any(isinstance(item, peft.PeftConfig) for item in items) or any(map(is_flora, items)):
            return None
        new = tuple(from_lora(item) if type(item) is peft.LoraConfig else item for item in items)
        if type(items[-1]) is peft.LoraConfig and None not in new:
            converted.append(new if isinstance(row, tuple) else new[0])
    return converted


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name == "parametrize":
            rows = rows_for(mark.args[0], mark.args[1])
            if rows is not None:
                marks[i] = pytest.mark.parametrize(mark.args[0], rows).mark


def pytest_collection_modifyitems(config, items):
    ours, others = [], []
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        (ours if any(map(is_flora, values)) else others).append(item)
        for part, reason in EXPLAINED.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    config.hook.pytest_deselected(items=others)
    items[:] = ours


def pytest_configure(config):
    """Stands in, while tests are collected, for what the suite imports for tests that need a network."""
    sys.path.insert(0, str(config.rootpath))
    config.stand_ins = []
    for name, attribute in {"datasets": "load_dataset", "diffusers": "StableDiffusionPipeline"}.items():
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], attribute, type(attribute, (), {}))
            config.stand_ins.append(name)


def pytest_collection_finish(session):
    for name in session.config.stand_ins:
        del sys.modules[name]
