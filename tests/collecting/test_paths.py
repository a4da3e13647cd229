"""The path through the engine: --kld-path, the marker's `path`, and what reports say of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_kld.collecting.items import needed_paths
from pytest_kld.settings.config import CONFIG, config_of
from pytest_kld.settings.subjects import candidate_of

if TYPE_CHECKING:
    from conftest import Gate

OPTIONS = ("--kld-engine=transformers", "--kld-windows=2", "--kld-concurrency=2", "--kld-max-mean=1")


def paths_of(gate: Gate, *arguments: str) -> list[tuple[str, str]]:
    """Return the end of each collected test's name, and its path."""
    items = gate.pytester.inline_genitems(
        f"--kld-ref={gate.reference}", f"--kld-candidate={gate.candidate}", *arguments
    )
    return [(item.name.replace(str(gate.candidate), "C"), candidate_of(item).path) for item in items[0]]


def test_each_path_of_both_is_a_test_and_one_path_leaves_the_ids_alone(gate: Gate) -> None:
    assert paths_of(gate) == [("test_kld[C]", "prefill")]
    assert paths_of(gate, "--kld-path=decode") == [("test_kld[C]", "decode")]
    both = [("test_kld[C-prefill]", "prefill"), ("test_kld[C-decode]", "decode")]
    assert paths_of(gate, "--kld-path=both") == both


def test_a_marker_chooses_the_path_of_its_tests(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        import pytest

        @pytest.mark.kld(path="decode")
        def test_one(): pass

        @pytest.mark.kld(path="both")
        class TestTwo:
            def test_two(self, kld): pass

            @pytest.mark.kld(path="prefill")
            def test_three(self): pass
    """)
    assert paths_of(gate, "--kld-path=prefill") == [
        ("test_one[C-decode]", "decode"),
        ("test_two[C-prefill]", "prefill"),
        ("test_two[C-decode]", "decode"),
        ("test_three[C]", "prefill"),
    ]
    assert [path for _, path in paths_of(gate, "--kld-path=decode")] == ["decode", "prefill", "decode", "prefill"]


def test_a_server_is_asked_for_every_path_that_the_chosen_tests_need(gate: Gate) -> None:
    """The built-in gate's tests, and what each selection of them needs beside a prefill and beside decoding."""
    models = (f"--kld-ref={gate.reference}", f"--kld-candidate={gate.candidate}")
    config = gate.pytester.parseconfigure(*models, "--kld-path=both")
    items, _ = gate.pytester.inline_genitems(*models, "--kld-path=both")

    def needed(*chosen: pytest.Item) -> list[list[str]]:
        paths = needed_paths(chosen, config_of(items[0]))
        subjects = [candidate_of(item) for item in items]
        assert [paths.beside(subject, is_reference=True) for subject in subjects] == [*map(paths.beside, subjects)]
        return [paths.beside(subject) for subject in subjects]

    prefill, decode = items
    assert needed(prefill, decode) == [["decode"], ["prefill"]]
    assert needed(prefill) == [[], ["prefill"]]
    assert needed(decode) == [["decode"], ["prefill"]]  # which it is compared with
    assert needed_paths(items, config.stash[CONFIG]).beside(candidate_of(prefill)) == []  # of other settings
    decode.add_marker(pytest.mark.skip)
    assert needed(prefill, decode) == needed(prefill)


def test_both_paths_are_gated_and_reported(gate: Gate) -> None:
    result = gate(*OPTIONS, "--kld-path=both", "--kld-json=report.json", "--kld-html=report.html", "-rA")
    result.assert_outcomes(passed=2)
    prefill, decode = gate.results()
    assert (prefill["candidate"], decode["candidate"]) == (str(gate.candidate), f"{gate.candidate} (decode)")
    assert decode["subjects"]["reference"]["path"] == decode["subjects"]["candidate"]["path"] == "decode"
    assert (prefill["figures"]["positions"], decode["figures"]["positions"]) == (2 * 64, 2 * 48)
    assert decode["about"]["protocol"]["decoding"] == {"prompt_size": 16, "concurrency": 2}
    assert prefill["about"]["protocol"]["decoding"] is None
    assert decode["figures"]["mean"] == pytest.approx(prefill["figures"]["mean"], rel=0.5)
    assert [part["start"] for part in decode["diagnosis"]["by_position"]] == list(range(16, 64, 3))
    assert min(place["position"] for place in decode["diagnosis"]["worst_positions"]) >= 16
    result.stdout.fnmatch_lines([f"KLD Evaluation Results (ref: {gate.reference}, *"])
    result.stdout.fnmatch_lines(
        [f"note: {gate.candidate} (decode): positions 16 to 63 of each window, decoded one token*"]
    )
    again = gate(*OPTIONS, "--kld-path=decode", "--kld-json=again.json")
    again.assert_outcomes(passed=1)
    again.stdout.no_fnmatch_line("*capture *windows, done in*")
    alone = gate.results("again.json")[0]["figures"]
    assert alone == {**decode["figures"], "decode_gap": None, "reference_decode_gap": None}
    assert decode["figures"]["decode_gap"] < 1e-9


def test_positions_that_are_skipped_count_from_the_start_of_the_window(gate: Gate) -> None:
    for skip, skipped in ((10, 0), (20, 4)):
        gate(*OPTIONS, "--kld-path=decode", f"--kld-skip-first={skip}", "--kld-json=report.json")
        figures = gate.results()[0]["figures"]
        assert (figures["positions"], figures["skipped"]) == (2 * 48, 2 * skipped)


def test_a_decode_gate_in_rounds_measures_the_same_positions(gate: Gate) -> None:
    result = gate(*OPTIONS, "--kld-path=decode", "--kld-windows=auto:2", "--kld-json=report.json")
    assert gate.results()[0]["figures"]["positions"] == 2 * 48, result.stdout.str()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kld-path=decoding",), "*--kld-path: expected one of prefill, decode, both, got 'decoding'*"),
        (("--kld-path=decode", "--kld-prompt-size=63"), "*--kld-prompt-size: a prompt of 63 tokens leaves no decode*"),
        (("--kld-path=decode", "--kld-window-size=2"), "*--kld-prompt-size: a prompt of 1 tokens leaves no decode*"),
        (("--kld-prompt-size=8",), "*--kld-prompt-size is given, but nothing is decoded*"),
        (("--kld-concurrency=0",), "*--kld-concurrency: expected a whole number of at least 1*"),
        (("--kld-concurrency=2",), "*--kld-concurrency is given, but nothing is decoded*"),
    ],
)
def test_options_that_cannot_be_followed_are_usage_errors(gate: Gate, options: tuple[str, ...], message: str) -> None:
    result = gate(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_a_path_that_cannot_be_followed_any_more_is_an_error(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        import pytest

        def test_late(request):
            request.getfixturevalue("kld")
    """)
    result = gate("--kld-engine=transformers", "--kld-path=both")
    result.assert_outcomes(failed=1, passed=2)  # the built-in gate can be run twice
    result.stdout.fnmatch_lines(["*--kld-path=both runs a test twice, but this one runs only once*"])
    gate.pytester.makeconftest("""
        import pytest

        def pytest_collection_modifyitems(items):
            for item in items:
                item.add_marker(pytest.mark.kld(path="decode"))
    """)
    gate.pytester.makepyfile("def test_plain(kld): pass")
    result = gate("--kld-engine=transformers")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*its kld marker names the path decode, but was added when*"])


def test_a_marker_with_an_unknown_path_is_refused(gate: Gate) -> None:
    gate.pytester.makepyfile("import pytest\n@pytest.mark.kld(path='both ways')\ndef test_it(): pass\n")
    result = gate()
    result.stdout.fnmatch_lines(["*kld marker, path: expected one of prefill, decode, both, got 'both ways'*"])


def test_a_suite_chooses_paths_for_all_of_its_subjects_or_for_one(gate: Gate) -> None:
    head = f'[reference]\nmodel = "{gate.reference}"\n[protocol]\nengine = "transformers"\n'
    one = f'[[candidate]]\nmodel = "{gate.candidate}"\nname = "a"\npath = "decode"\n'
    other = f'[[candidate]]\nmodel = "{gate.candidate}"\nname = "b"\n'
    file = gate.path / "a.kld.toml"

    def paths() -> list[tuple[str, str]]:
        items, _ = gate.pytester.inline_genitems(file)
        return [(item.name, candidate_of(item).path) for item in items]

    file.write_text(head + one + other)
    assert paths() == [("test_kld[a]", "decode"), ("test_kld[b]", "prefill")]
    file.write_text(f'{head}path = "decode"\nprompt_size = 8\n{other}')
    assert paths() == [("test_kld[b]", "decode")]
    file.write_text(f'{head}path = "both"\n{other}')
    assert paths() == [("test_kld[b-prefill]", "prefill"), ("test_kld[b-decode]", "decode")]


def test_a_decoded_subject_of_a_suite_is_compared_with_the_decoded_reference(gate: Gate) -> None:
    protocol = (
        '[protocol]\nengine = "transformers"\ndataset = "python-docs"\nwindows = 2\nwindow_size = 64\nstride = 32\n'
    )
    (gate.path / "a.kld.toml").write_text(
        f'[reference]\nmodel = "{gate.reference}"\n{protocol}'
        f'[[candidate]]\nmodel = "{gate.candidate}"\npath = "decode"\nlimits = {{max_mean = 1}}\n'
    )
    result = gate.pytester.runpytest_inprocess("a.kld.toml", gate.cache, "--kld-json=report.json")
    result.assert_outcomes(passed=1)
    subjects = gate.results()[0]["subjects"]
    assert subjects["reference"]["path"] == subjects["candidate"]["path"] == "decode"


FAULTY = """
    import pytest
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def late(module, query, key, value, mask, **options):
        if query.shape[2] == 1 and key.shape[2] > 40:
            key, value, mask = key[:, :, 32:], value[:, :, 32:], None
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("late_in_a_gate", late)

    @pytest.fixture(scope="session")
    def kld_candidate_args():
        return {"attn_implementation": "late_in_a_gate"}
"""


def test_both_paths_hold_the_candidate_against_itself(gate: Gate) -> None:
    gate.pytester.makeconftest(FAULTY)
    reports = ("--kld-json=report.json", "--kld-html=report.html", "--kld-junit=junit.xml")
    result = gate(*OPTIONS, "--kld-path=both", "--kld-max-decode-gap=1e-6", *reports)
    result.assert_outcomes(passed=1, failed=1)  # the prefill passes
    prefill, decode = gate.results()
    assert prefill["outcome"] == "passed"
    assert [prefill["figures"][name] for name in ("decode_gap", "reference_decode_gap")] == [None, None]
    assert decode["figures"]["decode_gap"] > 1e-4
    assert decode["figures"]["reference_decode_gap"] < 1e-9
    (check,) = (check for check in decode["checks"] if check["limit"] == "max_decode_gap")
    assert check["state"] == "fail"
    (found,) = (one for one in decode["diagnosis"]["patterns"] if one["name"] == "decode-departs")
    assert found["evidence"].startswith("decode departs from prefill from position 40 on: median ")
    result.stdout.fnmatch_lines(
        ["*FAIL  mean KLD of prefill and decode *", "Model *Prefill to decode  Reference's own"]
    )
    assert 'name="max_decode_gap"' in (gate.path / "junit.xml").read_text()
    assert 'data-chart="gap"' in (gate.path / "report.html").read_text()


def test_the_gap_is_that_of_the_captures_over_the_positions_that_both_have(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        import numpy as np
        import pytest

        @pytest.mark.kld(path="both", max_decode_gap=1)
        def test_gap(kld, kld_candidate, kld_path):
            if kld_path == "decode":
                assert kld.decode_gap == np.mean(kld.scores.columns["decode_gap"])
                assert kld.scores.columns["decode_gap"].shape == (2, 48)
                assert 0 <= kld.decode_gap < 1e-6
                assert "decode_gap" in kld.intervals
    """)
    gate(*OPTIONS, "--kld-confidence=0.9", "--kld-inconclusive=pass").assert_outcomes(passed=2)
    gate(*OPTIONS, "--kld-windows=auto:2", "--kld-inconclusive=pass").assert_outcomes(passed=2)


def test_a_limit_on_the_gap_needs_both_paths(gate: Gate) -> None:
    result = gate(*OPTIONS[:1], "--kld-max-decode-gap=1", "--kld-path=decode")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--kld-max-decode-gap is given, but no test measures both paths*"])
    gate.pytester.makepyfile("import pytest\n@pytest.mark.kld(max_decode_gap=1)\ndef test_it(): pass\n")
    result = gate(*OPTIONS[:1])
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*max_decode_gap cannot be checked: only the test that decodes with --kld-path=both*"])


def test_the_chunk_of_prefills_is_an_axis_of_a_suite_in_both_engines(gate: Gate) -> None:
    head = f'[reference]\nmodel = "{gate.reference}"\nengine = "transformers"\n'
    ones = "".join(
        f'[[candidate]]\nmodel = "{gate.candidate}"\nname = "{engine}"\nengine = "{engine}"\n'
        'axes = {"prefill chunk" = [32, 64]}\n'
        for engine in ("sglang", "vllm")
    )
    (gate.path / "a.kld.toml").write_text(head + ones)
    items, _ = gate.pytester.inline_genitems(gate.path / "a.kld.toml")
    subjects = [candidate_of(item) for item in items]
    assert [subject.id for subject in subjects] == ["sglang-32", "sglang-64", "vllm-32", "vllm-64"]
    assert subjects[0].arguments["args"][-2:] == ["--chunked-prefill-size", "32"]
    assert subjects[3].arguments["args"][-2:] == ["--max-num-batched-tokens", "64"]
