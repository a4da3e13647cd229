"""A diagnosis as lines for a terminal. Decoded text is quoted with `repr`, so no raw control character is printed."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTH = 118
_POSITIONS = 4
_WINDOWS = 3
_TOKENS = 6
_TOP = 3
_CONTEXT = 60
"""The number of context characters shown before a label."""


def diagnosis_lines(diagnosis: dict[str, Any]) -> list[str]:
    """Return about 25 lines: patterns, the distribution of KL, and the worst positions."""
    lines = []
    for pattern in diagnosis["patterns"]:
        text = f"{pattern['name']}: {pattern['explanation']} [{pattern['evidence']}]"
        lines += wrap(text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    if not diagnosis["patterns"]:
        lines.append("no known pattern")
    lines.append(f"the worst 1 % of the positions carry {diagnosis['top1pct_share']:.1%} of the KL; mean KL in nats")
    lines += _figures("by confidence of the reference", _confidences(diagnosis["by_confidence"]))
    lines += _figures("by position in the window", _parts(diagnosis["by_position"]))
    lines += _figures("by class of the label", _classes(diagnosis["by_token_class"]))
    lines += _figures("by window", _windows(diagnosis["worst_windows"]))
    lose = [entry for entry in diagnosis["vocabulary"] if entry["contribution"] > 0][:_TOKENS]
    gain = [entry for entry in diagnosis["vocabulary"] if entry["contribution"] < 0][::-1][:_TOKENS]
    lines += _figures("tokens that lose most (share of KL in nats)", [_contribution(entry) for entry in lose])
    lines += _figures("tokens that gain most", [_contribution(entry) for entry in gain])
    for position in diagnosis["worst_positions"][:_POSITIONS]:
        lines += _position(position)
    return lines


def _figures(title: str, figures: Sequence[str]) -> list[str]:
    """Put figures on as few lines as possible. No figure is broken, because its text may contain spaces."""
    lines = [f"  {title}:"]
    for figure in figures:
        if len(lines[-1]) + 2 + len(figure) > _WIDTH:
            lines.append("   ")
        lines[-1] += f" {figure},"
    return [line.removesuffix(",") if line is lines[-1] else line for line in lines] if figures else []


def _confidences(buckets: list[dict[str, Any]]) -> list[str]:
    return [
        f"{bucket['low']:g}-{bucket['high']:g} {bucket['mean_kl']:.4g}"
        for bucket in buckets
        if bucket["mean_kl"] is not None
    ]


def _parts(buckets: list[dict[str, Any]]) -> list[str]:
    """Show four of the parts of a window: the first, two in between, and the last."""
    step = max(1, (len(buckets) - 1) // 3)
    chosen = [*buckets[: -step or None : step][:3], buckets[-1]]
    return [
        f"{bucket['start']}-{bucket['stop']} {bucket['mean_kl']:.4g}"
        for bucket in chosen
        if bucket["mean_kl"] is not None
    ]


def _classes(classes: list[dict[str, Any]]) -> list[str]:
    return [f"{entry['class']} {entry['mean_kl']:.4g} ({entry['share']:.0%} of all)" for entry in classes]


def _windows(windows: list[dict[str, Any]]) -> list[str]:
    return [f"{window['window']} {window['mean_kl']:.4g} (max {window['max_kl']:.4g})" for window in windows[:_WINDOWS]]


def _contribution(entry: dict[str, Any]) -> str:
    return f"{_token(entry['id'], entry['text'])} {entry['contribution']:+.2g}"


def _position(position: dict[str, Any]) -> list[str]:
    delta = "" if position["delta_p"] is None else f", Δp {position['delta_p']:+.3f}"
    lines = [f"window {position['window']}, position {position['position']}: KL {position['kl']:.4g}{delta}"]
    if position["context"] is not None and position["label"] is not None:
        lines[0] += f"; {position['context'][-_CONTEXT:]!r} then {position['label_text']!r}"
    elif position["label"] is not None:
        lines[0] += f"; then id {position['label']}"
    sides = [(side, position[f"{side}_top"][:_TOP]) for side in ("reference", "candidate")]
    tops = [f"{side} {', '.join(_top(token) for token in top)}" for side, top in sides if top]
    return [*lines, *([f"  {'; '.join(tops)}"] if tops else [])]


def _top(token: dict[str, Any]) -> str:
    return f"{_token(token['id'], token['text'])} {token['p']:.3f}"


def _token(token_id: int, text: str | None) -> str:
    return f"id {token_id}" if text is None else repr(text)
