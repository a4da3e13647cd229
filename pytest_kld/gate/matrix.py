"""The result of one matrix: candidates beside each other, pair by pair. Plain data, like a `GateResult`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, get_args

from pytest_kld.gate.floor import is_below
from pytest_kld.gate.limits import MATRIX_LIMITS
from pytest_kld.gate.result import Inconclusive, Outcome
from pytest_kld.gate.verdict import Check, State
from pytest_kld.plain import plain
from pytest_kld.subjects.subject import EnginePath, Subject

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_kld.figures.between import Between, Direction

LIMIT = MATRIX_LIMITS["max_between"]
_STATES: tuple[State, ...] = ("pass", "inconclusive", "fail")
"""From the best to the worst."""


def judge_pair(
    first: str,
    second: str,
    found: Between,
    bound: float,
    *,
    windows: Mapping[str | None, int],
    each_dataset: bool,
    floors: Mapping[str | None, float] | None = None,
) -> tuple[Check, ...]:
    """Compare the mean KL of a pair, in the worse of both directions, with the limit.

    Args:
        first: the name of the first candidate.
        second: that of the second.
        found: their figures; a direction without an interval is compared by its mean.
        bound: the limit in nats.
        windows: the number of windows of each dataset, and of all under None.
        each_dataset: whether the limit also holds for each of several datasets.
        floors: the floor of the mean on each dataset, and on all under None, in nats; None if it was not measured.

    """

    def check(sides: tuple[str, str], direction: Direction, dataset: str | None) -> Check:
        limit = replace(LIMIT, label=f"mean KL({sides[0]} ‖ {sides[1]})")
        return Check(
            limit=limit,
            value=direction.mean,
            bound=bound,
            dataset=dataset,
            interval=direction.interval,
            windows=windows[dataset],
            floor=None if floors is None else floors[dataset],
        )

    tables: dict[str | None, tuple[Direction, Direction]] = {None: (found.forth, found.back)}
    if each_dataset:
        tables.update(found.datasets)
    return tuple(
        max(
            check((first, second), forth, dataset),
            check((second, first), back, dataset),
            key=lambda one: (_STATES.index(one.state), one.value, one.interval.high if one.interval else 0.0),
        )
        for dataset, (forth, back) in tables.items()
    )


def check_to_json(check: Check) -> dict[str, Any]:
    """Return one check of a pair as plain data."""
    return {
        "limit": check.limit.name,
        "dataset": check.dataset,
        "value": check.value,
        "bound": check.bound,
        "state": check.state,
        "interval": None if check.interval is None else asdict(check.interval),
        "more_windows": check.more_windows,
        "floor": check.floor,
        "text": str(check),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixResult:
    """Several candidates beside each other, on one path.

    Attributes:
        nodeid: the node id of the test that compares them.
        suite: the suite file that it belongs to, or None.
        name: what the candidates are variants of; `candidates` if they are not of one candidate.
        path: the path through the engine.
        reference: the reference that the differences of KLDs are taken to.
        members: the candidates, in the order of their tests.
        gaps: why a member is not in the matrix, by its label: it was skipped, say, or its own test is an error.
        pairs: for each pair of the others, their labels `first` and `second`, the fields of `between.Between`,
            `checks`, see `check_to_json`, and `floor`, see `floor.floor_of_pair`; None without --kld-floor.
        outcome: `passed`; `failed`: a pair exceeds the limit; `error`: a pair could not be compared; `skipped`: a pair
            is undecided and --kld-inconclusive=skip is set.
        message: the reason if it did not pass.
        undecided: the outcome if the limit is undecided, from --kld-inconclusive.
        about: the protocol of the comparison, from the scores; None if nothing was compared.
        seconds: how long it took.

    """

    nodeid: str
    suite: str | None
    name: str
    path: EnginePath
    reference: Subject
    members: tuple[Subject, ...]
    gaps: dict[str, str] = field(default_factory=dict)
    pairs: tuple[dict[str, Any], ...] = ()
    outcome: Outcome
    message: str = ""
    undecided: Inconclusive = "fail"
    about: dict[str, Any] | None = None
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """Return its name, with the path unless it is prefill."""
        return self.name if self.path == "prefill" else f"{self.name} ({self.path})"

    @property
    def title(self) -> str:
        """Return its name as reports name it: with its suite file, since several suites may have such a candidate."""
        return f"{self.suite}: {self.label}" if self.suite else self.label

    @property
    def checks(self) -> list[dict[str, Any]]:
        """Return every check of every pair."""
        return [check for pair in self.pairs for check in pair["checks"]]

    @property
    def state(self) -> State:
        """Return the worst state of its checks; `pass` without a limit."""
        return worst_state([check["state"] for check in self.checks])

    def short(self, label: str) -> str:
        """Return a member's name inside the matrix: the values of its axes, if all members are of one candidate."""
        member = next(one for one in self.members if one.label == label)
        alike = len({one.name for one in self.members}) == 1
        return ", ".join(member.axes.values()) if alike and member.axes else label

    def mean(self, first: str, second: str) -> float | None:
        """Return the mean KL(first ‖ second) in nats by the labels of both; None for a gap, or on the diagonal."""
        for pair in self.pairs:
            if (pair["first"], pair["second"]) == (first, second):
                return float(pair["forth"]["mean"])
            if (pair["first"], pair["second"]) == (second, first):
                return float(pair["back"]["mean"])
        return None

    def is_below_floor(self, first: str, second: str) -> bool:
        """Tell whether `mean` of the same labels is below twice the floor."""
        sides, mean = {first, second}, self.mean(first, second)
        pair = next((one for one in self.pairs if {one["first"], one["second"]} == sides), None)
        return mean is not None and pair is not None and bool(pair["floor"]) and is_below(mean, pair["floor"]["mean"])

    def explain(self) -> str:
        """Describe which pairs exceed the limit, and which do not."""
        checks = self.checks
        words = {"fail": "FAIL", "inconclusive": "?   ", "pass": "ok  "}
        states = [worst_state([one["state"] for one in pair["checks"]]) for pair in self.pairs]
        headline = f"every pair is within {LIMIT.name}" if checks else "no limit"
        if exceeded := states.count("fail"):
            headline = f"{exceeded} of {len(states)} pairs exceed {LIMIT.name}"
        elif undecided := states.count("inconclusive"):
            headline = f"{undecided} of {len(states)} pairs inconclusive for {LIMIT.name}"
        ordered = sorted(checks, key=lambda one: -_STATES.index(one["state"]))
        lines = [f"  {words[one['state']]}  {one['text']}" for one in ordered]
        lines += [f"  -     {label} is not in the matrix: {why}" for label, why in self.gaps.items()]
        return "\n".join([f"{headline}: {self.label}", *lines])

    def properties(self) -> list[tuple[str, str | float]]:
        """Return the figures as properties of a test case, for `--junitxml`."""
        found: list[tuple[str, str | float]] = [("kld_matrix", plain(self.title))]
        for pair in self.pairs:
            for sides, direction in ((("first", "second"), "forth"), (("second", "first"), "back")):
                of = " ‖ ".join(plain(self.short(pair[side])) for side in sides)
                found.append((f"kld_between_mean[{of}]", pair[direction]["mean"]))
            of = " | ".join(plain(self.short(pair[side])) for side in ("first", "second"))
            found.append((f"kld_between_disagreement[{of}]", pair["disagreement"]))
            found.append((f"kld_between_difference[{of}]", pair["difference"]))
        found += [(f"kld_gap[{plain(label)}]", plain(why)) for label, why in self.gaps.items()]
        if self.checks:
            found.append((f"kld_{LIMIT.name}", self.checks[0]["bound"]))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        data = {one.name: getattr(self, one.name) for one in fields(self)}
        members = [member.to_json() for member in self.members]
        return {**data, "reference": self.reference.to_json(), "members": members, "pairs": list(self.pairs)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MatrixResult:
        """Create it from the output of `to_json`.

        Raises:
            ValueError: a pair names what is no member, or the outcome is none.

        """
        result = cls(
            **{
                **data,
                "reference": Subject.from_json(data["reference"]),
                "members": tuple(Subject.from_json(member) for member in data["members"]),
                "pairs": tuple(data["pairs"]),
            }
        )
        labels = {member.label for member in result.members}
        named = {pair[side] for pair in result.pairs for side in ("first", "second")} | set(result.gaps)
        if not named <= labels or result.outcome not in get_args(Outcome):
            raise ValueError(f"the matrix {result.nodeid} contradicts itself")
        return result


def worst_state(states: Sequence[str]) -> State:
    """Return the worst of several states; `pass` if there are none."""
    return max(states, key=_STATES.index, default="pass")  # type: ignore[arg-type]
