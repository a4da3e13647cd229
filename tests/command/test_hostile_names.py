"""Names of directories, files and models cannot control the terminal or CI runner that shows the command's output."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Gate
from safetensors.torch import save_file
from sglang_cpu.releases import unpack

from pytest_kld.command import main

EVIL = "\x1b[31mred\u202egnp.\u2066\x9b1m##[error]\n::error::x"
SHOWN = EVIL.encode("unicode_escape").decode().replace("##[", r"\x23#[")
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
COMMANDS = re.compile(r"^\s*::|##\[|##vso\[", re.MULTILINE)


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A directory whose name turns a terminal red, reverses text and begins a line with a command to a CI runner."""
    path = tmp_path / EVIL
    path.mkdir()
    return path


class Shell:
    """Runs the command, and checks that what it prints is text and nothing else."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: str | Path, code: int = 0) -> str:
        self.capsys.readouterr()
        ended = main([str(word) for word in words])
        captured = self.capsys.readouterr()
        shown = captured.out + captured.err
        assert ended == code, ascii(shown)
        assert not CONTROLS.findall(shown), ascii(shown)
        assert not COMMANDS.findall(shown), ascii(shown)
        return shown


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def test_the_cache_commands_show_such_paths_as_escapes(gate: Gate, evil: Path, shell: Shell) -> None:
    cache, model = evil / "cache", shutil.copytree(gate.candidate, evil / "model")
    gate("--kld-max-mean=1", f"--kld-cache-dir={cache}", candidates=(model,)).assert_outcomes(passed=1)
    empty, here = f"--cache-dir={evil / 'none'}", f"--cache-dir={cache}"
    assert shell("cache", "path", here).endswith(f"{SHOWN}/cache\n")
    assert f"{SHOWN}/none holds no captures" in shell("cache", "ls", empty)
    assert f" in {evil.parent}/{SHOWN}/cache\n" in shell("cache", "ls", here)
    shell("cache", "ls", "--json", here)
    shell("cache", "verify", here)
    assert SHOWN in shell("cache", "verify", EVIL, here, code=2)
    capture = next(path.name for path in (cache / "captures").iterdir() if (path / "capture.json").is_file())
    archive = evil / "captures.tar"
    assert f"in {evil.parent}/{SHOWN}/captures.tar" in shell("cache", "export", archive, capture, here)
    shell("cache", "import", archive, "--check", empty)
    shell("cache", "import", archive, empty)
    archive.write_bytes(b"no archive")
    assert SHOWN[:12] in shell("cache", "import", archive, empty, code=2)
    shell("cache", "prune", "--unused-for=0", "--dry-run", here)
    shell("cache", "prune", f"--to={EVIL}", here, code=2)
    (cache / "captures" / capture / "capture.json").write_text("{}")
    shell("cache", "verify", here, code=1)


def test_init_shows_such_paths_as_escapes(evil: Path, shell: Shell) -> None:
    assert f"wrote {evil.parent}/{SHOWN}/release.kld.toml" in shell("init", evil)
    shell("init", evil, code=2)
    shell("init", evil, f"--max-mean={EVIL}", code=2)
    shell("init", evil / "release.kld.toml" / "below", code=2)


def test_patch_shows_such_paths_as_escapes(evil: Path, shell: Shell) -> None:
    unpack("0.5.9", evil / "site-packages")
    sglang = f"--sglang={evil / 'site-packages'}"
    for action, code in (("check", 1), ("apply", 0), ("apply", 0), ("check", 0), ("revert", 0), ("revert", 0)):
        assert f"{evil.parent}/{SHOWN}/" in shell("patch", f"--{action}", sglang, code=code)
    shell("patch", "--check", f"--sglang={evil}", code=2)


def test_baseline_shows_such_names_as_escapes(gate: Gate, evil: Path, shell: Shell) -> None:
    model = shutil.copytree(gate.candidate, evil / "model")
    report, failed, held = evil / "report.json", evil / "failed.json", evil / "held"
    gate(f"--kld-json={report}", "--kld-max-mean=1", f"--kld-cache-dir={evil / 'cache'}", candidates=(model,))
    gate(f"--kld-json={failed}", "--kld-max-mean=0", f"--kld-cache-dir={evil / 'cache'}", candidates=(model,))
    assert f"{evil.parent}/{SHOWN}/held" in shell("baseline", "promote", report, held)
    shell("baseline", "promote", report, held, f"--only={EVIL}", code=2)
    shell("baseline", "promote", failed, held, code=2)
    shell("baseline", "promote", report, report / "below", code=2)
    shell("baseline", "list", held)
    shell("baseline", "list", "--json", held)
    (evil / "empty").mkdir()
    assert "holds no baselines" in shell("baseline", "list", evil / "empty")
    shell("baseline", "show", held, str(model))
    shell("baseline", "show", held, EVIL, code=2)
    shell("baseline", "diff", report, held)
    shell("baseline", "diff", report, held, f"--max-regression={EVIL}", code=2)
    shell("baseline", "diff", report, evil / "model", code=1)


def test_import_logprobs_shows_such_paths_as_escapes(reference_dir: Path, evil: Path, shell: Shell) -> None:
    original = evil / "original"
    original.mkdir()
    for window in range(2):
        log_probs = torch.randn(64, 1024).log_softmax(-1)
        save_file({"log_probs": log_probs}, original / f"{window}.safetensors")
    options = ["--dataset=python-docs", "--windows=2", "--window-size=64", "--stride=32"]
    options += [f"--cache-dir={evil / 'cache'}", f"--name={EVIL}"]
    assert f"{evil.parent}/{SHOWN}/cache/captures/" in shell(
        "import-logprobs", original, f"--tokenizer={reference_dir}", *options
    )
    shell("import-logprobs", original, f"--tokenizer={evil}", *options, code=2)
    shell("import-logprobs", evil, f"--tokenizer={reference_dir}", *options, code=2)
