"""Shards: each of several sessions of the same command, on as many machines, gates its share of the Subjects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from pytest_kld.collecting.items import is_gated, is_matrix
from pytest_kld.collecting.matrices import matrix_key
from pytest_kld.settings.config import CONFIG, config_of
from pytest_kld.settings.subjects import candidate_of

if TYPE_CHECKING:
    from pytest_kld.gate.result import Shard

SHARE = pytest.StashKey["Share"]()


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a session's work a shard has.

    Attributes:
        shard: which shard it is.
        subjects: the number of its Subjects.
        of_subjects: the number of all Subjects.

    """

    shard: Shard
    subjects: int
    of_subjects: int

    @property
    def empty(self) -> bool:
        """Whether the shard has nothing to do because there are more shards than Subjects."""
        return not self.subjects and self.of_subjects > 0

    def __str__(self) -> str:
        """Say which shard this is and how much it has."""
        number = f"{self.subjects} of {self.of_subjects}" if self.subjects else f"none of the {self.of_subjects}"
        return f"{self.shard} gates {number} Subject{'' if self.of_subjects == 1 else 's'}"


def keep_share(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Deselect the gated tests of other shards.

    Subjects are dealt out in the order in which they were collected: to the shards 1, 2, …, N, 1, 2, … All tests of a
    Subject are in one shard, so it is captured once. The Subjects of a matrix are dealt out together, with the test
    that compares them. Tests that are not gated stay in every shard.
    """
    shard = session.config.stash[CONFIG].shard
    assert shard is not None
    dealt: dict[tuple[object, ...], int] = {}
    subjects: dict[tuple[object, ...], bool] = {}
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        if not is_gated(item) and not is_matrix(item):
            kept.append(item)
            continue
        mine = dealt.setdefault(matrix_key(item), len(dealt)) % shard.of == shard.number - 1
        (kept if mine else others).append(item)
        if is_gated(item):
            candidate = candidate_of(item)
            subjects[config_of(item).suite, candidate.id, candidate.path] = mine
    if others:
        session.config.hook.pytest_deselected(items=others)
        items[:] = kept
    session.config.stash[SHARE] = Share(shard, sum(subjects.values()), len(subjects))
