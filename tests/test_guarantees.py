"""Every guarantee names a test, and that test exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_SHOWN = "Not shown"
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def guarantees() -> list[str]:
    """Return the guarantees, each in one line, without the section of what is not shown."""
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    told, _, _ = text.partition(f"\n## {NOT_SHOWN}\n")
    assert told != text, f"the section {NOT_SHOWN!r} is missing"
    return [" ".join(item.split()) for item in re.findall(r"^- (.*(?:\n  .*)*)", told, flags=re.MULTILINE)]


def names_in(path: Path) -> set[str]:
    """Return the names of the tests in a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("guarantee", guarantees(), ids=lambda text: text[:60])
def test_guarantee_names_tests_that_exist(guarantee: str) -> None:
    named = _TEST.findall(guarantee)
    assert named, "it names no test, as `tests/FOLDER/test_MODULE.py::test_NAME`"
    for path, name in named:
        assert name in names_in(ROOT / path), f"{path} has no test {name}"
