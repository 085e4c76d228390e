"""What is learned: a network, its data and how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from flora.study import networks
from flora.study.data import Corpus, Data, animal_images, digit_images
from flora.study.networks import IMAGE, OWN_IMAGE, Network

REVIEWS = "polarity"


@dataclass(frozen=True)
class Task:
    """A network and its data; each run sees the same numbers of examples and steps."""

    name: str
    title: str
    network: Network
    load: Callable[[], Data]
    train: int = 1000
    validation: int = 300
    steps: int = 96
    batch_size: int = 32


def tasks(texts: Mapping[str, Corpus]) -> dict[str, Task]:
    """All tasks by name; of text, those whose corpora are there (`flora.study.data.corpora`)."""
    found = [
        Task("digits", "EfficientNet-Lite0 on handwritten digits", networks.EFFICIENTNET, partial(digit_images, IMAGE)),
        Task("animals", "EfficientNet-Lite0 on silhouettes", networks.EFFICIENTNET, partial(animal_images, IMAGE)),
        Task(
            "resnet-digits",
            "a small ResNet, pretrained on silhouettes, on handwritten digits",
            networks.RESNET,
            partial(digit_images, OWN_IMAGE),
        ),
        Task(
            "vit-digits",
            "a small ViT, pretrained on silhouettes, on handwritten digits",
            networks.VIT,
            partial(digit_images, OWN_IMAGE),
        ),
    ]
    about = {"trec": "questions", "polarity": "film reviews", "text": "sentences"}
    for name, corpus in texts.items():
        load = partial(_sentences, corpus)
        found.append(Task(name, f"all-MiniLM-L6-v2 on {about[name]}", networks.MINILM, load))
    if {"trec", REVIEWS} <= texts.keys():
        decoder = Network(networks.llama(texts[REVIEWS]), "classifier", exclude=r".*embed_tokens")
        title = "a small LLaMA-like decoder, pretrained on film reviews, on questions"
        found.append(Task("llama-trec", title, decoder, partial(_sentences, texts["trec"])))
    return {task.name: task for task in found}


def _sentences(corpus: Corpus) -> Data:
    return corpus.data(networks.tokenizer())
