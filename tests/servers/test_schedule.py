"""Schedules on simulated time: no job overlaps another on its GPUs, and a release is packed tightly."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from pytest_kld.servers.schedule import Job, bound, place

RELEASE = [
    Job(name="reference", places=8, seconds=420 + 250, first=True),
    *(Job(name=f"tp4-{index}", places=4, seconds=240 + 130 + 20 * index) for index in range(8)),
    *(Job(name=f"tp2-{index}", places=2, seconds=150 + 180 + 15 * index) for index in range(7)),
    *(Job(name=f"tp1-{index}", places=1, seconds=90 + 200 + 30 * index) for index in range(4)),
]
"""Twenty Subjects: seconds of boot and of capture."""


def test_a_release_of_twenty_subjects_on_eight_gpus_is_within_a_fifth_of_the_bound() -> None:
    assert len(RELEASE) == 20
    makespan = max(one.end for one in place(RELEASE, 8))
    serial, least = sum(job.seconds for job in RELEASE), bound(RELEASE, 8)
    print(f"serial {serial:.0f} s, side by side {makespan:.0f} s, bound {least:.0f} s: {makespan / least:.3f}x")
    assert least <= makespan <= 1.2 * least
    assert serial > 2 * makespan


@pytest.mark.parametrize("seed", range(20))
def test_any_release_is_placed_without_overlap_and_near_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    jobs = [Job(name=str(i), places=rng.choice([1, 2, 4, 8]), seconds=rng.uniform(100, 900)) for i in range(20)]
    placed = place(jobs, 8)
    assert sorted(one.job.name for one in placed) == sorted(job.name for job in jobs)
    for gpu in range(8):
        runs = sorted((one.start, one.end) for one in placed if gpu in one.places)
        assert all(before[1] <= after[0] for before, after in pairwise(runs))
    assert all(len(one.places) == one.job.places for one in placed)
    assert max(one.end for one in placed) <= 1.2 * bound(jobs, 8)


def test_two_servers_on_four_gpus_run_side_by_side_on_eight() -> None:
    placed = place([Job(name="a", places=4, seconds=10), Job(name="b", places=4, seconds=8)], 8)
    assert [(one.job.name, one.start, one.places) for one in placed] == [
        ("a", 0, (0, 1, 2, 3)),
        ("b", 0, (4, 5, 6, 7)),
    ]


def test_the_reference_starts_before_wider_candidates() -> None:
    jobs = [Job(name="wide", places=4, seconds=9), Job(name="reference", places=1, seconds=1, first=True)]
    assert [one.job.name for one in place(jobs, 4)] == ["reference", "wide"]


def test_a_job_that_fits_nowhere_is_named() -> None:
    with pytest.raises(ValueError, match="wide takes 8 GPUs, but there are 4"):
        place([Job(name="wide", places=8)], 4)
