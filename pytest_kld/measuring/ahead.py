"""Prepares the captures of a suite that run side by side, ahead of their tests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pytest_kld.captures.timing import EarlierRuns
from pytest_kld.collecting.paths import by_server
from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.errors import KLDError
from pytest_kld.measuring.measurement import Measurement
from pytest_kld.measuring.side_by_side import SideBySide, Work, job_name
from pytest_kld.servers.leases import visible_gpus
from pytest_kld.servers.schedule import Job
from pytest_kld.subjects.model import is_capture
from pytest_kld.subjects.subject import EnginePath, Subject
from pytest_kld.text.windows import Windows


def capture_side_by_side(
    measurement: Measurement,
    references: Sequence[Subject],
    candidates: Sequence[Subject],
    windows: Windows,
    *,
    extended: bool,
) -> None:
    """Start to capture Subjects, as many at once as fit, and to compute their scores; `measurement` waits for them.

    Nothing is started if only one server fits at a time or only one is needed, or if windows are measured in rounds.

    Args:
        measurement: the suite's.
        references: the reference, as it is run, on each path that the tests need.
        candidates: the candidates that can be run, as they are run.
        windows: the windows.
        extended: whether the scores need the columns of the second pass.

    """
    if measurement.config.adaptive:
        return
    gpus = visible_gpus(os.environ)
    ahead = _Ahead(measurement, references, windows, bool(gpus), len(gpus) or measurement.config.cpu_servers, extended)
    work = list(ahead.work(candidates))
    if len(work) < 2 or sum(sorted(one.job.places for one in work)[:2]) > ahead.places:
        return
    for engine in ahead.engines():
        engine.servers.cpu_servers = ahead.places
    place = f"{ahead.places} GPUs" if gpus else f"the CPU, {ahead.places} servers at once"
    names = ", ".join(one.job.name for one in work)
    measurement.progress.note(f"capturing {len(work)} Subjects side by side on {place}: {names}")
    measurement.ahead = SideBySide(work=work, places=ahead.places, interrupt=ahead.end_servers)
    measurement.ahead.start()


@dataclass(frozen=True, slots=True)
class _Ahead:
    measurement: Measurement
    references: Sequence[Subject]
    windows: Windows
    gpus: bool
    places: int
    extended: bool

    def work(self, candidates: Sequence[Subject]) -> Iterator[Work]:
        """Yield what is to be captured and needs a server that fits; a test captures the rest, or says why not."""
        runs = EarlierRuns.in_cache(self.measurement.config.cache_dir)
        comparable = {subject.path: subject for subject in self.references if self._is_there(subject)}
        groups: list[tuple[bool, list[Subject]]] = [(True, list(self.references))]
        groups += [(False, group) for group in by_server(candidates)]
        if self.measurement.config.floor:
            groups += [(of_reference, [replace(one, run=2) for one in group]) for of_reference, group in groups]
        for of_reference, group in groups:
            again = group[0].run == 2  # its floor is left to the test
            is_reference = of_reference and not again
            missing = [subject for subject in group if self._places(subject) is not None]
            needed = max((self._places(subject) or 0 for subject in missing), default=0)
            if not missing or needed > self.places:
                continue
            if is_reference:
                comparable |= {subject.path: subject for subject in missing}
            seconds = [self._seconds(runs, subject) for subject in missing]
            scored = [subject for subject in missing if subject.path in comparable and not is_reference and not again]
            yield Work(
                job=Job(
                    name=job_name(group[0], is_reference=of_reference),
                    places=needed,
                    seconds=max(loading for loading, _ in seconds) + sum(running for _, running in seconds),
                    first=is_reference,
                ),
                capture=partial(self._capture, missing),
                score=partial(self._score, comparable, scored) if scored else None,
                is_reference=is_reference,
            )

    def _seconds(self, runs: EarlierRuns, subject: Subject) -> tuple[float, float]:
        """Return how long a boot and a capture probably take; zeros if that is unknown."""
        windows = self.measurement.on_path(self.windows, subject.path)
        return runs.seconds(subject, windows.count * windows.rows) or (0.0, 0.0)

    def engines(self) -> Iterator[ServedEngine]:
        """Yield the served engines that are in use."""
        return (engine for engine in self.measurement.engines if isinstance(engine, ServedEngine))

    def end_servers(self) -> None:
        """Shut down every server, also those that are in use."""
        for engine in self.engines():
            engine.servers.close(in_use=True)

    def _places(self, subject: Subject) -> int | None:
        """Return how many GPUs a Subject's server takes (on a CPU: 1); None if no server is booted for it."""
        if subject.model is None or is_capture(subject.spec.path) or "url" in subject.arguments:
            return None
        engine = self.measurement.engine(subject.engine)
        if not isinstance(engine, ServedEngine):
            return None
        try:
            if self._is_there(subject):
                return None
            completed = engine.servers.complete(subject.arguments["args"], subject.environment)
            needed = engine.kind.gpus_needed(completed, engine.servers.installed(subject.environment).options)
        except KLDError:
            return None
        return max(needed, 1) if self.gpus else 1

    def _is_there(self, subject: Subject) -> bool:
        if subject.model is None or is_capture(subject.spec.path):
            return subject.model is not None
        return self.measurement.whereabouts(subject.pin(), self.windows) != "nowhere"

    def _capture(self, subjects: Sequence[Subject]) -> None:
        """Capture a Subject on each of its paths, and shut its server down: the next one needs its place."""
        first, *others = subjects
        try:
            self.measurement.library.obtain(first, self.measurement.on_path(self.windows, first.path))
            self.measurement.capture_beside(first, self.windows, [other.path for other in others])
        finally:
            engine = self.measurement.engine(first.engine)
            assert isinstance(engine, ServedEngine)
            engine.servers.release(first.pin().spec, first.arguments["args"], first.environment, run=first.run)

    def _score(self, references: Mapping[EnginePath, Subject], candidates: Sequence[Subject]) -> None:
        """Compute scores of what was captured, so that the tests find them in the cache."""
        for candidate in candidates:
            pair = (references[candidate.path], candidate)
            if not all(map(self._is_there, pair)):
                continue
            windows = self.measurement.on_path(self.windows, candidate.path)
            ours, theirs = (self.measurement.library.obtain(one, windows) for one in pair)
            self.measurement.scoring.compute(ours, theirs, windows, extended=self.extended, known=None)
