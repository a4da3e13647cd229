"""Matrices: which candidates of a session are compared with each other, and the tests that do it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.collecting.collection import GateModule, refuse
from pytest_kld.collecting.items import is_gated, is_matrix
from pytest_kld.collecting.matrix import Matrix, Member, matrix_of, own_between_of
from pytest_kld.plain import plain
from pytest_kld.settings.config import CONFIG, config_of
from pytest_kld.settings.subjects import candidate_of, named_candidate_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_kld.settings.config import KLDConfig
    from pytest_kld.subjects.subject import EnginePath, Subject

ALL = "candidates"
"""The name of a matrix of all candidates."""


def matrices_of(items: Sequence[pytest.Item], config: KLDConfig) -> list[Matrix]:
    """Return the matrices of the gated tests that share some settings: by the candidate's name and path.

    A candidate without variants is in none.
    """
    if config.matrix is None:
        return []
    groups: dict[tuple[str, EnginePath], dict[tuple[object, ...], Member]] = {}
    for item in items:
        if not is_gated(item) or config_of(item) is not config:
            continue
        subject = candidate_of(item)
        members = groups.setdefault((_name(subject, config), subject.path), {})
        key = subject.name, *subject.axes.items()
        if key not in members:
            named, axes = named_candidate_of(item)
            members[key] = Member(subject=subject, named=named, axes=axes)
        members[key].items.append(item)
    matrices = [
        Matrix(name=name, path=path, members=tuple(members.values()))
        for (name, path), members in groups.items()
        if len(members) > 1
    ]
    for matrix in matrices:
        labels = [member.subject.label for member in matrix.members]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise pytest.UsageError(f"the matrix of {matrix.name} has two candidates {min(twice)}: rename one of them")
    return matrices


def matrix_key(item: pytest.Item) -> tuple[str | None, str, str]:
    """Return what the tests of a matrix and of its members have in common: suite, name and path."""
    config = config_of(item)
    matrix = matrix_of(item)
    if matrix is not None:
        return config.suite, matrix.name, matrix.path
    subject = candidate_of(item)
    return config.suite, subject.id if config.matrix is None else _name(subject, config), subject.path


def _name(subject: Subject, config: KLDConfig) -> str:
    return ALL if config.matrix == "all" else subject.name


class MatrixModule(GateModule):
    """The tests of matrices. Its node id is that of its parent."""

    config_of_suite: KLDConfig | None
    matrices: Sequence[Matrix]

    @classmethod
    def of(cls, parent: Any, matrices: Sequence[Matrix], config_of_suite: KLDConfig | None = None) -> MatrixModule:
        """Return the collector of some matrices' tests, whose fixtures are those that `parent` sees."""
        from pytest_kld import gate_only

        module: MatrixModule = cls.from_parent(
            parent, path=Path(gate_only.__file__), nodeid=parent.nodeid if parent.nodeid not in ("", ".") else "kld"
        )
        module.config_of_suite, module.matrices = config_of_suite, matrices
        return module

    def istestfunction(self, obj: object, name: str) -> bool:  # noqa: ARG002
        """Accept only the function of a matrix."""
        return name == "test_kld_matrix"

    @property
    def own_config(self) -> KLDConfig | None:
        """Return the settings of the suite, if it is one."""
        return self.config_of_suite

    def parametrize(self, metafunc: pytest.Metafunc) -> bool:
        """Make a test for each matrix."""
        named = {} if self.config_of_suite is None else {"kld_config": self.config_of_suite}
        values = [
            pytest.param(*named.values(), matrix, id=plain(matrix.id), marks=_marks(matrix)) for matrix in self.matrices
        ]
        metafunc.parametrize((*named, "_kld_matrix"), values, indirect=True, scope="session")
        return True


def _marks(matrix: Matrix) -> list[pytest.MarkDecorator]:
    """Return the tags of all members, so that what selects any of them selects their matrix; and a skip."""
    tags = [set(member.subject.tags) for member in matrix.members]
    marks = [getattr(pytest.mark, tag) for tag in sorted(set.union(*tags))]
    if all(item.get_closest_marker("skip") for item in matrix.items):
        marks.append(pytest.mark.skip(reason="none of its candidates is measured"))
    return marks


def add_matrices(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add the tests of the matrices of all candidates that are not a suite's; a suite collects its own.

    Raises:
        pytest.UsageError: a matrix is asked for on the command line, but there is none.

    """
    config = session.config.stash[CONFIG]
    if config.matrix is None:
        return
    matrices = matrices_of(items, config)
    if matrices:
        parent = _common_parent([item for matrix in matrices for item in matrix.items])
        items.extend(session.genitems(MatrixModule.of(parent, matrices)))
    gated = [item for item in items if is_gated(item)]
    own = [item for item in gated if config_of(item) is config]
    asked = session.config.getoption("kld_matrix") and not any(map(is_matrix, items))
    if (gated and asked) or (own and not matrices and config.max_between is not None):
        refuse(session, f"--kld-matrix={config.matrix}: {no_matrix(config)}")
    compared = {id(item) for matrix in matrices for item in matrix.items}
    for item in own:
        if id(item) not in compared and own_between_of(item) is not None:
            refuse(session, f"{item.nodeid}: max_between bounds the pairs of a matrix, and its candidate is in none")


def no_matrix(config: KLDConfig) -> str:
    """Say why there is no matrix."""
    if config.matrix == "all":
        return "there are no two candidates to compare with each other"
    return (
        "no candidate has two variants to compare with each other: give it an axis, such as --kld-moe-backend twice, "
        "or compare all candidates with --kld-matrix=all"
    )


def place_matrices(items: list[pytest.Item]) -> None:
    """Move the test of each matrix behind the last one of its members'."""
    for item in [item for item in items if is_matrix(item)]:
        matrix = matrix_of(item)
        assert matrix is not None
        members = set(map(id, matrix.items))
        last = max((index for index, one in enumerate(items) if id(one) in members), default=None)
        if last is not None:
            at = items.index(item)
            del items[at]
            items.insert(last if at < last else last + 1, item)


def _common_parent(items: Sequence[pytest.Item]) -> pytest.Collector:
    """Return the deepest collector that all tests are in: it sees the fixtures that they share."""
    chains = [item.listchain()[:-1] for item in items]
    shared = [nodes[0] for nodes in zip(*chains, strict=False) if all(node is nodes[0] for node in nodes)]
    parent = shared[-1]
    assert isinstance(parent, pytest.Collector)
    return parent
