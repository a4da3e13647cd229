"""What a session is going to measure: the gated tests that were collected and not deselected.

Under xdist the workers collect, and the controller writes the reports. xdist tells the controller the node ids, but
these do not say what is gated. So each worker writes its plan to a file that the controller names. A worker on another
machine cannot do that; the controller then looks for the candidates' names in the node ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_kld.session.config import CONFIG
from pytest_kld.session.fixtures import is_gated
from pytest_kld.session.subjects import candidate_of, candidates_of
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pytest

PLAN_FILE = "kld_plan"
"""The key of xdist's `workerinput` under which a worker finds the path of its plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One gated test that was collected.

    Attributes:
        nodeid: the test's.
        candidate: the candidate that it measures.

    """

    nodeid: str
    candidate: Subject


def plan_of(items: Iterable[pytest.Item]) -> list[Planned]:
    """Return the gated tests among the items, in their order."""
    return [Planned(nodeid=item.nodeid, candidate=candidate_of(item)) for item in items if is_gated(item)]


class WorkerPlan:
    """Tells the controller what a worker of xdist collected."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Write the plan to the file that the controller reads."""
        path = Path(session.config.workerinput[PLAN_FILE])  # type: ignore[attr-defined]
        if path.parent.is_dir():  # else the controller is on another machine
            plan = [[planned.nodeid, planned.candidate.to_json()] for planned in plan_of(session.items)]
            path.write_text(json.dumps(plan), encoding="ascii")


def plan_of_worker(path: Path, nodeids: Sequence[str], config: pytest.Config) -> list[Planned]:
    """Return what a worker is going to measure.

    Args:
        path: the file to which it was asked to write its plan.
        nodeids: the tests that it collected; used if there is no such file.
        config: the controller's.

    """
    if path.is_file():
        plan = json.loads(path.read_text(encoding="ascii"))
        return [Planned(nodeid=nodeid, candidate=Subject.from_json(candidate)) for nodeid, candidate in plan]
    candidates = candidates_of(config.stash[CONFIG])
    found = []
    for nodeid in nodeids:
        parameters = nodeid.partition("[")[2]
        if named := [subject for subject in candidates if _in_id(subject) in parameters]:
            found.append(Planned(nodeid=nodeid, candidate=max(named, key=lambda subject: len(subject.id))))
    return found


def _in_id(subject: Subject) -> str:
    """Return a Subject's name as pytest writes it into a node id."""
    return subject.id.encode("unicode_escape").decode("ascii")
