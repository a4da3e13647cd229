"""Diagnosis: where a candidate departs from its reference, computed from the Scores alone. Pure numpy.

The result is plain JSON data; reports show it and xdist transfers it. Its texts are exactly what the tokenizer decodes,
including control characters: code that prints them must escape them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from pytest_kld.diagnosis.patterns import Pattern, find_patterns
from pytest_kld.figures.positions import Positions
from pytest_kld.text.tokens import CLASSES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_kld.figures.scores import Scores
    from pytest_kld.text.tokens import Tokens

CONFIDENCE_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
"""Bounds of the buckets of reference confidence; the last one includes 1."""
_STRETCHES = 16
"""The number of equal parts of a window for KL by position."""
_WORST_POSITIONS = 32
_WORST_WINDOWS = 8
_CONTEXT_TOKENS = 32
"""The number of context tokens shown before a label."""
_VOCABULARY = 16
"""The number of tokens listed that lose most, and of those that gain most."""


class TopToken(TypedDict):
    """One of a side's most probable tokens. `text` is None without a tokenizer."""

    id: int
    text: str | None
    p: float


class WorstPosition(TypedDict):
    """One of the positions with the greatest KL. Each place in the source text is listed once.

    `context` is the text up to and including the position's own token; `label` is the next token's id (None at a
    window's last position); `delta_p` is the candidate's probability of the label minus the reference's; `kl` is in
    nats.
    """

    window: int
    position: int
    source_position: int
    context: str | None
    label: int | None
    label_text: str | None
    kl: float
    delta_p: float | None
    reference_top: list[TopToken]
    candidate_top: list[TopToken]


class WorstWindow(TypedDict):
    """One of the windows with the greatest mean KL in nats; `start` counts tokens of the source text."""

    window: int
    start: int
    mean_kl: float
    max_kl: float


class ConfidenceBucket(TypedDict):
    """The positions whose greatest reference probability is in [low, high), and their mean KL in nats."""

    low: float
    high: float
    positions: int
    mean_kl: float | None


class PositionBucket(TypedDict):
    """The positions [start, stop) of every window, and their mean KL in nats."""

    start: int
    stop: int
    mean_kl: float | None


# The functional form, because `class` is a keyword.
TokenClass = TypedDict("TokenClass", {"class": str, "positions": int, "mean_kl": float, "share": float})
"""The positions whose label belongs to a class, their mean KL in nats, and their share of the total KL."""


class VocabularyEntry(TypedDict):
    """A token's contribution p (log p − log q) to KL, in nats per position; below 0 if the candidate gives it more.

    It is estimated from a random sample of positions; the sum over the vocabulary is the mean KL of these positions.
    """

    id: int
    text: str | None
    contribution: float


class Diagnosis(TypedDict):
    """All findings about one pair."""

    patterns: list[Pattern]
    worst_positions: list[WorstPosition]
    worst_windows: list[WorstWindow]
    top1pct_share: float
    by_confidence: list[ConfidenceBucket]
    by_position: list[PositionBucket]
    by_token_class: list[TokenClass]
    vocabulary: list[VocabularyEntry]


def diagnose(scores: Scores, tokens: Tokens | None = None) -> Diagnosis:
    """Describe where a candidate departs from its reference.

    Args:
        scores: the table, with at least one valid position. The evidence stored with it (`Scores.evidence`) gives the
            most probable tokens and the vocabulary; without evidence these are empty.
        tokens: turns ids into text; without it texts are None and there are no token classes.

    """
    positions = Positions.of(scores)
    return Diagnosis(
        patterns=find_patterns(positions, tokens),
        worst_positions=_worst_positions(positions, tokens),
        worst_windows=_worst_windows(positions),
        top1pct_share=positions.top_share(0.01),
        by_confidence=_by_confidence(positions),
        by_position=_by_position(positions),
        by_token_class=[] if tokens is None else _by_token_class(positions, tokens),
        vocabulary=_vocabulary(positions, tokens),
    )


def _worst_positions(positions: Positions, tokens: Tokens | None) -> list[WorstPosition]:
    tops = _stored_tops(positions, tokens)
    worst = []
    for window, column in positions.worst(len(tops) or _WORST_POSITIONS):
        label, delta_p = int(positions.labels[window, column]), float(positions.delta_p[window, column])
        before = positions.token_ids[window, max(0, column + 1 - _CONTEXT_TOKENS) : column + 1].tolist()
        reference_top, candidate_top = tops.get((window, column + positions.skipped), ([], []))
        worst.append(
            WorstPosition(
                window=window,
                position=column + positions.first,
                source_position=int(positions.source[window, column]),
                context=None if tokens is None else tokens.decode(before),
                label=label if label >= 0 else None,
                label_text=_text(tokens, label) if label >= 0 else None,
                kl=float(positions.kl[window, column]),
                delta_p=delta_p if label >= 0 else None,
                reference_top=reference_top,
                candidate_top=candidate_top,
            )
        )
    return worst


def _stored_tops(
    positions: Positions, tokens: Tokens | None
) -> dict[tuple[int, int], tuple[list[TopToken], list[TopToken]]]:
    evidence = positions.evidence
    if "worst" not in evidence:
        return {}
    reference, candidate = (
        [
            [TopToken(id=token, text=_text(tokens, token), p=p) for token, p in zip(*row, strict=True)]
            for row in zip(evidence[f"{side}_top_ids"].tolist(), evidence[f"{side}_top_p"].tolist(), strict=True)
        ]
        for side in ("reference", "candidate")
    )
    where = map(tuple, evidence["worst"].tolist())
    return dict(zip(where, zip(reference, candidate, strict=True), strict=True))


def _worst_windows(positions: Positions) -> list[WorstWindow]:
    windows = [
        WorstWindow(
            window=window, start=int(source[0]) - positions.first, mean_kl=float(kl.mean()), max_kl=float(kl.max())
        )
        for window, (row, valid, source) in enumerate(zip(positions.kl, positions.valid, positions.source, strict=True))
        if (kl := row[valid]).size
    ]
    return sorted(windows, key=lambda window: -window["mean_kl"])[:_WORST_WINDOWS]


def _by_confidence(positions: Positions) -> list[ConfidenceBucket]:
    bucket = np.searchsorted(CONFIDENCE_EDGES[1:-1], positions.confidence, side="right")
    return [
        ConfidenceBucket(low=low, high=high, positions=int(inside.sum()), mean_kl=_mean(positions.kl[inside]))
        for index, (low, high) in enumerate(pairwise(CONFIDENCE_EDGES))
        for inside in (positions.valid & (bucket == index),)
    ]


def _by_position(positions: Positions) -> list[PositionBucket]:
    size = positions.shape[1]
    edges = np.unique(np.linspace(0, size, _STRETCHES + 1).round().astype(int)).tolist()
    return [
        PositionBucket(
            start=start + positions.first,
            stop=stop + positions.first,
            mean_kl=_mean(positions.kl[:, start:stop][positions.valid[:, start:stop]]),
        )
        for start, stop in pairwise(edges)
    ]


def _by_token_class(positions: Positions, tokens: Tokens) -> list[TokenClass]:
    """Group positions by the class of the label; the classes with the greatest share of the KL come first."""
    labelled = positions.valid & (positions.labels >= 0)
    ids, which = np.unique(positions.labels[labelled], return_inverse=True)
    classes = np.array([CLASSES.index(tokens.class_of(token_id)) for token_id in ids.tolist()], int)[which]
    kl = positions.kl[labelled]
    groups = [(name, kl[classes == index]) for index, name in enumerate(CLASSES)]
    return sorted(
        (
            TokenClass(
                {
                    "class": name,
                    "positions": group.size,
                    "mean_kl": float(group.mean()),
                    "share": _share(group, kl),
                }
            )
            for name, group in groups
            if group.size
        ),
        key=lambda group: -group["mean_kl"] * group["positions"],
    )


def _share(group: NDArray[np.float64], kl: NDArray[np.float64]) -> float:
    """Return a group's share of the total; if that is infinite, its share of the infinite positions."""
    if np.isinf(kl).any():
        group, kl = np.isinf(group), np.isinf(kl)
    return float(group.sum() / kl.sum()) if kl.any() else 0.0


def _vocabulary(positions: Positions, tokens: Tokens | None) -> list[VocabularyEntry]:
    if "contribution" not in positions.evidence:
        return []
    ids, contribution = positions.evidence["vocabulary_ids"], positions.evidence["contribution"]
    order = np.argsort(-contribution)
    lose = [index for index in order[:_VOCABULARY] if contribution[index] > 0]
    gain = [index for index in order[-_VOCABULARY:] if contribution[index] < 0]
    return [
        VocabularyEntry(
            id=int(ids[index]), text=_text(tokens, int(ids[index])), contribution=float(contribution[index])
        )
        for index in (*lose, *gain)
    ]


def _text(tokens: Tokens | None, token_id: int) -> str | None:
    return None if tokens is None else tokens.text(token_id)


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if values.size else None
