"""Code from a model's repository: off by default, and named in every report if it was allowed to run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import Gate
from made import error_result, made_result

from pytest_kld.subjects.subject import Subject

REPORTS = ("--kld-json=r.json", "--kld-html=r.html", "--kld-markdown=r.md", "--kld-junit=r.xml", "--junitxml=j.xml")
NAMED = "every model and tokenizer (--kld-trust-remote-code)"
OWN_CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).with_name("ran").touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def words_of(gate: Gate, printed: str) -> dict[str, str]:
    """Return what the terminal and each report say."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in gate.path.glob("[rj].*")}
    assert len(texts) == len(REPORTS)
    return {"terminal": printed, **texts}


def test_every_report_names_what_was_trusted_and_none_does_without(gate: Gate) -> None:
    for options, named in (((), False), (("--kld-trust-remote-code",), True)):
        result = gate(*REPORTS, "--kld-max-mean=1", *options)
        assert result.ret == 0
        for where, text in words_of(gate, result.stdout.str()).items():
            assert (NAMED in text.replace("\n", " ")) == named, where
    note = f"code from the repository of {NAMED} was allowed to run"
    (told,) = json.loads((gate.path / "r.json").read_text())["results"]
    assert told["trust_remote_code"] is True
    assert note in told["notes"]
    for name in ("r.xml", "j.xml"):
        properties = {one.get("name"): one.get("value") for one in ElementTree.parse(gate.path / name).iter("property")}
        assert properties["kld_trust_remote_code"] == NAMED


@pytest.fixture
def model_with_code(gate: Gate, tmp_path: Path) -> Path:
    """The candidate as a model whose classes are in its own directory; if they are imported, a file appears."""
    model = Path(shutil.copytree(gate.candidate, tmp_path / "with-code"))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(OWN_CODE.replace("Path(__file__).with_name", f"Path({str(model)!r}).joinpath"))
    return model


@pytest.mark.slow
def test_code_of_a_model_runs_only_if_it_is_trusted_and_an_error_names_it_too(
    gate: Gate, model_with_code: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    cache = f"--kld-cache-dir={tmp_path / 'cache'}"
    result = gate(cache, candidates=(model_with_code,), subprocess=True)
    result.assert_outcomes(errors=1)
    assert not (model_with_code / "ran").exists()
    assert "--kld-trust-remote-code" in result.stdout.str()
    result = gate(*REPORTS, cache, "--kld-trust-remote-code", candidates=(model_with_code,), subprocess=True)
    assert (model_with_code / "ran").exists()
    for where, text in words_of(gate, result.stdout.str()).items():
        assert NAMED in text.replace("\n", " "), where


@pytest.mark.parametrize(
    "arguments",
    [
        {"trust_remote_code": True},
        {"args": ["--tp", "2", "--trust-remote-code"]},
        {"args": ["--trust_remote_code"]},
        {"args": ["--trust-remote-code=True"]},
        {"trust_remote_code": 1},
        {"trust-remote-code": "true"},
    ],
)
def test_a_side_that_trusts_its_model_is_named_even_if_it_was_not_measured(arguments: dict[str, Any]) -> None:
    result = error_result(Subject(name="m", arguments=arguments))
    assert result.trusted == ["m (trust_remote_code)"]
    assert "code from the repository of m (trust_remote_code) was allowed to run" in result.notes
    assert dict(result.properties())["kld_trust_remote_code"] == "m (trust_remote_code)"


@pytest.mark.parametrize(
    "arguments",
    [
        {"args": ["--tp", "2"]},
        {"trust_remote_code": False},
        {"trust_remote_code": "False"},
        {"args": ["--trust-remote-code=false", "--trust-remote-codes"]},
        {"revision": "--trust-remote-code"},
    ],
)
def test_nothing_is_named_that_trusts_nothing(arguments: dict[str, Any]) -> None:
    result = error_result(Subject(name="m", arguments=arguments))
    assert result.trusted == []
    assert "kld_trust_remote_code" not in dict(result.properties())


@pytest.mark.parametrize(
    "arguments",
    [
        [["--dtype", "float32"], ["--trust-remote-code"]],
        {"model_runner": "V1", "model_config.trust_remote_code": True},
        {"arguments": {"trust_remote_code": True, "tp_size": 1}},
    ],
    ids=["booted", "vLLM by URL", "SGLang by URL"],
)
def test_a_server_that_trusts_its_model_is_named_by_what_it_says_of_itself(arguments: Any) -> None:
    result = made_result("m")
    assert result.about is not None
    result.about["reference"]["key"] = {"engine": {"engine": "vllm", "arguments": arguments}}
    assert result.trusted == ["reference (trust_remote_code)"]
