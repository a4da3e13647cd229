"""Where the positions of a pair's Scores are in their texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pytest_kld.figures.scores import Scores

Integers = NDArray[np.int64]


def starts_of(scores: Scores) -> Integers:
    """Return where each window begins in its text, in tokens: [windows]. If it is not stored, windows slide."""
    known: Integers | None = scores.evidence.get("starts")
    return known if known is not None else np.concatenate([np.arange(n) for n in _counts(scores)]) * _stride(scores)


def texts_of(scores: Scores) -> Integers:
    """Return the number of the text that each window is from: [windows].

    Windows that are spread over a text are in any order. Of others, those of one text have increasing starts.
    """
    if scores.about["protocol"].get("windows_from") == "spread":
        return np.repeat(np.arange(len(_counts(scores))), _counts(scores))
    starts = starts_of(scores)
    return np.cumsum(np.diff(starts, prepend=starts[:1] - 1) <= 0)


def places_of(scores: Scores) -> Integers:
    """Return the place of each position: [windows, positions], in tokens; several texts follow one another."""
    starts, texts, size = starts_of(scores), texts_of(scores), scores.about["protocol"]["window_size"]
    ends = np.zeros(int(texts.max()) + 1, np.int64)
    np.maximum.at(ends, texts, starts + size)
    before = np.concatenate([[0], np.cumsum(ends)[:-1]])
    return (before[texts] + starts)[:, None] + np.arange(scores.first_position, size)


def scored_places_of(scores: Scores) -> tuple[Integers, int]:
    """Return the places of positions in the text without what no window scores, and how far apart windows usually are.

    Returns:
        [windows, positions]: texts follow one another, and gaps between windows are left out; and the usual distance
        between two windows, in tokens: at most the number of their scored positions.

    """
    starts, texts, size = starts_of(scores), texts_of(scores), scores.columns["kl"].shape[1]
    order = np.lexsort((starts, texts))
    same_text = np.diff(texts[order]) == 0
    steps = np.where(same_text, np.minimum(np.diff(starts[order]), size), size)
    places = np.empty_like(starts)
    places[order] = np.concatenate([[0], np.cumsum(steps)])
    usual = int(np.median(steps)) if steps.size else min(_stride(scores), size)
    return places[:, None] + np.arange(size), max(usual, 1)


def _counts(scores: Scores) -> list[int]:
    """Return the number of windows of each dataset."""
    windows = len(scores.columns["kl"])
    counts = [dataset["windows"] for dataset in scores.about["protocol"].get("datasets", ())]
    return counts if sum(counts) == windows else [windows]


def _stride(scores: Scores) -> int:
    stride: int = scores.about["protocol"]["stride"]
    return stride
