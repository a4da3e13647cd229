"""The result of one gated test, from which reports are made. Plain data, so that it can be sent between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from pytest_kld.gate.floor import MARK, NOT_TOLD
from pytest_kld.gate.limits import LIMITS
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
        suite: the suite file that the test belongs to, or None.
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
            `state` (`pass`, `fail`, `inconclusive`), `interval`, `more_windows`: how many more would probably decide
            it, `floor` and `below_floor`.
        undecided: the outcome of a test whose limits are undecided, from --kld-inconclusive.
        speed: how fast the candidate is served, and its checks, see `gate.speed.SpeedVerdict`; None if not measured.
        about: what was compared and how, from the scores; None if not measured.
        diagnosis: where the candidate departs from the reference, see `diagnosis.Diagnosis`; None if not measured.
        saw: what the gate saw and what it did not, see `saw.Saw`; None if not measured.
        trust_remote_code: whether the session let code from repositories of models and tokenizers run.
        seconds: how long the test took, including its share of common set-up.
        profile: see `profile_of`; None if not measured or if no report has charts.
        baseline: the earlier result that it is held against, see `baseline.Held`; None without --kld-baseline, or if
            there is none for this candidate.
        floor: what two runs of each side differ by, see `floor.Floor`; None without --kld-floor. An error has it too
            if a floor above a limit is the error.

    """

    nodeid: str
    suite: str | None = None
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
    speed: dict[str, Any] | None = None
    about: dict[str, Any] | None = None
    diagnosis: dict[str, Any] | None = None
    saw: dict[str, Any] | None = None
    trust_remote_code: bool = False
    seconds: float = 0.0
    profile: dict[str, Any] | None = None
    baseline: dict[str, Any] | None = None
    floor: dict[str, Any] | None = None

    @property
    def below_floor(self) -> list[str]:
        """Return which figures are below twice their floor; empty if no floor was measured."""
        return [] if self.floor is None else list(self.floor["below"])

    def below_floor_on(self, dataset: str) -> list[str]:
        """Return the same for one of several datasets."""
        return [] if self.floor is None else list(self.floor["datasets"][dataset]["below"])

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Return each figure beside the baseline's, see `regression.Change`; empty without a baseline."""
        return [] if self.baseline is None else list(self.baseline["changes"])

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
        speed = (self.speed or {}).get("checks", ())
        states = {check["state"] for check in (*self.checks, *self.changes, *speed)}
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
        if self.trusted:
            found.append(f"code from the repository of {' and '.join(self.trusted)} was allowed to run")
        found += self._vocabulary_notes()
        if self.speaks_for:
            found.append(f"the intervals speak for {self.speaks_for}")
        if decoding := (self.about or {}).get("protocol", {}).get("decoding"):
            size = self.about["protocol"]["window_size"]  # type: ignore[index]
            found.append(
                f"{self.candidate.label}: positions {decoding['prompt_size']:,} to {size - 1:,} of each window, "
                f"decoded one token a step, {decoding['concurrency']:,} sequences together"
            )
        if self.figures is not None and self.below_floor:
            labels = [limit.label for limit in LIMITS.values() if limit.figure in self.below_floor]
            found.append(f"{self.candidate.label}: {', '.join(labels)} ({MARK}): below twice the floor, {NOT_TOLD}")
        found += self._speed_notes()
        sides = [
            ((self.about or {}).get(side, {}).get("key") or {}).get("engine") for side in ("reference", "candidate")
        ]
        reference, candidate = ((side or {}).get("engine") for side in sides)
        if None not in (reference, candidate) and reference != candidate:
            found.append(
                f"{self.candidate.label} ran in {candidate} and the reference in {reference}: part of the divergence "
                "comes from the engines; for SmolLM2-135M in bfloat16 that was 1e-3 to 2e-3 nats"
            )
        if self.baseline is not None:
            found += [f"{self.candidate.label}: {note}" for note in self.baseline["notes"]]
        for name, side in zip(("the reference", self.candidate), sides, strict=True):
            found += [f"{name}: {note}" for note in (side or {}).get("notes", ())]
        return found + self._expert_notes()

    @property
    def trusted(self) -> list[str]:
        """Return whose repository's code was allowed to run: by --kld-trust-remote-code, a flag or an argument."""
        if self.trust_remote_code:
            return ["every model and tokenizer (--kld-trust-remote-code)"]
        sides = {"reference": self.reference, "candidate": self.candidate}
        keys = {side: (self.about or {}).get(side, {}).get("key") or {} for side in sides}
        return [
            f"{subject.label} (trust_remote_code)"
            for side, subject in sides.items()
            if _trusts(subject.arguments) or _trusts((keys[side].get("engine") or {}).get("arguments"))
        ]

    def _expert_notes(self) -> list[str]:
        """Say if experts were never met, and if a side does not tell which experts it used."""
        found = []
        candidate = ((self.saw or {}).get("experts") or {}).get("candidate")
        if candidate and candidate["never"]:
            found.append(
                f"{self.candidate.label}: {candidate['never']:,} of {candidate['experts']:,} experts were never met, "
                "so nothing is known about them; more text or other text may meet them"
            )
        for side, subject in (("reference", self.reference), ("candidate", self.candidate)):
            routing = (self.about or {}).get(side, {}).get("routing")
            if routing and routing["unobserved"] is not None:
                found.append(f"{subject.label}: which experts it used is unknown: {routing['unobserved']}")
        return found

    @property
    def speaks_for(self) -> str | None:
        """Return which part of each text the intervals speak for; None if there are none, or a project's windows."""
        protocol = (self.about or {}).get("protocol", {})
        if not self.intervals or protocol.get("windows_from") is None:
            return None
        parts = [_part(protocol, dataset) for dataset in protocol["datasets"]]
        if all(part.startswith("all of ") for part in parts):
            return ", ".join(parts)
        what = "this stretch" if len(parts) == 1 else "these stretches"
        return f"{what}: {', '.join(parts)} (--kld-windows-from=spread takes windows from all of the text)"

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

    def _speed_notes(self) -> list[str]:
        if self.speed is None:
            return []
        server, found = self.speed["candidate"]["server"], []
        if server["own"]:
            found.append(
                f"the speed of {self.candidate.label} was measured on a server of its own, with "
                f"{' '.join(server['arguments'])}"
            )
        elif server["added"]:
            found.append(
                f"the speed of {self.candidate.label} was measured on the server that captures, which pytest-kld gives "
                f"{' '.join(server['added'])}; --kld-throughput-args boots one without"
            )
        if server["others"]:
            found.append(
                f"beside {self.candidate.label}, servers of {', '.join(server['others'])} were up, and idle, while its "
                "speed was measured"
            )
        return found

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
        changes = {
            f"{name}_{change['figure']}": change[kind]
            for change in self.changes
            for name, kind in (("baseline", "before"), ("change", "difference"))
        }
        confidence = {"confidence": next((one["confidence"] for one in self.intervals.values()), None)}
        speed = {
            f"{figure}_c{cell['concurrency']}": value
            for cell in (self.speed["candidate"]["cells"] if self.speed else ())
            for figure, value in cell["figures"].items()
        }
        floors = {
            f"floor_{side}_{name}": self.floor[side][name]
            for side in ("reference", "candidate")
            for name in ("mean", "p99", "max", "top1_agreement")
            if self.floor
        }
        noise = {"below_floor": ", ".join(self.below_floor)} if self.floor else {}
        speaks_for = {"speaks_for": self.speaks_for and plain(self.speaks_for)}
        trusted = {"trust_remote_code": plain(", ".join(self.trusted)) or None}
        return [
            (f"kld_{name}", value)
            for name, value in {
                **described,
                **(self.figures or {}),
                **confidence,
                **speaks_for,
                **trusted,
                **bounds,
                **limits,
                **changes,
                **floors,
                **noise,
                **speed,
            }.items()
            if value is not None
        ]


def _trusts(arguments: Any) -> bool:
    """Tell whether an engine's arguments, as it takes them or as a running server tells them, trust remote code."""
    if isinstance(arguments, Mapping):
        return any(
            (name.rpartition(".")[2].replace("-", "_") == "trust_remote_code" and _is_on(value)) or _trusts(value)
            for name, value in arguments.items()
        )
    if isinstance(arguments, list | tuple):
        return any(_is_trusting_flag(argument) or _trusts(argument) for argument in arguments)
    return False


def _is_trusting_flag(argument: Any) -> bool:
    """Tell whether an argument is the flag in any spelling: `--trust_remote_code`, `--trust-remote-code=True`."""
    if not isinstance(argument, str):
        return False
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") == "--trust-remote-code" and (not equals or _is_on(value))


def _is_on(value: Any) -> bool:
    """Tell whether a switch is on; what is in doubt is on."""
    return bool(value) and str(value).lower() not in {"false", "0", "no", "off", "none"}


def _part(protocol: dict[str, Any], dataset: dict[str, Any]) -> str:
    """Say which part of a dataset its windows represent."""
    scored = (dataset["windows"] - 1) * protocol["stride"] + protocol["window_size"]
    if protocol["windows_from"] == "spread" or scored + protocol["stride"] > dataset["text_tokens"]:
        return f"all of {dataset['dataset']}"
    percent = min(99, 100 * scored / dataset["text_tokens"])
    return f"the first {format(percent, '.0f' if percent >= 1 else '.1g')} % of {dataset['dataset']}"


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several sessions that share the Subjects of a release.

    Attributes:
        number: which one, from 1.
        of: how many there are.

    """

    number: int
    of: int

    def __str__(self) -> str:
        """Name it as reports do."""
        return f"shard {self.number} of {self.of}"


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
            "floor": check.floor,
            "below_floor": check.below_floor,
        }
        for check in verdict.checks
    )


def by_suite(results: Sequence[GateResult]) -> list[list[GateResult]]:
    """Group results by their suite file, each of which has its own reference and protocol."""
    groups: dict[str | None, list[GateResult]] = {}
    for result in results:
        groups.setdefault(result.suite, []).append(result)
    return list(groups.values())


def by_candidate(results: Sequence[GateResult]) -> dict[str, list[GateResult]]:
    """Group results by the candidate's label, in order of first appearance; with several suites, by suite as well."""
    several = len({result.suite for result in results}) > 1
    groups: dict[str, list[GateResult]] = {}
    for result in results:
        label = result.candidate.label
        groups.setdefault(f"{result.suite}: {label}" if several and result.suite else label, []).append(result)
    return groups


def worst(results: Sequence[GateResult]) -> GateResult:
    """Return the decisive result for a candidate: an error, else a failure, else an expected failure or a pass."""
    return max(
        results, key=lambda result: (("passed", "skipped", "failed", "error").index(result.outcome), not result.xfail)
    )
