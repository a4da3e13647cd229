"""The documentation says what the code does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from pytest_kld import plugin
from pytest_kld.collecting.kld import KLD
from pytest_kld.figures.scores import Summary
from pytest_kld.gate.limits import LIMITS, MATRIX_LIMITS
from pytest_kld.session import fixtures
from pytest_kld.settings.options import OPTIONS

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading."""
    section = REFERENCE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]


def test_option_table_lists_every_option_with_its_ini_key_and_default() -> None:
    expected = [
        [
            option.option if option.flag else f"{option.option}={option.metavar}",
            option.ini,
        ]
        for option in OPTIONS
    ]
    assert [row[:2] for row in rows("Options and ini keys")] == expected
    defaults = {row[1]: row[2] for row in rows("Options and ini keys")}
    for option in OPTIONS:
        default = option.default
        if option.name in LIMITS and LIMITS[option.name].default is not None:
            default = f"{LIMITS[option.name].default:g}"
        if default is not None:
            assert defaults[option.ini] == default


def test_marker_table_lists_every_limit() -> None:
    assert [row[0] for row in rows("Marker")] == [*LIMITS, *MATRIX_LIMITS]


def test_fixture_table_lists_every_public_fixture() -> None:
    public = {name for name in vars(plugin) if name.startswith("kld")}
    assert public == {name for name in vars(fixtures) if name.startswith("kld")}
    documented = {row[0]: row[1] for row in rows("Fixtures")}
    assert set(documented) == public
    assert documented.pop("kld") == "function"
    assert set(documented.values()) == {"session"}


def test_facade_has_every_figure_that_the_fixture_table_names() -> None:
    (description,) = [row[2] for row in rows("Fixtures") if row[0] == "kld"]
    names = set(re.findall(r"`(\w+)`", description))
    public = {name for name, _ in inspect.getmembers(KLD, lambda value: isinstance(value, property))}
    attributes = {
        "summary",
        "diagnosis",
        "baseline",
        "floor",
        "saw",
        "datasets",
        "scores",
        "intervals",
        "bounds",
        "reference",
        "candidate",
        "subjects",
    }
    assert names == {name for name in public if not name.startswith("_")} | attributes


def test_figure_table_lists_every_field_of_the_summary() -> None:
    listed = [name.strip("` ") for row in rows("Figures") for name in row[0].split(",")]
    assert sorted(listed) == sorted(Summary.__slots__)


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_help_shows_every_option(pytester: pytest.Pytester) -> None:
    text = pytester.runpytest("--help").stdout.str()
    for option in OPTIONS:
        assert option.option in text
        assert f"{option.ini} (" in text
