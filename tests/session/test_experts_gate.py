"""Gates of models with experts: the limit, the note, the section in every report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest
from conftest import TINY
from transformers import Llama4TextConfig, Qwen3MoeConfig

if TYPE_CHECKING:
    from conftest import Gate, MakeModel

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def moe(make_model: MakeModel) -> Path:
    config = Qwen3MoeConfig(
        **TINY, num_experts=200, num_experts_per_tok=2, moe_intermediate_size=8, tie_word_embeddings=False
    )
    return make_model("moe-gate", config)


def test_experts_that_no_token_met_are_reported_and_can_fail_a_gate(gate: Gate, moe: Path) -> None:
    gate.reference = moe
    reports = (
        "--kld-json=report.json",
        "--kld-html=report.html",
        "--kld-junit=report.xml",
        "--kld-windows=1",
        "--kld-markdown=r.md",
    )
    result = gate(*reports, "--kld-min-experts-seen=1", candidates=(moe,))
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "*FAIL  share of experts met 0.* < min_experts_seen 1 *",
            "What this gate saw:",
            "  prefill: 64 in 1 window *",
            "  Experts of the candidate: * of 400 met, *",
            "  not seen: no decoding; * of 400 experts never met (layer:expert *",
            "note: *experts were never met*",
        ]
    )
    report = json.loads((gate.path / "report.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    (told,) = report["results"]
    seen = told["saw"]["experts"]["candidate"]
    assert told["figures"]["experts_seen"] == 1 - seen["never"] / 400
    assert 0 < seen["never"] == sum(len(layer["never"]) for layer in seen["layers"])
    assert told["saw"]["paths"] == ["prefill"]
    html = (gate.path / "report.html").read_text(encoding="utf-8")
    assert "What this gate saw" in html
    assert f"{seen['never']} of 400 experts never met" in html
    assert f"{seen['never']} of 400 experts never met" in (gate.path / "r.md").read_text(encoding="utf-8")
    assert "min_experts_seen" in (gate.path / "report.xml").read_text(encoding="utf-8")
    result = gate("--kld-windows=1", candidates=(moe,))  # without the limit
    assert result.ret == 0
    result.stdout.fnmatch_lines(["note: *experts were never met*"])


@pytest.mark.slow
def test_rounds_go_on_while_more_text_may_meet_more_experts(gate: Gate, moe: Path) -> None:
    gate.reference = moe
    options = ("--kld-windows=auto:28", "--kld-window-size=16", "--kld-stride=16", "--kld-min-experts-seen=1")
    result = gate(*options, "--kld-max-cut-mass=1", candidates=(moe,))
    result.stdout.fnmatch_lines(["*, 7 windows: fail", "*, 14 windows: fail", "*, 28 windows: fail"])
    assert result.ret == 1


def test_a_limit_on_experts_of_a_dense_model_is_an_error(gate: Gate) -> None:
    result = gate("--kld-min-experts-seen=0.5", f"--kld-cache-dir={gate.path / 'cache'}")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*--kld-min-experts-seen: *candidate* is dense: it has no experts to meet*"])


def test_a_marker_that_limits_experts_of_a_dense_model_is_an_error(gate: Gate) -> None:
    gate.pytester.makepyfile(
        """
        import pytest

        @pytest.mark.kld(min_experts_seen=0)
        def test_gate():
            pass
        """
    )
    result = gate("--kld-max-mean=1")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*min_experts_seen cannot be checked: the candidate is dense, or *"])


def test_a_model_that_does_not_show_its_experts_passes_with_a_note_but_not_with_a_limit(
    gate: Gate, make_model: MakeModel
) -> None:
    config = Llama4TextConfig(
        **TINY, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=32, tie_word_embeddings=False
    )
    gate.reference = model = make_model("llama4-gate", config)
    result = gate("--kld-windows=1", candidates=(model,))
    assert result.ret == 0
    result.stdout.fnmatch_lines(["note: *which experts it used is unknown: no module of Llama4ForCausalLM shows*"])
    result = gate("--kld-windows=1", "--kld-min-experts-seen=0", candidates=(model,))
    result.assert_outcomes(errors=1)
