"""Which servers run when: as many side by side as fit on the GPUs, the widest and longest first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One server, from its boot to the end of its capture.

    Attributes:
        name: what it is for.
        places: how many GPUs it takes, or 1 for a server on the CPU.
        seconds: how long it probably takes; 0 if that is not known.
        first: whether it starts before all jobs that are not.

    """

    name: str
    places: int
    seconds: float = 0.0
    first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """When a job runs, and on which places."""

    job: Job
    start: float
    end: float
    places: tuple[int, ...]


def in_order(jobs: Iterable[Job]) -> list[Job]:
    """Return jobs in the order in which they are considered.

    Wide jobs come first, because they fit only while many places are free, and long ones before short ones, so that no
    long one is left for the end. This is list scheduling with decreasing sizes (Graham 1969; Garey and Graham 1975 for
    jobs that take several places).
    """
    return sorted(jobs, key=lambda job: (not job.first, -job.places, -job.seconds))


def next_job(waiting: Sequence[Job], free: int) -> Job | None:
    """Return the first of these jobs, which are in order, that fits on the free places; None if none does."""
    return next((job for job in waiting if job.places <= free), None)


def place(jobs: Iterable[Job], places: int) -> list[Placed]:
    """Return when each job runs if each takes as long as is expected.

    Args:
        jobs: what is to be run; none takes more than all places.
        places: how many GPUs there are, or how many servers the CPU runs at once.

    Raises:
        ValueError: a job takes more places than there are.

    """
    waiting, free, now = in_order(jobs), list(range(places)), 0.0
    running: list[tuple[float, int, tuple[int, ...]]] = []
    placed: list[Placed] = []
    if wide := [job for job in waiting if job.places > places]:
        raise ValueError(f"{wide[0].name} takes {wide[0].places} GPUs, but there are {places}")
    while waiting or running:
        while (job := next_job(waiting, len(free))) is not None:
            waiting.remove(job)
            taken, free = tuple(free[: job.places]), free[job.places :]
            placed.append(Placed(job=job, start=now, end=now + job.seconds, places=taken))
            heapq.heappush(running, (now + job.seconds, len(placed), taken))
        now, _, freed = heapq.heappop(running)
        free = sorted([*free, *freed])
    return placed


def in_turn(jobs: Iterable[Job], places: int) -> list[Placed]:
    """Return when each job runs if they run one after the other in the order that is given."""
    placed, now = [], 0.0
    for job in jobs:
        placed.append(Placed(job=job, start=now, end=now + job.seconds, places=tuple(range(places))))
        now += job.seconds
    return placed


def bound(jobs: Iterable[Job], places: int) -> float:
    """Return a time that no schedule can beat: all work spread evenly, or the longest job."""
    jobs = list(jobs)
    work = sum(job.places * job.seconds for job in jobs) / places
    return max([work, *(job.seconds for job in jobs)])
