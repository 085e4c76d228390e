"""The study's memory: a file of JSON lines, to which each finished run adds one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def digest(**spec: Any) -> str:
    """The id of what is described: 16 hexadecimal digits, the same in every process."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """The lines of one file, read when asked for. Each is a JSON object with a ``kind`` and an ``id``.

    Of lines with one id the last counts. A line is written at once and reaches the disk before `append` returns; one
    that a killed process left unfinished is passed over, and the run that it was for is done again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self, kind: str | None = None) -> list[Record]:
        """All records, or those of a kind, in the order of their first lines.

        Raises ValueError for a line, other than an unfinished last one, that is no record.
        """
        found: dict[str, Record] = {}
        for number, line in enumerate(self._whole().splitlines(), 1):
            try:
                record = json.loads(line)
                found[record["id"]] = record
                record["kind"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path}, line {number}, is no record of the study: {line[:60]!r}") from error
        return [record for record in found.values() if kind in (None, record["kind"])]

    def has(self, id: str) -> bool:
        """Whether there is a record with this id."""
        return any(record["id"] == id for record in self.records())

    def append(self, record: Record) -> None:
        """Adds a line. Raises OSError if it cannot be written, ValueError for numbers that JSON has not."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        with self.path.open("ab", buffering=0) as file:  # one write at the end, so that other processes may add, too
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
            file.write(line)
            os.fsync(file.fileno())

    def _whole(self) -> bytes:
        """The finished lines; what a killed process began is left out."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return content[: content.rfind(b"\n") + 1]
