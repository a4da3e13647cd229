"""The plan of a session, for the terminal and as JSON: what is measured, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld import __version__
from pytest_kld.captures.cache import format_bytes
from pytest_kld.report.terminal import aligned, format_seconds
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from pytest_kld.gate.matrix import MatrixResult


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSubject:
    """What happens to one Subject.

    Attributes:
        role: `reference` or `candidate`.
        subject: what is run.
        suite: its suite file, or None.
        tests: the node ids of the tests that measure it.
        state: `cached`; `shared`: in the shared cache; `capture`; `named`: a capture that the user named; `skip`;
            `error`: it cannot be run; `unknown`: whether it is cached cannot be told.
        why: the reason of a skip or an error, or why something is unknown.
        gpus: how many GPUs its server takes; None if it needs no server.
        bytes: what its capture will take on disk; None if that is unknown.
        loading: seconds its boot will probably take; None if nothing like it ran before.
        running: seconds its windows will probably take.
        start: seconds after which it starts, if the times are right; None if they are not known.
        step: its place in the order, from 1, if times are not known: servers of one step run side by side.
        alone: whether no other server runs at the same time.
        booted: whether the server is the one that was booted for the same Subject on another path.
        places: the numbers of its GPUs among those that are visible.

    """

    role: str
    subject: Subject
    suite: str | None
    tests: tuple[str, ...] = ()
    state: str
    why: str | None = None
    gpus: int | None = None
    bytes: int | None = None
    loading: float | None = None
    running: float | None = None
    start: float | None = None
    step: int | None = None
    alone: bool = False
    booted: bool = False
    places: tuple[int, ...] = ()

    @property
    def seconds(self) -> float | None:
        """Return how long its capture will probably take."""
        return None if self.loading is None or self.running is None else self.loading + self.running

    @property
    def is_run(self) -> bool:
        """Whether a model is run for it, as far as is known."""
        return self.state in ("capture", "unknown")

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        names = ("role", "suite", "state", "why", "gpus", "bytes", "loading", "running", "start", "step")
        own = {name: getattr(self, name) for name in names}
        return {
            "name": self.subject.label,
            "subject": self.subject.to_json(),
            "tests": list(self.tests),
            **own,
            "places": list(self.places),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a session would measure.

    Attributes:
        subjects: every Subject, the reference of each suite before its candidates.
        gpus: the names of the GPUs that are visible.
        free_bytes: what is free in the cache directory.
        cache_dir: the cache directory.
        matrices: what is compared with each other, as results that were not measured.

    """

    subjects: tuple[PlannedSubject, ...]
    gpus: tuple[str, ...]
    free_bytes: int
    cache_dir: str
    matrices: tuple[MatrixResult, ...] = ()

    @property
    def servers(self) -> list[PlannedSubject]:
        """Return the Subjects that a server is booted for."""
        return [one for one in self.subjects if one.is_run and one.gpus is not None and not one.booted]

    @property
    def bytes(self) -> int:
        """Return what the captures will take, as far as is known."""
        return sum(one.bytes or 0 for one in self.subjects if one.is_run)

    @property
    def serial_seconds(self) -> float | None:
        """Return how long the captures would take one after the other; None if some time is unknown."""
        times = [one.seconds for one in self.subjects if one.is_run]
        return None if None in times else sum(time for time in times if time is not None)

    @property
    def seconds(self) -> float | None:
        """Return how long the captures will take as they are placed; None if some time is unknown."""
        if self.serial_seconds is None:
            return None
        ends = [one.start + (one.seconds or 0) for one in self.subjects if one.is_run and one.start is not None]
        return max(ends, default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "pytest_kld": __version__,
            "gpus": list(self.gpus),
            "cache_dir": self.cache_dir,
            "free_bytes": self.free_bytes,
            "bytes": self.bytes,
            "servers": len(self.servers),
            "seconds": self.seconds,
            "serial_seconds": self.serial_seconds,
            "subjects": [one.to_json() for one in self.subjects],
            "matrices": [
                {
                    **{name: getattr(one, name) for name in ("nodeid", "suite", "name", "path")},
                    "members": [member.label for member in one.members],
                }
                for one in self.matrices
            ],
        }

    def lines(self) -> list[str]:
        """Return the lines for the terminal: a table for each suite, and what it all takes."""
        heading = ["Subject", "Role", "Engine", "State", "GPUs", "Disk", "Boot", "Run", "Starts", "On GPUs"]
        lines: list[str] = []
        whys: dict[tuple[str, str], list[str]] = {}
        for suite in dict.fromkeys(one.suite for one in self.subjects):
            own = [one for one in self.subjects if one.suite == suite]
            lines += [] if suite is None else [f"{suite}:"]
            lines += [*aligned([heading, *map(_row, own)], left=(0, 1, 2, 3, 9)), ""]
            for one in own:
                if one.why:
                    whys.setdefault((one.state, one.why), []).append(one.subject.label)
        for (state, why), names in whys.items():
            many = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{state}: {names[0]}{many}: {why}")
        for matrix in self.matrices:
            count = len(matrix.members)
            pairs = f"{count * (count - 1) // 2} pair{'' if count == 2 else 's'}"
            lines.append(f"matrix of {matrix.title}: {count} candidates, {pairs}; it needs no capture of its own")
        return [*lines, *([""] if whys or self.matrices else []), *self._summary()]

    def _summary(self) -> Iterator[str]:
        run = [one for one in self.subjects if one.is_run]
        cached = sum(one.state in ("cached", "shared", "named") for one in self.subjects)
        yield f"{len(run)} of {len(self.subjects)} Subjects to capture, {cached} captured already"
        gpus = len(self.gpus)
        widest = max((one.gpus or 0 for one in self.servers), default=0)
        said = f"{len(self.servers)} servers to boot; {gpus} GPUs visible"
        yield said + (f", and one server needs {widest}" if widest > gpus else "")
        unknown = any(one.bytes is None for one in run)
        size = f"{'at least ' if unknown else ''}{format_bytes(self.bytes)}" if self.bytes or not unknown else "unknown"
        yield f"disk: {size} for captures; {format_bytes(self.free_bytes)} free in {self.cache_dir}"
        if self.seconds is None or self.serial_seconds is None:
            yield "time: unknown, because some of these models have not run before"
        elif run:
            yield (
                f"time: about {format_seconds(self.seconds)} from earlier runs, comparisons not included "
                f"({format_seconds(self.serial_seconds)} one after the other)"
            )


def _row(one: PlannedSubject) -> list[str]:
    starts = "-" if one.start is None else f"+{format_seconds(one.start)}"
    return [
        one.subject.label,
        one.role,
        one.subject.engine or "-",
        one.state,
        "-" if one.gpus is None else str(one.gpus),
        "-" if one.bytes is None else format_bytes(one.bytes),
        "-" if one.loading is None else format_seconds(one.loading),
        "-" if one.running is None else format_seconds(one.running),
        starts if one.step is None else f"step {one.step}",
        ",".join(map(str, one.places)) or "-",
    ]
