"""Matrices: the candidates of a gate beside each other, against float64 arithmetic on the models' own logits."""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import TINY
from guarantees.campaign import CONFTEST
from recorded import load, own_logits
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from pytest_kld.command import main
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

if TYPE_CHECKING:
    from conftest import Gate, MakeModel

DTYPES = ("float32", "bfloat16", "float16")
SUITE = """
[reference]
model = "REFERENCE"
[protocol]
engine = "transformers"
matrix = "axes"
head = "native"
[[candidate]]
name = "tiny"
model = "CANDIDATE"
tags = ["small"]
[candidate.axes]
dtype = ["float32", "bfloat16", "float16"]
"""
LABELS = tuple(f"tiny ({dtype})" for dtype in DTYPES)


def matrices(gate: Gate, name: str = "report.json") -> list[dict[str, Any]]:
    """Return the matrices in a JSON report."""
    found: list[dict[str, Any]] = json.loads((gate.path / name).read_text())["matrices"]
    return found


@pytest.fixture
def suite(gate: Gate) -> Any:
    """A function that writes a suite of the tiny models and runs it."""

    def run(text: str, *arguments: str, subprocess: bool = False, file: str = "moe.kld.toml") -> pytest.RunResult:
        path = gate.path / file
        path.write_text(text.replace("REFERENCE", str(gate.reference)).replace("CANDIDATE", str(gate.candidate)))
        run = gate.pytester.runpytest_subprocess if subprocess else gate.pytester.runpytest_inprocess
        return run(*gate.protocol, gate.cache, "--kld-json=report.json", *arguments)

    return run


def kl(z_p: torch.Tensor, z_q: torch.Tensor) -> np.ndarray:
    """KL(p ‖ q) at each position from logits, in float64."""
    log_p, log_q = z_p.double().log_softmax(-1), z_q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).numpy()


@pytest.fixture
def own_windows(gate: Gate, text_file: Path) -> Windows:
    """The windows of the gate, cut once more."""
    tokenizer = load_tokenizer(ModelSpec.parse(str(gate.reference), Path()), trust_remote_code=False)
    return cut_windows(load_corpus(str(text_file), Path()), tokenizer, count=3, size=64, stride=32, label="")


def test_a_suite_compares_the_variants_of_a_candidate_with_each_other(
    gate: Gate, suite: Any, own_windows: Windows
) -> None:
    result = suite(SUITE)
    result.assert_outcomes(passed=4)
    (matrix,) = matrices(gate)
    assert (matrix["nodeid"], matrix["outcome"]) == ("moe.kld.toml::test_kld_matrix[tiny]", "passed")
    assert (matrix["members"], matrix["gaps"]) == (list(LABELS), {})
    z_r = own_logits(load(gate.reference), own_windows)
    logits = {
        label: own_logits(load(gate.candidate, dtype), own_windows) for label, dtype in zip(LABELS, DTYPES, strict=True)
    }
    assert [(pair["first"], pair["second"]) for pair in matrix["pairs"]] == list(combinations(LABELS, 2))
    for pair in matrix["pairs"]:
        z_1, z_2 = logits[pair["first"]], logits[pair["second"]]
        for direction, expected in (("forth", kl(z_1, z_2)), ("back", kl(z_2, z_1))):
            assert pair[direction]["mean"] == pytest.approx(expected.mean(), rel=2e-3, abs=1e-9)
            assert pair[direction]["p99"] == pytest.approx(np.quantile(expected, 0.99), rel=2e-2, abs=1e-8)
            assert pair[direction]["max"] == pytest.approx(expected.max(), rel=2e-2, abs=1e-8)
        differ = (z_1.argmax(-1) != z_2.argmax(-1)).double().mean().item()
        assert pair["disagreement"] == pytest.approx(differ, abs=0.011)  # ties of bfloat16 may fall either way
        assert pair["difference"] == pytest.approx((kl(z_r, z_1) - kl(z_r, z_2)).mean(), rel=2e-2, abs=1e-8)
        assert pair["checks"] == []
    means = {
        (pair[one], pair[other]): f"{pair[direction]['mean']:.4g}"
        for pair in matrix["pairs"]
        for one, other, direction in (("first", "second", "forth"), ("second", "first", "back"))
    }
    for number, label in enumerate(LABELS, 1):
        cells = ["-" if other == label else means[label, other] for other in LABELS]
        result.stdout.fnmatch_lines(f"[[]{number}] {DTYPES[number - 1]} *{' *'.join(cells)}")
    result.stdout.fnmatch_lines("Candidates against each other: moe.kld.toml: tiny, dataset: *text.txt, 192 positions")


def test_no_capture_is_made_for_a_matrix(gate: Gate, suite: Any, tmp_path: Path) -> None:
    cache = f"--kld-cache-dir={tmp_path}"
    alone = suite(SUITE.replace('matrix = "axes"', ""), cache, "-v")
    alone.assert_outcomes(passed=3)
    assert matrices(gate) == []
    made = sorted(path.name for path in (tmp_path / "captures").iterdir() if path.is_dir())
    assert len(made) == 4
    result = suite(SUITE, cache, "-k", "matrix")  # its members' tests are not selected, and their captures are there
    result.assert_outcomes(passed=1, deselected=3)
    result.stdout.no_fnmatch_line("*kld: capture*")
    assert sorted(path.name for path in (tmp_path / "captures").iterdir() if path.is_dir()) == made
    assert len(matrices(gate)[0]["pairs"]) == 3


def test_a_matrix_without_captures_is_an_error_and_boots_nothing(gate: Gate, suite: Any, tmp_path: Path) -> None:
    result = suite(SUITE, f"--kld-cache-dir={tmp_path}", "moe.kld.toml::test_kld_matrix[tiny]")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("*ModelError: the capture of the reference * is not in the cache, and no test*")
    (matrix,) = matrices(gate)
    assert (matrix["outcome"], matrix["pairs"]) == ("error", [])
    assert not any((tmp_path / "captures").glob("*/manifest.json"))


@pytest.mark.parametrize(
    ("bound", "options", "state", "outcomes"),
    [
        ("1e-3", (), "pass", {"passed": 4}),
        ("1e-9", (), "fail", {"passed": 3, "failed": 1}),
        ("1", ("--kld-confidence=0.9",), "inconclusive", {"passed": 3, "failed": 1}),
        ("1", ("--kld-confidence=0.9", "--kld-inconclusive=skip"), "inconclusive", {"passed": 3, "skipped": 1}),
        ("1", ("--kld-confidence=0.9", "--kld-inconclusive=pass"), "inconclusive", {"passed": 4}),
    ],
)
def test_a_limit_on_pairs_passes_fails_or_is_undecided(
    gate: Gate, suite: Any, bound: str, options: tuple[str, ...], state: str, outcomes: dict[str, int]
) -> None:
    text = SUITE + f"[candidate.limits]\nmax_between = {bound}\n"
    result = suite(text, "--kld-max-nan=0", "--kld-junit=junit.xml", "--junitxml=own.xml", *options)
    result.assert_outcomes(**outcomes)
    (matrix,) = matrices(gate)
    checks = [check for pair in matrix["pairs"] for check in pair["checks"]]
    assert state in {check["state"] for check in checks}
    for pair in matrix["pairs"]:
        (check,) = pair["checks"]
        assert check["value"] == max(pair["forth"]["mean"], pair["back"]["mean"])
        assert check["bound"] == float(bound)
        assert (check["interval"] is not None) == bool(options)
    suites = ElementTree.parse(gate.path / "junit.xml").getroot().findall("testsuite")
    (own,) = [one for one in suites if one.get("name") == "matrix of moe.kld.toml: tiny"]
    names = [f"max_between[{one} | {other}]" for one, other in combinations(DTYPES, 2)]
    assert [case.get("name") for case in own.findall("testcase")] == names
    failed = len(own.findall("testcase/failure"))
    assert failed == sum(one["state"] == "fail" for one in checks) or state == "inconclusive"
    properties = {one.get("name") for one in ElementTree.parse(gate.path / "own.xml").iter("property")}
    assert f"kld_between_mean[{DTYPES[0]} ‖ {DTYPES[1]}]" in properties
    if state == "fail":
        exceeded = sum(check["state"] == "fail" for check in checks)
        result.stdout.fnmatch_lines(
            [
                f"*{exceeded} of 3 pairs exceed max_between: tiny",
                "*FAIL  mean KL(tiny (*) ‖ tiny (*)) * nats > max_between 1e-09 (over by *",
            ]
        )


def test_the_limit_of_all_candidates_is_the_sessions(gate: Gate, suite: Any) -> None:
    suite(SUITE + "[limits]\nmax_between = 1\n").assert_outcomes(passed=4)
    assert [pair["checks"][0]["bound"] for pair in matrices(gate)[0]["pairs"]] == [1, 1, 1]
    suite(SUITE + "[limits]\nmax_between = 1\n", "--kld-max-between=2").assert_outcomes(passed=4)
    assert matrices(gate)[0]["pairs"][0]["checks"][0]["bound"] == 2


def test_a_limit_on_pairs_needs_a_matrix(gate: Gate, suite: Any) -> None:
    nothing = SUITE.replace('matrix = "axes"', "")
    for text in (nothing + "[limits]\nmax_between = 1\n", nothing + "[candidate.limits]\nmax_between = 1\n"):
        result = suite(text)
        assert result.ret != 0
        said = "".join(result.outlines + result.errlines)
        assert "max_between" in said.replace("-", "_")
        assert "give --kld-matrix" in said
    (gate.path / "moe.kld.toml").unlink()
    result = gate("--kld-max-between=1")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*max_between bounds the pairs of a matrix, and there is none*")
    gate.pytester.makepyfile("import pytest\n@pytest.mark.kld(max_between=1)\ndef test_it(): pass\n")
    gate().stderr.fnmatch_lines("*test_it*: max_between bounds the pairs of a matrix, and there is none*")


def test_a_limit_on_pairs_that_no_pair_meets_is_refused(gate: Gate, suite: Any) -> None:
    limits = "[limits]\nmax_between = 1\n"
    one = SUITE.replace('matrix = "axes"', "").replace('"float32", "bfloat16", "float16"', '"float32"')
    (gate.path / "pytest.ini").write_text("[pytest]\nkld_matrix = axes\n")
    result = suite(one + limits)
    assert result.ret != 0
    (gate.path / "moe.kld.toml").unlink()
    result = gate("--kld-max-between=1")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*no candidate has two variants to compare*")
    gate.pytester.makepyfile("import pytest\n@pytest.mark.kld(max_between=1)\ndef test_alone(kld): pass\n")
    result = gate()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*test_alone*: max_between bounds the pairs of a matrix, and its candidate is in none*")


def test_paths_have_pairs_of_their_own(suite: Any) -> None:
    text = SUITE.replace('matrix = "axes"', 'matrix = "all"').replace('"float32", "bfloat16", "float16"', '"float32"')
    other = '[[candidate]]\nname = "more"\nmodel = "CANDIDATE"\npath = "decode"\n'
    result = suite(text + other + "[limits]\nmax_between = 1\n")
    result.stdout.fnmatch_lines("*SuiteError: moe.kld.toml:*no candidate has two Subjects*")


def test_a_limit_on_pairs_allows_no_gap(gate: Gate, suite: Any) -> None:
    text = SUITE.replace('"float16"]', '"float16", "float99"]') + "[limits]\nmax_between = 1\n"
    suite(text).assert_outcomes(passed=3, errors=2)
    (matrix,) = matrices(gate)
    assert matrix["outcome"] == "error"
    assert (
        "max_between cannot be checked on every pair of the matrix of tiny. tiny (float99): its own"
        in (matrix["message"])
    )


def test_positions_that_are_nan_do_not_escape_a_limit_on_pairs(
    gate: Gate, suite: Any, make_model: MakeModel, own_windows: Windows
) -> None:
    broken = make_model("nan-at-some-tokens")
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][int(own_windows.token_ids[0, 40])] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    text = SUITE.replace('model = "CANDIDATE"', f'model = "{broken}"')
    allowed = "max_nan = 1000\nmax_mean = 100\nmax_between = 100\n"
    suite(text + f"[limits]\n{allowed}").assert_outcomes(passed=4)
    assert matrices(gate)[0]["pairs"][0]["not_finite"] > 0
    suite(text + "[limits]\nmax_between = 100\n", "-k", "matrix").assert_outcomes(errors=1, deselected=3)
    assert "positions, which the limit would leave out" in matrices(gate)[0]["message"]


def test_a_matrix_does_not_replace_one_with_more_pairs(
    gate: Gate, suite: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    suite(SUITE, "--kld-json=old.json").assert_outcomes(passed=4)
    suite(SUITE.replace('"bfloat16", ', ""), "--kld-json=new.json").assert_outcomes(passed=3)
    assert main(["report", "--latest", "old.json", "new.json"]) == 2
    assert "lacks pairs that" in capfd.readouterr().err
    assert main(["report", "--latest", "old.json", "old.json"]) == 0


def test_a_matrix_needs_two_candidates(gate: Gate, suite: Any) -> None:
    one = SUITE.replace('"float32", "bfloat16", "float16"', '"float32"')
    result = suite(one)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("*SuiteError: moe.kld.toml:6: protocol.matrix: no candidate has two Subjects*")
    second = one.replace("[[candidate]]", '[[candidate]]\nname = "more"\nmodel = "CANDIDATE"\n[[candidate]]', 1)
    second = second.replace('matrix = "axes"', 'matrix = "all"')
    suite(second).assert_outcomes(passed=3)
    (matrix,) = matrices(gate)
    assert (matrix["name"], matrix["members"]) == ("candidates", ["more", "tiny (float32)"])
    bounded = SUITE + '[candidate.limits]\nmax_between = 1\n[[candidate]]\nname = "more"\nmodel = "CANDIDATE"\n'
    suite(bounded).assert_outcomes(passed=5)
    result = suite(bounded + "[candidate.limits]\nmax_between = 1\n")
    result.stdout.fnmatch_lines("*SuiteError: moe.kld.toml:*max_between: more is in no matrix*")
    (gate.path / "moe.kld.toml").unlink()
    result = gate("--kld-matrix=axes")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*--kld-matrix=axes: no candidate has two variants to compare*")


def test_windows_that_differ_from_candidate_to_candidate_are_refused(gate: Gate) -> None:
    result = gate("--kld-matrix=all", "--kld-windows=auto:4")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*--kld-matrix compares captures of the same windows*")


def test_variants_that_were_not_measured_leave_a_gap_that_says_why(gate: Gate, suite: Any) -> None:
    text = SUITE.replace('"float16"]', '"float16", "float99"]')
    result = suite(text, "--kld-html=report.html", "--kld-markdown=report.md", "--kld-junit=junit.xml")
    result.assert_outcomes(passed=4, errors=1)
    (matrix,) = matrices(gate)
    assert matrix["gaps"] == {"tiny (float99)": "its own test did not measure it"}
    assert (matrix["outcome"], len(matrix["pairs"])) == ("passed", 3)
    result.stdout.fnmatch_lines("note: tiny (float99) is not in the matrix: its own test did not measure it")
    for report in ("report.html", "report.md", "junit.xml"):
        assert "its own test did not measure it" in (gate.path / report).read_text()


def test_fewer_than_two_captures_are_an_error(gate: Gate, suite: Any) -> None:
    result = suite(SUITE.replace('"bfloat16", "float16"]', '"float99"]'))
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(
        "*ModelError: there is nothing to compare in the matrix of tiny, because fewer than two*"
    )
    assert "tiny (float99): its own test did not measure it" in matrices(gate)[0]["message"]


def test_a_variant_that_is_not_selected_comes_from_the_cache_or_leaves_a_gap(
    gate: Gate, suite: Any, tmp_path: Path
) -> None:
    cache = f"--kld-cache-dir={tmp_path}"
    suite(SUITE, cache, "-k", "not bfloat16").assert_outcomes(passed=3, deselected=1)
    (matrix,) = matrices(gate)
    assert matrix["gaps"] == {"tiny (bfloat16)": "its test is not selected, and its capture is not in the cache"}
    assert [(pair["first"], pair["second"]) for pair in matrix["pairs"]] == [(LABELS[0], LABELS[2])]
    suite(SUITE, cache, "-k", "bfloat16").assert_outcomes(passed=1, deselected=3)
    suite(SUITE, cache, "-k", "not bfloat16").assert_outcomes(passed=3, deselected=1)
    assert len(matrices(gate)[0]["pairs"]) == 3


def test_skipped_candidates_skip_their_matrix_and_tags_select_it(gate: Gate, suite: Any) -> None:
    skipped = SUITE.replace('tags = ["small"]', 'skip = "not yet"')
    suite(skipped).assert_outcomes(skipped=4)
    assert matrices(gate) == []
    suite(SUITE, "-m", "small").assert_outcomes(passed=4)
    suite(SUITE, "-m", "kld").assert_outcomes(passed=4)
    suite(SUITE, "-m", "not small").assert_outcomes(deselected=4)


def test_candidates_of_the_command_line_are_compared_with_each_other(gate: Gate, broken_dir: Path) -> None:
    result = gate(
        "--kld-matrix=all",
        "--kld-max-between=1e-3",
        "--kld-json=report.json",
        "--kld-skip-first=16",
        candidates=(gate.candidate, broken_dir),
    )
    result.assert_outcomes(passed=2, failed=1)
    (matrix,) = matrices(gate)
    assert (matrix["nodeid"], matrix["outcome"]) == ("kld::test_kld_matrix[candidates]", "failed")
    (pair,) = matrix["pairs"]
    assert pair["positions"] == 3 * 48
    means = {one["candidate"]: one["figures"]["mean"] for one in gate.results()}
    assert pair["difference"] == pytest.approx(means[str(gate.candidate)] - means[str(broken_dir)])
    result.stdout.fnmatch_lines("*1 of 1 pairs exceed max_between: candidates")


def test_tests_of_a_project_are_compared_and_the_strictest_marker_holds(gate: Gate, broken_dir: Path) -> None:
    gate.pytester.makeconftest("""
        import pytest

        @pytest.fixture(scope="session")
        def kld_candidate_args():
            return {"attn_implementation": "eager"}
    """)
    gate.pytester.makepyfile("""
        import pytest

        @pytest.mark.kld(max_between=9)
        def test_gate(): pass

        @pytest.mark.kld(max_between=2)
        def test_more(): pass
    """)
    result = gate("--kld-matrix=all", "--kld-json=report.json", candidates=(gate.candidate, broken_dir))
    result.assert_outcomes(passed=5)
    result.stdout.no_fnmatch_line("kld: capture *eager*")
    (matrix,) = matrices(gate)
    assert matrix["nodeid"].endswith(".py::test_kld_matrix[candidates]")
    assert [check["bound"] for check in matrix["pairs"][0]["checks"]] == [2]


def test_each_path_has_a_matrix_of_its_own(gate: Gate, suite: Any) -> None:
    options = ("--kld-path=both", "--kld-prompt-size=16", "--kld-concurrency=2")
    text = SUITE.replace(', "float16"]', "]")
    suite(text, *options).assert_outcomes(passed=6)
    decode, prefill = sorted(matrices(gate), key=lambda one: str(one["path"]))
    assert [one["nodeid"].partition("::")[2] for one in (prefill, decode)] == [
        "test_kld_matrix[tiny]",
        "test_kld_matrix[tiny-decode]",
    ]
    assert decode["members"] == ["tiny (float32) (decode)", "tiny (bfloat16) (decode)"]
    assert (prefill["pairs"][0]["positions"], decode["pairs"][0]["positions"]) == (3 * 64, 3 * 48)
    suite(text, "--kld-path=decode", *options[1:]).assert_outcomes(passed=3)
    assert matrices(gate)[0]["pairs"] == decode["pairs"]


def test_workers_of_xdist_measure_the_same_matrix_and_capture_nothing_twice(
    gate: Gate, suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite(SUITE).assert_outcomes(passed=4)
    alone = matrices(gate)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    gate.pytester.makeconftest("""
        import os
        import pytest
        from pytest_kld.captures.recording import Recording

        @pytest.fixture(scope="session", autouse=True)
        def count_runs():
            record = Recording.run
            def run(self, *args):
                with open(os.environ["RUNS"], "a") as file:
                    file.write(f"{self.subject.label}\\n")
                return record(self, *args)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Recording, "run", run)
                yield
    """)
    result = suite(SUITE, "-n2", f"--kld-cache-dir={tmp_path / 'cache'}", "--junitxml=own.xml")
    result.assert_outcomes(passed=4)
    assert sorted((tmp_path / "runs").read_text().splitlines()) == sorted([str(gate.reference), *LABELS])
    assert [one["pairs"] for one in matrices(gate)] == [one["pairs"] for one in alone]


def test_a_session_that_ends_early_says_that_the_matrix_is_missing(gate: Gate, suite: Any) -> None:
    result = suite(SUITE.replace('["float32"', '["float99"'), "-x")
    result.assert_outcomes(errors=1)
    (matrix,) = matrices(gate)
    assert matrix["outcome"] == "error"
    assert matrix["message"].startswith("not measured: the session ended before this test finished")
    result.stdout.fnmatch_lines(["INCOMPLETE: * 3 of 4 gated tests were not measured:", "*::test_kld_matrix[[]tiny]"])


def test_shards_keep_the_candidates_of_a_matrix_together_and_merge(
    gate: Gate, suite: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    text = SUITE + '[[candidate]]\nname = "alone"\nmodel = "CANDIDATE"\n'
    suite(text, "--kld-json=whole.json").assert_outcomes(passed=5)
    suite(text, "--kld-shard=1/2", "--kld-json=1.json").assert_outcomes(passed=4, deselected=1)
    suite(text, "--kld-shard=2/2", "--kld-json=2.json").assert_outcomes(passed=1, deselected=4)
    reports = ("--json=merged.json", "--html=merged.html", "--junit=merged.xml", "--markdown=merged.md")
    assert main(["report", "1.json", "2.json", *reports]) == 0
    assert "Candidates against each other: moe.kld.toml: tiny" in capfd.readouterr().out
    (whole,), (merged,) = matrices(gate, "whole.json"), matrices(gate, "merged.json")
    assert {**merged, "seconds": 0} == {**whole, "seconds": 0}
    for name in ("merged.html", "merged.xml", "merged.md"):
        assert "float32 " in (gate.path / name).read_text()
    assert main(["report", "1.json", "1.json"]) == 2
    result = gate("--kld-matrix=all", "--kld-shard=1/2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*--kld-matrix=all needs the captures of all candidates in one session*")


def test_other_vocabularies_cannot_be_compared(gate: Gate, make_model: MakeModel) -> None:
    config = Qwen3Config(**{**TINY, "vocab_size": TINY["vocab_size"] + 16}, tie_word_embeddings=False)
    wide = make_model("wide-for-a-matrix", config)
    options = ("--kld-max-cut-mass=1", "--kld-matrix=all", "--kld-json=report.json")
    result = gate(*options, candidates=(gate.candidate, wide))
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines("*CaptureError: * cannot be compared with each other: their vocabularies have 1,0*")
    assert matrices(gate)[0]["outcome"] == "error"


def test_a_capture_that_its_own_test_had_and_the_matrix_cannot_get_is_an_error(gate: Gate, suite: Any) -> None:
    gate.pytester.makeconftest("""
        import pytest
        from pytest_kld.errors import CaptureError
        from pytest_kld.measuring.measurement import Measurement

        @pytest.fixture(scope="session", autouse=True)
        def lose_the_fourth():
            obtain, calls = Measurement.candidate_capture, []
            def run(*arguments, **named):
                calls.append(arguments)
                if len(calls) == 4:
                    raise CaptureError("it is lost")
                return obtain(*arguments, **named)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Measurement, "candidate_capture", run)
                yield
    """)
    result = suite(SUITE)
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines("*CaptureError: it is lost")
    assert matrices(gate)[0]["gaps"] == {}


def test_floors_of_workers_of_xdist_leave_no_gap(gate: Gate, suite: Any, tmp_path: Path) -> None:
    result = suite(SUITE, "-n2", "--kld-floor", f"--kld-cache-dir={tmp_path / 'cache'}")
    result.assert_outcomes(passed=4)
    (matrix,) = matrices(gate)
    assert matrix["gaps"] == {}
    assert [pair["floor"]["mean"] for pair in matrix["pairs"]] == [0, 0, 0]  # transformers is deterministic here


def test_the_plan_says_what_is_compared(gate: Gate, suite: Any, tmp_path: Path) -> None:
    result = suite(SUITE, "--kld-plan", "--kld-plan-json=plan.json", f"--kld-cache-dir={tmp_path}")
    result.stdout.fnmatch_lines("matrix of moe.kld.toml: tiny: 3 candidates, 3 pairs; it needs no capture of its own")
    (matrix,) = json.loads((gate.path / "plan.json").read_text())["matrices"]
    assert matrix == {
        "nodeid": "moe.kld.toml::test_kld_matrix[tiny]",
        "suite": "moe.kld.toml",
        "name": "tiny",
        "path": "prefill",
        "members": list(LABELS),
    }


@pytest.mark.slow
def test_servers_with_other_flags_are_compared_without_a_boot_of_their_own(
    gate: Gate, suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests' own engine boots real servers in place of SGLang's."""
    engines = Path(__file__).parents[1] / "engines"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(engines), str(engines.parents[1])]))
    (tmp_path / "fault").touch()
    monkeypatch.setenv("TINY_FAULT", str(tmp_path / "fault"))
    gate.pytester.makeconftest(CONFTEST.format(engine="tiny"))
    text = SUITE.replace('"transformers"', '"sglang"').replace("dtype = [", '"--dtype" = [')
    result = suite(text, f"--kld-cache-dir={tmp_path / 'cache'}", "--kld-device=cpu", "-v", subprocess=True)
    result.assert_outcomes(passed=4)
    assert sum("booting" in line for line in result.outlines) == 4
    (matrix,) = matrices(gate)
    backends = ("--kld-moe-backend=triton", "--kld-moe-backend=cutlass", "--kld-matrix=axes")
    added = """
    import pytest

    @pytest.fixture(scope="session")
    def kld_server_args():
        return {"candidate": ["--a", "1"]}
    """
    gate.pytester.makeconftest(CONFTEST.format(engine="tiny") + dedent(added))
    options = (*backends, "--kld-engine=sglang", "--kld-device=cpu", f"--kld-cache-dir={tmp_path / 'cache'}")
    (gate.path / "moe.kld.toml").unlink()
    result = gate(*options, "--kld-json=moe.json", subprocess=True)
    result.assert_outcomes(passed=3)
    assert sum("booting" in line for line in result.outlines) == 2  # the reference is in the cache
    (pair,) = matrices(gate, "moe.json")[0]["pairs"]
    assert (pair["forth"]["max"], pair["back"]["max"], pair["disagreement"]) == (0, 0, 0)  # the flag changes nothing
    (gate.path / "conftest.py").unlink()
    in_process = suite(SUITE, "--kld-json=here.json")
    in_process.assert_outcomes(passed=4)
    (here,) = matrices(gate, "here.json")
    for ours, theirs in zip(matrix["pairs"], here["pairs"], strict=True):
        assert ours["forth"]["mean"] == pytest.approx(theirs["forth"]["mean"], rel=1e-2)
