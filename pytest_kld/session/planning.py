"""`--kld-plan`: what a session would measure, what it would take, and how it would fit on the GPUs."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.captures.recording import capture_bytes
from pytest_kld.captures.timing import EarlierRuns
from pytest_kld.collecting.items import PROBLEM, any_decodes, is_gated
from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.errors import KLDError, ReportError
from pytest_kld.files import write_report
from pytest_kld.measuring.measurement import Measurement
from pytest_kld.plain import json_escaped, plain
from pytest_kld.progress import Silent
from pytest_kld.report.plan import Plan, PlannedSubject
from pytest_kld.servers.leases import visible_gpus
from pytest_kld.servers.schedule import Job, in_turn, place
from pytest_kld.session.plan import matrices_of_plan
from pytest_kld.settings.config import CONFIG, config_of
from pytest_kld.settings.subjects import Overrides, Role, candidate_of, reference_of
from pytest_kld.subjects.model import is_capture
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from pytest_kld.settings.config import KLDConfig
    from pytest_kld.text.windows import Windows

_CHECK_ROWS = 2


def show_plan(session: pytest.Session) -> None:
    """Print the plan, and write it to the file that --kld-plan-json names.

    Raises:
        pytest.UsageError: the file cannot be written.

    """
    config = session.config.stash[CONFIG]
    plan = plan_session(session)
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None and plan.subjects:
        reporter.section("KLD plan")
        for line in plan.lines():
            reporter.write_line(plain(line))
    if config.plan_json is not None:
        try:
            write_report(config.plan_json, json_escaped(json.dumps(plan.to_json(), indent=2) + "\n").encode())
        except ReportError as error:
            raise pytest.UsageError(f"--kld-plan-json: {error}") from None


def plan_session(session: pytest.Session) -> Plan:
    """Plan what the collected tests would measure. Boots nothing, loads no weights, and runs no test.

    It reads configs, cuts the text, identifies models and asks the engines for their versions, because these decide
    what is cached.
    """
    gated = [item for item in session.items if is_gated(item)]
    groups: dict[int, list[pytest.Item]] = {}
    for item in gated:
        groups.setdefault(id(config_of(item)), []).append(item)
    planned = [one for items in groups.values() for one in _Planning.of(items).subjects()]
    gpus = visible_gpus(os.environ)
    config = session.config.stash[CONFIG]
    free = shutil.disk_usage(config.cache_dir).free if planned else 0
    return Plan(
        subjects=_placed(planned, len(gpus), config.cpu_servers),
        gpus=gpus,
        free_bytes=free,
        cache_dir=str(config.cache_dir),
        matrices=tuple(matrices_of_plan(session.items)),
    )


def _placed(planned: Sequence[PlannedSubject], gpus: int, cpu_servers: int = 1) -> tuple[PlannedSubject, ...]:
    """Fill in when and where each server runs. Suites follow each other."""
    done, total, offset, step = list(planned), gpus or cpu_servers, 0.0, 1
    timed = all(one.seconds is not None for one in planned if one.is_run)
    for suite in dict.fromkeys(one.suite for one in planned):
        served: dict[str, list[int]] = {}  # a job's name → the Subjects of its server, which run one after the other
        for index, one in enumerate(done):
            if one.suite == suite and one.is_run and (one.gpus or 0) <= total:
                served.setdefault(_server(one), []).append(index)
        jobs = []
        for name, indices in served.items():
            one = done[indices[0]]
            jobs.append(
                Job(
                    name=name,
                    places=total if one.alone or one.gpus is None else max(one.gpus, 1),
                    seconds=sum(done[index].seconds or 0.0 for index in indices) if timed else 1.0,
                    first=one.role == "reference",
                )
            )
        placed = place(jobs, total) if any(job.places < total for job in jobs) else in_turn(jobs, total)
        for it in placed:
            start = offset + it.start
            for index in served[it.job.name]:
                places = it.places[: done[index].gpus or 0] if gpus else ()
                when: dict[str, Any] = {"start": start} if timed else {"step": step + round(it.start)}
                start += done[index].seconds or 0.0
                done[index] = replace(done[index], **when, places=places)
        last = max((it.end for it in placed), default=0.0)
        offset, step = offset + last, step + round(last)
    return tuple(done)


def _server(one: PlannedSubject) -> str:
    """Return what a Subject shares with those that the same server serves: it is served on all of its paths."""
    subject = one.subject
    return f"{one.role} {subject.variant if one.gpus is not None else subject.label}"


def _booted_once(planned: Sequence[PlannedSubject]) -> list[PlannedSubject]:
    """Mark the Subjects whose servers are already booted, for another path of theirs."""
    servers: set[str] = set()
    marked = []
    for one in planned:
        needs_server = one.is_run and one.gpus is not None
        if needs_server and _server(one) in servers:
            marked.append(replace(one, booted=True, loading=None if one.loading is None else 0.0))
            continue
        servers |= {_server(one)} if needs_server else set()
        marked.append(one)
    return marked


@dataclass(slots=True, kw_only=True)
class _Planning:
    """The plan of the tests that share their settings."""

    config: KLDConfig
    items: list[pytest.Item]
    measurement: Measurement
    runs: EarlierRuns
    overrides: Overrides
    windows: Windows | None = None
    why_no_windows: str | None = None
    seen: dict[str, PlannedSubject] = field(default_factory=dict)

    @classmethod
    def of(cls, items: list[pytest.Item]) -> _Planning:
        config = config_of(items[0])
        made = cls(
            config=config,
            items=items,
            measurement=Measurement(config, Silent(), decodes=any_decodes(items, config)),
            runs=EarlierRuns.in_cache(config.cache_dir),
            overrides=_overrides(items[0]),
        )
        try:
            made.windows = made.measurement.windows()
        except KLDError as error:
            made.why_no_windows = str(error).splitlines()[0]
        return made

    def subjects(self) -> list[PlannedSubject]:
        """Return the reference and the candidates, each once; with --kld-floor, then the second run of each."""
        for item in self.items:
            subject = candidate_of(item)
            if (known := self.seen.get(subject.label)) is None:
                self.seen[subject.label] = self._planned("candidate", subject, item)
            else:
                self.seen[subject.label] = replace(known, tests=(*known.tests, item.nodeid))
        candidates, reference = list(self.seen.values()), reference_of(self.config)
        paths = dict.fromkeys(one.subject.path for one in candidates if one.state not in ("skip", "error"))
        references = [self._planned("reference", replace(reference, path=path), None) for path in paths]
        if not references:
            skipped = self._planned("reference", reference, None)
            references = [replace(skipped, state="skip", why="none of its candidates is measured")]
        planned = [*references, *candidates]
        again = [self._again(one) for one in planned if one.is_run or one.state in ("cached", "shared")]
        return _booted_once([*planned, *(again if self.config.floor else ())])

    def _again(self, planned: PlannedSubject) -> PlannedSubject:
        """Return the second run of a Subject, as it is run."""
        run = replace(planned, subject=replace(planned.subject, run=2), state="unknown", why=None, bytes=None)
        return run if run.subject.model is None else self._to_run(run)

    def _planned(self, role: Role, subject: Subject, item: pytest.Item | None) -> PlannedSubject:
        plain = PlannedSubject(
            role=role,
            subject=subject,
            suite=self.config.suite,
            tests=() if item is None else (item.nodeid,),
            state="unknown",
            alone=self.config.suite is None or self.config.adaptive,
        )
        if item is not None and (skip := next(item.iter_markers("skip"), None)):
            return replace(plain, state="skip", why=str(skip.kwargs.get("reason") or "no reason given"))
        if item is not None and (problem := item.stash.get(PROBLEM, None)):
            return replace(plain, state="error", why=problem)
        if subject.model is None:
            return replace(plain, why="a fixture of the project makes it")
        if is_capture(subject.spec.path):
            return replace(plain, state="named")
        try:
            subject = self.overrides.apply(subject, role)
            return self._to_run(replace(plain, subject=subject))
        except KLDError as error:
            return replace(plain, state="error", why=str(error).splitlines()[0])

    def _to_run(self, plain: PlannedSubject) -> PlannedSubject:
        subject, gpus = plain.subject, None
        engine = self.measurement.engine(subject.engine)
        if isinstance(engine, ServedEngine) and "url" not in subject.arguments:
            gpus = engine.kind.gpus_needed(subject.arguments["args"])
            gpus = 0 if engine.servers.settings.device == "cpu" else gpus
        known = replace(plain, gpus=gpus)
        try:
            if self.windows is None:
                return replace(known, why=self.why_no_windows)
            pinned = subject.pin()
            facts = engine.facts(pinned)
            windows = self.measurement.on_path(self.windows, subject.path)
            store = "hidden" if self.config.store == "auto" else self.config.store
            size = capture_bytes(facts, windows, store, _CHECK_ROWS)
            seconds = self.runs.seconds(pinned, windows.count * windows.rows) or (None, None)
            known = replace(known, bytes=size, loading=seconds[0], running=seconds[1])
            if "url" in subject.arguments:
                return replace(known, why="the server at its URL is not asked")
            where = self.measurement.whereabouts(pinned, self.windows)
        except KLDError as error:
            return replace(known, why=str(error).splitlines()[0])
        return replace(known, state="capture" if where == "nowhere" else where)


def _overrides(item: pytest.Item) -> Overrides:
    """Return what the project's fixtures add, without running a test."""
    session = item.session
    session._setupstate.setup(session)  # type: ignore[arg-type]  # makes session fixtures possible
    request: Any = item._request  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest takes a test that is not set up for one that is torn down
        overrides: Overrides = request.getfixturevalue("_kld_overrides")
    return overrides
