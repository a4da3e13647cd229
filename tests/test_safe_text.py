"""Text from outside is shown and has no other effect."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_kld.plain import LINES, json_escaped, plain, without_surrogates

ANY_TEXT = st.text(st.characters(exclude_categories=()))
"""Text with lone surrogates, control characters and unassigned code points."""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("\udcff\ud800", r"\udcff\ud800"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("a\u200bb\ufeff\u3164", r"a\u200bb\ufeff\u3164"),
        ("\U000e0041", r"\U000e0041"),
        ("::error::x", r"\x3a:error::x"),
        (" ::add-mask::x ::error::y", r" \x3a:add-mask::x ::error::y"),
        ("a ##[error]b", r"a \x23#[error]b"),
        ("##vso[task.setvariable]###[x]", r"\x23#vso[task.setvariable]#\x23#[x]"),
        ("tests/a.py::test_b[c] ## heading", "tests/a.py::test_b[c] ## heading"),
        ("naïve 漢字　‖ Δp 🙂 \\x1b", "naïve 漢字　‖ Δp 🙂 \\x1b"),
    ],
)
def test_what_is_no_text_is_spelled_out_and_text_stays(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_lines_and_tabs_of_a_message_may_stay() -> None:
    assert plain("a\n\tb\r\x1b", keep=LINES) == "a\n\tb\\r\\x1b"


def test_no_line_of_a_message_is_a_command_of_a_ci_runner() -> None:
    assert plain("it said:\n\t::stop-commands::x\nno::ne", keep=LINES) == "it said:\n\t\\x3a:stop-commands::x\nno::ne"


def test_no_json_is_a_command_of_a_ci_runner_and_it_keeps_its_meaning() -> None:
    text = "##[error]said \x1b the ##vso[task.setvariable]"
    written = json_escaped(json.dumps([text], ensure_ascii=False, indent=2))
    assert not re.search(r"##\w*\[|\x1b", written)
    assert json.loads(written) == [text]


@given(ANY_TEXT)
def test_plain_text_can_be_written_holds_no_control_and_is_a_fixed_point(text: str) -> None:
    shown = plain(text)
    shown.encode()
    assert not [char for char in shown if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert plain(shown) == shown


@given(ANY_TEXT)
def test_without_surrogates_changes_nothing_else(text: str) -> None:
    shown = without_surrogates(text)
    shown.encode()
    assert without_surrogates(shown) == shown
    if not any("\ud800" <= char <= "\udfff" for char in text):
        assert shown == text
