"""The Markdown summary, read by a Markdown parser: tables, figures, and names that are markup nowhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from made import error_result, made_matrix, made_mean, made_result, made_speed, subject
from markdown_it import MarkdownIt
from markdown_it.token import Token

from pytest_kld.command import main
from pytest_kld.gate.regression import Allowance, changes
from pytest_kld.gate.result import Incomplete, Shard
from pytest_kld.gate.speed import judge_speed
from pytest_kld.report import markdown
from pytest_kld.report.json_file import write_json_report

if TYPE_CHECKING:
    from conftest import Gate

EVIL = (
    "a|b`c``d <img src=x onerror=alert(1)> </details> [x](http://evil) ![y](http://evil) @team #1 *_~ http://evil.com\n"
    "\n# heading\n| row |\x1b[31m\u202e &lt; \\| \\` ```"
)
SPELLED = (
    r"a\x7cb\x60c\x60\x60d <img src=x onerror=alert(1)> </details> [x](http://evil) ![y](http://evil) @team #1 *_~ "
    r"http://evil.com\n\n# heading\n\x7c row \x7c\x1b[31m\u202e &lt; \\x7c \\x60 \x60\x60\x60"
)
TOP = [{"id": 7, "text": EVIL, "p": 0.75}]
WORST = {
    "window": 0,
    "position": 3,
    "source_position": 3,
    "context": f"before {EVIL}",
    "label": 9,
    "label_text": EVIL,
    "kl": 1.5,
    "delta_p": -0.5,
    "reference_top": TOP,
    "candidate_top": [],
}


def parsed(text: str) -> list[Token]:
    """Every token of a text, those inside of paragraphs and cells too."""
    blocks = MarkdownIt("commonmark").enable("table").parse(text)
    return [token for block in blocks for token in (block, *(block.children or ()))]


def cells(text: str, table: int = 0) -> list[list[str]]:
    """The cells of a table, as a reader sees them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    opened = [index for index, token in enumerate(tokens) if token.type == "table_open"][table]
    rows: list[list[str]] = []
    for token in tokens[opened:]:
        if token.type == "table_close":
            break
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append("".join(child.content for child in token.children or ()))
    return rows


def evil_results() -> list[Any]:
    result = made_result(subject(EVIL, EVIL), scale=1, reference=subject(EVIL), nodeid=EVIL, message=EVIL)
    assert result.about is not None
    protocol = {**result.about["protocol"], "dataset": EVIL, "datasets": [{"dataset": EVIL, "windows": 4}]}
    diagnosis = {"worst_positions": [WORST]}
    result = replace(
        result, about={**result.about, "protocol": protocol}, diagnosis=diagnosis, datasets={EVIL: result.figures or {}}
    )
    return [
        replace(result, datasets={EVIL: result.figures or {}, "b": result.figures or {}}),
        error_result(subject(f"{EVIL}2"), message=f"{EVIL}\n````\nmore", reference=subject(EVIL)),
    ]


def test_text_from_outside_is_markup_nowhere() -> None:
    incomplete = Incomplete(reason=EVIL, planned=3, not_measured=(EVIL,))
    tokens = parsed(markdown.render(evil_results(), incomplete))
    spans = [token.content for token in tokens if token.type == "code_inline"]
    assert spans.count(SPELLED) == 3  # reference, dataset, and the dataset's own row
    assert sum(span.startswith(SPELLED) for span in spans) == 7  # both candidates too, and one at its two limits
    kinds = {token.type for token in tokens}
    assert not kinds & {"link_open", "image", "html_inline", "hr", "blockquote_open", "bullet_list_open"}
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h3"]
    blocks = [token.content.strip() for token in tokens if token.type == "html_block"]
    assert blocks.count("</details>") == sum(block.startswith("<details>") for block in blocks)
    assert all(block == "</details>" or block.count("<details>") == 1 for block in blocks)
    assert not any("<img" in block for block in blocks)
    fences = [token.content for token in tokens if token.type == "fence"]
    assert sum("\\x1b[31m\\u202e" in fence for fence in fences) >= 3
    assert not any("\x1b" in token.content or "\u202e" in token.content for token in tokens)
    card = next(token.content for token in tokens if token.type == "fence" and token.info == "markdown")
    inside = parsed(card)
    assert {token.type for token in inside if token.type.startswith(("html", "link", "image", "heading"))} == set()
    assert len(cells(card)) == 2


def test_tables_have_verdicts_figures_and_intervals() -> None:
    good, bad = made_result("good", confidence=0.9, size=512), made_result("bad", scale=1, size=512)
    text = markdown.render([good, bad, error_result("lost")])
    assert text.startswith("### KLD: 3 candidates: 1 not measured, 1 failed, 1 passed\n")
    rows = cells(text)
    assert rows[0][:3] == ["Model", "Verdict", "Mean KLD"]
    assert [row[0] for row in rows[1:]] == ["good", "bad", "lost"]
    assert [row[1].split(" (")[0] for row in rows[1:]] == ["✓ pass", "✗ FAIL", "! ERROR"]
    figures, interval = good.figures or {}, good.intervals["mean"]
    assert rows[1][2] == f"{figures['mean']:.6f} [{interval['low']:.6f}, {interval['high']:.6f}]"
    assert rows[2][2] == f"{(bad.figures or {})['mean']:.6f}"
    assert set(rows[3][2:]) == {"–"}
    limits = cells(text, 1)
    assert ["mean KLD", "bad", f"{(bad.figures or {})['mean']:.6g}", "≤ 0.05", "fail"] in limits
    assert "ServerError: the server died" in text
    card = next(token.content for token in parsed(text) if token.type == "fence" and token.info == "markdown")
    assert [row[0] for row in cells(card)] == ["Model", "good", "bad"]
    assert card.rstrip().splitlines()[-1] == (
        "KL(reference ‖ candidate) in nats, reference `reference`: 4 windows of 512 tokens at stride 256 of `a text`; "
        "intervals at confidence 0.9; pytest-kld 0.1.0."
    )


def test_matrices_have_a_table_of_means_and_one_of_pairs() -> None:
    matrix = made_matrix("x", ("triton", EVIL), bound=0.5, gaps={f"x ({EVIL})": EVIL}, suite="moe.kld.toml")
    text = markdown.render([made_result("x")], matrices=[matrix])
    tokens = parsed(text)
    assert not {token.type for token in tokens} & {"link_open", "image", "html_inline", "hr", "blockquote_open"}
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h3", "h3"]
    means, pairs = cells(text, -2), cells(text, -1)
    assert [row[1:] for row in means[1:]] == [["–", f"{made_mean(0, 1):.4g}"], [f"{made_mean(1, 0):.4g}", "–"]]
    assert (pairs[0][0], pairs[1][-1]) == ("Pair", "ok")
    assert markdown.render([], matrices=[matrix]).startswith(
        "\n### KLD of `moe.kld.toml`, against each other: `x`, passed"
    )


def test_changes_against_the_baseline_have_a_table() -> None:
    figures = made_result("a").figures or {}
    before = {**figures, "mean": figures["mean"] / 2}
    found = changes(before, figures, (Allowance.parse("mean:5%"),))
    assert found[0].allowance is not None
    baseline = {"changes": [change.to_json() for change in found], "notes": []}
    text = markdown.render([made_result("a", baseline=baseline)])
    rows = cells(text, 2)
    assert rows[0][:4] == ["Model", "Figure", "Now", "Baseline"]
    mean = figures["mean"]
    assert rows[1] == [
        *("a", "mean KLD", f"{mean:.6g}", f"{mean / 2:.6g}", f"{mean / 2:+.6g} (+100.0%)", "–", "mean:5%", "fail")
    ]
    assert rows[2][-2:] == ["–", "–"]


def test_speed_is_folded_away_under_the_candidates_names() -> None:
    measured = made_speed({1: [100.0], 4: [300.0]})
    speed = judge_speed(measured, {"min_output_tps": {1: 45}}, base=None, base_label=None, confidence=None)
    text = markdown.render([made_result("a|b", speed=speed.to_json())], shard=Shard(number=2, of=5))
    assert "<details><summary>Speed</summary>" in text
    assert cells(text, 2)[1][0] == r"a\x7cb"
    assert text.endswith("shard 2 of 5.\n")


def test_each_suite_has_a_section() -> None:
    results = [made_result("a", suite="one.kld.toml"), made_result("a", suite="two.kld.toml", scale=1)]
    text = markdown.render(results)
    assert "### KLD of `one.kld.toml`: 1 candidate: 1 passed" in text
    assert "### KLD of `two.kld.toml`: 1 candidate: 1 failed" in text


def test_worst_tokens_of_failed_candidates_come_first_and_are_not_endless() -> None:
    diagnosis = {"worst_positions": [{**WORST, "label_text": f"t{index}"} for index in range(30)]}
    results = [made_result(f"m{index}", scale=0.01 if index else 1, diagnosis=diagnosis) for index in range(24)]
    text = markdown.render(results[::-1])
    worst = [line for line in text.splitlines() if line.startswith("<details><summary>Worst tokens")]
    assert len(worst) == 20
    assert "<code>m0</code>" in worst[0]
    assert "Worst tokens of 4 more candidates are in the HTML and JSON reports." in text
    assert [row[2] for row in cells(text, 2)[1:]] == [f"t{index}" for index in range(8)]


def test_a_session_that_gated_nothing_says_so() -> None:
    assert "Nothing was gated" in markdown.render([])


def test_the_command_writes_it_with_a_section_for_each_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = made_result("b", size=64)
    write_json_report(tmp_path / "report.json", [made_result("a"), other])
    assert main(["report", str(tmp_path / "report.json"), "--markdown", "-"]) == 0
    text = capsys.readouterr().out
    assert text.count("### KLD: 1 candidate: 1 passed") == 2
    assert [cells(text, table)[1][0] for table in (0, 2)] == ["a", "b"]


def test_a_job_summary_keeps_what_others_wrote(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = gate.path / "summary.md"
    summary.write_text("what another step wrote")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    for _ in range(2):
        result = gate("--kld-max-mean=1", "--kld-markdown=own.md")
        result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["Markdown report: *own.md", f"job summary report: {summary}"])
    own = (gate.path / "own.md").read_text()
    assert own.startswith("### KLD: 1 candidate: 1 passed")
    assert "Worst tokens of" in own
    assert summary.read_text() == f"what another step wrote\n{own}\n{own}"
    gate.pytester.makepyfile("def test_plain(): pass")
    gate.pytester.runpytest().assert_outcomes(passed=1)
    assert summary.read_text().count("### KLD") == 2


def test_a_job_summary_is_not_replaced_and_not_lost_silently(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(gate.path / "summary.md"))
    result = gate("--kld-markdown=summary.md")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --kld-markdown: GITHUB_STEP_SUMMARY writes its report to *summary.md, too; *"])
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(gate.path / "missing" / "summary.md"))
    result = gate("--kld-max-mean=1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["ERROR: cannot write the job summary report *missing*"])
