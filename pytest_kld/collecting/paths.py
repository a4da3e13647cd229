"""On which paths the tests of a session need each Subject: one server serves several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_kld.subjects.subject import EnginePath, Subject


@dataclass(frozen=True, slots=True)
class NeededPaths:
    """The paths of each candidate, by its name with its axes."""

    _of: dict[str, set[EnginePath]] = field(default_factory=dict)

    @classmethod
    def of(cls, tests: Iterable[tuple[Subject, str]]) -> NeededPaths:
        """Read them from the candidate of each test, and the path that the test was asked for; it may be `both`.

        A test that decodes and was asked for both needs the prefill too, to compare with.
        """
        found = cls()
        for candidate, asked in tests:
            needed = found._of.setdefault(candidate.variant, set())
            needed.add(candidate.path)
            if asked == "both":
                needed.add("prefill")
        return found

    def beside(self, subject: Subject, *, is_reference: bool = False) -> list[EnginePath]:
        """Return the other paths on which a Subject is needed; the reference is needed on those of every candidate."""
        paths = set().union(*self._of.values()) if is_reference else self._of.get(subject.variant, set())
        return sorted(paths - {subject.path})


def by_server(subjects: Sequence[Subject]) -> list[list[Subject]]:
    """Return Subjects in groups that differ in nothing but their paths, in their order."""
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.variant, []).append(subject)
    return list(groups.values())
