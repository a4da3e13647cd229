"""A gated test's three outcomes, and how skips and expected failures are treated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_kld.gate.limits import LIMITS

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate, MakeModel
    from transformers import PreTrainedTokenizerFast

ZERO = ("max_nan", "max_ref_nan", "max_cut_mass")
"""Limits on figures that are 0 for these models."""
ELSEWHERE = ("max_decode_gap", "min_experts_seen")
"""Limits for models that decode, and for those with experts: see test_paths.py and test_experts_gate.py."""
TOO_TIGHT = {name: 0 if limit.upper else 1 for name, limit in LIMITS.items() if name not in ZERO + ELSEWHERE}
"""For each other limit, a bound that the tiny model violates with its noisy copy as the reference.

With the models swapped, the noise happens to lower the perplexity, but a limit on its logarithm bounds an increase.
"""


@pytest.fixture(scope="session")
def nan_dir(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, text_file: Path) -> Path:
    """A model whose embedding is NaN for a token that occurs near the end of the last window only."""
    path = make_model("nan")
    ids = tokenizer(text_file.read_text())["input_ids"][:128]
    late = next(token for token in ids[112:] if token not in ids[:112])
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][late] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_every_limit_is_checked_and_every_exceeded_one_is_named_with_value_and_margin(
    gate: Gate, broken_dir: Path
) -> None:
    options = [f"--kld-{name.replace('_', '-')}={bound}" for name, bound in TOO_TIGHT.items()]
    result = gate(f"--kld-ref={broken_dir}", *options, "--kld-max-p99=1000", candidates=(gate.reference,))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert f"{len(TOO_TIGHT) - 1} of {len(LIMITS) - len(ELSEWHERE)} KLD limits exceeded: " in text
    for name in TOO_TIGHT:
        word = "ok   " if name == "max_p99" else "FAIL "
        assert any(f" {name} " in line and word in line for line in result.outlines), name
    assert "Traceback" not in text


@pytest.mark.parametrize("name", TOO_TIGHT)
def test_each_limit_fails_alone_as_a_marker_argument(gate: Gate, broken_dir: Path, name: str) -> None:
    gate.pytester.makepyfile(f"import pytest\n@pytest.mark.kld({name}={TOO_TIGHT[name]})\ndef test_gate(): pass")
    result = gate(f"--kld-ref={broken_dir}", candidates=(gate.reference,))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["1 of 4 KLD limits exceeded*", f"  FAIL  {LIMITS[name].label} * {name} *"])


def test_nan_of_either_side_is_a_failure_of_its_own_unless_allowed(gate: Gate, nan_dir: Path) -> None:
    candidate = gate("--kld-json=report.json", candidates=(nan_dir,))
    candidate.assert_outcomes(failed=1)
    candidate.stdout.fnmatch_lines(["  FAIL  candidate NaN count * > max_nan 0 (over by *"])
    (figures,) = (result["figures"] for result in gate.results())
    assert figures["candidate_nan_count"] > 0
    assert figures["reference_nan_count"] == 0
    assert figures["coverage"] == (figures["positions"] - figures["candidate_nan_count"]) / figures["positions"]

    reference = gate(f"--kld-ref={nan_dir}")
    reference.assert_outcomes(failed=1)
    reference.stdout.fnmatch_lines(["  FAIL  reference NaN count * > max_ref_nan 0 (over by *"])
    reference.stdout.re_match_lines([r".* 0 \(ref \d+\) .* FAIL "])
    gate(f"--kld-ref={nan_dir}", "--kld-max-ref-nan=1000").assert_outcomes(passed=1)
    gate("--kld-max-nan=1000", candidates=(nan_dir,)).assert_outcomes(passed=1)


def test_none_lifts_a_limit_that_stands_further_out(gate: Gate, nan_dir: Path) -> None:
    gate.pytester.makepyfile("import pytest\n@pytest.mark.kld(max_nan=None, max_mean=None)\ndef test_gate(): pass")
    gate("--kld-max-mean=0", candidates=(nan_dir,)).assert_outcomes(passed=1)


def test_failure_of_the_body_and_exceeded_limits_are_both_shown(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        import pytest
        @pytest.mark.kld(max_mean=1e-9)
        def test_both(): assert "the body" == "broken"
    """)
    result = gate("--kld-json=report.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert 'the body' == 'broken'*", "*- kld -*", "  FAIL  mean KLD*max_mean 1e-09*"])
    (outcome,) = gate.results()
    assert (outcome["outcome"], outcome["body_passed"]) == ("failed", False)


def test_failure_of_the_body_alone_is_a_failure_of_the_gate(gate: Gate) -> None:
    gate.pytester.makepyfile("def test_body(kld): assert False, '1 of 3 KLD limits exceeded'")
    result = gate("--kld-json=report.json")
    result.assert_outcomes(failed=1)
    result.stdout.no_fnmatch_line("*- kld -*")
    (outcome,) = gate.results()
    assert (outcome["outcome"], outcome["body_passed"]) == ("failed", False)
    assert all(check["passed"] for check in outcome["checks"])


def test_expected_failures_are_expected_and_unexpected_passes_are_told(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        import pytest
        @pytest.mark.xfail(reason="known")
        @pytest.mark.kld(max_mean=1e-9)
        def test_expected(): pass

        @pytest.mark.xfail(reason="known", strict=True)
        @pytest.mark.kld(max_mean=1e-9)
        def test_expected_strictly(): pass

        @pytest.mark.xfail(reason="known")
        @pytest.mark.kld(max_mean=1)
        def test_unexpected_pass(): pass

        @pytest.mark.xfail(reason="known", strict=True)
        @pytest.mark.kld(max_mean=1)
        def test_strict_unexpected_pass(): pass

        @pytest.mark.xfail(reason="only that", raises=ZeroDivisionError)
        @pytest.mark.kld(max_mean=1e-9)
        def test_failure_of_another_kind(): pass
    """)
    result = gate("--kld-json=report.json", "-rA")
    result.assert_outcomes(xfailed=2, xpassed=1, failed=2)
    result.stdout.fnmatch_lines(["FAILED*test_strict_unexpected_pass*", "FAILED*test_failure_of_another_kind*"])
    seen = {r["nodeid"].split("::")[1].split("[")[0]: (r["outcome"], r["xfail"]) for r in gate.results()}
    assert seen == {
        "test_expected": ("failed", True),
        "test_expected_strictly": ("failed", True),
        "test_unexpected_pass": ("passed", True),
        "test_strict_unexpected_pass": ("failed", False),
        "test_failure_of_another_kind": ("failed", False),
    }


def test_expected_failure_is_called_so_in_the_table_but_what_was_not_measured_stays_an_error(
    gate: Gate, unloadable_dir: Path
) -> None:
    gate.pytester.makepyfile("""
        import pytest
        @pytest.mark.xfail(reason="known")
        @pytest.mark.kld(max_mean=1e-9)
        def test_expected(): pass
    """)
    result = gate()
    assert result.ret == pytest.ExitCode.OK
    result.stdout.re_match_lines([rf"{gate.candidate} .* xfail "])
    gate(candidates=(unloadable_dir,)).stdout.re_match_lines([rf"{unloadable_dir} .* ERROR "])


def test_skipped_tests_are_not_gated(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        import pytest
        @pytest.mark.skip
        @pytest.mark.kld
        def test_skipped_by_mark(): pass

        @pytest.mark.kld(max_mean=1e-9)
        def test_skipped_in_its_body(): pytest.skip("not today")
    """)
    result = gate("--kld-json=report.json")
    result.assert_outcomes(skipped=2)
    assert gate.results() == []


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="subtests came with pytest 9")
def test_subtests_and_the_limits_count_together(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        def test_parts(kld, subtests):
            for part in range(3):
                with subtests.test(part=part):
                    assert part != 1
    """)
    gate("--junitxml=out.xml", "--kld-max-mean=1e-9", "--kld-json=report.json")
    (outcome,) = gate.results()
    assert outcome["outcome"] == "failed"
    assert (gate.path / "out.xml").read_text().count('"kld_mean"') == 1


def test_async_test_fails_and_does_not_pass_unrun(gate: Gate) -> None:
    gate.pytester.makepyfile("async def test_async(kld): pass")
    result = gate()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*async def functions are not natively supported*"])


def test_what_cannot_be_measured_is_an_error_and_the_other_candidates_are_gated(
    gate: Gate, unloadable_dir: Path
) -> None:
    result = gate("--kld-json=report.json", candidates=(unloadable_dir, gate.candidate))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines([f"ModelError: transformers cannot load {unloadable_dir}:*"])
    error, passed = gate.results()
    assert (error["outcome"], error["figures"], error["checks"], error["body_passed"]) == ("error", None, [], None)
    assert "ModelError" in error["message"]
    assert passed["outcome"] == "passed"
    result.stdout.re_match_lines([rf"{unloadable_dir} .* ERROR ", rf"{gate.candidate} .* pass "])


def test_reference_that_is_not_there_is_an_error_that_names_it_and_the_way_out(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = gate("--kld-ref=nobody/nothing")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ModelError: cannot find the model nobody/nothing: *name a local directory."])


def test_flipped_byte_in_a_strict_cache_is_an_error_that_names_the_file(gate: Gate, tmp_path: Path) -> None:
    cache = f"--kld-cache-dir={tmp_path}"
    gate(cache).assert_outcomes(passed=1)
    for path in tmp_path.glob("scores/*.safetensors"):
        path.unlink()
    (window, *_) = sorted(tmp_path.glob("captures/*/windows/00001.safetensors"))
    contents = bytearray(window.read_bytes())
    contents[-5] ^= 1
    window.write_bytes(contents)
    result = gate(cache, "--kld-strict-cache")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*CaptureError: {window} is corrupt*--kld-refresh*"])
    gate(cache, "--kld-strict-cache", "--kld-refresh").assert_outcomes(passed=1)


def test_gating_again_with_other_limits_computes_nothing(gate: Gate) -> None:
    gate().assert_outcomes(passed=1)
    again = gate("--kld-max-p99=1e-9")
    again.assert_outcomes(failed=1)
    again.stdout.no_fnmatch_line("kld: *windows*")


def test_failing_fixture_of_the_tests_own_is_an_error_with_the_figures(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        import pytest
        @pytest.fixture
        def broken(kld): raise RuntimeError("broken")
        def test_gate(kld, broken): pass
    """)
    gate("--kld-json=report.json").assert_outcomes(errors=1)
    (outcome,) = gate.results()
    assert outcome["outcome"] == "error"
    assert outcome["figures"]["mean"] > 0


@pytest.mark.parametrize("option", ["--kld-junit", "--kld-json"])
def test_report_that_cannot_be_written_fails_the_session_and_hides_nothing(gate: Gate, option: str) -> None:
    gate.pytester.makepyfile("""
        from pathlib import Path
        def test_gate(kld): Path("taken").write_text("a file, where a directory was going to be")
    """)
    result = gate(f"{option}=taken/report")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["ERROR: cannot write the * report *taken/report: *File exists*", "KLD Evaluation Results*"]
    )
    assert "INTERNALERROR" not in result.stdout.str()
