"""Floors: each side of a pair is run a second time, and its two runs are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import FloorError
from pytest_kld.figures.schedule import rounds_of
from pytest_kld.figures.scores import Summary
from pytest_kld.gate.floor import Floor
from pytest_kld.settings.subjects import on_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_kld.captures.capture import Capture
    from pytest_kld.collecting.paths import NeededPaths
    from pytest_kld.measuring.measurement import Measurement
    from pytest_kld.settings.subjects import Role
    from pytest_kld.text.windows import Windows

_Figures = dict[str, Any]
Runs = tuple[_Figures, "Mapping[str, _Figures]"]
"""The figures of two runs of a Subject, and those on each dataset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """Finds the floors of Subjects.

    Attributes:
        measurement: where captures and scores come from.
        windows: all windows that may be used.
        count: how many of them are compared.
        extended: whether the figures of the second pass are needed.
        needed: the paths on which the session's tests need each Subject: one server of a second run serves them all.

    """

    measurement: Measurement
    windows: Windows
    count: int
    extended: bool
    needed: NeededPaths

    def of_pair(self, reference: Capture, candidate: Capture, *, gaps: bool = False) -> Floor:
        """Return the floor of a comparison.

        Args:
            reference: the reference's capture.
            candidate: the candidate's.
            gaps: whether the candidate's prefill is compared with its decoding, which needs the floors of both.

        Raises:
            FloorError: a side cannot be run again.

        """
        sides = [self.of_side(reference, "reference"), self.of_side(candidate, "candidate")]
        if gaps:
            sides[1] = self._with_gap(candidate, sides[1])
        (ours, ours_by_dataset), (theirs, theirs_by_dataset) = sides
        return Floor(
            reference=ours,
            candidate=theirs,
            datasets={
                name: Floor(reference=ours_by_dataset[name], candidate=theirs_by_dataset[name])
                for name in theirs_by_dataset
                if len(theirs_by_dataset) > 1
            },
        )

    def of_side(self, capture: Capture, role: Role) -> Runs:
        """Return the figures of KL(run 1 ‖ run 2) of a capture's Subject, macro averages, and those of each dataset.

        Args:
            capture: of the first run, on any of its paths.
            role: what the Subject is in this session.

        Raises:
            FloorError: the Subject cannot be run again, or the second run is the first one.

        """
        measurement = self.measurement
        subject = measurement.library.subject_of(capture)
        if subject is None:
            raise FloorError(
                f"--kld-floor runs each model twice, and the capture {capture.path} is of none that can be run: name "
                "the model, or leave --kld-floor out"
            )
        rounds = rounds_of(measurement.on_path(self.windows, subject.path), adaptive=measurement.config.adaptive)
        windows = next(one for one in rounds if one.count == self.count)
        also = self.needed.beside(subject, is_reference=role == "reference")
        first = measurement.extend(capture, windows, rounds)
        second = measurement.capture_again(subject, windows, rounds, also, role=role)
        require_two_runs(first, second)
        scores = measurement.scoring.scores(first, second, windows, extended=self.extended)
        scores = scores.without_first(measurement.config.skip_first)
        if apart := scores.finite_on_one_side:
            raise FloorError(
                f"at {apart:,} positions, one of the two runs of {first.name} is finite and the other is not"
            )
        tables = scores.by_dataset()
        summaries = {name: Summary.of(table) for name, table in tables.items()}
        whole = (
            Summary.macro_average(list(summaries.values())) if len(summaries) > 1 else next(iter(summaries.values()))
        )
        return whole.to_json(), {name: summary.to_json() for name, summary in summaries.items()}

    def _with_gap(self, decoded: Capture, found: Runs) -> Runs:
        """Add the floor of the gap between a candidate's paths: the larger mean of the two."""
        subject = self.measurement.library.subject_of(decoded)
        assert subject is not None
        windows = self.measurement.on_path(self.windows, "prefill")
        rounds = rounds_of(windows, adaptive=self.measurement.config.adaptive)
        prefilled = self.measurement.library.obtain(on_path(subject, "prefill"), rounds[0], rounds=rounds)
        other, others = self.of_side(prefilled, "candidate")
        return _gap(found[0], other), {name: _gap(figures, others[name]) for name, figures in found[1].items()}


def _gap(figures: _Figures, other: _Figures) -> _Figures:
    return {**figures, "decode_gap": max(figures["mean"], other["mean"])}


def require_two_runs(first: Capture, second: Capture) -> None:
    """Refuse to take one run for two, whose floor would always be 0.

    Raises:
        FloorError: both captures are the same, or come from the same load of the model.

    """
    one, other = first.manifest, second.manifest
    same = first.path == second.path or one["key"] == other["key"]
    origins = one.get("origin"), other.get("origin")
    if same or (origins[0] is not None and origins[0] == origins[1]):
        what = "the same capture" if same else f"both from the process {origins[0]}"
        raise FloorError(f"the two runs of {first.name} are {what}, so they say nothing of the noise between runs")
