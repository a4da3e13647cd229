"""Names and messages from outside are shown, but cannot control the terminal or the page that shows them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

if TYPE_CHECKING:
    from conftest import Gate

EVIL = "\x1b[31mred\x1b]0;title\x07\u202egnp.\u2066\u200b\x9b1m\u2028"
SHOWN = EVIL.encode("unicode_escape").decode()
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
REPORTS = ("--kld-json=report.json", "--kld-junit=report.xml", "--kld-html=report.html", "--junitxml=out.xml")


@pytest.fixture
def evil_dir(gate: Gate, tmp_path: Path) -> Path:
    """The candidate under a name that turns a terminal red, reverses text and hides some."""
    gate.cache = f"--kld-cache-dir={tmp_path / 'cache'}"  # elsewhere captures are looked up by the original's name
    return Path(shutil.copytree(gate.candidate, tmp_path / f"model{EVIL}"))


def controls_in(gate: Gate, *arguments: str, candidate: Path, reference: Path | None = None) -> tuple[int, str]:
    """Gate in a separate process with colours; check that no control characters are shown.

    Returns:
        The exit code and what was printed.

    """
    options = [f"--kld-ref={reference or gate.reference}", f"--kld-candidate={candidate}", *gate.protocol, gate.cache]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *REPORTS, "-rA", "-vv", *arguments],
        cwd=gate.path,
        capture_output=True,
        check=False,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(gate.path),
            "PYTHONUTF8": "1",
            "PYTHONPATH": ":".join(sys.path),
            "OMP_NUM_THREADS": "1",
        },
    )
    shown = (ran.stdout + ran.stderr).decode()
    assert not CONTROLS.findall(shown), CONTROLS.sub(lambda match: ascii(match[0]), shown)
    for name in ("report.json", "report.xml", "report.html", "out.xml"):
        if (gate.path / name).is_file():
            text = (gate.path / name).read_text(encoding="utf-8").partition("<script>")[0]  # the libraries are not ours
            assert not CONTROLS.findall(text), name
    return ran.returncode, shown


@pytest.mark.parametrize("limit", ["1", "1e-9"])
def test_control_characters_in_a_models_name_are_spelled_out(gate: Gate, evil_dir: Path, limit: str) -> None:
    code, shown = controls_in(gate, f"--kld-max-mean={limit}", candidate=evil_dir, reference=evil_dir.parent / "ref")
    assert code == pytest.ExitCode.USAGE_ERROR  # the reference, beside the evil directory, does not exist
    code, shown = controls_in(gate, f"--kld-max-mean={limit}", f"--kld-cache-dir={gate.path}/c", candidate=evil_dir)
    assert code == (limit == "1e-9")
    table = shown.partition("KLD Evaluation Results")[2]
    assert f"model{SHOWN} " in table
    assert f"kld: capture {evil_dir.parent}/model{SHOWN}: 3/3 windows" in shown
    if code:
        assert re.search(
            rf"KLD limits exceeded: {re.escape(str(evil_dir.parent))}/model{re.escape(SHOWN)} against", shown
        )
    (suite,) = ElementTree.parse(gate.path / "report.xml").getroot()
    assert suite.get("name") == f"{evil_dir.parent}/model{SHOWN}"
    assert gate.results()[0]["candidate"] == str(evil_dir)  # JSON does its own escaping, and programs get the real name
    assert f"model{SHOWN}" in (gate.path / "report.html").read_text()


@pytest.mark.slow
def test_control_characters_in_what_a_test_asserts_are_spelled_out(gate: Gate, evil_dir: Path) -> None:
    gate.pytester.makepyfile("""
        def test_assert(kld):
            print(kld.candidate)
            assert kld.mean < 1e-9
        def test_raise(kld): raise RuntimeError(kld.candidate)
        def test_repr(kld): assert not kld
    """)
    code, shown = controls_in(gate, candidate=evil_dir)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert f"mean KLD of {evil_dir.parent}/model{SHOWN} against" in shown
    assert f"RuntimeError: {evil_dir.parent}/model{SHOWN[:30]}" in shown  # pytest ends the line at U+2028


@pytest.mark.slow
@pytest.mark.parametrize("field", ["architectures", "model_type", "quantization_config", "torch_dtype"])
def test_control_characters_in_config_json_are_spelled_out(gate: Gate, tmp_path: Path, field: str) -> None:
    gate.cache = f"--kld-cache-dir={tmp_path / 'cache'}"
    model = Path(shutil.copytree(gate.candidate, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config.pop("dtype", None)
    config[field] = {
        "architectures": [EVIL],
        "quantization_config": {"quant_method": EVIL},
    }.get(field, EVIL)
    (model / "config.json").write_text(json.dumps(config))
    controls_in(gate, candidate=model)
    (result,) = gate.results()
    assert result["candidate"] == str(model)


def test_control_characters_in_a_dataset_and_its_name_are_spelled_out(gate: Gate, tmp_path: Path) -> None:
    text = tmp_path / f"text{EVIL}.txt"
    text.write_text(f"{EVIL} and more of it. " * 200, encoding="utf-8")
    code, shown = controls_in(gate, f"--kld-dataset={text}", "--kld-max-mean=1e-9", candidate=gate.candidate)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert f"text{SHOWN}.txt" in shown
    assert "kld diagnosis" in shown


def test_control_characters_in_a_usage_error_are_spelled_out(gate: Gate, tmp_path: Path) -> None:
    (tmp_path / EVIL).mkdir()
    code, shown = controls_in(gate, candidate=tmp_path / EVIL)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: --kld-candidate: {tmp_path}/{SHOWN} is neither a model directory" in shown


def test_words_of_a_suite_and_of_a_text_are_no_commands_to_a_ci_runner(gate: Gate, tmp_path: Path) -> None:
    """A reason begins a line of the summary with one, and the worst positions quote the text."""
    words = f"{EVIL}\n::error::x\n##[error]y"
    (tmp_path / "text.txt").write_text("and ##[error]z of it. " * 300)
    candidates = "".join(
        f"[[candidate]]\nname = {json.dumps(name + words)}\nmodel = {json.dumps(str(gate.candidate))}\n"
        f"{mark} = {json.dumps('since ' + words)}\n"
        for name, mark in (("a", "xfail"), ("b", "skip"))
    )
    suite = (
        f"[reference]\nmodel = {json.dumps(str(gate.reference))}\n"
        f"[protocol]\ndataset = {json.dumps(str(tmp_path / 'text.txt'))}\nwindows = 2\nwindow_size = 64\nstride = 32\n"
        f"[limits]\nmax_mean = 0.0\n{candidates}"
        f"[[candidate]]\nname = {json.dumps('c' + words)}\nmodel = {json.dumps(str(gate.candidate))}\n"
    )
    (gate.path / "evil.kld.toml").write_text(suite)
    run = gate.pytester.runpytest_inprocess("evil.kld.toml", "-rA", "-vv", gate.cache, "--junitxml=out.xml")
    run.assert_outcomes(failed=1, skipped=1, xfailed=1)
    shown = run.stdout.str()
    assert "kld diagnosis" in shown
    assert not CONTROLS.findall(shown + (gate.path / "out.xml").read_text(encoding="utf-8"))
    assert re.findall(r"^\s*::.*|.*##\[.*", shown, re.MULTILINE) == []
