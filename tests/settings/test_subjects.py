"""Subjects come from options, a test's parameters, and fixtures; one module makes them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_kld.errors import ModelError
from pytest_kld.settings.config import CONFIG
from pytest_kld.settings.subjects import Overrides, candidate_of, candidates_of, reference_of
from pytest_kld.subjects.subject import MOE_BACKEND

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate

FLAGS = ("--kld-engine=sglang", "--kld-ref-args=--tp 8", "--kld-candidate-args=--tp 4", "--kld-candidate-env=A=1")


def items_of(gate: Gate, *arguments: str) -> list[pytest.Item]:
    return gate.pytester.inline_genitems(
        f"--kld-ref={gate.reference}", f"--kld-candidate={gate.candidate}", *arguments
    )[0]


def test_options_make_the_subjects_of_both_sides(gate: Gate) -> None:
    config = gate.pytester.parseconfigure(
        f"--kld-ref={gate.reference}", f"--kld-candidate={gate.candidate}", *FLAGS
    ).stash[CONFIG]
    reference, (candidate,) = reference_of(config), candidates_of(config)
    assert (reference.name, reference.engine) == (str(gate.reference), "sglang")
    assert reference.arguments == {"args": ["--tp", "8"]}
    assert candidate.arguments == {"args": ["--tp", "4"]}
    assert candidate.environment == {"A": "1"}


def test_a_backend_of_the_options_is_an_axis_of_the_built_in_gate(gate: Gate) -> None:
    items = items_of(gate, *FLAGS, "--kld-moe-backend=triton", "--kld-moe-backend=cutlass")
    subjects = [candidate_of(item) for item in items]
    assert [subject.axes for subject in subjects] == [{MOE_BACKEND: "triton"}, {MOE_BACKEND: "cutlass"}]
    assert subjects[0].arguments == {"args": ["--tp", "4", "--moe-runner-backend", "triton"]}
    assert [item.name for item in items] == [f"test_kld[{subject.id}]" for subject in subjects]
    assert subjects[0].label == f"{gate.candidate} (triton)"


def test_a_model_whose_name_looks_like_a_label_with_a_backend_stays_whole(gate: Gate, tmp_path: Path) -> None:
    odd = tmp_path / "model (triton)"
    odd.symlink_to(gate.candidate, target_is_directory=True)
    gate.cache = f"--kld-cache-dir={tmp_path / 'cache'}"  # elsewhere captures are looked up by the original's name
    result = gate("--kld-json=report.json", candidates=(odd, gate.candidate))
    result.assert_outcomes(passed=2)
    subjects = [result["subjects"]["candidate"] for result in gate.results()]
    assert [(subject["name"], subject["axes"]) for subject in subjects] == [(str(odd), {}), (str(gate.candidate), {})]


def test_parameters_of_a_test_make_its_subject(gate: Gate) -> None:
    gate.pytester.makepyfile(f"""
        import pytest

        @pytest.mark.parametrize("kld_moe_backend", ["triton"], indirect=True)
        @pytest.mark.parametrize("kld_candidate", [{str(gate.reference)!r}], indirect=True)
        def test_own(kld): pass
    """)
    (item,) = gate.pytester.inline_genitems(f"--kld-ref={gate.reference}", *FLAGS)[0]
    subject = candidate_of(item)
    assert (subject.name, subject.axes) == (str(gate.reference), {MOE_BACKEND: "triton"})
    assert subject.arguments == {"args": ["--tp", "4", "--moe-runner-backend", "triton"]}


def test_fixtures_add_to_a_subject_by_role_and_by_name(gate: Gate) -> None:
    config = gate.pytester.parseconfigure(
        f"--kld-ref={gate.reference}", f"--kld-candidate={gate.candidate}", *FLAGS
    ).stash[CONFIG]
    overrides = Overrides(
        server_args={"candidate": ["--a"], str(gate.candidate): ["--b"], "reference": ["--c"]},
        server_env={"candidate": {"A": "2", "B": "3"}},
    )
    subject = overrides.apply(candidates_of(config)[0], "candidate", {MOE_BACKEND: "triton"})
    assert subject.arguments["args"] == ["--tp", "4", "--a", "--b", "--moe-runner-backend", "triton"]
    assert subject.environment == {"A": "2", "B": "3"}
    with pytest.raises(ModelError, match="kld_candidate_args is for the engine transformers"):
        Overrides(loading={"candidate": {"dtype": "float32"}}).apply(subject, "candidate")


def test_the_result_tells_what_was_run_fixtures_included(gate: Gate) -> None:
    gate.pytester.makeconftest("""
        import pytest

        @pytest.fixture(scope="session")
        def kld_candidate_args(): return {"attn_implementation": "eager"}
    """)
    gate("--kld-json=report.json").assert_outcomes(passed=1)
    (result,) = gate.results()
    assert result["subjects"]["candidate"]["arguments"] == {"attn_implementation": "eager"}
    assert result["subjects"]["reference"]["arguments"] == {}
    assert result["about"]["candidate"]["key"]["axes"] == {}
