"""A part of the report: its text, its drawings, and what all parts write and draw alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flora.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLOURS
GREY = "#777777"

STYLES: Mapping[str, tuple[str, str]] = {
    "head": (GREY, "X"),
    "full": (BLACK, "*"),
    "lora": (BLUE, "o"),
    "locon": (GREEN, "^"),
    "flora": (VERMILION, "s"),
    "flora-fixed": (ORANGE, "s"),
    "circulant": (PURPLE, "D"),
    "toeplitz": (PURPLE, "v"),
    "ldr": (PURPLE, "<"),
    "kronecker": (PURPLE, "P"),
    "rescale": (GREY, "d"),
    "peft-lora": (SKY, "o"),
    "peft-loha": (SKY, "h"),
    "peft-lokr": (SKY, "p"),
}
"""A method's colour and marker, the same in every drawing."""


@dataclass(frozen=True)
class Section:
    """Markdown that begins with its heading, and the drawings that it shows as ``study-NAME.svg``, by NAME."""

    text: str
    figures: Mapping[str, Figure] = field(default_factory=dict)


def shown(name: str, caption: str) -> str:
    """The markdown of a drawing of the section."""
    return f"![{caption}](study-{name}.svg)"


def unwrapped(text: str) -> str:
    """Markdown with each paragraph and each item of a list on one line, as the other pages have them."""
    lines: list[str] = []
    for line in text.strip().splitlines():
        begins = not lines or not lines[-1] or not line or line.startswith(("- ", "|", "#", "!"))
        if begins or lines[-1].startswith(("|", "#", "!")):
            lines.append(line)
        else:
            lines[-1] += " " + line.strip()
    return "\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in markdown; its first column starts at the left, the others end at the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
