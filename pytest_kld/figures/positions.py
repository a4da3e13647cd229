"""The positions of a pair's Scores as the diagnosis needs them: their places in the text and their figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pytest_kld.figures.source import starts_of, texts_of

if TYPE_CHECKING:
    from pytest_kld.figures.scores import Scores

_REFERENCE_NON_FINITE, _CANDIDATE_NON_FINITE = 1, 2  # as in divergence.py, which needs torch

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """All positions of one pair; arrays are [windows, positions] unless stated otherwise.

    Attributes:
        kl: KL(reference ‖ candidate) in nats; NaN if a side is not finite.
        valid: whether both sides are finite.
        reference_bad: whether the reference is not finite; `candidate_bad`: the same for the candidate.
        confidence: the reference's probability of its most probable token.
        delta_p: the candidate's probability of the label minus the reference's; NaN without a label.
        reference_argmax: the reference's most probable token; `candidate_argmax`: the candidate's.
        token_ids: the tokens that the models saw.
        labels: the next token, −1 if there is none.
        text: [windows], the number of the text that a window is from.
        source: the place of a position's token in its text.
        first: the position of the table's first column in its window.
        skipped: how many columns at the start of each window are left out.
        gap: KL(prefill ‖ decode) of the candidate, in nats, NaN where it is unknown; None unless both were measured.
        reference_gap: the same for the reference.
        evidence: the arrays stored with the table; see `evidence.gather_evidence`. May be empty.

    """

    kl: Floats
    valid: Booleans
    reference_bad: Booleans
    candidate_bad: Booleans
    confidence: Floats
    delta_p: Floats
    reference_argmax: Integers
    candidate_argmax: Integers
    token_ids: Integers
    labels: Integers
    text: Integers
    source: Integers
    first: int
    skipped: int
    gap: Floats | None
    reference_gap: Floats | None
    evidence: dict[str, NDArray[Any]]

    @classmethod
    def of(cls, scores: Scores) -> Positions:
        """Create the positions from a table and the evidence stored with it."""
        columns, flags = scores.columns, scores.columns["flags"]
        reference_bad, candidate_bad = (flags & _REFERENCE_NON_FINITE) != 0, (flags & _CANDIDATE_NON_FINITE) != 0
        windows, size = flags.shape
        token_ids = columns["token_ids"].astype(np.int64)
        return cls(
            kl=columns["kl"],
            valid=~(reference_bad | candidate_bad),
            reference_bad=reference_bad,
            candidate_bad=candidate_bad,
            confidence=columns["reference_confidence"],
            delta_p=np.exp(-columns["candidate_nll"]) - np.exp(-columns["reference_nll"]),
            reference_argmax=columns["reference_argmax"].astype(np.int64),
            candidate_argmax=columns["candidate_argmax"].astype(np.int64),
            token_ids=token_ids,
            labels=np.concatenate([token_ids[:, 1:], np.full((windows, 1), -1)], axis=1),
            text=texts_of(scores),
            source=starts_of(scores)[:, None] + scores.first_position + np.arange(size),
            first=scores.first_position,
            skipped=scores.skipped,
            gap=columns.get("decode_gap"),
            reference_gap=columns.get("reference_decode_gap"),
            evidence=scores.evidence,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of windows, and of positions in each."""
        windows, size = self.kl.shape
        return windows, size

    @property
    def mean_kl(self) -> float:
        """Return the mean KL over valid positions."""
        return float(self.kl[self.valid].mean())

    @property
    def top1_agreement(self) -> float:
        """Return the share of valid positions where both sides have the same most probable token."""
        return float((self.reference_argmax == self.candidate_argmax)[self.valid].mean())

    def worst(self, count: int) -> list[tuple[int, int]]:
        """Return (window, column) of the positions with the greatest KL, the greatest first.

        Windows overlap, so one place in the text can be scored several times; only its worst score is listed. Positions
        with KL = 0 are not listed.
        """
        flat = np.flatnonzero(self.valid & (self.kl > 0))
        ordered = flat[np.argsort(-self.kl.ravel()[flat], kind="stable")]
        place = (self.text[:, None] * (self.source.max() + 1) + self.source).ravel()[ordered]
        _, first = np.unique(place, return_index=True)
        chosen = ordered[np.sort(first)[:count]]
        windows, columns = np.unravel_index(chosen, self.shape)
        return list(zip(windows.tolist(), columns.tolist(), strict=True))

    def top_share(self, share: float) -> float:
        """Return the share of the total KL in the given share of positions with the greatest KL."""
        kl = np.sort(self.kl[self.valid])[::-1]
        total = float(kl.sum())
        if total == 0 or math.isinf(total):
            return 0.0 if total == 0 else 1.0
        return float(kl[: math.ceil(share * kl.size)].sum()) / total
