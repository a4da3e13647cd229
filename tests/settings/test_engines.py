"""Which engine runs which side, and which options it takes: told before anything boots."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from conftest import Gate

from pytest_kld.settings import engines

SIDES = ("--kld-engine=sglang", "--kld-candidate-engine=vllm")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The served engines that are found here."""
    names: set[str] = set()
    monkeypatch.setattr(engines, "find_spec", lambda name: ModuleSpec(name, None) if name in names else None)
    return names


def subjects(gate: Gate, *options: str, candidates: tuple[Path | str, ...] | None = None) -> dict[str, Any]:
    """Return what a session would run."""
    gate.pytester.makeconftest("""
        import json
        from pytest_kld.settings.config import CONFIG
        from pytest_kld.settings.subjects import candidates_of, reference_of

        def pytest_collection_finish(session):
            config = session.config.stash[CONFIG]
            found = {"reference": reference_of(config), "candidates": candidates_of(config)}
            (session.config.rootpath / "subjects.json").write_text(json.dumps(found, default=lambda s: s.to_json()))
    """)
    result = gate("--collect-only", "-q", *options, candidates=candidates)
    assert result.ret == pytest.ExitCode.OK, result.errlines
    import json

    found: dict[str, Any] = json.loads((gate.path / "subjects.json").read_text())
    found["ids"] = [line for line in result.outlines if "::" in line]
    return found


def refusal(gate: Gate, *options: str) -> str:
    result = gate(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line.startswith("ERROR")]
    return line


@pytest.mark.parametrize("name", ["sglang", "vllm"])
def test_auto_is_the_engine_that_is_installed(gate: Gate, installed: set[str], name: str) -> None:
    installed.add(name)
    found = subjects(gate)
    assert [found["reference"]["engine"], found["candidates"][0]["engine"]] == [name, name]


def test_auto_is_the_engine_whose_command_is_given(gate: Gate, installed: set[str]) -> None:
    installed.update(("sglang", "vllm"))
    found = subjects(gate, "--kld-vllm-command=/opt/py -m vllm.entrypoints.openai.api_server")
    assert found["reference"]["engine"] == "vllm"


def test_two_installed_engines_and_none_named_is_a_usage_error(gate: Gate, installed: set[str]) -> None:
    installed.update(("sglang", "vllm"))
    said = refusal(gate)
    assert said.startswith("ERROR: --kld-engine: sglang and vllm can run the models, since both are installed")
    assert "--kld-engine=sglang or --kld-engine=vllm" in said


def test_a_session_without_a_gate_does_not_mind_two_engines(gate: Gate, installed: set[str]) -> None:
    installed.update(("sglang", "vllm"))
    gate.pytester.makepyfile("def test_else(): pass")
    gate.pytester.makeini(f"[pytest]\nkld_ref = {gate.reference}\nkld_candidate = {gate.candidate}")
    gate.pytester.runpytest_inprocess().assert_outcomes(passed=1)


def test_a_running_server_of_an_unknown_engine_is_a_usage_error(gate: Gate, installed: set[str]) -> None:
    assert not installed
    said = refusal(gate, "--kld-ref-url=http://127.0.0.1:1", "--kld-capture-dir=spool")
    assert said.startswith("ERROR: --kld-engine: name the engine of the servers that are given by URL")


def test_each_side_s_flags_are_checked_by_its_engine(gate: Gate) -> None:
    subjects(gate, *SIDES, "--kld-ref-args=--tp 8", "--kld-candidate-args=-tp 8")
    assert "--kld-ref-args: --model-path cannot be given" in refusal(gate, *SIDES, "--kld-ref-args=--model-path x")
    said = refusal(gate, *SIDES, "--kld-candidate-args=--headless")
    assert "--kld-candidate-args: --headless cannot be given: servers of several nodes" in said


@pytest.mark.parametrize("option", ["--kld-ref-args=--tp 8", "--kld-candidate-args=--tp 8", "--kld-ref-env=A=1"])
def test_flags_for_an_engine_without_servers_are_a_usage_error(gate: Gate, option: str) -> None:
    said = refusal(gate, "--kld-engine=transformers", option)
    assert said.startswith(f"ERROR: {option.partition('=')[0]}: transformers runs no server")


def test_moe_backends_need_servers(gate: Gate) -> None:
    said = refusal(gate, "--kld-engine=sglang", "--kld-candidate-engine=transformers", "--kld-moe-backend=triton")
    assert said.startswith("ERROR: --kld-moe-backend needs servers")


def test_flags_for_candidates_in_two_engines_with_servers_are_a_usage_error(gate: Gate) -> None:
    engines = ("--kld-engine=sglang", "--kld-candidate-engine=sglang", "--kld-candidate-engine=vllm")
    said = refusal(gate, *engines, "--kld-candidate-args=--tp 8")
    assert "the candidates run in sglang and vllm, which take different flags" in said
    assert "kld_server_args" in said


def test_another_engine_for_the_candidates_is_an_axis(gate: Gate) -> None:
    found = subjects(gate, *SIDES, "--kld-candidate-engine=sglang", candidates=(gate.reference,))
    assert (found["reference"]["engine"], found["reference"]["axes"]) == ("sglang", {})
    assert [(one["engine"], one["axes"]) for one in found["candidates"]] == [
        ("vllm", {"engine": "vllm"}),
        ("sglang", {"engine": "sglang"}),
    ]
    assert found["ids"] == [f"kld::test_kld[{gate.reference}-{engine}]" for engine in ("vllm", "sglang")]


def test_without_the_option_candidates_have_no_axis(gate: Gate) -> None:
    (candidate,) = subjects(gate, "--kld-engine=vllm")["candidates"]
    assert (candidate["engine"], candidate["axes"]) == ("vllm", {})


def test_one_checkpoint_in_two_engines_is_gated_and_the_captures_are_those_of_either_engine_alone(gate: Gate) -> None:
    """Here the second engine is the first: what differs is only how it was asked for."""
    same = gate("--kld-engine=transformers", candidates=(gate.reference,))
    same.assert_outcomes(passed=1)
    asked = gate(
        "--kld-engine=transformers", "--kld-candidate-engine=transformers", "-rA", candidates=(gate.reference,)
    )
    asked.assert_outcomes(passed=1)
    assert "capturing" not in asked.stdout.str()
    asked.stdout.fnmatch_lines([f"*{gate.reference} (transformers)*pass*"])
