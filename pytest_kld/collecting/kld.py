"""What a test sees of one candidate: figures that explain themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import ScoresError
from pytest_kld.gate.figure import Figure
from pytest_kld.gate.limits import LIMITS, why_missing
from pytest_kld.gate.verdict import Verdict, judge

if TYPE_CHECKING:
    from pytest_kld.diagnosis import Diagnosis
    from pytest_kld.figures.interval import Interval
    from pytest_kld.figures.saw import Saw
    from pytest_kld.figures.scores import Scores
    from pytest_kld.gate.baseline import Held
    from pytest_kld.gate.floor import Floor
    from pytest_kld.subjects.subject import Subject


class KLD:
    """The figures of one candidate, for assertions: `assert kld.p99 < 0.3`.

    Divergences are in nats. See `Summary` for each figure's definition.

    Attributes:
        reference: the reference's name.
        candidate: the candidate's name, with its axes.
        subjects: the Subjects of both, that is, what was run, under `reference` and `candidate`.
        bounds: the limits that are checked after the test's body, by name.
        each_dataset: whether the limits also apply to each of several datasets.
        scores: the table per position, without the positions that `--kld-skip-first` leaves out.
        datasets: every figure of each dataset, by its name.
        summary: every figure; with several datasets, their macro average.
        intervals: a confidence interval of each figure that has one; empty without --kld-confidence.
        diagnosis: where the candidate departs from the reference, see `diagnosis.Diagnosis`.
        floor: what two runs of each side differ by, see `floor.Floor`; None without --kld-floor.
        baseline: the earlier result that this one is held against, see `baseline.Held`; None if there is none.
        saw: what the gate saw and what it did not, see `saw.Saw`.

    """

    def __init__(
        self,
        *,
        reference: Subject,
        candidate: Subject,
        bounds: Mapping[str, float],
        scores: Scores,
        each_dataset: bool = False,
        confidence: float | None = None,
        spend: float = 1.0,
        floor: Floor | None = None,
    ) -> None:
        """Compute the figures from the scores. See `uncertainty.intervals` for `spend`.

        Raises:
            ScoresError: there is nothing to compute them from, or a figure that has a limit is missing.

        """
        from pytest_kld.figures.scores import Summary

        self.subjects = {"reference": reference, "candidate": candidate}
        self.reference = reference.label
        self.candidate = candidate.label
        self.bounds = dict(bounds)
        self.each_dataset = each_dataset
        self.scores = scores
        tables = scores.by_dataset()
        self.datasets = {name: Summary.of(table) for name, table in tables.items()}
        self._dataset_windows = {name: len(table.columns["flags"]) for name, table in tables.items()}
        summaries = list(self.datasets.values())
        self.summary = Summary.macro_average(summaries) if len(summaries) > 1 else summaries[0]
        self.intervals: dict[str, Interval] = {}
        self._dataset_intervals: dict[str, dict[str, Interval]] = {}
        if confidence is not None:
            self._find_intervals(confidence, spend)
        self.floor = floor
        self.diagnosis: Diagnosis | None = None
        self.baseline: Held | None = None
        self.saw: Saw | None = None
        self.verdict()  # a limit that cannot be checked is an error before the test's body, not a failure after it

    def __repr__(self) -> str:
        """Name the pair and the headline figures."""
        summary = self.summary
        return (
            f"<kld of {self._pair}: mean {summary.mean:.6g}, p99 {summary.p99:.6g}, max {summary.max:.6g} nats, "
            f"NaN {summary.candidate_nan_count}, top-1 {summary.top1_agreement:.2%}>"
        )

    def verdict(self) -> Verdict:
        """Check the figures against the limits and against the baseline."""
        windows = len(self.scores.columns["flags"])
        checks = judge(
            self.summary.to_json(), self.bounds, intervals=self.intervals, windows=windows, floor=self.floor
        ).checks
        if self.each_dataset and len(self.datasets) > 1:
            for name, summary in self.datasets.items():
                checks += judge(
                    summary.to_json(),
                    self.bounds,
                    name,
                    intervals=self._dataset_intervals.get(name),
                    windows=self._dataset_windows[name],
                    floor=None if self.floor is None else self.floor.datasets[name],
                ).checks
        return Verdict(checks=checks, changes=() if self.baseline is None else self.baseline.changes)

    def measured(self, *, profile: bool) -> dict[str, Any]:
        """Return the fields of a GateResult that follow from the scores and the limits, with a profile on request."""
        from pytest_kld.figures.profile import profile_of
        from pytest_kld.gate.result import checks_of

        return {
            "figures": self.summary.to_json(),
            "datasets": {name: summary.to_json() for name, summary in self.datasets.items()},
            "intervals": {name: interval.to_json() for name, interval in self.intervals.items()},
            "checks": checks_of(self.verdict()),
            "about": self.scores.about,
            "diagnosis": dict(self.diagnosis) if self.diagnosis else None,
            "saw": dict(self.saw) if self.saw else None,
            "profile": profile_of(self.scores) if profile else None,
            "baseline": None if self.baseline is None else self.baseline.to_json(),
            "floor": self.floor_to_json(),
        }

    def floor_to_json(self) -> dict[str, Any] | None:
        """Return the floor as plain data, with the figures that are below twice of it; None if there is none."""
        if self.floor is None:
            return None
        datasets = {name: summary.to_json() for name, summary in self.datasets.items()}
        return self.floor.to_json(self.summary.to_json(), datasets)

    def explain(self) -> str:
        """Explain the verdict: which limits were exceeded, by how much, and which were not."""
        return self.verdict().explain(self.candidate, self.reference, self.summary.to_json())

    def _find_intervals(self, confidence: float, spend: float) -> None:
        from pytest_kld.figures.uncertainty import intervals, macro_average

        tables = self.scores.by_dataset()
        self._dataset_intervals = {name: intervals(table, confidence, spend=spend) for name, table in tables.items()}
        parts = list(self._dataset_intervals.values())
        self.intervals = parts[0] if len(parts) == 1 else macro_average(parts, list(self.datasets.values()))

    @property
    def mean(self) -> Figure:
        """Mean KL(reference ‖ candidate) in nats."""
        return self._figure("mean")

    @property
    def median(self) -> Figure:
        """Median KL in nats."""
        return self._figure("median")

    @property
    def p95(self) -> Figure:
        """95 % quantile of KL in nats."""
        return self._figure("p95")

    @property
    def p99(self) -> Figure:
        """99 % quantile of KL in nats."""
        return self._figure("p99")

    @property
    def p999(self) -> Figure:
        """99.9 % quantile of KL in nats."""
        return self._figure("p999")

    @property
    def max(self) -> Figure:
        """Largest KL in nats."""
        return self._figure("max")

    @property
    def nan_count(self) -> int:
        """Positions where the candidate is not finite."""
        return self.summary.candidate_nan_count

    @property
    def reference_nan_count(self) -> int:
        """Positions where the reference is not finite."""
        return self.summary.reference_nan_count

    @property
    def cut_mass(self) -> Figure:
        """Largest probability that either side gives to tokens the other lacks, in [0, 1]."""
        return self._figure("cut_mass")

    @property
    def top1_agreement(self) -> Figure:
        """Share of positions with the same most probable token, in [0, 1]."""
        return self._figure("top1_agreement")

    @property
    def ppl_ratio(self) -> Figure:
        """Candidate's perplexity over the reference's."""
        return self._figure("ppl_ratio")

    @property
    def log_ppl_ratio(self) -> Figure:
        """Natural logarithm of `ppl_ratio`, in nats."""
        return self._figure("log_ppl_ratio")

    @property
    def rms_delta_p(self) -> Figure:
        """Root mean square of the change in the label's probability, in [0, 1]."""
        return self._figure("rms_delta_p")

    @property
    def flips(self) -> Figure:
        """Share of positions with a changed top token, among those where the reference is confident."""
        return self._figure("flips")

    @property
    def reverse_kl(self) -> Figure:
        """Mean KL(candidate ‖ reference) in nats."""
        return self._figure("reverse_kl")

    @property
    def js(self) -> Figure:
        """Mean Jensen-Shannon divergence in nats."""
        return self._figure("js")

    @property
    def tv(self) -> Figure:
        """Mean total variation distance, in [0, 1]."""
        return self._figure("tv")

    @property
    def top5_overlap(self) -> Figure:
        """Mean share of the reference's top five tokens that are among the candidate's."""
        return self._figure("top5_overlap")

    @property
    def abs_entropy_difference(self) -> Figure:
        """Mean absolute difference of the entropies in nats."""
        return self._figure("abs_entropy_difference")

    @property
    def decode_gap(self) -> Figure:
        """Mean KL(prefill ‖ decode) of the candidate against itself in nats; with --kld-path=both, when it decodes."""
        return self._figure("decode_gap")

    @property
    def experts_seen(self) -> Figure:
        """Share of the candidate's experts that at least one position was routed to."""
        return self._figure("experts_seen")

    @property
    def _pair(self) -> str:
        return f"{self.candidate} against {self.reference}"

    def _figure(self, name: str) -> Figure:
        limit = next(limit for limit in LIMITS.values() if limit.figure == name)
        value = getattr(self.summary, name)
        if value is None:
            raise ScoresError(f"there is no kld.{name}: {why_missing(name)}")
        return Figure(value, label=limit.label, unit=limit.unit, pair=self._pair)
