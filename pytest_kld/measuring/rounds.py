"""Adaptive windows: look at the data after each round and stop as soon as every limit is decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_kld.figures.schedule import rounds_of, schedule
from pytest_kld.figures.scores import Summary
from pytest_kld.figures.uncertainty import intervals
from pytest_kld.gate.verdict import judge

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_kld.captures.capture import Capture
    from pytest_kld.figures.scores import Scores
    from pytest_kld.gate.verdict import Verdict
    from pytest_kld.measuring.measurement import Measurement
    from pytest_kld.text.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """One pair that is measured in rounds.

    Attributes:
        measurement: where captures and scores come from.
        reference: the reference's capture of the first round, or of more windows.
        candidate: the candidate's.
        windows: all that may be used.
        extended: whether the columns of the second pass are needed.
        gaps: whether each side's own prefill is compared with its decoding.

    """

    measurement: Measurement
    reference: Capture
    candidate: Capture
    windows: Windows
    extended: bool = False
    gaps: bool = False

    def until_decided(self, bounds: Mapping[str, float]) -> tuple[Scores, float]:
        """Return the scores of the first round that decides every limit, or of the last, and what that round may spend.

        Reference and candidate advance together. Captures and scores in the cache are reused.
        """
        config, reference, candidate, scores = self.measurement.config, self.reference, self.candidate, None
        assert config.confidence is not None
        rounds = rounds_of(self.windows)
        for look, windows in zip(schedule(self.windows.count), rounds, strict=True):
            reference = self.measurement.extend(reference, windows, rounds)
            candidate = self.measurement.extend(candidate, windows, rounds)
            scores = self.measurement.scoring.scores(
                reference, candidate, windows, extended=self.extended, known=scores and scores.without_gaps()
            )
            if self.gaps:
                scores = self.measurement.scoring.with_gaps(scores, reference, candidate, windows)
            counted = scores.without_first(config.skip_first)
            known = intervals(counted, config.confidence, spend=look.spend)
            verdict = judge(Summary.of(counted).to_json(), bounds, intervals=known, windows=look.windows)
            self.measurement.progress.note(f"{candidate.name}, {look.windows} windows: {verdict.state}")
            if verdict.decided and not _may_grow(verdict):
                break
        return counted, look.spend


def _may_grow(verdict: Verdict) -> bool:
    """Tell whether a limit that is missed may still be reached: more text can only meet more experts."""
    missed = [check.limit.figure for check in verdict.checks if check.state == "fail"]
    return bool(missed) and set(missed) == {"experts_seen"}
