"""Results as tables, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flora.bench.compare import Result, Row
from flora.tables import aligned

MIB = 2**20
HEAD = ("peer", "least ms", "quartile ms", "ratio", "±", "overhead / limit", "saved MiB", "peak MiB", "must reach")


def terminal(result: Result) -> str:
    """All figures of one comparison, one peer a line."""
    limit = f", arithmetic limit {result.limit:.3f}" if result.limit is not None else ""
    measured = [_cells(row, result.limit) for row in result.rows if row.timing is not None]
    lines = [f"{result.name}{limit}", aligned(HEAD, measured)]
    lines += [f"{row.peer}: {_shortened(row.absent)}" for row in result.rows if row.absent is not None]
    noisy = [f"{row.peer} ({row.timing.why_noisy})" for row in result.rows if row.timing is not None and row.noisy]
    if noisy:
        lines.append(f"too noisy to be used: {', '.join(noisy)}")
    return "\n".join(lines)


def ratios(results: Sequence[Result], peers: Sequence[str]) -> str:
    """Ratios to the frozen step as a Markdown table: a row for each comparison, a column for each peer."""
    bounded = list(dict.fromkeys(row.peer for result in results for row in result.rows if row.bound is not None))
    limited = any(result.limit is not None for result in results)
    head = ["", *peers, *(["limit"] if limited else []), *(f"{peer} must reach" for peer in bounded)]
    lines = []
    for result in results:
        line = [result.name, *(_ratio(result.row(peer)) for peer in peers)]
        if limited:
            line.append("" if result.limit is None else f"{result.limit:.2f}")
        lines.append([*line, *(_bound(result.row(peer)) for peer in bounded)])
    return markdown(head, lines)


def megabytes(results: Sequence[Result], peers: Sequence[str], field: str) -> str:
    """``field``, "saved" or "peak", in MiB as a Markdown table."""
    lines = []
    for result in results:
        values = [getattr(row, field) if row is not None else None for row in map(result.row, peers)]
        lines.append([result.name, *("–" if value is None else f"{value / MIB:.1f}" for value in values)])
    return markdown(["", *peers], lines)


def microseconds(results: Sequence[Result], peers: Sequence[str]) -> str:
    """Times of single calls, and what they add to the frozen one's, as a Markdown table."""
    bounded = list(dict.fromkeys(row.peer for result in results for row in result.rows if row.over_bound is not None))
    head = ["µs", *peers, *(f"{peer} over {peers[0]}" for peer in peers[1:])]
    lines = []
    for result in results:
        rows = [*map(result.row, peers)]
        times = ["–" if row is None or row.timing is None else f"{row.timing.quartile * 1e6:.1f}" for row in rows]
        lines.append([result.name, *times, *map(_over, rows[1:]), *(_over_bound(result.row(peer)) for peer in bounded)])
    return markdown([*head, *(f"{peer} must reach" for peer in bounded)], lines)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(row: Row, limit: float | None) -> tuple[str, ...]:
    timing = row.timing
    assert timing is not None
    ratio = row.ratio
    overhead = "" if ratio is None or limit is None or ratio == 1.0 else f"{(ratio - 1) / (limit - 1):.1f}"
    return (
        row.peer,
        f"{timing.least * 1e3:.3f}",
        f"{timing.quartile * 1e3:.3f}",
        "noisy" if ratio is None else f"{ratio:.3f}",
        f"{timing.error:.3f}",
        overhead,
        "" if row.saved is None else f"{row.saved / MIB:.1f}",
        "" if row.peak is None else f"{row.peak / MIB:.1f}",
        _bound(row) + _saved_bound(row),
    )


def _ratio(row: Row | None) -> str:
    if row is None or row.timing is None:
        return "–"
    return "noisy" if row.ratio is None else f"{row.ratio:.2f}"


def _over(row: Row | None) -> str:
    if row is None or row.timing is None:
        return "–"
    return "noisy" if row.over is None else f"{row.over * 1e6:.1f}"


def _over_bound(row: Row | None) -> str:
    if row is None or row.over_bound is None:
        return ""
    return f"{row.over_bound * 1e6:.1f}" + _mark(row.over, row.over_bound)


def _mark(value: float | None, bound: float) -> str:
    return "" if value is None else " ✓" if value <= bound else " ✗"


def _bound(row: Row | None) -> str:
    if row is None or row.bound is None:
        return ""
    return f"{row.bound:.2f}" + _mark(row.ratio, row.bound)


def _saved_bound(row: Row) -> str:
    if row.saved is None or row.saved_bound is None:
        return ""
    return f" saved {row.saved_bound / MIB:.1f} {'✓' if row.saved <= row.saved_bound else '✗'}"


def _shortened(reason: str, most: int = 160) -> str:
    return reason if len(reason) <= most else f"{reason[:most]}…"
