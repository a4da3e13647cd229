"""Shards: together they gate every Subject once, and their merged report is that of one session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from made import made_result

from pytest_kld.command import main
from pytest_kld.gate.result import Shard
from pytest_kld.report.json_file import write_json_report

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Gate

OWN = ("seconds", "created")


@pytest.fixture
def candidates(candidate_dir: Path, broken_dir: Path, reference_dir: Path) -> tuple[Path, ...]:
    return candidate_dir, broken_dir, reference_dir


def without_times(report: Any) -> Any:
    """Return a report without what is another in each session."""
    if isinstance(report, dict):
        return {name: without_times(value) for name, value in report.items() if name not in OWN}
    return [without_times(value) for value in report] if isinstance(report, list) else report


@pytest.fixture
def report_command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function that runs `pytest-kld report` and returns its exit code and all that it printed, on one line."""

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main(["report", *arguments])
        return code, " ".join("".join(capfd.readouterr()).split())

    return run


@pytest.mark.parametrize("count", [2, 5])
def test_merged_shards_are_the_report_of_one_session(
    gate: Gate, candidates: tuple[Path, ...], report_command: Callable[..., tuple[int, str]], count: int
) -> None:
    options = ("--kld-max-mean=0.1",)
    gate(*options, "--kld-json=whole.json", "--kld-html=whole.html", candidates=candidates)
    gated = []
    for number in range(1, count + 1):
        result = gate(
            *options,
            f"--kld-shard={number}/{count}",
            f"--kld-json=shard-{number}.json",
            f"--kld-junit=shard-{number}.xml",
            f"--kld-html=shard-{number}.html",
            candidates=candidates,
        )
        report = json.loads(Path(f"shard-{number}.json").read_text())
        assert report["shard"] == {"number": number, "of": count}
        assert f"shard {number} of {count}" in Path(f"shard-{number}.xml").read_text()
        assert f"pytest-kld report, shard {number} of {count}" in Path(f"shard-{number}.html").read_text()
        mine = len(report["results"])
        said = f"{mine} of 3" if mine else "none of the 3"
        result.stdout.fnmatch_lines(f"shard {number} of {count} gates {said} Subjects")
        if not mine:
            assert result.ret == pytest.ExitCode.OK
        gated += [one["nodeid"] for one in report["results"]]
    shards = [f"shard-{number}.json" for number in range(1, count + 1)]
    code, output = report_command(*shards, "--json", "merged.json", "--html", "merged.html")
    assert code == 1, output  # `broken` fails, as in one session
    whole, merged = (json.loads(Path(name).read_text()) for name in ("whole.json", "merged.json"))
    for report in (whole, merged):
        report["results"].sort(key=lambda one: one["nodeid"])
    assert without_times(merged) == without_times(whole)
    assert sorted(gated) == [one["nodeid"] for one in whole["results"]]
    code, output = report_command(*shards[1:])
    assert code == 2
    assert f"shard 1 of {count} is missing: give the reports of all shards" in output


def test_tests_of_one_subject_stay_together_and_other_tests_run_everywhere(
    gate: Gate, candidates: tuple[Path, ...]
) -> None:
    gate.pytester.makepyfile("""
        def test_mean(kld): pass
        def test_tail(kld): pass
        def test_plain(): pass
    """)
    seen = []
    for number in (1, 2):
        result = gate(f"--kld-shard={number}/2", "--collect-only", "-q", candidates=candidates)
        seen.append({line for line in result.outlines if "::" in line})
    plain = {line for line in seen[0] if line.endswith("::test_plain")}
    assert seen[0] & seen[1] == plain != set()
    for tests in seen:
        names = [
            sorted(line.partition("[")[2] for line in tests if f"::{test}[" in line)
            for test in ("test_mean", "test_tail")
        ]
        assert names[0] == names[1] != []
    assert len(seen[0] | seen[1]) == 7


def test_selection_comes_before_the_split(gate: Gate, candidates: tuple[Path, ...]) -> None:
    options = ("-k", "broken or candidate", "--collect-only", "-q")
    lines = [
        [line for line in gate(f"--kld-shard={number}/2", *options, candidates=candidates).outlines if "::" in line]
        for number in (1, 2)
    ]
    assert [len(line) for line in lines] == [1, 1]
    assert lines[0] != lines[1]


def test_nothing_to_gate_at_all_is_not_an_empty_shard(gate: Gate, candidates: tuple[Path, ...]) -> None:
    result = gate("--kld-shard=1/2", "-k", "nothing", candidates=candidates)
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.slow
def test_shards_of_workers_are_the_same(gate: Gate, candidates: tuple[Path, ...]) -> None:
    for number in (1, 5):
        result = gate(
            "-p",
            "xdist",
            "-n2",
            f"--kld-shard={number}/5",
            "--kld-json=report.json",
            candidates=candidates,
            subprocess=True,
        )
        assert result.ret == pytest.ExitCode.OK
        said = "1 of 3" if number == 1 else "none of the 3"
        result.stdout.fnmatch_lines(f"shard {number} of 5 gates {said} Subjects")
        assert len(gate.results()) == (number == 1)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ((Shard(1, 2), Shard(2, 3)), "shards of different splits, of 2 and 3 shards"),
        ((Shard(1, 4), Shard(3, 4)), "shards 2, 4 of 4 are missing"),
    ],
)
def test_shards_that_do_not_make_a_whole_are_refused(
    tmp_path: Path, report_command: Callable[..., tuple[int, str]], shards: tuple[Shard, ...], message: str
) -> None:
    paths = [str(tmp_path / f"{shard.number}.json") for shard in shards]
    for path, shard in zip(paths, shards, strict=True):
        write_json_report(Path(path), [made_result(str(shard))], None, shard)
    code, output = report_command(*paths)
    assert code == 2
    assert message in output
