"""Collects suite files: one test for each Subject."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_kld.collecting.collection import GateModule
from pytest_kld.collecting.items import PROBLEM
from pytest_kld.collecting.matrices import MatrixModule, matrices_of
from pytest_kld.errors import SuiteError
from pytest_kld.plain import LINES, plain
from pytest_kld.settings.subjects import candidate_of, is_overridden
from pytest_kld.suites.suite import Suite, load_suite

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pytest_kld.settings.config import KLDConfig
    from pytest_kld.suites.suite import Entry

_OWN_FIXTURES = ("kld_config", "kld_windows", "kld_reference", "kld_candidate")
"""A suite says itself what these are."""


def suite_module(path: Path, parent: pytest.Collector) -> SuiteModule:
    """Return the collector of a suite file."""
    module: SuiteModule = SuiteModule.from_parent(parent, path=path)
    return module


class SuiteModule(GateModule):
    """A suite file, collected as a module whose only test is the built-in gate."""

    suite: Suite

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """Read the file and return its tests.

        Raises:
            CollectError: the file has a mistake.

        """
        try:
            self.suite = load_suite(self.path, self.nodeid, self.config)
        except SuiteError as error:
            raise self.CollectError(plain(f"{type(error).__name__}: {error}", keep=LINES)) from None
        for tag in sorted({tag for entry in self.suite.entries for tag in entry.subject.tags}):
            self.config.addinivalue_line("markers", f"{tag}: a tag of suite files")
        entries = {entry.subject.id: entry for entry in self.suite.entries}
        items = list(super().collect())
        for item in items:
            assert isinstance(item, pytest.Item)
            entry = entries[candidate_of(item).id]
            if (problem := entry.problem or _overridden(item)) is not None:
                item.stash[PROBLEM] = problem
        tests = [item for item in items if isinstance(item, pytest.Item)]
        if matrices := matrices_of(tests, self.suite.config):
            items += MatrixModule.of(self, matrices, self.suite.config).collect()
        return items

    @property
    def own_config(self) -> KLDConfig:
        """Return the settings of the suite."""
        return self.suite.config

    def parametrize(self, metafunc: pytest.Metafunc) -> bool:
        """Make a test for each Subject."""
        values = [
            pytest.param(self.suite.config, entry.subject, id=plain(entry.subject.id), marks=_marks(entry))
            for entry in self.suite.entries
        ]
        metafunc.parametrize(("kld_config", "kld_candidate"), values, indirect=True, scope="session")
        return True


def _overridden(item: pytest.Item) -> str | None:
    for fixture in _OWN_FIXTURES:
        if is_overridden(item, fixture):
            return (
                f"a conftest.py overrides the fixture {fixture}, and a suite file says itself what is measured: keep "
                "the suite in a directory without that fixture"
            )
    return None


def _marks(entry: Entry) -> list[pytest.MarkDecorator]:
    marks = [getattr(pytest.mark, tag) for tag in entry.subject.tags]
    if entry.skip is not None:
        marks.append(pytest.mark.skip(reason=entry.skip))
    if entry.xfail is not None:
        marks.append(pytest.mark.xfail(reason=plain(entry.xfail, keep=LINES)))
    return marks
