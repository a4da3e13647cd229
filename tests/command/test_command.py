"""The command as a whole: help, exit codes, completion, what it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pytest_kld.command import cli, main


def commands(group: click.Group, *above: str) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found.append((*above, name))
        if isinstance(command, click.Group):
            found += commands(command, *above, name)
    return found


@pytest.mark.parametrize("path", commands(cli), ids=" ".join)
def test_every_command_has_help_in_sentences(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*path, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: pytest-kld {' '.join(path)}")
    context: click.Command = cli
    for name in path:
        assert isinstance(context, click.Group)
        context = context.commands[name]
    assert context.help
    assert context.help.strip().endswith((".", '"', ")"))
    for parameter in context.params:
        assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), parameter.name


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cash"]) == 2
    assert "No such command 'cash'" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "_PYTEST_KLD_COMPLETE" in capsys.readouterr().out


def test_bash_completes_sub_commands() -> None:
    asked = {"_PYTEST_KLD_COMPLETE": "bash_complete", "COMP_WORDS": "pytest-kld cache v", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest_kld.command"], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout == "plain,verify\n"


def test_patch_and_help_import_nothing_that_a_server_may_lack(tmp_path: Path) -> None:
    """`pip install --no-deps pytest-kld` in SGLang's image is enough: click comes with uvicorn."""
    code = (
        "import sys; from pytest_kld.command import main\n"
        "assert main(['--help']) == 0\n"
        "assert main(['patch', '--check', '--sglang', '.']) == 2\n"
        "print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.splitlines()[-1].split())
    lacking = {
        "torch",
        "numpy",
        "transformers",
        "safetensors",
        "filelock",
        "platformdirs",
        "jinja2",
        "pytest",
        "psutil",
    }
    assert not loaded & lacking
