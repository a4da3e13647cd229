"""Captures run side by side as far as they fit, scores meanwhile; one that fails stops no other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from threading import Event

import pytest

from pytest_kld.errors import ServerError
from pytest_kld.measuring.side_by_side import SideBySide, Work
from pytest_kld.servers.schedule import Job

LONG = 20.0
"""Seconds after which a test that waits in vain gives up."""


class Server:
    """A capture that goes on until it is told to end, and scores that do so, too."""

    def __init__(self, name: str, places: int = 1, *, reference: bool = False) -> None:
        self.name, self.started, self.end, self.ended = name, Event(), Event(), Event()
        self.scoring, self.scored = Event(), Event()
        self.failure: Exception | None = None
        self.work = Work(
            job=Job(name=name, places=places, first=reference),
            capture=self.capture,
            score=None if reference else self.score,
            is_reference=reference,
        )

    def capture(self) -> None:
        self.started.set()
        assert self.end.wait(LONG)
        self.ended.set()
        if self.failure is not None:
            raise self.failure

    def score(self) -> None:
        self.scoring.set()
        assert self.scored.wait(LONG)


def running(*servers: Server, places: int, interrupt: Callable[[], None] = lambda: None) -> SideBySide:
    made = SideBySide(work=[server.work for server in servers], places=places, interrupt=interrupt)
    made.start()
    return made


def test_servers_start_when_their_places_are_free_and_while_others_capture_and_are_scored() -> None:
    reference, a, b, c = Server("reference", 2, reference=True), Server("a"), Server("b"), Server("c")
    ahead = running(reference, a, b, c, places=2)
    assert reference.started.wait(LONG)
    assert not a.started.wait(0.05)  # the reference takes both places
    reference.end.set()
    assert a.started.wait(LONG)
    assert b.started.wait(LONG)
    assert not c.started.is_set()
    a.end.set()
    assert c.started.wait(LONG)  # while b captures
    assert a.scoring.wait(LONG)  # while b and c capture
    assert not b.ended.is_set()
    for server in (b, c):
        server.end.set()
    for server in (a, b, c):
        server.scored.set()
    for name in ("reference", "a", "b", "c", "no such job"):
        ahead.wait(name, lambda: None)
    ahead.stop()


def test_a_failure_is_raised_where_its_subject_is_awaited_and_the_others_go_on() -> None:
    reference, bad, good = Server("reference", reference=True), Server("bad"), Server("good")
    bad.failure = ServerError("it died")
    for server in (reference, bad, good):
        server.end.set()
        server.scored.set()
    ahead = running(reference, bad, good, places=1)
    ahead.wait("good", lambda: None)
    with pytest.raises(ServerError, match="it died"):
        ahead.wait("bad", lambda: None)
    assert good.scoring.is_set()
    assert not bad.scoring.is_set()
    ahead.stop()


def test_nothing_more_starts_after_the_reference_failed() -> None:
    reference, candidate = Server("reference", reference=True), Server("candidate")
    reference.failure = ServerError("it died")
    reference.end.set()
    ahead = running(reference, candidate, places=1)
    with pytest.raises(ServerError, match="it died"):
        ahead.wait("reference", lambda: None)
    ahead.wait("candidate", lambda: None)  # it was given up; its test would capture it
    assert not candidate.started.is_set()
    ahead.stop()


def test_the_end_of_a_session_interrupts_captures_and_leaves_no_thread() -> None:
    a, b = Server("a"), Server("b")
    before = threading.active_count()
    ahead = running(a, b, places=1, interrupt=a.end.set)
    assert a.started.wait(LONG)
    ahead.stop()
    assert a.ended.is_set()
    assert not b.started.is_set()
    assert threading.active_count() == before


def test_the_waiting_thread_is_given_turns() -> None:
    a = Server("a")
    a.scored.set()
    ahead = running(a, places=1)
    ahead.wait("a", a.end.set)  # the capture ends only because the waiting thread did something
    ahead.stop()
