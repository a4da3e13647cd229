"""Fixtures: what they return, how they are overridden, and that models run once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_kld.captures.recording import Recording

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from conftest import Gate


def test_facade_has_the_figures_of_the_summary(gate: Gate, tmp_path: Path) -> None:
    gate.cache = f"--kld-cache-dir={tmp_path / 'cache'}"  # a capture has the name that its model had first
    gate.pytester.makepyfile("""
        import numpy as np
        import pytest

        def test_figures(kld, kld_windows, kld_reference, kld_candidate):
            columns = kld.scores.columns
            kl = columns["kl"]
            assert kl.shape == kld_windows.token_ids.shape == (3, 64)
            assert kld.mean == pytest.approx(kl.mean(), rel=1e-12)
            assert kld.median == pytest.approx(np.median(kl), rel=1e-12)
            for name, q in (("p95", 0.95), ("p99", 0.99), ("p999", 0.999)):
                assert getattr(kld, name) == pytest.approx(np.quantile(kl, q), rel=1e-12)
            assert kld.max == kl.max()
            assert (kld.nan_count, kld.reference_nan_count) == (0, 0)
            same = columns["reference_argmax"] == columns["candidate_argmax"]
            assert kld.top1_agreement == same.mean()
            nll = {side: columns[f"{side}_nll"][:, :-1].mean() for side in ("reference", "candidate")}
            assert kld.ppl_ratio == pytest.approx(np.exp(nll["candidate"] - nll["reference"]), rel=1e-12)
            assert kld.summary.positions == 192
            assert kld.bounds == {"max_mean": 1, "max_nan": 0, "max_ref_nan": 0, "max_cut_mass": 0.01}
            assert kld.reference == kld_reference.name
            assert kld.candidate == kld_candidate.name
            assert kld.candidate in repr(kld) and f"{kld.mean:.6g}" in repr(kld)
    """)
    gate("--kld-max-mean=1").assert_outcomes(passed=1)


def test_failed_comparison_of_a_figure_explains_itself(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        def test_left(kld): assert kld.p99 < 1e-9
        def test_right(kld): assert 1.5 <= kld.top1_agreement
        def test_arithmetic(kld): assert kld.p99 < 0.001 * kld.mean
    """)
    result = gate()
    result.assert_outcomes(failed=3)
    pair = f"{gate.candidate} against {gate.reference}"
    result.stdout.fnmatch_lines(
        [
            f"E  *P99 KLD of {pair} is 0.* nats, 0.* away from 1e-09",
            f"E  *top-1 agreement of {pair} is 0.*, 0.* away from 1.5",
            f"E  *P99 KLD of {pair} is 0.* nats, * away from *",
        ]
    )


def test_each_model_runs_once_for_all_tests_and_candidates(
    gate: Gate, broken_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    record = Recording.run
    monkeypatch.setattr(Recording, "run", lambda self, *args: (runs.append(self.subject.label), record(self, *args))[1])
    gate.pytester.makepyfile(
        test_a="def test_a(kld): pass\ndef test_b(kld_candidate): pass", test_b="def test_c(kld, kld_reference): pass"
    )
    candidates = (gate.candidate, broken_dir)
    gate(f"--kld-cache-dir={tmp_path}", candidates=candidates).assert_outcomes(passed=6)
    assert runs == [str(path) for path in (gate.reference, *candidates)]


def test_engine_arguments_are_passed_on_and_are_part_of_the_cache_key(gate: Gate) -> None:
    gate.pytester.makeconftest("""
        import pytest, torch

        @pytest.fixture(scope="session")
        def kld_reference_args(): return {"attn_implementation": "eager"}

        @pytest.fixture(scope="session")
        def kld_candidate_args(): return {"dtype": torch.bfloat16}
    """)
    result = gate("--kld-json=report.json")
    result.assert_outcomes(passed=1)
    (about,) = (result["about"] for result in gate.results())
    assert about["reference"]["key"]["engine"]["arguments"] == {"attn_implementation": "eager"}
    assert about["candidate"]["key"]["engine"]["arguments"] == {"dtype": "torch.bfloat16"}


def test_arguments_overridden_for_a_part_of_the_tests_are_an_error_and_not_the_other_parts_figures(gate: Gate) -> None:
    for part in ("one", "two"):
        (gate.path / part).mkdir()
        (gate.path / part / f"test_{part}.py").write_text(f"def test_{part}(kld): pass")
    (gate.path / "one" / "conftest.py").write_text(
        "import pytest\n@pytest.fixture(scope='session')\ndef kld_candidate_args(): return {'torch_dtype': 'bfloat16'}"
    )
    result = gate()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ModelError: kld_candidate_args is overridden for some of the tests only*"])


def test_candidate_overridden_for_a_part_of_the_tests_has_its_own_figures(gate: Gate) -> None:
    for part in ("one", "two"):
        (gate.path / part).mkdir()
    (gate.path / "one" / "test_one.py").write_text("def test_same(kld): assert kld.max == 0")
    (gate.path / "two" / "test_two.py").write_text("def test_other(kld): assert kld.max > 0")
    (gate.path / "one" / "conftest.py").write_text(
        "import pytest\n@pytest.fixture(scope='session')\ndef kld_candidate(request, kld_reference):\n"
        "    return kld_reference"
    )
    gate().assert_outcomes(passed=2)


def test_windows_can_be_overridden_and_both_sides_run_on_them(gate: Gate) -> None:
    gate.pytester.makeconftest("""
        import dataclasses, pytest

        @pytest.fixture(scope="session")
        def kld_windows(kld_windows):
            return dataclasses.replace(kld_windows, token_ids=kld_windows.token_ids[:, :16].copy())
    """)
    gate.pytester.makepyfile("def test_short(kld): assert kld.summary.positions == 48")
    gate().assert_outcomes(passed=1)


def test_captures_can_be_overridden_with_ones_made_elsewhere(gate: Gate, tmp_path: Path) -> None:
    cache = f"--kld-cache-dir={tmp_path}"  # the common cache would also hold other tests' captures of these models
    gate(cache, "--kld-json=report.json")
    gate.pytester.makeconftest(
        """
        import pytest
        from pytest_kld.captures.capture import Capture

        def find(config, name):
            for path in config.cache_dir.glob("captures/*/capture.json"):
                capture = Capture.open(path.parent)
                key = capture.manifest["key"]
                usual = (key["store"], key["engine"]["dtype"], key["engine"]["arguments"]) == ("auto", "auto", {})
                if capture.name == name and capture.windows == 3 and usual:
                    if capture.manifest["protocol"]["window_size"] == 64:
                        return capture

        @pytest.fixture(scope="session")
        def kld_reference(kld_config): return find(kld_config, kld_config.ref.label)

        @pytest.fixture(scope="session", params=["mine"])
        def kld_candidate(kld_config, request): return find(kld_config, CANDIDATE)
    """.replace("CANDIDATE", repr(str(gate.candidate)))
    )
    gate.pytester.makepyfile(
        "def test_own(kld, kld_candidate): assert kld.scores.about['candidate']['digest'] == kld_candidate.digest"
    )
    result = gate(cache, "--kld-json=own.json", candidates=())
    result.assert_outcomes(passed=1)
    (own,), (usual,) = gate.results("own.json"), gate.results()
    assert own["figures"] == usual["figures"]
    assert own["candidate"] == "mine"


def test_parameters_of_an_overriding_fixture_take_the_place_of_the_options(gate: Gate) -> None:
    gate.pytester.makeconftest("""
        import pytest
        @pytest.fixture(scope="session", params=["a", "b"])
        def kld_candidate(request, kld_reference): return kld_reference
    """)
    gate.pytester.makepyfile("def test_own(kld): assert kld.max == 0")
    gate("-v").assert_outcomes(passed=2)


def test_tests_bring_their_own_candidates_by_indirect_parametrization(gate: Gate, broken_dir: Path) -> None:
    gate.pytester.makepyfile(f"""
        import pytest
        @pytest.mark.parametrize("kld_candidate", [{str(gate.candidate)!r}, {str(broken_dir)!r}], indirect=True)
        @pytest.mark.kld(max_mean=0.1)
        def test_own(): pass

        @pytest.mark.parametrize("kld_candidate", ["no such thing!"], indirect=True)
        def test_unknown(kld): pass

        @pytest.mark.parametrize("kld_candidate", [{str(gate.candidate)!r}])
        def test_direct(kld): pass
    """)
    result = gate(candidates=(gate.candidate,))
    result.assert_outcomes(passed=1, failed=1, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*ModelError: 'no such thing!': there is no directory*",
            "*ModelError: kld_candidate is *: parametrize it with*",
        ]
    )
    result.stdout.re_match_lines([rf"{gate.candidate} .*", rf"{broken_dir} .* FAIL "])


def test_a_model_gated_against_itself_differs_by_nothing(gate: Gate) -> None:
    gate.pytester.makepyfile(
        "def test_same(kld): assert kld.max == 0\ndef test_top1(kld): assert kld.top1_agreement == 1"
    )
    gate("--kld-max-max=0", candidates=(gate.reference,)).assert_outcomes(passed=2)
