"""Measures a matrix: takes the captures of its candidates, and compares each pair."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.collecting.items import bounds_of
from pytest_kld.collecting.paths import NeededPaths
from pytest_kld.errors import CaptureError, KLDError, ModelError
from pytest_kld.figures.between import between
from pytest_kld.gate.floor import floor_of_pair
from pytest_kld.gate.matrix import MatrixResult, check_to_json, judge_pair
from pytest_kld.gate.regression import CONFIDENCE
from pytest_kld.gate.verdict import Verdict
from pytest_kld.measuring.floors import Floors
from pytest_kld.settings.subjects import is_overridden, on_path, reference_of
from pytest_kld.subjects.model import is_capture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_kld.captures.capture import Capture
    from pytest_kld.collecting.matrix import Matrix, Member
    from pytest_kld.figures.scores import Scores
    from pytest_kld.gate.verdict import Check
    from pytest_kld.measuring.floors import Runs
    from pytest_kld.measuring.measurement import Measurement
    from pytest_kld.settings.config import KLDConfig
    from pytest_kld.settings.subjects import Overrides
    from pytest_kld.subjects.subject import Subject
    from pytest_kld.text.windows import Windows


class _GapError(Exception):
    """A member has no capture; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparing:
    """One matrix, to be measured.

    No model is run for it that a selected test does not need: captures are those of the members' tests, or in the
    cache.

    Attributes:
        matrix: what is compared.
        config: the settings of its tests.
        measurement: where captures and scores come from.
        overrides: what fixtures add to Subjects.
        windows: the windows, on whichever path.
        selected: the tests of this session.
        why_unmeasured: says why none of some tests measured its candidate; returns None if one did.
        is_elsewhere: tells whether one of some tests runs in another process.

    """

    matrix: Matrix
    config: KLDConfig
    measurement: Measurement
    overrides: Overrides
    windows: Windows
    selected: Sequence[pytest.Item]
    why_unmeasured: Callable[[Sequence[pytest.Item]], str | None]
    is_elsewhere: Callable[[Sequence[pytest.Item]], bool]

    def result(self) -> MatrixResult:
        """Compare every pair; whoever attaches the result to a test fills in what the test tells.

        Raises:
            KLDError: two members cannot be compared, or there are fewer than two captures.

        """
        reference = self._reference()
        captures: dict[str, tuple[Capture, Scores]] = {}
        floors: dict[str, Runs] = {}
        gaps: dict[str, str] = {}
        for member in self.matrix.members:
            try:
                capture = self._capture(member, reference)
                if self.config.floor:
                    floors[member.subject.label] = self._floor(member, capture)
            except _GapError as gap:
                gaps[member.subject.label] = str(gap)
                continue
            captures[member.subject.label] = capture, self._scores(reference, capture)
        if len(captures) < 2:
            self._refuse(gaps)
        bound = self.matrix.bound(self.config)
        if bound is not None:
            self._require_all(gaps)
        pairs = [self._pair(pair, captures, floors, bound) for pair in combinations(captures, 2)]
        _, scores = next(iter(captures.values()))
        names = ("protocol", "skip_first", "head", "versions")
        return replace(
            planned_matrix(self.matrix, "", self.config),
            gaps=gaps,
            pairs=tuple(pairs),
            outcome="passed",
            about={name: scores.about[name] for name in names},
        )

    def _require_all(self, gaps: dict[str, str]) -> None:
        """Refuse a limit that cannot be checked on every pair; only a skip takes a candidate out of its matrix."""
        left = [member.subject.label for member in self.matrix.members if not self._is_skipped(member)]
        if missing := [f"{label}: {gaps[label]}" for label in left if label in gaps]:
            raise ModelError(
                f"max_between cannot be checked on every pair of the matrix of {self.matrix.name}. {'; '.join(missing)}"
            )

    def _require_finite(self, labels: tuple[str, str], scores: Scores) -> None:
        """Refuse a limit on a pair with more positions that are NaN or infinite than its candidates' tests allow."""
        items = [item for member in self.matrix.members if member.subject.label in labels for item in member.items]
        allowed = sum(bounds_of(item, self.config).get("max_nan", math.inf) for item in items)
        if (found := scores.not_finite) > allowed:
            raise ModelError(
                f"{labels[0]} or {labels[1]} is NaN or infinite at {found:,} positions, which the limit would leave out"
            )

    def _refuse(self, gaps: dict[str, str]) -> None:
        told = "; ".join(f"{label}: {why}" for label, why in gaps.items())
        if all(self._is_skipped(member) for member in self.matrix.members if member.subject.label in gaps):
            pytest.skip(f"fewer than two candidates were measured: {told}")
        raise ModelError(
            f"there is nothing to compare in the matrix of {self.matrix.name}, because fewer than two candidates have "
            f"a capture. {told}"
        )

    def _reference(self) -> Capture:
        for item in self.matrix.items:
            for fixture in ("kld_reference", "kld_candidate"):
                if is_overridden(item, fixture):
                    raise ModelError(
                        f"a matrix needs candidates and a reference that options or a suite name, but the project's "
                        f"fixture {fixture} makes one"
                    )
        named = on_path(reference_of(self.config), self.matrix.path)
        reference = self.overrides.apply(named, "reference")
        if not self._selected(self.matrix.items) and not self._is_there(reference):
            raise ModelError(
                f"the capture of the reference {reference.label} is not in the cache, and no test that needs it is "
                "selected: run the tests of the candidates as well"
            )
        return self.measurement.capture(reference, self.windows)

    def _capture(self, member: Member, reference: Capture) -> Capture:
        """Return the capture of a member.

        Raises:
            _GapError: its own test did not capture it, or is not selected.
            KLDError: its capture cannot be used, and no other test will say so.

        """
        subject = self.overrides.apply(on_path(member.named, self.matrix.path), "candidate", member.axes)
        items = self._selected(member.items)
        if why := self.why_unmeasured(items or member.items):
            raise _GapError(why)
        if not items and not self._is_there(subject):
            raise _GapError("its test is not selected, and its capture is not in the cache")
        with self._left_to(items):
            return self.measurement.candidate_capture(subject, self.windows, reference)

    def _floor(self, member: Member, capture: Capture) -> Runs:
        """Return the figures of a member's two runs.

        Raises:
            _GapError: its second run is not in the cache, and no test of it is selected.
            KLDError: its second run cannot be used, and no other test will say so.

        """
        items, subject = self._selected(member.items), self.measurement.library.subject_of(capture)
        if not items and subject is not None and not self._is_there(replace(subject, run=2)):
            raise _GapError("its test is not selected, and its second run is not in the cache")
        windows = self.measurement.on_path(self.windows, self.matrix.path)
        floors = Floors(
            measurement=self.measurement,
            windows=self.windows,
            count=windows.count,
            extended=False,
            needed=NeededPaths(),
        )
        with self._left_to(items):
            return floors.of_side(capture, "candidate")

    @contextmanager
    def _left_to(self, items: Sequence[pytest.Item]) -> Iterator[None]:
        """Make an error a gap if a test in another worker of xdist will report it."""
        try:
            yield
        except KLDError as error:
            if not self.is_elsewhere(items):
                raise
            raise _GapError(f"it was not captured: {str(error).splitlines()[0]}") from error

    def _is_skipped(self, member: Member) -> bool:
        """Tell whether no test measures a member, because all of them are skipped."""
        return all(item.get_closest_marker("skip") for item in member.items)

    def _selected(self, items: Sequence[pytest.Item]) -> list[pytest.Item]:
        chosen = set(map(id, self.selected))
        return [item for item in items if id(item) in chosen]

    def _is_there(self, subject: Subject) -> bool:
        if is_capture(subject.spec.path):
            return True
        return self.measurement.whereabouts(subject.pin(), self.windows) != "nowhere"

    def _scores(self, one: Capture, other: Capture, *, extended: bool = False) -> Scores:
        windows = self.measurement.on_path(self.windows, self.matrix.path)
        for capture in (one, other):
            capture.require_path(windows)
        scores = self.measurement.scoring.scores(one, other, windows, extended=extended)
        return scores.without_first(self.config.skip_first)

    def _pair(
        self,
        labels: tuple[str, str],
        captures: dict[str, tuple[Capture, Scores]],
        floors: dict[str, Runs],
        bound: float | None,
    ) -> dict[str, Any]:
        (one, first), (other, second) = (captures[label] for label in labels)
        if one.vocab_size != other.vocab_size:
            raise CaptureError(
                f"{labels[0]} and {labels[1]} cannot be compared with each other: their vocabularies have "
                f"{one.vocab_size:,} and {other.vocab_size:,} tokens"
            )
        scores = self._scores(one, other, extended=True)
        confidence = self.config.confidence
        found = between(scores, first, second, confidence=confidence, of_difference=confidence or CONFIDENCE)
        each = self.config.each_dataset
        windows: dict[str | None, int] = {name: len(one.columns["flags"]) for name, one in scores.by_dataset().items()}
        windows[None] = len(scores.columns["flags"])
        floor: dict[str, float] | None = None
        means: dict[str | None, float] | None = None
        if floors:
            (ours, ours_on), (theirs, theirs_on) = (floors[label] for label in labels)
            floor = floor_of_pair(ours, theirs)
            means = {name: floor_of_pair(ours_on[name], theirs_on[name])["mean"] for name in found.datasets}
            means[None] = floor["mean"]
        checks: tuple[Check, ...] = ()
        if bound is not None:
            self._require_finite(labels, scores)
            checks = judge_pair(*labels, found, bound, windows=windows, each_dataset=each, floors=means)
        Verdict(checks=checks).require_finer(*labels)
        return {
            "first": labels[0],
            "second": labels[1],
            **found.to_json(),
            "checks": [check_to_json(check) for check in checks],
            "floor": floor,
        }


def planned_matrix(matrix: Matrix, nodeid: str, config: KLDConfig) -> MatrixResult:
    """Return the result of a matrix that was not measured."""
    from pytest_kld.settings.subjects import reference_as_named

    return MatrixResult(
        nodeid=nodeid,
        suite=config.suite,
        name=matrix.name,
        path=matrix.path,
        reference=on_path(reference_as_named(config), matrix.path),
        members=tuple(member.subject for member in matrix.members),
        outcome="error",
        undecided=config.inconclusive,
    )
