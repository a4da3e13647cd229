"""What a session is going to measure: the gated tests that were collected and not deselected.

Under xdist the workers collect, and the controller writes the reports. xdist tells the controller the node ids, but
these do not say what is gated. So each worker writes its plan to a file that the controller names. A worker on another
machine cannot do that; the controller then looks for the candidates' names in the node ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_kld.collecting.collection import SUITE_SUFFIX
from pytest_kld.collecting.items import is_gated, is_matrix
from pytest_kld.errors import KLDError
from pytest_kld.settings.config import CONFIG, config_of
from pytest_kld.settings.subjects import candidate_of, candidates_of, on_path, reference_as_named
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pytest

    from pytest_kld.gate.matrix import MatrixResult

PLAN_FILE = "kld_plan"
"""The key of xdist's `workerinput` under which a worker finds the path of its plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One gated test that was collected.

    Attributes:
        nodeid: the test's.
        reference: what it is compared with.
        candidate: the candidate that it measures.
        suite: its suite file, or None.
        trust_remote_code: see `GateResult`.

    """

    nodeid: str
    reference: Subject
    candidate: Subject
    suite: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, item: pytest.Item) -> Planned:
        """Return what a gated test measures."""
        config = config_of(item)
        candidate = candidate_of(item)
        reference = on_path(reference_as_named(config), candidate.path)
        return cls(
            nodeid=item.nodeid,
            reference=reference,
            candidate=candidate,
            suite=config.suite,
            trust_remote_code=config.trust_remote_code,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "nodeid": self.nodeid,
            "reference": self.reference.to_json(),
            "candidate": self.candidate.to_json(),
            "suite": self.suite,
            "trust_remote_code": self.trust_remote_code,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Planned:
        """Create it from the output of `to_json`."""
        sides = {side: Subject.from_json(data[side]) for side in ("reference", "candidate")}
        return cls(**{**data, **sides})


def plan_of(items: Iterable[pytest.Item]) -> list[Planned]:
    """Return the gated tests among the items, in their order."""
    return [Planned.of(item) for item in items if is_gated(item)]


def matrices_of_plan(items: Iterable[pytest.Item]) -> list[MatrixResult]:
    """Return what the tests of matrices among the items would measure, as results that were not measured."""
    found = [item for item in items if is_matrix(item)]
    if not found:
        return []
    from pytest_kld.collecting.matrix import matrix_of
    from pytest_kld.measuring.comparing import planned_matrix

    matrices = [(item, matrix_of(item)) for item in found]
    return [planned_matrix(matrix, item.nodeid, config_of(item)) for item, matrix in matrices if matrix is not None]


class WorkerPlan:
    """Tells the controller what a worker of xdist collected."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Write the plan to the file that the controller reads."""
        path = Path(session.config.workerinput[PLAN_FILE])  # type: ignore[attr-defined]
        if path.parent.is_dir():  # else the controller is on another machine
            plan = [planned.to_json() for planned in plan_of(session.items)]
            matrices = [matrix.to_json() for matrix in matrices_of_plan(session.items)]
            written = {"tests": plan, "matrices": matrices, "share": _share_of(session.config)}
            path.write_text(json.dumps(written), encoding="ascii")


def _share_of(config: pytest.Config) -> list[int] | None:
    if config.stash[CONFIG].shard is None:
        return None
    from pytest_kld.collecting.shards import SHARE

    share = config.stash[SHARE]
    return [share.subjects, share.of_subjects]


def share_of_worker(path: Path) -> tuple[int, int] | None:
    """Return how many Subjects a worker's shard has, and how many there are; None if nobody knows."""
    if not path.is_file() or (share := json.loads(path.read_text(encoding="ascii"))["share"]) is None:
        return None
    return share[0], share[1]


def matrices_of_worker(path: Path) -> list[MatrixResult]:
    """Return the matrices that a worker is going to measure; none if it could not write its plan."""
    if not path.is_file():
        return []
    from pytest_kld.gate.matrix import MatrixResult

    return [MatrixResult.from_json(data) for data in json.loads(path.read_text(encoding="ascii"))["matrices"]]


def plan_of_worker(path: Path, nodeids: Sequence[str], config: pytest.Config) -> list[Planned]:
    """Return what a worker is going to measure.

    Args:
        path: the file to which it was asked to write its plan.
        nodeids: the tests that it collected; used if there is no such file.
        config: the controller's.

    """
    if path.is_file():
        return [Planned.from_json(planned) for planned in json.loads(path.read_text(encoding="ascii"))["tests"]]
    reference = reference_as_named(config.stash[CONFIG])
    try:
        candidates = candidates_of(config.stash[CONFIG])
    except KLDError:  # the session was refused
        candidates = []
    found = []
    for nodeid in nodeids:
        file, _, test = nodeid.partition("::")
        parameters = test.partition("[")[2]
        if file.endswith(SUITE_SUFFIX):
            named_here = Subject(name=parameters.removesuffix("]"))
            unknown = Subject(name=f"the reference of {file}")
            found.append(Planned(nodeid=nodeid, reference=unknown, candidate=named_here, suite=file))
            continue
        if named := [subject for subject in candidates if _in_id(subject) in parameters]:
            longest = max(named, key=lambda subject: len(subject.id))
            found.append(Planned(nodeid=nodeid, reference=reference, candidate=longest))
    return found


def _in_id(subject: Subject) -> str:
    """Return a Subject's name as pytest writes it into a node id."""
    return subject.id.encode("unicode_escape").decode("ascii")
