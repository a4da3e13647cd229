"""Captures of a suite's Subjects ahead of their tests: as many servers side by side as fit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

from pytest_kld.servers.schedule import Job, in_order, next_job
from pytest_kld.subjects.subject import Subject

_SECONDS_BETWEEN_LOOKS = 0.2
_LONGEST_STOP_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One Subject to be captured.

    Attributes:
        job: its size; the name is unique.
        capture: captures it, and releases its server.
        score: computes its scores, once it and the reference are captured; None if that is left to its test.
        is_reference: whether the others are compared with it. If its capture fails, no more work is started.

    """

    job: Job
    capture: Callable[[], object]
    score: Callable[[], object] | None = None
    is_reference: bool = False


@dataclass(slots=True, kw_only=True)
class SideBySide:
    """Runs work in threads: each piece when its GPUs are free, in the order of `servers.schedule`.

    Scores are computed one after the other in a thread of their own, so the next servers boot and capture meanwhile.

    Attributes:
        work: what is captured. If the reference is not among it, it is captured already, or by a test.
        places: how many GPUs there are, or how many servers the CPU runs at once.
        interrupt: makes captures that are under way fail, such as by ending their servers.

    """

    work: Sequence[Work]
    places: int
    interrupt: Callable[[], None]
    _captured: dict[str, Future[None]] = field(default_factory=dict)
    _scored: dict[str, Future[None]] = field(default_factory=dict)
    _waiting: list[Work] = field(default_factory=list)
    _to_score: list[Work] = field(default_factory=list)
    _free: int = 0
    _stopped: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Start what fits; the rest starts by itself when places become free."""
        by_name = {one.job.name: one for one in self.work}
        self._waiting = [by_name[job.name] for job in in_order(one.job for one in self.work)]
        self._captured = {one.job.name: Future() for one in self.work}
        self._scored = {one.job.name: Future() for one in self.work if one.score is not None}
        self._to_score = [one for one in self._waiting if one.score is not None]
        self._free = self.places
        self._thread(self._score_all)
        with self._changed:
            self._start_what_fits()

    def wait(self, name: str, while_waiting: Callable[[], None]) -> None:
        """Wait until a Subject is captured, and its scores are computed if the reference was captured.

        Args:
            name: the job's name; nothing is awaited for one that is not among the work.
            while_waiting: called now and then, in this thread.

        Raises:
            Exception: the capture failed with this.

        """
        for futures in (self._captured, self._scored):
            if name not in futures:
                continue
            with self._changed:
                while not futures[name].done():
                    self._changed.release()
                    try:
                        while_waiting()
                    finally:
                        self._changed.acquire()
                    self._changed.wait(_SECONDS_BETWEEN_LOOKS)
            while_waiting()
            if futures is self._captured and not futures[name].cancelled():
                futures[name].result()

    def stop(self) -> None:
        """Start nothing more, interrupt what is under way, and wait for the threads to end, for a minute at most."""
        with self._changed:
            self._stopped = True
            self._start_what_fits()
            unfinished = [one for one in self._captured.values() if not one.done()]
            self._changed.notify_all()
        deadline = time.monotonic() + _LONGEST_STOP_SECONDS  # a thread may be waiting for another process
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < deadline:
            if unfinished:
                self.interrupt()
            for thread in self._threads:
                thread.join(_SECONDS_BETWEEN_LOOKS)

    def _start_what_fits(self) -> None:
        """Start threads. The lock is held."""
        if self._stopped:
            for one in self._waiting:
                self._captured[one.job.name].cancel()
        while not self._stopped:
            job = next_job([one.job for one in self._waiting], self._free)
            if job is None:
                return
            one = next(one for one in self._waiting if one.job is job)
            self._waiting.remove(one)
            self._free -= job.places
            self._thread(lambda one=one: self._capture(one))  # type: ignore[misc]

    def _capture(self, one: Work) -> None:
        failure: BaseException | None = None
        try:
            one.capture()
        except BaseException as error:  # whatever it is, the test of this Subject reports it
            failure = error
        with self._changed:
            self._free += one.job.places
            self._stopped = self._stopped or (one.is_reference and failure is not None)
            _finish(self._captured[one.job.name], failure)
            self._start_what_fits()
            self._changed.notify_all()

    def _score_all(self) -> None:
        """Compute scores as soon as both sides are captured, in the order in which that happens."""
        reference = next((self._captured[one.job.name] for one in self.work if one.is_reference), None)
        while self._to_score:
            with self._changed:
                ready = self._next_to_score(reference)
                while ready is None and not self._stopped:
                    self._changed.wait()
                    ready = self._next_to_score(reference)
                if ready is None or self._stopped:
                    for one in self._to_score:
                        self._scored[one.job.name].cancel()
                    self._changed.notify_all()
                    return
                self._to_score.remove(ready)
            try:
                if _good(self._captured[ready.job.name]) and (reference is None or _good(reference)):
                    assert ready.score is not None
                    ready.score()
            except Exception:  # noqa: S110  # the test computes them again, and reports the error
                pass
            with self._changed:
                _finish(self._scored[ready.job.name], None)
                self._changed.notify_all()

    def _next_to_score(self, reference: Future[None] | None) -> Work | None:
        if reference is not None and not reference.done():
            return None
        return next((one for one in self._to_score if self._captured[one.job.name].done()), None)

    def _thread(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name="pytest-kld capture", daemon=True)
        self._threads.append(thread)
        thread.start()


def job_name(subject: Subject, *, is_reference: bool) -> str:
    """Return the name of a Subject's job, which is the same on all paths; a model may be reference and candidate."""
    return f"{'the reference ' if is_reference else ''}{subject.variant}"


def _finish(future: Future[None], failure: BaseException | None) -> None:
    if failure is None:
        future.set_result(None)
    else:
        future.set_exception(failure)


def _good(future: Future[None]) -> bool:
    try:
        return future.exception() is None
    except CancelledError:
        return False
