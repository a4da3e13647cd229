"""A matrix: candidates whose captures are compared with each other, and the tests that measure them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_kld.gate.limits import MATRIX_LIMITS, merge_bounds, parse_marker
from pytest_kld.settings.subjects import candidate_of

if TYPE_CHECKING:
    import pytest

    from pytest_kld.settings.config import KLDConfig
    from pytest_kld.subjects.subject import EnginePath, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One candidate of a matrix.

    Attributes:
        subject: the candidate, as reports name it.
        named: the candidate, as its test names it; fixtures may add to it when it is run.
        axes: the axes that are added then.
        items: the tests that measure it, including those that are not selected.

    """

    subject: Subject
    named: Subject
    axes: dict[str, str]
    items: list[pytest.Item] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Candidates that are compared with each other, on one path.

    Attributes:
        name: the name that they share; `candidates` if all candidates are compared.
        path: their path through the engine.
        members: at least two.

    """

    name: str
    path: EnginePath
    members: tuple[Member, ...]

    @property
    def id(self) -> str:
        """Return the name, and the path unless it is prefill, for a test's id."""
        return self.name if self.path == "prefill" else f"{self.name}-{self.path}"

    @property
    def items(self) -> list[pytest.Item]:
        """Return the tests of all members."""
        return [item for member in self.members for item in member.items]

    def bound(self, config: KLDConfig) -> float | None:
        """Return the limit on its pairs: the smallest one of its members' tests; None if they have none."""
        bounds = [between_of(item, config) for item in self.items]
        return min((bound for bound in bounds if bound is not None), default=None)


def matrix_of(item: pytest.Item) -> Matrix | None:
    """Return the matrix that a test measures; None if it measures none."""
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    found: Matrix | None = parameters.get("_kld_matrix")
    return found


def between_of(item: pytest.Item, config: KLDConfig) -> float | None:
    """Return a test's limit on the pairs of the matrix that its candidate is in; None if it has none."""
    own = own_between_of(item)
    return config.max_between if own is None else own


def own_between_of(item: pytest.Item) -> float | None:
    """Return the limit on pairs that a test's markers or its candidate set; None if they set none."""
    markers = [parse_marker(mark.args, mark.kwargs) for mark in item.iter_markers("kld")]
    return merge_bounds(*markers, dict(candidate_of(item).limits), limits=MATRIX_LIMITS).get("max_between")
