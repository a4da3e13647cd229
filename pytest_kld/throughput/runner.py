"""Puts a Subject's server under load, round by round, and collects what the load generator reports."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_kld.engines.served.load import Load, LoadResult
from pytest_kld.errors import ServerError
from pytest_kld.servers.leases import lease_directory
from pytest_kld.servers.quiet import alone
from pytest_kld.throughput.devices import devices
from pytest_kld.throughput.figures import FIGURES, median_of
from pytest_kld.throughput.gauges import watched

if TYPE_CHECKING:
    from pytest_kld.engines.served.engine import ServedEngine
    from pytest_kld.engines.served.load import LoadTool
    from pytest_kld.engines.served.pool import ServerHandle
    from pytest_kld.progress import Progress
    from pytest_kld.subjects.model import ModelSpec
    from pytest_kld.subjects.subject import Subject

REQUESTS_PER_SLOT = 4
"""Requests of a run, for each that is open at a time, so that starting and ending weigh little."""
_SEED = 20_000
_TIMEOUT_SECONDS = 4 * 3600
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """What is measured.

    Attributes:
        concurrencies: numbers of requests that are open at a time.
        input_tokens: tokens of each prompt.
        output_tokens: tokens of each answer.
        rounds: how often each concurrency is measured.
        failures: how many requests of a run may fail.
        arguments: further flags of the server; if there are any, it is another server than the one that captures.

    """

    concurrencies: tuple[int, ...]
    input_tokens: int
    output_tokens: int
    rounds: int
    failures: int = 0
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """The server that is put under load."""

    url: str
    handle: ServerHandle | None
    own: bool
    arguments: Sequence[str]
    added: Sequence[str]

    def devices(self) -> list[dict[str, Any]]:
        """Describe the devices now. Those of a server that we did not boot are unknown: it may be elsewhere."""
        return [{"name": f"devices of {self.url}"}] if self.handle is None else devices(self.handle.gpus)


def measure(
    engine: ServedEngine,
    subject: Subject,
    settings: LoadSettings,
    *,
    tokenizer: ModelSpec,
    directory: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Measure how fast a Subject is served.

    Args:
        engine: runs the Subject.
        subject: pinned.
        settings: what is measured.
        tokenizer: the model whose tokenizer the load generator loads, to know which ids there are.
        directory: receives the reports of the load generator; the server's side must see it under the same path.
        progress: receives a note for each run.

    Returns:
        Plain data: `cells`, one for each concurrency, with `rounds` (the figures of each), `figures` (their medians)
        and `gauges`; `server`, `devices`, `settings`, `tool`; see docs/report.schema.json.

    Raises:
        ServerError: the server or the load generator fails, a request fails, or answers are not as long as asked.

    """
    tool = engine.kind.load_tool
    if tool is None:
        raise ServerError(f"pytest-kld knows no load generator of {engine.kind.title}: leave out --kld-throughput")
    if tokenizer.has_own_code and not engine.servers.settings.trust_remote_code:
        raise ServerError(
            f"{tool.name} would run code from the repository of {tokenizer.label} to load its tokenizer: give "
            "--kld-trust-remote-code, or name another model with --kld-tokenizer"
        )
    directory.mkdir(parents=True, exist_ok=True)
    target = _target(engine, tool, subject, settings)
    run = _Run(
        engine=engine,
        tool=tool,
        subject=subject,
        tokenizer=tokenizer.source,
        target=target,
        settings=settings,
        directory=directory,
    )
    cells: dict[int, list[dict[str, Any]]] = {concurrency: [] for concurrency in settings.concurrencies}
    described: list[dict[str, Any]] = []
    with alone(lease_directory(), lambda: progress.note("waiting for other sessions' work to end: speed is measured")):
        before = os.getloadavg()[0]
        for index in range(settings.rounds):
            for concurrency in settings.concurrencies:
                progress.note(
                    f"speed of {subject.label}: round {index + 1} of {settings.rounds}, concurrency {concurrency}"
                )
                figures, gauges, described = run.once(index, concurrency)
                cells[concurrency].append({"figures": figures, "gauges": gauges})
    return {
        "cells": [_cell(concurrency, rounds) for concurrency, rounds in cells.items()],
        "settings": {
            "input_tokens": settings.input_tokens,
            "output_tokens": settings.output_tokens,
            "rounds": settings.rounds,
            "failures": settings.failures,
            "requests_per_slot": REQUESTS_PER_SLOT,
        },
        "server": {
            "own": target.own,
            "arguments": list(target.arguments),
            "added": list(target.added),
            "others": engine.servers.others(target.handle) if target.handle else [],
        },
        "devices": described,
        "load_average": before,
        "tool": tool.name,
        "raw": str(directory),
    }


def _cell(concurrency: int, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    gauges = [one["gauges"] for one in rounds]
    known = [name for name in (gauges[0] if gauges else {}) if all(name in one for one in gauges)]
    figures = [one["figures"] for one in rounds]
    return {
        "concurrency": concurrency,
        "requests": concurrency * REQUESTS_PER_SLOT,
        "rounds": figures,
        "figures": {name: median_of(figures, name) for name in FIGURES},
        "gauges": {name: median_of(gauges, name) for name in known},
    }


def _target(engine: ServedEngine, tool: LoadTool, subject: Subject, settings: LoadSettings) -> _Target:
    if url := subject.arguments.get("url"):
        if settings.arguments:
            raise ServerError(
                f"{subject.label} runs at {url}, so its flags cannot be changed: leave out --kld-throughput-args"
            )
        return _Target(url=str(url).rstrip("/"), handle=None, own=False, arguments=(), added=())
    given = list(subject.arguments.get("args", ()))
    own = bool(settings.arguments) or tool.wants_own_server
    arguments = [*given, *settings.arguments]
    completed = engine.servers.complete(arguments, subject.environment, capturing=not own)
    _require_concurrency(tool.most_concurrent(completed), max(settings.concurrencies), subject)
    handle = engine.servers.get(subject.spec, arguments, subject.environment, capturing=not own)
    return _Target(url=handle.url, handle=handle, own=own, arguments=completed, added=completed[len(arguments) :])


def _require_concurrency(most: int | None, concurrency: int, subject: Subject) -> None:
    if most is not None and most < concurrency:
        raise ServerError(
            f"the server of {subject.label} runs at most {most} requests at a time, so concurrency {concurrency} "
            "cannot be measured: raise its limit, or leave out this concurrency"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What all runs of one Subject have in common."""

    engine: ServedEngine
    tool: LoadTool
    subject: Subject
    tokenizer: str
    target: _Target
    settings: LoadSettings
    directory: Path

    def once(self, index: int, concurrency: int) -> tuple[dict[str, float], dict[str, float], list[dict[str, Any]]]:
        """Run the load generator once; return its figures, the server's gauges, and the devices meanwhile."""
        load = Load(
            concurrency=concurrency,
            requests=concurrency * REQUESTS_PER_SLOT,
            input_tokens=self.settings.input_tokens,
            output_tokens=self.settings.output_tokens,
            # No two runs on one server send the same prompts: the second would find them in the prefix cache.
            seed=_SEED + index * len(self.settings.concurrencies) + self.settings.concurrencies.index(concurrency),
            warmup=min(concurrency, REQUESTS_PER_SLOT),
        )
        name = f"c{concurrency}-round{index + 1}"
        output = self.directory / f"{name}.jsonl"
        output.unlink(missing_ok=True)
        with watched(self.target.url, self._api_key, self.tool.gauges) as gauges:
            with self._running(load, output, self.directory / f"{name}.log") as process:
                described = self._wait(process, name)
            code = process.returncode
        result = self._read(output, self.directory / f"{name}.log", code)
        self._check(load, result)
        (self.directory / f"{name}.json").write_text(json.dumps(result.raw))
        output.unlink()
        each = 1000 * self.settings.output_tokens / result.mean_e2e
        figures = {**result.figures, "output_tps_per_request": each}
        figures["failed"] = load.requests - result.completed
        return {name: figures[name] for name in FIGURES}, dict(gauges.medians()), described

    @property
    def _api_key(self) -> str | None:
        return None if self.target.handle else self.engine.api_key

    @contextmanager
    def _running(self, load: Load, output: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        words = self.tool.command(load, self.target.url, self.subject.spec.source, self.tokenizer, output)
        argv, variables = self.engine.servers.tool(words, self.subject.environment)
        if self._api_key:
            variables["OPENAI_API_KEY"] = self._api_key
        with log.open("wb") as written:
            try:
                process = subprocess.Popen(  # noqa: S603
                    argv, env=variables, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT
                )
            except OSError as error:
                raise ServerError(f"the load generator {self.tool.name} does not run: {error}") from error
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()

    def _wait(self, process: subprocess.Popen[bytes], name: str) -> list[dict[str, Any]]:
        """Wait for the end of a run, and describe the devices while they are under load."""
        handle, started = self.target.handle, time.monotonic()
        described: list[dict[str, Any]] = []
        while process.poll() is None:
            if handle is not None and self.engine.servers.ended(handle):
                raise self.engine.servers.failure(handle, f"the server of {self.subject.label} died under load")
            if time.monotonic() - started > _TIMEOUT_SECONDS:
                raise ServerError(f"the load generator ran for more than {_TIMEOUT_SECONDS} s ({name})")
            if not described and time.monotonic() - started > 1:
                described = self.target.devices()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return described or self.target.devices()

    def _read(self, output: Path, log: Path, code: int) -> LoadResult:
        handle = self.target.handle
        if handle is not None and self.engine.servers.ended(handle):
            raise self.engine.servers.failure(handle, f"the server of {self.subject.label} died under load")
        if code != 0 or not output.is_file():
            end = log.read_text(errors="replace")[-1500:].strip()
            raise ServerError(
                f"the load generator {self.tool.name} failed for {self.subject.label} (exit code {code}); the end of "
                f"{log}:\n{end}"
            )
        try:
            return self.tool.read(output.read_text())
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ServerError(
                f"the report of {self.tool.name} cannot be read ({type(error).__name__}: {error}): this release "
                f"reports something else than the supported ones. The report is {output}."
            ) from error

    def _check(self, load: Load, result: LoadResult) -> None:
        """Reject a run that did not do what was asked."""
        failed = load.requests - result.completed
        if failed > self.settings.failures or not result.completed:
            said = f": {result.errors[0][:300]}" if result.errors else ""
            raise ServerError(
                f"{failed} of {load.requests} requests failed while {self.subject.label} was under load at concurrency "
                f"{load.concurrency}{said}"
            )
        expected = result.completed * load.output_tokens
        if result.output_tokens != expected:
            raise ServerError(
                f"{self.subject.label} answered {result.completed} requests with {result.output_tokens:,} tokens, but "
                f"{expected:,} were asked for: answers that end early would be counted as speed"
            )
        _require_concurrency(result.most_concurrent, load.concurrency, self.subject)
        wrong = [name for name, value in result.figures.items() if not 0 <= value < float("inf")]
        if wrong or not result.mean_e2e > 0 or not result.figures["output_tps"] > 0:
            raise ServerError(f"the load generator {self.tool.name} reports figures that cannot be: {wrong or 'zeros'}")
