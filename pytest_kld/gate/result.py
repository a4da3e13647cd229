"""The result of one gated test, from which reports are made. Plain data, so that it can be sent between processes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from pytest_kld.gate.verdict import band
from pytest_kld.plain import plain
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_kld.gate.verdict import Verdict

Outcome = Literal["passed", "skipped", "failed", "error"]
Inconclusive = Literal["fail", "pass", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """One test, one candidate.

    Attributes:
        nodeid: the test's node id.
        reference: the reference.
        candidate: the candidate.
        outcome: `passed`; `failed`: a measured figure violates a limit, or the test's own assertion failed; `error`:
            not measured; `skipped`: limits are undecided and --kld-inconclusive=skip is set.
        message: the reason if the test did not pass.
        xfail: whether the test is marked as expected to fail.
        body_passed: whether the test's own body passed; None if it did not run.
        figures: the figures of the `Summary` by name, macro averages for several datasets; None if not measured.
        datasets: the same for each dataset, by its name.
        intervals: for each figure `low`, `high`, `confidence`, `effective_positions`, `least_windows`; empty without
            --kld-confidence.
        checks: each limit with `limit`, `figure`, `dataset` (None: the macro average), `value`, `bound`, `passed`,
            `state` (`pass`, `fail`, `inconclusive`), `interval` and `more_windows`: how many more would probably decide
            it.
        undecided: the outcome of a test whose limits are undecided, from --kld-inconclusive.
        about: what was compared and how, from the scores; None if not measured.
        diagnosis: where the candidate departs from the reference, see `diagnosis.Diagnosis`; None if not measured.
        seconds: how long the test took, including its share of common set-up.
        profile: see `profile_of`; None if not measured or if no report has charts.

    """

    nodeid: str
    reference: Subject
    candidate: Subject
    outcome: Outcome
    message: str = ""
    xfail: bool = False
    body_passed: bool | None = None
    figures: dict[str, Any] | None = None
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    intervals: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: tuple[dict[str, Any], ...] = ()
    undecided: Inconclusive = "fail"
    about: dict[str, Any] | None = None
    diagnosis: dict[str, Any] | None = None
    seconds: float = 0.0
    profile: dict[str, Any] | None = None

    @property
    def band(self) -> str | None:
        """Return the word for the mean KL, or None if not measured."""
        return None if self.figures is None else band(self.figures["mean"])

    @property
    def windows(self) -> int:
        """Return the number of windows that were measured."""
        return 0 if self.about is None else int(self.about["protocol"]["windows"])

    def windows_of(self, dataset: str | None) -> int:
        """Return the number of measured windows of one dataset; for None, of all datasets."""
        parts = [] if self.about is None else self.about["protocol"].get("datasets", [])
        return next((int(part["windows"]) for part in parts if part["dataset"] == dataset), self.windows)

    @property
    def inconclusive(self) -> bool:
        """Whether no limit is exceeded and some are undecided."""
        states = {check["state"] for check in self.checks}
        return "inconclusive" in states and "fail" not in states

    @property
    def notes(self) -> list[str]:
        """Return what a reader should know about how the figures were obtained."""
        found = []
        if self.figures is not None and self.figures["max"] == 0 and not self.figures.get("cut_mass"):
            found.append(
                f"KLD of {self.candidate.label} is exactly 0 at every position: it computes the same as the reference. "
                "Was the same model named twice?"
            )
        found += self._vocabulary_notes()
        sides = [
            ((self.about or {}).get(side, {}).get("key") or {}).get("engine") for side in ("reference", "candidate")
        ]
        reference, candidate = ((side or {}).get("engine") for side in sides)
        if None not in (reference, candidate) and reference != candidate:
            found.append(
                f"{self.candidate.label} ran in {candidate} and the reference in {reference}: part of the divergence "
                "comes from the engines, about 2e-3 nats in bfloat16"
            )
        for name, side in zip(("the reference", self.candidate), sides, strict=True):
            found += [f"{name}: {note}" for note in (side or {}).get("notes", ())]
        return found

    def _vocabulary_notes(self) -> list[str]:
        sizes = [(self.about or {}).get(side, {}).get("vocab_size") for side in ("reference", "candidate")]
        if None in sizes or sizes[0] == sizes[1] or self.figures is None:
            return []
        reference, candidate = self.reference.label, self.candidate.label
        wider = reference if sizes[0] > sizes[1] else candidate
        return [
            f"the vocabularies differ: {reference} has {sizes[0]:,} tokens and {candidate} {sizes[1]:,}. The "
            f"figures cover the first {min(sizes):,}, renormalised; {wider} gives the others a probability of up to "
            f"{self.figures['cut_mass']:.3g}"
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        data = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**data, "reference": self.reference.to_json(), "candidate": self.candidate.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GateResult:
        """Create a result from the output of `to_json`."""
        sides = {side: Subject.from_json(data[side]) for side in ("reference", "candidate")}
        return cls(**{**data, **sides, "checks": tuple(data["checks"])})

    def properties(self) -> list[tuple[str, str | float]]:
        """Return the figures as properties of the test case, for `--junitxml`."""
        names = {"candidate": plain(self.candidate.label), "reference": plain(self.reference.label)}
        described = {**names, "band": self.band}
        limits = {check["limit"]: check["bound"] for check in self.checks}
        bounds = {
            f"{name}_{end}": interval[end]
            for name, interval in self.intervals.items()
            for end in ("low", "high", "effective_positions")
        }
        confidence = {"confidence": next((one["confidence"] for one in self.intervals.values()), None)}
        return [
            (f"kld_{name}", value)
            for name, value in {**described, **(self.figures or {}), **confidence, **bounds, **limits}.items()
            if value is not None
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incomplete:
    """A session that ended before every gated test had run.

    Attributes:
        reason: why it ended, as pytest describes it.
        planned: how many gated tests were collected.
        not_measured: the node ids of the tests that did not finish, in collection order.

    """

    reason: str
    planned: int
    not_measured: tuple[str, ...]

    def __str__(self) -> str:
        """Describe in one sentence what is missing, without the names."""
        missing = len(self.not_measured)
        return (
            f"the session ended early ({self.reason}); {missing} of {self.planned} gated "
            f"test{'' if self.planned == 1 else 's'} {'was' if missing == 1 else 'were'} not measured"
        )


def checks_of(verdict: Verdict) -> tuple[dict[str, Any], ...]:
    """Return a verdict's checks as plain data."""
    return tuple(
        {
            "limit": check.limit.name,
            "figure": check.limit.figure,
            "dataset": check.dataset,
            "value": check.value,
            "bound": check.bound,
            "passed": check.passed,
            "state": check.state,
            "interval": None if check.interval is None else check.interval.to_json(),
            "more_windows": check.more_windows,
        }
        for check in verdict.checks
    )


def by_candidate(results: Sequence[GateResult]) -> dict[str, list[GateResult]]:
    """Group results by the candidate's label, in order of first appearance."""
    groups: dict[str, list[GateResult]] = {}
    for result in results:
        groups.setdefault(result.candidate.label, []).append(result)
    return groups


def worst(results: Sequence[GateResult]) -> GateResult:
    """Return the decisive result for a candidate: an error, else a failure, else an expected failure or a pass."""
    return max(
        results, key=lambda result: (("passed", "skipped", "failed", "error").index(result.outcome), not result.xfail)
    )
