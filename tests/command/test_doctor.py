"""`pytest-kld doctor`: what it finds on this machine, and which known issues it names for which model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from nvidia_smi import put_on_path
from transformers import Qwen3_5MoeConfig, Qwen3Config

from pytest_kld.command import main

if TYPE_CHECKING:
    from sglang_cpu.environment import SGLangEnvironment

AWQ = {"quant_method": "awq", "modules_to_not_convert": ["model.layers.0."]}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_KLD_SAVE_DIR", raising=False)


def diagnosed(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    capsys.readouterr()
    code = main(["doctor", "--json", "--offline", "--cache-dir", str(tmp_path / "cache"), *arguments])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return code, found


def model(path: Path, config: Any, **changes: Any) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**config.to_dict(), **changes}))
    return str(path)


def named(found: list[dict[str, Any]], about: str) -> set[str]:
    return {finding["what"].partition(":")[0] for finding in found if finding["about"] == about}


def test_a_plain_model_on_this_machine_has_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = model(tmp_path / "plain", Qwen3Config())
    code, found = diagnosed(capsys, tmp_path, plain)
    assert code == 0
    assert named(found, plain) == {"no known issue applies"}
    assert {"versions", "SGLang", "vLLM", "GPUs", "cache"} <= {finding["about"] for finding in found}
    assert not (tmp_path / "cache").exists()
    (versions,) = [finding["what"] for finding in found if finding["about"] == "versions"]
    assert f"Python {sys.version_info[0]}.{sys.version_info[1]}" in versions


@pytest.mark.parametrize(
    ("changes", "gpu", "expected", "code"),
    [
        ({}, "9.0", {"vision-language vocabulary"}, 0),
        ({}, "12.0", {"vision-language vocabulary", "hybrid attention on Blackwell (SM120)"}, 1),
        (
            {"quantization_config": AWQ},
            "9.0",
            {"vision-language vocabulary", "AWQ with experts that are not quantized"},
            1,
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "9.0", {"vision-language vocabulary"}, 0),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "9.0",
            {"vision-language vocabulary", "compressed-tensors with linear attention"},
            1,
        ),
    ],
)
def test_known_issues_of_qwen3_5_are_named_where_they_apply(
    changes: dict[str, Any],
    gpu: str,
    expected: set[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_on_path(tmp_path, monkeypatch, gpu)
    path = model(tmp_path / "qwen", Qwen3_5MoeConfig(), **changes)
    got, found = diagnosed(capsys, tmp_path, path)
    assert named(found, path) == expected
    assert got == code
    assert all(finding["fix"] for finding in found if finding["about"] == path)


def test_the_variable_of_the_original_patch_is_a_problem_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SGLANG_KLD_SAVE_DIR", "/tmp/kld")
    code, found = diagnosed(capsys, tmp_path, model(tmp_path / "plain", Qwen3Config()))
    assert code == 1
    assert named(found, "this machine") == {"the original capture patch is active"}


def test_an_engine_that_is_not_where_its_command_looks_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"--sglang-command={sys.executable} -m sglang.launch_server"
    code, found = diagnosed(capsys, tmp_path, command)
    (engine,) = [finding for finding in found if finding["about"] == "SGLang"]
    assert (code, engine["state"]) == (1, "problem")
    assert "has no SGLang" in engine["what"]


def test_a_model_that_cannot_be_read_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model(tmp_path / "damaged", Qwen3Config())
    (tmp_path / "damaged" / "config.json").write_text("[]")
    code, found = diagnosed(capsys, tmp_path, path, "nobody/has-this")
    assert code == 1
    assert named(found, path) == named(found, "nobody/has-this") == {"its config.json cannot be read"}
    assert main(["doctor", "--offline", "not a name"]) == 2


@pytest.mark.slow
@pytest.mark.sglang
def test_the_real_sglang_is_asked_for_its_hook(
    environment: SGLangEnvironment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.variables.items():
        monkeypatch.setenv(name, value)
    command = f"--sglang-command={environment.python} -m sglang.launch_server"
    _, found = diagnosed(capsys, tmp_path, command)
    (engine,) = [finding for finding in found if finding["about"] == "SGLang"]
    assert engine["state"] == "ok", engine
    assert "the hook is in place; sglang 0." in engine["what"]
